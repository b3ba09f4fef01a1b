"""Optimizers of the single-GPU script; the offloaded one has its own (src/optimizer_utils.py)."""

from dataclasses import dataclass, field
from typing import Any

from src.techniques.libraries import missing
from src.techniques.technique import Config, Technique


@dataclass(frozen=True)
class Optimizer:
    """A class, its library, and what it is called with beside weights and learning rate."""

    name: str
    library: str = "torch.optim"
    settings: dict[str, Any] = field(default_factory=dict)
    unpredicted: str = ""  # why a dry run cannot say what it needs


_COMPILED = "its update is compiled"
CHOICES: dict[str, Optimizer] = {
    "adamw_fused": Optimizer("AdamW", settings={"fused": True}),
    "adamw_foreach": Optimizer("AdamW", settings={"foreach": True}),
    "adamw_loop": Optimizer("AdamW", settings={"foreach": False}),
    "adafactor": Optimizer("Adafactor", settings={"foreach": False}),
    "sgd": Optimizer("SGD", settings={"fused": True}),
    # Weight decay as in PyTorch's AdamW; torchao's default is 0.
    "adamw_8bit": Optimizer("AdamW8bit", "torchao.optim", {"weight_decay": 1e-2}, _COMPILED),
    "adamw_4bit": Optimizer("AdamW4bit", "torchao.optim", {"weight_decay": 1e-2}, _COMPILED),
    "adamw_cpu": Optimizer("CPUOffloadOptimizer", "torchao.optim", unpredicted="torchao wants a GPU to be there"),
    "flash_adamw": Optimizer("FlashAdamW", "flashoptim", unpredicted="flashoptim wants a GPU to be there"),
}


def _refusal(config: Config) -> str | None:
    chosen = CHOICES[config.optimizer]
    package = chosen.library.partition(".")[0]
    if package != "torch" and (reason := missing(package)):
        return f"--optimizer {config.optimizer}: {reason}"
    if config.compute_dtype == "fp16" and not chosen.settings.get("fused"):
        return f"fp16 needs an optimizer that unscales gradients itself, not {config.optimizer}"
    if config.dtype == "fp32" and config.optimizer == "flash_adamw":
        return "--optimizer flash_adamw keeps what bf16 weights round off: there is nothing to keep in fp32"
    return None


def _not_predicted(config: Config) -> str | None:
    reason = CHOICES[config.optimizer].unpredicted
    return f"--optimizer {config.optimizer} is not predicted: {reason}" if reason else None


def _refusal_in_backward(config: Config) -> str | None:
    if not config.optimizer_in_backward:
        return None
    if config.gradient_accumulation_steps > 1:
        return "--optimizer_in_backward updates weights after each micro-batch: --gradient_accumulation_steps 1"
    if config.compute_dtype == "fp16":
        return "--optimizer_in_backward cannot see whether a gradient overflowed before it updates: not with fp16"
    if config.optimizer == "adamw_cpu":
        return "--optimizer adamw_cpu updates weights on the host after the backward pass: not in it"
    return None


OPTIMIZERS = (
    Technique(
        name="optimizer",
        default="adamw_fused",
        help="how weights are updated; 8bit, 4bit and cpu are torchao's, flash is flashoptim's",
        tag="",
        choices=tuple(CHOICES),
        scripts=("all_gpu",),
        refusal=_refusal,
        gpu_only=lambda config: config.optimizer in ("adamw_8bit", "adamw_4bit", "adamw_cpu", "flash_adamw"),
        unpredicted=_not_predicted,
    ),
    Technique(
        name="optimizer_in_backward",
        default=False,
        help="update each weight as soon as its gradient is there, and let that go",
        tag="inbackward",
        scripts=("all_gpu",),
        compared=True,
        refusal=_refusal_in_backward,
        gpu_only=lambda config: config.optimizer_in_backward,  # a CPU compares gradients, which are gone
    ),
)
