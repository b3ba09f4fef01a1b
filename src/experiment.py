"""The contract between a script and what runs it: the device, the step and its marks, the batch, the script itself."""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from src.config import RunConfig
from src.techniques import forward_arguments

PHASES = ("forward", "backward", "optimizer")
Mark = Callable[[str], None]
# step(mark) runs one optimizer step, calls mark(phase) as each phase begins, and returns the detached loss.
Step = Callable[[Mark], torch.Tensor]
Batch = dict[str, Any]  # keyword arguments of the model


def no_mark(phase: str) -> None:
    """The mark of a timed step: does nothing."""


class OutOfMemory(Exception):
    """A GPU, real or simulated, has no room. `facts` are what the record keeps of it."""

    facts: Mapping[str, int | None]


class Runtime(Protocol):
    """What measuring needs of a device. Byte counts are those of this process's tensors on it."""

    device: torch.device

    def tracking(self) -> AbstractContextManager: ...
    def synchronize(self) -> None: ...
    def release_cache(self) -> None: ...
    def reset_peak(self) -> None: ...
    def peak_bytes(self) -> tuple[int | None, int | None]: ...
    def device_used_bytes(self) -> int | None: ...
    def allocation_retries(self) -> int | None: ...
    def captured(self, step: "Step") -> "Step": ...


@dataclass(frozen=True)
class Experiment:
    """A model, its optimizer, the loss scaler its gradients went through, and the step that trains it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: Step
    steps_before = 0  # optimizer steps that the weights had had when this run began

    def resident(self) -> dict[str, list[torch.Tensor]]:
        """What stays on the GPU between steps, by what it is for."""
        states = [t for state in self.optimizer.state.values() for value in state.values() for t in _tensors_in(value)]
        weights = [t for parameter in self.model.parameters() for t in _tensors_in(parameter)]
        return {"parameters": weights, "optimizer_state": states}

    def labelling(self, attribution: Any) -> AbstractContextManager:
        """Nothing beyond the model's own modules asks for memory."""
        return nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """The gradients there are now, in the order of the parameters."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def grad_norm(self) -> float | None:
        """L2 norm of all gradients, taken in fp32 and without the loss scale; None if the step has let them go."""
        if not self.gradients():
            return None
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients()]
        return torch.linalg.vector_norm(torch.stack(norms)).item() / self.scaler.get_scale()


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors with memory of their own in a weight or an optimizer's state, which quantised ones keep in parts."""
    if isinstance(value, torch.Tensor) and not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [part for part in getattr(value, "__dict__", {}).values() if isinstance(part, torch.Tensor)]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What one of the two scripts hands over to those who run it: the command line, grids, dry runs and checks."""

    name: str
    defaults: RunConfig
    cpu_defaults: Mapping[str, Any]  # in their place where there is no GPU
    build_experiment: Callable[..., Experiment]
    main: Callable[..., int]  # runs one configuration; returns the exit status
    # Makes a `main` for several runs in one process that differ in their sizes alone, and share what it builds.
    main_for_many: Callable[[], Callable[..., int]] | None = None
    # simulate(config, card, limit_bytes) is what its dry runs run on; None: a GPU alone.
    simulate: Callable[..., Any] | None = None
    kept_dry_runs: Callable[[], Any] | None = None  # the same as `main_for_many`, of dry runs
    unchecked: Callable[..., Sequence[str]] = lambda config: ()  # what of its prediction no measured record shows


Build = Callable[[RunConfig, Runtime], Experiment]


def set_seed(seed: int) -> None:
    """Seed every random generator an experiment draws from."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_batches(vocab_size: int, config: RunConfig, device: torch.device) -> list[Batch]:
    """One step's micro-batches of random tokens that are their own labels, int64, without padding.

    Each is of shape (batch_size, seq_length).
    """
    tokens = torch.randint(vocab_size, (config.global_batch_size, config.seq_length), device=device)
    return _micro_batches(tokens, config)


def random_batches_of_rank(vocab_size: int, config: RunConfig, device: torch.device) -> list[Batch]:
    """This rank's micro-batches of one global random batch, the same for any number of ranks and micro-batches."""
    # A generator of its own: what building the model draws from the global one differs from rank to rank.
    generator = torch.Generator().manual_seed(config.seed)
    whole = torch.randint(vocab_size, (config.global_batch_size, config.seq_length), generator=generator)
    ranks = config.global_batch_size // (config.batch_size * config.gradient_accumulation_steps)
    return _micro_batches(whole.chunk(ranks)[int(os.environ.get("RANK", "0"))].to(device), config)


def _micro_batches(tokens: torch.Tensor, config: RunConfig) -> list[Batch]:
    parts = tokens.chunk(config.gradient_accumulation_steps)
    return [{"input_ids": ids, "labels": ids} | forward_arguments(config) for ids in parts]
