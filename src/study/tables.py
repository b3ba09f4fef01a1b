"""Tables made from records, as Markdown or CSV. Needs no torch."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence

from src.config import RunConfig
from src.record import Record
from src.study.figures import absence, setting_words
from src.utils import GIB, markdown_table

Table = list[list[str]]  # the first row is the header


def to_csv(table: Table) -> str:
    """Comma-separated values, without the thousands' commas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell.replace(",", "") for cell in row] for row in table)
    return text.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": lambda table: markdown_table(table[0], table[1:]),
    "csv": to_csv,
}


def runs_table(found: Sequence[Record]) -> Table:
    """A row for each record, whatever became of it: settings, peak, latency, throughput, parity.

    Parity is the gradients' error against fp32, over that of Hugging Face's code in the same dtype.
    """
    header = ["kernels", "batch", "seq", "settings", "status", "peak GiB", "ms a step", "IQR ms", "tokens/s", "MFU"]
    return [[*header, "parity"], *(_row(record) for record in sorted(found, key=_order))]


def _order(record: Record) -> tuple:
    config = _listed_config(record)
    return setting_words(record), config.seq_length, config.batch_size, len(config.kernels), config.title, record.mode


def _listed_config(record: Record) -> RunConfig:
    """The configuration that a record's figures are of: for a search, of the largest size that fits."""
    config, frontier = record.run, record.frontier
    if frontier is None or not frontier.predicted:
        return config
    return dataclasses.replace(config, **{frontier.searched: frontier.predicted})


def _row(record: Record) -> list[str]:
    config = _listed_config(record)
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
        number_or_empty(None if record.parity is None else record.parity.ratio, 1, "{:.2f}"),
    ]


def number_or_empty(value: float | None, unit: float, form: str) -> str:
    """Nothing for what was not measured."""
    return "" if value is None else form.format(value / unit)
