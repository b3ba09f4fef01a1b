"""How fast an offloaded step could be on this machine: a lower bound from rates measured on it.

A step has to do three kinds of work, and these rules say what may overlap:

- the GPU multiplies: 2 operations a weight and token forward, 4 backward (2 if it is not trained), 2 more where a layer
  is recomputed (all but its last product, which nothing needs), and the products of attention;
- weights and gradients cross PCIe: every weight in the forward pass, every layer's again in the backward pass, every
  gradient back; multiplying and both directions overlap;
- Adam reads and writes host memory. It needs the norm of all gradients, so it cannot start before the backward pass
  ends; it can run behind the next forward pass.

    floor = max(forward, Adam) + backward,     forward, backward = max(multiplying, crossing)

Method: Ren et al. 2021 (ZeRO-Offload), section 3, with this machine's rates. Several ranks share PCIe and host memory
as their partitions do; micro-batches after the first add a forward and a backward pass.

A dry run states the same at rates that were measured before (src/predict/rates.py). It bounds the step from below, and
says nothing of how far above it the step stays.
"""

import torch
from transformers import PretrainedConfig

from src.experiment import Runtime
from src.machine import local_ranks
from src.measure.machine_rates import host_rates, matmul_flops
from src.model_utils import TORCH_DTYPES, adapters_of_layer, flops_of_passes, full_shape, parameter_counts
from src.offload.team import largest
from src.offload_config import OffloadConfig
from src.predict.rates import OffloadRates

# Bytes that one update of a parameter has to read and write: 16-bit gradient read; master weights and two moments read
# and written; a 16-bit copy of the weights written unless they are the master weights.
UPDATE_BYTES = {"fp32": 2 + 3 * 8 + 2, "bf16": 2 + 3 * 4}


def floor_seconds(
    flops_forward: float, flops_backward: float, bytes_of: dict[str, float], rates: dict[str, float], micro: int
) -> dict[str, float]:
    """The parts of the floor and their sum, in seconds. `flops_*` and `bytes_of` are of one micro-batch and rank."""
    to_gpu, to_host = rates["to_gpu_bytes_per_s"], rates["to_host_bytes_per_s"]
    forward = max(flops_forward / rates["matmul_flops_per_s"], bytes_of["forward_to_gpu"] / to_gpu)
    backward = max(
        flops_backward / rates["matmul_flops_per_s"],
        bytes_of["backward_to_gpu"] / to_gpu,
        bytes_of["to_host"] / to_host,
    )
    adam = bytes_of["adam"] / rates["host_memory_bytes_per_s"]
    total = max(forward, adam) + backward + (micro - 1) * (forward + backward)
    return {"forward_s": forward, "backward_s": backward, "adam_s": adam, "floor_s": total}


def work(model: torch.nn.Module, config: OffloadConfig) -> tuple[float, float, dict[str, float]]:
    """Operations and bytes of one micro-batch on one rank; Adam's bytes of all ranks of this machine."""
    shape = model.config
    layer, rest = parameter_counts(shape)
    layers = (layer + adapters_of_layer(config, shape)) * shape.num_hidden_layers
    trained = sum(full_shape(p).numel() for p in model.parameters() if p.requires_grad)
    passes = config.world_size * config.gradient_accumulation_steps
    forward, backward = (flops / passes for flops in flops_of_passes(model, config))
    recomputed = forward - _never_recomputed(shape, config) * config.tokens_per_step / passes
    recomputed *= sum(layer.gradient_checkpointing for layer in model.model.layers) / shape.num_hidden_layers
    width = TORCH_DTYPES[config.dtype].itemsize / config.world_size
    ranks_here = min(local_ranks(), config.world_size)  # a dry run of one rank may run among others
    moved = {
        "forward_to_gpu": width * (layers + rest),
        "backward_to_gpu": width * layers,
        "to_host": width * trained,
        "adam": UPDATE_BYTES[config.optimizer_states] * trained * ranks_here / config.world_size,
    }
    return forward, backward + recomputed, moved


def _never_recomputed(shape: PretrainedConfig, config: OffloadConfig) -> int:
    """Operations a token of the LM head and, in each layer, of the MLP's last product, whose result nothing needs.

    Where the MLP has adapters, that is the second of an adapter's two.
    """
    inputs = config.lora_rank if config.lora_rank and config.lora_targets == "linear" else shape.intermediate_size
    return 2 * shape.hidden_size * (shape.vocab_size + shape.num_hidden_layers * inputs)


def of_run(model: torch.nn.Module, config: OffloadConfig, runtime: Runtime) -> tuple[float | None, dict | None]:
    """The floor in seconds and what it is made of.

    None where weights or optimizer states stay on the GPU, of which `work` knows nothing, or if the GPU has no room
    left to measure its rates. Every rank calls it.
    """
    if not (config.weights_on_cpu and config.optimizer_on_cpu):
        return None, None
    runtime.release_cache()
    try:
        rates = measure_rates(TORCH_DTYPES[config.dtype], runtime)
    except torch.OutOfMemoryError:
        rates = None
    if largest(None if rates is None else 0) is None:
        return None, None
    # The slowest rank's rates: all wait for it.
    rates = {name: 1 / largest(1 / rate) for name, rate in rates.items()}
    flops_forward, flops_backward, moved = work(model, config)
    parts = floor_seconds(flops_forward, flops_backward, moved, rates, config.gradient_accumulation_steps)
    return parts.pop("floor_s"), parts | rates


def measure_rates(dtype: torch.dtype, runtime: Runtime) -> dict[str, float]:
    """What this machine does at best, by `floor_seconds`'s names."""
    return {"matmul_flops_per_s": matmul_flops(dtype, runtime)} | host_rates(runtime)


def predicted(model: torch.nn.Module, config: OffloadConfig, rates: OffloadRates | None) -> dict[str, float] | None:
    """`floor_seconds` at rates that were measured before; None where it is not known.

    Several GPUs share PCIe and host memory in a way that rates of one do not tell, and weights or states that stay on
    the GPU cross nothing.
    """
    if rates is None or config.world_size > 1 or not (config.weights_on_cpu and config.optimizer_on_cpu):
        return None
    if config.dtype not in rates.matmul_flops:
        return None
    own = {
        "matmul_flops_per_s": rates.matmul_flops[config.dtype],
        "to_gpu_bytes_per_s": rates.to_gpu_bytes,
        "to_host_bytes_per_s": rates.to_host_bytes,
        "host_memory_bytes_per_s": rates.host_memory_bytes,
    }
    parts = floor_seconds(*work(model, config), own, config.gradient_accumulation_steps)
    return parts | own | {"host_cores": rates.cores}
