"""The optimizers of both experiments, and the learning-rate schedule of the offloaded one."""

from typing import Any

import torch
from transformers import get_scheduler

from src.config import RunConfig
from src.offload_config import OffloadConfig
from src.techniques.optimizers import OPTIMIZERS
from src.utils import UsageError


def build_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; its state takes the weights' dtype and is created by the first step."""
    class_name, kwargs = OPTIMIZERS[config.optimizer]
    return getattr(torch.optim, class_name)(model.parameters(), lr=config.learning_rate, **kwargs)


def build_loss_scaler(config: RunConfig, device: torch.device) -> torch.amp.GradScaler:
    """A dynamic loss scaler for fp16; for other dtypes a scaler that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")


def build_offload_optimizer(model: torch.nn.Module, config: OffloadConfig) -> torch.optim.Optimizer:
    """AdamW on the CPU, DeepSpeed's or ours, compiled at first use; or PyTorch's where the GPU keeps the states."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta_0, config.beta_1),
        "weight_decay": config.weight_decay,
    }
    if not config.optimizer_on_cpu:
        return torch.optim.AdamW(model.parameters(), **settings, fused=True)
    if config.optimizer == "deepspeed_cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(model.parameters(), **settings, fp32_optimizer_states=config.optimizer_states == "fp32")
    from src.offload.overlapped_adam import FusedCpuAdam

    return FusedCpuAdam(
        model.parameters(), **settings, states=config.optimizer_states, threads=config.cpu_threads, seed=config.seed
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: OffloadConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over the run: warm-up, timed and diagnostic steps, counted as optimizer steps.

    Raises `UsageError` for what the schedule cannot do.
    """
    steps = config.warmup + config.iterations + 1
    if config.lr_scheduler_type == "polynomial" and config.num_warmup_steps >= steps:
        raise UsageError(f"--lr_scheduler_type polynomial needs --num_warmup_steps below the run's {steps} steps")
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=config.num_warmup_steps, num_training_steps=steps
        )
    except ValueError as error:
        raise UsageError(f"--lr_scheduler_type {config.lr_scheduler_type}: {error}") from error
