"""Starts DeepSpeed's launcher and stays with it: `... FLAGS --module src.offload.rank SCRIPT ...`

DeepSpeed starts two launchers, one in the other, and ranks below the second. What this supervisor catches that they
do not:

- A rank that is killed: they end the others and exit with a number. Here one line says which rank, and why.
- A rank that is stopped, or does not come to a collective: they wait for ever, or say nothing of who is missing.
- The inner launcher killed: the outer one exits with status 0, and the ranks run on.
- A signal to the command: they leave their ranks running, or show a traceback. For SIGKILL see `src.offload.rank`.
- A rank that has no time to write its record: the record is kept with what happened.

Standard library only, and no process is forked after anything else was imported.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.offload import job, ranks
from src.offload.command import launcher, port_flags, take_shown_gpus
from src.offload.endings import Cause, seen_to_fall, told_by_launcher
from src.offload.kept_record import keep
from src.utils import ExitStatus, UsageError, error_line

_TICK_S = 0.1  # DeepSpeed's launcher looks once a second; this one sees how a rank ended before it is gone
_LOOK_S = 1  # between looks at every process of the machine: where there were 540, ten a second took 15 % of a core
_SETTLE_S = 10  # in which the launcher's own status tells what the rank's does not
_ENDING_S = 15  # in which the launcher ends the other ranks of one that has told why it failed
_LAST_S = 600  # in which every rank ends after the first; it may have a trace to write
_STOPPED_S = 10
_LATE_S = 3  # between the ranks of a collective that fails
_INTERRUPTED_S = 5  # in which ranks give back what they hold, such as the lock of a compilation
_KILLED_S = 5  # in which the system ends what was killed
_REMOTE_S = 15  # in which pdsh ends the ranks of other machines
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(words: Sequence[str]) -> int:
    """Run the job that DeepSpeed's launcher would run with `words`; its exit status."""
    # From here on they wait until they are asked for. What a shell or nohup has ignored stays so.
    heard = {number for number in _INTERRUPTS if signal.getsignal(number) != signal.SIG_IGN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, signal.SIGCHLD})
    try:
        ranks.check_environment()
        take_shown_gpus(words)
        with port_flags(words) as flags, tempfile.TemporaryDirectory(prefix="offload-job-") as folder:
            return _Supervisor(job.Job(Path(folder)), [*launcher(), *flags, *words], heard, mask).run()
    except UsageError as error:
        error_line(error)
        return ExitStatus.BAD_ARGUMENTS


class _Supervisor:
    def __init__(self, notes: job.Job, command: list[str], heard: set[int], mask: set[int]) -> None:
        self._job, self._heard, self._started = notes, {*heard, signal.SIGCHLD}, time.time()
        self._remote = "--hostfile" in command and "--no_ssh" not in command
        self._codes: dict[int, int] = {}  # how processes ended, as far as the system says, by pid
        self._stopped: dict[int, float] = {}  # since when, by pid
        ranks.adopt_orphans()  # so that everything below stays below, whichever launcher dies
        self._job.note("supervisor", os.getpid())

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            ranks.die_with_parent()

        # In a session of its own: Ctrl-C comes here alone, and the ranks hear what is meant for them.
        self._launcher = subprocess.Popen(
            command,
            env=os.environ | {job.VARIABLE: str(notes.folder)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=prepare,
        )
        self._job.note("group", self._launcher.pid)

    def run(self) -> int:
        """The exit status of the job, of which no process is left."""
        outcome = self._wait()
        if isinstance(outcome, Cause):
            if self._job.claim():
                with contextlib.suppress(OSError):  # the terminal may be what went
                    error_line(outcome.message)
            self._end_gently()
        left = self._end()
        if left:
            error_line(f"the system does not end process {', '.join(map(str, left))}")
        if not isinstance(outcome, Cause):
            return outcome
        keep(self._job, outcome.kind, outcome.message, self._started)
        return outcome.status

    def _wait(self) -> Cause | int:
        """What ends the job, or the status with which the launcher has ended it."""
        processes, looked = {}, -math.inf
        while True:
            heard = signal.sigtimedwait(self._heard, _TICK_S)
            if heard is not None and (number := heard.si_signo) in _INTERRUPTS:
                text = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
                return Cause(text, 128 + number, "Interrupted")
            if heard is not None or time.monotonic() - looked >= _LOOK_S:
                processes, looked = self._look(), time.monotonic()
            else:
                processes = self._look({*processes, *(note["pid"] for note in self._job.ranks().values())})
            outcome = self._fallen() or self._standing_still(processes) or self._waiting()
            if outcome is None and self._launcher_status is not None:
                outcome = self._after_launcher()
            if outcome is not None:
                return outcome

    def _look(self, among: Iterable[int] | None = None) -> dict[int, job.Process]:
        """Every process of the job that has not ended, or each `among` them, by pid; notes how others did."""
        found = job.descendants(os.getpid()) if among is None else job.processes(among)
        self._codes |= {p.pid: p.exit_code for p in found.values() if p.has_ended}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        if self._launcher_status is not None:
            self._launcher.returncode = self._launcher_status
        return {pid: p for pid, p in found.items() if not p.has_ended}

    @property
    def _launcher_status(self) -> int | None:
        return self._codes.get(self._launcher.pid)

    def _status_told(self, rank: int) -> int | None:
        """With which a rank has come to its own end, after it told what there was to tell."""
        return self._job.read(f"rank{rank}.status")

    def _has_ended(self, pid: int) -> bool:
        found = job.process(pid)  # not by its parents: the launchers may have gone just now
        return found is None or found.has_ended

    def _fallen(self) -> Cause | int | None:
        """Of a rank that has ended in the middle of the run, or of one that has told why it failed."""
        begun = self._job.ranks()
        gone = {rank: note["pid"] for rank, note in begun.items() if self._has_ended(note["pid"])}
        told = {rank: self._status_told(rank) for rank in gone}
        if any(told.values()):
            failed = next(status for status in told.values() if status)
            self._wait_for_launcher(_ENDING_S)
            return failed
        # What a rank says with its status is true unless the system says otherwise: it may die while it exits.
        fallen = {rank: pid for rank, pid in gone.items() if told[rank] is None or self._codes.get(pid, 0)}
        if fallen:
            return self._of_fallen(fallen, begun)
        return self._late(begun.keys() - gone.keys(), gone) if gone else None

    def _late(self, left: Set[int], ended: Iterable[int]) -> Cause | None:
        """Of a rank that does not come to its end when others have."""
        moments = [self._job.modified(f"rank{rank}.status") or time.time() for rank in ended]
        if left and time.time() - max(moments) > _LAST_S:
            return Cause(f"rank {min(left)}: did not end within {_LAST_S} s of the others", kind="TimedOut")
        return None

    def _of_fallen(self, fallen: dict[int, int], begun: dict[int, dict[str, Any]]) -> Cause:
        """Of ranks that have ended, by pid, in the middle of the run."""
        is_first = self._job.claim()  # before the others tell that they lost it
        aborted = any(self._codes.get(pid) == -signal.SIGABRT for pid in fallen.values())  # NCCL does so at a time-out
        places = self._places(begun.keys() - fallen.keys()) if aborted else ""
        cause = seen_to_fall({rank: self._codes.get(pid) for rank, pid in fallen.items()})
        if cause is None:
            launcher = self._wait_for_launcher(_SETTLE_S)
            terminated = {rank: self._job.modified(f"rank{rank}.terminated") for rank in fallen}
            cause = told_by_launcher(launcher, terminated, sorted(self._siblings(begun) - begun.keys()))
        cause = replace(cause, message=cause.message + places)
        if is_first:
            error_line(cause.message)
        return cause

    def _siblings(self, begun: dict[int, dict[str, Any]]) -> set[int]:
        """The ranks of this machine, as those say that have begun."""
        return {rank for note in begun.values() for rank in note["here"]}

    def _standing_still(self, processes: dict[int, job.Process]) -> Cause | None:
        """Of a process that somebody has stopped: the others would wait for it for ever."""
        now = time.monotonic()
        self._stopped = {p.pid: self._stopped.get(p.pid, now) for p in processes.values() if p.state == "T"}
        for pid, since in self._stopped.items():
            if now - since > _STOPPED_S:
                ranks_of = {note["pid"]: rank for rank, note in self._job.ranks().items()}
                who = f"rank {ranks_of[pid]}" if pid in ranks_of else f"process {pid} of the job"
                return Cause(f"{who}: stopped by a signal (SIGSTOP) for {_STOPPED_S} s", kind="TimedOut")
        return None

    def _waiting(self) -> Cause | None:
        """Of a rank that did not come to a collective in which others waited until it failed."""
        begun = self._job.ranks()
        waited = {rank: since for rank in begun if (since := self._job.modified(f"rank{rank}.waited"))}
        missing = [rank for rank in begun if rank not in waited]
        if not waited or not missing or time.time() - min(waited.values()) < _LATE_S:
            return None
        text = f"rank {missing[0]}: did not come to where rank {min(waited)} waited for it"
        return Cause(text + self._places(missing), kind="TimedOut")

    def _places(self, of: Iterable[int]) -> str:
        """Where ranks are, as they write when they are asked, for the end of a line."""
        begun, of = self._job.ranks(), sorted(of)
        job.send(signal.SIGUSR1, (begun[rank]["pid"] for rank in of))
        time.sleep(0.5 if of else 0)
        return "".join(job.place(self._job, rank) for rank in of)

    def _wait_for_launcher(self, seconds: float) -> int | None:
        """Its exit status, if it ends in that time."""
        deadline = time.monotonic() + seconds
        while self._launcher_status is None and time.monotonic() < deadline:
            self._look()
            time.sleep(_TICK_S)
        return self._launcher_status

    def _after_launcher(self) -> Cause | int:
        """The launcher has ended, and no rank has told of a failure or was seen to fail."""
        status, begun = self._launcher_status, self._job.ranks()
        if status < 0:
            return Cause(f"DeepSpeed's launcher was {ranks.ending_of(status)}", kind="Killed")
        if status:
            kind = f"DeepSpeed's launcher left with exit status {status}"
            return status if self._remote else Cause(kind)
        done = begun.keys() >= self._siblings(begun) and all(self._status_told(rank) == 0 for rank in begun)
        if done and (begun or self._remote):
            return ExitStatus.DONE
        # The outer launcher takes the status of an inner one that a signal has ended for 0.
        return Cause("DeepSpeed's inner launcher was ended by a signal", kind="Killed")

    def _end_gently(self) -> None:
        """Let ranks give back what they hold, and pdsh end those of other machines."""
        if self._remote:
            job.send(signal.SIGTERM, [self._launcher.pid])
            self._wait_for_launcher(_REMOTE_S)
        pids = {note["pid"] for note in self._job.ranks().values()}
        deadline = time.monotonic() + _INTERRUPTED_S
        job.send(signal.SIGINT, pids & set(self._look()))
        while pids & set(self._look()) and time.monotonic() < deadline:
            time.sleep(_TICK_S)

    def _end(self) -> list[int]:
        """Kill what is left of the job; what outlives that."""
        deadline, quiet = time.monotonic() + _KILLED_S, 0
        while quiet < 2 and time.monotonic() < deadline:  # one look may miss a process whose parent dies meanwhile
            left = self._look()
            quiet = 0 if left else quiet + 1
            job.send(signal.SIGKILL, left)
            time.sleep(_TICK_S)
        return list(left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
