"""Attention that is not computed again: what its kernel returned in the forward pass is used in the backward pass.

The output and the statistics of its softmax are all that attention's backward pass needs beside queries, keys and
values, and these are cheap to make again: at long lengths attention is nearly all of a layer's time. Two modes for
`torch.utils.checkpoint`, as its selective checkpointing has them, where what is kept goes through functions.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.utils import UsageError

aten = torch.ops.aten
# Each returns the output and the logarithm of the softmax's sums first; what follows is a few numbers.
FUSED_ATTENTION = {
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class KeepAttention(TorchDispatchMode):
    """While entered, `keep` gets what each attention returns; `results` has what it makes of that."""

    def __init__(self, keep: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.results: deque[tuple[Sequence[Any], Sequence[Any]]] = deque()
        self._keep = keep

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FUSED_ATTENTION:
            self.results.append(([self._keep(tensor) for tensor in result[:2]], result[2:]))
        return result

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if error is None and not self.results:
            raise UsageError("--attention_kept: attention goes through none of PyTorch's fused kernels here")


class UseKept(TorchDispatchMode):
    """While entered, attention returns what `take` gives for the kept `results`, the earliest first."""

    def __init__(
        self, results: "deque[tuple[Sequence[Any], Sequence[Any]]]", take: Callable[[Any], torch.Tensor]
    ) -> None:
        super().__init__()
        self._results, self._take = results, take

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in FUSED_ATTENTION:
            return func(*args, **(kwargs or {}))
        kept, others = self._results.popleft()
        return (*map(self._take, kept), *others)
