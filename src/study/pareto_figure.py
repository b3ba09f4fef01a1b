"""Memory against speed of the settings that were run at one size, numbered, with a list that names them."""

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from src.record import WRONG
from src.study import answers
from src.study.bars import empty_figure, plain, set_title
from src.study.pareto import Choices, Group, Point, title

_RIGHT = {"marker": "o", "color": "#1f3a5f", "markeredgecolor": "black"}
_UNCHECKED = {"marker": "s", "color": "#c8c8c8", "markeredgecolor": "#505050"}
_WRONG = {"marker": "o", "color": "white", "markeredgecolor": "black"}
_OTHER = {"marker": "D", "color": "#8ab4c9", "markeredgecolor": "black"}
_MARKS = [
    (_RIGHT, "gradients as exact as Hugging Face's"),
    (_OTHER, "the same, with another optimizer than AdamW"),
    (_UNCHECKED, "parity not measured"),
    (_WRONG, f"{WRONG} trains wrongly: not on the frontier"),
]
_LINE = {"color": "#b35900", "linewidth": 1.4}
_ANY_LINE = {"color": "#b35900", "linewidth": 0.9, "linestyle": "--"}
_SIZE = 6  # of a marker, in points
_TEXT = 9
_ROW = 0.2  # inches
_HEADER = "No Liger: Hugging Face's code;\ngradient checkpointing unless said"
_LONGEST = 100  # characters of a setting
_AXIS, _CHART = 0.9, 5.8  # inches
_MOST = 80  # settings that are named, if they are not those of the frontier


def pareto(group: Group, own: Choices) -> Figure:
    """One point a setting, the frontier as a line, and beside it a list of all, by memory."""
    is_short = len(own.records) <= _MOST
    named = own if is_short else Choices(own.any_optimizer[:_MOST], [])
    labels = [textwrap.shorten(own.label(record), _LONGEST, placeholder=" …") for record in named.records]
    width = 2.2 + max(map(_inches, [*labels, *_HEADER.split("\n")]))
    height = max(4.6, 1.5 + _ROW * (len(labels) + 2))
    drawing = empty_figure(_AXIS + _CHART + width, height)
    chart, names = drawing.subplots(1, 2, width_ratios=[_CHART, width])
    _points(chart, own)
    _list(names, named, labels, width, height)
    unnamed = [] if is_short else [f"named are {len(named.points)} of {len(own.points)} settings, all on the line"]
    set_title(drawing, own.records, unnamed + _notes(group, own), what=title(group, own))
    drawing.draw_without_rendering()  # where the points are is known after the layout
    _number(chart, named)
    return drawing


def _inches(text: str) -> float:
    """How wide it is in bold."""
    return TextPath((0, 0), plain(text), size=_TEXT, prop=FontProperties(weight="bold")).get_extents().width / 72


def _notes(group: Group, own: Choices) -> list[str]:
    notes = ["line: most tokens/s with so much memory"]
    notes[0] += ", dashed with any optimizer" if own.any_optimizer != own.frontier else ""
    if any(len(p.speeds) > 1 for p in own.points):
        notes.append("upright bars: slowest to fastest run of a setting")
    if group.sequences * group.seq_length < answers.MANY_TOKENS:
        low, high = answers.REPEATS
        notes.append(f"times of so small steps differed from run to run by {low:+.0%} to {high:+.0%}")
    return notes


def _style(point: Point) -> dict[str, str]:
    if point.is_wrong:
        return _WRONG
    return _UNCHECKED if point.is_unchecked else _OTHER if point.has_other_steps else _RIGHT


def _points(axes: Axes, own: Choices) -> None:
    for name, best, style in (("any optimizer", own.any_optimizer, _ANY_LINE), ("frontier", own.frontier, _LINE)):
        line = axes.plot([p.gib for p in best], [p.speed for p in best], drawstyle="steps-post", zorder=1, **style)
        line[0].set_gid(name)
    for point in own.points:
        if len(point.speeds) > 1:
            axes.vlines(point.gib, point.speeds[0], point.speeds[-1], color="#707070", linewidth=0.8, zorder=2)
        axes.plot(point.gib, point.speed, linestyle="", markersize=_SIZE, zorder=3, **_style(point))
    axes.margins(0.08)
    axes.set_xlabel("GiB allocated at the peak")
    axes.set_ylabel("tokens/s")
    axes.yaxis.set_major_formatter("{x:,.12g}")
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    styles = list(map(_style, own.points))
    marks = [axes.plot([], [], linestyle="", markersize=_SIZE, label=text, **s)[0] for s, text in _MARKS if s in styles]
    axes.figure.legend(handles=marks, loc="outside lower left", ncols=4, fontsize=_TEXT, frameon=False)


def _list(axes: Axes, own: Choices, labels: Sequence[str], width: float, height: float) -> None:
    """Number, mark, words, GiB and tokens/s of each point, in bold on the frontier; then what has no point, and why."""
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=((height - 1.2) / _ROW - 1, -1.5))
    best = [*own.frontier, *own.any_optimizer]
    _row(axes, -0.5, ("", _HEADER, "GiB", "tokens/s"), width)
    for row, (point, label) in enumerate(zip(own.points, labels), start=1):
        cells = str(row), label, f"{point.gib:,.2f}", f"{point.speed:,.0f}"
        _row(axes, row, cells, width, fontweight="bold" if point in best else "normal")
        axes.plot(0.4, row, markersize=_SIZE, linestyle="", **_style(point))
    absent = zip(own.absent, labels[len(own.points) :])
    for row, (record, label) in enumerate(absent, start=len(own.points) + 1):
        _row(axes, row, ("", label, answers.absence(record), ""), width)


def _row(axes: Axes, y: float, cells: Sequence[str], width: float, **style: str) -> None:
    places = (0.25, "right"), (0.55, "left"), (width - 0.75, "right"), (width, "right")
    for text, (x, side) in zip(cells, places):
        axes.text(x, y, plain(text), ha=side, va="center", fontsize=_TEXT, **style)


# Numbers beside the points

Place = tuple[float, float]  # in points from the figure's corner


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle, in points from the figure's corner."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether they have an area in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top


# Offsets to try, the nearest first: eight directions, right above first.
_OFFSETS = [
    (radius * math.cos(angle), radius * math.sin(angle))
    for radius in (9, 13, 18, 24, 32, 42, 54)
    for angle in (math.pi / 4 * turn for turn in (1, 3, 7, 5, 2, 6, 0, 4))
]
_NEAR = 14  # a number further away has a line to its point


def _number(axes: Axes, own: Choices) -> None:
    """Write each point's number where it is free of marks, bars, the frontier, the axes and other numbers."""
    where = [_place(axes, p.gib, p.speed) for p in own.points]
    taken = [_around(*place, _SIZE, _SIZE) for place in where] + _lines(axes, own)
    for row, (point, (x, y)) in enumerate(zip(own.points, where), start=1):
        size = 6 * len(str(row)), 9
        boxes = {(dx, dy): _around(x + dx, y + dy, *size) for dx, dy in _OFFSETS}
        offset = min(boxes, key=lambda o: sum(map(boxes[o].overlaps, taken)))
        taken.append(boxes[offset])
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#404040", "shrinkA": 5, "shrinkB": 3}
        text = axes.annotate(
            str(row),
            (point.gib, point.speed),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_TEXT,
            arrowprops=line if math.hypot(*offset) > _NEAR else None,
        )
        text.set_in_layout(False)


def _place(axes: Axes, gib: float, speed: float) -> Place:
    x, y = axes.transData.transform((gib, speed)) * 72 / axes.figure.dpi
    return float(x), float(y)


def _around(x: float, y: float, width: float, height: float) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _between(a: Place, b: Place) -> Box:
    """What a line that is upright or level takes."""
    (left, right), (bottom, top) = sorted((a[0], b[0])), sorted((a[1], b[1]))
    return Box(left - 1, bottom - 1, right + 1, top + 1)


def _lines(axes: Axes, own: Choices) -> list[Box]:
    """The steps of the frontiers, the spreads between runs, and what is left of the chart and below it."""
    steps = [*itertools.pairwise(own.frontier), *itertools.pairwise(own.any_optimizer)]
    ends = [((a.gib, a.speed), (b.gib, a.speed)) for a, b in steps]
    ends += [((b.gib, a.speed), (b.gib, b.speed)) for a, b in steps]
    ends += [((p.gib, p.speeds[0]), (p.gib, p.speeds[-1])) for p in own.points if len(p.speeds) > 1]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ends += [((left, bottom), (left, top)), ((left, bottom), (right, bottom))]
    return [_between(_place(axes, *a), _place(axes, *b)) for a, b in ends]
