"""One rank of a job that is not there: DeepSpeed's own engine on a simulated GPU, in a world of any size.

Which weights are gathered and when they are let go, what is prefetched, how gradients are reduced and where the
optimizer works is DeepSpeed's code, run as it is: a prediction follows its version and its configuration. Replaced are
only the things that DeepSpeed reaches beyond PyTorch's tensors: streams, the exchange with other ranks, and compiled
updates of host memory; and what it does once for each rank (many_ranks.py). None of them takes memory that PyTorch's
allocator would count.

Rank 0 is simulated. Partitions are rounded up, so no rank holds more.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from src import overrides
from src.config import RunConfig
from src.machine import Gpu
from src.offload import floor
from src.offload.host_memory import PROCESS_BYTES, STEPS_BYTES
from src.offload.many_ranks import only_own_pieces
from src.offload_config import OffloadConfig
from src.predict.fake_gpu import FakeGpu, aten
from src.predict.fake_machine import FakeMachine
from src.predict.live_memory import tensors_in
from src.predict.rates import Rates
from src.predict.work import NO_KERNEL, Work

# Of the offloaded records under doc/data/.
MEASURED_RANKS = 4
_LLAMAS = [f"meta-llama/Llama-{name}{suffix}" for name in ("3.2-1B", "3.1-8B") for suffix in ("", "-Instruct")]
MEASURED_MODELS = (*_LLAMAS, "Qwen/Qwen3-0.6B")

_EXCHANGES = ["all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "send", "recv", "barrier"]
_EXCHANGES += ["reduce_scatter", "reduce_scatter_tensor", "broadcast", "broadcast_object_list", "gather", "scatter"]
_EXCHANGES += ["all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced", "all_gather_object"]
_EXCHANGES += ["all_to_all", "all_to_all_single", "monitored_barrier"]


class SimulatedRank(FakeMachine):
    """Rank 0 of a job of `config.world_size` ranks, on `card`."""

    def __init__(self, config: OffloadConfig, card: Gpu, limit_bytes: int | None = None) -> None:
        super().__init__(card, limit_bytes)
        self._world_size = config.world_size

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let everything in the block, DeepSpeed's engine too, run as this rank."""
        with _job(self, self._world_size), super().active():
            yield

    def begin_steps(self) -> None:
        """From here on the process takes more."""
        self.host.allocate(STEPS_BYTES)

    def host_peak_bytes(self) -> int:
        """What the ranks of all machines take, and their processes beside the tensors."""
        return self._world_size * (self.host.peak_bytes + PROCESS_BYTES)

    def floor(self, model: torch.nn.Module, config: OffloadConfig, rates: Rates) -> dict[str, float] | None:
        """By src/offload/floor.py."""
        return floor.predicted(model, config, rates.offload)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A byte that is read is the flag that some gradient overflowed: none does.
        if func is aten._local_scalar_dense.default and args[0].dtype is torch.uint8:
            return 0
        return super().__torch_dispatch__(func, types, args, kwargs)


class SimulatedProcess(FakeMachine):
    """A process without others, which keeps what one GPU does not hold in the host beside it."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let everything in the block run in this process; copies beside the step are done at once."""
        with contextlib.ExitStack() as stack:
            for name in ("Stream", "stream", "current_stream"):
                stack.enter_context(mock.patch(f"torch.cuda.{name}", _Nothing))
            stack.enter_context(super().active())
            yield

    def begin_counting(self) -> None:
        """What the GPU does, and that alone."""
        self.works = []

    def _note_work(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """A copy that the CPU does not wait for runs beside the step: launching it is all that the step sees of it.

        Of one that it waits for no rate is known, so the step has no time.
        """
        places = {self.place_of(tensor).type for tensor in tensors_in([args, kwargs, result])}
        if self.works is None or "cpu" not in places:
            super()._note_work(func, args, kwargs, result)
        elif "cuda" in places:
            beside = func is aten.copy_.default and (True in args[2:] or kwargs.get("non_blocking"))
            self._append(NO_KERNEL if beside else Work("copies that the CPU waits for", "unknown"))

    def host_peak_bytes(self) -> int:
        """What the tensors take there, and the process beside them."""
        return self.host.peak_bytes + PROCESS_BYTES


def one_gpu(config: RunConfig, card: Gpu, limit_bytes: int | None = None) -> FakeGpu:
    """The GPU of a run without DeepSpeed's engine; with the host beside it where the run keeps something there."""
    kind = FakeGpu if config.checkpoint_offload == "none" else SimulatedProcess
    return kind(card, limit_bytes)


def unchecked(config: OffloadConfig) -> list[str]:
    """What of a run no measured record shows, so that nothing but DeepSpeed's own code speaks for its prediction."""
    places = {"weights on the GPU": config.weights_on_cpu, "optimizer on the GPU": config.optimizer_on_cpu}
    found = [] if config.zero_stage == 3 else [f"ZeRO-{config.zero_stage}"]
    found += [name for name, on_cpu in places.items() if not on_cpu]
    found += [f"{config.world_size:,} GPUs"] if config.world_size > MEASURED_RANKS else []
    found += ["--ds_override's other values"] if overrides.says_more(config.ds_overrides) else []
    on_one = {
        "checkpoints on the host": config.checkpoint_offload != "none",
        "MLP or loss in pieces of tokens": bool(config.mlp_tile_tokens or config.flce_tokens),
        "LoRA": config.lora_rank > 0,
        "micro-batches": config.gradient_accumulation_steps > 1,
    }
    if config.world_size > 1:
        found += [f"{name} on several GPUs" for name, is_on in on_one.items() if is_on]
    return found if config.model_name in MEASURED_MODELS else [*found, config.model_name]


class _Nothing:
    """A stream, an event or the handle of an exchange: whatever is asked of it is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _job(rank: SimulatedRank, world_size: int) -> Iterator[None]:
    """DeepSpeed believes that it is rank 0 of `world_size`; afterwards everything is as it was."""
    # DeepSpeed looks for its accelerator while it is imported, and would tell that it finds none.
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(_accelerator(rank))
        import deepspeed
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        stack.enter_context(_process_group(world_size))
        stack.enter_context(mock.patch.dict(vars(groups), {"_WORLD_GROUP": None, "mesh_device": None}))
        stack.enter_context(mock.patch.object(comm, "cdb", None))
        # ZeRO-3 replaces it for good, and is not undone by DeepSpeed.
        stack.enter_context(mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear))
        stack.enter_context(_quiet())
        deepspeed.init_distributed("nccl", verbose=False)
        for patch in (*_silent_peers(comm.cdb), *only_own_pieces(), *_nothing_compiled(), *_sound_gradients()):
            stack.enter_context(patch)
        yield


def _accelerator(rank: SimulatedRank) -> Any:
    """DeepSpeed's accelerator for CUDA, without CUDA."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    class Accelerator(CUDA_Accelerator):
        Stream = Event = current_stream = default_stream = _Nothing
        set_device = synchronize = empty_cache = manual_seed = manual_seed_all = range_push = range_pop = _Nothing
        reset_peak_memory_stats = reset_max_memory_allocated = reset_max_memory_cached = _Nothing

        @contextlib.contextmanager
        def stream(self, stream: Any) -> Iterator[None]:
            before, rank.allocator.stream = rank.allocator.stream, stream
            try:
                yield
            finally:
                rank.allocator.stream = before

        def is_available(self) -> bool:
            return True

        def device_count(self) -> int:
            return 1

        def memory_allocated(self, device_index: int | None = None) -> int:
            return rank.live_bytes

        max_memory_allocated = memory_reserved = max_memory_reserved = memory_cached = memory_allocated
        max_memory_cached = memory_allocated

        def available_memory(self, device_index: int | None = None) -> int:
            return rank.card.memory_bytes - rank.live_bytes

    return mock.patch.object(real_accelerator, "ds_accelerator", Accelerator())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed warns of this machine, which will run nothing."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _process_group(world_size: int) -> Iterator[None]:
    """PyTorch's group of a single process that says how many others there are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _silent_peers(backend: Any) -> Iterator[Any]:
    """What is sent reaches nobody, and what is to be received keeps its size."""
    for name in _EXCHANGES:
        yield mock.patch.object(type(backend), name, _Nothing)


def _nothing_compiled() -> Iterator[Any]:
    """Updates of host memory write where memory is; without them nothing needs a compiler."""
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder

    from src.offload import overlapped_adam

    nothing = SimpleNamespace(create_adam=_Nothing, adam_update=_Nothing, destroy_adam=_Nothing)
    yield mock.patch.object(CPUAdamBuilder, "load", return_value=nothing)
    yield mock.patch.object(overlapped_adam, "_kernel", return_value=nothing)
    # The last step's updates may run after this block, in their thread. What was handed to it must be nothing already:
    # the real update would write where no memory is.
    yield mock.patch.object(overlapped_adam.FusedCpuAdam, "update", _Nothing)
    for name in ("Stream", "stream", "current_stream"):
        yield mock.patch(f"torch.cuda.{name}", _Nothing)


def _sound_gradients() -> Iterator[Any]:
    """There are no values to compare: ranks agree, and no norm is infinite."""
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2

    yield mock.patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", _Nothing)
    for module in (stage3, stage_1_and_2):
        yield mock.patch.object(module, "is_invalid_grad_norm", return_value=False)
