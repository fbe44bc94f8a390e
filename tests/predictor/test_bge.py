"""The predictor that ships: who waits for whom, what is cached, learned, distrusted, exchanged."""

from __future__ import annotations

import asyncio
import builtins
import json
import logging
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elis_gateway.errors import ConfigError
from elis_gateway.predictor.base import Estimate, View
from elis_gateway.predictor.bge import EncodeOnce, Paper, make
from elis_gateway.predictor.history import History
from elis_gateway.predictor.make import make_predictor
from elis_gateway.tasks import spawn
from tests.predictor import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "models")


def once(folder: Path, **options: Any) -> EncodeOnce:
    """With patience for a machine that stands still, unless impatience is the point."""
    made = make(folder, **{"deadline": 60.0, **options})
    assert isinstance(made, EncodeOnce)
    return made


def view(prompt: str, attained: int = 0, *, job: str = "j", answer: str = "", app: str = "a", model: str = "m") -> View:
    return View(job, model, app, prompt, answer or "hello " * attained, attained, None)


def sure(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate


class Held:
    """Holds the encoder until it is let go; counts what it encodes."""

    def __init__(self, predictor: EncodeOnce | Paper) -> None:
        self.batches: list[int] = []
        self.free = False
        real = predictor.model.encode

        def encode(texts: Sequence[tuple[str, str]]) -> Any:
            while not self.free:
                time.sleep(0.001)
            self.batches.append(len(texts))
            return real(texts)

        predictor.model.encode = encode  # type: ignore[method-assign]


async def test_nobody_waits_for_the_encoder(folder: Path) -> None:
    predictor = once(folder)
    held = Held(predictor)
    long, short = view("long long tale", job="1"), view("short", job="2")
    first = sure(predictor.instant(long)).remaining
    assert first == sure(predictor.instant(short)).remaining  # nothing is known of either prompt yet
    asked = [spawn(predictor.refine([each]), name="refine") for each in (long, short)]
    await asyncio.sleep(0.01)
    assert sure(predictor.instant(long)).remaining == first
    held.free = True
    ([of_long], [of_short]) = await asyncio.gather(*asked)
    assert sure(of_long).remaining > 1.2 * first > 1.2 * sure(of_short).remaining
    assert not predictor.wants_refining(long)
    assert sure(predictor.instant(long)).remaining == sure(of_long).remaining
    predictor.close()


async def test_a_job_that_ends_while_its_prompt_is_encoded_leaves_nothing(folder: Path) -> None:
    predictor = once(folder)
    held = Held(predictor)
    short = view("short")
    predictor.instant(short)
    asked = spawn(predictor.refine([short]), name="refine")
    await asyncio.sleep(0.01)
    predictor.learn(view("short", 3), complete=True)
    held.free = True
    assert await asked == [None]
    assert not predictor._jobs, "nobody will ever take away what is remembered of a job that is over"
    assert not predictor.wants_refining(view("short", job="another")), "its prompt is known all the same"
    predictor.close()


async def test_several_at_once_are_told_what_each_would_be_told(folder: Path) -> None:
    one, together = once(folder), once(folder)
    for predictor in (one, together):
        await predictor.refine([view("long long tale", job="0"), view("short", job="1")])
    for at in (0, 50, 100):
        views = [view(("long long tale", "short", "unknown")[n % 3], at, job=f"{n}") for n in range(7)]
        said = together.instants(views)
        assert [sure(each).remaining for each in said] == pytest.approx(
            [sure(one.instant(each)).remaining for each in views], rel=1e-5
        )
        assert [sure(each).source for each in said] == ["bge", "bge", "bge-instant"] * 2 + ["bge"]
    assert together.instants([]) == []
    one.close()
    together.close()


async def test_a_prompt_is_encoded_once_however_many_ask(folder: Path) -> None:
    predictor = once(folder, cached_prompts=2)
    held = Held(predictor)
    asked = [spawn(predictor.refine([view("long", job=f"{n}")]), name="refine") for n in range(5)]
    await asyncio.sleep(0.01)
    held.free = True
    await asyncio.gather(*asked)
    assert held.batches == [1]
    for prompt in ("short", "tale", "long"):
        await predictor.refine([view(prompt, job=prompt)])
    assert held.batches == [1] * 4  # room for two: "long" was forgotten
    assert predictor.counts["encoded"] == 4
    predictor.close()


async def test_a_prompt_that_is_asked_again_and_again_is_kept_and_counted(folder: Path) -> None:
    """As the driver asks: at once first, and the encoder only where that is wanted."""
    predictor = once(folder, cached_prompts=2)

    async def arrives(prompt: str, job: str) -> None:
        predictor.instant(view(prompt, job=job))
        if predictor.wants_refining(view(prompt, job=job)):
            await predictor.refine([view(prompt, job=job)])

    await arrives("hello", "early")
    for number in range(6):
        await arrives("long", f"often {number}")
        await arrives(f"tale {number}", f"once {number}")
    assert predictor.counts == {"encoded": 8, "cached": 5, "shed": 0, "failed": 0}
    # What was encoded for a job stays its own, though the cache has forgotten the prompt.
    assert not predictor.wants_refining(view("hello", 50, job="early"))
    assert predictor.wants_refining(view("hello", job="late"))
    predictor.close()


async def test_a_busy_encoder_sheds_and_the_instant_estimate_stands(folder: Path) -> None:
    predictor = once(folder, deadline=0.05)
    held = Held(predictor)
    asked = [spawn(predictor.refine([view(f"tale {n}", job=f"{n}")]), name="refine") for n in range(20)]
    await asyncio.sleep(0.1)
    held.free = True
    answers = [answer for [answer] in await asyncio.gather(*asked)]
    assert predictor.counts["shed"] >= 17
    assert sum(answer is None for answer in answers) == predictor.counts["shed"]
    assert predictor.instant(view("tale 19", job="19")) is not None
    predictor.close()


async def test_an_encoder_that_fails_costs_the_embedding_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    predictor = once(folder)

    def broken(*args: Any) -> Any:
        raise ValueError("encoder: no numbers")

    predictor.model.encode = broken  # type: ignore[method-assign]
    assert await predictor.refine([view("long")]) == [None]
    assert predictor.counts["failed"] == 1
    assert "no numbers" in caplog.text
    predictor.model.head = broken  # type: ignore[method-assign]
    assert sure(predictor.instant(view("long"))).remaining >= 1.0
    predictor.close()


def serve(predictor: EncodeOnce, count: int, tokens: Callable[[random.Random, bool], int], *, app: str = "a") -> None:
    """Jobs whose prompts are known, from arrival to end. ``tokens``: the answer's length, by what was asked for."""
    rng = random.Random(app + str(count))
    for number in range(count):
        long = rng.random() < 0.5
        prompt = "long tale" if long else "short"
        length = tokens(rng, long)
        for at in range(0, min(length, 400), 50):
            predictor.instant(view(prompt, at, job=f"{app}{number}", app=app))
        predictor.learn(view(prompt, length, job=f"{app}{number}", app=app), complete=True)


async def known(predictor: EncodeOnce) -> None:
    await predictor.refine([view("long tale", job="x"), view("short", job="y")])


async def test_learns_from_what_it_serves_even_that_the_model_is_wrong(folder: Path) -> None:
    """Where "short" prompts have long answers."""
    predictor = once(folder)
    await known(predictor)
    before = [sure(predictor.instant(view(p, job=p))).remaining for p in ("long tale", "short")]
    serve(predictor, 150, lambda rng, long: rng.randint(30, 60) if long else rng.randint(600, 900))
    after = [sure(predictor.instant(view(p, job=p))).remaining for p in ("long tale", "short")]
    assert before[0] > before[1]
    assert after[0] < 150
    assert after[1] > 400
    predictor.close()


async def test_what_was_learned_is_kept_and_learning_can_be_refused(folder: Path, tmp_path: Path) -> None:
    def habit(rng: random.Random, long: bool) -> int:
        return rng.randint(900, 1200)

    predictor = once(folder, state=tmp_path / "learned.npz")
    serve(predictor, 60, habit)
    predictor.save()
    again = once(folder, state=tmp_path / "learned.npz")
    assert sure(again.instant(view("hello"))).remaining == pytest.approx(
        sure(predictor.instant(view("hello"))).remaining, rel=0.1
    )
    refusing = once(folder, learn=False, state=tmp_path / "nothing.npz")
    before = sure(refusing.instant(view("hello", job="z"))).remaining
    serve(refusing, 60, habit)
    refusing.save()
    assert sure(refusing.instant(view("hello", job="z"))).remaining == before
    assert not (tmp_path / "nothing.npz").exists()
    # Numbers only: neither prompts nor answers are in the file.
    with np.load(tmp_path / "learned.npz") as file:
        assert b"hello" not in file["names"].tobytes()


async def test_korean_is_counted_in_the_engines_tokens(folder: Path) -> None:
    """The engine's tokenizer makes half as many tokens of Korean as the training one; of English as many."""
    korean = "오늘은 날씨가 아주 좋아서 친구와 함께 공원에 갔습니다. "
    english = "The quick brown fox jumps over the lazy dog and sleeps. "
    predictor = once(folder)
    from elis_gateway.predictor.units import training_tokens

    for number in range(60):
        for text, share in ((korean, 0.5), (english, 1.0)):
            answer = text * (10 + number % 7)
            served = round(share * training_tokens(answer))
            job = f"{share}{number}"
            predictor.instant(view("hello", job=job, app=job[:3]))
            predictor.learn(View(job, "m", job[:3], "hello", answer, served, None), complete=True)
    assert predictor.units.ratio("m", "hangul") == pytest.approx(0.5, rel=0.1)
    assert predictor.units.ratio("m", "latin") == pytest.approx(1.0, rel=0.1)
    # The same shipped prediction, of e^5 training tokens, is half as many of the engine's where the answer is Korean.
    views = [
        View("k", "m", "0.5", "hello", korean * 4, 50, None),
        View("e", "m", "1.0", "hello", english * 4, 50, None),
    ]
    half, full = predictor._sights(views, [predictor._trace(each) for each in views], [None, None])
    assert half.shipped is not None
    assert full.shipped is not None
    assert np.exp(half.shipped - full.shipped) == pytest.approx(0.5, rel=0.15)
    # And a served token is worth two of those that the counters know.
    from elis_gateway.predictor import features

    at = features.FEATURES.index("attained")
    assert half.features is not None
    assert np.expm1(half.features[at]) == pytest.approx(100, rel=0.15)
    predictor.close()


def counting(folder: Path, **ratio: float) -> Path:
    """The folder of a head that was trained on another tokenizer's tokens."""
    path = folder / "manifest.json"
    sheet = json.loads(path.read_text())
    sheet["head"]["unit_ratio"] = ratio
    path.write_text(json.dumps(sheet))
    return folder


async def test_a_head_that_counts_the_engine_s_own_tokens_is_not_converted_again(tmp_path: Path) -> None:
    """Retrained on Korean traffic, counted with the engine's tokenizer, which makes half as many tokens of it."""
    from elis_gateway.predictor import features
    from elis_gateway.predictor.units import training_tokens

    korean = "오늘은 날씨가 아주 좋아서 친구와 함께 공원에 갔습니다. "
    predictor = once(counting(tiny.build(tmp_path / "once"), hangul=0.5))
    paper = make(counting(tiny.build(tmp_path / "paper", paper=True), hangul=0.5), deadline=60.0)
    assert isinstance(paper, Paper)
    answer = korean * 20
    for each in (predictor, paper):
        for number in range(60):
            asked = View(f"{number}", "m", "a", "hello", answer, round(0.5 * training_tokens(answer)), None)
            each.learn(asked, complete=True)
    asked = View("k", "m", "a", "hello", korean * 4, 50, None)
    [sight] = predictor._sights([asked], [predictor._trace(asked)], [None])
    assert sight.shipped == pytest.approx(5.0, abs=0.05)
    assert sight.features is not None
    assert np.expm1(sight.features[features.FEATURES.index("attained")]) == pytest.approx(50, rel=0.05)
    [said] = await paper.refine([asked])
    assert sure(said).remaining == pytest.approx(np.exp(5.0), rel=0.05)
    predictor.close()
    paper.close()


async def test_a_client_with_absurd_answers_spoils_its_own_estimates(folder: Path) -> None:
    predictor = once(folder)
    await known(predictor)

    def honest(rng: random.Random, long: bool) -> int:
        return rng.randint(300, 500) if long else rng.randint(20, 60)

    serve(predictor, 150, honest, app="good")
    serve(predictor, 600, lambda rng, long: 1 if long else 100_000, app="evil")
    serve(predictor, 40, honest, app="good")
    long, short = (sure(predictor.instant(view(p, job=p, app="good"))).remaining for p in ("long tale", "short"))
    assert 200 < long < 600
    assert 25 < short < 80
    predictor.close()


async def test_a_worse_predictor_than_history_is_replaced_by_it_and_returns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = once(folder, learn=False)
    await known(predictor)
    rng = random.Random(1)
    lies = [True]
    real = predictor.learner.predict

    def predict(model: str, app: str, sight: Any) -> Any:
        """Says anything, while it lies."""
        said = real(model, app, sight)
        return said._replace(mean=rng.uniform(1.0, 2000.0)) if lies[0] else said

    monkeypatch.setattr(predictor.learner, "predict", predict)
    # History knows the two applications apart.
    for app, tokens in (("chat", 900), ("classify", 30)):
        for _ in range(20):
            predictor.learner.history.learn(view("", tokens, app=app), complete=True)

    def traffic(count: int) -> None:
        for number in range(count):
            app = "chat" if number % 2 else "classify"
            prompt, tokens = ("long tale", 900) if number % 2 else ("short", 30)
            job = f"{count}-{number}"
            predictor.instant(view(prompt, job=job, app=app))
            predictor.learn(view(prompt, tokens + number % 13, job=job, app=app), complete=True)

    traffic(100)
    assert sure(predictor.instant(view("short", job="a", app="chat"))).source == "history"
    assert "using history" in caplog.text
    assert [score.trusted for score in predictor.scores() if score.model == "m"] == [False]
    lies[0] = False
    traffic(250)
    assert sure(predictor.instant(view("short", job="b", app="chat"))).source == "bge"
    predictor.close()


async def test_the_published_method_waits_and_reads_what_was_answered(tmp_path: Path) -> None:
    predictor = make(tiny.build(tmp_path, paper=True), deadline=60.0)
    assert isinstance(predictor, Paper)
    assert predictor.instant(view("long")) is None
    [before] = await predictor.refine([view("long")])
    [after] = await predictor.refine([view("long", 50, answer="short " * 20)])
    assert sure(before).remaining > sure(after).remaining
    assert sure(before).gittins is None
    [bounded] = await predictor.refine([view("long")._replace(allowed=3)])
    assert sure(bounded).remaining == 3.0
    predictor.close()


async def test_the_published_method_is_scored_beside_history_and_never_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is wrong about both applications, which history knows apart."""
    predictor = make(tiny.build(tmp_path, paper=True), deadline=60.0)
    assert isinstance(predictor, Paper)
    for number in range(96):
        app, prompt, tokens = (("chat", "short", 900), ("classify", "long", 30))[number % 2]
        asked = view(prompt, job=f"{number}", app=app)
        [said] = await predictor.refine([asked])
        assert sure(said).source == "elis-paper"
        predictor.learn(view(prompt, tokens + number % 7, job=f"{number}", app=app), complete=True)
    score = next(score for score in predictor.scores() if score.model == "m")
    assert score.tau < 0.0 < score.tau_history
    assert score.mae > 300
    assert math.isnan(score.coverage)
    assert score.trusted
    assert "using history" not in caplog.text
    assert not predictor._said
    predictor.close()


async def test_the_published_method_may_be_told_not_to_learn(tmp_path: Path) -> None:
    predictor = make(tiny.build(tmp_path, paper=True), deadline=60.0, learn=False)
    assert isinstance(predictor, Paper)
    before = predictor.units.ratio("m", "latin")
    for _ in range(50):
        predictor.learn(view("long", 400, answer="hello hello hello " * 40), complete=True)
    assert predictor.units.ratio("m", "latin") == before
    predictor.close()


# ---- exchanged while serving ----------------------------------------------------------------------------------------


async def test_another_model_takes_over_and_what_was_learned_stays(folder: Path, tmp_path: Path) -> None:
    predictor = once(folder)
    await known(predictor)
    serve(predictor, 80, lambda rng, long: rng.randint(300, 500))
    learned = predictor.learner.history.median("m", "a", 0)
    line = predictor.learner._all.coefficients.copy()
    assert not await predictor.swap(folder)
    other = tiny.build(tmp_path / "others", bias=6.5, name="other")
    assert await predictor.swap(other)
    assert predictor.model.manifest.name == "other"
    assert predictor.learner.history.median("m", "a", 0) == learned
    assert (predictor.learner._all.coefficients == line).all()  # the same counters, the same projection
    assert sure(predictor.instant(view("long tale"))).remaining > 1
    predictor.close()


async def test_the_same_folder_with_other_contents_is_read_again(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path)
    predictor = once(folder)
    tiny.build(tmp_path, bias=6.5, name="retrained")
    assert await predictor.swap(folder)
    assert predictor.model.manifest.name == "retrained"
    predictor.close()


@pytest.mark.parametrize("damage", ["gone", "corrupt", "paper", "not json"])
async def test_a_folder_that_is_no_good_is_refused_and_the_old_model_stays(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    predictor = once(folder)
    other = tiny.build(tmp_path / "others", paper=damage == "paper")
    if damage == "gone":
        (other / "head.onnx").unlink()
    elif damage == "corrupt":
        (other / "head.onnx").write_bytes(b"x")
    elif damage == "not json":
        (other / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"head|restart|manifest"):
        await predictor.swap(other)
    assert predictor.model.folder == folder
    assert predictor.instant(view("long")) is not None
    predictor.close()


async def test_exchange_while_jobs_are_estimated(folder: Path, tmp_path: Path) -> None:
    """Refines under way, windows passing, jobs ending; models come and go, one of them with another projection."""
    predictor = once(folder)
    others = [tiny.build(tmp_path / str(n), bias=4.0 + n, name=f"{n}") for n in range(3)]
    np.save(others[2] / "projection.npy", np.eye(tiny.HIDDEN, dtype=np.float32))
    manifest = (others[2] / "manifest.json").read_text()
    old = tiny.digest(others[1] / "projection.npy")
    (others[2] / "manifest.json").write_text(manifest.replace(old, tiny.digest(others[2] / "projection.npy")))
    stop, total = False, 0

    async def client(name: int) -> None:
        nonlocal total
        done = 0
        while not stop:
            prompt = f"long tale {name} {done}"
            job = f"{name}-{done}"
            assert predictor.instant(view(prompt, job=job)) is not None
            await predictor.refine([view(prompt, job=job)])
            await asyncio.sleep(0)
            assert predictor.instant(view(prompt, 50, job=job)) is not None
            predictor.learn(view(prompt, 70, job=job), complete=True)
            done += 1
            total += 1

    clients = [spawn(client(n), name="client") for n in range(4)]
    for other in (*others, folder, *others):
        before = total
        assert await predictor.swap(other)
        while total < before + 8:
            await asyncio.sleep(0.001)
            assert not any(each.done() for each in clients)
    stop = True
    await asyncio.gather(*clients)
    assert predictor.counts["failed"] == 0
    predictor.close()


# ---- what is not there ----------------------------------------------------------------------------------------------


def test_without_onnxruntime_there_is_history_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("elis_gateway.predictor.onnx", "elis_gateway.predictor.bge"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level(logging.WARNING):
        predictor = make_predictor("bge")
    assert isinstance(predictor, History)
    assert [record.message.count("elis-gateway[cpu]") for record in caplog.records] == [1]


def test_serving_with_a_model_loads_no_training_framework(folder: Path) -> None:
    script = (
        "import sys\n"
        "import elis_gateway.app\n"
        "from elis_gateway.predictor.make import make_predictor\n"
        f"make_predictor('bge', path={str(folder)!r}).close()\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in done.stdout.split()}
    assert "onnxruntime" in roots
    assert not roots & {"torch", "transformers", "scipy", "sklearn", "onnx", "lightgbm", "onnx_export"}


def test_a_folder_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="manifest"):
        make_predictor("bge", path=tmp_path / "nowhere")
