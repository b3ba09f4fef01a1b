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


def first_to_fall(codes: Mapping[int, int | None], never_begun: Sequence[int], launcher: int | None) -> Cause:
    """Of ranks that have ended, `codes` says how as far as it was seen, the one that did so first.

    The launcher terminates the others, and passes on how the first has ended: that tells of one that was gone before
    anybody saw how, or before it had begun to say that it is there.
    """
    for rank, code in codes.items():
        if code not in (None, -signal.SIGTERM):
            return _ended(rank, code)
    if launcher == _TERMINATED:
        return Cause(LAUNCHER_ENDED, kind="Killed")
    unseen = [*never_begun, *(rank for rank, code in codes.items() if code is None), *codes]
    return _ended(unseen[0], launcher and (launcher - 256 if launcher > 128 else launcher))


def _ended(rank: int, code: int | None) -> Cause:
    how = "has ended; the system does not say how" if code is None else ending_of(code)
    return Cause(f"rank {rank}: {how}", kind="Killed" if code is None or code < 0 else "Failed")
