"""The composition root: builds every part from the configuration, starts them in order and stops them in reverse.

Knows: how to wire everything. Never: request logic.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING, Any

from aiohttp import web

from elis_gateway import build, tls
from elis_gateway import config as config_module
from elis_gateway.access import Door, Rounds
from elis_gateway.admin import make_admin_app
from elis_gateway.config import Config, ExternalPolicy
from elis_gateway.config import Scheduler as SchedulerSection
from elis_gateway.core.placement import UpstreamInfo
from elis_gateway.core.scheduler import Scheduler
from elis_gateway.dispatcher import Dispatcher
from elis_gateway.errors import ConfigError, MissingExtra, UnknownUpstream
from elis_gateway.flight import Flight, Observer
from elis_gateway.handlers import Handlers, describe
from elis_gateway.intake import Intake
from elis_gateway.journal import Journal
from elis_gateway.lag import LagMeter
from elis_gateway.listener import AppRunner, Listener, Request, sign
from elis_gateway.live import Live
from elis_gateway.metrics import Metrics
from elis_gateway.roster import Roster
from elis_gateway.tasks import spawn
from elis_gateway.traffic_log import TrafficLog
from elis_gateway.upstream.fleet import Fleet
from elis_gateway.upstream.http import check
from elis_gateway.upstream.relay import Relay
from elis_gateway.warmth import Warmth

if TYPE_CHECKING:
    from elis_gateway.tracing import Tracer

__all__ = ["Gateway", "serve"]

_log = logging.getLogger("elis_gateway")
_FLUSH = 2.0
"""Seconds that handlers get to write their last bytes once every job is over."""

_ORDERING = ("policy", "aging", *build.WINDOWS)
"""Keys of the scheduler's section that decide who goes next and for how long; they change while serving."""
_READ_WHEN_NEEDED = (("server", "shutdown_grace"), ("admin", "key_hash"))
"""Keys of sections that need a restart which are looked up each time."""
_COLLECT = (10_000, 20, 20)
"""The garbage collector's thresholds. A request makes some hundred objects that live as long as it does; by Python's
own (700, 10, 10) every other one is looked through several times: 7 % of what an unstreamed request costs."""
_LINGER = 1.0
"""Seconds in which the rest of a refused body is still read, so that its sender gets to see the refusal."""

_SAVE_TRIES = 5
_SAVE_EVERY = 300.0
"""Seconds between two times that what the predictor learned is written down."""

Reload = Callable[[], Config]


class Gateway:
    """One gateway on the running loop: ``start``, ``stop``, and what the admin listener needs (``AdminDesk``)."""

    def __init__(self, config: Config, reload: Reload | None = None) -> None:
        self.config = config
        self._began = config
        """The configuration it was started with: what needs a restart is in effect as it was then."""
        self._reload = reload
        self._loop = asyncio.get_running_loop()
        scheduler = config.scheduler
        self._ordering = scheduler
        """The scheduler's section in effect: policy, aging and windows can change while serving."""
        self.predictor = build.predictor(config.predictor)
        self.core = Scheduler(
            build.scheduler_config(scheduler, estimates=self.predictor is not None),
            build.policy(scheduler.policy, scheduler.aging),
        )
        self.fleet = Fleet(
            config.upstreams, self._upstream_changed, overcommit=scheduler.in_hand, lost=self._upstream_lost
        )
        self.journal = Journal()
        self.metrics = Metrics(
            {
                "elis_jobs_live": lambda: [((), len(self.flights))],
                "elis_jobs_waiting": lambda: [((), self.core.waiting())],
                "elis_slices_running": lambda: [((u,), self.core.running(u)) for u in self.core.upstreams],
                "elis_slots": lambda: [((n,), u.info.slots) for n, u in self.core.upstreams.items()],
                "elis_seconds_per_token": self._paces,
                "elis_seam_tokens": lambda: [((), self.core.seam_tokens)],
                "elis_order_jct_seconds": self._orders,
                "elis_prompts_total": lambda: [((k,), n) for k, n in getattr(self.predictor, "counts", {}).items()],
                "elis_estimate_mae_tokens": lambda: [((s.model,), s.mae) for s in self._scores()],
                "elis_estimate_bias_tokens": lambda: [((s.model,), s.bias) for s in self._scores()],
                "elis_estimate_coverage": lambda: [((s.model,), s.coverage) for s in self._scores()],
                "elis_estimate_tau": self._taus,
                "elis_estimate_trusted": lambda: [((s.model,), float(s.trusted)) for s in self._scores()],
                "elis_order_jobs": lambda: [((m,), pool.shadow.settled) for m, pool in self.core.pools.items()],
                "elis_longest_wait_seconds": lambda: [((), self._live.longest_wait(self._loop.time()))],
                "elis_upstream_up": lambda: [((u["id"],), float(u["up"])) for u in self.fleet.describe()],
                "elis_continuations_cold_ratio": lambda: [((u,), share) for u, share in self._warmth.cold()],
                "elis_engine_running": lambda: self._told("engine_running"),
                "elis_engine_waiting": lambda: self._told("engine_waiting"),
                "elis_engine_kv_usage": lambda: self._told("engine_kv_usage"),
            }
        )
        self._warmth = Warmth()
        self._lag = LagMeter(self.metrics.lagged)
        self._traffic_log = self._make_traffic_log()
        self._keys = config_module.keys(config)
        self.door = Door(
            self._keys,
            config.limits,
            scheduler.classes,
            self._loop.time,
            self.patience,
            fair_round=scheduler.fair_round if scheduler.fair else None,
        )
        self._tracer = self._make_tracer()
        self._intake = Intake(
            self.fleet,
            self._loop.time,
            aliases=config.models,
            classes=scheduler.classes,
            default_class=scheduler.default_class,
            class_tail=scheduler.class_tail,
            describe=describe,
            door=self.door,
            forward_credentials=any(u.forward_credentials for u in config.upstreams),
            reads_text=self.predictor is not None and self.predictor.reads_text,
            trace=None if self._tracer is None else self._tracer.parent,
        )
        self._live = Live(self.core, lambda: self.flights, time.time() - self._loop.time())
        observers: list[Observer] = [
            self.door, self._intake, self.metrics, self.journal, self._live, self._warmth,
        ]  # fmt: skip
        if scheduler.fair:
            observers.append(Rounds(self.door))
        if self._traffic_log is not None:
            observers.append(self._traffic_log)
        if self._tracer is not None:
            observers.append(self._tracer)
        self.dispatcher = Dispatcher(
            self.core,
            self.predictor,
            self.fleet.upstreams,
            observers=observers,
            estimate_deadline=getattr(config.predictor, "deadline", 0.5),
            retry_budget=scheduler.retry_budget,
        )
        self._relay = Relay(
            self.fleet, config.models, body_timeout=config.server.body_timeout, max_body=config.server.max_body
        )
        self._changing = asyncio.Lock()
        """One change of the configuration at a time, and none before everything has begun."""
        self._hurried = asyncio.Event()
        self._saving = threading.Lock()
        """One save at a time: the last one may come while a thread is still at the one before."""
        self.roster = Roster(self.fleet, config.upstreams, idle=self._idle, gone=self._upstream_gone)
        self._saver: asyncio.Task[None] | None = None
        self._tls: list[tls.Listening] = []
        self._runners: list[web.BaseRunner] = []
        self._sites: list[web.TCPSite] = []

    # --- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Probe the upstreams, then listen. Raises OSError for an address in use, ``ConfigError`` for bad files."""
        try:
            if self._traffic_log is not None:
                self._traffic_log.start()
            async with self._changing:
                await self.fleet.start()
            server, admin = self.config.server, self.config.admin
            await self._listen(web.ServerRunner(self._public(), shutdown_timeout=_FLUSH), server)
            admin_app = make_admin_app(self)
            admin_app.on_response_prepare.append(sign)
            runner = AppRunner(admin_app, head_timeout=server.head_timeout, access_log=None, shutdown_timeout=_FLUSH)
            await self._listen(runner, admin)
            self._lag.start()
            self._saver = spawn(self._save_regularly(), name="save what was learned")
        except BaseException:
            await self.stop(grace=0.0)
            raise
        if not isinstance(Scheduler.submit, FunctionType):
            _log.info("the scheduler core is compiled")
        _log.info("listening on %s://%s:%d", _scheme(server), server.host, self.port)
        _log.info("admin listening on %s://%s:%d", _scheme(admin), admin.host, self.admin_port)

    async def stop(self, grace: float | None = None) -> None:
        """Accept no more, let requests finish for ``grace`` seconds (default: the configured), end the rest, close all.

        Once is enough; a second call finds nothing left to stop.
        """
        self.roster.closed = True
        while self._sites:
            await self._sites.pop().stop()
        if grace is None:
            grace = self.config.server.shutdown_grace
        over = self._loop.time() + grace
        await self.dispatcher.drain(0.0 if self._hurried.is_set() else grace)
        # What is only passed on has the same time.
        waits = [spawn(self._relay.idle(), name="relayed calls"), spawn(self._hurried.wait(), name="hurry")]
        left = max(over - self._loop.time(), 0.0)
        _, pending = await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        while self._runners:
            await self._runners.pop().cleanup()
        self._lag.stop()
        if self._saver is not None:
            self._saver.cancel()
            await asyncio.wait([self._saver])
        if self.predictor is not None:
            if (close := getattr(self.predictor, "close", None)) is not None:
                close()
            self._save()
        await self.fleet.close()
        if self._traffic_log is not None:
            await asyncio.to_thread(self._traffic_log.close)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def _save_regularly(self) -> None:
        """A gateway that is killed should not have forgotten what it learned in a month."""
        while True:
            await asyncio.sleep(_SAVE_EVERY)
            for _ in range(_SAVE_TRIES if self.predictor is not None else 0):
                try:
                    # In a thread: writing it all down takes a tenth of a second, in which no token would move.
                    await asyncio.to_thread(self._save)
                    break
                except RuntimeError:
                    _log.debug("something new was learned of while it was written down: once more")

    def _save(self) -> None:
        assert self.predictor is not None
        try:
            with self._saving:
                self.predictor.save()
        except OSError as error:
            # Stopping goes on: connections and the traffic log are still to be closed.
            _log.error("what the predictor learned was not saved: %s", error)

    def hurry(self) -> None:
        """End the grace of ``stop``: now, or as soon as it would begin."""
        self._hurried.set()
        self.dispatcher.hurry()

    @property
    def port(self) -> int:
        """The public listener's port."""
        return _port(self._runners[0])

    @property
    def admin_port(self) -> int:
        """The admin listener's port."""
        return _port(self._runners[1])

    async def _listen(self, runner: web.BaseRunner, settings: config_module.Server | config_module.Admin) -> None:
        context: ssl.SSLContext | None = None
        if settings.tls.cert is not None:
            self._tls.append(tls.Listening(settings.tls))
            context = self._tls[-1].context
        await runner.setup()
        self._runners.append(runner)
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024, ssl_context=context)
        try:
            await site.start()
        except socket.gaierror as error:
            raise ConfigError(f"host: {settings.host}: {error.strerror}") from error
        if runner is self._runners[0]:
            # The admin listener stays reachable while jobs drain.
            self._sites.append(site)

    def _public(self) -> web.Server:
        handlers = Handlers(
            self._intake,
            self.dispatcher,
            self.fleet,
            self._relay,
            self.door,
            relayed=self.config.server.relay,
            cors_origins=self.config.server.cors_origins,
            client_backlog=self.config.limits.client_backlog,
            keepalive_after=self.config.server.keepalive_after,
            refused=self.metrics.refused,
            body_timeout=self.config.server.body_timeout,
        )
        loop, max_body = self._loop, self.config.server.max_body

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return Request(message, payload, protocol, writer, task, loop, client_max_size=max_body)

        return Listener(
            handlers,
            head_timeout=self.config.server.head_timeout,
            stall=self.config.limits.client_stall,
            refused=self.metrics.refused,
            keepalive_timeout=self.config.server.idle_timeout,
            lingering_time=_LINGER,
            request_factory=request,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=True,
            max_line_size=self.config.server.max_header,
            max_field_size=self.config.server.max_header,
        )

    def _make_traffic_log(self) -> TrafficLog | None:
        section = self.config.traffic_log
        if section.path is None:
            return None
        return TrafficLog(
            section.path,
            max_bytes=section.max_bytes,
            keep=section.keep,
            prompts=self.config.logging.prompts,
            epoch=lambda: time.time() - self._loop.time(),
        )

    def patience(self, model: str) -> float:
        """Seconds after which a model may have room again."""
        return self.dispatcher.retry_after(model)

    def client_keys(self) -> list[dict[str, Any]]:
        """Clients' keys by name, and what they use."""
        return self.door.describe()

    @property
    def key_hash(self) -> str | None:
        """Hash of the key that the admin listener asks for."""
        return self.config.admin.key_hash

    def _make_tracer(self) -> Tracer | None:
        section = self.config.tracing
        if not section.enabled:
            return None
        try:
            # Only where it is wanted: importing it costs memory, and the packages may not be there.
            from elis_gateway.tracing import Tracer
        except ModuleNotFoundError as error:
            raise MissingExtra("otel", "tracing") from error
        return Tracer(section, clock=self._loop.time, epoch=time.time() - self._loop.time())

    def _upstream_changed(self, info: UpstreamInfo) -> None:
        self.dispatcher.upstream_changed(info)

    def _upstream_lost(self, name: str, after: float) -> None:
        self.dispatcher.give_up_silent(name, after)

    def _paces(self) -> Iterable[tuple[tuple[str, ...], float]]:
        return [((model,), pool.seconds_per_token) for model, pool in self.core.pools.items() if pool.upstreams]

    def _told(self, what: str) -> Iterable[tuple[tuple[str, ...], float]]:
        """What the upstreams that are asked said of themselves."""
        return [((u["id"],), u[what]) for u in self.fleet.describe() if u[what] is not None]

    def _scores(self) -> Iterable[Any]:
        """How good recent estimates were, where the predictor keeps such books."""
        scores = getattr(self.predictor, "scores", None)
        return [] if scores is None else scores()

    def _taus(self) -> Iterable[tuple[tuple[str, ...], float]]:
        for score in self._scores():
            yield (score.model, "estimates"), score.tau
            yield (score.model, "history"), score.tau_history

    def _orders(self) -> Iterable[tuple[tuple[str, ...], float]]:
        for model, pool in self.core.pools.items():
            shadow = pool.shadow
            if shadow.settled:
                yield (model, "first_come", "mean"), shadow.shadow_mean
                yield (model, "first_come", "p99"), shadow.p99.value
                yield (model, "actual", "mean"), shadow.real_mean
                yield (model, "actual", "p99"), shadow.real_p99.value

    # --- the admin listener's desk -------------------------------------------------------------------------------

    @property
    def flights(self) -> Mapping[str, Flight]:
        """Every job that is not over."""
        return self.dispatcher.flights

    def now(self) -> float:
        """The loop's time."""
        return self._loop.time()

    def render_metrics(self) -> bytes:
        """The metrics page."""
        return self.metrics.render()

    def policy(self) -> dict[str, Any]:
        """The policy in effect, with its aging and its windows, as in the configuration."""
        section = self._ordering.model_dump(mode="json")
        return {**section["policy"], **{name: section[name] for name in ("aging", *build.WINDOWS)}}

    def set_policy(self, wanted: Any) -> None:
        """Order by another policy from now on. Raises ``ConfigError``."""
        wanted = build.parse_policy(wanted, self._ordering)
        if isinstance(wanted.policy, ExternalPolicy) and wanted.policy != self.config.scheduler.policy:
            # Naming a class means calling it: whoever reaches this port could run anything.
            raise ConfigError("policy: a class of your own has to be named in the configuration file")
        self._use_policy(wanted)

    def _use_policy(self, section: SchedulerSection) -> None:
        policy = build.policy(section.policy, section.aging)
        windows = {name: getattr(section, name) for name in build.WINDOWS}
        self._ordering = self._ordering.model_copy(update={"policy": section.policy, "aging": section.aging, **windows})
        self.dispatcher.set_policy(policy, replace(self.core.config, **windows))
        self.fleet.keep_in_hand(self._ordering.in_hand)

    def upstreams(self) -> list[dict[str, Any]]:
        """Every upstream."""
        running = self.core.running
        return [
            {
                **u,
                "running": running(u["id"]) if u["id"] in self.core.upstreams else 0,
                "several_engines": u["engines"] > 1 or self._warmth.suspected(u["id"]),
            }
            for u in self.fleet.describe()
        ]

    def look(self) -> dict[str, Any]:
        """What goes on right now, for the page."""
        return self._live.look(self._loop.time(), self.upstreams(), self.policy())

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again and apply what can change while serving: policy, aliases, classes, upstreams."""
        if self._reload is None:
            raise ConfigError("there is no configuration file to read again")
        async with self._changing:
            self.roster.refuse_if_closed()
            # In a thread: thousands of keys are parsed in seconds, in which no token would move.
            new = await asyncio.to_thread(self._reload)
            new_keys = await asyncio.to_thread(config_module.keys, new)
            return await self._take_over(new, new_keys)

    async def _take_over(self, new: Config, new_keys: tuple[config_module.ApiKey, ...]) -> dict[str, Any]:
        applied: list[str] = []
        old = self.config
        self._check(new)
        swapped = await self._swap_model(new)
        self.roster.refuse_if_closed()
        changed = [n for n in _ORDERING if getattr(new.scheduler, n) != getattr(self._ordering, n)]
        if changed:
            self._use_policy(new.scheduler)
            applied += [f"scheduler.{name}" for name in changed]
        if new.models != old.models:
            self._intake.aliases = self._relay.aliases = dict(new.models)
            applied.append("models")
        if (new.scheduler.classes, new.scheduler.default_class) != (old.scheduler.classes, old.scheduler.default_class):
            self._intake.classes = dict(new.scheduler.classes)
            self._intake.default_class = new.scheduler.default_class
            applied.append("scheduler.classes")
        if new.scheduler.class_tail != old.scheduler.class_tail:
            self._intake.class_tail = dict(new.scheduler.class_tail)
            applied.append("scheduler.class_tail")
        if new_keys != self._keys or new.limits != old.limits or new.scheduler.classes != old.scheduler.classes:
            self._keys = new_keys
            self.door.change(new_keys, new.limits, new.scheduler.classes)
            applied.append("auth and limits")
        if self._tls:
            for listening in self._tls:
                listening.load()
            applied.append("certificates")
        if (dials := build.live_dials(new.scheduler)) != build.live_dials(old.scheduler):
            policy = build.policy(new.scheduler.policy, new.scheduler.aging)
            self.dispatcher.set_policy(policy, replace(self.core.config, **dials))
            applied.append("scheduler.queue, retries and tail")
        if new.scheduler.retry_budget != old.scheduler.retry_budget:
            self.dispatcher.budget.share = new.scheduler.retry_budget
            applied.append("scheduler.retry_budget")
        if new.logging.level != old.logging.level:
            logging.getLogger("elis_gateway").setLevel(new.logging.level.upper())
            applied.append("logging.level")
        applied += [
            f"{section}.{key}"
            for section, key in _READ_WHEN_NEEDED
            if getattr(getattr(new, section), key) != getattr(getattr(old, section), key)
        ]
        self.config = new
        if await self._change_upstreams({u.name: u for u in new.upstreams}):
            applied.append("upstreams")
        if swapped:
            applied.append("predictor.path")
        restart = _needs_restart(self._began, new, swaps=hasattr(self.predictor, "swap"))
        _log.info(
            "configuration read again; applied: %s; needs a restart: %s", applied or "nothing", restart or "nothing"
        )
        return {"applied": applied, "needs_restart": restart}

    async def _swap_model(self, new: Config) -> bool:
        """Another model folder, or the same with other contents, if the predictor can take it. Raises ConfigError."""
        swap = getattr(self.predictor, "swap", None)
        if swap is None or new.predictor.kind != self._began.predictor.kind:
            return False
        return bool(await swap(getattr(new.predictor, "path", None)))

    def _check(self, new: Config) -> None:
        """All or nothing: what could only fail half-way, a key or a certificate that is not there, is tried first."""
        there = self.fleet.settings()
        for upstream in new.upstreams:
            if upstream != there.get(upstream.name):
                check(upstream)
        for listening in self._tls:
            tls.listener(listening.section)
        build.policy(new.scheduler.policy, new.scheduler.aging)

    async def _change_upstreams(self, wanted: Mapping[str, config_module.Upstream]) -> bool:
        self._intake.forward_credentials = any(u.forward_credentials for u in wanted.values())
        return await self.roster.change(wanted)

    async def _idle(self, upstream: str) -> None:
        await self.dispatcher.idle(upstream)
        await self._relay.idle(upstream)

    def _upstream_gone(self, name: str, for_good: bool) -> None:
        self.dispatcher.upstream_removed(name)
        self._warmth.forget(name)
        if for_good:
            self.metrics.forget(name)

    async def add_upstream(self, wanted: Any) -> dict[str, Any]:
        """Use another upstream from now on, until a reload says otherwise. Raises ``ConfigError``."""
        ranks = {settings.name: settings for settings in build.parse_upstream(wanted).ranks()}
        async with self._changing:
            self.roster.refuse_if_closed()
            try:
                config_module.check_count(len(self.roster.wanted) + len(ranks))
                for settings in ranks.values():
                    self.config.check_upstream(settings)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            if twice := sorted(ranks.keys() & self.roster.wanted.keys()):
                raise ConfigError(f"there is an upstream {twice[0]} already")
            await self._change_upstreams({**self.roster.wanted, **ranks})
        return {"upstreams": self.upstreams()}

    async def remove_upstream(self, name: str) -> dict[str, Any]:
        """Empty an upstream and forget it, until a reload says otherwise. Raises ``UnknownUpstream``."""
        async with self._changing:
            if name not in self.roster.wanted:
                raise UnknownUpstream(name)
            await self._change_upstreams({n: u for n, u in self.roster.wanted.items() if n != name})
        return {"upstreams": self.upstreams()}

    async def drain_upstream(self, name: str, draining: bool) -> dict[str, Any]:
        """Send it nothing more, and let what runs there go on elsewhere; or use it again.

        Raises ``UnknownUpstream``.
        """
        self.roster.drain(name, draining)
        return {"upstreams": self.upstreams()}


def _needs_restart(began: Config, new: Config, *, swaps: bool) -> list[str]:
    """What is said now and is not in effect. ``swaps``: the predictor takes another folder while it serves."""
    live = {*_ORDERING, "classes", "class_tail", "default_class", "queue", "retries", "retry_budget", "tail"}
    sections = ("server", "admin", "predictor", "logging", "traffic_log", "tracing")
    taken = {name: {key for section, key in _READ_WHEN_NEEDED if section == name} for name in sections}
    taken["logging"] = {"level"}
    taken["predictor"] = {"path"} if swaps else set()

    def rest(config: Config, name: str) -> dict[str, Any]:
        return dict(getattr(config, name).model_dump(exclude=taken[name]))

    return [
        f"scheduler.{name}"
        for name in type(new.scheduler).model_fields
        if name not in live and getattr(new.scheduler, name) != getattr(began.scheduler, name)
    ] + [
        *(name for name in sections if rest(new, name) != rest(began, name)),
        *(
            f"limits.{n}"
            for n in ("client_backlog", "client_stall")
            if getattr(new.limits, n) != getattr(began.limits, n)
        ),
    ]


def _scheme(settings: config_module.Server | config_module.Admin) -> str:
    return "http" if settings.tls.cert is None else "https"


def _port(runner: web.BaseRunner) -> int:
    address = runner.addresses[0]
    assert isinstance(address, tuple)
    return int(address[1])


async def serve(config: Config, reload: Reload | None = None) -> None:
    """Serve until SIGTERM or SIGINT: the first is graceful, a second ends the grace. SIGHUP reads the file again."""
    loop = asyncio.get_running_loop()
    gateway = Gateway(config, reload)
    stop = asyncio.Event()

    def told_to_stop() -> None:
        if stop.is_set():
            _log.warning("told again: ending what still runs")
            gateway.hurry()
        else:
            _log.info("shutting down; jobs have %g s to finish", gateway.config.server.shutdown_grace)
            stop.set()

    async def read_again() -> None:
        try:
            await gateway.reload()
        except ConfigError as error:
            _log.error("the configuration stays as it is: %s", error)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: spawn(read_again(), name="reload"))
    try:
        await gateway.start()
        # What is loaded by now stays: the garbage collector need not look at it while tokens wait.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        await stop.wait()
    finally:
        await gateway.stop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
