"""GPUs the project knows, and facts of this machine. A new GPU is one entry of `GPUS`."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.utils import GIB, MIB, UsageError


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as it is known without one at hand."""

    name: str  # as PyTorch gives it
    capability: tuple[int, int]
    multiprocessors: int
    # Dense peak of the units that a training step runs on, FLOP/s by dtype: NVIDIA's data sheets and architecture white
    # papers. fp32 without TF32, as PyTorch multiplies by default. None: not known, so there is no MFU.
    peak_flops: Mapping[str, float] | None = None
    memory_bytes_per_s: float | None = None  # NVIDIA's data sheet
    memory_bytes: int | None = None  # as PyTorch reports it; None where we have seen none
    # What the CUDA context and loaded libraries take before the allocator gets any: the driver's view less what PyTorch
    # reserved, in the records under doc/data/. Taken to be the H100's where nothing was measured.
    context_bytes: int = 767 * MIB
    word: str = ""  # what it is called on a command line
    sheet_gib: int | None = None  # memory by the data sheet, of which the driver keeps some

    @property
    def usable_bytes(self) -> int | None:
        """What PyTorch would report as its memory, of a GPU that nobody asked: the share that an H100 has of its 80."""
        if self.memory_bytes is not None or self.sheet_gib is None:
            return self.memory_bytes
        return int(self.sheet_gib * GIB * H100.memory_bytes / (H100.sheet_gib * GIB))


_HOPPER = {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12}
_A100 = {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, _HOPPER, 3.35e12, memory_bytes=85017493504, word="h100", sheet_gib=80)
H200 = Gpu("NVIDIA H200", (9, 0), 132, _HOPPER, 4.8e12, memory_bytes=150109880320, word="h200")
_H100_PCIE = {"bf16": 756e12, "fp16": 756e12, "fp32": 51.2e12}
_RTX_4090 = {"bf16": 165.2e12, "fp16": 165.2e12, "fp32": 82.6e12}
_RTX_3090 = {"bf16": 71e12, "fp16": 71e12, "fp32": 35.6e12}

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        H100,
        Gpu("NVIDIA H100 PCIe", (9, 0), 114, _H100_PCIE, 2e12, word="h100-pcie", sheet_gib=80),
        H200,
        Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, _A100, 1.555e12, word="a100-40gb", sheet_gib=40),
        Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, _A100, 2.039e12, word="a100", sheet_gib=80),
        Gpu("NVIDIA A100-PCIE-40GB", (8, 0), 108, _A100, 1.555e12, word="a100-pcie-40gb", sheet_gib=40),
        Gpu("NVIDIA A100 80GB PCIe", (8, 0), 108, _A100, 1.935e12, word="a100-pcie", sheet_gib=80),
        Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, _RTX_4090, 1.008e12, word="rtx4090", sheet_gib=24),
        Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, _RTX_3090, 0.936e12, word="rtx3090", sheet_gib=24),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU that a user means: by the word for it, however it is written, or its full name. Raises `UsageError`."""
    plain = "".join(c for c in name.lower() if c.isalnum())
    for gpu in GPUS.values():
        if plain in ("".join(c for c in known.lower() if c.isalnum()) for known in (gpu.word, gpu.name)):
            return gpu
    raise UsageError(f"unknown GPU {name[:60]!r}: one of {', '.join(gpu.word for gpu in GPUS.values())}")


def peak_flops(gpu: str | None, dtype: str) -> float | None:
    """The data sheet's dense FLOP/s of this GPU (its name as PyTorch gives it) for `dtype`, or None if unlisted."""
    rates = GPUS[gpu].peak_flops if gpu in GPUS else None
    return None if rates is None else rates[dtype]


def this_gpu() -> Gpu:
    """The GPU of this machine, as PyTorch reports it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
    )


def has_gpu() -> bool:
    """Whether PyTorch would find a CUDA GPU. Imports no torch, and does not initialise CUDA.

    Asks NVIDIA's management library, so that a process which only looks can still fork, and `--help` is instant.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not _torch_has_cuda():
        return False
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    count = ctypes.c_uint(0)
    found = library.nvmlInit_v2() == 0 and library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    return found and count.value > 0


def _torch_has_cuda() -> bool:
    """Whether the installed PyTorch was built for CUDA, by the file in which it says so."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).with_name("version.py").read_text()
    return any(line.startswith("cuda") and "None" not in line for line in text.splitlines())


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_ranks() -> int:
    """Processes of this job on this machine; launchers name it differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def core_share(ranks: int, cores: int | None = None) -> int:
    """Cores of each of `ranks` processes that share evenly those of a machine, this one's if `cores` names no other."""
    return max(1, (usable_cores() if cores is None else cores) // ranks)


def host_peak_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_host_bytes() -> int:
    """What this process can still allocate: the machine's free memory, or less under a cgroup's limit."""
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup, or no limit
        return available
    files = int(counts["inactive_file"]) + int(counts["active_file"])  # cached files give way
    return min(available, limit - used + files)


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
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(*, on_gpu: bool) -> dict[str, Any]:
    """The machine and the versions a figure was measured with; what cannot be read is None."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties().total_memory if on_gpu else None,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cpu_count": usable_cores(),
        "machine_cpu_count": os.cpu_count(),
        "local_ranks": local_ranks(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "liger_kernel": _version("liger-kernel"),
        "deepspeed": _version("deepspeed"),
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "omp": {name: value for name, value in sorted(os.environ.items()) if name.startswith("OMP_")},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
