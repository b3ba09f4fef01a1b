"""LoRA (Hu et al. 2021) through peft: small matrices are trained beside weights that stay as they are, or in 4 bits."""

from typing import Any

from src.techniques.libraries import missing
from src.techniques.technique import Config, Model, Technique
from src.utils import UsageError


def _refusal(config: Config) -> str | None:
    if not config.lora_rank:
        named = [name for name in ("lora_alpha", "lora_targets") if getattr(config, name) != LORA_DEFAULTS[name]]
        return f"--{named[0]} does nothing without --lora_rank" if named else None
    if reason := missing("peft"):
        return f"--lora_rank: {reason}"
    return "--fp8 changes the weights that --lora_rank leaves alone: one of them" if config.fp8 else None


def _targets(layer: Model, config: Config) -> dict[str, Any]:
    """The linear layers of a decoder layer that get adapters, by their names in it."""
    import torch

    part = layer if config.lora_targets == "linear" else layer.self_attn
    return {name: module for name, module in part.named_modules() if isinstance(module, torch.nn.Linear)}


def adapter_parameters(layer: Model, config: Config) -> int:
    """Parameters of the adapters in a decoder layer: a matrix from its input to the rank, one from there to its output.

    `layer` is as Hugging Face makes it. 0 without LoRA.
    """
    return config.lora_rank * sum(m.in_features + m.out_features for m in _targets(layer, config).values())


def _add_adapters(model: Model, config: Config) -> None:
    """Into every linear layer, or those of attention.

    In fp32, as peft makes them beside half-precision weights. DeepSpeed keeps an fp32 copy of what it trains on the
    host, and wants one dtype on the GPU: there they have that of the other weights.
    """
    if not config.lora_rank:
        return
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    names = [name.rpartition(".")[2] for name in _targets(model.model.layers[0], config)]
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names)
    inject_adapter_in_model(adapters, model)
    dtype = torch.float32 if config.script == "all_gpu" else model.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


_BLOCK, _SCALES = 64, 256  # torchao's: numbers that share a scale, and scales that share one of their own


def _refusal_of_nf4(config: Config) -> str | None:
    if config.lora_base == "model":
        return None
    if reason := missing("torchao"):
        return f"--lora_base nf4: {reason}"
    for name, off in (("mixed_precision", "none"), ("compile", "none"), ("mlp_tiles", 1)):
        if getattr(config, name) != off:
            return f"--lora_base nf4 goes with --{name} {off}: torchao's 4-bit weights have not been tried with it"
    return None


def _quantise(model: Model, config: Config) -> None:
    """Hold the decoder layers' linear weights in 4 bits; when the first is made, all are there in the model's dtype."""
    if config.lora_base == "model":
        return
    import torch
    from torchao.quantization import to_nf4

    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if not isinstance(module, torch.nn.Linear) or module.weight.requires_grad:
                continue
            if module.weight.numel() % (_BLOCK * _SCALES):
                raise UsageError(
                    f"--lora_base nf4 takes {_BLOCK * _SCALES:,} numbers at a time, and {name.partition('.base')[0]} "
                    f"of {config.model_name} has {' x '.join(map(str, module.weight.shape))}"
                )
            weight = to_nf4(module.weight.detach(), _BLOCK, _SCALES)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)


LORA_DEFAULTS = {"lora_alpha": 16, "lora_targets": "linear"}
LORA = (
    Technique(
        name="lora_rank",
        default=0,
        help="train LoRA adapters of this rank, and nothing else; 0 trains every weight",
        tag="lora",
        bounds=(0, 2**14),
        refusal=_refusal,
        to_model=_add_adapters,
    ),
    Technique(
        name="lora_alpha",
        default=LORA_DEFAULTS["lora_alpha"],
        help="adapters count alpha / rank times",
        tag="alpha",
        bounds=(1, 2**20),
    ),
    Technique(
        name="lora_targets",
        default=LORA_DEFAULTS["lora_targets"],
        help="where adapters are: in every linear layer but the LM head, or in attention's alone",
        tag="targets-",
        choices=("linear", "attention"),
    ),
    # After the adapters, which are not quantised.
    Technique(
        name="lora_base",
        default="model",
        help="what the decoder layers' linear weights are held in under LoRA: the model's dtype, or nf4, 4 bits as in "
        "QLoRA (Dettmers et al. 2023) by torchao, made the model's dtype again for each product",
        tag="base-",
        choices=("model", "nf4"),
        scripts=("all_gpu",),
        needs=("lora_rank",),
        changes_numerics=True,
        not_offloaded="DeepSpeed partitions and offloads a weight as one tensor, and torchao's 4-bit ones are five",
        refusal=_refusal_of_nf4,
        gpu_only=lambda config: config.lora_base == "nf4",
        to_model=_quantise,
    ),
)
