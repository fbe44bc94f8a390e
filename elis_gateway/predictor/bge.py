"""The shipped predictor: an encoder off the event loop, a head on it, and a learner that corrects both.

Knows: which of its parts says what when. Never: sessions (``onnx``), threads (``batcher``), arithmetic (``learner``).

``encode-once``: a job is estimated at once from the text's counters, history and what was learned, with the prompt's
embedding where that is known; where it is not, the encoder is asked, and a better estimate follows when it answers.
``elis-paper``, the published method: prompt and answer so far are encoded after every window, nothing is said before
that, and nothing is learned but token units. It is scored beside history as well, and never replaced by it: whoever
runs the published method means that one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from math import exp, isfinite, log, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np

from elis_gateway.errors import ConfigError
from elis_gateway.predictor import features
from elis_gateway.predictor.audit import Audit, Moment, Score
from elis_gateway.predictor.base import Estimate, Predictor, View, clamp
from elis_gateway.predictor.batcher import Batcher, Busy
from elis_gateway.predictor.history import History
from elis_gateway.predictor.learner import Learner, Prediction, Sight, Vector
from elis_gateway.predictor.manifest import folder_of, load
from elis_gateway.predictor.onnx import Device, Floats, Model, ModelError
from elis_gateway.predictor.units import Units, script_of

__all__ = ["EncodeOnce", "Paper", "make"]

_log = logging.getLogger("elis_gateway.predictor")

_NO_FEATURES = np.zeros((1, 0), dtype=np.float32)
_JOBS = 20_000
"""Jobs whose predictions are remembered; those of jobs that never end are forgotten first."""
_WINDOWS = 400
"""Predictions remembered of one job."""
_GPU_BATCH = 32
"""On a CPU batching gains nothing: there one prompt at a time."""


def make(
    path: str | Path | None = None,
    *,
    deadline: float = 0.5,
    device: Device = "auto",
    threads: int = 1,
    learn: bool = True,
    state: str | Path | None = None,
    strength: float = 8.0,
    horizon: float = 1000.0,
    max_apps: int = 256,
    cached_prompts: int = 4096,
) -> Predictor:
    """The predictor a model folder is for. Raises ConfigError, MissingExtra."""
    model = Model(folder_of(path), device=device, threads=threads)
    _log.info("predictor %s (%s) on %s", model.manifest.name, model.manifest.architecture, model.device)
    again: dict[str, object] = {"device": device, "threads": threads}
    history = History(strength=strength, horizon=horizon, max_apps=max(max_apps, 1000))
    if model.paper:
        return Paper(model, history, deadline=deadline, learn=learn, again=again)
    learner = Learner(
        model.features, model.reduced, layout=model.layout, history=history, horizon=horizon, max_apps=max_apps
    )
    return EncodeOnce(
        model,
        learner,
        deadline=deadline,
        learn=learn,
        state=None if state is None else Path(state),
        cached_prompts=cached_prompts,
        again=again,
    )


class _Shipped:
    """What both have: a model that can be exchanged while serving, and a thread that encodes."""

    reads_text = True
    refines = True

    def __init__(self, model: Model, *, deadline: float, again: dict[str, object]) -> None:
        self.model = model
        self.units = Units()
        self.audit = Audit()
        self.counts: dict[str, int] = dict.fromkeys(("encoded", "cached", "shed", "failed"), 0)
        """Prompts by what became of asking for their embedding."""
        self._again = again
        self._batcher: Batcher[tuple[str, str], Floats] = Batcher(
            self._encode, max_batch=self._batch(), patience=deadline, name="encoder"
        )

    def _batch(self) -> int:
        return _GPU_BATCH if self.model.device == "cuda" else 1

    def _encode(self, texts: Sequence[tuple[str, str]]) -> Sequence[Floats]:
        """In the worker thread."""
        return list(self.model.encode(texts))

    async def _ask(self, prompt: str, answer: str) -> Floats | None:
        """One vector, or None where the encoder is too busy or fails."""
        try:
            vector = await self._batcher.ask((prompt, answer))
        except Busy:
            self.counts["shed"] += 1
            return None
        except ModelError as error:
            self.counts["failed"] += 1
            _log.warning("the encoder failed: %s", str(error)[:300])
            return None
        self.counts["encoded"] += 1
        return vector

    def _ratio(self, view: View) -> float:
        """Served tokens per token that the head counts."""
        script = script_of(view.answer, view.prompt)
        return self.units.ratio(view.model, script) / self.model.manifest.head.unit_ratio.get(script, 1.0)

    async def swap(self, path: str | Path | None) -> bool:
        """Load the folder anew, if it changed; in a thread, and used only once it has run. False: it did not change.

        Raises ConfigError for a folder that is no good; the old model then stays.
        """
        model = await asyncio.to_thread(self._load, folder_of(path))
        if model is None:
            return False
        if model.paper != self.model.paper:
            one, other = model.manifest.architecture, self.model.manifest.architecture
            raise ConfigError(f"{model.folder}: is for {one}; going there from {other} needs a restart")
        self._use(model)
        _log.info("predictor %s (%s) takes over", model.manifest.name, model.folder)
        return True

    def _load(self, folder: Path) -> Model | None:
        manifest = load(folder)
        if folder.resolve() == self.model.folder.resolve() and manifest == self.model.manifest:
            return None
        return Model(folder, **self._again)  # type: ignore[arg-type]

    def _use(self, model: Model) -> None:
        self.model = model
        self._batcher.max_batch = self._batch()

    def scores(self) -> Iterable[Score]:
        """How good the estimates of recent jobs were, by served model."""
        return self.audit.scores()

    def close(self) -> None:
        """End the worker thread."""
        self._batcher.close()


class _Known(NamedTuple):
    """A prompt's embedding, as the head and the learner read it."""

    embedding: Floats
    reduced: Vector


class _Trace:
    """What was said of one job."""

    __slots__ = ("first", "key", "known", "made", "moments", "reading")

    def __init__(self, key: bytes, prompt: str) -> None:
        self.key = key
        self.known: _Known | None = None
        """Kept as long as the job lasts, whatever becomes of the cache."""
        self.reading = features.Reading(prompt)
        self.first: Prediction | None = None
        self.made: dict[int, Prediction] = {}
        self.moments: dict[int, Moment] = {}
        """By tokens attained; a better estimate at the same place takes the first one's."""


class EncodeOnce(_Shipped):
    """Instant estimates from counters, history and the learner; the prompt's embedding refines them."""

    def __init__(
        self,
        model: Model,
        learner: Learner,
        *,
        deadline: float,
        learn: bool,
        state: Path | None,
        cached_prompts: int,
        again: dict[str, object],
    ) -> None:
        super().__init__(model, deadline=deadline, again=again)
        self.learner = learner
        self._learns = learn
        self._state = state
        self._most_cached = cached_prompts
        self._cache: OrderedDict[bytes, _Known] = OrderedDict()
        self._asked: dict[bytes, asyncio.Future[None]] = {}
        self._jobs: OrderedDict[str, _Trace] = OrderedDict()
        self._nothing = np.zeros((1, model.manifest.encoder.hidden), dtype=np.float32)
        if state is not None and state.exists():
            try:
                self.units.restore(learner.load(state).get("units", []))
            except (ValueError, TypeError) as error:
                _log.warning("learned state %s: token units: %s", state, error)

    # ---- asked --------------------------------------------------------------------------------------------------

    def instant(self, view: View) -> Estimate | None:
        return self.instants((view,))[0]

    def instants(self, views: Sequence[View]) -> list[Estimate | None]:
        """The same for several jobs, in the order of ``views``: the head runs once, for a third less each."""
        traces = [self._trace(view) for view in views]
        known = [self._known(trace) for trace in traces]
        sights = self._sights(views, traces, known)
        return [self._estimate(*each) for each in zip(views, traces, sights, strict=True)]

    def _estimate(self, view: View, trace: _Trace, sight: Sight) -> Estimate | None:
        attained = view.attained
        prediction = self.learner.predict(view.model, view.app, sight)
        history = self.learner.history
        if trace.first is None or attained <= trace.first.attained:
            trace.first = prediction
        if len(trace.made) < _WINDOWS or attained in trace.made:
            trace.made[attained] = prediction
            before = history.mean(view)
            trace.moments[attained] = Moment(
                attained, prediction.mean, prediction.low, prediction.high,
                prediction.mean if before is None else before,
            )  # fmt: skip
        if not self.audit.trusts(view.model) and (plain := history.instant(view)) is not None:
            return plain
        return Estimate(prediction.mean, prediction.gittins, "bge-instant" if sight.reduced is None else "bge")

    def wants_refining(self, view: View) -> bool:
        """Whether the prompt's embedding is still to be had."""
        return self._known(self._trace(view)) is None

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        await asyncio.gather(*(self._learn_prompt(view) for view in views))
        # Without the embedding there is nothing to add to what was said at once; and a job that ended meanwhile is
        # forgotten: nobody would ever take away what was remembered of it now.
        traces = [self._jobs.get(view.job_id) for view in views]
        encoded = [view for view, trace in zip(views, traces, strict=True) if trace is not None and self._known(trace)]
        better = dict(zip((view.job_id for view in encoded), self.instants(encoded), strict=True))
        return [better.get(view.job_id) for view in views]

    async def _learn_prompt(self, view: View) -> None:
        """Have the prompt in the cache, if the encoder can. One prompt is encoded once, however many ask."""
        trace = self._trace(view)
        if self._known(trace) is not None:
            return
        key = trace.key
        under_way = self._asked.get(key)
        if under_way is not None:
            await asyncio.shield(under_way)
            return
        done = self._asked[key] = asyncio.get_running_loop().create_future()
        try:
            model = self.model
            vector = await self._ask(view.prompt, "")
            if vector is not None and model is self.model:
                self._cache[key] = trace.known = _Known(vector[None, :], model.reduce(vector))
                if len(self._cache) > self._most_cached:
                    self._cache.popitem(last=False)
        finally:
            del self._asked[key]
            done.set_result(None)

    def _known(self, trace: _Trace) -> _Known | None:
        """The embedding of a job's prompt, if it was made for this job or for another with the same prompt."""
        if trace.known is None and (found := self._cache.get(trace.key)) is not None:
            self._cache.move_to_end(trace.key)
            self.counts["cached"] += 1
            trace.known = found
        return trace.known

    def _trace(self, view: View) -> _Trace:
        trace = self._jobs.get(view.job_id)
        if trace is None:
            text = features.prompt_text(view.prompt).encode("utf-8", "surrogatepass")
            trace = self._jobs[view.job_id] = _Trace(blake2b(text, digest_size=16).digest(), view.prompt)
            if len(self._jobs) > _JOBS:
                self._jobs.popitem(last=False)
        return trace

    def _sights(self, views: Sequence[View], traces: Sequence[_Trace], known: Sequence[_Known | None]) -> list[Sight]:
        """What the learner is told. The head speaks the tokens that it was trained on, the rest the engine's."""
        if not views:
            return []
        ratios = [self._ratio(view) for view in views]
        rows = np.array(
            [
                trace.reading(view.answer, round(view.attained / ratio))
                for view, trace, ratio in zip(views, traces, ratios, strict=True)
            ],
            dtype=np.float32,
        )
        shipped: list[float | None] = [None] * len(views)
        try:
            said = self._heads(views, known, rows)
            shipped = [one + log(ratio) for one, ratio in zip(said, ratios, strict=True)]
        except ModelError as error:
            self.counts["failed"] += 1
            _log.warning("the head failed: %s", str(error)[:300])
        return [
            Sight(
                view.attained, view.allowed, one, row, None if seen is None else seen.reduced,
                None if trace.first is None or trace.first.attained >= view.attained else trace.first.whole,
            )
            for view, trace, one, row, seen in zip(views, traces, shipped, rows, known, strict=True)
        ]  # fmt: skip

    def _heads(self, views: Sequence[View], known: Sequence[_Known | None], rows: Floats) -> list[float]:
        embeddings = [self._nothing if seen is None else seen.embedding for seen in known]
        together = embeddings[0] if len(embeddings) == 1 else np.concatenate(embeddings)
        return self.model.head(together, rows, [view.model for view in views])

    # ---- told ---------------------------------------------------------------------------------------------------

    def learn(self, view: View, *, complete: bool) -> None:
        trace = self._jobs.pop(view.job_id, None)
        if complete and trace is not None:
            self.audit.learn(view.model, list(trace.moments.values()), view.attained)
        if not self._learns:
            return
        if view.attained and view.answer:
            self.units.learn(view.model, view.answer, view.attained)
        made = [] if trace is None else [trace.made[at] for at in sorted(trace.made)]
        made = [each for each in made if len(each.inputs) == self.learner.inputs]
        self.learner.learn(view.model, view.app, made, view.attained, complete=complete)

    def save(self) -> None:
        if self._state is not None and self._learns:
            self.learner.save(self._state, {"units": self.units.dump()})

    def _use(self, model: Model) -> None:
        if model.manifest.encoder.sha256 != self.model.manifest.encoder.sha256 or model.layout != self.model.layout:
            # Embeddings mean something else from now on, and what was said of live jobs teaches nothing.
            self._cache.clear()
            for trace in self._jobs.values():
                trace.made.clear()
                trace.first = trace.known = None
        super()._use(model)
        self._nothing = np.zeros((1, model.manifest.encoder.hidden), dtype=np.float32)
        self.learner.fit(model.features, model.reduced, model.layout)


class Paper(_Shipped):
    """Prompt and answer so far, encoded after every window; one number."""

    def __init__(
        self, model: Model, history: History, *, deadline: float, learn: bool, again: dict[str, object]
    ) -> None:
        """``history``: what the estimates are compared with; nothing follows from it."""
        super().__init__(model, deadline=deadline, again=again)
        self.audit = Audit(gives_way=False)
        self._history = history
        self._learns = learn
        self._said: OrderedDict[str, dict[int, Moment]] = OrderedDict()
        """Of live jobs, by tokens attained."""

    def instant(self, view: View) -> Estimate | None:
        """Nothing: the published method waits for its model."""
        return None

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        for view in views:
            self._said.setdefault(view.job_id, {})
            if len(self._said) > _JOBS:
                self._said.popitem(last=False)
        vectors = await asyncio.gather(*(self._ask(view.prompt, view.answer) for view in views))
        return [
            None if vector is None else self._estimate(view, vector)
            for view, vector in zip(views, vectors, strict=True)
        ]

    def _estimate(self, view: View, vector: Floats) -> Estimate | None:
        [said] = self.model.head(vector[None, :], _NO_FEATURES, [view.model])
        remaining = exp(min(said, 13.0)) * self._ratio(view)
        if not isfinite(remaining):
            return None
        remaining = clamp(remaining, view.allowed)
        moments = self._said.get(view.job_id)
        if moments is not None and len(moments) < _WINDOWS:
            # None: the job ended meanwhile, and nobody would ever take away what is remembered of it.
            before = self._history.mean(view)
            moments[view.attained] = Moment(view.attained, remaining, nan, nan, remaining if before is None else before)
        return Estimate(remaining, None, "elis-paper")

    def scores(self) -> Iterable[Score]:
        """It names no bounds that truths could be within."""
        return (score._replace(coverage=nan) for score in super().scores())

    def learn(self, view: View, *, complete: bool) -> None:
        moments = self._said.pop(view.job_id, {})
        if complete:
            self.audit.learn(view.model, list(moments.values()), view.attained)
        if not self._learns:
            return
        self._history.learn(view, complete=complete)
        if view.attained and view.answer:
            self.units.learn(view.model, view.answer, view.attained)

    def save(self) -> None:
        """Nothing to keep."""
