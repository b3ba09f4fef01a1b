"""Checkpoints on the host whose copies run beside the step: out while later layers run, back while later ones go back.

At most two checkpoints are on the GPU on their way out, and two on their way back. Every block is taken and given back
by the stream of the step, which waits for a copy before it lets its tensor go: so the peak is the same in every step.

A layer may keep what its attention returned there, too. That is for long sequences, whose peak is in attention's
backward pass: without `ahead` a layer's input comes back when that layer needs it, and not beside another's attention.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from src.techniques.kept_attention import KeepAttention, UseKept
from src.techniques.pinned import PinnedBuffers


@dataclass(eq=False)
class _Kept:
    """A tensor on its way: its values in the order of its memory, and how they are to be seen."""

    values: torch.Tensor | None  # on the GPU, flat
    shape: torch.Size
    strides: tuple[int, ...]
    before: "_Kept | None" = None  # a layer's input: that of the layer before
    attention: "list[_Kept]" = field(default_factory=list)  # a layer's input: what its attention returned
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    host: list[torch.Tensor] = field(default_factory=list)
    copied: Any = None  # the event after its last copy

    def __post_init__(self) -> None:
        self.device, self.dtype = self.values.device, self.values.dtype


class HostCheckpoints:
    """What one model's layers keep on the host."""

    def __init__(self, *, ahead: bool = True) -> None:
        self._ahead = ahead
        self.buffers = PinnedBuffers()
        self._last: _Kept | None = None  # the newest layer's input
        self._attention: list[_Kept] = []  # of the layer that begins
        self._leaving: list[_Kept] = []  # of the layer that has begun: their copies run
        self._stream: Any = None

    def call(self, function: Callable[..., Any], *args: Any, keep_attention: bool = False, **kwargs: Any) -> Any:
        """`function(*args)`, computed again in the backward pass, with the tensors of `args` on the host until then.

        With `keep_attention` its attention is not computed again: what that returned is on the host, too.
        """
        self._attention = []
        contexts = {"context_fn": self._contexts} if keep_attention else {}
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, **contexts, **kwargs)

    def _contexts(self) -> tuple[KeepAttention, UseKept]:
        """PyTorch enters one in the forward pass, the other while it computes again."""
        attention = self._attention

        def keep(tensor: torch.Tensor) -> _Kept:
            kept = _described(tensor)
            attention.append(kept)
            self._leaving.append(kept)
            self._copy_out(kept)
            return kept

        keeping = KeepAttention(keep)
        return keeping, UseKept(keeping.results, self._take)

    def _pack(self, tensor: torch.Tensor) -> _Kept | torch.Tensor:
        if not tensor.numel():
            return tensor  # PyTorch 2.11 saves an empty one beside the arguments
        for kept in self._leaving:
            self._let_go(kept)
        self._leaving = []
        last = self._last
        if last is not None:
            if last.before is not None:
                self._let_go(last.before)
            self._copy_out(last)
        # The newest one stays: if no layer follows, the backward pass begins with it.
        self._last = _described(tensor)
        self._last.before, self._last.attention = last, self._attention
        return self._last

    def _unpack(self, kept: _Kept | torch.Tensor) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        tensor = self._take(kept)
        before = self._last = kept.before
        for needed in kept.attention:
            self._copy_back(needed)
        if before is not None and self._ahead:
            self._copy_back(before)
        elif before is not None:
            self._let_go(before)
        return tensor

    def _take(self, kept: _Kept) -> torch.Tensor:
        """The tensor, for the step to use; it is not kept any longer."""
        self._copy_back(kept)
        self._wait(kept)
        tensor, kept.values = kept.values.as_strided(kept.shape, kept.strides), None
        # The next copy into a buffer waits, on the same stream, for this one out of it.
        self.buffers.give_back(kept.host)
        kept.host = []
        return tensor

    def _copy_out(self, kept: _Kept) -> None:
        kept.host = self.buffers.take(kept.values.nbytes, pin=kept.device.type == "cuda")
        with self._beside(kept):
            for piece, part in _pairs(kept):
                piece.copy_(part, non_blocking=True)

    def _copy_back(self, kept: _Kept) -> None:
        if kept.values is not None:
            return
        kept.values = torch.empty(kept.shape.numel(), dtype=kept.dtype, device=kept.device)
        with self._beside(kept):
            for piece, part in _pairs(kept):
                part.copy_(piece, non_blocking=True)

    def _let_go(self, kept: _Kept) -> None:
        self._wait(kept)
        kept.values = None

    @contextlib.contextmanager
    def _beside(self, kept: _Kept) -> Iterator[None]:
        """The copies' own stream, after everything that the step has launched so far; on a CPU there is none."""
        if kept.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            kept.copied = self._stream.record_event()

    def _wait(self, kept: _Kept) -> None:
        if kept.copied is not None:
            torch.cuda.current_stream().wait_event(kept.copied)


def _described(tensor: torch.Tensor) -> _Kept:
    """A tensor whose memory has no gaps is copied as it lies there; another in the usual order."""
    with torch.no_grad():
        dense = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1 == tensor.numel()
        tensor = tensor.detach() if dense else tensor.detach().contiguous()
        return _Kept(tensor.as_strided((tensor.numel(),), (1,)), tensor.shape, tensor.stride())


def _pairs(kept: _Kept) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces on the host, and the bytes on the GPU that belong there."""
    whole, start = kept.values.view(torch.uint8), 0
    for piece in kept.host:
        part = whole[start : start + piece.numel()]
        yield piece[: part.numel()], part
        start += piece.numel()
