"""What one experiment is: the kernels it runs (`Strategy`) and everything else (`RunConfig`, `OffloadConfig`).

All are frozen dataclasses; the command line, the run name and the record's `config` are made from their fields,
so a field added here reaches all three. Nothing here imports torch: naming and planning runs stays instant.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self
from urllib.parse import quote

from src.offload import ranks
from src.utils import UsageError

DTYPES = ("bf16", "fp16", "fp32")
DEVICES = ("auto", "cuda", "cpu")
SEARCHED = ("batch_size", "seq_length")
ATTENTION = ("sdpa", "flash_attention_2", "eager")

MAX_TOKENS = 2**32  # per step; far more than fits a GPU, and every tensor's size in bytes stays below 2**63

# Class in torch.optim and its keyword arguments.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_fused": ("AdamW", {"fused": True}),
    "adamw_foreach": ("AdamW", {"foreach": True}),
    "adamw_loop": ("AdamW", {"foreach": False}),
    "adafactor": ("Adafactor", {"foreach": False}),
    "sgd": ("SGD", {"fused": True}),
}


def _option(default: Any, help: str, *, tag: str | None = None, flag: str | None = None, **argparse_kwargs: Any) -> Any:
    """A dataclass field with its command-line option; `tag` names it in the run name when it is not the default."""
    metadata = {"help": help, "tag": tag, "flag": flag, "argparse": argparse_kwargs}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Which parts of Llama run as Liger kernels; False means Hugging Face's own code."""

    rope: bool = _option(True, "Liger rotary position embedding", flag="enable_rope")
    swiglu: bool = _option(True, "Liger SwiGLU MLP", flag="enable_swiglu")
    rms_norm: bool = _option(True, "Liger RMSNorm", flag="enable_rms")
    flce: bool = _option(True, "Liger fused linear cross-entropy (no logits tensor)", flag="enable_flce")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that are on, in field order."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name))

    @property
    def title(self) -> str:
        """The study's name for it, or the kernels that are on."""
        names = (name for name, strategy in STRATEGIES.items() if strategy == self)
        return next(names, " + ".join(self.kernels) + " only")

    @classmethod
    def only(cls, *kernels: str) -> "Strategy":
        """The strategy with exactly these kernels on."""
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := set(kernels) - set(names):
            raise UsageError(f"unknown kernel {sorted(unknown)}: choose from {names}")
        return cls(**{name: name in kernels for name in names})


# The study's three strategies, under the names its figures use.
STRATEGIES: dict[str, Strategy] = {
    "No Liger Kernel": Strategy.only(),
    "Liger Kernel w/o FLCE": Strategy.only("rope", "swiglu", "rms_norm"),
    "All Liger Kernel": Strategy(),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment on one GPU. Field defaults are the study's settings; run names are relative to them."""

    script: ClassVar[str] = "all_gpu"
    original_flags: ClassVar[dict[str, str]] = {}  # field -> another name of its flag
    without_flag: ClassVar[frozenset[str]] = frozenset({"strategy"})

    model_name: str = _option(
        "meta-llama/Llama-3.2-1B-Instruct", "Hub id with a shipped shape, 'tiny-llama', or a local folder", tag="model"
    )
    batch_size: int = _option(8, "sequences per step")
    seq_length: int = _option(1024, "tokens per sequence")
    iterations: int = _option(10, "timed steps", tag="iters")
    warmup: int = _option(3, "steps before the clock starts", tag="warmup")
    dtype: str = _option("bf16", "weights, gradients and optimizer state", tag="", choices=DTYPES)
    strategy: Strategy = Strategy()
    gradient_checkpointing: bool = _option(True, "recompute each layer in the backward pass", tag="gc")
    optimizer: str = _option("adamw_fused", "how weights are updated", tag="", choices=tuple(OPTIMIZERS))
    learning_rate: float = _option(1e-5, "of the optimizer", tag="lr")
    attention: str = _option("sdpa", "Hugging Face attention implementation", tag="", choices=ATTENTION)
    device: str = _option("auto", "auto takes the GPU where there is one", tag="", choices=DEVICES)
    memory_limit_gib: float | None = _option(None, "cap the GPU allocator, as on a smaller card", tag="limit")
    dry_run: bool = _option(False, "predict the peak on fake tensors, without a GPU", tag="dryrun", action="store_true")
    gpu_memory_gib: float | None = _option(None, "memory of the card that a dry run must fit into", tag="gpu")
    find_max: str | None = _option(None, "search the largest that fits", tag="max", choices=SEARCHED)
    pretrained: bool = _option(False, "load the real weights, not random ones", tag="pretrained", action="store_true")
    seed: int = _option(42, "of weights and tokens", tag="seed")
    breakdown: bool = _option(True, "record one more step: the memory snapshot, and what the peak is made of")
    result_dir: str = _option("results", "where the record goes")
    snapshot_dir: str = _option("snap_shots", "where the memory snapshot goes; '' writes none")
    log_dir: str = _option("logs", "where TensorBoard logs and the trace go; '' writes none")
    debug: bool = _option(False, "show the traceback of an error", action="store_true")

    def __post_init__(self) -> None:
        self._check_bounds(
            batch_size=(1, 2**31),
            seq_length=(2, 2**31),  # the labels are the tokens, shifted by one
            iterations=(1, 2**31),
            warmup=(0, 2**31),
            seed=(0, 2**63 - 1),
        )
        if self.batch_size * self.seq_length > MAX_TOKENS:
            raise UsageError(
                f"--batch_size {self.batch_size} x --seq_length {self.seq_length} is more than {MAX_TOKENS} tokens: "
                "tensors of that size have no 64-bit byte count"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning_rate must be greater than 0, got {self.learning_rate}")
        for name in ("memory_limit_gib", "gpu_memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"--{name} must be greater than 0, got {value}")

    def _check_bounds(self, **bounds: tuple[float, float]) -> None:
        for name, (smallest, largest) in bounds.items():
            if not smallest <= getattr(self, name) <= largest:
                flag = self.original_flags.get(name, name)
                raise UsageError(f"--{flag} must be from {smallest} to {largest}, got {getattr(self, name)}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, on all GPUs."""
        return self.batch_size * self.seq_length

    @property
    def description(self) -> str:
        """What one step trains on, and how, for a person."""
        return f"batch {self.batch_size} x {self.seq_length} tokens, {self.dtype}"

    def _original_name(self) -> str:
        kernels = self.strategy
        return (
            f"bs{self.batch_size}_seq{self.seq_length}_rope{kernels.rope}_silu{kernels.swiglu}"
            f"_rms{kernels.rms_norm}_flce{kernels.flce}"
        )

    def _usual(self, f: dataclasses.Field) -> Any:
        """The value of a field that the run name leaves out."""
        return f.default

    @property
    def run_name(self) -> str:
        """The original's name, then every setting that differs from the study's: different runs, different names."""
        name = self._original_name() + self.settings_name
        # File systems take names of 255 bytes, and a suffix follows.
        return name if len(name) < 200 else f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    @property
    def settings_name(self) -> str:
        """The part of the run name that says which settings differ from the study's."""
        name = ""
        for f in dataclasses.fields(self):
            value, tag = getattr(self, f.name), f.metadata.get("tag")
            # A name does not depend on whether the GPU was asked for or found.
            if tag is None or value == self._usual(f) or (f.name, value) == ("device", "cuda"):
                continue
            name += f"_{tag}{_name_part(value)}"
        return name

    def unusual(self, *left_out: str) -> list[str]:
        """Name and value of each setting that differs from the usual, but for those `left_out` and folders."""
        hidden = {*left_out, "strategy", "device", "breakdown", "result_dir", "snapshot_dir", "log_dir", "debug"}
        fields = [f for f in dataclasses.fields(self) if f.name not in hidden]
        differing = [f.name for f in fields if getattr(self, f.name) != self._usual(f)]
        return [f"{name} {getattr(self, name)}" for name in differing]

    def to_dict(self) -> dict[str, Any]:
        """Every field, the strategy's among them, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "strategy"}
        return values | dataclasses.asdict(self.strategy)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that are no field of this version are left out."""
        own = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        kernels = {f.name: values[f.name] for f in dataclasses.fields(Strategy) if f.name in values}
        return cls(**own, strategy=Strategy(**kernels))

    @property
    def record_file(self) -> Path:
        """Where the record goes; its text goes beside it."""
        return Path(self.result_dir, f"{self.run_name}.json")

    @property
    def snapshot_file(self) -> Path:
        """Where the memory snapshot goes."""
        return Path(self.snapshot_dir, f"{self.run_name}.pickle")

    @property
    def log_folder(self) -> Path:
        """This run's TensorBoard folder."""
        return Path(self.log_dir, self.run_name)

    @property
    def trace_file(self) -> Path:
        """Where the profiler trace goes, beside the TensorBoard logs."""
        return self.log_folder / "step.pt.trace.json"


# DeepSpeed's CPU Adam, all of it in the optimizer phase; and ours, which updates while the next forward pass runs.
OFFLOAD_OPTIMIZERS = ("deepspeed_cpu_adam", "overlapped_cpu_adam")
STATES = ("fp32", "bf16")
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# The original's settings, which are the defaults, and ours for speed. What neither names is the same in both.
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {
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


_SEED = PRESETS["seed"]


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(RunConfig):
    """One experiment under ZeRO-3 with everything offloaded to the CPU. Run names are relative to the preset."""

    script: ClassVar[str] = "deepspeed"
    original_flags: ClassVar[dict[str, str]] = {
        "batch_size": "per_device_train_batch_size",
        "seq_length": "max_seq_len",
        "iterations": "num_train_iterations",
        "rope": "enable_liger_rope",
        "swiglu": "enable_liger_swiglu",
        "rms_norm": "enable_liger_rms",
        "flce": "enable_liger_flce",
    }
    without_flag: ClassVar[frozenset[str]] = frozenset(
        {"strategy", "world_size", "dry_run", "gpu_memory_gib", "find_max"}
    )

    preset: str = _option("seed", "the original's settings, or ours for speed", tag="", choices=tuple(PRESETS))
    world_size: int = _option(1, "processes, one per GPU", tag="gpus")
    batch_size: int = _option(4, "sequences per GPU and micro-batch")
    gradient_accumulation_steps: int = _option(1, "micro-batches per step", tag="accum")
    iterations: int = _option(5, "timed steps", tag="iters")
    dtype: str = _option(_SEED["dtype"], "weights and gradients", tag="", choices=DTYPES)
    optimizer: str = _option(_SEED["optimizer"], "how weights are updated", tag="", choices=OFFLOAD_OPTIMIZERS)
    optimizer_states: str = _option(
        _SEED["optimizer_states"], "master weights and Adam's moments", tag="states", choices=STATES
    )
    learning_rate: float = _option(1e-4, "of the optimizer", tag="lr")
    weight_decay: float = _option(0.01, "of the optimizer", tag="wd")
    beta_0: float = _option(0.9, "decay of Adam's first moment", tag="beta0-")
    beta_1: float = _option(0.95, "decay of Adam's second moment", tag="beta1-")
    gradient_clipping: float = _option(0.9, "largest norm of all gradients; 0 clips nothing", tag="clip")
    lr_scheduler_type: str = _option("cosine", "learning-rate schedule", tag="", choices=SCHEDULERS)
    num_warmup_steps: int = _option(0, "of the learning-rate schedule", tag="lrwarmup")
    fp16_loss_scale_window: int = _option(100, "steps without overflow before the loss scale doubles", tag="window")
    fp16_initial_scale_power: int = _option(7, "the loss scale starts at 2 to this power", tag="scale")
    fp16_hysteresis: int = _option(1, "overflows before the loss scale halves", tag="hysteresis")
    reduce_bucket_size: float | None = _option(
        _SEED["reduce_bucket_size"], "gradient elements reduced at a time; fast: a layer", tag="bucket"
    )
    sub_group_size: float | None = _option(
        _SEED["sub_group_size"], "elements updated at a time; fast: a layer", tag="sub"
    )
    fetch_layers: bool = _option(
        _SEED["fetch_layers"], "fetch a whole decoder layer at a time, not each weight", tag="fetchlayers"
    )
    prefetch_layers: int = _option(_SEED["prefetch_layers"], "decoder layers fetched ahead", tag="prefetch")
    cpu_threads: int | None = _option(None, "threads of overlapped_cpu_adam; default: all cores but one", tag="threads")
    ds_override: str = _option("{}", "JSON merged into the DeepSpeed configuration; null removes", tag="ds")
    step_per_print: int = _option(10, "steps between DeepSpeed's own reports")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_bounds(
            world_size=(1, 2**20),
            gradient_accumulation_steps=(1, 2**20),
            weight_decay=(0, 1e6),
            beta_0=(0, 1 - 1e-9),
            beta_1=(0, 1 - 1e-9),
            gradient_clipping=(0, 1e30),
            num_warmup_steps=(0, 2**31),
            fp16_loss_scale_window=(1, 2**31),
            fp16_initial_scale_power=(0, 32),
            fp16_hysteresis=(1, 2**31),
            prefetch_layers=(0, 2**20),
            step_per_print=(1, 2**31),
        )
        for name, smallest in (("reduce_bucket_size", 1), ("sub_group_size", 0), ("cpu_threads", 1)):
            value = getattr(self, name)
            if value is not None and not smallest <= value <= 2**40:
                raise UsageError(f"--{name} must be {smallest} or more, got {value}")
        if self.optimizer == "overlapped_cpu_adam" and self.dtype == "fp16":
            raise UsageError("--optimizer overlapped_cpu_adam has no fp16: use --dtype bf16")
        if self.optimizer_states == "bf16" and self.dtype != "bf16":
            raise UsageError(f"--optimizer_states bf16 goes with --dtype bf16, not {self.dtype}")
        self.ds_overrides  # noqa: B018  a malformed one is told now

    @property
    def ds_overrides(self) -> dict[str, Any]:
        """`ds_override`, parsed."""
        try:
            overrides = json.loads(self.ds_override)
        except ValueError as error:
            raise UsageError(f"--ds_override is not JSON: {error}") from error
        if not isinstance(overrides, dict):
            raise UsageError("--ds_override must be a JSON object")
        return overrides

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, on all GPUs."""
        return self.batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, on all GPUs."""
        return self.global_batch_size * self.seq_length

    @property
    def description(self) -> str:
        """What one step trains on, and how, for a person."""
        times = ((self.gradient_accumulation_steps, "micro-batches"), (self.world_size, "processes"))
        size = "".join(f" x {count} {unit}" for count, unit in times if count > 1)
        states = f"{self.dtype} with {self.optimizer_states} optimizer states"
        return (
            f"batch {self.batch_size} x {self.seq_length} tokens{size}, {states}, ZeRO-3 offload, preset {self.preset}"
        )

    def _original_name(self) -> str:
        kernels = self.strategy
        return (
            f"bs{self.global_batch_size}_seq{self.seq_length}_liger_rope{kernels.rope:d}_silu{kernels.swiglu:d}"
            f"_rms{kernels.rms_norm:d}_flce{kernels.flce:d}"
        )

    def _usual(self, f: dataclasses.Field) -> Any:
        return PRESETS[self.preset].get(f.name, f.default)


CONFIGS: dict[str, type[RunConfig]] = {config.script: config for config in (RunConfig, OffloadConfig)}


def config_of(record: Mapping[str, Any]) -> RunConfig:
    """The configuration that a record keeps."""
    return CONFIGS[record["script"]].from_dict(record["config"])


# Values that stand in names as they are.
_PLAIN_NAMES = {*OPTIMIZERS, *ATTENTION, *SEARCHED, *OFFLOAD_OPTIMIZERS, *SCHEDULERS}


def _name_part(value: Any) -> str:
    """`value` as part of a file name, different for different values."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if not isinstance(value, str) or value in _PLAIN_NAMES:
        return str(value)
    # A model: org+model reads well; "_" separates the parts of a name, so it is encoded like the rest.
    return quote(value, safe="").replace("_", "%5F").replace("%2F", "+")


def _flag01(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"expected 0 or 1, got {text!r}")
    return text == "1"


_FLAG_TYPES = {float | None: float, str | None: str, int | None: int}


def _add_option(parser: Any, f: dataclasses.Field, default: Any, original_flag: str | None) -> None:
    shown = "" if default is None else f" (default: {int(default) if f.type is bool else default})"
    names = dict.fromkeys([original_flag or f.name, f.metadata["flag"] or f.name])
    kwargs = {"dest": f.name, "default": default, "help": f.metadata["help"] + shown}
    if "action" in f.metadata["argparse"]:
        kwargs |= {"help": f.metadata["help"]}
    elif f.type is bool:
        kwargs |= {"type": _flag01, "metavar": "0|1", "nargs": "?", "const": True}
    else:
        kwargs |= {"type": _FLAG_TYPES.get(f.type, f.type)}
    parser.add_argument(*(f"--{name}" for name in names), **kwargs, **f.metadata["argparse"])


class _Parser(argparse.ArgumentParser):
    """Tells a mistake once, not once per rank."""

    def error(self, message: str) -> NoReturn:
        if not ranks.is_first_here():
            ranks.give_way()
        super().error(message)


def make_parser(description: str | None, defaults: RunConfig) -> argparse.ArgumentParser:
    """An argparse parser with one option per field of `defaults` and its strategy, `defaults` as default values."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(defaults):
        if f.name not in defaults.without_flag:
            _add_option(parser, f, getattr(defaults, f.name), defaults.original_flags.get(f.name))
    kernels = parser.add_argument_group("kernels: 1 runs Liger's, 0 Hugging Face's own code")
    for f in dataclasses.fields(Strategy):
        _add_option(kernels, f, getattr(defaults.strategy, f.name), defaults.original_flags.get(f.name))
    return parser


def to_config(namespace: argparse.Namespace, config_type: type[RunConfig] = RunConfig) -> RunConfig:
    """The parsed command line as a configuration. Raises `UsageError` on values no experiment can have."""
    return config_type.from_dict(vars(namespace))
