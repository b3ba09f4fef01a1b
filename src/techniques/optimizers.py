"""Optimizers of the single-GPU script; the offloaded one has its own (src/optimizer_utils.py)."""

from typing import Any

from src.techniques.technique import Config, Technique

# Class in torch.optim and its keyword arguments.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_fused": ("AdamW", {"fused": True}),
    "adamw_foreach": ("AdamW", {"foreach": True}),
    "adamw_loop": ("AdamW", {"foreach": False}),
    "adafactor": ("Adafactor", {"foreach": False}),
    "sgd": ("SGD", {"fused": True}),
}


def _refusal(config: Config) -> str | None:
    if config.dtype != "fp16" or OPTIMIZERS[config.optimizer][1].get("fused"):
        return None
    return f"--dtype fp16 needs an optimizer that unscales gradients itself, not {config.optimizer}"


OPTIMIZER = Technique(
    name="optimizer",
    default="adamw_fused",
    help="how weights are updated",
    tag="",
    choices=tuple(OPTIMIZERS),
    scripts=("all_gpu",),
    refusal=_refusal,
)
