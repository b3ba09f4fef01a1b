"""The first choices of an advice, measured on the GPU that is here, beside what was predicted."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from src.advise import lines
from src.advise.outcomes import Outcome
from src.advise.ranking import Advice
from src.config import RunConfig
from src.record import Record, load
from src.study.grids import Task
from src.study.workers import Job, what_happened
from src.utils import GIB, aligned_table, error_line

FIRST = 3
LONGEST_S = 600  # of a run


class Measured(NamedTuple):
    """A choice, and the record of its run; None: it left none."""

    outcome: Outcome
    record: Record | None

    @property
    def time_error(self) -> float | None:
        """Of the predicted step, relative."""
        if self.record is None or self.record.latency_s is None or self.outcome.seconds is None:
            return None
        return self.outcome.seconds / self.record.latency_s - 1

    @property
    def memory_error(self) -> float | None:
        """Of the predicted peak, relative."""
        if self.record is None or self.record.peak_memory_bytes is None:
            return None
        return self.outcome.peak_bytes / self.record.peak_memory_bytes - 1


def run_here(config: RunConfig) -> Record | None:
    """Run it in a process of its own, forked from this one, which has imported everything. Returns its record."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, result_dir=folder, snapshot_dir="", log_dir="")
        log = Path(folder, "log")
        task = Task(config, tuple(lines.words(config)[2:]))
        job = Job(task)
        try:
            _, ending = job.run(task, log, LONGEST_S)
        finally:
            job.end()
        if config.record_file.exists():
            record = load(config.record_file)
            if record.status == "error" and record.error is not None:
                error_line(record.error.message)
            return record
        error_line(what_happened(ending, log)[1])
        return None


def measure_first(advice: Advice, run: Callable[[RunConfig], Record | None] = run_here) -> list[Measured]:
    """The first choices, measured one after the other, under the memory that was asked about."""
    limit_gib = advice.request.limit_bytes / GIB
    here = [dataclasses.replace(o.config, dry_run=False, memory_limit_gib=limit_gib) for o in advice.pareto[:FIRST]]
    return [Measured(outcome, run(config)) for outcome, config in zip(advice.pareto, here)]


def measured_report(found: list[Measured], card: str) -> str:
    """Predicted and measured figures side by side, and a caution if they are not of one GPU; `card` was asked about."""
    gpus = sorted({own.record.environment.gpu for own in found if own.record is not None} - {None})
    header = ["measured here", "peak GiB", "predicted", "off", "ms a step", "predicted", "off"]
    table = aligned_table([header, *map(_row, found)], "lrrrrrr")
    other = f"; the advice is for an {card}, so the times are not comparable" if gpus and gpus != [card] else ""
    return f"{table}\n\nMeasured on: {', '.join(gpus) or 'nothing ran'}{other}"


def _row(own: Measured) -> list[str]:
    record, outcome = own.record, own.outcome
    peak = None if record is None else record.peak_memory_bytes
    time = None if record is None else record.latency_s
    status = {"ok": "", "oom": " (out of memory)"}.get("" if record is None else record.status, " (failed)")
    return [
        outcome.choice.name + status,
        "" if peak is None else f"{peak / GIB:.2f}",
        f"{outcome.peak_bytes / GIB:.2f}",
        _percent(own.memory_error),
        "" if time is None else f"{time * 1e3:,.1f}",
        "not known" if outcome.seconds is None else f"{outcome.seconds * 1e3:,.1f}",
        _percent(own.time_error),
    ]


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.1%}"
