"""What a snapshot shows, as text."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from src.explain.categories import order, words
from src.explain.refusal import headline
from src.explain.replay import Stack
from src.explain.stacks import origin
from src.explain.timeline import Timeline
from src.utils import aligned_table, format_bytes, printable

NOT_RECORDED = (
    "No history was recorded on GPU {gpu}: {size} is what was alive at the dump, and no peak is known.\n"
    "To record one, call torch.cuda.memory._record_memory_history() before the step."
)


class Group(NamedTuple):
    """Blocks at the peak that one origin asked for, for one purpose and in one phase."""

    size: int  # bytes
    blocks: int
    category: str
    phase: str
    origin: str
    stack: Stack  # of one of them


def groups(timeline: Timeline) -> list[Group]:
    """What is alive at the peak, largest group first."""
    device = timeline.device
    alive = np.flatnonzero(timeline.alive(timeline.peak_event))
    sizes: Counter = Counter()
    counts: Counter = Counter()
    first: dict[tuple, int] = {}
    columns = (timeline.category, timeline.phase, device.start < 0, device.label, device.stack)
    rows = np.stack([column[alive] for column in columns], axis=1)
    kinds, which, blocks = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    totals = np.bincount(which.ravel(), device.size[alive], len(kinds)) if len(alive) else []
    for (category, phase, before, label, stack), count, total in zip(kinds.tolist(), blocks.tolist(), totals):
        when = timeline.phase_names[phase] if not before else "before the trace" if device.recorded else ""
        key = (timeline.names[category], when, _origin(timeline.labels[label], timeline.stacks[stack], when))
        sizes[key] += int(total)
        counts[key] += count
        first.setdefault(key, stack)
    return [Group(size, counts[key], *key, timeline.stacks[first[key]]) for key, size in sizes.most_common()]


def _origin(label: str, stack: Stack, phase: str) -> str:
    """Who asked for a block, layers of one kind taken together."""
    module, _, operation = printable(label).partition("|")
    where = ".".join("*" if part.isdigit() else part for part in module.split("."))
    told = " ".join(filter(None, (where, operation))) or origin(stack)
    return told or ("autograd, no stack" if phase == "backward" else "-")


def breakdown_table(breakdown: dict[str, int]) -> str:
    """Categories of a peak with their bytes and shares; empty ones are left out."""
    peak = sum(breakdown.values())
    return aligned_table([(words(name), format_bytes(n), f"{n / peak:.1%}") for name, n in breakdown.items() if n])


def waterfall(a: dict[str, int], b: dict[str, int]) -> list[tuple[str, int, int, int]]:
    """Category, bytes at the peak of A and of B, and the difference; the differences sum to that of the peaks."""
    pairs = [(name, a.get(name, 0), b.get(name, 0)) for name in order([*dict.fromkeys([*a, *b])])]
    return [(name, first, second, second - first) for name, first, second in pairs if first or second]


def waterfall_table(a: dict[str, int], b: dict[str, int]) -> str:
    """The way from one peak to another, largest change first."""
    rows = [(words(name), *sizes) for name, *sizes in waterfall(a, b)]
    return _changes_table("at the peak", rows)


def frames_compared(*timelines: Timeline) -> list[tuple[str, int, int, int]]:
    """The same by who asked, whatever for; with what the allocator counts beyond the requests, so that it sums."""
    sides = []
    for timeline in timelines:
        sizes: Counter = Counter()
        for group in groups(timeline):
            sizes[group.origin if group.origin != "-" else "nobody named"] += group.size
        sizes["the allocator's rounding"] += timeline.known_peak_bytes - timeline.peak_bytes
        sides.append(sizes)
    first, second = sides
    pairs = [(name, first[name], second[name]) for name in dict.fromkeys([*first, *second])]
    return [(name, a, b, b - a) for name, a, b in pairs if a or b]


def frames_table(a: Timeline, b: Timeline, top: int) -> str:
    """The `top` largest changes by who asked, and all others as one row."""
    rows = sorted(frames_compared(a, b), key=lambda row: -abs(row[3]))
    if rest := rows[top:]:
        sums = [sum(row[i] for row in rest) for i in (1, 2, 3)]
        rows = [*rows[:top], (f"{len(rest)} others", *sums)]
    return _changes_table("asked for by", rows, in_order=True)


def _changes_table(title: str, rows: Sequence[tuple], *, in_order: bool = False) -> str:
    rows = list(rows) if in_order else sorted(rows, key=lambda row: -abs(row[3]))
    total = ("peak", *(sum(row[i] for row in rows) for i in (1, 2, 3)))
    lines = [(title, "A", "B", "B - A")]
    for name, first, second, change in [*rows, total]:
        lines.append((name, format_bytes(first), format_bytes(second), f"{change / 2**20:+,.1f} MiB"))
    return aligned_table(lines)


def peak_line(timeline: Timeline) -> str:
    """When the peak is reached and how much it is, or that it is not known."""
    size = format_bytes(timeline.known_peak_bytes)
    if not timeline.device.recorded:
        return NOT_RECORDED.format(gpu=timeline.device.number, size=size)
    if not timeline.event_count:
        return f"The history has no allocation and no release: {size} were alive all the time"
    phase = f" in the {timeline.peak_phase} phase" if timeline.peak_phase else ""
    moment = f"after event {timeline.peak_event + 1:,} of {timeline.event_count:,}"
    alive = int(timeline.alive(timeline.peak_event).sum())
    corrected = timeline.measured_peak is None and timeline.known_peak_bytes > timeline.peak_bytes
    line = f"Peak {'at least ' if corrected else ''}{size}{phase}, {moment}, {alive:,} blocks alive"
    if corrected:
        line += f"\n({format_bytes(timeline.peak_bytes)} were asked for; blocks alive at the dump are larger than that)"
    return line


def report(timeline: Timeline, top: int) -> str:
    """The peak, what it is made of, and the blocks that make most of it; a refused request comes first."""
    parts = [headline(timeline)] if timeline.refused else []
    if timeline.refused and timeline.refused[-1].event != timeline.peak_event:
        parts.append("alive then:\n" + breakdown_table(timeline.breakdown_at(timeline.refused[-1].event)))
    rows = [("largest", "blocks", "for", "allocated in", "by")]
    for group in groups(timeline)[:top]:
        size, count = format_bytes(group.size), f"{group.blocks:,}"
        rows.append((size, count, words(group.category), group.phase or "-", group.origin))
    parts += [peak_line(timeline), breakdown_table(timeline.breakdown()), _left_aligned(rows)]
    return "\n\n".join(filter(None, parts))


def gpus_table(timelines: Sequence[Timeline]) -> str:
    """Each GPU of a snapshot, the fullest first."""
    rows = [(f"{len(timelines)} GPUs", "peak", "alive at the dump", "reserved at the dump")]
    for timeline in timelines:
        device = timeline.device
        peak = format_bytes(timeline.known_peak_bytes) if device.recorded else "not recorded"
        reserved = format_bytes(sum(device.segments.values()))
        rows.append((f"GPU {device.number}", peak, format_bytes(device.alive_at_dump), reserved))
    return aligned_table(rows)


def _left_aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [cell.rjust(w) if i < 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)
