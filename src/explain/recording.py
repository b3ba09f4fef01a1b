"""Records one extra step of an experiment so that each block of GPU memory can be told apart.

Hooks tell a `Sink` which module or autograd node is about to ask for memory, which blocks hold weights, gradients and
the like, and which phase begins. On a GPU the sink is the CUDA allocator's own history, in which labels and notes
become part of the snapshot; in a dry run it is the simulated GPU. This room reads both. No dispatch mode is
involved: under one, autograd would not add gradients in place, and the peak would be another.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from src.experiment import Mark, Step, no_mark
from src.explain.categories import LOSS_MODULE, OWNER, PEAK, PHASE

# Allocator events kept: one step of an 8B model without gradient checkpointing has about 10,000.
MAX_ENTRIES = 100_000


class Sink(Protocol):
    """Who keeps what memory is for."""

    def set_label(self, label: str) -> None: ...
    def own(self, category: str, tensor: torch.Tensor) -> None: ...
    def enter_phase(self, phase: str) -> None: ...


class Attributed(Protocol):
    """An experiment whose memory can be told apart."""

    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def step(self) -> Step: ...
    def resident(self) -> dict[str, list[torch.Tensor]]: ...
    def gradients(self) -> list[torch.Tensor]: ...
    def labelling(self, attribution: "Attribution") -> contextlib.AbstractContextManager: ...


class Attribution:
    """Tells `sink` what the memory is for while `experiment`'s step runs."""

    def __init__(self, sink: Sink, experiment: Attributed) -> None:
        self._sink = sink
        self._experiment = experiment
        self._phase = ""
        self._running: list[tuple[str, int]] = []  # modules that are running, and the autograd node each began at
        self._node = ""  # label of the autograd node that is running
        self._ranges: list[tuple[range, str]] = []  # autograd nodes of each module, inner modules first

    def step(self, mark: Mark = no_mark) -> torch.Tensor:
        """The experiment's step, with everything in it labelled; `mark` is called as each phase begins."""

        def enter_phase(phase: str) -> None:
            mark(phase)
            self._enter_phase(phase)

        for category, tensors in self._experiment.resident().items():
            self.own(category, tensors)
        with self._hooks(), self._experiment.labelling(self):
            return self._experiment.step(enter_phase)

    def own(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Note what the blocks of `tensors` are for."""
        for tensor in tensors:
            if tensor.is_cuda and tensor.untyped_storage().nbytes():
                self._sink.own(category, tensor)

    @contextlib.contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is asked for in this block is asked for by `name`."""
        self._sink.set_label(name)
        try:
            yield
        finally:
            self._tell()

    def _enter_phase(self, phase: str) -> None:
        self._phase, self._node = phase, ""
        if phase == "optimizer":
            self.own("gradients", self._experiment.gradients())
        self._sink.enter_phase(phase)
        self._sink.set_label("")

    def _enter(self, name: str) -> None:
        self._running.append((name, torch.autograd._get_sequence_nr()))
        self._tell()

    def _leave(self) -> tuple[str, range]:
        name, first_node = self._running.pop()
        self._tell()
        return name, range(first_node, torch.autograd._get_sequence_nr())

    def _tell(self) -> None:
        if self._running:
            recomputed = "recomputed" if self._phase == "backward" else ""
            self._sink.set_label(f"{self._running[-1][0]}|{recomputed}")
        else:
            self._sink.set_label(self._node)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        """Hooks on every module of the model; they go when the step is done."""
        model = self._experiment.model
        handles = []
        for path, module in model.named_modules():
            enter = functools.partial(self._enter_module, path or LOSS_MODULE)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            # A recomputation may end early, by an exception.
            handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        for layer in model.model.layers:
            if layer.gradient_checkpointing:
                handles.append(layer.register_forward_pre_hook(self._note_checkpoint, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_module(self, name: str, _module: torch.nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        if name == LOSS_MODULE:
            self.own("inputs", (value for value in kwargs.values() if isinstance(value, torch.Tensor)))
        self._enter(name)

    def _leave_module(self, _module: torch.nn.Module, _args: tuple, output: Any) -> None:
        name, nodes = self._leave()
        if self._phase != "forward":
            return
        self._ranges.append((nodes, name))
        if name == LOSS_MODULE and output is not None:
            self._label_nodes(output.loss.grad_fn)
            self._ranges.clear()

    def _note_checkpoint(self, _layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._phase == "forward":
            self.own("checkpoints", [args[0] if args else kwargs["hidden_states"]])

    def _label_nodes(self, root: Any) -> None:
        """Let each autograd node that `root` leads to say, as it runs backward, which module it came from."""
        for node in _graph(root):
            if node.name().endswith("AccumulateGrad"):
                continue  # its work belongs to the node before
            number = node._sequence_nr()
            module = next((name for nodes, name in self._ranges if number in nodes), "")
            node.register_prehook(self._node_runs(f"{module}|{node.name()}"))

    def _node_runs(self, label: str) -> Callable[[Any], None]:
        def tell(_gradients: Any) -> None:
            self._node = label
            self._tell()

        return tell


def _graph(root: Any) -> Iterator[Any]:
    """Every autograd node that `root` leads to."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


class _AllocatorHistory:
    """The CUDA allocator's history as a sink: labels go to the allocations that follow, notes between the events."""

    def set_label(self, label: str) -> None:
        torch.cuda.memory._set_memory_metadata(label)

    def own(self, category: str, tensor: torch.Tensor) -> None:
        _note(f"{OWNER} {category} {tensor.untyped_storage().data_ptr()}")

    def enter_phase(self, phase: str) -> None:
        _note(f"{PHASE} {phase}")


def _note(text: str) -> None:
    with torch.profiler.record_function(text):
        pass


def record_step(experiment: Attributed) -> dict[str, Any]:
    """Run one step with the CUDA allocator's history on; returns PyTorch's snapshot with labels and notes in it.

    Requests keep their Python stack, releases do not: looking at the stack while an exception unwinds it, such as the
    one with which a recomputation ends, loses the exception, and the step fails ("returned NULL without setting an
    exception"; PyTorch 2.11 under DeepSpeed, and with Gemma 2's kernels).
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.memory._record_memory_history(
        max_entries=MAX_ENTRIES, stacks="python", context="alloc", global_record_annotations=True
    )
    try:
        Attribution(_AllocatorHistory(), experiment).step()
        torch.cuda.synchronize()
        _note(f"{PEAK} {torch.cuda.max_memory_allocated()}")
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
        torch.cuda.memory._set_memory_metadata("")
    now = snapshot["external_annotations"][-1]["time_us"]
    for address in _workspaces():
        note = {"name": f"{OWNER} library_workspace {address}", "stage": "START", "time_us": now}
        snapshot["external_annotations"].append(note)
    return snapshot


def _workspaces() -> set[int]:
    """Addresses of cuBLAS's workspaces: what the allocator gets back when they are given up; they are made again."""
    before = _active_addresses()
    torch._C._cuda_clearCublasWorkspaces()
    return before - _active_addresses()


def _active_addresses() -> set[int]:
    blocks = (block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"])
    return {block["address"] for block in blocks if block["state"] == "active_allocated"}
