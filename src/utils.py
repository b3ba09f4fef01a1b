"""Small helpers that know nothing of experiments, nor of torch: reading and drawing results needs none."""

import atexit
import enum
import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

MIB = 2**20
GIB = 2**30


class UsageError(Exception):
    """A request that cannot be carried out as given. Its message says what to do; scripts exit with status 2."""


class HostMemoryError(UsageError):
    """The host has too little memory for a run; a smaller one may fit."""


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


def print_rank0(*args: object, sep: str = " ") -> None:
    """Print once per job, not once per process."""
    if is_rank0():
        print(*args, sep=sep, flush=True)


def error_line(message: object) -> None:
    """One line on stderr, however many the message has, and without what a terminal would obey."""
    print("error:", printable(" ".join(str(message).split())), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` from a file as a terminal or a table may get it: line ends and escape sequences spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def file_name(text: str) -> str:
    """`text`, cut where no file could have it as its name: file systems take 255 bytes, and other parts follow."""
    return text if len(text) < 200 else f"{text[:180]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def keep_out_of_garbage_collection() -> None:
    """Let the collector pass over all that exists now: walking libraries' objects would take a fifth of a second."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # the interpreter frees them when it ends


def ceil_div(numerator: int, denominator: int) -> int:
    """`numerator / denominator`, rounded up."""
    return -(-numerator // denominator)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is no less than `number`."""
    return ceil_div(number, multiple) * multiple


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is no less than `number`."""
    return 1 << (number - 1).bit_length()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile (linear interpolation); of one value, three times that value."""
    if len(values) == 1:
        return (values[0],) * 3
    import statistics  # here, as tempfile below: while this file is read, Ctrl-C is no single line yet

    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place: readers see all of it or nothing.

    Raises OSError that names `path`, as of a full disk.
    """
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:60]}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(folder: Path) -> None:
    """Make `folder` and a file in it, so that a run does not find out at its end. Raises OSError."""
    import tempfile

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def format_bytes(count: int | None) -> str:
    """`count` in MiB; 'n/a' for a figure that was not measured."""
    return "n/a" if count is None else f"{count / MIB:,.1f} MiB"


def aligned_table(rows: Iterable[Sequence[str]], align: str = "") -> str:
    """`rows` in columns of one width; the first is left-aligned and the others right-aligned, or as `align` says.

    `align` has a letter for each column: "l" or "r".
    """
    return _table(rows, align, header=False, form="plain")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table, its columns aligned as in `aligned_table`."""
    lines = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return _table(lines, align, header=True, form="pipe")


def _table(rows: Iterable[Sequence[str]], align: str, *, header: bool, form: str) -> str:
    import tabulate  # takes as long as all else here

    table = [[printable(cell) for cell in row] for row in rows]
    letters = align or "l" + "r" * (len(table[0]) - 1)
    text = tabulate.tabulate(
        table[1:] if header else table,
        headers=table[0] if header else (),
        tablefmt=form,
        colalign=[{"l": "left", "r": "right"}[letter] for letter in letters],
        disable_numparse=True,
        preserve_whitespace=True,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())
