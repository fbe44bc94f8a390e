"""Spans as a collector gets them: one per job, its slices below it, within the client's own trace."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from elis_gateway.sim.faults import Fault
from elis_gateway.tasks import spawn
from tests.gateway.world import COMPLETIONS, World, paced, until, world

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from elis_gateway import tracing

BODY: dict[str, Any] = {"model": "sim", "prompt": "the secret plan", "max_tokens": 120, "ignore_eos": True}
ON = {"tracing": {"enabled": True}, "predictor": {"kind": "max_tokens"}}
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    kept = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_sink", lambda section: SimpleSpanProcessor(kept))
    return kept


def story(kept: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The one job's span, and its slices in order."""
    found = kept.get_finished_spans()
    (job,) = (span for span in found if span.name.startswith("job "))
    below = [span for span in found if span.parent and job.context and span.parent.span_id == job.context.span_id]
    assert len(below) == len(found) - 1
    return job, sorted(below, key=lambda span: span.start_time or 0)


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def over(w: World, jobs: int = 1) -> None:
    await until(lambda: len(w.gateway.journal.recent(9)) == jobs)


async def test_a_job_and_its_slices(spans: InMemorySpanExporter) -> None:
    async with world(**ON) as w:
        w.engine.faults.add(Fault("end", after=30))
        await w.check(COMPLETIONS, BODY, traceparent=PARENT, tracestate="vendor=1")
        await over(w)
        job, slices = story(spans)
        assert job.context is not None
        assert job.parent is not None
        assert f"{job.context.trace_id:032x}" == PARENT.split("-")[1]
        assert f"{job.parent.span_id:016x}" == PARENT.split("-")[2]
        assert facts(job)["elis.outcome"] == "completed"
        assert facts(job)["gen_ai.usage.output_tokens"] == 120
        assert [facts(s)["elis.end"] for s in slices] == ["interrupted", "finished"]
        assert [s.status.is_ok for s in slices] == [False, True]
        assert sum(facts(s)["elis.tokens"] for s in slices) == 120
        assert job.start_time is not None
        assert job.end_time is not None
        for part in slices:
            assert job.start_time <= (part.start_time or 0) <= (part.end_time or 0) <= job.end_time
        sent = [record.traceparent for record in w.engine.log]
        assert sent == [f"00-{s.context.trace_id:032x}-{s.context.span_id:016x}-01" for s in slices if s.context]
        assert job.context.trace_state.get("vendor") == "1"


async def test_a_preempted_job_and_one_that_failed(spans: InMemorySpanExporter) -> None:
    async with world(paced(500, slots=1), slots=1, **ON) as w:
        long = spawn(w.ask(COMPLETIONS, {**BODY, "max_tokens": 300, "stream": True}), name="ask")
        await until(lambda: any(f.answer.attained > 5 for f in w.gateway.flights.values()))
        await w.check(COMPLETIONS, {**BODY, "max_tokens": 5})
        await long
        w.engine.faults.add(Fault("status", status=400, times=2))
        async with w.post(COMPLETIONS, BODY) as response:
            assert response.status == 400
        await over(w, 3)
    ends = [facts(span)["elis.end"] for span in spans.get_finished_spans() if span.name.startswith("slice ")]
    assert sorted(ends) == ["failed", "finished", "finished", "preempted", "window"]
    (failed,) = (s for s in spans.get_finished_spans() if facts(s).get("elis.outcome") == "failed")
    assert not failed.status.is_ok
    assert facts(failed)["elis.cause"] == "status_400"


async def test_a_client_that_does_not_trace_starts_a_trace_unless_sampled_out(spans: InMemorySpanExporter) -> None:
    async with world(**ON) as w:
        await w.check(COMPLETIONS, BODY)
        await over(w)
    job, _ = story(spans)
    assert job.parent is None
    spans.clear()
    async with world(**{**ON, "tracing": {"enabled": True, "sample": 0.0}}) as w:
        await w.check(COMPLETIONS, BODY, traceparent="no trace at all")
        await over(w)
        told = w.engine.log[0].traceparent
        assert told is not None
        assert int(told.rsplit("-")[3], 16) & 1 == 0
    assert not spans.get_finished_spans()


async def test_no_prompt_answer_or_key_gets_into_a_span(spans: InMemorySpanExporter) -> None:
    async with world(**ON) as w:
        answer = await w.ask(COMPLETIONS, BODY, Authorization="Bearer sk-client")
        await over(w)
    told = "".join(span.to_json() for span in spans.get_finished_spans())
    for secret in ("secret plan", "sk-client", answer.text[:20]):
        assert secret not in told


async def test_off_nothing_is_sent_and_nobody_is_told() -> None:
    async with world() as w:
        await w.check(COMPLETIONS, BODY, traceparent=PARENT)
        assert w.engine.log[0].traceparent is None
        told = [*w.gateway.dispatcher._tell_submitted, *w.gateway.dispatcher._tell_slice_began]
        assert not [each for each in told if "tracing" in type(each.__self__).__module__]  # type: ignore[attr-defined]


def test_without_the_extra_it_says_what_to_install(tmp_path: Any) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("upstreams: [{url: 'http://127.0.0.1:9', slots: 1}]\ntracing: {enabled: true}\n")
    script = (
        "import sys\n"
        "sys.modules['opentelemetry.context'] = None\n"
        f"sys.argv = ['elis-gateway', 'serve', {str(file)!r}]\n"
        "from elis_gateway.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'elis-gateway[otel]'" in done.stderr
