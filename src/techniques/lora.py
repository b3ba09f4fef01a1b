"""LoRA (Hu et al. 2021) through peft: small matrices are trained beside weights that stay as they are."""

from typing import Any

from src.techniques.libraries import missing
from src.techniques.technique import Config, Model, Technique


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
)
