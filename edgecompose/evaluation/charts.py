"""Charts of an evaluation, as SVG that follows the reader's light or dark theme and as PNG; the one use of matplotlib.

matplotlib is an extra, `edgecompose[report]`, and is imported only when a chart is drawn.
"""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgecompose.errors import EvaluationError
from edgecompose.evaluation.results import Metrics, Score, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = Mapping[str, Mapping[str, float]]
#: Text, quiet text and lines in the light theme, and what they become in the dark one.
_INK, _QUIET, _LINE = "#1f2328", "#59636e", "#d1d9e0"
_DARK = {_INK: "#e6edf3", _QUIET: "#9198a1", _LINE: "#3d444d"}
#: Colours of the main variant, the base and the others: distinct for colour-blind readers, on white and on black.
_MAIN, _BASE = "#1f83d6", "#8b949e"
#: Full colour of a heat map: white can be read on most of it.
_HEAT, _WHITE_FROM = "#0b5cad", 0.7
_OTHERS = ("#009e73", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9", "#8f7ee0", "#b3892d", "#4fb0a5")
_MARKS = "oDs^vP<X>"
_FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgecompose",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _QUIET,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _QUIET,
    "ytick.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}
#: Cells of a heat map below this share have no label.
_SHOWN = 0.02
_CHARACTER = 0.083  # inches of a character at size 9, at most


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture in both forms, its natural `width` in CSS pixels, and what it shows in words."""

    name: str
    title: str
    alt: str
    svg: str
    png: bytes
    width: int


def require_matplotlib() -> None:
    """Fail early, before hours of work.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        frozen = getattr(sys, "frozen", False)
        remedy = "this executable does not hold; with a Python of your own" if frozen else "is not installed;"
        raise EvaluationError(
            f"a report needs matplotlib, which {remedy} run: pip install 'edgecompose[report]'"
        ) from error


def draw_charts(summary: Summary) -> list[Chart]:
    """The charts of an evaluation; of the main variant those that there is something to show of."""
    require_matplotlib()
    main = summary.metrics[summary.main]
    means = ", ".join(f"{n} {s.mean:.1%}" for n, s in summary.metrics.items() if s.mean is not None)
    charts = [
        _chart(
            "accuracy",
            "Accuracy, with intervals of 95 %",
            f"Mean accuracy: {means}. Below it every task by itself.",
            lambda: _accuracy(summary),
        )
    ]
    if any(main.weights.values()):
        charts.append(
            _chart(
                "weights",
                f"Mean weight of adapters, per cent ({summary.main})",
                f"Tasks against adapters. {_largest(main.weights, 'is given mostly')}",
                lambda: _heat_map(main.weights, "adapter"),
            )
        )
    if main.routing.confusion:
        shares = {
            task: {top: count / sum(counts.values()) for top, count in counts.items()}
            for task, counts in main.routing.confusion.items()
        }
        charts.append(
            _chart(
                "confusion",
                "Where prompts were routed, per cent of a task's examples",
                f"Tasks against the task on top. {_largest(shares, 'goes mostly to')}",
                lambda: _heat_map(shares, "task on top"),
            )
        )
    if main.routing.error is not None:
        bins = "; ".join(f"{b.share:.0%} share, {b.right:.0%} right" for b in main.routing.reliability if b.n)
        charts.append(
            _chart(
                "reliability",
                "Can the top task's share be trusted?",
                f"Expected calibration error {main.routing.error:.3f}. {bins}.",
                lambda: _reliability(main),
            )
        )
    return charts


def colours(summary: Summary) -> dict[str, str]:
    """A colour for each variant."""
    fixed = {summary.main: _MAIN} | ({} if summary.main == "base" else {"base": _BASE})
    others = [name for name in summary.metrics if name not in fixed]
    rest = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return {name: (fixed | rest)[name] for name in summary.metrics}


def _largest(matrix: Matrix, verb: str) -> str:
    tops = ((task, max(row, key=row.__getitem__)) for task, row in matrix.items() if row)
    return "; ".join(f"{task} {verb} {top}" for task, top in tops) + "."


def _chart(name: str, title: str, alt: str, draw: Callable[[], Figure]) -> Chart:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = draw()
        svg, png = io.StringIO(), io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
        figure.savefig(png, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return Chart(
        name=name,
        title=title,
        alt=alt,
        svg=_themed(svg.getvalue(), title),
        png=png.getvalue(),
        width=round(figure.get_figwidth() * 96),
    )


def _themed(svg: str, title: str) -> str:
    """An SVG whose colours of text and lines are variables, which the dark theme sets anew."""
    names = {_INK: "--ink", _QUIET: "--quiet", _LINE: "--line"}
    light = ";".join(f"{names[colour]}:{colour}" for colour in names)
    dark = ";".join(f"{names[colour]}:{_DARK[colour]}" for colour in names)
    for colour, name in names.items():
        svg = svg.replace(f": {colour}", f": var({name})")
    svg = svg.replace("'DejaVu Sans'", _FONTS.replace('"', "'"))
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    start = svg.index("<svg")
    opened = svg.index(">", start) + 1
    return f"{svg[start:opened]}<title>{html.escape(title)}</title>{style}{svg[opened:]}"


def _figure(width: float, height: float, *boxes: tuple[float, float, float, float]) -> tuple[Figure, list[Axes]]:
    """A figure in inches with axes at (left, top, width, height) in inches, from its upper left corner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    places = [(x / width, 1 - (y + h) / height, w / width, h / height) for x, y, w, h in boxes]
    axes = [figure.add_axes(place) for place in places]
    for one in axes:
        one.spines[:].set_visible(False)
        one.tick_params(length=0)
    return figure, axes


def _margin(labels: Sequence[str]) -> float:
    return 0.25 + _CHARACTER * max(map(len, labels))


def _accuracy(summary: Summary) -> Figure:
    """Means of all variants on top, which name the colours; every task below, best first."""
    main = summary.metrics[summary.main]
    tasks = sorted(set().union(*(s.tasks for s in summary.metrics.values())))
    tasks.sort(key=lambda task: -main.tasks[task].accuracy if task in main.tasks else 1)
    shown = {n: Score(0, s.mean, s.ci95) for n, s in summary.metrics.items() if s.mean is not None and s.ci95}
    pitch = 0.2 + 0.075 * len(shown)
    left, width, gap = _margin([*tasks, *shown]), 5.2, 0.55
    heights = 0.23 * len(shown), pitch * len(tasks)
    figure, (top, rows) = _figure(
        left + width + 0.7,
        0.35 + sum(heights) + gap + 0.3,
        (left, 0.35, width, heights[0]),
        (left, 0.35 + heights[0] + gap, width, heights[1]),
    )
    palette, marks = colours(summary), {name: _MARKS[i % len(_MARKS)] for i, name in enumerate(summary.metrics)}
    scores = [*shown.values(), *(score for s in summary.metrics.values() for score in s.tasks.values())]
    low, high = min(score.ci95[0] for score in scores), max(score.ci95[1] for score in scores)
    for axes, title in ((top, "mean over tasks, per cent right"), (rows, "each task")):
        axes.set_xlim(max(-0.01, low - 0.03), min(1.01, high + 0.03))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f}")
        axes.set_title(title, loc="left", fontsize=9, color=_QUIET)
    top.tick_params(labelbottom=False)
    for place, (name, score) in enumerate(shown.items()):
        _dot(top, score, place, palette[name], marks[name], 6)
        top.text(
            1.01,
            place,
            f"{score.accuracy * 100:.1f}",
            transform=top.get_yaxis_transform(),
            va="center",
            weight="bold" if name == summary.main else "normal",
        )
    top.set_yticks(range(len(shown)), list(shown))
    for label, name in zip(top.get_yticklabels(), shown, strict=True):
        label.set_color(palette[name])
        label.set_fontweight("bold")
    top.set_ylim(len(shown) - 0.5, -0.5)
    for place, task in enumerate(tasks):
        for number, name in enumerate(shown):
            if task in summary.metrics[name].tasks:
                offset = (number - (len(shown) - 1) / 2) * 0.085 / pitch
                _dot(rows, summary.metrics[name].tasks[task], place + offset, palette[name], marks[name], 4)
        rows.axhline(place + 0.5, color=_LINE, linewidth=0.6)
    rows.set_yticks(range(len(tasks)), tasks)
    rows.set_ylim(len(tasks) - 0.5, -0.5)
    return figure


def _dot(axes: Axes, score: Score, place: float, colour: str, mark: str, size: float) -> None:
    axes.hlines(place, *score.ci95, color=colour, linewidth=1.2, alpha=0.55)
    axes.plot([score.accuracy], [place], mark, color=colour, markersize=size, markeredgewidth=0)


def _heat_map(matrix: Matrix, across: str) -> Figure:
    """Cells labelled in per cent; rows that have a column of their name first, in the order of the columns."""
    from matplotlib.patches import Rectangle

    adapters = set().union(*matrix.values())
    rows = sorted(matrix, key=lambda row: (row not in adapters, row))
    columns = [*(row for row in rows if row in adapters), *sorted(adapters - set(rows))]
    left, above = _margin(rows), _margin(columns) * 0.8 + 0.3
    width, height = 0.33 * len(columns), 0.25 * len(rows)
    figure, (axes,) = _figure(left + width + above * 0.8, above + height + 0.1, (left, above, width, height))
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            share = matrix[row].get(column, 0.0)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=_HEAT, alpha=min(1.0, max(share, 0.0)), linewidth=0))
            if abs(share) >= _SHOWN:
                colour = "#ffffff" if share > _WHITE_FROM else _INK
                axes.text(x + 0.5, y + 0.5, f"{share * 100:.0f}", ha="center", va="center", fontsize=7, color=colour)
            if row == column:
                axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=_QUIET, linewidth=0.8))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.hlines(range(len(rows) + 1), 0, len(columns), color=_LINE, linewidth=0.6, zorder=0)
    axes.xaxis.tick_top()
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=50, ha="left", rotation_mode="anchor")
    axes.tick_params(axis="x", labelcolor=_INK)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    figure.text(0.06 / figure.get_figwidth(), 1 - 0.2 / figure.get_figheight(), f"task × {across}", color=_QUIET)
    return figure


def _reliability(metrics: Metrics) -> Figure:
    """Hits against the top share, a dot a bin, as large as the bin; on the diagonal the share is what it says."""
    figure, (axes,) = _figure(4.6, 4.5, (0.75, 0.2, 3.6, 3.6))
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(0.13, 0.16, "as sure as right", color=_QUIET, rotation=45, rotation_mode="anchor", fontsize=8)
    bins = [b for b in metrics.routing.reliability if b.n]
    most = max(b.n for b in bins)
    for b in bins:
        axes.plot([b.share], [b.right], "o", color=_MAIN, markersize=5 + 12 * (b.n / most) ** 0.5, alpha=0.85)
        axes.annotate(f"{b.n}", (b.share, b.right), (0, -17), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, 1.06)
    axes.grid()
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value * 100:.0f}")
    axes.set_xlabel("share of the top task, per cent")
    axes.set_ylabel("routed to the example's own task, per cent")
    axes.text(1.0, 0.03, f"expected calibration error {metrics.routing.error:.3f}", ha="right")
    return figure
