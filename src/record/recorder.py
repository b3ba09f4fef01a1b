"""The one door through which everything about a run is written: record, text, snapshot, logs and trace.

recorder = Recorder(config, "measured", runtime.device)
with recorder:                       # running out of memory ends the block, not the program
    experiment = build_experiment(config, runtime)
    recorder.add_model(experiment, runtime)
    recorder.add_measurement(measure(...))
    recorder.add_phases(measure_phases(...))
return recorder.finish(experiment)   # prints the report, records the diagnostic steps; the exit status
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from src import machine
from src.config import RunConfig
from src.experiment import Experiment, OutOfMemory, Runtime
from src.explain.reading import save as save_snapshot
from src.explain.recording import record_step
from src.explain.timeline import Timeline, timeline
from src.measure import Measurement, PhasePeaks
from src.measure.devices import OutOfMemoryWatch
from src.model_utils import flops_per_step, implementations
from src.record.record import Environment, Failure, Parity, Record, load, save
from src.record.report import breakdown, files_written, parity_table, report, summary
from src.record.tensorboard import trace_step, write_tensorboard
from src.utils import UsageError, check_writable, error_line, first_line, print_rank0, quartiles


class Team(Protocol):
    """The processes that take part in a run, one a GPU."""

    keeps: bool  # whether this one writes what all of them showed

    def measurement(self, own: Measurement) -> Measurement: ...
    def phases(self, own: PhasePeaks) -> PhasePeaks: ...
    def largest(self, own: int | None) -> int | None: ...
    def total(self, own: int) -> int: ...
    def tell_out_of_memory(self, config: RunConfig) -> None: ...
    def leave_draft(self, record: Record, config: RunConfig) -> None: ...


class Alone:
    """A single process: what it showed is what the run showed."""

    keeps = True

    def measurement(self, own: Measurement) -> Measurement:
        return own

    def phases(self, own: PhasePeaks) -> PhasePeaks:
        return own

    def largest(self, own: int | None) -> int | None:
        return own

    def total(self, own: int) -> int:
        return own

    def tell_out_of_memory(self, config: RunConfig) -> None:
        pass

    def leave_draft(self, record: Record, config: RunConfig) -> None:
        pass


class Recorder:
    """Opens, fills and finishes the record of one run."""

    def __init__(self, config: RunConfig, mode: str, device: torch.device, team: Team | None = None) -> None:
        self.config = config
        self.record = new_record(config, mode, machine.environment(on_gpu=device.type == "cuda"))
        self.measurement: Measurement | None = None
        self._team = team or Alone()
        self._watch = OutOfMemoryWatch()
        self._started = time.time()

    def __enter__(self) -> Self:
        """Raises `UsageError`, with nothing recorded, if a folder that the run writes to cannot be written."""
        if self._team.keeps:
            check_folders(self.config)
            self._team.leave_draft(self.record, self.config)
        if self.record.mode == "measured" and torch.cuda.is_available():
            self._watch.attach()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Save the record, whichever way the block ends.

        Running out of GPU memory is a result. Any other exception is recorded and goes on, but for a `UsageError`:
        nothing has run. Any rank may have to tell of a failure, because the launcher ends the others.
        """
        if isinstance(error, UsageError) or (error is not None and not isinstance(error, Exception)):
            return False
        if error is None:
            self.record.status = "ok"
        elif isinstance(error, torch.OutOfMemoryError):
            self._fail("oom", error, self._watch.facts)
        elif isinstance(error, OutOfMemory):
            self._fail("oom", error, error.facts)
        else:
            self._fail("error", error, {})
            # After a rank has failed, the others' exchanges with it fail, too: the first failure is the cause.
            self._take_earlier_failure()
        if self._team.keeps or self.record.status != "ok":
            self._save_or_print()
        return self.record.status != "error"

    def _fail(self, status: str, error: Exception, facts: dict[str, Any]) -> None:
        self.record.status = status
        self.record.error = Failure(type=type(error).__name__, message=first_line(error), **facts)

    def _take_earlier_failure(self) -> None:
        path = self.config.record_file
        told = _record_in(path)
        if told is not None and told.status != "ok" and path.stat().st_mtime >= self._started:
            self.record.status, self.record.error = told.status, told.error

    def _save_or_print(self) -> None:
        """Save the record; a full disk costs the file, not the figures, and a failure replaces no result."""
        path = self.config.record_file
        kept = _record_in(path) if self.record.status == "error" else None
        if kept is not None and kept.status != "error":
            error_line(f"{path} keeps the result of an earlier run; this one failed")
            return
        try:
            save(self.record, path, report)
        except OSError:
            print_rank0(summary(self.record))
            raise

    def add_model(self, experiment: Experiment, runtime: Runtime) -> None:
        """Fill in what runs, and the peak while it was built unless it had been built before."""
        model, is_new = experiment.model, not experiment.steps_before
        self.record.steps_before = experiment.steps_before
        self.record.implementations = implementations(model)
        self.record.model_flops_per_step = flops_per_step(model, self.config)
        self.record.load_peak_bytes = self._team.largest(runtime.peak_bytes()[0] if is_new else None)

    def add_measurement(self, own: Measurement) -> None:
        """Fill in what the timed steps showed; times only if they are a GPU's."""
        measurement = self.measurement = self._team.measurement(own)
        record = self.record
        record.peak_memory_bytes = measurement.peak_memory_bytes
        record.peak_reserved_bytes = measurement.reserved_bytes
        record.device_used_bytes = measurement.device_used_bytes
        record.allocation_retries = measurement.allocation_retries
        if not record.steps_before:  # otherwise the peak is of what ran before, too
            record.host_peak_bytes = self._team.total(machine.host_peak_bytes())
        record.losses, record.loss = measurement.losses, measurement.losses[-1]
        if record.mode == "measured":
            self._add_speed(measurement.step_seconds)

    def _add_speed(self, step_seconds: list[float]) -> None:
        record = self.record
        first, latency, third = quartiles(step_seconds)
        peak = machine.peak_flops(record.environment.gpu, self.config.compute_dtype)
        record.step_seconds = step_seconds
        record.latency_s = latency
        record.latency_iqr_s = third - first if len(step_seconds) > 1 else None
        record.throughput_tokens_per_s = self.config.tokens_per_step / latency
        if peak is not None:
            record.mfu_peak_flops = peak * record.processes
            record.mfu = record.model_flops_per_step / latency / record.mfu_peak_flops

    def add_phases(self, own: PhasePeaks) -> None:
        """Fill in what the extra step showed."""
        record, phases = self.record, self._team.phases(own)
        record.grad_norm = phases.grad_norm
        record.peak_phase, record.phase_peak_bytes = phases.phase, phases.peak_bytes

    def add_breakdown(self, found: Timeline) -> None:
        """Fill in what the peak of a recorded step is made of."""
        self.record.peak_breakdown = found.breakdown()
        self.record.breakdown_peak_bytes = sum(self.record.peak_breakdown.values())

    def finish(self, experiment: Experiment | None = None) -> int:
        """Print the report; of a run that ended well on an `experiment`, record the diagnostic steps, too.

        Returns the exit status. The record is safe by now, whatever becomes of those steps, in which every rank takes
        part.
        """
        print_rank0(report(self.record))
        if self.record.status == "oom":
            self._team.tell_out_of_memory(self.config)
        if self.record.status == "ok" and experiment is not None:
            self._diagnose(experiment)
        print_rank0("\n" + files_written(self.config))
        return self.record.exit_status

    def add_parity(self, compare: Callable[[], Parity]) -> None:
        """Fill in and print how exact the gradients are, by `compare`; one rank does it, after everything else.

        Running out of memory there costs the comparison, not what was measured before.
        """
        if self.record.status != "ok" or not self._team.keeps:
            return
        try:
            self.record.parity = compare()
        except torch.OutOfMemoryError:
            print_rank0("\nParity: not measured, the GPU has no room for the comparison")
            return
        save(self.record, self.config.record_file, report)
        print_rank0("\n" + parity_table(self.record.parity))

    def _diagnose(self, experiment: Experiment) -> None:
        on_gpu, found = self.record.mode == "measured", None
        if on_gpu and self.config.breakdown:
            found = self._record_breakdown(experiment)
            print_rank0("\n" + breakdown(self.record))
        if self.config.log_dir:
            if self._team.keeps:
                write_tensorboard(self.config.log_folder, self.record, self.measurement, found)
            trace_step(experiment.step, self.config.trace_file, keeps=self._team.keeps)

    def _record_breakdown(self, experiment: Experiment) -> Timeline:
        snapshot = record_step(experiment)
        found = timeline(snapshot)
        self.add_breakdown(found)
        if self._team.keeps:
            if self.config.snapshot_dir:
                save_snapshot(snapshot, self.config.snapshot_file)
            save(self.record, self.config.record_file, report)
        return found


def new_record(config: RunConfig, mode: str, environment: dict[str, Any], **values: Any) -> Record:
    """A record of nothing yet, or of `values`."""
    return Record(
        run_name=config.run_name,
        script=config.script,
        mode=mode,
        config=config.to_dict(),
        environment=Environment(**environment),
        **values,
    )


def _record_in(path: Path) -> Record | None:
    """The record in a file, None if there is none or it cannot be read."""
    try:
        return load(path)
    except UsageError:
        return None


def check_folders(config: RunConfig) -> None:
    """Make the folders that a run writes to. Raises `UsageError` if it cannot write there."""
    needed = {"result_dir": True, "snapshot_dir": not config.searched, "log_dir": not config.plans}
    for name in (name for name in needed if needed[name]):
        folder = getattr(config, name)
        if not folder and name != "result_dir":
            continue
        try:
            check_writable(Path(folder))
        except OSError as error:
            raise UsageError(f"--{name}: cannot write to {folder!r}: {error.strerror}") from error
