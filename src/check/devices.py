"""The CPU, where a mode that sees every operation counts the bytes of live tensors."""

import contextlib

from src.measure.devices import HostRuntime
from src.predict.live_memory import LiveMemory


class TrackedHost(HostRuntime):
    """The CPU in place of a GPU, with the peak that a GPU's allocator would count."""

    def __init__(self) -> None:
        self._memory = LiveMemory()

    def tracking(self) -> contextlib.AbstractContextManager:
        """Enter before building the model: tensors made outside are counted only once an operation returns them."""
        return self._memory

    def reset_peak(self) -> None:
        self._memory.reset_peak()

    def peak_bytes(self) -> tuple[int, int | None]:
        """Peak of live tensors since the last reset; nothing is reserved on a CPU."""
        return self._memory.peak_bytes, None
