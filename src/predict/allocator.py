"""A model of PyTorch's CUDA caching allocator: which blocks it would hand out, without a GPU.

What `torch.cuda.max_memory_allocated` counts is whole blocks, not the bytes asked for: requests are rounded, a large
block is only split when more than 1 MiB would be left, and what is reserved depends on how freed blocks merge. The
rules and constants are those of c10/cuda/CUDACachingAllocator.cpp under its default settings (no expandable
segments). A stream has free blocks of its own, which no other stream is given.
"""

import bisect
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeAlias

from src.experiment import OutOfMemory
from src.utils import MIB, round_up

MIN_BLOCK_BYTES = 512  # every request is rounded up to a multiple of this
SMALL_BYTES = MIB  # requests up to this size share small segments
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB  # segment for requests between SMALL_BYTES and MIN_OWN_SEGMENT_BYTES
MIN_OWN_SEGMENT_BYTES = 10 * MIB  # from here a request gets a segment of its own ...
SEGMENT_ROUND_BYTES = 2 * MIB  # ... rounded up to a multiple of this


class SimulatedOutOfMemory(OutOfMemory):
    """The simulated card has no room for a request."""

    def __init__(self, **facts: int) -> None:
        super().__init__(f"a card of this size has no room for {facts['requested_bytes']} more bytes")
        self.facts = facts


@dataclass(eq=False)
class Piece:
    """A piece of a segment; neighbours in the same segment are linked."""

    address: int
    size: int
    pool: "Pool" = field(repr=False)
    is_free: bool = True
    previous: "Piece | None" = field(default=None, repr=False)
    next: "Piece | None" = field(default=None, repr=False)


Pool: TypeAlias = list[tuple[int, int, Piece]]


def rounded(count: int) -> int:
    """Bytes of the block that a request of `count` bytes needs."""
    return max(MIN_BLOCK_BYTES, round_up(count, MIN_BLOCK_BYTES))


def _segment_bytes(size: int) -> int:
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(size, SEGMENT_ROUND_BYTES)


class CachingAllocator:
    """Allocates simulated blocks and counts them; `limit_bytes` bounds what can be reserved.

    If it is not `strict`, the first request beyond the limit is noted in `refused`, and from there on everything fits:
    what does not fit shows what it would need.
    """

    def __init__(self, limit_bytes: int | None = None, *, strict: bool = True) -> None:
        self.limit_bytes, self.strict = limit_bytes, strict
        self.refused: SimulatedOutOfMemory | None = None
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.segments: dict[int, Piece] = {}  # address -> first block
        self.stream: Hashable = None  # the one that asks from now on
        # Free blocks of each stream, those of small segments and the others, as (size, address, block), sorted: the
        # first that is large enough is the best fit.
        self._pools: defaultdict[Hashable, tuple[Pool, Pool]] = defaultdict(lambda: ([], []))
        self._next_address = 0x7F0000000000

    def reset_peak(self) -> None:
        """Let both peaks start again from now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def allocate(self, count: int) -> Piece:
        """A block of at least `count` > 0 bytes. Raises `SimulatedOutOfMemory` where `limit_bytes` forbids it."""
        size = rounded(count)
        is_small = size <= SMALL_BYTES
        small, large = self._pools[self.stream]
        pool = small if is_small else large
        block = self._best_fit(pool, size) or self._new_segment(pool, size)
        smallest_rest = MIN_BLOCK_BYTES if is_small else SMALL_BYTES + MIN_BLOCK_BYTES
        if block.size - size >= smallest_rest:
            self._split(block, size)
        block.is_free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Piece) -> None:
        """Take a block back and merge it with free neighbours."""
        self.allocated_bytes -= block.size
        block.is_free = True
        for left, right in ((block, block.next), (block.previous, block)):
            if left is not None and right is not None and left.is_free and right.is_free:
                self._forget(left if right is block else right)
                self._merge(left, right)
                block = left
        bisect.insort(block.pool, (block.size, block.address, block))

    def release_cached(self) -> None:
        """Return segments in which everything is free to the driver, as `torch.cuda.empty_cache` does."""
        for first in [first for first in self.segments.values() if first.is_free and first.next is None]:
            self._forget(first)
            del self.segments[first.address]
            self.reserved_bytes -= first.size

    def _best_fit(self, pool: Pool, size: int) -> Piece | None:
        index = bisect.bisect_left(pool, (size, 0))
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, pool: Pool, size: int) -> Piece:
        segment_bytes = _segment_bytes(size)
        if self.limit_bytes is not None and self.refused is None:
            self._keep_to_limit(segment_bytes)
        block = Piece(self._next_address, segment_bytes, pool)
        self._next_address += segment_bytes
        self.segments[block.address] = block
        self.reserved_bytes += segment_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _keep_to_limit(self, segment_bytes: int) -> None:
        """Make room for a new segment; if there is none, raise or note it."""
        if self.reserved_bytes + segment_bytes > self.limit_bytes:
            self.release_cached()
        if self.reserved_bytes + segment_bytes <= self.limit_bytes:
            return
        gaps = [pool[-1][0] for pools in self._pools.values() for pool in pools if pool]
        refused = SimulatedOutOfMemory(
            requested_bytes=segment_bytes,
            free_bytes=self.limit_bytes - self.allocated_bytes,
            reserved_bytes=self.reserved_bytes,
            allocated_bytes=self.allocated_bytes,
            largest_gap_bytes=max(gaps, default=0),
        )
        if self.strict:
            raise refused
        self.refused = refused

    def _split(self, block: Piece, size: int) -> None:
        rest = Piece(block.address + size, block.size - size, block.pool, previous=block, next=block.next)
        if rest.next is not None:
            rest.next.previous = rest
        block.next, block.size = rest, size
        bisect.insort(rest.pool, (rest.size, rest.address, rest))

    def _merge(self, left: Piece, right: Piece) -> None:
        left.size += right.size
        left.next = right.next
        if left.next is not None:
            left.next.previous = left

    def _forget(self, block: Piece) -> None:
        """Take a free block out of its pool."""
        del block.pool[bisect.bisect_left(block.pool, (block.size, block.address))]
