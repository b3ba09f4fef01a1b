"""The experiment on a GPU that is not there: what its peak will be, what the peak is made of, and whether it fits.

The script's own `build_experiment` and step run on fake tensors (see src/fake_gpu.py), so a prediction follows every
change of the experiment. Nothing is computed: there are no times, and no loss.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from src import records
from src.attribution import Attribution
from src.config import RunConfig
from src.experiment import Build, Experiment
from src.explain.categories import CATEGORIES
from src.explain.reading import save
from src.explain.timeline import timeline
from src.fake_gpu import H100, Card, FakeGpu
from src.measure import Mark, PhasePeaks, measure_phases, no_mark
from src.model_utils import flops_per_step, implementations, patched
from src.recording import new_record, recording
from src.simulated_snapshot import simulated_snapshot
from src.utils import GIB, UsageError, aligned_table, format_bytes, print_rank0


class FakeRuntime:
    """A `FakeGpu` behind the interface of a device; fake tensors live between `tracking()`'s enter and exit."""

    device = torch.device("cuda", 0)

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def tracking(self) -> contextlib.AbstractContextManager:
        """Enter before building the model."""
        return self.gpu.active()

    def synchronize(self) -> None:
        """Nothing runs."""

    def release_cache(self) -> None:
        """As on a GPU between warm-up and timed steps."""
        gc.collect()
        self.gpu.allocator.release_cached()

    def reset_peak(self) -> None:
        """Let both peaks start again from now."""
        self.gpu.allocator.reset_peak()

    def peak_bytes(self) -> tuple[int, int | None]:
        """Peak allocated and peak reserved since the last reset."""
        return self.gpu.allocator.peak_allocated_bytes, self.gpu.allocator.peak_reserved_bytes

    def device_used_bytes(self) -> int | None:
        """No driver, no view of it."""
        return None

    def allocation_retries(self) -> int | None:
        """Simulated, but not counted."""
        return None


@dataclass(frozen=True)
class Prediction:
    """What one simulated step showed, after one that creates the optimizer's state. Sizes in bytes."""

    config: RunConfig
    load_peak_bytes: int
    phases: PhasePeaks
    peak_reserved_bytes: int
    breakdown: dict[str, int]  # category -> bytes at the peak; sums to peak_bytes
    model_flops: int
    implementations: dict[str, str]
    gpu: FakeGpu = field(repr=False)
    experiment: Experiment = field(repr=False)  # while it lives, so does its memory on `gpu`
    first_event: int  # where the events of the step begin

    @property
    def peak_bytes(self) -> int:
        """Peak allocated."""
        return max(self.phases.peak_bytes.values())


def predict(
    config: RunConfig,
    build: Build,
    *,
    card: Card = H100,
    limit_bytes: int | None = None,
    record_frames: bool = False,
) -> Prediction:
    """Simulate `config` on `card`; `limit_bytes` bounds what the allocator may reserve.

    `record_frames` keeps the Python stack of every request of the step, for a snapshot.

    Raises `SimulatedOutOfMemory` if the experiment does not fit into `limit_bytes`.
    """
    gpu = FakeGpu(card, limit_bytes)
    runtime = FakeRuntime(gpu)
    # The weights' values do not matter, so they are never loaded, and no network is used.
    config = dataclasses.replace(config, pretrained=False)
    with patched(), _without_garbage_collector(), runtime.tracking():
        experiment = build(config, runtime)
        load_peak = runtime.peak_bytes()[0]
        experiment.step(no_mark)
        runtime.release_cache()
        gpu.record_frames, first_event = record_frames, len(gpu.events)
        reserved = 0

        attribution = Attribution(gpu, experiment, gradient_checkpointing=config.gradient_checkpointing)

        def step(mark: Mark) -> torch.Tensor:
            def enter_phase(phase: str) -> None:
                nonlocal reserved
                reserved = max(reserved, runtime.peak_bytes()[1])
                mark(phase)

            return attribution.step(enter_phase)

        phases = measure_phases(step, runtime, lambda: None)
        return Prediction(
            config=config,
            load_peak_bytes=load_peak,
            phases=phases,
            peak_reserved_bytes=max(reserved, runtime.peak_bytes()[1]),
            breakdown=timeline(simulated_snapshot(gpu, first_event)).breakdown(),
            model_flops=flops_per_step(experiment.model, config),
            implementations=implementations(experiment.model),
            gpu=gpu,
            experiment=experiment,
            first_event=first_event,
        )


@contextlib.contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Keep Python's collector from freeing tensors at moments that differ from run to run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def limit_bytes(config: RunConfig, card: Card = H100) -> int | None:
    """What the allocator may reserve under --gpu_memory_gib and --memory_limit_gib, None if neither is given."""
    limits = []
    if config.gpu_memory_gib is not None:
        limits.append(int(config.gpu_memory_gib * GIB) - card.context_bytes)
        if limits[0] <= 0:
            raise UsageError(f"--gpu_memory_gib {config.gpu_memory_gib:g} has no room beside the CUDA context")
    if config.memory_limit_gib is not None:
        limits.append(int(config.memory_limit_gib * GIB))
    return min(limits, default=None)


def fill_record(record: dict[str, Any], prediction: Prediction) -> None:
    """Put a prediction into a record; what was not simulated stays None."""
    phase = prediction.phases.phase
    record |= {
        "implementations": prediction.implementations,
        "model_flops_per_step": prediction.model_flops,
        "load_peak_bytes": prediction.load_peak_bytes,
        "peak_memory_bytes": prediction.peak_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "phase_peak_bytes": prediction.phases.peak_bytes,
        "peak_phase": "load" if prediction.load_peak_bytes > prediction.peak_bytes else phase,
        "peak_breakdown": prediction.breakdown,
        "breakdown_peak_bytes": prediction.peak_bytes,
    }


def main(config: RunConfig, build: Build) -> int:
    """Predict the experiment, record and print it; returns the exit status, 3 if it does not fit the card asked for."""
    limit = limit_bytes(config)
    record = new_record("predicted", config, torch.device("cpu"))
    record["simulated_gpu"] = H100.name
    with recording(record, config):
        prediction = predict(config, build, record_frames=bool(config.snapshot_dir))
        fill_record(record, prediction)
        if config.snapshot_dir:
            save(simulated_snapshot(prediction.gpu, prediction.first_event), config.snapshot_file)
        if limit is not None:
            predict(config, build, limit_bytes=limit)
    print_rank0(records.report(record, config), records.files_written(config), sep="\n\n")
    if limit is not None:
        answer = "fits" if record["status"] == "ok" else "does not fit"
        print_rank0(f"\nIt {answer} {format_bytes(limit)} of allocator memory.")
    return records.exit_status(record)


def forecast(config: RunConfig, build: Build, strategies: dict[str, Any]) -> str:
    """A table of what `config` would need under each strategy, side by side."""
    predictions = {
        name: predict(dataclasses.replace(config, strategy=strategy), build) for name, strategy in strategies.items()
    }
    rows = [("", *predictions)]
    for category in CATEGORIES:
        rows.append((category.replace("_", " "), *(format_bytes(p.breakdown[category]) for p in predictions.values())))
    rows.append(("peak memory", *(format_bytes(p.peak_bytes) for p in predictions.values())))
    rows.append(("in the phase", *(p.phases.phase for p in predictions.values())))
    return aligned_table(rows)
