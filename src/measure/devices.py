"""The devices that steps are measured on: one CUDA GPU, or the CPU in its place under offloading."""

import contextlib
import gc

import torch

from src.config import RunConfig
from src.experiment import Step
from src.measure.graph import GraphedStep
from src.utils import GIB, UsageError


class CudaRuntime:
    """One CUDA GPU, counted by PyTorch's caching allocator."""

    def __init__(self, config: RunConfig) -> None:
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA GPU; --device cpu checks the kernels without one")
        self.device = torch.device("cuda", torch.cuda.current_device())
        if config.compute_dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError(f"{torch.cuda.get_device_name()} has no bf16: use --dtype fp16 or fp32")
        if config.memory_limit_gib is not None:
            self._limit(int(config.memory_limit_gib * GIB))
        self._retries_before = self._retries()
        self._captured_peak_bytes = 0

    def _limit(self, limit_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.device).total_memory
        if limit_bytes > total:
            raise UsageError(f"--memory_limit_gib {limit_bytes / GIB:g} is more than the GPU's {total / GIB:.1f} GiB")
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total, self.device)

    def tracking(self) -> contextlib.AbstractContextManager:
        """Nothing to enter: the allocator always counts."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release_cache(self) -> None:
        """Free what Python no longer reaches, and return the allocator's unused blocks to the driver."""
        gc.collect()
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> tuple[int, int | None]:
        """Peak allocated and peak reserved since the last reset."""
        peak = max(torch.cuda.max_memory_allocated(self.device), self._captured_peak_bytes)
        return peak, torch.cuda.max_memory_reserved(self.device)

    def captured(self, step: Step) -> Step:
        """`step` as a CUDA graph; its peak counts from its capture on, whatever the allocator says."""

        def note(peak_bytes: int) -> None:
            self._captured_peak_bytes = peak_bytes

        return GraphedStep(step, note)

    def device_used_bytes(self) -> int | None:
        """Memory in use on the whole card as the driver sees it: ours, the CUDA context, and other programs'."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def allocation_retries(self) -> int:
        """How often, in this object's life, the allocator found no room before it gave its cache back to the driver."""
        return self._retries() - self._retries_before

    def _retries(self) -> int:
        return torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)


class HostRuntime:
    """The CPU in place of a GPU under offloading: everything is host memory there, so no peak stands for a GPU's."""

    device = torch.device("cpu")

    def tracking(self) -> contextlib.AbstractContextManager:
        """Nothing is counted."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def release_cache(self) -> None:
        gc.collect()

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> tuple[int | None, int | None]:
        return None, None

    def device_used_bytes(self) -> int | None:
        return None

    def allocation_retries(self) -> int | None:
        return None

    def captured(self, step: Step) -> Step:
        """There is nothing to capture for."""
        return step


class OutOfMemoryWatch:
    """Remembers what the CUDA allocator was asked for, and what was free, when it last gave up."""

    def __init__(self) -> None:
        self.facts: dict[str, int | None] = {}

    def attach(self) -> None:
        """Watch from now on, for as long as the process lives."""
        torch._C._cuda_attach_out_of_memory_observer(self._observe)

    def _observe(self, device: int, requested: int, allowed: int, driver_free: int) -> None:
        # What this process could still have had: the driver's free memory, less under a cap, and its own unused blocks.
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free = min(driver_free, allowed - reserved) + reserved - allocated
        pieces = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
        self.facts = {
            "requested_bytes": requested,
            "free_bytes": free,
            "reserved_bytes": reserved,
            "allocated_bytes": allocated,
            "largest_gap_bytes": max((piece["size"] for piece in pieces if piece["state"] == "inactive"), default=0),
        }
