"""What the learner makes of finished jobs: what it learns, from whom, how little it can be misled, what it keeps."""

from __future__ import annotations

import logging
import threading
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elis_gateway.predictor import learner as real
from elis_gateway.predictor import spread as ratios
from elis_gateway.predictor.learner import Learner, Prediction, Sight
from tests.predictor.plain_learner import Plain

FEATURES, REDUCED = 4, 8
WEIGHTS = np.random.default_rng(7).normal(size=REDUCED)
WEIGHTS *= 0.8 / np.linalg.norm(WEIGHTS)


class Traffic:
    """Answers whose length depends on the prompt's embedding: 200 tokens times e^(WEIGHTS z), times some noise."""

    def __init__(self, seed: int = 1, *, base: float = 200.0, noise: float = 0.3) -> None:
        self.rng = np.random.default_rng(seed)
        self.base, self.noise = base, noise

    def job(self) -> tuple[np.ndarray, int]:
        z = self.rng.normal(size=REDUCED)
        return z, max(1, round(self.base * np.exp(WEIGHTS @ z + self.noise * self.rng.normal())))


def sights(z: np.ndarray | None, tokens: int) -> list[Sight]:
    return [Sight(at, None, None, (log(1 + at), 0.0, 1.0, 0.5), z) for at in range(0, tokens, 50)]


def serve(
    learner: Learner, traffic: Traffic, count: int, *, model: str = "m", app: str = "a", complete: bool = True
) -> None:
    for _ in range(count):
        z, tokens = traffic.job()
        made = [learner.predict(model, app, sight) for sight in sights(z, tokens)]
        learner.learn(model, app, made, tokens, complete=complete)


def ask(learner: Learner, z: np.ndarray | None = None, *, model: str = "m", app: str = "a") -> Prediction:
    return learner.predict(model, app, Sight(0, None, None, (0.0, 0.0, 1.0, 0.5), z))


def order(learner: Learner, traffic: Traffic, *, app: str = "a") -> float:
    """Rank correlation of 200 new answers with what was predicted."""
    jobs = [traffic.job() for _ in range(200)]
    said = np.array([ask(learner, z, app=app).mean for z, _ in jobs])
    came = np.array([tokens for _, tokens in jobs])
    return float(np.corrcoef(said.argsort().argsort(), came.argsort().argsort())[0, 1])


def test_learns_what_prompts_say() -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 30)
    early = order(learner, Traffic(2))
    serve(learner, Traffic(3), 470)
    assert early > 0.2
    assert order(learner, Traffic(2)) > 0.8


def test_the_mean_is_the_mean() -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 800)
    jobs = [Traffic(9).job() for _ in range(1)] + [(z, t) for z, t in (Traffic(s).job() for s in range(10, 310))]
    said = np.mean([ask(learner, z).mean for z, _ in jobs])
    assert said == pytest.approx(np.mean([tokens for _, tokens in jobs]), rel=0.15)


def test_before_anything_was_seen_the_shipped_model_speaks() -> None:
    learner = Learner(FEATURES, REDUCED)
    short = learner.predict("m", "a", Sight(0, None, log(40.0)))
    long = learner.predict("m", "a", Sight(0, None, log(900.0)))
    assert short.mean < 0.5 * long.mean


def test_a_shipped_model_that_is_right_is_believed_and_one_that_is_wrong_is_not() -> None:
    rng = np.random.default_rng(1)
    right, wrong = Learner(0, 0), Learner(0, 0)
    for _ in range(300):
        tokens = max(1, round(rng.lognormal(log(200), 1.0)))
        right.learn("m", "a", [right.predict("m", "a", Sight(0, None, log(tokens)))], tokens, complete=True)
        noise = rng.lognormal(log(200), 1.0)
        wrong.learn("m", "a", [wrong.predict("m", "a", Sight(0, None, log(noise)))], tokens, complete=True)

    def ratio(learner: Learner) -> float:
        low, high = (learner.predict("m", "a", Sight(0, None, log(n))).scale for n in (50.0, 800.0))
        return high / low

    assert ratio(right) > 8  # of 16
    assert ratio(wrong) < 1.5


def test_a_new_application_begins_as_its_models_average_and_soon_has_its_own_mind() -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 300, app="old")
    unseen = ask(learner, app="new").mean
    assert unseen == pytest.approx(ask(learner, app="old").mean, rel=0.25)
    serve(learner, Traffic(2, base=2000.0), 60, app="new")
    assert ask(learner, np.zeros(REDUCED), app="new").mean > 1200
    assert ask(learner, np.zeros(REDUCED), app="old").mean < 500


def test_cut_off_answers_are_lower_bounds() -> None:
    honest, censored, fooled = (Learner(FEATURES, REDUCED) for _ in range(3))
    for learner, how in ((honest, "all"), (censored, "bound"), (fooled, "as if complete")):
        traffic = Traffic(1)
        for number in range(600):
            z, tokens = traffic.job()
            made = [learner.predict("m", "a", sight) for sight in sights(z, tokens)]
            cut = number % 2 == 0 and tokens > 60 and how != "all"
            length = 60 if cut else tokens
            made = [each for each in made if each.attained <= length]
            learner.learn("m", "a", made, length, complete=not cut or how == "as if complete")
    true = ask(honest, np.zeros(REDUCED)).median
    assert ask(censored, np.zeros(REDUCED)).median == pytest.approx(true, rel=0.35)
    assert ask(fooled, np.zeros(REDUCED)).median < 0.6 * true


def test_absurd_lengths_move_the_line_a_little() -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 300)
    z = np.zeros(REDUCED)
    before, ranked = ask(learner, z).scale, order(learner, Traffic(2))
    for _ in range(15):
        learner.learn("m", "a", [ask(learner, z)], 10**9, complete=True)
    assert ask(learner, z).scale < 1.6 * before
    assert order(learner, Traffic(2)) > ranked - 0.1


def test_a_client_with_absurd_lengths_spoils_its_own_estimates_only() -> None:
    clean, poisoned = Learner(FEATURES, REDUCED), Learner(FEATURES, REDUCED)
    for learner in (clean, poisoned):
        serve(learner, Traffic(1), 150, app="good")
    for number in range(600):
        sight = Sight(0, None, None, (0.0, 0.0, 1.0, 0.5), np.random.default_rng(number).normal(size=REDUCED))
        made = [poisoned.predict("m", "evil", sight)]
        poisoned.learn("m", "evil", made, 1 if number % 2 else 100_000, complete=True)
    for learner in (clean, poisoned):
        serve(learner, Traffic(2), 50, app="good")
    z = np.zeros(REDUCED)
    assert ask(poisoned, z, app="good").mean == pytest.approx(ask(clean, z, app="good").mean, rel=0.4)
    assert order(poisoned, Traffic(3), app="good") > order(clean, Traffic(3), app="good") - 0.15
    # What a newcomer starts from is bent, but not taken over.
    assert 0.3 < ask(poisoned, z, app="new").scale / ask(clean, z, app="new").scale < 4.0


def test_habits_change() -> None:
    learner = Learner(FEATURES, REDUCED, horizon=200)
    serve(learner, Traffic(1), 400)
    serve(learner, Traffic(2, base=1000.0), 400)
    assert ask(learner, np.zeros(REDUCED)).median == pytest.approx(1000, rel=0.35)


def test_the_order_does_not_follow_every_new_guess() -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 200)
    features = (log(51), 0.0, 1.0, 0.5)
    alone = learner.predict("m", "a", Sight(50, None, None, features, np.zeros(REDUCED)))
    short, long = (
        learner.predict("m", "a", Sight(50, None, None, features, np.zeros(REDUCED), first)) for first in (120.0, 900.0)
    )
    # Both estimates are of the same moment; what was said at first pulls at the index, more than at the mean.
    assert short.gittins < alone.gittins < long.gittins
    assert long.gittins / short.gittins > 2 * long.mean / short.mean
    bounded = learner.predict("m", "a", Sight(50, 60, None, features, np.zeros(REDUCED), 5000.0))
    assert 1.0 <= bounded.gittins <= 60


def test_a_line_that_says_too_much_is_followed_by_half() -> None:
    """Twenty answers, more inputs than that, and all of it noise: estimates stay near each other."""
    rng = np.random.default_rng(1)
    learner = Learner(0, 40)
    for _ in range(60):
        z = rng.normal(size=40)
        learner.learn(
            "m",
            "a",
            [learner.predict("m", "a", Sight(0, None, None, None, z))],
            int(rng.integers(20, 900)),
            complete=True,
        )
    said = [learner.predict("m", "a", Sight(0, None, None, None, rng.normal(size=40))).mean for _ in range(50)]
    assert max(said) / min(said) < 4


def test_an_input_beyond_what_was_seen_says_no_more_than_the_largest_seen() -> None:
    rng = np.random.default_rng(1)
    learner = Learner(2, 0)
    for _ in range(100):
        wanted = float(rng.normal())
        tokens = round(200 * np.exp(0.5 * wanted))
        learner.learn(
            "m", "a", [learner.predict("m", "a", Sight(0, None, None, (wanted, 0.0)))], max(tokens, 1), complete=True
        )
    usual, absurd = (learner.predict("m", "a", Sight(0, None, None, (x, 9.0))).mean for x in (3.5, 1000.0))
    assert absurd == pytest.approx(usual, rel=0.2)


def test_one_answer_with_a_rare_word_decides_nothing() -> None:
    """A counter that is zero but for one absurdly short answer, asked about when it is not zero."""
    learner = Learner(2, 0)
    rng = np.random.default_rng(1)
    for number in range(100):
        rare = float(number == 50)
        sight = Sight(0, None, None, (7.0 * rare, 0.0))
        tokens = 2 if rare else int(rng.integers(100, 500))
        learner.learn("m", "a", [learner.predict("m", "a", sight)], tokens, complete=True)
    with_it, without = (learner.predict("m", "a", Sight(0, None, None, (x, 0.0))).mean for x in (7.0, 0.0))
    assert with_it > 0.5 * without


@pytest.mark.patches
@pytest.mark.parametrize("unit", [1e9, 3.0])
def test_is_the_plain_mathematics_done_in_less_time(monkeypatch: pytest.MonkeyPatch, unit: float) -> None:
    """Growing units, rows gathered a few at a time, tables made when asked for: a stream of jobs in two applications,
    some cut off, comes out as where everything fades by multiplication and is made anew every time."""
    for module in (real, ratios):
        monkeypatch.setattr(module, "RENEW", 0.0)
        monkeypatch.setattr(module, "UNIT", unit)  # 3: units are made small again all the time
    monkeypatch.setattr(ratios.Spread, "_next", lambda self: 0)
    fast, plain = Learner(FEATURES, REDUCED), Plain(FEATURES, REDUCED)
    traffic = Traffic(5)
    for number in range(60):
        z, tokens = traffic.job()
        app = "ab"[number % 3 == 0]
        seen, made = [], []
        for at, sight in zip(range(0, tokens, 50), sights(z, tokens), strict=True):
            sight = sight._replace(shipped=4.0 + 0.5 * z[0], first=made[0].whole if made else None)
            made.append(fast.predict("m", app, sight))
            seen.append(plain.see("m", app, sight))
            mean, median, scale = plain.predict("m", app, sight)
            assert made[-1].scale == pytest.approx(scale, rel=1e-3), (number, at)
            assert made[-1].mean == pytest.approx(mean, rel=1e-3)
            assert made[-1].median == pytest.approx(median, rel=1e-3)
        complete = number % 7 != 0
        fast.learn("m", app, made[:16], tokens, complete=complete)
        plain.learn("m", app, seen[:16], tokens, complete)


def test_memory_is_bounded() -> None:
    learner = Learner(FEATURES, 2, max_apps=5)
    for number in range(50):
        learner.learn(f"m{number}", "a", [ask(learner, model=f"m{number}")], 10, complete=True)
    assert len(learner._apps) == 5
    assert len(learner._models) == 5


def test_a_job_of_a_thousand_windows_teaches_as_much_as_one_of_sixteen() -> None:
    learner = Learner(FEATURES, REDUCED)
    made = [learner.predict("m", "a", sight) for sight in sights(np.zeros(REDUCED), 50_000)]
    learner.learn("m", "a", made, 50_000, complete=True)
    assert len(learner._all.weights) <= 16


@settings(max_examples=60, deadline=None)
@given(
    taught=st.lists(st.tuples(st.integers(1, 200_000), st.booleans(), st.integers(0, 3)), max_size=30),
    attained=st.integers(0, 100_000),
    allowed=st.one_of(st.none(), st.integers(-1, 10**7)),
    shipped=st.one_of(st.none(), st.floats(-50.0, 50.0)),
)
def test_whatever_was_seen_an_estimate_is_sane(
    taught: list[tuple[int, bool, int]], attained: int, allowed: int | None, shipped: float | None
) -> None:
    learner = Learner(1, 2)
    for tokens, complete, app in taught:
        sight = Sight(0, None, 3.0, (1.0,), np.array([0.1 * app, -1.0]))
        learner.learn("m", str(app), [learner.predict("m", str(app), sight)], tokens, complete=complete)
    said = learner.predict("m", "1", Sight(attained, allowed, shipped, (0.5,), np.array([1.0, 1.0])))
    most = 1e6 if allowed is None else max(allowed, 1)
    assert 1.0 <= said.gittins <= said.mean * (1 + 1e-9) <= most * 50
    assert said.median >= 1.0
    if allowed is not None:
        assert said.mean <= most
        assert said.median <= most


def test_is_kept_across_restarts(tmp_path: Path) -> None:
    learner = Learner(FEATURES, REDUCED, layout="one")
    serve(learner, Traffic(1), 120)
    serve(learner, Traffic(2, base=900.0), 60, app="b")
    learner.save(tmp_path / "state")
    again = Learner(FEATURES, REDUCED, layout="one")
    again.load(tmp_path / "state")
    z, _ = Traffic(3).job()
    for app in ("a", "b", "never seen"):
        # The one that was not restarted follows a line that is up to a tenth of its answers old.
        assert ask(again, z, app=app).mean == pytest.approx(ask(learner, z, app=app).mean, rel=0.25)
    serve(again, Traffic(4), 10)


def test_what_is_saved_while_learning_goes_on_is_whole(tmp_path: Path) -> None:
    learner = Learner(FEATURES, REDUCED, horizon=1)  # units grow so fast that they are made small again all the time
    serve(learner, Traffic(1), 40)
    done = threading.Event()

    def save() -> None:
        while not done.is_set():
            learner.save(tmp_path / "state")

    saver = threading.Thread(target=save)
    saver.start()
    for number in range(60):
        serve(learner, Traffic(number), 1, app=f"{number}")
        again = Learner(FEATURES, REDUCED, horizon=1)
        if (tmp_path / "state").exists():
            again.load(tmp_path / "state")
            assert again._all.moments[0, 0] < 9.0
            assert 1 < ask(again).mean < 20_000
    done.set()
    saver.join()


def test_of_another_models_state_the_history_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learner = Learner(FEATURES, REDUCED, layout="one")
    serve(learner, Traffic(1), 50)
    learner.save(tmp_path / "state")
    other = Learner(FEATURES, REDUCED + 1, layout="two")
    with caplog.at_level(logging.INFO):
        other.load(tmp_path / "state")
    assert "another model" in caplog.text
    assert other.history.median("m", "a", 0) == pytest.approx(learner.history.median("m", "a", 0), rel=0.01)


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_state_costs_what_was_learned_and_nothing_else(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 20)
    path = tmp_path / "state"
    learner.save(path)
    there = path.read_bytes()[:-2000] if damage is None else damage
    path.write_bytes(there)
    again = Learner(FEATURES, REDUCED)
    again.load(path)
    assert "starting without it" in caplog.text
    serve(again, Traffic(2), 5)
    for _ in range(2):
        again.save(path)
        assert (tmp_path / "state.unread").read_bytes() == there  # a newer version's, perhaps


def test_a_state_with_numbers_that_are_none_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learner = Learner(FEATURES, REDUCED)
    serve(learner, Traffic(1), 20)
    learner._all.seen = np.nan
    learner.save(tmp_path / "state")
    again = Learner(FEATURES, REDUCED)
    again.load(tmp_path / "state")
    assert "finite" in caplog.text


def test_another_shipped_model_keeps_what_still_fits() -> None:
    learner = Learner(FEATURES, REDUCED, layout="one")
    serve(learner, Traffic(1), 200)
    z, _ = Traffic(3).job()
    before = ask(learner, z).mean
    learner.fit(FEATURES, REDUCED, "one")
    assert ask(learner, z).mean == before
    learner.fit(FEATURES, REDUCED, "two")
    assert ask(learner, z).mean != before
    assert learner.history.median("m", "a", 0) > 100
