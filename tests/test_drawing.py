"""Figures and tables drawn from records made up here, of every status; and drawing.py as a user meets it."""

import csv
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from PIL import Image

import drawing
from src.config import RunConfig
from src.machine import H100
from src.offload_config import PRESETS, OffloadConfig
from src.record import Failure, Frontier, KernelCheck, load_all, save
from src.record.recorder import new_record
from src.study import answers, figures, tables
from src.study.bars import throughput
from src.techniques import STRATEGIES, TITLES, kernels_only
from src.utils import GIB, error_line, quartiles
from tests.helpers import assert_one_error_line
from tests.made_up import BAD, anything

NONE, NO_FLCE, ALL = TITLES.values()
GPU = "NVIDIA Imaginary 1000"
BATCH_FIGURES = ["comparison_2_strategies.png", "comparison_3_strategies.png", "latency.png"]
LENGTH_FIGURES = ["comparison_fixed_batch_4_2_strategies.png", "comparison_fixed_batch_4_3_strategies.png"]

FAST = OffloadConfig(preset="fast", **PRESETS["fast"])

ABSENT = {
    "OOM": {"status": "oom", "error": Failure(type="OutOfMemoryError", message="full")},
    "OOM*": {"status": "oom", "mode": "inferred", "error": Failure(type="Inferred", message="not run")},
    "failed": {"status": "error", "error": Failure(type="Killed", message="ended by SIGSEGV")},
}


def record(strategy, batch_size, seq_length=1024, *, config=None, absent=None, gpu=GPU, date="", **values):
    """A record of a measured run with one of the study's strategies; `values` are its own, or its configuration's."""
    kernels = STRATEGIES[{title: word for word, title in TITLES.items()}[strategy]]
    config = config or RunConfig()
    fields = {f.name for f in dataclasses.fields(config)}
    settings = {name: values.pop(name) for name in list(values) if name in fields}
    sizes = {"batch_size": batch_size, "seq_length": seq_length, "device": "cuda"}
    config = dataclasses.replace(config, **{**kernels, **sizes, **settings})
    seconds = values.pop("seconds", [0.5, 0.25, 0.75, 1.0])
    first, latency, third = quartiles(seconds)
    told = {"peak_memory_bytes": 2 * GIB, "step_seconds": seconds, "latency_s": latency, "latency_iqr_s": third - first}
    told |= {"throughput_tokens_per_s": config.tokens_per_step / latency, "mfu": 0.4, "status": "ok"}
    told = {"mode": "measured", **(ABSENT[absent] if absent else told)}
    environment = {"gpu": gpu, "date": date, "torch": values.pop("torch", None)}
    return new_record(config, environment=environment, **told | values)


def predicted(*cell, **values):
    known = {"mode": "predicted", "simulated_gpu": "NVIDIA H100", "gpu": None, "dry_run": True}
    nothing = dict.fromkeys(("step_seconds", "latency_s", "latency_iqr_s", "throughput_tokens_per_s", "mfu"))
    return record(*cell, **known, **nothing, **values)


def study():
    """A small study: batch sizes at 1024 tokens and lengths at batch 4, three strategies; all figures differ."""
    cells = itertools.product(TITLES.values(), [(1, 1024), (4, 1024), (8, 1024), (4, 512), (4, 2048)])
    return [
        record(name, *cell, seconds=[0.1 * i, 0.1 * i + 0.3, 0.1 * i + 0.7], peak_memory_bytes=i * GIB + 2**20)
        for i, (name, cell) in enumerate(cells, start=1)
    ]


def drawn(found):
    """File name -> figure."""
    named = list(figures.all_figures(found))
    assert len({name for name, _ in named}) == len(named)
    return dict(named)


def title_of(figure):
    return " ".join(figure.get_suptitle().split())


def place(axes, x):
    return axes.get_xticklabels()[round(x)].get_text()


def bars(figure, axes):
    """(strategy, size) -> height; strategies by the legend's colours and hatches."""

    def look(patch):
        return to_rgb(patch.get_facecolor()), patch.get_hatch() or ""

    (legend,) = figure.legends
    names = {look(patch): text.get_text() for patch, text in zip(legend.get_patches(), legend.get_texts())}
    assert len(names) == len(legend.get_texts())  # each looks another
    shown = [patch for patch in axes.patches if patch.get_height()]  # those without are for the legend
    found = {(names[look(p)], place(axes, p.get_x() + p.get_width() / 2)): p.get_height() for p in shown}
    assert len(found) == len(shown)
    return found


def marks(axes, strategies):
    """(strategy, size) -> what is written where there is no bar."""
    width, found = 0.8 / len(strategies), {}
    for text in axes.texts:
        x = text.xy[0]
        i = round((x - round(x)) / width + (len(strategies) - 1) / 2)
        found[strategies[i], place(axes, x)] = text.get_text()
    return found


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ([(1, 1024), (8, 1024)], BATCH_FIGURES),
        ([(1, 256), (8, 256)], BATCH_FIGURES),  # another length, where there is none of the original's
        ([(4, 512), (4, 2048)], LENGTH_FIGURES),
        ([(8, 512), (8, 2048)], ["peaks.png"]),  # the original's lengths are at batch 4
        ([(8, 1024)], ["peaks.png"]),
    ],
)
def test_only_figures_whose_cells_are_there(cells, names):
    assert list(drawn([record(name, *cell) for name in (NONE, ALL) for cell in cells])) == names
    assert list(drawn([record(NONE, *cell) for cell in cells])) == ["peaks.png"]  # nothing to compare it with


@pytest.mark.parametrize("file", [*BATCH_FIGURES[:2], LENGTH_FIGURES[1]])
def test_bars_are_the_records_figures(file):
    found, by_length = study(), "fixed" in file
    strategies = (NONE, ALL) if "_2_" in file else (NONE, NO_FLCE, ALL)
    named = drawn(found)
    assert list(named) == BATCH_FIGURES + LENGTH_FIGURES
    figure = named[file]
    drawn_of = [r for r in found if (r.run.batch_size == 4 if by_length else r.run.seq_length == 1024)]
    sizes = [f"{r.run.seq_length if by_length else r.run.batch_size:,}" for r in drawn_of]
    expected = {(r.run.title, size): r for size, r in zip(sizes, drawn_of) if r.run.title in strategies}
    speed, memory = figure.axes
    tokens = {key: r.run.tokens_per_step / r.latency_s for key, r in expected.items()}
    assert bars(figure, speed) == pytest.approx(tokens)
    assert bars(figure, memory) == pytest.approx({key: r.peak_memory_bytes / GIB for key, r in expected.items()})
    assert (speed.get_ylabel(), memory.get_ylabel()) == ("tokens/s", "GiB")
    labels = ["512", "1,024", "2,048"] if by_length else ["1", "4", "8"]
    assert [label.get_text() for label in speed.get_xticklabels()] == labels
    assert speed.get_xlabel().startswith("sequence length, batch 4" if by_length else "batch size, 1024 tokens")
    assert title_of(figure).startswith(f"Llama-3.2-1B-Instruct, bf16, gradient checkpointing, {GPU}")


def test_latency_is_the_median_in_milliseconds_with_its_quartiles():
    seconds = {(NONE, 1): [0.1, 0.2, 0.4], (ALL, 1): [0.3], (ALL, 2): [0.5, 0.5]}
    found = [record(*cell, seconds=of_steps) for cell, of_steps in seconds.items()]
    figure = drawn(found)["latency.png"]
    (axes,) = figure.axes
    assert bars(figure, axes) == pytest.approx({(NONE, "1"): 200, (ALL, "1"): 300, (ALL, "2"): 500})
    ends = [c.lines[2][0].get_segments()[0][:, 1] for c in axes.containers if isinstance(c, ErrorbarContainer)]
    assert [list(end) for end in ends] == [pytest.approx([150, 300])]  # what does not vary has no whiskers
    assert throughput(found[0]) == pytest.approx((1024 / 0.2, 1024 / 0.2 - 1024 / 0.3, 1024 / 0.15 - 1024 / 0.2))


def test_what_has_no_bar_says_why():
    found = [record(NONE, 1), record(ALL, 1), record(NO_FLCE, 1)]
    found += [record(name, 2, absent=absent) for name, absent in zip((NONE, NO_FLCE, ALL), ABSENT)]
    found[-1].peak_memory_bytes = GIB  # until it failed
    found += [record(NONE, 4)]
    figure = drawn(found)["comparison_3_strategies.png"]
    expected = dict(zip(itertools.product((NONE, NO_FLCE, ALL), ["2"]), ABSENT))
    expected |= {(NO_FLCE, "4"): "not run", (ALL, "4"): "not run"}
    for axes in figure.axes:
        assert marks(axes, (NONE, NO_FLCE, ALL)) == expected
        assert set(bars(figure, axes)) == {(NONE, "1"), (NO_FLCE, "1"), (ALL, "1"), (NONE, "4")}
    assert "OOM*: not run, a smaller one ran out of memory" in title_of(figure)


def test_kernels_beyond_the_three_strategies_are_drawn_as_strategies_of_their_own():
    others = [kernels_only("rope"), kernels_only("rope", "flce")]
    found = study() + [record(NONE, size, **kernels) for kernels in others for size in (1, 8)]
    named = drawn(found)
    five = [f"pareto_all_gpu_{size}x1024_NVIDIA_Imaginary_1000.png" for size in (1, 8)]
    assert list(named) == [*BATCH_FIGURES[:2], "comparison_all_strategies.png", "latency.png", *LENGTH_FIGURES, *five]
    figure = named["comparison_all_strategies.png"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [NONE, NO_FLCE, ALL, "rope + flce only", "rope only"]
    heights = bars(figure, figure.axes[1])
    assert (heights["rope only", "8"], heights["rope + flce only", "1"]) == (2, 2)
    # The others' figures are as without them.
    three, alone = named["comparison_3_strategies.png"], drawn(study())["comparison_3_strategies.png"]
    assert bars(three, three.axes[0]) == bars(alone, alone.axes[0])


def test_other_settings_have_files_of_their_own_with_two_strategies_only_if_not_with_three():
    three = [record(name, size, config=FAST) for name in TITLES.values() for size in (1, 2)]
    two = [record(name, size, dtype="fp32", gpu="NVIDIA X") for name in (NONE, ALL) for size in (1, 2)]
    lone = [record(ALL, size, seed=7) for size in (1, 2)]
    named = drawn(study() + three + two + lone)
    first = BATCH_FIGURES + LENGTH_FIGURES
    assert list(named)[:5] == first  # the largest part of the original's grids has the original's names
    suffix = "_deepspeed_fast_NVIDIA_Imaginary_1000"
    ours = {f"comparison_3_strategies{suffix}.png", f"latency{suffix}.png"}
    others = {name.replace(".png", "_all_gpu_fp32_NVIDIA_X.png") for name in BATCH_FIGURES[1:]}
    assert set(list(named)[5:]) == ours | others | {"peaks.png"}
    figure = named[f"comparison_3_strategies{suffix}.png"]
    assert "ZeRO-3 offload, preset fast" in title_of(figure)


def test_whole_grids_come_first_and_of_those_offloads():
    few = [record(ALL, 1, config=FAST), record(NONE, 2, config=FAST)]
    whole = [record(*cell) for cell in answers.GRID]
    offloaded = [record(*cell, config=OffloadConfig()) for cell in answers.GRID[:40]]  # four fifths count as all
    found = [(setting.config.script, len(cells)) for setting, cells in answers.studies(few + whole + offloaded).items()]
    assert found == [("deepspeed", 40), ("all_gpu", 45), ("deepspeed", 2)]


@pytest.mark.parametrize("backwards", [False, True])
def test_of_several_records_of_a_run_the_best_then_the_last_counts(backwards):
    def answer(*found):
        found = [*found[:: -1 if backwards else 1], record(NONE, 2), record(NONE, 1)]
        (cells,) = answers.studies(found).values()
        return cells[answers.Cell(ALL, 1, 1024)]

    old, new = (record(ALL, 1, date=f"2026-0{month}-01", iterations=month) for month in (1, 2))
    assert answer(old, new) is new
    assert answer(new, record(ALL, 1, date="2026-03-01", warmup=0)) is new
    assert answer(old, full := record(ALL, 1, absent="OOM", date="2026-03-01")) is full
    guess, failed = (record(ALL, 1, absent=why, date="2026-04-01") for why in ("OOM*", "failed"))
    assert answer(old, guess) is old
    assert answer(failed, guess) is guess


def test_predictions_stand_beside_the_runs_they_are_of():
    measured = [record(NONE, 1, peak_memory_bytes=2 * GIB), record(ALL, 2, peak_memory_bytes=4 * GIB)]
    measured += [record(NO_FLCE, 4), record(ALL, 8, absent="OOM"), record(ALL, 1, mode="interpreted")]
    right = [predicted(NONE, 1, peak_memory_bytes=3 * GIB), predicted(ALL, 2, peak_memory_bytes=3 * GIB)]
    wrong = [predicted(NO_FLCE, 4, dtype="fp32"), predicted(NO_FLCE, 4, 512), predicted(ALL, 8), predicted(ALL, 1)]
    wrong += [predicted(ALL, 2, peak_memory_bytes=GIB, warmup=0, iterations=1)]
    named = drawn(measured + right + wrong)
    figure = named["predicted_vs_measured.png"]
    points = {point for line in figure.axes[0].lines[:4] for point in zip(*map(list, line.get_data()))}
    assert points == {(2, 3), (4, 3)}
    errors = [y for line in figure.axes[1].lines[:4] for y in line.get_ydata()]
    assert sorted(errors) == pytest.approx([-25, 50])
    assert title_of(figure) == f"2 peaks of Llama-3.2-1B-Instruct; measured: {GPU}"
    assert "predicted_vs_measured.png" in drawn([record(ALL, 1), *wrong])
    assert list(drawn([record(ALL, 1), predicted(ALL, 2)])) == ["peaks.png", "predicted_peaks.png"]


def test_predictions_have_pictures_of_their_own_that_say_so():
    sizes = (1, 4, 8)
    found = [predicted(name, size, peak_memory_bytes=30 * size * GIB) for name in TITLES.values() for size in sizes]
    found[0] = record(NONE, 1, absent="OOM*", dry_run=True, gpu=None)  # which does not name the card
    found = [r.model_copy(update={"simulated_gpu": r.simulated_gpu and H100.name}) for r in found]
    named = drawn(found)
    assert list(named) == ["predicted_comparison_3_strategies.png"]
    (figure,) = named.values()
    (axes,) = figure.axes  # no throughput: nothing was timed
    assert title_of(figure).startswith("predicted, not measured: ")
    heights = bars(figure, axes)
    assert heights[ALL, "8"] == 240
    assert marks(axes, (NONE, NO_FLCE, ALL)) == {(NONE, "1"): "OOM*"}
    (room,) = {y for line in axes.lines for y in line.get_ydata()}  # what does not fit the card is told
    assert room == (H100.memory_bytes - H100.context_bytes) / GIB
    small = [predicted(ALL, size, peak_memory_bytes=30 * GIB, gpu_memory_gib=24) for size in sizes]
    (figure,) = drawn([r.model_copy(update={"simulated_gpu": H100.name}) for r in small]).values()
    (room,) = {line.get_xdata()[0] for line in figure.axes[0].lines if "room" in line.get_label()}
    assert room == 24 - H100.context_bytes / GIB
    both = drawn([*study(), *found])
    assert set(both) == {*drawn(study()), *named, "predicted_vs_measured.png"}
    for name in BATCH_FIGURES[:2]:
        alone = drawn(study())[name]
        assert bars(both[name], both[name].axes[1]) == bars(alone, alone.axes[1])


def test_peaks_of_a_few_runs_are_what_they_are_made_of():
    parts = {"parameters": GIB // 2, "logits_and_loss": GIB, "gradients": 0}
    few = [record(NONE, 8, peak_memory_bytes=3 * GIB // 2, peak_breakdown=parts), record(ALL, 8, peak_memory_bytes=GIB)]
    (figure,) = drawn([*few, record(NO_FLCE, 8, absent="OOM")]).values()
    (axes,) = figure.axes
    widths = [(patch.get_y() + 0.3, patch.get_width()) for patch in axes.patches]
    assert widths == [(0, 0.5), (0, 0), (0, 1), (1, 1)]
    assert [label.get_text().split("\n") for label in axes.get_yticklabels()] == [
        [NONE, "8 x 1,024"],
        [ALL, "8 x 1,024"],
    ]
    assert [text.get_text() for text in axes.texts] == ["1.50 GiB, 13,107 tokens/s", "1.00 GiB, 13,107 tokens/s"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["not taken apart", "parameters", "logits and loss"]
    found = predicted(ALL, 8, find_max="batch_size", frontier=FRONTIER)
    (name, figure), *_ = drawn([found]).items()
    assert name == "predicted_peaks.png"
    assert figure.axes[0].get_yticklabels()[0].get_text() == f"{ALL}\n17 x 1,024, the largest that fits"


def test_single_runs_of_several_settings_stand_in_one_picture():
    found = [record(ALL, 8), record(ALL, 8, dtype="fp32", seed=7), record(ALL, 8, gpu="NVIDIA Other")]
    named = drawn(found)
    assert list(named) == ["peaks.png", "peaks_NVIDIA_Other.png"]
    labels = [label.get_text() for label in named["peaks.png"].axes[0].get_yticklabels()]
    assert labels == [f"{ALL}\n8 x 1,024, bf16", f"{ALL}\n8 x 1,024, fp32, seed 7"]
    assert title_of(named["peaks.png"]) == f"Llama-3.2-1B-Instruct, gradient checkpointing, {GPU}"


def test_kernels_checked_without_a_gpu_are_drawn():
    checks = [((), 0.0, 4, True), (("rope",), 0.0, 4, True), (("flce",), 2e-7, 2, False)]
    rows = [
        KernelCheck(kernels=list(names), implementations={}, losses=[8.0], loss_difference=0.0, gradient_difference=g,
                    peak_memory_bytes=peak * 2**20, agrees=agrees)
        for names, g, peak, agrees in checks
    ]  # fmt: skip
    one = record(ALL, 2, mode="interpreted", kernel_check=rows, peak_memory_bytes=2**21)
    ((name, figure),) = drawn([one]).items()
    assert name == "kernel_check.png"
    memory, gradients = figure.axes
    assert [patch.get_width() for patch in memory.patches] == [4, 4, 2]
    assert [text.get_text() for text in gradients.texts] == ["", "0", "2.0e-07"]
    names = [label.get_text() for label in memory.get_yticklabels()]
    assert names == ["none (Hugging Face)", "rope", "flce DIFFERS"]


def test_spread_between_runs_is_told_beside_the_one_that_is_shown():
    first, again = (record(ALL, 1, date=f"2026-0{i}-01", seconds=[0.1 * i]) for i in (1, 2))
    limited = record(ALL, 1, seconds=[0.4], memory_limit_gib=24.0, allocation_retries=0)
    other = record(ALL, 1, seconds=[0.8], gpu="NVIDIA Other")
    found = [record(NONE, 1), record(NONE, 2), again, first, limited, other, first.model_copy()]
    table = [row for row in tables.runs_table(found)[1:] if row[0] == ALL]
    assert {row[-1] for row in table} == {"", "3 runs: 100.0 to 400.0"}
    assert [row[-1] for row in table if "Other" in row[3]] == [""]
    title = title_of(drawn(found)["comparison_2_strategies.png"])
    assert "1 of 3 cells were run again: -50% to +100% time a step" in title


SETTINGS = f"Llama-3.2-1B-Instruct, bf16, gradient checkpointing, {GPU}"
FRONTIER = Frontier(searched="batch_size", limit_bytes=9, predicted=17)
OFFLOADED = SETTINGS.replace("bf16, ", "bf16, ZeRO-3 offload, preset fast, ")
ROWS = {
    f"{NONE};8;1,024;{SETTINGS};measured;1,234.50;1,000.0;500.0;8,192;12.3%": record(
        NONE, 8, seconds=[0.5, 1.0, 1.5], peak_memory_bytes=int(1234.5 * GIB), mfu=0.12345
    ),
    f"{NONE};16;1,024;{SETTINGS};OOM*;;;;;": record(NONE, 16, absent="OOM*"),
    f"{NO_FLCE};8;1,024;{SETTINGS};failed;;;;;": record(NO_FLCE, 8, absent="failed"),
    f"{ALL};8;4,096;{SETTINGS}, limited to 24 GiB;OOM;;;;;": record(ALL, 8, 4096, absent="OOM", memory_limit_gib=24.0),
    f"{NO_FLCE};17;1,024;{SETTINGS.replace(GPU, 'NVIDIA H100')}, find_max batch_size;predicted;2.00;;;;": predicted(
        NO_FLCE, 8, find_max="batch_size", frontier=FRONTIER
    ),
    f"{ALL};4;1,024;{OFFLOADED};measured;2.00;625.0;375.0;6,554;40.0%": record(ALL, 4, config=FAST),
}
HEADER = [
    "kernels",
    "batch",
    "seq",
    "settings",
    "status",
    "peak GiB",
    "ms a step",
    "IQR ms",
    "tokens/s",
    "MFU",
    "parity",
    "frontier",
    "repeats, ms a step",
]


def test_tables_have_a_sorted_row_for_each_record_and_read_back_as_they_were():
    for row, of in ROWS.items():
        assert tables.runs_table([of]) == [HEADER, [*row.split(";"), "", "", ""]]
    found = list(ROWS.values())
    table = tables.runs_table(found)
    assert tables.runs_table(found[::-1]) == table
    order = [(row[3], row[2], int(row[1])) for row in table[1:]]
    assert order == sorted(order)
    rows = list(csv.reader(io.StringIO(tables.FORMATS["csv"](table))))
    assert rows == [[cell.replace(",", "") for cell in row] for row in table]
    lines = tables.FORMATS["markdown"](table).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert cells == table


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """Run drawing.py in this process, in an empty folder; the study's records are in `study`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["drawing.py", *map(str, arguments)])
        return drawing.main(), *capsys.readouterr()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(drawing, "STUDY", tmp_path / "study")
    return run


def keep(folder, *found):
    for one in found:
        save(one, folder / f"{one.run_name}.json", str)


LENGTHS = [record(name, 4, length) for name in (NONE, ALL) for length in (512, 2048)]


def test_pictures_of_ones_own_records_else_of_the_study(draw, tmp_path):
    other = [record(name, 4, length, seed=7) for name in (NONE, ALL) for length in (512, 2048)]
    keep(tmp_path / "study", *LENGTHS, *other)
    status, stdout, stderr = draw("--out", "pictures")
    assert status == 0
    assert stderr == "No records in results/: some of the study's own instead; name ../study for all.\n"
    written = sorted([f"pictures/{name}" for name in LENGTH_FIGURES] + LENGTH_FIGURES)
    assert sorted(stdout.splitlines()) == written  # and not of every setting that the study has
    assert sorted(str(path) for path in Path().rglob("*.png")) == written
    with Image.open(LENGTH_FIGURES[0]) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1800, 720)
    status, stdout, stderr = draw("--table", "markdown")  # there is nothing else in it
    assert stdout == tables.FORMATS["markdown"](tables.runs_table(load_all([tmp_path / "study"]))) + "\n"
    assert (status, "No records in results/" in stderr) == (0, True)
    keep(tmp_path / "here" / "results", record(NONE, 4))
    assert draw() == (0, "figures/peaks.png\n", "")
    status, stdout, _ = draw("--table", "csv")
    assert (status, stdout.count("\n"), stdout.splitlines()[1].startswith("No Liger Kernel,4,1024")) == (0, 2, True)


def test_file_that_is_no_record_is_told_and_the_others_are_drawn(draw, tmp_path):
    keep(tmp_path / "fine", *LENGTHS)
    for name, content in (("empty", ""), ("list", "[]"), ("schema", '{"schema": 99}'), ("bytes", "\x80")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(content)
        status, stdout, stderr = draw(tmp_path / "fine", tmp_path / name)
        assert (status, len(stdout.splitlines())) == (1, 4)
        assert_one_error_line(stderr, f"skipped: {tmp_path / name / 'x.json'} is not a record: ")
        status, stdout, _ = draw(tmp_path / "fine", tmp_path / name, "--table=csv")
        assert (status, len(stdout.splitlines())) == (1, 5)
    os.mkfifo(tmp_path / "list" / "pipe.json")  # nobody writes into it
    assert "pipe.json is not a record: it is no regular file" in draw(tmp_path / "list")[2]


def test_what_cannot_be_drawn_is_one_line_and_its_status(draw, monkeypatch, tmp_path):
    status, _, stderr = draw(tmp_path / "nowhere")
    assert status == 2
    assert_one_error_line(stderr, f"no records below {tmp_path / 'nowhere'}")
    keep(
        tmp_path / "none", record(NONE, 4, absent="OOM"), record(ALL, 4, absent="failed"), record(ALL, 1, absent="OOM")
    )
    status, _, stderr = draw(tmp_path / "none")
    assert status == 2
    assert_one_error_line(stderr, "nothing to draw: no peak and no kernel check in 2 OOM, 1 failed; --table markdown")
    keep(tmp_path / "fine", *LENGTHS)

    def full_disk(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    status, _, stderr = draw(tmp_path / "fine")
    assert status == 1
    assert_one_error_line(stderr, "No space left on device: 'figures/comparison_fixed")
    assert not list(Path().rglob("*.png"))


# Whatever a file says


def test_texts_from_files_are_escaped_for_where_they_go(tmp_path, capsys):
    found = [record(ALL, 1, gpu=BAD), record(ALL, 1, model_name="=HYPERLINK()")]
    table = tables.runs_table(found)
    lines = tables.FORMATS["markdown"](table).splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(HEADER) + 1}
    for text in map(tables.FORMATS.get, ("csv", "markdown")):
        assert "\x1b" not in text(table)
    cells = [cell for row in csv.reader(io.StringIO(tables.FORMATS["csv"](table))) for cell in row]
    assert [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")] == []
    assert "'=HYPERLINK() bf16" in " ".join(cells)
    assert tables.to_csv([["-1.5", "+3", "1,000", "-x", "@y", "-5%"]]) == "-1.5,+3,1000,'-x,'@y,-5%"
    next(iter(drawn(found).values())).savefig(tmp_path / "x.png")
    error_line(BAD)
    assert capsys.readouterr().err == "error: =1+1|\\x1b[31m $\\frac$\n"


@settings(max_examples=25)
@given(written=anything())
def test_tables_and_figures_take_whatever_is_a_record(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    for i, values in enumerate(written):
        (folder / f"{i}.json").write_text(json.dumps(values))
    found = load_all([folder], lambda error: None)
    if found:
        for form in tables.FORMATS.values():
            assert form(tables.runs_table(found))
    for name, figure in figures.all_figures(found):
        assert len(name) < 255
        figure.savefig(io.BytesIO(), dpi=20, format="png")
