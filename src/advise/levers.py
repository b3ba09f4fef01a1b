"""What advice is made of: levers, and choices that pull several of them. Needs no torch.

No lever trains wrongly: FLCE's mean in fp16, Cut Cross-Entropy in bf16 and fp8 are none. What no dry run can tell the
memory and the time of is none either: `UNPREDICTED` names it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from src.techniques import kernels_only


@dataclass(frozen=True)
class Lever:
    """One thing to turn on."""

    name: str
    values: Mapping[str, Any] = field(hash=False)
    effort: int  # how much a user changes for it; they are added up
    training: str = ""  # how it trains, where that is not what was asked for: no gain of speed makes up for it


def checkpointing(every: int) -> Lever:
    """One layer in so many is checkpointed."""
    if every == 1:
        return Lever("gradient checkpointing", {"gradient_checkpointing": True}, 1)
    values = {"gradient_checkpointing": True, "checkpoint_every": every}
    return Lever(f"one layer in {every} checkpointed", values, 2)


def mlp_checkpointing(every: int) -> Lever:
    """Of one layer in so many the MLP is checkpointed."""
    name = "checkpointing of the MLPs" if every == 1 else f"MLP of one layer in {every} checkpointed"
    return Lever(name, {**checkpointing(every).values, "checkpoint_part": "mlp"}, 2)


CHECKPOINTING, MLP_CHECKPOINTING, EVERY_SECOND = checkpointing(1), mlp_checkpointing(1), checkpointing(2)
LARGER_CHUNKS = Lever("FLCE chunks of 16 inputs", {"flce_chunks": 16}, 1)
CHUNKED_LOSS = Lever("chunked loss in PyTorch", {"loss": "chunked", "loss_chunks": 16}, 2)
CUDA_GRAPH = Lever("CUDA graph", {"cuda_graph": True}, 2)
IN_BACKWARD = Lever("optimizer in the backward pass", {"optimizer_in_backward": True}, 2)
ON_HOST = Lever("checkpoints on the host", {"gradient_checkpointing": True, "checkpoint_offload": "overlapped"}, 2)
MLP_TILES = Lever("MLPs in pieces of 16,384 tokens", {"mlp_tile_tokens": 2**14}, 2)
ADAFACTOR = Lever("Adafactor", {"optimizer": "adafactor"}, 2, "another optimizer")
# The repository's other script: weights, gradients and optimizer states in host memory, with gradient checkpointing.
OFFLOAD = Lever("ZeRO-3 offload (DeepSpeed)", {"offloaded": True}, 4)
LORA = Lever("LoRA", {"lora_rank": 16}, 2, "adapters only")

# All but Liger's kernels, which depend on the model.
LEVERS = (
    CHECKPOINTING,
    MLP_CHECKPOINTING,
    EVERY_SECOND,
    LARGER_CHUNKS,
    CHUNKED_LOSS,
    CUDA_GRAPH,
    IN_BACKWARD,
    ON_HOST,
    MLP_TILES,
    ADAFACTOR,
    OFFLOAD,
    LORA,
)

# What may be better still, but no dry run can tell.
UNPREDICTED = (
    "torch.compile of each layer (--compile layers), 8-bit and 4-bit optimizers (--optimizer adamw_8bit), and fp8 "
    "products, which are other numbers than bf16's (--fp8 1)"
)


def liger(kernels: Collection[str]) -> Lever:
    """Those of Liger's kernels that a model can have."""
    name = "Liger kernels" if "flce" in kernels else "Liger kernels w/o FLCE"
    return Lever(name, kernels_only(*kernels), 1)


@dataclass(frozen=True)
class Choice:
    """Levers that are pulled together."""

    levers: tuple[Lever, ...] = ()

    @property
    def name(self) -> str:
        """In words."""
        return " + ".join(lever.name for lever in self.levers) or "nothing (Hugging Face's code)"

    @property
    def values(self) -> dict[str, Any]:
        """The settings."""
        return reduce(lambda found, lever: found | dict(lever.values), self.levers, {})

    @property
    def effort(self) -> int:
        """How much a user changes."""
        return sum(lever.effort for lever in self.levers)

    @property
    def training(self) -> str:
        """How it trains, where that is not what was asked for."""
        return ", ".join(lever.training for lever in self.levers if lever.training)

    def has(self, lever: Lever) -> bool:
        """Whether a lever is among them."""
        return lever in self.levers
