"""What DeepSpeed does for each rank of a job, done for one: a dry run of a thousand takes as long as one of eight.

ZeRO-3 cuts what it exchanges into a piece for each rank. Pieces are views and take no memory, but a simulated rank sees
each as an operation. Here only its own are cut; requests for memory remain DeepSpeed's, in their order and size.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch


def only_own_pieces() -> Iterator[Any]:
    """Patches of DeepSpeed for rank 0 of a job that is simulated."""
    from deepspeed.runtime.zero import partition_parameters, stage3

    # Every range() of this module counts ranks.
    yield mock.patch.object(partition_parameters, "range", lambda ranks: range(min(ranks, 1)), create=True)
    yield mock.patch.object(partition_parameters.AllGatherCoalescedHandle, "wait", _wait)
    yield mock.patch.object(stage3, "reduce_scatter_coalesced", _reduce_scatter)


def _wait(handle: Any, handle_dependency: bool = True) -> None:
    """Weights that were gathered together are each copied out of what the ranks gave."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if handle.complete:
        return
    for param in handle.params:
        pieces = handle.partitions[0].as_strided((param.ds_numel,), (1,))  # any as many: there are no values
        param.data = torch.cat([pieces]).view(param.ds_shape).to(param.ds_tensor.dtype)
        param.ds_status = ZeroParamStatus.AVAILABLE
    handle.complete = True
    if not handle_dependency:
        handle.data_buffer.append(handle.partitions)  # kept until all that was fetched has come


@torch.no_grad()
def _reduce_scatter(tensors: Sequence[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """This rank's piece of each tensor, out of a copy in which all ranks' pieces are of one size."""
    from deepspeed import comm

    ranks = comm.get_world_size(group)
    sizes = [math.ceil(tensor.numel() / ranks) for tensor in tensors]
    flat = tensors[0].view(-1)
    if len(tensors) > 1 or flat.numel() % ranks:
        own = list(zip(tensors, sizes))
        lacking = [min(size, rank * size + size - t.numel()) for rank in range(ranks) for t, size in own]
        padding = [torch.empty(count, dtype=flat.dtype, device=flat.device) for count in lacking if count > 0]
        flat = torch.cat([*(tensor.view(-1) for tensor in tensors), *padding])
    flat.div_(ranks)
    ends = itertools.accumulate(sizes)
    return [flat.narrow(0, end - size, size) for end, size in zip(ends, sizes)]
