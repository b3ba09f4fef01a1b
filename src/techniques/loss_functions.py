"""The losses of `losses.py`: mean cross-entropy of the next token, of the last hidden states and the LM head's weight.

`hidden` is [tokens, width], `weight` [words, width], `labels` [tokens], of which `IGNORED` ones do not count.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from src.techniques import tiles
from src.utils import next_power_of_two

IGNORED = -100
_ROWS = 8192  # of a weight's gradient that are scaled at a time

Loss = Callable[..., torch.Tensor]


def forward_with(loss: Loss, settings: Mapping[str, Any]) -> Callable[..., CausalLMOutput]:
    """A causal model's forward pass that ends in `loss`, and never has all logits."""

    def forward(self: Any, input_ids: torch.Tensor, labels: torch.Tensor, **further: Any) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        found = loss(hidden.flatten(0, 1), self.lm_head.weight, _shifted(labels), **settings, **further)
        return CausalLMOutput(loss=found)

    return forward


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, flat: the next one; the last of a sequence nothing."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()


def liger(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """Liger's cross-entropy where Hugging Face calls PyTorch's: on fp32 logits, as Liger's patch has it."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits.float().view(-1, vocab_size), _shifted(labels), ignore_index=IGNORED)


def cce(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cut Cross-Entropy (Wijmans et al. 2024) with every part of the gradient."""
    return _cut(hidden, weight, labels, None)


def cce_filtered(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same, where blocks of the gradient are left out whose softmax rounds to nothing in the dtype."""
    return _cut(hidden, weight, labels, "auto")


def _cut(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, threshold: str | None) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, filter_eps=threshold)


def pytorch(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PyTorch's own, in pieces of the size that it picks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, options=options)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunks: int) -> torch.Tensor:
    """Plain PyTorch, some tokens at a time, sized as Liger sizes FLCE's chunks; never waits for the GPU."""
    pieces = -(-weight.shape[0] // (chunks * weight.shape[1]))
    size = next_power_of_two(-(-len(hidden) // pieces))
    return _InPieces.apply(hidden, weight, labels, size, _plain_piece, weight.dtype)


def flce(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    tokens: int,
    num_items_in_batch: int | None = None,  # every piece is summed up, and the mean taken in the backward pass
    **settings: Any,
) -> torch.Tensor:
    """Liger's fused loss of `tokens` tokens at a time: its logits take no more memory, however many there are.

    The LM head's gradient is added up over the pieces in fp32.
    """
    piece = functools.partial(_liger_piece, settings)
    return _InPieces.apply(hidden, weight, labels, tokens, piece, torch.float32)


# piece(hidden, weight, labels, of_hidden, of_weight) is the sum of some tokens' losses; it fills in the gradient of
# their hidden states, and adds that of the weight.
Piece = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain_piece(
    rows: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, of_rows: torch.Tensor, of_weight: torch.Tensor
) -> torch.Tensor:
    counted, index = (wanted != IGNORED)[:, None], wanted.clamp(min=0)[:, None]
    logits = (rows @ weight.T).float()
    norm = logits.logsumexp(1, keepdim=True)
    total = ((norm - logits.gather(1, index)) * counted).sum()
    logits.sub_(norm).exp_().scatter_add_(1, index, logits.new_full((), -1.0).expand(index.shape))
    of_logits = logits.mul_(counted).to(rows.dtype)
    del logits
    torch.mm(of_logits, weight, out=of_rows)
    of_weight.addmm_(of_logits.T, rows)
    return total


def _liger_piece(
    settings: Mapping[str, Any],
    rows: torch.Tensor,
    weight: torch.Tensor,
    wanted: torch.Tensor,
    of_rows: torch.Tensor,
    of_weight: torch.Tensor,
) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    gradients = {"compute_gradients": True, "weight_requires_grad": True}
    found = fused_linear_cross_entropy_forward(
        rows, weight, wanted, ignore_index=IGNORED, reduction="sum", **gradients, **settings
    )
    of_rows.copy_(found[4])
    of_weight.add_(found[5])
    return found[0]


class _InPieces(torch.autograd.Function):
    """Makes both gradients in the forward pass, as FLCE does, of the sum over tokens.

    The backward pass divides by their number, after the loss scale has lifted what fp16 could not hold. It writes over
    what it saved, so it can run once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        size: int,
        piece: Piece,
        dtype: torch.dtype,  # in which the weight's gradient is added up
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=dtype)
        for rows, wanted, of_rows in tiles.one_by_one(hidden.split(size), labels.split(size), of_hidden.split(size)):
            total += piece(rows, weight, wanted, of_rows, of_weight)
        count = (labels != IGNORED).sum()
        ctx.save_for_backward(of_hidden, of_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight, count = ctx.saved_tensors
        factor = upstream / count  # in fp32: in the gradients' dtype it would be rounded first
        for rows in (*of_hidden.split(_ROWS), *of_weight.split(_ROWS)):
            rows.copy_(rows * factor if rows.dtype == torch.float32 else rows.float().mul_(factor))
        return of_hidden, of_weight.to(ctx.weight_dtype), None, None, None, None


# Of `--loss`: those that take hidden states in place of logits.
OF_HIDDEN: dict[str, Loss] = {"cce": cce, "cce_filtered": cce_filtered, "torch": pytorch, "chunked": chunked}
