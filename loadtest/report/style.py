"""Colours and sizes that plots and page share. In an SVG every colour becomes a CSS variable, so that one drawing is
right on light and on dark ground."""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "BASE",
    "CSS",
    "FIGURE",
    "FOREGROUND",
    "GRID",
    "GROUND",
    "MUTED",
    "SEQUENCE",
    "SERIES",
    "SIZES",
    "WIDE",
    "adapt",
]

FOREGROUND, MUTED, GRID, BASE, GROUND = "#1b1f24", "#5b6470", "#e3e6ea", "#8a929c", "#fefefe"
SERIES = ("#0b6fb8", "#d1590a", "#148a63", "#a8458f", "#9a7400", "#c0392b", "#3c5aa6", "#4d7c0f")
"""One per setting, the base apart, which is grey. Told apart by people who see few colours, too."""
SEQUENCE = ("#cfe3f3", "#9cc6e6", "#5fa3d3", "#2b7cba", "#135a94", "#0a3a66")
"""Short to long."""

_DARK = {
    FOREGROUND: "#e7eaee", MUTED: "#9aa4b0", GRID: "#2c333b", GROUND: "#12161b", BASE: "#8c96a1",
    "#0b6fb8": "#5ab0ee", "#d1590a": "#f59a5a", "#148a63": "#4fc79c", "#a8458f": "#d98cc6", "#9a7400": "#d9b13f",
    "#c0392b": "#ef8377", "#3c5aa6": "#93a9e6", "#4d7c0f": "#a3c95a",
    "#cfe3f3": "#16344d", "#9cc6e6": "#1f5079", "#5fa3d3": "#2d74ab", "#2b7cba": "#4f9bd6", "#135a94": "#86bfec",
    "#0a3a66": "#c4e1f8",
}  # fmt: skip

SIZES: dict[str, Any] = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": FOREGROUND,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "elis",
}
FIGURE, WIDE = (5.0, 3.7), (11.4, 4.4)
"""Inches: half of a desktop's page, which fills a phone's; and all of it."""


def _name(colour: str) -> str:
    return f"--plot-{colour[1:]}"


CSS = (
    ":root{" + "".join(f"{_name(light)}:{light};" for light in _DARK) + "}\n"
    "@media (prefers-color-scheme: dark){:root{"
    + "".join(f"{_name(light)}:{dark};" for light, dark in _DARK.items())
    + "}}\n"
)

_COLOUR = re.compile("|".join(_DARK), re.IGNORECASE)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"', re.DOTALL)
_HEIGHT = re.compile(r'(<svg[^>]*?) height="[^"]*"', re.DOTALL)
_ID = re.compile(r'(\bid="|url\(#|href="#)')


def adapt(svg: str, name: str, label: str) -> str:
    """An SVG made for one page among others: no prolog, ids of its own, as wide as its place, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _HEIGHT.sub(r"\1", _SIZE.sub(r"\1", svg, count=1), count=1)
    svg = _ID.sub(lambda found: f"{found[1]}{name}-", svg)
    svg = _COLOUR.sub(lambda found: f"var({_name(found[0].lower())})", svg)
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans'")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
