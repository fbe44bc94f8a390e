"""From configuration sections to the scheduler's parts. Knows both sides' names; never builds anything that runs."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from elis_gateway import config
from elis_gateway.config.explain import explain
from elis_gateway.core.policy import Aging, Policy, make_policy
from elis_gateway.core.scheduler import SchedulerConfig
from elis_gateway.errors import ConfigError
from elis_gateway.predictor.base import Predictor
from elis_gateway.predictor.make import make_predictor

__all__ = [
    "WINDOWS", "live_dials", "parse_policy", "parse_upstream", "policy", "predictor", "scheduler_config",
]  # fmt: skip

WINDOWS = ("window", "mode", "rescore")
"""Keys of the scheduler's section that say for how long somebody goes; they change while serving."""


def policy(section: Any, aging: Any) -> Policy:
    """The policy of a ``scheduler.policy`` section. Raises ``ConfigError``."""
    options = section.model_dump(exclude={"kind"})
    if isinstance(section, config.ExternalPolicy):
        return _outside(section.kind, section.options)
    if section.kind in ("sjf", "isrtf"):
        options["aging"] = Aging(**aging.model_dump())
    return make_policy(section.kind, **options)


def parse_policy(wanted: Any, current: config.Scheduler) -> config.Scheduler:
    """``current`` with another policy, from JSON: a name, or an object with ``kind`` and the policy's options; beside
    them, where given, ``aging`` and the keys of ``WINDOWS``. Raises ``ConfigError``."""
    if isinstance(wanted, str):
        wanted = {"kind": wanted}
    if not isinstance(wanted, dict):
        raise ConfigError("policy: expected a name or an object with `kind`")
    given = dict(wanted)
    beside = {name: given.pop(name) for name in ("aging", *WINDOWS) if given.get(name) is not None}
    try:
        section = config.Scheduler.model_validate({"policy": given, **beside})
    except ValidationError as error:
        raise ConfigError(explain(error, config.Scheduler)) from None
    return current.model_copy(update={name: getattr(section, name) for name in ("policy", *beside)})


def predictor(section: Any) -> Predictor | None:
    """The predictor of a ``predictor`` section; None for ``none``. Raises ``ConfigError``."""
    if isinstance(section, config.ExternalPredictor):
        return make_predictor(section.kind, **section.options)
    return make_predictor(section.kind, **section.model_dump(exclude={"kind"}))


def scheduler_config(section: config.Scheduler, *, estimates: bool) -> SchedulerConfig:
    """The scheduler's dials."""
    values: dict[str, Any] = {
        "window": section.window,
        "mode": section.mode,
        "estimates": estimates,
        "rescore": section.rescore,
        "seam_cost": None if section.seam_cost == "auto" else section.seam_cost,
        **live_dials(section),
    }
    known = {field.name for field in fields(SchedulerConfig)}
    return SchedulerConfig(**{name: value for name, value in values.items() if name in known})


def live_dials(section: config.Scheduler) -> dict[str, Any]:
    """The scheduler's dials that may change while it runs."""
    return {
        "queue_limit": section.queue.max_jobs,
        "queue_ttl": section.queue.ttl,
        "unavailable_timeout": section.queue.unavailable_timeout,
        "retries": section.retries,
        "tail": section.tail,
    }


def parse_upstream(wanted: Any) -> config.Upstream:
    """An upstream that comes over the network, from JSON. Raises ``ConfigError``.

    It may not name anything of this machine: an environment variable or a file named there would be sent to whatever
    address is named beside it.
    """
    try:
        settings = config.Upstream.model_validate(wanted)
    except ValidationError as error:
        raise ConfigError(explain(error, config.Upstream)) from None
    local = [name for name in ("api_key_env", "tls", "forward_credentials") if name in settings.model_fields_set]
    if local:
        raise ConfigError(f"{local[0]}: can be set in the configuration file only")
    return settings


def _outside(kind: str, options: dict[str, Any]) -> Policy:
    where = f"scheduler.policy.kind: {kind!r}"
    module, colon, name = kind.partition(":")
    try:
        if colon:
            build = getattr(import_module(module), name)
        else:
            build = next(iter(entry_points(group="elis_gateway.policies", name=kind))).load()
        made = build(**options)
    except (ImportError, AttributeError, StopIteration, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error or 'no such entry point'}") from error
    if lacking := [name for name in ("key", "needs_estimates", "preempts") if not hasattr(made, name)]:
        raise ConfigError(f"{where}: {type(made).__name__} is not a policy: it lacks {', '.join(lacking)}")
    return made  # type: ignore[no-any-return]
