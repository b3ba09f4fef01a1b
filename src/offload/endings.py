"""Why a job ended, from how its processes did."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from src.offload.ranks import ending_of
from src.utils import ExitStatus

LAUNCHER_ENDED = "DeepSpeed's launcher was ended by a signal"
_TERMINATED = 1  # exit status of DeepSpeed's inner launcher after a signal


@dataclass(frozen=True)
class Cause:
    """Why a job did not come to its own end."""

    message: str
    status: int = ExitStatus.FAILED
    kind: str = "Failed"  # as in a record's error: Killed, TimedOut, Interrupted, ...


def seen_to_fall(codes: Mapping[int, int | None]) -> Cause | None:
    """Of the rank among `codes` that ended by itself; None if none was seen to. The launcher terminates the others."""
    for rank, code in codes.items():
        if code not in (None, -signal.SIGTERM):
            return _ended(rank, code)
    return None


def told_by_launcher(status: int | None, terminated: Mapping[int, float | None], never_begun: Sequence[int]) -> Cause:
    """Of the rank that ended before anybody saw how: the launcher passes its status on.

    It is one that never came to say that it is there, or one that was not `terminated`, which has the moments; or else
    the first that was.
    """
    if status == _TERMINATED:
        return Cause(LAUNCHER_ENDED, kind="Killed")
    by_themselves = [*never_begun, *(rank for rank, moment in terminated.items() if moment is None)]
    rank = by_themselves[0] if by_themselves else min(terminated, key=terminated.get)
    return _ended(rank, status and (status - 256 if status > 128 else status))


def _ended(rank: int, code: int | None) -> Cause:
    how = "has ended; the system does not say how" if code is None else ending_of(code)
    return Cause(f"rank {rank}: {how}", kind="Killed" if code is None or code < 0 else "Failed")
