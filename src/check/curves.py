"""What comparisons showed, for a person: parity as a table, loss curves as a figure. Needs no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.config import RunConfig
from src.record import WRONG, GradientError, Parity
from src.techniques import kernels_title
from src.utils import markdown_table

SMOOTHED = 20  # steps: random batches differ in how hard they are


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file of `python -m src.check` or `python -m src.check.convergence`."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def parities(file: Path) -> list[tuple[RunConfig, Parity]]:
    """The comparisons in a file, by model, dtype and tokens, the strategies in their order."""
    found = [(RunConfig.from_dict(line["config"]), Parity(**line["parity"])) for line in lines_of(file)]
    return sorted(found, key=lambda pair: (pair[0].model_name, pair[0].dtype, pair[1].tokens))


def parity_rows(found: Sequence[tuple[RunConfig, Parity]]) -> str:
    """A Markdown table: errors against fp32 of each run and of Hugging Face's code in the same dtype."""
    rows = []
    for config, parity in found:
        title = kernels_title(config) + (f", FLCE's {config.flce_reduction}" if config.flce else "")
        model = config.model_name.rsplit("/")[-1].removesuffix("-Instruct")
        rows.append(
            [
                title + ("" if parity.agrees else f" {WRONG}"),
                model,
                config.dtype,
                f"{config.batch_size} x {config.seq_length}",
                _percent(parity.run.gradient),
                _percent(parity.hugging_face.gradient),
                "" if parity.ratio is None else f"{parity.ratio:.2f}",
                f"{_percent(parity.run.worst)} {_short(parity.run)}".strip(),
                f"{_percent(parity.hugging_face.worst)} {_short(parity.hugging_face)}".strip(),
            ]
        )
    header = ["kernels", "model", "dtype", "batch x seq", "gradient error", "Hugging Face's", "ratio"]
    return markdown_table([*header, "worst parameter", "Hugging Face's worst"], rows)


def _percent(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.0e}"


def _short(error: GradientError) -> str:
    return error.worst_parameter.removeprefix("model.").removesuffix(".weight")


def figure(curves: Sequence[dict[str, Any]]) -> Figure:
    """Loss curves, and how far each is above Hugging Face's in the same dtype."""
    drawing = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2)
    colours = ("#1f3a5f", "#6baed6", "#d95f02", "#5aae61", "#7b3294")
    baselines = {c["config"]["dtype"]: c["losses"] for c in curves if c["variant"].endswith("Hugging Face")}
    for curve, colour, style in zip(curves, colours, ("-", "--", "-", "--", ":")):
        losses, baseline = curve["losses"], baselines[curve["config"]["dtype"]]
        left.plot(losses, color=colour, linestyle=style, linewidth=1.4, label=curve["variant"])
        if losses is not baseline:
            above = smoothed([loss - other for loss, other in zip(losses, baseline)])
            right.plot(above, color=colour, linestyle=style, linewidth=1.4)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step")
    right.set_title(f"above Hugging Face's in the same dtype, mean of {SMOOTHED} steps", fontsize=10)
    right.axhline(0, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.grid(linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return drawing


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last `SMOOTHED` values at each step, of fewer at the beginning."""
    windows = [values[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def last_above(curves: Sequence[dict[str, Any]], variant: str) -> float:
    """How far a variant's loss is above Hugging Face's in the same dtype, mean of the last `SMOOTHED` steps."""
    named = {curve["variant"]: curve["losses"] for curve in curves}
    baseline = named[f"{variant.split(',')[0]}, Hugging Face"]
    return smoothed([loss - other for loss, other in zip(named[variant], baseline)])[-1]


def worst_ratio(found: Sequence[tuple[RunConfig, Parity]], dtype: str, reduction: str | None = None) -> float:
    """The largest error over Hugging Face's of the runs in `dtype` that turn something on."""
    return max(
        parity.ratio
        for config, parity in found
        if config.dtype == dtype and config.kernels and parity.ratio is not None
        if reduction is None or (config.flce and config.flce_reduction == reduction)
    )


def short(found: Sequence[tuple[RunConfig, Parity]], tokens: int) -> list[tuple[RunConfig, Parity]]:
    """The comparisons in 16 bits on so many tokens, of runs that turn something on."""
    return [(c, p) for c, p in found if p.tokens == tokens and c.dtype != "fp32" and c.kernels]
