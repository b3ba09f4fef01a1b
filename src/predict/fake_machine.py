"""A GPU that is not there and the host memory beside it: fake tensors that live in one or in the other.

`FakeGpu` counts every tensor as the GPU's. Under offloading most bytes are the host's, so here each storage has a place
of its own: the device that an operation was asked for, else that of its arguments. To PyTorch both are CPU tensors,
and moving one to the CPU would do nothing; what moves tensors is replaced by an operation that the mode sees.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from src.machine import H100, Gpu
from src.predict.fake_gpu import FakeGpu
from src.predict.live_memory import tensors_in
from src.utils import next_power_of_two

aten = torch.ops.aten
_CPU = torch.device("cpu")


class HostMemory:
    """Counts the bytes of a process's tensors in host memory.

    Ordinary memory goes back to the system. Pinned memory is taken in powers of two and kept for the next request of
    the same size (aten/src/ATen/core/CachingHostAllocator.h).
    """

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self._kept: Counter[int] = Counter()  # pinned blocks that nobody uses, by size

    def allocate(self, count: int, *, pinned: bool = False) -> Callable[[], None]:
        """Take `count` > 0 bytes; returns what gives them back."""
        if not pinned:
            self._take(count)
            return lambda: self._take(-count)
        size = next_power_of_two(count)
        if self._kept[size]:
            self._kept[size] -= 1
        else:
            self._take(size)
        return lambda: self._kept.update([size])

    def _take(self, count: int) -> None:
        self.live_bytes += count
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _infinity_test_bytes(tensor: torch.Tensor) -> int:
    """The absolute values that `isinf` makes first (aten/src/ATen/native/TensorCompare.cpp)."""
    return tensor.numel() * tensor.element_size()


# Memory that an operation on the host takes and gives back while it runs, besides its outputs.
_HOST_TEMPORARIES: dict[Callable, Callable[..., int]] = {aten.isinf.default: _infinity_test_bytes}


class FakeMachine(FakeGpu):
    """Gives fake tensors memory on a simulated `card` or in the host beside it."""

    def __init__(self, card: Gpu = H100, limit_bytes: int | None = None) -> None:
        super().__init__(card, limit_bytes)
        self.host = HostMemory()
        self._places: dict[int, torch.device] = {}  # of each live storage, by the address of its StorageImpl
        self._place = _CPU  # of what the operation that runs now returns
        self._destination: torch.device | None = None  # of a tensor that is being moved
        self._pinning = False

    def begin_counting(self) -> None:
        """Not counted: what the host does, and what is copied meanwhile, has no rates."""

    def place_of(self, tensor: torch.Tensor) -> torch.device:
        """Where the bytes of `tensor` are."""
        return self._places.get(tensor.untyped_storage()._cdata, _CPU)

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        before = self._place, self._pinning
        self._place = self._place_of_result(func, args, kwargs)
        self._pinning = bool(kwargs.pop("pin_memory", False)) or self._pinning
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._place, self._pinning = before

    def _place_of_result(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
        if self._destination is not None:
            return self._destination
        # A conversion that autograd asks for names the CPU, where it takes every tensor to be.
        if kwargs.get("device") is not None and func is not aten._to_copy.default:
            return _placed(kwargs["device"])
        places = {self.place_of(tensor) for tensor in tensors_in([args, kwargs])}
        return next((place for place in places if place.type != "cpu"), _CPU)

    def account(self, result: Any, func: Callable, reused: torch.UntypedStorage | None = None) -> None:
        new = []
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self._places:
                continue
            self._places[storage._cdata] = self._place
            weakref.finalize(storage, self._places.pop, storage._cdata)
            if self._place.type == "cuda":
                new.append(tensor)
            elif self._place.type == "cpu" and storage.nbytes():
                weakref.finalize(storage, self.host.allocate(storage.nbytes(), pinned=self._pinning))
        super().account(new, func, reused)

    def _take_temporaries(self, func: Callable, args: Sequence[Any]) -> None:
        if self._place.type == "cuda":
            super()._take_temporaries(func, args)
        elif func in _HOST_TEMPORARIES:
            # It is gone before the output comes, which is no larger: only a peak is left.
            self.host.allocate(_HOST_TEMPORARIES[func](*args))()

    def _copy(self, tensor: torch.Tensor, place: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self._destination = place
        try:
            return aten._to_copy(tensor, dtype=dtype) if dtype != tensor.dtype else aten.clone(tensor)
        finally:
            self._destination = None

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in pinned host memory."""
        before, self._pinning = self._pinning, True
        try:
            return self._copy(tensor, _CPU, tensor.dtype)
        finally:
            self._pinning = before

    def _patches(self) -> Iterator[contextlib.AbstractContextManager]:
        yield from super()._patches()
        to = torch.Tensor.to

        def device(tensor: FakeTensor) -> torch.device:
            if tensor.fake_mode.in_kernel_invocation:
                return torch.device("meta")
            return tensor.fake_device if self._inside_operation else self.place_of(tensor)

        def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            wanted = _place_asked_for(*args, **kwargs)
            if self._inside_operation or wanted is None or wanted.type == "meta":
                return to(tensor, *args, **kwargs)
            dtype = _dtype_asked_for(*args, **kwargs) or tensor.dtype
            if wanted == self.place_of(tensor):
                return to(tensor, dtype)
            return self._copy(tensor, wanted, dtype)

        yield mock.patch.object(FakeTensor, "device", property(device))
        yield mock.patch.object(FakeTensor, "is_cuda", property(lambda t: self.place_of(t).type == "cuda"), create=True)
        replacements = {
            "to": move,
            "cpu": lambda tensor, *_, **__: move(tensor, _CPU),
            "cuda": lambda tensor, *_, **__: move(tensor, "cuda"),
            "pin_memory": lambda tensor, *_: self.pin(tensor),
            "record_stream": lambda tensor, stream: None,
        }
        for name, replacement in replacements.items():
            yield mock.patch.object(torch.Tensor, name, replacement)
        # Fake storages have no data; what compares addresses asks whether two tensors share one.
        yield mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)


def _placed(device: Any) -> torch.device:
    """One of the two places, or "meta": there is one GPU."""
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" else device


def _place_asked_for(*args: Any, **kwargs: Any) -> torch.device | None:
    """The device in the arguments of `Tensor.to`, None if it is to stay where it is."""
    first = kwargs.get("device", args[0] if args else None)
    if isinstance(first, torch.Tensor):
        return first.device
    return _placed(first) if isinstance(first, str | int | torch.device) else None


def _dtype_asked_for(*args: Any, **kwargs: Any) -> torch.dtype | None:
    """The dtype in the arguments of `Tensor.to`."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].dtype
    return kwargs.get("dtype") or next((value for value in args if isinstance(value, torch.dtype)), None)
