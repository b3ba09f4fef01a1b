"""The experiment on a machine without a GPU: do the Liger kernels compute what Hugging Face's code computes?

Trains a tiny Llama for a few steps from the same weights on the same batch, once with Hugging Face's code and once
with each Liger kernel alone and with all of them. The kernels are the real ones, run by Triton's interpreter. Loss
and gradients are compared, and the peak of live tensors is tracked. The interpreter's speed says nothing about the
kernels' and is not reported.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from src import dry_run, interpreter, records
from src.config import RunConfig, Strategy
from src.experiment import Build
from src.fake_gpu import H100
from src.measure import Measurement, PhasePeaks, measure, measure_phases
from src.model_utils import SHAPES, implementations, patched
from src.profiler import write_tensorboard
from src.recording import add_measurement, add_phases, new_record, recording
from src.runtime import CpuRuntime
from src.utils import ExitStatus, UsageError, aligned_table, format_bytes

# Small enough for the interpreter, with a batch large enough that the logits dominate memory as they do at full size.
DEFAULTS: dict[str, Any] = {
    "model_name": "tiny-llama",
    "batch_size": 2,
    "seq_length": 96,
    "iterations": 2,
    "warmup": 0,
    "dtype": "fp32",
    "learning_rate": 1e-3,
}

# Kernels and Hugging Face's code add up the same numbers in another order: differences of a few roundings each.
TOLERANCE = 64 * torch.finfo(torch.float32).eps

FULL_SIZE = {name + suffix for name in SHAPES if name != "tiny-llama" for suffix in ("", "-Instruct")}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What training with one strategy showed."""

    measurement: Measurement
    phases: PhasePeaks
    gradient: np.ndarray  # every parameter's gradient in the first step, flat, float64
    implementations: dict[str, str]


def train(config: RunConfig, build: Build) -> Variant:
    """Train with one strategy: first a step whose gradients are kept, then `config.iterations` more."""
    runtime = CpuRuntime()
    gradients: list[np.ndarray] = []
    with patched(), runtime.tracking():
        experiment = build(config, runtime)

        def keep_gradients() -> float:
            # As numpy arrays, which the memory tracker does not count.
            gradients.extend(g.numpy().astype(np.float64).ravel() for g in experiment.gradients())
            return experiment.grad_norm()

        phases = measure_phases(experiment.step, runtime, keep_gradients)
        description = ", ".join(config.strategy.kernels) or "Hugging Face"
        measurement = measure(
            experiment.step, runtime, warmup=config.warmup, iterations=config.iterations, description=description
        )
        return Variant(measurement, phases, np.concatenate(gradients), implementations(experiment.model))


def relative_difference(value: np.ndarray, reference: np.ndarray) -> float:
    """||value - reference|| / ||reference||, of vectors or of single numbers."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def compare(strategy: Strategy, variant: Variant, baseline: Variant) -> dict[str, Any]:
    """One row of the check, as the record keeps it; differences are relative."""
    loss = relative_difference(np.array(variant.measurement.losses), np.array(baseline.measurement.losses))
    gradient = relative_difference(variant.gradient, baseline.gradient)
    return {
        "kernels": list(strategy.kernels),
        "implementations": variant.implementations,
        "losses": variant.measurement.losses,
        "loss_difference": loss,
        "gradient_difference": gradient,
        "peak_memory_bytes": variant.measurement.peak_memory_bytes,
        "agrees": loss <= TOLERANCE and gradient <= TOLERANCE,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The check's rows for a person; the first is the baseline."""
    lines = [("Liger kernels", "last loss", "loss differs", "gradient differs", "peak of live tensors", "")]
    for row in rows:
        name = " + ".join(row["kernels"]) or "none (Hugging Face)"
        is_baseline = row is rows[0]
        lines.append(
            (
                name,
                f"{row['losses'][-1]:.6f}",
                "-" if is_baseline else f"{row['loss_difference']:.1e}",
                "-" if is_baseline else f"{row['gradient_difference']:.1e}",
                format_bytes(row["peak_memory_bytes"]),
                "" if is_baseline else "agrees" if row["agrees"] else "DIFFERS",
            )
        )
    return aligned_table(lines)


def main(config: RunConfig, build: Build, full_size: RunConfig) -> int:
    """Check every kernel of `config.strategy`, alone and together, and forecast the memory of `full_size` on a GPU.

    Returns the exit status, 1 if a kernel disagrees.
    """
    if config.dtype != "fp32" or config.memory_limit_gib is not None:
        raise UsageError("on a CPU the kernels are checked in fp32 and without --memory_limit_gib")
    if config.model_name in FULL_SIZE:
        raise UsageError(f"{config.model_name} needs a GPU: Triton's interpreter is too slow for it; use tiny-llama")
    interpreter.enable()
    print("No GPU in use: checking the Liger kernels against Hugging Face's code on the CPU, in Triton's interpreter.")
    record = new_record("interpreted", config, torch.device("cpu"))
    with recording(record, config):
        strategies = _strategies(config.strategy)
        variants = [train(dataclasses.replace(config, strategy=strategy), build) for strategy in strategies]
        rows = [compare(strategy, variant, variants[0]) for strategy, variant in zip(strategies, variants)]
        variant = variants[-1]
        record |= {"implementations": variant.implementations, "kernel_check": rows}
        add_measurement(record, variant.measurement)
        add_phases(record, variant.phases)
        if config.log_dir:
            write_tensorboard(config.log_folder, record, variant.measurement)
    steps = f"{config.iterations} training steps, {config.batch_size} x {config.seq_length} tokens, fp32"
    print(f"\n{config.model_name}, {steps}; differences are relative, a rounding is 1e-07\n")
    print(table(rows), records.files_written(config), sep="\n\n")
    print(
        f"\nForecast for an {H100.name} (src/dry_run.py): {full_size.model_name}, "
        f"{full_size.batch_size} x {full_size.seq_length} tokens, {full_size.dtype}\n"
    )
    print(dry_run.forecast(full_size, build, {"Hugging Face": Strategy.only(), "Liger": config.strategy}))
    print("\nRunning this on a GPU would add measured peaks, latency, throughput, a snapshot and a trace.")
    return ExitStatus.DONE if all(row["agrees"] for row in rows) else ExitStatus.FAILED


def _strategies(chosen: Strategy) -> list[Strategy]:
    """Hugging Face's code, each chosen kernel alone, and all of them together."""
    singles = [Strategy.only(name) for name in chosen.kernels]
    together = [chosen] if len(singles) > 1 else []
    return [Strategy.only(), *singles, *together]
