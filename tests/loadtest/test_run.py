"""`loadtest run` as a whole: in virtual time by the command line, live against a gateway; what must show, shows."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from elis_gateway.access import hashed
from elis_gateway.cli import cli
from elis_gateway.errors import ConfigError, GatewayError
from elis_gateway.sim.engine import EngineModel
from loadtest import run as running
from loadtest import runner, store
from loadtest.compare import contrast
from loadtest.experiment import Experiment, Live, Simulated, conduct, plan
from loadtest.knowledge import Knowledge
from loadtest.live import Screen, Watch
from loadtest.options import Work
from loadtest.records import Row, Run
from loadtest.runner import Stop
from loadtest.tables import verdict
from loadtest.targets import Steering
from loadtest.workload import Request, Seeds, Workload, azure
from tests.gateway.world import paced, world
from tests.upstream.autojump import run as virtually

ENGINE = EngineModel(4, ((1, 30.0),), seam_tokens=1.5)


def command(*args: str) -> Result:
    return CliRunner().invoke(cli, ["loadtest", *args])


def work(**options: Any) -> Work:
    given: dict[str, Any] = {
        "num_requests": 30, "arrivals": "poisson", "gamma_shape": 1.0, "gamma_scale": 1.0, "rate": 40.0, "load": None,
        "capacity": None, "prompts": None, "turns": "first", "lengths": "uniform:min=5,max=40", "mix": None,
        "longest": 100, "forced": None, "seed": 0, "arrivals_seed": None, "lengths_seed": None, "prompts_seed": None,
    }  # fmt: skip
    return Work(**{**given, **options})


def screen() -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, width=130, highlight=False)), out


# ---- in virtual time ------------------------------------------------------------------------------------------------


def test_a_comparison_in_virtual_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = command(
        "run", "--target", "sim:vllm-cpu", "--load", "0.95", "--num-requests", "60", "--seeds", "2",
        "--compare", "fcfs,isrtf,perfect", "--output", str(folder), "--slo", "jct=20", "--predictor", "noisy:0.6",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("Ratio to fcfs", "isrtf again", "In short", "A/A: two runs of isrtf", str(folder)):
        assert words in result.output
    summary = json.loads((folder / "summary.json").read_text())
    assert {"config", "start_time", "end_time", "elapsed_time", "final_stats", "jobs", "elis"} == set(summary)
    assert summary["final_stats"]["total_requests"] == summary["final_stats"]["completed_jobs"] == 60
    job = summary["jobs"][0]
    assert set(job) == {
        "job_id", "request_id", "generated_tokens", "jct", "preemption_count", "predicted_remaining_history",
    }  # fmt: skip
    assert summary["final_stats"]["predictions_made"] == sum(
        len(j["predicted_remaining_history"]) for j in summary["jobs"]
    )
    told = summary["elis"]
    assert (told["version"], told["target"], told["complete"], told["valid"]) == (1, "sim", True, True)
    assert " Measured 20" in told["engine"]["about"]
    assert len(told["runs"]) == 2 * 4
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4 * 60
    assert rows[0]["legs"]
    assert "## Ratio to fcfs" in (folder / "report.md").read_text()
    assert (folder / "summary.csv").read_text().count("\n") == 9
    again = store.read(folder)
    for ours, theirs in zip(store.summary(again, again.arms())["elis"]["comparison"], told["comparison"], strict=True):
        assert (ours["setting"], ours["wins"]) == (theirs["setting"], theirs["wins"])
        assert ours["metrics"]["jct.mean"]["ratio"] == pytest.approx(theirs["metrics"]["jct.mean"]["ratio"], abs=1e-5)
    # A folder that holds a run is not written over.
    assert command("run", "--target", "sim", "--output", str(folder)).exit_code == 2


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert command("run", "--target", "sim", "--num-requests", "5", "--output", str(folder)).exit_code == 0
    path = folder / "workloads" / "seed-0.json"
    path.write_text(path.read_text().replace('"at": ', '"at": 1'))
    with pytest.raises(ConfigError, match="it was changed"):
        store.read(folder)
    with pytest.raises(ConfigError, match="cannot be read"):
        store.read(tmp_path)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--compare", "fcfs,fastest"], "setting 'fastest': expected one of"),
        (["--compare", "fcfs,fcfs"], "the same setting twice"),
        (["--slo", "jct"], "expected NAME=SECONDS"),
        (["--slo", "speed=3"], "expected jct, ttft or tpot"),
        (["--predictor", "guess"], "expected one of"),
        (["--rate", "3", "--load", "1"], "give one of them"),
        (["--body", "[]"], "expected a JSON object"),
        (["--header", "x"], "expected NAME:VALUE"),
        (["--rate", "-1"], "expected more than 0"),
        (["--closed", "4"], "--closed has no effect in virtual time"),
        (["--max-lag", "1"], "--max-lag has no effect in virtual time"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path: Path, args: list[str], said: str) -> None:
    result = command("run", "--target", "sim", "--num-requests", "5", "--output", str(tmp_path / "x"), *args)
    assert result.exit_code == 2
    assert said in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--predictor", "perfect"], "--predictor has no effect with a live target"),
        (["--compare", "fcfs,perfect"], "use predictor.kind oracle"),
        (["--compare", "fcfs,isrtf-tail"], "cannot be switched"),
    ],
)
def test_what_makes_no_sense_live_is_said_before_anything_is_sent(tmp_path: Path, args: list[str], said: str) -> None:
    folder = tmp_path / "x"
    result = command("run", "--target", "http://127.0.0.1:9", "--output", str(folder), *args)
    assert (result.exit_code, folder.exists()) == (2, False)
    assert said in result.output.replace("\n", " ")


def test_a_frozen_workload_is_not_drawn_anew(tmp_path: Path) -> None:
    path, folder = str(tmp_path / "work.json"), str(tmp_path / "out")
    assert command("make-workload", path, "--num-requests", "5").exit_code == 0
    result = command("run", "--target", "sim", "--workload", path, "--num-requests", "50", "--output", folder)
    assert result.exit_code == 2
    assert "--num-requests has no effect on a frozen workload" in result.output
    result = command("run", "--target", "sim", "--workload", path, "--seed", "7", "--output", folder)
    assert result.exit_code == 0, result.output


def test_seeds_that_share_the_rows_of_a_trace_are_no_seeds(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{n},10,{n + 1}\n" for n in range(30)))
    options = ("run", "--target", "sim", "--arrivals", f"trace:{path}", "--num-requests", "10")
    result = command(*options, "--seeds", "4", "--output", str(tmp_path / "no"))
    assert (result.exit_code, "no 4 independent workloads" in result.output) == (2, True)
    assert command(*options, "--seeds", "3", "--output", str(tmp_path / "yes")).exit_code == 0
    works = store.read(tmp_path / "yes").workloads.values()
    assert len({request.tokens for work in works for request in work.requests}) == 30


def test_runs_are_interleaved_and_every_other_seed_backwards() -> None:
    order = [" ".join(map(str, one)).strip() for one in plan(["a", "b", "c"], [0, 1], "b")]
    assert order == ["b 0", "a 0", "c 0", "b 0 again", "b 1 again", "c 1", "a 1", "b 1"]


def simulate(predictor: str, settings: list[str], again: str | None, seeds: range, requests: int = 60) -> Experiment:
    works = {s: azure(requests, load=0.95, capacity=ENGINE.capacity, seeds=Seeds.all(s)) for s in seeds}
    experiment = Experiment({}, "sim", settings, works, again, engine=ENGINE)
    target = Simulated(ENGINE, Knowledge(predictor, lambda noise: works[seeds[0]]), window=50, watch=False)
    with asyncio.Runner() as loop:
        loop.run(conduct(experiment, target, stop=Stop()))
    return experiment


def test_equal_arms_do_not_differ_in_90_to_99_of_100_tries() -> None:
    """The two arms differ in prediction noise alone; 95 % is what the interval promises. With fewer requests many runs
    of the two arms are the same to the last token, which are no tries."""
    equal = 0
    for number in range(100):
        arms = simulate("noisy:0.6", ["sjf"], "sjf", range(6 * number, 6 * number + 6), requests=60).arms()
        equal += not contrast(arms["sjf again"], arms["sjf"]).metrics["jct.mean"].differs
    assert 90 <= equal <= 99


def test_shuffled_predictions_lose_the_gain() -> None:
    gains = {}
    for predictor in ("perfect", "shuffled"):
        arms = simulate(predictor, ["fcfs", "isrtf"], None, range(6), requests=150).arms()
        gains[predictor] = contrast(arms["isrtf"], arms["fcfs"]).metrics["jct.mean"].ratio
    assert gains["perfect"] < 0.9
    assert gains["shuffled"] > 0.97


# ---- live -----------------------------------------------------------------------------------------------------------


async def test_a_comparison_through_a_live_gateway(tmp_path: Path) -> None:
    ours, out = screen()
    async with world(paced(3000.0, slots=2), slots=2, predictor={"kind": "max_tokens"}) as w:
        before = w.gateway.policy()
        options = running.Options(
            target=w.url, settings=("fcfs", "isrtf-published"), admin=w.admin, seeds=1, window=10, output=tmp_path,
        )  # fmt: skip
        experiment = await running._live(options, work(), ours)
        assert w.gateway.policy() == before
    assert [run.name for run in experiment.runs] == ["fcfs", "isrtf-published", "fcfs again"]
    assert experiment.complete
    assert not [fault for fault in experiment.faults() if "lagged" not in fault]
    fixed = experiment.runs[1]
    assert fixed.about["policy"]["mode"] == "fixed"
    for row in fixed.rows:
        assert row.tokens == row.expected
        # A token that ends in half a character is kept back at a seam, so there may be a call more.
        assert row.slices == len(row.legs) >= -(-row.tokens // 10)
        assert sum(leg.tokens for leg in row.legs) == row.tokens
        assert row.predictions
        assert row.wait is not None
        assert row.end is not None
        assert row.sent < row.legs[-1].end <= row.end + 0.01
        assert len(row.gaps) <= row.tokens
    store.write(tmp_path, experiment)
    assert [len(run.rows) for run in store.read(tmp_path).runs] == [30, 30, 30]
    assert "completed, mean JCT" in out.getvalue()
    assert any("one seed tells no noise" in line for line in verdict(experiment, experiment.arms()))
    told = "\n".join(store.introduction(experiment))
    assert "predictor:" not in told, "the gateway's, of which we know nothing"
    assert "every predictor sees in max_tokens" in told


async def test_what_is_done_is_kept_when_the_gateway_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, out = screen()
    async with world(paced(3000.0, slots=2), slots=2, predictor={"kind": "max_tokens"}) as w:
        use, asked = Steering.use, 0

        async def lost(self: Steering, wanted: Any) -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked > 1:
                raise GatewayError("nobody there")
            return await use(self, wanted)

        monkeypatch.setattr(Steering, "use", lost)
        options = running.Options(target=w.url, settings=("fcfs", "sjf"), admin=w.admin, output=tmp_path)
        experiment = await running._live(options, work(), ours)
    assert [run.name for run in experiment.runs] == ["fcfs"]
    assert not experiment.valid
    store.write(tmp_path, experiment)
    assert "stopped before every planned run was made" in (tmp_path / "report.md").read_text()
    assert "stopped: nobody there; what is done is kept" in out.getvalue()
    assert "could not be put back" in out.getvalue()


async def test_a_gateway_whose_admin_listener_asks_for_a_key(tmp_path: Path) -> None:
    key = "open-sesame-open-sesame"
    async with world(paced(3000.0, slots=2), slots=2, admin={"port": 0, "key_hash": hashed(key)}) as w:
        options = running.Options(target=w.url, settings=("sjf",), admin=w.admin, output=tmp_path)
        with pytest.raises(GatewayError, match="401"):
            await running._live(options, work(num_requests=3), screen()[0])
        experiment = await running._live(replace(options, admin_key=key), work(num_requests=3), screen()[0])
    assert experiment.complete
    store.write(tmp_path, experiment)
    assert key not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(("name", "said"), [("isrtf-tail", "cannot be switched"), ("perfect", "oracle")])
async def test_a_setting_that_a_running_gateway_cannot_take_is_refused(name: str, said: str) -> None:
    live = Live(lambda _: pytest.fail("nothing is sent"), None, window=50)
    (planned,) = plan([name], [0], None)
    with pytest.raises(ConfigError, match=said):
        await live.make(planned, Workload((), {}), Stop())


async def test_a_plain_server_is_measured_as_it_is(tmp_path: Path) -> None:
    ours, out = screen()
    async with world(paced(3000.0, slots=2)) as w:
        options = running.Options(target=w.engine.url, settings=(), users=3, output=tmp_path)
        experiment = await running._live(options, work(num_requests=12), ours)
        wrong = running.Options(target=w.engine.url, settings=("fcfs", "sjf"), admin=w.engine.url)
        with pytest.raises(GatewayError, match="answered 404"):
            await running._live(wrong, work(), ours)
        with pytest.raises(ConfigError, match="give --capacity, or --batch-size"):
            await running._live(options, work(load=0.5, rate=None), ours)
        measured = running.Options(target=w.engine.url, settings=(), batch_size=2)
        again = await running._live(measured, work(load=0.5, rate=None, num_requests=5), ours)
    (run,) = experiment.runs
    assert (run.users, run.complete, len(run.rows)) == (3, True, 12)
    assert all(row.lag == 0 for row in run.rows)
    assert "CLOSED LOOP" in " ".join(store.introduction(experiment))
    assert "closed loop of 3 users" in out.getvalue()
    assert any("not those of open traffic" in line for line in verdict(experiment, experiment.arms()))
    assert again.config["capacity"] > 500


class Stalling:
    """Answers at once, but for a while."""

    def __init__(self, start: float, begin: float, end: float) -> None:
        self.start, self.begin, self.end = start, begin, end

    async def send(self, request: Request, row: Row) -> None:
        if self.begin <= (since := now() - self.start) < self.end:
            await asyncio.sleep(self.end - since)
        row.first = row.end = now() - self.start
        row.tokens = 1


def now() -> float:
    return asyncio.get_running_loop().time()


def burst(count: int, gap: float) -> Workload:
    return Workload(tuple(Request(f"r{n}", n * gap, "hi", 1, "", 1) for n in range(count)))


@pytest.mark.usefixtures("on_the_loop_s_clock")
def test_a_stall_shows_in_the_latency_of_everybody_who_came_meanwhile() -> None:
    async def story() -> None:
        target = Stalling(now() + 0.05, 0.1, 0.4)
        run = await runner.run(burst(50, 0.01), target, start=target.start)
        slow = [row.jct for row in run.rows if row.jct > 0.05]
        # Thirty arrived in the 0.3 s of the stall; a closed loop would have seen one slow answer.
        assert 24 <= len(slow) <= 26
        assert max(slow) > 0.28
        still = Stalling(now(), 0.0, 0.3)
        one = await runner.closed(burst(50, 0.0), still, 1, start=still.start)
        assert sum(row.jct > 0.1 for row in one.rows) == 1

    virtually(story())


async def test_the_lag_of_many_requests_due_at_once_is_that_of_the_last() -> None:
    class Laborious:
        async def send(self, request: Request, row: Row) -> None:
            time.sleep(0.002)  # the generator's own work
            row.first = row.end = row.sent

    told: list[float] = []
    run = await runner.run(
        burst(50, 0.0), Laborious(), start=time.perf_counter(), on_sent=lambda row: told.append(row.lag)
    )
    assert run.lag >= 49 * 0.002
    assert max(told) == run.lag


@pytest.mark.usefixtures("on_the_loop_s_clock")
def test_a_run_that_is_stopped_keeps_what_it_has() -> None:
    virtually(_stopped())


async def _stopped() -> None:
    stop = Stop()

    class Slow:
        async def send(self, request: Request, row: Row) -> None:
            if request.id == "r4":
                stop.set()
            if request.id != "r0":
                await asyncio.sleep(60)
            row.first = row.end = row.sent
            row.tokens = 1

    run = await runner.run(burst(100, 0.005), Slow(), start=now(), stop=stop)
    assert not run.complete
    assert run.unsent >= 94
    assert run.rows[0].error == ""
    assert {row.error for row in run.rows[1:]} == {"unfinished"}
    experiment = Experiment({}, "live", ["x"], {0: burst(100, 0.005)}, runs=[run])
    assert any("unfinished" in fault for fault in experiment.faults())


def test_requests_that_failed_are_told_with_what_they_failed_of() -> None:
    rows = [Row(f"r{n}", n, n, None, None, error="status 400" if n else "reset") for n in range(20)]
    experiment = Experiment({}, "live", ["x"], {0: burst(1, 1)}, runs=[Run("x", "hash", rows)])
    assert experiment.faults() == ["x, seed 0: 20 of 20 requests failed (status 400, reset)"]


def test_a_run_that_lagged_is_invalid() -> None:
    rows = [Row(f"r{n}", n, n + 0.2, n + 1, n + 2, 1) for n in range(20)]
    run = Run("x", "hash", rows)
    experiment = Experiment({}, "live", ["x"], {0: burst(1, 1)}, runs=[run])
    assert not experiment.valid
    assert "lagged by 200 ms" in experiment.faults()[0]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_a_live_run(terminal: bool) -> None:
    out = io.StringIO()
    now = 10.0
    ours = Screen(Console(file=out, width=130, force_terminal=terminal, highlight=False))
    watch = Watch(ours, lambda: now)
    watch.begin("isrtf seed 0", burst(10, 1.0), now)
    for n in range(6):
        now += 1.0
        row = Row(f"r{n}", n, n + 0.001, n + 0.5, n + 1.0, 20, error="timeout" if n == 3 else "")
        watch.sent(row)
        watch.ended(burst(1, 1).requests[0], row)
    if terminal:
        watch._picture()
    watch.end()
    text = out.getvalue()
    assert "isrtf seed 0" in text or terminal
    assert "lag 1.0 ms" in text
    assert "JCT 1.00 s" in text
    if terminal:
        assert "failed 1" in text
