"""What a script builds and `measure` runs."""

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from src.measure import Step


@dataclass(frozen=True)
class Experiment:
    """A model, the loss scaler its gradients went through, and the step that trains it."""

    model: LlamaForCausalLM
    scaler: torch.amp.GradScaler
    step: Step

    def gradients(self) -> list[torch.Tensor]:
        """The gradients there are now, in the order of the parameters."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def grad_norm(self) -> float:
        """L2 norm of all gradients, without the loss scale."""
        return torch.nn.utils.get_total_norm(self.gradients()).item() / self.scaler.get_scale()
