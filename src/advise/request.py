"""What is asked: a model, a GPU, sizes and a goal. Needs no torch, so that mistakes are told at once."""

import dataclasses
import os
from dataclasses import dataclass

from src import families, machine, techniques
from src.config import RunConfig
from src.machine import Gpu, gpu_named
from src.offload_config import PRESETS, OffloadConfig
from src.utils import GIB, UsageError

# What to look for -> how a person calls that.
GOALS = {
    "speed": "the fastest that fits",
    "fit": "the least change that fits",
    "longest": "the longest sequences that fit",
    "largest": "the largest batch that fits",
}
# Of the goals that look for a size: the setting that has it.
SEARCHED = {"longest": "seq_length", "largest": "batch_size"}
# Of a GPU's memory, what advice leaves free. The peak is predicted to a few bytes, the gaps between blocks are not: on
# an H200 three choices that a dry run fitted into the last 4 % ran out of memory (doc/advice.md).
LEFT_FREE = 0.05


@dataclass(frozen=True)
class Request:
    """A question. `base` is Hugging Face's code as it is: everything is turned off."""

    base: RunConfig
    card: Gpu
    limit_bytes: int  # what PyTorch's allocator may reserve
    goal: str

    @property
    def room_bytes(self) -> int:
        """What a choice may reserve."""
        return int(self.limit_bytes * (1 - LEFT_FREE))

    @property
    def searched(self) -> str | None:
        """The size that is looked for; None: sizes are given."""
        return SEARCHED.get(self.goal)

    def with_settings(self, *, offloaded: bool = False, **settings: object) -> RunConfig:
        """The run with these settings, of the offloaded script if that is asked for. Raises `UsageError`."""
        config = dataclasses.replace(self._offloaded if offloaded else self.base, **settings)
        config = dataclasses.replace(config, **techniques.chosen(config, settings))
        techniques.check(config)
        return config

    @property
    def _offloaded(self) -> RunConfig:
        base = self.base
        own = PRESETS["fast"] | {"preset": "fast", "model_name": base.model_name, "dtype": base.dtype}
        sizes = {"batch_size": base.batch_size, "seq_length": base.seq_length, "gpu_rates": base.gpu_rates}
        return OffloadConfig(dry_run=True, device="cuda", **own, **sizes)


def request(
    *,
    model_name: str,
    gpu: str,
    batch_size: int,
    seq_length: int,
    goal: str = "speed",
    gpu_memory_gib: float | None = None,
    dtype: str = "bf16",
    gpu_rates: str | None = None,
) -> Request:
    """What a user asks for. `gpu_rates` are those of a dry run. Raises `UsageError`."""
    card = gpu_named(gpu)
    families.check_name(model_name, pretrained=False)
    known = families.shipped(model_name)
    if known is not None and seq_length > (positions := known[1]["max_position_embeddings"]):
        raise UsageError(f"--seq_length {seq_length} is beyond the {positions} positions of {model_name}")
    config = RunConfig(
        model_name=model_name,
        batch_size=batch_size,
        seq_length=seq_length,
        dtype=dtype,
        gpu_memory_gib=gpu_memory_gib,
        gpu_rates=gpu_rates,
    )
    off = techniques.without(config) | {"gradient_checkpointing": False}
    base = dataclasses.replace(config, **off, gpu_memory_gib=None, dry_run=True, device="cuda")
    base = dataclasses.replace(base, **techniques.chosen(base, {"dtype"}))
    memory = card.usable_bytes if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    if memory is None:
        raise UsageError(f"how much memory the {card.name} has is not known here: --gpu_memory_gib says it")
    if memory <= card.context_bytes:
        raise UsageError(f"--gpu_memory_gib {gpu_memory_gib:g} has no room beside the CUDA context")
    card = dataclasses.replace(card, memory_bytes=memory)
    return Request(base, card, memory - card.context_bytes, goal)


def check_gpu(without: str) -> None:
    """Raises `UsageError` if there is no GPU to measure on; `without` says what can be done without one."""
    if not machine.has_gpu():
        raise UsageError(f"measuring needs a GPU, and there is none here: {without}")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # look for a GPU without initialising CUDA, so that forks can
