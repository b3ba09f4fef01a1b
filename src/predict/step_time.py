"""How long a step takes on a GPU that is not there: the operations of its dry run, replayed with two clocks.

The CPU launches operations one after the other and runs ahead; the GPU begins each when it is launched and the one
before is done. Where the CPU reads a number of the GPU's, it waits for all that was launched, and launches the next
only then.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from src.predict.rates import Rates
from src.predict.work import Work


@dataclass(frozen=True)
class StepTime:
    """A predicted step, in seconds."""

    seconds: float
    gpu_s: float  # what the GPU works
    cpu_s: float  # what the CPU works to launch that; it also waits

    @property
    def bound(self) -> str:
        """Which of the two has more to do: "gpu", or "launches"."""
        return "gpu" if self.gpu_s >= self.cpu_s else "launches"


def step_time(works: Iterable[Work], rates: Rates) -> StepTime | None:
    """The time of a step that consists of `works`, from an idle GPU until it is idle again.

    None if it is not known what one of them asks for.
    """
    cpu = gpu = gpu_s = cpu_s = 0.0
    for work in works:
        if work.unit == "unknown":
            return None
        if work.unit == "wait":
            cpu = max(cpu, gpu)
            continue
        busy = rates.cpu_seconds(work)
        cpu, cpu_s = cpu + busy, cpu_s + busy
        if work.unit != "none":
            busy = rates.seconds(work)
            gpu, gpu_s = max(gpu, cpu) + busy, gpu_s + busy
    return StepTime(max(cpu, gpu), gpu_s, cpu_s)
