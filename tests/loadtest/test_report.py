"""What is drawn and written of a run, and stored runs held against each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from elis_gateway.cli import cli
from loadtest import store
from loadtest.records import Leg, Row, Run
from loadtest.report.plots import draw, lanes, waiting
from loadtest.report.style import FIGURE, SIZES, adapt
from loadtest.tables import tables, verdict


def command(*args: str) -> Result:
    return CliRunner().invoke(cli, ["loadtest", *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "out"
    result = command(
        "run", "--target", "sim:vllm-cpu", "--load", "0.95", "--num-requests", "100", "--seeds", "2",
        "--compare", "fcfs,isrtf,perfect", "--output", str(path), "--predictor", "noisy:0.6",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return path


class Page(HTMLParser):
    """Tags in balance, and everything that would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.drawings = 0
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img", "path", "use"):
            self.open.append(tag)
        self.drawings += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href") or name.endswith(":href"):
                self.fetched += [value or ""] if not (value or "").startswith("#") else []
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def test_the_page_stands_alone(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.drawings == len(list((folder / "plots").glob("*.png"))) == 7
    assert page.fetched == []
    assert "<script" not in text
    assert "@import" not in text
    assert "url(http" not in text
    assert len(page.ids) == len(set(page.ids))
    # Every colour of the drawings follows the ground they stand on.
    assert not re.search(r"(fill|stroke): #(?!0{6}|f{6})[0-9a-f]{6}", text)
    assert "prefers-color-scheme: dark" in text


def test_the_report_is_made_anew_from_what_is_stored(folder: Path) -> None:
    before = (folder / "report.md").read_text()
    (folder / "report.html").unlink()
    assert command("report", str(folder)).exit_code == 0
    assert (folder / "report.html").exists()
    assert (folder / "report.md").read_text() == before


def test_a_stopped_run_compares_no_means_over_different_seeds(folder: Path) -> None:
    experiment = store.read(folder)
    whole = {table.title: table for table in tables(experiment, experiment.arms())}
    # Stopped before the second seed of all but first come.
    experiment.runs = [run for run in experiment.runs if run.seed == 0 or run.setting == "fcfs"]
    arms = experiment.arms()
    cut = {table.title: table for table in tables(experiment, arms)}
    assert "Only the 1 of 2 seeds" in cut["Figures"].note
    assert cut["Figures"].rows[0][1] == f"{arms['fcfs'].figures[0]['jct']['mean']:.2f}" != whole["Figures"].rows[0][1]
    assert "Only the" not in whole["Figures"].note
    assert "One workload seed" in cut["Ratio to fcfs"].note
    assert "over 2 workload seeds" in whole["Ratio to fcfs"].note


def test_a_run_without_anything_to_compare_or_to_tell_is_drawn_all_the_same() -> None:
    from loadtest.experiment import AS_IT_IS, Experiment
    from loadtest.workload import Request, Workload

    rows = [Row(f"r{n}", n, n, n + 0.5, n + 1.0 + n % 3, 10 + n) for n in range(30)]
    work = Workload(tuple(Request(f"r{n}", n, "", 1, "", 10 + n) for n in range(30)))
    experiment = Experiment({}, "live", [AS_IT_IS], {0: work}, runs=[Run(AS_IT_IS, work.hash, rows)])
    plots = draw(experiment, experiment.arms())
    assert [plot.name for plot in plots] == ["jct", "length", "queue"]
    nothing = Experiment({}, "live", [AS_IT_IS], {0: work}, runs=[Run(AS_IT_IS, work.hash, [])])
    assert draw(nothing, nothing.arms()) == []


def test_slots_are_lanes_and_waiting_is_what_is_in_none() -> None:
    def leg(start: float, end: float, why: str = "finished") -> Leg:
        return Leg("e", start, start, end, 5, why)

    rows = [
        Row("a", 0, 0, 0, 9, 5, legs=[leg(0, 2, "preempted"), leg(5, 9)]),
        Row("b", 1, 1, 2, 5, 5, legs=[leg(2, 5)]),
        Row("c", 1, 1, 1, 4, 5, legs=[leg(1, 4)]),
    ]
    run = Run("x", "w", rows)
    assert [[bar[:2] for bar in lane] for lane in lanes(run)] == [[(0, 2), (2, 5), (5, 9)], [(1, 4)]]
    assert lanes(run)[0][0][3]
    steps = waiting(run)
    assert max(count for _, count in steps) == 1
    assert steps[-1] == (5, 0)


def test_a_call_that_waits_in_the_engine_is_drawn_in_the_slot_that_it_gets() -> None:
    def leg(start: float, first: float | None, end: float) -> Leg:
        return Leg("e", start, first, end, 0 if first is None else 5, "finished")

    rows = [
        Row("a", 0, 0, 0, 4, 5, legs=[leg(0, 0.1, 4)]),
        Row("b", 0, 0, 0, 6, 5, legs=[leg(0, 0.1, 6)]),
        Row("c", 1, 1, 4, 9, 5, legs=[leg(1, 4.1, 9)]),
        Row("called back", 1, 1, 4, 9, 5, legs=[leg(1, None, 2), leg(4.5, 6.1, 7)]),
    ]
    bars = [[bar[:2] for bar in lane] for lane in lanes(Run("x", "w", rows))]
    assert bars == [[(0, 4), (4, 9)], [(0, 6), (6, 7)]], "two slots are two rows"


def test_a_drawing_can_be_read_on_a_phone() -> None:
    # A drawing is as wide as its place; a phone's is 360 CSS pixels less the page's margins.
    shrunk = (360 - 2 * 14) / (72 * FIGURE[0])
    assert shrunk * min(size for name, size in SIZES.items() if name.endswith("size")) >= 8.5


def test_drawings_of_one_page_do_not_share_ids() -> None:
    svg = '<?xml?><svg width="4pt" height="3pt" viewBox="0 0 4 3"><g id="a" clip-path="url(#c)"/><use href="#a"/></svg>'
    assert adapt(svg, "p", "what it shows") == (
        '<svg role="img" aria-label="what it shows" viewBox="0 0 4 3">'
        '<g id="p-a" clip-path="url(#p-c)"/><use href="#p-a"/></svg>'
    )


# ---- stored runs ----------------------------------------------------------------------------------------------------


def test_a_run_against_itself_keeps_every_limit(folder: Path) -> None:
    result = command("compare", str(folder), str(folder), "--fail-above", "jct.mean=1.0", "--fail-below", "jct.p50=1.0")
    assert result.exit_code == 0, result.output
    assert "1.00 ± 0.00" in result.output


def test_a_broken_limit_is_said_and_is_the_exit_status(folder: Path) -> None:
    result = command("compare", f"{folder}:fcfs", f"{folder}:perfect", "--fail-above", "jct.mean=1.0")
    assert result.exit_code == 1
    assert "fcfs: jct.mean is" in result.output
    result = command("compare", f"{folder}:perfect", f"{folder}:fcfs", "--fail-above", "jct.mean=1.0")
    assert result.exit_code == 0
    # What cannot be said is no success.
    result = command("compare", f"{folder}:perfect", f"{folder}:fcfs", "--fail-above", "jct.p99=2.0")
    assert result.exit_code == 1
    assert "too few samples" in result.output


def changed(folder: Path, into: Path, change: Callable[[Run], None]) -> str:
    """The stored run, with something done to every run of isrtf."""
    experiment = store.read(folder)
    for run in experiment.runs:
        if run.setting == "isrtf":
            change(run)
    experiment.complete = all(run.complete for run in experiment.runs)
    store.write(into, experiment)
    return f"{into}:isrtf"


def test_what_was_stopped_or_lagged_keeps_no_limit(folder: Path, tmp_path: Path) -> None:
    limits = ("--fail-above", "jct.mean=9")

    def stopped(run: Run) -> None:
        run.complete = run.seed == 0

    def lagged(run: Run) -> None:
        for row in run.rows:
            row.sent += 1.0

    def refused(run: Run) -> None:
        run.rows[7].error = "status 503"

    for change, said, status in (
        (stopped, "stopped with 0 requests unfinished", 1),
        (lagged, "lagged by 1000 ms (p99): invalid", 1),
        (refused, "requests got answers of different length, or under one of the two alone", 0),
    ):
        name = changed(folder, tmp_path / change.__name__, change)
        result = command("compare", name, f"{folder}:fcfs", *limits)
        assert (said in result.output, result.exit_code) == (True, status), result.output
        assert command("compare", name, f"{folder}:fcfs").exit_code == 0
    assert command("compare", f"{folder}:isrtf", f"{folder}:fcfs", *limits).exit_code == 0


def test_a_stopped_run_is_told_of_and_compared_with_nothing(folder: Path) -> None:
    experiment = store.read(folder)
    experiment.complete = False
    for run in experiment.runs:
        run.complete = run.setting != "isrtf"
    said = verdict(experiment, experiment.arms())
    assert any("isrtf, seed 0: stopped" in line for line in said)
    assert not any(line.startswith("isrtf: ") for line in said)
    # Two seeds show little; that is not to say that nothing is there.
    assert any(re.match(r"perfect: (no difference shown|mean JCT .* than fcfs \()", line) for line in said)


def test_the_report_says_how_long_answers_are_and_how_many_seeds_there_ought_to_be(folder: Path) -> None:
    experiment = store.read(folder)
    told = "\n".join(store.introduction(experiment))
    lengths = sorted(request.tokens for request in experiment.workloads[0].requests)
    assert f"median {lengths[50]}, p90 {lengths[90]}, longest {lengths[-1]}; none of forced length" in told
    assert "predictor: noisy:0.6" in told
    assert re.search(r"load: 0.95 of a capacity of \d+ tokens/s, measured before the runs", told)
    note = tables(experiment, experiment.arms())[0].note
    assert "fewer than the 10 that a result should rest on" in note
    assert "No sjf beside it" in note


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{}:fcfs", "{}:nobody"], "no setting 'nobody'"),
        (["{}", "{}", "--fail-above", "speed=1"], "expected one of jct.mean"),
        (["{}", "{}", "--fail-above", "jct.mean"], "expected jct.mean=RATIO"),
        (["{}", "/nowhere"], "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_said(folder: Path, args: list[str], said: str) -> None:
    result = command("compare", *(arg.format(folder) for arg in args))
    assert result.exit_code == 2
    assert said in result.output


def test_other_work_is_not_compared(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    command("run", "--target", "sim:vllm-cpu", "--rate", "1", "--num-requests", "5", "--output", str(other))
    result = command("compare", f"{other}", f"{folder}:fcfs")
    assert result.exit_code == 2
    assert "not the same work" in result.output
    assert store.read(other).settings == ["isrtf"]
