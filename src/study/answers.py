"""Which records belong together, and which of them answers for a cell of a grid. Needs no torch."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from src.config import RunConfig
from src.machine import H100, core_share
from src.record import Parity, Record
from src.techniques import TECHNIQUES, TITLES
from src.utils import file_name

FIXED_LENGTH, FIXED_BATCH = 1024, 4
BATCH_SIZES = (1, 4, 8, 16, 32, 64, 96, 112)  # of FIXED_LENGTH tokens a sequence
SEQ_LENGTHS = (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576)  # FIXED_BATCH sequences
MANY_TOKENS = 16 * 1024  # a step of so many is bound by the GPU; the time of a smaller one differs from run to run


# How far step times of smaller ones lay apart when the study's cells were measured again, see doc/report.md.
REPEATS = (-0.17, 0.34)


class Cell(NamedTuple):
    """A place in a grid: what the runs of one study differ in."""

    strategy: str  # as figures call it
    batch_size: int
    seq_length: int


_SIZES = dict.fromkeys([*((b, FIXED_LENGTH) for b in BATCH_SIZES), *((FIXED_BATCH, s) for s in SEQ_LENGTHS)])
GRID = tuple(Cell(name, *size) for size in _SIZES for name in TITLES.values())

# Fields that runs of one study may differ in: its cells' own, and what changes no step.
COMPARED = ("batch_size", "seq_length", *(t.name for t in TECHNIQUES.values() if t.compared))
NOT_A_SETTING = (
    *COMPARED,
    *("device", "dry_run", "breakdown", "phases", "parity", "iterations", "warmup", "step_per_print"),
    "host_memory_gib",
    *(f.name for f in dataclasses.fields(RunConfig) if f.metadata["is_place"]),
)


class Setting(NamedTuple):
    """What the runs of one study have in common."""

    config: RunConfig  # kernels, sizes and what changes no step have their defaults
    machine: str

    @property
    def name(self) -> str:
        """Script, unusual settings and machine, for a file's name."""
        return file_name(f"{self.config.script}{self.config.settings_name}_{plain_name(self.machine)}")


StepTimes = dict[tuple[Setting, Cell], list[float]]
Parities = dict[tuple[str, str, tuple], Parity]  # of a model, a dtype, and the techniques that change numerics


def plain_name(text: str) -> str:
    """`text` for a file's name: letters and digits, which any file system has."""
    return "_".join("".join(c if c.isascii() and c.isalnum() else " " for c in text).split())


def settings(config: RunConfig) -> RunConfig:
    """`config` with everything at its default that runs of one study may differ in."""
    usual = {f.name: f.default for f in dataclasses.fields(config) if f.name in NOT_A_SETTING}
    return dataclasses.replace(config, **usual)


def machine(record: Record) -> str:
    """The GPU, and where Adam runs on the CPU how many cores that has and how its threads are bound."""
    # What was inferred from predictions does not say of which card; dry runs simulate one.
    gpu = record.simulated_gpu or record.environment.gpu or (H100.name if is_predicted(record) else "no GPU")
    cores = record.environment.cpu_count
    if record.script != "deepspeed" or cores is None or is_predicted(record):
        return gpu
    return ", ".join([gpu, f"{cores} CPU cores", *thread_variables(record)])


def gpu_name(record: Record) -> str:
    """The GPU's short name: H100 for NVIDIA H100 80GB HBM3."""
    name = record.environment.gpu or "no GPU"
    model = re.search(r"\b([RG]TX )?[A-Z]*\d+[A-Z]*\b", name)
    return model.group() if model else name


def thread_variables(record: Record) -> list[str]:
    """Variables that set a run's threads, but for the share of the cores that each of several ranks takes by itself."""
    here, cores = record.environment.local_ranks or 1, record.environment.cpu_count or 1
    share = {"OMP_NUM_THREADS": str(core_share(here, cores))} if here > 1 else {}
    return [f"{name}={value}" for name, value in record.environment.omp.items() if share.get(name) != value]


def absence(record: Record | None) -> str:
    """Why there is no figure."""
    if record is None:
        return "not run"
    if record.status == "oom":
        return "OOM" + ("*" if record.mode == "inferred" else "")
    return "failed" if record.status == "error" else "not measured"


def short_model(config: RunConfig) -> str:
    """The model without its organisation or folder."""
    return config.model_name.rsplit("/")[-1]


def setting_words(record: Record) -> str:
    """Model, machine and settings, for a title or a cell."""
    config: RunConfig = record.answered
    words = [short_model(config), config.dtype]
    if record.script == "deepspeed":
        words.append(f"{config.zero}, preset {config.preset}")
    elif config.preset != "original":
        words.append(f"preset {config.preset}")
    words.append("gradient checkpointing" if config.gradient_checkpointing else "no checkpointing")
    words.append(machine(record))
    if config.memory_limit_gib is not None:
        words.append(f"limited to {config.memory_limit_gib:g} GiB")
    said = ("model_name", "dtype", "preset", "gradient_checkpointing", "memory_limit_gib")
    return ", ".join([*words, *config.unusual(*NOT_A_SETTING, *said)])


def cell(record: Record) -> Cell:
    """The cell that a record is of."""
    config = record.run
    return Cell(config.title, config.batch_size, config.seq_length)


def is_measured(record: Record) -> bool:
    """Whether a record tells of a run on a GPU: what was measured, or inferred from what was measured."""
    own = record.mode in ("measured", "inferred") and record.frontier is None
    return own and not record.config.get("dry_run")


def is_predicted(record: Record) -> bool:
    """Whether a record tells of a run that a dry run simulated, or that was inferred from such runs."""
    return record.mode == "predicted" or (record.mode == "inferred" and bool(record.config.get("dry_run")))


def studies(
    found: Iterable[Record], counts: Callable[[Record], bool] = is_measured
) -> dict[Setting, dict[Cell, Record]]:
    """The records that count, by what they have in common, one for each cell; those nearest to the original's first.

    A study without a memory limit also takes the runs under one that never met it.
    """
    own = list(filter(counts, found))
    grouped: dict[Setting, dict[Cell, Record]] = {}
    for record in own:
        _add(record, grouped.setdefault(study_of(record), {}))
    for record in filter(None, map(without_its_limit, own)):
        if study_of(record) in grouped:
            _add(record, grouped[study_of(record)])
    return {setting: grouped[setting] for setting in sorted(grouped, key=lambda s: distance(s, grouped[s]))}


def step_times(found: Iterable[Record]) -> StepTimes:
    """Seconds a step of each run of an experiment on one machine, ascending: several show the spread between runs."""
    times: StepTimes = defaultdict(list)
    for record in filter(is_measured, found):
        is_timed = record.latency_s is not None and record.run.warmup > 0  # kernels are compiled in a first step
        if is_timed and record.latency_s not in times[place(record)]:  # a copy is no repeat
            times[place(record)].append(record.latency_s)
    return {where: sorted(own) for where, own in times.items()}


def place(record: Record) -> tuple[Setting, Cell]:
    """The experiment and the machine of a run: the same for its repeats, also under a limit that they never met."""
    record = without_its_limit(record) or record
    return study_of(record), cell(record)


def repeats(record: Record, times: StepTimes) -> str:
    """How many runs of its experiment there are, and their times a step in ms; nothing of a single one."""
    return spread(times.get(place(record), ())) if record.latency_s is not None else ""


def spread(times: Sequence[float]) -> str:
    """The same of these times."""
    return f"{len(times)} runs: {times[0] * 1e3:,.1f} to {times[-1] * 1e3:,.1f}" if len(times) > 1 else ""


def parities(found: Iterable[Record]) -> Parities:
    """Of each way to compute gradients the parity that was measured; of several the one furthest from Hugging Face's.

    A run without one of its own has that of any run of its model and dtype with the same techniques, of whatever size.
    Techniques that leave the numbers as they are, such as checkpointing, make no difference.
    """
    known: Parities = {}
    for record in found:
        if record.parity is not None:
            known[numerics(record.run)] = max(known.get(numerics(record.run), record.parity), record.parity, key=_off)
    return known


def with_parity(record: Record, known: Parities) -> Record:
    """The record, with the parity of another one where it has none of its own."""
    parity = known.get(numerics(record.run))
    return record if record.parity is not None or parity is None else record.model_copy(update={"parity": parity})


def numerics(config: RunConfig) -> tuple[str, str, tuple]:
    """What gradients depend on besides the batch: two runs of the same compute them in the same way."""
    techniques = tuple(getattr(config, t.name) for t in TECHNIQUES.values() if t.changes_numerics)
    return config.model_name, config.dtype, techniques


def _off(parity: Parity) -> tuple[bool, float]:
    return not parity.agrees, math.inf if parity.ratio is None else parity.ratio


def experiment(record: Record) -> tuple[RunConfig, Cell, bool]:
    """What a record is of, on whatever machine: the same for a prediction and the run that it is of.

    A single step makes the optimizer's states after its peak: one alone takes less memory than one of several.
    """
    return settings(record.run), cell(record), record.run.warmup + record.run.iterations == 1


def study_of(record: Record) -> Setting:
    """What a record has in common with the other cells of its study."""
    return Setting(settings(record.run), machine(record))


def _add(record: Record, cells: dict[Cell, Record]) -> None:
    own = cell(record)
    cells[own] = max(cells.get(own, record), record, key=_worth)


class LimitNeverMet(Record):
    """A run under a memory limit that it never reached: it also counts as the run without a limit."""


def without_its_limit(record: Record) -> Record | None:
    """A run under a memory limit as the one without, which is the same if the allocator always found room. Or None.

    PyTorch's allocator compares with the limit only when it asks the driver for more, and tries again after a refusal.
    """
    never_met = record.status == "ok" and record.allocation_retries == 0
    if record.config.get("memory_limit_gib") is None or not never_met:
        return None
    values = {name: getattr(record, name) for name in Record.model_fields}
    return LimitNeverMet(**values | {"config": record.config | {"memory_limit_gib": None}})


def ran_under_a_limit(record: Record) -> bool:
    """Whether `without_its_limit` made this record."""
    return isinstance(record, LimitNeverMet)


def _worth(record: Record) -> tuple[int, bool, str, bool]:
    """Of several records of a cell the largest counts: a result before an inference before a failure.

    Of several results one whose first step, in which kernels are compiled, stayed outside the clock; then the last.
    """
    kind = 0 if record.status == "error" else 1 if record.mode == "inferred" else 2
    return kind, record.run.warmup > 0, record.environment.date, record.status == "ok"


def distance(setting: Setting, cells: dict[Cell, Record]) -> tuple:
    """How far a study is from the original's, to sort by: cells of its grids, ZeRO-3 offload, its settings.

    A few cells less, as after a crash, make no study another one: four fifths of the grids count as all.
    """
    answered = sum(place in GRID and record.status != "error" for place, record in cells.items())
    covered = len(GRID) if answered >= 0.8 * len(GRID) else answered
    unusual = setting.config.unusual()
    return -covered, setting.config.script != "deepspeed", len(unusual), -answered, -len(cells), setting.name
