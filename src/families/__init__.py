"""Model families that the project can build and patch. A new one is one entry, in a file of this folder.

Needs neither torch nor transformers: an entry names Hugging Face's classes and Liger's patch.
"""

import os

from src.families.family import Family, Shape
from src.families.gemma import GEMMA2, GEMMA3
from src.families.llama import LLAMA
from src.families.others import GRANITE, MISTRAL, OLMO2, PHI3, SMOLLM3
from src.families.qwen import QWEN2, QWEN3
from src.utils import UsageError

_ALL = (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, GRANITE)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
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
