"""What one run of the offloaded script is: `OffloadConfig`, its presets, and which script has which configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from src import overrides
from src.config import COUNT, DTYPES, LONGEST, RunConfig, option
from src.utils import UsageError

# DeepSpeed's CPU Adam, all of it in the optimizer phase; and ours, which updates while the next forward pass runs.
OFFLOAD_OPTIMIZERS = ("deepspeed_cpu_adam", "overlapped_cpu_adam")
STATES = ("fp32", "bf16")
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# What the study compares: the original's settings, which are the defaults, and ours for speed. What neither names is
# the same in both.
PRESETS: dict[str, dict[str, Any]] = {
    "original": {
        "dtype": "fp16",
        "optimizer": "deepspeed_cpu_adam",
        "optimizer_states": "fp32",
        "reduce_bucket_size": 1e5,
        "sub_group_size": 0,
        "fetch_layers": False,
        "prefetch_layers": 0,
    },
    "fast": {
        "dtype": "bf16",
        "optimizer": "overlapped_cpu_adam",
        "optimizer_states": "fp32",
        "reduce_bucket_size": None,
        "sub_group_size": None,
        "fetch_layers": True,
        "prefetch_layers": 1,
    },
}

# Without a GPU: what Triton's interpreter can run in a minute or two.
CPU_DEFAULTS = {
    "model_name": "tiny-llama",
    "batch_size": 2,
    "seq_length": 32,
    "iterations": 2,
    "warmup": 1,
    "dtype": "fp32",
    "optimizer_states": "fp32",
}

_ORIGINAL = PRESETS["original"]
_DECAY = (0, 1 - 1e-9)


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(RunConfig):
    """One run under ZeRO-3 with everything offloaded to the CPU. Run names are relative to the preset."""

    script: ClassVar[str] = "deepspeed"
    without_flag: ClassVar[frozenset[str]] = frozenset({"world_size", "host_memory_gib", "phases"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS | {"longest": PRESETS["fast"] | LONGEST}

    preset: str = option(
        "original",
        "the original's settings, ours for speed, or ours for the longest sequences",
        tag="",
        choices=tuple(presets),
    )
    world_size: int = option(1, "processes, one per GPU", tag="gpus", flags=("num_gpus",), bounds=(1, 2**20))
    batch_size: int = option(
        4, "sequences per GPU and micro-batch", flags=("per_device_train_batch_size",), bounds=(1, COUNT)
    )
    seq_length: int = option(1024, "tokens per sequence", flags=("max_seq_len",), bounds=(2, COUNT))
    iterations: int = option(5, "timed steps", tag="iters", flags=("num_train_iterations",), bounds=(1, COUNT))
    dtype: str = option(_ORIGINAL["dtype"], "weights and gradients", tag="", choices=DTYPES)
    optimizer: str = option(_ORIGINAL["optimizer"], "how weights are updated", tag="", choices=OFFLOAD_OPTIMIZERS)
    optimizer_states: str = option(
        _ORIGINAL["optimizer_states"], "master weights and Adam's moments", tag="states", choices=STATES
    )
    learning_rate: float = option(1e-4, "of the optimizer", tag="lr", bounds=(1e-30, 1e30))
    weight_decay: float = option(0.01, "of the optimizer", tag="wd", bounds=(0, 1e6))
    beta_0: float = option(0.9, "decay of Adam's first moment", tag="beta0-", bounds=_DECAY)
    beta_1: float = option(0.95, "decay of Adam's second moment", tag="beta1-", bounds=_DECAY)
    gradient_clipping: float = option(
        0.9, "largest norm of all gradients; 0 clips nothing", tag="clip", bounds=(0, 1e30)
    )
    lr_scheduler_type: str = option("cosine", "learning-rate schedule", tag="", choices=SCHEDULERS)
    num_warmup_steps: int = option(0, "of the learning-rate schedule", tag="lrwarmup", bounds=(0, COUNT))
    fp16_loss_scale_window: int = option(
        100, "steps without overflow before the loss scale doubles", tag="window", bounds=(1, COUNT)
    )
    fp16_initial_scale_power: int = option(7, "the loss scale starts at 2 to this power", tag="scale", bounds=(0, 32))
    fp16_hysteresis: int = option(1, "overflows before the loss scale halves", tag="hysteresis", bounds=(1, COUNT))
    reduce_bucket_size: float | None = option(
        _ORIGINAL["reduce_bucket_size"],
        "gradient elements reduced at a time; fast: a layer",
        tag="bucket",
        bounds=(1, 2**40),
    )
    sub_group_size: float | None = option(
        _ORIGINAL["sub_group_size"], "elements updated at a time; fast: a layer", tag="sub", bounds=(0, 2**40)
    )
    fetch_layers: bool = option(
        _ORIGINAL["fetch_layers"], "fetch a whole decoder layer at a time, not each weight", tag="fetchlayers"
    )
    prefetch_layers: int = option(
        _ORIGINAL["prefetch_layers"], "decoder layers fetched ahead", tag="prefetch", bounds=(0, 2**20)
    )
    cpu_threads: int | None = option(
        None,
        "threads of overlapped_cpu_adam; default: a rank's share of the cores but one",
        tag="threads",
        bounds=(1, 2**20),
    )
    ds_override: str = option(
        "{}",
        'JSON, or a file of it, merged into DeepSpeed\'s configuration; null removes, "auto" is ours',
        tag="ds",
        longest=2**20,
    )
    find_min: str | None = option(
        None, "search the smallest that fits, a power of two; the GPUs of a dry run", tag="min", choices=("num_gpus",)
    )
    step_per_print: int = option(10, "steps between DeepSpeed's own reports", bounds=(1, COUNT))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.find_min and self.find_max:
            raise UsageError("--find_min and --find_max are two searches: give one of them")
        if self.optimizer == "overlapped_cpu_adam" and self.dtype == "fp16":
            raise UsageError("--optimizer overlapped_cpu_adam has no fp16: use --dtype bf16")
        if self.optimizer_states == "bf16" and self.dtype != "bf16":
            raise UsageError(f"--optimizer_states bf16 goes with --dtype bf16, not {self.dtype}")
        overrides.check(self)  # a malformed one is told now

    def refusal_on_cpu(self) -> str | None:
        """Why a machine without a GPU cannot run this, in one line; None if it can."""
        if self.dtype == "fp16" or self.memory_limit_gib is not None:
            return "on a CPU there is no --dtype fp16 and no --memory_limit_gib"
        return None

    @property
    def searched(self) -> str | None:
        return "world_size" if self.find_min else super().searched

    @property
    def ds_overrides(self) -> dict[str, Any]:
        """`ds_override`, parsed; what is left to us is not in it."""
        return overrides.parsed(self.ds_override)

    @property
    def zero_stage(self) -> int:
        """What is partitioned among the ranks: 1 optimizer states, 2 gradients too, 3 weights too."""
        return overrides.stage(self.ds_overrides)

    @property
    def weights_on_cpu(self) -> bool:
        """Whether the host keeps the weights; only ZeRO-3 can."""
        return self.zero_stage == 3 and overrides.is_offloaded(self.ds_overrides, "offload_param")

    @property
    def optimizer_on_cpu(self) -> bool:
        """Whether the host keeps the optimizer's states, and updates there."""
        return overrides.is_offloaded(self.ds_overrides, "offload_optimizer")

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, on all GPUs."""
        return super().global_batch_size * self.world_size

    @property
    def description(self) -> str:
        """What one step trains on, and how, for a person."""
        processes = f" x {self.world_size} processes" if self.world_size > 1 else ""
        size = f"batch {self.batch_size} x {self.seq_length} tokens{self._times()}{processes}"
        states = f"{self.dtype} with {self.optimizer_states} optimizer states"
        return f"{size}, {states}, {self.zero}, preset {self.preset}"

    @property
    def zero(self) -> str:
        """The stage of ZeRO and where the host keeps what, for a person."""
        if self.zero_stage == 3 and self.weights_on_cpu and self.optimizer_on_cpu:
            return "ZeRO-3 offload"
        places = ["GPU", "CPU"]
        weights, optimizer = places[self.weights_on_cpu], places[self.optimizer_on_cpu]
        return f"ZeRO-{self.zero_stage} with weights on the {weights} and optimizer on the {optimizer}"

    def _original_name(self) -> str:
        return (
            f"bs{self.global_batch_size}_seq{self.seq_length}_liger_rope{self.rope:d}_silu{self.swiglu:d}"
            f"_rms{self.rms_norm:d}_flce{self.flce:d}"
        )


CONFIGS: dict[str, type[RunConfig]] = {config.script: config for config in (RunConfig, OffloadConfig)}
