"""What every predictor must do, as checks that anyone can run on their own: from pytest, or alone.

    from elis_gateway.predictor import conformance

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
    def test_my_predictor(check):
        check(lambda: MyPredictor(...))

Each check takes a function that makes a fresh predictor, and raises AssertionError saying what is wrong.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Callable, Iterator

from elis_gateway.predictor.base import Estimate, Predictor, View

__all__ = ["CHECKS", "check_estimates", "check_flags", "check_forgets", "check_refine", "check_speed", "views"]

Make = Callable[[], Predictor]

INSTANT_BUDGET = 0.001
"""Seconds that ``instant`` and ``learn`` may take on average: they run on the event loop."""


def views(count: int = 400, *, seed: int = 1) -> Iterator[View]:
    """Jobs of all kinds: several models and applications, text in several scripts, known and unknown limits."""
    rng = random.Random(seed)
    prompts = (
        "",
        "Say hello.",
        "안녕하세요, 소개해 주세요.",
        "写一首诗",
        "🙂" * 20,
        "def f(x):\n    return x\n" * 40,
        "\ud800",
    )
    for number in range(count):
        attained = rng.choice((0, 0, 1, 50, 51, 999, 10**6))
        yield View(
            job_id=f"job-{number}",
            model=rng.choice(("a", "b")),
            app=rng.choice(("", "chat", "code")),
            prompt=rng.choice(prompts),
            answer=rng.choice(prompts) if attained else "",
            attained=attained,
            allowed=rng.choice((None, 1, 2, 50, 1000, 10**6)),
        )


def _check(estimate: Estimate | None, view: View) -> None:
    if estimate is None:
        return
    assert isinstance(estimate, Estimate), f"expected Estimate or None, got {type(estimate).__name__}"
    most = float("inf") if view.allowed is None else view.allowed
    for name, value in (("remaining", estimate.remaining), ("gittins", estimate.gittins)):
        if value is not None:
            assert isinstance(value, float | int), f"{name}: expected a number, got {value!r}"
            assert value < float("inf"), f"{name}: {value!r} is not finite"
            assert 1 <= value <= most, (
                f"{name}: {value!r} is not within 1 .. tokens still allowed ({view.allowed}) after {view.attained}"
            )
    assert isinstance(estimate.source, str), f"source: expected a string, got {estimate.source!r}"


def check_flags(make: Make) -> None:
    """``reads_text`` and ``refines`` are booleans, ``refine`` is a coroutine, the protocol is complete."""
    predictor = make()
    assert isinstance(predictor, Predictor), (
        "does not have everything that elis_gateway.predictor.base.Predictor asks for"
    )
    assert isinstance(predictor.reads_text, bool), "reads_text: expected True or False"
    assert isinstance(predictor.refines, bool), "refines: expected True or False"
    assert inspect.iscoroutinefunction(predictor.refine), "refine: expected 'async def'"


def check_estimates(make: Make) -> None:
    """Whatever was learned, and whatever the job: no exception, and estimates within 1 .. tokens still allowed."""
    predictor = make()
    for view in views(100):
        _check(predictor.instant(view), view)
    for number, view in enumerate(views(seed=2)):
        _check(predictor.instant(view), view)
        predictor.learn(view, complete=number % 3 > 0)
        _check(predictor.instant(view), view)
    for view in views(100, seed=3):
        _check(predictor.instant(view), view)


def check_refine(make: Make) -> None:
    """``refine`` answers every view, in order, and leaves the views alone; no views, no answers."""
    predictor = make()
    asked = list(views(40))
    for view in asked[:20]:
        predictor.learn(view, complete=True)

    async def ask() -> tuple[list[Estimate | None], list[Estimate | None]]:
        return await predictor.refine(asked), await predictor.refine([])

    answers, none = asyncio.run(ask())
    assert list(none) == [], "refine of no views: expected no estimates"
    assert len(answers) == len(asked), f"refine: expected {len(asked)} estimates, got {len(answers)}"
    for view, estimate in zip(asked, answers, strict=True):
        _check(estimate, view)


def check_forgets(make: Make) -> None:
    """News of a job that it never heard of, or has heard the end of, is no reason to fail; ``save`` may be repeated."""
    predictor = make()
    view = View("unknown", "new model", "new app", "", "", 17, None)
    predictor.learn(view, complete=False)
    predictor.learn(view, complete=True)
    predictor.learn(view._replace(attained=0), complete=False)
    _check(predictor.instant(view), view)
    predictor.save()
    predictor.save()


def check_speed(make: Make) -> None:
    """``instant`` and ``learn`` do not hold up the event loop: a millisecond on average is far too much."""
    predictor = make()
    asked = list(views(400))
    begun = time.thread_time()
    for view in asked:
        predictor.instant(view)
        predictor.learn(view, complete=True)
    took = (time.thread_time() - begun) / len(asked)
    assert took < INSTANT_BUDGET, f"instant and learn take {took * 1e6:.0f} microseconds together"


CHECKS = (check_flags, check_estimates, check_refine, check_forgets, check_speed)
"""All of them."""
