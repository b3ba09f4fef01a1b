"""A request that ran out of memory: what was there, and what would have helped."""

from src.explain.categories import words
from src.explain.replay import Device, OutOfMemory
from src.explain.stacks import origin
from src.explain.timeline import Timeline
from src.utils import format_bytes

_HELP = {
    "parameters": "smaller dtype or quantised weights; several GPUs: ZeRO-3 or FSDP",
    "gathered_parameters": "ZeRO-3: smaller stage3_max_live_parameters",
    "gradients": "gradients kept in the weights' dtype; several GPUs: ZeRO-2; LoRA",
    "optimizer_state": "an 8-bit or offloaded optimizer; several GPUs: ZeRO-1",
    "optimizer_temporaries": "the optimizer's fused=True, which needs no temporaries, or foreach=False",
    "checkpoints": "a smaller batch, or checkpoints offloaded to the host",
    "logits_and_loss": "a fused linear cross-entropy (Liger's FLCE), which never holds all logits",
    "attention": "gradient checkpointing, flash attention, or a smaller batch",
    "mlp": "gradient checkpointing, Liger's SwiGLU, or a smaller batch",
    "norm": "gradient checkpointing, Liger's RMSNorm, or a smaller batch",
    "hidden_states": "gradient checkpointing, or a smaller batch",
    "activations": "gradient checkpointing, or a smaller batch",
}


def reserved_bytes(device: Device, refused: OutOfMemory) -> int:
    """What the allocator held of the GPU when it refused: what it holds at the dump, less what it took since."""
    since = sum(change.sign * change.size for change in device.changes if change.position > refused.position)
    return sum(device.segments.values()) - since


def largest_gap(timeline: Timeline, refused: OutOfMemory) -> int | None:
    """The largest free piece inside what was reserved, in bytes. None where the snapshot does not show it."""
    device = timeline.device
    segments = dict(device.segments)
    for change in reversed([change for change in device.changes if change.position > refused.position]):
        if change.mapped:
            return None  # pieces of an expandable segment have grown together since
        if change.sign < 0:
            segments[change.address] = change.size
        else:
            segments.pop(change.address, None)
    alive = timeline.alive(refused.event)
    sizes = device.dump_size.clip(device.size)[alive].tolist()
    blocks = sorted(zip(device.address[alive].tolist(), sizes))
    gap, place = 0, 0
    for start, size in sorted(segments.items()):
        free_from = start
        while place < len(blocks) and blocks[place][0] < start + size:
            gap = max(gap, blocks[place][0] - free_from)
            free_from = max(free_from, sum(blocks[place]))
            place += 1
        gap = max(gap, start + size - free_from)
    return gap if segments else None


def headline(timeline: Timeline) -> str:
    """What was asked for by whom, what was free, and what would have helped; of several refusals the last."""
    refused = timeline.refused[-1]
    device = timeline.device
    by = origin(timeline.stacks[refused.stack])
    allocated = int(timeline.allocated[refused.event + 1])
    reserved = reserved_bytes(device, refused)
    gap = largest_gap(timeline, refused)
    lines = [
        f"Out of memory on GPU {device.number}: {format_bytes(refused.requested)} were asked for"
        + (f" by {by}" if by else ""),
        f"free on the card {format_bytes(refused.device_free)}, reserved by PyTorch {format_bytes(reserved)}, "
        f"of which allocated {format_bytes(allocated)} and unused {format_bytes(reserved - allocated)}"
        + (f" (largest gap {format_bytes(gap)})" if gap is not None else ""),
        f"What would have helped: {_advice(timeline, refused, reserved - allocated, gap)}",
    ]
    if len(timeline.refused) > 1:
        lines.append(f"It is the last of {len(timeline.refused)} refused requests in the history.")
    return "\n".join(lines)


def _advice(timeline: Timeline, refused: OutOfMemory, unused: int, gap: int | None) -> str:
    requested = refused.requested
    if refused.device_free >= requested:
        return "a higher limit for this process: the card itself had enough (set_per_process_memory_fraction)."
    if gap is not None and gap >= requested:
        return "nothing more than that gap, but it belongs to another stream or to a pool of its own (CUDA graphs)."
    if unused + refused.device_free >= requested:
        setting = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        how = "fewer different sizes: expandable segments are on" if timeline.expandable_segments else setting
        return f"less fragmentation, for enough was free in all, in pieces too small ({how})."
    short = requested - unused - refused.device_free
    parts = sorted(timeline.breakdown_at(refused.event).items(), key=lambda part: -part[1])
    named = [
        f"{words(name)} hold {format_bytes(size)}: {_HELP[name]}" for name, size in parts if name in _HELP and size
    ]
    return f"{format_bytes(short)} more. " + "; ".join(named[:2]) + "." if named else f"{format_bytes(short)} more."
