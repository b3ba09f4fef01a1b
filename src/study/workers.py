"""The processes in which the runs of a study work.

In other processes because Liger's patches cannot be undone and a GPU that ran out of memory starts clean; forked from
one that has imported everything, because importing takes longer than most runs. CUDA cannot be used in a fork of a
process that has initialised it, as some libraries do while they are imported (torchao): then each run starts afresh. A
run on several GPUs always does, as under a launcher: its imports are few beside building the engine.
"""

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from src import machine
from src.cli import run_config
from src.config import RunConfig
from src.experiment import Script
from src.offload.ranks import die_with_parent, ending_of
from src.study.grids import Task, script
from src.utils import ExitStatus, UsageError, error_line

INTERRUPTIONS = (signal.SIGTERM, signal.SIGHUP)  # end a study as Ctrl-C does


@dataclass(frozen=True)
class _Worker:
    """A process in which tasks run."""

    pid: int
    connection: Connection  # takes tasks, gives their exit statuses
    name: str  # which rank it is, to begin a message with; nothing if it is the only one

    def give(self, task: Task, log: Path) -> None:
        """Let it run `task`; it may have died."""
        with contextlib.suppress(OSError):
            self.connection.send((task, log))

    def ending(self) -> int | None:
        """Exit status of its task, or how the process died; None while neither has happened."""
        if self.connection.poll():
            with contextlib.suppress(EOFError, OSError):
                return self.connection.recv()
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None


class Job:
    """The processes, one a GPU, in which a task runs, and those after it where the script can share what it built."""

    def __init__(self, task: Task) -> None:
        self.is_kept = script(task.config.script).main_for_many is not None
        self._settings = task.config.but_for_sizes
        self._workers: list[_Worker] = []
        sys.stdout.flush()
        sys.stderr.flush()
        for variables in _ranks_of(task.config):
            ours, theirs = Pipe()
            starts_afresh = bool(variables) or torch.cuda.is_initialized()
            pid = _spawn(task.config.script, theirs, variables) if starts_afresh else _fork()
            if pid == 0:
                ours.close()
                _serve(script(task.config.script), theirs)
            theirs.close()
            self._workers.append(_Worker(pid, ours, f"rank {variables['RANK']}: " if variables else ""))

    def takes(self, task: Task) -> bool:
        """Whether `task` can run in these processes."""
        return self.is_kept and task.config.but_for_sizes == self._settings

    def run(self, task: Task, log: Path, timeout_s: float) -> tuple[str, int | None]:
        """Name and exit status of the first rank that fails, or of the last; no name and None if it takes too long."""
        for worker in self._workers:
            worker.give(task, log)
        waiting, deadline = list(self._workers), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for worker in list(waiting):
                ending = worker.ending()
                if ending is not None:
                    waiting.remove(worker)
                    if ending or not waiting:
                        return worker.name, ending
            time.sleep(0.02)
        return "", None

    def end(self) -> None:
        """End the processes, and what they started."""
        for worker in self._workers:
            _end_group(worker.pid)
            worker.connection.close()


def _ranks_of(config: RunConfig) -> list[dict[str, str]]:
    """What a launcher tells each process of a job by its environment; nothing to a single one."""
    count = getattr(config, "world_size", 1)
    if count == 1 or config.plans:  # one process simulates one of the ranks
        return [{}]
    from src.ds_utils import free_port

    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("RANK", "LOCAL_RANK")
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **dict.fromkeys(names[0], str(count))}
    # As `ranks.share_cores`, for which it is too late in a process that imports PyTorch first.
    job |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(machine.core_share(count)))}
    return [job | dict.fromkeys(names[1], str(rank)) for rank in range(count)]


def _fork() -> int:
    """`os.fork`, at whose end an interruption is heard: raised in one of the hooks that run in it, it would be lost."""
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *INTERRUPTIONS})
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of other threads. There are only those of OpenBLAS, which wait for work.
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _spawn(script_name: str, connection: Connection, variables: dict[str, str]) -> int:
    """Start this module as a program, which serves one script at its end of the connection; its process."""
    os.set_inheritable(connection.fileno(), True)
    command = [sys.executable, "-m", __name__, script_name, str(connection.fileno())]
    return os.posix_spawn(sys.executable, command, os.environ | variables, setsid=True)


def _serve(of: Script, connection: Connection) -> NoReturn:
    """In a worker: be the script, for one task after the other."""
    try:
        if os.getsid(0) != os.getpid():
            os.setsid()  # so that whatever it starts can be ended with it
        die_with_parent()
        for number in INTERRUPTIONS:
            signal.signal(number, signal.SIG_DFL)
        main = of.main if of.main_for_many is None else of.main_for_many()
        while True:
            connection.send(_run_task(of, main, *connection.recv()))
    except (EOFError, BrokenPipeError):
        pass  # the study has ended
    except BaseException as error:
        error_line(f"{type(error).__name__}: {error}")
    finally:
        os._exit(ExitStatus.FAILED)  # what the parent registered for its own end is not the child's


def _run_task(of: Script, main: Callable[..., int], task: Task, log: Path) -> int:
    """Exit status of `main` for a task, with what it prints going to `log`."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{of.name}.py", *task.arguments]
    status = int(run_config(main, task.config))
    sys.stdout.flush()
    return status


def _end_group(child: int) -> None:
    """End what is left of a child and of what it started."""
    for kill in (os.killpg, os.kill):  # it may not have come to lead a group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def what_happened(ending: int | None, log: Path) -> tuple[str, str]:
    """Type and message of the error of a task that left no record."""
    if ending is None:
        return "TimedOut", "it took too long and was ended"
    if ending < 0:
        return "Killed", ending_of(ending)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return "Failed", f"exit status {ending}: {told.removeprefix('error: ') or 'it printed nothing'}"


def facts_of(config: RunConfig) -> dict[str, Any]:
    """The environment that a run of `config` would record, from a child process: reading it initialises CUDA."""
    if torch.cuda.is_initialized():
        return machine.environment(on_gpu=not config.dry_run and config.device == "cuda")
    reading, writing = os.pipe()
    child = _fork()
    if child == 0:
        try:
            with os.fdopen(writing, "w") as file:
                json.dump(machine.environment(on_gpu=not config.dry_run and config.device == "cuda"), file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise UsageError("the GPU cannot be used: run the script by itself to see why")
    return json.loads(text)


if __name__ == "__main__":
    _serve(script(sys.argv[1]), Connection(int(sys.argv[2])))
