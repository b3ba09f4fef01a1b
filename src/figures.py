"""The study's figures, from records. Needs no torch."""

import dataclasses
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.config import STRATEGIES, RunConfig, config_of
from src.utils import GIB

Record = dict[str, Any]

matplotlib.rcParams["hatch.linewidth"] = 0.4

# Bars differ in lightness and hatching as well as in hue, for print in grey and for the colour-blind.
STYLES: dict[str, dict[str, Any]] = {
    "No Liger Kernel": {"color": "#1f3a5f", "hatch": ""},
    "Liger Kernel w/o FLCE": {"color": "#e08e2b", "hatch": "//"},
    "All Liger Kernel": {"color": "#a8dadc", "hatch": ".."},
}
TWO, THREE = ("No Liger Kernel", "All Liger Kernel"), tuple(STRATEGIES)

# What an experiment's figures compare; runs that differ in anything else are drawn by themselves.
_COMPARED = ("strategy", "batch_size", "seq_length")
_NOT_A_SETTING = ("device", "result_dir", "snapshot_dir", "log_dir", "debug", "dry_run", "iterations", "warmup")


def setting_of(record: Record) -> tuple:
    """What runs must have in common to be drawn together: script, machine, and every setting that is not compared."""
    config = config_of(record)
    names = [f.name for f in dataclasses.fields(config) if f.name not in (*_COMPARED, *_NOT_A_SETTING)]
    gpu = record["simulated_gpu"] if record["mode"] == "predicted" else record["environment"]["gpu"]
    return record["script"], gpu, tuple((name, getattr(config, name)) for name in names)


def all_figures(found: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that can be drawn."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in found:
        if record["mode"] in ("measured", "inferred") and record["frontier"] is None:
            groups[setting_of(record)].append(record)
    compared = [group for group in groups.values() if len({config_of(r).strategy for r in group}) > 1]
    largest = sorted(compared, key=len, reverse=True)
    for group in largest:
        suffix = "" if group is largest[0] else _suffix(group[0])
        yield from _figures_of(group, suffix)
    pairs = predicted_and_measured(found)
    if pairs:
        yield "predicted_vs_measured.png", predicted_figure(pairs)


def _suffix(record: Record) -> str:
    """What tells a group's files from those of the largest group."""
    config = config_of(record)
    gpu = (record["environment"]["gpu"] or "no_gpu").replace(" ", "_")
    return f"_{record['script']}{config.settings_name}_{gpu}"


def _figures_of(group: list[Record], suffix: str) -> Iterator[tuple[str, Figure]]:
    """The original's four figures and latency, as far as the group has their cells."""
    lengths = Counter(r["config"]["seq_length"] for r in group)
    length = 1024 if lengths[1024] > 1 else lengths.most_common(1)[0][0]
    by_batch = [r for r in group if r["config"]["seq_length"] == length]
    by_length = [r for r in group if r["config"]["batch_size"] == 4]
    if len({r["config"]["batch_size"] for r in by_batch}) > 1:
        axis = Axis("batch_size", f"batch size, {length} tokens a sequence")
        yield f"comparison_2_strategies{suffix}.png", comparison(by_batch, TWO, axis)
        yield f"comparison_3_strategies{suffix}.png", comparison(by_batch, THREE, axis)
        yield f"latency{suffix}.png", latency(by_batch, axis)
    if len({r["config"]["seq_length"] for r in by_length}) > 1:
        axis = Axis("seq_length", "sequence length, batch 4")
        yield f"comparison_fixed_batch_4_2_strategies{suffix}.png", comparison(by_length, TWO, axis)
        yield f"comparison_fixed_batch_4_3_strategies{suffix}.png", comparison(by_length, THREE, axis)


@dataclasses.dataclass(frozen=True)
class Axis:
    """What the groups of bars differ in."""

    field: str
    label: str


def comparison(group: Sequence[Record], strategies: Sequence[str], axis: Axis) -> Figure:
    """Throughput and peak memory as grouped bars."""
    drawing = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2)
    _bars(left, group, strategies, axis, throughput, "tokens/s", "throughput")
    _bars(right, group, strategies, axis, peak_gib, "GiB", "peak allocated memory")
    _finish(drawing, left, group, strategies)
    return drawing


def latency(group: Sequence[Record], axis: Axis) -> Figure:
    """Time of a step as grouped bars."""
    drawing = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    _bars(axes, group, THREE, axis, step_ms, "ms", "time of a step")
    _finish(drawing, axes, group, THREE)
    return drawing


def _quartiles(record: Record) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the step times."""
    first, median, third = statistics.quantiles(record["step_seconds"], n=4, method="inclusive")
    return first, median, third


def throughput(record: Record) -> tuple[float, float, float]:
    """Tokens/s and how far its quartiles lie below and above."""
    tokens = config_of(record).tokens_per_step
    first, median, third = (tokens / seconds for seconds in _quartiles(record))
    return median, median - third, first - median


def step_ms(record: Record) -> tuple[float, float, float]:
    """Milliseconds a step and how far its quartiles lie below and above."""
    first, median, third = (1e3 * seconds for seconds in _quartiles(record))
    return median, median - first, third - median


def peak_gib(record: Record) -> tuple[float, float, float]:
    """Peak allocated memory, which does not vary."""
    return record["peak_memory_bytes"] / GIB, 0.0, 0.0


def _bars(
    axes: Axes,
    group: Sequence[Record],
    strategies: Sequence[str],
    axis: Axis,
    value: Callable[[Record], tuple[float, float, float]],
    unit: str,
    title: str,
) -> None:
    cells = {(config_of(r).strategy.title, r["config"][axis.field]): r for r in group}
    sizes = sorted({size for name, size in cells if name in strategies})
    width = 0.8 / len(strategies)
    for i, name in enumerate(strategies):
        for place, size in enumerate(sizes):
            record, x = cells.get((name, size)), place + (i - (len(strategies) - 1) / 2) * width
            if record is not None and record["status"] == "ok":
                height, below, above = value(record)
                style = {**STYLES[name], "edgecolor": "black", "linewidth": 0.5}
                axes.bar(x, height, width, **style)
                if below or above:
                    axes.errorbar(x, height, [[below], [above]], color="black", capsize=2, linewidth=0.8)
            else:
                text = absence(record)
                axes.annotate(text, (x, 0), (0, 3), textcoords="offset points", ha="center", rotation=90, fontsize=7)
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlabel(axis.label)
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def absence(record: Record | None) -> str:
    """Why a bar is not there."""
    if record is None:
        return "not run"
    if record["status"] == "oom":
        return "OOM" + ("*" if record["mode"] == "inferred" else "")
    return "failed"


def setting_words(record: Record) -> str:
    """Model, machine and settings, for a title or a cell."""
    config: RunConfig = config_of(record)
    words = [config.model_name.rsplit("/")[-1], config.dtype]
    if record["script"] == "deepspeed":
        words.append(f"ZeRO-3 offload, preset {config.preset}")
    words.append("gradient checkpointing" if config.gradient_checkpointing else "no checkpointing")
    words.append(record["simulated_gpu"] or record["environment"]["gpu"] or "no GPU")
    if config.memory_limit_gib is not None:
        words.append(f"limited to {config.memory_limit_gib:g} GiB")
    said = ("model_name", "dtype", "preset", "gradient_checkpointing", "memory_limit_gib")
    return ", ".join([*words, *config.unusual(*_COMPARED, *_NOT_A_SETTING, *said)])


def _finish(drawing: Figure, axes: Axes, group: Sequence[Record], strategies: Sequence[str]) -> None:
    """Title, legend, and what the marks mean."""
    measured = next((r for r in group if r["status"] == "ok"), group[0])
    notes = ["bars: median; whiskers: quartiles"]
    if any(r["mode"] == "inferred" for r in group):
        notes.append("OOM*: not run, a smaller one ran out of memory")
    drawing.suptitle(f"{setting_words(measured)}\n{'; '.join(notes)}", fontsize=9)
    handles = [axes.bar(0, 0, label=name, edgecolor="black", linewidth=0.5, **STYLES[name]) for name in strategies]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(strategies), fontsize=9, frameon=False)


def predicted_and_measured(found: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Predictions beside the measured runs they are of."""

    def key(record: Record) -> str:
        return dataclasses.replace(config_of(record), dry_run=False, iterations=1, warmup=1).run_name

    predictions = {
        key(r): r for r in found if r["mode"] == "predicted" and r["peak_memory_bytes"] and not r["frontier"]
    }
    measured = [r for r in found if r["mode"] == "measured" and r["status"] == "ok" and r["script"] == "all_gpu"]
    return [(predictions[key(r)], r) for r in measured if key(r) in predictions]


def predicted_figure(pairs: Sequence[tuple[Record, Record]]) -> Figure:
    """Predicted against measured peaks, and the errors."""
    drawing = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2)
    for name, marker in zip(STRATEGIES, "osD"):
        own = [
            (p["peak_memory_bytes"], m["peak_memory_bytes"]) for p, m in pairs if config_of(m).strategy.title == name
        ]
        x = [measured / GIB for _, measured in own]
        style = {"linestyle": "", "marker": marker, "color": STYLES[name]["color"], "markeredgecolor": "black"}
        left.plot(x, [predicted / GIB for predicted, _ in own], label=name, **style)
        right.plot(x, [100 * (predicted / measured - 1) for predicted, measured in own], **style)
    top = max(max(p["peak_memory_bytes"], m["peak_memory_bytes"]) for p, m in pairs) / GIB * 1.05
    left.plot([0, top], [0, top], color="grey", linewidth=0.8, zorder=0)
    left.set(xlim=(0, top), ylim=(0, top), ylabel="predicted, without a GPU, GiB")
    right.axhline(0, color="grey", linewidth=0.8, zorder=0)
    right.set(ylabel="error of the prediction, %", xlim=(0, top))
    for axes in (left, right):
        axes.set_xlabel("measured peak, GiB")
        axes.grid(linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.suptitle(f"{len(pairs)} peaks; measured: {pairs[0][1]['environment']['gpu']}", fontsize=9)
    drawing.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return drawing
