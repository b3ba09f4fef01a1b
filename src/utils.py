"""Small helpers that know nothing of experiments, nor of torch: reading and drawing results needs none."""

import atexit
import enum
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

MIB = 2**20
GIB = 2**30


class UsageError(Exception):
    """A request that cannot be carried out as given. Its message says what to do; scripts exit with status 2."""


class ExitStatus(enum.IntEnum):
    """What a script tells the shell."""

    DONE = 0
    FAILED = 1
    BAD_ARGUMENTS = 2
    OUT_OF_MEMORY = 3
    INTERRUPTED = 130


def is_rank0() -> bool:
    """Whether this process speaks and writes for the whole job."""
    return int(os.environ.get("RANK", "0")) == 0


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_ranks() -> int:
    """Processes of this job on this machine; launchers name it differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def print_rank0(*args: object, sep: str = " ") -> None:
    """Print once per job, not once per process."""
    if is_rank0():
        print(*args, sep=sep, flush=True)


def keep_out_of_garbage_collection() -> None:
    """Let the collector pass over all that exists now: walking DeepSpeed's objects would take a fifth of a second."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # the interpreter frees them when it ends


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is no less than `number`."""
    return 1 << (number - 1).bit_length()


def median_and_iqr(values: Sequence[float]) -> tuple[float, float | None]:
    """Median and interquartile range (linear interpolation); the range of fewer than two values is None."""
    if len(values) < 2:
        return statistics.median(values), None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), third - first


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:60]}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(folder: Path) -> None:
    """Make `folder` and a file in it, so that a run does not find out at its end. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def format_bytes(count: int | None) -> str:
    """`count` in MiB; 'n/a' for a figure that was not measured."""
    return "n/a" if count is None else f"{count / MIB:,.1f} MiB"


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` with columns padded to one width each; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def error_line(message: object) -> None:
    """One line on stderr, however many the message has."""
    print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
