"""From PyTorch's snapshot to columns of numbers: every block of memory, from its allocation to its release.

A snapshot of five million events is 2 GB of Python objects; as columns it is 100 MB, and numpy replays it in seconds.
The format: torch/cuda/memory.py (`_snapshot`) and torch/csrc/cuda/memory_snapshot.cpp. Anything that is not in that
format raises some exception here, of any kind; src/explain/reading.py makes one line of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Frame = tuple[str, str, int]  # function, file, line
Stack = tuple[Frame, ...]  # innermost frame first

_BLOCK_BYTES = 512  # the allocator's unit
_BEYOND_ANY_MEMORY = 2**62  # sums of sizes below it fit 64-bit integers
_SEGMENT_SIGNS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_STACKS_COMPARED = 200  # pairs that show whether a release carries the stack of the allocation


class OutOfMemory(NamedTuple):
    """A request that the allocator refused."""

    position: int  # in the trace
    event: int  # the last allocation or release before it, -1 if there is none
    requested: int  # bytes
    device_free: int  # bytes that the driver still had
    stack: int


class SegmentChange(NamedTuple):
    """Memory that the allocator took from the driver (+1) or gave back (-1)."""

    position: int
    sign: int
    address: int
    size: int
    mapped: bool  # a part of an expandable segment


@dataclass
class Device:
    """One GPU: its blocks as columns, those from before the first event first. Sizes are bytes, times microseconds.

    A block is alive after event `e` if start <= e < end. Events are allocations and releases, numbered from 0.
    """

    number: int
    recorded: bool  # whether there is a history at all
    times: np.ndarray  # of each event, never decreasing
    size: np.ndarray
    start: np.ndarray  # number of the event that allocated it, -1 if it was there before the first
    end: np.ndarray  # of the event that released it, the number of events if none did
    address: np.ndarray
    stack: np.ndarray  # index into the snapshot's stacks
    label: np.ndarray  # index into its labels
    requested: np.ndarray  # as `size`, without what the allocator could not split off
    dump_size: np.ndarray  # as the allocator counts it when the snapshot is taken, -1 if it is gone by then
    alive_at_dump: int  # bytes
    segments: dict[int, int]  # address -> size of what is reserved when the snapshot is taken
    changes: list[SegmentChange]
    refused: list[OutOfMemory]


@dataclass
class Annotation:
    """A named range of the program, as far as PyTorch noted it."""

    name: str
    stage: str  # "START" or "END"
    time: int


@dataclass
class Recorded:
    """A whole snapshot as columns."""

    devices: list[Device]
    stacks: list[Stack]
    labels: list[str]
    annotations: list[Annotation]
    expandable_segments: bool = False


@dataclass
class _Numbers:
    """Gives equal stacks, and equal labels, one number. The snapshot must live as long: it goes by `id`."""

    stacks: dict[Stack, int] = field(default_factory=lambda: {(): 0})
    labels: dict[str, int] = field(default_factory=lambda: {"": 0})
    _frames: dict[int, Frame] = field(default_factory=dict)
    _seen: dict[tuple[int, ...], list[tuple[Sequence, int]]] = field(default_factory=dict)

    def stack(self, frames: Sequence[dict[str, Any]] | None) -> int:
        if not frames:
            return 0
        # Stacks share their frames, but each is a list of its own. Those that agree in some frames are compared whole.
        count = len(frames)
        middle, quarter = frames[count // 2], frames[count // 4]
        key = count, id(frames[0]), id(quarter), id(middle), id(frames[-1 - count // 4]), id(frames[-1])
        alike = self._seen.setdefault(key, [])
        for other, number in alike:
            if other == frames:
                return number
        number = self.stacks.setdefault(tuple(map(self._frame, frames)), len(self.stacks))
        if len(self._seen) >= 100_000:  # of a file whose stacks share no frames
            self._seen.clear()
            self._frames.clear()
        alike.append((frames, number))
        return number

    def _frame(self, frame: dict[str, Any]) -> Frame:
        found = self._frames.get(id(frame))
        if found is None:
            name, file, line = frame["name"], frame["filename"], frame.get("line", 0)
            if not (isinstance(name, str) and isinstance(file, str) and isinstance(line, int)):
                raise TypeError("a stack has no names")
            found = self._frames[id(frame)] = name, file, line
        return found

    def label(self, label: str | None) -> int:
        if not label:
            return 0
        if not isinstance(label, str):
            raise TypeError("a label is no text")
        return self.labels.setdefault(label, len(self.labels))


def recorded(snapshot: dict[str, Any] | list[dict[str, Any]]) -> Recorded:
    """The columns of `snapshot`, or of the bare list of segments that `torch.cuda.memory_snapshot()` returns."""
    if isinstance(snapshot, list):
        snapshot = {"segments": snapshot, "device_traces": []}
    numbers = _Numbers()
    traces = dict(enumerate(list(snapshot["device_traces"])))
    segments: dict[int, list] = {}
    for segment in snapshot["segments"]:
        segments.setdefault(segment["device"], []).append(segment)
    devices = [
        _device(number, traces.get(number, []), segments.get(number, []), numbers)
        for number in sorted({number for number, trace in traces.items() if trace} | segments.keys())
    ]
    annotations = [
        Annotation(_text(note["name"]), _text(note.get("stage", "")), _whole(note["time_us"]))
        for note in snapshot.get("external_annotations") or ()
    ]
    settings = snapshot.get("allocator_settings") or {}
    expandable = settings.get("expandable_segments") is True
    return Recorded(devices, list(numbers.stacks), list(numbers.labels), annotations, expandable)


def _device(number: int, trace: list[dict[str, Any]], segments: list[dict[str, Any]], numbers: _Numbers) -> Device:
    events = _Events()
    for position, entry in enumerate(trace):
        events.add(position, entry, numbers)
    allocates = np.array(events.allocates, bool)
    address, size = _column(events.address), _rounded(_column(events.size))
    end, unmatched = _pairs(address, allocates)
    live = _alive_at_dump(segments)

    # Blocks from before: those that are released without having been allocated, and those that lie where nothing did.
    freed_first = np.flatnonzero(unmatched)
    places = _column(list(live))
    throughout = [live[place] for place in places[~np.isin(places, address)].tolist()]
    made = np.flatnonzero(allocates)
    stacks = _column(events.stack)
    releases_say_who = _releases_say_who(events, made, end, numbers)
    of_freed = [numbers.stack(events.frames[event]) if releases_say_who else 0 for event in freed_first.tolist()]
    before = np.zeros(len(freed_first) + len(throughout), np.int64)

    def column(freed: Any, there: list[int], allocated: np.ndarray) -> np.ndarray:
        return np.concatenate([freed, _column(there), allocated])

    sizes = size[freed_first], size[made]
    result = Device(
        number=number,
        recorded=bool(trace),
        times=np.maximum.accumulate(_column(events.time)),
        size=column(sizes[0], [block.size for block in throughout], sizes[1]),
        start=np.concatenate([before - 1, made]),
        end=column(freed_first, [len(address)] * len(throughout), end[made]),
        address=column(address[freed_first], [block.address for block in throughout], address[made]),
        stack=column(_column(of_freed), [numbers.stack(block.frames) for block in throughout], stacks[made]),
        label=np.concatenate([before, _column(events.label)[made]]),
        requested=column(sizes[0], [block.requested for block in throughout], sizes[1]),
        dump_size=np.full(len(before) + len(made), -1),
        alive_at_dump=sum(block.size for block in live.values()),
        segments={_whole(s["address"]): _size(s["total_size"]) for s in segments if "total_size" in s},
        changes=events.changes,
        refused=events.refused,
    )
    _compare_with_dump(result, live, numbers)
    if float(result.size.sum(dtype=float)) >= _BEYOND_ANY_MEMORY:
        raise ValueError("its sizes are beyond any memory")
    return result


class _Events:
    """The entries of a trace by their kind: an allocation or a release is an event with a place in each list."""

    def __init__(self) -> None:
        self.allocates: list[bool] = []
        self.address: list[int] = []
        self.size: list[int] = []
        self.time: list[int] = []
        self.stack: list[int] = []
        self.label: list[int] = []
        self.frames: list[Any] = []  # of a release, which rarely matter and take long to compare
        self.changes: list[SegmentChange] = []
        self.refused: list[OutOfMemory] = []

    def add(self, position: int, entry: dict[str, Any], numbers: _Numbers) -> None:
        action = entry["action"]
        if action == "free_completed":  # the most frequent after the two below
            return
        if action in ("alloc", "free_requested"):
            allocates = action == "alloc"
            self.allocates.append(allocates)
            self.address.append(entry["addr"])
            self.size.append(entry["size"])
            self.time.append(entry.get("time_us", 0))
            frames = entry.get("frames")
            self.stack.append(numbers.stack(frames) if allocates else 0)
            self.label.append(numbers.label(entry.get("user_metadata")) if allocates else 0)
            self.frames.append(None if allocates else frames)
        elif action == "oom":
            size, free = _size(entry["size"]), _size(entry.get("device_free", 0))
            stack = numbers.stack(entry.get("frames"))
            self.refused.append(OutOfMemory(position, len(self.allocates) - 1, size, free, stack))
        elif action in _SEGMENT_SIGNS:
            mapped = action in ("segment_map", "segment_unmap")
            place, size = _whole(entry["addr"]), _size(entry["size"])
            self.changes.append(SegmentChange(position, _SEGMENT_SIGNS[action], place, size, mapped))


def _pairs(address: np.ndarray, allocates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each event the one that releases what it allocated, or their number; and which release matches nothing."""
    end = np.full(len(address), len(address))
    unmatched = ~allocates
    order = np.argsort(address, kind="stable")  # events at one address stay in their order
    before, after = order[:-1], order[1:]
    matches = (address[before] == address[after]) & allocates[before] & ~allocates[after]
    end[before[matches]] = after[matches]
    unmatched[after[matches]] = False
    return end, unmatched


class _Live(NamedTuple):
    address: int
    size: int
    requested: int
    frames: Any


def _alive_at_dump(segments: list[dict[str, Any]]) -> dict[int, _Live]:
    """What is alive when the snapshot is taken, by address."""
    live = {}
    for segment in segments:
        address = _whole(segment["address"])
        for block in segment["blocks"]:
            size = _size(block["size"])
            if block["state"] == "active_allocated":
                frames, requested = block.get("frames"), block.get("requested_size", size)
                if frames is None and block.get("history"):  # PyTorch 2.0
                    frames, requested = block["history"][0].get("frames"), block["history"][0].get("real_size", size)
                requested = -(-_size(requested) // _BLOCK_BYTES) * _BLOCK_BYTES
                place = _whole(block.get("address", address))
                live[place] = _Live(place, size, requested, frames)
            address += size
    return live


def _releases_say_who(events: _Events, made: np.ndarray, end: np.ndarray, numbers: _Numbers) -> bool:
    """Whether a release has the stack of its allocation; with context="all" it has that of the release itself."""
    pairs = [(events.stack[a], events.frames[end[a]]) for a in made[end[made] < len(end)][:_STACKS_COMPARED].tolist()]
    stacks = [(a, numbers.stack(frames)) for a, frames in pairs]
    return any(a for a, _ in stacks) and all(a == b for a, b in stacks)


def _compare_with_dump(device: Device, live: dict[int, _Live], numbers: _Numbers) -> None:
    """Note of each block that is alive to the end how large the allocator counts it, and its stack if it had none."""
    for block in np.flatnonzero(device.end == len(device.times)).tolist():
        found = live.get(int(device.address[block]))
        if found is not None:
            device.dump_size[block] = found.size
            device.stack[block] = device.stack[block] or numbers.stack(found.frames)


def _column(values: list[Any]) -> np.ndarray:
    if not set(map(type, values)) <= {int}:
        raise TypeError("a size, an address or a time is no number")
    return np.array(values, np.int64)


def _rounded(sizes: np.ndarray) -> np.ndarray:
    """Sizes as the allocator counts them."""
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() < _BEYOND_ANY_MEMORY:
        raise ValueError("a size is no number of bytes")
    return -(-sizes // _BLOCK_BYTES) * _BLOCK_BYTES


def _whole(value: Any) -> int:
    if not isinstance(value, int) or abs(value) >= 2**63:
        raise TypeError("an address or a time is no number")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < _BEYOND_ANY_MEMORY:
        raise ValueError("a size is no number of bytes")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a note is no text")
    return value
