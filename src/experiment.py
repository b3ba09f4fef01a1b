"""What a script builds and `measure` runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from src.attribution import Attribution
from src.config import RunConfig
from src.measure import Step
from src.runtime import Runtime


@dataclass(frozen=True)
class Experiment:
    """A model, its optimizer, the loss scaler its gradients went through, and the step that trains it."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: Step

    def resident(self) -> dict[str, list[torch.Tensor]]:
        """What stays on the GPU between steps, by what it is for."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return {"parameters": list(self.model.parameters()), "optimizer_state": states}

    def labelling(self, attribution: Attribution) -> AbstractContextManager:
        """Nothing beyond the model's own modules asks for memory."""
        return nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """The gradients there are now, in the order of the parameters."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def grad_norm(self) -> float:
        """L2 norm of all gradients, taken in fp32 and without the loss scale."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients()]
        return torch.linalg.vector_norm(torch.stack(norms)).item() / self.scaler.get_scale()


# A script's own function that builds what it measures, so that others can run it too.
Build = Callable[[RunConfig, Runtime], Experiment]
