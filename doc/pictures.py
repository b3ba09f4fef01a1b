"""The report's own figures, and those of src/study/figures.py and src/explain for the study's records."""

import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.text import Text

from doc import evidence, long, studies, tables
from doc.evidence import BATCHES, MODELS, Folder
from doc.studies import ALL, NO_FLCE, NONE
from src.check import curves
from src.config import RunConfig
from src.explain.categories import COLOURS, words
from src.explain.plot import figure
from src.machine import H100
from src.study import answers, figures
from src.study.bars import STYLES, peak_gib, step_ms
from src.study.pareto_figure import pareto
from src.techniques import TITLES
from src.utils import GIB, MIB

MODEL = MODELS[0]
DARK, BLUE, PLAIN, ORANGE = "#1f3a5f", "#7a9cc6", "#d9d9d9", "#e08e2b"
WIDTH, SMALL = 6.5, 8  # inches of the report's text, and points of the smallest letters
CHARACTERS = 100  # of a line so wide
MOST_TOKENS = 32 * 1024  # of the picture of peaks against tokens
SHADE = (0.12, 0.23, 0.37)  # DARK, of which a heat map takes more or less
LOOK = {"font.size": SMALL, "axes.titlesize": SMALL, "axes.labelsize": SMALL, "figure.titlesize": SMALL}
LOOK |= {"xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False}
MARKERS = {
    title: {"marker": marker, "color": STYLES[title]["color"], "markeredgecolor": "black"}
    for title, marker in zip(TITLES.values(), "osD")
}
OUTLINE = {"edgecolor": "black", "linewidth": 0.5}
# Of the diagrams.
FILLS = {"kernel": "#a8dadc", "memory": "#f1e3c8", "plain": PLAIN, "pale": "#fbeae0"}
FILLS |= {"logits": COLOURS["logits_and_loss"], "gradient": COLOURS["gradients"]}
LOOKS = {"": ("black", {}), "upright": ("black", {"rotation": 90}), "edged": ("white", {})}
LOOKS["white"] = ("white", {"color": "white", "weight": "bold"})


def all_figures() -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that the documents show."""
    with matplotlib.rc_context(LOOK):
        yield from _own_figures()
    for size, (group, own) in evidence.peers().items():
        yield f"peers_{answers.plain_name(size).replace('_x_', 'x')}.png", pareto(group, own)


def _own_figures() -> Iterator[tuple[str, Figure]]:
    h100 = evidence.folder("h100_single_gpu")
    yield "first_page.png", first_page()
    yield "tokens.png", tokens()
    yield "long.png", long_sequences()
    yield "memory_by_batch.png", memory_by_batch(h100)
    yield "fusion.png", diagram("fusion")
    yield "chunks.png", diagram("chunks")
    yield "waterfall.png", waterfall()
    yield "peak_single_gpu.png", timelines("bs8_seq1024_rope{0}_silu{0}_rms{0}_flce{0}", ("False", "True"))
    yield "peak_offload.png", timelines("bs8_seq1024_liger_rope{0}_silu{0}_rms{0}_flce{0}_fast", ("0", "1"), 6)
    yield "kernels_alone.png", kernels_alone(h100)
    yield "few_tokens.png", few_tokens()
    yield "parity.png", parity()
    yield "offload_steps.png", offload_steps(evidence.folder("h100_offload"))
    yield "original.png", original()
    yield "map.png", heat_map()
    trained = curves.lines_of(evidence.DATA / "parity/convergence_h100.jsonl")
    yield "convergence.png", _printed(curves.figure(trained), 2.9, 3)
    runs = [run for run in evidence.single_gpu_runs() if run.status == "ok"]
    yield "predictions.png", _printed(figures.predicted_figure(evidence.predictions(runs)))
    for part in studies.studies():
        if not part.is_limited:
            yield from ((name, _printed(_stacked(figure), 4.4)) for name, figure in part.figures())


def _figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(1, columns, **kwargs)


def _printed(drawing: Figure, height: float = 3.2, columns: int = 4) -> Figure:
    """The same figure as wide as the report's text, where no letter is smaller than 8 points."""
    drawing.set_size_inches(WIDTH, height)
    for text in drawing.findobj(Text):
        text.set_fontsize(SMALL)
    for axes in drawing.axes:
        axes.tick_params(labelsize=SMALL)
        axes.set_title(textwrap.fill(axes.get_title(), CHARACTERS // 3), fontsize=SMALL)
    if drawing.get_suptitle():  # whose lines were broken for another width, but for the notes, which begin anew
        lines = re.sub(r"\n(?!bars:)", " ", drawing.get_suptitle()).split("\n")
        drawing.suptitle("\n".join(textwrap.fill(line, CHARACTERS) for line in lines), fontsize=SMALL)
    for legend in drawing.legends:
        names = [text.get_text() for text in legend.get_texts()]
        style = {"loc": "outside lower center", "ncols": columns, "fontsize": SMALL, "frameon": False}
        drawing.legend(legend.legend_handles, names, **style)
        legend.remove()
    return drawing


def _stacked(drawing: Figure) -> Figure:
    """The same figure with its panels below each other."""
    grid = drawing.add_gridspec(len(drawing.axes), 1)
    for axes, place in zip(drawing.axes, grid):
        axes.set_subplotspec(place)
    return drawing


def _plain(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _grouped(
    axes: Axes, groups: Sequence[str], series: dict[str, tuple[dict[str, Any], Sequence[float]]], form: str
) -> None:
    """Bars beside each other, with their values on them; name -> looks and a value for each group."""
    width = 0.8 / len(series)
    for i, (name, (looks, values)) in enumerate(series.items()):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(groups))]
        bars = axes.bar(places, values, width, label=name, **looks, **OUTLINE)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=SMALL)
    axes.set_xticks(range(len(groups)), groups, fontsize=SMALL)
    axes.legend(frameon=False, fontsize=SMALL)


def first_page() -> Figure:
    """Memory against speed of everything that was run at 32 x 1024; what stands out is named beside its point."""
    own, _ = evidence.headline()
    named = {found["label"]: found for found in evidence.first_page()}
    drawing, axes = _figure(WIDTH, 3.9)
    best = own.frontier
    axes.plot([p.gib for p in best], [p.speed for p in best], drawstyle="steps-post", color=ORANGE, zorder=1)
    marks = {"right": (DARK, "gradients as exact as Hugging Face's"), "wrong": ("white", "less exact: does not count")}
    for kind, (colour, label) in marks.items():
        axes.plot([], [], "o", color=colour, markeredgecolor="black", markersize=7, label=label)
        for point in (p for p in own.points if p.is_wrong == (kind == "wrong") and not p.has_other_steps):
            found = named.get(own.label(point.record), {"words": "", "offset": (0, 0), "side": "left"})
            style = {"color": colour, "markersize": 7} if found["words"] else {"color": PLAIN, "markersize": 4}
            axes.plot(point.gib, point.speed, "o", markeredgecolor="black", zorder=2 + bool(found["words"]), **style)
            place = {"xytext": found["offset"], "textcoords": "offset points", "ha": found["side"]}
            axes.annotate(found["words"], (point.gib, point.speed), **place)
    axes.set(xlim=(0, 66), xlabel="GiB allocated at the peak")
    axes.yaxis.set_major_formatter("{x:,.12g}")
    axes.set_title(
        f"{answers.setting_words(best[0].record).split(',')[0]}, bf16, AdamW, 32 x 1024 tokens a step, H100",
        fontsize=10,
    )
    _plain(axes, "tokens/s")
    axes.legend(loc="upper left")
    return drawing


def timelines(name: str, words: Sequence[str], height: float = 4.6) -> Figure:
    """Memory over a step without and with Liger kernels, from the committed snapshots."""
    gpus = ", ".join({run.environment.gpu for run in evidence.peaks().values()})
    titles = [f"{kernels}, 8 x 1024, {gpus}" for kernels in (NONE, ALL)]
    drawing = figure({title: evidence.snapshot(name.format(w)) for title, w in zip(titles, words)})
    for axes in drawing.axes[1::2]:  # beside the timelines, what the peak is made of
        _, size = axes.get_title(loc="left").rsplit(": ", 1)
        axes.set_title(f"peak: {size}", loc="left")
    return _printed(drawing, height)


def tokens() -> Figure:
    """Peaks against the tokens of a step, predicted and measured, and where FLCE begins to save by the rule."""
    drawing, panels = _figure(WIDTH, 2.9, len(MODELS), sharey=True)
    measured, predicted = evidence.peaks_by_tokens(), evidence.peaks_by_tokens(True)
    for axes, shape in zip(panels, MODELS):
        lines, marks = predicted.loc[shape.name], measured.loc[shape.name]
        for title, style in ((NONE, "-"), (ALL, "--")):
            own = lines[title].dropna()
            own = own[own.index <= MOST_TOKENS]
            axes.plot(own.index / 1000, own / GIB, style, color="black", linewidth=1, label=f"predicted, {title}")
        own = lines[ALL].dropna()
        rule = [(peak + shape.saving_bytes(count)) / GIB for count, peak in own.items() if count <= MOST_TOKENS]
        axes.plot(own.index[: len(rule)] / 1000, rule, color=ORANGE, linewidth=4, alpha=0.5, zorder=0, label="the rule")
        for title in (NONE, ALL):
            own = marks[title].dropna() if title in marks else marks[:0]
            own = own[own.index <= MOST_TOKENS]
            axes.plot(
                own.index / 1000, own / GIB, linestyle="", markersize=5, label=f"measured, {title}", **MARKERS[title]
            )
        begins = shape.begins_to_save
        axes.axvline(begins / 1000, color="grey", linestyle=":", linewidth=1)
        axes.annotate(f"N/6V: {begins:,.0f} tokens", (begins / 1000, 1), (3, 0), textcoords="offset points")
        axes.set_xlim(0, 1.05 * MOST_TOKENS / 1000)
        axes.set_title(shape.short_name)
        axes.set_xlabel("thousand tokens a step")
        _plain(axes, "GiB allocated at the peak" if shape is MODELS[0] else "")
    panels[0].set_ylim(bottom=0)
    handles, names = panels[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=3)
    return drawing


def long_sequences() -> Figure:
    """Peaks against the tokens of one sequence, predicted and measured, and the memory of two cards."""
    drawing, axes = _figure(WIDTH, 3.6)
    predicted, runs = long.predicted(), long.measured()
    sizes = sorted({tokens for _, tokens in predicted})
    colours = dict(zip(long.SETTINGS, (DARK, BLUE, ORANGE)))
    for setting, marker in zip(long.SETTINGS, "oD^"):
        colour = colours[setting]
        own = [(tokens, predicted[setting, tokens].peak_memory_bytes / GIB) for tokens in sizes]
        hollow = {"color": colour, "markerfacecolor": "white", "markersize": 6, "linewidth": 1}
        axes.plot(*zip(*own), marker=marker, label=f"{setting}, predicted", zorder=2, **hollow)
        measured = [r for r in runs if long.setting_of(r) == setting and r.run.model_name == RunConfig.model_name]
        fitting = [(r.run.seq_length, r.peak_memory_bytes / GIB) for r in measured if r.status == "ok"]
        looks = {"color": colour, "markeredgecolor": "black", "markersize": 7, "linestyle": ""}
        axes.plot(*(zip(*fitting) if fitting else ([], [])), marker=marker, label="measured", zorder=3, **looks)
        full = [r.run.seq_length for r in measured if r.status == "oom"]
        label = "measured: no room" if full else None
        axes.plot(full, [H100.memory_bytes / GIB] * len(full), "X", label=label, zorder=3, **looks)
    for words_of, room in (("24 GB", 24 * GIB), ("80 GB", H100.memory_bytes)):
        height = (room - H100.context_bytes) / GIB  # what CUDA leaves
        axes.axhline(height, color="grey", linestyle=":", linewidth=1)
        axes.annotate(f"a card of {words_of}", (sizes[0], height), (0, 3), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{tokens:,}" for tokens in sizes])
    axes.set(xlim=(0.75 * sizes[0], 1.5 * sizes[-1]), ylim=(0, 100), xlabel="tokens of the one sequence of a step")
    gpu = answers.gpu_name(runs[0])
    axes.set_title(f"{MODEL.short_name}, bf16, AdamW, gradient checkpointing; measured on an {gpu}")
    _plain(axes, "GiB allocated at the peak")
    drawing.legend(loc="outside lower center", ncols=3)
    return drawing


def waterfall() -> Figure:
    """From the peak without any kernel to the peak with all, category by category."""
    runs = evidence.folder("h100_techniques")
    without, with_all = runs.run("none"), runs.run("all")
    change = {name: with_all.peak_breakdown[name] - size for name, size in without.peak_breakdown.items()}
    large = {name: size for name, size in sorted(change.items(), key=lambda pair: pair[1]) if abs(size) > 90 * MIB}
    rest = sum(change.values()) - sum(large.values())
    drawing, axes = _figure(WIDTH, 2.6)
    level, names = without.breakdown_peak_bytes / GIB, [NONE]
    axes.bar(0, level, 0.65, color=DARK, **OUTLINE)
    axes.annotate(f"{level:.2f}", (0, level), (0, 3), textcoords="offset points", ha="center")
    for place, (name, size) in enumerate([*large.items(), ("all else", rest)], start=1):
        height = size / GIB
        looks = {"color": "#a8dadc", "hatch": "\\\\"} if height < 0 else {"color": ORANGE, "hatch": "//"}
        axes.bar(place, abs(height), 0.65, min(level, level + height), **looks, **OUTLINE)
        axes.plot([place - 1, place], [level, level], color="grey", linewidth=0.6, zorder=0)
        top = max(level, level + height)
        axes.annotate(f"{height:+.2f}", (place, top), (0, 3), textcoords="offset points", ha="center")
        level += height
        names.append(words(name))
    axes.bar(len(names), level, 0.65, color=STYLES[ALL]["color"], hatch="..", **OUTLINE)
    axes.annotate(f"{level:.2f}", (len(names), level), (0, 3), textcoords="offset points", ha="center")
    labels = [textwrap.fill(name, 12) for name in [*names, ALL]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title(f"{answers.setting_words(without)}, 8 x 1024 tokens")
    axes.margins(y=0.1)
    _plain(axes, "GiB at the peak")
    return drawing


def few_tokens() -> Figure:
    """The time of a step of few tokens in each run of the three strategies."""
    found = sorted(
        evidence.few_tokens(), key=lambda own: (own[NONE].run.tokens_per_step, not own[NONE].run.gradient_checkpointing)
    )
    groups: dict[str, list[dict]] = {}
    for own in found:
        kept = "checkpointing" if own[NONE].run.gradient_checkpointing else "no checkp."
        groups.setdefault(f"{tables.size(own[NONE])}\n{kept}", []).append(own)
    drawing, axes = _figure(WIDTH, 3.0)
    for place, runs in enumerate(groups.values()):
        for i, title in enumerate((NONE, NO_FLCE, ALL)):
            times = [own[title].latency_s * 1e3 for own in runs]
            x = place + (i - 1) * 0.24
            axes.plot([x] * len(times), times, linestyle="-", color="grey", linewidth=0.8, zorder=1)
            label = title if not place else None
            axes.plot([x] * len(times), times, linestyle="", markersize=6, label=label, **MARKERS[title])
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, None)
    axes.set_title(f"{answers.setting_words(found[0][NONE]).split(',')[0]}, bf16, H100; a mark for each run")
    _plain(axes, "ms a step")
    axes.legend(ncols=3, loc="lower center")
    return drawing


def parity() -> Figure:
    """The error of the gradients over Hugging Face's in the same dtype."""
    found = [
        pair
        for pair in curves.parities(evidence.DATA / "parity/h100.jsonl")
        if pair[0].model_name == MODEL.name + "-Instruct"
    ]
    sizes = sorted({own.tokens for _, own in found})
    looks = {
        ("bf16", "all kernels", "mean"): {"color": DARK},
        ("fp16", "all, FLCE's sum", "sum"): {"color": "#a8dadc", "hatch": ".."},
        ("fp16", "all, FLCE's mean", "mean"): {"color": ORANGE, "hatch": "//"},
    }
    series = {}
    for (dtype, words_of, reduction), style in looks.items():
        own = {p.tokens: p.ratio for c, p in found if c.flce and c.dtype == dtype and c.flce_reduction == reduction}
        series[f"{dtype}, {words_of}"] = style, [own[size] for size in sizes]
    drawing, axes = _figure(WIDTH, 2.7)
    _grouped(axes, [f"{size:,} tokens" for size in sizes], series, "{:.2f}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_title(f"{MODEL.short_name}, H100; above 1.5 counts as wrong")
    _plain(axes, "error / Hugging Face's")
    return drawing


def heat_map() -> Figure:
    """Predicted peaks by batch and length, without and with all kernels; what an H100 cannot hold is hatched."""
    records = {answers.cell(r): r for r in evidence.folder("predicted_map").records}
    batches, lengths = (sorted({cell[i] for cell in records}) for i in (1, 2))
    drawing, panels = _figure(WIDTH, 2.9, 2, sharey=True)
    for axes, title in zip(panels, (NONE, ALL)):
        for x, batch in enumerate(batches):
            for y, length in enumerate(lengths):
                record = records[answers.Cell(title, batch, length)]
                fits = record.status == "ok"
                gib = record.peak_memory_bytes / GIB if fits else 0
                looks = {"facecolor": (*SHADE, gib / 80)} if fits else {"facecolor": "white", "hatch": "////"}
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, edgecolor="#909090", linewidth=0.4, **looks))
                if fits:
                    axes.text(
                        x,
                        y,
                        f"{gib:.0f}",
                        ha="center",
                        va="center",
                        fontsize=SMALL,
                        color="white" if gib > 45 else "black",
                    )
        axes.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(lengths) - 0.5), xlabel="batch size")
        axes.set_xticks(range(len(batches)), batches)
        axes.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.tick_params(length=0)
        axes.set_title(title)
    panels[0].set_ylabel("tokens a sequence")
    drawing.suptitle(
        f"{MODEL.short_name}, bf16, checkpointing: predicted peak in GiB on an H100; hatched: does not fit",
        fontsize=SMALL,
    )
    return drawing


def memory_by_batch(runs: Folder) -> Figure:
    """What a step without Liger kernels must hold at its peak, computed from the shape, beside measured peaks."""
    drawing, axes = _figure(WIDTH, 3.5)
    places, bottom = range(len(BATCHES)), [0.0] * len(BATCHES)
    for name, hatch, label, bytes_of in (
        ("parameters", "", "weights", lambda tokens: MODEL.parameters * 2),
        ("optimizer_state", "..", "Adam's moments", lambda tokens: MODEL.parameters * 4),
        ("hidden_states", "xxx", "layer inputs kept by checkpointing", MODEL.checkpoint_bytes),
        ("logits_and_loss", "//", "three fp32 copies of the logits", lambda tokens: 3 * MODEL.logits_bytes(tokens, 4)),
    ):
        heights = [bytes_of(batch * 1024) / GIB for batch in BATCHES]
        axes.bar(places, heights, 0.55, bottom, color=COLOURS[name], hatch=hatch, label=label, **OUTLINE)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for kernels, title, marker, colour in (("none", NONE, "o", "black"), ("all", ALL, "D", "white")):
        peaks = [runs.run(kernels, batch_size=batch).peak_memory_bytes / GIB for batch in BATCHES]
        style = {"color": colour, "markeredgecolor": "black", "markersize": 6}
        axes.plot(places, peaks, marker, label=f"measured peak, {title}", **style)
    axes.set_xticks(places, [str(batch) for batch in BATCHES])
    axes.set_xlabel("batch size, 1024 tokens a sequence")
    axes.set_title(f"Llama 3.2 1B, bf16, gradient checkpointing; measured on {runs.gpu}")
    _plain(axes, "GiB")
    axes.legend()
    return drawing


def diagram(name: str) -> Figure:
    """A drawing of doc/source/diagrams.toml: boxes, arrows and words."""
    found = tomllib.loads(tables.templates().get_template("diagrams.toml").render(model=MODEL))[name]
    drawing, panels = _figure(*found["size"], len(found["panel"]), squeeze=False)
    for axes, panel in zip(panels[0], found["panel"]):
        width, height = panel["span"]
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_title(panel["title"])
        axes.set_axis_off()
        for x, y, width, height, text, colour, *looks in panel["boxes"]:
            edge, letters = LOOKS[looks[0] if looks else ""]
            patch = Rectangle((x, y), width, height, facecolor=FILLS[colour], edgecolor=edge, linewidth=0.7)
            axes.add_patch(patch)
            axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **letters)
        for x0, y0, x1, y1, *colour in panel["arrows"]:
            style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": FILLS[colour[0]] if colour else "0.25"}
            axes.add_patch(FancyArrowPatch((x0, y0), (x1, y1), **style))
        for x, y, text, size, *weight in panel.get("words", ()):
            axes.text(x, y, text, ha="center", fontsize=size, weight=weight[0] if weight else "normal")
    legend = found.get("legend", {})
    handles = [Rectangle((0, 0), 1, 1, facecolor=FILLS[colour], **OUTLINE) for colour in legend]
    if handles:
        drawing.legend(handles, legend.values(), loc="outside lower center", ncols=2)
    return drawing


def kernels_alone(folder: Folder) -> Figure:
    """Peak and time of a step with each kernel alone, and together."""
    runs = evidence.alone(folder)
    names = ["none", "RoPE", "SwiGLU", "RMSNorm", "FLCE", "all but FLCE", "all"]
    colours = [DARK, *[BLUE] * 4, *(STYLES[title]["color"] for title in (NO_FLCE, ALL))]
    drawing, (left, right) = _figure(WIDTH, 2.9, 2)
    for axes, value, form, label, title in (
        (left, peak_gib, "{:.1f}", "GiB", "peak allocated memory"),
        (right, step_ms, "{:.0f}", "ms", "time of a step, median and quartiles"),
    ):
        told = [value(run) for run in runs]
        bars = axes.bar(names, [median for median, *_ in told], 0.65, color=colours, **OUTLINE)
        axes.bar_label(bars, [form.format(median) for median, *_ in told], padding=2)
        for place, (median, below, above) in enumerate(told):
            if below or above:
                axes.errorbar(place, median, [[below], [above]], color="black", capsize=2, linewidth=0.8)
        axes.set_title(title)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.margins(y=0.12)
        _plain(axes, label)
    drawing.suptitle(f"{answers.setting_words(runs[0])}, 8 x 1024 tokens")
    return drawing


def offload_steps(runs: Folder) -> Figure:
    """Time of an offloaded step under the original's settings, under ours, and the floor."""
    pairs = evidence.preset_pairs(runs)
    drawing, axes = _figure(WIDTH, 3.2)
    groups = [f"{textwrap.fill(fast.run.title, 10)}\n{fast.run.batch_size} x 1024" for _, fast in pairs]
    series = {
        "the original's settings (preset original)": ({"color": DARK}, [first.latency_s for first, _ in pairs]),
        "ours (preset fast)": ({"color": ORANGE, "hatch": "//"}, [fast.latency_s for _, fast in pairs]),
        "floor, from rates of the same run": ({"color": PLAIN}, [fast.floor_s for _, fast in pairs]),
    }
    _grouped(axes, groups, series, "{:.2f}")
    axes.set_title(f"Llama 3.2 1B, ZeRO-3 offload, {runs.gpu}")
    _plain(axes, "seconds a step")
    return drawing


def original() -> Figure:
    """Peaks the original study published beside ours under its settings."""
    cells = [row for row in studies.beside_the_original() if row[0].strategy != NO_FLCE]
    drawing, axes = _figure(WIDTH, 3.0)
    theirs, own = ([record.peak_memory_bytes / GIB for record in column] for column in list(zip(*cells))[1:3])
    groups = [f"{'none' if cell.strategy == NONE else 'all'}\n{cell.batch_size}" for cell, *_ in cells]
    gpu = answers.gpu_name(cells[0][2])
    series = {"original study, RTX 4090": ({"color": "#b0b0b0", "hatch": "//"}, theirs)}
    series[f"ours, {gpu}"] = {"color": DARK}, own
    _grouped(axes, groups, series, "{:.1f}")
    axes.set_xlabel("Liger kernels, batch size at 1024 tokens")
    axes.set_title("Llama 3.2 1B, ZeRO-3 offload, fp16, the original's settings")
    _plain(axes, "peak allocated memory, GiB")
    return drawing
