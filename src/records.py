"""One JSON file per run: what was asked for, what was measured, on which machine. Base units: bytes and seconds.

A record is a plain dict with every key of `EMPTY`. What was not measured is None, never a guess. Files are written
atomically, so a record that exists is whole.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.config import RunConfig, config_of
from src.explain.report import breakdown_table
from src.utils import (
    MIB,
    ExitStatus,
    UsageError,
    aligned_table,
    format_bytes,
    write_atomically,
)

SCHEMA = 1

EMPTY: dict[str, Any] = {
    "schema": SCHEMA,
    "run_name": None,
    "script": None,  # "all_gpu" | "deepspeed"
    "status": None,  # "ok" | "oom" | "error"
    "mode": None,  # "measured" | "predicted" | "interpreted"; "inferred": not run, a smaller one ran out of memory
    "config": None,
    "simulated_gpu": None,  # of a prediction: the GPU that was simulated
    "implementations": None,  # which function or class implements each kernel's part of the model
    "steps_before": None,  # optimizer steps the weights had had: more than 0 where a sweep goes on with an engine
    "skipped_steps": None,  # of the run's steps, those whose fp16 gradients overflowed, so that no weight changed
    "peak_memory_bytes": None,
    "peak_reserved_bytes": None,
    "allocation_retries": None,  # times the GPU or its limit was full and the allocator gave its cache back
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
    "peak_breakdown": None,  # category -> bytes at the peak of the step below, see src/explain/
    "breakdown_peak_bytes": None,  # peak of the step in which the breakdown was recorded
    "peak_phase": None,
    "phase_peak_bytes": None,
    "kernel_check": None,  # of an interpreted run: one entry per strategy
    "frontier": None,  # of --find_max: what was searched, the limit, and the largest size that fits
    "environment": None,
    "error": None,
}


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
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


def load(path: Path) -> dict[str, Any]:
    """Read a record back. Raises `UsageError` if the file is not one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable record: {first_line(error)}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UsageError(f"{path} is not a record of schema {SCHEMA}")
    return EMPTY | record


def load_all(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every record below `folders`, in the order of their paths.

    Raises `UsageError` if a folder is none, and if a file does not say what ran where and what became of it.
    """
    paths: list[Path] = []
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is no folder")
        # A hidden one is being written, or was when its program was killed.
        paths += sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    return [load_whole(path) for path in paths]


def load_whole(path: Path) -> dict[str, Any]:
    """`load`, of a record that says what ran where and what became of it. Raises `UsageError` if it does not."""
    record = load(path)
    try:
        whole = "gpu" in record["environment"] and record["status"] in ("ok", "oom", "error") and bool(record["mode"])
        config_of(record)
    except (KeyError, TypeError, ValueError, UsageError):
        whole = False
    if not whole:
        raise UsageError(f"{path} is not a whole record: it does not say what ran, where, and what became of it")
    return record


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
        note = f"in the {record['peak_phase']} phase" + (", fullest GPU" if processes(record) > 1 else "")
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


def processes(record: dict[str, Any]) -> int:
    """Processes that took part in the run, one a GPU."""
    return record["config"].get("world_size", 1)


def _oom_summary(error: dict[str, Any]) -> str:
    rows = [
        ("Out of memory", ""),
        ("asked for", format_bytes(error["requested_bytes"])),
        ("free", format_bytes(error["free_bytes"])),
        ("already allocated", format_bytes(error["allocated_bytes"])),
    ]
    return aligned_table(rows)
