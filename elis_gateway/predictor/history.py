"""The running distribution of answer lengths, by model and application. Who asks tells more than what is asked.

Knows: which lengths were seen, and how much to believe them. Never: text, clocks, the scheduler.

Lengths are counted in bins of constant relative width. For every bin the *hazard* is kept, the share of answers
ending there among those that came so far: the Kaplan-Meier estimate (1958), which uses a cancelled or cut-off answer
for what it is, one that lasted at least so long. An application's hazards lean on its model's, those on everyone's,
and those on a broad guess, each counting as ``strength`` answers at risk in every bin: a new application starts as its
model's average, and where none of its answers ever came, it says nothing about what comes next. What remains after
``attained`` tokens follows from the hazards beyond. Old answers fade: after ``horizon`` newer ones of the same
application, one counts 1/e.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any

from elis_gateway.predictor.base import Estimate, View
from elis_gateway.predictor.gittins import BINS, EDGES, LengthTable, bin_of, lognormal_hazards
from elis_gateway.predictor.shelf import Shelf

__all__ = ["TURN", "History", "Share", "set_aside"]

_log = logging.getLogger(__name__)

_VERSION = 1
_PRIOR = lognormal_hazards(median=200.0, sigma=1.3)
_KNOWN = ("ended", "lasted", "partly")
_FREE = 50.0
"""Answers that an application may add to a level above it whatever the others do."""


TURN = 0.0001
"""Seconds for which a thread that saves stands aside before every part, so that the event loop gets its turn."""


class Share:
    """How much of what a level has seen came from one application below it.

    As long as nobody else is heard, an application counts in full. Beside others it counts no more than all of them
    together (and ``_FREE`` answers): whoever sends absurd answers, however many, spoils its own estimates first and can
    bend what others start from by half at the most.
    """

    __slots__ = ("at", "given")

    def __init__(self) -> None:
        self.given = 0.0
        """Weight given, as it stood when the level had seen ``at`` answers."""
        self.at = 0

    def take(self, count: int, seen: float, decay: float) -> float:
        """What the next answer counts at a level that saw ``count`` answers, which weigh ``seen`` today; each fades by
        ``decay`` with every further one."""
        given = self.given * decay ** (count - self.at)
        others = max(seen - given, 0.0)
        most = others + _FREE
        weight = 1.0 if others < 1.0 or given <= most else most / given
        self.given = given * decay + weight
        self.at = count + 1
        return weight


class _Lengths:
    """One distribution: decaying counts, and the table made from them."""

    __slots__ = (
        "built", "changes", "ended", "fresh", "hazards", "lasted", "parent", "partly", "seen", "strangers", "table",
        "to_all", "to_parent", "unit",
    )  # fmt: skip

    def __init__(self, parent: _Lengths | None) -> None:
        self.parent = parent
        self.ended = array("d", bytes(8 * BINS))
        """Answers that ended in each bin."""
        self.lasted = array("d", bytes(8 * BINS))
        """Answers last seen alive in it."""
        self.partly = array("d", bytes(8 * BINS))
        """How far into the bin those were, as shares of it, summed."""
        self.unit = 1.0
        """What one answer counts now; grows, so that older ones fade without being touched."""
        self.seen = 0.0
        """Answers counted, in today's units."""
        self.changes = 0
        """Answers since the beginning."""
        self.fresh = 0
        """``changes`` at which the table must be made anew."""
        self.built = 0
        """``changes`` of the parent when the table was made."""
        self.hazards: array[float] = _PRIOR
        self.table: LengthTable | None = None
        self.to_all, self.to_parent = Share(), Share()
        self.strangers = Share()
        """What applications gave that are hardly known: together they count here as one."""

    def add(self, tokens: int, complete: bool, growth: float, weight: float = 1.0) -> None:
        """``growth``: how much more the next answer counts than this one; ``weight``: how much this one counts."""
        unit = self.unit * weight
        if complete:
            self.ended[bin_of(tokens - 1)] += unit
        else:
            i = bin_of(tokens)
            self.lasted[i] += unit
            self.partly[i] += unit * min(1.0, (tokens - EDGES[i]) / (EDGES[i + 1] - EDGES[i]))
        self.seen = self.seen / growth + weight
        self.changes += 1
        self.unit *= growth
        if self.unit > 1e9:
            self._rescale()

    def _rescale(self) -> None:
        for counts in (self.ended, self.lasted, self.partly):
            for i, count in enumerate(counts):
                counts[i] = count / self.unit
        self.unit = 1.0

    def current(self, strength: float) -> LengthTable:
        """The table of ``known``, made when somebody asks for it."""
        hazards = self.known(strength)
        if self.table is None:
            self.table = LengthTable(hazards)
        return self.table

    def known(self, strength: float) -> array[float]:
        """The hazards, made anew where enough has been learned: 3 % more answers here, or 20 % more at the parent."""
        parent = self.parent
        if self.changes >= self.fresh or (parent is not None and parent.changes > 1.2 * self.built + 16):
            self._build(strength)
        return self.hazards

    def _build(self, strength: float) -> None:
        prior: Sequence[float] = _PRIOR
        if self.parent is not None:
            prior = self.parent.known(strength)
            self.built = self.parent.changes
        hazards = array("d", bytes(8 * BINS))
        ended, lasted, partly = self.ended, self.lasted, self.partly
        weight = strength * self.unit
        beyond = 0.0
        for i in range(BINS - 1, -1, -1):
            at_risk = ended[i] + partly[i] + beyond
            hazards[i] = (ended[i] + weight * prior[i]) / (at_risk + weight)
            beyond += ended[i] + lasted[i]
        self.hazards = hazards
        self.fresh = self.changes + 1 + int(0.03 * self.seen)
        self.table = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"seen": round(self.seen, 3)}
        for name in _KNOWN:
            counts = getattr(self, name)
            data[name] = {str(EDGES[i]): round(count / self.unit, 4) for i, count in enumerate(counts) if count}
        return data

    def from_json(self, data: dict[str, Any]) -> None:
        for name in _KNOWN:
            counts = getattr(self, name)
            for edge, count in data[name].items():
                if not 0.0 <= float(count) < 1e12:
                    raise ValueError(f"count {count!r}")
                counts[bin_of(int(edge))] += float(count)
        self.seen = float(data["seen"])
        self.changes = int(self.seen)


class History:
    """Predicts from the lengths of earlier answers to the same application of the same model.

    An estimate carries the mean remaining length and its Gittins index, both for an answer cut off at what is allowed.
    Nothing is said before the first answer was seen. ``instant`` and ``learn`` take microseconds; making a table anew,
    about a tenth of a millisecond, happens at most once per 3 % of new answers.
    """

    reads_text = False
    refines = False

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        strength: float = 8.0,
        horizon: float = 1000.0,
        max_apps: int = 1000,
    ) -> None:
        """``path``: file that keeps what was learned; read now if it exists, written by ``save``. ``max_apps``: (model,
        application) pairs remembered, the least recently used forgotten first (about 10 KB each), of those first that
        hardly ever asked."""
        if strength <= 0 or horizon < 1 or max_apps < 1:
            raise ValueError("history: expected strength > 0, horizon >= 1 and max_apps >= 1")
        self._path = Path(path) if path is not None else None
        self._strength = strength
        self._growth = 1.0 + 1.0 / horizon
        self._all = _Lengths(None)
        self._models: Shelf[str, _Lengths] = Shelf(max_apps)
        self._apps: Shelf[tuple[str, str], _Lengths] = Shelf(max_apps)
        self._lock = Lock()
        """Saving goes on in a thread of its own; it copies one distribution at a time, and learning waits for that."""
        self._unread = False
        """There is a file, and it could not be read."""
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def instant(self, view: View) -> Estimate | None:
        if not self._all.changes:
            return None
        mean, index = self._table(view.model, view.app)(view.attained, view.allowed)
        return Estimate(mean, index, "history")

    def mean(self, view: View) -> float | None:
        """What ``instant`` says remains, for less."""
        return self._table(view.model, view.app).mean(view.attained, view.allowed) if self._all.changes else None

    def _table(self, model: str, app: str) -> LengthTable:
        known = self._apps.get((model, app)) or self._models.get(model) or self._all
        return known.current(self._strength)

    async def refine(self, views: Sequence[View]) -> list[Estimate | None]:
        return [self.instant(view) for view in views]

    def learn(self, view: View, *, complete: bool) -> None:
        tokens = view.attained
        if tokens < 1:
            return  # nothing was answered: neither a length nor a bound of one
        with self._lock:
            self._learn((view.model, view.app), tokens, complete)

    def _learn(self, key: tuple[str, str], tokens: int, complete: bool) -> None:
        growth, everybody = self._growth, self._all
        model = self._model(key[0])
        known = self._app(key)
        new = self._apps.stranger(key)
        to_all = (everybody.strangers if new else known.to_all).take(everybody.changes, everybody.seen, 1.0 / growth)
        to_model = (model.strangers if new else known.to_parent).take(model.changes, model.seen, 1.0 / growth)
        everybody.add(tokens, complete, growth, to_all)
        model.add(tokens, complete, growth, to_model)
        known.add(tokens, complete, growth)

    def median(self, model: str, app: str, attained: int) -> float:
        """Even odds of what remains after ``attained`` tokens, in tokens; a broad guess before the first answer."""
        return self._table(model, app).median(attained)

    def own(self, model: str, app: str) -> float:
        """How many answers of its own, as they count today, an application's lengths rest on."""
        known = self._apps.get((model, app))
        return 0.0 if known is None else known.seen

    def _model(self, model: str, times: int = 1) -> _Lengths:
        return self._models.use(model, lambda: _Lengths(self._all), times)

    def _app(self, key: tuple[str, str], times: int = 1) -> _Lengths:
        return self._apps.use(key, lambda: _Lengths(self._models.get(key[0]) or self._all), times)

    # ---- across restarts --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the file, if there is one to write: at once or not at all. Raises OSError."""
        if self._path is None:
            return
        temporary = self._path.with_name(self._path.name + ".part")
        with temporary.open("w", encoding="utf-8") as file:
            # In pieces: one call would keep the interpreter to itself for a tenth of a second.
            for piece in json.JSONEncoder().iterencode(self.dump()):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if self._unread:
            set_aside(self._path)
            self._unread = False
        temporary.replace(self._path)

    def dump(self) -> dict[str, Any]:
        """Everything learned, as JSON can hold it. Another thread may be learning meanwhile."""
        with self._lock:
            models = [(key, known) for key in self._models if (known := self._models.get(key)) is not None]
            apps = [(key, known) for key in self._apps if (known := self._apps.get(key)) is not None]
        return {
            "version": _VERSION,
            "all": self._json(self._all),
            "models": [[model, self._json(known)] for model, known in models],
            "apps": [[*key, self._json(known)] for key, known in apps],
        }

    def _json(self, known: _Lengths) -> dict[str, Any]:
        sleep(TURN)
        with self._lock:
            return known.to_json()

    def restore(self, data: dict[str, Any]) -> None:
        """Take up what ``dump`` gave. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']!r}, expected {_VERSION}")
        self._all.from_json(data["all"])
        for model, counts in data["models"]:
            self._model(str(model), int(counts["seen"])).from_json(counts)
        for model, app, counts in data["apps"]:
            self._app((str(model), str(app)), int(counts["seen"])).from_json(counts)

    def forget(self) -> None:
        """Begin anew."""
        self._all = _Lengths(None)
        self._models.clear()
        self._apps.clear()

    def _load(self, path: Path) -> None:
        """Take up what was saved. A file that cannot be read costs the history, not the service."""
        try:
            self.restore(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            _log.warning("history %s cannot be read (%s: %s): starting without it", path, type(exc).__name__, exc)
            self._unread = True
            self.forget()


def set_aside(path: Path) -> None:
    """Something is about to be written where what is there could not be read: a newer version's, or nothing of ours."""
    if path.is_file():
        kept = path.with_name(path.name + ".unread")
        path.replace(kept)
        _log.warning("what was at %s is kept as %s", path, kept)
