"""What one experiment is: the kernels it runs (`Strategy`) and everything else (`RunConfig`).

Both are frozen dataclasses; the command line, the run name and the record's `config` are made from their fields,
so a field added here reaches all three. Nothing here imports torch: naming and planning runs stays instant.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

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


class UsageError(Exception):
    """A request that cannot be carried out as given. Its message says what to do; scripts exit with status 2."""


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
    """One experiment. Field defaults are the study's settings; run names are relative to them."""

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
    result_dir: str = _option("results", "where the record goes")
    snapshot_dir: str = _option("snap_shots", "where the memory snapshot goes; '' writes none")
    log_dir: str = _option("logs", "where TensorBoard logs and the trace go; '' writes none")
    debug: bool = _option(False, "show the traceback of an error", action="store_true")

    def __post_init__(self) -> None:
        bounds = {
            "batch_size": (1, 2**31),
            "seq_length": (2, 2**31),  # the labels are the tokens, shifted by one
            "iterations": (1, 2**31),
            "warmup": (0, 2**31),
            "seed": (0, 2**63 - 1),
        }
        for name, (smallest, largest) in bounds.items():
            if not smallest <= getattr(self, name) <= largest:
                raise UsageError(f"--{name} must be from {smallest} to {largest}, got {getattr(self, name)}")
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

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_length

    @property
    def run_name(self) -> str:
        """The original's name, then every setting that differs from the study's: different runs, different names."""
        kernels = self.strategy
        name = (
            f"bs{self.batch_size}_seq{self.seq_length}_rope{kernels.rope}_silu{kernels.swiglu}"
            f"_rms{kernels.rms_norm}_flce{kernels.flce}"
        )
        for f in dataclasses.fields(self):
            value, tag = getattr(self, f.name), f.metadata.get("tag")
            # A name does not depend on whether the GPU was asked for or found.
            if tag is None or value == f.default or (f.name, value) == ("device", "cuda"):
                continue
            name += f"_{tag}{_name_part(value)}"
        # File systems take names of 255 bytes, and a suffix follows.
        return name if len(name) < 200 else f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, the strategy's among them, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "strategy"}
        return values | dataclasses.asdict(self.strategy)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
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


def _name_part(value: Any) -> str:
    """`value` as part of a file name, different for different values."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if not isinstance(value, str) or value in OPTIMIZERS or value in ATTENTION or value in SEARCHED:
        return str(value)
    # A model: org+model reads well; "_" separates the parts of a name, so it is encoded like the rest.
    return quote(value, safe="").replace("_", "%5F").replace("%2F", "+")


def _flag01(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"expected 0 or 1, got {text!r}")
    return text == "1"


def _add_option(parser: argparse.ArgumentParser, f: dataclasses.Field, default: Any) -> None:
    shown = "" if default is None else f" (default: {int(default) if f.type is bool else default})"
    flag = "--" + (f.metadata["flag"] or f.name)
    kwargs = {"dest": f.name, "default": default, "help": f.metadata["help"] + shown}
    if "action" in f.metadata["argparse"]:
        kwargs |= {"help": f.metadata["help"]}
    elif f.type is bool:
        kwargs |= {"type": _flag01, "metavar": "0|1"}
    else:
        kwargs |= {"type": {float | None: float, str | None: str}.get(f.type, f.type)}
    parser.add_argument(flag, **kwargs, **f.metadata["argparse"])


def make_parser(description: str | None, defaults: RunConfig) -> argparse.ArgumentParser:
    """An argparse parser with one option per field of `RunConfig` and `Strategy`, `defaults` as default values."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for f in dataclasses.fields(RunConfig):
        if f.name != "strategy":
            _add_option(parser, f, getattr(defaults, f.name))
    kernels = parser.add_argument_group("kernels: 1 runs Liger's, 0 Hugging Face's own code")
    for f in dataclasses.fields(Strategy):
        _add_option(kernels, f, getattr(defaults.strategy, f.name))
    return parser


def to_config(namespace: argparse.Namespace) -> RunConfig:
    """The parsed command line as a `RunConfig`. Raises `UsageError` on values no experiment can have."""
    return RunConfig.from_dict(vars(namespace))
