"""The memory of one step over time, by what it is for, and the composition of its peak beside it."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.explain.categories import COLOURS, colours, order, words
from src.explain.timeline import Timeline
from src.utils import GIB, write_atomically

POINTS = 2000  # of a timeline, more than its pixels
_SMALLEST_SHARE = 0.02  # of a peak, to be named beside it
_MOST_SPANS = 40  # of phases; more of them, as of many micro-batches, would be grey noise


def figure(timelines: Mapping[str, Timeline], top_bytes: int | None = None) -> Figure:
    """A row for each named timeline, on one scale of memory, which ends at `top_bytes` or above the highest peak."""
    drawing = Figure(figsize=(11, 1.0 + 3.4 * len(timelines)), layout="constrained")
    FigureCanvasAgg(drawing)
    rows = drawing.subplots(len(timelines), 2, width_ratios=(3, 1), squeeze=False, sharey=True)
    highest = max(sum(timeline.breakdown().values()) for timeline in timelines.values()) * 1.12
    top = max(highest, top_bytes or 0) / GIB or 1.0
    rows[0][0].set_ylim(0, top)
    shown: dict[str, Any] = {}
    for (name, timeline), (left, right) in zip(timelines.items(), rows):
        shown |= _draw_timeline(left, timeline)
        _draw_peak(right, timeline, top)
        left.set_title(_plain(name), loc="left", fontsize=9)
    names = order(list(shown))
    labels = [_plain(words(name)) for name in names]
    drawing.legend(
        [shown[name] for name in names], labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    return drawing


def save_plot(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw `timelines` into a PNG file."""
    write_atomically(path, lambda temporary: figure(timelines).savefig(temporary, dpi=150, format="png"))


def _draw_timeline(axes: Axes, timeline: Timeline) -> dict[str, Any]:
    """Stacked areas, the phases and the peak; returns the areas that can be seen, by category."""
    numbers, parts = timeline.by_category(POINTS)
    highest = sum(parts.values()).max()
    heights, colour_of = [parts[name] / GIB for name in parts], colours(timeline.names)
    areas = dict(zip(parts, axes.stackplot(numbers, *heights, colors=[colour_of[name] for name in parts], linewidth=0)))
    end = timeline.event_count
    spans = timeline.phases if len(timeline.phases) <= _MOST_SPANS else []
    for i, ((start, phase), (stop, _)) in enumerate(itertools.pairwise([*spans, (end, "")])):
        axes.axvspan(start, stop, color="black" if i % 2 else "white", alpha=0.06, linewidth=0, zorder=0)
        at_edge = stop == end and stop - start < 0.1 * end  # too narrow for its name
        place = (end if at_edge else (start + stop) / 2, 0.985)
        align = "right" if at_edge else "center"
        axes.annotate(_plain(phase), place, xycoords=("data", "axes fraction"), ha=align, va="top", fontsize=8)
    axes.plot([timeline.peak_event], [timeline.peak_bytes / GIB], marker="v", color="black", markersize=5)
    axes.set_xlim(0, max(end, 1))
    axes.set_xlabel("allocator events of one step")
    axes.set_ylabel("allocated memory, GiB")
    return {name: areas[name] for name in parts if parts[name].max() >= highest * 0.005}


def _draw_peak(axes: Axes, timeline: Timeline, top: float) -> None:
    """What the peak is made of, as one bar in the colours of the timeline; the axis ends at `top` GiB."""
    breakdown = timeline.breakdown()
    peak, bottom, lowest = sum(breakdown.values()) / GIB, 0.0, 0.0
    colour_of = colours(timeline.names)
    for name in breakdown:
        height = max(breakdown[name], 0) / GIB
        axes.bar(0, height, bottom=bottom, color=colour_of[name], width=0.5, edgecolor="white", linewidth=0.4)
        if height >= _SMALLEST_SHARE * peak:
            place = max(bottom + height / 2, lowest)  # names do not lie over each other
            text = _plain(f"{words(name)}  {height:.2f}")
            axes.annotate(text, (0.29, place), va="center", fontsize=8, annotation_clip=False)
            lowest = place + 0.055 * top
        bottom += height
    phase = f" in {_plain(timeline.peak_phase)}" if timeline.peak_phase else ""
    axes.set_title(f"at the peak{phase}: {peak:.2f} GiB", fontsize=9, loc="left")
    axes.set_xlim(-0.3, 1.6)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, labelleft=False)


def _plain(text: str) -> str:
    """`text` as it is: matplotlib takes what stands between two dollar signs for mathematics."""
    return text.replace("$", r"\$")


__all__ = ["COLOURS", "POINTS", "figure", "save_plot"]
