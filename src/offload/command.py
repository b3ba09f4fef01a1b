"""DeepSpeed's command, and the port at which the ranks of a job meet."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from src.offload import job
from src.utils import UsageError


def launcher() -> list[str]:
    """DeepSpeed's command, as this Python's own module.

    The `deepspeed` on PATH may be missing (an installation with --target), or be another Python's, which has no torch.
    """
    if find_spec("deepspeed") is None:
        raise UsageError("deepspeed is not installed: pip install -r requirements.txt")
    return [sys.executable, "-m", "deepspeed.launcher.runner"]


def take_shown_gpus(words: Sequence[str]) -> None:
    """Keep the GPUs that CUDA_VISIBLE_DEVICES shows to a job with `words`, DeepSpeed's flags, for its ranks.

    DeepSpeed's launcher counts a machine's GPUs from 0, so it would take those that were to be left alone, and knows
    none by name (GPU-..., MIG-...). So the variable gets another name here, and `src.offload.rank` sets it in each
    rank. Raises `UsageError` if fewer are shown than asked for.
    """
    os.environ.pop(job.GPUS_VARIABLE, None)
    count = _after("--num_gpus", words)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    if shown == [""] or count is None or "--hostfile" in words:
        return
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    if len(shown) < int(count):
        raise UsageError(f"NUM_GPUS={count}, but CUDA_VISIBLE_DEVICES={','.join(shown)} shows {len(shown)}")
    os.environ[job.GPUS_VARIABLE] = ",".join(shown[: int(count)])


@contextlib.contextmanager
def port_flags(words: Sequence[str]) -> Iterator[list[str]]:
    """What DeepSpeed's launcher has to be told beside `words`, its flags. Raises `UsageError` if a port is taken.

    Machines agree on a port beforehand. On a single one a port is chosen that is free, and held until the block ends:
    rank 0 comes to listen at it only seconds later, and meanwhile another job could choose the same.
    """
    several = "--hostfile" in words
    listens_here = not several or ("--no_ssh" in words and _after("--node_rank", words) == "0")
    given = _after("--master_port", words)
    if given is not None:
        if listens_here and not _is_free(int(given)):
            raise UsageError(f"MASTER_PORT={given} is in use on this machine: take another, or leave it unset")
        yield []
    elif several:
        yield []  # DeepSpeed's own, the same on all machines
    else:
        with _held() as port:
            yield ["--master_port", str(port)]


def _after(flag: str, words: Sequence[str]) -> str | None:
    return words[words.index(flag) + 1] if flag in words[:-1] else None


def _is_free(port: int) -> bool:
    """Whether a process could listen there as PyTorch does: at every address, also right after another has ended."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _held() -> Iterator[int]:
    """A port that the system gives to nobody else, and at which a process may listen that asks for it."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Linux: bound twice, as long as one listens
        port = holder.getsockname()[1]
        if not _is_free(port):  # another system
            holder.close()
        yield port
