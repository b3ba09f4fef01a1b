"""Seeds, and the random tokens that experiments train on."""

import os
import random

import torch

from src.config import OffloadConfig


def set_seed(seed: int) -> None:
    """Seed every random generator an experiment draws from."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_batch(vocab_size: int, batch_size: int, seq_length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of random tokens that are their own labels, int64 of shape (batch_size, seq_length), without padding."""
    input_ids = torch.randint(vocab_size, (batch_size, seq_length), device=device)
    return {"input_ids": input_ids, "labels": input_ids}


def micro_batches(vocab_size: int, config: OffloadConfig, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of one global random batch, the same for any number of ranks and micro-batches."""
    # A generator of its own: what building the model draws from the global one differs from rank to rank.
    generator = torch.Generator().manual_seed(config.seed)
    whole = torch.randint(vocab_size, (config.global_batch_size, config.seq_length), generator=generator)
    mine = whole.chunk(config.world_size)[int(os.environ.get("RANK", "0"))].to(device)
    return [{"input_ids": ids, "labels": ids} for ids in mine.chunk(config.gradient_accumulation_steps)]
