"""The report's tables: narrow enough for a page. doc/tables.py has the full ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from src.figures import absence
from src.tables import markdown

from doc.levers import LEVERS
from doc.original import LINES, NOT_MEASURED, Column, bracket, frontier
from doc.tables import milliseconds
from src.config import MAX_TOKENS, STRATEGIES, config_of
from src.study import Cell, Record
from src.utils import GIB, MIB

MANY_TOKENS = 16 * 1024  # a step of so many is bound by the GPU


def _cell(record: Record | None, key: str, unit: float, form: str) -> str:
    """A record's figure, or why there is none."""
    if record is None:
        return NOT_MEASURED
    return form.format(record[key] / unit) if record["status"] == "ok" else absence(record)


def peak(record: Record | None) -> str:
    """Peak allocated memory in GiB."""
    return _cell(record, "peak_memory_bytes", GIB, "{:,.2f}")


def speed(record: Record | None) -> str:
    """Tokens/s."""
    return _cell(record, "throughput_tokens_per_s", 1, "{:,.0f}")


def step(record: Record | None) -> str:
    """Milliseconds a step, the median and half of the interquartile range."""
    if record is None or record["status"] != "ok":
        return _cell(record, "latency_s", 1e-3, "")
    return milliseconds(record, 0 if record["script"] == "deepspeed" else 1)


def by_size(runs: Sequence[Record], field: str) -> str:
    """Peak and throughput of the three strategies for each batch size or sequence length among `runs`."""
    cells = {(config_of(r).strategy, r["config"][field]): r for r in runs}
    sizes = sorted({size for strategy, size in cells if strategy in STRATEGIES.values()})
    rows = []
    for size in sizes:
        three = [cells.get((strategy, size)) for strategy in STRATEGIES.values()]
        rows.append([f"{size:,}", *map(peak, three), *map(speed, three)])
    names = ("none", "w/o FLCE", "all")
    header = [field.split("_")[0], *(f"{name}, GiB" for name in names), *(f"{name}, tokens/s" for name in names)]
    return markdown(header, rows)


def alone(runs: Sequence[Record]) -> str:
    """Each strategy's peak and step, and its difference from the first run's."""
    first = runs[0]
    rows = []
    for run in runs:
        saved = (run["peak_memory_bytes"] - first["peak_memory_bytes"]) / GIB
        faster = run["latency_s"] / first["latency_s"] - 1
        differences = ["", ""] if run is first else [f"{saved:+,.2f}", f"{faster:+.0%}"]
        rows.append([config_of(run).strategy.title, peak(run), differences[0], step(run), differences[1]])
    return markdown(["kernels", "peak GiB", "change", "ms a step", "change"], rows)


def side_by_side(pairs: Sequence[tuple[Record | None, Record | None]]) -> str:
    """Peak and step of runs without and with all Liger kernels."""
    rows = []
    for without, with_all in pairs:
        config = config_of(without or with_all)
        model = config.model_name.rsplit("/")[-1].removesuffix("-Instruct")
        cell = f"{model}, {config.dtype}, {config.batch_size} x {config.seq_length}"
        rows.append([cell, peak(without), peak(with_all), step(without), step(with_all)])
    return markdown(["model, batch x seq", "none, GiB", "all, GiB", "none, ms", "all, ms"], rows)


def ladder(steps: Sequence[tuple[str, Record | None]]) -> str:
    """Peak, step and throughput of runs, each in words."""
    rows = [[words, peak(record), step(record), speed(record)] for words, record in steps]
    return markdown(["turned on", "peak GiB", "ms a step", "tokens/s"], rows)


def composition(runs: dict[str, Record]) -> str:
    """What the peaks of `runs` are made of, in MiB; parts below a hundredth of every peak are added up."""
    parts = [run["peak_breakdown"] for run in runs.values()]
    totals = [sum(part.values()) for part in parts]
    large = [name for name in parts[0] if any(p[name] >= 0.01 * total for p, total in zip(parts, totals))]
    rows = [[name.replace("_", " "), *(f"{part[name] / MIB:,.0f}" for part in parts)] for name in large]
    rest = [total - sum(part[name] for name in large) for part, total in zip(parts, totals)]
    rows += [["all else", *(f"{count / MIB:,.0f}" for count in rest)]]
    rows += [["**peak**", *(f"**{total / MIB:,.0f}**" for total in totals)]]
    rows += [["phase", *(run["peak_phase"] for run in runs.values())]]
    return markdown(["at the peak, MiB", *runs], rows)


def presets(pairs: Sequence[tuple[Record | None, Record | None]]) -> str:
    """Runs under the presets seed and fast side by side."""
    rows = []
    for seed, fast in pairs:
        config = config_of(seed or fast)
        both = seed is not None and fast is not None and seed["status"] == fast["status"] == "ok"
        faster = f"{seed['latency_s'] / fast['latency_s']:.1f}" if both else ""
        floor = _cell(fast, "floor_s", 1e-3, "{:,.0f}")
        sizes = f"{config.strategy.title}, {config.batch_size} x {config.seq_length}"
        rows.append([sizes, step(seed), step(fast), faster, floor, peak(seed), peak(fast)])
    return markdown(
        ["kernels, batch x seq", "seed, ms", "fast, ms", "times faster", "floor, ms", "seed, GiB", "fast, GiB"], rows
    )


def levers(runs: Sequence[Record]) -> str:
    """What was tried with an offloaded step, in the order of trial."""
    found = {run["run_name"]: run for run in runs if not run["environment"].get("omp")}
    rows = [
        [lever.what, step(found[lever.run_name]), peak(found[lever.run_name])]
        for lever in LEVERS
        if lever.run_name in found and not lever.variables
    ]
    return markdown(["what was changed", "ms a step", "peak GiB"], rows)


def originals(cells: Sequence[tuple[Cell, Record, Record]]) -> str:
    """Peaks the original study published beside ours under its settings."""
    rows = [
        [
            f"{cell.strategy}, {cell.batch_size} x {cell.seq_length}",
            peak(theirs),
            peak(ours),
            f"{ours['peak_memory_bytes'] / theirs['peak_memory_bytes'] - 1:+.0%}",
        ]
        for cell, theirs, ours in cells
    ]
    return markdown(["kernels, batch x seq", "original, GiB", "ours, GiB", "difference"], rows)


def repeats(found: Sequence[Any]) -> str:
    """How far peaks and step times of cells measured twice lie apart, for many tokens a step and for few."""
    rows = []
    for repeat in found:
        few, many = (repeat.changes(tokens) for tokens in (range(MANY_TOKENS), range(MANY_TOKENS, MAX_TOKENS)))
        rows.append([repeat.title, str(len(repeat.pairs)), f"{repeat.peak_difference:.2%}", _range(many), _range(few)])
    times = f"step time, {MANY_TOKENS:,} tokens or more", "step time, fewer"
    return markdown(["settings", "cells", "peak, largest difference", *times], rows)


def _range(changes: Sequence[float]) -> str:
    return f"{min(changes):+.0%} to {max(changes):+.0%}" if changes else NOT_MEASURED


def frontiers(found: Sequence[Any]) -> str:
    """Where memory ends for each strategy, with all memory and under a limit."""
    by_config = {part.setting.config: part for part in found}
    limits = sorted({config.memory_limit_gib for config in by_config} - {None})
    rows = []
    for config, part in by_config.items():
        if part.is_limited:
            continue
        for strategy in STRATEGIES:
            cells = []
            for limit in (None, *limits):
                limited = by_config.get(dataclasses.replace(config, memory_limit_gib=limit))
                column = limited.column if limited else Column("", {})
                cells += [bracket(*frontier(column, strategy, line)) for line in LINES]
            rows.append([part.short_title, strategy, *cells])
    memory = ("all memory", *(f"{limit:g} GiB" for limit in limits))
    return markdown(["settings", "kernels", *(f"{how}: {line.what}" for how in memory for line in LINES)], rows)


def states(shapes: Sequence[Any]) -> str:
    """What training holds between steps in a 16-bit type with Adam: weights, gradients, two moments."""
    rows = [
        [
            shape.short_name,
            f"{shape.parameters / 1e9:.2f}",
            *(f"{shape.parameters * width / GIB:,.1f}" for width in (2, 2, 4, 8)),
        ]
        for shape in shapes
    ]
    return markdown(
        ["model", "weights, billions", "weights, GiB", "gradients, GiB", "Adam, GiB", "together, GiB"], rows
    )


def logits(shape: Any, runs: Sequence[Record]) -> str:
    """What the loss holds at each batch size, and its share of the measured peak."""
    rows = []
    for run in runs:
        config = config_of(run)
        tokens = config.tokens_per_step
        loss = 3 * shape.logits_bytes(tokens, 4)
        rows.append(
            [
                f"{config.batch_size} x {config.seq_length}",
                f"{shape.logits_bytes(tokens, 2) / GIB:,.2f}",
                f"{loss / GIB:,.2f}",
                peak(run),
                f"{loss / run['peak_memory_bytes']:.0%}",
            ]
        )
    return markdown(
        ["batch x seq", "bf16 logits, GiB", "three fp32 copies, GiB", "measured peak, GiB", "share of it"], rows
    )


def chunks(shapes: Sequence[Any], tokens: int) -> str:
    """How fused linear cross-entropy divides `tokens` tokens for each model."""
    rows = [
        [
            shape.short_name,
            f"{shape.config.vocab_size:,}",
            f"{shape.config.hidden_size:,}",
            f"{shape.chunk(tokens):,}",
            f"{shape.chunks(tokens):,}",
            f"{shape.logits_bytes(shape.chunk(tokens), 2) / MIB:,.0f}",
            f"{shape.logits_bytes(tokens, 2) / MIB:,.0f}",
            f"{shape.head_bytes / MIB:,.0f}",
        ]
        for shape in shapes
    ]
    header = ["model", "V", "H", "tokens a chunk", "chunks", "logits of one, MiB", "of all, MiB", "V x H gradient, MiB"]
    return markdown(header, rows)


def machines(runs: Sequence[Record]) -> str:
    """A column for each GPU: the machine and the versions that its runs were measured with."""
    gpus = sorted({run["environment"]["gpu"] for run in runs})
    names = ["gpu_memory_bytes", "cpu", "cpu_count", "driver", "cuda", "python"]
    names += ["torch", "triton", "transformers", "liger_kernel", "deepspeed"]
    rows = []
    for name in names:
        cells = []
        for gpu in gpus:
            values = {run["environment"].get(name) for run in runs if run["environment"]["gpu"] == gpu} - {None}
            words = [f"{v / GIB:,.1f} GiB" if name == "gpu_memory_bytes" else str(v) for v in sorted(values)]
            cells.append(", ".join(words) or "not recorded")
        rows.append([name.removesuffix("_bytes").replace("_", " "), *cells])
    return markdown(["measured on", *gpus], rows)


def errors(found: Sequence[Any]) -> dict[str, float]:
    """The largest and the second largest of the predictions' absolute errors, and their number."""
    sizes = sorted(abs(p.error) for p in found)
    return {"largest": sizes[-1], "next": sizes[-2], "count": len(sizes)}
