"""A training step as one CUDA graph: the CPU launches it at once, instead of kernel by kernel.

Source: PyTorch's notes "CUDA semantics", CUDA graphs, whole-network capture.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import masking_utils

from src.experiment import Mark, Step, no_mark

_EAGER_STEPS = 2  # the optimizer makes its state in the first, libraries their workspaces


class GraphedStep:
    """`step`, captured in its third call and replayed from then on.

    A step whose phases are marked runs kernel by kernel: nothing can be seen inside a graph. The graph is let go first,
    and captured again if it is wanted again: it holds all memory of a step, beside which another may have no room.
    `on_capture` is told the peak of the captured step, in bytes: replays use that memory again, and ask the allocator
    for none of it. It is told 0 when the graph is let go.
    """

    def __init__(self, step: Step, on_capture: Callable[[int], None]) -> None:
        self._step, self._on_capture = step, on_capture
        self._eager_steps = 0
        self._stream = torch.cuda.Stream()  # capturing needs another than the usual one, and gradients stay with it
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: torch.Tensor | None = None

    def __call__(self, mark: Mark = no_mark) -> torch.Tensor:
        if mark is not no_mark or self._eager_steps < _EAGER_STEPS:
            self._eager_steps += 1
            self._let_go()
            return self._run(mark)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._loss

    def _run(self, mark: Mark) -> torch.Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(mark)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _let_go(self) -> None:
        if self._graph is None:
            return
        torch.cuda.synchronize()
        self._graph = self._loss = None
        torch.cuda.empty_cache()  # the graph's memory is its own until it is returned to the driver
        self._on_capture(0)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats()
        with _as_if_running(), torch.cuda.graph(graph, stream=self._stream):
            self._loss = self._step(no_mark)
        self._on_capture(torch.cuda.max_memory_allocated())
        self._graph = graph


@contextmanager
def _as_if_running() -> Iterator[None]:
    """transformers takes capturing for tracing, and would make a mask, with which attention takes a slower kernel.

    If it did not, it would ask the GPU whether a row holds several sequences, and wait: here each holds one.
    """
    instead = {"is_tracing": lambda *_: False, "find_packed_sequence_indices": lambda position_ids: None}
    with contextlib.ExitStack() as stack:
        for name, replacement in instead.items():
            stack.callback(setattr, masking_utils, name, getattr(masking_utils, name))
            setattr(masking_utils, name, replacement)
        yield
