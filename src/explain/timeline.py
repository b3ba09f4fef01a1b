"""The memory of one GPU over time, and what it is made of at its peak."""

import bisect
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from src.explain import purposes
from src.explain.categories import CATEGORIES, order
from src.explain.replay import Device, OutOfMemory, Recorded, Stack, recorded


@dataclass(slots=True, eq=False)
class Block:
    """One piece of GPU memory from its allocation to its release."""

    size: int  # bytes
    start: int  # number of the event that allocated it, -1 if it was there before the first
    label: str  # "module|operation", as far as the program said
    frames: Stack  # (function, file, line), innermost first
    phase: str = ""  # in which it was allocated
    category: str = ""
    end: int = 0  # number of the event that released it, the number of events if none did

    @property
    def module(self) -> str:
        """The module that asked for it."""
        return self.label.partition("|")[0]

    @property
    def operation(self) -> str:
        """What asked for it there, as far as is known."""
        return self.label.partition("|")[2]


@dataclass
class Timeline:
    """What one GPU's allocator did, event by event."""

    device: Device
    stacks: list[Stack]
    labels: list[str]
    names: list[str]  # of categories
    category: np.ndarray  # of each block, an index into `names`
    phase: np.ndarray  # of each block, an index into `phase_names`
    phase_names: list[str]
    phases: list[tuple[int, str]]  # number of the first event of each phase, and its name
    measured_peak: int | None = None  # by the allocator's own counter
    expandable_segments: bool = False
    allocated: np.ndarray = field(init=False)  # bytes before the first event and after each

    def __post_init__(self) -> None:
        self.allocated = np.cumsum(self._changes(np.ones(len(self.device.size), bool)))
        self.peak_event = int(np.argmax(self.allocated)) - 1  # after which it is reached first, -1: before the first
        self.peak_bytes = int(self.allocated[self.peak_event + 1])  # of the blocks

    def _changes(self, chosen: np.ndarray) -> np.ndarray:
        """By how much the chosen blocks grow before the first event, and by each."""
        device = self.device
        count = len(device.times)
        # Each event has one block, so that nothing is added twice; only those from before share their place.
        changes = np.zeros(count + 1, np.int64)
        before = device.start < 0
        changes[0] = device.size[chosen & before].sum()
        changes[device.start[chosen & ~before] + 1] = device.size[chosen & ~before]
        released = chosen & (device.end < count)
        changes[device.end[released] + 1] -= device.size[released]
        return changes

    @property
    def event_count(self) -> int:
        """Allocations and releases in the history."""
        return len(self.device.times)

    @property
    def refused(self) -> list[OutOfMemory]:
        """The requests that ran out of memory."""
        return self.device.refused

    def phase_at(self, event: int) -> str:
        """The phase of an event, "" before the first."""
        index = bisect.bisect_right(self.phases, event, key=lambda start: start[0]) - 1
        return self.phases[index][1] if index >= 0 else ""

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak is reached."""
        return self.phase_at(max(self.peak_event, 0))

    @functools.cached_property
    def known_peak_bytes(self) -> int:
        """The allocator's own peak where the snapshot has it, else what is certain to have been allocated at once.

        A block can be larger than what was asked for. How much shows only when it is alive at the dump, so the peak
        of the requests is raised by that; and it cannot have been less than what is alive at the dump.
        """
        if self.measured_peak is not None:
            return self.measured_peak
        device, alive = self.device, self.alive(self.peak_event)
        beyond = np.maximum(device.dump_size - device.size, 0)[alive & (device.dump_size >= 0)].sum()
        return max(self.peak_bytes + int(beyond), device.alive_at_dump)

    def alive(self, event: int) -> np.ndarray:
        """Whether each block is alive after an event."""
        return (self.device.start <= event) & (event < self.device.end)

    def block(self, index: int) -> Block:
        """One block, by its place in the columns."""
        device = self.device
        label, stack = self.labels[device.label[index]], self.stacks[device.stack[index]]
        phase, category = self.phase_names[self.phase[index]], self.names[self.category[index]]
        size, start, end = int(device.size[index]), int(device.start[index]), int(device.end[index])
        return Block(size, start, label, stack, phase, category, end)

    def at_peak(self) -> list[Block]:
        """The blocks that are alive at the peak."""
        return [self.block(i) for i in np.flatnonzero(self.alive(self.peak_event))]

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """Every block; of a long history, this takes a while."""
        return [self.block(i) for i in range(len(self.device.size))]

    @functools.cached_property
    def events(self) -> list[tuple[int, Block]]:
        """(+1, block) for each allocation and (-1, block) for each release; of a long history, this takes a while."""
        ends = {block.end: (-1, block) for block in self.blocks if block.end < self.event_count}
        found = {block.start: (1, block) for block in self.blocks if block.start >= 0} | ends
        return [found[event] for event in range(self.event_count)]

    def breakdown_at(self, event: int) -> dict[str, int]:
        """Bytes of each category after an event. Has all of `CATEGORIES`, and others where there are any."""
        chosen = self.alive(event)
        totals = dict.fromkeys(self.names, 0)
        for code in np.unique(self.category[chosen]).tolist():
            totals[self.names[code]] = int(self.device.size[chosen & (self.category == code)].sum())
        return {name: totals[name] for name in order(self.names) if totals[name] or name in CATEGORIES}

    def breakdown(self) -> dict[str, int]:
        """Bytes of each category at the peak; sums to `known_peak_bytes`."""
        totals = self.breakdown_at(self.peak_event)
        totals["allocator_rounding"] += self.known_peak_bytes - self.peak_bytes
        return totals

    def by_category(self, points: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Event numbers, at most `points`, and the bytes of each category after each: peaks between them are kept."""
        edges = np.unique(np.linspace(0, len(self.allocated), min(points, len(self.allocated)) + 1).astype(int))
        kept = np.array([low + np.argmax(self.allocated[low:high]) for low, high in itertools.pairwise(edges)])
        present = set(np.unique(self.category).tolist())
        codes = [(name, self.names.index(name)) for name in order(self.names)]
        parts = {name: np.cumsum(self._changes(self.category == code))[kept] for name, code in codes if code in present}
        return kept - 1, parts


def timeline(snapshot: dict[str, Any]) -> Timeline:
    """The timeline of the snapshot's fullest GPU. Raises any error if `snapshot` has another form."""
    return timelines_of(recorded(snapshot))[0]


def timelines_of(columns: Recorded, patterns: Mapping[str, str] | None = None) -> list[Timeline]:
    """The timeline of each GPU, the fullest first.

    `patterns` are categories of the user's own: a regular expression that is searched in the label and in
    "FUNCTION FILE:LINE" of each frame. A block that several fit has the first.
    """
    devices = columns.devices or recorded({"segments": [], "device_traces": [[{"action": "snapshot"}]]}).devices
    found = [_timeline(columns, device, patterns or {}) for device in devices]
    return sorted(found, key=lambda timeline: -timeline.known_peak_bytes)


def _timeline(columns: Recorded, device: Device, patterns: Mapping[str, str]) -> Timeline:
    known = purposes.sort_out(columns, device, patterns)
    return Timeline(device, columns.stacks, columns.labels, expandable_segments=columns.expandable_segments, **known)
