"""Host memory that a run takes beside the GPU's, checked before anything is built."""

import dataclasses

from transformers import PretrainedConfig

from src.architecture import head_dim, one_layer_model
from src.config import RunConfig
from src.machine import available_host_bytes, local_ranks
from src.model_utils import TORCH_DTYPES, adapters_of_layer, parameter_counts
from src.offload_config import OffloadConfig
from src.techniques.pinned import piece_sizes
from src.utils import GIB, HostMemoryError, UsageError, ceil_div, next_power_of_two

# What a process takes besides tensors: PyTorch, CUDA's libraries, what its heap keeps. What is left of the measured
# peaks under doc/data/ that come while building, 1.3 to 1.6 GiB, when the tensors of a simulated run are taken away.
PROCESS_BYTES = 3 * GIB // 2
# What it takes more from the first step on. Three runs were watched on an H200: their memory beside the tensors grew by
# 0.5 to 0.7 GiB. It shows where a step takes more than building did.
STEPS_BYTES = GIB // 2
_CPU_PROCESS_BYTES = GIB // 2  # without CUDA's


def kept_on_host_bytes(config: RunConfig, shape: PretrainedConfig) -> int:
    """What `--checkpoint_offload overlapped` and `--attention_kept` pin on one GPU's host.

    Every checkpointed layer's input but the last, which stays on the GPU, and of layers that keep their attention its
    output and, in fp32, the logarithm of each row's softmax sum.
    """
    if config.checkpoint_offload != "overlapped":
        return 0
    tokens = config.batch_size * config.seq_length
    width, attention_width = (TORCH_DTYPES[dtype].itemsize for dtype in (config.dtype, config.compute_dtype))
    checkpointed = range(0, shape.num_hidden_layers, config.checkpoint_every)
    inputs = len(checkpointed) - 1
    heads = shape.num_attention_heads
    attention = _pieces_bytes(tokens * heads * head_dim(shape) * attention_width) + _pieces_bytes(tokens * heads * 4)
    kept = sum(layer < config.attention_kept for layer in checkpointed)
    return inputs * _pieces_bytes(tokens * shape.hidden_size * width) + kept * attention


def _pieces_bytes(count: int) -> int:
    return sum(piece_sizes(count))


def check_kept_on_host(config: RunConfig, shape: PretrainedConfig) -> None:
    """Raises `HostMemoryError` if this host, or --host_memory_gib, has less memory than one GPU's run keeps there.

    A dry run is of another machine, of whose host nothing is known without that flag.
    """
    if config.plans and config.host_memory_gib is None:
        return
    needed = kept_on_host_bytes(config, shape) + PROCESS_BYTES
    asked_for = config.host_memory_gib
    available = available_host_bytes() if asked_for is None else int(asked_for * GIB)
    if needed <= available or needed == PROCESS_BYTES:
        return
    ways = ["a shorter sequence"]
    layers = min(config.attention_kept, shape.num_hidden_layers)
    fitting = [n for n in range(layers) if _needed_with(config, shape, n) <= available]
    ways += [f"--attention_kept {fitting[-1]}"] if fitting else []
    known = "of --host_memory_gib" if asked_for is not None else "that are free (--host_memory_gib, if there is more)"
    raise HostMemoryError(
        f"{config.model_name} keeps {needed / GIB:.2f} GiB in host memory at {config.seq_length:,} tokens, more than "
        f"the {available / GIB:.2f} GiB {known}: take {' or '.join(reversed(ways))}"
    )


def check_more_kept_on_host(config: OffloadConfig, more: int) -> None:
    """Raises `HostMemoryError` if this host has not `more` bytes left for each rank, beside an engine that is built."""
    needed, available = more * min(local_ranks(), config.world_size), available_host_bytes()
    if needed > available:
        raise HostMemoryError(
            f"{config.seq_length:,} tokens keep {needed / GIB:.2f} GiB more in host memory than what ran before, and "
            f"{available / GIB:.2f} GiB are free: take a shorter sequence"
        )


def _needed_with(config: RunConfig, shape: PretrainedConfig, attention_kept: int) -> int:
    return kept_on_host_bytes(dataclasses.replace(config, attention_kept=attention_kept), shape) + PROCESS_BYTES


def host_bytes_needed(config: OffloadConfig, model_config: PretrainedConfig) -> int:
    """Host memory that the whole job takes with the optimizer offloaded.

    Within 6 % of the records under doc/data/, which have the weights offloaded, too. The same as a dry run's, which
    counts every tensor, but at once; under ZeRO-1 and 2, which pin master weights and gradients instead, within 10 %.
    """
    layer, rest = parameter_counts(model_config)
    layers = layer * model_config.num_hidden_layers
    if config.lora_rank:
        layers, rest = adapters_of_layer(config, model_config) * model_config.num_hidden_layers, 0
    count, width = ceil_div(layers + rest, config.world_size), TORCH_DTYPES[config.dtype].itemsize
    state_width = 4 if config.optimizer_states == "fp32" else 2
    ours = config.optimizer == "overlapped_cpu_adam"
    states = (2 if ours and state_width == width else 3) * state_width * count  # moments and master weights
    pinned = next_power_of_two(width * count)  # all gradients
    if config.weights_on_cpu or config.zero_stage < 3:
        # All weights, and what they were made in one by one, which PyTorch keeps for later use.
        pinned += next_power_of_two(width * count) + width * count
        pinned += next_power_of_two(width * ceil_div(rest, config.world_size))
    in_steps = kept_on_host_bytes(config, model_config) + (0 if config.device == "cpu" else STEPS_BYTES)
    if ours:
        passing = max(in_steps, width * count)  # or the gradients' memory, before it is pinned and any step runs
    else:
        # Gradients in the master weights' dtype; in fp16 a copy and a mask of all, to look for infinities.
        pinned += next_power_of_two(state_width * ceil_div(rest, config.world_size))
        pinned += state_width * ceil_div(layers, config.world_size)
        passing = in_steps + ((width + 1) * count if config.dtype == "fp16" else 0)
    process = _CPU_PROCESS_BYTES if config.device == "cpu" else PROCESS_BYTES
    trained = states + pinned + passing
    if config.lora_rank:
        frozen, passing = _frozen_bytes(config, model_config)
        return config.world_size * (frozen + max(passing, trained) + process)
    return config.world_size * (trained + process)


def _frozen_bytes(config: OffloadConfig, model_config: PretrainedConfig) -> tuple[int, int]:
    """What a rank's part of weights takes that are not trained, and what more only while they are made.

    They stay as they are made, pinned one by one. The LM head is made last, in ordinary memory first; if it will be the
    embedding, its own pinned memory stays for later use.
    """
    model = one_layer_model(model_config)
    in_layer = {id(parameter) for parameter in model.model.layers[0].parameters()}
    width, pinned = TORCH_DTYPES[config.dtype].itemsize, 0
    for parameter in model.parameters():
        times = model_config.num_hidden_layers if id(parameter) in in_layer else 1
        pinned += times * next_power_of_two(width * ceil_div(parameter.numel(), config.world_size))
    head = width * ceil_div(model.lm_head.weight.numel(), config.world_size)
    return pinned + (next_power_of_two(head) if model_config.tie_word_embeddings else 0), head


def check_host_memory(config: OffloadConfig, model_config: PretrainedConfig) -> None:
    """Raises `UsageError` if this host has less free memory than its ranks will take."""
    needed = host_bytes_needed(config, model_config) * min(local_ranks(), config.world_size) // config.world_size
    available = available_host_bytes()
    if needed <= available:
        return
    ways = [] if config.preset == "fast" else ["--preset fast"]
    ways += [] if config.optimizer_states == "bf16" else ["--preset fast --optimizer_states bf16"]
    raise UsageError(
        f"{config.model_name} offloaded takes about {needed / GIB:.1f} GiB of host memory here, and "
        f"{available / GIB:.1f} GiB are free: take {', '.join([*ways, 'a smaller model'])}, or more machines"
    )
