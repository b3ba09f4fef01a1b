"""Figures and tables drawn from records made up here, of every status; and drawing.py as a user meets it."""

import csv
import io
import itertools
import shutil
import statistics
import sys
from collections import Counter

import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from PIL import Image

import drawing
from src import figures, records, tables
from src import study as study_of
from src.config import STRATEGIES, OffloadConfig, RunConfig
from src.utils import GIB, median_and_iqr
from tests.helpers import ROOT, assert_one_error_line, run_python
from tests.made_up import ALL, GPU, NO_FLCE, NONE, failed, grids, inferred, make, out_of_memory, predicted

FOUR_FIGURES = (
    "comparison_2_strategies.png",
    "comparison_3_strategies.png",
    "comparison_fixed_batch_4_2_strategies.png",
    "comparison_fixed_batch_4_3_strategies.png",
)


def random_seconds(rng):
    return [rng.uniform(0.1, 2) for _ in range(rng.randrange(2, 12))]


def study(rng):
    """A small study: batch sizes at 1024 tokens and lengths at batch 4, three strategies."""
    cells = [(batch, 1024) for batch in (1, 4, 8)] + [(4, 512), (4, 2048)]
    return [
        make(name, *cell, seconds=random_seconds(rng), peak=rng.randrange(GIB, 80 * GIB))
        for name in STRATEGIES
        for cell in cells
    ]


def drawn(found):
    """File name -> figure."""
    named = list(figures.all_figures(found))
    assert len({name for name, _ in named}) == len(named)
    return dict(named)


def title_of(figure):
    """Its title as one line."""
    return " ".join(figure.get_suptitle().split())


def style_of(patch):
    return to_rgb(patch.get_facecolor()), patch.get_hatch() or ""


NAMES = {(to_rgb(style["color"]), style["hatch"]): name for name, style in figures.STYLES.items()}


def place(axes, x):
    """The label on the horizontal axis below `x`."""
    return axes.get_xticklabels()[round(x)].get_text()


def bars(axes):
    """(strategy, size) -> height."""
    found = {}
    for patch in axes.patches:
        if patch.get_height():  # those without are for the legend
            x = patch.get_x() + patch.get_width() / 2
            key = NAMES[style_of(patch)], place(axes, x)
            assert key not in found
            found[key] = patch.get_height()
    return found


def whiskers(axes):
    """(strategy, size) -> lower and upper end."""
    centers = {
        round(patch.get_x() + patch.get_width() / 2, 6): NAMES[style_of(patch)]
        for patch in axes.patches
        if patch.get_height()
    }
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            ((x, low), (_, high)) = container.lines[2][0].get_segments()[0]
            found[centers[round(x, 6)], place(axes, x)] = low, high
    return found


def marks(axes, strategies):
    """(strategy, size) -> what is written where there is no bar."""
    width = 0.8 / len(strategies)
    found = {}
    for text in axes.texts:
        x = text.xy[0]
        i = round((x - round(x)) / width + (len(strategies) - 1) / 2)
        found[strategies[i], place(axes, x)] = text.get_text()
    return found


# Figures


def test_study_gives_the_five_files(rng):
    assert list(drawn(study(rng))) == [*FOUR_FIGURES[:2], "latency.png", *FOUR_FIGURES[2:]]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ([(1, 1024), (8, 1024)], ["comparison_2_strategies.png", "comparison_3_strategies.png", "latency.png"]),
        ([(1, 256), (8, 256)], ["comparison_2_strategies.png", "comparison_3_strategies.png", "latency.png"]),
        ([(4, 512), (4, 2048)], list(FOUR_FIGURES[2:])),
        ([(8, 512), (8, 2048)], []),  # the original's lengths are at batch 4
        ([(8, 1024)], []),
    ],
    ids=["batch sizes", "batch sizes at another length", "lengths", "lengths at another batch", "one size"],
)
def test_only_figures_whose_cells_are_there(cells, names):
    assert list(drawn([make(name, *cell) for name in (NONE, ALL) for cell in cells])) == names


def test_batch_sizes_are_those_at_the_originals_length_if_there_are_some(rng):
    cells = [(batch, 1024) for batch in (1, 8)] + [(batch, 300) for batch in (1, 2, 3)]
    found = [make(name, *cell) for cell in cells for name in (NONE, ALL)]
    rng.shuffle(found)
    assert drawn(found)[FOUR_FIGURES[0]].axes[0].get_xlabel() == "batch size, 1024 tokens a sequence"
    without = [
        record for record in found if record["config"]["seq_length"] == 300 or record["config"]["batch_size"] == 8
    ]
    assert drawn(without)[FOUR_FIGURES[0]].axes[0].get_xlabel() == "batch size, 300 tokens a sequence"


def test_one_strategy_alone_is_not_compared():
    assert drawn([make(ALL, batch) for batch in (1, 2, 4)]) == {}


def test_no_records_no_figures():
    assert drawn([]) == {}


@pytest.mark.parametrize("strategies", [figures.TWO, figures.THREE], ids=len)
def test_bars_are_the_records_figures(rng, strategies):
    found = study(rng)
    rng.shuffle(found)
    left, right = drawn(found)[f"comparison_{len(strategies)}_strategies.png"].axes
    expected = {
        (name, str(r["config"]["batch_size"])): r
        for name in strategies
        for r in found
        if r["config"]["seq_length"] == 1024 and RunConfig.from_dict(r["config"]).strategy == STRATEGIES[name]
    }
    assert len(expected) == 3 * len(strategies)
    throughputs = {cell: r["throughput_tokens_per_s"] for cell, r in expected.items()}
    assert bars(left) == pytest.approx(throughputs)
    assert bars(right) == pytest.approx({cell: r["peak_memory_bytes"] / GIB for cell, r in expected.items()})
    assert whiskers(right) == marks(left, strategies) == marks(right, strategies) == {}
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "4", "8"]


@pytest.mark.parametrize("file", [FOUR_FIGURES[2], FOUR_FIGURES[3]])
def test_bars_by_length(rng, file):
    found = study(rng)
    strategies = figures.TWO if "2" in file else figures.THREE
    left, right = drawn(found)[file].axes
    peaks = {
        (RunConfig.from_dict(r["config"]).strategy.title, f"{r['config']['seq_length']:,}"): r["peak_memory_bytes"]
        for r in found
        if r["config"]["batch_size"] == 4
    }
    assert bars(right) == pytest.approx({cell: peak / GIB for cell, peak in peaks.items() if cell[0] in strategies})
    assert [label.get_text() for label in left.get_xticklabels()] == ["512", "1,024", "2,048"]


def test_whiskers_are_quartiles(rng):
    found = study(rng)
    seconds = {
        (RunConfig.from_dict(r["config"]).strategy.title, str(r["config"]["batch_size"])): r["step_seconds"]
        for r in found
        if r["config"]["seq_length"] == 1024
    }
    quartiles = {cell: statistics.quantiles(steps, n=4, method="inclusive") for cell, steps in seconds.items()}
    figure = drawn(found)
    (times,) = figure["latency.png"].axes
    assert bars(times) == pytest.approx({cell: 1e3 * median for cell, (_, median, _) in quartiles.items()})
    ends = whiskers(times)
    assert ends.keys() == quartiles.keys()
    for cell, (first, _, third) in quartiles.items():
        assert ends[cell] == pytest.approx((1e3 * first, 1e3 * third))
    speed = whiskers(figure["comparison_3_strategies.png"].axes[0])
    for (name, batch), (first, _, third) in quartiles.items():
        tokens = int(batch) * 1024
        assert speed[name, batch] == pytest.approx((tokens / third, tokens / first))


def test_steps_that_took_the_same_time_have_no_whiskers():
    found = [make(name, batch, seconds=3 * [0.5]) for name in STRATEGIES for batch in (1, 2)]
    assert whiskers(drawn(found)["latency.png"].axes[0]) == {}


def test_run_of_one_step_is_drawn_without_whiskers():
    found = [make(name, batch, seconds=[0.5], iterations=1) for name in (NONE, ALL) for batch in (1, 2)]
    (times,) = drawn(found)["latency.png"].axes
    assert set(bars(times).values()) == {500.0}
    assert whiskers(times) == {}


def test_what_has_no_bar_says_why():
    found = [
        make(NONE, 1),
        out_of_memory(NONE, 2),
        inferred(NONE, 4),
        make(NO_FLCE, 1),
        failed(NO_FLCE, 2),
        make(ALL, 1),
        make(ALL, 2),
        make(ALL, 4),
    ]
    two, three, times = (drawn(found)[f] for f in (*FOUR_FIGURES[:2], "latency.png"))
    absent = {(NONE, "2"): "OOM", (NONE, "4"): "OOM*"}
    for axes in two.axes:
        assert marks(axes, figures.TWO) == absent
        assert bars(axes).keys() == {(NONE, "1"), (ALL, "1"), (ALL, "2"), (ALL, "4")}
    absent |= {(NO_FLCE, "2"): "failed", (NO_FLCE, "4"): "not run"}
    for axes in (*three.axes, *times.axes):
        assert marks(axes, figures.THREE) == absent
        assert bars(axes).keys() == {(NONE, "1"), (NO_FLCE, "1"), (ALL, "1"), (ALL, "2"), (ALL, "4")}


@pytest.mark.parametrize("absent", [failed, inferred], ids=lambda absent: absent.__name__)
@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_measurement_counts_where_the_same_cell_also_failed(absent, order):
    """As when an earlier attempt, with another number of steps, is still in the folder."""
    cell = [make(NONE, 2), absent(NONE, 2, iterations=3)][::order]
    for axes in drawn([make(NONE, 1), *cell, make(ALL, 1), make(ALL, 2)])[FOUR_FIGURES[0]].axes:
        assert (NONE, "2") in bars(axes)
        assert marks(axes, figures.TWO) == {}


@pytest.mark.parametrize("absent", [out_of_memory, failed, inferred], ids=lambda absent: absent.__name__)
def test_failure_is_never_a_bar_whatever_else_it_has(absent):
    """A run that ran out of memory may have recorded a peak before."""
    odd = absent(NONE, 2) | {"peak_memory_bytes": 9 * GIB, "step_seconds": [1.0, 2.0]}
    left, right = drawn([make(NONE, 1), odd, make(ALL, 1), make(ALL, 2)])[FOUR_FIGURES[0]].axes
    for axes in (left, right):
        assert (NONE, "2") not in bars(axes)


def test_two_strategies_leave_out_the_third(rng):
    found = drawn(study(rng))
    for name, strategies in zip(FOUR_FIGURES, (figures.TWO, figures.THREE) * 2):
        legend = [text.get_text() for text in found[name].legends[0].get_texts()]
        assert legend == list(strategies)
        for axes in found[name].axes:
            assert {strategy for strategy, _ in bars(axes)} == set(strategies)


def test_size_that_only_the_third_strategy_has_is_not_on_the_axis_of_two():
    found = [make(name, batch) for name in STRATEGIES for batch in (1, 2)] + [make(NO_FLCE, 4)]
    two, three = (drawn(found)[name].axes[0] for name in FOUR_FIGURES[:2])
    assert [label.get_text() for label in two.get_xticklabels()] == ["1", "2"]
    assert [label.get_text() for label in three.get_xticklabels()] == ["1", "2", "4"]


def test_axes_say_what_and_in_which_unit(rng):
    found = drawn(study(rng))
    for name in FOUR_FIGURES[:2]:
        left, right = found[name].axes
        assert left.get_xlabel() == right.get_xlabel() == "batch size, 1024 tokens a sequence"
        assert (left.get_ylabel(), right.get_ylabel()) == ("tokens/s", "GiB")
        assert (left.get_title(), right.get_title()) == ("throughput", "peak allocated memory")
    for name in FOUR_FIGURES[2:]:
        left, right = found[name].axes
        assert left.get_xlabel() == right.get_xlabel() == "sequence length, batch 4"
        assert (left.get_ylabel(), right.get_ylabel()) == ("tokens/s", "GiB")
    (times,) = found["latency.png"].axes
    assert (times.get_xlabel(), times.get_ylabel()) == ("batch size, 1024 tokens a sequence", "ms")
    for figure in found.values():
        for axes in figure.axes:
            assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize("peak", [0.003, 0.7, 21.5, 70])
@pytest.mark.parametrize("seconds", [1e-4, 0.3, 20])
def test_ticks_are_where_their_labels_say(peak, seconds):
    found = [make(name, b, peak=int(peak * b * GIB), seconds=[seconds]) for name in (NONE, ALL) for b in (1, 2)]
    for figure in drawn(found).values():
        figure.canvas.draw()
        for axes in figure.axes:
            told = [float(label.get_text().replace(",", "")) for label in axes.get_yticklabels()]
            assert told == pytest.approx(list(axes.get_yticks()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["Llama-3.2-1B-Instruct", "bf16", "gradient checkpointing", GPU]),
        ({"memory_limit_gib": 23.5}, ["limited to 23.5 GiB"]),
        ({"gradient_checkpointing": False, "dtype": "fp32"}, ["no checkpointing", "fp32"]),
        ({"model_name": "meta-llama/Llama-3.1-8B-Instruct", "seed": 7}, ["Llama-3.1-8B-Instruct", "seed 7"]),
        ({"config": OffloadConfig, "preset": "seed"}, ["ZeRO-3 offload, preset seed", "fp16"]),
        ({"config": OffloadConfig, "gradient_accumulation_steps": 2}, ["gradient_accumulation_steps 2"]),
    ],
    ids=["usual", "limit", "dtype", "model", "offload", "accumulation"],
)
def test_title_names_model_machine_and_settings(settings, words):
    found = [make(name, batch, **settings) for name in (NONE, ALL) for batch in (1, 2)]
    for figure in drawn(found).values():
        title = title_of(figure)
        assert GPU in title
        assert [word for word in words if word not in title] == []
        assert "limited" in title or "memory_limit_gib" not in settings
        assert "quartiles" in title
        assert "OOM*" not in title


def test_title_fits_its_figure():
    common = {"config": OffloadConfig, "model_name": "meta-llama/Llama-3.1-8B-Instruct", "learning_rate": 1.25e-5}
    found = [make(name, batch, **common, weight_decay=0.125) for name in (NONE, ALL) for batch in (1, 2)]
    found += [inferred(ALL, 4, **common, weight_decay=0.125)]
    for figure in drawn(found).values():
        figure.canvas.draw()
        extent = figure._suptitle.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width


def test_title_explains_what_was_not_run():
    found = [make(NONE, 1), inferred(NONE, 2), make(ALL, 1), make(ALL, 2)]
    for figure in drawn(found).values():
        assert "OOM*: not run" in title_of(figure)


SETTINGS = {
    "limit": {"memory_limit_gib": 24.0},
    "checkpointing": {"gradient_checkpointing": False},
    "dtype": {"dtype": "fp32"},
    "model": {"model_name": "meta-llama/Llama-3.2-3B-Instruct"},
    "GPU": {"gpu": "NVIDIA Other"},
    "script": {"config": OffloadConfig, "preset": "fast"},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings_go_to_other_files(setting):
    other = SETTINGS[setting]
    common = [make(name, batch, peak=GIB) for name in STRATEGIES for batch in (1, 2, 4)]
    found = [make(name, batch, peak=5 * GIB, **other) for name in (NONE, ALL) for batch in (1, 2)] + common
    named = drawn(found)
    usual = {name: figure for name, figure in named.items() if name in (*FOUR_FIGURES, "latency.png")}
    assert len(usual) == 3
    assert len(named) == 6
    for name, figure in named.items():
        if "comparison" in name:
            assert set(bars(figure.axes[1]).values()) == {1 if name in usual else 5}


def usual_title(found):
    """The title of the figure with the original's first name, and how many figures there are of each."""
    named = drawn(found)
    assert len(named) == 5 * sum(name.startswith("latency") for name in named)
    return named[FOUR_FIGURES[0]].get_suptitle()


OFFLOAD = {"config": OffloadConfig, "dtype": "fp16"}


def test_grid_is_the_originals():
    assert len(study_of.GRID) == len(set(study_of.GRID)) == 45
    with (ROOT / "doc/data/original/rtx4090_offload.csv").open() as file:
        published = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {(r["strategy"], int(r["batch_size"]), int(r["seq_length"])) for r in published} < set(study_of.GRID)


@pytest.mark.parametrize(
    "lesser",
    [
        {},
        {"gradient_checkpointing": False},
        {**OFFLOAD, "preset": "fast"},
        {**OFFLOAD, "memory_limit_gib": 24.0},
        {**OFFLOAD, "world_size": 2},
        {**OFFLOAD, "gpu": "NVIDIA Younger"},
    ],
    ids=["one GPU", "no checkpointing", "fast", "limit", "two GPUs", "another machine"],
)
@pytest.mark.parametrize("lost", [0, 4])
def test_offload_grids_have_the_originals_names(rng, lesser, lost):
    """Also if a few of their cells are missing or crashed."""
    missing, crashed = (rng.sample(study_of.GRID, lost) if "gpu" not in lesser else () for _ in range(2))
    found = grids(without=missing, **OFFLOAD) + grids(**lesser)
    for record in found[: 45 - len(missing)]:
        if study_of.cell(record) in crashed:
            record |= failed(*study_of.cell(record), **OFFLOAD)
    rng.shuffle(found)
    title = usual_title(found)
    assert "ZeRO-3 offload, preset seed, gradient checkpointing" in title
    assert title.splitlines()[0].endswith(GPU)


def test_grids_come_before_a_few_cells_whatever_those_are_of(rng):
    few = [make(*cell, **OFFLOAD) for cell in study_of.GRID if cell.batch_size in (1, 8) or cell.seq_length == 512]
    few += [make(*cell, **OFFLOAD) for cell in study_of.GRID if cell.seq_length == 4096]
    found = few + grids()
    rng.shuffle(found)
    assert "offload" not in usual_title(found)


def test_of_two_measurements_of_a_cell_the_later_counts(rng):
    """Records of several folders."""
    common = [make(NONE, 1), make(ALL, 1), make(ALL, 2)]
    cell = [
        make(NONE, 2, peak=(3 + i) * GIB, iterations=5 + i, environment={"gpu": GPU, "date": f"2026-11-2{i}T17:29:32"})
        for i in range(3)
    ]
    rng.shuffle(cell)
    _, right = drawn(common + cell)[FOUR_FIGURES[0]].axes
    assert bars(right)[NONE, "2"] == 5


def test_runs_that_never_met_their_limit_stand_for_those_without(rng):
    """Of the study without a limit and of the limited one; others only of the latter."""
    free = [make(NONE, 1), make(ALL, 1)]
    limited = [
        make(ALL, 2, peak=2 * GIB, memory_limit_gib=24.0, allocation_retries=0),
        make(ALL, 4, peak=3 * GIB, memory_limit_gib=24.0, allocation_retries=1),
        make(ALL, 8, peak=4 * GIB, memory_limit_gib=24.0),  # an old record, which does not say
        out_of_memory(NONE, 2, memory_limit_gib=24.0, allocation_retries=0),
        make(ALL, 16, peak=5 * GIB, memory_limit_gib=24.0, allocation_retries=0, dtype="fp32"),
    ]
    found = free + limited
    rng.shuffle(found)
    drawings = [figure for name, figure in drawn(found).items() if name.startswith("comparison_2_strategies")]
    (without,) = (figure for figure in drawings if "limited" not in title_of(figure))
    (under,) = (figure for figure in drawings if "limited" in title_of(figure))
    assert set(bars(without.axes[1])) == {(NONE, "1"), (ALL, "1"), (ALL, "2")}
    assert set(bars(under.axes[1])) == {(ALL, "2"), (ALL, "4"), (ALL, "8")}
    assert "1 of 3 runs under a memory limit that they never met" in title_of(without)
    assert "never met" not in title_of(under)


def test_limited_runs_alone_make_no_study_without_a_limit():
    found = [make(n, b, memory_limit_gib=24.0, allocation_retries=0) for n in (NONE, ALL) for b in (1, 2)]
    assert all("limited to 24 GiB" in title_of(figure) for figure in drawn(found).values())


@pytest.mark.parametrize("absent", [failed, inferred], ids=lambda absent: absent.__name__)
@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_out_of_memory_counts_before_what_is_not_measured(absent, order):
    cell = [out_of_memory(NONE, 2), absent(NONE, 2, iterations=3)][::order]
    left, _ = drawn([make(NONE, 1), *cell, make(ALL, 1), make(ALL, 2)])[FOUR_FIGURES[0]].axes
    assert marks(left, figures.TWO) == {(NONE, "2"): "OOM"}


def test_runs_with_other_cpus_are_drawn_by_themselves_only_where_these_compute():
    machines = [{"gpu": GPU, "cpu_count": cores} for cores in (8, 64)]
    for config, groups in ((RunConfig, 1), (OffloadConfig, 2)):
        found = [make(n, b, config=config, environment=m) for m in machines for n in (NONE, ALL) for b in (1, 2)]
        named = drawn(found)
        assert len(named) == 3 * groups
        titles = {title_of(figure) for figure in named.values()}
        assert all("CPU cores" in title for title in titles) == (config is OffloadConfig)


def test_versions_are_named_where_they_differ():
    found = [
        make(name, batch, environment={"gpu": GPU, "torch": f"2.{10 + batch}", "triton": "3.9"})
        for name in (NONE, ALL)
        for batch in (1, 2)
    ]
    for figure in drawn(found).values():
        assert "torch 2.11 and 2.12" in title_of(figure)
        assert "triton" not in title_of(figure)


def test_size_without_any_bar_is_on_the_axis():
    found = [make(name, batch) for name in (NONE, ALL) for batch in (1, 2)]
    found += [out_of_memory(name, 4) for name in (NONE, ALL)]
    for figure in drawn(found).values():
        for axes in figure.axes:
            assert axes.get_xlim() == (-0.6, 2.6)


def test_batch_of_several_gpus_says_so():
    found = [make(name, batch, config=OffloadConfig, world_size=2) for name in (NONE, ALL) for batch in (1, 2)]
    axes = drawn(found)[FOUR_FIGURES[0]].axes[0]
    assert axes.get_xlabel() == "batch size per GPU, 1024 tokens a sequence"
    assert set(bars(axes).values()) == {2 * b * 1024 / median_and_iqr([0.5, 0.25, 0.75, 1.0])[0] for b in (1, 2)}


def test_every_group_has_files_of_its_own(rng):
    groups = [{}, *SETTINGS.values()]
    found = [make(name, batch, **settings) for settings in groups for name in (NONE, ALL) for batch in (1, 2)]
    rng.shuffle(found)
    assert len(drawn(found)) == 3 * len(groups)


@pytest.mark.parametrize(
    "setting",
    [
        {"result_dir": "a"},
        {"snapshot_dir": ""},
        {"log_dir": "b"},
        {"debug": True},
        {"iterations": 50},
        {"warmup": 9},
        {"step_per_print": 2},
    ],
    ids=str,
)
def test_what_does_not_change_the_step_does_not_part_runs(setting):
    found = [
        make(name, batch, config=OffloadConfig, **own)
        for name, batch, own in [(NONE, 1, {}), (NONE, 2, setting), (ALL, 1, setting), (ALL, 2, {})]
    ]
    named = drawn(found)
    assert list(named) == [*FOUR_FIGURES[:2], "latency.png"]
    assert len(bars(named["latency.png"].axes[0])) == 4


def test_predictions_interpreted_runs_and_searches_are_no_bars():
    found = [make(name, batch) for name in (NONE, ALL) for batch in (1, 2)]
    others = [predicted(NONE, 4), make(ALL, 8, mode="interpreted"), make(ALL, 16, find_max="batch_size", frontier={})]
    left, _ = drawn(found + others)[FOUR_FIGURES[0]].axes
    assert {size for _, size in bars(left)} == {"1", "2"}


def test_cells_inferred_from_predictions_are_no_figure_of_measured_runs():
    """What a sweep with --dry_run --gpu_memory_gib leaves."""
    card = {"dry_run": True, "gpu_memory_gib": 24.0, "gpu": None}
    found = [predicted(name, 1, gpu_memory_gib=24.0) for name in (NONE, ALL)]
    found += [out_of_memory(name, 2, mode="predicted", simulated_gpu="NVIDIA H100", **card) for name in (NONE, ALL)]
    found += [inferred(name, batch, **card) for name in (NONE, ALL) for batch in (4, 8)]
    assert drawn(found) == {}


def test_strategies_that_the_figures_do_not_compare_give_no_empty_figure():
    found = [make(ALL, batch) for batch in (1, 2)]
    for record in found:
        record["config"] |= {"rope": False, "swiglu": record["config"]["batch_size"] == 1}
    for figure in drawn(found).values():
        assert all(bars(axes) for axes in figure.axes)


def luminance(color):
    """Relative luminance, as a grey print has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_bars_differ_in_print_without_colour():
    assert figures.STYLES.keys() == STRATEGIES.keys()
    lightness = sorted(116 * luminance(style["color"]) ** (1 / 3) - 16 for style in figures.STYLES.values())
    assert min(second - first for first, second in itertools.pairwise(lightness)) > 12  # of 100
    assert len({style["hatch"] for style in figures.STYLES.values()}) == 3


# Predictions beside measurements


def test_predictions_stand_beside_the_runs_they_are_of(rng):
    peaks = [rng.randrange(GIB, 40 * GIB) for _ in range(8)]
    measured = [
        make(NONE, 1, peak=peaks[0]),
        make(ALL, 1, peak=peaks[1], iterations=50, warmup=2),
        make(ALL, 2, peak=peaks[2], memory_limit_gib=24.0),
        make(ALL, 4, peak=peaks[3]),  # not predicted
        out_of_memory(NONE, 8),
        failed(NO_FLCE, 1),
        make(ALL, 1, mode="interpreted"),
        make(ALL, 16, find_max="batch_size", frontier={"searched": "batch_size"}),
    ]
    predictions = [
        predicted(NONE, 1, peak=peaks[4]),
        predicted(ALL, 1, peak=peaks[5], snapshot_dir=""),
        predicted(ALL, 2, peak=peaks[6], memory_limit_gib=24.0),
        predicted(ALL, 4, peak=peaks[7], gradient_checkpointing=False),  # of another run
        predicted(ALL, 4, 512),
        predicted(ALL, 4, memory_limit_gib=24.0),
        predicted(ALL, 4, dtype="fp32"),
        predicted(NO_FLCE, 4),
        predicted(NONE, 8),
        predicted(NO_FLCE, 1),
        predicted(ALL, 4, find_max="batch_size", frontier={"searched": "batch_size"}),
        out_of_memory(ALL, 4, mode="predicted", dry_run=True),
    ]
    found = measured + predictions
    rng.shuffle(found)
    pairs = figures.predicted_and_measured(found)
    assert Counter((p["peak_memory_bytes"], m["peak_memory_bytes"]) for p, m in pairs) == Counter(
        zip(peaks[4:7], peaks[:3])
    )
    figure = drawn(found)["predicted_vs_measured.png"]
    left, right = figure.axes
    points = {point for line in left.lines[:3] for point in zip(*line.get_data())}
    assert points == {(measured / GIB, predicted / GIB) for predicted, measured in zip(peaks[4:7], peaks[:3])}
    errors = sorted(y for line in right.lines[:3] for y in line.get_ydata())
    assert errors == pytest.approx(sorted(100 * (p / m - 1) for p, m in zip(peaks[4:7], peaks[:3])))
    assert left.get_xlabel() == right.get_xlabel() == "measured peak, GiB"
    assert (left.get_ylabel(), right.get_ylabel()) == ("predicted, without a GPU, GiB", "error of the prediction, %")
    assert "3 peaks" in title_of(figure)
    assert GPU in title_of(figure)


def test_predicted_figure_names_every_machine():
    found = [predicted(ALL, 1), predicted(ALL, 2), make(ALL, 1), make(ALL, 2, gpu="NVIDIA Other")]
    title = title_of(drawn(found)["predicted_vs_measured.png"])
    assert GPU in title
    assert "NVIDIA Other" in title


def test_predicted_figure_shows_all_the_peaks_that_it_counts():
    odd = [make(ALL, 1, peak=3 * GIB), predicted(ALL, 1, peak=4 * GIB)]
    for record in odd:
        record["config"] |= {"flce": False}
        record["config"] |= {"rope": False}
    figure = drawn([*odd, make(ALL, 1), predicted(ALL, 1)])["predicted_vs_measured.png"]
    points = [tuple(map(float, point)) for line in figure.axes[0].lines for point in zip(*line.get_data())]
    assert "2 peaks" in title_of(figure)
    assert {(3, 4), (2, 2)} < set(points)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [ALL, "other kernels"]


def test_no_pairs_no_figure():
    assert drawn([make(ALL, 1), predicted(ALL, 2)]) == {}
    assert drawn([predicted(ALL, 1)]) == {}


# Tables

TITLE = f"Llama-3.2-1B-Instruct, bf16, gradient checkpointing, {GPU}"
RECORDS = {
    "measured": make(NONE, 8, seconds=[0.5, 1.0, 1.5], peak=int(1234.5 * GIB)) | {"mfu": 0.12345},
    "inferred": inferred(NONE, 16),
    "failed": failed(NO_FLCE, 8),
    "out of memory": out_of_memory(ALL, 8, 16384, memory_limit_gib=24.0),
    "predicted": predicted(ALL, 8) | {"mfu": None, "latency_iqr_s": None},
    "predicted out of memory": out_of_memory(NONE, 64, mode="predicted", simulated_gpu="H", gpu=None, dry_run=True),
    "inferred from that": inferred(NONE, 96, gpu=None, dry_run=True),
    "search": predicted(NO_FLCE, 8, find_max="batch_size")
    | {"frontier": {"searched": "batch_size", "predicted": 17}, "mfu": None, "latency_iqr_s": None},
    "offload": make(ALL, 4, config=OffloadConfig, preset="fast", dtype="bf16", optimizer="overlapped_cpu_adam"),
}
ROWS = {
    "measured": f"{NONE};8;1,024;{TITLE};measured;1,234.50;1,000.0;500.0;8,192;12.3%",
    "inferred": f"{NONE};16;1,024;{TITLE};OOM*;;;;;",
    "failed": f"{NO_FLCE};8;1,024;{TITLE};failed;;;;;",
    "out of memory": f"{ALL};8;16,384;{TITLE}, limited to 24 GiB;OOM;;;;;",
    "predicted": f"{ALL};8;1,024;{TITLE.replace(GPU, 'NVIDIA H100')};predicted;2.00;;;;",
}
OTHER_ROWS = {
    "predicted out of memory": f"{NONE};64;1,024;{TITLE.replace(GPU, 'H')};OOM (predicted);;;;;",
    "inferred from that": f"{NONE};96;1,024;{TITLE.replace(GPU, 'no GPU')};OOM* (predicted);;;;;",
    "search": f"{NO_FLCE};17;1,024;{TITLE.replace(GPU, 'NVIDIA H100')}, find_max batch_size;predicted;2.00;;;;",
}
HEADER = "kernels;batch;seq;settings;status;peak GiB;ms a step;IQR ms;tokens/s;MFU"


@pytest.mark.parametrize(("kind", "expected"), [*ROWS.items(), *OTHER_ROWS.items()])
def test_row_of_a_record(kind, expected):
    header, row = tables.runs_table([RECORDS[kind]])
    assert header == HEADER.split(";")
    assert row == expected.split(";")


def test_row_of_an_offloaded_run_says_so():
    _, row = tables.runs_table([RECORDS["offload"]])
    assert "ZeRO-3 offload, preset fast" in row[3]
    assert row[:3] == [ALL, "4", "1,024"]


MARKDOWN = """
| kernels | batch | seq | settings | status | peak GiB | ms a step | IQR ms | tokens/s | MFU |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| All Liger Kernel | 8 | 1,024 | Llama-3.2-1B-Instruct, bf16, gradient checkpointing, NVIDIA H100 | predicted | 2.00 |  |  |  |  |
| No Liger Kernel | 8 | 1,024 | Llama-3.2-1B-Instruct, bf16, gradient checkpointing, NVIDIA Imaginary 1000 | measured | 1,234.50 | 1,000.0 | 500.0 | 8,192 | 12.3% |
| Liger Kernel w/o FLCE | 8 | 1,024 | Llama-3.2-1B-Instruct, bf16, gradient checkpointing, NVIDIA Imaginary 1000 | failed |  |  |  |  |  |
| No Liger Kernel | 16 | 1,024 | Llama-3.2-1B-Instruct, bf16, gradient checkpointing, NVIDIA Imaginary 1000 | OOM* |  |  |  |  |  |
| All Liger Kernel | 8 | 16,384 | Llama-3.2-1B-Instruct, bf16, gradient checkpointing, NVIDIA Imaginary 1000, limited to 24 GiB | OOM |  |  |  |  |  |
""".strip()  # noqa: E501

CSV = """
kernels,batch,seq,settings,status,peak GiB,ms a step,IQR ms,tokens/s,MFU
All Liger Kernel,8,1024,Llama-3.2-1B-Instruct bf16 gradient checkpointing NVIDIA H100,predicted,2.00,,,,
No Liger Kernel,8,1024,Llama-3.2-1B-Instruct bf16 gradient checkpointing NVIDIA Imaginary 1000,measured,1234.50,1000.0,500.0,8192,12.3%
Liger Kernel w/o FLCE,8,1024,Llama-3.2-1B-Instruct bf16 gradient checkpointing NVIDIA Imaginary 1000,failed,,,,,
No Liger Kernel,16,1024,Llama-3.2-1B-Instruct bf16 gradient checkpointing NVIDIA Imaginary 1000,OOM*,,,,,
All Liger Kernel,8,16384,Llama-3.2-1B-Instruct bf16 gradient checkpointing NVIDIA Imaginary 1000 limited to 24 GiB,OOM,,,,,
""".strip()  # noqa: E501


@pytest.mark.parametrize(("form", "text"), [("markdown", MARKDOWN), ("csv", CSV)])
def test_tables_whatever_the_order_of_the_records(rng, form, text):
    found = [RECORDS[kind] for kind in ROWS]
    rng.shuffle(found)
    assert tables.FORMATS[form](tables.runs_table(found)) == text


def test_csv_is_read_back_as_it_was(rng):
    found = study(rng)
    table = tables.runs_table(found)
    rows = list(csv.reader(io.StringIO(tables.to_csv(table))))
    assert len(rows) == 1 + len(found)
    assert rows == [[cell.replace(",", "") for cell in row] for row in table]


# drawing.py


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """Run drawing.py in this process, in an empty folder; the study is in `study`. (exit status, stdout, stderr)"""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["drawing.py", *map(str, arguments)])
        capsys.readouterr()
        return drawing.main(), *capsys.readouterr()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(drawing, "STUDY", tmp_path / "study")
    return run


def write(folder, found):
    for i, record in enumerate(found):
        records.save(record, folder / f"{i}" / f"{record['run_name']}.json")


def pngs(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_files_are_pictures_of_the_size_of_a_page(draw, rng, tmp_path):
    found = study(rng)
    write(tmp_path / "here/results", [*found, predicted(ALL, 8)])
    status, stdout, stderr = draw()
    assert (status, stderr) == (0, "")
    assert sorted(stdout.split()) == pngs(tmp_path / "here")
    assert pngs(tmp_path / "here") == sorted([*FOUR_FIGURES, "latency.png", "predicted_vs_measured.png"])
    for name in stdout.split():
        with Image.open(name) as picture:
            picture.load()
            assert 1000 < picture.width < 2500
            assert 500 < picture.height < 1500
            assert len(picture.convert("L").getcolors()) > 20


def test_empty_folder_draws_the_study_and_says_so(draw, rng, tmp_path):
    write(tmp_path / "study", study(rng))
    status, stdout, stderr = draw()
    assert (status, stderr) == (0, "")
    first, *names = stdout.splitlines()
    assert "study" in first
    assert sorted(names) == pngs(tmp_path / "here")
    assert set(FOUR_FIGURES) < set(names)


@pytest.mark.parametrize("form", tables.FORMATS)
def test_table_of_the_study_has_nothing_else_in_it(draw, rng, tmp_path, form):
    found = study(rng)
    write(tmp_path / "study", found)
    status, stdout, stderr = draw("--table", form)
    assert (status, stdout) == (0, tables.FORMATS[form](tables.runs_table(found)) + "\n")
    assert "study" in stderr


def test_records_of_ones_own_come_before_the_study(draw, rng, tmp_path):
    write(tmp_path / "study", study(rng))
    write(tmp_path / "here/results", [make(name, batch) for name in (NONE, ALL) for batch in (1, 2)])
    status, stdout, _ = draw()
    assert (status, stdout.split()) == (0, [*FOUR_FIGURES[:2], "latency.png"])


def test_folders_that_are_named_are_drawn_together(draw, tmp_path):
    write(tmp_path / "a", [make(NONE, batch) for batch in (1, 2)])
    write(tmp_path / "b", [make(ALL, batch) for batch in (1, 2)])
    write(tmp_path / "study", [make(NO_FLCE, batch) for batch in (1, 2)])
    for only in ("a", "b"):
        assert draw(tmp_path / only)[0] == 0
        assert pngs(tmp_path / "here") == []  # one strategy is nothing to compare
    assert draw(tmp_path / "a", tmp_path / "b")[0] == 0
    assert len(pngs(tmp_path / "here")) == 3


@pytest.mark.parametrize(("form", "text"), [("markdown", MARKDOWN), ("csv", CSV)])
def test_table_in_place_of_figures(draw, tmp_path, form, text):
    write(tmp_path / "here/results", [RECORDS[kind] for kind in ROWS])
    assert draw("--table", form) == (0, text + "\n", "")
    assert pngs(tmp_path / "here") == []


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_bad_folder_is_one_line_and_status_2(draw, rng, tmp_path, name):
    write(tmp_path / "study", study(rng))  # not what was asked for
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    status, stdout, stderr = draw(tmp_path / name)
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, str(tmp_path / name))


def test_no_records_anywhere_is_one_line_that_says_where(draw):
    status, _, stderr = draw()
    assert status == 2
    assert_one_error_line(stderr, "results")


GARBAGE = [b"", b"{", b"\x80\x04\x95", b"[]", b"null", b'{"schema": 99}', b'{"benchmark": {}}', b'{"schema": 1}']
GARBAGE += [b'{"schema": 1, "status": "ok", "script": "all_gpu", "config": {}, "environment": {"gpu": "X"}}']
GARBAGE += [
    b'{"schema": 1, "status": "ok", "mode": "measured", "script": "none", "config": {}, "environment": {"gpu": ""}}'
]


@pytest.mark.parametrize("arguments", [[], ["--table", "markdown"]], ids=["figures", "table"])
@pytest.mark.parametrize("content", GARBAGE, ids=str)
def test_file_that_is_no_record_is_one_line_and_status_2(draw, rng, tmp_path, content, arguments):
    folder = tmp_path / "here/results"
    write(folder, study(rng)[:2])
    (folder / "garbage.json").write_bytes(content)
    status, _, stderr = draw(*arguments)
    assert status == 2
    assert_one_error_line(stderr, "garbage.json")
    assert pngs(tmp_path / "here") == []


def test_record_that_is_being_written_is_passed_over(draw, tmp_path):
    """`write_atomically` fills a file with a dot first; a run that is killed then leaves it."""
    folder = tmp_path / "here/results"
    write(folder, [make(name, batch) for name in (NONE, ALL) for batch in (1, 2)])
    (folder / ".bs1_seq1024.a1b2c3d4.json").write_text('{"schema": 1, "run_')
    status, stdout, stderr = draw()
    assert (status, stderr) == (0, "")
    assert len(stdout.split()) == 3


def test_nothing_to_compare_is_said(draw, tmp_path):
    write(tmp_path / "here/results", [make(ALL, 1)])
    status, stdout, stderr = draw()
    assert (status, stderr) == (0, "")
    assert "two strategies" in stdout


def test_folder_that_cannot_be_written_is_one_line(draw, monkeypatch, tmp_path):
    write(tmp_path / "here/results", [make(name, batch) for name in (NONE, ALL) for batch in (1, 2)])
    (tmp_path / "here" / FOUR_FIGURES[0]).mkdir()
    status, _, stderr = draw()
    assert status == 1
    assert_one_error_line(stderr, FOUR_FIGURES[0])


def test_program_without_torch(tmp_path):
    """Drawing takes a moment: what reads results imports no torch."""
    for module in ("drawing", "src.figures", "src.study", "src.tables", "src.records"):
        done = run_python("-c", f"import {module}, sys; print('torch' in sys.modules)")
        assert (done.stdout, done.stderr) == ("False\n", ""), module
    write(tmp_path / "results", [make(name, batch) for name in (NONE, ALL) for batch in (1, 2)])
    done = run_python(ROOT / "drawing.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [*FOUR_FIGURES[:2], "latency.png"] == list(dict.fromkeys(done.stdout.split()))
    assert len(pngs(tmp_path)) == 3


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "doc/data").iterdir()))
def test_committed_records_can_be_drawn_and_listed(folder, tmp_path):
    shutil.copytree(ROOT / "doc/data" / folder, tmp_path / folder)
    found = records.load_all([tmp_path / folder])
    for figure in drawn(found).values():
        assert all(bars(axes) for axes in figure.axes) or "peaks" in title_of(figure)
    assert len(tables.runs_table(found)) == 1 + len(found)
