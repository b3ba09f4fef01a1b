"""Mixed precision: weights and optimizer state in fp32, matrix products in half of that."""

from src.techniques.technique import Config, Model, Technique


def _refusal(config: Config) -> str | None:
    if config.mixed_precision == "none" or config.dtype == "fp32":
        return None
    return f"--mixed_precision {config.mixed_precision} keeps weights in fp32: leave --dtype {config.dtype} out"


def _autocast(model: Model, config: Config) -> None:
    """As Hugging Face's Trainer has it, through Accelerate: outputs come back in fp32, logits too if there are any."""
    if config.mixed_precision == "none":
        return
    import torch
    from accelerate.utils.operations import convert_outputs_to_fp32

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    model.forward = convert_outputs_to_fp32(torch.autocast(model.device.type, dtype)(model.forward))


MIXED_PRECISION = Technique(
    name="mixed_precision",
    default="none",
    help="bf16 or fp16: weights and optimizer state in fp32 under autocast, as Hugging Face's Trainer trains",
    tag="mixed-",
    choices=("none", "bf16", "fp16"),
    scripts=("all_gpu",),
    changes_numerics=True,
    not_offloaded="DeepSpeed's --dtype bf16 and fp16 already keep fp32 weights and states, on the host, beside "
    "half-precision ones",
    refusal=_refusal,
    to_model=_autocast,
)
