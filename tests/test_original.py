"""The original's figures beside ours, and the best settings that fit: made from records made up here."""

import csv
import re

import pytest
from src.fake_gpu import H100

from doc import best, original, tables
from src import study
from src.config import PRESETS, STRATEGIES, OffloadConfig
from src.utils import GIB
from tests.helpers import ROOT
from tests.made_up import ALL, NO_FLCE, NONE, failed, inferred, make, out_of_memory, predicted

GPU = "NVIDIA H100 80GB HBM3"
SEED = {"config": OffloadConfig, "gpu": GPU}
FAST = {**SEED, "preset": "fast", **PRESETS["fast"]}
LIMIT = {"memory_limit_gib": 24.0}
PUBLISHED = list(
    csv.DictReader(
        line for line in (ROOT / "doc/data/original/rtx4090_offload.csv").read_text().splitlines() if line[0] != "#"
    )
)


def published(cell, field):
    row = {"strategy": cell[0], "batch_size": str(cell[1]), "seq_length": str(cell[2])}
    (found,) = [r for r in PUBLISHED if row.items() <= r.items()]
    return found[field]


def rows(document, heading):
    """The rows of the table below a heading, each as (column -> text)."""
    section = document.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    header, _, *body = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert {len(row) for row in body} == {len(header)}
    return [dict(zip(header, row)) for row in body]


def answer(document, question, whose):
    (line,) = re.findall(rf"{question}[^\n]*\n(?:- [^\n]*\n)*?- {whose}: ([^\n]*)", document + "\n")
    return line


def document(*found):
    return original.original_document(list(found))


def peaks(batch, none, no_flce, every, seq_length=1024, **settings):
    """The three strategies in a cell, with these peaks in GiB."""
    sizes = zip(STRATEGIES, (none, no_flce, every))
    return [make(name, batch, seq_length, peak=int(GIB * peak), **SEED, **settings) for name, peak in sizes]


# The original beside ours


def test_every_published_figure_is_shown_and_every_cell(rng):
    text = document(*peaks(4, 4, 3, 2))
    shown = zip(rows(text, "Peak allocated memory, GiB"), rows(text, "Throughput, tokens/s"), strict=True)
    told = {}
    for cell, (peak, speed) in zip(study.GRID, shown, strict=True):
        assert (peak["kernels"], peak["batch x seq"]) == (cell.strategy, f"{cell.batch_size} x {cell.seq_length}")
        told[cell] = peak["original, RTX 4090"], speed["original, RTX 4090"]
    for row in PUBLISHED:
        figures = told.pop((row["strategy"], int(row["batch_size"]), int(row["seq_length"])))
        if row["status"] == "oom":
            assert figures == ("OOM", "OOM")
        else:
            peak, speed = int(row["peak_memory_bytes"]), float(row["throughput_tokens_per_s"])
            assert figures == (f"{peak / 2**30:,.2f}", f"{speed:,.0f}")
    assert set(told.values()) == {("no figure", "no figure")}


def test_our_figures_stand_in_the_column_of_their_gpu_and_preset(rng):
    found = {
        "H100, seed": make(ALL, 32, peak=rng.randrange(GIB, 9 * GIB), seconds=[rng.uniform(1, 2)] * 3, **SEED),
        "H100, fast": make(ALL, 32, peak=rng.randrange(GIB, 9 * GIB), seconds=[rng.uniform(1, 2)] * 3, **FAST),
        "H200, seed": out_of_memory(NONE, 112, **{**SEED, "gpu": "NVIDIA H200"}),
    }
    odd = [
        make(ALL, 16, **{**SEED, **setting}) for setting in (LIMIT, {"world_size": 2}, {"seed": 1}, {"dtype": "bf16"})
    ]
    odd.append(make(ALL, 16, **SEED, environment={"gpu": GPU, "cpu_count": 8, "omp": {"OMP_PLACES": "cores"}}))
    everything = [*odd, *found.values(), inferred(NONE, 96, **SEED), failed(NO_FLCE, 96, **SEED), make(ALL, 4, **SEED)]
    rng.shuffle(everything)
    text = document(*everything)
    shown = rows(text, "Peak allocated memory, GiB")
    # Of a preset's studies the fullest is shown.
    assert list(shown[0])[2:] == ["original, RTX 4090", "H100, seed", "H100, fast"]
    by_cell = {(row["kernels"], row["batch x seq"]): row for row in shown}
    for title in ("H100, seed", "H100, fast"):
        assert by_cell[ALL, "32 x 1024"][title] == f"{found[title]['peak_memory_bytes'] / GIB:.2f}"
        assert by_cell[ALL, "16 x 1024"][title] == "not measured"
    speeds = {(row["kernels"], row["batch x seq"]): row for row in rows(text, "Throughput, tokens/s")}
    speed = found["H100, seed"]["throughput_tokens_per_s"]
    assert speeds[ALL, "32 x 1024"]["H100, seed"] == f"{speed:,.0f}"
    for figures in (by_cell, speeds):
        assert figures[NONE, "96 x 1024"]["H100, seed"] == "OOM*"
        assert figures[NO_FLCE, "96 x 1024"]["H100, seed"] == "failed"
        others = [row["H100, seed"] for row in figures.values()]
        assert others.count("not measured") == 45 - 4
    assert "H100, seed 2, 1 inferred, 1 failed; H100, fast 1." in text
    assert "Measured limited to 24 GiB, of 45 cells: H100, seed 1." in text


def test_predictions_and_interpreted_runs_are_no_figures_of_ours():
    never = [make(ALL, 16, **SEED, mode="interpreted"), predicted(ALL, 16, config=OffloadConfig)]
    text = document(make(ALL, 4, **SEED), *never)
    (row,) = [
        r for r in rows(text, "Peak allocated memory, GiB") if (r["kernels"], r["batch x seq"]) == (ALL, "16 x 1024")
    ]
    assert row["H100, seed"] == "not measured"


def test_ratios_are_those_of_the_records(rng):
    seconds = {name: rng.uniform(1, 2) for name in STRATEGIES}
    none, no_flce, every = (int(GIB * p) for p in (rng.uniform(9, 10), rng.uniform(5, 8), rng.uniform(1, 4)))
    found = [
        make(name, 8, peak=peak, seconds=[seconds[name]] * 3, **SEED)
        for name, peak in zip(STRATEGIES, (none, no_flce, every))
    ]
    shown = rows(document(*found), "What Liger kernels save")
    (mine,) = [row for row in shown if row["whose"] == "H100, seed"]
    assert list(mine.values()) == [
        "8 x 1024",
        "H100, seed",
        f"{none / every:.2f}",
        f"{(no_flce - every) / (none - every):.1%}",
        f"{seconds[NONE] / seconds[ALL]:.2f}",
    ]
    theirs = {row["batch x seq"]: row for row in shown if row["whose"] == "original, RTX 4090"}
    assert theirs.keys() == {"1 x 1024", "4 x 1024", "8 x 1024", "4 x 512", "4 x 2048"}
    a, b, c = (int(published((name, 8, 1024), "peak_memory_bytes")) for name in STRATEGIES)
    assert theirs["8 x 1024"]["peak, none / all"] == f"{a / c:.2f}"
    assert theirs["8 x 1024"]["FLCE's share of the saving"] == f"{(b - c) / (a - c):.1%}"


@pytest.mark.parametrize(
    ("no_flce", "told"),
    [
        ([9.92, 9.8], "97.5% to 99.0% in 2 cells: it is"),
        ([9.92, 5], "37.5% to 99.0% in 2 cells: it is in 1 of 2"),
        ([4, 5], "25.0% to 37.5% in 2 cells: it is not"),
    ],
)
def test_verdict_on_flce_is_that_of_the_numbers(no_flce, told):
    found = [record for batch, peak in zip((8, 16), no_flce) for record in peaks(batch, 10, peak, 2)]
    assert answer(document(*found), "Is nearly all of the saving FLCE's", "H100, seed") == told


def test_verdict_on_flce_needs_all_three_strategies():
    found = [r for r in peaks(8, 10, 9, 2) if study.cell(r).strategy != NO_FLCE]
    assert answer(document(*found), "Is nearly all of the saving FLCE's", "H100, seed") == "not measured"


@pytest.mark.parametrize(("factor", "told"), [(1.02, "within 5%"), (1.2, "larger"), (0.8, "smaller")])
def test_saving_is_compared_with_the_published_in_the_same_cell(factor, told):
    theirs = [int(published((name, 8, 1024), "peak_memory_bytes")) for name in (NONE, ALL)]
    found = [make(name, 8, peak=int(p * f), **SEED) for name, p, f in zip((NONE, ALL), theirs, (factor, 1))]
    found += peaks(32, 10, 9, 2)  # the original has no figure there
    ratio = theirs[0] / theirs[1]
    expected = f"{told} in 1 of 1: 8 x 1024 {ratio * factor:.2f} for {ratio:.2f}"
    assert answer(document(*found), "How large is the saving", "H100, seed") == expected
    other = document(*peaks(32, 10, 9, 2))
    assert answer(other, "How large is the saving", "H100, seed") == "not measured in a cell that the original has"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.5, "2.00 in 1 cell: by more than 5%"), (0.98, "1.02 in 1 cell: not by more than 5%")],
)
def test_verdict_on_speed_is_that_of_the_numbers(seconds, told):
    found = [make(NONE, 8, seconds=[1.0] * 3, **SEED), make(ALL, 8, seconds=[seconds] * 3, **SEED)]
    assert answer(document(*found), "Is an offloaded step faster", "H100, seed") == told


@pytest.mark.parametrize(("copies", "explained"), [(1.0, True), (0.95, True), (0.3, False), (-1.0, False)])
def test_copy_of_the_logits_is_the_explanation_only_where_it_explains(copies, explained):
    theirs = int(published((NONE, 8, 1024), "peak_memory_bytes"))
    found = [make(NONE, 8, peak=round(theirs - copies * 8 * 1024 * 128256 * 4), **SEED), make(ALL, 8, peak=GIB, **SEED)]
    found += peaks(1, 2, 2, 2)  # the logits do not set this peak
    text = document(*found, make(NONE, 4, peak=GIB, **SEED), make(ALL, 4, peak=GIB, **FAST))
    assert f"that of H100, seed by this many fp32 copies of the logits: {copies:.2f} in 1 cell." in text
    assert ("transformers' loss" in text) == explained


def test_nothing_is_explained_where_nothing_was_measured():
    text = document(make(ALL, 4, **SEED))
    assert "copies of the logits" not in text
    assert answer(text, "How much more fits", "ours") == "not measured under a limit of 24 GiB"
    for row in rows(text, "Where memory ends"):
        assert row["ours"] == "not measured"


def test_frontiers_are_those_under_the_limit(rng):
    found = [make(NONE, 112, **SEED), make(NONE, 4, 24576, **SEED)]  # without a limit
    found += [make(NONE, batch, **SEED, **LIMIT) for batch in (1, 4)]
    found += [out_of_memory(NONE, 8, **SEED, **LIMIT), inferred(NONE, 16, **SEED, **LIMIT)]
    found += [make(ALL, batch, **SEED, **LIMIT) for batch in (4, 64)] + [failed(ALL, 96, **SEED, **LIMIT)]
    found += [out_of_memory(ALL, 4, 512, **SEED, **LIMIT), inferred(NO_FLCE, 1, **SEED, **LIMIT)]
    rng.shuffle(found)
    text = document(*found)
    shown = {(row["kernels"], row["what"].split()[1]): row["H100, seed"] for row in rows(text, "Where memory ends")}
    assert shown == {
        (NONE, "batch"): "4 (8: OOM)",
        (NO_FLCE, "batch"): "none (1: OOM*)",
        (ALL, "batch"): "64 (none larger measured)",
        (NONE, "sequence"): "1,024 (none larger measured)",
        (NO_FLCE, "sequence"): "not measured",
        (ALL, "sequence"): "1,024 (none larger measured)",
    }
    theirs = {row["kernels"]: row["original, RTX 4090"] for row in rows(text, "Where memory ends")[:3]}
    assert theirs == {NONE: "8 (16: OOM)", NO_FLCE: "8 (16: OOM)", ALL: "112 (none larger measured)"}
    batch, sequence = answer(text, "How much more fits", "H100, seed").split("; ")
    assert batch == "largest batch at 1024 tokens 64 for 4, at least 16 times"
    assert sequence.endswith("at least 1 times, though none larger was measured without any")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (GPU, "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA Other", "NVIDIA Other"),
    ],
)
def test_short_name_tells_gpus_apart(name, short):
    assert study.gpu_name({"environment": {"gpu": name}}) == short


# The best that fits


def used(record, reserved_gib, memory=H100.memory_bytes, **environment):
    """`record` with what the driver saw in use, and the card's memory."""
    record["environment"] |= {"gpu_memory_bytes": memory, **environment}
    return record | {"device_used_bytes": int(reserved_gib * GIB)}


H200 = {"gpu": "NVIDIA H200", "memory": 150109880320}
CASES = {
    "used less": (used(make(ALL, 8, gpu=GPU), 23.9), True, None),
    "used more": (used(make(ALL, 8, gpu=GPU), 24.1), False, "took 24.10 GiB"),
    "unknown use": (make(ALL, 8, gpu=GPU) | {"device_used_bytes": None}, False, None),
    "ran under the limit": (used(make(ALL, 8, gpu=GPU, **LIMIT), 24.6), True, None),
    "under a larger limit": (used(make(ALL, 8, gpu=GPU, memory_limit_gib=40.0), 30), False, "took 30.00 GiB"),
    "out of memory": (used(out_of_memory(ALL, 8, gpu=GPU), 0), False, "OOM"),
    "inferred": (used(inferred(ALL, 8, gpu=GPU), 0), False, "OOM*"),
    "out of the limit": (used(out_of_memory(ALL, 8, gpu=GPU, **LIMIT), 0), False, "OOM"),
    "out of less": (used(out_of_memory(ALL, 8, gpu=GPU, memory_limit_gib=16.0), 0), False, None),
    "out of a smaller card": (used(out_of_memory(ALL, 8, gpu="NVIDIA L4"), 0, memory=22 * GIB), False, None),
    "failed": (used(failed(ALL, 8, gpu=GPU), 10), False, None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_fits_24_gib_and_what_shows_that_it_does_not(case):
    record, fits, reason = CASES[case]
    assert best.fits(record, 24 * GIB) == fits
    assert best.excess(record, 24 * GIB) == reason


def best_rows(found, budget):
    shown = rows(best.best_document(found), budget)
    return {(row["settings"], row["kernels"], row["GPU"]): list(row.values())[3:] for row in shown}


def test_largest_and_fastest_that_fit(rng):
    checkpointed, plain = "one GPU, bf16, checkpointing", "one GPU, bf16, no checkpointing"
    found = [
        used(make(NONE, 8, gpu=GPU, seconds=[1.0] * 3), 20),
        used(make(NONE, 32, gpu=GPU, seconds=[2.0] * 3), 70),
        used(out_of_memory(NONE, 64, gpu=GPU), 0),
        used(inferred(NONE, 96, gpu=GPU), 0),
        used(make(NONE, 9, gpu=GPU, **LIMIT, seconds=[1.0] * 3), 23),  # of no grid, and counts
        used(out_of_memory(NONE, 10, gpu=GPU, **LIMIT), 0),
        used(make(NONE, 3, 5000, gpu=GPU, seconds=[0.1] * 3), 23),  # on no line, but fast
        used(make(NONE, 4, 2048, gpu=GPU, seconds=[1.0] * 3), 79),
        used(make(ALL, 64, seconds=[1.0] * 3, gpu="NVIDIA H200"), 90),
        used(make(ALL, 8, gpu=GPU, seconds=[1.0] * 3, gradient_checkpointing=False), 23),
        used(make(ALL, 16, gpu=GPU, dtype="fp32"), 1),
        used(make(ALL, 16, gpu=GPU, optimizer="sgd"), 1),
        used(make(ALL, 32, **FAST, seconds=[4.0] * 3), 10),
        used(make(ALL, 96, **FAST), 10, gpu=GPU, omp={"OMP_PLACES": "cores"}),
    ]
    rng.shuffle(found)
    large, small = (best_rows(found, budget) for budget in ("80 GB", "24 GiB"))
    assert large[checkpointed, NONE, "H100"][:3] == [
        "32 (64: OOM)",
        "2,048 (none larger measured)",
        "150,000 at 3 x 5000",
    ]
    assert small[checkpointed, NONE, "H100"][:3] == [
        "9 (10: OOM)",
        "none (2,048: took 79.00 GiB)",
        "150,000 at 3 x 5000",
    ]
    assert large[checkpointed, ALL, "H200"][:3] == ["none (64: took 90.00 GiB)", "not measured", "none fits"]
    assert (checkpointed, ALL, "H100") not in large  # neither measured nor predicted
    assert small[plain, ALL, "H100"][:3] == ["8 (none larger measured)", "not measured", "8,192 at 8 x 1024"]
    assert small["ZeRO-3 offload, preset fast", ALL, "H100"][0] == "32 (none larger measured)"
    assert small["ZeRO-3 offload, preset seed", ALL, ""][:3] == 3 * ["not measured"]
    text = best.best_document(found)
    assert f"measured on an H100 that fit: {checkpointed}, {NONE}, 3 x 5000: 150,000 tokens/s." in text
    assert "measured on an H200 that fit" not in text
    assert f"- {checkpointed}: H100 5, H200 1" in text
    assert "- ZeRO-3 offload, preset seed: not measured" in text


def searched(name, field, size, card_gib=None, cell=None, simulated_gpu=H100.name, **settings):
    """The record of a search on a simulated GPU."""
    card = H100.memory_bytes if card_gib is None else int(card_gib * GIB)
    frontier = {"searched": field, "limit_bytes": card - H100.context_bytes, "predicted": size}
    fields = {"gpu_memory_gib": card_gib, "find_max": field, "frontier": frontier, "simulated_gpu": simulated_gpu}
    return predicted(name, *(cell or {"batch_size": (8, 1024), "seq_length": (4, 1024)}[field]), **fields, **settings)


def test_predictions_stand_in_columns_of_their_own_only():
    setting = "one GPU, bf16, checkpointing"
    found = [
        used(make(NONE, 8, gpu=GPU), 20),
        searched(NONE, "batch_size", 11, 24.0),
        searched(NONE, "batch_size", 77),
        searched(NONE, "seq_length", 2176, 24.0),
        searched(NONE, "batch_size", 5, 16.0),
        searched(ALL, "seq_length", 0, 24.0),
        searched(NONE, "batch_size", 6, 24.0, gradient_checkpointing=False),
        searched(NONE, "batch_size", 99, 24.0, cell=(8, 512)),
        searched(NONE, "batch_size", 98, 24.0, dtype="fp32"),
        searched(NONE, "batch_size", 97, 24.0, simulated_gpu="NVIDIA Other"),
    ]
    small, large = best_rows(found, "24 GiB"), best_rows(found, "80 GB")
    assert best_rows(found[::-1], "24 GiB") == small
    assert small[setting, NONE, "H100"][0::3] == ["8 (none larger measured)", "11"]
    assert small[setting, NONE, "H100"][4] == "2,176"
    assert small[setting, ALL, "H100"] == [*3 * ["not measured"], "not predicted", "none"]
    assert large[setting, NONE, "H100"][3:] == ["77", "not predicted"]
    assert small["one GPU, bf16, no checkpointing", NONE, ""] == 3 * ["not measured"] + ["6", "not predicted"]


# The committed documents


@pytest.mark.parametrize("name", ["original", "best"])
def test_committed_document_is_that_of_the_records(name):
    made = tables.TABLES[name].text(ROOT / "doc" / "data", f"python -m doc.tables {name} doc/data")
    assert (ROOT / "doc" / f"{name}.md").read_text() == made + "\n"
