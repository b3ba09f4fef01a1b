"""The study's figures, from records. Needs no torch."""

import dataclasses
import functools
import itertools
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.explain.categories import colours, order, words
from src.machine import GPUS
from src.record import WRONG, Record
from src.study import answers
from src.study.answers import Cell, Setting, StepTimes, absence, machine, setting_words, short_model
from src.techniques import TITLES
from src.utils import GIB, MIB, file_name, printable, quartiles

matplotlib.rcParams["hatch.linewidth"] = 0.4
warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # a box stands for it

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
_LONGEST_LABEL = 75  # characters beside a bar
_MOST_BARS = 40  # of a figure of peaks
_SMALLEST_PART = 0.005  # of the largest peak, to be named in a legend
_WHOLE = "not taken apart"

Cells = Mapping[Cell, Record]
Draw = Callable[[], Figure]


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


def all_figures(found: Sequence[Record], most: int | None = None) -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that can be drawn, of at most so many studies of a kind.

    The study nearest to the original's has the original's file names. The others add their settings to them, and are
    not drawn with two strategies where they can be with three: that figure has all the bars of the other. What was
    predicted has pictures of its own, whose names say so.
    """
    times = answers.step_times(found)
    for prefix, counts in (("", answers.is_measured), ("predicted_", answers.is_predicted)):
        studies = answers.studies(found, counts)
        drawn = {setting: own for setting, cells in studies.items() if (own := _figures_of(setting, cells, times))}
        for i, (setting, named) in enumerate(itertools.islice(drawn.items(), most)):
            original = i == 0 and not prefix
            for name, draw in named.items():
                fuller = name.replace("_2_", "_3_")
                if original or fuller == name or fuller not in named:
                    yield f"{prefix}{name}{f'_{setting.name}' if i else ''}.png", draw()
        lone = [r for setting in studies.keys() - drawn.keys() for r in studies[setting].values()]
        lone = sorted((r for r in lone if r.peak_memory_bytes is not None), key=_order)
        for i, place in enumerate(itertools.islice(dict.fromkeys(map(machine, lone)), most)):
            group = [r for r in lone if machine(r) == place]
            yield f"{prefix}peaks{f'_{file_name(answers.plain_name(place))}' if i else ''}.png", peaks(group, times)
    for i, record in enumerate(itertools.islice((r for r in found if r.kernel_check), most)):
        yield f"kernel_check{f'_{file_name(record.run.run_name)}' if i else ''}.png", kernel_check(record)
    pairs = predicted_and_measured(found)
    if pairs:
        yield "predicted_vs_measured.png", predicted_figure(pairs)


def _figures_of(setting: Setting, cells: Cells, times: StepTimes) -> dict[str, Draw]:
    """The original's four figures and latency, as far as a study has their cells."""
    if any(r.frontier for r in cells.values()):  # answers of searches are no grid
        return {}
    return dict(_comparisons_of(cells, _repeats(setting, cells, times)))


def _order(record: Record) -> tuple:
    config = record.answered
    return (
        machine(record),
        config.seq_length,
        config.batch_size,
        setting_words(record),
        len(config.kernels),
        config.title,
    )


def _comparisons_of(cells: Cells, note: str) -> Iterator[tuple[str, Draw]]:
    sizes: dict[int, set[int]] = defaultdict(set)
    for cell in cells:
        sizes[cell.seq_length].add(cell.batch_size)
    fixed = answers.FIXED_LENGTH
    length = fixed if len(sizes[fixed]) > 1 else max(sizes, key=lambda length: (len(sizes[length]), length))
    per_gpu = " per GPU" if next(iter(cells.values())).processes > 1 else ""
    by_batch = {cell: record for cell, record in cells.items() if cell.seq_length == length}
    axis = Axis("batch_size", f"batch size{per_gpu}, {length} tokens a sequence")
    yield from _comparisons("comparison", by_batch, axis, note)
    if _comparable(by_batch, THREE, axis) and any(map(step_ms, by_batch.values())):
        yield "latency", functools.partial(latency, by_batch, axis, note)
    by_length = {cell: record for cell, record in cells.items() if cell.batch_size == answers.FIXED_BATCH}
    axis = Axis("seq_length", f"sequence length, batch {answers.FIXED_BATCH}{per_gpu}")
    yield from _comparisons(f"comparison_fixed_batch_{answers.FIXED_BATCH}", by_length, axis, note)


def _comparisons(name: str, cells: Cells, axis: Axis, note: str) -> Iterator[tuple[str, Draw]]:
    named = {"2_strategies": TWO, "3_strategies": THREE}
    others = sorted({cell.strategy for cell in cells} - set(THREE))
    if others:
        named["all_strategies"] = tuple(s for s in (*THREE, *others) if any(cell.strategy == s for cell in cells))
    for suffix, strategies in named.items():
        if _comparable(cells, strategies, axis):
            yield f"{name}_{suffix}", functools.partial(comparison, cells, strategies, axis, note)


def _comparable(cells: Cells, strategies: Sequence[str], axis: Axis) -> bool:
    """Whether there is something to compare: two strategies, two sizes, and at least one bar."""
    recorded = {cell.strategy for cell in cells} & set(strategies)
    bars = [cell for cell, record in cells.items() if peak_gib(record) and cell.strategy in strategies]
    return len(recorded) > 1 and len(axis.sizes(cells, strategies)) > 1 and bool(bars)


def _repeats(setting: Setting, cells: Cells, times: StepTimes) -> str:
    """How far the step times of other runs of the same experiments lie from those that are drawn."""
    several = [(times.get((setting, cell), ()), record) for cell, record in cells.items() if step_ms(record)]
    several = [(own, record) for own, record in several if len(own) > 1]
    apart = [seconds / record.latency_s - 1 for own, record in several for seconds in own]
    if not apart:
        return ""
    words = f"{len(several)} of {len(cells)} cells were run again"
    return f"{words}: {min(apart):+.0%} to {max(apart):+.0%} time a step"


def comparison(cells: Cells, strategies: Sequence[str], axis: Axis, note: str = "") -> Figure:
    """Throughput and peak memory as grouped bars; peak memory alone where nothing has a time, as in a prediction."""
    panels = [(throughput, "tokens/s", "throughput"), (peak_gib, "GiB", "peak allocated memory")]
    panels = [panel for panel in panels if panel[0] is peak_gib or any(map(panel[0], cells.values()))]
    drawing = _empty(4 + 4 * len(panels), 4.8)
    for axes, panel in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels):
        _bars(axes, cells, strategies, axis, *panel)
    heights = [bar[0] for cell, r in cells.items() if cell.strategy in strategies and (bar := peak_gib(r))]
    _mark_card(drawing.axes[-1], list(cells.values()), max(heights))
    _finish(drawing, drawing.axes[0], list(cells.values()), strategies, note)
    return drawing


def latency(cells: Cells, axis: Axis, note: str = "") -> Figure:
    """Time of a step as grouped bars."""
    drawing = _empty(8, 4.8)
    axes = drawing.subplots()
    _bars(axes, cells, THREE, axis, step_ms, "ms", "time of a step")
    _finish(drawing, axes, list(cells.values()), THREE, note)
    return drawing


def _empty(width: float, height: float) -> Figure:
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


Bar = tuple[float, float, float]  # its height, and how far its quartiles lie below and above


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
    _title(drawing, group, ["bars: median; whiskers: quartiles"] if any(map(step_ms, group)) else [], note)
    handles = [
        axes.bar(0, 0, label=_plain(name), edgecolor="black", linewidth=0.5, **style_of(name, strategies))
        for name in strategies
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(strategies), fontsize=9, frameon=False)


def _title(drawing: Figure, group: Sequence[Record], notes: list[str], note: str = "", what: str | None = None) -> None:
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
    drawing.suptitle(_plain("\n".join(title)), fontsize=9)


def _mark_card(axes: Axes, group: Sequence[Record], top: float, *, across: bool = True) -> None:
    """A line at what the simulated card has for the allocator, where a predicted peak of up to `top` GiB is more."""
    card = GPUS.get(next((r.simulated_gpu for r in group if r.simulated_gpu), ""))
    room = (card.memory_bytes - card.context_bytes) / GIB if card and card.memory_bytes else None
    if room is not None and top > room:
        style = {
            "color": "#b30000",
            "linestyle": "--",
            "linewidth": 1,
            "label": f"the card's room for tensors: {room:.1f} GiB",
        }
        line = (axes.axhline if across else axes.axvline)(room, **style)
        axes.legend(handles=[line], fontsize=8, frameon=False, loc="upper left" if across else "upper right")


def _plain(text: str) -> str:
    """`text` as it is: matplotlib takes what stands between two dollar signs for mathematics."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def peaks(group: Sequence[Record], times: StepTimes) -> Figure:
    """The peak of each run and what it is made of, as stacked bars; beside it its phase, throughput and repeats."""
    shown = group[:_MOST_BARS]
    drawing = _empty(12, 1.8 + 0.5 * len(shown))
    axes = drawing.subplots()
    seen: dict[str, Any] = {}
    top = max(max(r.peak_memory_bytes, sum((r.peak_breakdown or {}).values())) for r in shown) / GIB
    for place, record in enumerate(shown):
        left, parts = 0.0, record.peak_breakdown or {_WHOLE: record.peak_memory_bytes}
        colour_of = colours(list(parts)) | {_WHOLE: "white"}
        for name in order(list(parts)):
            width = parts[name] / GIB
            style = {"color": colour_of[name], "edgecolor": "black", "linewidth": 0.3 * bool(width)}
            bar = axes.barh(place, width, 0.6, left, **style)
            if width > _SMALLEST_PART * top:
                seen.setdefault(name, bar)
            left += width
        told = [f"{record.peak_memory_bytes / GIB:,.2f} GiB", f"in {record.peak_phase}" if record.peak_phase else ""]
        told += [f"{bar[0]:,.0f} tokens/s"] if (bar := throughput(record)) else []
        told += [f"{several} ms"] if (several := answers.repeats(record, times)) else []
        text = _plain(", ".join(filter(None, told)))
        axes.annotate(text, (left, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    common = [word for word in _setting_parts(shown[0]) if all(word in _setting_parts(r) for r in shown)]
    axes.set_yticks(range(len(shown)), [_plain(_run_words(record, common)) for record in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * top or 1)
    _mark_card(axes, shown, top, across=False)
    axes.set_xlabel("GiB allocated at the peak")
    axes.spines[["top", "right"]].set_visible(False)
    more = [f"the first {len(shown)} of {len(group)} runs"] if len(group) > len(shown) else []
    _title(drawing, shown, more, what=", ".join(common))
    names = order(list(seen))
    labels = [_plain(words(name)) for name in names]
    drawing.legend([seen[n] for n in names], labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return drawing


def _setting_parts(record: Record) -> list[str]:
    return setting_words(record).split(", ")


def _run_words(record: Record, common: Sequence[str]) -> str:
    """Kernels, sizes, and the settings that not all of its neighbours have, as far as they fit beside a bar."""
    config = record.answered
    sizes = f"{config.batch_size:,} x {config.seq_length:,}" + (", the largest that fits" if record.frontier else "")
    own = [word for word in _setting_parts(record) if word not in common]
    return f"{record.title}\n{textwrap.shorten(', '.join([sizes, *own]), _LONGEST_LABEL, placeholder=' …')}"


def kernel_check(record: Record) -> Figure:
    """Live memory and gradients of each kernel, checked in Triton's interpreter beside Hugging Face's code."""
    rows = record.kernel_check
    drawing = _empty(10, 1.6 + 0.4 * len(rows))
    left, right = drawing.subplots(1, 2, sharey=True)
    columns = [(left, [r.peak_memory_bytes for r in rows], MIB, "{:,.1f}", "peak of live tensors, MiB")]
    differences = [None, *(r.gradient_difference for r in rows[1:])]
    columns.append((right, differences, 1, "{:.1e}", "gradients differ from Hugging Face's, relative"))
    for axes, values, unit, form, label in columns:
        heights = [(value or 0) / unit for value in values]
        bars = axes.barh(range(len(rows)), heights, 0.6, color="#7a9cc6", edgecolor="black", linewidth=0.5)
        told = ["" if value is None else form.format(value / unit) if value else "0" for value in values]
        axes.bar_label(bars, told, padding=3, fontsize=8)
        axes.set_xlabel(label, fontsize=9)
        axes.set_xlim(0, 1.25 * max(heights) or 1)
        axes.set_xticks([])  # the bars say it
        axes.spines[["top", "right"]].set_visible(False)
    names = [" + ".join(r.kernels) or "none (Hugging Face)" for r in rows]
    verdicts = ["" if r.agrees else " DIFFERS" for r in rows]
    left.set_yticks(range(len(rows)), [_plain(n + v) for n, v in zip(names, verdicts)], fontsize=9)
    left.invert_yaxis()
    size = f"{short_model(record.run)}, {record.run.description}"
    drawing.suptitle(_plain(f"checked on a CPU in Triton's interpreter, nothing timed: {size}"), fontsize=9)
    return drawing


def _differing_versions(group: Sequence[Record]) -> list[str]:
    """A note for each library of which the runs had several versions."""
    found = {name: {getattr(r.environment, name) for r in group} - {None} for name in _VERSIONS}
    return [f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items() if len(versions) > 1]


def predicted_and_measured(found: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Predictions beside the measured runs they are of."""
    peaks = [r for r in found if r.mode == "predicted" and r.peak_memory_bytes and not r.frontier]
    predictions = {answers.experiment(r): r for r in peaks}
    runs = [r for r in found if r.mode == "measured" and r.peak_memory_bytes and r.script == "all_gpu"]
    measured = [answers.without_its_limit(r) or r for r in runs]
    return [(predictions[place], r) for r in measured if (place := answers.experiment(r)) in predictions]


def predicted_figure(pairs: Sequence[tuple[Record, Record]]) -> Figure:
    """Predicted against measured peaks, and the errors."""
    drawing = _empty(10, 4.6)
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
    models = ", ".join(sorted({short_model(measurement.run) for _, measurement in pairs}))
    drawing.suptitle(_plain(f"{len(pairs)} peaks of {models}; measured: {machines}"), fontsize=9)
    drawing.legend(loc="outside lower center", ncols=len(_MARKERS), fontsize=9, frameon=False)
    return drawing
