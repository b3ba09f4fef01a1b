"""Model families that the project can build and patch. A new one is one entry of `FAMILIES`.

Needs neither torch nor transformers: an entry names Hugging Face's classes and Liger's patch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from src.utils import UsageError

Shape = Mapping[str, Any]  # what a model's published config.json says of its architecture


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One of Hugging Face's model types."""

    model_type: str
    config_class: str  # in transformers
    causal_lm: str  # the class in `module`
    decoder_layer: str  # the class in `module`
    liger_patch: str  # the function in liger_kernel.transformers
    # Technique -> Liger's name of its switch in this family; one that is not there is a kernel that Liger lacks for it.
    liger_switches: Mapping[str, str] = field(
        default_factory=lambda: {
            "rope": "rope",
            "swiglu": "swiglu",
            "rms_norm": "rms_norm",
            "flce": "fused_linear_cross_entropy",
        }
    )
    # Memory and speed do not depend on the weights' values, so these are built with random ones.
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module of transformers that has its code."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


def _llama3(rope_factor: float, **shape: Any) -> Shape:
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


_LLAMA = Family(
    model_type="llama",
    config_class="LlamaConfig",
    causal_lm="LlamaForCausalLM",
    decoder_layer="LlamaDecoderLayer",
    liger_patch="apply_liger_kernel_to_llama",
    shapes={
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
        # For loss curves (src/check/convergence.py): some 40 million weights.
        "small-llama": {
            "vocab_size": 16384,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        # For CPUs: about the proportions of Llama 3.2 1B (vocabulary and MLP over hidden size), 1/3000 of its weights.
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
    },
)


def _qwen3(**shape: Any) -> Shape:
    """What the dense Qwen3 models share, with one model's own sizes."""
    return {
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    } | shape


_QWEN3 = Family(
    model_type="qwen3",
    config_class="Qwen3Config",
    causal_lm="Qwen3ForCausalLM",
    decoder_layer="Qwen3DecoderLayer",
    liger_patch="apply_liger_kernel_to_qwen3",
    shapes={
        "Qwen/Qwen3-0.6B": _qwen3(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            tie_word_embeddings=True,
        ),
        "Qwen/Qwen3-4B": _qwen3(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            tie_word_embeddings=True,
        ),
        "tiny-qwen3": {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    },
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (_LLAMA, _QWEN3)}

SHAPES: dict[str, tuple[Family, Shape]] = {
    name: (family, shape) for family in FAMILIES.values() for name, shape in family.shapes.items()
}


def check_name(model_name: str, *, pretrained: bool) -> None:
    """Raises `UsageError` if there is no such model, as far as can be told without asking the Hub."""
    if os.path.isdir(model_name):
        return
    if shipped(model_name) is None and not pretrained:
        raise UsageError(
            f"unknown model {model_name!r}: use one of {', '.join(SHAPES)} (or its -Instruct id), a local "
            "folder with a config.json, or, to measure, --pretrained with a Hub id you have access to"
        )
    if pretrained and shipped(model_name) is not None and "/" not in model_name:
        raise UsageError(f"{model_name} is a shape that nobody trained: leave out --pretrained, or name a model")


def shipped(model_name: str) -> tuple[Family, Shape] | None:
    """Family and shape of a model that the project ships the shape of, by its id or that of its -Instruct form."""
    return SHAPES.get(model_name) or SHAPES.get(model_name.removesuffix("-Instruct"))


def full_size(model_name: str) -> bool:
    """Whether it is a shipped shape of a size that Triton's interpreter is too slow for."""
    return shipped(model_name) is not None and not model_name.startswith(("tiny-", "small-"))
