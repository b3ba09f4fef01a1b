"""The experiment on a machine without a GPU: do the techniques compute what Hugging Face's code computes?

Trains a tiny model for a few steps from the same weights on the same batch, once with Hugging Face's code and once with
each technique alone and with all of them. The kernels are the real ones, run by Triton's interpreter. Loss and
gradients are compared, and the peak of live tensors is tracked. The interpreter's speed says nothing about the kernels'
and is not reported.
"""

import dataclasses

import numpy as np
import torch

from src import techniques
from src.check import interpreter
from src.check.devices import TrackedHost
from src.check.parity import measure_parity
from src.config import RunConfig
from src.experiment import Build, Script
from src.machine import H100
from src.measure import Measurement, PhasePeaks, measure, measure_phases
from src.model_utils import implementations, patched
from src.predict import dry_run
from src.record import KernelCheck
from src.record.recorder import Recorder
from src.record.report import files_written, kernel_check_table
from src.record.tensorboard import write_tensorboard
from src.techniques import TECHNIQUES
from src.utils import ExitStatus, UsageError

# Kernels and Hugging Face's code add up the same numbers in another order: differences of a few roundings each.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training with one set of techniques showed."""

    measurement: Measurement
    phases: PhasePeaks
    gradient: np.ndarray  # every parameter's gradient in the first step, flat, float64
    implementations: dict[str, str]


def train(config: RunConfig, build: Build) -> Trained:
    """Train with one set of techniques: a step whose gradients are kept, then `config.iterations` more."""
    runtime = TrackedHost()
    gradients: list[np.ndarray] = []
    with patched(), runtime.tracking():
        experiment = build(config, runtime)

        def keep_gradients() -> float:
            # As numpy arrays, which the memory tracker does not count.
            gradients.extend(g.numpy().astype(np.float64).ravel() for g in experiment.gradients())
            return experiment.grad_norm()

        phases = measure_phases(experiment.step, runtime, keep_gradients)
        measurement = measure(
            experiment.step, runtime, warmup=config.warmup, iterations=config.iterations, description=label(config)
        )
        return Trained(measurement, phases, np.concatenate(gradients), implementations(experiment.model))


def label(config: RunConfig) -> str:
    """The compared techniques that a run has on."""
    on = techniques.turned_on(config)
    return " + ".join(name if TECHNIQUES[name].is_kernel else f"{name} {value}" for name, value in on.items())


def variants(config: RunConfig) -> list[RunConfig]:
    """Hugging Face's code, each technique of `config` alone with what it needs, and all of them together."""
    off, on = techniques.without(config), techniques.turned_on(config)
    sets = [{name, *TECHNIQUES[name].needs} & off.keys() for name in on]
    sets += [set(on)] if len(on) > 1 else []
    own = [{name: getattr(config, name) for name in names} for names in [set(), *sets]]
    return list(dict.fromkeys(dataclasses.replace(config, **off | values) for values in own))


def relative_difference(value: np.ndarray, reference: np.ndarray) -> float:
    """||value - reference|| / ||reference||, of vectors or of single numbers."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def compare(config: RunConfig, trained: Trained, baseline: Trained) -> KernelCheck:
    """One row of the check; differences are relative."""
    loss = relative_difference(np.array(trained.measurement.losses), np.array(baseline.measurement.losses))
    gradient = relative_difference(trained.gradient, baseline.gradient)
    return KernelCheck(
        kernels=label(config).split(" + ") if label(config) else [],
        implementations=trained.implementations,
        losses=trained.measurement.losses,
        loss_difference=loss,
        gradient_difference=gradient,
        peak_memory_bytes=trained.measurement.peak_memory_bytes,
        agrees=loss <= TOLERANCE and gradient <= TOLERANCE,
    )


def main(config: RunConfig, script: Script, planned: RunConfig | None) -> int:
    """Check what `config` turns on, alone and together, and forecast the memory of `planned`, the run on a GPU.

    Returns the exit status, 1 if a technique disagrees.
    """
    if refusal := config.refusal_on_cpu():
        raise UsageError(refusal)
    interpreter.enable()
    if config.parity:
        return _parity(config)
    print("No GPU in use: checking the Liger kernels against Hugging Face's code on the CPU, in Triton's interpreter.")
    print("That has small sizes of its own, which flags change; the forecast is of the run on a GPU.", flush=True)
    if planned is not None:
        print(_forecast(planned, script))
    recorder = Recorder(config, "interpreted", torch.device("cpu"))
    with recorder:
        chosen = variants(config)
        trained = [train(variant, script.build_experiment) for variant in chosen]
        rows = [compare(variant, one, trained[0]) for variant, one in zip(chosen, trained)]
        recorder.record.implementations = trained[-1].implementations
        recorder.record.kernel_check = rows
        recorder.add_measurement(trained[-1].measurement)
        recorder.add_phases(trained[-1].phases)
        if config.log_dir:
            write_tensorboard(config.log_folder, recorder.record, trained[-1].measurement)
    count = config.warmup + 1 + config.iterations  # the step whose gradients are compared trains, too
    steps = f"{count} training steps, {config.batch_size} x {config.seq_length} tokens, fp32"
    print(f"\n{config.model_name}, {steps}; differences are relative, a rounding is 1e-07\n")
    print(kernel_check_table(rows), files_written(config), sep="\n\n")
    print("\nRunning this on a GPU would add measured peaks, latency, throughput, a snapshot and a trace.")
    return ExitStatus.DONE if all(row.agrees for row in rows) else ExitStatus.FAILED


def _parity(config: RunConfig) -> int:
    """Compare the run's gradients with fp32's. Exit status 1 if they are worse than Hugging Face's."""
    print("No GPU in use: comparing gradients on the CPU, the kernels in Triton's interpreter.", flush=True)
    recorder = Recorder(config, "interpreted", torch.device("cpu"))
    with recorder:
        recorder.record.parity = measure_parity(config, torch.device("cpu"))
    recorder.finish()
    return ExitStatus.DONE if recorder.record.parity.agrees else ExitStatus.FAILED


def _forecast(planned: RunConfig, script: Script) -> str:
    """The memory of the run that a GPU would make of the same command."""
    off = techniques.without(planned)
    named = {"Hugging Face": off}
    if own := techniques.turned_on(planned):
        named["Liger" if all(TECHNIQUES[name].is_kernel for name in own) else "this run"] = off | own
    head = (
        f"\nForecast for an {H100.name} (python {planned.script}_liger_kernel.py --dry_run): {planned.model_name}, "
        f"{planned.description}\n"
    )
    return f"{head}\n{dry_run.forecast(planned, script, named)}\n"
