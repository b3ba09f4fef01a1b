"""The snapshot of a simulated GPU, in PyTorch's format and with the notes of src/explain/recording.py."""

from typing import Any

from src.explain.categories import OWNER, PHASE
from src.predict.allocator import SMALL_SEGMENT_BYTES
from src.predict.fake_gpu import Allocation, FakeGpu


def simulated_snapshot(gpu: FakeGpu, first_event: int) -> dict[str, Any]:
    """What happened on `gpu` since `first_event`.

    Its time is the number of the event: nothing ran, so nothing took time.
    """
    trace: list[dict[str, Any]] = []
    notes = [(number - first_event, f"{PHASE} {phase}") for number, phase in gpu.phase_starts if number >= first_event]
    made: dict[Allocation, int] = {}
    for number, (action, allocation) in enumerate(gpu.events[first_event:]):
        for name in ("alloc",) if action == "alloc" else ("free_requested", "free_completed"):
            trace.append(
                {
                    "action": name,
                    "addr": allocation.address,
                    "size": allocation.size,
                    "stream": 0,
                    "time_us": number,
                    "user_metadata": f"{allocation.module}|{allocation.operation}",
                    "frames": _frames(allocation),
                }
            )
        made.setdefault(allocation, number if action == "alloc" else -1)
    for allocation in gpu.allocations.values():
        made.setdefault(allocation, -1)
    notes += [(number, f"{OWNER} {a.owner} {a.address}") for a, number in made.items() if a.owner]
    return {
        "segments": _segments(gpu),
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [{"name": name, "stage": "START", "device": 0, "time_us": n} for n, name in notes],
    }


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
