"""One JSON file per run: what was asked for, what was measured, on which machine. Base units: bytes and seconds.

A record is a plain dict with every key of `EMPTY`. What was not measured is None, never a guess. Files are written
atomically, so a record that exists is whole.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from src import runtime
from src.allocator import SimulatedOutOfMemory
from src.config import RunConfig, UsageError, config_of
from src.measure import Measurement, PhasePeaks
from src.snapshot import Timeline, breakdown_table
from src.utils import (
    MIB,
    ExitStatus,
    aligned_table,
    check_writable,
    format_bytes,
    median_and_iqr,
    print_rank0,
    write_atomically,
)

SCHEMA = 1

EMPTY: dict[str, Any] = {
    "schema": SCHEMA,
    "run_name": None,
    "script": None,  # "all_gpu" | "deepspeed"
    "status": None,  # "ok" | "oom" | "error"
    "mode": None,  # "measured" | "predicted" | "interpreted"
    "config": None,
    "simulated_gpu": None,  # of a prediction: the GPU that was simulated
    "implementations": None,  # which function or class implements each kernel's part of the model
    "peak_memory_bytes": None,
    "peak_reserved_bytes": None,
    "device_used_bytes": None,
    "host_peak_bytes": None,
    "load_peak_bytes": None,  # peak while building the model, before the first step
    "step_seconds": None,
    "latency_s": None,
    "latency_iqr_s": None,
    "throughput_tokens_per_s": None,
    "model_flops_per_step": None,
    "mfu": None,
    "mfu_peak_flops": None,  # the peak that mfu is relative to, of all GPUs
    "floor_s": None,  # under offloading: no step can be faster on this machine, see src/floor.py
    "floor": None,  # what the floor is made of
    "losses": None,
    "loss": None,  # of the last timed step
    "grad_norm": None,
    "peak_breakdown": None,  # category -> bytes at the peak of the step below, see src/snapshot.py
    "breakdown_peak_bytes": None,  # peak of the step in which the breakdown was recorded
    "peak_phase": None,
    "phase_peak_bytes": None,
    "kernel_check": None,  # of an interpreted run: one entry per strategy
    "frontier": None,  # of --find_max: what was searched, the limit, and the largest size that fits
    "environment": None,
    "error": None,
}


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
    peak = None if peak is None else peak * _processes(record)
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
        _check_folders(config)
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
        # A rank that runs out of memory ends, and the others fail for want of it: that is no other failure.
        elsewhere = _out_of_memory_since(started, config.record_file)
        record |= elsewhere or {"status": "error", "error": _error(error)}
        if elsewhere is None:
            raise
    finally:
        if {None: False, "ok": keeps}.get(record["status"], True):
            _save_or_print(record, config.record_file)


def _out_of_memory_since(moment: float, path: Path) -> dict[str, Any] | None:
    """Status and error of the record in `path` if it was written since `moment` and tells of too little memory."""
    if not path.exists() or path.stat().st_mtime < moment:
        return None
    told = load(path)
    return {"status": "oom", "error": told["error"]} if told["status"] == "oom" else None


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
    return {"type": type(error).__name__, "message": _first_line(error)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record and beside it, as the original did, its printed figures as text."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    write_atomically(path.with_name(path.stem + ".txt"), lambda temporary: temporary.write_text(summary(record) + "\n"))


def _save_or_print(record: dict[str, Any], path: Path) -> None:
    """Save the record; a full disk costs the file, not the figures."""
    try:
        save(record, path)
    except OSError:
        print_rank0(summary(record))
        raise


def load(path: Path) -> dict[str, Any]:
    """Read a record back. Raises `UsageError` if the file is not one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable record: {_first_line(error)}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UsageError(f"{path} is not a record of schema {SCHEMA}")
    return EMPTY | record


def _check_folders(config: RunConfig) -> None:
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


def exit_status(record: dict[str, Any]) -> int:
    """The status of a program whose result is this record."""
    return ExitStatus.OUT_OF_MEMORY if record["status"] == "oom" else ExitStatus.DONE


def report(record: dict[str, Any], config: RunConfig) -> str:
    """What a run prints: what ran, and its figures."""
    kernels = ", ".join(config.strategy.kernels) or "none"
    simulated = record["simulated_gpu"]
    where = f"predicted for {simulated}" if simulated else f"on {record['environment']['gpu'] or 'the CPU'}"
    lines = [
        f"{config.model_name}, {config.description}, {where}",
        f"Liger kernels: {kernels}; gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}",
        "",
        summary(record),
    ]
    if config.dtype == "fp16":
        lines.insert(2, "fp16: through a loss scaler; its optimizer state underflows, so the loss means little")
    return "\n".join(lines)


def files_written(config: RunConfig) -> str:
    """The files of this run, a line each."""
    files = {"record": config.record_file, "snapshot": config.snapshot_file, "logs": config.log_folder}
    return "\n".join(f"{name:<8} {path}" for name, path in files.items() if path.exists())


def summary(record: dict[str, Any]) -> str:
    """The record's figures as aligned text."""
    parts = []
    if record["peak_memory_bytes"] is not None or record["losses"] is not None:
        parts.append(_figures(record))
    if record["peak_breakdown"] is not None:
        parts.append(breakdown(record))
    if record["status"] == "oom":
        parts.append(_oom_summary(record["error"]))
    if record["status"] == "error":
        parts.append(f"Failed: {record['error']['message']}")
    return "\n\n".join(parts)


def breakdown(record: dict[str, Any]) -> str:
    """What the peak is made of and, of a measured run, how its peak differs from that of the timed steps."""
    text = "At the peak:\n" + breakdown_table(record["peak_breakdown"])
    if record["mode"] != "measured":
        return text
    difference = (record["breakdown_peak_bytes"] - record["peak_memory_bytes"]) / MIB
    return f"{text}\nrecorded in one more step, whose peak differs by {difference:+,.1f} MiB"


def _figures(record: dict[str, Any]) -> str:
    rows = []
    if record["peak_memory_bytes"] is not None:
        note = f"in the {record['peak_phase']} phase" + (", fullest GPU" if _processes(record) > 1 else "")
        rows.append(("Peak memory allocated", format_bytes(record["peak_memory_bytes"]), note))
    if record["peak_reserved_bytes"] is not None:
        rows.append(("Peak memory reserved", format_bytes(record["peak_reserved_bytes"]), "by PyTorch's allocator"))
    if record["latency_s"] is not None:
        rows += _speed_rows(record)
    if record["host_peak_bytes"] is not None:
        rows.append(("Host memory peak", format_bytes(record["host_peak_bytes"]), ""))
    if record["losses"] is not None:
        rows.append(("Loss", _number(record["loss"]), "last timed step"))
        rows.append(("Gradient norm", _number(record["grad_norm"]), "one more step"))
    width = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return "\n".join(f"{name:<{width[0]}}  {value:>{width[1]}}  {note}".rstrip() for name, value, note in rows)


def _number(value: float | None) -> str:
    """NaN and infinity are null in a file, and mean the same."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"


def _speed_rows(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    steps, iqr, peak = len(record["step_seconds"]), record["latency_iqr_s"], record["mfu_peak_flops"]
    spread = "" if iqr is None else f", IQR {iqr * 1e3:.2f} ms"
    rows = [
        ("Memory used on the card", format_bytes(record["device_used_bytes"]), "driver's view, all programs"),
        ("Latency", f"{record['latency_s'] * 1e3:,.2f} ms", f"median of {steps} steps{spread}"),
        ("Throughput", f"{record['throughput_tokens_per_s']:,.0f} tokens/s", ""),
    ]
    if record["floor_s"] is not None:
        ratio = f"the step takes {record['latency_s'] / record['floor_s']:.2f} times as long"
        rows.append(("Floor", f"{record['floor_s'] * 1e3:,.2f} ms", ratio))
    if peak is None:
        return [*rows, ("MFU", "n/a", "no data-sheet peak known for this GPU")]
    return [*rows, ("MFU", f"{record['mfu']:.1%}", f"of {peak / 1e12:,.0f} TFLOP/s (data sheet, dense)")]


def _processes(record: dict[str, Any]) -> int:
    return record["config"].get("world_size", 1)


def _oom_summary(error: dict[str, Any]) -> str:
    rows = [
        ("Out of memory", ""),
        ("asked for", format_bytes(error["requested_bytes"])),
        ("free", format_bytes(error["free_bytes"])),
        ("already allocated", format_bytes(error["allocated_bytes"])),
    ]
    return aligned_table(rows)
