"""Qwen2 (and 2.5), and the dense models of Qwen3."""

from typing import Any

from src.families.family import Family, Shape, shape, tiny


def _qwen2(**sizes: Any) -> Shape:
    return shape(theta=1000000.0, epsilon=1e-6, bos_token_id=151643, eos_token_id=151643, **sizes)


def _qwen3(**sizes: Any) -> Shape:
    return shape(
        vocabulary=151936,
        key_value_heads=8,
        head_width=128,
        positions=40960,
        theta=1000000.0,
        epsilon=1e-6,
        bos_token_id=151643,
        eos_token_id=151645,
        **sizes,
    )


_QWEN25_SMALL = {"vocabulary": 151936, "key_value_heads": 2, "positions": 32768, "tied": True}

QWEN2 = Family(
    model_type="qwen2",
    prefix="Qwen2",
    shapes={
        "Qwen/Qwen2.5-0.5B": _qwen2(**_QWEN25_SMALL, width=896, mlp=4864, layers=24, heads=14, head_width=64),
        "Qwen/Qwen2.5-7B": _qwen2(
            vocabulary=152064,
            width=3584,
            mlp=18944,
            layers=28,
            heads=28,
            key_value_heads=4,
            head_width=128,
            positions=131072,
            tied=False,
        ),
        "tiny-qwen2": tiny(theta=1000000.0),
    },
)

QWEN3 = Family(
    model_type="qwen3",
    prefix="Qwen3",
    shapes={
        "Qwen/Qwen3-0.6B": _qwen3(width=1024, mlp=3072, layers=28, heads=16, tied=True),
        "Qwen/Qwen3-4B": _qwen3(width=2560, mlp=9728, layers=36, heads=32, tied=True),
        "Qwen/Qwen3-8B": _qwen3(width=4096, mlp=12288, layers=36, heads=32, tied=False),
        "tiny-qwen3": tiny(theta=1000000.0, epsilon=1e-6),
    },
)
