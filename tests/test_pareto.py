"""Which settings no other beats in memory and speed: the frontier, its figure, and its column of the table."""

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from src.offload_config import OffloadConfig
from src.record import WRONG, GradientError, Parity
from src.study import figures, tables
from src.study.pareto import Choices, Point, changes_numerics, choices, frontier
from src.study.pareto_figure import pareto
from src.utils import GIB
from tests.made_up import ALL, NO_FLCE, NONE, failed, made_up, out_of_memory, predicted

PNG = "pareto_all_gpu_8x1024_NVIDIA_Imaginary_1000.png"


def parity(ratio):
    """As it was measured, so many times Hugging Face's own error."""
    run, theirs = (
        GradientError(loss=0.0, gradient=error, worst=error, worst_parameter="") for error in (0.04 * ratio, 0.04)
    )
    return Parity(
        tokens=8192, dtype="bf16", loss_scale=None, reference_loss=8.0, run=run, hugging_face=theirs, ratio=ratio,
        agrees=ratio <= 1.5,
    )  # fmt: skip


def run(kernels, gib, seconds, batch_size=8, **settings):
    return made_up(kernels, batch_size, peak=int(gib * GIB), seconds=[seconds], **settings)


RUNS = {
    "No Liger": run(NONE, 20, 0.20),
    "No Liger, no checkpointing": run(NONE, 32, 0.16, gradient_checkpointing=False),
    "All Liger": run(ALL, 10, 0.18, parity=parity(0.99)),
    f"All Liger {WRONG}, flce_chunks 16": run(ALL, 9, 0.10, flce_chunks=16, parity=parity(3)),
    "All Liger, no checkpointing": run(ALL, 17, 0.14, gradient_checkpointing=False),
    "All Liger, gradient_accumulation_steps 4": run(ALL, 7, 0.40, 2, gradient_accumulation_steps=4),
    "Liger w/o FLCE": run(NO_FLCE, 19, 0.17),
    "rope only": run(NONE, 20, 0.19, rope=True),
}
ABSENT = {
    "All Liger, optimizer adamw_loop": failed(ALL, 8, optimizer="adamw_loop"),
    "Liger w/o FLCE, no checkpointing": out_of_memory(NO_FLCE, 8, gradient_checkpointing=False),
}
BEST = ["All Liger, gradient_accumulation_steps 4", "All Liger", "All Liger, no checkpointing"]
# Not of the same size, machine, model or seed; nor timed.
OTHERS = [
    run(NONE, 1, 0.01, 4),
    run(NONE, 1, 0.01, gpu="NVIDIA Other"),
    run(NONE, 1, 0.01, model_name="Qwen/Qwen3-0.6B"),
    run(NONE, 1, 0.01, seed=7),
    predicted(ALL, 8, optimizer="sgd"),
]
FOUND = [*RUNS.values(), *ABSENT.values(), *OTHERS]


def only(found):
    ((group, own),) = choices(found).items()
    return group, own


def labels(own, points):
    return [own.label(point.record) for point in points]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=12))
def test_nothing_right_beats_the_frontier_and_something_beats_the_rest(rows):
    points = [Point(run(NONE, gib, 1 / tenths, parity=parity(3 if wrong else 1)), ()) for gib, tenths, wrong in rows]

    def beats(a, b):
        return a.gib <= b.gib and a.speed >= b.speed and (a.gib, a.speed) != (b.gib, b.speed)

    right = [p for p in points if not p.is_wrong]
    expected = [p for p in right if not any(beats(other, p) for other in right)]
    found = frontier(points)
    assert sorted(map(id, found)) == sorted(map(id, expected))
    assert [p.gib for p in found] == sorted(p.gib for p in found)


def test_settings_of_one_size_are_compared_and_named_by_what_they_turn_on():
    group, own = only(FOUND)
    assert sorted(labels(own, own.points)) == sorted(RUNS)
    assert [own.label(r) for r in own.absent] == list(ABSENT)
    assert labels(own, own.frontier) == BEST
    assert f"{group.name}.png" == PNG
    assert [p.record.peak_memory_bytes for p in own.points] == sorted(r.peak_memory_bytes for r in RUNS.values())
    assert not choices(list(RUNS.values())[:2])


def test_of_offloaded_runs_presets_are_compared():
    found = [run(NONE, 20, 2.0, config=OffloadConfig), run(ALL, 9, 2.0, config=OffloadConfig)]
    found += [run(ALL, 8, 0.5, config=OffloadConfig, preset="fast", dtype="bf16", optimizer="overlapped_cpu_adam",
                  reduce_bucket_size=None, sub_group_size=None, fetch_layers=True, prefetch_layers=1)]  # fmt: skip
    group, own = only(found)
    assert group.name == "pareto_deepspeed_8x1024_NVIDIA_Imaginary_1000"
    assert labels(own, own.points) == ["All Liger, bf16, preset fast", f"All Liger {WRONG}, fp16", "No Liger, fp16"]


def test_run_has_the_parity_of_another_one_with_the_same_numerics():
    known = [run(ALL, 3, 1, 1, parity=parity(ratio), iterations=20) for ratio in (1, 3, 2)]
    own = only([*RUNS.values(), *known])[1]
    kinds = {own.label(p.record).replace(f" {WRONG}", ""): (p.is_wrong, p.is_unchecked) for p in own.points}
    right, unchecked, wrong = (False, False), (False, True), (True, False)
    assert kinds == {
        "No Liger": right,
        "No Liger, no checkpointing": right,  # recomputing leaves the numbers as they are
        "All Liger": right,  # its own parity goes before another's
        "All Liger, flce_chunks 16": wrong,
        "All Liger, no checkpointing": wrong,  # of several the worst
        "All Liger, gradient_accumulation_steps 4": wrong,
        "Liger w/o FLCE": unchecked,
        "rope only": unchecked,
    }
    # Another dtype or model says nothing of it.
    others = [
        run(NO_FLCE, 3, 1, 1, parity=parity(3), **s) for s in ({"dtype": "fp16"}, {"model_name": "Qwen/Qwen3-4B"})
    ]
    assert labels(own, only([*FOUND, *others])[1].points) == labels(own, only(FOUND)[1].points)


def test_eager_attention_is_usual_where_the_family_has_it():
    assert changes_numerics(made_up(NONE, 1, attention="eager").run)
    assert not changes_numerics(made_up(NONE, 1, attention="eager", model_name="google/gemma-2-2b").run)


@pytest.fixture(scope="module")
def drawn():
    """The figure of `FOUND` and of a repeat of one run, with where its texts are."""
    again = run(NO_FLCE, 19, 0.25, environment={"date": "2025-01-01"})
    return dict(figures.all_figures([*FOUND, again]))[PNG], only([*FOUND, again])[1]


def texts(axes):
    return [text for text in axes.texts if text.get_text()]


def test_figure_has_every_point_in_its_mark_and_the_frontier_as_a_line(drawn):
    figure, own = drawn
    chart, _ = figure.axes
    marks = {(line.get_xdata()[0], line.get_ydata()[0]): line for line in chart.lines if len(line.get_xdata()) == 1}
    assert set(marks) == {(p.gib, p.speed) for p in own.points}
    for point in own.points:
        line = marks[point.gib, point.speed]
        assert (to_rgb(line.get_markerfacecolor()) == (1, 1, 1)) == point.is_wrong
        assert (line.get_marker() == "s") == point.is_unchecked
    (best,) = [line for line in chart.lines if line.get_gid() == "frontier"]
    assert list(zip(*best.get_data())) == [(p.gib, p.speed) for p in own.frontier]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[:2] == ["gradients as exact as Hugging Face's", "parity not measured"]
    assert told[2:] == [f"{WRONG} trains wrongly: not on the frontier"]
    (bar,) = chart.collections  # of the setting that was run twice
    slow, fast = bar.get_segments()[0]
    assert (*slow, *fast) == pytest.approx((19, 8192 / 0.25, 19, 8192 / 0.17))


def test_figure_names_every_point_beside_the_chart(drawn):
    figure, own = drawn
    chart, names = figure.axes
    points = dict(enumerate(own.points, start=1))
    assert {t.get_text(): t.xy for t in chart.texts} == {str(i): (p.gib, p.speed) for i, p in points.items()}
    rows = itertools.groupby(texts(names)[3:], key=lambda text: text.get_position()[1])
    expected = [[str(i), own.label(p.record), f"{p.gib:,.2f}", f"{p.speed:,.0f}"] for i, p in points.items()]
    expected += [[label, why] for label, why in zip(ABSENT, ("failed", "OOM"))]
    assert [[text.get_text() for text in row] for _, row in rows] == expected
    bold = [t.get_text() for t in names.texts if t.get_fontweight() == "bold"]
    assert bold[1::4] == labels(own, own.frontier)


def test_no_text_overlaps_another_or_a_mark():
    crowd = [run(ALL, 10 + 0.1 * i, 0.16 + 0.002 * (i % 7), flce_chunks=i + 20) for i in range(20)]
    group, own = only([*FOUND, *crowd])
    figure = pareto(group, own)
    figure.savefig(io.BytesIO(), format="png", dpi=figure.dpi)
    chart, names = figure.axes
    # Of the text alone: an annotation's own extent has its line, too.
    numbers, listed = ([Text.get_window_extent(t).shrunk(0.9, 0.8) for t in texts(a)] for a in (chart, names))
    radius = 2.5 * figure.dpi / 72
    middles = [chart.transData.transform((p.gib, p.speed)) for p in own.points]
    marks = [Bbox([middle - radius, middle + radius]) for middle in middles]
    assert not [pair for pair in itertools.combinations(numbers + listed, 2) if pair[0].overlaps(pair[1])]
    assert not [pair for pair in itertools.product(numbers, marks) if pair[0].overlaps(pair[1])]
    assert min(t.get_fontsize() for axes in figure.axes for t in texts(axes)) >= 8


def test_column_of_the_table_says_the_same():
    table = tables.runs_table(FOUND)
    column = table[0].index("frontier")
    own = only(FOUND)[1]
    told = {(f"{p.gib:,.2f}", f"{p.speed:,.0f}") for p in own.frontier}
    assert {(row[5], row[8]) for row in table[1:] if row[column]} == told
    assert {row[column] for row in table[1:]} == {"", "yes"}


def test_other_optimizers_have_a_line_of_their_own():
    """They learn otherwise: SGD's little memory and time are no choice to one who trains with AdamW."""
    found = [*FOUND, run(ALL, 5, 0.15, optimizer="sgd"), run(ALL, 11, 0.19, optimizer="adamw_foreach")]
    group, own = only(found)
    assert labels(own, own.frontier) == BEST
    assert labels(own, own.any_optimizer) == ["All Liger, optimizer sgd", BEST[-1]]
    chart = pareto(group, own).axes[0]
    marks = [line.get_xdata()[0] for line in chart.lines if line.get_marker() == "D" and len(line.get_xdata())]
    lines = {line.get_gid(): list(zip(*line.get_data())) for line in chart.lines}
    assert marks == [5]
    assert lines["any optimizer"] == [(p.gib, p.speed) for p in own.any_optimizer]
    rows = {row[5]: row[11] for row in tables.runs_table(found)}
    assert (rows["5.00"], rows["10.00"], rows["17.00"], rows["11.00"]) == ("any optimizer", "yes", "yes", "")


def test_under_a_limit_that_was_never_met_a_run_counts_twice():
    limited = [run(ALL, 2, 0.1, memory_limit_gib=24.0, allocation_retries=0)]
    limited += [run(name, 3, 0.3, memory_limit_gib=24.0) for name in (NONE, NO_FLCE)]
    found = [*list(RUNS.values())[:2], *limited]
    assert [len(own.points) for own in choices(found).values()] == [3, 3]
    rows = [row for row in tables.runs_table(found) if row[11] == "yes"]
    assert [(row[0], row[5]) for row in rows] == [(ALL, "2.00")]


def test_three_strategies_that_are_bars_by_size_have_no_figure_of_their_own():
    found = [run(name, 2 * size, 0.1 * size, size) for name in (NONE, NO_FLCE, ALL) for size in (1, 8)]
    assert not [name for name, _ in figures.all_figures(found) if "pareto" in name]
    assert [name for name, _ in figures.all_figures(found[1::2]) if "pareto" in name] == [PNG]


def test_of_too_many_settings_those_on_the_frontier_are_named():
    points = [Point(run(ALL, 1 + i % 9, 0.1 + 0.01 * i, flce_chunks=i + 1), ()) for i in range(90)]
    group = next(iter(choices(FOUND)))
    figure = pareto(group, Choices(points, []))
    assert [t.get_text() for t in figure.axes[0].texts] == ["1"]
    assert figure.get_suptitle().count("named are 1 of 90 settings")
