"""Llama shapes shipped with the repository, building a model, and putting Liger's kernels into it."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.llama import modeling_llama

from src.config import RunConfig, Strategy
from src.utils import UsageError

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _llama3(rope_factor: float, **shape: Any) -> dict[str, Any]:
    """What every Llama 3.1/3.2 shares, with one model's own sizes."""
    return {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    } | shape


# Sizes from the models' published config.json files. Memory and speed do not depend on the weights' values.
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _llama3(
        rope_factor=32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-3B": _llama3(
        rope_factor=32.0,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B": _llama3(
        rope_factor=8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    # For CPUs: about the proportions of Llama 3.2 1B (vocabulary and MLP over hidden size) at 1/3000 of its weights.
    "tiny-llama": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


def load_model_config(config: RunConfig) -> LlamaConfig:
    """The architecture `config` names: a shipped shape, a local folder's config.json or, with --pretrained, the Hub's.

    Raises `UsageError` if the model is unknown, is no Llama, or cannot take `config.seq_length` tokens.
    """
    shape = SHAPES.get(config.model_name.removesuffix("-Instruct"))
    if shape is not None and not config.pretrained:
        model_config = LlamaConfig(**shape)
    elif config.pretrained or Path(config.model_name).is_dir():
        model_config = _from_hub(AutoConfig.from_pretrained, config.model_name)
    else:
        raise UsageError(
            f"unknown model {config.model_name!r}: use one of {', '.join(SHAPES)} (or its -Instruct id), a local "
            "folder with a config.json, or, to measure, --pretrained with a Hub id you have access to"
        )
    if model_config.model_type != "llama":
        raise UsageError(f"{config.model_name} is a {model_config.model_type!r} model; this study patches 'llama' only")
    if config.seq_length > model_config.max_position_embeddings:
        raise UsageError(
            f"--seq_length {config.seq_length} is beyond the {model_config.max_position_embeddings} positions "
            f"of {config.model_name}"
        )
    model_config.use_cache = False
    return model_config


def _from_hub(load: Callable[..., Any], model_name: str, **kwargs: Any) -> Any:
    """`load(model_name)` with the many ways in which it fails told in one line."""
    try:
        return load(model_name, **kwargs)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot load {model_name!r}: {reason} (gated model? accept its licence on huggingface.co and run "
            "'hf auth login'; without --pretrained, shipped shapes need no access)"
        ) from error


@dataclass(frozen=True)
class Kernel:
    """One replaceable part of Llama: Liger's switch for it, and what implements it in a built model."""

    liger_switch: str
    implementation: Callable[[LlamaForCausalLM], object]


# One entry per field of Strategy. A new kernel is a field there and an entry here.
KERNELS: dict[str, Kernel] = {
    "rope": Kernel("rope", lambda model: modeling_llama.apply_rotary_pos_emb),
    "swiglu": Kernel("swiglu", lambda model: type(model.model.layers[0].mlp)),
    "rms_norm": Kernel("rms_norm", lambda model: type(model.model.norm)),
    "flce": Kernel("fused_linear_cross_entropy", lambda model: model.forward.__func__),
}


# Notices about Liger's own code that a user can do nothing about: a back end for other hardware that is not
# installed, and a config attribute that Liger's forward still reads. Any other warning passes.
_HIDDEN_NOTICES = {
    "liger_kernel.backends.registry": "could not be imported",
    "transformers.configuration_utils": "`use_return_dict` is deprecated",
}


@functools.cache
def _hide_notices() -> None:
    for name, text in _HIDDEN_NOTICES.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in str(record.msg))


def apply_strategy(strategy: Strategy) -> None:
    """Put the strategy's Liger kernels into Hugging Face's Llama, for models built after this call.

    Liger replaces module globals for the whole process, so call it once per process, or inside `patched()`. With no
    kernel on, Liger is not even imported. Liger's stand-alone cross-entropy stays off: with `flce=False` the loss is
    Hugging Face's.
    """
    if not strategy.kernels:
        return
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise UsageError(
            f"Liger's kernels cannot be imported ({error}): pip install -r requirements.txt, or switch them off with "
            "--enable_rope 0 --enable_swiglu 0 --enable_rms 0 --enable_flce 0"
        ) from error
    _hide_notices()
    switches = {kernel.liger_switch: getattr(strategy, name) for name, kernel in KERNELS.items()}
    apply_liger_kernel_to_llama(**switches, cross_entropy=False)


@contextmanager
def patched() -> Iterator[None]:
    """Undo, on exit, what Liger replaced in Hugging Face's Llama.

    Liger replaces names of the module and the forward of LlamaForCausalLM; a model built inside must not be used
    outside.
    """
    names, forward = dict(vars(modeling_llama)), LlamaForCausalLM.forward
    try:
        yield
    finally:
        vars(modeling_llama).update(names)
        LlamaForCausalLM.forward = forward


def implementations(model: LlamaForCausalLM) -> dict[str, str]:
    """Qualified names of the functions and classes that implement each kernel's part in this model, loss included."""
    parts = {name: kernel.implementation(model) for name, kernel in KERNELS.items()}
    parts |= {"cross_entropy": torch.nn.functional.cross_entropy, "decoder_layer": type(model.model.layers[0])}
    return {name: f"{part.__module__}.{part.__qualname__}" for name, part in parts.items()}


def build_model(config: RunConfig, device: torch.device) -> LlamaForCausalLM:
    """The model of the experiment, in training mode on `device`, with random or real weights in `config.dtype`."""
    model_config = load_model_config(config)
    apply_strategy(config.strategy)
    if config.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UsageError("--attention flash_attention_2 needs the package flash-attn: install it or use sdpa")
    kwargs = {"dtype": TORCH_DTYPES[config.dtype], "attn_implementation": config.attention}
    if config.pretrained:
        load = AutoModelForCausalLM.from_pretrained
        # ZeRO-3 places weights itself.
        placement = {} if is_deepspeed_zero3_enabled() else {"device_map": {"": device}}
        model = _from_hub(load, config.model_name, config=model_config, **placement, **kwargs)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(model_config, **kwargs)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_counts(shape: LlamaConfig) -> tuple[int, int]:
    """Parameters of one decoder layer, and of all the rest: embedding, LM head if it is not tied, last norm."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_attention_heads + shape.num_key_value_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return layer, embeddings + shape.hidden_size


def flops_per_step(model: LlamaForCausalLM, config: RunConfig) -> int:
    """Floating-point operations that one optimizer step needs: 6·N·T for the weights plus causal attention.

    N counts every weight that takes part in a matrix product: all but an embedding that is not also the LM head.
    Attention is 2 products of S·S·heads·head_dim per layer and sequence, halved by the causal mask, 2 operations
    each, and three times that with the backward pass. Recomputation under gradient checkpointing is not counted.
    Method: PaLM (Chowdhery et al. 2022), appendix B, with the causal half of attention left out.
    """
    shape = model.config
    weights = sum(full_shape(p).numel() for p in model.parameters() if len(full_shape(p)) == 2)
    if not shape.tie_word_embeddings:
        weights -= full_shape(model.get_input_embeddings().weight).numel()
    tokens = config.tokens_per_step
    attention_width = shape.num_attention_heads * shape.head_dim
    attention = 6 * shape.num_hidden_layers * attention_width * config.seq_length * tokens
    return 6 * weights * tokens + attention
