"""Host memory that an offloaded run takes, checked before anything is built."""

from transformers import PretrainedConfig

from src.architecture import one_layer_model
from src.machine import available_host_bytes, local_ranks
from src.model_utils import TORCH_DTYPES, adapters_of_layer, parameter_counts
from src.offload_config import OffloadConfig
from src.utils import GIB, UsageError, ceil_div, next_power_of_two

# What a process takes besides tensors: PyTorch, CUDA's libraries, compiled kernels, and what its heap keeps. What is
# left of the measured peaks under doc/data/, 1.3 to 2 GiB, when the tensors of a simulated run are taken from them.
PROCESS_BYTES = 3 * GIB // 2
_CPU_PROCESS_BYTES = GIB // 2  # without CUDA's


def host_bytes_needed(config: OffloadConfig, model_config: PretrainedConfig) -> int:
    """Host memory that the whole job takes with everything offloaded, within 5 % of the records under doc/data/.

    The same as a dry run's, which counts every tensor, but at once.
    """
    layer, rest = parameter_counts(model_config)
    layers = layer * model_config.num_hidden_layers
    if config.lora_rank:
        layers, rest = adapters_of_layer(config, model_config) * model_config.num_hidden_layers, 0
    count, width = ceil_div(layers + rest, config.world_size), TORCH_DTYPES[config.dtype].itemsize
    state_width = 4 if config.optimizer_states == "fp32" else 2
    ours = config.optimizer == "overlapped_cpu_adam"
    states = (2 if ours and state_width == width else 3) * state_width * count  # moments and master weights
    # Pinned memory is taken in powers of two: all weights, all gradients, and what the weights were made in one by one,
    # which PyTorch keeps for later use.
    pinned = 2 * next_power_of_two(width * count) + width * count
    pinned += next_power_of_two(width * ceil_div(rest, config.world_size))
    if ours:
        passing = width * count  # the gradients' memory, before it is pinned
    else:
        # Gradients in the master weights' dtype; in fp16 a copy and a mask of all, to look for infinities.
        pinned += next_power_of_two(state_width * ceil_div(rest, config.world_size))
        pinned += state_width * ceil_div(layers, config.world_size)
        passing = (width + 1) * count if config.dtype == "fp16" else 0
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
