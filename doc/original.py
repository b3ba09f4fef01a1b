"""The original's published figures beside ours, cell by cell, and which of its conclusions ours bear out.

Every verdict is chosen by the numbers of the records; a cell without a record says so.
"""

import csv
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from src.figures import absence
from src.records import EMPTY
from src.tables import markdown

from src import study
from src.config import PRESETS, STRATEGIES, OffloadConfig
from src.model_utils import SHAPES
from src.study import Cell, Record
from src.utils import GIB

PUBLISHED = Path(__file__).parent / "data" / "original" / "rtx4090_offload.csv"
CARD_GIB = 24.0  # the original's card
NOT_MEASURED = "not measured"
NONE, NO_FLCE, ALL = STRATEGIES
OFFLOAD = {name: OffloadConfig(preset=name, **settings) for name, settings in PRESETS.items()}
MODEL = OffloadConfig.model_name.removesuffix("-Instruct")
VOCABULARY = SHAPES[MODEL]["vocab_size"]


@dataclasses.dataclass(frozen=True)
class Column:
    """One study of the original's grids."""

    title: str
    cells: Mapping[Cell, Record]
    absent: str = NOT_MEASURED  # what stands for a cell that it does not have

    def ran(self, cell: Cell) -> Record | None:
        """The record of a cell that ran to its end."""
        record = self.cells.get(cell)
        return record if record and record["status"] == "ok" else None

    def text(self, cell: Cell, field: str, unit: float, form: str) -> str:
        """A figure of a cell, or why there is none."""
        if cell not in self.cells:
            return self.absent
        record = self.ran(cell)
        return form.format(record[field] / unit) if record else absence(self.cells[cell])


@dataclasses.dataclass(frozen=True)
class Line:
    """The cells of a strategy along one of the grids."""

    what: str
    field: str
    sizes: tuple[int, ...]

    def cells(self, strategy: str) -> dict[int, Cell]:
        """Size -> cell."""
        fixed = {"batch_size": study.FIXED_BATCH, "seq_length": study.FIXED_LENGTH}
        return {size: Cell(strategy, **(fixed | {self.field: size})) for size in self.sizes}


LINES = (
    Line(f"largest batch at {study.FIXED_LENGTH} tokens", "batch_size", study.BATCH_SIZES),
    Line(f"longest sequence at batch {study.FIXED_BATCH}", "seq_length", study.SEQ_LENGTHS),
)


def original() -> Column:
    """The published figures."""
    with PUBLISHED.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    cells = {}
    for row in rows:
        figures = {name: float(row[name]) for name in ("peak_memory_bytes", "throughput_tokens_per_s") if row[name]}
        cell = Cell(row["strategy"], int(row["batch_size"]), int(row["seq_length"]))
        cells[cell] = EMPTY | {"mode": "measured", "status": row["status"]} | figures
    return Column("original, RTX 4090", cells, "no figure")


def ours(runs: Sequence[Record], limit_gib: float | None = None) -> dict[str, Column]:
    """Preset -> the fullest of our studies with it; under a memory limit if one is given."""
    wanted = {dataclasses.replace(config, memory_limit_gib=limit_gib): name for name, config in OFFLOAD.items()}
    columns: dict[str, Column] = {}
    for setting, cells in study.studies(runs).items():
        if preset := wanted.get(setting.config):
            title = f"{study.gpu_name(next(iter(cells.values())))}, {preset}"
            columns.setdefault(preset, Column(title, cells))
    return columns


def bracket(fits: Collection[int], too_large: Mapping[int, str]) -> str:
    """The largest size that fits, and what shows that there it ends."""
    if not fits and not too_large:
        return NOT_MEASURED
    largest = max(fits, default=0)
    beyond = min((size for size in too_large if size > largest), default=None)
    end = "none larger measured" if beyond is None else f"{beyond:,}: {too_large[beyond]}"
    return f"{largest:,} ({end})" if largest else f"none ({end})"


class Frontier(NamedTuple):
    """What ran and what did not along a line."""

    fits: list[int]
    too_large: dict[int, str]


def frontier(column: Column, strategy: str, line: Line) -> Frontier:
    """The sizes that ran, and those that ran out of memory."""
    records = {size: column.cells[cell] for size, cell in line.cells(strategy).items() if cell in column.cells}
    return Frontier(
        [size for size, record in records.items() if record["status"] == "ok"],
        {size: absence(record) for size, record in records.items() if record["status"] == "oom"},
    )


class Saving(NamedTuple):
    """What Liger kernels bring in one cell."""

    peak_ratio: float  # peak without any over peak with all
    flce_share: float | None  # part of the saving that FLCE brings when it comes last
    speed_ratio: float  # throughput with all over throughput without any


def savings(column: Column) -> dict[tuple[int, int], Saving]:
    """(batch, sequence) -> saving, where the runs without and with all kernels ran."""
    found = {}
    for _, *size in study.GRID:
        none, without, every = (column.ran(Cell(name, *size)) for name in STRATEGIES)
        if none and every:
            a, b = none["peak_memory_bytes"], every["peak_memory_bytes"]
            share = (without["peak_memory_bytes"] - b) / (a - b) if without and a != b else None
            speed = every["throughput_tokens_per_s"] / none["throughput_tokens_per_s"]
            found[tuple(size)] = Saving(a / b, share, speed)
    return found


def original_document(runs: Sequence[Record]) -> str:
    """The published figures beside ours, of all cells, and what they say."""
    published, by_preset, limited = original(), ours(runs), list(ours(runs, CARD_GIB).values())
    full = list(by_preset.values())
    columns = [published, *full]
    parts = [
        INTRODUCTION,
        _coverage(full, "without a limit"),
        _coverage(limited, f"limited to {CARD_GIB:g} GiB"),
        "## What the figures say",
        *_conclusions(published, full, limited),
        WHY,
        *_logits_copies(published, by_preset.get("seed")),
        "## Where memory ends",
        f"What ran, and the smallest that did not; ours under `--memory_limit_gib {CARD_GIB:g}`.",
        _frontier_table(published, limited),
        "## What Liger kernels save",
        "Cells that ran both without any kernel and with all. FLCE's share: (peak without FLCE - peak with all) / "
        "(peak without any - peak with all).",
        _savings_table(columns),
        "## Peak allocated memory, GiB",
        _cells_table(columns, "peak_memory_bytes", GIB, "{:,.2f}"),
        "## Throughput, tokens/s",
        _cells_table(columns, "throughput_tokens_per_s", 1, "{:,.0f}"),
    ]
    return "\n\n".join(parts)


INTRODUCTION = (
    "The original measured Llama 3.2 1B under DeepSpeed ZeRO-3 with everything offloaded, in fp16 with gradient "
    "checkpointing, on one RTX 4090 with 24 GB and an i9-13900K, in October 2024. Its figures are in "
    "`doc/data/original/`: `OOM` is what it drew where it reports no figure, `no figure` a cell of its grids that it "
    "does not show. Ours are of both presets: `seed` has the original's DeepSpeed settings, `fast` is bf16 with ours. "
    "`OOM*` was not run: a smaller one ran out of memory."
)

WHY = f"""## Why they differ

- **Measuring.** The original timed 3 iterations without a warm-up and with the profiler on, so its throughput is too
  low by an unknown amount. Ours is the median of {OffloadConfig.iterations} steps or more after a warm-up, with
  profiler and snapshot in other steps.
- **Machine.** Under offloading a step is bound by PCIe, host memory and the CPU as much as by the GPU. Throughput is to
  be compared within a column, not between two. A limit of 24 GiB leaves the allocator more than a card of 24 GiB does,
  whose CUDA context takes some first.
- **Libraries.** The original names no versions; ours are above. Their effects were not measured one by one."""

_LOGITS_COPY = (
    "When the original was measured, transformers' loss made one more fp32 copy of the logits, shifted by a token; "
    "[a change of January 2025](https://github.com/huggingface/transformers/pull/35646) removed it. That copy is "
    "nearly all of the difference."
)


def _sizes(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)


def _coverage(columns: Sequence[Column], how: str) -> str:
    """How much of the grids was measured."""
    if not columns:
        return f"Measured {how}: none of {len(study.GRID)} cells."
    told = []
    for column in columns:
        own = [column.cells[cell] for cell in study.GRID if cell in column.cells]
        inferred = sum(record["mode"] == "inferred" for record in own)
        failed = sum(record["status"] == "error" for record in own)
        limited = sum(map(study.ran_under_a_limit, own))
        note = f" ({limited} of them under a limit that they never met)" if limited else ""
        rest = [f"{count} {what}" for count, what in ((inferred, "inferred"), (failed, "failed")) if count]
        told.append(f"{column.title} {', '.join([f'{len(own) - inferred - failed}{note}', *rest])}")
    return f"Measured {how}, of {len(study.GRID)} cells: {'; '.join(told)}."


def spread(values: Collection[float], form: str) -> str:
    """Smallest and largest of `values`."""
    ends = dict.fromkeys([form.format(min(values)), form.format(max(values))])
    return f"{' to '.join(ends)} in {len(values)} {'cell' if len(values) == 1 else 'cells'}"


def verdict(values: Collection[float], holds: Callable[[float], bool], yes: str, no: str) -> str:
    """Which of two statements the values bear out."""
    count = sum(map(holds, values))
    return yes if count == len(values) else no if count == 0 else f"{yes} in {count} of {len(values)}"


def _conclusions(published: Column, full: Sequence[Column], limited: Sequence[Column]) -> Iterator[str]:
    theirs, mine = savings(published), {column.title: savings(column) for column in full}
    yield _answers(
        "Is nearly all of the saving FLCE's? Its share of the saving, the other kernels being on:",
        {name: [s.flce_share for s in found.values() if s.flce_share is not None] for name, found in mine.items()},
        [s.flce_share for s in theirs.values() if s.flce_share is not None],
        "{:.1%}",
        lambda values: verdict(values, lambda share: share >= 0.9, "it is", "it is not"),
    )
    yield "\n".join(
        [
            "How large is the saving? Peak without any kernel over peak with all, against the published in the same "
            "cell:",
            *(f"- {name}: {_against(theirs, found)}" for name, found in mine.items()),
        ]
    )
    yield _answers(
        "Is an offloaded step faster? Throughput with all kernels over throughput without any:",
        {name: [s.speed_ratio for s in found.values()] for name, found in mine.items()},
        [s.speed_ratio for s in theirs.values()],
        "{:.2f}",
        lambda values: verdict(values, lambda ratio: ratio > 1.05, "by more than 5%", "not by more than 5%"),
    )
    question = f"Do the same cells fit? Ours limited to {CARD_GIB:g} GiB, in the cells that the original reports:"
    agreements = [f"- {column.title}: {agreement(published, column)}" for column in limited]
    yield "\n".join([question, *(agreements or [f"- ours: {NOT_MEASURED} under that limit"])])
    gains = [f"- {column.title}: {_gains(column)}" for column in (published, *limited)]
    gains += [] if limited else [f"- ours: {NOT_MEASURED} under a limit of {CARD_GIB:g} GiB"]
    yield "\n".join([f"How much more fits {CARD_GIB:g} GiB with all kernels than without any?", *gains])


def _answers(
    question: str,
    values: Mapping[str, Collection[float]],
    published: Collection[float],
    form: str,
    answer: Callable[[Collection[float]], str],
) -> str:
    lines = [f"- original: {spread(published, form)}: {answer(published)}"]
    for name, own in values.items():
        lines.append(f"- {name}: {f'{spread(own, form)}: {answer(own)}' if own else NOT_MEASURED}")
    return "\n".join([question, *lines])


def _against(theirs: Mapping[tuple[int, int], Saving], found: Mapping[tuple[int, int], Saving]) -> str:
    """Our ratios beside the published ones, in the cells that both have."""
    common = [size for size in found if size in theirs]
    if not common:
        return f"{NOT_MEASURED} in a cell that the original has"
    changes = [found[size].peak_ratio / theirs[size].peak_ratio for size in common]
    words = [
        ("within 5%", sum(abs(change - 1) <= 0.05 for change in changes)),
        ("larger", sum(change > 1.05 for change in changes)),
        ("smaller", sum(change < 0.95 for change in changes)),
    ]
    pairs = ", ".join(f"{_sizes(s)} {found[s].peak_ratio:.2f} for {theirs[s].peak_ratio:.2f}" for s in common)
    return f"{', '.join(f'{word} in {count}' for word, count in words if count)} of {len(common)}: {pairs}"


def agreement(published: Column, column: Column) -> str:
    """In how many cells memory sufficed here as it did there, and in which it did not."""
    common = [cell for cell in study.GRID if cell in published.cells and cell in column.cells]
    other = [cell for cell in common if bool(published.ran(cell)) != bool(column.ran(cell))]
    told = [f"{cell.strategy}, {_sizes(cell[1:])} {'fits' if column.ran(cell) else 'does not'}" for cell in other]
    return "; ".join([f"the same in {len(common) - len(other)} of {len(common)}", *told])


def _gains(column: Column) -> str:
    """The largest that ran without any and with all kernels, and the factor between."""
    told = []
    for line in LINES:
        none, every = frontier(column, NONE, line), frontier(column, ALL, line)
        if not none.fits or not every.fits:
            told.append(f"{line.what} {NOT_MEASURED}")
            continue
        low, high = max(none.fits), max(every.fits)
        ended = any(size > high for size in every.too_large)
        least = "" if ended else "at least "
        sure = "" if any(size > low for size in none.too_large) else ", though none larger was measured without any"
        told.append(f"{line.what} {high:,} for {low:,}, {least}{high / low:.3g} times{sure}")
    return "; ".join(told)


def _logits_copies(published: Column, ours: Column | None) -> Iterator[str]:
    """How much more the original took, in fp32 copies of the logits, where these set the peak without Liger kernels."""
    copies = []
    for size, saving in (savings(ours) if ours else {}).items():
        cell = Cell(NONE, *size)
        if published.ran(cell) and saving.peak_ratio > 1.05:
            more = published.ran(cell)["peak_memory_bytes"] - ours.ran(cell)["peak_memory_bytes"]
            copies.append(more / (cell.batch_size * cell.seq_length * VOCABULARY * 4))
    if copies:
        text = (
            "Without Liger kernels, where the logits set the peak, the original's is higher than that of "
            f"{ours.title} by this many fp32 copies of the logits: {spread(copies, '{:.2f}')}."
        )
        explained = all(abs(count - 1) < 0.1 for count in copies)
        yield f"{text} {_LOGITS_COPY}" if explained else text


def _frontier_table(published: Column, limited: Sequence[Column]) -> str:
    columns = [published, *(limited or [Column("ours", {})])]
    rows = [
        [name, line.what, *(bracket(*frontier(column, name, line)) for column in columns)]
        for line in LINES
        for name in STRATEGIES
    ]
    return markdown(["kernels", "what", *(column.title for column in columns)], rows)


def _savings_table(columns: Sequence[Column]) -> str:
    found = {column.title: savings(column) for column in columns}
    rows = []
    for size in dict.fromkeys((cell.batch_size, cell.seq_length) for cell in study.GRID):
        for title, saving in found.items():
            if size in saving:
                ratio, share, speed = saving[size]
                part = NOT_MEASURED if share is None else f"{share:.1%}"
                rows.append([_sizes(size), title, f"{ratio:.2f}", part, f"{speed:.2f}"])
    header = ["batch x seq", "whose", "peak, none / all", "FLCE's share of the saving", "tokens/s, all / none"]
    return markdown(header, rows)


def _cells_table(columns: Sequence[Column], field: str, unit: float, form: str) -> str:
    rows = [
        [cell.strategy, _sizes(cell[1:]), *(column.text(cell, field, unit, form) for column in columns)]
        for cell in study.GRID
    ]
    return markdown(["kernels", "batch x seq", *(column.title for column in columns)], rows)
