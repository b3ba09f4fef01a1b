"""Keeps the record of a job whose ranks were ended before they could."""

import contextlib
from pathlib import Path

from src.offload.job import Job
from src.utils import UsageError, error_line


def keep(job: Job, kind: str, message: str, started: float) -> None:
    """Complete and save the draft that the first rank has left, if there is one.

    What a rank has saved of this run stays, unless it is an error: ranks that lost another one blame the network.
    """
    draft = job.read("draft")
    if draft is None:
        return
    # Imported now that nothing of the job is left.
    from src.record.record import Failure, Record, load, save
    from src.record.report import report

    path, told = Path(draft["path"]), None
    with contextlib.suppress(UsageError):  # there is none, or it is no record
        told = load(path)
    is_of_this_run = told is not None and path.stat().st_mtime >= started
    # A failure replaces no result, be it of this run or of one before it.
    if told is not None and told.status in ("ok", "oom"):
        return
    record = told if is_of_this_run else Record.model_validate(draft["record"])
    record.status, record.error = "error", Failure(type=kind, message=message)
    try:
        save(record, path, report)
    except OSError as error:
        error_line(f"{path} cannot be written: {error.strerror}")
