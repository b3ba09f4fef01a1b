"""The original's two grids, as it published them and as we ran them, and what fits a card of a given memory."""

import csv
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from doc import evidence
from src.config import RunConfig
from src.machine import H100
from src.offload_config import PRESETS, OffloadConfig
from src.record import Record
from src.record.record import Environment
from src.study import answers
from src.study.answers import FIXED_BATCH, FIXED_LENGTH, GRID, Cell, absence, setting_words
from src.study.bars import THREE, Axis, comparison
from src.techniques import STRATEGIES, TITLES
from src.utils import GIB, UsageError

CARD_GIB = 24.0  # the original's card
NOT_MEASURED = "not measured"
NONE, NO_FLCE, ALL = TITLES.values()
OFFLOAD = {name: OffloadConfig(preset=name, **settings) for name, settings in PRESETS.items()}
LIMITED = dataclasses.replace(OFFLOAD["original"], memory_limit_gib=CARD_GIB)
BUDGETS = {"80 GB": H100.memory_bytes, "24 GiB": 24 * GIB}
SETTINGS: dict[str, RunConfig] = {
    "one GPU, bf16, checkpointing": RunConfig(),
    "one GPU, bf16, no checkpointing": RunConfig(gradient_checkpointing=False),
    **{f"ZeRO-3 offload, preset {name}": config for name, config in OFFLOAD.items()},
}


@dataclasses.dataclass(frozen=True)
class Line:
    """The cells of a strategy along one of the grids."""

    what: str
    field: str
    fixed: tuple[str, int]
    sizes: tuple[int, ...]

    def cells(self, kernels: str) -> dict[int, Cell]:
        """Size -> cell."""
        return {size: Cell(kernels, **dict([self.fixed]), **{self.field: size}) for size in self.sizes}

    def has(self, cell: Cell) -> bool:
        """Whether a cell, of whatever size, lies on it."""
        name, value = self.fixed
        return getattr(cell, name) == value


LINES = (
    Line(f"largest batch at {FIXED_LENGTH} tokens", "batch_size", ("seq_length", FIXED_LENGTH), answers.BATCH_SIZES),
    Line(f"longest sequence at batch {FIXED_BATCH}", "seq_length", ("batch_size", FIXED_BATCH), answers.SEQ_LENGTHS),
)


class Reach(NamedTuple):
    """The sizes along a line that ran or fit, and those that did not, each with what shows it."""

    fits: Collection[int]
    too_large: Mapping[int, str]

    @property
    def largest(self) -> int:
        """That fits; 0 if none does."""
        return max(self.fits, default=0)

    @property
    def beyond(self) -> int | None:
        """The smallest above it that does not fit, None if none larger was measured."""
        return min((size for size in self.too_large if size > self.largest), default=None)

    def __str__(self) -> str:
        if not self.fits and not self.too_large:
            return NOT_MEASURED
        end = "none larger measured" if self.beyond is None else f"{self.beyond:,}: {self.too_large[self.beyond]}"
        return f"{self.largest:,} ({end})" if self.largest else f"none ({end})"


@dataclasses.dataclass(frozen=True)
class Column:
    """One study of the original's grids: theirs, or ours on one machine and with one set of settings."""

    title: str
    setting: answers.Setting
    cells: Mapping[Cell, Record]
    absent: str = NOT_MEASURED  # what stands for a cell that it does not have

    @property
    def config(self) -> RunConfig:
        """What its runs have in common."""
        return self.setting.config

    def ran(self, cell: Cell) -> Record | None:
        """The record of a cell that ran to its end."""
        record = self.cells.get(cell)
        return record if record and record.status == "ok" else None

    def reach(self, kernels: str, line: Line) -> Reach:
        """How far memory reaches along a line."""
        records = {size: self.cells[cell] for size, cell in line.cells(kernels).items() if cell in self.cells}
        fits = [size for size, record in records.items() if record.status == "ok"]
        return Reach(fits, {size: absence(record) for size, record in records.items() if record.status == "oom"})

    def savings(self) -> pd.DataFrame:
        """What all kernels bring, by (batch, sequence), in the cells that ran without any and with all.

        `flce` is the part of the saved memory that FLCE brings when it comes last.
        """
        ran = [(*cell, r.peak_memory_bytes, r.throughput_tokens_per_s) for cell in GRID if (r := self.ran(cell))]
        rows = pd.DataFrame(ran, columns=["kernels", "batch", "seq", "peak", "speed"])
        wide = (rows.pivot(index=["batch", "seq"], columns="kernels", values=name) for name in ("peak", "speed"))
        sizes = pd.MultiIndex.from_tuples(dict.fromkeys(cell[1:] for cell in GRID), names=["batch", "seq"])
        peak, speed = (own.reindex(index=sizes, columns=list(TITLES.values())).astype(float) for own in wide)
        saved = peak[NONE] - peak[ALL]
        found = {
            "peak": peak[NONE] / peak[ALL],
            "flce": ((peak[NO_FLCE] - peak[ALL]) / saved).where(saved != 0),
            "speed": speed[ALL] / speed[NONE],
        }
        return pd.DataFrame(found).dropna(subset=["peak"])

    @property
    def words(self) -> str:
        """Model, settings and machine."""
        found = list(self.cells.values())
        return setting_words(next((r for r in found if r.status == "ok"), found[0]))

    @property
    def is_limited(self) -> bool:
        """Whether its runs had a memory limit."""
        return self.config.memory_limit_gib is not None

    @property
    def missing(self) -> int:
        """Cells of the grids that have no record."""
        return len(set(GRID) - set(self.cells))

    def counts(self) -> dict[str, int]:
        """Of the grids' cells: how many were measured, of these under a limit that they never met, and the others."""
        own = [self.cells[cell] for cell in GRID if cell in self.cells]
        inferred, failed = sum(r.mode == "inferred" for r in own), sum(r.status == "error" for r in own)
        never_met = sum(map(answers.ran_under_a_limit, own))
        measured = len(own) - inferred - failed
        return {"measured": measured, "never_met": never_met, "inferred": inferred, "failed": failed}

    @property
    def pictures(self) -> list[str]:
        """The names of its figures' files: by batch size and by length."""
        return [f"study_{self.setting.name}_by_{what}.png" for what in ("batch", "length")]

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """These files' names and figures."""
        labels = f"batch size, {FIXED_LENGTH} tokens a sequence", f"sequence length, batch {FIXED_BATCH}"
        for name, line, label in zip(self.pictures, LINES, labels):
            cells = {cell: record for cell, record in self.cells.items() if line.has(cell)}
            yield name, comparison(cells, THREE, Axis(line.field, label))


def original() -> Column:
    """The published figures, each as a record of its own."""
    with (evidence.DATA / "original" / "rtx4090_offload.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    words = {title: word for word, title in TITLES.items()}
    cells = {}
    for row in rows:
        cell = Cell(row["strategy"], int(row["batch_size"]), int(row["seq_length"]))
        switches = STRATEGIES[words[cell.strategy]]
        config = OffloadConfig(**switches, batch_size=cell.batch_size, seq_length=cell.seq_length)
        cells[cell] = Record(
            run_name=config.run_name,
            script="deepspeed",
            mode="measured",
            status=row["status"],
            config=config.to_dict(),
            peak_memory_bytes=int(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else None,
            throughput_tokens_per_s=float(row["throughput_tokens_per_s"]) if row["throughput_tokens_per_s"] else None,
            environment=Environment(gpu="NVIDIA GeForce RTX 4090"),
        )
    setting = answers.Setting(OFFLOAD["original"], "NVIDIA GeForce RTX 4090")
    return Column("original, RTX 4090", setting, cells, absent="no figure")


def short(config: RunConfig) -> str:
    """What tells the settings of a study from the others'."""
    if config.script == "deepspeed":
        return f"offload, preset {config.preset}"
    return "one GPU" if config.gradient_checkpointing else "one GPU, no checkpointing"


def columns(runs: Iterable[Record]) -> list[Column]:
    """The studies among `runs`, those together that can be drawn together, the nearest to the original first."""
    return [
        Column(f"{answers.gpu_name(next(iter(cells.values())))}, {short(setting.config)}", setting, cells)
        for setting, cells in answers.studies(runs).items()
    ]


def ours(runs: Iterable[Record], limit_gib: float | None = None) -> dict[str, Column]:
    """Preset -> the fullest of our studies with it; under a memory limit if one is given."""
    wanted = {dataclasses.replace(config, memory_limit_gib=limit_gib): name for name, config in OFFLOAD.items()}
    found: dict[str, Column] = {}
    for column in columns(runs):
        if preset := wanted.get(column.config):
            gpu, _ = column.title.split(", ", 1)
            found.setdefault(preset, dataclasses.replace(column, title=f"{gpu}, {preset}"))
    return found


def studies() -> list[Column]:
    """Those below doc/data/study."""
    return columns(evidence.records_below(evidence.DATA / "study"))


def study_with(config: RunConfig) -> Column:
    """The study with these settings. Raises `UsageError` if there is none."""
    if found := [column for column in studies() if column.config == config]:
        return found[0]
    raise UsageError(f"doc/data/study has no study with these settings: {config.script}{config.settings_name}")


def beside_the_original() -> list[tuple[Cell, Record, Record, float]]:
    """Cells at 1024 tokens of which the original published a peak, ours under its settings, and how much more it is."""
    both, found = (original(), study_with(OFFLOAD["original"])), []
    for cell in (cell for cell in GRID if cell.seq_length == FIXED_LENGTH):
        theirs, own = (column.ran(cell) for column in both)
        if theirs and own:
            found.append((cell, theirs, own, own.peak_memory_bytes / theirs.peak_memory_bytes - 1))
    return found


def agreement(column: Column) -> str:
    """In how many cells memory sufficed here as it did in the original, and in which it did not."""
    published = original()
    common = [cell for cell in GRID if cell in published.cells and cell in column.cells]
    other = [cell for cell in common if bool(published.ran(cell)) != bool(column.ran(cell))]
    told = [f"{c.strategy}, {c[1]} x {c[2]} {'fits' if column.ran(c) else 'does not'}" for c in other]
    return "; ".join([f"the same in {len(common) - len(other)} of {len(common)}", *told])


def logits_copies(column: Column) -> pd.Series:
    """How much more the original took, in fp32 copies of the logits, where these set the peak without Liger kernels."""
    published, copies = original(), []
    for size, saving in column.savings()["peak"].items():
        theirs, own = (c.ran(Cell(NONE, *size)) for c in (published, column))
        if theirs and saving > 1.05:
            more = theirs.peak_memory_bytes - own.peak_memory_bytes
            copies.append(more / (own.run.tokens_per_step * evidence.MODELS[0].config.vocab_size * 4))
    return pd.Series(copies, dtype=float)


def repeats() -> pd.DataFrame:
    """Cells without a limit that had been measured before, with a machine for themselves: how far both are apart."""
    alone = [*evidence.folder("h100_single_gpu").records, *evidence.folder("h100_offload").records]
    before = {column.setting: column for column in columns(alone)}
    rows = []
    for again in (column for column in studies() if column.setting in before and not column.is_limited):
        for cell, later in again.cells.items():
            earlier = before[again.setting].ran(cell)
            if earlier is not None and later.status == "ok":
                peak = later.peak_memory_bytes / earlier.peak_memory_bytes - 1
                step = later.latency_s / earlier.latency_s - 1
                rows.append((short(again.config), later.run.tokens_per_step, peak, step))
    return pd.DataFrame(rows, columns=["settings", "tokens", "peak", "step"])


def fits(record: Record, budget: int) -> bool:
    """Whether a run is known to fit `budget` bytes."""
    limit, used = record.run.memory_limit_gib, record.device_used_bytes
    within_limit = limit is not None and limit * GIB <= budget
    return record.status == "ok" and (within_limit or (used is not None and used <= budget))


def excess(record: Record, budget: int) -> str | None:
    """What shows that a run takes more than `budget` bytes, None if nothing does."""
    limit, used = record.run.memory_limit_gib, record.device_used_bytes
    if record.status == "ok":
        return None if used is None or fits(record, budget) else f"took {used / GIB:,.2f} GiB"
    had = record.environment.gpu_memory_bytes if limit is None else limit * GIB + H100.context_bytes
    if record.status == "oom" and had is not None and had >= budget:
        return "OOM*" if record.mode == "inferred" else "OOM"
    return None


def _setting(record: Record) -> str | None:
    """The name in `SETTINGS` of what a record is of, whatever card or memory limit it was for."""
    names = {config: name for name, config in SETTINGS.items()}
    plain = {"find_max": None, "gpu_memory_gib": None, "memory_limit_gib": None}
    return names.get(dataclasses.replace(answers.settings(record.run), **plain))


def grid_runs(runs: Iterable[Record]) -> pd.DataFrame:
    """The measured runs with `SETTINGS`, whatever memory they were limited to."""
    rows = []
    for record in filter(answers.is_measured, runs):
        setting, cell = _setting(record), answers.cell(record)
        if setting and not answers.thread_variables(record):
            in_grid = cell in GRID and record.status != "error"
            rows.append((setting, cell.strategy, answers.gpu_name(record), cell, in_grid, record))
    return pd.DataFrame(rows, columns=["setting", "kernels", "gpu", "cell", "in_grid", "record"])


def searched(runs: Iterable[Record]) -> dict[tuple, int]:
    """(setting, kernels, what was searched, bytes of the card) -> the largest size predicted to fit."""
    lines, found = {line.field: line for line in LINES}, {}
    for record in (r for r in runs if r.frontier is not None and r.simulated_gpu == H100.name):
        cell, asked = answers.cell(record), record.frontier
        if asked.searched in lines and lines[asked.searched].has(cell):
            card_bytes = asked.limit_bytes + H100.context_bytes
            found[_setting(record), cell.strategy, asked.searched, card_bytes] = asked.predicted
    return found


def largest(own: pd.DataFrame, line: Line, budget: int) -> Reach:
    """The sizes along a line that fit, and what shows that others do not."""
    on_line = own[own["cell"].map(line.has).astype(bool)]
    by_size = on_line["record"].groupby(on_line["cell"].map(lambda cell: getattr(cell, line.field)))
    fitting = [size for size, found in by_size if any(fits(r, budget) for r in found)]
    told = {size: [t for r in found if (t := excess(r, budget))] for size, found in by_size if size not in fitting}
    return Reach(fitting, {size: min(reasons) for size, reasons in told.items() if reasons})


def fastest(own: pd.DataFrame, budget: int) -> pd.Series | None:
    """The row of the fastest run that fits, if any does."""
    speeds = {place: r.throughput_tokens_per_s for place, r in own["record"].items() if fits(r, budget)}
    return own.loc[max(speeds, key=speeds.__getitem__)] if speeds else None
