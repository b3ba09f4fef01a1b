"""Llama 3.1 and 3.2, and TinyLlama, which is built as Llama 2."""

from typing import Any

from src.families.family import Family, Shape, shape, tiny


def _llama3(rope_factor: float, **sizes: Any) -> Shape:
    return shape(
        vocabulary=128256,
        key_value_heads=8,
        positions=131072,
        theta=500000.0,
        rope={
            "rope_type": "llama3",
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=128001,
        **sizes,
    )


LLAMA = Family(
    model_type="llama",
    prefix="Llama",
    shapes={
        "meta-llama/Llama-3.2-1B": _llama3(32.0, width=2048, mlp=8192, layers=16, heads=32, head_width=64, tied=True),
        "meta-llama/Llama-3.2-3B": _llama3(32.0, width=3072, mlp=8192, layers=28, heads=24, head_width=128, tied=True),
        "meta-llama/Llama-3.1-8B": _llama3(8.0, width=4096, mlp=14336, layers=32, heads=32, head_width=128, tied=False),
        "meta-llama/Llama-3.1-70B": _llama3(
            8.0, width=8192, mlp=28672, layers=80, heads=64, head_width=128, tied=False
        ),
        "TinyLlama/TinyLlama_v1.1": shape(
            vocabulary=32000,
            width=2048,
            mlp=5632,
            layers=22,
            heads=32,
            key_value_heads=4,
            head_width=64,
            positions=2048,
            theta=10000.0,
            tied=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        # For loss curves (src/check/convergence.py): some 40 million weights.
        "small-llama": tiny(vocabulary=16384, width=512, mlp=1408, layers=8, heads=8, key_value_heads=4, head_width=64),
        "tiny-llama": tiny(),
    },
)
