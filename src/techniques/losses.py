"""Losses beside the model's own, which is Hugging Face's or, as a kernel, Liger's fused one. A run has one of them."""

from types import MethodType
from typing import Any

from src.techniques.kernels import refuse_changed_logits
from src.techniques.libraries import missing
from src.techniques.technique import Config, Model, Technique
from src.utils import UsageError

_LIBRARIES = {"cce": "cut_cross_entropy", "cce_filtered": "cut_cross_entropy"}
_LARGEST_CUT = 2**31  # numbers that Cut Cross-Entropy's kernels can address: tokens x width


def _refusal(config: Config) -> str | None:
    if config.loss == "model":
        return None
    if config.flce:
        return f"a run has one loss: --loss {config.loss} goes with --enable_flce 0"
    if config.loss in _LIBRARIES and (reason := missing(_LIBRARIES[config.loss])):
        return f"--loss {config.loss}: {reason}"
    if config.loss == "torch" and not torch_has_it():
        return "--loss torch needs torch 2.13 or newer, which has linear_cross_entropy"
    return None


def torch_has_it() -> bool:
    """Whether this PyTorch has `linear_cross_entropy`."""
    from importlib.metadata import version

    return tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 13)


def _set_loss(model: Model, config: Config) -> None:
    if config.loss == "model":
        return
    from src.techniques import loss_functions

    if config.loss == "liger":
        model.loss_function = loss_functions.liger
        return
    refuse_changed_logits(model, f"--loss {config.loss}", instead="--loss liger")
    tokens, width = config.batch_size * config.seq_length, model.config.hidden_size
    if config.loss in _LIBRARIES and tokens * width > _LARGEST_CUT:
        raise UsageError(
            f"--loss {config.loss} counts in 32 bits, too few for {tokens:,} tokens x {width:,}: at most "
            f"{_LARGEST_CUT // width:,} tokens, or another loss"
        )
    loss = loss_functions.OF_HIDDEN[config.loss]
    settings: dict[str, Any] = {"chunks": config.loss_chunks} if config.loss == "chunked" else {}
    model.forward = MethodType(loss_functions.forward_with(loss, settings), model)


LOSSES = (
    Technique(
        name="loss",
        default="model",
        help="model: Hugging Face's or, if that is on, FLCE; liger: Liger's cross-entropy; cce: Cut Cross-Entropy, "
        "exact or filtered; torch: PyTorch's linear_cross_entropy; chunked: PyTorch, a piece of the logits at a time",
        tag="loss-",
        choices=("model", "liger", "cce", "cce_filtered", "torch", "chunked"),
        scripts=("all_gpu",),
        compared=True,
        changes_numerics=True,
        refusal=_refusal,
        gpu_only=lambda config: config.loss.startswith("cce"),
        to_model=_set_loss,
    ),
    Technique(
        name="loss_chunks",
        default=1,
        help="a piece of the chunked loss has as many tokens as their logits may take memory: that of so many inputs "
        "of the LM head, as --flce_chunks has it",
        tag="losschunks",
        bounds=(1, 1024),
        scripts=("all_gpu",),
        needs=("loss",),
        compared=True,
        changes_numerics=True,
        refusal=lambda config: (
            None
            if config.loss_chunks == 1 or config.loss in ("model", "chunked")
            else "--loss_chunks is for --loss chunked"
        ),
    ),
)
