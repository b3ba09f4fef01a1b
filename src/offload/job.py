"""What the processes of a job tell each other: notes in a folder that the supervisor of `src.offload.launch` makes.

Standard library only: a rank reads it before it imports anything that could touch a GPU.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "OFFLOAD_JOB"  # names the folder; ranks that pdsh starts on another machine have none
GPUS_VARIABLE = "OFFLOAD_GPUS"  # CUDA's names of the GPUs that the ranks are to see, if the job was shown some


@dataclass(frozen=True)
class Job:
    """The folder of notes. Each note is written once and whole."""

    folder: Path

    def note(self, name: str, value: Any) -> None:
        """Leave `value` under `name`."""
        temporary = self.folder / f".{name}.{os.getpid()}"
        with contextlib.suppress(OSError):  # the job has ended meanwhile, or the disk is full: no reason to fail
            temporary.write_text(json.dumps(value, default=str))
            temporary.replace(self.folder / name)

    def read(self, name: str) -> Any:
        """The note under `name`; None if there is none."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def modified(self, name: str) -> float | None:
        """When the note was left, as `time.time()` has it; None if there is none, or nothing in it."""
        with contextlib.suppress(OSError):
            found = (self.folder / name).stat()
            return found.st_mtime if found.st_size else None
        return None

    def claim(self) -> bool:
        """Whether nobody has told yet why the job ends: from now on somebody has."""
        try:
            os.close(os.open(self.folder / "told", os.O_CREAT | os.O_EXCL))
        except (FileExistsError, FileNotFoundError):  # the folder goes when the job has ended
            return False
        except OSError:  # a full disk: better twice than never
            pass
        return True

    def ranks(self) -> dict[int, dict[str, Any]]:
        """Of each rank that has begun on this machine: its `pid`, and the ranks that are to be `here`."""
        numbers = sorted(int(path.stem[4:]) for path in self.folder.glob("rank*.begun"))
        begun = {number: self.read(f"rank{number}.begun") for number in numbers}
        return {number: note for number, note in begun.items() if note is not None}


def current() -> Job | None:
    """The job that this process belongs to, if it has a supervisor on this machine."""
    folder = os.environ.get(VARIABLE)
    return Job(Path(folder)) if folder and os.path.isdir(folder) else None


@dataclass(frozen=True)
class Process:
    """A line of /proc/PID/stat."""

    pid: int
    parent: int
    state: str  # T: stopped, Z: has ended, and its parent has not asked how
    exit_code: int  # of one that has ended: negative for a signal

    @property
    def has_ended(self) -> bool:
        return self.state in "ZX"


def process(pid: int) -> Process | None:
    """What the system says of a process; None if there is none, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # before it stands the program's name, which may hold anything
    return Process(pid, int(fields[1]), fields[0], os.waitstatus_to_exitcode(int(fields[49])))


def processes(pids: Iterable[int]) -> dict[int, Process]:
    """What the system says of each that there is, by pid."""
    return {pid: found for pid in pids if (found := process(pid)) is not None}


def descendants(ancestor: int) -> dict[int, Process]:
    """Every process below `ancestor`, in whatever session, by pid."""
    names = [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []
    every = processes(map(int, names)).values()
    below, parents = {}, {ancestor}
    while parents:
        children = {p.pid: p for p in every if p.parent in parents and p.pid not in below}
        below |= children
        parents = set(children)
    return below


def send(number: int, pids: Iterable[int]) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill_below(ancestor: int) -> bool:
    """Kill every process below `ancestor`; whether any was left."""
    left = [p.pid for p in descendants(ancestor).values() if not p.has_ended]
    send(signal.SIGKILL, left)
    return bool(left)


def place(job: Job, rank: int) -> str:
    """Where a rank was when it was asked, for the end of a line; nothing if it has not answered."""
    with contextlib.suppress(OSError, StopIteration):
        lines = (job.folder / f"rank{rank}.where").read_text().splitlines()
        last = next(line for line in lines if " File " in line)
        return f"; rank {rank} was in {last.replace(' File ', '').strip()}"
    return ""
