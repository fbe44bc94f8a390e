"""The whole configuration, and what must be true of its sections together."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import field_validator as validates
from pydantic import model_validator as validates_all

from elis_gateway.config.access import ApiKey, Auth, Limits
from elis_gateway.config.listeners import Admin, Server
from elis_gateway.config.observing import Logging, Tracing, TrafficLog
from elis_gateway.config.predictors import BgePredictor, Predictor
from elis_gateway.config.scheduling import Scheduler
from elis_gateway.config.section import Name, Section
from elis_gateway.config.upstreams import Upstream, check_count

__all__ = ["Config"]


class Config(Section):
    """The whole configuration."""

    server: Server = Server()
    admin: Admin = Admin()
    upstreams: tuple[Upstream, ...]
    """The engines behind the gateway; at least one, and with their ranks at most 1024."""
    models: dict[Name, Name] = {}
    """Aliases: the name a client may ask for, and the model it gets."""
    scheduler: Scheduler = Scheduler()
    predictor: Predictor = BgePredictor(kind="bge")
    """Where estimates come from."""
    auth: Auth = Auth()
    limits: Limits = Limits()
    logging: Logging = Logging()
    traffic_log: TrafficLog = TrafficLog()
    tracing: Tracing = Tracing()

    @validates("models")
    @classmethod
    def _aliases_name_models(cls, models: dict[str, str]) -> dict[str, str]:
        if chained := sorted(alias for alias, model in models.items() if model in models):
            raise ValueError(
                f"expected aliases to name models, not aliases: {', '.join(f'{a} -> {models[a]}' for a in chained)}"
            )
        return models

    @validates_all(mode="after")
    def _classes_exist(self) -> Config:
        self.check_keys(self.auth.keys)
        for upstream in self.upstreams:
            self.check_upstream(upstream)
        if unknown := sorted(set(self.limits.classes) - set(self.scheduler.classes)):
            raise ValueError(f"limits.classes: expected classes of scheduler.classes; unknown: {', '.join(unknown)}")
        return self

    def check_upstream(self, upstream: Upstream) -> None:
        """Does this upstream go with the scheduler's section? Raises ValueError."""
        if upstream.slots == "auto" and upstream.overcommit is None and self.scheduler.overcommit:
            raise ValueError(
                f"upstreams: {upstream.name}: expected no scheduler.overcommit with slots: auto: with calls of ours in "
                "the engine's queue that queue says nothing of its slots"
            )
        if self.scheduler.fair and (upstream.overcommit or upstream.engine_priority == "on"):
            raise ValueError(
                f"upstreams: {upstream.name}: expected no overcommit and no engine_priority with scheduler.fair: "
                "an engine's own queue knows no rounds"
            )

    def check_keys(self, keys: Iterable[ApiKey]) -> None:
        """Do the classes exist that these keys name? Raises ValueError."""
        for key in keys:
            for name in (key.default_class, key.max_class):
                if name is not None and name not in self.scheduler.classes:
                    raise ValueError(f"auth: key {key.name}: expected a class of scheduler.classes, got {name!r}")
            ranks = self.scheduler.classes
            if key.default_class and key.max_class and ranks[key.default_class] < ranks[key.max_class]:
                raise ValueError(f"auth: key {key.name}: default_class is better than max_class")

    @validates("upstreams")
    @classmethod
    def _names_differ(cls, upstreams: tuple[Upstream, ...]) -> tuple[Upstream, ...]:
        if not upstreams:
            raise ValueError("expected at least one upstream")
        upstreams = tuple(rank for upstream in upstreams for rank in upstream.ranks())
        check_count(len(upstreams))
        names = [upstream.name for upstream in upstreams]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected different names; more than one upstream is called {', '.join(twice)}")
        return upstreams
