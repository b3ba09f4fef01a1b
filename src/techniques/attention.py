"""Hugging Face's attention implementations."""

import importlib.util

from src.techniques.technique import Config, Technique


def _refusal(config: Config) -> str | None:
    if config.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn") is not None:
        return None
    return "--attention flash_attention_2 needs the package flash-attn: pip install flash-attn, or take sdpa"


ATTENTION = Technique(
    name="attention",
    default="sdpa",
    help="Hugging Face attention implementation",
    tag="",
    choices=("sdpa", "flash_attention_2", "eager"),
    changes_numerics=True,
    refusal=_refusal,
)
