"""Options that several sub-commands share: how to say which work it is. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elis_gateway.errors import ConfigError

if TYPE_CHECKING:
    from loadtest.workload import Seeds, Workload

__all__ = ["DRAWN", "Work", "work_options"]

_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)

_OPTIONS = (
    click.option("--num-requests", default=100, show_default=True, help="Requests of a workload."),
    click.option(
        "--arrivals",
        default="gamma",
        show_default=True,
        metavar="PROCESS",
        help="constant | poisson | gamma | onoff:on=10,off=20[,idle=0.1] | ramp:from=0.5,to=2 | "
        "stages:60@0.5,60@2 (seconds @ times the rate) | once | azure (shipped trace, scaled) | "
        "trace:FILE[,speed=2][,start=1000] (Azure's CSV format; each seed takes the next piece of it).",
    ),
    click.option(
        "--gamma-shape", default=1.0, show_default=True, help="Of gamma arrivals; below 1 is burstier than Poisson."
    ),
    click.option(
        "--gamma-scale", default=1.0, show_default=True, help="Seconds: shape x scale is the mean gap, without a rate."
    ),
    click.option("--rate", type=float, help="Mean requests per second; otherwise from --load, or shape and scale."),
    click.option(
        "--load",
        type=float,
        help="Offered tokens as a share of the capacity, instead of --rate.  [default: 0.95 with --capacity]",
    ),
    click.option("--capacity", type=float, help="Tokens per second with every slot at work, for --load."),
    click.option(
        "--prompts-file",
        "prompts",
        type=_EXISTING,
        help='JSONL, ShareGPT, LMSYS-Chat, {"prompts": [...]}, CSV; .gz is fine. Default: the shipped pool.',
    ),
    click.option("--turns", type=click.Choice(["first", "all"]), default="first", help="Of recorded conversations."),
    click.option(
        "--lengths",
        default="",
        metavar="DISTRIBUTION",
        help="own (as recorded with the prompts) | azure (shipped trace) | trace:FILE | constant:tokens=200 | "
        "uniform:min=10,max=500 | exponential:mean=200 | lognormal:median=150,sigma=1 | pareto:min=40,alpha=1.5 | "
        "two:short=30,long=800,share=0.2.  [default: azure for the pool, own for a file]",
    ),
    click.option(
        "--mix",
        metavar="FILE",
        help="Applications, each with share, system prompt, prompts, lengths, arrivals (YAML or JSON); `example` for a "
        "built-in one.",
    ),
    click.option(
        "--longest",
        default=1000,
        show_default=True,
        type=click.IntRange(min=1),
        help="Longest answer in tokens; also the limit sent.",
    ),
    click.option(
        "--force-lengths/--natural-lengths",
        "forced",
        default=None,
        help="Send ignore_eos with the exact length, or let the model stop.  [default: forced where the length was not "
        "recorded with the text]",
    ),
    click.option("--seed", default=0, show_default=True, help="First workload seed, of arrivals, lengths and prompts."),
    click.option("--arrivals-seed", type=int, help="A seed of its own for the arrivals."),
    click.option("--lengths-seed", type=int, help="A seed of its own for the lengths."),
    click.option("--prompts-seed", type=int, help="A seed of its own for the prompts."),
)
_NAMES = (
    "num_requests", "arrivals", "gamma_shape", "gamma_scale", "rate", "load", "capacity", "prompts", "turns", "lengths",
    "mix", "longest", "forced", "seed", "arrivals_seed", "lengths_seed", "prompts_seed",
)  # fmt: skip
DRAWN = frozenset(_NAMES) - {"seed"}
"""Options that a frozen workload has no use for. (The seed still says what a simulated predictor happens to know.)"""


@dataclass(frozen=True)
class Work:
    """The work that the options describe."""

    num_requests: int
    arrivals: str
    gamma_shape: float
    gamma_scale: float
    rate: float | None
    load: float | None
    capacity: float | None
    prompts: Path | None
    turns: str
    lengths: str
    mix: str | None
    longest: int
    forced: bool | None
    seed: int
    arrivals_seed: int | None
    lengths_seed: int | None
    prompts_seed: int | None

    def seeds(self, number: int) -> Seeds:
        """Those of the ``number``-th workload; a seed of its own stays where it is told to stay."""
        from loadtest.workload import Seeds

        own = (self.arrivals_seed, self.lengths_seed, self.prompts_seed)
        return Seeds(*(self.seed + number if seed is None else seed for seed in own))

    def make(self, number: int = 0, *, capacity: float | None = None) -> Workload:
        """The ``number``-th workload. ``capacity``: tokens/s, where the options leave it to be measured."""
        from loadtest import make

        if self.mix is not None:
            if self.prompts is not None or self.lengths:
                raise ConfigError("--mix says itself which prompts and lengths: leave --prompts-file and --lengths out")
            apps = (
                tuple(make.App(**app) for app in make.EXAMPLE_MIX) if self.mix == "example" else make.read_mix(self.mix)
            )
        else:
            apps = (make.App(prompts=str(self.prompts) if self.prompts else "pool", lengths=self.lengths),)
        if self.rate is not None and self.load is not None:
            raise ConfigError("--rate and --load say the same: give one of them")
        for name in ("rate", "load", "capacity", "gamma_shape", "gamma_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
        plan = make.Plan(
            requests=self.num_requests,
            apps=apps,
            arrivals=f"gamma:shape={self.gamma_shape:g}" if self.arrivals == "gamma" else self.arrivals,
            rate=self._rate(),
            load=self._load(),
            capacity=self.capacity if self.capacity is not None else capacity,
            longest=self.longest,
            forced=self.forced,
            turns=self.turns,
        )
        return make.make(plan, self.seeds(number))

    def _load(self) -> float | None:
        return 0.95 if self.load is None and self.capacity is not None and self.rate is None else self.load

    def _rate(self) -> float | None:
        if self.rate is not None or self._load() is not None or self.arrivals.startswith("trace:"):
            return self.rate
        return 1 / (self.gamma_shape * self.gamma_scale)


def work_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options; it receives them as one ``Work`` named ``work``."""

    @wraps(command)
    def wrapped(**given: Any) -> Any:
        return command(work=Work(**{name: given.pop(name) for name in _NAMES}), **given)

    whole: Callable[..., Any] = wrapped
    for option in reversed(_OPTIONS):
        whole = option(whole)
    return whole
