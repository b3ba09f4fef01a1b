"""What one run is: `RunConfig`; the offloaded script's is in src/offload_config.py.

Frozen dataclasses whose fields are what is trained (`Sizes`), what is turned on (a field for each entry of
src/techniques) and how it is run. Flags, the run name and the record's `config` are made from the fields. Nothing here
imports torch: naming and planning runs stays instant.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import quote

from src.families import full_size
from src.machine import H100, Gpu
from src.techniques import KERNEL_NAMES, TECHNIQUES, Technique, gpu_only, kernels_only, title
from src.utils import GIB, UsageError, file_name

DTYPES = ("bf16", "fp16", "fp32")
DEVICES = ("auto", "cuda", "cpu")
SEARCHED = ("batch_size", "seq_length")

MAX_TOKENS = 2**32  # per step; far more than fits a GPU, and every tensor's size in bytes stays below 2**63
COUNT = 2**31


def option(
    default: Any,
    help: str,
    *,
    tag: str | None = None,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    bounds: tuple[float, float] | None = None,
    is_place: bool = False,
    longest: int = 1000,
) -> Any:
    """A field with its command-line option.

    `tag` begins the value in the run name where it is not the default; None: no run is another for it. `flags` are the
    original's names, before our own. `bounds` are the smallest and the largest value. `is_place` says where a run
    writes: no two runs are different for it. `longest` is how many characters a text may have.
    """
    names = ("help", "tag", "flags", "choices", "bounds", "is_place", "longest")
    return field(default=default, metadata=dict(zip(names, (help, tag, flags, choices, bounds, is_place, longest))))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained, and for how long."""

    model_name: str = option(
        "meta-llama/Llama-3.2-1B-Instruct", "Hub id with a shipped shape, 'tiny-llama', or a local folder", tag="model"
    )
    batch_size: int = option(8, "sequences per step, or per micro-batch", bounds=(1, COUNT))
    # The labels are the tokens, shifted by one.
    seq_length: int = option(1024, "tokens per sequence", bounds=(2, COUNT))
    gradient_accumulation_steps: int = option(1, "micro-batches per step", tag="accum", bounds=(1, 2**20))
    iterations: int = option(10, "timed steps", tag="iters", bounds=(1, COUNT))
    warmup: int = option(3, "steps before the clock starts", tag="warmup", bounds=(0, COUNT))
    dtype: str = option("bf16", "weights, gradients and optimizer state", tag="", choices=DTYPES)


def _technique_field(technique: Technique) -> tuple[str, type, Any]:
    flags = tuple(filter(None, (technique.flag, technique.offload_flag, *technique.aliases)))
    own = option(
        technique.default,
        technique.help,
        tag=technique.tag,
        flags=flags,
        choices=technique.choices,
        bounds=technique.bounds,
    )
    return technique.name, type(technique.default), own


# A field for each entry of the registry.
Techniques = dataclasses.make_dataclass(
    "Techniques", map(_technique_field, TECHNIQUES.values()), bases=(Sizes,), frozen=True, kw_only=True
)


# For the longest sequences, in both scripts: what does not grow with the length, or grows on the host.
LONGEST: dict[str, Any] = {
    "batch_size": 1,
    **kernels_only(*KERNEL_NAMES),
    "flce_tokens": 2**16,
    "mlp_tile_tokens": 2**14,
    "gradient_checkpointing": True,
    "checkpoint_offload": "overlapped",
    "attention_kept": 1024,  # in every layer
}
# The study's settings, which are the defaults, and the longest sequences. Explicit flags override single values.
PRESETS: dict[str, dict[str, Any]] = {"original": {}, "longest": LONGEST | {"optimizer_in_backward": True}}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Techniques):
    """One run on one GPU. Field defaults are the study's settings; run names are relative to those of the preset."""

    script: ClassVar[str] = "all_gpu"
    without_flag: ClassVar[frozenset[str]] = frozenset()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    learning_rate: float = option(1e-5, "of the optimizer", tag="lr", bounds=(1e-30, 1e30))
    device: str = option("auto", "auto takes the GPU where there is one", tag="", choices=DEVICES)
    memory_limit_gib: float | None = option(
        None, "cap the GPU allocator, as on a smaller card", tag="limit", bounds=(1e-6, 2**20)
    )
    dry_run: bool = option(False, "predict the peak on fake tensors, without a GPU", tag="dryrun")
    gpu_memory_gib: float | None = option(
        None, "memory of the card that a dry run must fit into", tag="gpu", bounds=(1e-6, 2**20)
    )
    host_memory_gib: float | None = option(
        None,
        "host memory that a run may take, where the system cannot say; or that of a dry run",
        tag="host",
        bounds=(1e-6, 2**20),
    )
    gpu_rates: str | None = option(
        None,
        "GPU whose speed a dry run takes: a name in src/machine.py, or a file of python -m src.predict.calibrate",
        tag="rates",
    )
    find_max: str | None = option(None, "search the largest that fits", tag="max", choices=SEARCHED)
    pretrained: bool = option(False, "load the real weights, not random ones", tag="pretrained")
    seed: int = option(42, "of weights and tokens", tag="seed", bounds=(0, 2**63 - 1))
    breakdown: bool = option(True, "record one more step: the memory snapshot, and what the peak is made of")
    phases: bool = option(True, "run one more step: each phase's peak, and the norm of the gradients")
    parity: bool = option(False, "compare the gradients with fp32's, beside Hugging Face's own error")
    result_dir: str = option("results", "where the record goes", is_place=True)
    snapshot_dir: str = option("snap_shots", "where the memory snapshot goes; '' writes none", is_place=True)
    log_dir: str = option("logs", "where TensorBoard logs and the trace go; '' writes none", is_place=True)
    debug: bool = option(False, "show the traceback of an error", is_place=True)
    preset: str = option(
        "original", "the study's settings, or those for the longest sequences", tag="", choices=tuple(PRESETS)
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_value(f, getattr(self, f.name))
        if self.batch_size * self.seq_length > MAX_TOKENS:
            raise UsageError(
                f"--batch_size {self.batch_size} x --seq_length {self.seq_length} is more than {MAX_TOKENS} tokens: "
                "tensors of that size have no 64-bit byte count"
            )

    def refusal_on_cpu(self) -> str | None:
        """Why a machine without a GPU cannot run this, in one line; None if it can."""
        if self.memory_limit_gib is not None:
            return "on a CPU there is no --memory_limit_gib: --dry_run --memory_limit_gib says what fits"
        if self.compute_dtype == "bf16" or (self.compute_dtype == "fp16" and not self.parity):
            return "on a CPU the kernels are checked in fp32, with --parity also in fp16; bf16 needs a GPU"
        if flags := gpu_only(self):
            return f"{flags[0]} needs a GPU; --dry_run does without"
        if full_size(self.model_name):
            return f"{self.model_name} needs a GPU: Triton's interpreter is too slow for it; use tiny-llama"
        return None

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, on all GPUs."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, on all GPUs."""
        return self.global_batch_size * self.seq_length

    @property
    def compute_dtype(self) -> str:
        """Of matrix products: the weights' dtype, or what autocast makes of it."""
        return self.dtype if self.mixed_precision == "none" else self.mixed_precision

    @property
    def plans(self) -> bool:
        """Whether nothing is to run: a dry run or a search."""
        return self.dry_run or self.searched is not None

    @property
    def searched(self) -> str | None:
        """The field whose value is searched for; whatever it has is not used."""
        return self.find_max

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the Liger kernels that are on."""
        return tuple(name for name in KERNEL_NAMES if getattr(self, name))

    @property
    def but_for_sizes(self) -> Self:
        """With its sizes replaced: the same for runs that differ in nothing else."""
        return dataclasses.replace(self, batch_size=1, seq_length=2)

    @property
    def title(self) -> str:
        """The study's name for the kernels that are on, and what else is compared with them."""
        return title(self)

    @property
    def description(self) -> str:
        """What one step trains on, and how, for a person."""
        return f"batch {self.batch_size} x {self.seq_length} tokens{self._times()}, {self._precision()}"

    def _precision(self) -> str:
        return self.dtype if self.mixed_precision == "none" else f"{self.dtype} under {self.mixed_precision} autocast"

    def _times(self) -> str:
        count = self.gradient_accumulation_steps
        return f" x {count} micro-batches" if count > 1 else ""

    def _original_name(self) -> str:
        return (
            f"bs{self.batch_size}_seq{self.seq_length}_rope{self.rope}_silu{self.swiglu}"
            f"_rms{self.rms_norm}_flce{self.flce}"
        )

    def usual(self, f: dataclasses.Field) -> Any:
        """The value of a field that the run name leaves out: that of the preset."""
        return self.presets[self.preset].get(f.name, f.default)

    @property
    def run_name(self) -> str:
        """The original's name, then every setting that differs from the study's: different runs, different names."""
        return file_name(self._original_name() + self.settings_name)

    @property
    def settings_name(self) -> str:
        """The part of the run name that says which settings differ from the study's."""
        name = ""
        for f in dataclasses.fields(self):
            value, tag = getattr(self, f.name), f.metadata["tag"]
            # A name does not depend on whether the GPU was asked for or found.
            if tag is None or value == self.usual(f) or (f.name, value) == ("device", "cuda"):
                continue
            if isinstance(value, int) and float in _kinds(f):
                value = float(value)
            name += f"_{tag}{_name_part(value, f.metadata['choices'])}"
        return name

    def unusual(self, *left_out: str) -> list[str]:
        """Name and value of each setting of the run name that differs from the usual, but for those `left_out`."""
        fields = [f for f in dataclasses.fields(self) if f.metadata["tag"] is not None and f.name not in left_out]
        differing = [f for f in fields if getattr(self, f.name) != self.usual(f) and f.name != "device"]
        return [f"{f.name} {getattr(self, f.name)}" for f in differing]

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that are no field of this version are left out."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})

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


def flag_of(f: dataclasses.Field) -> str:
    """The first of a field's flags, without its dashes."""
    return next(iter(f.metadata["flags"]), f.name)


def _kinds(f: dataclasses.Field) -> set[type]:
    """The types that a field's value can have, None aside."""
    return {kind for kind in (bool, int, float, str) if kind is f.type or kind in getattr(f.type, "__args__", ())}


def _check_value(f: dataclasses.Field, value: Any) -> None:
    """Raises `UsageError` if a field cannot have this value."""
    if value is None and type(None) in getattr(f.type, "__args__", ()):
        return
    kinds = _kinds(f)
    fits = type(value) in kinds or (float in kinds and type(value) is int)
    flag, choices, bounds = flag_of(f), f.metadata["choices"], f.metadata["bounds"]
    if not fits:
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise UsageError(f"--{flag} must be {names}, got {str(value)[:60]!r}")
    if choices and value not in choices:
        raise UsageError(f"--{flag} must be one of {', '.join(choices)}, got {value[:60]!r}")
    if bounds and not bounds[0] <= value <= bounds[1]:
        least, most = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in bounds)
        raise UsageError(f"--{flag} must be from {least} to {most}, got {value}")
    if isinstance(value, str) and len(value) > f.metadata["longest"]:
        raise UsageError(f"--{flag} must have at most {f.metadata['longest']} characters, got {len(value)}")


def _name_part(value: Any, choices: tuple[str, ...]) -> str:
    """`value` as part of a file name, different for different values."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if not isinstance(value, str) or value in choices:
        return str(value)
    # A model: org+model reads well; "_" separates the parts of a name, so it is encoded like the rest.
    return quote(value, safe="").replace("_", "%5F").replace("%2F", "+")


def room(config: RunConfig, card: Gpu = H100) -> int:
    """What the allocator may reserve: all of `card` but the CUDA context, or what the run asks for, in bytes."""
    return limit_bytes(config, card) or card.memory_bytes - card.context_bytes


def limit_bytes(config: RunConfig, card: Gpu = H100) -> int | None:
    """What the allocator may reserve under --gpu_memory_gib and --memory_limit_gib, None if neither is given."""
    limits = []
    if config.gpu_memory_gib is not None:
        limits.append(int(config.gpu_memory_gib * GIB) - card.context_bytes)
        if limits[0] <= 0:
            raise UsageError(f"--gpu_memory_gib {config.gpu_memory_gib:g} has no room beside the CUDA context")
    if config.memory_limit_gib is not None:
        limits.append(int(config.memory_limit_gib * GIB))
    return min(limits, default=None)
