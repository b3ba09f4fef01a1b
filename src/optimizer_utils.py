"""The optimizer of the single-GPU experiment."""

import torch

from src.config import OPTIMIZERS, RunConfig, UsageError


def build_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; its state takes the weights' dtype and is created by the first step."""
    class_name, kwargs = OPTIMIZERS[config.optimizer]
    return getattr(torch.optim, class_name)(model.parameters(), lr=config.learning_rate, **kwargs)


def build_loss_scaler(config: RunConfig, device: torch.device) -> torch.amp.GradScaler:
    """A dynamic loss scaler for fp16; for other dtypes a scaler that does nothing.

    Raises `UsageError` for fp16 with an optimizer that cannot take scaled fp16 gradients.
    """
    scaled = config.dtype == "fp16"
    if scaled and not OPTIMIZERS[config.optimizer][1].get("fused"):
        raise UsageError(f"--dtype fp16 needs an optimizer that unscales gradients itself, not {config.optimizer}")
    return torch.amp.GradScaler(device.type, enabled=scaled)
