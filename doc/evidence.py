"""What the documents speak of: records found by their settings, models' sizes, predictions beside what was measured.

A record that is missing is a `UsageError`: no document is made without what it speaks of.
"""

import dataclasses
import functools
import itertools
import os
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from src import machine, techniques
from src.advise.request import LEFT_FREE
from src.cli import command_line
from src.config import DTYPES, RunConfig
from src.explain.reading import read
from src.explain.timeline import Timeline
from src.families import SHAPES
from src.machine import H100
from src.model_utils import TORCH_DTYPES, load_model_config, parameter_counts
from src.offload_config import PRESETS, OffloadConfig
from src.record import Record, load, load_and_tell
from src.study import answers, fit_rates, grids, pareto
from src.study.answers import short_model
from src.study.figures import predicted_and_measured
from src.study.fit_rates import Compared
from src.techniques import KERNEL_NAMES, STRATEGIES, TECHNIQUES, TITLES, kernels_only
from src.utils import GIB, UsageError, ceil_div, next_power_of_two

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "doc" / "data"
SOURCE = ROOT / "doc" / "source"
# The runs of which predictions are kept, and where these are.
PREDICTED_RUNS = ("h100_single_gpu", "h100_techniques", "h100_peers", "h100_people")
PREDICTED_RUNS += ("h200_single_gpu", "h200_peers", "h200_people", "h200_long", "h200_graphs", "h200_checkpointing")
# A GPU's word -> the runs to which its rates were fitted, see src/study/fit_rates.py.
FITTED_RUNS = {"h100": ("h100_single_gpu", "h100_techniques"), "h200": ("h200_single_gpu", "h200_peers")}
PREDICTIONS = {"all_gpu": "predicted_single_gpu", "deepspeed": "predicted_offload"}

BATCHES = (1, 4, 8, 16, 32)  # of the runs that had a machine for themselves
OFFLOADED = (("none", 4), ("all", 4), ("none", 32), ("all", 32), ("all", 96))  # kernels and batch

Pair = tuple[Record, Record]

strange: set[Path] = set()  # folders in which there were files that are no records


@functools.cache  # several documents are made of one folder
def records_below(place: Path) -> tuple[Record, ...]:
    """The records below a folder; a user's may have other files, which are skipped, the study's own may not."""
    found, is_whole = load_and_tell([place])
    if not is_whole and place.is_relative_to(DATA):
        raise UsageError(f"{place} has files that are no records")
    strange.update([] if is_whole else [place])
    return tuple(found)


_records_in = functools.cache(lambda place: tuple(map(load, sorted(place.glob("*.json")))))


@dataclasses.dataclass(frozen=True)
class Folder:
    """The records of one folder below doc/data, which one machine measured."""

    name: str
    records: Sequence[Record]

    def find(self, kernels: str = "all", *, preset: str | None = None, **settings: Any) -> Record | None:
        """The run with these settings, the study's where none is given; `preset` names an offloaded one. Or None.

        `kernels` is a word of a grid, or the only kernel that is on.
        """
        switches = STRATEGIES[kernels] if kernels in STRATEGIES else kernels_only(kernels)
        if preset is None:
            config: RunConfig = RunConfig(**switches, **settings)
        else:
            config = OffloadConfig(**switches, **OffloadConfig.presets[preset] | {"preset": preset} | settings)
        found = [r for r in self.records if (r.script, r.run_name) == (config.script, config.run_name)]
        if len(found) > 1:
            raise UsageError(f"doc/data/{self.name} has several records of {config.run_name}")
        return found[0] if found else None

    def run(self, kernels: str = "all", *, preset: str | None = None, **settings: Any) -> Record:
        """The same, of a run that must be there and must have ended well."""
        record = self.find(kernels, preset=preset, **settings)
        if record is None or record.status != "ok":
            what = "no record" if record is None else "only a run that failed"
            named = {"kernels": kernels, "preset": preset} | settings
            words = [f"{name} {value}" for name, value in named.items() if value is not None]
            raise UsageError(f"doc/data/{self.name} has {what} of: {', '.join(words)}")
        return record

    def pairs(self, *settings: dict[str, Any]) -> list[tuple[Record | None, Record | None]]:
        """Of each of these settings the run without and with all Liger kernels."""
        return [(self.find("none", **own), self.find("all", **own)) for own in settings]

    @property
    def gpu(self) -> str:
        """The GPU that measured all of them."""
        found = {r.environment.gpu for r in self.records if r.mode == "measured"}
        if len(found) != 1:
            raise UsageError(f"doc/data/{self.name} has records of {len(found)} GPUs, not of one")
        return found.pop()


def folder(name: str) -> Folder:
    """The records in doc/data/`name`, but for those in folders below it. Raises `UsageError` if there are none."""
    if found := _records_in(DATA / name):
        return Folder(name, found)
    raise UsageError(f"doc/data/{name} has no records")


def listed(place: Path, script: str | None = None, modes: Sequence[str] = ("measured",)) -> list[Record]:
    """Every record of a script, or of both, of these modes below a folder, in the order of the tables."""
    runs = [r for r in records_below(place) if r.mode in modes and script in (None, r.script)]
    if not runs:
        raise UsageError(f"no measured records of {script or 'any'} script below {place}")
    return sorted(runs, key=table_order)


def table_order(record: Record) -> tuple:
    """One GPU before offload; then by model, settings, tokens, kernels."""
    return (record.script, *(_one_gpu_order if record.script == "all_gpu" else _offload_order)(record))


def _one_gpu_order(record: Record) -> tuple:
    config, models = record.run, list(SHAPES)
    model, optimizer = config.model_name.removesuffix("-Instruct"), config.optimizer
    place = models.index(model) if model in models else len(models)
    settings = DTYPES.index(config.dtype), optimizer != RunConfig.optimizer, optimizer
    settings += config.memory_limit_gib is not None, not config.gradient_checkpointing
    return place, *settings, config.seq_length, config.batch_size, len(config.kernels), record.run_name


def _offload_order(record: Record) -> tuple:
    config = record.run
    usual = all(getattr(config, name) == value for name, value in config.presets[config.preset].items())
    sizes = config.seq_length, config.batch_size, len(config.kernels), list(config.presets).index(config.preset)
    return config.model_name, config.world_size, not usual, *sizes, record.run_name


def by_batch(runs: Folder, checkpointing: bool) -> list[Record]:
    """The three strategies' runs at 1024 tokens, as far as they are there."""
    settings = [{"batch_size": batch, "gradient_checkpointing": checkpointing} for batch in BATCHES]
    found = (runs.find(kernels, **own) for kernels in STRATEGIES for own in settings)
    return [record for record in found if record is not None]


def alone(runs: Folder) -> list[Record]:
    """Each kernel by itself, between none of them and more of them together."""
    return [runs.run(kernels) for kernels in ("none", *KERNEL_NAMES, "no_flce", "all")]


def preset_pairs(runs: Folder) -> list[Pair]:
    """Offloaded runs under the original's settings, and under ours."""
    return [tuple(runs.run(kernels, preset=p, batch_size=batch) for p in PRESETS) for kernels, batch in OFFLOADED]


def ladder() -> list[tuple[str, Record | None]]:
    """What to turn on, one after the other, at 32 x 1024 tokens, in words and as runs."""
    h100, offload = folder("h100_single_gpu"), folder("h100_offload")
    return [
        ("nothing", h100.find("none", batch_size=32, gradient_checkpointing=False)),
        ("checkpointing", h100.find("none", batch_size=32)),
        ("all Liger kernels", h100.find("all", batch_size=32, gradient_checkpointing=False)),
        ("all Liger kernels, checkpointing", h100.find("all", batch_size=32)),
        ("all Liger kernels, checkpointing, offload (fast)", offload.find(preset="fast", batch_size=32)),
    ]


def peaks() -> dict[str, Record]:
    """Runs with a breakdown of their peak, without and with Liger kernels."""
    single, offload = folder("h200_single_gpu"), folder("h200_offload")
    return {
        "one GPU, none": single.run("none"),
        "one GPU, all": single.run("all"),
        "offload, none": offload.run("none", preset="fast", batch_size=8),
        "offload, all": offload.run("all", preset="fast", batch_size=8),
    }


@functools.cache
def peers() -> dict[str, tuple[pareto.Group, pareto.Choices]]:
    """Size, and the model if it is another than the study's -> everything that was turned on there, on an H100."""
    found = pareto.choices(folder("h100_peers").records)
    ordered = sorted(found, key=lambda g: (g.config.model_name != RunConfig.model_name, g.sequences))
    models = ["" if g.config.model_name == RunConfig.model_name else f"{short_model(g.config)}, " for g in ordered]
    return {f"{model}{g.sequences} x {g.seq_length}": (g, found[g]) for model, g in zip(models, ordered)}


# What a run of `plain` may differ in; it is otherwise what the study trains: bf16, fused AdamW, no other technique.
VARIED = (
    "model_name",
    "batch_size",
    "seq_length",
    "iterations",
    "warmup",
    "gradient_checkpointing",
    "memory_limit_gib",
)
FEW_TOKENS = 4096  # of a step: so few are bound by the CPU


def plain(place: Path) -> list[Record]:
    """The measured runs on one GPU below a folder that ended well and differ in kernels and `VARIED` alone."""
    found = [r for r in listed(place, "all_gpu") if r.status == "ok" and r.frontier is None]
    return [r for r in found if r.run.title in TITLES.values() and not r.run.unusual(*VARIED, *KERNEL_NAMES)]


@functools.cache
def few_tokens() -> list[dict[str, Record]]:
    """The study's three strategies at few tokens, on the H100, as they ran after each other: title -> run."""
    found: dict[tuple, dict[str, Record]] = defaultdict(dict)
    for place in ("h100_single_gpu", "h100_peers", "study/h100_single_gpu"):
        for run in plain(DATA / place):
            config = run.run
            if config.model_name == RunConfig.model_name and config.tokens_per_step <= FEW_TOKENS:
                how = config.gradient_checkpointing, config.memory_limit_gib, config.batch_size, config.seq_length
                found[place, *how][config.title] = run
    return [own for own in found.values() if len(own) == len(TITLES)]


def offloaded(preset: str, **settings: Any) -> list[Record]:
    """The H100's offloaded runs of the study's model with a preset as it is, on one GPU, and with these settings."""
    sizes = ("batch_size", "seq_length", "iterations", "warmup", "memory_limit_gib", *KERNEL_NAMES)
    runs = [r for r in listed(DATA, "deepspeed") if r.status == "ok" and answers.gpu_name(r) == "H100"]
    runs = [r for r in runs if r.run.preset == preset and r.processes == 1 and not r.run.unusual("preset", *sizes)]
    return [r for r in runs if all(getattr(r.run, name) == value for name, value in settings.items())]


def apart_in_training(a: Record, b: Record) -> float:
    """The largest difference of two runs' losses, step by step, and gradient norms, relative to the first's."""
    figures = zip([*a.losses, a.grad_norm], [*b.losses, b.grad_norm], strict=True)
    return max(abs(other / own - 1) for own, other in figures)


def beside_others(runs: Iterable[Record]) -> list[Record]:
    """Those that had a part of their machine's cores: other GPUs of it worked beside them, with cores of their own."""
    return [run for run in runs if (run.environment.machine_cpu_count or 0) > (run.environment.cpu_count or 0)]


def efficiency(several: Record, fewer: Record) -> float:
    """The speed of each of several GPUs over that of each of fewer, or of one alone."""
    speed, other = (run.throughput_tokens_per_s / run.processes for run in (several, fewer))
    return speed / other


def newest() -> str:
    """The day of the newest measurement."""
    last = max(r.environment.date for r in records_below(DATA) if r.mode == "measured")
    return f"{datetime.fromisoformat(last):%-d %B %Y}"


def changes(runs: Iterable[dict[str, Record]], of: str, to: str) -> list[float]:
    """How much longer a step takes when `of` becomes `to`, relative, ascending."""
    return sorted(own[to].latency_s / own[of].latency_s - 1 for own in runs)


@functools.cache
def peaks_by_tokens(predicted: bool = False, of_several: str = "max") -> pd.DataFrame:
    """Peaks in bytes, of runs with checkpointing, by model and tokens of a step: a column for each strategy."""
    found = [r for r in plain(DATA) if r.run.gradient_checkpointing]
    if predicted:
        found = [r for name in ("predicted_tokens", "predicted_map") for r in folder(name).records]
    rows = [
        (r.run.model_name.removesuffix("-Instruct"), r.run.tokens_per_step, r.run.title, r.peak_memory_bytes)
        for r in found
    ]
    table = pd.DataFrame(rows, columns=["model", "tokens", "kernels", "peak"]).dropna()
    return table.groupby(["model", "tokens", "kernels"])["peak"].agg(of_several).unstack()


def rule_errors() -> list[tuple[str, int, bool]]:
    """Model, tokens, and whether what FLCE saved there is further from the rule than 0.7 GiB and 8 %."""
    found = peaks_by_tokens()[[TITLES["none"], TITLES["all"]]].dropna()
    rows = []
    for (model, tokens), (none, every) in found.iterrows():
        off = abs(none - every - Shape(model).saving_bytes(tokens))
        rows.append((model, tokens, off > max(0.7 * GIB, 0.08 * (none - every))))
    return rows


def reached(pairs: dict[str, Pair], speed: float = 0, memory: float = 1) -> int:
    """How many pairs become so many times as fast, and need at most this part of the memory."""
    return sum(
        every.throughput_tokens_per_s >= speed * none.throughput_tokens_per_s
        and every.peak_memory_bytes <= memory * none.peak_memory_bytes
        for none, every in pairs.values()
    )


def first_page() -> list[dict[str, Any]]:
    """What the first page names of all that was run at 32 x 1024: doc/source/first_page.toml."""
    return tomllib.loads((SOURCE / "first_page.toml").read_text())["point"]


@functools.cache
def headline() -> tuple[pareto.Choices, dict[str, pareto.Point]]:
    """What ran at 32 x 1024 on the H100, and of it the rows of the first page, each with the speeds of all its runs."""
    runs = [r for r in listed(DATA, "all_gpu") if r.environment.gpu == H100.name]
    (own,) = (own for g, own in pareto.choices(runs).items() if g[:3] == (RunConfig(), 32, 1024))
    labels = {own.label(point.record): point for point in own.points}
    if missing := {named["label"] for named in first_page()} - labels.keys():
        raise UsageError(f"no run at 32 x 1024 of {', '.join(missing)}")
    return own, {named["row"]: labels[named["label"]] for named in first_page() if "row" in named}


def share(record: Record, *categories: str) -> float:
    """The share of the peak that these categories of memory have."""
    return sum(record.peak_breakdown[name] for name in categories) / record.breakdown_peak_bytes


@functools.cache
def snapshot(name: str) -> Timeline:
    """One of the committed memory snapshots."""
    return read(DATA / "snapshots" / f"{name}.pickle.gz")


def breakdown_pairs(runs: Iterable[Record]) -> list[Pair]:
    """Runs with a breakdown without any and with all Liger kernels, otherwise the same."""
    told = {(r.environment.gpu, r.script, r.run_name): r for r in runs if r.peak_breakdown}
    pairs = []
    for (gpu, script, _), none in told.items():
        every = told.get((gpu, script, dataclasses.replace(none.run, **STRATEGIES["all"]).run_name))
        if not none.run.kernels and every is not None:
            pairs.append((none, every))
    return pairs


def tried(runs: Iterable[Record]) -> list[tuple[dict[str, str], Record | None]]:
    """What was tried to make an offloaded step faster, in the order of trial, each with the run that measured it."""
    found = {(run.run_name, *answers.thread_variables(run)): run for run in runs}
    pairs = []
    for lever in tomllib.loads((SOURCE / "levers.toml").read_text())["lever"]:
        words = [*lever["flags"].split(), "--device", "cuda"]
        run_name = command_line(None, OffloadConfig(), {}, words).config.run_name
        pairs.append((lever, found.get((run_name, *lever["variables"].split()))))
    return pairs


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model that follow from its configuration alone."""

    name: str

    @functools.cached_property
    def config(self) -> Any:
        """Its Hugging Face configuration."""
        config = RunConfig(model_name=self.name)
        return load_model_config(dataclasses.replace(config, **techniques.chosen(config, ())))

    @property
    def short_name(self) -> str:
        """Without its organisation."""
        return self.name.rsplit("/")[-1]

    @functools.cached_property
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

    def saving_bytes(self, tokens: float) -> float:
        """About what FLCE saves with bf16 weights, AdamW in bf16 and checkpointing.

        Without it the peak is where the backward pass begins: weights and moments (6 bytes a weight) and three fp32
        copies of the logits. With it the peak is where that pass ends: weights, moments and gradients (8 a weight).
        """
        return max(0.0, self.logits_bytes(tokens, 12) - 2 * self.parameters)

    @property
    def begins_to_save(self) -> float:
        """The tokens of a step at which that is more than nothing."""
        return self.parameters / (6 * self.config.vocab_size)

    def factor(self, budget: int = 1) -> int:
        """How many times as many logits as hidden numbers a token has, over the `budget`, rounded up."""
        return ceil_div(self.config.vocab_size, budget * self.config.hidden_size)

    def chunk(self, tokens: int, budget: int = 1) -> int:
        """Tokens of which fused linear cross-entropy makes logits at a time, so that they take `budget` inputs' memory.

        Liger computes it inside its forward pass, where nothing can ask for it; a test compares.
        """
        return min(next_power_of_two(ceil_div(tokens, self.factor(budget))), tokens)

    def chunks(self, tokens: int, budget: int = 1) -> int:
        """The number of those chunks."""
        return ceil_div(tokens, self.chunk(tokens, budget))


MODELS = tuple(map(Shape, ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B")))


def dry_run_of(run: Record) -> RunConfig:
    """The dry run that predicts a run at its GPU's rates; of one that ran out of memory, whether it fits that card."""
    config = run.run
    if isinstance(config, OffloadConfig):
        # What changes no peak, so that runs that differ in nothing else share a prediction.
        usual = {name: getattr(OffloadConfig, name) for name in ("iterations", "warmup", "cpu_threads", "breakdown")}
        limit = config.memory_limit_gib if run.status == "oom" else None
        config = dataclasses.replace(config, **usual, memory_limit_gib=limit)
    place = DATA.relative_to(ROOT) / PREDICTIONS[run.script]
    config = dataclasses.replace(config, dry_run=True, result_dir=str(place), snapshot_dir="", log_dir="")
    if run.script == "all_gpu" and _gpu_word(run) != H100.word:
        config = dataclasses.replace(config, gpu_rates=_gpu_word(run))
    if run.status == "ok" or run.environment.gpu_memory_bytes is None:
        return config
    return dataclasses.replace(config, gpu_memory_gib=run.environment.gpu_memory_bytes / GIB)


def _gpu_word(run: Record) -> str:
    """The word of the GPU whose rates predict a run: those of an H100 where nothing is known of its own."""
    return machine.GPUS.get(run.environment.gpu, H100).word


def single_gpu_runs() -> list[Record]:
    """The measured runs of one GPU of which predictions are kept: those that can be predicted."""
    return [run for name in PREDICTED_RUNS for run in predictable(listed(DATA / name, "all_gpu"))]


def predictable(runs: Iterable[Record]) -> list[Record]:
    """Those whose peak a dry run can say; one that failed has none."""
    known = [run for run in runs if not any(t.unpredicted(run.run) for t in TECHNIQUES.values())]
    return [run for run in known if run.status != "error"]


def offloaded_runs() -> list[Record]:
    """Every measured offloaded run that has a result; one that ran out of memory has no peak to compare."""
    return [run for run in listed(DATA, "deepspeed") if run.mode == "measured" and run.status != "error"]


def predict_all() -> None:
    """Predict them anew, which takes half an hour. A user has the figures as text too; evidence is records alone."""
    from src.predict import dry_run

    # Asked once, before records that are written here make it a changed checkout.
    os.environ.setdefault("GIT_COMMIT", machine.environment(on_gpu=False)["git_commit"])
    for name, runs in (("all_gpu", single_gpu_runs()), ("deepspeed", offloaded_runs())):
        configs = list({config.run_name: config for config in map(dry_run_of, runs)}.values())
        dry_run.many(configs, grids.script(name))
        for config in configs:
            config.record_file.with_suffix(".txt").unlink()


def predictions(runs: Iterable[Record]) -> list[Pair]:
    """Each run's prediction, and the run. Raises `UsageError` if one was not predicted."""
    kept = {record.run_name: record for name in PREDICTIONS.values() for record in folder(name).records}
    pairs = []
    for run in runs:
        name = dry_run_of(run).run_name
        if name not in kept:
            raise UsageError(f"no prediction of {run.run_name}: python -m doc.build --predictions")
        pairs.append((kept[name], run))
    return pairs


def prediction(run: Record) -> Record:
    """Of one run."""
    return predictions([run])[0][0]


def made_after(runs: Iterable[Record]) -> bool:
    """Whether each prediction is younger than the measurement that it is of."""
    return all(prediction.environment.date > run.environment.date for prediction, run in predictions(runs))


def timed() -> dict[str, list[Compared]]:
    """The runs whose time is predicted, GPU by GPU: those that its rates were fitted to, those held out, later ones.

    Without those of fewer than five steps after two of warm-up: their times say less.
    """
    own = {name: predictions(filter(_is_timed, predictable(listed(DATA / name, "all_gpu")))) for name in PREDICTED_RUNS}
    groups = {}
    for gpu, fitted in FITTED_RUNS.items():
        found = [c for name, pairs in own.items() for c in fit_rates.compared(pairs, name) if _gpu_word(c.run) == gpu]
        groups |= {f"{gpu.upper()}, {name}": runs for name, runs in fit_rates.by_fit(found, fitted).items() if runs}
    return groups


def _is_timed(run: Record) -> bool:
    return run.run.warmup >= 2 and run.run.iterations >= 5


def _advised(row: Mapping[str, Any]) -> tuple[str, str, int, int]:
    """What was asked and what was advised, at which size."""
    return str(row["situation"]), row["choice"], row["config"]["batch_size"], row["config"]["seq_length"]


def named_anew(rows: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The choices of `rows` that `before` does not name, or at another size."""
    known = set(map(_advised, before))
    return [row for row in rows if _advised(row) not in known]


def put_beside(rows: Iterable[Mapping[str, Any]], runs: Iterable[Record]) -> list[tuple[Record, list[Record]]]:
    """Of each row of advice that is among `runs` its run, and all that fit of the same sizes, the fastest first."""
    fitting = sorted((run for run in runs if run.status == "ok"), key=lambda run: run.latency_s)
    named = {_name_without_limit(run.run): run for run in fitting}
    advised = [named.get(_name_without_limit(RunConfig.from_dict(row["config"]))) for row in rows]
    return [(own, [run for run in fitting if _sizes(run) == _sizes(own)]) for own in advised if own is not None]


def _name_without_limit(config: RunConfig) -> str:
    return dataclasses.replace(config, dry_run=False, memory_limit_gib=None).run_name


def _sizes(run: Record) -> tuple[str, int, int]:
    return run.run.model_name, run.run.batch_size, run.run.seq_length


def leaves_free(run: Record) -> bool:
    """Whether a run under a limit left as much of it free as advice does."""
    return run.peak_memory_bytes <= (1 - LEFT_FREE) * run.run.memory_limit_gib * GIB


def margins(beside: Iterable[tuple[Record, Sequence[Record]]]) -> list[tuple[float, float]]:
    """How much longer than each advised run the fastest other took that leaves memory free, and how much their steps
    spread. Relative to the advised run's time, the least first; less than none is faster."""
    found = []
    for own, runs in beside:
        other = next(run for run in runs if run is not own and leaves_free(run))
        spread = max(own.latency_iqr_s, other.latency_iqr_s)
        found.append((other.latency_s / own.latency_s - 1, spread / own.latency_s))
    return sorted(found)


def none_is_faster(margins: Iterable[tuple[float, float]]) -> bool:
    """Whether no other run was faster by more than steps spread."""
    return all(gap >= -spread for gap, spread in margins)


def beyond(beside: Iterable[tuple[Record, Sequence[Record]]]) -> float:
    """By how much the fastest of all that fit was faster than what is advised, at most."""
    return max(own.latency_s / runs[0].latency_s - 1 for own, runs in beside)


def over(beside: Iterable[tuple[Record, Sequence[Record]]], *, every: int, part: str = "layer") -> list[float]:
    """How many times as fast advised runs are as their kernels and FLCE with one layer in so many, or its MLP,
    checkpointed, where that fits and is another; the least first."""
    found = []
    for own, runs in beside:
        settings = {"gradient_checkpointing": True, "checkpoint_every": every, "checkpoint_part": part}
        name = dataclasses.replace(own.run, **settings).run_name
        found += [run.latency_s / own.latency_s for run in runs if run.run_name == name and run is not own]
    return sorted(found)


def said_to_fit(runs: Sequence[Record]) -> tuple[int, int]:
    """Of runs under a limit, of how many a dry run that is told it says rightly whether they fit; and how many."""
    return sum(load(dry_run_of(run).record_file).status == run.status for run in runs), len(runs)


def with_earlier_times(rows: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choices of `rows` that were not run again, each with the time that the same choice took in `before`."""
    known = {_advised(row): row["measured_s"] for row in before}
    return [{**row, "measured_s": known[_advised(row)]} for row in rows if row["status"] is None]


def off(rows: Iterable[Mapping[str, Any]], guess: str, measured: str) -> list[float]:
    """Errors of rows' predictions, relative, without signs, largest first."""
    return sorted((abs(row[guess] / row[measured] - 1) for row in rows), reverse=True)


def too_short(rows: Iterable[Mapping[str, Any]]) -> float:
    """The part of the rows of advice that took longer than was predicted."""
    return statistics.mean(row["measured_s"] > row["predicted_s"] for row in rows)


def many_tokens(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of advice whose steps have as many tokens as times are meant to be predicted closely for."""
    return [row for row in rows if row["config"]["batch_size"] * row["config"]["seq_length"] >= fit_rates.MANY_TOKENS]


def orders(rows: Iterable[Mapping[str, Any]], apart: float = 0.02) -> tuple[int, int]:
    """Of situations whose two times differ by so much: how often the faster one was named, and how often not."""
    verdicts = []
    for _, both in itertools.groupby(rows, lambda row: row["situation"]):
        fast, *slow = sorted(both, key=lambda row: row["measured_s"])
        if slow and slow[0]["measured_s"] >= (1 + apart) * fast["measured_s"]:
            verdicts.append(fast["predicted_s"] < slow[0]["predicted_s"])
    return sum(verdicts), len(verdicts) - sum(verdicts)


def apart(runs: Folder, again: Folder) -> list[float]:
    """How far the times of those of `runs` that were repeated lie from their repeats', relative, without signs."""
    first = {run.run_name: run for run in runs.records}
    pairs = [(first[run.run_name], run) for run in again.records if run.run_name in first]
    return [abs(run.latency_s / own.latency_s - 1) for own, run in pairs]


def error(prediction: Record, run: Record) -> float:
    """Of a predicted peak, relative."""
    return prediction.peak_memory_bytes / run.peak_memory_bytes - 1


def host_error(prediction: Record, run: Record) -> float | None:
    """Of a predicted peak of host memory, relative; None if it was not measured, or nothing is kept there."""
    sizes = prediction.predicted_host_bytes, run.host_peak_bytes
    return None if None in sizes else sizes[0] / sizes[1] - 1


def time_error(prediction: Record, run: Record) -> float | None:
    """Of a predicted time of a step, relative; None if there is none."""
    times = prediction.predicted_latency_s, run.latency_s
    return None if None in times else times[0] / times[1] - 1


def errors(runs: Iterable[Record], of: Callable[..., float | None] = error) -> list[float]:
    """The predictions' errors, or what else `of` says of each and its run, without signs, largest first."""
    found = [of(*pair) for pair in predictions(runs) if pair[1].status == "ok"]
    return sorted((abs(off) for off in found if off is not None), reverse=True)


def _has_floor(prediction: Record, run: Record) -> bool:
    """Whether both state a floor, of machines of the same kind: that of an H100 is predicted."""
    return None not in (prediction.predicted_floor_s, run.floor_s) and run.environment.gpu == H100.name


def floor_error(prediction: Record, run: Record) -> float | None:
    """Of a predicted floor, relative; None where there is none to compare with."""
    return prediction.predicted_floor_s / run.floor_s - 1 if _has_floor(prediction, run) else None


def floor_of_step(prediction: Record, run: Record) -> float | None:
    """The part of the measured step that a predicted floor is, None likewise."""
    return prediction.predicted_floor_s / run.latency_s if _has_floor(prediction, run) else None


def study_errors() -> tuple[list[float], list[float]]:
    """Errors, without their signs, of the study's predicted peaks: all, and those that no GPU had measured before."""
    first: dict[Any, str] = {}  # experiment -> when its peak was first measured
    for run in records_below(DATA):
        if run.mode == "measured" and run.status == "ok":
            place = _whatever_limit(run)
            first[place] = min(first.get(place, run.environment.date), run.environment.date)
    pairs = predicted_and_measured(records_below(DATA / "study"))
    blind = [(p, run) for p, run in pairs if p.environment.date < first[_whatever_limit(run)]]
    return tuple([abs(error(*pair)) for pair in own] for own in (pairs, blind))


def _whatever_limit(record: Record) -> tuple[RunConfig, answers.Cell]:
    """The experiment without its memory limit: one measured under a limit is measured."""
    config, cell, _ = answers.experiment(record)
    return dataclasses.replace(config, memory_limit_gib=None), cell


def limit_verdicts() -> tuple[list[Pair], list[Pair]]:
    """The study's runs under a memory limit, each after its prediction; and those pairs that disagree on what fits."""
    found = records_below(DATA / "study")
    predicted = {answers.experiment(r): r for r in found if r.mode == "predicted"}
    runs = [r for r in found if r.mode == "measured" and r.run.memory_limit_gib is not None]
    pairs = [(predicted[place], run) for run in runs if (place := answers.experiment(run)) in predicted]
    return pairs, [(prediction, run) for prediction, run in pairs if prediction.status != run.status]


def other_estimates(model_name: str, dtype: str) -> tuple[int, int]:
    """Bytes by accelerate's rule for Adam and DeepSpeed's for ZeRO-2, on one GPU; neither asks for batch or kernels."""
    from accelerate.commands.estimate import estimate_training_usage
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    weights = Shape(model_name).parameters
    accelerate = estimate_training_usage(weights * TORCH_DTYPES[dtype].itemsize, "float32")["step"]
    _, deepspeed = estimate_zero2_model_states_mem_needs(weights, num_gpus_per_node=1, num_nodes=1, cpu_offload=False)
    return accelerate, deepspeed
