"""Building a model of any family, with Liger's kernels in it, and counting its weights and operations."""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from src import architecture, techniques
from src.config import RunConfig
from src.families import FAMILIES, Family, check_name, shipped
from src.techniques import KERNEL_NAMES, TECHNIQUES
from src.techniques.kernels import lacking
from src.techniques.lora import adapter_parameters
from src.utils import UsageError, ceil_div, first_line

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model_config(config: RunConfig) -> PretrainedConfig:
    """The architecture `config` names: a shipped shape, a local folder's config.json or, with --pretrained, the Hub's.

    Raises `UsageError` if the model is unknown, of no family, or cannot take `config.seq_length` tokens.
    """
    check_name(config.model_name, pretrained=config.pretrained)
    known = shipped(config.model_name)
    if known is not None and not config.pretrained:
        family, shape = known
        model_config = getattr(transformers, family.config)(**shape)
    elif os.path.isdir(config.model_name):
        model_config = architecture.read(Path(config.model_name, "config.json"), config.model_name)
    else:
        model_config = architecture.read(_from_hub(_download_config, config.model_name), config.model_name)
    positions = model_config.max_position_embeddings
    model_config.max_position_embeddings = int(positions * config.rope_scaling)
    if config.seq_length > model_config.max_position_embeddings:
        raise UsageError(
            f"--seq_length {config.seq_length} is beyond the {positions} positions of {config.model_name}: "
            f"--rope_scaling {ceil_div(config.seq_length, positions)} divides them, or a shorter sequence"
        )
    family = family_of(model_config)
    if family.not_sdpa and config.attention == "sdpa":
        raise UsageError(f"{config.model_name} needs --attention eager: {family.not_sdpa}, which sdpa leaves out")
    model_config.use_cache = False
    return model_config


def _download_config(model_name: str, *, local_files_only: bool) -> Path:
    return Path(huggingface_hub.hf_hub_download(model_name, "config.json", local_files_only=local_files_only))


def _from_hub(load: Callable[..., Any], model_name: str, **kwargs: Any) -> Any:
    """`load(model_name)` with the many ways in which it fails told in one line, and no wait for a Hub out of reach."""
    unreachable = not os.path.isdir(model_name) and _hub_is_unreachable()
    try:
        return load(model_name, local_files_only=unreachable, **kwargs)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = f"{constants.ENDPOINT} cannot be reached, and no copy is here" if unreachable else first_line(error)
        causes = (error, error.__cause__)
        gated = any(isinstance(cause, GatedRepoError | RepositoryNotFoundError) for cause in causes)
        login = ": accept its licence on huggingface.co and run 'hf auth login'" if gated else ""
        raise UsageError(f"cannot load {model_name!r}: {reason}{login}; shipped shapes need no --pretrained") from error


@functools.cache
def _hub_is_unreachable() -> bool:
    """Whether the Hub does not answer at once: its library would try for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except (httpx.HTTPError, OSError):  # the second is of HF_HUB_OFFLINE
        return True
    return False


def family_of(model_config: PretrainedConfig) -> Family:
    """The registry's entry for a model."""
    return FAMILIES[model_config.model_type]


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


def apply_kernels(config: RunConfig, family: Family) -> None:
    """Put the run's Liger kernels into Hugging Face's code, for models of `family` built after this call.

    Liger replaces module globals for the whole process, so call it once per process, or inside `patched()`. With no
    kernel on, Liger is not even imported. Liger's stand-alone cross-entropy stays off: with `flce=False` the loss is
    Hugging Face's. Raises `UsageError` if Liger is missing, or has no such kernel for the family.
    """
    if not config.kernels:
        return
    if reason := lacking(config.kernels, family):
        raise UsageError(reason)
    try:
        patch = getattr(importlib.import_module("liger_kernel.transformers"), family.liger_patch)
    except ImportError as error:
        off = " ".join(f"--{TECHNIQUES[name].flag} 0" for name in KERNEL_NAMES)
        raise UsageError(
            f"Liger's kernels cannot be imported ({error}): pip install -r requirements.txt, or switch them off: {off}"
        ) from error
    _hide_notices()
    switches = {switch: name in config.kernels for name, switch in family.liger_switches.items()}
    patch(**switches, cross_entropy=False)


@contextmanager
def patched() -> Iterator[None]:
    """Undo, on exit, what Liger replaced in Hugging Face's code.

    Liger replaces names of a family's module and the forward of its causal LM; a model built inside must not be used
    outside.
    """
    modules = {family: importlib.import_module(family.module) for family in FAMILIES.values()}
    names = {family: dict(vars(module)) for family, module in modules.items()}
    forwards = {family: getattr(module, family.causal_lm).forward for family, module in modules.items()}
    try:
        yield
    finally:
        for family, module in modules.items():
            vars(module).update(names[family])
            getattr(module, family.causal_lm).forward = forwards[family]


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """Qualified names of the functions and classes that implement each technique's part in this model, and the loss."""
    parts = {t.name: t.implementation(model) for t in TECHNIQUES.values() if t.implementation is not None}
    parts |= {"cross_entropy": torch.nn.functional.cross_entropy, "decoder_layer": type(model.model.layers[0])}
    return {name: f"{part.__module__}.{part.__qualname__}" for name, part in parts.items()}


def build_model(config: RunConfig, device: torch.device) -> PreTrainedModel:
    """The model of the experiment, in training mode on `device`, with random or real weights in `config.dtype`."""
    techniques.check(config)
    model_config = load_model_config(config)
    apply_kernels(config, family_of(model_config))
    kwargs = {"dtype": TORCH_DTYPES[config.dtype], "attn_implementation": config.attention}
    if config.pretrained:
        load = AutoModelForCausalLM.from_pretrained
        # ZeRO-3 places weights itself.
        placement = {} if is_deepspeed_zero3_enabled() else {"device_map": {"": device}}
        model = _from_hub(load, config.model_name, config=model_config, **placement, **kwargs)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(model_config, **kwargs)
    techniques.apply_to_model(model, config)
    return model.train()


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_counts(shape: PretrainedConfig) -> tuple[int, int]:
    """Parameters of one decoder layer, and of all the rest: embedding, LM head if it is not tied, last norm.

    Counted on a model of one layer that has no data, so that every family is counted right.
    """
    model = architecture.one_layer_model(shape)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return layer, sum(p.numel() for p in model.parameters()) - layer


def adapters_of_layer(config: RunConfig, shape: PretrainedConfig) -> int:
    """Parameters of LoRA's adapters in one decoder layer; 0 without."""
    return adapter_parameters(architecture.one_layer_model(shape).model.layers[0], config)


def flops_per_step(model: PreTrainedModel, config: RunConfig) -> int:
    """Floating-point operations that one optimizer step needs: 6·N·T for the weights plus causal attention.

    N counts every weight that takes part in a matrix product: all but an embedding that is not also the LM head. One
    that is not trained, as under LoRA, needs no gradient of its own: 4 in place of 6.
    Attention is 2 products of S·S·heads·head_dim per layer and sequence, halved by the causal mask, 2 operations
    each, and three times that with the backward pass. Recomputation under gradient checkpointing is not counted.
    Method: PaLM (Chowdhery et al. 2022), appendix B, with the causal half of attention left out.
    """
    return sum(flops_of_passes(model, config))


def flops_of_passes(model: PreTrainedModel, config: RunConfig) -> tuple[int, int]:
    """The operations of `flops_per_step` in the forward pass and in the backward pass."""
    shape, tokens = model.config, config.tokens_per_step
    of_input = None if shape.tie_word_embeddings else model.get_input_embeddings().weight
    products = [p for p in model.parameters() if len(full_shape(p)) == 2 and p is not of_input]
    weights = sum(full_shape(p).numel() for p in products)
    trained = sum(full_shape(p).numel() for p in products if p.requires_grad)
    attention_width = shape.num_attention_heads * architecture.head_dim(shape)
    attention = 2 * shape.num_hidden_layers * attention_width * config.seq_length * tokens
    forward = 2 * weights * tokens + attention
    return forward, forward + 2 * trained * tokens + attention
