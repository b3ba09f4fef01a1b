"""Fills a record while an experiment runs, and keeps it whichever way the run ends."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from src import runtime
from src.allocator import SimulatedOutOfMemory
from src.config import RunConfig, config_of
from src.measure import Measurement, PhasePeaks
from src.offload import ranks
from src.records import EMPTY, first_line, load, processes, save, summary
from src.snapshot import Timeline
from src.utils import UsageError, check_writable, median_and_iqr, print_rank0


def new_record(mode: str, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """A record of nothing yet."""
    return EMPTY | {
        "run_name": config.run_name,
        "script": config.script,
        "mode": mode,
        "config": config.to_dict(),
        "environment": runtime.environment(device),
    }


def add_measurement(record: dict[str, Any], measurement: Measurement) -> None:
    """Fill in what the timed steps showed; times only if they are a GPU's."""
    record |= {
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "peak_reserved_bytes": measurement.reserved_bytes,
        "device_used_bytes": measurement.device_used_bytes,
        "allocation_retries": measurement.allocation_retries,
        "host_peak_bytes": runtime.host_peak_bytes(),
        "losses": measurement.losses,
        "loss": measurement.losses[-1],
    }
    if record["mode"] == "measured":
        _add_speed(record, measurement.step_seconds)


def _add_speed(record: dict[str, Any], step_seconds: list[float]) -> None:
    config = config_of(record)
    latency, iqr = median_and_iqr(step_seconds)
    peak = runtime.peak_flops(record["environment"]["gpu"], config.dtype)
    peak = None if peak is None else peak * processes(record)
    record |= {
        "step_seconds": step_seconds,
        "latency_s": latency,
        "latency_iqr_s": iqr,
        "throughput_tokens_per_s": config.tokens_per_step / latency,
        "mfu": None if peak is None else record["model_flops_per_step"] / latency / peak,
        "mfu_peak_flops": peak,
    }


def add_phases(record: dict[str, Any], phases: PhasePeaks) -> None:
    """Fill in what the extra step showed."""
    load, peak = record["load_peak_bytes"], record["peak_memory_bytes"]
    in_load = load is not None and peak is not None and load > peak
    record |= {
        "grad_norm": phases.grad_norm,
        "peak_phase": "load" if in_load else phases.phase,
        "phase_peak_bytes": phases.peak_bytes,
    }


def add_breakdown(record: dict[str, Any], timeline: Timeline) -> None:
    """Fill in what the peak of the recorded step is made of."""
    breakdown = timeline.breakdown()
    record |= {"peak_breakdown": breakdown, "breakdown_peak_bytes": sum(breakdown.values())}


@contextlib.contextmanager
def recording(record: dict[str, Any], config: RunConfig, *, keeps: bool = True) -> Iterator[None]:
    """Save `record` whichever way the block ends; running out of GPU memory ends the block, not the program.

    Any other exception is recorded as an error and goes on. Raises `UsageError` at once, with nothing recorded, if a
    folder the run writes to cannot be written. Of several ranks one `keeps` its record; any may have to tell of a
    failure, because the launcher ends the others.
    """
    if keeps:
        check_folders(config)
        ranks.leave_draft(record, config.record_file)
    watch, started = OutOfMemoryWatch(), time.time()
    if record["mode"] == "measured" and torch.cuda.is_available():
        watch.attach()
    try:
        yield
        record["status"] = "ok"
    except UsageError:
        raise
    except torch.OutOfMemoryError as error:
        record |= {"status": "oom", "error": _error(error) | watch.facts}
    except SimulatedOutOfMemory as error:
        record |= {"status": "oom", "error": _error(error) | error.facts}
    except Exception as error:
        # A rank that fails ends, and the others fail for want of it: that is no other failure.
        elsewhere = _failure_since(started, config.record_file)
        record |= elsewhere or {"status": "error", "error": _error(error)}
        if record["status"] != "oom":
            raise
    finally:
        if {None: False, "ok": keeps}.get(record["status"], True):
            _save_or_print(record, config.record_file)


def _failure_since(moment: float, path: Path) -> dict[str, Any] | None:
    """Status and error of the record in `path` if it was written since `moment` and tells of a failure."""
    if not path.exists() or path.stat().st_mtime < moment:
        return None
    told = load(path)
    return {name: told[name] for name in ("status", "error")} if told["status"] in ("oom", "error") else None


class OutOfMemoryWatch:
    """Remembers what the CUDA allocator was asked for, and what was free, when it last gave up."""

    def __init__(self) -> None:
        self.facts: dict[str, int | None] = {"requested_bytes": None, "free_bytes": None, "allocated_bytes": None}

    def attach(self) -> None:
        """Watch from now on, for as long as the process lives."""
        torch._C._cuda_attach_out_of_memory_observer(self._observe)

    def _observe(self, device: int, requested: int, allowed: int, driver_free: int) -> None:
        # What this process could still have had: the driver's free memory, less under a cap, and its own unused blocks.
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free = min(driver_free, allowed - reserved) + reserved - allocated
        self.facts = {"requested_bytes": requested, "free_bytes": free, "allocated_bytes": allocated}


def _error(error: BaseException) -> dict[str, Any]:
    return {"type": type(error).__name__, "message": first_line(error)}


def check_folders(config: RunConfig) -> None:
    """Make the folders that a run writes to. Raises `UsageError` if it cannot write there."""
    plans = config.dry_run or config.find_max is not None
    needed = {"result_dir": True, "snapshot_dir": not config.find_max, "log_dir": not plans}
    for name in (name for name in needed if needed[name]):
        folder = getattr(config, name)
        if not folder and name != "result_dir":
            continue
        try:
            check_writable(Path(folder))
        except OSError as error:
            raise UsageError(f"--{name}: cannot write to {folder!r}: {error.strerror}") from error


def _save_or_print(record: dict[str, Any], path: Path) -> None:
    """Save the record; a full disk costs the file, not the figures."""
    try:
        save(record, path)
    except OSError:
        print_rank0(summary(record))
        raise
