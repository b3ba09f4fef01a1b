"""A DeepSpeed engine as an experiment: what stays on its GPU, and what ZeRO asks memory for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from src.experiment import Step
from src.explain.categories import GATHER, REDUCE
from src.explain.recording import Attribution
from src.predict.live_memory import tensors_in


@dataclass(frozen=True)
class OffloadExperiment:
    """A DeepSpeed engine and the step that trains it."""

    engine: Any  # deepspeed.DeepSpeedEngine
    step: Step
    steps_before: int  # optimizer steps of the engine when this run began
    skipped_before: int

    @property
    def model(self) -> torch.nn.Module:
        """The model inside the engine."""
        return self.engine.module

    @property
    def skipped_steps(self) -> int:
        """Steps of this run that changed no weight, because gradients had overflowed."""
        return self.engine.skipped_steps - self.skipped_before

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
        # Each weight's part, where ZeRO-3 divides them: the optimizer holds it, too, and this comes last.
        parts = [p.ds_tensor for p in self.model.parameters() if hasattr(p, "ds_tensor")]
        return found | {"parameters": [*self.model.parameters(), *parts]}

    def gradients(self) -> list[torch.Tensor]:
        """None are left when the optimizer begins: each goes to the host as it is made."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    @contextmanager
    def labelling(self, attribution: Attribution) -> Iterator[None]:
        """Let ZeRO say which memory it asks for, and which gradients are ready."""
        optimizer = self.engine.optimizer
        methods = [
            (_coordinator(optimizer), "fetch_sub_module", GATHER),
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
