"""Bars beside each other: the study's comparisons by size. Needs no torch."""

import contextlib
import dataclasses
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.config import room
from src.machine import GPUS
from src.record import WRONG, Record
from src.study import answers
from src.study.answers import Cell, absence, setting_words
from src.techniques import TITLES
from src.utils import GIB, UsageError, printable, quartiles

matplotlib.rcParams["hatch.linewidth"] = 0.4
warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # a box stands for it

# Bars differ in lightness and hatching as well as in hue, for print in grey and for the colour-blind.
STYLES: dict[str, dict[str, Any]] = {
    "No Liger Kernel": {"color": "#1f3a5f", "hatch": ""},
    "Liger Kernel w/o FLCE": {"color": "#e08e2b", "hatch": "//"},
    "All Liger Kernel": {"color": "#a8dadc", "hatch": ".."},
}
TWO, THREE = ("No Liger Kernel", "All Liger Kernel"), tuple(TITLES.values())
_VERSIONS = ("torch", "transformers", "liger_kernel", "deepspeed")

_CHARACTERS_AN_INCH = 10  # of a title

Cells = Mapping[Cell, Record]
Bar = tuple[float, float, float]  # its height, and how far its quartiles lie below and above


def style_of(strategy: str, among: Sequence[str]) -> dict[str, Any]:
    """Colour and hatching of a strategy's bars: the study's three have their own, others differ `among` themselves."""
    if strategy in STYLES:
        return STYLES[strategy]
    others = [name for name in among if name not in STYLES]
    place = others.index(strategy)
    return {"color": matplotlib.colormaps["tab20"](place % 20), "hatch": ("xx", "\\\\", "oo")[place % 3]}


@dataclasses.dataclass(frozen=True)
class Axis:
    """What the groups of bars differ in."""

    field: str
    label: str

    def sizes(self, cells: Cells, strategies: Sequence[str] = THREE) -> list[int]:
        """The sizes of which there are records with one of `strategies`."""
        return sorted({getattr(cell, self.field) for cell in cells if cell.strategy in strategies})


def comparison(cells: Cells, strategies: Sequence[str], axis: Axis, note: str = "") -> Figure:
    """Throughput and peak memory as grouped bars; peak memory alone where nothing has a time, as in a prediction."""
    panels = [(throughput, "tokens/s", "throughput"), (peak_gib, "GiB", "peak allocated memory")]
    panels = [panel for panel in panels if panel[0] is peak_gib or any(map(panel[0], cells.values()))]
    drawing = empty_figure(4 + 4 * len(panels), 4.8)
    for axes, panel in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels):
        _bars(axes, cells, strategies, axis, *panel)
    heights = [bar[0] for cell, r in cells.items() if cell.strategy in strategies and (bar := peak_gib(r))]
    mark_card(drawing.axes[-1], list(cells.values()), max(heights))
    _finish(drawing, drawing.axes[0], list(cells.values()), strategies, note)
    return drawing


def latency(cells: Cells, axis: Axis, note: str = "") -> Figure:
    """Time of a step as grouped bars."""
    drawing = empty_figure(8, 4.8)
    axes = drawing.subplots()
    _bars(axes, cells, THREE, axis, step_ms, "ms", "time of a step")
    _finish(drawing, axes, list(cells.values()), THREE, note)
    return drawing


def empty_figure(width: float, height: float) -> Figure:
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


def throughput(record: Record) -> Bar | None:
    """Tokens/s, None if no step was timed."""
    if record.status != "ok" or record.step_seconds is None:
        return None
    tokens = record.run.tokens_per_step
    first, median, third = (tokens / seconds for seconds in quartiles(record.step_seconds))
    return median, median - third, first - median


def step_ms(record: Record) -> Bar | None:
    """Milliseconds a step, None if none was timed."""
    if record.status != "ok" or record.step_seconds is None or record.latency_s is None:
        return None
    first, median, third = (1e3 * seconds for seconds in quartiles(record.step_seconds))
    return median, median - first, third - median


def peak_gib(record: Record) -> Bar | None:
    """Peak allocated memory, which does not vary; None if it is not known. Predicted is also one that does not fit."""
    known = (record.status == "ok" or answers.is_predicted(record)) and record.peak_memory_bytes is not None
    return (record.peak_memory_bytes / GIB, 0.0, 0.0) if known else None


def _bars(
    axes: Axes,
    cells: Cells,
    strategies: Sequence[str],
    axis: Axis,
    value: Callable[[Record], Bar | None],
    unit: str,
    title: str,
) -> None:
    records = {(cell.strategy, getattr(cell, axis.field)): record for cell, record in cells.items()}
    sizes = axis.sizes(cells, strategies)
    width = 0.8 / len(strategies)
    for i, name in enumerate(strategies):
        for place, size in enumerate(sizes):
            record, x = records.get((name, size)), place + (i - (len(strategies) - 1) / 2) * width
            if record is not None and (bar := value(record)):
                height, below, above = bar
                style = {**style_of(name, strategies), "edgecolor": "black", "linewidth": 0.5}
                axes.bar(x, height, width, **style)
                if record.trains_wrongly:
                    axes.annotate(WRONG, (x, height), (0, 4), textcoords="offset points", ha="center", fontsize=9)
                if below or above:
                    axes.errorbar(x, height, [[below], [above]], color="black", capsize=2, linewidth=0.8)
            else:
                text = absence(record)
                axes.annotate(text, (x, 0), (0, 3), textcoords="offset points", ha="center", rotation=90, fontsize=7)
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlim(-0.6, len(sizes) - 0.4)  # sizes without bars, too
    axes.set_xlabel(axis.label)
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter("{x:,.12g}")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(drawing: Figure, axes: Axes, group: Sequence[Record], strategies: Sequence[str], note: str) -> None:
    """Title, legend, and what the marks mean."""
    set_title(drawing, group, ["bars: median; whiskers: quartiles"] if any(map(step_ms, group)) else [], note)
    handles = [
        axes.bar(0, 0, label=plain(name), edgecolor="black", linewidth=0.5, **style_of(name, strategies))
        for name in strategies
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(strategies), fontsize=9, frameon=False)


def set_title(
    drawing: Figure, group: Sequence[Record], notes: list[str], note: str = "", what: str | None = None
) -> None:
    """What was run where, whether it was measured or predicted, and what the marks mean."""
    first = next((r for r in group if r.status == "ok"), group[0])
    what = setting_words(first) if what is None else what
    what = ("predicted, not measured: " if answers.is_predicted(first) else "") + what
    if any(r.mode == "inferred" for r in group):
        notes.append("OOM*: not run, a smaller one ran out of memory")
    if limited := sum(map(answers.ran_under_a_limit, group)):
        notes.append(f"{limited} of {len(group)} runs under a memory limit that they never met")
    if any(r.trains_wrongly for r in group):
        notes.append(f"{WRONG}: gradients less exact than Hugging Face's, see doc/parity.md")
    notes += [*filter(None, [note]), *_differing_versions(group)]
    width = round(_CHARACTERS_AN_INCH * drawing.get_figwidth())
    title = [textwrap.fill(line, width) for line in (what, "; ".join(notes)) if line]
    drawing.suptitle(plain("\n".join(title)), fontsize=9)


def mark_card(axes: Axes, group: Sequence[Record], top: float, *, across: bool = True) -> None:
    """A line at what the simulated card has for the allocator, where a predicted peak of up to `top` GiB is more."""
    rooms = [_room_gib(r) for r in group if r.simulated_gpu]
    room = rooms[0] if rooms else None  # the runs of a study share their limits
    if room is not None and top > room:
        style = {
            "color": "#b30000",
            "linestyle": "--",
            "linewidth": 1,
            "label": f"the card's room for tensors: {room:.1f} GiB",
        }
        line = (axes.axhline if across else axes.axvline)(room, **style)
        axes.legend(handles=[line], fontsize=8, frameon=False, loc="upper left" if across else "upper right")


def _room_gib(predicted: Record) -> float | None:
    """What the allocator had: of the card, or what was asked for; None if nothing is known of the card."""
    card = GPUS.get(predicted.simulated_gpu)
    with contextlib.suppress(UsageError):  # a limit that no run can have had
        return room(predicted.run, card) / GIB if card and card.memory_bytes else None
    return None


def plain(text: str) -> str:
    """`text` as it is: matplotlib takes what stands between two dollar signs for mathematics."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def _differing_versions(group: Sequence[Record]) -> list[str]:
    """A note for each library of which the runs had several versions."""
    found = {name: {getattr(r.environment, name) for r in group} - {None} for name in _VERSIONS}
    return [f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items() if len(versions) > 1]
