"""TensorBoard logs of a run, and a profiler trace of one extra step in the same folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from src.measure import Mark, Measurement, Step
from src.utils import MIB, write_atomically

# What TensorBoard's HPARAMS page compares.
_METRICS = ("peak_memory_bytes", "peak_reserved_bytes", "latency_s", "throughput_tokens_per_s", "mfu", "loss")


def write_tensorboard(folder: Path, record: dict[str, Any], measurement: Measurement) -> None:
    """Scalars per timed step, the configuration as text, and hparams with the run's figures.

    A run that is repeated replaces its own logs. Times are written for measured runs only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    config = record["config"]
    tokens = config["batch_size"] * config["seq_length"]
    with SummaryWriter(str(folder)) as writer:
        for i, loss in enumerate(measurement.losses):
            writer.add_scalar("train/loss", loss, i)
            writer.add_scalar("memory/peak_allocated_MiB", measurement.peak_allocated_bytes[i] / MIB, i)
            if record["mode"] == "measured":
                writer.add_scalar("memory/peak_reserved_MiB", measurement.peak_reserved_bytes[i] / MIB, i)
                writer.add_scalar("time/step_s", measurement.step_seconds[i], i)
                writer.add_scalar("time/tokens_per_s", tokens / measurement.step_seconds[i], i)
        for name in ("config", "environment", "implementations"):
            writer.add_text(name, _markdown_table(record[name]))
        hparams = {k: v for k, v in config.items() if v is not None and not k.endswith("_dir") and k != "debug"}
        metrics = {f"result/{key}": record[key] for key in _METRICS if record[key] is not None}
        # run_name="." keeps the hparams in this run's folder instead of one named after the time.
        writer.add_hparams(hparams, metrics, run_name=".")


def _markdown_table(values: dict[str, Any]) -> str:
    rows = [f"| {key} | {json.dumps(value)} |" for key, value in values.items()]
    return "\n".join(["| field | value |", "| --- | --- |", *rows])


def trace_step(step: Step, path: Path) -> None:
    """Profile one step, with its phases named, and write the Chrome trace to `path` (open it in ui.perfetto.dev)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler, _phase_ranges() as mark:
        step(mark)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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
