"""Host memory that an offloaded run takes, checked before anything is built."""

from transformers import PretrainedConfig

from src.machine import available_host_bytes, local_ranks
from src.model_utils import TORCH_DTYPES, parameter_counts
from src.offload_config import OffloadConfig
from src.utils import GIB, UsageError, next_power_of_two

# What a process takes besides tensors: PyTorch, CUDA's libraries, compiled kernels. What is left of the measured peaks
# under doc/data/ by the rules of the next function.
PROCESS_BYTES = 3 * GIB // 2
_CPU_PROCESS_BYTES = GIB // 2  # without CUDA's


def host_bytes_needed(config: OffloadConfig, model_config: PretrainedConfig) -> int:
    """Host memory that the whole job takes, within a few per cent of the records under doc/data/."""
    layer, rest = parameter_counts(model_config)
    layers = layer * model_config.num_hidden_layers
    count, width = layers + rest, TORCH_DTYPES[config.dtype].itemsize
    state_width = 4 if config.optimizer_states == "fp32" else 2
    shares_weights = config.optimizer == "overlapped_cpu_adam" and state_width == width
    states = (2 if shares_weights else 3) * state_width * count  # moments and master weights
    # Pinned memory is taken in powers of two, and PyTorch keeps what the model was built in for later use.
    pinned = 2 * next_power_of_two(width * count) + width * count
    if config.optimizer == "deepspeed_cpu_adam":  # copies the gradients into the master weights' dtype
        pinned += next_power_of_two(state_width * rest) + state_width * layers
    process = _CPU_PROCESS_BYTES if config.device == "cpu" else PROCESS_BYTES
    return states + pinned + process * config.world_size


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
