"""AdamW on the CPU that runs while the GPU works on the next forward pass, under DeepSpeed's ZeRO-3 offload.

DeepSpeed's optimizer step makes several passes over everything in host memory while the GPU waits. Here

- a gradient crosses PCIe once and stays in 16 bits; its norm is taken on the GPU, without a wider copy;
- unscaling, clipping, Adam and the conversion of the weights are one pass over memory (overlapped_adam.cpp);
- `step()` only starts the updates. They run in a thread, in the order in which the forward pass needs the weights,
  and a fetch waits for the update of what it fetches. No update is late: each forward pass sees all of them.
"""

import functools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch.utils.cpp_extension import load

from src.machine import core_share, local_ranks

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def _kernel() -> ModuleType:
    """The compiled update; compiled at first use, then taken from PyTorch's extension cache."""
    return load(
        "overlapped_adam",
        [str(Path(__file__).with_suffix(".cpp"))],
        extra_cflags=["-O3", "-std=c++20", "-march=native", "-fopenmp", "-fno-math-errno"],
    )


def _usual_threads() -> int:
    """This rank's share of the cores, less one for the thread that launches GPU kernels."""
    return max(1, core_share(local_ranks()) - 1)


class FusedCpuAdam(torch.optim.Optimizer):
    """AdamW over flat tensors in host memory (Kingma & Ba 2015; Loshchilov & Hutter 2019).

    `states` is the dtype of master weights and moments. With "bf16" there are no other weights than the model's, and
    rounding is stochastic, so that small updates count in the mean.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        states: str = "fp32",
        threads: int | None = None,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = STATE_DTYPES[states]
        self.threads = threads or _usual_threads()
        self.seed = seed
        self.updates = 0
        _kernel()

    def step(self, closure: Any = None) -> None:
        """Not used: who owns the flat tensors calls `update`."""
        raise NotImplementedError("FusedCpuAdam updates flat partitions: call update()")

    def init_state(self, master: torch.Tensor) -> None:
        """Moments of zero for `master`."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[master][name] = torch.zeros_like(master, dtype=self.state_dtype, requires_grad=False)
        self.state[master]["step"] = 0

    def update(
        self,
        weights: torch.Tensor,
        master: torch.Tensor,
        gradients: torch.Tensor,
        *,
        scale: float,
        lr: float,
        group: dict[str, Any],
    ) -> None:
        """One step of `master`, and of `weights`, its rounded copy or itself; `gradients` are multiplied by `scale`.

        `lr` is that of the step: the schedule may have moved `group`'s on by the time the update runs.
        """
        state = self.state[master]
        state["step"] += 1
        self.updates += 1
        _kernel().adam_update(
            weights,
            master,
            gradients,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            scale,
            lr,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            (self.seed + self.updates) % 2**32,
            self.threads,
        )


_Part = tuple[int, torch.Tensor, torch.Tensor]  # a parameter's id, its gradient on the GPU, its place on the host


def _runs(parts: list[_Part]) -> list[_Part]:
    """`parts` with neighbours that lie one after the other on both sides taken together: a copy each costs time."""
    runs: list[_Part] = []
    for first_id, gradient, place in parts:
        if runs:
            run_id, run, run_place = runs[-1]
            if _follows(run, gradient) and _follows(run_place, place):
                count = (run.numel() + gradient.numel(),)
                runs[-1] = (run_id, run.as_strided(count, (1,)), run_place.as_strided(count, (1,)))
                continue
        runs.append((first_id, gradient, place))
    return runs


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    same_storage = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same_storage and first.storage_offset() + first.numel() == second.storage_offset()


class OverlappedZero3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's ZeRO-3 optimizer with `FusedCpuAdam` updating behind the next forward pass.

    Replaces what happens to a gradient partition and to a sub-group of parameters; partitioning, gathering, reduction,
    norms, clipping and the step itself stay DeepSpeed's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adam")
        self._pending: dict[int, Future] = {}  # sub-group -> its update
        self._gradient_scale = 1.0
        super().__init__(*args, **kwargs)
        self._sub_group_of = {param.ds_id: i for i, group in enumerate(self.fp16_groups) for param in group}
        self._wait_before_fetches()

    def _configure_master_weights(self, **kwargs: Any) -> torch.dtype:
        super()._configure_master_weights(**kwargs)
        return self.optimizer.state_dtype if self.dtype != torch.float32 else torch.float32

    def initialize_optimizer_states(self) -> None:
        """Moments for each sub-group; gradients need no buffer of their own."""
        for master, weights in zip(self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat):
            if master.dtype == weights.dtype:
                master.data = weights.data
            self.optimizer.init_state(master)

    def _wait_before_fetches(self) -> None:
        coordinator = self.parameter_offload.get_param_coordinator()
        name = "_PartitionedParameterCoordinator__all_gather_params"
        fetch = getattr(coordinator, name)

        def wait_and_fetch(params: set[torch.nn.Parameter], forward: bool) -> None:
            for param in params:
                self._wait(self._sub_group_of.get(param.ds_id))
            fetch(params, forward)

        setattr(coordinator, name, wait_and_fetch)

    def _wait(self, sub_group: int | None) -> None:
        update = self._pending.pop(sub_group, None)
        if update is not None:
            update.result()

    def finish_updates(self) -> None:
        """Wait until every weight and state is what the last step made it."""
        for sub_group in list(self._pending):
            self._wait(sub_group)

    def _gradient_partition(self, param: torch.nn.Parameter) -> torch.Tensor:
        """This rank's gradient of `param` in host memory."""
        return self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[param.ds_id]

    def partition_grads(
        self, params_to_release: list[torch.nn.Parameter], grad_partitions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Send reduced gradients to the host, once; take their norms on the way."""
        parts = []
        for param, gradient in zip(params_to_release, grad_partitions):
            if param.grad.is_cuda:
                param.grad.record_stream(torch.cuda.current_stream())
            param.grad = None
            if param.partition_numel() * self._get_param_partition_rank(param) >= param.ds_numel:
                continue  # this rank's partition is padding
            self._wait(self._sub_group_of[param.ds_id])
            partition = self._gradient_partition(param).narrow(0, 0, gradient.numel())
            parts.append((self.get_param_id(param), gradient, partition))
        for first_id, gradient, partition in _runs(parts):
            if self.micro_step_id > 0:
                gradient = gradient + partition.to(gradient.device, non_blocking=True)
            partition.copy_(gradient, non_blocking=True)
            if self.is_gradient_accumulation_boundary():
                # The norm of a run stands for all its parameters: only the sum over all is read.
                self.norm_for_param_grads[first_id] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            if gradient.is_cuda:
                gradient.record_stream(torch.cuda.current_stream())
        return [partition for _, _, partition in parts]

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: torch.nn.Parameter) -> None:
        """Collect `param`'s gradient; a full bucket leaves at once, not when the next gradient comes."""
        super().reduce_independent_p_g_buckets_and_remove_grads(param)
        dtype = self.get_param_comm_dtype(param)
        if self.ipg_buckets[dtype].elements >= self.reduce_bucket_size:
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)

    def _get_norm_groups(self) -> list[torch.Tensor]:
        """One norm for everything, read back once; DeepSpeed waits for one of each sub-group."""
        none = torch.zeros((), device=get_accelerator().current_device_name())
        total = torch.stack([none, *self.norm_for_param_grads.values()]).square().sum()
        self.norm_for_param_grads.clear()
        dist.all_reduce(total, group=self.dp_process_group)
        return [total.sqrt().cpu()]

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Remember what gradients are to be multiplied by; the update does it."""
        clip = 1.0 if self.clip_grad <= 0 else max(1.0, (float(total_norm) / self.loss_scale + 1e-6) / self.clip_grad)
        self._gradient_scale = 1.0 / (clip * self.loss_scale)

    def _optimizer_step(self, sub_group_id: int) -> None:
        params = self.fp16_groups[sub_group_id]
        first = self._gradient_partition(params[0])
        count = self.fp16_partitioned_groups_flat_numel[sub_group_id]
        # The partitions of a sub-group lie one after the other.
        gradients = self.grad_partitions_flat_buffer.narrow(0, first.storage_offset(), count)
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        self._pending[sub_group_id] = self._worker.submit(
            self.optimizer.update,
            self.fp16_partitioned_groups_flat[sub_group_id],
            self.fp32_partitioned_groups_flat[sub_group_id],
            gradients,
            scale=self._gradient_scale,
            lr=group["lr"],
            group=group,
        )

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """Nothing: the update writes the weights where they are fetched from."""

    def _post_step(self, timer_names: set[str]) -> None:
        if self.persistent_parameters:
            self.finish_updates()  # they are gathered now, not when they are needed
        super()._post_step(timer_names)

    def checkpoint_event_prologue(self) -> None:
        """Checkpoints hold finished updates."""
        self.finish_updates()
        super().checkpoint_event_prologue()

    def destroy(self) -> None:
        """Stop the thread, too."""
        self.finish_updates()
        self._worker.shutdown()
        super().destroy()
