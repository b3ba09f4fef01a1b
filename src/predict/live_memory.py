"""Counts the bytes of live tensors, storage by storage, as a GPU's allocator would.

A CPU has no peak-memory counter. This mode sees every operation, gives each new storage a block of a simulated
allocator when an operation returns it, and takes the block back when the storage is freed; so `peak_bytes` has the
meaning of `torch.cuda.max_memory_allocated`.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.predict.allocator import CachingAllocator, Piece

# Modules between an operation and a mode's __torch_dispatch__, which PyTorch wraps.
_DISPATCHING = ("torch._dynamo", "torch._compile")

_ALONE = (object(),)  # which nothing holds but a tuple

_PLAIN = (int, float, str, torch.dtype, torch.device, type(None))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, _PLAIN):
        return  # quickly: most arguments of operations are these
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


class LiveMemory(TorchDispatchMode):
    """While entered, gives every storage that operations create a block of `allocator`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and guarding each dispatch against it takes a fifth of the time."""
        return False

    def __init__(self, allocator: CachingAllocator | None = None) -> None:
        super().__init__()
        self.allocator = allocator or CachingAllocator()
        self.blocks: dict[int, Piece] = {}  # block of each live storage, by the address of its StorageImpl

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that are alive."""
        return self.allocator.allocated_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest `live_bytes` since the last `reset_peak`."""
        return self.allocator.peak_allocated_bytes

    def reset_peak(self) -> None:
        """Let the peak start again from what is alive now."""
        self.allocator.reset_peak()

    def block_of(self, tensor: torch.Tensor) -> Piece | None:
        """The block that holds `tensor`, None if it has no bytes or was made outside."""
        return self.blocks.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        reused = args[0].untyped_storage() if _adds_in_place(func, args) else None
        result = func(*args, **(kwargs or {}))
        self.account(result, func, reused)
        return result

    def account(self, result: Any, func: Callable, reused: torch.UntypedStorage | None = None) -> None:
        """Give the new storages in an operation's `result` their blocks; the first takes over that of `reused`."""
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self.blocks or storage.nbytes() == 0:
                continue
            block = None if reused is None else self.blocks.pop(reused._cdata, None)
            block = block or self.allocate(storage.nbytes(), func)
            self.blocks[storage._cdata] = block
            weakref.finalize(storage, self._storage_freed, storage._cdata, block)

    def allocate(self, count: int, func: Callable | None) -> Piece:
        """A block for `count` bytes that operation `func` asked for."""
        return self.allocator.allocate(count)

    def free(self, block: Piece) -> None:
        """Take back a block."""
        self.allocator.free(block)

    def _storage_freed(self, key: int, block: Piece) -> None:
        # A block that was taken over by another storage is that storage's to free.
        if self.blocks.get(key) is block:
            del self.blocks[key]
            self.free(block)


def _adds_in_place(func: Callable, args: Sequence[Any]) -> bool:
    """Whether, without a mode, this operation would write to its first argument: autograd's sum of two gradients.

    The engine adds the gradients that reach a node into the first one's memory if nobody else holds it, but out of
    place whenever a dispatch mode is active (torch/csrc/autograd/input_buffer.cpp). It calls from C++, so the nearest
    Python frame is the one that started it; a tensor that only it holds has the counts below in here. One that Python
    holds as well has a reference more: a full backward hook, as DeepSpeed's, keeps the gradient of what a layer
    returned until the layer's backward pass has ended.
    """
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
        return False
    caller = sys._getframe(2)
    while caller.f_code.co_name == "__torch_dispatch__" or caller.f_globals["__name__"].startswith(_DISPATCHING):
        caller = caller.f_back
    if caller.f_code.co_name != "_engine_run_backward":
        return False
    first = args[0]
    references = sys.getrefcount(first) - sys.getrefcount(_ALONE[0])  # beside those of a tuple: the engine's, `first`
    return (first._use_count(), torch._C._storage_Use_Count(first.untyped_storage()._cdata), references) == (4, 2, 2)
