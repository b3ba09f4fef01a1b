"""The record of a run: one typed, versioned JSON file. Base units: bytes and seconds.

What was not measured is None, never a guess. What is read is checked: a file that is no record is told in one line
that names the file and the field.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pydantic

from src.config import RunConfig
from src.offload_config import CONFIGS
from src.techniques import warnings
from src.utils import ExitStatus, UsageError, first_line, write_atomically

SCHEMA = 2
WRONG = "†"  # marks a run whose gradients are less exact than Hugging Face's in the same dtype


class _Typed(pydantic.BaseModel):
    """Fields of exactly these types; a name that is none of them is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, validate_assignment=True, populate_by_name=True)


class Environment(_Typed):
    """The machine and the versions a figure was measured with; what could not be read is None."""

    gpu: str | None
    gpu_memory_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None
    cpu: str | None = None
    cpu_count: int | None = None  # cores that the process may use
    machine_cpu_count: int | None = None
    python: str | None = None
    torch: str | None = None
    triton: str | None = None
    transformers: str | None = None
    liger_kernel: str | None = None
    deepspeed: str | None = None
    git_commit: str | None = None
    date: str = ""
    omp: dict[str, str] = {}
    argv: list[str] = []


class Failure(_Typed):
    """Why a run did not end well; the sizes are of one that ran out of GPU memory."""

    type: str
    message: str
    requested_bytes: int | None = None
    free_bytes: int | None = None
    allocated_bytes: int | None = None


class KernelCheck(_Typed):
    """One set of techniques, run by Triton's interpreter, beside Hugging Face's code. Differences are relative."""

    kernels: list[str]
    implementations: dict[str, str]
    losses: list[float]
    loss_difference: float
    gradient_difference: float
    peak_memory_bytes: int | None
    agrees: bool


class GradientError(_Typed):
    """Relative errors of one pass against Hugging Face's code in fp32; None: not finite."""

    loss: float | None
    gradient: float | None  # over all parameters: ||g - g_fp32|| / ||g_fp32||
    worst: float | None  # the same, of the parameter where it is largest
    worst_parameter: str


class Parity(_Typed):
    """How exact a run's gradients are, beside Hugging Face's code in the same dtype. See src/check/parity.py."""

    tokens: int  # of the batch that was compared
    dtype: str
    loss_scale: float | None  # of fp16
    reference_loss: float
    run: GradientError
    hugging_face: GradientError
    ratio: float | None  # the run's error of the whole gradient over Hugging Face's
    agrees: bool


class Frontier(_Typed):
    """The answer of --find_max."""

    searched: str
    limit_bytes: int
    predicted: int
    measured: int | None = None


class Record(_Typed):
    """What was asked for, what came of it, and on which machine."""

    schema_version: int = pydantic.Field(SCHEMA, alias="schema")
    run_name: str
    script: Literal["all_gpu", "deepspeed"]
    status: Literal["ok", "oom", "error"] | None = None  # None: still running
    # "inferred": not run, because a smaller run ran out of memory.
    mode: Literal["measured", "predicted", "interpreted", "inferred"]
    config: dict[str, Any]
    simulated_gpu: str | None = None  # of a prediction: the GPU that was simulated
    implementations: dict[str, str] | None = None  # which function or class implements each technique's part
    steps_before: int | None = None  # optimizer steps that the weights had had: more than 0 where an engine is shared
    skipped_steps: int | None = None  # of the run's steps, those whose fp16 gradients overflowed: no weight changed
    peak_memory_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    allocation_retries: int | None = None  # times the GPU or its limit was full and the allocator gave its cache back
    device_used_bytes: int | None = None
    host_peak_bytes: int | None = None
    predicted_host_bytes: int | None = None  # of a prediction: host memory of the whole job, on all its machines
    load_peak_bytes: int | None = None  # peak while building the model, before the first step
    step_seconds: list[float] | None = None
    latency_s: float | None = None
    latency_iqr_s: float | None = None
    throughput_tokens_per_s: float | None = None
    model_flops_per_step: int | None = None
    mfu: float | None = None
    mfu_peak_flops: float | None = None  # the peak that mfu is relative to, of all GPUs
    floor_s: float | None = None  # under offloading: no step can be faster on this machine, see src/offload/floor.py
    floor: dict[str, float] | None = None  # what the floor is made of
    losses: list[float | None] | None = None
    loss: float | None = None  # of the last timed step
    grad_norm: float | None = None
    peak_breakdown: dict[str, int] | None = None  # category -> bytes at the peak of the step below
    breakdown_peak_bytes: int | None = None  # peak of the step in which the breakdown was recorded
    peak_phase: str | None = None
    phase_peak_bytes: dict[str, int | None] | None = None
    kernel_check: list[KernelCheck] | None = None  # of an interpreted run
    parity: Parity | None = None
    frontier: Frontier | None = None  # of --find_max
    environment: Environment
    error: Failure | None = None

    @functools.cached_property
    def run(self) -> RunConfig:
        """The configuration that the record keeps."""
        return CONFIGS[self.script].from_dict(self.config)

    @property
    def trains_wrongly(self) -> bool:
        """Whether the gradients are less exact than Hugging Face's: by its parity, or by what is known."""
        return bool(warnings(self.run)) if self.parity is None else not self.parity.agrees

    @property
    def title(self) -> str:
        """What is compared, for a table or a legend, with the mark of a run that trains wrongly."""
        return self.run.title + (f" {WRONG}" if self.trains_wrongly else "")

    @property
    def processes(self) -> int:
        """Processes that took part in the run, one a GPU."""
        return self.config.get("world_size", 1)

    @property
    def exit_status(self) -> int:
        """The status of a program whose result is this record."""
        return ExitStatus.OUT_OF_MEMORY if self.status == "oom" else ExitStatus.DONE


def save(record: Record, path: Path, text: Callable[[Record], str]) -> None:
    """Write the record and beside it, as the original did, its printed figures as text."""
    values = _finite(record.model_dump(by_alias=True))
    written = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(written))
    write_atomically(path.with_suffix(".txt"), lambda temporary: temporary.write_text(text(record) + "\n"))


def _finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def load(path: Path) -> Record:
    """Read a record back, also one of an older schema. Raises `UsageError` if the file is not one."""
    try:
        values = json.loads(path.read_text())
        record = Record.model_validate(_upgraded(values))
        record.run  # noqa: B018  a configuration that cannot be is told now
        if record.status is None:
            raise UsageError("it does not say what became of the run")
        return record
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UsageError(f"{path} is not a record: {where}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError, UsageError) as error:
        raise UsageError(f"{path} is not a record: {first_line(error)}") from error


def load_all(folders: Iterable[Path]) -> list[Record]:
    """Every record below `folders`, in the order of their paths. Raises `UsageError` if a file or folder is none."""
    return [load(path) for path in record_files(folders)]


def record_files(folders: Iterable[Path]) -> list[Path]:
    """The files below `folders` that should be records. Raises `UsageError` if a folder is none."""
    paths: list[Path] = []
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is no folder")
        # A hidden one is being written, or was when its program was killed.
        paths += sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    return paths


def _upgraded(values: Any) -> Any:
    """The content of a file of an older schema as one of this. Raises `UsageError` if its schema is no known one."""
    if not isinstance(values, dict):
        raise UsageError("it is no JSON object")
    schema = values.get("schema")
    if schema == 1:
        values = values | {"schema": SCHEMA}
        # The original's preset was called as the random generators' seed is.
        if isinstance(values.get("config"), dict) and values["config"].get("preset") == "seed":
            values["config"] = values["config"] | {"preset": "original"}
    elif schema != SCHEMA:
        raise UsageError(f"its schema is {str(schema)[:20]!r}, this version reads 1 to {SCHEMA}")
    return values
