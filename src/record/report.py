"""What a run prints, and what its .txt file has: the record's figures for a person."""

import contextlib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from src.config import RunConfig
from src.explain.report import breakdown_table
from src.record.record import Failure, Frontier, KernelCheck, Parity, Record, load
from src.techniques import TECHNIQUES
from src.utils import MIB, UsageError, aligned_table, format_bytes


def report(record: Record) -> str:
    """What ran, where, whether it was measured, and its figures: what is printed, and stands in the .txt."""
    config = record.answered
    lines = [
        f"{origin(record)}: {config.model_name}, {config.description}",
        f"Liger kernels: {', '.join(config.kernels) or 'none'}; "
        f"gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}",
    ]
    if config.dtype == "fp16" and record.script == "all_gpu":  # the other keeps weights and states in fp32 beside
        lines.append("fp16: through a loss scaler; its optimizer state underflows, so the loss means little")
    return "\n".join([*lines, "", summary(record)])


def origin(record: Record) -> str:
    """Where a record's figures come from."""
    if record.mode == "measured":
        return f"Measured on {record.environment.gpu or 'a GPU'}"
    if record.mode == "interpreted":
        return "Checked on a CPU, the kernels in Triton's interpreter"
    card = record.simulated_gpu or "a GPU that is not there"
    return f"Predicted for {card}, not measured" if record.mode == "predicted" else "Not run: inferred"


def files_written(config: RunConfig) -> str:
    """The files of this run, a line each, and the command that compares it with another."""
    files = {"record": config.record_file, "snapshot": config.snapshot_file, "logs": config.log_folder}
    lines = [f"{name:<8} {path}" for name, path in files.items() if path.exists()]
    if config.record_file.exists():
        other = last_comparable(config.record_file) or "OTHER.json"
        lines.append(
            f"compare  {shlex.join(['python', '-m', 'src.study', 'compare', str(other), str(config.record_file)])}"
        )
    return "\n".join(lines)


def last_comparable(path: Path) -> Path | None:
    """The last record beside this one of the same model, sizes and machine with other techniques; None if none is."""
    try:
        own = load(path)
    except UsageError:
        return None
    sizes = "_".join(path.stem.split("_")[:2])  # a run name begins with them
    for other in sorted(path.parent.glob(f"{sizes}_*.json"), key=_written, reverse=True):
        with contextlib.suppress(UsageError):
            if is_comparable(own, load(other)):
                return other
    return None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_comparable(a: Record, b: Record) -> bool:
    """Whether two runs tell what a technique brings: both measured, or both predicted, otherwise the same.

    How many steps they took makes no difference.
    """

    def setting(r: Record) -> tuple:
        where = r.script, r.mode, r.environment.gpu, r.simulated_gpu, r.processes
        return *where, r.run.batch_size, r.run.seq_length, r.run.unusual(*TECHNIQUES, "iterations", "warmup")

    differs = any(getattr(a.run, name) != getattr(b.run, name) for name in TECHNIQUES)
    return setting(a) == setting(b) and b.status == "ok" and differs


def summary(record: Record) -> str:
    """The record's figures as aligned text."""
    parts = []
    if record.frontier is not None:
        parts.append(_answer(record.frontier))
    if record.peak_memory_bytes is not None or record.losses is not None:
        parts.append(_figures(record))
    if record.kernel_check:
        parts.append(kernel_check_table(record.kernel_check))
    if record.peak_breakdown:
        parts.append(breakdown(record))
    if record.parity is not None:
        parts.append(parity_table(record.parity))
    if record.error is not None:
        parts.append(_oom_summary(record.error) if record.status == "oom" else f"Failed: {record.error.message}")
    return "\n\n".join(parts)


def _answer(frontier: Frontier) -> str:
    """What a search found."""
    measured = "" if frontier.measured is None else f", measured on this GPU: {frontier.measured:,}"
    room = f"{format_bytes(frontier.limit_bytes)} of allocator memory"
    if frontier.searched == "world_size":
        return f"Fewest GPUs, a power of two, that it fits with {room} each: {frontier.predicted or 'none'}"
    return f"Largest {frontier.searched} that fits {room}: {frontier.predicted or 'none'}{measured}"


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


def kernel_check_table(rows: Sequence[KernelCheck]) -> str:
    """Each set of techniques that was checked beside Hugging Face's code, which is the first; relative differences."""
    lines = [("Liger kernels", "last loss", "loss differs", "gradient differs", "peak of live tensors", "")]
    for row in rows:
        is_baseline = row is rows[0]
        lines.append(
            (
                " + ".join(row.kernels) or "none (Hugging Face)",
                f"{row.losses[-1]:.6f}",
                "-" if is_baseline else f"{row.loss_difference:.1e}",
                "-" if is_baseline else f"{row.gradient_difference:.1e}",
                format_bytes(row.peak_memory_bytes),
                "" if is_baseline else "agrees" if row.agrees else "DIFFERS",
            )
        )
    return aligned_table(lines, "lrrrrl")


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
        notes = [f"in the {record.peak_phase} phase"] if record.peak_phase else []
        notes += ["fullest GPU"] if record.processes > 1 else []
        rows.append(("Peak memory allocated", format_bytes(record.peak_memory_bytes), ", ".join(notes)))
        if record.load_peak_bytes is not None and record.load_peak_bytes > record.peak_memory_bytes:
            rows.append(("Peak while building", format_bytes(record.load_peak_bytes), "more than in any step"))
    if record.peak_reserved_bytes is not None:
        rows.append(("Peak memory reserved", format_bytes(record.peak_reserved_bytes), "by PyTorch's allocator"))
    if record.latency_s is not None:
        rows += _speed_rows(record)
    if record.predicted_latency_s is not None:
        rows += _predicted_speed_rows(record)
    if record.predicted_floor_s is not None:
        told = f"a bound from below, not the step's time; rates: {record.predicted_floor_rates}"
        rows.append(("Floor, predicted", f"{record.predicted_floor_s * 1e3:,.1f} ms", told))
    if record.host_peak_bytes is not None:
        rows.append(("Host memory peak", format_bytes(record.host_peak_bytes), ""))
    if record.predicted_host_bytes is not None:
        share = format_bytes(record.predicted_host_bytes // record.processes)
        rows.append(("Host memory peak", format_bytes(record.predicted_host_bytes), f"{share} for each GPU"))
    if record.losses is not None:
        rows.append(("Loss", _number(record.loss), "last timed step"))
    if record.grad_norm is not None:  # missing if gradients go before a step ends, or --phases 0
        rows.append(("Gradient norm", _number(record.grad_norm), "one more step"))
    return aligned_table(rows, "lrl")


def _number(value: float | None) -> str:
    """NaN and infinity are null in a file, and mean the same."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"


def _speed_rows(record: Record) -> list[tuple[str, str, str]]:
    steps, iqr, peak = len(record.step_seconds or ()), record.latency_iqr_s, record.mfu_peak_flops
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


def _predicted_speed_rows(record: Record) -> list[tuple[str, str, str]]:
    seconds = record.predicted_latency_s
    parts = f"GPU {record.predicted_gpu_s * 1e3:,.1f} ms, CPU {record.predicted_cpu_s * 1e3:,.1f} ms"
    if record.predicted_bound == "launches":
        parts += ": bound by launches, which differ from run to run"
    return [
        ("Latency, predicted", f"{seconds * 1e3:,.1f} ms", parts),
        ("Throughput, predicted", f"{record.answered.tokens_per_step / seconds:,.0f} tokens/s", record.predicted_rates),
    ]


def _oom_summary(error: Failure) -> str:
    rows = [("Out of memory", ""), ("asked for", format_bytes(error.requested_bytes))]
    if error.reserved_bytes is None:  # a record of an earlier version
        rows.append(("free, in pieces of any size", format_bytes(error.free_bytes)))
    else:
        unused = error.reserved_bytes - error.allocated_bytes
        rows += [
            ("free beside what is reserved", format_bytes(error.free_bytes - unused)),
            ("reserved, unused, in pieces", format_bytes(unused)),
            ("  the largest of them", format_bytes(error.largest_gap_bytes)),
        ]
    return aligned_table([*rows, ("allocated", format_bytes(error.allocated_bytes))])
