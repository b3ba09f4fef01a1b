"""A model's config.json, from a folder or the Hub: checked before anything is built from it.

Such a file comes from anywhere. It must not run code, ask a question, hang or fill the memory, and what it asks for
beyond a plain causal language model is refused, because a figure for another model would be wrong.
"""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
import transformers
from torch.utils._python_dispatch import _disable_current_modes

from src.families import FAMILIES
from src.utils import UsageError

LARGEST_FILE_BYTES = 2**24  # of a config.json; usual ones have a few thousand
# What a model returns beside its loss is no part of its architecture.
_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def _count(largest: int) -> Any:
    """A whole number from 1 to `largest`, null where Hugging Face derives it."""
    return Annotated[int, pydantic.Field(ge=1, le=largest)] | None


class Architecture(pydantic.BaseModel):
    """What every family's config.json has in common. The bounds are a few times those of the largest known models."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")

    model_type: str
    architectures: list[str] | None = None
    hidden_size: _count(2**17) = None
    intermediate_size: _count(2**20) = None
    num_hidden_layers: _count(1024) = None
    num_attention_heads: _count(2**12) = None
    num_key_value_heads: _count(2**12) = None
    head_dim: _count(2**12) = None
    vocab_size: _count(2**22) = None
    max_position_embeddings: _count(2**31) = None
    num_labels: _count(2**16) = None
    attention_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    rms_norm_eps: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    quantization_config: Any = None
    auto_map: Any = None
    pretraining_tp: Any = None

    def objections(self) -> list[str]:
        """Why a run of this model would not be what the file says, a sentence each."""
        heads, groups, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        causal = not self.architectures or any(name.endswith("ForCausalLM") for name in self.architectures)
        undivided = heads and self.hidden_size and not width and self.hidden_size % heads
        known = ", ".join(FAMILIES)
        found = {
            "it comes with code of its own (auto_map), which is never run": self.auto_map,
            "its weights are quantised (quantization_config), which is not supported": self.quantization_config,
            f"its head is that of {self.architectures}, not of a causal language model": not causal,
            "pretraining_tp is not supported": self.pretraining_tp not in (None, 1),
            f"{groups} num_key_value_heads do not divide {heads} num_attention_heads": groups and (heads or 0) % groups,
            f"{heads} num_attention_heads do not divide hidden_size {self.hidden_size}": undivided,
            f"head_dim {width} is odd, and RoPE turns pairs": (width or 0) % 2,
            f"it is a {self.model_type!r} model; known families: {known}": self.model_type not in FAMILIES,
        }
        return [sentence for sentence, holds in found.items() if holds]


def read(path: Path, model_name: str) -> transformers.PretrainedConfig:
    """Hugging Face's configuration of the model that a config.json describes.

    Raises `UsageError` if the file is none, asks for what is not honoured, or has values that cannot be.
    """
    try:
        values = _json(path)
        objections = Architecture.model_validate(values).objections()
        if objections:
            raise UsageError(objections[0])
        found = getattr(transformers, FAMILIES[values["model_type"]].config).from_dict(values | _OUTPUTS)
        one_layer_model(found)  # finds what Hugging Face's classes cannot build
        return found
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UsageError(f"cannot use {model_name!r}: config.json: {where}: {first['msg']}") from error
    except Exception as error:  # Hugging Face's classes fail in many ways on values that cannot be
        kind = "" if isinstance(error, OSError | UsageError) else f"{type(error).__name__}: "
        raise UsageError(f"cannot use {model_name!r}: {kind}{' '.join(str(error).split())[:300]}") from error


def head_dim(config: transformers.PretrainedConfig) -> int:
    """The width of a head. Most public files of Qwen2, Phi-3, OLMo 2, SmolLM3 and Granite leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def one_layer_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The model with a single decoder layer and no data. A dry run that counts memory does not see it.

    Hugging Face's `from_config` would partition it where ZeRO-3 is on, and there is nothing to partition.
    """
    values = config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    family = FAMILIES[config.model_type]
    model_class = getattr(importlib.import_module(family.module), family.causal_lm)
    with _disable_current_modes(), torch.device("meta"):
        return model_class(type(config).from_dict(values))


def _json(path: Path) -> Any:
    if not path.is_file():
        raise UsageError("it has no config.json")
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise UsageError(f"its config.json has more than {LARGEST_FILE_BYTES:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UsageError("its config.json is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"its config.json is no JSON: {error}") from error
