"""Renders a comparison of methods: as Markdown, and as an HTML page with a plot of all intervals."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from .comparison import LEVEL, Cell, Column, Comparison

_SHORT = {"recall_subset": "Rs", "recall": "R", "map": "mAP", "ndcg": "nDCG"}

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid #d0d7de; padding: .3rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } small { color: #59636e } .best { font-weight: 700 }
svg { width: 100%; height: auto } text { font: 12px system-ui, sans-serif; fill: #1f2328 }"""

LABELS, PLOT, LINE = 240, 420, 22
"""Widths of the names and of the intervals in the plot, and the height of a row, in pixels."""


def render_markdown(comparison: Comparison) -> str:
    """Render the table, the notes that it needs to be read, and the protocols."""
    heads = ["method", *map(head, comparison.columns), *_cost_names(comparison)]
    lines = [heads, ["---"] * len(heads)]
    for name, cells in comparison.rows.items():
        shown = [_cell(cells.get(column), column, comparison) for column in comparison.columns]
        lines.append([name.replace("|", "/"), *shown, *_costs(name, comparison)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes(comparison), "## Protocols", *_protocol_lists(comparison)]) + "\n"


def _cell(cell: Cell | None, column: Column, comparison: Comparison) -> str:
    if cell is None:
        return "-"
    text = f"{100 * cell.value:.1f}"
    text = f"**{text}**" if is_highest(cell, column, comparison) else text
    return f"{text} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]{mark(cell)}"


def mark(cell: Cell) -> str:
    """Return the mark of a difference that the test finds: an arrow up or down, nothing without."""
    if not cell.differs:
        return ""
    return " ↑" if (cell.difference or 0) > 0 else " ↓"


def is_highest(cell: Cell, column: Column, comparison: Comparison) -> bool:
    """Return whether no row has a higher value in the column, and some row has a lower one."""
    values = [cells[column].value for cells in comparison.rows.values() if column in cells]
    return cell.value == max(values) > min(values)


def head(column: Column) -> str:
    """Return a column's head: `cirr/val R@1`."""
    metric = column.metric
    for name, short in _SHORT.items():
        metric = metric.replace(name, short)
    return f"{column.benchmark} {metric}".replace("|", "/")


def notes(comparison: Comparison) -> list[str]:
    """Return sentences that say what values, intervals and marks are."""
    runs = {cell.runs for cells in comparison.rows.values() for cell in cells.values()}
    texts = ["Percent; bold: the highest of its column."]
    if 1 in runs:
        texts.append("[ ]: 95 % bootstrap interval over queries, of a row of one run.")
    if several := ", ".join(map(str, sorted(runs - {1}))):
        texts.append(
            f"Rows of {several} runs: the mean, and in [ ] the 95 % interval over seeds; tests compare queries, each "
            "by its mean over runs."
        )
    if comparison.against is not None:
        texts.append(
            f"↑, ↓: above or below {comparison.against} by a paired sign-flip test over queries, p at most {LEVEL} "
            f"after Holm's correction for the {comparison.tests} tests of this table. No mark: no difference found."
        )
    return [" ".join(texts)]


def _cost_names(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(name for cost in comparison.costs.values() for name in cost))


def _costs(row: str, comparison: Comparison) -> list[str]:
    return [_figure(comparison.costs[row].get(name)) for name in _cost_names(comparison)]


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/")


def _protocol_lists(comparison: Comparison) -> list[str]:
    """Return a list of settings for each benchmark."""
    parts = []
    for benchmark, protocol in comparison.protocols.items():
        counts = ", ".join(f"{number:,} {what}" for what, number in protocol["counts"].items())
        settings = [f"{key} {value}" for key, value in protocol.items() if key not in ("name", "counts")]
        parts.append(f"- `{benchmark}`, protocol `{protocol['name']}`: {counts}; {'; '.join(settings)}")
    return ["\n".join(parts)]


def render_html(comparison: Comparison, title: str = "Comparison of methods") -> str:
    """Render a page of its own, without scripts and without anything fetched: table, notes, plots and protocols."""
    heads = ["method", *map(head, comparison.columns), *_cost_names(comparison)]
    rows = [f"<tr>{''.join(f'<th>{escape(text)}</th>' for text in heads)}</tr>"]
    for name, cells in comparison.rows.items():
        shown = [_html_cell(cells.get(column), column, comparison) for column in comparison.columns]
        costs = [f"<td>{escape(text)}</td>" for text in _costs(name, comparison)]
        rows.append(f"<tr><td>{escape(name)}</td>{''.join([*shown, *costs])}</tr>")
    items = [f"<li>{escape(line[2:])}</li>" for line in _protocol_lists(comparison)[0].split("\n")]
    protocols = re.sub("`(.*?)`", r"<code>\1</code>", "".join(items))
    plots = "".join(f"<h3>{escape(head(c))}</h3>{plot(comparison, c)}" for c in comparison.columns)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><div class=wide><table>{''.join(rows)}</table></div>"
        f"<p>{escape(' '.join(notes(comparison)))}</p>{plots}<h2>Protocols</h2><ul>{protocols}</ul></body></html>\n"
    )


def _html_cell(cell: Cell | None, column: Column, comparison: Comparison) -> str:
    if cell is None:
        return "<td>-</td>"
    best = ' class="best"' if is_highest(cell, column, comparison) else ""
    ends = f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return f"<td><span{best}>{100 * cell.value:.1f}</span>{mark(cell)}<br><small>{ends}</small></td>"


def plot(comparison: Comparison, column: Column) -> str:
    """Draw the intervals of a column as SVG: a dot and a line for each row, the row tested against as a rule."""
    cells = {name: own[column] for name, own in comparison.rows.items() if column in own}
    low, high = (f(end for c in cells.values() for end in (c.low, c.high)) for f in (min, max))
    span = max(high - low, 1e-3)

    def x(value: float) -> float:
        return round(LABELS + PLOT * (0.03 + 0.94 * (value - low) / span), 1)

    height = LINE * (len(cells) + 1)
    parts = [f'<svg viewBox="0 0 {LABELS + PLOT + 60} {height}" role="img" aria-label="{escape(head(column))}">']
    if comparison.against in cells:
        rule = x(cells[comparison.against].value)
        parts.append(
            f'<line x1="{rule}" x2="{rule}" y1="4" y2="{height - LINE}" stroke="#afb8c1" stroke-dasharray="4"/>'
        )
    parts += [line for number, (name, cell) in enumerate(cells.items()) for line in _interval(number, name, cell, x)]
    for value, anchor in dict([(low, "start"), (high, "end")]).items():  # one label where the two are equal
        parts.append(f'<text x="{x(value)}" y="{height - 6}" text-anchor="{anchor}">{100 * value:.1f}</text>')
    return "".join([*parts, "</svg>"])


def _interval(number: int, name: str, cell: Cell, x: Any) -> Sequence[str]:
    y = LINE * number + 14
    colour = "#0969da" if cell.differs else "#59636e"
    short = name if len(name) <= 34 else f"{name[:33]}…"
    return (
        f'<text x="{LABELS - 8}" y="{y + 4}" text-anchor="end">{escape(short)}</text>',
        f'<line x1="{x(cell.low)}" x2="{x(cell.high)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{x(cell.value)}" cy="{y}" r="4" fill="{colour}"/>',
        f'<text x="{LABELS + PLOT + 6}" y="{y + 4}">{100 * cell.value:.1f}{mark(cell)}</text>',
    )


__all__ = ["render_html", "render_markdown"]
