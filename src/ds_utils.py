"""DeepSpeed: its configuration (a pure function of `OffloadConfig`), its job, and the engine.

DeepSpeed chooses its accelerator when it is imported, so nothing here imports it at the top.
"""

import atexit
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PretrainedConfig
from transformers.integrations import HfDeepSpeedConfig

from src.machine import local_ranks
from src.model_utils import adapters_of_layer, build_model, family_of, load_model_config, parameter_counts
from src.offload import join, ranks
from src.offload.experiment import OffloadExperiment
from src.offload.host_memory import check_host_memory, check_more_kept_on_host, kept_on_host_bytes
from src.offload_config import OffloadConfig
from src.optimizer_utils import build_offload_optimizer, build_scheduler
from src.utils import UsageError, ceil_div, print_rank0


def zero3_config(config: OffloadConfig, model_config: PretrainedConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of the experiment; sizes are in elements."""
    layer, rest = parameter_counts(model_config)
    layer += adapters_of_layer(config, model_config)
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": True,
        "contiguous_gradients": config.optimizer == "deepspeed_cpu_adam",  # ours needs no bucket to copy into
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": layer if config.reduce_bucket_size is None else int(config.reduce_bucket_size),
        "sub_group_size": _sub_group_size(config, layer),
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    if config.prefetch_layers:
        zero["stage3_prefetch_bucket_size"] = layer * config.prefetch_layers
        zero["stage3_max_live_parameters"] = rest + layer * (config.prefetch_layers + 2)
        # Nothing stays on the GPU between its uses; DeepSpeed's default would keep a model of this size whole.
        zero["stage3_max_reuse_distance"] = 0
    if config.zero_stage < 3:  # weights are whole on every GPU
        zero = {key: value for key, value in zero.items() if key != "offload_param" and not key.startswith("stage3_")}
    elif config.fetch_layers:
        zero["leaf_module"] = {"classes": [family_of(model_config).decoder_layer]}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "prescale_gradients": False,
        "steps_per_print": config.step_per_print,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
        **_precision(config),
    }
    if config.optimizer == "overlapped_cpu_adam":
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return _merged(settings, config.ds_overrides)


def _sub_group_size(config: OffloadConfig, layer: int) -> int:
    """Elements of this rank's partition that are updated at a time."""
    return ceil_div(layer, config.world_size) if config.sub_group_size is None else int(config.sub_group_size)


def _precision(config: OffloadConfig) -> dict[str, Any]:
    if config.dtype == "fp16":
        loss_scale = {
            "loss_scale_window": config.fp16_loss_scale_window,
            "initial_scale_power": config.fp16_initial_scale_power,
            "hysteresis": config.fp16_hysteresis,
        }
        return {"fp16": {"enabled": True, **loss_scale}}
    if config.dtype == "bf16":
        in_bf16 = config.optimizer == "deepspeed_cpu_adam" and config.optimizer_states == "bf16"
        return {"bf16": {"enabled": True, "bf16_master_weights_and_grads": in_bf16, "bf16_optimizer_states": in_bf16}}
    return {}


def _merged(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `overrides` put over it, level by level; None removes a key (RFC 7396)."""
    merged = dict(settings)
    for key, value in overrides.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merged(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def init_distributed(device: str) -> torch.device:
    """Join the job that the launcher started, or make one of a single process; returns this rank's device."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", "29500" if ranks.world_size() > 1 else str(free_port()))
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    _quieten()
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA GPU; --device cpu runs the engine without one")
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        processes = max(local_ranks(), local_rank + 1)
        if processes > gpus:
            raise UsageError(f"{processes} processes on this machine, but {gpus} GPUs: take NUM_GPUS={gpus}")
        torch.cuda.set_device(local_rank)
        # When a collective has timed out, PyTorch waits four times this long for traces before it ends the rank: a
        # minute by default. Nobody asked for traces.
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")
    join.meet()
    # DeepSpeed's own collectives for CPUs leave 66 MiB a rank in /dev/shm for good.
    backend = importlib.import_module("deepspeed.comm.torch")
    own_collectives = mock.patch.object(backend, "build_shm_op", return_value=None)
    with own_collectives if device == "cpu" else nullcontext():
        deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", verbose=False)
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def shut_down(experiment: OffloadExperiment) -> None:
    """End the experiment's threads now, and this process's part in the job when it exits."""
    experiment.finish_updates()
    experiment.engine.destroy()
    # Not now: a process may run several experiments. Not after a failure: others may never come to the end.
    atexit.unregister(_leave_job)
    atexit.register(_leave_job)


def _leave_job() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port on this machine that no one listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quieten() -> None:
    """Keep off the console what a user can do nothing about; other warnings pass."""
    logging.getLogger("DeepSpeed").addFilter(_is_for_users)  # the same one again changes nothing
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # ZeRO-1 and 2 look at addresses, which fake tensors have none of; what is predicted does not depend on them.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    warnings.filterwarnings("ignore", message="barrier\\(\\): using the device under current context")
    # PyTorch counts calls of an optimizer's step(), which ours does not have.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")


def _let_reports_through() -> None:
    """What --step_per_print asks for is at a level that DeepSpeed does not show."""
    logger = logging.getLogger("DeepSpeed")
    for speaker in (logger, *logger.handlers):
        speaker.setLevel(logging.INFO)


def _is_for_users(record: logging.LogRecord) -> bool:
    message = str(record.msg)
    if record.levelno < logging.WARNING:
        return "skipped=" in message  # the report of --step_per_print
    return "ZeRO with an untested optimizer" not in message


def build_engine(config: OffloadConfig, device: torch.device) -> Any:
    """The DeepSpeed engine around the model, its weights partitioned and offloaded as they are made.

    Raises `UsageError` if the host has too little memory or DeepSpeed refuses the configuration.
    """
    import deepspeed

    _quieten()
    model_config = load_model_config(config)
    if not config.plans:
        _check_measured(config)
        check_host_memory(config, model_config)
        _announce_compilation(config)
    settings = zero3_config(config, model_config)
    _check_accepted(settings)
    with _partitioned(settings):
        model = build_model(config, device)
        optimizer = build_offload_optimizer(model, config)
        with _overlapped_zero3() if config.optimizer == "overlapped_cpu_adam" else nullcontext():
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=build_scheduler(optimizer, config), config=settings
            )
    if not config.plans:
        _let_reports_through()
    return engine


@contextmanager
def _partitioned(settings: dict[str, Any]) -> Iterator[None]:
    """Let transformers build and load models partitioned, which it does while an object lives.

    It ends also where building fails: the error's traceback would keep the object, and the next model be partitioned.
    """
    kept = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del kept


class KeptEngine:
    """Builds an engine for the first of several runs and gives it to those after it, which differ in their sizes alone.

    Building takes longer than most runs of a sweep. The weights go on from where the run before has left them.
    """

    def __init__(self) -> None:
        self._engine: Any = None
        self._kept_bytes = 0  # of the host, for good: what is pinned for a step is used again

    def __call__(self, config: OffloadConfig, device: torch.device) -> Any:
        """The engine for `config`. Raises what `build_engine` raises."""
        is_new = self._engine is None
        if is_new:
            self._engine = build_engine(config, device)
        shape = load_model_config(config)  # a length that the model cannot take is refused here, too
        kept = kept_on_host_bytes(config, shape)
        if not is_new and not config.plans:
            check_more_kept_on_host(config, kept - self._kept_bytes)
        self._kept_bytes = max(self._kept_bytes, kept)
        self._engine.set_train_micro_batch_size(config.batch_size)
        return self._engine


def _check_measured(config: OffloadConfig) -> None:
    if not config.optimizer_on_cpu:
        raise UsageError("--ds_override: with its optimizer on the GPU this script predicts only: add --dry_run")


def _check_accepted(settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(settings)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise UsageError(f"DeepSpeed refuses this configuration: {str(error) or type(error).__name__}") from error


def _overlapped_zero3() -> Any:
    from deepspeed.runtime.zero import stage3

    from src.offload.overlapped_adam import OverlappedZero3

    return mock.patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", OverlappedZero3)


def _announce_compilation(config: OffloadConfig) -> None:
    """Say what takes long, and whom a compilation would wait for."""
    from torch.utils.cpp_extension import _get_build_directory

    name = {"deepspeed_cpu_adam": "cpu_adam", "overlapped_cpu_adam": "overlapped_adam"}[config.optimizer]
    folder = Path(_get_build_directory(name, verbose=False))
    if (folder / f"{name}.so").exists():
        return
    lock = folder / "lock"
    waiting = f" If nothing else compiles it now, delete {lock}: a compilation that was killed left it."
    told = f"Compiling {config.optimizer} for this machine: once, up to a few minutes."
    print_rank0(told + (waiting if lock.exists() else ""))
