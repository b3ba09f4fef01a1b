"""Keeps the record of a job whose ranks were ended before they could."""

import contextlib
from pathlib import Path

from src.offload.job import Job
from src.utils import error_line


def keep(job: Job, kind: str, message: str, started: float) -> None:
    """Complete and save the draft that the first rank has left, if there is one.

    What a rank has saved of this run stays, unless it is an error: ranks that lost another one blame the network.
    """
    draft = job.read("draft")
    if draft is None:
        return
    from src import records  # now that nothing of the job is left; it needs no torch

    path = Path(draft["path"])
    record, told = draft["record"], None
    with contextlib.suppress(Exception):  # there is none, or it cannot be read
        told = records.load(path)
        if path.stat().st_mtime >= started:
            record = told
    if record is told and record["status"] in ("ok", "oom"):
        return
    # A run that was not allowed to end says nothing against the one before it.
    if kind == "Interrupted" and told is not None and told["status"] == "ok":
        return
    record |= {"status": "error", "error": {"type": kind, "message": message}}
    try:
        records.save(record, path)
    except OSError as error:
        error_line(f"{path} cannot be written: {error.strerror}")
