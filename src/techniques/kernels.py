"""The Liger kernels. Off means Hugging Face's own code."""

import sys

from src.techniques.technique import Model, Technique


def _rotary(model: Model) -> object:
    return sys.modules[type(model).__module__].apply_rotary_pos_emb


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
        help="Liger SwiGLU MLP",
        flag="enable_swiglu",
        offload_flag="enable_liger_swiglu",
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
        implementation=lambda model: model.forward.__func__,
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
)
