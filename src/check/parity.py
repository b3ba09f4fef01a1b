"""How exact a run's gradients are: their error against fp32, beside the error of Hugging Face's code in the same dtype.

From the same weights on the same batch, three models take one forward and backward pass: Hugging Face's code in the
run's dtype, the run's techniques in it, and Hugging Face's code in fp32, which is the reference. Errors are relative L2
norms over all parameters, ||g - g_fp32|| / ||g_fp32||, and the largest of a single parameter. fp16 goes through the
loss scale that the run begins with, halved until every gradient is finite, as a loss scaler would.

The reference takes a sequence at a time, and where the GPU has no room, gradients wait on the host: what fits the GPU
in the run's dtype can be compared. Under ZeRO-3 the model is compared by itself, on one GPU: partitioning adds no
rounding.
"""

import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from src import techniques
from src.config import RunConfig
from src.experiment import Batch, random_batches, set_seed
from src.model_utils import build_model, patched
from src.record import GradientError, Parity

# Where a run's error is this many times Hugging Face's own, it computes something else than Hugging Face's code does.
TOLERATED = 1.5
# In fp32 the reference is no more exact than the run: adding up in another order makes this much, and means nothing.
# (Hugging Face's code against itself, a batch of 8 against its sequences one by one: 2e-5 on an H100.)
ORDER_OF_SUMS = 1e-4
GRAD_SCALER_START = 2.0**16  # of torch.amp.GradScaler

Gradients = dict[str, torch.Tensor]  # parameter -> gradient


def measure_parity(config: RunConfig, device: torch.device) -> Parity:
    """Compare the gradients of one micro-batch of `config`. Needs the device for itself; may run out of memory."""
    return next(iter(compare([config], device)))[1]


def compare(configs: Sequence[RunConfig], device: torch.device) -> Iterator[tuple[RunConfig, Parity]]:
    """The parity of each of `configs`, which differ in nothing but techniques, and share the references."""
    one = dataclasses.replace(configs[0], gradient_accumulation_steps=1)
    plain = dataclasses.replace(one, **techniques.without(one))
    with patched():
        model = _built(plain, device)
        rest = _resting_place(model, device, one.dtype)
        weights = {name: p.detach().to(rest, copy=True) for name, p in model.named_parameters()}
        theirs = _pass(model, plain, device, rest)
        reference = _reference(model, plain, device, rest)
        del model
    hugging_face = _errors(theirs, reference, device)
    for config in configs:
        with patched():
            variant = dataclasses.replace(config, gradient_accumulation_steps=1)
            ours = theirs if variant == plain else _pass(_built(variant, device, weights), variant, device, rest)
        run = _errors(ours, reference, device)
        yield (
            config,
            Parity(
                tokens=one.batch_size * one.seq_length,
                dtype=one.compute_dtype,
                loss_scale=ours.scale,
                reference_loss=reference.loss,
                run=run,
                hugging_face=hugging_face,
                ratio=None
                if run.gradient is None or not hugging_face.gradient
                else run.gradient / hugging_face.gradient,
                agrees=agrees(run, hugging_face),
            ),
        )


def _resting_place(model: PreTrainedModel, device: torch.device, dtype: str) -> torch.device:
    """Where weights and gradients wait: on a GPU with room for them all, otherwise on the host.

    In fp32 a run's own activations leave none: 32 x 1024 tokens of a 1B model ran out of 80 GB for it.
    """
    count = sum(p.numel() for p in model.parameters())
    waiting = count * (4 + 3 * model.dtype.itemsize)  # fp32 gradients, and in the run's dtype two more and the weights
    has_room = (
        device.type == "cuda"
        and dtype != "fp32"
        and waiting < torch.cuda.get_device_properties(device).total_memory / 4
    )
    return device if has_room else torch.device("cpu")


def agrees(run: GradientError, hugging_face: GradientError) -> bool:
    """Whether a run's gradients are about as exact as Hugging Face's, also those of its worst parameter."""
    if run.gradient is None or run.worst is None:
        return False
    if hugging_face.gradient is None or hugging_face.worst is None:
        return True
    whole = run.gradient <= max(TOLERATED * hugging_face.gradient, ORDER_OF_SUMS)
    return whole and run.worst <= max(TOLERATED * hugging_face.worst, ORDER_OF_SUMS)


@dataclasses.dataclass(frozen=True)
class _Pass:
    """What one forward and backward pass gave."""

    loss: float
    gradients: Gradients
    scale: float | None


def _built(config: RunConfig, device: torch.device, weights: Gradients | None = None) -> PreTrainedModel:
    """The model of `config` as a run would build it, with `weights` in place of its own."""
    set_seed(config.seed)
    model = build_model(config, device)
    for name, parameter in model.named_parameters():
        if weights is not None:
            parameter.data.copy_(weights[name])
    return model


def _batch(model: PreTrainedModel, config: RunConfig, device: torch.device) -> Batch:
    torch.manual_seed(config.seed)
    return random_batches(model.config.vocab_size, config, device)[0]


def _pass(model: PreTrainedModel, config: RunConfig, device: torch.device, rest: torch.device) -> _Pass:
    """One pass in the run's dtype, through its loss scale if it is fp16."""
    scale = _first_scale(config) if config.compute_dtype == "fp16" else None
    batch = _batch(model, config, device)
    while True:
        loss = model(**batch).loss
        (loss if scale is None else loss * scale).backward()
        gradients = _taken(model, rest)
        if scale is None or scale <= 1 or all(torch.isfinite(g).all() for g in gradients.values()):
            return _Pass(loss.item(), gradients, scale)
        scale /= 2


def _first_scale(config: RunConfig) -> float:
    power = getattr(config, "fp16_initial_scale_power", None)
    return GRAD_SCALER_START if power is None else 2.0**power


def _reference(model: PreTrainedModel, config: RunConfig, device: torch.device, rest: torch.device) -> _Pass:
    """Hugging Face's code in fp32, a sequence at a time: all have as many tokens, so their mean is the batch's."""
    model = model.float()
    vars(model).pop("forward", None)  # which autocast would take from fp32 again
    batch, losses = _batch(model, config, device), []
    for ids in batch["input_ids"].split(1):
        loss = model(input_ids=ids, labels=ids).loss / config.batch_size
        loss.backward()
        losses.append(loss.item())
    return _Pass(sum(losses), _taken(model, rest), None)


def _taken(model: PreTrainedModel, rest: torch.device) -> Gradients:
    """The model's gradients, moved to where they wait."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = parameter.grad.to(rest)
            parameter.grad = None
    gc.collect()
    return gradients


def _errors(found: _Pass, reference: _Pass, device: torch.device) -> GradientError:
    """Errors of a pass's loss and gradients against the reference's; None where they are not finite."""
    difference, norm, worst = 0.0, 0.0, (0.0, "")
    for name, wanted in reference.gradients.items():
        wanted = wanted.to(device)
        own = found.gradients[name].to(device).float() / (found.scale or 1.0)
        off, size = (own - wanted).norm().item(), wanted.norm().item()
        difference, norm = difference + off**2, norm + size**2
        # A parameter whose gradient is zero everywhere has no relative error.
        worst = max(worst, (off / size if size else 0.0, name), key=lambda pair: _finite_first(pair[0]))
    loss = abs(found.loss - reference.loss) / abs(reference.loss)
    values = (loss, (difference / norm) ** 0.5, worst[0])
    finite = [value if math.isfinite(value) else None for value in values]
    return GradientError(loss=finite[0], gradient=finite[1], worst=finite[2], worst_parameter=worst[1])


def _finite_first(value: float) -> float:
    """Not a number counts as more than any error."""
    return float("inf") if value != value else value
