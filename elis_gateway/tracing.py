"""OpenTelemetry spans: one per job, its slices as children. The only module that imports opentelemetry (extra `otel`).

Knows: W3C trace context, which facts of a job become attributes. Never: being imported where tracing is off; prompts,
answers and keys do not get into spans.

A client's ``traceparent`` is the job's parent; the engine is sent its slice's own, so that an engine that traces too
shows up under the right slice. Times are the loop's, so that spans agree with logs and metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from elis_gateway import __version__, config
from elis_gateway.core.job import Outcome
from elis_gateway.core.slice import SliceEnd
from elis_gateway.flight import Flight, Leg, Observer

__all__ = ["Tracer"]

_CONTEXT = TraceContextTextMapPropagator()
_BROKEN = (SliceEnd.INTERRUPTED, SliceEnd.FAILED)
_NS = 1e9


class _Trace:
    """A job's spans: its own, and that of the slice in flight."""

    __slots__ = ("context", "job", "slice")

    def __init__(self, job: Span) -> None:
        self.job = job
        self.context = set_span_in_context(job)
        self.slice: Span | None = None


def _sink(section: config.Tracing) -> SpanProcessor:
    """Takes the spans: to a collector, in batches, from a thread of its own."""
    endpoint = None if section.endpoint is None else section.endpoint.rstrip("/") + "/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class Tracer(Observer):
    """Makes the spans. ``epoch``: what to add to the loop's time to get the time of day, in seconds."""

    def __init__(self, section: config.Tracing, *, clock: Callable[[], float], epoch: float) -> None:
        """``clock``: the loop's time."""
        resource = Resource.create({"service.name": section.service, "service.version": __version__})
        sampler = ParentBasedTraceIdRatio(section.sample)
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        self._provider.add_span_processor(_sink(section))
        self._tracer = self._provider.get_tracer("elis_gateway", __version__)
        self._clock = clock
        self._epoch = epoch

    def close(self) -> None:
        """Send what is left; may take seconds where the collector does not answer."""
        self._provider.shutdown()

    def parent(self, headers: Mapping[str, str]) -> Context | None:
        """The trace that a client's request belongs to, if it says so."""
        if "traceparent" not in headers:
            return None
        # The propagator looks names up as they are written here; a header's name may come in any case.
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return _CONTEXT.extract(given)

    def _ns(self, at: float) -> int:
        return int((at + self._epoch) * _NS)

    # --- told ----------------------------------------------------------------------------------------------------

    def submitted(self, flight: Flight) -> None:
        """A request was taken."""
        spec = flight.spec
        span = self._tracer.start_span(
            f"job {spec.model}",
            context=flight.trace if isinstance(flight.trace, Context) else Context(),
            kind=SpanKind.SERVER,
            start_time=self._ns(self._clock()),
            attributes={
                "elis.job": spec.id,
                "elis.class": flight.class_name,
                "http.route": flight.request.route,
                "gen_ai.request.model": spec.model,
                "elis.sliceable": spec.sliceable,
            },
        )
        flight.trace = _Trace(span)

    def slice_began(self, flight: Flight, upstream: str) -> None:
        """An upstream call is about to be made."""
        trace = flight.trace
        if not isinstance(trace, _Trace):
            return
        span = trace.slice = self._tracer.start_span(
            f"slice {upstream}",
            context=trace.context,
            kind=SpanKind.CLIENT,
            start_time=self._ns(self._clock()),
            attributes={"elis.upstream": upstream},
        )
        headers: dict[str, str] = {}
        _CONTEXT.inject(headers, set_span_in_context(span))
        flight.headers = headers

    def slice_ended(self, flight: Flight, leg: Leg) -> None:
        """An upstream call is over."""
        trace = flight.trace
        if not isinstance(trace, _Trace) or trace.slice is None:
            return
        span, trace.slice = trace.slice, None
        span.set_attributes({"elis.tokens": leg.tokens, "elis.end": leg.end, "elis.continued": leg.continued})
        if leg.first_token is not None:
            span.add_event("first token", timestamp=self._ns(leg.first_token))
        if leg.end in _BROKEN:
            span.set_status(Status(StatusCode.ERROR, leg.cause))
        span.end(self._ns(leg.ended))

    def finished(self, flight: Flight) -> None:
        """A job is over."""
        trace, job = flight.trace, flight.job
        if not isinstance(trace, _Trace) or job is None or job.outcome is None or job.finished is None:
            return
        span = trace.job
        span.set_attributes(
            {
                "elis.outcome": job.outcome,
                "elis.queue_wait": job.waited,
                "elis.slices": job.slices,
                "elis.preemptions": job.preemptions,
                "gen_ai.usage.output_tokens": job.attained,
            }
        )
        if job.cause:
            span.set_attribute("elis.cause", job.cause)
        if flight.first_estimate is not None:
            span.set_attribute("elis.first_estimate", flight.first_estimate.remaining)
        if job.first_token is not None:
            span.add_event("first token", timestamp=self._ns(job.first_token))
        if job.outcome not in (Outcome.COMPLETED, Outcome.CANCELLED):
            span.set_status(Status(StatusCode.ERROR, job.cause))
        span.end(self._ns(job.finished))
