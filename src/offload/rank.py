"""Runs a script as a rank of a job: `python -m src.offload.rank SCRIPT ...`, as DeepSpeed's launcher starts it.

The script runs in this very process, which has imported nothing but the standard library before. A thread beside it
catches what DeepSpeed's launcher does not: that launcher starts ranks and forgets them when it is killed itself, and
nothing ends them when the command that a user or a batch system started is killed.
"""

import contextlib
import faulthandler
import os
import runpy
import select
import shutil
import signal
import sys
import threading
import time
import traceback

from src.offload import job, ranks
from src.offload.kept_record import keep
from src.utils import ExitStatus, UsageError, error_line

_BY_DEEPSPEED = "CROSS_RANK"  # a variable that only DeepSpeed's launcher sets
_LOOK_S = 1  # between looks, where the system cannot wait for processes that are nobody's children

_KEEPING_S = 5


def main() -> int:
    """The script's exit status."""
    here = job.current()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what runs in its background
    if here is not None:
        _register(here)
    if gpus := os.environ.get(job.GPUS_VARIABLE):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # in place of DeepSpeed's numbers from 0
    _watch(here)
    sys.argv = sys.argv[1:]
    status = _run(sys.argv[0])
    sys.stdout.flush()
    if here is not None:
        here.note(f"rank{ranks.rank()}.status", status)
    return status


def _run(script: str) -> int:
    """Run the script; what it does not tell itself is told here, such as a library that is missing."""
    try:
        ranks.check_environment()
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        if isinstance(left.code, str):
            ranks.tell(left.code)
            return ExitStatus.FAILED
        return int(left.code or 0)
    except KeyboardInterrupt:
        ranks.tell("interrupted")
        return ExitStatus.INTERRUPTED
    except UsageError as error:
        ranks.tell(error)
        return ExitStatus.BAD_ARGUMENTS
    except BaseException as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        ranks.tell(f"{ranks.name()}{type(error).__name__}: {error}")
        return ExitStatus.FAILED
    return ExitStatus.DONE


def _register(here: job.Job) -> None:
    """Say which process this rank is, and be ready to say where it is: SIGUSR1 writes that, even out of a C call."""
    number = ranks.rank()
    where = (here.folder / f"rank{number}.where").open("w")
    faulthandler.register(signal.SIGUSR1, file=where, all_threads=False)
    # The launcher terminates the ranks that have not failed: this tells them from the one that has.
    terminated = (here.folder / f"rank{number}.terminated").open("w")
    faulthandler.register(signal.SIGTERM, file=terminated, all_threads=False, chain=True)
    size, place = (int(os.environ.get(name) or default) for name, default in (("LOCAL_SIZE", 1), ("LOCAL_RANK", 0)))
    here.note(f"rank{number}.begun", {"pid": os.getpid(), "here": list(range(number - place, number - place + size))})


def _watch(here: job.Job | None) -> None:
    """End this process with its supervisor or, where it has none, with its launcher."""
    if here is not None:
        end, pid = _end_job, here.read("supervisor")
    elif _BY_DEEPSPEED in os.environ:
        end, pid = _end_here, _launcher()
    else:
        return

    def watch() -> None:
        _wait_for(pid)
        end(here)

    threading.Thread(target=watch, daemon=True).start()


def _launcher() -> int | None:
    """This rank's parent, unless it has been killed already: who adopted the rank is in another process group."""
    parent = os.getppid()
    with contextlib.suppress(ProcessLookupError):
        return parent if parent and os.getpgid(parent) == os.getpgrp() else None
    return None


def _wait_for(pid: int | None) -> None:
    """Return when the process has ended, at once if there is none; no look before disturbs a measurement."""
    try:
        ending = os.pidfd_open(pid)
    except (ProcessLookupError, TypeError):
        return
    except (AttributeError, OSError):  # another system than Linux, or an old one
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                time.sleep(_LOOK_S)
        return
    waiting = select.poll()
    waiting.register(ending, select.POLLIN)
    waiting.poll()


def _end_job(here: job.Job) -> None:
    """The supervisor was killed: what it started is a process group, launchers, stopped ranks and all."""

    def kill() -> None:
        job.kill_below(os.getpid())
        if here_group == os.getpgrp():
            os.killpg(here_group, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    here_group, started = here.read("group"), here.modified("supervisor")
    threading.Timer(_KEEPING_S, kill).start()  # whatever becomes of the rank that keeps the record
    if here.claim():
        message = "the command that started this job was killed; its ranks are ended"
        error_line(message)
        keep(here, "Killed", message, started)
        shutil.rmtree(here.folder, ignore_errors=True)
        kill()


def _end_here(_: None) -> None:
    """The launcher of a rank that has no supervisor is gone."""
    ranks.tell(f"{ranks.name()}its launcher is gone")
    job.kill_below(os.getpid())
    os._exit(ExitStatus.FAILED)


if __name__ == "__main__":
    sys.exit(main())
