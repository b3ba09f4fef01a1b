"""Tables made from records, as Markdown or CSV. Needs no torch."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence

from src.record import WRONG, Record
from src.study import answers, pareto
from src.study.answers import absence, setting_words
from src.utils import GIB, markdown_table, printable

Table = list[list[str]]  # the first row is the header


def to_csv(table: Table) -> str:
    """Comma-separated values, without the thousands' commas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_csv_cell(cell) for cell in row] for row in table)
    return text.getvalue().rstrip("\n")


def _csv_cell(text: str) -> str:
    """`text` from a file: a spreadsheet would run what begins as a formula does, unless an apostrophe precedes it."""
    text = printable(text.replace(",", ""))
    is_formula = text.startswith(("=", "+", "-", "@")) and not re.fullmatch(r"[+-]?[\d.]+%?", text)
    return f"'{text}" if is_formula else text


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": lambda table: markdown_table(table[0], table[1:]),
    "csv": to_csv,
}


def runs_table(found: Sequence[Record]) -> Table:
    """A row for each record, whatever became of it: settings, peak, latency, throughput, parity, frontier, repeats.

    Parity is the gradients' error against fp32, over that of Hugging Face's code in the same dtype. The frontier has
    what no other setting beats in memory and speed, where three or more were run at one size: with AdamW, or with any
    optimizer, see pareto.py. IQR is the spread of steps within a run; repeats say how far the runs of the same
    experiment on the same machine lie apart.
    """
    times, best = answers.step_times(found), pareto.on_frontier(found)
    header = ["kernels", "batch", "seq", "settings", "status", "peak GiB", "ms a step", "IQR ms", "tokens/s", "MFU"]
    rows = [_row(r, times, best) for r in sorted(found, key=_order)]
    return [[*header, "parity", "frontier", "repeats, ms a step"], *rows]


def _order(record: Record) -> tuple:
    config = record.answered
    return setting_words(record), config.seq_length, config.batch_size, len(config.kernels), config.title, record.mode


def _row(record: Record, times: answers.StepTimes, best: Mapping[tuple, str]) -> list[str]:
    config = record.answered
    status = record.mode if record.status == "ok" else absence(record)
    status += " (predicted)" if config.dry_run and record.status != "ok" else ""
    cells = [record.title, f"{config.batch_size:,}", f"{config.seq_length:,}", setting_words(record), status]
    return [
        *cells,
        number_or_empty(record.peak_memory_bytes, GIB, "{:,.2f}"),
        number_or_empty(record.latency_s, 1e-3, "{:,.1f}"),
        number_or_empty(record.latency_iqr_s, 1e-3, "{:,.1f}"),
        number_or_empty(record.throughput_tokens_per_s, 1, "{:,.0f}"),
        number_or_empty(record.mfu, 1e-2, "{:.1f}%"),
        _parity(record),
        best.get(pareto.told(record), ""),
        answers.repeats(record, times),
    ]


def settings_table(sizes: Mapping[str, pareto.Choices]) -> Table:
    """A row for each setting, whatever its size: parity, and peak and speed at each of `sizes`, which have names.

    In bold (Markdown) is what no other setting with AdamW beats in memory and speed.
    """
    rows: dict[str, dict[str, str]] = {}
    for name, own in sizes.items():
        best = [pareto.told(point.record) for point in own.frontier]
        for record in own.records:
            row = rows.setdefault(own.label(record).replace(f" {WRONG}", ""), {"setting": own.label(record)})
            row["parity"] = row.get("parity") or _parity(record)
            peak = number_or_empty(record.peak_memory_bytes, GIB, "{:,.2f}")
            speed = number_or_empty(record.throughput_tokens_per_s, 1, "{:,.0f}")
            told = (peak, speed) if record.status == "ok" else (absence(record), "")
            strong = "**" if pareto.told(record) in best else ""
            row |= {f"{what}, {name}": f"{strong}{text}{strong}" for what, text in zip(("GiB", "tokens/s"), told)}
    header = ["setting", "parity", *(f"{what}, {name}" for name in sizes for what in ("GiB", "tokens/s"))]
    return [header, *([row.get(name, "") for name in header] for row in rows.values())]


def _parity(record: Record) -> str:
    return number_or_empty(None if record.parity is None else record.parity.ratio, 1, "{:.2f}")


def number_or_empty(value: float | None, unit: float, form: str) -> str:
    """Nothing for what was not measured."""
    return "" if value is None else form.format(value / unit)
