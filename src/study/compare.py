"""Compares two records: what differs in settings and machine, what came of it, and what cannot be compared.

    python -m src.study compare results/A.json results/B.json

Any two will do, measured or predicted, of either script. Repeats of the two, if the folders that they are in have any,
show how far runs of one experiment lie apart. Exit status 2: a file is no record.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from src import program
from src.config import RunConfig
from src.explain.report import waterfall_table
from src.record import WRONG, Record, load
from src.record.report import origin
from src.study import answers
from src.techniques import KERNEL_NAMES
from src.utils import ExitStatus, UsageError, aligned_table, format_bytes, printable

MACHINE = ("driver", "cuda", "cpu", "cpu_count", "python", "torch", "triton", "transformers", "liger_kernel")
MACHINE += ("deepspeed", "git_commit", "omp")

# Name -> value, and how it is written.
FIGURES: dict[str, tuple[Callable[[Record], float | None], Callable[[float], str]]] = {
    "peak memory allocated": (lambda r: r.peak_memory_bytes, format_bytes),
    "peak memory reserved": (lambda r: r.peak_reserved_bytes, format_bytes),
    "memory used on the card": (lambda r: r.device_used_bytes, format_bytes),
    "host memory peak": (lambda r: r.host_peak_bytes, format_bytes),
    "step, median": (lambda r: r.latency_s, lambda seconds: f"{seconds * 1e3:,.2f} ms"),
    "step, predicted": (lambda r: r.predicted_latency_s, lambda seconds: f"{seconds * 1e3:,.1f} ms"),
    "step, IQR within the run": (lambda r: r.latency_iqr_s, lambda seconds: f"{seconds * 1e3:,.2f} ms"),
    "throughput": (lambda r: r.throughput_tokens_per_s, lambda rate: f"{rate:,.0f} tokens/s"),
    "MFU": (lambda r: r.mfu, lambda share: f"{share:.1%}"),
    "floor": (lambda r: r.floor_s, lambda seconds: f"{seconds * 1e3:,.2f} ms"),
    "floor, predicted": (lambda r: r.predicted_floor_s, lambda seconds: f"{seconds * 1e3:,.1f} ms"),
    "last loss": (lambda r: r.loss, lambda loss: f"{loss:.4f}"),
    "gradient error": (lambda r: r.parity and r.parity.run.gradient, lambda error: f"{error:.3%}"),
    "over Hugging Face's": (lambda r: r.parity and r.parity.ratio, lambda ratio: f"{ratio:.2f}"),
}


def main(words: Sequence[str]) -> int:
    """Print the comparison that a command line asks for; returns the exit status."""
    parser = program.Parser(
        prog="python -m src.study compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    arguments = parser.parse_args(words)
    files = (arguments.a, arguments.b)
    print(comparison(*map(load, files), files, repeats_beside(files)))
    return ExitStatus.DONE


def repeats_beside(files: Sequence[Path]) -> list[Record]:
    """The records in the folders of `files` with the same file names: runs of the same settings."""
    found = []
    for path in dict.fromkeys(folder / file.name for folder in {f.parent for f in files} for file in files):
        try:
            found.append(load(path))
        except UsageError:  # there is none
            continue
    return found


def comparison(a: Record, b: Record, names: Sequence[object], others: Sequence[Record] = ()) -> str:
    """Two records side by side; `names` say which they are, `others` may have repeats of them."""
    pair = (a, b)
    head = [(label, f"{name}", f"{origin(r)}, {r.environment.date[:10]}") for label, name, r in zip("AB", names, pair)]
    parts = [aligned_table(head, "lll")]
    if rows := differences(a, b):
        parts.append(aligned_table([("differs", "A", "B"), *rows], "lll"))
    parts.append(aligned_table([("", "A", "B", "B - A", "B / A"), *_figures(a, b)]))
    if a.peak_breakdown and b.peak_breakdown:
        parts.append(waterfall_table(a.peak_breakdown, b.peak_breakdown))
    parts.append("\n".join(f"- {printable(line)}" for line in cautions(a, b, answers.step_times([a, b, *others]))))
    return "\n\n".join(filter(None, parts))


def differences(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """What differs in settings, and in machine and versions as far as both records know them."""
    rows = [("script", a.script, b.script), ("kernels", a.title, b.title)]
    rows += [(name, _setting(a, name), _setting(b, name)) for name in _settings_of(a) | _settings_of(b)]
    rows.append(("gpu", *(r.simulated_gpu or r.environment.gpu for r in (a, b))))
    versions = [(name, getattr(a.environment, name), getattr(b.environment, name)) for name in MACHINE]
    rows += [row for row in versions if None not in row]
    return [(name, _words(first), _words(second)) for name, first, second in rows if first != second]


def _settings_of(record: Record) -> dict[str, None]:
    """Names of settings to compare. What is usual of one script is no difference from the other, which has none."""
    fields = [f for f in dataclasses.fields(record.run) if not f.metadata["is_place"] and f.name != "device"]
    shared = {f.name for f in dataclasses.fields(RunConfig)}
    fields = [f for f in fields if f.name in shared or getattr(record.run, f.name) != record.run.usual(f)]
    return {f.name: None for f in fields if f.name not in KERNEL_NAMES}


def _setting(record: Record, name: str) -> Any:
    return getattr(record.run, name, None)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={text}" for name, text in value.items()) or "-"
    return "-" if value is None else str(value)[:40]


def _figures(a: Record, b: Record) -> list[tuple[str, ...]]:
    rows = []
    for name, (value, write) in FIGURES.items():
        first, second = value(a), value(b)
        if first is None and second is None:
            continue
        cells = [answers.absence(r) if v is None else write(v) for r, v in ((a, first), (b, second))]
        both = None not in (first, second)
        change = ("-" if second < first else "+") + write(abs(second - first)) if both else ""
        rows.append((name, *cells, change, f"{second / first:.2f}" if both and first else ""))
    return rows


def cautions(a: Record, b: Record, times: answers.StepTimes) -> list[str]:
    """What a reader must know before believing a difference, a line each."""
    pair, lines = (a, b), []
    for label, r in zip("AB", pair):
        if r.status != "ok":
            lines.append(f"{label} has no figures of its own: {r.error.message if r.error else r.status}")
        if r.mode == "interpreted":
            lines.append(f"{label} was checked on a CPU: nothing in it was timed, its memory is that of live tensors")
        if r.trains_wrongly:
            lines.append(
                f"{label} {WRONG}: its gradients are less exact than Hugging Face's, so its gains do not count"
            )
    if len({answers.is_predicted(r) for r in pair}) > 1 or len({r.mode == "interpreted" for r in pair}) > 1:
        lines.append("not comparable in time: they were not measured alike")
    elif len({answers.machine(r) for r in pair}) > 1:
        lines.append(f"not comparable in time, other machines: {answers.machine(a)}; {answers.machine(b)}")
    if len(models := {r.run.model_name for r in pair}) > 1:
        lines.append(f"not comparable, other models: {' and '.join(sorted(models))}")
    if len({r.answered.tokens_per_step for r in pair}) > 1:
        lines.append("not comparable in memory and time, other sizes: tokens/s alone is per token")
    elif len({r.answered.seq_length for r in pair}) > 1:
        lines.append("not comparable in memory and time, other lengths of the sequences: attention is more work")
    return [*lines, *_spread(a, b, times)]


def _spread(a: Record, b: Record, times: answers.StepTimes) -> list[str]:
    """How much of a difference in time may be chance."""
    if a.latency_s is None or b.latency_s is None:
        return []
    places = [answers.place(r) for r in (a, b)]
    known = [times.get(place, []) for place in places]
    lines = [f"{label}, ms a step: {answers.spread(own)}" for label, own in zip("AB", known) if len(own) > 1]
    if places[0] == places[1]:
        return [*lines[:1], "the same experiment on the same machine: what differs is the spread between runs"]
    if len(lines) == 2 and known[0][0] <= known[1][-1] and known[1][0] <= known[0][-1]:
        lines.append("the ranges of their runs overlap: no difference in time is shown")
    if not lines and min(r.run.tokens_per_step for r in (a, b)) < answers.MANY_TOKENS:
        low, high = answers.REPEATS
        lines.append(
            f"one run each: below {answers.MANY_TOKENS:,} tokens a step, runs of one experiment differed by "
            f"{low:+.0%} to {high:+.0%}; smaller differences in time mean nothing"
        )
    return lines
