"""The record of a run: one typed, versioned JSON file. Base units: bytes and seconds.

What was not measured is None, never a guess. What is read is checked: a file that is no record is told in one line
that names the file and the field.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from src.config import RunConfig
from src.offload_config import CONFIGS
from src.techniques import warnings
from src.utils import ExitStatus, UsageError, error_line, first_line, write_atomically

SCHEMA = 2
# Always in the file, null where they were not measured: a reader would miss them.
HEADLINES = ("peak_memory_bytes", "latency_s", "throughput_tokens_per_s")
WRONG = "†"  # marks a run whose gradients are less exact than Hugging Face's in the same dtype


# What no run can show is no figure: a table or a picture of it would mean nothing.
Bytes = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
Seconds = Annotated[float, pydantic.Field(gt=1e-9, lt=1e9)]
Rate = Annotated[float, pydantic.Field(gt=0, lt=1e21)]  # per second; also a share of one


class _Typed(pydantic.BaseModel):
    """Fields of exactly these types; a name that is none of them is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, validate_assignment=True, populate_by_name=True)


class Environment(_Typed):
    """The machine and the versions a figure was measured with; what could not be read is None."""

    gpu: str | None
    gpu_memory_bytes: Bytes | None = None
    driver: str | None = None
    cuda: str | None = None
    cpu: str | None = None
    cpu_count: int | None = None  # cores that the process may use
    machine_cpu_count: int | None = None
    local_ranks: int | None = None  # processes of the run on this machine, where each says it
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
    requested_bytes: Bytes | None = None
    free_bytes: Bytes | None = None  # in all, whatever its pieces: not yet reserved, and unused inside what is reserved
    reserved_bytes: Bytes | None = None  # by PyTorch's allocator
    allocated_bytes: Bytes | None = None
    largest_gap_bytes: Bytes | None = None  # the largest unused piece inside what is reserved


class KernelCheck(_Typed):
    """One set of techniques, run by Triton's interpreter, beside Hugging Face's code. Differences are relative."""

    kernels: list[str]
    implementations: dict[str, str]
    losses: list[float] = pydantic.Field(min_length=1)
    loss_difference: float
    gradient_difference: float
    peak_memory_bytes: Bytes | None
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
    """The answer of --find_max or --find_min: the largest size or the fewest GPUs that fit, 0 if none does."""

    searched: Literal["batch_size", "seq_length", "world_size"]
    limit_bytes: Bytes
    predicted: int = pydantic.Field(ge=0, lt=2**33)
    measured: int | None = pydantic.Field(None, ge=0, lt=2**33)


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
    peak_memory_bytes: Bytes | None = None
    peak_reserved_bytes: Bytes | None = None
    allocation_retries: int | None = None  # times the GPU or its limit was full and the allocator gave its cache back
    device_used_bytes: Bytes | None = None
    host_peak_bytes: Bytes | None = None
    predicted_host_bytes: Bytes | None = None  # of a prediction: host memory of the whole job, on all its machines
    load_peak_bytes: Bytes | None = None  # peak while building the model, before the first step
    step_seconds: Annotated[list[Seconds], pydantic.Field(min_length=1)] | None = None
    latency_s: Seconds | None = None  # the median of them
    latency_iqr_s: float | None = pydantic.Field(None, ge=0, lt=1e9)
    throughput_tokens_per_s: Rate | None = None
    model_flops_per_step: int | None = None
    mfu: Rate | None = None
    mfu_peak_flops: float | None = None  # the peak that mfu is relative to, of all GPUs
    # Of a prediction: how long a step would take. What was measured is above, so that none is taken for the other.
    predicted_latency_s: Seconds | None = None
    predicted_gpu_s: float | None = pydantic.Field(None, ge=0, lt=1e9)  # what the GPU works in it
    predicted_cpu_s: float | None = pydantic.Field(None, ge=0, lt=1e9)  # what the CPU works to launch that
    predicted_bound: Literal["gpu", "launches"] | None = None  # which of the two has more to do
    predicted_rates: str | None = None  # where the rates of the GPU come from
    floor_s: Seconds | None = None  # under offloading: at the rates measured in the same run, see src/offload/floor.py
    floor: dict[str, float] | None = None  # what the floor is made of
    # Of a prediction: the floor at rates that were measured before. It bounds the step from below, and is not its time.
    predicted_floor_s: Seconds | None = None
    predicted_floor: dict[str, float] | None = None
    predicted_floor_rates: str | None = None  # where these rates come from
    losses: list[float | None] | None = None
    loss: float | None = None  # of the last timed step
    grad_norm: float | None = None
    peak_breakdown: dict[str, Bytes] | None = None  # category -> bytes at the peak of the step below
    breakdown_peak_bytes: Bytes | None = None  # peak of the step in which the breakdown was recorded
    peak_phase: str | None = None
    phase_peak_bytes: dict[str, Bytes | None] | None = None  # of the same step as the phase
    kernel_check: list[KernelCheck] | None = None  # of an interpreted run
    parity: Parity | None = None
    frontier: Frontier | None = None  # of a search
    environment: Environment
    error: Failure | None = None

    @functools.cached_property
    def run(self) -> RunConfig:
        """The configuration that the record keeps."""
        return CONFIGS[self.script].from_dict(self.config)

    @functools.cached_property
    def answered(self) -> RunConfig:
        """The configuration that the figures are of: of a search, with its answer."""
        if self.frontier is None or not self.frontier.predicted:
            return self.run
        return dataclasses.replace(self.run, **{self.frontier.searched: self.frontier.predicted})

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
        return getattr(self.answered, "world_size", 1)

    @property
    def exit_status(self) -> int:
        """The status of a program whose result is this record."""
        return ExitStatus.OUT_OF_MEMORY if self.status == "oom" else ExitStatus.DONE


def save(record: Record, path: Path, text: Callable[[Record], str]) -> None:
    """Write the record and beside it, as the original did, its printed figures as text. Raises OSError.

    The text comes first: who finds a record finds its text, also where the disk was full in between.
    """
    told = text(record) + "\n"
    written = json.dumps(_finite(_fields(record)), indent=1, allow_nan=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(written, encoding="utf-8")
        write_atomically(path.with_suffix(".txt"), lambda beside: beside.write_text(told, "utf-8", "backslashreplace"))

    write_atomically(path, write)


def _fields(record: Record) -> dict[str, Any]:
    """What the file says: what has a value, and the figures that a reader would miss."""
    values = record.model_dump(by_alias=True)
    if record.error is not None:
        values["error"] = record.error.model_dump(exclude_none=True)
    return {name: value for name, value in values.items() if value is not None or name in HEADLINES}


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
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UsageError("it is no regular file")
        values = json.loads(path.read_text(encoding="utf-8"))
        record = Record.model_validate(_upgraded(values))
        record.answered  # noqa: B018  a configuration that cannot be is told now
        if record.status is None:
            raise UsageError("it does not say what became of the run")
        return record
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UsageError(f"{path} is not a record: {where}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError, UsageError) as error:
        raise UsageError(f"{path} is not a record: {first_line(error)}") from error


def load_all(folders: Iterable[Path], skip: Callable[[UsageError], object] | None = None) -> list[Record]:
    """Every record below `folders`, in the order of their paths.

    A file that is no record goes to `skip`, as the `UsageError` that names file and field; without `skip` it is raised.
    Raises `UsageError` if a folder is none.
    """
    found = []
    for path in record_files(folders):
        try:
            found.append(load(path))
        except UsageError as error:
            if skip is None:
                raise
            skip(error)
    return found


def load_and_tell(folders: Iterable[Path]) -> tuple[list[Record], bool]:
    """The records below `folders`, and whether all files there are some; stderr has a line for each that is none."""
    strange: list[UsageError] = []
    found = load_all(folders, strange.append)
    for error in strange:
        error_line(f"skipped: {error}")
    return found, not strange


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
