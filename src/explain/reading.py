"""Reads snapshot files. Nothing in a file is executed, and a file made to crash or to fill the machine is one line.

The file is unpickled by a process of its own, which answers with columns of numbers (src/explain/replay.py). A tuple
nested two million deep runs Python's own stack over, which no check from inside can prevent: it ends that process.
"""

import contextlib
import gc
import gzip
import io
import os
import pickle
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from src.explain.replay import Recorded, recorded
from src.explain.stacks import printable
from src.explain.timeline import Timeline, timelines_of
from src.utils import GIB, UsageError, write_atomically

MAX_FILE_BYTES = 2 * GIB  # of a snapshot, unpacked
_MAX_READING_BYTES = 8 * GIB  # of the reading process: a file of 800 MB takes 3 GiB, a hostile one any amount
_ROOT = Path(__file__).resolve().parents[2]
_FAILED = 2  # exit status of the reading process that has said on stderr why


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts, all a snapshot has; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise UsageError(f"it holds {module}.{name}, which a memory snapshot has no use for")


class _Bounded(io.RawIOBase):
    """A file that refuses to be longer than a limit; what is packed is unpacked no further than that."""

    def __init__(self, file: Any, limit: int) -> None:
        self._file, self._limit, self._left = file, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise UsageError(f"it is larger than {self._limit / GIB:g} GiB; record fewer events (max_entries)")
        return count


def read(path: Path) -> Timeline:
    """The timeline of the fullest GPU in a snapshot file. Raises `UsageError` with one clear line if it is not one."""
    return read_all(path)[0]


def read_all(path: Path, patterns: dict[str, str] | None = None) -> list[Timeline]:
    """The timeline of each GPU, the fullest first. `patterns`: see `timelines_of`. Raises `UsageError` as `read`."""
    try:
        with _open(path) as file:
            columns = _in_a_process(file)
        found = timelines_of(columns, patterns or {})
        if not any(timeline.known_peak_bytes or timeline.refused for timeline in found):
            raise UsageError("it holds no block of GPU memory")
        return found
    except UsageError as error:
        raise UsageError(f"{path} is not read: {error}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    """The file, if it is a regular one: a FIFO would wait for ever, and a device need not end."""
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError("it is no regular file")
    return file


def _in_a_process(file: BinaryIO) -> Recorded:
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from src.explain import reading; reading.answer()"
    done = subprocess.run([sys.executable, "-P", "-c", code], stdin=file, capture_output=True, check=False)
    if done.returncode == 0:
        return pickle.loads(done.stdout)  # our own process wrote it, not the file
    if done.returncode == _FAILED and done.stderr:
        raise UsageError(done.stderr.decode(errors="replace").strip().splitlines()[-1])
    raise UsageError("reading it ended the process that read it: it is nested too deep, or memory ran out")


def answer() -> None:
    """Be the reading process: a snapshot file is stdin, and `Recorded` or one line goes out."""
    _bound_memory()
    try:
        columns = load(sys.stdin.buffer)
    except UsageError as error:
        sys.stderr.write("\n" + printable(" ".join(str(error).split())))
        os._exit(_FAILED)
    pickle.dump(columns, sys.stdout.buffer, protocol=5)
    sys.stdout.flush()
    os._exit(0)  # freeing millions of objects one by one would take seconds


def load(file: BinaryIO) -> Recorded:
    """The snapshot in an open file as columns. Raises `UsageError` if it is none."""
    packed = file.peek(2)[:2] == b"\x1f\x8b"
    unpacked = gzip.GzipFile(fileobj=file) if packed else file
    gc.disable()  # it would walk all objects again and again, and finds nothing: a snapshot has no cycles
    try:
        return recorded(_PlainUnpickler(io.BufferedReader(_Bounded(unpacked, MAX_FILE_BYTES), 2**20)).load())
    except UsageError:
        raise
    except MemoryError:
        raise UsageError(f"it would take more than {_MAX_READING_BYTES / GIB:g} GiB") from None
    except (EOFError, OSError, pickle.UnpicklingError, zlib.error) as error:
        raise UsageError(f"it is no whole pickle: {error}") from error
    except Exception as error:  # a pickle of something else can fail anywhere
        raise UsageError(f"it is no memory snapshot of PyTorch ({type(error).__name__}: {error})") from error
    finally:
        gc.enable()


def _bound_memory() -> None:
    """A file of ten bytes can ask for a table of 64 GiB: let that be a MemoryError, not the end of other programs."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limits, macOS does not keep them
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = _MAX_READING_BYTES if hard < 0 else min(hard, _MAX_READING_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def save(snapshot: dict[str, Any], path: Path) -> None:
    """Write a snapshot as PyTorch does, for pytorch.org/memory_viz and `python -m torch.cuda._memory_viz`.

    The page reads pickles up to protocol 4, and Python 3.14 would write protocol 5.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(snapshot, protocol=4)))
