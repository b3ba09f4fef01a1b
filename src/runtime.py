"""The one place that knows whether there is a GPU: synchronising, memory counters, limits, facts of the machine."""

import contextlib
import gc
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch

from src.config import RunConfig
from src.live_memory import LiveMemory
from src.utils import GIB, UsageError, usable_cores


class Runtime(Protocol):
    """What measuring needs of a device. Byte counts are those of this process's tensors on it."""

    device: torch.device

    def tracking(self) -> contextlib.AbstractContextManager: ...
    def synchronize(self) -> None: ...
    def release_cache(self) -> None: ...
    def reset_peak(self) -> None: ...
    def peak_bytes(self) -> tuple[int | None, int | None]: ...
    def device_used_bytes(self) -> int | None: ...
    def allocation_retries(self) -> int | None: ...


class CudaRuntime:
    """One CUDA GPU, counted by PyTorch's caching allocator."""

    def __init__(self, config: RunConfig) -> None:
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA GPU; --device cpu checks the kernels without one")
        self.device = torch.device("cuda", torch.cuda.current_device())
        if config.dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError(f"{torch.cuda.get_device_name()} has no bf16: use --dtype fp16 or fp32")
        if config.memory_limit_gib is not None:
            self._limit(int(config.memory_limit_gib * GIB))
        self._retries_before = self._retries()

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
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

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


class CpuRuntime(HostRuntime):
    """The CPU, where a mode that sees every operation counts the bytes of live tensors."""

    def __init__(self) -> None:
        self._memory = LiveMemory()

    def tracking(self) -> contextlib.AbstractContextManager:
        """Enter before building the model: tensors made outside are counted only once an operation returns them."""
        return self._memory

    def reset_peak(self) -> None:
        self._memory.reset_peak()

    def peak_bytes(self) -> tuple[int, int | None]:
        """Peak of live tensors since the last reset; nothing is reserved on a CPU."""
        return self._memory.peak_bytes, None


def resolve_device(device: str) -> str:
    """'cuda' or 'cpu' for the --device given. Leaves CUDA alone: a process that has asked it cannot fork any more."""
    if device != "auto":
        return device
    with mock.patch.dict(os.environ, PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return "cuda" if torch.cuda.is_available() else "cpu"


def host_peak_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_A100 = {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}
# Dense peak of the units a training step runs on, FLOP/s, by the name PyTorch gives: NVIDIA's data sheets and
# architecture white papers. fp32 without TF32, as PyTorch multiplies by default. A card that is not listed has no MFU.
_PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12},
    "NVIDIA H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "fp32": 51.2e12},
    "NVIDIA H200": {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12},
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2e12, "fp16": 165.2e12, "fp32": 82.6e12},
    "NVIDIA GeForce RTX 3090": {"bf16": 71e12, "fp16": 71e12, "fp32": 35.6e12},
}


def peak_flops(gpu: str | None, dtype: str) -> float | None:
    """The data sheet's dense FLOP/s of this GPU (its name as PyTorch gives it) for `dtype`, or None if unlisted."""
    return _PEAK_FLOPS[gpu][dtype] if gpu in _PEAK_FLOPS else None


def _run(*command: str) -> str | None:
    """First line of a command's output, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _git_commit() -> str | None:
    """$GIT_COMMIT, for code that runs outside its checkout, else HEAD with a mark if files differ."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    root = str(Path(__file__).parent)
    commit = _run("git", "-C", root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("-dirty" if _run("git", "-C", root, "status", "--porcelain", "--untracked-files=no") else "")


def _cpu_name() -> str | None:
    """The processor's model, as Linux names it."""
    try:
        names = [
            line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
    except OSError:
        return None
    return names[0].strip() if names else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions a figure was measured with; what cannot be read is None."""
    on_gpu = device.type == "cuda"
    versions = {name.replace("-", "_"): _version(name) for name in ("triton", "transformers", "liger-kernel")}
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cpu_count": usable_cores(),
        "machine_cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "deepspeed": _version("deepspeed"),
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "omp": {name: value for name, value in sorted(os.environ.items()) if name.startswith("OMP_")},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
