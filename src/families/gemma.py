"""Gemma 2 and 3 (text). Their MLP is a GeGLU, which takes the place of SwiGLU: `--enable_swiglu` switches it."""

from typing import Any

from src.families.family import Family, Shape, shape, tiny

_SWITCHES = {"rope": "rope", "swiglu": "geglu", "rms_norm": "rms_norm", "flce": "fused_linear_cross_entropy"}


def _gemma2(**sizes: Any) -> Shape:
    return shape(
        vocabulary=256000,
        head_width=256,
        positions=8192,
        theta=10000.0,
        epsilon=1e-6,
        tied=True,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        **sizes,
    )


GEMMA2 = Family(
    model_type="gemma2",
    prefix="Gemma2",
    liger_switches=_SWITCHES,
    not_sdpa="its attention scores are capped",
    shapes={
        "google/gemma-2-2b": _gemma2(width=2304, mlp=9216, layers=26, heads=8, key_value_heads=4),
        "google/gemma-2-9b": _gemma2(width=3584, mlp=14336, layers=42, heads=16, key_value_heads=8),
        "tiny-gemma2": tiny(query_pre_attn_scalar=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    },
)


# Layers of a sliding window have a RoPE of their own.
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}


def _gemma3(**sizes: Any) -> Shape:
    return shape(
        vocabulary=262144,
        heads=4,
        key_value_heads=1,
        head_width=256,
        positions=32768,
        theta=1000000.0,
        epsilon=1e-6,
        tied=True,
        query_pre_attn_scalar=256,
        sliding_window=512,
        **sizes,
    ) | {"rope_parameters": _ROPES}


GEMMA3 = Family(
    model_type="gemma3_text",
    prefix="Gemma3",
    config_class="Gemma3TextConfig",
    package="gemma3",
    liger_switches=_SWITCHES,
    shapes={
        "google/gemma-3-270m": _gemma3(width=640, mlp=2048, layers=18),
        "google/gemma-3-1b-pt": _gemma3(width=1152, mlp=6912, layers=26),
        "tiny-gemma3": tiny(query_pre_attn_scalar=16, sliding_window=512) | {"rope_parameters": _ROPES},
    },
)
