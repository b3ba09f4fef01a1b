"""Hugging Face's attention implementations."""

import importlib.util

from src.families import shipped
from src.techniques.technique import Config, Technique


def _refusal(config: Config) -> str | None:
    if config.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn") is not None:
        return None
    return "--attention flash_attention_2 needs the package flash-attn: pip install flash-attn, or take sdpa"


def _of_family(config: Config) -> str | None:
    known = shipped(config.model_name)
    return "eager" if known is not None and known[0].not_sdpa else None


ATTENTION = Technique(
    name="attention",
    default="sdpa",
    help="Hugging Face attention implementation; the default is eager for Gemma 2, whose scores are capped, else sdpa",
    tag="",
    choices=("sdpa", "flash_attention_2", "eager"),
    changes_numerics=True,
    refusal=_refusal,
    chosen=_of_family,
)
