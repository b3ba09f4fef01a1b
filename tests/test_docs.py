"""The documents show what the records show."""

import math
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from doc import evidence, original, report_tables, tables
from src import records
from src.config import PRESETS, OffloadConfig, Strategy, config_of
from src.ds_utils import host_bytes_needed
from src.explain.reading import read
from src.explain.report import waterfall_table
from src.model_utils import load_model_config
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
PREDICTED = (ROOT / "doc" / "predicted_vs_measured.md").read_text()
RECORDS = ROOT / "doc" / "data" / "h100_single_gpu"
DEFAULT_RUN = "bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue"


def cells(table: str) -> list[list[str]]:
    """What tells the runs of a Markdown table apart."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [row[: len(tables.CELL_HEADER)] for row in rows]


@pytest.fixture(scope="module")
def runs():
    return tables.load_all(ROOT / "doc" / "data")


@pytest.fixture(scope="module")
def offloaded():
    return tables.load_all(ROOT / "doc" / "data", "deepspeed")


def test_every_record_is_whole_and_names_its_code_and_machine(runs, offloaded):
    for run in [*runs, *offloaded]:
        assert set(run) == set(records.EMPTY)
        assert re.fullmatch("[0-9a-f]{40}", run["environment"]["git_commit"]), run["run_name"]
        assert run["environment"]["gpu"]
        assert run["status"] in ("ok", "oom"), run["run_name"]


def test_measured_table_is_that_of_the_records(runs):
    assert (ROOT / "doc" / "measured.md").read_text().endswith(tables.measured_table(runs) + "\n")


def test_predicted_table_has_a_row_for_each_record_of_its_folder():
    assert cells(PREDICTED) == cells(tables.measured_table(tables.load_all(RECORDS)))


def test_readme_shows_rows_of_the_tables(runs, offloaded):
    measured = tables.measured_table(runs).splitlines()
    offload = tables.offload_table(offloaded).splitlines()
    frontiers = report_tables.frontiers(evidence.studies()).splitlines()
    shown = {line for line in README.splitlines() if line.startswith("| ")}
    assert min(len(shown & set(table)) for table in (measured, offload, frontiers)) > 5
    assert shown <= {*measured, *offload, *frontiers}


def test_readme_says_how_long_the_study_took():
    fast = [r for r in evidence.folder("study/h100_offload").records if r["config"]["preset"] == "fast"]
    starts = [datetime.fromisoformat(r["environment"]["date"]) for r in fast]
    minutes = math.ceil((max(starts) - min(starts)) / timedelta(minutes=1))
    assert f"then with all memory took {minutes} minutes on the H100" in " ".join(README.split())


def test_readme_states_how_the_study_was_predicted():
    errors, verdicts = evidence.study_errors(), evidence.verdicts()
    told = len(verdicts.measured) - len(verdicts.wrong)
    stated = " ".join(README.split())
    assert (
        f"Over {len(errors.every)} peaks of the study's grids the largest error is {max(errors.every):.3%};" in stated
    )
    assert f"; {len(errors.blind)} of them no GPU had measured when they were predicted" in stated
    assert f"of {len(verdicts.measured)} cells that an H100 ran under 24 GiB, the dry run tells {told} right" in stated


def test_readme_says_where_two_gpus_were_measured():
    assert [r["config"]["world_size"] for r in evidence.folder("h100_two_gpus").records] == [2, 2]
    (row, *others) = scaling_rows(evidence.folder("h100_two_gpus").records)
    assert {cell[:2] + cell[3:] for cell in (row, *others)} == {("fast, warmup 2", "All Liger Kernel", "H100")}


def test_readme_says_that_the_same_cells_fit_as_on_the_originals_card():
    limited = original.ours(records.load_all([ROOT / "doc" / "data"]), original.CARD_GIB)
    assert {original.agreement(original.original(), column) for column in limited.values()} == {"the same in 28 of 28"}


def test_offload_table_and_levers_are_those_of_the_records(offloaded):
    assert (ROOT / "doc" / "offload.md").read_text().endswith(tables.offload_table(offloaded) + "\n")
    tried = tables.load_all(ROOT / "doc" / "data" / "h200_offload", "deepspeed")
    assert (ROOT / "doc" / "levers.md").read_text().endswith(tables.levers_table(tried) + "\n")


def test_fast_preset_takes_no_more_memory_and_less_time_than_the_original(offloaded):
    by_name = {run["run_name"]: run for run in offloaded if run["status"] == "ok"}
    pairs = [(run, by_name[f"{name}_fast"]) for name, run in by_name.items() if f"{name}_fast" in by_name]
    assert len(pairs) >= 35
    for seed, fast in pairs:
        assert fast["peak_memory_bytes"] <= seed["peak_memory_bytes"]
        # With many tokens a step the GPU, which is the same, takes most of its time.
        factor = 1.9 if config_of(seed).tokens_per_step <= 2**15 else 1.3
        assert fast["latency_s"] < seed["latency_s"] / factor


def test_estimate_of_host_memory_is_near_what_was_measured(offloaded):
    told = [run for run in offloaded if run["host_peak_bytes"] is not None and not config_of(run).ds_overrides]
    assert len(told) > 30
    for run in told:
        config = config_of(run)
        estimate = host_bytes_needed(config, load_model_config(config))
        near = 0.08 if config.world_size == 1 else 0.1  # each process has an allowance
        assert estimate == pytest.approx(run["host_peak_bytes"], rel=near), run["run_name"]


def test_peak_table_is_that_of_the_records():
    runs = tables.load_all(ROOT / "doc" / "data", None)
    assert (ROOT / "doc" / "peak.md").read_text().endswith(tables.peak_table(runs) + "\n")


def test_every_measured_peak_is_attributed(runs, offloaded):
    told = [run for run in (*runs, *offloaded) if run["peak_breakdown"]]
    assert len(told) > 40
    for run in told:
        assert sum(run["peak_breakdown"].values()) == run["breakdown_peak_bytes"], run["run_name"]
        assert run["peak_breakdown"]["unattributed"] < 0.03 * run["breakdown_peak_bytes"], run["run_name"]


def test_readme_shows_what_the_reader_of_snapshots_prints():
    names = re.findall(r"doc/data/snapshots/\S+\.gz", README)
    waterfall = waterfall_table(*(read(ROOT / name).breakdown() for name in names))
    assert waterfall in README


def test_readme_shows_the_figures_of_the_default_run():
    assert records.summary(records.load(RECORDS / f"{DEFAULT_RUN}.json")) in README


def test_readme_states_the_largest_error_of_the_predictions():
    count, error = re.search(r"^(\d+) peaks; the largest error is ([\d.]+%)", PREDICTED, re.MULTILINE).groups()
    assert f"Over {count} peaks measured on an H100 the largest error is {error}" in README


def test_readme_states_the_frontiers_of_the_records():
    stated = re.search(
        r"predicted and measured was (\d+) with all\s+Liger kernels and (\d+) with none", README
    ).groups()
    for size, kernels in zip(stated, ("True", "False")):
        name = DEFAULT_RUN.replace("True", kernels) + "_iters5_warmup2_gpu24_maxbatch_size.json"
        frontier = records.load(RECORDS / name)["frontier"]
        assert frontier["predicted"] == frontier["measured"] == int(size)


def test_readme_lists_every_module():
    for path in [*Path(ROOT / "src").glob("*.py"), *ROOT.glob("*.py"), *Path(ROOT / "doc").glob("*.py")]:
        assert path.name == "__init__.py" or path.relative_to(ROOT).as_posix() in README, path


# Scaling


def offload_record(rng, gpu="NVIDIA H200", preset="seed", **fields):
    """A record with figures of its own."""
    config = OffloadConfig(device="cuda", preset=preset, **PRESETS[preset], **fields)
    speed = rng.uniform(1e3, 1e5)
    facts = {"gpu": gpu, "date": "2026-01-01T00:00:00+00:00"}
    figures = {"peak_memory_bytes": rng.randrange(2**30, 2**36), "throughput_tokens_per_s": speed, "environment": facts}
    identity = {"run_name": config.run_name, "script": "deepspeed", "mode": "measured", "status": "ok"}
    return records.EMPTY | identity | {"config": config.to_dict()} | figures


def scaling_rows(runs):
    """Rows of the table as dictionaries by column, by (first column, kernels, sizes, GPU)."""
    lines = [line for line in tables.scaling_table(runs).split("\n") if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return {tuple(row[:4]): dict(zip(header[4:], row[4:], strict=True)) for row in rows}


def test_efficiency_is_relative_to_one_gpu_and_what_was_not_measured_stays_empty(rng):
    one, two, eight = (offload_record(rng, preset="fast", world_size=n) for n in (1, 2, 8))
    ((cell, row),) = scaling_rows([eight, one, two]).items()
    assert cell == ("fast", "All Liger Kernel", "4 x 1024", "H200")
    for n, run in ((1, one), (2, two), (8, eight)):
        name = "1 GPU" if n == 1 else f"{n} GPUs"
        assert row.pop(f"peak GiB, {name}") == f"{run['peak_memory_bytes'] / 2**30:,.2f}"
        assert row.pop(f"tokens/s, {name}") == f"{run['throughput_tokens_per_s']:,.0f}"
        if n > 1:
            efficiency = run["throughput_tokens_per_s"] / n / one["throughput_tokens_per_s"]
            assert row.pop(f"efficiency, {name}") == f"{efficiency:.0%}"
    assert row == {"peak GiB, 4 GPUs": "", "tokens/s, 4 GPUs": "", "efficiency, 4 GPUs": ""}


def test_other_gpus_settings_and_threads_are_no_reference(rng):
    four = offload_record(rng, world_size=4)
    threads = offload_record(rng)
    threads["environment"]["omp"] = {"OMP_NUM_THREADS": "2"}
    others = [threads, offload_record(rng, gpu="NVIDIA H100 80GB HBM3"), offload_record(rng, batch_size=8)]
    others += [offload_record(rng, preset="fast"), offload_record(rng, model_name="meta-llama/Llama-3.1-8B")]
    others += [offload_record(rng, strategy=Strategy.only())]
    (row,) = scaling_rows([*others, four]).values()
    shown = {name for name, text in row.items() if text}
    assert shown == {"peak GiB, 4 GPUs", "tokens/s, 4 GPUs"}


def test_run_out_of_memory_has_no_speed_and_is_no_reference(rng):
    one, two = (offload_record(rng, world_size=n) for n in (1, 2))
    oom = one | {"status": "oom", "peak_memory_bytes": None, "throughput_tokens_per_s": None}
    (row,) = scaling_rows([oom, two]).values()
    assert (row["peak GiB, 1 GPU"], row["tokens/s, 1 GPU"], row["efficiency, 2 GPUs"]) == ("OOM", "", "")
    oom = two | {"status": "oom", "peak_memory_bytes": None, "throughput_tokens_per_s": None}
    (row,) = scaling_rows([one, oom]).values()
    assert (row["peak GiB, 2 GPUs"], row["tokens/s, 2 GPUs"], row["efficiency, 2 GPUs"]) == ("OOM", "", "")


def test_without_runs_on_several_gpus_the_scaling_table_says_so(rng):
    assert tables.scaling_table([offload_record(rng)]) == "No run on several GPUs has been measured."
