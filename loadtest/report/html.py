"""One self-contained HTML page, and PNGs of its plots. Works offline: no script, no font, no image from anywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

from loadtest import store
from loadtest.experiment import Experiment
from loadtest.report.plots import Plot, draw, svg
from loadtest.report.style import CSS, adapt
from loadtest.tables import Table, tables, verdict

__all__ = ["page", "write"]

_PAGE = """\
*{box-sizing:border-box}
:root{--bg:#fff;--panel:#f6f8fa;--fg:#1b1f24;--muted:#5b6470;--line:#e3e6ea;--accent:#0b6fb8;--warn:#a33b00}
@media (prefers-color-scheme: dark){:root{--bg:#12161b;--panel:#1a2027;--fg:#e7eaee;--muted:#9aa4b0;--line:#2c333b;
--accent:#5ab0ee;--warn:#f59a5a}}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.6rem;margin:.2em 0 .5em}h2{font-size:1.15rem;margin:0 0 .2em}
p,ul{margin:.3em 0 .8em}ul{padding-left:1.2em}
.meta{color:var(--muted);font-size:.9rem;list-style:none;padding:0;overflow-wrap:anywhere}
.short{background:var(--panel);border-left:4px solid var(--accent);border-radius:6px;padding:14px 18px;margin:18px 0}
.short.warn{border-color:var(--warn)}
.short ul{margin:0}
.plots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:28px 32px;margin:28px 0;grid-auto-flow:dense}
figure{margin:0;min-width:0}figure.wide{grid-column:1/-1}
figure p,.note{color:var(--muted);font-size:.88rem;margin:.1em 0 .5em}
figure svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
section{margin:34px 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--bg);padding-right:18px}
th{color:var(--muted);font-weight:600}
@media (max-width:760px){.plots{grid-template-columns:minmax(0,1fr)}main{padding:16px 14px 48px}h1{font-size:1.35rem}
figure.wide .scroll svg{min-width:760px}}
@media print{figure,section{break-inside:avoid}}
"""


def write(folder: Path, experiment: Experiment) -> None:
    """``report.html`` and ``plots/*.png`` in the folder of an experiment."""
    arms = experiment.arms()
    plots = draw(experiment, arms)
    images = folder / "plots"
    images.mkdir(exist_ok=True)
    for plot in plots:
        plot.figure.savefig(images / f"{plot.name}.png", dpi=190, facecolor="white")
    said = verdict(experiment, arms)
    text = page(store.introduction(experiment), said, bool(experiment.faults()), plots, tables(experiment, arms))
    (folder / "report.html").write_text(text, encoding="utf-8")


def page(introduction: list[str], said: list[str], warn: bool, plots: list[Plot], shown: list[Table]) -> str:
    """The whole page."""
    first, rest = shown[:1], shown[1:]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>elis-gateway load test</title>',
        f"<style>{CSS}{_PAGE}</style></head><body><main>",
        "<h1>What the order changes</h1>"
        if len(first) and first[0].title.startswith("Ratio")
        else "<h1>Load test</h1>",
        '<ul class="meta">',
        *(f"<li>{escape(line)}</li>" for line in introduction),
        "</ul>",
    ]
    if said:
        kind = "short warn" if warn else "short"
        parts += [f'<div class="{kind}"><ul>', *(f"<li>{escape(line)}</li>" for line in said), "</ul></div>"]
    parts += [_table(table) for table in first]
    parts += ['<div class="plots">', *(_figure(plot) for plot in plots), "</div>"]
    parts += [_table(table) for table in rest]
    return "".join([*parts, "</main></body></html>\n"])


def _figure(plot: Plot) -> str:
    drawing = adapt(svg(plot), plot.name, escape(f"{plot.title}. {plot.words}", quote=True))
    kind = ' class="wide"' if plot.wide else ""
    drawn = f'<div class="scroll">{drawing}</div>' if plot.wide else drawing
    return f"<figure{kind}><h2>{escape(plot.title)}</h2><p>{escape(plot.words)}</p>{drawn}</figure>"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>{escape(table.title)}</h2>{note}{body}</section>"
