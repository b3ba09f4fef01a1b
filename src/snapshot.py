"""Memory snapshots in PyTorch's own format, for pytorch.org/memory_viz and `python -m torch.cuda._memory_viz`."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from src.utils import write_atomically

# Allocator events kept: one step of an 8B model without gradient checkpointing has about 10,000.
MAX_ENTRIES = 100_000


def record_snapshot(step: Callable[[], object], path: Path) -> None:
    """Run one step with the CUDA allocator's history on, with Python stacks, and save its snapshot to `path`."""
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, stacks="python")
    try:
        step()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(snapshot)))
