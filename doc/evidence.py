"""What the report and the slides are made from: records by their settings, facts of the models' shapes, conditions.

A record that is not there, or a sentence whose condition the records no longer meet, is a `UsageError`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from doc import original
from src import records, study
from src.config import PRESETS, STRATEGIES, OffloadConfig, RunConfig, Strategy, config_of
from src.explain.reading import read
from src.explain.timeline import Timeline
from src.figures import all_figures, predicted_and_measured, setting_words
from src.model_utils import load_model_config, parameter_counts
from src.study import Record
from src.utils import GIB, MIB, UsageError, next_power_of_two

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "doc" / "data"
NO_KERNELS, NO_FLCE, ALL_KERNELS = STRATEGIES.values()


@dataclasses.dataclass(frozen=True)
class Folder:
    """The records of one folder below doc/data, which one machine measured."""

    name: str
    records: list[Record]

    def find(self, strategy: Strategy = ALL_KERNELS, *, preset: str | None = None, **settings: Any) -> Record | None:
        """The run with these settings, the study's where none is given; `preset` names an offloaded one. Or None."""
        if preset is None:
            config: RunConfig = RunConfig(strategy=strategy, **settings)
        else:
            config = OffloadConfig(strategy=strategy, **PRESETS[preset] | {"preset": preset} | settings)
        found = [r for r in self.records if (r["script"], r["run_name"]) == (config.script, config.run_name)]
        if len(found) > 1:
            raise UsageError(f"doc/data/{self.name} has several records of {config.run_name}")
        return found[0] if found else None

    def run(self, strategy: Strategy = ALL_KERNELS, *, preset: str | None = None, **settings: Any) -> Record:
        """The same, of a run that must be there and must have ended well."""
        record = self.find(strategy, preset=preset, **settings)
        if record is None or record["status"] != "ok":
            what = "no record" if record is None else "only a run that failed"
            words = ", ".join(f"{key} {value}" for key, value in settings.items())
            kernels = " ".join(filter(None, (strategy.title, preset and f"preset {preset}", words)))
            raise UsageError(f"doc/data/{self.name} has {what} of: {kernels}")
        return record

    @property
    def gpu(self) -> str:
        """The GPU that measured all of them."""
        found = {r["environment"]["gpu"] for r in self.records if r["mode"] == "measured"}
        if len(found) != 1:
            raise UsageError(f"doc/data/{self.name} has records of {len(found)} GPUs, not of one")
        return found.pop()


def folder(name: str) -> Folder:
    """The records in doc/data/`name`, but for those in folders below it. Raises `UsageError` if there are none."""
    paths = sorted((DATA / name).glob("*.json"))
    if not paths:
        raise UsageError(f"doc/data/{name} has no records")
    return Folder(name, [records.load(path) for path in paths])


@dataclasses.dataclass(frozen=True)
class Study:
    """The study's runs on one machine and with one set of settings."""

    setting: study.Setting
    cells: dict[study.Cell, Record]

    @property
    def title(self) -> str:
        """Model, settings and machine."""
        found = list(self.cells.values())
        return setting_words(next((r for r in found if r["status"] == "ok"), found[0]))

    @property
    def short_title(self) -> str:
        """What tells it from the others."""
        config = self.setting.config
        if config.script == "deepspeed":
            return f"offload, preset {config.preset}"
        return "one GPU" if config.gradient_checkpointing else "one GPU, no checkpointing"

    @property
    def machine(self) -> str:
        """Its GPU and what tells it from the others."""
        return f"{study.gpu_name(next(iter(self.cells.values())))}, {self.short_title}"

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """File names and figures of its three strategies, as far as it has runs enough: by batch size and by length."""
        for name, figure in all_figures(list(self.cells.values())):
            if "3_strategies" in name:
                yield f"study_{self.setting.name}_by_{'length' if 'fixed_batch' in name else 'batch'}.png", figure

    @property
    def pictures(self) -> list[str]:
        """The names of these files."""
        return [name for name, _ in self.figures()]

    def frontier(self, strategy: Strategy) -> tuple[int, int] | None:
        """The largest batch at 1024 tokens that ran, and the smallest that ran out of memory; None if none did."""
        by_batch, _ = original.LINES
        fits, too_large = original.frontier(self.column, strategy.title, by_batch)
        return (max(fits), min(too_large)) if fits and too_large else None

    @property
    def column(self) -> original.Column:
        """Its cells, to be set beside others'."""
        return original.Column(self.title, self.cells)

    @property
    def is_limited(self) -> bool:
        """Whether its runs had a memory limit."""
        return self.setting.config.memory_limit_gib is not None

    @property
    def missing(self) -> int:
        """Cells of the original's grids that have no record."""
        return len(set(study.GRID) - set(self.cells))


def studies() -> list[Study]:
    """The runs below doc/data/study, those together that can be drawn together, the nearest to the original first."""
    return [Study(*item) for item in study.studies(records.load_all([DATA / "study"])).items()]


def study_with(config: RunConfig, among: Sequence[Study]) -> Study:
    """The study with these settings. Raises `UsageError` if there is none."""
    for part in among:
        if part.setting.config == config:
            return part
    raise UsageError(f"doc/data/study has no study with these settings: {config.script}{config.settings_name}")


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Cells of a study that had been measured before."""

    title: str
    pairs: list[tuple[Record, Record]]  # before, and in the study

    @property
    def peak_difference(self) -> float:
        """The largest change of a peak, relative."""
        return max(abs(later["peak_memory_bytes"] / earlier["peak_memory_bytes"] - 1) for earlier, later in self.pairs)

    def changes(self, tokens: range) -> list[float]:
        """Relative changes of the step time of cells with so many tokens."""
        return [
            later["latency_s"] / earlier["latency_s"] - 1
            for earlier, later in self.pairs
            if config_of(later).tokens_per_step in tokens
        ]


def repeats(among: Sequence[Study]) -> list[Repeat]:
    """What the studies measured again of folders whose runs had a machine for themselves."""
    before = study.studies([*folder("h100_single_gpu").records, *folder("h100_offload").records])
    found = []
    for again in among:
        cells = before.get(again.setting, {})
        pairs = [(cells[cell], record) for cell, record in again.cells.items() if cell in cells]
        ran = [pair for pair in pairs if all(record["status"] == "ok" for record in pair)]
        if ran and not again.is_limited:
            found.append(Repeat(again.short_title, ran))
    return found


def snapshot(name: str) -> Timeline:
    """One of the committed memory snapshots."""
    return read(DATA / "snapshots" / f"{name}.pickle.gz")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model that follow from its configuration alone."""

    name: str

    @property
    def config(self) -> Any:
        """Its Hugging Face configuration."""
        return load_model_config(RunConfig(model_name=self.name))

    @property
    def short_name(self) -> str:
        """Without its organisation."""
        return self.name.rsplit("/")[-1]

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        layer, rest = parameter_counts(self.config)
        return layer * self.config.num_hidden_layers + rest

    def logits_bytes(self, tokens: int, width: int) -> int:
        """One copy of all logits, with `width` bytes each."""
        return tokens * self.config.vocab_size * width

    def checkpoint_bytes(self, tokens: int) -> int:
        """The layer inputs that checkpointing keeps, in a 16-bit type."""
        return tokens * self.config.hidden_size * self.config.num_hidden_layers * 2

    def factor(self, budget: int = 1) -> int:
        """How many times as many logits as hidden numbers a token has, over the `budget`, rounded up."""
        return _ceil(self.config.vocab_size, budget * self.config.hidden_size)

    def chunk(self, tokens: int, budget: int = 1) -> int:
        """Tokens of which fused linear cross-entropy makes logits at a time, so that they take `budget` inputs' memory.

        As liger_kernel.ops.fused_linear_cross_entropy computes it in the midst of its forward pass; a test compares.
        """
        return min(next_power_of_two(_ceil(tokens, self.factor(budget))), tokens)

    def chunks(self, tokens: int, budget: int = 1) -> int:
        """The number of those chunks."""
        return _ceil(tokens, self.chunk(tokens, budget))

    @property
    def head_bytes(self) -> int:
        """The LM head's weight, or its gradient, in a 16-bit type."""
        return self.config.vocab_size * self.config.hidden_size * 2


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A row of doc/predicted_vs_measured.md."""

    kernels: str
    measured_gib: float
    error: float  # relative


class Errors(NamedTuple):
    """Errors of the study's predicted peaks, relative, without their signs."""

    every: list[float]
    blind: list[float]  # of those that no GPU had measured when they were predicted


def study_errors() -> Errors:
    """Of the peaks below doc/data/study. One measured under a memory limit is measured."""
    first: dict[tuple[RunConfig, study.Cell], str] = {}  # experiment -> when its peak was first measured
    for run in records.load_all([DATA]):
        if run["mode"] == "measured" and run["status"] == "ok":
            place, date = _whatever_limit(run), run["environment"]["date"]
            first[place] = min(first.get(place, date), date)
    errors = Errors([], [])
    for prediction, run in predicted_and_measured(records.load_all([DATA / "study"])):
        error = abs(prediction["peak_memory_bytes"] / run["peak_memory_bytes"] - 1)
        errors.every.append(error)
        if prediction["environment"]["date"] < first[_whatever_limit(run)]:
            errors.blind.append(error)
    return errors


def _whatever_limit(record: Record) -> tuple[RunConfig, study.Cell]:
    config, cell = study.experiment(record)
    return dataclasses.replace(config, memory_limit_gib=None), cell


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Whether cells of the study fit a memory limit, as predicted and as measured."""

    measured: list[Record]
    wrong: list[Record]  # those of which the prediction says otherwise


def verdicts() -> Verdicts:
    """Cells that ran under a memory limit or ran out of it, and of which there is a prediction under the same limit."""
    found = records.load_all([DATA / "study"])
    predicted = {study.experiment(r): r["status"] for r in found if r["mode"] == "predicted"}
    runs = [r for r in found if r["mode"] == "measured" and r["config"]["memory_limit_gib"] is not None]
    runs = [r for r in runs if study.experiment(r) in predicted]
    return Verdicts(runs, [r for r in runs if r["status"] != predicted[study.experiment(r)]])


def predictions() -> list[Prediction]:
    """The peaks of doc/predicted_vs_measured.md that were both predicted and measured."""
    text = (ROOT / "doc" / "predicted_vs_measured.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    column = {name: i for i, name in enumerate(rows[0])}
    return [
        Prediction(row[0], float(row[column["measured GiB"]]), float(row[column["error"]].rstrip("%")) / 100)
        for row in rows[2:]
        if row[column["error"]].endswith("%")
    ]


def holds(condition: bool, caller: Callable[[], str]) -> str:
    """The text of a `{% call holds(...) %}` block. Raises `UsageError` if the records say otherwise."""
    text = " ".join(caller().split())
    if not condition:
        raise UsageError(f"the records no longer show this: {text!r}")
    return text


def _number(value: float) -> str:
    """Three significant digits, and thousands' commas."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


FILTERS: dict[str, Callable[..., str]] = {
    "gib": lambda count: f"{count / GIB:,.2f} GiB",
    "mib": lambda count: f"{count / MIB:,.0f} MiB",
    "ms": lambda seconds: f"{seconds * 1e3:,.0f} ms",
    "tokens": lambda rate: f"{rate:,.0f} tokens/s",
    "percent": lambda share: f"{share:.0%}",
    "percent3": lambda share: f"{share:.3%}",
    "size": lambda record: "{batch_size} x {seq_length}".format(**record["config"]),
    "gb_per_s": lambda rate: f"{rate / 1e9:,.0f} GB/s",
    "times": lambda ratio: f"{_number(ratio)}",
    "count": lambda number: f"{number:,.0f}",
    "gpu": study.gpu_name,
}
