"""What a memory snapshot shows: the blocks alive at the peak, what they are for, and in which phase. Needs no torch.

    python -m src.snapshot snap_shots/RUN.pickle           # the peak of one run
    python -m src.snapshot A.pickle B.pickle               # what B has more or less than A, by category
    python -m src.snapshot A.pickle B.pickle --plot both.png   # their timelines on one scale

Reads snapshots of any PyTorch program (`torch.cuda.memory._dump_snapshot`), gzipped ones too. Those of this project
also say what each block is for: src/attribution.py writes labels and notes into fields that PyTorch has for them.
Other programs' blocks are sorted by the functions that asked for them, as far as the snapshot has stacks. Reading
executes nothing that is in the file.
"""

import argparse
import bisect
import contextlib
import gzip
import itertools
import pickle
import resource
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.utils import GIB, ExitStatus, UsageError, aligned_table, error_line, format_bytes, write_atomically

# What memory is for, in the order it is shown.
CATEGORIES = (
    "parameters",
    "gathered_parameters",  # under ZeRO-3: weights fetched for their use
    "gradients",
    "gradient_reduction",  # under ZeRO-3: gradients on their way to the host, their copies and norms
    "optimizer_state",
    "optimizer_temporaries",
    "checkpoints",  # the layer inputs that gradient checkpointing keeps
    "logits_and_loss",
    "attention",  # here and below: activations kept for the backward pass, their gradients, and temporaries
    "mlp",
    "norm",
    "hidden_states",  # between the parts of a layer, and between layers
    "inputs",  # tokens, positions, rotary tables
    "library_workspace",
    "allocator_rounding",  # what the allocator counts beyond what was asked for
    "unattributed",
)

# Notes in a snapshot, as names of PyTorch's annotations: "phase NAME", "owner CATEGORY ADDRESS", "peak BYTES".
PHASE, OWNER, PEAK = "phase", "owner", "peak"

# The model itself: what runs in it outside its decoder is the LM head and the loss.
LOSS_MODULE = "loss"
GATHER, REDUCE = "zero3.gather", "zero3.reduce"

MAX_FILE_BYTES = 2 * GIB  # of a snapshot, unpacked
# What reading may take: a file of 200 MB takes 1.5 GiB, and a hostile one could ask for any amount.
_MAX_READING_BYTES = 8 * GIB

_BLOCK_BYTES = 512  # the allocator's unit
_BEYOND_ANY_MEMORY = 2**62  # sums of sizes below it fit 64-bit integers
_LIVE_STATES = ("active_allocated",)


@dataclass(slots=True, eq=False)
class Block:
    """One piece of GPU memory from its allocation to its release."""

    size: int  # bytes
    start: int  # number of the event that allocated it, -1 if it was there before the first
    label: str  # "module|operation", as far as the program said
    frames: Sequence[dict[str, Any]]
    phase: str = ""  # in which it was allocated
    category: str = ""

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

    blocks: list[Block]
    events: list[tuple[int, Block]]  # +1: allocated, -1: released
    phases: list[tuple[int, str]]  # number of the first event of each phase, and its name
    measured_peak: int | None = None  # by the allocator's own counter
    initial: list[Block] = field(default_factory=list)
    peak_bytes: int = 0  # of the blocks
    peak_event: int = -1  # after which event the peak is reached first, -1: before the first

    def __post_init__(self) -> None:
        self.initial = [block for block in self.blocks if block.start < 0]
        sizes = np.fromiter((sign * block.size for sign, block in self.events), np.int64, len(self.events))
        self.allocated = sum(block.size for block in self.initial) + np.concatenate([[0], np.cumsum(sizes)])
        self.peak_event = int(np.argmax(self.allocated)) - 1
        self.peak_bytes = int(self.allocated[self.peak_event + 1])

    def phase_at(self, event: int) -> str:
        """The phase of an event, "" before the first."""
        index = bisect.bisect_right(self.phases, event, key=lambda start: start[0]) - 1
        return self.phases[index][1] if index >= 0 else ""

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak is reached."""
        return self.phase_at(max(self.peak_event, 0))

    def at_peak(self) -> list[Block]:
        """The blocks that are alive at the peak."""
        alive = dict.fromkeys(self.initial)
        for sign, block in self.events[: self.peak_event + 1]:
            if sign > 0:
                alive[block] = None
            else:
                del alive[block]
        return list(alive)

    def breakdown(self) -> dict[str, int]:
        """Bytes of each category at the peak. Sums to the allocator's peak where the snapshot has it, else to ours."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for block in self.at_peak():
            totals[block.category] += block.size
        if self.measured_peak is not None:
            totals["allocator_rounding"] += self.measured_peak - self.peak_bytes
        return totals

    def by_category(self, points: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Event numbers, at most `points`, and the bytes of each category after each: peaks between them are kept."""
        edges = np.unique(np.linspace(0, len(self.allocated), min(points, len(self.allocated)) + 1).astype(int))
        kept = np.array([low + np.argmax(self.allocated[low:high]) for low, high in itertools.pairwise(edges)])
        changes: dict[str, np.ndarray] = {}
        for number, (sign, block) in enumerate(self.events):
            if block.category not in changes:
                changes[block.category] = np.zeros(len(self.events) + 1, np.int64)
            changes[block.category][number + 1] = sign * block.size
        for block in self.initial:
            changes.setdefault(block.category, np.zeros(len(self.events) + 1, np.int64))[0] += block.size
        return kept - 1, {name: np.cumsum(changes[name])[kept] for name in CATEGORIES if name in changes}


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts, all a snapshot has; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise UsageError(f"it holds {module}.{name}, which a memory snapshot has no use for")


def read(path: Path) -> Timeline:
    """The timeline in a snapshot file. Raises `UsageError` with one clear line if it is not one."""
    try:
        with _open(path) as file, _bounded_memory():
            found = timeline(_PlainUnpickler(file).load())
        if not found.peak_bytes:
            raise UsageError("it holds no block of GPU memory")
        return found
    except UsageError as error:
        raise UsageError(f"{path} is not read: {error}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise UsageError(f"{path} is not read: it would take more than {_MAX_READING_BYTES / GIB:g} GiB") from None
    except (EOFError, pickle.UnpicklingError, gzip.zlib.error) as error:
        raise UsageError(f"{path} is no whole pickle: {error}") from error
    except Exception as error:  # a pickle of something else can fail anywhere
        raise UsageError(f"{path} is no memory snapshot of PyTorch ({type(error).__name__}: {error})") from error


def _open(path: Path) -> BinaryIO:
    """The file, unpacked if it is gzipped. Raises `UsageError` if it is too large."""
    file = path.open("rb")
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    unpacked = gzip.GzipFile(fileobj=file) if packed else file
    if _is_larger(unpacked, MAX_FILE_BYTES):
        file.close()
        raise UsageError(f"it is larger than {MAX_FILE_BYTES / GIB:g} GiB; record fewer events (max_entries)")
    unpacked.seek(0)
    return unpacked


def _is_larger(file: BinaryIO, limit: int) -> bool:
    """Whether `file` has more than `limit` bytes; a packed one is unpacked no further than that."""
    left = limit
    while left >= 0 and (chunk := file.read(2**24)):
        left -= len(chunk)
    return left < 0


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process grow by a bounded amount."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    if pages is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + _MAX_READING_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def save(snapshot: dict[str, Any], path: Path) -> None:
    """Write a snapshot as PyTorch does, for pytorch.org/memory_viz and `python -m torch.cuda._memory_viz`."""
    write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(snapshot)))


def timeline(snapshot: dict[str, Any]) -> Timeline:
    """The timeline of the snapshot's busiest GPU. Raises any error if `snapshot` has another form."""
    traces = snapshot["device_traces"]
    device = max(range(len(traces)), key=lambda i: len(traces[i]), default=0)
    trace = traces[device] if traces else []
    ends = _blocks_at_end(snapshot["segments"], device if trace else None)
    blocks, events, times, lives = _replay(trace, ends)
    _check_frames(blocks)
    if sum(block.size for block in blocks) >= _BEYOND_ANY_MEMORY:
        raise ValueError("its sizes are beyond any memory")
    phases, measured_peak = [], None
    for note in snapshot.get("external_annotations") or ():
        kind, *rest = note["name"].split(" ")
        if note.get("stage") != "START":
            continue
        # Another program may name its ranges as it likes.
        if kind == PHASE and len(rest) == 1:
            phases.append((bisect.bisect_left(times, note["time_us"]), rest[0]))
        elif kind == OWNER and len(rest) == 2 and rest[0] in CATEGORIES and _is_number(rest[1]):
            block = _alive_at(lives.get(int(rest[1]), ()), times, note["time_us"])
            if block is not None:
                block.category = rest[0]
        elif kind == PEAK and len(rest) == 1 and _is_number(rest[0]):
            measured_peak = int(rest[0])
    result = Timeline(blocks, events, sorted(phases, key=lambda start: start[0]), measured_peak)
    labelled = any(block.label for block in blocks)
    for block in blocks:
        block.phase = result.phase_at(block.start) if block.start >= 0 else ""
        block.category = block.category or (_by_label if labelled else _by_frames)(block)
    return result


def _blocks_at_end(segments: list[dict[str, Any]], device: int | None) -> dict[int, tuple[int, list]]:
    """Address -> (size, frames) of what is alive when the snapshot is taken."""
    ends = {}
    for segment in segments:
        if device is not None and segment["device"] != device:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] in _LIVE_STATES:
                ends[block.get("address", address)] = (_count(block["size"]), block.get("frames") or ())
            address += _count(block["size"])
    return ends


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < _BEYOND_ANY_MEMORY:
        raise ValueError("a size is no number of bytes")
    return value


def _is_number(text: str) -> bool:
    """Whether `text` is a number that an address or a size can be."""
    return text.isascii() and text.isdigit() and len(text) < 20


def _check_frames(blocks: Sequence[Block]) -> None:
    """Raises `ValueError` if a stack is none. Many blocks share one."""
    for stack in {id(block.frames): block.frames for block in blocks}.values():
        for frame in stack:
            if not (isinstance(frame["name"], str) and isinstance(frame["filename"], str)):
                raise ValueError("a stack has no names")


def _replay(
    trace: list[dict[str, Any]], ends: dict[int, tuple[int, Sequence]]
) -> tuple[list[Block], list[tuple[int, Block]], list[int], dict[int, list[Block]]]:
    """Blocks, events, the time of each event, and the blocks that lay at each address, in order."""
    blocks: list[Block] = []
    events: list[tuple[int, Block]] = []
    times: list[int] = []
    lives: dict[int, list[Block]] = defaultdict(list)
    alive: dict[int, Block] = {}
    for entry in trace:
        action = entry["action"]
        if action == "alloc":
            address = entry["addr"]
            size = -(-_count(entry["size"]) // _BLOCK_BYTES) * _BLOCK_BYTES
            block = Block(size, len(events), entry.get("user_metadata") or "", entry.get("frames") or ())
            blocks.append(block)
            lives[address].append(block)
            alive[address] = block
            events.append((1, block))
        elif action == "free_requested":
            address = entry["addr"]
            block = alive.pop(address, None)
            if block is None:  # allocated before the first event
                block = Block(-(-_count(entry["size"]) // _BLOCK_BYTES) * _BLOCK_BYTES, -1, "", ())
                blocks.append(block)
                lives[address].insert(0, block)
            events.append((-1, block))
        else:
            continue
        time = entry.get("time_us", 0)
        times.append(max(time, times[-1]) if times else time)
    for address, (size, frames) in ends.items():
        if address not in alive:
            block = Block(size, -1, "", frames)
            blocks.append(block)
            lives[address].insert(0, block)
    return blocks, events, times, lives


def _alive_at(lives: Sequence[Block], times: list[int], time: int) -> Block | None:
    """The last of the blocks at one address that was allocated by `time`."""
    found = None
    for block in lives:
        if block.start < 0 or times[block.start] <= time:
            found = block
    return found


# Part of a module's path -> category; the first that fits.
_BY_MODULE = (
    ("rotary_emb", "inputs"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
    ("norm", "norm"),
    ("embed_tokens", "hidden_states"),
    ("layers", "hidden_states"),
    ("model", "inputs"),
)


def _by_label(block: Block) -> str:
    """The category of a block that has no owner, by who asked for it."""
    if block.start < 0:
        return "unattributed"
    if block.phase == "optimizer":
        return "optimizer_temporaries"
    module = block.module
    if module in (GATHER, REDUCE):
        return {GATHER: "gathered_parameters", REDUCE: "gradient_reduction"}[module]
    parts = module.split(".")
    if parts[0] == LOSS_MODULE or parts[-1] == "lm_head":
        return "logits_and_loss"
    # A tied embedding's second gradient, before it is added to the LM head's, and its partial sums.
    if parts[-1] == "embed_tokens" and block.phase == "backward":
        return "gradients"
    for part, category in _BY_MODULE:
        if any(part in name for name in parts):
            return category
    return "unattributed"


# Part of a file's path or of a function's name -> category; the innermost frame that fits any decides.
_BY_NAME = (
    ("/torch/optim/", "optimizer_temporaries"),
    ("cross_entropy", "logits_and_loss"),
    ("CrossEntropy", "logits_and_loss"),
    ("loss", "logits_and_loss"),
    ("Rotary", "attention"),
    ("attention", "attention"),
    ("Attention", "attention"),
    ("mlp", "mlp"),
    ("swiglu", "mlp"),
    ("norm", "norm"),
)


def _by_frames(block: Block) -> str:
    """The category of a block in a snapshot without labels, by its stack."""
    for frame in block.frames:
        name, file = frame["name"], frame["filename"]
        for part, category in _BY_NAME:
            if part in name or (part in file and part.startswith("/")):
                return category
    return "unattributed"


def _origin(block: Block) -> str:
    """Who asked for a block, layers of one kind taken together."""
    where = ".".join("*" if part.isdigit() else part for part in block.module.split("."))
    what = " ".join(filter(None, (where, block.operation)))
    if what:
        return what
    frame = next((f for f in block.frames if not _is_plumbing(f["filename"])), None)
    return f"{frame['name']} ({Path(frame['filename']).name}:{frame['line']})" if frame else "-"


def _is_plumbing(file: str) -> bool:
    return not file or "/torch/" in file or file.startswith("??")


def largest(timeline: Timeline, count: int) -> list[tuple[int, int, str, str, str]]:
    """The largest groups of blocks at the peak that one origin asked for: (bytes, blocks, category, phase, origin)."""
    sizes: Counter = Counter()
    blocks: Counter = Counter()
    for block in timeline.at_peak():
        key = (block.category, block.phase or "before", "" if block.start < 0 else _origin(block))
        sizes[key] += block.size
        blocks[key] += 1
    return [(size, blocks[key], *key) for key, size in sizes.most_common(count)]


def breakdown_table(breakdown: dict[str, int]) -> str:
    """Categories of a peak with their bytes and shares; empty ones are left out."""
    peak = sum(breakdown.values())
    return aligned_table(
        [(name.replace("_", " "), format_bytes(n), f"{n / peak:.1%}") for name, n in breakdown.items() if n]
    )


def waterfall(a: dict[str, int], b: dict[str, int]) -> list[tuple[str, int, int, int]]:
    """Category, bytes at the peak of A and of B, and the difference; the differences sum to that of the peaks."""
    return [(name, a[name], b[name], b[name] - a[name]) for name in CATEGORIES if a[name] or b[name]]


def waterfall_table(a: dict[str, int], b: dict[str, int]) -> str:
    """The way from one peak to another, largest change first."""
    rows = sorted(waterfall(a, b), key=lambda row: -abs(row[3]))
    total = ("peak", sum(a.values()), sum(b.values()), sum(b.values()) - sum(a.values()))
    lines = [("at the peak", "A", "B", "B - A")]
    for name, first, second, change in [*rows, total]:
        lines.append((name.replace("_", " "), format_bytes(first), format_bytes(second), f"{change / 2**20:+,.1f} MiB"))
    return aligned_table(lines)


def report(timeline: Timeline, top: int) -> str:
    """The peak, what it is made of, and the blocks that make most of it."""
    breakdown, alive = timeline.breakdown(), timeline.at_peak()
    phase = f" in the {timeline.peak_phase} phase" if timeline.peak_phase else ""
    moment = f"after event {timeline.peak_event + 1:,} of {len(timeline.events):,}"
    head = f"Peak {format_bytes(sum(breakdown.values()))}{phase}, {moment}, {len(alive):,} blocks alive"
    rows = [("largest", "blocks", "for", "allocated in", "by")]
    for size, count, category, started, origin in largest(timeline, top):
        rows.append((format_bytes(size), f"{count:,}", category.replace("_", " "), started, origin))
    return "\n\n".join([head, breakdown_table(breakdown), _left_aligned(rows)])


def _left_aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [cell.rjust(w) if i < 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def main() -> int:
    """Read one snapshot or compare two; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m src.snapshot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("second", type=Path, nargs="?", metavar="file2")
    parser.add_argument("--top", type=int, default=12, help="groups of blocks to list (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the timelines and what the peaks are made of")
    arguments = parser.parse_args()
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # names may be anything
        files = [file for file in (arguments.file, arguments.second) if file is not None]
        timelines = [read(file) for file in files]
        for label, file, found in zip("AB", files, timelines):
            print(f"{f'{label}: ' if len(files) > 1 else ''}{file}", report(found, arguments.top), "", sep="\n")
        if len(files) > 1:
            print(waterfall_table(*(found.breakdown() for found in timelines)))
        if arguments.plot:
            from src.memory_plot import save_plot

            names = [file.name.split(".")[0] for file in files]
            if len(set(names)) < len(names):
                names = list(map(str, files))
            save_plot(dict(zip(names, timelines)), arguments.plot)
            print(f"\nplot     {arguments.plot}")
    except UsageError as error:
        error_line(error)
        return ExitStatus.BAD_ARGUMENTS
    except OSError as error:
        error_line(f"--plot: cannot write {arguments.plot}: {error.strerror}")
        return ExitStatus.BAD_ARGUMENTS
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
