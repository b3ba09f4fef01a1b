"""One of several processes of a job: however it ends, one line says which and why, and nothing of it stays behind.

Launchers only know a status, and they look at their ranks once a second. Needs no torch.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from src.utils import ExitStatus, error_line

_GRACE_S = 10  # in which a launcher ends the other ranks of a job that fails
_NEXT_S = 3  # a launcher that terminates a rank comes next to the process that watches it
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>
_WATCHED = {signal.SIGCHLD, signal.SIGTERM}


def world_size() -> int:
    """Processes of this job, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def name() -> str:
    """Which rank this is, to begin a line with; nothing if it is the only one."""
    return f"rank {os.environ.get('RANK', '0')}: " if world_size() > 1 else ""


def is_first_here() -> bool:
    """Whether this rank speaks for those of its machine that fail as it does."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0


def give_way() -> None:
    """Before telling what another rank tells: wait for the launcher, which will have ended this one meanwhile."""
    if world_size() > 1:
        time.sleep(_GRACE_S)


def ending_of(status: int) -> str:
    """How a process ended, in words; `status` as `os.waitstatus_to_exitcode` has it."""
    if status >= 0:
        return f"left in the middle of the run with exit status {status}"
    number = -status
    hint = "; the system may have had too little host memory" if number == signal.SIGKILL else ""
    return f"ended by {signal.Signals(number).name}{hint}"


def die_with_parent() -> None:
    """Let the system end this process if the one that forked it is killed; Linux can."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


@contextmanager
def watched() -> Iterator[None]:
    """Run the block in a fork of this process, which itself only waits, and tells how the block ended if that cannot.

    For ranks of several; a single process has somebody who looks at it. What the block tells of its own failure is not
    told again. Enter it before there are threads, and before anything asks for a GPU: CUDA cannot be used in a fork of
    a process that did.
    """
    if world_size() == 1:
        yield
        return
    launcher = os.getppid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    reading, writing = os.pipe()
    rank = os.fork()
    if rank:
        os.close(writing)
        os._exit(_watch(rank, reading, launcher))
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(reading)
    yield
    os.write(writing, b".")


def _watch(rank: int, reading: int, launcher: int) -> int:
    """Exit status of a job's process whose work `rank` does; it ends with this one."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank hears it too
    while True:
        told = signal.sigtimedwait(_WATCHED, 1)
        terminated = told is not None and told.si_signo == signal.SIGTERM
        ended, status = os.waitpid(rank, os.WNOHANG)
        if ended:
            break
        if terminated:
            if told.si_pid != launcher:
                error_line(f"{name()}{ending_of(-signal.SIGTERM)}")
            return ExitStatus.FAILED
        if os.getppid() != launcher:
            error_line(f"{name()}its launcher is gone")
            return ExitStatus.FAILED
    _kill_orphans()
    ending = os.waitstatus_to_exitcode(status)
    if ending >= 0 and os.read(reading, 1):
        return ending
    # A launcher that ends a job terminates the rank first and then this process, which may hear of both at once.
    by_launcher = ending == -signal.SIGTERM and (terminated or signal.sigtimedwait({signal.SIGTERM}, _NEXT_S))
    if not by_launcher:
        error_line(f"{name()}{ending_of(ending)}")
    return ExitStatus.FAILED


def _kill_orphans() -> None:
    """End what the rank had started, such as a compiler."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        process.kill()
