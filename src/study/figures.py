"""The study's figures, from records. Needs no torch."""

import functools
import itertools
import textwrap
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from src.explain.categories import colours, order, words
from src.record import Record
from src.study import answers
from src.study.answers import Setting, StepTimes, machine, setting_words, short_model
from src.study.bars import (
    STYLES,
    THREE,
    TWO,
    Axis,
    Cells,
    comparison,
    empty_figure,
    latency,
    mark_card,
    peak_gib,
    plain,
    set_title,
    step_ms,
    throughput,
)
from src.study.pareto import Choices, choices
from src.study.pareto_figure import pareto
from src.utils import GIB, MIB, file_name

_OTHER = "other settings"
_MARKERS = {name: (marker, style["color"]) for (name, style), marker in zip(STYLES.items(), "osD")}
_MARKERS[_OTHER] = ("^", "white")
_LONGEST_LABEL = 75  # characters beside a bar
_MOST_BARS = 40  # of a figure of peaks
_MOST_STRATEGIES = 9  # beside each other; more are told apart in memory against speed alone
_SMALLEST_PART = 0.005  # of the largest peak, to be named in a legend
_WHOLE = "not taken apart"
Draw = Callable[[], Figure]


def all_figures(found: Sequence[Record], most: int | None = None) -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that can be drawn, of at most so many studies of a kind.

    The study nearest to the original's has the original's file names. The others add their settings to them, and are
    not drawn with two strategies where they can be with three: that figure has all the bars of the other. What was
    predicted has pictures of its own, whose names say so. Where three settings or more were run at one size, memory
    against speed is a picture, those with most settings first.
    """
    times = answers.step_times(found)
    in_bars: set[Setting] = set()
    for prefix, counts in (("", answers.is_measured), ("predicted_", answers.is_predicted)):
        studies = answers.studies(found, counts)
        drawn = {setting: own for setting, cells in studies.items() if (own := _figures_of(setting, cells, times))}
        in_bars |= drawn.keys()
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
    by_size = {group: own for group, own in choices(found).items() if not _is_in_bars(own, in_bars)}
    for group, own in itertools.islice(by_size.items(), most):
        yield f"{group.name}.png", pareto(group, own)
    for i, record in enumerate(itertools.islice((r for r in found if r.kernel_check), most)):
        yield f"kernel_check{f'_{file_name(record.run.run_name)}' if i else ''}.png", kernel_check(record)
    pairs = predicted_and_measured(found)
    if pairs:
        yield "predicted_vs_measured.png", predicted_figure(pairs)


def _is_in_bars(own: Choices, drawn: Collection[Setting]) -> bool:
    """Whether all points are bars beside each other already: the three strategies of one study that has bars."""
    settings = {answers.study_of(p.record) for p in own.points}
    return len(settings) == 1 and settings <= set(drawn) and all(p.record.run.title in THREE for p in own.points)


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
    if 0 < len(others) <= _MOST_STRATEGIES - len(THREE):
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


def peaks(group: Sequence[Record], times: StepTimes) -> Figure:
    """The peak of each run and what it is made of, as stacked bars; beside it its phase, throughput and repeats."""
    shown = group[:_MOST_BARS]
    drawing = empty_figure(12, 1.8 + 0.5 * len(shown))
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
        text = plain(", ".join(filter(None, told)))
        axes.annotate(text, (left, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    common = [word for word in _setting_parts(shown[0]) if all(word in _setting_parts(r) for r in shown)]
    axes.set_yticks(range(len(shown)), [plain(_run_words(record, common)) for record in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * top or 1)
    mark_card(axes, shown, top, across=False)
    axes.set_xlabel("GiB allocated at the peak")
    axes.spines[["top", "right"]].set_visible(False)
    more = [f"the first {len(shown)} of {len(group)} runs"] if len(group) > len(shown) else []
    set_title(drawing, shown, more, what=", ".join(common))
    names = order(list(seen))
    labels = [plain(words(name)) for name in names]
    drawing.legend([seen[n] for n in names], labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return drawing


def _setting_parts(record: Record) -> list[str]:
    return setting_words(record).split(", ")


def _run_words(record: Record, common: Sequence[str]) -> str:
    """Kernels, sizes, and the settings that not all of its neighbours have, as far as they fit beside a bar."""
    config = record.answered
    sizes = f"{config.batch_size:,} x {config.seq_length:,}"
    if record.frontier:
        fewest = record.frontier.searched == "world_size"
        sizes += f" on {record.processes} GPUs, the fewest that it fits" if fewest else ", the largest that fits"
    own = [word for word in _setting_parts(record) if word not in common]
    return f"{record.title}\n{textwrap.shorten(', '.join([sizes, *own]), _LONGEST_LABEL, placeholder=' …')}"


def kernel_check(record: Record) -> Figure:
    """Live memory and gradients of each kernel, checked in Triton's interpreter beside Hugging Face's code."""
    rows = record.kernel_check
    drawing = empty_figure(10, 1.6 + 0.4 * len(rows))
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
    left.set_yticks(range(len(rows)), [plain(n + v) for n, v in zip(names, verdicts)], fontsize=9)
    left.invert_yaxis()
    size = f"{short_model(record.run)}, {record.run.description}"
    drawing.suptitle(plain(f"checked on a CPU in Triton's interpreter, nothing timed: {size}"), fontsize=9)
    return drawing


def predicted_and_measured(found: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Predictions beside the measured runs they are of."""
    peaks = [r for r in found if r.mode == "predicted" and r.peak_memory_bytes and not r.frontier]
    predictions = {answers.experiment(r): r for r in peaks}
    runs = [r for r in found if r.mode == "measured" and r.peak_memory_bytes and r.script == "all_gpu"]
    measured = [answers.without_its_limit(r) or r for r in runs]
    return [(predictions[place], r) for r in measured if (place := answers.experiment(r)) in predictions]


def predicted_figure(pairs: Sequence[tuple[Record, Record]]) -> Figure:
    """Predicted against measured peaks, and the errors."""
    drawing = empty_figure(10, 4.6)
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
    title = textwrap.fill(f"{len(pairs)} peaks of {models}; measured: {machines}", 120)
    drawing.suptitle(plain(title), fontsize=9)
    drawing.legend(loc="outside lower center", ncols=len(_MARKERS), fontsize=9, frameon=False)
    return drawing
