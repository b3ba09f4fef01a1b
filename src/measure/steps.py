"""Timing training steps and reading their peak memory. The contract:

warm-up steps stay outside the clock; the device is synchronised before both clock reads; garbage and the allocator's
cache are cleared once, before the first timed step; peaks are reset before each step; nothing of one step but its loss,
a number, is held during the next; no profiler and no memory history runs here. That number is a block of 512 bytes: by
as much are peaks measured here above those of a dry run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from src.experiment import Runtime, Step, no_mark


@dataclass(frozen=True)
class Measurement:
    """One entry per timed step; memory in bytes, None where the device has no counter."""

    step_seconds: list[float]
    losses: list[float]
    peak_allocated_bytes: list[int | None]
    peak_reserved_bytes: list[int | None]
    device_used_bytes: int | None
    allocation_retries: int | None = None  # of the whole run so far

    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest peak of any timed step."""
        return None if None in self.peak_allocated_bytes else max(self.peak_allocated_bytes)

    @property
    def reserved_bytes(self) -> int | None:
        """Largest reservation of any timed step."""
        return None if None in self.peak_reserved_bytes else max(self.peak_reserved_bytes)


def measure(step: Step, runtime: Runtime, *, warmup: int, iterations: int, description: str = "steps") -> Measurement:
    """Run `warmup` steps, then time `iterations` steps one by one."""
    seconds, losses, allocated, reserved = [], [], [], []
    with tqdm(total=warmup + iterations, desc=description, unit="step", leave=False, disable=None) as progress:
        for _ in range(warmup):
            step(no_mark)
            progress.update()
        runtime.synchronize()
        runtime.release_cache()
        for _ in range(iterations):
            runtime.reset_peak()
            runtime.synchronize()
            start = time.perf_counter()
            loss = step(no_mark)
            runtime.synchronize()
            seconds.append(time.perf_counter() - start)
            peak = runtime.peak_bytes()
            allocated.append(peak[0])
            reserved.append(peak[1])
            losses.append(loss.item())
            progress.update()
    used, retries = runtime.device_used_bytes(), runtime.allocation_retries()
    return Measurement(seconds, losses, allocated, reserved, used, retries)


@dataclass(frozen=True)
class PhasePeaks:
    """What one extra, untimed step showed."""

    peak_bytes: dict[str, int | None]  # phase -> peak allocated while in it
    grad_norm: float | None

    @property
    def phase(self) -> str | None:
        """The phase that sets the step's peak; the earliest if several do."""
        return None if None in self.peak_bytes.values() else max(self.peak_bytes, key=self.peak_bytes.__getitem__)


def measure_phases(step: Step, runtime: Runtime, grad_norm: Callable[[], float | None]) -> PhasePeaks:
    """Run one step; read the peak of each phase and, when the gradients are complete, their norm."""
    peaks: dict[str, int | None] = {}
    phases: list[str] = []
    norms: list[float | None] = []

    def close_phase() -> None:
        if phases:
            # With several micro-batches a phase comes back.
            readings = (peaks.get(phases[-1]), runtime.peak_bytes()[0])
            peaks[phases[-1]] = max((r for r in readings if r is not None), default=None)

    def mark(phase: str) -> None:
        close_phase()
        if phase == "optimizer":
            norms.append(grad_norm())
        phases.append(phase)
        runtime.reset_peak()

    step(mark)
    close_phase()
    return PhasePeaks(peaks, norms[0])
