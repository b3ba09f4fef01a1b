"""The report's own figures, and those of src/figures.py and src/explain/plot.py for the study's records."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from doc import evidence, facts
from doc.evidence import ALL_KERNELS, NO_FLCE, NO_KERNELS, Folder, Study
from doc.facts import BATCHES, MODELS
from src import figures, study
from src.config import Strategy
from src.explain import plot
from src.explain.categories import CATEGORIES, COLOURS
from src.figures import STYLES, THREE, Axis
from src.utils import GIB, MIB

TOKENS = 8 * 1024  # of the step that the diagrams show
MODEL = MODELS[0]


def all_figures() -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that the report and the slides show."""
    h100, offload = evidence.folder("h100_single_gpu"), evidence.folder("h100_offload")
    yield "memory_by_batch.png", memory_by_batch(h100)
    yield "fusion.png", fusion()
    yield "chunks.png", chunks()
    yield "peak_single_gpu.png", timelines("bs8_seq1024_rope{0}_silu{0}_rms{0}_flce{0}", ("False", "True"))
    yield "peak_offload.png", timelines("bs8_seq1024_liger_rope{0}_silu{0}_rms{0}_flce{0}_fast", ("0", "1"))
    yield "composition.png", composition()
    axis = Axis("batch_size", "batch size, 1024 tokens a sequence")
    for name, checkpointing in (("strategies", True), ("strategies_no_checkpointing", False)):
        cells = {study.cell(record): record for record in facts.by_batch(h100, checkpointing)}
        yield f"{name}.png", _smaller(figures.comparison(cells, THREE, axis))
    yield "kernels_alone.png", kernels_alone(h100)
    yield "offload_steps.png", offload_steps(offload)
    studies = evidence.studies()
    yield "original.png", original(studies)
    yield "ladder.png", ladder()
    yield "predictions.png", predictions(h100.gpu)
    for part in studies:
        if not part.is_limited:
            yield from ((name, _smaller(figure)) for name, figure in part.figures())


def _figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(1, columns, **kwargs)


def _plain(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def timelines(name: str, words: Sequence[str]) -> Figure:
    """Memory over a step without and with Liger kernels, from the committed snapshots."""
    gpus = {run["environment"]["gpu"] for run in facts.peaks().values()}
    titles = [f"{strategy.title}, 8 x 1024, {', '.join(gpus)}" for strategy in (NO_KERNELS, ALL_KERNELS)]
    drawing = plot.figure({title: evidence.snapshot(name.format(w)) for title, w in zip(titles, words)})
    return _smaller(drawing, 9.5, 6.2)


def _smaller(drawing: Figure, width: float = 10.5, height: float = 4.2) -> Figure:
    """The same figure with larger type, for a page and a slide."""
    drawing.set_size_inches(width, height)
    return drawing


def composition() -> Figure:
    """The peaks of a step on one GPU and under offload, without and with Liger kernels, as stacked bars."""
    drawing, axes = _figure(11, 4.2)
    runs = facts.peaks()
    shown = {}
    for place, run in enumerate(runs.values()):
        left = 0.0
        for name in CATEGORIES:
            width = run["peak_breakdown"][name] / GIB
            bar = axes.barh(place, width, 0.62, left, color=COLOURS[name], edgecolor="white", linewidth=0.4)
            if width > 0.05:
                shown[name] = bar
            if width > 1:
                colour = "white" if name in ("parameters", "logits_and_loss", "gathered_parameters") else "black"
                axes.text(left + width / 2, place, f"{width:.1f}", ha="center", va="center", fontsize=9, color=colour)
            left += width
        axes.text(left + 0.15, place, f"{left:.2f} GiB", va="center", fontsize=10, weight="bold")
    axes.set_yticks(range(len(runs)), runs, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(run["breakdown_peak_bytes"] for run in runs.values()) / GIB)
    axes.set_xlabel("GiB allocated at the peak")
    axes.spines[["top", "right"]].set_visible(False)
    gpu = ", ".join(sorted({run["environment"]["gpu"] for run in runs.values()}))
    axes.set_title(f"Llama 3.2 1B, bf16, gradient checkpointing, 8 x 1024 tokens, {gpu}", fontsize=9)
    names = [name for name in CATEGORIES if name in shown]
    labels = [name.replace("_", " ") for name in names]
    drawing.legend([shown[n] for n in names], labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return drawing


def memory_by_batch(folder: Folder) -> Figure:
    """What a step without Liger kernels must hold at its peak, computed from the shape, beside measured peaks."""
    drawing, axes = _figure(8, 4.2)
    parts = {
        "parameters": [MODEL.parameters * 2] * len(BATCHES),
        "optimizer_state": [MODEL.parameters * 4] * len(BATCHES),
        "checkpoints": [MODEL.checkpoint_bytes(batch * 1024) for batch in BATCHES],
        "logits_and_loss": [3 * MODEL.logits_bytes(batch * 1024, 4) for batch in BATCHES],
    }
    labels = ("weights", "Adam's moments", "layer inputs kept by checkpointing", "three fp32 copies of the logits")
    bottom = [0.0] * len(BATCHES)
    for (name, sizes), label in zip(parts.items(), labels):
        heights = [size / GIB for size in sizes]
        axes.bar(range(len(BATCHES)), heights, 0.55, bottom, color=COLOURS[name], label=label)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for strategy, marker, colour in ((NO_KERNELS, "o", "black"), (ALL_KERNELS, "D", "white")):
        runs = [folder.run(strategy, batch_size=batch) for batch in BATCHES]
        peaks = [run["peak_memory_bytes"] / GIB for run in runs]
        label = f"measured peak, {strategy.title}"
        axes.plot(range(len(BATCHES)), peaks, marker, color=colour, markeredgecolor="black", markersize=7, label=label)
    axes.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    axes.set_xlabel("batch size, 1024 tokens a sequence")
    axes.set_title(f"Llama 3.2 1B, bf16, gradient checkpointing; measured on {folder.gpu}", fontsize=9)
    _plain(axes, "GiB")
    axes.legend(frameon=False, fontsize=9)
    return drawing


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, **style: Any) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", linewidth=0.7))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 9} | style)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    axes.add_patch(FancyArrowPatch(start, end, **{"arrowstyle": "-|>", "mutation_scale": 10, "color": "0.25"} | style))


def fusion() -> Figure:
    """SwiGLU's element-wise part as two kernels and as one: what goes through GPU memory."""
    drawing, (left, right) = _figure(10, 3.3, 2)
    kernel, memory = "#a8dadc", "#f1e3c8"
    for axes, title in (
        (left, "Hugging Face: two kernels, 3 reads and 2 writes"),
        (right, "Liger: one kernel, 2 reads and 1 write"),
    ):
        axes.set(xlim=(0, 10), ylim=(0, 5))
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
    _box(left, 0.3, 3.6, 1.7, 0.9, "gate", memory)
    _box(left, 0.3, 0.6, 1.7, 0.9, "up", memory)
    _box(left, 2.6, 3.6, 1.5, 0.9, "SiLU", kernel)
    _box(left, 4.6, 3.6, 2.0, 0.9, "SiLU(gate)", memory)
    _box(left, 4.9, 0.6, 1.5, 0.9, "multiply", kernel)
    _box(left, 7.6, 0.6, 1.9, 0.9, "output", memory)
    for start, end in (
        ((2.0, 4.05), (2.6, 4.05)),
        ((4.1, 4.05), (4.6, 4.05)),
        ((5.6, 3.6), (5.6, 1.5)),
        ((2.0, 1.05), (4.9, 1.05)),
        ((6.4, 1.05), (7.6, 1.05)),
    ):
        _arrow(left, start, end)
    _box(right, 0.3, 3.6, 1.7, 0.9, "gate", memory)
    _box(right, 0.3, 0.6, 1.7, 0.9, "up", memory)
    _box(right, 3.8, 1.7, 2.4, 1.7, "SiLU(gate) · up\nin registers", kernel)
    _box(right, 7.6, 2.1, 1.9, 0.9, "output", memory)
    for start, end in (((2.0, 4.05), (3.8, 2.9)), ((2.0, 1.05), (3.8, 2.2)), ((6.2, 2.55), (7.6, 2.55))):
        _arrow(right, start, end)
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="black", linewidth=0.7) for c in (memory, kernel)]
    drawing.legend(
        handles, ["array in GPU memory", "kernel"], loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    return drawing


def chunks() -> Figure:
    """Fused linear cross-entropy: all logits at once, and a chunk at a time."""
    drawing, axes = _figure(10, 4.6)
    axes.set(xlim=(0, 20), ylim=(0, 9.4))
    axes.set_axis_off()
    red, grey, blue, pale = COLOURS["logits_and_loss"], "#d9d9d9", COLOURS["gradients"], "#f6d5bd"
    whole, part = MODEL.logits_bytes(TOKENS, 2), MODEL.logits_bytes(MODEL.chunk(TOKENS), 2)
    hidden, vocabulary = MODEL.config.hidden_size, MODEL.config.vocab_size

    axes.text(4.4, 9.1, "cross-entropy as usual", ha="center", fontsize=11, weight="bold")
    _box(axes, 0.2, 1.4, 1.1, 6.6, f"hidden states\n{TOKENS:,} x {hidden:,}", grey, rotation=90)
    _box(axes, 2.2, 1.4, 5.8, 6.6, "", red)
    axes.text(
        5.1,
        4.7,
        f"logits\n{TOKENS:,} x {vocabulary:,}\n{whole / GIB:.2f} GiB in bf16,\n"
        f"and three fp32 copies of {2 * whole / GIB:.2f} GiB\nin the loss and its backward pass",
        ha="center",
        va="center",
        fontsize=9.5,
        color="white",
        weight="bold",
    )
    _arrow(axes, (1.3, 4.7), (2.2, 4.7))
    axes.text(4.4, 0.7, "three copies alive as backward begins", ha="center", fontsize=9)

    axes.text(14.8, 9.1, "fused linear cross-entropy", ha="center", fontsize=11, weight="bold")
    count = MODEL.chunks(TOKENS)
    head = f"gradient\nof the LM head\n{vocabulary:,}\nx {hidden:,}\n{MODEL.head_bytes / MIB:.0f} MiB"
    rows, low, high = 8, 1.4, 8.0
    step = (high - low) / rows
    for row in range(rows):
        y = high - (row + 1) * step
        current = row == 2
        done = row < 2
        axes.add_patch(Rectangle((10.0, y), 1.1, step, facecolor=blue if done else grey, edgecolor="white"))
        style = {"facecolor": red} if current else {"facecolor": pale, "alpha": 0.45}
        axes.add_patch(Rectangle((12.2, y), 3.4, step, edgecolor="white", linewidth=1, **style))
    y = high - 3 * step
    axes.text(
        13.9,
        y + step / 2,
        f"one chunk: {part / MIB:.0f} MiB",
        ha="center",
        va="center",
        fontsize=9.5,
        color="white",
        weight="bold",
    )
    _arrow(axes, (11.1, y + step * 0.72), (12.2, y + step * 0.72))
    _arrow(axes, (12.2, y + step * 0.28), (11.1, y + step * 0.28), color=blue)
    axes.text(11.65, y - 0.1, "gradient", ha="center", va="top", fontsize=7.5, color="black")
    _box(axes, 17.0, 2.4, 2.6, 4.6, head, blue)
    _arrow(axes, (15.6, y + step / 2), (17.0, y + step / 2), color=blue)
    axes.text(16.3, y + step / 2 + 0.2, "add", ha="center", fontsize=8)
    axes.text(10.55, high + 0.2, "hidden states", ha="center", fontsize=8.5)
    axes.text(13.9, high + 0.2, f"{count} chunks of {MODEL.chunk(TOKENS)} tokens", ha="center", fontsize=8.5)
    each = "per chunk: logits, loss, gradient in place of the logits; then the next chunk takes its memory"
    axes.text(14.8, 0.7, each, ha="center", fontsize=9)
    return drawing


def kernels_alone(folder: Folder) -> Figure:
    """Peak and time of a step with each kernel alone, and together."""
    runs = facts.alone(folder)
    names = ["none", "RoPE", "SwiGLU", "RMSNorm", "FLCE", "all but\nFLCE", "all"]
    colours = ["#1f3a5f", *["#7a9cc6"] * len(Strategy().kernels)]
    colours += [STYLES[strategy.title]["color"] for strategy in (NO_FLCE, ALL_KERNELS)]
    drawing, (left, right) = _figure(11, 3.9, 2)
    for axes, key, unit, form, label, title in (
        (left, "peak_memory_bytes", GIB, "{:.1f}", "GiB", "peak allocated memory"),
        (right, "latency_s", 1e-3, "{:.0f}", "ms", "time of a step, median and quartiles"),
    ):
        values = [run[key] / unit for run in runs]
        bars = axes.bar(names, values, 0.65, color=colours, edgecolor="black", linewidth=0.5)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=8.5)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=8.5)
        _plain(axes, label)
    for place, run in enumerate(runs):
        median, below, above = figures.step_ms(run)
        right.errorbar(place, median, [[below], [above]], color="black", capsize=2, linewidth=0.8)
    drawing.suptitle(f"{figures.setting_words(runs[0])}, 8 x 1024 tokens", fontsize=9)
    return drawing


def offload_steps(folder: Folder) -> Figure:
    """Time of an offloaded step under the original's settings, under ours, and the floor."""
    labels = [f"{strategy.title}\n{batch} x 1024" for strategy, batch in facts.OFFLOADED]
    drawing, axes = _figure(9, 3.9)
    for place, (seed, fast) in enumerate(facts.presets(folder)):
        values = [seed["latency_s"], fast["latency_s"], fast["floor_s"]]
        for i, (seconds, colour) in enumerate(zip(values, ("#1f3a5f", "#e08e2b", "#d9d9d9"))):
            bar = axes.bar(place + (i - 1) * 0.26, seconds, 0.26, color=colour, edgecolor="black", linewidth=0.5)
            axes.bar_label(bar, [f"{seconds:.2f}"], padding=2, fontsize=8.5)
    axes.set_xticks(range(len(labels)), labels, fontsize=9)
    axes.set_title(f"Llama 3.2 1B, ZeRO-3 offload, {folder.gpu}", fontsize=9)
    _plain(axes, "seconds a step")
    names = ("the original's settings (preset seed)", "ours (preset fast)", "floor of this machine")
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="black") for c in ("#1f3a5f", "#e08e2b", "#d9d9d9")]
    axes.legend(handles, names, frameon=False, fontsize=9)
    return drawing


def ladder() -> Figure:
    """Peak and throughput of what can be turned on, one after the other."""
    drawing, (left, right) = _figure(11, 3.6, 2, sharey=True)
    steps = facts.ladder()
    for axes, value, form, label in (
        (left, lambda run: run["peak_memory_bytes"] / GIB, "{:.1f}", "peak, GiB"),
        (right, lambda run: run["throughput_tokens_per_s"], "{:,.0f}", "tokens/s"),
    ):
        for place, (words, run) in enumerate(steps):
            if run is None or run["status"] != "ok":
                axes.annotate(figures.absence(run), (0, place), (3, 0), textcoords="offset points", va="center")
                continue
            colour = STYLES[(ALL_KERNELS if "Liger" in words else NO_KERNELS).title]["color"]
            bar = axes.barh(place, value(run), 0.65, color=colour, edgecolor="black", linewidth=0.5)
            axes.bar_label(bar, [form.format(value(run))], padding=3, fontsize=9)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    names = [words.replace(", ", ",\n").replace(",\noffload", ", offload") for words, _ in steps]
    left.set_yticks(range(len(steps)), names, fontsize=9)
    left.invert_yaxis()
    return drawing


def original(studies: Sequence[Study]) -> Figure:
    """Peaks the original study published beside ours under its settings."""
    cells = [row for row in facts.beside_the_original(studies) if row[0].strategy != NO_FLCE.title]
    drawing, axes = _figure(10, 3.8)
    gpus = ("original study, RTX 4090", f"ours, {study.gpu_name(cells[0][2])}")
    for i, (name, colour) in enumerate(zip(gpus, ("#b0b0b0", "#1f3a5f"))):
        values = [peaks[i]["peak_memory_bytes"] / GIB for _, *peaks in cells]
        places = [place + (i - 0.5) * 0.4 for place in range(len(cells))]
        bars = axes.bar(places, values, 0.4, color=colour, edgecolor="black", linewidth=0.5, label=name)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=8)
    labels = [f"{'none' if cell.strategy == NO_KERNELS.title else 'all'}\n{cell.batch_size}" for cell, *_ in cells]
    axes.set_xticks(range(len(cells)), labels, fontsize=9)
    axes.set_xlabel("Liger kernels, batch size at 1024 tokens")
    axes.set_title("Llama 3.2 1B, ZeRO-3 offload, fp16, the original's settings", fontsize=9)
    _plain(axes, "peak allocated memory, GiB")
    axes.legend(frameon=False, fontsize=9)
    return drawing


def predictions(gpu: str) -> Figure:
    """Errors of the predicted peaks."""
    found = evidence.predictions()
    drawing, axes = _figure(8, 3.4)
    named = (NO_KERNELS.title, ALL_KERNELS.title)
    for name, marker in ((NO_KERNELS.title, "o"), (ALL_KERNELS.title, "D"), ("", "s")):
        own = [p for p in found if (p.kernels if p.kernels in named else "") == name]
        x, y = [p.measured_gib for p in own], [100 * p.error for p in own]
        colour = STYLES[name]["color"] if name else STYLES[NO_FLCE.title]["color"]
        style = {"color": colour, "markeredgecolor": "black", "markeredgewidth": 0.6}
        axes.plot(x, y, marker, label=name or "some of the kernels", **style)
    axes.axhline(0, color="grey", linewidth=0.8, zorder=0)
    largest = max(abs(100 * p.error) for p in found)
    axes.set_ylim(-1.7 * largest, 1.7 * largest)
    axes.set_xlabel("measured peak, GiB")
    axes.set_title(f"{len(found)} peaks, predicted without a GPU; measured on {gpu}", fontsize=9)
    _plain(axes, "error of the prediction, %")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower right")
    return drawing
