"""Checkpoints on the host whose copies run beside the step: out while later layers run, back while later ones go back.

At most two checkpoints are on the GPU on their way out, and two on their way back. Every block is taken and given back
by the stream of the step, which waits for a copy before it lets its tensor go: so the peak is the same in every step.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@dataclass(eq=False)
class _Kept:
    """A layer's input, on its way."""

    tensor: torch.Tensor | None  # on the GPU
    device: torch.device
    before: "_Kept | None"  # of the layer before
    host: torch.Tensor | None = None
    copied: Any = None  # the event after its last copy


class HostCheckpoints:
    """What one model's layers keep on the host; buffers there are pinned and used again in the next step."""

    def __init__(self) -> None:
        self._last: _Kept | None = None
        self._buffers: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._stream: Any = None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args)`, computed again in the backward pass, with the tensors of `args` on the host until then."""
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, **kwargs)

    def _pack(self, tensor: torch.Tensor) -> _Kept | torch.Tensor:
        if not tensor.numel():
            return tensor  # PyTorch 2.11 saves an empty one beside the arguments
        last = self._last
        if last is not None:
            if last.before is not None:
                self._let_go(last.before)
            self._copy_out(last)
        # The newest one stays: if no layer follows, the backward pass begins with it.
        self._last = _Kept(tensor.detach(), tensor.device, last)
        return self._last

    def _unpack(self, kept: _Kept | torch.Tensor) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        if kept.tensor is None:
            self._copy_back(kept)
        self._wait(kept)
        tensor, kept.tensor = kept.tensor, None
        self._release(kept)
        before, self._last = kept.before, kept.before
        if before is not None and before.tensor is None:
            self._copy_back(before)
        return tensor

    def _copy_out(self, kept: _Kept) -> None:
        kept.host = self._buffer(kept.tensor)
        self._copy(kept, kept.host, kept.tensor)

    def _copy_back(self, kept: _Kept) -> None:
        kept.tensor = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
        self._copy(kept, kept.tensor, kept.host)

    def _let_go(self, kept: _Kept) -> None:
        self._wait(kept)
        kept.tensor = None

    def _copy(self, kept: _Kept, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._beside(kept.device):
            target.copy_(source, non_blocking=True)
            kept.copied = None if self._stream is None else self._stream.record_event()

    def _beside(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The copies' own stream, after everything that the step has launched so far; on a CPU there is none."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _wait(self, kept: _Kept) -> None:
        if kept.copied is not None:
            torch.cuda.current_stream().wait_event(kept.copied)

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        free = self._buffers.setdefault((tensor.shape, tensor.dtype), [])
        if free:
            return free.pop()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")

    def _release(self, kept: _Kept) -> None:
        """The next copy into a buffer waits, on the same stream, for this one out of it."""
        if kept.host is not None:
            self._buffers[kept.host.shape, kept.host.dtype].append(kept.host)
            kept.host = None
