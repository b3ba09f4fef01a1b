"""The report's own figures, and those of src/study/figures.py and src/explain for the study's records."""

import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from doc import evidence, studies, tables
from doc.evidence import BATCHES, MODELS, Folder
from doc.studies import ALL, NO_FLCE, NONE
from src.check import curves
from src.explain.categories import COLOURS
from src.explain.plot import figure
from src.study import answers, figures
from src.study.bars import STYLES, peak_gib, step_ms
from src.study.pareto_figure import pareto
from src.utils import GIB

MODEL = MODELS[0]
DARK, PLAIN, ORANGE = "#1f3a5f", "#d9d9d9", "#e08e2b"
OUTLINE = {"edgecolor": "black", "linewidth": 0.5}
# Of the diagrams.
FILLS = {"kernel": "#a8dadc", "memory": "#f1e3c8", "plain": PLAIN, "pale": "#fbeae0"}
FILLS |= {"logits": COLOURS["logits_and_loss"], "gradient": COLOURS["gradients"]}
LOOKS = {"": ("black", {}), "upright": ("black", {"rotation": 90}), "edged": ("white", {})}
LOOKS["white"] = ("white", {"color": "white", "weight": "bold", "fontsize": 9.5})


def all_figures() -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that the report and the slides show."""
    h100 = evidence.folder("h100_single_gpu")
    yield "first_page.png", first_page()
    yield "memory_by_batch.png", memory_by_batch(h100)
    yield "fusion.png", diagram("fusion")
    yield "chunks.png", diagram("chunks")
    yield "peak_single_gpu.png", timelines("bs8_seq1024_rope{0}_silu{0}_rms{0}_flce{0}", ("False", "True"))
    yield "peak_offload.png", timelines("bs8_seq1024_liger_rope{0}_silu{0}_rms{0}_flce{0}_fast", ("0", "1"))
    yield "composition.png", figures.peaks(list(evidence.peaks().values()), {})
    yield "kernels_alone.png", kernels_alone(h100)
    yield "offload_steps.png", offload_steps(evidence.folder("h100_offload"))
    yield "original.png", original()
    yield "convergence.png", curves.figure(curves.lines_of(evidence.DATA / "parity/convergence_h100.jsonl"))
    for size, (group, own) in evidence.peers().items():
        yield f"peers_{answers.plain_name(size).replace('_x_', 'x')}.png", pareto(group, own)
    runs = [run for run in evidence.single_gpu_runs() if run.status == "ok"]
    yield "predictions.png", figures.predicted_figure(evidence.predictions(runs))
    for part in studies.studies():
        if not part.is_limited:
            yield from ((name, _resized(figure)) for name, figure in part.figures())


def _figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(1, columns, **kwargs)


def _resized(drawing: Figure, width: float = 10.5, height: float = 4.2) -> Figure:
    """The same figure with larger type, for a page and a slide."""
    drawing.set_size_inches(width, height)
    return drawing


def _plain(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _grouped(axes: Axes, groups: Sequence[str], series: dict[str, tuple[str, Sequence[float]]], form: str) -> None:
    """Bars beside each other, with their values on them; name -> colour and a value for each group."""
    width = 0.8 / len(series)
    for i, (name, (colour, values)) in enumerate(series.items()):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(groups))]
        bars = axes.bar(places, values, width, color=colour, label=name, **OUTLINE)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.legend(frameon=False, fontsize=9)


# Beside points of the first page's picture: further words, or the same in two lines; where, in points of type.
LABELS = {
    "No Liger": ("Hugging Face's code", -6, -4, "right"),
    "Liger w/o FLCE": ("all Liger kernels but FLCE", -7, -3, "right"),
    "All Liger": ("all Liger kernels,\ncheckpointing", 0, 9, "center"),
    "All Liger, no checkpointing": ("all Liger kernels,\nno checkpointing", -7, -4, "right"),
    "flce only, no checkpointing, flce_chunks 16, compile layers": (
        "FLCE in larger pieces,\nlayers compiled",
        7,
        1,
        "left",
    ),
    "flce only \u2020, no checkpointing, flce_chunks 16, fp8, compile layers": ("the same in fp8", 7, -4, "left"),
    "All Liger, checkpoint_every 2": ("every second layer checkpointed", -2, 8, "center"),
    "All Liger, checkpoint_part mlp": ("MLPs checkpointed", 8, -9, "left"),
    "Liger w/o FLCE \u2020, loss cce": ("Cut Cross-Entropy", 7, -4, "left"),
}


def first_page() -> Figure:
    """Memory against speed of everything that was run at 32 x 1024; what stands out is named beside its point."""
    own, _ = evidence.headline()
    drawing, axes = _figure(8, 4.6)
    best = own.frontier
    axes.plot([p.gib for p in best], [p.speed for p in best], drawstyle="steps-post", color=ORANGE, zorder=1)
    marks = {"right": (DARK, "gradients as exact as Hugging Face's"), "wrong": ("white", "less exact: does not count")}
    for kind, (colour, label) in marks.items():
        axes.plot([], [], "o", color=colour, markeredgecolor="black", markersize=7, label=label)
        for point in (p for p in own.points if p.is_wrong == (kind == "wrong") and not p.has_other_steps):
            words, right, up, side = LABELS.get(own.label(point.record), ("", 0, 0, "left"))
            fill = colour if words or point.is_wrong else PLAIN
            size = 7 if words else 4
            axes.plot(
                point.gib,
                point.speed,
                "o",
                color=fill,
                markeredgecolor="black",
                markersize=size,
                zorder=2 + bool(words),
            )
            place = {"xytext": (right, up), "textcoords": "offset points", "ha": side, "fontsize": 9.5}
            axes.annotate(words, (point.gib, point.speed), **place)
    axes.set(xlim=(0, 66), xlabel="GiB allocated at the peak")
    axes.yaxis.set_major_formatter("{x:,.12g}")
    axes.set_title(
        f"{answers.setting_words(best[0].record).split(',')[0]}, bf16, AdamW, 32 x 1024 tokens a step, H100",
        fontsize=10,
    )
    _plain(axes, "tokens/s")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return drawing


def timelines(name: str, words: Sequence[str]) -> Figure:
    """Memory over a step without and with Liger kernels, from the committed snapshots."""
    gpus = ", ".join({run.environment.gpu for run in evidence.peaks().values()})
    titles = [f"{kernels}, 8 x 1024, {gpus}" for kernels in (NONE, ALL)]
    drawing = figure({title: evidence.snapshot(name.format(w)) for title, w in zip(titles, words)})
    return _resized(drawing, 10.5, 5.4)


def memory_by_batch(runs: Folder) -> Figure:
    """What a step without Liger kernels must hold at its peak, computed from the shape, beside measured peaks."""
    drawing, axes = _figure(8, 4.2)
    places, bottom = range(len(BATCHES)), [0.0] * len(BATCHES)
    for name, label, bytes_of in (
        ("parameters", "weights", lambda tokens: MODEL.parameters * 2),
        ("optimizer_state", "Adam's moments", lambda tokens: MODEL.parameters * 4),
        ("checkpoints", "layer inputs kept by checkpointing", MODEL.checkpoint_bytes),
        ("logits_and_loss", "three fp32 copies of the logits", lambda tokens: 3 * MODEL.logits_bytes(tokens, 4)),
    ):
        heights = [bytes_of(batch * 1024) / GIB for batch in BATCHES]
        axes.bar(places, heights, 0.55, bottom, color=COLOURS[name], label=label)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for kernels, title, marker, colour in (("none", NONE, "o", "black"), ("all", ALL, "D", "white")):
        peaks = [runs.run(kernels, batch_size=batch).peak_memory_bytes / GIB for batch in BATCHES]
        style = {"color": colour, "markeredgecolor": "black", "markersize": 7}
        axes.plot(places, peaks, marker, label=f"measured peak, {title}", **style)
    axes.set_xticks(places, [str(batch) for batch in BATCHES])
    axes.set_xlabel("batch size, 1024 tokens a sequence")
    axes.set_title(f"Llama 3.2 1B, bf16, gradient checkpointing; measured on {runs.gpu}", fontsize=9)
    _plain(axes, "GiB")
    axes.legend(frameon=False, fontsize=9)
    return drawing


def diagram(name: str) -> Figure:
    """A drawing of doc/source/diagrams.toml: boxes, arrows and words."""
    found = tomllib.loads(tables.templates().get_template("diagrams.toml").render(model=MODEL))[name]
    drawing, panels = _figure(*found["size"], len(found["panel"]), squeeze=False)
    for axes, panel in zip(panels[0], found["panel"]):
        width, height = panel["span"]
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_title(panel["title"], fontsize=10)
        axes.set_axis_off()
        for x, y, width, height, text, colour, *looks in panel["boxes"]:
            edge, letters = LOOKS[looks[0] if looks else ""]
            patch = Rectangle((x, y), width, height, facecolor=FILLS[colour], edgecolor=edge, linewidth=0.7)
            axes.add_patch(patch)
            axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 9} | letters)
        for x0, y0, x1, y1, *colour in panel["arrows"]:
            style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": FILLS[colour[0]] if colour else "0.25"}
            axes.add_patch(FancyArrowPatch((x0, y0), (x1, y1), **style))
        for x, y, text, size, *weight in panel.get("words", ()):
            axes.text(x, y, text, ha="center", fontsize=size, weight=weight[0] if weight else "normal")
    legend = found.get("legend", {})
    handles = [Rectangle((0, 0), 1, 1, facecolor=FILLS[colour], **OUTLINE) for colour in legend]
    if handles:
        drawing.legend(handles, legend.values(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return drawing


def kernels_alone(folder: Folder) -> Figure:
    """Peak and time of a step with each kernel alone, and together."""
    runs = evidence.alone(folder)
    names = ["none", "RoPE", "SwiGLU", "RMSNorm", "FLCE", "all but\nFLCE", "all"]
    colours = [DARK, *["#7a9cc6"] * 4, *(STYLES[title]["color"] for title in (NO_FLCE, ALL))]
    drawing, (left, right) = _figure(11, 3.9, 2)
    for axes, value, form, label, title in (
        (left, peak_gib, "{:.1f}", "GiB", "peak allocated memory"),
        (right, step_ms, "{:.0f}", "ms", "time of a step, median and quartiles"),
    ):
        told = [value(run) for run in runs]
        bars = axes.bar(names, [median for median, *_ in told], 0.65, color=colours, **OUTLINE)
        axes.bar_label(bars, [form.format(median) for median, *_ in told], padding=2, fontsize=8.5)
        for place, (median, below, above) in enumerate(told):
            if below or above:
                axes.errorbar(place, median, [[below], [above]], color="black", capsize=2, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=8.5)
        _plain(axes, label)
    drawing.suptitle(f"{answers.setting_words(runs[0])}, 8 x 1024 tokens", fontsize=9)
    return drawing


def offload_steps(runs: Folder) -> Figure:
    """Time of an offloaded step under the original's settings, under ours, and the floor."""
    pairs = evidence.preset_pairs(runs)
    drawing, axes = _figure(9, 3.9)
    groups = [f"{fast.run.title}\n{fast.run.batch_size} x 1024" for _, fast in pairs]
    series = {
        "the original's settings (preset original)": (DARK, [first.latency_s for first, _ in pairs]),
        "ours (preset fast)": (ORANGE, [fast.latency_s for _, fast in pairs]),
        "floor of this machine": (PLAIN, [fast.floor_s for _, fast in pairs]),
    }
    _grouped(axes, groups, series, "{:.2f}")
    axes.set_title(f"Llama 3.2 1B, ZeRO-3 offload, {runs.gpu}", fontsize=9)
    _plain(axes, "seconds a step")
    return drawing


def original() -> Figure:
    """Peaks the original study published beside ours under its settings."""
    cells = [row for row in studies.beside_the_original() if row[0].strategy != NO_FLCE]
    drawing, axes = _figure(10, 3.8)
    theirs, own = ([record.peak_memory_bytes / GIB for record in column] for column in list(zip(*cells))[1:3])
    groups = [f"{'none' if cell.strategy == NONE else 'all'}\n{cell.batch_size}" for cell, *_ in cells]
    gpu = answers.gpu_name(cells[0][2])
    series = {"original study, RTX 4090": ("#b0b0b0", theirs), f"ours, {gpu}": (DARK, own)}
    _grouped(axes, groups, series, "{:.1f}")
    axes.set_xlabel("Liger kernels, batch size at 1024 tokens")
    axes.set_title("Llama 3.2 1B, ZeRO-3 offload, fp16, the original's settings", fontsize=9)
    _plain(axes, "peak allocated memory, GiB")
    return drawing
