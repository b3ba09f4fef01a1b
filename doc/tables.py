"""The documents' tables, in Markdown. Every figure in them is a record's, or follows from a model's shape."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import pandas as pd

from doc import evidence, long, studies
from doc.evidence import Pair
from doc.studies import GRID, LINES, NOT_MEASURED, Column
from src.explain.categories import CATEGORIES
from src.record import Record
from src.study import answers, fit_rates
from src.study.answers import MANY_TOKENS, absence
from src.study.fit_rates import Compared
from src.study.pareto import Choices
from src.study.tables import settings_table
from src.techniques import KERNEL_NAMES, TECHNIQUES, TITLES
from src.utils import GIB, MIB, markdown_table

CELL = ["kernels", "model", "settings", "checkpointing", "batch x seq", "GPU"]
REPEATS = "repeats, ms a step"
# Fields of a run that its cell tells in words of its own, or that its figures show.
SAID = ("model_name", "batch_size", "seq_length", "dtype", "optimizer", "memory_limit_gib", "gradient_checkpointing")
SAID += ("gradient_accumulation_steps", "iterations", "warmup")
OFFLOAD_CELL = ["preset, and what differs from it", "kernels", "batch x seq", "GPU"]


def _number(value: float) -> str:
    """Three significant digits, and thousands' commas."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def size(record: Record) -> str:
    """Sequences and tokens of a step."""
    return f"{record.run.batch_size} x {record.run.seq_length}"


def figure(record: Record | None, field: str, unit: float, form: str, absent: str = NOT_MEASURED) -> str:
    """A record's figure, or why there is none."""
    if record is None:
        return absent
    if record.status != "ok":
        return absence(record)
    value = getattr(record, field)
    return "" if value is None else form.format(value / unit)


def peak(record: Record | None, absent: str = NOT_MEASURED) -> str:
    """Peak allocated memory in GiB."""
    return figure(record, "peak_memory_bytes", GIB, "{:,.2f}", absent)


def speed(record: Record | None, absent: str = NOT_MEASURED) -> str:
    """Tokens/s."""
    return figure(record, "throughput_tokens_per_s", 1, "{:,.0f}", absent)


def step(record: Record | None, digits: int | None = None) -> str:
    """Milliseconds a step, the median and half of the interquartile range; under offload in whole ones."""
    if record is None or record.status != "ok" or record.latency_s is None:
        return figure(record, "latency_s", 1e-3, "")
    digits = digits if digits is not None else 0 if record.script == "deepspeed" else 1
    spread = "" if record.latency_iqr_s is None else f" ± {record.latency_iqr_s * 1e3 / 2:,.{digits}f}"
    return f"{record.latency_s * 1e3:,.{digits}f}{spread}"


# How a document writes a number: `{{ bytes | gib }}`.
FILTERS: dict[str, Callable[..., Any]] = {
    "gib": lambda count: f"{count / GIB:,.2f} GiB",
    "mib": lambda count: f"{count / MIB:,.0f} MiB",
    "ms": lambda seconds: f"{seconds * 1e3:,.0f} ms",
    "tokens": lambda rate: f"{rate:,.0f} tokens/s",
    "percent": lambda share: f"{share:.0%}",
    "percent1": lambda share: f"{share:.1%}",
    "percent3": lambda share: f"{share:.3%}",
    "gb_per_s": lambda rate: f"{rate / 1e9:,.0f} GB/s",
    "times": _number,
    "count": lambda number: f"{number:,.0f}",
    "words": lambda name: name.replace("_", " "),
    "gpu": answers.gpu_name,
    "over_floor": lambda run: run.latency_s / run.floor_s,
    **{function.__name__: function for function in (size, peak, step, speed)},
}


def templates() -> jinja2.Environment:
    """The texts of doc/source. A name that does not exist is an error."""
    loader = jinja2.FileSystemLoader(evidence.SOURCE)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, lstrip_blocks=True)
    environment.filters |= FILTERS
    return environment


def _cell(record: Record) -> list[str]:
    """What tells a run on one GPU apart from the others in a table."""
    config = record.run
    model = config.model_name.removeprefix("meta-llama/").removesuffix("-Instruct")
    settings = [config.dtype, *([] if config.optimizer == "adamw_fused" else [config.optimizer])]
    settings += [] if config.memory_limit_gib is None else [f"limit {config.memory_limit_gib:g} GiB"]
    micro_batches = config.gradient_accumulation_steps
    settings += [] if micro_batches == 1 else [f"{micro_batches} micro-batches"]
    settings += config.unusual(*SAID, *(t.name for t in TECHNIQUES.values() if t.compared))
    checkpointing = "yes" if config.gradient_checkpointing else "no"
    return [record.title, model, ", ".join(settings), checkpointing, size(record), answers.gpu_name(record)]


def _offload_cell(record: Record, *has_column: str) -> list[str]:
    """The same of an offloaded run: the preset and every setting that differs from it and has no column."""
    unusual = record.run.unusual("preset", "batch_size", "seq_length", *has_column)
    settings = ", ".join([record.run.preset, *unusual, *answers.thread_variables(record)])
    return [settings, record.title, size(record), answers.gpu_name(record)]


def machine_list(runs: Sequence[Record]) -> str:
    """An item for each machine and set of versions that the runs were measured with."""
    names = ["gpu", "driver", "cuda", "torch", "triton", "transformers", "liger_kernel", "python"]
    if any(run.script == "deepspeed" for run in runs):
        names += ["deepspeed", "cpu", "cpu_count"]
    found = pd.DataFrame(
        [r.environment.model_dump(include=set(names)) for r in runs if r.mode == "measured"], dtype=object
    )
    rows = found[names].drop_duplicates().values.tolist()
    return "\n".join(sorted(f"- {', '.join(f'{name} {value}' for name, value in zip(names, row))}" for row in rows))


def measured(runs: Sequence[Record], found: Sequence[Record] = ()) -> str:
    """Peak, time, throughput and MFU of each run, and how far its repeats among all that was `found` lie apart."""
    rows, times = [], answers.step_times(found or runs)
    for run in runs:
        figures = [step(run, 1), speed(run), figure(run, "mfu", 1, "{:.1%}"), answers.repeats(run, times)]
        rows.append([*_cell(run), peak(run), *(figures if run.status == "ok" else [""] * 4)])
    return markdown_table([*CELL, "peak GiB", "ms a step (median ± IQR/2)", "tokens/s", "MFU", REPEATS], rows)


def side_by_side(sizes: Mapping[str, tuple[Any, Choices]]) -> str:
    """Everything that was turned on, at several sizes."""
    header, *rows = settings_table({name: own for name, (_, own) in sizes.items()})
    return markdown_table(header, rows)


def savings_of(pairs: Mapping[str, Pair], brief: bool = False) -> str:
    """What all kernels change in the peak and in the speed, pair by pair; `brief` without the figures themselves."""
    header = ["trained", "none, GiB", "all, GiB", "memory", "none, tokens/s", "all, tokens/s", "speed"]
    rows = []
    for words, (none, every) in pairs.items():
        memory = every.peak_memory_bytes / none.peak_memory_bytes - 1
        faster = every.throughput_tokens_per_s / none.throughput_tokens_per_s - 1
        rows.append([words, peak(none), peak(every), f"{memory:+.0%}", speed(none), speed(every), f"{faster:+.0%}"])
    return markdown_table(*([header[::3], [row[::3] for row in rows]] if brief else [header, rows]))


def headline() -> str:
    """What the first page says: the peak, the speeds of all runs, and how exact the gradients are."""
    rows = []
    for words, point in evidence.headline()[1].items():
        ends = sorted({point.speeds[0], point.speeds[-1]})
        speeds = f"{' to '.join(f'{rate:,.0f}' for rate in ends)} ({len(point.speeds)})"
        ratio = "not measured" if point.record.parity is None else f"{point.record.parity.ratio:.2f}"
        rows.append([words, f"{point.gib:.2f}", speeds, ratio])
    header = ["turned on", "peak GiB", "tokens/s, slowest to fastest (runs)", "gradient error / Hugging Face's"]
    return markdown_table(header, rows)


def _peaks(prediction: Record, run: Record) -> list[str]:
    """Measured and predicted peak, and the error; of a run that ran out of memory whether it was foreseen."""
    if run.status != "ok":
        return ["OOM", "fits" if prediction.status == "ok" else "OOM", ""]
    peaks = [f"{record.peak_memory_bytes / GIB:,.3f}" for record in (run, prediction)]
    return [*peaks, f"{evidence.error(prediction, run):+.3%}"]


PEAKS = ("measured GiB", "predicted GiB", "error")


def predicted(pairs: Sequence[Pair], *, others: bool = True) -> str:
    """Measured and predicted peak, the error, and what two other estimators say, which know of plain training alone."""
    rows = []
    for prediction, run in pairs:
        estimates = evidence.other_estimates(run.run.model_name, run.run.dtype) if others else ()
        rows.append([*_cell(run), *_peaks(prediction, run), *(f"{count / GIB:,.2f}" for count in estimates)])
    return markdown_table([*CELL, *PEAKS, *(("accelerate", "DeepSpeed") if others else ())], rows)


def accuracy(groups: Mapping[str, Sequence[Compared]]) -> str:
    """How far predicted times are off, group by group."""
    return markdown_table(fit_rates.HEADER, fit_rates.accuracy(groups))


def step_times(found: Sequence[Compared]) -> str:
    """Measured and predicted time of each run, the error, and what bounds the step."""
    rows = []
    for own in sorted(found, key=lambda c: evidence.table_order(c.run)):
        times = [f"{seconds * 1e3:,.1f}" for seconds in (own.run.latency_s, own.predicted.seconds)]
        rows.append([*_cell(own.run), *times, f"{own.error:+.1%}", own.predicted.bound])
    return markdown_table([*CELL, "measured ms", "predicted ms", "error", "bound by"], rows)


def advised(rows: Sequence[Mapping[str, Any]]) -> str:
    """Advice, and what its choices showed when they were run: peak, time, and how far each was predicted off."""
    header = ("wanted", "model", "batch x seq", "limit GiB", "choice", "peak GiB", "off", "ms a step", "off", "")
    shown = []
    for row in rows:
        config, own = row["config"], row["situation"]
        peak, time, guess = row["measured_peak_bytes"], row["measured_s"], row["predicted_s"]
        figures = ["", ""] if peak is None else [f"{peak / GIB:.2f}", f"{row['predicted_peak_bytes'] / peak - 1:+.3%}"]
        figures += (
            ["", ""] if time is None else [f"{time * 1e3:,.1f}", f"{guess / time - 1:+.1%}" if guess else "not known"]
        )
        limit = "all" if own["gpu_memory_gib"] is None else f"{row['limit_bytes'] / GIB:.2f}"
        sizes = f"{config['batch_size']} x {config['seq_length']}"
        status = {"ok": "", None: "not measured", "oom": "out of memory", "error": "failed"}[row["status"]]
        model = config["model_name"].rpartition("/")[2]
        shown.append([f"{own['goal']}, {row['rank']}", model, sizes, limit, row["choice"], *figures, status])
    return markdown_table(header, shown)


def beside_advice(found: Sequence[tuple[Record, Sequence[Record]]], count: int = 5) -> str:
    """Each advised run, and the fastest of what was measured in the same memory."""
    header = ("model", "batch x seq", "limit GiB", "turned on", "peak GiB", "ms a step", "tokens/s", "")
    rows = []
    for own, runs in found:
        for run in (run for place, run in enumerate(runs) if place < count or run is own):
            note = "advised" if run is own else "" if evidence.leaves_free(run) else "beyond what advice leaves free"
            model, limit = run.run.model_name.rpartition("/")[2], f"{run.run.memory_limit_gib:g}"
            rows.append([model, size(run), limit, run.title, peak(run), step(run), speed(run), note])
    return markdown_table(header, rows)


def _host(prediction: Record, run: Record) -> list[str]:
    """Measured and predicted peak of host memory, and the error; empty where there is none."""
    sizes, off = (run.host_peak_bytes, prediction.predicted_host_bytes), evidence.host_error(prediction, run)
    return [*(f"{count / GIB:,.2f}" if count else "" for count in sizes), "" if off is None else f"{off:+.1%}"]


HOST = tuple(f"host {name}" for name in PEAKS)


def predicted_offload(pairs: Sequence[Pair]) -> str:
    """The same of offloaded runs, and of the host, whose error is missing where it was not measured."""
    rows = []
    for prediction, run in pairs:
        told = [*_cell(run), run.run.preset, str(run.processes)]
        rows.append([*told, *_peaks(prediction, run), *_host(prediction, run)])
    return markdown_table([*CELL, "preset", "GPUs", *PEAKS, *HOST], rows)


def long_sequences(pairs: Sequence[Pair]) -> str:
    """Runs of long sequences: memory of GPU and host, predicted and measured, and what a step took."""
    said = ("model_name", "batch_size", "seq_length", "memory_limit_gib", "host_memory_gib", "iterations", "warmup")
    rows = []
    for prediction, run in pairs:
        settings = run.run.unusual(*said, "preset", *KERNEL_NAMES)
        told = [answers.short_model(run.run).removesuffix("-Instruct"), f"{run.run.seq_length:,}"]
        told.append(", ".join([long.setting_of(run), *settings]))
        steps = f"{len(run.step_seconds)} after {run.run.warmup}" if run.step_seconds else ""
        times = [figure(run, "latency_s", 1, "{:,.2f}"), speed(run), steps] if run.status == "ok" else [""] * 3
        rows.append([*told, *_peaks(prediction, run), *_host(prediction, run), *times])
    header = ["model", "tokens", "turned on", *PEAKS, *HOST, "s a step", "tokens/s", "timed steps, after warm-up"]
    return markdown_table(header, rows)


def long_changed(found: Sequence[Record]) -> str:
    """Predicted: what `LONGEST` needs whole, and with a part of it changed."""
    rows = []
    for run in found:
        changed = ", ".join(long.changes(run)) or "nothing"
        host = figure(run, "predicted_host_bytes", GIB, "{:,.2f}")
        rows.append([changed, peak(run), host, figure(run, "predicted_latency_s", 1, "{:,.0f}")])
    return markdown_table(["changed", "peak GiB", "host GiB", "s a step"], rows)


def attention_alone(lines: Sequence[Mapping[str, Any]]) -> str:
    """Forward and backward pass of one layer's attention, by the library that was asked for."""
    rows = []
    for own in sorted(lines, key=lambda own: own["tokens"]):
        library = own["asked"].removeprefix("SDPBackend.").removesuffix("_ATTENTION")
        sizes = [f"{own[name] / GIB:,.3f}" for name in ("backward_workspace", "model_cudnn_workspace")]
        rows.append([f"{own['tokens']:,}", library, f"{own['forward_s']:,.3f}", f"{own['backward_s']:,.3f}", *sizes])
    return markdown_table(["tokens", "library", "forward s", "backward s", "workspace GiB", "estimated GiB"], rows)


def offload(runs: Sequence[Record]) -> str:
    """Peak and speed of each offloaded run, what bounds it, and the host memory it took."""
    rows, spread = [], answers.step_times(runs)
    for run in runs:
        figures = [""] * 6
        if run.status == "ok":
            times = "" if run.floor_s is None else f"{run.latency_s / run.floor_s:.1f}"
            floor = figure(run, "floor_s", 1e-3, "{:,.0f}")
            figures = [step(run), speed(run), floor, times, figure(run, "host_peak_bytes", GIB, "{:,.1f}")]
            figures.append(answers.repeats(run, spread))
        rows.append([*_offload_cell(run), peak(run), *figures])
    speeds = ["ms a step (median ± IQR/2)", "tokens/s", "floor ms", "times the floor", "host GiB", REPEATS]
    return markdown_table([*OFFLOAD_CELL, "peak GiB", *speeds], rows)


def scaling(runs: Sequence[Record]) -> str:
    """Each experiment that ran on several GPUs: peak of the fullest, tokens/s of all, and what part of n times one's.

    Compares runs on the same kind of GPU that differ in their number and in nothing else. Empty if there is none.
    """
    runs = [answers.without_its_limit(run) or run for run in sorted(runs, key=lambda run: run.environment.date)]
    alone = [dataclasses.replace(r.run, world_size=1).run_name for r in runs]
    keys = [(name, r.environment.gpu, *answers.thread_variables(r)) for name, r in zip(alone, runs)]
    found = pd.DataFrame({"key": keys, "count": [r.processes for r in runs], "record": runs})
    found = found.drop_duplicates(["key", "count"], keep="last")  # of two alike, the later
    several = [dict(zip(own["count"], own["record"])) for _, own in found.groupby("key") if own["count"].max() > 1]
    counts = sorted({1}.union(*several))
    rows = [_scaling_row(own, counts) for own in sorted(several, key=lambda o: evidence.table_order(o[min(o)]))]
    columns = [("peak GiB", counts), ("tokens/s", counts), ("efficiency", counts[1:])]
    of_counts = [f"{what}, {n} GPU{'s' * (n > 1)}" for what, numbers in columns for n in numbers]
    header = [name.replace("batch", "batch per GPU") for name in OFFLOAD_CELL]
    return markdown_table([*header, *of_counts], rows) if rows else ""


def _scaling_row(own: dict[int, Record], counts: Sequence[int]) -> list[str]:
    rates = {n: run.throughput_tokens_per_s for n, run in own.items() if run.status == "ok"}
    efficiencies = [_efficiency(own[n], own[1]) if {1, n} <= rates.keys() else "" for n in counts[1:]]
    figures = [peak(own.get(n), absent="") for n in counts], [f"{rates[n]:,.0f}" if n in rates else "" for n in counts]
    return [*_offload_cell(own[min(own)], "world_size"), *itertools.chain(*figures), *efficiencies]


def _efficiency(several: Record, one: Record) -> str:
    """With a star if each of several ranks had threads for all cores, as before they shared them."""
    return f"{evidence.efficiency(several, one):.0%}{'' if 'OMP_NUM_THREADS' in several.environment.omp else '*'}"


def levers(runs: Sequence[Record]) -> str:
    """A row for each lever."""
    rows = []
    for lever, run in evidence.tried(runs):
        flags = " ".join(filter(None, (lever["variables"], lever["flags"])))
        told = [lever["what"], f"`{flags}`" if flags else "none", lever["predicted"]]
        rows.append([*told, step(run), peak(run, absent=""), lever["verdict"]])
    header = ["lever", "flags", "predicted", "measured ms a step (median ± IQR/2)", "peak GiB", "verdict"]
    return markdown_table(header, rows, "lllrrr")


def peak_changes(none: Record, every: Record) -> str:
    """What the peaks without any and with all kernels are made of, and what the kernels took away, largest first."""
    parts = pd.DataFrame({"none": none.peak_breakdown, "all": every.peak_breakdown})
    parts = parts.reindex(CATEGORIES).loc[lambda p: (p != 0).any(axis=1)]
    parts = parts.assign(change=parts["all"] - parts["none"]).sort_values("change", kind="stable")
    parts.loc["peak"] = parts.sum()
    rows = []
    for name, row in parts.iterrows():
        numbers = [f"{row['none'] / MIB:,.1f}", f"{row['all'] / MIB:,.1f}", f"{row['change'] / MIB:+,.1f}"]
        rows.append([name.replace("_", " "), *numbers])
    return markdown_table(["at the peak", *(f"{r.run.title}, MiB" for r in (none, every)), "difference"], rows)


def grid(columns: Sequence[Column], field: str, unit: float, form: str) -> str:
    """A figure of every cell of the original's grids."""
    rows = []
    for cell in GRID:
        figures = [figure(c.cells.get(cell), field, unit, form, c.absent) for c in columns]
        rows.append([cell.strategy, f"{cell.batch_size} x {cell.seq_length}", *figures])
    return markdown_table(["kernels", "batch x seq", *(column.title for column in columns)], rows)


def memory_ends(columns: Sequence[Column]) -> str:
    """What ran along each grid, and the smallest that did not."""
    places = [(name, line) for line in LINES for name in TITLES.values()]
    rows = [[name, line.what, *(str(c.reach(name, line)) for c in columns)] for name, line in places]
    return markdown_table(["kernels", "what", *(column.title for column in columns)], rows)


def savings(columns: Sequence[Column]) -> str:
    """What all kernels save in each cell, and FLCE's share of it."""
    found = pd.concat({column.title: column.savings() for column in columns}, names=["whose"])
    rows = []
    for place in dict.fromkeys(cell[1:] for cell in GRID):
        own = found[found.index.droplevel("whose") == place]
        for (title, *_), saving in own.iterrows():
            part = NOT_MEASURED if pd.isna(saving["flce"]) else f"{saving['flce']:.1%}"
            rows.append([f"{place[0]} x {place[1]}", title, f"{saving['peak']:.2f}", part, f"{saving['speed']:.2f}"])
    header = ["batch x seq", "whose", "peak, none / all", "FLCE's share of the saving", "tokens/s, all / none"]
    return markdown_table(header, rows)


def best(runs: Sequence[Record], budget: int) -> str:
    """The largest sizes and the fastest one that fit a budget, of each setting and GPU, and what was predicted."""
    found, predictions = studies.grid_runs(runs), studies.searched(runs)
    rows = []
    for setting in studies.SETTINGS:
        gpus = sorted(set(found[found["setting"] == setting]["gpu"])) or [""]
        for gpu, kernels in itertools.product(gpus, TITLES.values()):
            own = found[(found["setting"] == setting) & (found["gpu"] == gpu) & (found["kernels"] == kernels)]
            expected = [predictions.get((setting, kernels, line.field, budget)) for line in LINES]
            if gpu and own.empty and set(expected) == {None}:
                continue
            told = ["not predicted" if number is None else f"{number:,}" if number else "none" for number in expected]
            sizes = [str(studies.largest(own, line, budget)) for line in LINES]
            rows.append([setting, kernels, gpu, *sizes, _fastest(own, budget), *told])
    header = ["settings", "kernels", "GPU", *(line.what for line in LINES), "fastest that fits, tokens/s"]
    return markdown_table([*header, *(f"predicted: {line.what}" for line in LINES)], rows)


def _fastest(own: pd.DataFrame, budget: int) -> str:
    row = studies.fastest(own, budget)
    if row is not None:
        return f"{speed(row['record'])} at {size(row['record'])}"
    return "none fits" if any(studies.excess(r, budget) for r in own["record"]) else NOT_MEASURED


def by_size(runs: Sequence[Record], field: str) -> str:
    """Peak and throughput of the three strategies for each batch size or sequence length among `runs`."""
    rows = [(getattr(r.run, field), r.run.title, r) for r in runs if r.run.title in TITLES.values()]
    wide = pd.DataFrame(rows, columns=["size", "kernels", "record"]).pivot(
        index="size", columns="kernels", values="record"
    )
    wide = wide.reindex(columns=list(TITLES.values())).astype(object).where(wide.notna(), None)
    names = ("none", "w/o FLCE", "all")
    header = [field.split("_")[0], *(f"{name}, GiB" for name in names), *(f"{name}, tokens/s" for name in names)]
    return markdown_table(
        header, [[f"{number:,}", *map(peak, own), *map(speed, own)] for number, *own in wide.itertuples()]
    )


def composition(runs: dict[str, Record]) -> str:
    """What the peaks of `runs` are made of, in MiB; parts below a hundredth of every peak are added up."""
    parts = pd.DataFrame({name: run.peak_breakdown for name, run in runs.items()}).reindex(CATEGORIES)
    is_large = (parts >= 0.01 * parts.sum()).any(axis=1)
    shown = pd.concat([parts[is_large], parts[~is_large].sum().to_frame("all else").T])
    rows = [[name.replace("_", " "), *(f"{count / MIB:,.0f}" for count in row)] for name, *row in shown.itertuples()]
    rows += [["**peak**", *(f"**{count / MIB:,.0f}**" for count in parts.sum())]]
    rows += [["phase", *(run.peak_phase for run in runs.values())]]
    return markdown_table(["at the peak, MiB", *runs], rows)


def repeats(found: pd.DataFrame) -> str:
    """How far peaks and step times of cells measured twice lie apart, for many tokens a step and for few."""
    rows = []
    for title, own in found.groupby("settings", sort=False):
        times = own["step"].groupby(own["tokens"] < MANY_TOKENS).agg(["min", "max"]).reindex([False, True])
        ranges = [NOT_MEASURED if pd.isna(low) else f"{low:+.0%} to {high:+.0%}" for low, high in times.values]
        rows.append([title, str(len(own)), f"{own['peak'].abs().max():.2%}", *ranges])
    times = f"step time, {MANY_TOKENS:,} tokens or more", "step time, fewer"
    return markdown_table(["settings", "cells", "peak, largest difference", *times], rows)


def frontiers(found: Sequence[Column]) -> str:
    """Where memory ends for each strategy, with all memory and under a limit."""
    by_config = {column.config: column for column in found}
    limits = [None, *sorted({config.memory_limit_gib for config in by_config} - {None})]
    rows = []
    for column in (column for column in found if not column.is_limited):
        under = [by_config.get(dataclasses.replace(column.config, memory_limit_gib=limit)) for limit in limits]
        for kernels in TITLES.values():
            ends = [str(own.reach(kernels, line)) if own else NOT_MEASURED for own in under for line in LINES]
            rows.append([studies.short(column.config), kernels, *ends])
    memory = ("all memory" if limit is None else f"{limit:g} GiB" for limit in limits)
    return markdown_table(["settings", "kernels", *(f"{how}: {line.what}" for how in memory for line in LINES)], rows)


def machines(runs: Sequence[Record]) -> str:
    """A column for each GPU: the machine and the versions that its runs were measured with."""
    names = ["gpu_memory_bytes", "cpu", "cpu_count", "driver", "cuda", "python"]
    names += ["torch", "triton", "transformers", "liger_kernel", "deepspeed"]
    found = pd.DataFrame([run.environment.model_dump(include={"gpu", *names}) for run in runs], dtype=object)
    sizes = found["gpu_memory_bytes"]
    found["gpu_memory_bytes"] = [None if count is None else f"{count / GIB:,.1f} GiB" for count in sizes]
    told = found.groupby("gpu").agg(
        lambda column: ", ".join(map(str, sorted(column.dropna().unique()))) or "not recorded"
    )
    rows = [[name.removesuffix("_bytes").replace("_", " "), *told[name]] for name in names]
    return markdown_table(["measured on", *told.index], rows)
