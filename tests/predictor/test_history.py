"""What the history learns, believes, forgets and keeps."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.predictor.base import Estimate, View
from elis_gateway.predictor.history import History


def view(attained: int, *, app: str = "app", model: str = "model", allowed: int | None = None) -> View:
    return View("job", model, app, "", "", attained, allowed)


def ask(history: History, attained: int = 0, *, app: str = "app", model: str = "model") -> Estimate:
    estimate = history.instant(view(attained, app=app, model=model))
    assert estimate is not None
    return estimate


def teach(
    history: History, lengths: list[int], *, app: str = "app", model: str = "model", complete: bool = True
) -> None:
    for tokens in lengths:
        history.learn(view(tokens, app=app, model=model), complete=complete)


def lognormal(median: float, sigma: float, count: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [max(1, round(median * rng.lognormvariate(0.0, sigma))) for _ in range(count)]


def test_says_nothing_before_the_first_answer() -> None:
    history = History()
    assert history.instant(view(0)) is None
    teach(history, [100])
    assert history.instant(view(0)) is not None


def test_learns_the_mean() -> None:
    history = History()
    lengths = lognormal(200, 0.5, 3000)
    teach(history, lengths)
    recent = lengths[-1000:]
    assert ask(history).remaining == pytest.approx(sum(recent) / len(recent), rel=0.06)


def test_what_remains_is_conditioned_on_what_was_attained() -> None:
    history = History(horizon=1e6)
    lengths = [20] * 500 + [1000] * 500
    random.Random(1).shuffle(lengths)
    teach(history, lengths)
    fresh, survivor = ask(history, 0), ask(history, 50)
    assert fresh.remaining == pytest.approx(510, rel=0.1)
    assert survivor.remaining == pytest.approx(950, rel=0.1)  # longer than at the start: the short ones are out
    assert fresh.gittins is not None
    assert fresh.gittins == pytest.approx(40, rel=0.15)
    assert ask(history, 900).remaining == pytest.approx(100, rel=0.35)


def test_applications_have_habits_and_new_ones_start_at_the_models() -> None:
    history = History()
    for _ in range(300):
        teach(history, [10], app="short")
        teach(history, [1000], app="long")
    assert ask(history, app="short").remaining < 40
    assert ask(history, app="long").remaining > 800
    assert ask(history, app="never seen").remaining == pytest.approx(505, rel=0.2)


def test_a_few_answers_move_an_application_a_little_and_many_move_it_all_the_way() -> None:
    history = History()
    teach(history, lognormal(500, 0.5, 1000), app="other")
    start = ask(history, app="new").remaining
    means = []
    for count in (1, 4, 15, 80, 400):
        teach(history, [20] * count, app="new")
        means.append(ask(history, app="new").remaining)
    assert start > means[0] > means[1] > means[2] > means[3] > means[4]
    assert means[0] > 0.6 * start
    assert means[-1] < 40


def test_another_models_answers_count_only_where_nothing_else_is_known() -> None:
    history = History()
    teach(history, [800] * 500, model="a")
    teach(history, [30] * 500, model="b")
    assert ask(history, model="a").remaining > 600
    assert ask(history, model="b").remaining < 60
    assert 100 < ask(history, model="c").remaining < 700


def test_cut_off_answers_are_lower_bounds() -> None:
    lengths = lognormal(300, 0.7, 4000)
    fair = sum(lengths) / len(lengths)
    naive, careful = History(horizon=1e6), History(horizon=1e6)
    for tokens in lengths:
        teach(naive, [min(tokens, 250)])
        teach(careful, [min(tokens, 250)], complete=tokens < 250)
    # The naive reading believes that nothing is longer than the cut.
    assert ask(naive).remaining < 260
    assert ask(careful).remaining > 280
    # Half the answers cut at random moments: Kaplan-Meier gets the mean back.
    rng = random.Random(2)
    careful = History(horizon=1e6)
    for tokens in lengths:
        left_at = round(rng.expovariate(1 / 600)) + 1
        teach(careful, [min(tokens, left_at)], complete=tokens <= left_at)
    assert ask(careful).remaining == pytest.approx(fair, rel=0.05)


def test_old_habits_fade() -> None:
    history = History(horizon=200)
    teach(history, [1000] * 2000)
    assert ask(history).remaining > 900
    teach(history, [50] * 1000)
    assert ask(history).remaining < 80


def test_an_estimate_stops_at_what_is_allowed() -> None:
    history = History()
    teach(history, [10] * 300 + [1000] * 300)
    estimate = history.instant(view(0, allowed=100))
    assert estimate is not None
    assert estimate.remaining == pytest.approx(55, rel=0.15)  # not the mean cut to 100, but the mean of what is cut


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.booleans(), st.sampled_from("abc")), min_size=1, max_size=60),
    st.integers(0, 300_000),
    st.none() | st.integers(1, 200_000),
)
def test_always_within_what_is_allowed(
    answers: list[tuple[int, bool, str]], attained: int, allowed: int | None
) -> None:
    history = History()
    for tokens, complete, app in answers:
        history.learn(view(tokens, app=app), complete=complete)
    estimate = history.instant(view(attained, app="a", allowed=allowed))
    if estimate is not None:
        assert estimate.gittins is not None
        assert 1 <= estimate.gittins <= estimate.remaining + 1e-9
        assert estimate.remaining <= (float("inf") if allowed is None else allowed)


def test_memory_is_bounded_and_the_least_used_application_goes_first() -> None:
    history = History(max_apps=50)
    tracemalloc.start()
    try:
        for number in range(400):
            teach(history, [700] * 3, app="kept")
            teach(history, [10] * 3, app=f"app-{number}")
            ask(history, app=f"app-{number}")
            if number == 100:
                before, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < before * 1.2 + 50_000
    assert ask(history, app="kept").remaining > 500


def test_invented_names_push_out_no_real_application_and_bend_newcomers_by_half_at_most() -> None:
    history = History(max_apps=40)
    for number in range(20):
        teach(history, [700] * 20, app=f"real-{number}")
    for number in range(3000):
        teach(history, [3], app=f"invented-{number}")
        if number % 10 == 0:
            teach(history, [700], app=f"real-{number // 10 % 20}")
    assert len(history._apps) == 40
    for number in range(20):
        assert ask(history, app=f"real-{number}").remaining > 500
    # Three thousand names together count for newcomers about as much as the others do.
    assert ask(history, app="new").remaining > 150


def test_one_name_per_request_is_no_reason_to_learn_nothing() -> None:
    history = History(max_apps=40)
    for number in range(300):
        teach(history, [700], app=f"conversation-{number}")
    assert ask(history, app="new").remaining > 500


def test_counts_never_overflow() -> None:
    history = History(horizon=1, strength=0.01)  # every answer counts twice as much as the one before
    teach(history, [100] * 500)
    assert 20 < ask(history).remaining < 200


def test_is_kept_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    history = History(path)
    for number in range(600):
        teach(history, lognormal(100 + 400 * (number % 3), 0.5, 1, seed=number), app=f"app-{number % 3}")
    teach(history, [5000] * 5, complete=False)
    history.save()
    again = History(path)
    for app in ("app-0", "app-1", "app-2", "new"):
        for attained in (0, 50, 400, 3000):
            # The one that was not restarted may hold a table that is 3 % of its answers old.
            assert ask(again, attained, app=app).remaining == pytest.approx(
                ask(history, attained, app=app).remaining, rel=0.05
            )
    again.save()
    assert json.loads(path.read_text())["version"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 99}',
        '{"version": 1, "all": {"seen": "x"}}',
        '{"version": 1, "all": {"seen": 1, "ended": {"5": -3}, "lasted": {}, "partly": {}}, "models": [], "apps": []}',
    ],
)
def test_a_file_that_cannot_be_read_costs_the_history_not_the_service(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    history = History(path)
    assert history.instant(view(0)) is None
    assert "starting without it" in caplog.text
    teach(history, [10])
    history.save()
    assert History(path).instant(view(0)) is not None
    # A newer version's, or nothing of ours at all: not to be lost.
    assert (tmp_path / "history.json.unread").read_text() == content
    history.save()
    assert (tmp_path / "history.json.unread").read_text() == content


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.json"
    history = History(path)
    teach(history, [10] * 10)
    history.save()
    before = path.read_bytes()
    monkeypatch.setattr(json.JSONEncoder, "iterencode", lambda *_: iter(["{", 1 / 0]))
    teach(history, [1000] * 10)
    with pytest.raises(ZeroDivisionError):
        history.save()
    assert path.read_bytes() == before


def test_options_are_checked() -> None:
    for options in ({"strength": 0.0}, {"horizon": 0.5}, {"max_apps": 0}):
        with pytest.raises(ValueError, match="history"):
            History(**options)
