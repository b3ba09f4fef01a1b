"""What a run prints, and what its .txt file has: the record's figures for a person."""

import math

from src.config import RunConfig
from src.explain.report import breakdown_table
from src.record.record import Failure, Parity, Record
from src.utils import MIB, aligned_table, format_bytes


def report(record: Record) -> str:
    """What ran, and its figures."""
    config = record.run
    where = f"on {record.environment.gpu or 'the CPU'}"
    if record.simulated_gpu:
        where = f"predicted for {record.simulated_gpu}"
    kernels = ", ".join(config.kernels) or "none"
    lines = [
        f"{config.model_name}, {config.description}, {where}",
        f"Liger kernels: {kernels}; gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}",
    ]
    if config.dtype == "fp16":
        lines.append("fp16: through a loss scaler; its optimizer state underflows, so the loss means little")
    return "\n".join([*lines, "", summary(record)])


def files_written(config: RunConfig) -> str:
    """The files of this run, a line each."""
    files = {"record": config.record_file, "snapshot": config.snapshot_file, "logs": config.log_folder}
    return "\n".join(f"{name:<8} {path}" for name, path in files.items() if path.exists())


def summary(record: Record) -> str:
    """The record's figures as aligned text."""
    parts = []
    if record.peak_memory_bytes is not None or record.losses is not None:
        parts.append(_figures(record))
    if record.peak_breakdown:
        parts.append(breakdown(record))
    if record.parity is not None:
        parts.append(parity_table(record.parity))
    if record.status == "oom":
        parts.append(_oom_summary(record.error))
    if record.status == "error":
        parts.append(f"Failed: {record.error.message}")
    return "\n\n".join(parts)


def breakdown(record: Record) -> str:
    """What the peak is made of and, of a measured run, how its peak differs from that of the timed steps."""
    text = "At the peak:\n" + breakdown_table(record.peak_breakdown)
    if record.mode != "measured":
        return text
    difference = (record.breakdown_peak_bytes - record.peak_memory_bytes) / MIB
    return f"{text}\nrecorded in one more step, whose peak differs by {difference:+,.1f} MiB"


def parity_table(parity: Parity) -> str:
    """How far the run's gradients are from fp32's, beside Hugging Face's code in the same dtype, and the verdict."""
    rows = [("Gradients against fp32", "whole gradient", "worst parameter", "", "loss")]
    for name, error in (("this run", parity.run), ("Hugging Face", parity.hugging_face)):
        numbers = [_percent(value) for value in (error.gradient, error.worst, error.loss)]
        rows.append((f"  {name}, {parity.dtype}", numbers[0], numbers[1], error.worst_parameter, numbers[2]))
    verdict = "as exact as Hugging Face's code" if parity.agrees else "WRONG: less exact than Hugging Face's code"
    times = "" if parity.ratio is None else f" ({parity.ratio:.2f} times its error)"
    return f"{aligned_table(rows, 'lrrlr')}\nParity, {parity.tokens:,} tokens: {verdict}{times}"


def _percent(value: float | None) -> str:
    return (
        "not finite"
        if value is None or not math.isfinite(value)
        else f"{value:.3%}"
        if value > 1e-4
        else f"{value:.1e}"
    )


def _figures(record: Record) -> str:
    rows = []
    if record.peak_memory_bytes is not None:
        note = f"in the {record.peak_phase} phase" + (", fullest GPU" if record.processes > 1 else "")
        rows.append(("Peak memory allocated", format_bytes(record.peak_memory_bytes), note))
    if record.peak_reserved_bytes is not None:
        rows.append(("Peak memory reserved", format_bytes(record.peak_reserved_bytes), "by PyTorch's allocator"))
    if record.latency_s is not None:
        rows += _speed_rows(record)
    if record.host_peak_bytes is not None:
        rows.append(("Host memory peak", format_bytes(record.host_peak_bytes), ""))
    if record.predicted_host_bytes is not None:
        share = format_bytes(record.predicted_host_bytes // record.processes)
        rows.append(("Host memory peak", format_bytes(record.predicted_host_bytes), f"{share} for each GPU"))
    if record.losses is not None:
        rows.append(("Loss", _number(record.loss), "last timed step"))
        rows.append(("Gradient norm", _number(record.grad_norm), "one more step"))
    return aligned_table(rows, "lrl")


def _number(value: float | None) -> str:
    """NaN and infinity are null in a file, and mean the same."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"


def _speed_rows(record: Record) -> list[tuple[str, str, str]]:
    steps, iqr, peak = len(record.step_seconds), record.latency_iqr_s, record.mfu_peak_flops
    spread = "" if iqr is None else f", IQR {iqr * 1e3:.2f} ms"
    rows = [
        ("Memory used on the card", format_bytes(record.device_used_bytes), "driver's view, all programs"),
        ("Latency", f"{record.latency_s * 1e3:,.2f} ms", f"median of {steps} steps{spread}"),
        ("Throughput", f"{record.throughput_tokens_per_s:,.0f} tokens/s", ""),
    ]
    if record.floor_s is not None:
        ratio = f"the step takes {record.latency_s / record.floor_s:.2f} times as long"
        rows.append(("Floor", f"{record.floor_s * 1e3:,.2f} ms", ratio))
    if peak is None:
        return [*rows, ("MFU", "n/a", "no data-sheet peak known for this GPU")]
    return [*rows, ("MFU", f"{record.mfu:.1%}", f"of {peak / 1e12:,.0f} TFLOP/s (data sheet, dense)")]


def _oom_summary(error: Failure) -> str:
    rows = [
        ("Out of memory", ""),
        ("asked for", format_bytes(error.requested_bytes)),
        ("free", format_bytes(error.free_bytes)),
        ("already allocated", format_bytes(error.allocated_bytes)),
    ]
    return aligned_table(rows)
