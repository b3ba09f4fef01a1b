"""The study's figures, from records. Needs no torch."""

import dataclasses
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.config import RunConfig
from src.record import WRONG, Record
from src.study import answers
from src.study.answers import Cell, machine
from src.techniques import TITLES
from src.utils import GIB, quartiles

matplotlib.rcParams["hatch.linewidth"] = 0.4

# Bars differ in lightness and hatching as well as in hue, for print in grey and for the colour-blind.
STYLES: dict[str, dict[str, Any]] = {
    "No Liger Kernel": {"color": "#1f3a5f", "hatch": ""},
    "Liger Kernel w/o FLCE": {"color": "#e08e2b", "hatch": "//"},
    "All Liger Kernel": {"color": "#a8dadc", "hatch": ".."},
}
TWO, THREE = ("No Liger Kernel", "All Liger Kernel"), tuple(TITLES.values())
_OTHER = "other kernels"
_MARKERS = {name: (marker, style["color"]) for (name, style), marker in zip(STYLES.items(), "osD")}
_MARKERS[_OTHER] = ("^", "white")
_VERSIONS = ("torch", "transformers", "liger_kernel", "deepspeed")

_CHARACTERS_AN_INCH = 10  # of a title

Cells = Mapping[Cell, Record]


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


def all_figures(found: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that can be drawn.

    The study nearest to the original's has the original's file names. The others add their settings to them, and are
    not drawn with two strategies where they can be with three: that figure has all the bars of the other.
    """
    studies = answers.studies(found).items()
    drawn = {setting: figures for setting, cells in studies if (figures := dict(_figures_of(cells)))}
    for i, (setting, named) in enumerate(drawn.items()):
        for name, figure in named.items():
            if i == 0 or name.replace("_2_", "_3_") == name or name.replace("_2_", "_3_") not in named:
                yield f"{name}{f'_{setting.name}' if i else ''}.png", figure
    pairs = predicted_and_measured(found)
    if pairs:
        yield "predicted_vs_measured.png", predicted_figure(pairs)


def _figures_of(cells: Cells) -> Iterator[tuple[str, Figure]]:
    """The original's four figures and latency, as far as a study has their cells."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for cell in cells:
        sizes[cell.seq_length].add(cell.batch_size)
    fixed = answers.FIXED_LENGTH
    length = fixed if len(sizes[fixed]) > 1 else max(sizes, key=lambda length: (len(sizes[length]), length))
    per_gpu = " per GPU" if next(iter(cells.values())).processes > 1 else ""
    by_batch = {cell: record for cell, record in cells.items() if cell.seq_length == length}
    axis = Axis("batch_size", f"batch size{per_gpu}, {length} tokens a sequence")
    yield from _comparisons("comparison", by_batch, axis)
    if _comparable(by_batch, THREE, axis):
        yield "latency", latency(by_batch, axis)
    by_length = {cell: record for cell, record in cells.items() if cell.batch_size == answers.FIXED_BATCH}
    axis = Axis("seq_length", f"sequence length, batch {answers.FIXED_BATCH}{per_gpu}")
    yield from _comparisons(f"comparison_fixed_batch_{answers.FIXED_BATCH}", by_length, axis)


def _comparisons(name: str, cells: Cells, axis: Axis) -> Iterator[tuple[str, Figure]]:
    named = {"2_strategies": TWO, "3_strategies": THREE}
    others = sorted({cell.strategy for cell in cells} - set(THREE))
    if others:
        named["all_strategies"] = tuple(s for s in (*THREE, *others) if any(cell.strategy == s for cell in cells))
    for suffix, strategies in named.items():
        if _comparable(cells, strategies, axis):
            yield f"{name}_{suffix}", comparison(cells, strategies, axis)


def _comparable(cells: Cells, strategies: Sequence[str], axis: Axis) -> bool:
    """Whether there is something to compare: two strategies, two sizes, and at least one bar."""
    recorded = {cell.strategy for cell in cells} & set(strategies)
    bars = [cell for cell, record in cells.items() if record.status == "ok" and cell.strategy in strategies]
    return len(recorded) > 1 and len(axis.sizes(cells, strategies)) > 1 and bool(bars)


def comparison(cells: Cells, strategies: Sequence[str], axis: Axis) -> Figure:
    """Throughput and peak memory as grouped bars."""
    drawing = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2)
    _bars(left, cells, strategies, axis, throughput, "tokens/s", "throughput")
    _bars(right, cells, strategies, axis, peak_gib, "GiB", "peak allocated memory")
    _finish(drawing, left, list(cells.values()), strategies)
    return drawing


def latency(cells: Cells, axis: Axis) -> Figure:
    """Time of a step as grouped bars."""
    drawing = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    _bars(axes, cells, THREE, axis, step_ms, "ms", "time of a step")
    _finish(drawing, axes, list(cells.values()), THREE)
    return drawing


def throughput(record: Record) -> tuple[float, float, float]:
    """Tokens/s and how far its quartiles lie below and above."""
    tokens = record.run.tokens_per_step
    first, median, third = (tokens / seconds for seconds in quartiles(record.step_seconds))
    return median, median - third, first - median


def step_ms(record: Record) -> tuple[float, float, float]:
    """Milliseconds a step and how far its quartiles lie below and above."""
    first, median, third = (1e3 * seconds for seconds in quartiles(record.step_seconds))
    return median, median - first, third - median


def peak_gib(record: Record) -> tuple[float, float, float]:
    """Peak allocated memory, which does not vary."""
    return record.peak_memory_bytes / GIB, 0.0, 0.0


def _bars(
    axes: Axes,
    cells: Cells,
    strategies: Sequence[str],
    axis: Axis,
    value: Callable[[Record], tuple[float, float, float]],
    unit: str,
    title: str,
) -> None:
    records = {(cell.strategy, getattr(cell, axis.field)): record for cell, record in cells.items()}
    sizes = axis.sizes(cells, strategies)
    width = 0.8 / len(strategies)
    for i, name in enumerate(strategies):
        for place, size in enumerate(sizes):
            record, x = records.get((name, size)), place + (i - (len(strategies) - 1) / 2) * width
            if record is not None and record.status == "ok":
                height, below, above = value(record)
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


def absence(record: Record | None) -> str:
    """Why a bar is not there."""
    if record is None:
        return "not run"
    if record.status == "oom":
        return "OOM" + ("*" if record.mode == "inferred" else "")
    return "failed"


def _short_model(config: RunConfig) -> str:
    return config.model_name.rsplit("/")[-1]


def setting_words(record: Record) -> str:
    """Model, machine and settings, for a title or a cell."""
    config: RunConfig = record.run
    words = [_short_model(config), config.dtype]
    if record.script == "deepspeed":
        words.append(f"ZeRO-3 offload, preset {config.preset}")
    words.append("gradient checkpointing" if config.gradient_checkpointing else "no checkpointing")
    words.append(machine(record))
    if config.memory_limit_gib is not None:
        words.append(f"limited to {config.memory_limit_gib:g} GiB")
    said = ("model_name", "dtype", "preset", "gradient_checkpointing", "memory_limit_gib")
    return ", ".join([*words, *config.unusual(*answers.NOT_A_SETTING, *said)])


def _finish(drawing: Figure, axes: Axes, group: Sequence[Record], strategies: Sequence[str]) -> None:
    """Title, legend, and what the marks mean."""
    measured = next((r for r in group if r.status == "ok"), group[0])
    notes = ["bars: median; whiskers: quartiles"]
    if any(r.mode == "inferred" for r in group):
        notes.append("OOM*: not run, a smaller one ran out of memory")
    if limited := sum(map(answers.ran_under_a_limit, group)):
        notes.append(f"{limited} of {len(group)} runs under a memory limit that they never met")
    if any(r.trains_wrongly for r in group):
        notes.append(f"{WRONG}: gradients less exact than Hugging Face's, see doc/parity.md")
    notes += _differing_versions(group)
    width = round(_CHARACTERS_AN_INCH * drawing.get_figwidth())
    title = [textwrap.fill(words, width) for words in (setting_words(measured), "; ".join(notes))]
    drawing.suptitle("\n".join(title), fontsize=9)
    handles = [
        axes.bar(0, 0, label=name, edgecolor="black", linewidth=0.5, **style_of(name, strategies))
        for name in strategies
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(strategies), fontsize=9, frameon=False)


def _differing_versions(group: Sequence[Record]) -> list[str]:
    """A note for each library of which the runs had several versions."""
    found = {name: {getattr(r.environment, name) for r in group} - {None} for name in _VERSIONS}
    return [f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items() if len(versions) > 1]


def predicted_and_measured(found: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Predictions beside the measured runs they are of."""
    peaks = [r for r in found if r.mode == "predicted" and r.peak_memory_bytes and not r.frontier]
    predictions = {answers.experiment(r): r for r in peaks}
    runs = [r for r in found if r.mode == "measured" and r.status == "ok" and r.script == "all_gpu"]
    measured = [answers.without_its_limit(r) or r for r in runs]
    return [(predictions[place], r) for r in measured if (place := answers.experiment(r)) in predictions]


def predicted_figure(pairs: Sequence[tuple[Record, Record]]) -> Figure:
    """Predicted against measured peaks, and the errors."""
    drawing = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2)
    by_strategy: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for prediction, measurement in pairs:
        name = answers.cell(measurement).strategy
        peaks = measurement.peak_memory_bytes / GIB, prediction.peak_memory_bytes / GIB
        by_strategy[name if name in THREE else _OTHER].append(peaks)
    for name, (marker, color) in _MARKERS.items():
        x, y = zip(*by_strategy[name]) if name in by_strategy else ((), ())
        style = {"linestyle": "", "marker": marker, "color": color, "markeredgecolor": "black"}
        left.plot(x, y, label=name if x else None, **style)
        right.plot(x, [100 * (predicted / measured - 1) for measured, predicted in zip(x, y)], **style)
    top = 1.05 * max(max(peaks) for own in by_strategy.values() for peaks in own)
    left.plot([0, top], [0, top], color="grey", linewidth=0.8, zorder=0)
    left.set(xlim=(0, top), ylim=(0, top), ylabel="predicted, without a GPU, GiB")
    right.axhline(0, color="grey", linewidth=0.8, zorder=0)
    right.set(ylabel="error of the prediction, %", xlim=(0, top))
    for axes in (left, right):
        axes.set_xlabel("measured peak, GiB")
        axes.grid(linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    machines = ", ".join(sorted({machine(measurement) for _, measurement in pairs}))
    models = ", ".join(sorted({_short_model(measurement.run) for _, measurement in pairs}))
    drawing.suptitle(f"{len(pairs)} peaks of {models}; measured: {machines}", fontsize=9)
    drawing.legend(loc="outside lower center", ncols=len(_MARKERS), fontsize=9, frameon=False)
    return drawing
