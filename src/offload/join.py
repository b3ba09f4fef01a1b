"""The ranks of a job meet before PyTorch and DeepSpeed wait for them, who would not say for whom."""

import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import torch

from src.offload import ranks
from src.utils import UsageError

_STORE: list[Any] = []  # kept: it ends with the process
_SILENT_S = 30  # before a line says who is missing
_JOIN_S = 300  # somebody may start the other machines' parts by hand
_LOOK_S = 0.2


def meet(bound_s: float = _JOIN_S, silent_s: float = _SILENT_S) -> None:
    """Return when every rank is there. Raises `UsageError` if one does not come within `bound_s`."""
    size, rank = ranks.world_size(), ranks.rank()
    if size == 1:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    patience = _Patience(bound_s, silent_s)
    while rank and not _answers(address, port):
        patience.wait(f"rank 0 at {place}")
    try:
        store = torch.distributed.TCPStore(
            address, port, size, rank == 0, timedelta(seconds=bound_s), wait_for_workers=False
        )
        store.set(f"here/{rank}", "")
        while missing := [other for other in range(size) if not store.check([f"here/{other}"])]:
            patience.wait(f"rank {missing[0]} of {size} to come to {place}")
    except torch.distributed.DistError as error:
        raise UsageError(f"{ranks.name()}cannot meet the others at {place}: {str(error).splitlines()[0]}") from error
    _STORE.append(store)
    # As torchrun does: PyTorch meets in a store that is there already.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


class _Patience:
    def __init__(self, bound_s: float, silent_s: float) -> None:
        self._started, self._bound_s, self._silent_s = time.monotonic(), bound_s, silent_s

    def wait(self, whom: str) -> None:
        """Wait a moment for `whom`. Raises `UsageError` at the bound."""
        waited = time.monotonic() - self._started
        if waited > self._bound_s:
            raise UsageError(f"{ranks.name()}waited {self._bound_s:.0f} s in vain for {whom}")
        if waited > self._silent_s and ranks.is_first_here():
            self._silent_s = self._bound_s
            print(f"{ranks.name()}waiting up to {self._bound_s:.0f} s for {whom}", file=sys.stderr, flush=True)
        time.sleep(_LOOK_S)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True
