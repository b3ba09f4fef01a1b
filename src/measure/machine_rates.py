"""What a machine does at best: matrix products, copies over PCIe, and updates of host memory in place.

FLOP/s and bytes/s, each of the shortest of several runs. A few seconds in all.
"""

import time
from collections.abc import Callable

import torch

from src.experiment import Runtime
from src.machine import local_ranks
from src.utils import GIB

WIDTH = 8192  # of a square matrix
HOST_BYTES = GIB  # that are updated; half as many cross PCIe


def matmul_flops(dtype: torch.dtype, runtime: Runtime) -> float:
    """FLOP/s of the product of two large square matrices."""
    matrix = torch.randn(WIDTH, WIDTH, device=runtime.device, dtype=dtype)
    return 2 * WIDTH**3 / _best_seconds(lambda: matrix @ matrix, runtime)


def host_rates(runtime: Runtime) -> dict[str, float]:
    """Bytes/s over PCIe each way, and of host memory, read and written by the ranks of this machine together."""
    count = HOST_BYTES // 4
    # Ranks of one machine share its memory, so each measures while the others do.
    on_host, pinned = torch.ones(count), torch.ones(count // 2).pin_memory()
    on_gpu = torch.empty(count // 2, device=runtime.device)
    moved = 4 * (count // 2)
    return {
        "to_gpu_bytes_per_s": moved / _best_seconds(lambda: on_gpu.copy_(pinned, non_blocking=True), runtime),
        "to_host_bytes_per_s": moved / _best_seconds(lambda: pinned.copy_(on_gpu, non_blocking=True), runtime),
        "host_memory_bytes_per_s": local_ranks() * 8 * count / _best_seconds(lambda: on_host.mul_(0.999), runtime),
    }


def _best_seconds(work: Callable[[], object], runtime: Runtime, repeats: int = 7) -> float:
    """The shortest of several runs: what the machine can do, not what it does on average."""
    seconds = []
    for _ in range(repeats):
        runtime.synchronize()
        start = time.perf_counter()
        work()
        runtime.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
