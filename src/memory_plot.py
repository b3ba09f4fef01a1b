"""The memory of one step over time, by what it is for, and the composition of its peak beside it."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.snapshot import CATEGORIES, Timeline
from src.utils import GIB, write_atomically

# Told apart by lightness as well as by hue, for print in grey and for the colour-blind.
COLOURS = {
    "parameters": "#08306b",
    "gathered_parameters": "#4a78b5",
    "gradients": "#6baed6",
    "gradient_reduction": "#a6cee8",
    "optimizer_state": "#c6dbef",
    "optimizer_temporaries": "#dfe9f3",
    "checkpoints": "#1b5e20",
    "logits_and_loss": "#d95f02",
    "attention": "#7b3294",
    "mlp": "#fdb863",
    "norm": "#c2a5cf",
    "hidden_states": "#5aae61",
    "inputs": "#a6dba0",
    "library_workspace": "#969696",
    "allocator_rounding": "#d9d9d9",
    "unattributed": "#252525",
}

POINTS = 2000  # of a timeline, more than its pixels
_SMALLEST_SHARE = 0.02  # of a peak, to be named beside it


def figure(timelines: Mapping[str, Timeline]) -> Figure:
    """A row for each named timeline, all on one scale of memory."""
    drawing = Figure(figsize=(11, 0.6 + 3.6 * len(timelines)), layout="constrained")
    FigureCanvasAgg(drawing)
    rows = drawing.subplots(len(timelines), 2, width_ratios=(3, 1), squeeze=False, sharey=True)
    for (name, timeline), (left, right) in zip(timelines.items(), rows):
        shown = _draw_timeline(left, timeline)
        _draw_peak(right, timeline)
        left.set_title(name, loc="left", fontsize=9)
        _draw_legend(left, shown)
    top = max(sum(timeline.breakdown().values()) for timeline in timelines.values()) / GIB
    rows[0][0].set_ylim(0, top * 1.12)
    return drawing


def save_plot(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw `timelines` into a PNG file."""
    write_atomically(path, lambda temporary: figure(timelines).savefig(temporary, dpi=150, format="png"))


def _draw_timeline(axes: Axes, timeline: Timeline) -> list[str]:
    """Stacked areas, the phases and the peak; returns the categories that can be seen."""
    numbers, parts = timeline.by_category(POINTS)
    highest = sum(parts.values()).max()
    shown = [name for name in parts if parts[name].max() >= highest * 0.005]
    areas = axes.stackplot(
        numbers, *(parts[name] / GIB for name in parts), colors=[COLOURS[name] for name in parts], linewidth=0
    )
    for area, name in zip(areas, parts):
        area.set_label(name.replace("_", " "))
    end = len(timeline.events)
    starts = [*timeline.phases, (end, "")]
    for i, ((start, phase), (stop, _)) in enumerate(itertools.pairwise(starts)):
        axes.axvspan(start, stop, color="black" if i % 2 else "white", alpha=0.06, linewidth=0, zorder=0)
        at_edge = stop == end and stop - start < 0.1 * end  # too narrow for its name
        place = (end if at_edge else (start + stop) / 2, 0.985)
        align = "right" if at_edge else "center"
        axes.annotate(phase, place, xycoords=("data", "axes fraction"), ha=align, va="top", fontsize=8)
    axes.axvline(timeline.peak_event, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(end, 1))
    axes.set_xlabel("allocator events of one step")
    axes.set_ylabel("allocated memory, GiB")
    return [name.replace("_", " ") for name in shown]


def _draw_legend(axes: Axes, shown: list[str]) -> None:
    """Name the areas that can be seen, the uppermost first."""
    handles, labels = axes.get_legend_handles_labels()
    kept = [(handle, label) for handle, label in zip(handles, labels) if label in shown][::-1]
    axes.legend(*zip(*kept), loc="upper left", bbox_to_anchor=(0, 0.95), fontsize=7, ncols=2)


def _draw_peak(axes: Axes, timeline: Timeline) -> None:
    """What the peak is made of, as one bar in the colours of the timeline."""
    breakdown = timeline.breakdown()
    peak, bottom = sum(breakdown.values()), 0
    for name in CATEGORIES:
        count = breakdown[name]
        if count <= 0:
            continue
        axes.bar(0, count / GIB, bottom=bottom / GIB, color=COLOURS[name], width=0.5, edgecolor="white", linewidth=0.4)
        if count >= _SMALLEST_SHARE * peak:
            text = f"{name.replace('_', ' ')}  {count / GIB:.2f}"
            axes.annotate(text, (0.29, (bottom + count / 2) / GIB), va="center", fontsize=8, annotation_clip=False)
        bottom += count
    phase = f" in {timeline.peak_phase}" if timeline.peak_phase else ""
    axes.set_title(f"at the peak{phase}: {peak / GIB:.2f} GiB", fontsize=9, loc="left")
    axes.set_xlim(-0.3, 1.6)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
