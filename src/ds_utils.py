"""DeepSpeed: its configuration (a pure function of `OffloadConfig`), the engine, and what several ranks measured.

DeepSpeed chooses its accelerator when it is imported, so nothing here imports it at the top.
"""

import atexit
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig
from transformers.integrations import HfDeepSpeedConfig

from src import records
from src.attribution import Attribution
from src.config import OffloadConfig
from src.live_memory import tensors_in
from src.measure import Measurement, PhasePeaks, Step
from src.model_utils import TORCH_DTYPES, build_model, load_model_config, parameter_counts
from src.offload import join, ranks
from src.optimizer_utils import build_offload_optimizer, build_scheduler
from src.snapshot import GATHER, REDUCE
from src.utils import GIB, UsageError, is_rank0, local_ranks, next_power_of_two, print_rank0


def zero3_config(config: OffloadConfig, model_config: LlamaConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of the experiment; sizes are in elements."""
    layer, rest = parameter_counts(model_config)
    zero: dict[str, Any] = {
        "stage": 3,
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
    if config.fetch_layers:
        zero["leaf_module"] = {"classes": ["LlamaDecoderLayer"]}
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
    return -(-layer // config.world_size) if config.sub_group_size is None else int(config.sub_group_size)


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


# What a process takes besides tensors: PyTorch, CUDA's libraries, compiled kernels. What is left of the measured peaks
# under doc/data/ by the rules of the next function.
_PROCESS_BYTES = 4 * GIB
_CPU_PROCESS_BYTES = GIB // 2  # without CUDA's


def host_bytes_needed(config: OffloadConfig, model_config: LlamaConfig) -> int:
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
    process = _CPU_PROCESS_BYTES if config.device == "cpu" else _PROCESS_BYTES
    return states + pinned + process * config.world_size


def check_host_memory(config: OffloadConfig, model_config: LlamaConfig) -> None:
    """Raises `UsageError` if this host has less free memory than its ranks will take."""
    needed = host_bytes_needed(config, model_config) * min(local_ranks(), config.world_size) // config.world_size
    available = _available_host_bytes()
    if needed > available:
        raise UsageError(
            f"{config.model_name} offloaded takes about {needed / GIB:.1f} GiB of host memory here, and "
            f"{available / GIB:.1f} GiB are free: take --preset fast, --optimizer_states bf16 with it, a smaller "
            "model, or more machines"
        )


def _available_host_bytes() -> int:
    """What this process can still allocate: the machine's free memory, or less under a cgroup's limit."""
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup, or no limit
        return available
    files = int(counts["inactive_file"]) + int(counts["active_file"])  # cached files give way
    return min(available, limit - used + files)


@dataclass(frozen=True)
class OffloadExperiment:
    """A DeepSpeed engine and the step that trains it."""

    engine: Any  # deepspeed.DeepSpeedEngine
    step: Step

    @property
    def model(self) -> torch.nn.Module:
        """The model inside the engine."""
        return self.engine.module

    @property
    def steps_done(self) -> tuple[int, int]:
        """Optimizer steps of the engine so far, and those of them that changed no weight: gradients had overflowed."""
        return self.engine.global_steps, self.engine.skipped_steps

    def resident(self) -> dict[str, list[torch.Tensor]]:
        """What stays on the GPU between steps, by what it is for."""
        optimizer = self.engine.optimizer
        found: dict[str, list[torch.Tensor]] = {"gradient_reduction": [], "optimizer_state": []}
        buckets = {f"bucket {i}": vars(bucket) for i, bucket in enumerate(optimizer.ipg_buckets.values())}
        for name, value in (vars(optimizer) | buckets).items():
            category = "gradient_reduction" if "grad" in name or "bucket" in name else "optimizer_state"
            found[category] += tensors_in(value)
        for states in (optimizer.optimizer, getattr(optimizer, "backup_optimizer", None)):
            found["optimizer_state"] += tensors_in([] if states is None else states.state)
        masters = [tensor for tensor in found["optimizer_state"] if tensor.is_leaf and tensor.grad is not None]
        found["gradient_reduction"] += [master.grad for master in masters]
        return found | {"parameters": list(self.model.parameters())}

    def gradients(self) -> list[torch.Tensor]:
        """None are left when the optimizer begins: each goes to the host as it is made."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    @contextmanager
    def labelling(self, attribution: Attribution) -> Iterator[None]:
        """Let ZeRO say which memory it asks for, and which gradients are ready."""
        optimizer = self.engine.optimizer
        methods = [
            (_coordinator(optimizer), "_PartitionedParameterCoordinator__all_gather_params", GATHER),
            (optimizer, "reduce_independent_p_g_buckets_and_remove_grads", REDUCE),
            (optimizer, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads", REDUCE),
        ]
        with ExitStack() as stack:
            for owner, name, label in methods:
                if hasattr(owner, name):
                    stack.enter_context(_labelled(owner, name, label, attribution))
            yield

    def finish_updates(self) -> None:
        """Wait for updates that still run behind the last step."""
        getattr(self.engine.optimizer, "finish_updates", lambda: None)()

    def grad_norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping; None if it overflowed."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)


def _coordinator(optimizer: Any) -> Any:
    """What fetches weights; under ZeRO-2 there is none."""
    offload = getattr(optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()


def _labelled(owner: Any, name: str, label: str, attribution: Attribution) -> AbstractContextManager:
    """`owner.name` with what it asks for labelled, and the gradient of a parameter it is given noted."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        attribution.own("gradients", (a.grad for a in args if isinstance(a, torch.nn.Parameter) and a.grad is not None))
        with attribution.label(label):
            return method(*args, **kwargs)

    return mock.patch.object(owner, name, call)


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
    logging.getLogger("DeepSpeed").addFilter(_is_for_users)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
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

    model_config = load_model_config(config)
    check_host_memory(config, model_config)
    settings = zero3_config(config, model_config)
    _check_accepted(settings)
    _announce_compilation(config)
    # While this object lives, transformers builds and loads models partitioned.
    partitioned = HfDeepSpeedConfig(settings)
    model = build_model(config, device)
    optimizer = build_offload_optimizer(model, config)
    with _overlapped_zero3() if config.optimizer == "overlapped_cpu_adam" else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=build_scheduler(optimizer, config), config=settings
        )
    del partitioned
    _let_reports_through()
    return engine


class KeptEngine:
    """Builds an engine for the first of several runs and gives it to those after it, which differ in their sizes alone.

    Building takes longer than most runs of a sweep. The weights go on from where the run before has left them.
    """

    def __init__(self) -> None:
        self._engine: Any = None

    def __call__(self, config: OffloadConfig, device: torch.device) -> Any:
        """The engine for `config`. Raises what `build_engine` raises."""
        if self._engine is None:
            self._engine = build_engine(config, device)
        load_model_config(config)  # a length that the model cannot take is refused here, too
        self._engine.set_train_micro_batch_size(config.batch_size)
        return self._engine


def _check_accepted(settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(settings)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise UsageError(f"DeepSpeed refuses this configuration: {str(error) or type(error).__name__}") from error


def _overlapped_zero3() -> Any:
    from deepspeed.runtime.zero import stage3

    from src.overlapped_adam import OverlappedZero3

    return mock.patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", OverlappedZero3)


_LONGEST_COMPILATION_S = 1800  # it takes a few minutes


def _announce_compilation(config: OffloadConfig) -> None:
    """Say what takes long. Raises `UsageError` if a compilation that was killed would be waited for for ever."""
    from torch.utils.cpp_extension import _get_build_directory

    name = {"deepspeed_cpu_adam": "cpu_adam", "overlapped_cpu_adam": "overlapped_adam"}[config.optimizer]
    folder = Path(_get_build_directory(name, verbose=False))
    _check_lock(folder / "lock")
    if not (folder / f"{name}.so").exists():
        print_rank0(f"Compiling {config.optimizer} for this machine: once, up to a few minutes.")


def _check_lock(lock: Path) -> None:
    """Whoever compiles has the lock open. It is not ours to delete: other machines may share the folder."""
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return
    if _is_open(lock) or not lock.exists():
        return
    if age_s > _LONGEST_COMPILATION_S:
        raise UsageError(f"{lock} was left by a compilation that was killed: delete it, and start again")
    if ranks.is_first_here():
        told = (
            f"Waiting for {lock} to go: a compilation that was killed has left it, unless another machine compiles "
            "there now. If none does, stop this run, delete the file and start again."
        )
        print(told, file=sys.stderr, flush=True)


def _is_open(path: Path) -> bool:
    """Whether a process on this machine has the file open, as far as this user may look."""
    import psutil

    processes = psutil.process_iter(["open_files"])
    return any(str(path.resolve()) == file.path for process in processes for file in process.info["open_files"] or ())


def _gathered(value: Any) -> list[Any]:
    """`value` of every rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _combined(combine: Callable[[list[Any]], Any], columns: list[list[Any]]) -> list[Any]:
    """`combine` over the ranks, entry by entry; None where a rank has none."""
    return [None if None in entries else combine(list(entries)) for entries in zip(*columns)]


def over_ranks(measurement: Measurement) -> Measurement:
    """What the slowest and fullest ranks showed; losses are averaged."""
    all_ranks = _gathered(measurement)
    used, retries = zip(*((m.device_used_bytes, m.allocation_retries) for m in all_ranks))
    return Measurement(
        step_seconds=_combined(max, [m.step_seconds for m in all_ranks]),
        losses=_combined(lambda losses: sum(losses) / len(losses), [m.losses for m in all_ranks]),
        peak_allocated_bytes=_combined(max, [m.peak_allocated_bytes for m in all_ranks]),
        peak_reserved_bytes=_combined(max, [m.peak_reserved_bytes for m in all_ranks]),
        device_used_bytes=None if None in used else max(used),
        allocation_retries=None if None in retries else max(retries),
    )


def phases_over_ranks(phases: PhasePeaks, grad_norm: float | None) -> PhasePeaks:
    """The fullest rank's peak of each phase."""
    all_ranks = _gathered(phases.peak_bytes)
    peaks = {name: _combined(max, [[p[name]] for p in all_ranks])[0] for name in all_ranks[0]}
    return PhasePeaks(peaks, grad_norm)


def sum_over_ranks(value: int) -> int:
    """The sum of every rank's `value`."""
    return sum(_gathered(value))


def max_over_ranks(value: int | None) -> int | None:
    """The largest of every rank's `value`, None if a rank has none."""
    return _combined(max, [[v] for v in _gathered(value)])[0]


def report_of_ranks(record: dict[str, Any], config: OffloadConfig) -> None:
    """Print what the run showed; another rank than the first tells only if it alone ran out of memory."""
    print_rank0(records.report(record, config))
    if record["status"] == "oom" and not is_rank0():
        ranks.give_way()
        ranks.tell(f"{ranks.name()}out of GPU memory, see {config.record_file}")
