"""What the doctor found, and what to say of it: to a person in words, to the gateway in YAML.

Knows: findings, and what metrics pages say of a load. Never: how anything is found out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import orjson

from elis_gateway.upstream.base import Capabilities

__all__ = ["Findings", "Load", "load_of", "report", "snippet"]

_ALIKE = 0.10
"""Answers whose middle four fifths lie within this share of each other are all equally long."""
_NOBODY = 0.02
"""Waits shorter than this share of the completion time are no waits."""


@dataclass
class Load:
    """What a gateway or an engine says of its traffic so far. Times in seconds, lengths in tokens."""

    source: str
    requests: float
    wait: float
    """Mean wait for a slot."""
    time: float
    """Mean completion time."""
    spread: tuple[float, float] | None = None
    """10th and 90th percentile of the answers' lengths, to within their buckets."""


@dataclass
class Findings:
    """All that was found out of one engine."""

    url: str
    model: str | None = None
    capabilities: Capabilities = field(default_factory=Capabilities)
    slots: int | None = None
    """Sequences it runs at once; None: more than the ramp went up to, or it could not be told."""
    tried: int = 0
    """Calls at once at the top of the ramp."""
    configured: int | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    """What else a person has set for it, and the doctor knows nothing better of."""
    pace: float | None = None
    """Seconds per token of one call alone."""
    full_pace: float | None = None
    """Seconds per token of each call at the top of the ramp."""
    seam: float | None = None
    """What interrupting and resuming costs, in decoded tokens."""
    cache: str = "not seen"
    route: str = "/v1/completions"
    """Where it is asked: chats where it serves nothing else."""
    engines: str = "one, as far as can be seen"
    """How many engines answer at its address."""
    tools: str = "not known"
    reasoning: str = "not seen"
    load: Load | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def generates(self) -> bool:
        """It has given an answer, so there is something to order."""
        return self.tried > 0

    @property
    def wrong(self) -> bool:
        """It generates nothing, or more slots are configured than there are."""
        return not self.generates or (
            self.configured is not None and self.slots is not None and self.configured > self.slots
        )


# ---- does anybody wait? --------------------------------------------------------------------------------------------


def load_of(text: str, source: str, *, wait: str, time: str, length: str) -> Load | None:
    """The load that a metrics page tells of, if it does."""

    def total(name: str) -> float:
        return sum(_number(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))

    requests = total(f"{wait}_count")
    if requests < 50:
        return None
    times = total(f"{time}_count")
    return Load(
        source,
        requests,
        total(f"{wait}_sum") / requests,
        total(f"{time}_sum") / times if times else 0.0,
        _spread(text, length),
    )


def _number(text: str) -> float:
    """A value of a metrics page; what is no finite number is nothing."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if isfinite(value) else 0.0


def _spread(text: str, name: str) -> tuple[float, float] | None:
    """10th and 90th percentile of a histogram, interpolated within its buckets."""
    rows: dict[float, float] = {}
    for labels, value in re.findall(rf"^{re.escape(name)}_bucket\{{(.*)\}} (\S+)$", text, re.MULTILINE):
        bound = re.search(r'le="([^"]+)"', labels)
        if bound is not None:
            edge = float("inf") if bound[1] == "+Inf" else _number(bound[1])
            rows[edge] = rows.get(edge, 0.0) + _number(value)
    edges = sorted(rows)
    if not edges or not rows[edges[-1]]:
        return None

    def quantile(q: float) -> float:
        wanted, below, low = q * rows[edges[-1]], 0.0, 0.0
        for edge in edges:
            if rows[edge] >= wanted:
                if edge == float("inf"):
                    return low
                inside = rows[edge] - below
                return low + (edge - low) * ((wanted - below) / inside if inside else 1.0)
            below, low = rows[edge], edge
        return low

    return quantile(0.1), quantile(0.9)


def _order(load: Load | None) -> list[str]:
    """Whether order can help, in words."""
    if load is None:
        return [
            "Whether order helps is for your traffic to say: it does where requests wait and answers differ in length."
            " Put the gateway in front, and ask the doctor again with its configuration, or look at /ui."
        ]
    said = []
    if load.time and load.wait < _NOBODY * load.time:
        said.append(
            f"ORDER CANNOT HELP NOW: of {load.requests:.0f} requests at {load.source} nobody waited"
            f" ({load.wait:.3f} s of {load.time:.2f} s). Whoever does not wait cannot be overtaken."
        )
    elif load.time:
        said.append(
            f"Requests at {load.source} waited {load.wait:.2f} s of {load.time:.2f} s, {load.wait / load.time:.0%}."
        )
    if load.spread is not None:
        short, long = load.spread
        if long and (long - short) / long <= _ALIKE:
            said.append(
                f"ORDER CANNOT HELP: answers are all equally long ({short:.0f} to {long:.0f} tokens)."
                " Nobody is shorter than the next; use policy fcfs."
            )
        else:
            said.append(f"Answers differ: a tenth is shorter than {short:.0f} tokens, a tenth longer than {long:.0f}.")
    return said


# ---- telling -------------------------------------------------------------------------------------------------------


def report(found: Findings) -> list[str]:
    """What was found, for a person."""
    able = found.capabilities
    lines = [f"{found.url}: {able.kind}, {', '.join(sorted(able.models)) or 'no models'}"]
    if not found.generates:
        lines += [f"  note: {note}" for note in found.notes]
        lines.append("  NOTHING TO ORDER HERE: it gave no answer. The gateway wants servers that generate text.")
        return lines
    context = ", ".join(f"{model}: {length}" for model, length in able.context.items()) or "it does not say"
    slots = f"{found.slots}" if found.slots is not None else f"more than the {found.tried} tried"
    rows = [
        ("context length", context),
        ("token ids", "yes: answers are continued exactly" if able.ids else "no: one call per request, still ordered"),
        ("orders by priority", "yes, seen twice" if able.orders else "no"),
        ("prefix cache", found.cache),
        ("tool parser", found.tools),
        ("reasoning parser", found.reasoning),
        ("engines there", found.engines),
        ("slots", slots),
    ]
    if found.pace is not None and found.full_pace is not None:
        rows.append(
            ("pace of one call", f"{1 / found.pace:.1f} tokens/s alone, {1 / found.full_pace:.1f} of {found.tried}")
        )
    if found.seam is not None:
        rows.append(("seam cost", f"{found.seam:.1f} decoded tokens"))
    lines += [f"  {name:19s} {value}" for name, value in rows]
    lines += [f"  note: {note}" for note in found.notes]
    if found.engines.startswith("SEVERAL"):
        lines.append("  Name the engines themselves as upstreams: an answer goes on best where its prompt is cached.")
    if found.wrong:
        lines.append(
            f"  WRONG: slots is {found.configured}, the engine runs {found.slots}: what waits inside it is not ordered."
        )
    if found.configured is not None and found.slots is not None and found.configured < found.slots:
        lines.append(f"  slots is {found.configured}, the engine runs {found.slots}: it could do more at once.")
    lines += [f"  {line}" for line in _order(found.load)]
    return lines


def snippet(found: list[Findings]) -> str:
    """The YAML to use; nothing where nothing generates."""
    useful = [one for one in found if one.generates]
    if not useful:
        return ""
    lines = ["upstreams:"]
    for one in useful:
        lines.append(f"  - url: {one.url}")
        ranks = one.capabilities.engines
        slots = max((one.slots if one.slots is not None else one.tried) // ranks, 1)
        comment = "" if one.slots is not None else " # at least; what the engine is started with (vLLM: --max-num-seqs)"
        lines.append(f"    slots: {slots}{comment}")
        if ranks > 1:
            lines.append(f"    data_parallel_size: {ranks} # slots are each rank's")
        if one.capabilities.orders:
            lines.append("    overcommit: 2 # it orders its own queue by priority")
        lines += [f"    {name}: {orjson.dumps(value).decode()}" for name, value in one.kept.items()]
    return "\n".join(lines) + "\n"
