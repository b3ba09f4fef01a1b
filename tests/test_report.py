"""The report and the slides are made of records and of models' shapes, and fail where these do not bear them out."""

import json
import re
import shutil

import pytest
import torch

from doc import build, evidence, office, report_tables
from doc.evidence import ALL_KERNELS, NO_KERNELS, Shape, holds
from src import study
from src.config import RunConfig
from src.utils import GIB, UsageError
from tests.helpers import ROOT, run_python
from tests.made_up import ALL, NO_FLCE, NONE, make, out_of_memory

DEFAULT_RUN = "h100_single_gpu/bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue.json"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A copy of the study's records that a test may change."""
    shutil.copytree(evidence.DATA, tmp_path / "data")
    monkeypatch.setattr(evidence, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Renders a text of a test's own."""
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(build, "DOC", tmp_path)

    def rendered(text):
        (tmp_path / "source" / "report.md").write_text(text)
        return build.render("report.md")

    return rendered


def scale_peak(data, factor):
    """Change the peak of one record."""
    record = json.loads((data / DEFAULT_RUN).read_text())
    record["peak_memory_bytes"] = int(record["peak_memory_bytes"] * factor)
    (data / DEFAULT_RUN).write_text(json.dumps(record))
    return record["peak_memory_bytes"]


def test_everything_in_doc_is_what_the_records_and_sources_make(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert build.stale() == []


def test_a_document_made_from_another_text_is_stale(monkeypatch):
    monkeypatch.chdir(ROOT)
    render = build.render
    monkeypatch.setattr(build, "render", lambda name: render(name) + ("another slide" if name == "slides.md" else ""))
    assert build.stale() == ["group_10_liger_kernel.pptx"]


def test_report_follows_the_records(data, rng):
    before = build.render("report.md")
    shown = f"{scale_peak(data, rng.uniform(1.02, 1.04)) / GIB:,.2f}"
    assert build.render("report.md").count(shown) - before.count(shown) >= 5


def test_conclusion_that_the_records_no_longer_show_stops_the_build(data, rng):
    scale_peak(data, rng.uniform(1.5, 1.9))
    with pytest.raises(UsageError, match=r"^doc/source/\w+.md, line \d+: the records no longer show this: '.+'$"):
        build.render("report.md")


def test_build_tells_of_a_missing_record_in_one_line(data):
    (data / DEFAULT_RUN).unlink()
    with pytest.raises(UsageError, match=r"doc/data/h100_single_gpu has no record of: All Liger Kernel$"):
        build.render("report.md")


def test_condition_of_a_sentence(source, rng):
    low, high = rng.randrange(100), rng.randrange(100, 200)
    text = "first line\n\n{%% call holds(%d < %d) %%}So be it.{%% endcall %%}\n"
    assert source(text % (low, high)) == "first line\n\nSo be it.\n"
    with pytest.raises(UsageError, match=r"line 3: the records no longer show this: 'So be it\.'$"):
        source(text % (high, low))


def test_unknown_name_and_syntax_error_name_their_line(source):
    with pytest.raises(UsageError, match="line 2: 'speed_of_light' is undefined"):
        source("one\n{{ speed_of_light }}\n")
    with pytest.raises(UsageError, match=r"report\.md, line 1: "):
        source("{% call %}\n")


def test_paragraphs_are_broken_and_tables_left_alone(rng):
    words = " ".join("".join(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in range(200))
    table = "| a | b |\n| :--- | ---: |\n| " + "x" * 130 + " | 1 |"
    text = f"# Title\n\n{words}\n\n\n- {words}\n- short\n\n{table}\n"
    broken = build.reflow(text)
    assert broken.split() == text.split()
    assert table in broken
    assert max(len(line) for line in broken.splitlines() if not line.startswith("|")) <= 120
    assert build.reflow(broken) == broken


def test_chunks_are_those_of_liger(monkeypatch, rng):
    from liger_kernel.ops import fused_linear_cross_entropy as flce

    rows = []

    class Kernel:
        def __getitem__(self, grid):
            rows.append(grid[0])
            return lambda **_: None

    monkeypatch.setattr(flce, "liger_cross_entropy_kernel", Kernel())
    for _ in range(40):
        tokens, hidden, budget = rng.randint(1, 300), rng.choice([2, 4, 8]), rng.choice([1, 1, 2, 8])
        vocabulary = rng.randint(hidden, 60)
        rows.clear()
        labels = torch.randint(vocabulary, (tokens,))
        flce.fused_linear_cross_entropy_forward(
            torch.randn(tokens, hidden), torch.randn(vocabulary, hidden), labels, chunk_mem_const=budget
        )
        monkeypatch.setattr(Shape, "config", type("", (), {"vocab_size": vocabulary, "hidden_size": hidden}))
        shape = Shape("any")
        assert rows[0] == shape.chunk(tokens, budget)
        assert len(rows) == shape.chunks(tokens, budget)


def test_shape_counts_every_weight_once():
    from transformers import AutoModelForCausalLM

    for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(Shape(name).config)
        assert Shape(name).parameters == model.num_parameters()
        assert Shape(name).head_bytes == model.lm_head.weight.numel() * 2


def test_failed_run_is_found_but_bears_no_sentence():
    h100 = evidence.folder("h100_single_gpu")
    settings = {"batch_size": 32, "gradient_checkpointing": False}
    assert h100.find(NO_KERNELS, **settings)["status"] == "oom"
    with pytest.raises(UsageError, match="only a run that failed of: No Liger Kernel batch_size 32"):
        h100.run(NO_KERNELS, **settings)
    assert h100.find(ALL_KERNELS, batch_size=5) is None


def test_cells_without_figures_say_why():
    h100 = evidence.folder("h100_single_gpu")
    oom = h100.find(NO_KERNELS, batch_size=32, gradient_checkpointing=False)
    for cell in (report_tables.peak, report_tables.step, report_tables.speed):
        assert cell(None) == "not measured"
        assert cell(oom) == "OOM"


def test_study_counts_the_cells_it_lacks(rng):
    part = evidence.studies()[0]
    fewer = evidence.Study(part.setting, dict(rng.sample(list(part.cells.items()), len(part.cells) - 3)))
    assert fewer.missing == part.missing + 3 == len(study.GRID) - len(fewer.cells)


def rows_of(table):
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_repeated_cells_are_compared_with_those_before(rng):
    few, many = rng.sample(range(1, 16), 2), rng.sample(range(16, 99), 2)
    factors = {batch: rng.uniform(0.5, 2) for batch in (*few, *many)}
    pairs = [
        (make(ALL, batch, seconds=[1.0] * 3, peak=2 * GIB), make(ALL, batch, seconds=[factor] * 3, peak=2 * GIB))
        for batch, factor in factors.items()
    ]
    pairs[0][1]["peak_memory_bytes"] = 3 * GIB
    (row,) = rows_of(report_tables.repeats([evidence.Repeat("these", pairs)]))
    name, count, peak, *times = row.values()
    assert (name, count, peak) == ("these", "4", "50.00%")
    for text, batches in zip(times, (many, few)):
        changes = sorted(factors[batch] - 1 for batch in batches)
        assert text == f"{changes[0]:+.0%} to {changes[1]:+.0%}"


def test_runs_measured_again_are_those_of_the_same_settings_and_machine(data):
    counts = {repeat.title: len(repeat.pairs) for repeat in evidence.repeats(evidence.studies())}
    assert counts == {
        "offload, preset seed": 5,
        "offload, preset fast": 5,
        "one GPU": 15,
        "one GPU, no checkpointing": 13,
    }
    (data / "h100_single_gpu" / "bs1_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue.json").unlink()
    fewer = {repeat.title: len(repeat.pairs) for repeat in evidence.repeats(evidence.studies())}
    assert fewer == counts | {"one GPU": 14}


def test_frontiers_show_each_setting_with_all_memory_and_under_its_limit():
    found = [make(ALL, 8), make(NONE, 4), out_of_memory(NONE, 8), make(ALL, 4, 2048)]
    limited = [make(ALL, 4), out_of_memory(ALL, 8)]
    studies = [
        evidence.Study(study.Setting(RunConfig(memory_limit_gib=limit), "GPU"), {study.cell(r): r for r in runs})
        for limit, runs in ((None, found), (24.0, limited))
    ]
    shown = {row["kernels"]: list(row.values())[2:] for row in rows_of(report_tables.frontiers(studies))}
    nothing = "not measured"
    assert shown == {
        NONE: ["4 (8: OOM)", "1,024 (none larger measured)", nothing, nothing],
        NO_FLCE: 4 * [nothing],
        ALL: ["8 (none larger measured)", "2,048 (none larger measured)", "4 (8: OOM)", "1,024 (none larger measured)"],
    }


def test_what_any_gpu_had_measured_before_is_not_called_blind(data):
    every, blind = evidence.study_errors()
    folder, name = data / "study" / "predicted_single_gpu", "bs4_seq24576_ropeTrue_siluTrue_rmsTrue_flceTrue"
    path = folder / f"{name}_dryrun1.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"peak_memory_bytes": 2 * before["peak_memory_bytes"]}))
    assert max(evidence.study_errors().blind) == pytest.approx(1, abs=0.001)
    # As if another GPU had measured it earlier, under a limit.
    run = json.loads((data / "study" / "h100_single_gpu" / f"{name}_warmup2_limit24.json").read_text())
    run["environment"] |= {"date": "2026-01-01T00:00:00+00:00", "gpu": "NVIDIA Other"}
    earlier = data / "h200_single_gpu" / "earlier.json"
    earlier.write_text(json.dumps(run))
    assert [len(errors) for errors in evidence.study_errors()] == [len(every), len(blind) - 1]
    # A run that ran out of memory shows no peak.
    earlier.write_text(json.dumps(run | {"status": "oom"}))
    assert len(evidence.study_errors().blind) == len(blind)
    # What is predicted after the measurement is not blind either.
    earlier.unlink()
    before["environment"]["date"] = "2126-01-01T00:00:00+00:00"
    path.write_text(json.dumps(before))
    assert len(evidence.study_errors().blind) == len(blind) - 1


def test_wrong_verdicts_on_what_fits_are_found(data):
    before = evidence.verdicts()
    assert {r["config"]["memory_limit_gib"] for r in before.measured} == {24}
    assert {r["mode"] for r in before.measured} == {"measured"}
    name = "bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue_limit24_dryrun1.json"
    path = data / "study" / "predicted_single_gpu" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "oom"}))
    after = evidence.verdicts()
    assert len(after.measured) == len(before.measured)
    assert {r["run_name"] for r in after.wrong} - {r["run_name"] for r in before.wrong} == {
        "bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue_warmup2_limit24"
    }


def test_tables_keep_their_cells_and_get_widths():
    table = "| name | GiB |\n| :--- | ---: |\n| a long name | 1 |"
    lines = office.with_column_widths(f"text\n\n{table}\n\nmore\n").splitlines()
    assert [*lines[:3], *lines[4:]] == ["text", "", "| name | GiB |", "| a long name | 1 |", "", "more"]
    first, second = re.fullmatch(r"\|:(-+)\|(-+):\|", lines[3]).groups()
    assert len(first) > 2 * len(second)


def test_check_fails_in_one_line_when_a_source_has_changed(tmp_path):
    for name in ("doc", "src", "all_gpu_liger_kernel.py", "deepspeed_liger_kernel.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "doc" / "source" / "slides.md").open("a") as slides:
        slides.write("\n# One more slide\n")
    done = run_python("-m", "doc.build", "--check", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: out of date, run python -m doc.build: group_10_liger_kernel.pptx\n"


def test_holds_returns_its_text_on_one_line():
    assert holds(True, lambda: "two\n  lines") == "two lines"


@pytest.mark.parametrize("name", ["group_10_midterm.pdf", "group_10_liger_kernel.pdf"])
def test_links_of_the_pdfs_hold_on_any_machine(name):
    links = re.findall(rb"/URI\(([^)]*)\)", (build.DOC / name).read_bytes())
    assert links or "liger_kernel" in name
    for link in map(bytes.decode, links):
        assert link.startswith("https://") or (build.DOC / link).is_file(), link
