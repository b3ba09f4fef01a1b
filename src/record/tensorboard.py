"""TensorBoard logs of a run, and a profiler trace of one extra step in the same folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from src.config import RunConfig
from src.experiment import Mark, Step
from src.explain.plot import figure
from src.explain.timeline import Timeline
from src.measure import Measurement
from src.record.record import Record
from src.techniques import TECHNIQUES
from src.utils import GIB, markdown_table, write_atomically

# Columns of TensorBoard's HPARAMS page, which shows the first five: tag -> (key of the record, divisor).
_RESULTS = {
    "summary/peak_GiB": ("peak_memory_bytes", GIB),
    "summary/step_s": ("latency_s", 1),
    "summary/tokens_per_s": ("throughput_tokens_per_s", 1),
    "summary/mfu": ("mfu", 1),
    "summary/reserved_GiB": ("peak_reserved_bytes", GIB),
    "summary/loss": ("loss", 1),
}


def write_tensorboard(folder: Path, record: Record, measurement: Measurement, timeline: Timeline | None = None) -> None:
    """Scalars per timed step, the configuration as text, hparams with the run's figures, and its memory `timeline`.

    A run that is repeated replaces its own logs. Times are written for measured runs only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    config = record.run
    with SummaryWriter(str(folder)) as writer:
        for i, loss in enumerate(measurement.losses):
            writer.add_scalar("step/loss", loss, i)
            if measurement.peak_allocated_bytes[i] is not None:
                writer.add_scalar("step/peak_allocated_GiB", measurement.peak_allocated_bytes[i] / GIB, i)
            if record.mode == "measured":
                writer.add_scalar("step/peak_reserved_GiB", measurement.peak_reserved_bytes[i] / GIB, i)
                writer.add_scalar("step/seconds", measurement.step_seconds[i], i)
                writer.add_scalar("step/tokens_per_s", config.tokens_per_step / measurement.step_seconds[i], i)
        texts = {
            "config": record.config,
            "environment": record.environment.model_dump(),
            "implementations": record.implementations,
        }
        for name, values in texts.items():
            writer.add_text(name, _markdown_table(values))
        _add_hparams(writer, config, record)
        if timeline is not None:
            writer.add_figure("memory/timeline", figure({record.run_name: timeline}))
            # All runs on one card on one scale, the card's memory: small ones are small there.
            card = record.environment.gpu_memory_bytes
            writer.add_figure("memory/timeline_on_the_card", figure({record.run_name: timeline}, card))
            parts = {name: f"{count / GIB:,.3f} GiB" for name, count in record.peak_breakdown.items() if count}
            writer.add_text("peak_breakdown", _markdown_table(parts))


def _add_hparams(writer: SummaryWriter, config: RunConfig, record: Record) -> None:
    """One row of the HPARAMS page: what runs are compared by, and their results; everything else is in the text."""
    # Few and short columns, so that the results beside them are in sight.
    limit = config.memory_limit_gib
    compared = (t.name for t in TECHNIQUES.values() if t.compared)
    columns = (
        "model_name",
        "batch_size",
        "seq_length",
        "dtype",
        "preset",
        "optimizer",
        "memory_limit_gib",
        "world_size",
    )
    gpu = record.environment.gpu or "no GPU"
    shown = {
        "Kernels": record.title,  # capitals sort first
        "model": f"{config.model_name.rsplit('/')[-1].removesuffix('-Instruct')} {config.dtype}",
        "tokens": f"{config.tokens_per_step // config.seq_length} x {config.seq_length}",
        "preset": "one GPU" if (record.script, config.preset) == ("all_gpu", "original") else config.preset,
        "optimizer": config.optimizer,
        "limit_GiB": "none" if limit is None else f"{limit:g}",
        "GPUs": f"{record.processes} x {gpu}",
        "others": ", ".join(config.unusual(*columns, *compared)) or "usual",
    }
    # TensorBoard takes the columns from any one run, so each run names them all, also those it has no figure for.
    for summary in hparams(shown, dict.fromkeys(_RESULTS, 0.0)):
        writer.file_writer.add_summary(summary)
    for tag, (key, divisor) in _RESULTS.items():
        if getattr(record, key) is not None:
            writer.add_scalar(tag, getattr(record, key) / divisor, config.iterations - 1)


def _markdown_table(values: dict[str, Any]) -> str:
    return markdown_table(["field", "value"], [[key, json.dumps(value)] for key, value in values.items()], "ll")


def trace_step(step: Step, path: Path, *, keeps: bool = True) -> None:
    """Profile one step, with its phases named, and write the Chrome trace to `path` (open it in ui.perfetto.dev).

    Where several ranks take part in the step, only one `keeps` its trace.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notices ("USDT: ...") tell a user nothing
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler, _phase_ranges() as mark:
        step(mark)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if keeps:
        write_atomically(path, lambda temporary: profiler.export_chrome_trace(str(temporary)))


@contextmanager
def _phase_ranges() -> Iterator[Mark]:
    """A mark under which each phase is a named range of the trace."""
    open_ranges: list[torch.profiler.record_function] = []

    def close() -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    def mark(phase: str) -> None:
        close()
        open_ranges.append(torch.profiler.record_function(phase))
        open_ranges[-1].__enter__()

    try:
        yield mark
    finally:
        close()
