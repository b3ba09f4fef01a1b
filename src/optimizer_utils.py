"""The optimizers of both experiments, and the learning-rate schedule of the offloaded one."""

import importlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import get_scheduler

from src.config import RunConfig
from src.offload_config import OffloadConfig
from src.techniques.optimizers import CHOICES
from src.utils import UsageError


def build_optimizer(model: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; its state takes the weights' dtype and is created by the first step."""
    chosen = CHOICES[config.optimizer]
    kind = getattr(importlib.import_module(chosen.library), chosen.name)
    settings = dict(chosen.settings)
    if config.cuda_graph and chosen.name == "AdamW":
        settings["capturable"] = True
    if config.optimizer == "adamw_cpu":
        settings["offload_gradients"] = config.gradient_accumulation_steps == 1

    trained = _trained(model)

    def build(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return kind(parameters, lr=config.learning_rate, **settings)

    if config.optimizer_in_backward:
        optimizer = InBackward(trained, build)
        # A parameter's hook leads through the optimizer back to the parameter, by a way that Python's collector does
        # not see: both would stay for good. The model is not on it.
        weakref.finalize(model, optimizer.remove_hooks).atexit = False
        return optimizer
    optimizer = build(trained)
    if config.optimizer == "adamw_cpu":
        optimizer.state = {}  # the host has it, and torchao no such attribute
    return optimizer


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class InBackward:
    """An optimizer for each parameter, which updates it once its gradient is complete, and lets that go.

    Source: PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward pass".
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        build: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self._optimizers = {parameter: build([parameter]) for parameter in parameters}
        self._hooks = [own.register_post_accumulate_grad_hook(self._update) for own in self._optimizers]

    def _update(self, parameter: torch.nn.Parameter) -> None:
        self._optimizers[parameter].step()
        parameter.grad = None

    def remove_hooks(self) -> None:
        """Update no more."""
        for hook in self._hooks:
            hook.remove()

    @property
    def state(self) -> dict[torch.nn.Parameter, dict[str, Any]]:
        """The optimizers' states, by parameter."""
        return {parameter: optimizer.state[parameter] for parameter, optimizer in self._optimizers.items()}

    def step(self) -> None:
        """Everything has been updated."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """No gradient is left."""


def build_loss_scaler(config: RunConfig, device: torch.device) -> torch.amp.GradScaler:
    """A dynamic loss scaler for fp16; for other dtypes a scaler that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.compute_dtype == "fp16")


def build_offload_optimizer(model: torch.nn.Module, config: OffloadConfig) -> torch.optim.Optimizer:
    """AdamW on the CPU, DeepSpeed's or ours, compiled at first use; or PyTorch's where the GPU keeps the states."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta_0, config.beta_1),
        "weight_decay": config.weight_decay,
    }
    if not config.optimizer_on_cpu:
        return torch.optim.AdamW(_trained(model), **settings, fused=True)
    if config.optimizer == "deepspeed_cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(_trained(model), **settings, fp32_optimizer_states=config.optimizer_states == "fp32")
    from src.offload.overlapped_adam import FusedCpuAdam

    return FusedCpuAdam(
        _trained(model), **settings, states=config.optimizer_states, threads=config.cpu_threads, seed=config.seed
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
