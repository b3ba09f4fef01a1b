"""Runs a grid; survives whatever becomes of a single run, and goes on where it was."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.config import RunConfig
from src.machine import H100
from src.record import Failure, Record, load, save
from src.record.recorder import check_folders, new_record
from src.record.report import report
from src.study.answers import is_measured, numerics, without_its_limit
from src.study.grids import SCRIPTS, Task
from src.study.workers import Job, facts_of, what_happened
from src.utils import GIB, ExitStatus, UsageError, error_line, printable


class Sweep:
    """Runs tasks one after the other in processes of their own."""

    def __init__(self, tasks: Sequence[Task], *, timeout_s: float, every_cell: bool) -> None:
        self._tasks = tasks
        self._timeout_s = timeout_s
        self._every_cell = every_cell
        self._environment: dict[str, Any] | None = None
        self._job: Job | None = None

    def run(self) -> int:
        """Run what has no record yet; returns the exit status."""
        own, skipped = self._finished()
        done = self._ran_under_a_limit() | own
        self._check_machine(done)
        waiting = [task for task in self._tasks if task.config.run_name not in done | skipped]
        for task in waiting:
            check_folders(task.config)
        if done:
            limited = len(done) - len(own)
            note = f", {limited} of them under a memory limit that they never met" if limited else ""
            print(f"{len(done)} of {len(self._tasks)} cells have a record already{note}: not run again")
        failed = 0
        with tqdm(total=len(waiting), unit="cell", disable=None) as progress, contextlib.closing(self):
            for task in waiting:
                progress.set_description(task.label)
                # A prediction costs seconds, and says what a size that does not fit would need.
                every_cell = self._every_cell or task.config.dry_run
                reason = None if every_cell else _too_large(task.config, done)
                started = time.monotonic()
                record = self._infer(task, reason) if reason else self._measure(_without_known_parity(task, done))
                done[task.config.run_name] = record
                failed += record.status == "error"
                progress.write(f"{time.monotonic() - started:6.1f} s  {printable(f'{task.label}: {outcome(record)}')}")
                progress.update()
        for error in skipped.values():
            error_line(f"skipped, not replaced: {error}")
        if failed:
            error_line(f"{failed} cells failed; their records say why, and the next sweep tries them again")
        return ExitStatus.FAILED if failed or skipped else ExitStatus.DONE

    def close(self) -> None:
        """End the processes in which tasks run."""
        if self._job is not None:
            self._job.end()
            self._job = None

    def _finished(self) -> tuple[dict[str, Record], dict[str, UsageError]]:
        """Name of a task -> its record; and of those in whose place there is a file that is no record, what it is."""
        found, strange = {}, {}
        for task in self._tasks:
            try:
                record = finished_record(task.config)
            except UsageError as error:
                strange[task.config.run_name] = error
                continue
            if record is not None:
                found[task.config.run_name] = record
        return found, strange

    def _ran_under_a_limit(self) -> dict[str, Record]:
        """Name of a task without a memory limit -> record of the same run under one that it never met."""
        names = {task.config.run_name for task in self._tasks}
        found = {}
        for folder in {Path(task.config.result_dir) for task in self._tasks}:
            for path in sorted(folder.glob("[!.]*.json")):
                with contextlib.suppress(UsageError):
                    record = without_its_limit(load(path))
                    if record and is_measured(record) and (name := record.run.run_name) in names:
                        found[name] = record
        return found

    def _check_machine(self, done: dict[str, Record]) -> None:
        gpus = {record.environment.gpu for record in done.values() if record.mode == "measured"}
        if gpus - {self._facts()["gpu"]}:
            folder = self._tasks[0].config.result_dir
            raise UsageError(f"{folder} has records of {', '.join(map(str, gpus))}: take another --result_dir")

    def _infer(self, task: Task, reason: str) -> Record:
        return self._write(task, "inferred", "oom", "Inferred", f"not run: {reason} ran out of memory")

    def _write(self, task: Task, mode: str, status: str, kind: str, message: str) -> Record:
        """Record for a task what it could not record itself."""
        environment = self._facts() | {"argv": [SCRIPTS[task.config.script] + ".py", *task.arguments]}
        failure = Failure(type=kind, message=message)
        card = H100.name if task.config.dry_run else None
        record = new_record(task.config, mode, environment, status=status, error=failure, simulated_gpu=card)
        save(record, task.config.record_file, report)
        return record

    def _measure(self, task: Task) -> Record:
        """Run a task and read its record; if it left none, write one that says what happened."""
        started = time.time()
        log = task.config.record_file.with_suffix(".log")
        rank, ending = self._run(task, log)
        mode = "predicted" if task.config.dry_run else {"cuda": "measured", "cpu": "interpreted"}[task.config.device]
        record = _record_since(started, task.config)
        # After a rank is killed, the exchanges of the others fail: what they record is not the cause.
        killed = ending is None or ending < 0
        if record is None or (killed and rank and record.status == "error"):
            kind, message = what_happened(ending, log)
            return self._write(task, mode, "error", kind, rank + message)
        if record.status != "error":
            log.unlink(missing_ok=True)
        return record

    def _run(self, task: Task, log: Path) -> tuple[str, int | None]:
        """Which of several ranks ended the task, and its exit status: negative for a signal, None for too long."""
        log.unlink(missing_ok=True)
        if self._job is None or not self._job.takes(task):
            self.close()
            self._job = Job(task)
        rank, ending = self._job.run(task, log, self._timeout_s)
        if ending != ExitStatus.DONE or not self._job.is_kept:
            self.close()
        return rank, ending

    def _facts(self) -> dict[str, Any]:
        """The environment as a task would record it."""
        if self._environment is None:
            self._environment = facts_of(self._tasks[0].config)
        return self._environment


def _without_known_parity(task: Task, done: dict[str, Record]) -> Task:
    """The task without its `--parity` if it has been measured of the same numerics and sizes: figures find it there."""
    own = _compared(task.config)
    known = any(record.parity is not None and _compared(record.run) == own for record in done.values())
    if not (task.config.parity and known):
        return task
    return dataclasses.replace(task, config=dataclasses.replace(task.config, parity=False))


def _compared(config: RunConfig) -> tuple:
    return numerics(config), config.batch_size, config.seq_length


def _too_large(config: RunConfig, done: dict[str, Record]) -> str | None:
    """The run that shows that `config` does not fit: no larger, otherwise the same, and out of memory.

    The first such one in `done` was run, not inferred: it comes before whatever was inferred from it.
    """
    for name, record in done.items():
        if record.status != "oom":
            continue
        sizes = {size: record.config[size] for size in ("batch_size", "seq_length")}
        smaller = all(size <= getattr(config, field) for field, size in sizes.items())
        if smaller and dataclasses.replace(config, **sizes).run_name == name:
            return name
    return None


def _record_since(moment: float, config: RunConfig) -> Record | None:
    """The record of `config` if it was written since `moment` and says what became of the run."""
    try:
        record = load(config.record_file) if config.record_file.stat().st_mtime >= moment - 1e-2 else None
    except (OSError, UsageError):
        return None
    return record if record and record.run_name == config.run_name else None


def finished_record(config: RunConfig) -> Record | None:
    """The record of a run that ended with a result of its own; failures are tried again.

    Raises `UsageError` if a file stands in its place that is no record: it is not ours to replace.
    """
    if not config.record_file.exists():
        return None
    record = load(config.record_file)
    is_own = record.run_name == config.run_name and record.mode != "inferred"
    return record if is_own and record.status != "error" else None


def outcome(record: Record) -> str:
    """A record in a few words."""
    if record.status == "oom":
        needs = "" if record.peak_memory_bytes is None else f"peak {record.peak_memory_bytes / GIB:,.2f} GiB: "
        return f"{needs}out of memory" + (" (inferred)" if record.mode == "inferred" else "")
    if record.status == "error":
        return f"failed: {record.error.message}"
    peak, speed = record.peak_memory_bytes, record.throughput_tokens_per_s
    words = [] if peak is None else [f"peak {peak / GIB:,.2f} GiB"]
    words += [] if speed is None else [f"{speed:,.0f} tokens/s"]
    step = record.predicted_latency_s
    words += [] if step is None else [f"{step * 1e3:,.1f} ms a step (predicted)"]
    return ", ".join(words) or record.mode
