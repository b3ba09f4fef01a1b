"""What an entry of the registry of model families says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = Mapping[str, Any]  # what a model's published config.json says of its architecture


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One of Hugging Face's model types."""

    model_type: str
    prefix: str  # of its classes in transformers: Llama in LlamaForCausalLM
    config_class: str = ""  # empty: prefix + Config
    package: str = ""  # of transformers.models; empty: the model type
    # Technique -> Liger's name of its switch in this family; one that is not there is a kernel that Liger lacks for it.
    liger_switches: Mapping[str, str] = field(
        default_factory=lambda: {
            "rope": "rope",
            "swiglu": "swiglu",
            "rms_norm": "rms_norm",
            "flce": "fused_linear_cross_entropy",
        }
    )
    # Why --attention sdpa would not be this model; empty: it is.
    not_sdpa: str = ""
    # Memory and speed do not depend on the weights' values, so these are built with random ones.
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def config(self) -> str:
        """The configuration class in transformers."""
        return self.config_class or f"{self.prefix}Config"

    @property
    def causal_lm(self) -> str:
        """The model class in `module`."""
        return f"{self.prefix}ForCausalLM"

    @property
    def decoder_layer(self) -> str:
        """The layer class in `module`."""
        return f"{self.prefix}DecoderLayer"

    @property
    def liger_patch(self) -> str:
        """The function in liger_kernel.transformers."""
        return f"apply_liger_kernel_to_{self.model_type}"

    @property
    def module(self) -> str:
        """The module of transformers that has its code."""
        package = self.package or self.model_type
        return f"transformers.models.{package}.modeling_{package}"


def shape(
    *,
    vocabulary: int,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    head_width: int,
    positions: int,
    theta: float,
    tied: bool,
    epsilon: float = 1e-5,
    rope: Mapping[str, Any] | None = None,
    **more: Any,
) -> Shape:
    """What every family's config.json has: `theta` is RoPE's, `rope` the rest of it, `more` the family's own fields."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_width,
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(rope or {})},
        **more,
    }


# For CPUs: about the proportions of Llama 3.2 1B (vocabulary and MLP over hidden size), 1/3000 of its weights.
_TINY: dict[str, Any] = {
    "vocabulary": 4096,
    "width": 64,
    "mlp": 256,
    "layers": 2,
    "heads": 4,
    "key_value_heads": 2,
    "head_width": 16,
    "positions": 2048,
    "theta": 500000.0,
    "tied": True,
}


def tiny(**more: Any) -> Shape:
    """A shape that Triton's interpreter can train, with a family's own fields."""
    return shape(**_TINY | more)
