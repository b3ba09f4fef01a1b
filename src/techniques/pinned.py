"""Host memory for what waits there until the backward pass: pinned, and used again in the next step."""

from collections import defaultdict

import torch

SMALLEST_BYTES = 2**20


def piece_sizes(count: int) -> list[int]:
    """Sizes of the pieces that `count` bytes are kept in, largest first.

    PyTorch rounds what it pins up to a power of two: 768 MiB in one block would take a GiB. In pieces that are powers
    of two themselves a tensor takes less than `SMALLEST_BYTES` more than it has.
    """
    sizes = []
    while count > 0:
        sizes.append(max(SMALLEST_BYTES, 1 << (count.bit_length() - 1)))
        count -= sizes[-1]
    return sizes


class PinnedBuffers:
    """Pieces that are free, by size; a tensor of any shape and dtype takes those that it needs."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def take(self, count: int, *, pin: bool) -> list[torch.Tensor]:
        """Pieces with room for `count` bytes, as bytes."""
        return [self._free[size].pop() if self._free[size] else self._new(size, pin) for size in piece_sizes(count)]

    def give_back(self, pieces: list[torch.Tensor]) -> None:
        """Let the next tensor have them."""
        for piece in pieces:
            self._free[piece.numel()].append(piece)

    def _new(self, size: int, pin: bool) -> torch.Tensor:
        self.allocated_bytes += size
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin)
