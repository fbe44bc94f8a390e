"""The admin listener, the metrics and their table, the traffic log."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from elis_gateway.config import from_mapping
from elis_gateway.metrics import SERIES
from elis_gateway.tasks import spawn
from elis_gateway.traffic_log import SCHEMA, Row, text_hash
from tests.gateway.world import COMPLETIONS, World, paced, payloads, read_until, until, world
from tests.predictor import tiny

BODY: dict[str, Any] = {"model": "sim", "prompt": "Tell me", "max_tokens": 120, "ignore_eos": True}
TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"


async def _get(w: World, path: str) -> Any:
    async with w.session.get(w.admin + path) as response:
        assert response.status == 200
        return orjson.loads(await response.read())


async def _samples(w: World) -> dict[str, float]:
    async with w.session.get(w.admin + "/metrics") as response:
        text = await response.text()
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


async def test_metrics_tell_what_happened() -> None:
    async with world() as w:
        for _ in range(3):
            await w.check(COMPLETIONS, BODY)
        await until(lambda: len(w.gateway.journal.recent(9)) == 3)
        found = await _samples(w)
        upstream = next(iter(w.gateway.fleet.upstreams))
        assert found['elis_jobs_total{class="default",model="sim",outcome="completed"}'] == 3
        assert found['elis_tokens_total{model="sim"}'] == 360
        assert found['elis_answer_tokens_sum{model="sim"}'] == 360
        assert found['elis_jct_seconds_count{model="sim"}'] == 3
        assert found[f'elis_slices_total{{end="finished",upstream="{upstream}"}}'] == 3
        assert found[f'elis_slots{{upstream="{upstream}"}}'] == 4
        assert found["elis_jobs_live"] == 0


async def test_the_table_lists_exactly_what_is_exported() -> None:
    rows = re.findall(r"^\| `(elis_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", TABLE.read_text(), re.MULTILINE)
    table = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}
    assert table == {s.name: (s.kind, s.labels, s.help) for s in SERIES}
    async with world() as w:
        async with w.session.get(w.admin + "/metrics") as response:
            exported = re.findall(r"^# TYPE (elis_\w+) (\w+)$", await response.text(), re.MULTILINE)
        assert sorted(exported) == sorted((s.name, s.kind) for s in SERIES)


async def test_fixed_windows_keep_no_call_in_hand() -> None:
    async with world(paced(50), slots=1) as w:
        [upstream] = w.gateway.core.upstreams.values()
        assert upstream.info.overcommit == 1
        for mode, kept in (("fixed", 0), ("elastic", 1)):
            async with w.session.put(w.admin + "/admin/policy", json={"kind": "isrtf", "mode": mode}) as response:
                assert response.status == 200, await response.text()
            assert upstream.info.overcommit == kept


async def test_jobs_live_and_over() -> None:
    async with world(paced(50), slots=1, upstream={"overcommit": 0}) as w:
        asking = [spawn(w.ask(COMPLETIONS, {**BODY, "prompt": f"{n}"}), name="ask") for n in range(2)]
        await until(lambda: any(flight.answer.started for flight in w.gateway.flights.values()))
        jobs = await _get(w, "/admin/jobs")
        assert jobs["live"] == 2
        assert sorted(job["state"] for job in jobs["jobs"]) == ["ready", "running"]
        for task in asking:
            task.cancel()
        await until(lambda: len(w.gateway.journal.recent(9)) == 2)
        over = (await _get(w, "/admin/jobs"))["finished"]
        assert [job["outcome"] for job in over] == ["cancelled", "cancelled"]
        assert await _get(w, f"/admin/jobs/{over[0]['job_id']}") == over[0]
        async with w.session.get(w.admin + "/admin/jobs/nobody") as response:
            assert response.status == 404


async def test_the_policy_can_be_changed_while_jobs_wait() -> None:
    async with world(paced(1500, slots=1), slots=1, predictor={"kind": "max_tokens"}) as w:
        assert (await _get(w, "/admin/policy"))["kind"] == "isrtf"
        asking = [spawn(w.check(COMPLETIONS, {**BODY, "prompt": f"{n}"}), name="ask") for n in range(4)]
        await until(lambda: len(w.gateway.flights) == 4)
        for wanted in ("fcfs", {"kind": "sjf", "order": "mean", "aging": "none"}, "las"):
            async with w.session.put(w.admin + "/admin/policy", json=wanted) as response:
                assert response.status == 200
        assert (await _get(w, "/admin/policy"))["kind"] == "las"
        for task in asking:
            await task


async def test_the_windows_can_be_changed_while_serving() -> None:
    async with world(predictor={"kind": "max_tokens"}) as w:
        assert {**(await _get(w, "/admin/policy")), "aging": 0}["mode"] == "elastic"
        wanted = {"kind": "isrtf", "order": "mean", "mode": "fixed", "rescore": "always", "window": 4, "aging": "none"}
        async with w.session.put(w.admin + "/admin/policy", json=wanted) as response:
            assert response.status == 200
            assert orjson.loads(await response.read()) == {**wanted, "aging": {"kind": "none"}}
        await w.check(COMPLETIONS, {**BODY, "max_tokens": 12, "ignore_eos": True})
        (job,) = w.gateway.journal.recent(1)
        assert len(job["slices"]) >= 3
        assert max(leg["tokens"] for leg in job["slices"]) <= 4


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (b"{", "not JSON: "),
        (b"3", "policy: expected a name or an object with `kind`"),
        (b'{"kind": "sjf", "mode": "slow"}', "mode: expected 'fixed' or 'elastic', got 'slow'"),
        (
            b'"isrft"',
            "policy.kind: expected one of fcfs, round_robin, las, sjf, isrtf, or package.module:Class, got 'isrft'",
        ),
        (b'{"kind": "sjf", "odrer": "mean"}', "policy.odrer: unknown key; did you mean 'order'?"),
    ],
)
async def test_a_policy_that_makes_no_sense_changes_nothing(wanted: bytes, words: str) -> None:
    """The words are those of ``check-config``."""
    async with world() as w:
        async with w.session.put(w.admin + "/admin/policy", data=wanted) as response:
            assert response.status == 400
            assert orjson.loads(await response.read())["error"].startswith(words)
        assert (await _get(w, "/admin/policy"))["kind"] == "isrtf"


async def test_nobody_names_code_to_be_run_over_the_network(tmp_path: Path) -> None:
    wanted = {"kind": "os:mkdir", "options": {"path": str(tmp_path / "made")}}
    async with world() as w, w.session.put(w.admin + "/admin/policy", json=wanted) as response:
        assert response.status == 400
    assert not (tmp_path / "made").exists()


async def test_upstreams_and_reload() -> None:
    async with world() as w:
        found = (await _get(w, "/admin/upstreams"))["upstreams"]
        assert [(u["in_service"], u["token_ids"], u["models"]) for u in found] == [(True, True, ["sim"])]
        async with w.session.post(w.admin + "/admin/reload") as response:
            assert orjson.loads(await response.read()) == {"applied": [], "needs_restart": []}


async def test_reload_takes_up_a_retrained_model_and_refuses_a_broken_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = tiny.build(tmp_path, name="first")
    async with world(predictor={"kind": "bge", "path": str(folder), "deadline": 60.0}) as w:

        async def reload(status: int) -> Any:
            async with w.session.post(w.admin + "/admin/reload") as response:
                assert response.status == status
                return orjson.loads(await response.read())

        asking = [spawn(w.ask(COMPLETIONS, {**BODY, "prompt": f"long tale {n}"}), name="ask") for n in range(8)]
        assert await reload(200) == {"applied": [], "needs_restart": []}
        tiny.build(tmp_path, name="retrained", bias=6.0)
        assert await reload(200) == {"applied": ["predictor.path"], "needs_restart": []}
        (folder / "head.onnx").write_bytes(b"half a file")
        assert "head.onnx: not the file" in (await reload(400))["error"]
        await asyncio.gather(*asking)
        await w.ask(COMPLETIONS, {**BODY, "prompt": "long tale"})
        predictor: Any = w.gateway.predictor
        assert predictor.model.manifest.name == "retrained"
        await until(lambda: predictor.learner.history.median("sim", "", 0) != 200)
        async with w.session.get(w.admin + "/metrics") as response:
            page = await response.text()
        assert 'elis_prompts_total{result="encoded"}' in page
        assert "elis_estimate_missed_total" not in page


@pytest.mark.parametrize("prompts", ["full", "hash", "none"])
async def test_the_traffic_log_has_one_row_per_job(tmp_path: Path, prompts: str) -> None:
    path = tmp_path / "logs" / "traffic.jsonl"
    async with world(traffic_log={"path": str(path)}, logging={"prompts": prompts}) as w:
        answer = await w.ask(COMPLETIONS, BODY)
    (row,) = map(orjson.loads, path.read_bytes().splitlines())
    assert set(row) == set(Row.__annotations__)
    assert (row["schema"], row["outcome"], row["finish_reason"]) == (SCHEMA, "completed", "length")
    assert (row["completion_tokens"], row["prompt_tokens"]) == (120, answer.prompt_tokens)
    assert row["arrival"] <= row["first_token"] <= row["end"]
    assert row["prompt"] == (BODY["prompt"] if prompts == "full" else None)
    assert row["answer"] == (answer.text if prompts == "full" else None)
    assert row["prompt_hash"] == (None if prompts == "none" else text_hash(BODY["prompt"]))


async def test_the_traffic_log_rotates(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    async with world(traffic_log={"path": str(path), "max_bytes": 1500, "keep": 2}) as w:
        for _ in range(8):
            await w.ask(COMPLETIONS, {**BODY, "max_tokens": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["traffic.jsonl", "traffic.jsonl.1", "traffic.jsonl.2"]
    assert all(p.stat().st_size <= 1500 for p in tmp_path.iterdir())


async def test_a_name_that_is_no_text_costs_the_traffic_log_one_row(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    async with world(traffic_log={"path": str(path)}) as w:
        writer = w.gateway._traffic_log
        assert writer is not None
        assert writer._behind is not None
        writer._behind.put({"app": "\udcff"})  # type: ignore[arg-type]
        await w.ask(COMPLETIONS, BODY)
    assert len(path.read_bytes().splitlines()) == 1


async def test_a_history_that_cannot_be_written_does_not_keep_the_gateway_from_stopping(tmp_path: Path) -> None:
    async with world(predictor={"kind": "history", "path": str(tmp_path / "nowhere" / "h.json")}) as w:
        await w.gateway.stop(0.0)
        assert all(u._client is None for u in w.gateway.fleet.upstreams.values())


class _Files:
    """A gateway whose configuration file changes."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.given = w.gateway.config.model_dump(mode="json", exclude_defaults=True)
        self.w.gateway._reload = lambda: from_mapping(self.given)

    async def reload(self, **upstreams: Mapping[str, object]) -> int:
        """Upstreams by name, with what differs from the one there was."""
        first = self.w.gateway.config.upstreams[0].model_dump(mode="json")
        base = {**first, "url": self.w.engine.url}
        self.given = {**self.given, "upstreams": [{**base, "name": n, **more} for n, more in upstreams.items()]}
        async with self.w.session.post(self.w.admin + "/admin/reload") as response:
            return response.status


async def test_a_reload_is_all_or_nothing() -> None:
    async with world() as w:
        files = _Files(w)
        assert await files.reload(a={}) == 200
        await until(lambda: list(w.gateway.fleet.upstreams) == ["a"])
        for upstreams in ({"a": {"api_key_env": "NOT_THERE"}}, {"b": {"api_key_env": "NOT_THERE"}}):
            assert await files.reload(**upstreams) == 400
            assert list(w.gateway.fleet.upstreams) == ["a"]
        assert await files.reload(a={"slots": 3}) == 200
        await until(lambda: bool(w.gateway.fleet.models))
        assert w.gateway.core.upstreams["a"].info.slots == 3


async def test_an_upstream_that_is_wanted_again_before_it_was_gone_comes_back() -> None:
    async with world(paced(100)) as w:
        files = _Files(w)
        assert await files.reload(a={}) == 200
        await until(lambda: list(w.gateway.fleet.models) == ["sim"])
        async with w.post(COMPLETIONS, {**BODY, "stream": True, "max_tokens": 60, "ignore_eos": True}) as response:
            await read_until(response, 1)
            assert await files.reload(b={}) == 200
            assert await files.reload(a={"slots": 2}, b={}) == 200
            assert payloads(await response.read())[-1] == b"[DONE]"
        await until(lambda: sorted(u.info.slots for u in w.gateway.core.upstreams.values()) == [2, 4])


async def test_what_is_no_http_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with world() as w:
        reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.admin_port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Null: \x00\r\n\r\n")
        assert b" 400 " in (await reader.read(1000)).split(b"\r\n")[0]
        writer.close()
        await writer.wait_closed()
    assert not [record for record in caplog.records if record.exc_info]
