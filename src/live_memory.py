"""Counts the bytes of live tensors, storage by storage, as a GPU's caching allocator would.

A CPU has no peak-memory counter. This mode sees every operation, adds each new storage when an operation returns it
and takes it off when it is freed, so `peak_bytes` has the meaning of `torch.cuda.max_memory_allocated`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The allocator hands out multiples of this: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp.
BLOCK_BYTES = 512


def allocated_bytes(count: int) -> int:
    """Bytes the CUDA caching allocator counts as allocated for a request of `count` bytes."""
    return -(-count // BLOCK_BYTES) * BLOCK_BYTES


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


class LiveMemory(TorchDispatchMode):
    """While entered, keeps `live_bytes` and `peak_bytes` of the storages that operations create."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Let the peak start again from what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = allocated_bytes(storage.nbytes())
        self.live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
