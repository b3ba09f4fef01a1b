"""The Liger kernels. Off means Hugging Face's own code."""

import inspect
import sys
from collections.abc import Collection
from types import MethodType
from typing import Any

from src.families import Family
from src.techniques.technique import Config, Model, Technique
from src.utils import UsageError


def _rotary(model: Model) -> object:
    return sys.modules[type(model).__module__].apply_rotary_pos_emb


def lacking(names: Collection[str], family: Family) -> str | None:
    """Which of these kernels Liger does not have for a family, in one line."""
    missing = [kernel for kernel in KERNELS if kernel.name in names and kernel.name not in family.liger_switches]
    if not missing:
        return None
    return f"Liger has no {missing[0].name} kernel for {family.model_type} models: --{missing[0].flag} 0"


def _tokens_with_labels(config: Config) -> dict[str, int]:
    """With their number Liger adds up the tokens' losses, and divides after the backward pass has scaled them.

    The labels are the tokens, shifted by one, so the last of each sequence has none.
    """
    count = config.batch_size * (config.seq_length - 1)
    return {"num_items_in_batch": count} if config.flce_reduction == "sum" else {}


def _accumulation(config: Config) -> dict[str, Any]:
    import torch

    return {"accum_dtype": torch.float32} if config.flce_accumulation == "fp32" else {}


def _underflow(config: Config) -> str | None:
    """FLCE makes the gradient in the forward pass, before the loss is scaled.

    Under "mean" it is divided by the number of tokens there, which takes most of it below what fp16 can hold
    (linkedin/Liger-Kernel issue 512).
    """
    if not (config.flce and config.compute_dtype == "fp16" and config.flce_reduction == "mean"):
        return None
    return (
        "fp16 with FLCE's mean trains wrongly: gradients are divided by the number of tokens before the loss scale "
        "lifts them, and underflow; --flce_reduction sum does not, nor does --dtype bf16"
    )


def _in_pieces(model: Model, config: Config) -> None:
    """Where there are no more tokens than a piece has, Liger's own forward pass stays."""
    tokens = config.batch_size * config.seq_length
    if not config.flce_tokens or tokens <= config.flce_tokens:
        return
    from src.techniques.loss_functions import flce, forward_with

    refuse_changed_logits(model, "--flce_tokens", instead="--flce_tokens 0")
    model.forward = MethodType(forward_with(flce, {"tokens": config.flce_tokens}), model)


# What a model does to its logits before the loss, which a loss of its hidden states leaves out.
_ON_LOGITS = ("final_logit_softcapping", "logits_scaling")


def refuse_changed_logits(model: Model, flag: str, instead: str) -> None:
    """Raises `UsageError` if a model changes its logits before the loss."""
    shape = model.config
    if changed := [name for name in _ON_LOGITS if getattr(shape, name, None) not in (None, 1.0)]:
        raise UsageError(f"{flag} leaves out the {changed[0]} of {shape.model_type} models: {instead}")


KERNELS = (
    Technique(
        name="rope",
        default=True,
        help="Liger rotary position embedding",
        flag="enable_rope",
        offload_flag="enable_liger_rope",
        compared=True,
        changes_numerics=True,
        liger_switch="rope",
        implementation=_rotary,
    ),
    Technique(
        name="swiglu",
        default=True,
        help="Liger SwiGLU MLP; Gemma's is GeGLU",
        flag="enable_swiglu",
        offload_flag="enable_liger_swiglu",
        aliases=("enable_geglu",),
        compared=True,
        changes_numerics=True,
        liger_switch="swiglu",
        implementation=lambda model: type(model.model.layers[0].mlp),
    ),
    Technique(
        name="rms_norm",
        default=True,
        help="Liger RMSNorm",
        flag="enable_rms",
        offload_flag="enable_liger_rms",
        compared=True,
        changes_numerics=True,
        liger_switch="rms_norm",
        implementation=lambda model: type(model.model.norm),
    ),
    Technique(
        name="flce",
        default=True,
        help="Liger fused linear cross-entropy (no logits tensor)",
        flag="enable_flce",
        offload_flag="enable_liger_flce",
        compared=True,
        changes_numerics=True,
        liger_switch="fused_linear_cross_entropy",
        implementation=lambda model: inspect.unwrap(model.forward, stop=inspect.ismethod).__func__,
        chosen=lambda config: False if config.loss != "model" else None,
    ),
    Technique(
        name="flce_chunks",
        default=1,
        help="logits of a chunk of tokens may take as much memory as this many inputs of the LM head (Liger: 1)",
        tag="chunks",
        bounds=(1, 1024),
        needs=("flce",),
        compared=True,
        changes_numerics=True,
        # Liger's forward passes it on to its loss. Its own default is not given: the call is then the original's.
        forward_arguments=lambda config: {"chunk_mem_const": config.flce_chunks} if config.flce_chunks > 1 else {},
    ),
    Technique(
        name="flce_reduction",
        default="mean",
        help="how FLCE adds up the tokens' losses; the default is sum under fp16, where mean trains wrongly, else mean",
        tag="",
        choices=("mean", "sum"),
        needs=("flce",),
        changes_numerics=True,
        forward_arguments=_tokens_with_labels,
        warning=_underflow,
        chosen=lambda config: "sum" if config.flce and config.compute_dtype == "fp16" else None,
    ),
    Technique(
        name="flce_accumulation",
        default="model",
        help="dtype in which FLCE adds up the LM head's gradient over its chunks: the model's, or fp32",
        tag="accumulate-",
        choices=("model", "fp32"),
        needs=("flce",),
        changes_numerics=True,
        forward_arguments=_accumulation,
    ),
    Technique(
        name="flce_tokens",
        default=0,
        help="FLCE of so many tokens at a time, so that its logits do not grow with their number; 0: of all at once",
        tag="flcetokens",
        bounds=(0, 2**31),
        needs=("flce",),
        compared=True,
        changes_numerics=True,
        to_model=_in_pieces,
    ),
)
