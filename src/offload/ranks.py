"""One of several processes of a job: which one it is, and who of them speaks. Needs no torch."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from src.machine import core_share, local_ranks
from src.offload import job
from src.utils import UsageError, error_line

_GRACE_S = 10  # in which a launcher ends the other ranks of a job that fails
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>
_ACCELERATORS = ("", "cpu", "cuda")  # what DS_ACCELERATOR may say; this program runs on no others


def _count(name: str, default: int) -> int:
    """A number that the launcher has put into the environment; `check_environment` tells of one that is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def world_size() -> int:
    """Processes of this job, as the launcher says."""
    return _count("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is."""
    return _count("RANK", 0)


def check_environment(script: str = "deepspeed") -> None:
    """Raises `UsageError` if what a launcher sets cannot be: PyTorch would wait for ranks that never come."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal() and int(text) < 2**16):
            raise UsageError(f"{name} must be a number, got {text!r}: launchers set it; unset it to run without one")
    size = world_size()
    if size == 0 or rank() >= size:
        raise UsageError(f"RANK={rank()} cannot be with WORLD_SIZE={size}: ranks count from 0 to WORLD_SIZE - 1")
    if size > 1 and script != "deepspeed":
        raise UsageError(f"WORLD_SIZE={size}, but this script runs on one GPU: bash run_ds.sh runs on several")
    if 0 in (_count("LOCAL_WORLD_SIZE", 1), _count("LOCAL_SIZE", 1)):
        raise UsageError("LOCAL_WORLD_SIZE and LOCAL_SIZE count the processes of this machine: at least 1")
    accelerator = os.environ.get("DS_ACCELERATOR", "")
    if accelerator not in _ACCELERATORS:
        raise UsageError(f"DS_ACCELERATOR must be cpu, cuda or unset, got {accelerator!r}")


def share_cores() -> None:
    """Keep OpenMP to this rank's share of the cores, unless the environment says how many threads to take.

    PyTorch and DeepSpeed's Adam read it when they are loaded. Without it each of several ranks starts as many threads
    as it may use cores, and they wait for each other: four H200s took eight times as long (doc/scaling.md).
    """
    if local_ranks() > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(core_share(local_ranks())))


def name() -> str:
    """Which rank this is, to begin a line with; nothing if it is the only one."""
    return f"rank {rank()}: " if world_size() > 1 else ""


def is_first_here() -> bool:
    """Whether this rank speaks for those of its machine that fail as it does."""
    return world_size() == 1 or _count("LOCAL_RANK", 0) == 0


def give_way(waited: object = None) -> None:
    """Before telling what another rank tells: wait for the launcher, which will have ended this one meanwhile.

    `waited` is the error of a collective that failed. If no rank has died, the supervisor then looks for the ranks that
    did not come to it.
    """
    if world_size() == 1:
        return
    here = job.current()
    if here is not None and waited is not None:
        here.note(f"rank{rank()}.waited", str(waited))
    with contextlib.suppress(KeyboardInterrupt):  # the supervisor has told, and interrupts who waits
        time.sleep(_GRACE_S)


def tell(message: object) -> None:
    """One line on stderr for the whole job: what the first to tell says. Without a supervisor each rank tells."""
    here = job.current()
    if here is None or here.claim():
        error_line(message)


def leave_draft(record: dict[str, Any], path: Path) -> None:
    """Leave with the supervisor the record that it completes and saves if this job is ended from outside."""
    here = job.current()
    if here is not None:
        here.note("draft", {"path": str(path.resolve()), "record": record})


def ending_of(status: int) -> str:
    """How a process ended, in words; `status` as `os.waitstatus_to_exitcode` has it."""
    if status >= 0:
        return f"left in the middle of the run with exit status {status}"
    number = -status
    hint = "; the system may have had too little host memory" if number == signal.SIGKILL else ""
    return f"ended by {signal_name(number)}{hint}"


def signal_name(number: int) -> str:
    """Such as SIGKILL; real-time signals have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def die_with_parent() -> None:
    """Let the system end this process if the one that started it is killed; Linux can."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of what those below it leave behind; Linux can."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
