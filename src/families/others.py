"""Mistral, Phi-3, OLMo 2, SmolLM3 and Granite: built as Llama is, but for a few sizes and factors."""

from typing import Any

from src.families.family import Family, Shape, shape, tiny


def _mistral(**sizes: Any) -> Shape:
    return shape(key_value_heads=8, head_width=128, theta=1000000.0, heads=32, sliding_window=None, tied=False, **sizes)


MISTRAL = Family(
    model_type="mistral",
    prefix="Mistral",
    shapes={
        "mistralai/Mistral-7B-v0.3": _mistral(vocabulary=32768, width=4096, mlp=14336, layers=32, positions=32768),
        "mistralai/Mistral-Nemo-Base-2407": _mistral(
            vocabulary=131072, width=5120, mlp=14336, layers=40, positions=131072
        ),
        "tiny-mistral": tiny(sliding_window=None),
    },
)

PHI3 = Family(
    model_type="phi3",
    prefix="Phi3",
    shapes={
        "microsoft/Phi-3-mini-4k-instruct": shape(
            vocabulary=32064,
            width=3072,
            mlp=8192,
            layers=32,
            heads=32,
            key_value_heads=32,
            head_width=96,
            positions=4096,
            theta=10000.0,
            tied=False,
            sliding_window=2047,
            original_max_position_embeddings=4096,
        ),
        "microsoft/phi-4": shape(
            vocabulary=100352,
            width=5120,
            mlp=17920,
            layers=40,
            heads=40,
            key_value_heads=10,
            head_width=128,
            positions=16384,
            theta=250000.0,
            tied=False,
            sliding_window=None,
            pad_token_id=100349,
            bos_token_id=100257,
            eos_token_id=100265,
            original_max_position_embeddings=16384,
        ),
        "tiny-phi3": tiny(tied=False, pad_token_id=None, bos_token_id=None, eos_token_id=None),
    },
)


def _olmo2(**sizes: Any) -> Shape:
    return shape(
        vocabulary=100352,
        head_width=128,
        positions=4096,
        theta=500000.0,
        epsilon=1e-6,
        tied=False,
        pad_token_id=100277,
        eos_token_id=100257,
        **sizes,
    )


OLMO2 = Family(
    model_type="olmo2",
    prefix="Olmo2",
    shapes={
        "allenai/OLMo-2-0425-1B": _olmo2(width=2048, mlp=8192, layers=16, heads=16, key_value_heads=16),
        "allenai/OLMo-2-1124-7B": _olmo2(width=4096, mlp=11008, layers=32, heads=32, key_value_heads=32),
        "tiny-olmo2": tiny(tied=False, pad_token_id=None, eos_token_id=None),
    },
)

# Every fourth layer has no RoPE, which is this class's default. There is one size.
SMOLLM3 = Family(
    model_type="smollm3",
    prefix="SmolLM3",
    shapes={
        "HuggingFaceTB/SmolLM3-3B": shape(
            vocabulary=128256,
            width=2048,
            mlp=11008,
            layers=36,
            heads=16,
            key_value_heads=4,
            head_width=128,
            positions=65536,
            theta=5000000.0,
            epsilon=1e-6,
            tied=True,
            pad_token_id=128004,
        ),
        "tiny-smollm3": tiny(layers=4, pad_token_id=None, bos_token_id=None, eos_token_id=None),
    },
)


def _granite(scaling: float, attention: float, **sizes: Any) -> Shape:
    return shape(
        vocabulary=49155,
        layers=40,
        heads=32,
        key_value_heads=8,
        positions=131072,
        theta=5000000.0,
        tied=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=scaling,
        attention_multiplier=attention,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
    )


GRANITE = Family(
    model_type="granite",
    prefix="Granite",
    # Its logits are divided by a number, which Liger's fused loss cannot do.
    liger_switches={"rope": "rope", "swiglu": "swiglu", "rms_norm": "rms_norm"},
    shapes={
        "ibm-granite/granite-3.1-2b-base": _granite(8.0, 0.015625, width=2048, mlp=8192, head_width=64),
        "ibm-granite/granite-3.1-8b-base": _granite(16.0, 0.0078125, width=4096, mlp=12800, head_width=128),
        "tiny-granite": tiny(
            embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.0625
        ),
    },
)
