"""What happened, as Prometheus series. The only module that imports prometheus_client. Never: decisions.

Facts come in through the observer's methods, derived from job timestamps, so that live and simulated runs report the
same quantities. They are kept in plain counters and arrays (about a microsecond per fact) and become series only when
someone asks for them. ``SERIES`` is the one list of what is exported; docs/metrics.md is tested against it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from elis_gateway import __version__
from elis_gateway.core.job import Outcome
from elis_gateway.core.slice import SliceEnd
from elis_gateway.flight import Flight, Leg, Observer

__all__ = ["SERIES", "Gauge", "Metrics"]


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_SHORT = (1e-5, 1e-4, 1e-3, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_TOKENS = (1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)
_COUNTS = (1, 2, 3, 5, 10, 20, 50, 100)
_WINDOW, _INTERRUPTED = SliceEnd.WINDOW, SliceEnd.INTERRUPTED


class Series(NamedTuple):
    """One exported series: its kind, labels, buckets where it is a histogram, and what it means."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


SERIES = (
    Series("elis_jobs_total", "counter", ("model", "class", "outcome"), "Jobs that are over."),
    Series(
        "elis_jct_seconds", "histogram", ("model",), "Job completion time: arrival to end, completed jobs.", _SECONDS
    ),
    Series("elis_ttft_seconds", "histogram", ("model",), "Arrival to the first token.", _SECONDS),
    Series(
        "elis_tpot_seconds", "histogram", ("model",), "Time per output token after the first, waits included.", _SHORT
    ),
    Series(
        "elis_itl_seconds",
        "histogram",
        ("model",),
        "Between two arrivals of one answer's tokens, seams and waits included.",
        _GAPS,
    ),
    Series("elis_queue_wait_seconds", "histogram", ("model",), "Time a job spent waiting for slots, in all.", _SECONDS),
    Series("elis_answer_tokens", "histogram", ("model",), "Length of completed answers.", _TOKENS),
    Series("elis_tokens_total", "counter", ("model",), "Answer tokens received and kept."),
    Series("elis_windows_total", "counter", ("model",), "Windows of tokens that have arrived."),
    Series("elis_slices_per_job", "histogram", ("model",), "Upstream calls a job took.", _COUNTS),
    Series("elis_preemptions_total", "counter", ("model",), "Calls ended early because another job deserved the slot."),
    Series("elis_slices_total", "counter", ("upstream", "end"), "Upstream calls by how they ended."),
    Series("elis_upstream_errors_total", "counter", ("upstream", "cause"), "Upstream calls that failed."),
    Series("elis_failovers_total", "counter", ("upstream",), "Calls broken there whose job went on in another call."),
    Series("elis_refusals_total", "counter", ("reason",), "Requests answered with an error, by its code."),
    Series("elis_seam_gap_seconds", "histogram", ("upstream",), "Sending a continuation to its first token.", _GAPS),
    Series(
        "elis_first_token_seconds", "histogram", ("upstream",), "Sending a first call to its first token.", _SECONDS
    ),
    Series("elis_estimates_total", "counter", ("model",), "Estimates made."),
    Series("elis_estimate_seconds", "histogram", (), "Time an estimate took.", _SHORT),
    Series(
        "elis_estimate_error_tokens", "histogram", ("model",), "First estimate against the answer, absolute.", _TOKENS
    ),
    Series(
        "elis_estimates_missed_total",
        "counter",
        ("model", "reason"),
        "Estimates that were asked for and are not there: `late`, `failed` or `absurd`.",
    ),
    Series(
        "elis_prompts_total",
        "counter",
        ("result",),
        "Prompts by what became of encoding them: `encoded`, `cached`, `shed` (the encoder was busy) or `failed`.",
    ),
    Series("elis_estimate_mae_tokens", "gauge", ("model",), "Mean absolute error of recent estimates; model `*`: all."),
    Series("elis_estimate_bias_tokens", "gauge", ("model",), "Mean of estimated less true, recent estimates."),
    Series(
        "elis_estimate_coverage",
        "gauge",
        ("model",),
        "Share of truths within bounds meant for four of five; NaN: none were named.",
    ),
    Series(
        "elis_estimate_tau",
        "gauge",
        ("model", "predictor"),
        "Kendall's tau of recent estimates and of history's with the truth; model `*`: all together.",
    ),
    Series(
        "elis_estimate_trusted",
        "gauge",
        ("model",),
        "0: history orders recent answers better and is used (never for `elis-paper`).",
    ),
    Series("elis_jobs_live", "gauge", (), "Jobs that are not over."),
    Series("elis_jobs_waiting", "gauge", (), "Jobs waiting for a slot."),
    Series("elis_longest_wait_seconds", "gauge", (), "How long the job waits that has waited longest."),
    Series("elis_slices_running", "gauge", ("upstream",), "Upstream calls in flight."),
    Series("elis_slots", "gauge", ("upstream",), "Sequences the upstream runs at once; 0 while it is out of service."),
    Series("elis_upstream_up", "gauge", ("upstream",), "1: its health probes succeed."),
    Series(
        "elis_engine_running",
        "gauge",
        ("upstream",),
        "Sequences the engine says it runs, others' too; where `slots: auto` asks it.",
    ),
    Series("elis_engine_waiting", "gauge", ("upstream",), "Calls the engine says wait in its own queue; likewise."),
    Series("elis_engine_kv_usage", "gauge", ("upstream",), "Share of its KV memory the engine says is used; likewise."),
    Series(
        "elis_continuations_cold_ratio",
        "gauge",
        ("upstream",),
        "Share of its last 64 continuations whose prompt was not cached where it had just been, as far as it tells.",
    ),
    Series("elis_seconds_per_token", "gauge", ("model",), "Measured pace of one running job."),
    Series("elis_seam_tokens", "gauge", (), "What interrupting and resuming costs, in decoded tokens."),
    Series(
        "elis_order_jct_seconds",
        "gauge",
        ("model", "order", "stat"),
        "Completion time of the same jobs as served (`actual`) and as plain first-come would have served them.",
    ),
    Series("elis_order_jobs", "gauge", ("model",), "Completed jobs that `elis_order_jct_seconds` rests on."),
    Series(
        "elis_event_loop_lag_seconds",
        "histogram",
        (),
        "How late the event loop ran a timer, four times a second.",
        _SHORT,
    ),
    Series("elis_info", "gauge", ("version",), "Always 1."),
)

Labels = tuple[str, ...]
Gauge = Callable[[], Iterable[tuple[Labels, float]]]
"""Read when someone asks: label values and the value."""


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        rows: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), running))
        return rows


class _Model:
    """Everything counted per model, found with one lookup."""

    __slots__ = (
        "error", "estimates", "itl", "jct", "length", "preemptions", "slices", "tokens", "tpot", "ttft", "wait",
        "windows",
    )  # fmt: skip

    def __init__(self) -> None:
        self.jct = _Histogram(_SECONDS)
        self.ttft = _Histogram(_SECONDS)
        self.tpot = _Histogram(_SHORT)
        self.itl = _Histogram(_GAPS)
        self.wait = _Histogram(_SECONDS)
        self.length = _Histogram(_TOKENS)
        self.slices = _Histogram(_COUNTS)
        self.error = _Histogram(_TOKENS)
        self.tokens = 0
        self.windows = 0
        self.preemptions = 0
        self.estimates = 0


class Metrics(Collector, Observer):
    """Counts what it is told. ``gauges``: by series name, how to read the ones that are asked for, not told."""

    def __init__(self, gauges: dict[str, Gauge] | None = None) -> None:
        self._gauges = gauges or {}
        self._jobs: dict[Labels, int] = {}
        self._models: dict[str, _Model] = {}
        self._ends: dict[Labels, int] = {}
        self._errors: dict[Labels, int] = {}
        self._seams: dict[str, _Histogram] = {}
        self._firsts: dict[str, _Histogram] = {}
        self._failovers: dict[str, int] = {}
        self._refusals: dict[str, int] = {}
        self._lag = _Histogram(_SHORT)
        self._estimate_seconds = _Histogram(_SHORT)
        self._missed: dict[Labels, int] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # --- told ----------------------------------------------------------------------------------------------------

    def fed(self, flight: Flight, gap: float) -> None:
        """Tokens arrived, ``gap`` seconds after the ones before them."""
        name = flight.spec.model
        (self._models.get(name) or self._model(name)).itl.observe(gap)

    def window_passed(self, flight: Flight) -> None:
        """Another window's tokens arrived."""
        self._model(flight.spec.model).windows += 1

    def refused(self, reason: str) -> None:
        """A request was answered with an error before any of its answer was sent."""
        self._refusals[reason] = self._refusals.get(reason, 0) + 1

    def lagged(self, seconds: float) -> None:
        """The event loop was that late."""
        self._lag.observe(seconds)

    def estimated(self, flight: Flight, seconds: float) -> None:
        """A new estimate, and what it took."""
        self._model(flight.spec.model).estimates += 1
        self._estimate_seconds.observe(seconds)

    def estimate_missed(self, flight: Flight, why: str) -> None:
        """An estimate that is not there."""
        key = (flight.spec.model, why)
        self._missed[key] = self._missed.get(key, 0) + 1

    def slice_ended(self, flight: Flight, leg: Leg) -> None:
        """An upstream call is over."""
        key = (leg.upstream, leg.end)
        self._ends[key] = self._ends.get(key, 0) + 1
        model = self._model(flight.spec.model)
        model.tokens += leg.tokens
        if leg.end == _WINDOW and leg.tokens:
            model.windows += 1
        if (
            leg.continued
            and (broken := flight.legs[-2]).end == _INTERRUPTED
            and (broken.upstream, _INTERRUPTED) in self._ends  # else it was removed since, and is forgotten
        ):
            self._failovers[broken.upstream] = self._failovers.get(broken.upstream, 0) + 1
        if leg.cause:
            key = (leg.upstream, leg.cause)
            self._errors[key] = self._errors.get(key, 0) + 1
        if leg.first_token is not None:
            found = self._seams if leg.continued else self._firsts
            histogram = found.get(leg.upstream)
            if histogram is None:
                histogram = found[leg.upstream] = _Histogram(_GAPS if leg.continued else _SECONDS)
            histogram.observe(leg.first_token - leg.sent)

    def finished(self, flight: Flight) -> None:
        """A job is over."""
        job = flight.job
        if job is None or job.outcome is None or job.finished is None:
            return
        key = (job.spec.model, flight.class_name, job.outcome)
        self._jobs[key] = self._jobs.get(key, 0) + 1
        model = self._model(job.spec.model)
        model.wait.observe(job.waited)
        model.preemptions += job.preemptions
        if job.first_token is not None:
            model.ttft.observe(job.first_token - job.arrival)
            if job.attained > 1:
                model.tpot.observe((job.finished - job.first_token) / (job.attained - 1))
        if job.slices:
            model.slices.observe(job.slices)
        if job.outcome is Outcome.COMPLETED:
            model.jct.observe(job.finished - job.arrival)
            model.length.observe(job.attained)
            if flight.first_estimate is not None:
                model.error.observe(abs(flight.first_estimate.remaining - job.attained))

    def forget(self, upstream: str) -> None:
        """It was removed: where upstreams come and go by the hour, their series would only become more."""
        for counts in (self._ends, self._errors):
            for key in [key for key in counts if key[0] == upstream]:
                del counts[key]
        for kept in (self._seams, self._firsts, self._failovers):
            kept.pop(upstream, None)

    def _model(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model()
        return model

    # --- asked ---------------------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """The whole page in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every series of ``SERIES``, also those without a sample yet."""
        counters, histograms = self._counters(), self._histograms()
        for series in SERIES:
            if series.kind == "counter":
                counter = CounterMetricFamily(series.name.removesuffix("_total"), series.help, labels=series.labels)
                for labels, value in counters[series.name]:
                    counter.add_metric(labels, value)
                yield counter
            elif series.kind == "histogram":
                family = HistogramMetricFamily(series.name, series.help, labels=series.labels)
                for labels, histogram in histograms[series.name]:
                    family.add_metric(labels, histogram.cumulated(), histogram.total)
                yield family
            else:
                gauge = GaugeMetricFamily(series.name, series.help, labels=series.labels)
                for labels, value in self._read(series.name):
                    gauge.add_metric(labels, value)
                yield gauge

    def _read(self, name: str) -> Iterable[tuple[Labels, float]]:
        if name == "elis_info":
            return [((__version__,), 1.0)]
        gauge = self._gauges.get(name)
        return gauge() if gauge is not None else []

    def _counters(self) -> dict[str, list[tuple[Labels, float]]]:
        models = self._models.items()
        return {
            "elis_jobs_total": [(k, float(v)) for k, v in self._jobs.items()],
            "elis_tokens_total": [((name,), float(m.tokens)) for name, m in models],
            "elis_windows_total": [((name,), float(m.windows)) for name, m in models],
            "elis_preemptions_total": [((name,), float(m.preemptions)) for name, m in models],
            "elis_estimates_total": [((name,), float(m.estimates)) for name, m in models],
            "elis_estimates_missed_total": [(k, float(v)) for k, v in self._missed.items()],
            "elis_prompts_total": list(self._read("elis_prompts_total")),
            "elis_slices_total": [(k, float(v)) for k, v in self._ends.items()],
            "elis_failovers_total": [((k,), float(v)) for k, v in self._failovers.items()],
            "elis_refusals_total": [((k,), float(v)) for k, v in self._refusals.items()],
            "elis_upstream_errors_total": [(k, float(v)) for k, v in self._errors.items()],
        }

    def _histograms(self) -> dict[str, list[tuple[Labels, _Histogram]]]:
        models = self._models.items()
        return {
            "elis_jct_seconds": [((name,), m.jct) for name, m in models],
            "elis_ttft_seconds": [((name,), m.ttft) for name, m in models],
            "elis_tpot_seconds": [((name,), m.tpot) for name, m in models],
            "elis_itl_seconds": [((name,), m.itl) for name, m in models],
            "elis_queue_wait_seconds": [((name,), m.wait) for name, m in models],
            "elis_answer_tokens": [((name,), m.length) for name, m in models],
            "elis_slices_per_job": [((name,), m.slices) for name, m in models],
            "elis_estimate_error_tokens": [((name,), m.error) for name, m in models],
            "elis_seam_gap_seconds": [((name,), h) for name, h in self._seams.items()],
            "elis_first_token_seconds": [((name,), h) for name, h in self._firsts.items()],
            "elis_estimate_seconds": [((), self._estimate_seconds)],
            "elis_event_loop_lag_seconds": [((), self._lag)],
        }
