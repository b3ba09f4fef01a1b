"""Memory snapshots in PyTorch's own format, for pytorch.org/memory_viz and `python -m torch.cuda._memory_viz`."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from src.allocator import SMALL_SEGMENT_BYTES
from src.fake_gpu import Allocation, FakeGpu
from src.utils import write_atomically

# Allocator events kept: one step of an 8B model without gradient checkpointing has about 10,000.
MAX_ENTRIES = 100_000


def record_snapshot(step: Callable[[], object], path: Path, *, stacks: bool = True, keeps: bool = True) -> None:
    """Run one step with the CUDA allocator's history on, with Python `stacks`, and save its snapshot to `path`.

    Where several ranks take part in the step, only one `keeps` its snapshot.
    """
    torch.cuda.memory._record_memory_history(
        max_entries=MAX_ENTRIES, stacks="python", context="all" if stacks else None
    )
    try:
        step()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    if keeps:
        write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(snapshot)))


def save_simulated(gpu: FakeGpu, first_event: int, path: Path) -> None:
    """Save what happened on a simulated GPU since `first_event` as a snapshot of the same format.

    Its time is the number of the event: nothing ran, so nothing took time.
    """
    trace: list[dict[str, Any]] = []
    for number, (action, allocation) in enumerate(gpu.events[first_event:]):
        for name in ("alloc",) if action == "alloc" else ("free_requested", "free_completed"):
            trace.append(
                {
                    "action": name,
                    "addr": allocation.address,
                    "size": allocation.size,
                    "stream": 0,
                    "time_us": number,
                    "frames": _frames(allocation),
                }
            )
    snapshot = {
        "segments": _segments(gpu),
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [],
    }
    write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(snapshot)))


def _frames(allocation: Allocation) -> list[dict[str, Any]]:
    """The Python stack, below a line that says which operation in which module asked."""
    origin = {"name": f"{allocation.operation} in {allocation.module or allocation.phase}", "filename": "", "line": 0}
    return [origin, *({"name": name, "filename": file, "line": line} for file, line, name in allocation.frames)]


def _segments(gpu: FakeGpu) -> list[dict[str, Any]]:
    allocations = {allocation.address: allocation for allocation in gpu.allocations.values()}
    segments = []
    for first in gpu.allocator.segments.values():
        blocks, block = [], first
        while block is not None:
            live = allocations.get(block.address) if not block.is_free else None
            blocks.append(
                {
                    "address": block.address,
                    "size": block.size,
                    "requested_size": block.size,
                    "state": "inactive" if live is None else "active_allocated",
                    "frames": [] if live is None else _frames(live),
                }
            )
            block = block.next
        active = sum(b["size"] for b in blocks if b["state"] == "active_allocated")
        total = sum(b["size"] for b in blocks)
        segments.append(
            {
                "device": 0,
                "address": first.address,
                "total_size": total,
                "allocated_size": active,
                "active_size": active,
                "requested_size": active,
                "stream": 0,
                "segment_type": "small" if total <= SMALL_SEGMENT_BYTES else "large",
                "segment_pool_id": (0, 0),
                "is_expandable": False,
                "frames": [],
                "blocks": blocks,
            }
        )
    return segments
