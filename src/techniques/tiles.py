"""A function of single tokens, computed some tokens at a time, and again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


def in_tiles(function: Function, weights: Sequence[torch.Tensor], tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """`function` of `hidden`, [..., width], `tokens` rows at a time; it uses the trained `weights` and keeps the shape.

    Gradients of weights are added up in fp32 and handed over once, so that an optimizer in the backward pass sees the
    whole. (Liger's tiled MLP adds each tile's to `.grad`.)
    """
    return _Tiled.apply(function, tokens, hidden, *weights)


def one_by_one(*tiles: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The first of each, the second, and so on: all take the same memory, so a dry run puts some in place of many."""
    return zip(*tiles)


class _Tiled(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, function: Function, tokens: int, hidden: torch.Tensor, *weights: torch.Tensor) -> Any:
        ctx.function, ctx.tokens, ctx.weights = function, tokens, weights
        ctx.autocast = _autocast_now(hidden.device)
        ctx.save_for_backward(hidden)
        result = torch.empty_like(hidden)
        for rows, to in one_by_one(_tiles(hidden, tokens), _tiles(result, tokens)):
            to.copy_(function(rows))
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in ctx.weights]
        tiles = (_tiles(tensor, ctx.tokens) for tensor in (hidden, upstream.contiguous(), of_hidden))
        for rows, of_result, to in one_by_one(*tiles):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                result = ctx.function(rows)
            of_rows, *parts = torch.autograd.grad(result, [rows, *ctx.weights], of_result.to(result.dtype))
            del result
            to.copy_(of_rows)
            for total, part in zip(totals, parts):
                total.add_(part)
        return None, None, of_hidden, *(total.to(weight.dtype) for total, weight in zip(totals, ctx.weights))


def _tiles(tensor: torch.Tensor, tokens: int) -> Sequence[torch.Tensor]:
    """[1, at most `tokens`, width] each."""
    return tensor.view(1, -1, tensor.shape[-1]).split(tokens, dim=1)


def _autocast_now(device: torch.device) -> dict[str, Any]:
    """What lets the backward pass compute in the dtypes of the forward pass."""
    return {
        "device_type": device.type,
        "dtype": torch.get_autocast_dtype(device.type),
        "enabled": torch.is_autocast_enabled(device.type),
    }
