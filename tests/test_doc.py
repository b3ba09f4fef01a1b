"""Everything in doc/ is what the records make, and a sentence that they no longer bear out stops the build."""

import csv
import dataclasses
import itertools
import re
import zipfile
from collections import defaultdict

import pandas as pd
import pytest
import torch

from doc import build, evidence, long, studies, tables
from doc.evidence import DATA, ROOT, Folder, Shape
from src.config import PRESETS as RUN_PRESETS
from src.config import RunConfig
from src.machine import H100
from src.offload_config import PRESETS, OffloadConfig
from src.record import save
from src.study import answers
from src.study.answers import MANY_TOKENS, REPEATS
from src.utils import GIB, UsageError
from tests.helpers import assert_one_error_line, near_host_peak
from tests.made_up import ALL, NO_FLCE, NONE, failed, inferred, made_up, out_of_memory, predicted

ORIGINAL = {"config": OffloadConfig, "gpu": H100.name, **PRESETS["original"]}
FAST = {**ORIGINAL, **PRESETS["fast"], "preset": "fast"}
TEXTS = [*(ROOT / "doc" / f"{name}.md" for name in build.DOCUMENTS), ROOT / "README.md"]


def rows(table):
    """The cells of a Markdown table, or of all tables in a text, without headers' rules."""
    lines = [line.strip() for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if not all(re.fullmatch(":?-+:?", cell) for cell in row)]


def by_column(table):
    """The rows as dictionaries."""
    header, *body = rows(table)
    return [dict(zip(header, row, strict=True)) for row in body]


# The committed documents


def test_everything_is_what_the_records_and_sources_make():
    assert build.stale() == []


def test_another_text_makes_its_documents_stale(monkeypatch):
    render = build.render
    monkeypatch.setattr(build, "render", lambda name: render(name) + ("one more" if name in ("slides", "peak") else ""))
    assert build.stale() == ["peak.md", "group_10_liger_kernel.pptx"]


def test_slides_have_numbers_and_an_author_and_the_reports_figures_are_numbered():
    with zipfile.ZipFile(ROOT / "doc" / "group_10_liger_kernel.pptx") as slides:
        assert f"<dc:creator>{build.AUTHOR}</dc:creator>" in slides.read("docProps/core.xml").decode()
        pages = [slides.read(name).decode() for name in slides.namelist() if name.startswith("ppt/slides/slide")]
    assert len(pages) > 10
    assert all(page.count('type="slidenum"') == 1 for page in pages)
    with zipfile.ZipFile(ROOT / "doc" / "group_10_midterm.docx") as report:
        text = re.sub("<[^>]+>", "", report.read("word/document.xml").decode())
    numbers = re.findall(r"Figure (\d+)\.", text)
    assert numbers == [str(place + 1) for place in range(len(re.findall(r"!\[", build.render("report"))))]


def test_spread_between_runs_that_compare_tells_is_that_of_the_records():
    found = studies.repeats()
    steps = found[found["tokens"] < MANY_TOKENS]["step"]
    assert (round(steps.min(), 2), round(steps.max(), 2)) == REPEATS


def test_tables_of_a_users_records_whatever_became_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "strange", set())
    kinds = {
        "failed": lambda **own: [failed(ALL, 4, **own)],
        "nameless": lambda **own: [failed(ALL, 4, gpu=None, **own)],
        "full": lambda **own: [out_of_memory(name, 4, **own) for name in (NONE, ALL)],
        "one step": lambda **own: [made_up(n, 4, seconds=[0.5], latency_iqr_s=None, **own) for n in (NONE, ALL)],
        "untimed": lambda **own: [
            made_up(ALL, 4, latency_s=None, step_seconds=None, throughput_tokens_per_s=None, **own)
        ],
    }
    scripts = {"measured": RunConfig, "offload": OffloadConfig, "original": OffloadConfig, "levers": OffloadConfig}
    scripts |= {"best": RunConfig, "scaling": OffloadConfig, "parity": RunConfig, "report": RunConfig}
    for (kind, make), (name, config) in itertools.product(kinds.items(), scripts.items()):
        folder = tmp_path / f"{kind} {name}"
        for one in make(config=config):
            save(one, folder / f"{one.run_name}.json", str)
        assert build.render(name, str(folder))
    assert "| 500.0 |" in re.sub(r" +", " ", build.render("measured", str(tmp_path / "one step measured")))
    (tmp_path / "full best" / "x.json").write_text("{}")
    (tmp_path / "full best").rename(tmp_path / "again")  # what was read is not read again
    build.render("best", str(tmp_path / "again"))
    assert_one_error_line(capsys.readouterr().err, f"skipped: {tmp_path / 'again' / 'x.json'} is not a record")
    assert evidence.strange == {tmp_path / "again"}


@pytest.mark.parametrize(
    "path", [*TEXTS, ROOT / "doc" / "guide.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_links_and_pictures_exist(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if target and not (path.parent / target).exists()] == []


def test_figures_of_the_readmes_tables_are_those_of_the_documents():
    def figures(row):
        return [cell for cell in row if re.search(r"\d", cell)]

    known = [figures(row) for path in TEXTS[:-1] for row in rows(path.read_text())]
    shown = [row for row in map(figures, rows(TEXTS[-1].read_text())) if len(row) > 2]
    assert len(shown) > 5
    for row in shown:  # which may leave columns out
        assert any(all(cell in rest for cell in row) for rest in map(iter, known)), row


def test_figures_of_the_readmes_first_page_are_in_the_report():
    first_page = TEXTS[-1].read_text().partition("## Quick start")[0]
    figures = set(re.findall(r"\d[\d,]*(?:\.\d+)?", re.sub(r"\]\([^)]*\)", "", first_page)))
    report = set(re.findall(r"\d[\d,]*(?:\.\d+)?", (ROOT / "doc" / "report.md").read_text()))
    assert len(figures) > 20
    assert figures <= report


def said(path):
    return " ".join(path.read_text().split())


def test_readme_says_of_long_sequences_what_the_document_says():
    paragraph = re.search(r"\*\*Long sequences\.\*\* (.*?) \[", said(TEXTS[-1]))[1]
    figures = re.findall(r"\d[\d,]*\d(?:\.\d+)?", paragraph)
    known = set(re.findall(r"\d[\d,]*\d(?:\.\d+)?", (ROOT / "doc" / "long.md").read_text()))
    assert len(figures) == 8
    assert set(figures) <= known


def test_readme_says_of_advice_what_the_document_says():
    document, text = said(ROOT / "doc" / "advice.md"), said(TEXTS[-1])
    assert "none was faster than what it names first by more than their steps spread, in any of the four.**" in document
    least, most = re.search(r"is ([\d.]+) to ([\d.]+) times as fast as all layers checkpointed", document).groups()
    assert f"checkpointing all layers took {least} to {most} times as long" in text
    assert f"up to {re.search(r'was faster by ([.0-9]+)% at most', document)[1]} % faster" in text


def test_readme_says_of_several_gpus_what_the_document_says():
    text, document = said(TEXTS[-1]), said(ROOT / "doc" / "scaling.md")
    found = defaultdict(list)
    for row in by_column((ROOT / "doc" / "scaling.md").read_text().partition("\n## ")[0]):
        preset = row["preset, and what differs from it"].split(",")[0]
        for count in (2, 4):
            if figure := row[f"efficiency, {count} GPUs"]:
                before = preset == "original" and figure.endswith("*")
                found["before" if before else preset, count].append(int(figure.partition("%")[0]))
    found["before", 2].append(int(re.search(r"\((\d+)% of twice one's speed there\)", document)[1]))
    told = {what: f"{min(own)} to {max(own)} %" for what, own in found.items()}
    assert f"two GPUs reach {told.pop(('fast', 2))} of twice one's speed, four {told.pop(('fast', 4))} of four" in text
    four, two = re.search(r"the last is (\d+)%, and two GPUs' (\d+)%", document).groups()
    assert f"beside its fastest run {two} and {four} %" in text
    fastest = re.search(r"two GPUs reach (\d+)% and four (\d+)%\.", document).groups()
    original = f"two reach {told.pop(('original', 2))} and four {told.pop(('original', 4))}"
    assert "{}, beside one's fastest run {} and {} %".format(original, *fastest) in text
    assert f"two {told.pop(('before', 2))} before" in text
    assert not told


def test_readme_states_the_errors_of_the_predictions():
    text = " ".join(TEXTS[-1].read_text().split())
    told = set(re.findall(r"(\d+) peaks[^.%]*?largest error is ([\d.]+%)", text))
    single, offloaded = evidence.single_gpu_runs(), evidence.offloaded_runs()
    found = evidence.errors(single), evidence.study_errors()[0], evidence.errors(offloaded)
    assert told <= {(str(len(errors)), f"{max(errors):.3%}") for errors in found}
    assert told


def test_every_search_for_gpus_stands_in_its_place():
    _, text = (ROOT / "doc" / "predicted_offload.md").read_text().split("## Which GPUs")
    shown = {(row["model"], row["what is divided, and where it is"]): row for row in by_column(text)}
    found = evidence.folder("predicted_gpus").records
    assert len(found) == 6 * len(shown)
    for record in found:
        config, count = record.run, record.frontier.predicted
        row = shown[answers.short_model(config), f"{config.zero}, preset {config.preset}"]
        told = row[f"{config.gpu_memory_gib:.0f} GB, {'FLCE' if config.flce else 'no FLCE'}"]
        assert told == (f"{count:,} ({record.predicted_host_bytes / GIB:,.0f} GiB)" if count else "none")


# Conditions


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Renders a text of a test's own."""
    monkeypatch.setattr(evidence, "SOURCE", tmp_path)

    def rendered(text):
        (tmp_path / "report.md").write_text(text)
        return build.render.__wrapped__("report")

    return rendered


def test_sentence_stands_only_if_its_condition_holds(source):
    text = "one\n\n{%% call holds(%s) %%}So be\nit.{%% endcall %%}\n"
    assert source(text % "1 < 2") == "one\n\nSo be it.\n"
    with pytest.raises(UsageError, match=r"^doc/source/report\.md, line 3: the records no longer show this: 'So be"):
        source(text % "2 < 1")
    with pytest.raises(UsageError, match=r"report\.md, line 3: 'speed_of_light' is undefined$"):
        source(text % "speed_of_light > 0")


def test_records_that_say_otherwise_stop_the_build(monkeypatch):
    place = evidence.folder("h100_single_gpu")
    default, folder = place.run("all"), evidence.folder
    others = [record for record in place.records if record is not default]
    worse = Folder(
        place.name, [*others, default.model_copy(update={"peak_memory_bytes": int(1.7 * default.peak_memory_bytes)})]
    )
    monkeypatch.setattr(evidence, "folder", lambda name: worse if name == place.name else folder(name))
    with pytest.raises(UsageError, match=r"^doc/source/\w+\.md, line \d+: the records no longer show this: '.+'$"):
        build.render.__wrapped__("report")
    fewer = Folder(place.name, others)
    monkeypatch.setattr(evidence, "folder", lambda name: fewer if name == place.name else folder(name))
    with pytest.raises(UsageError, match=r"doc/data/h100_single_gpu has no record of: kernels all$"):
        build.render.__wrapped__("report")


def test_failed_run_is_found_but_bears_no_sentence():
    runs, settings = evidence.folder("h100_single_gpu"), {"batch_size": 32, "gradient_checkpointing": False}
    assert runs.find("none", **settings).status == "oom"
    with pytest.raises(UsageError, match="only a run that failed of: kernels none, batch_size 32"):
        runs.run("none", **settings)


# What the committed records are


def test_every_record_names_its_code_and_machine_and_takes_its_peak_apart():
    found = [r for r in evidence.records_below(DATA) if r.mode == "measured"]
    for run in found:
        assert re.fullmatch("[0-9a-f]{40}", run.environment.git_commit), run.run_name
        assert run.environment.gpu
        assert run.status in ("ok", "oom"), run.run_name
    told = [run for run in found if run.peak_breakdown]
    assert len(told) > 40
    for run in told:
        assert sum(run.peak_breakdown.values()) == run.breakdown_peak_bytes, run.run_name
        assert run.peak_breakdown["unattributed"] < 0.03 * run.breakdown_peak_bytes, run.run_name


def test_host_memory_of_long_sequences_is_near_what_was_measured():
    told = [(p, r) for p, r in evidence.predictions(long.measured()) if evidence.host_error(p, r) is not None]
    assert told
    for prediction, run in told:
        assert prediction.predicted_host_bytes == near_host_peak(run), run.run_name


def test_times_that_predictions_are_compared_with_are_those_of_enough_steps():
    found = [c.run for own in evidence.timed().values() for c in own]
    assert len(found) > 200
    assert all(len(run.step_seconds) >= 5 and run.run.warmup >= 2 for run in found)


def test_fast_preset_takes_no_more_memory_and_less_time_than_the_original():
    by_name = {run.run_name: run for run in evidence.listed(DATA, "deepspeed") if run.status == "ok"}
    pairs = [(run, by_name[f"{name}_fast"]) for name, run in by_name.items() if f"{name}_fast" in by_name]
    assert len(pairs) >= 35
    for first, fast in pairs:
        assert fast.peak_memory_bytes <= first.peak_memory_bytes
        # With many tokens a step the GPU, which is the same, takes most of its time.
        assert fast.latency_s < first.latency_s / (1.9 if first.run.tokens_per_step <= 2**15 else 1.3)


def test_every_measured_run_has_its_prediction_which_is_no_run_of_a_study():
    pairs = evidence.predictions([*evidence.single_gpu_runs(), *evidence.offloaded_runs()])
    for script, place in evidence.PREDICTIONS.items():  # runs that differ only in what changes no peak share one
        named = {prediction.run_name for prediction, run in pairs if run.script == script}
        assert named == {record.run_name for record in evidence.folder(place).records}
    for prediction, run in pairs:
        assert prediction.mode == "predicted"
        if run.script == "deepspeed":
            continue
        own = {"gpu_memory_gib": prediction.run.gpu_memory_gib, "gpu_rates": prediction.run.gpu_rates}
        assert answers.settings(prediction.run) == dataclasses.replace(answers.settings(run.run), **own)
        assert prediction.run.gpu_rates == (None if "H100" in run.environment.gpu else "h200")
        assert prediction.mode == "predicted"
    assert answers.studies(prediction for prediction, _ in pairs) == {}
    with pytest.raises(UsageError, match=r"no prediction of bs7_\S+: python -m doc\.build --predictions"):
        evidence.predictions([made_up(ALL, 7)])


def test_published_figures_are_read_as_they_stand():
    lines = (DATA / "original" / "rtx4090_offload.csv").read_text().splitlines()
    published = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    column = studies.original()
    assert len(published) == len(column.cells) == 28
    for row in published:
        cell = answers.Cell(row["strategy"], int(row["batch_size"]), int(row["seq_length"]))
        if row["status"] == "oom":
            assert (column.ran(cell), tables.peak(column.cells[cell])) == (None, "OOM")
            continue
        assert column.cells[cell].peak_memory_bytes == int(row["peak_memory_bytes"])
        assert column.cells[cell].throughput_tokens_per_s == float(row["throughput_tokens_per_s"])


# What is computed


def column(*found):
    (only,) = studies.columns(found)
    return only


def test_savings_are_ratios_of_the_records():
    peaks, seconds = {NONE: 10 * GIB, NO_FLCE: 8 * GIB, ALL: 2 * GIB}, {NONE: 3.0, NO_FLCE: 2.5, ALL: 2.0}
    found = [made_up(name, 8, peak=peaks[name], seconds=[seconds[name]] * 3, **ORIGINAL) for name in peaks]
    found += [made_up(NONE, 16, **ORIGINAL), out_of_memory(ALL, 16, **ORIGINAL), inferred(ALL, 32, **ORIGINAL)]
    found += [made_up(NONE, 4, **ORIGINAL), made_up(ALL, 4, **ORIGINAL), failed(NO_FLCE, 4, **ORIGINAL)]
    own = column(*found)
    assert own.savings().loc[(8, 1024)].tolist() == [5, 0.75, 1.5]
    assert own.savings().loc[(4, 1024)].isna().tolist() == [False, True, False]
    assert len(own.savings()) == 2
    assert own.counts() == {"measured": 7, "never_met": 0, "inferred": 1, "failed": 1}
    assert str(own.reach(NONE, studies.LINES[0])) == "16 (none larger measured)"
    assert str(own.reach(ALL, studies.LINES[0])) == "8 (16: OOM)"
    assert str(own.reach(NO_FLCE, studies.LINES[1])) == "not measured"


LONGEST = {**RUN_PRESETS["longest"], "preset": "longest", "memory_limit_gib": 79.2, "attention_kept": 15}
del LONGEST["batch_size"]


def test_long_sequences_stand_with_what_they_needed_and_the_longest_that_fit_are_the_ladder(monkeypatch):
    folder = {"model_name": "models/llama_4_layers", "rope_scaling": 8.0}
    full = out_of_memory(NONE, 1, 2**17)
    longest = made_up(ALL, 1, 2**19, **LONGEST, rope_scaling=4.0, host_peak_bytes=100 * GIB, warmup=0)
    other = made_up(ALL, 1, 2**20, **LONGEST | folder, seconds=[700.0], host_peak_bytes=GIB)
    runs = [other, full, out_of_memory(NONE, 1, 2**20), made_up(NONE, 1, 2**13), longest, made_up(NONE, 1, 2**15)]
    monkeypatch.setattr(evidence, "listed", lambda *_: [*runs, failed(ALL, 1, 2**13)])
    assert [r.run.seq_length for r in long.measured()] == [2**13, 2**15, 2**17, 2**19, 2**20, 2**20]
    assert long.ladder() == {NONE: (runs[-1], full), long.LONGEST: (longest, None)}
    kept = predicted(ALL, 1, 2**19, **LONGEST, peak=GIB, predicted_host_bytes=98 * GIB)
    shown = by_column(
        tables.long_sequences([(out_of_memory(NONE, 1, 2**17), full), (kept, longest), (predicted(ALL, 1), other)])
    )
    assert [row["tokens"] for row in shown] == ["131,072", "524,288", "1,048,576"]
    assert shown[1]["turned on"] == "preset longest, attention_kept 15, rope_scaling 4.0"
    assert (shown[1]["error"], shown[1]["host error"]) == ("-50.000%", "-2.0%")
    assert shown[1]["timed steps, after warm-up"] == "4 after 0"
    assert (shown[0]["measured GiB"], shown[0]["s a step"], shown[0]["host measured GiB"]) == ("OOM", "", "")
    assert (shown[2]["model"], shown[2]["s a step"], shown[2]["host error"]) == ("llama_4_layers", "700.00", "")


def used(record, gib, memory=H100.memory_bytes):
    environment = record.environment.model_copy(update={"gpu_memory_bytes": memory})
    return record.model_copy(
        update={"device_used_bytes": int(gib * GIB) if record.status == "ok" else None, "environment": environment}
    )


LIMIT = {"memory_limit_gib": 24.0}
FITS_24_GIB = {
    "driver saw less": (used(made_up(ALL, 8), 23), True, None),
    "driver saw more": (used(made_up(ALL, 8), 25), False, "took 25.00 GiB"),
    "under the limit": (used(made_up(ALL, 8, **LIMIT), 24.7), True, None),
    "out of 24 GiB": (used(out_of_memory(ALL, 8, **LIMIT), 0), False, "OOM"),
    "out of less": (used(out_of_memory(ALL, 8, memory_limit_gib=16.0), 0), False, None),
    "out of a larger card": (used(out_of_memory(ALL, 8), 0), False, "OOM"),
    "out of a smaller card": (used(out_of_memory(ALL, 8), 0, memory=22 * GIB), False, None),
    "not run": (used(inferred(ALL, 8, **LIMIT), 0), False, "OOM*"),
    "failed": (used(failed(ALL, 8), 0), False, None),
}


@pytest.mark.parametrize("case", FITS_24_GIB)
def test_what_fits_24_gib_and_what_shows_that_it_does_not(case):
    record, fits, reason = FITS_24_GIB[case]
    assert studies.fits(record, 24 * GIB) == fits
    assert studies.excess(record, 24 * GIB) == reason


def test_best_settings_are_those_that_fit_and_predictions_stand_apart():
    gpu = {"gpu": H100.name}
    search = {"searched": "batch_size", "limit_bytes": 24 * GIB - H100.context_bytes, "predicted": 11}
    found = [
        used(made_up(NONE, 8, seconds=[1.0] * 3, **gpu), 20),
        used(out_of_memory(NONE, 10, **gpu, **LIMIT), 0),
        used(made_up(NONE, 3, 5000, seconds=[0.1] * 3, **gpu), 23),  # on no line of the grids, but fast
        used(made_up(NONE, 4, 2048, seconds=[1.0] * 3, **gpu), 79),
        used(made_up(ALL, 16, dtype="fp32", **gpu), 1),
        used(made_up(ALL, 32, **FAST), 10),
        predicted(NONE, 8, find_max="batch_size", gpu_memory_gib=24.0, frontier=search),
    ]
    shown = {tuple(row[:3]): row[3:] for row in rows(tables.best(found, 24 * GIB))[1:]}
    setting = "one GPU, bf16, checkpointing"
    reach = ["8 (10: OOM)", "none (2,048: took 79.00 GiB)"]
    assert shown[setting, NONE, "H100"] == [*reach, "150,000 at 3 x 5000", "11", "not predicted"]
    assert (setting, ALL, "H100") not in shown
    assert shown["ZeRO-3 offload, preset fast", ALL, "H100"][0] == "32 (none larger measured)"


def test_efficiency_is_relative_to_one_gpu_and_what_was_not_measured_stays_empty():
    def shared(n):
        return {"cpu_count": 8 * n, "local_ranks": n, "omp": {"OMP_NUM_THREADS": "8"} if n > 1 else {}}

    one, two, eight = (
        made_up(ALL, 4, world_size=n, seconds=[1 / n**0.5] * 3, environment=shared(n), **FAST) for n in (1, 2, 8)
    )
    later = {"date": "2026-02-02T00:00:00+00:00"}
    other = [made_up(ALL, 4, **FAST, environment=later | own) for own in ({"gpu": "H200"}, {"omp": {"OMP_X": "1"}})]
    (row,) = by_column(tables.scaling([eight, *other, two, one]))
    assert row["preset, and what differs from it"] == "fast"
    assert [row[f"efficiency, {n} GPUs"] for n in (2, 8)] == ["141%", "283%"]
    assert [row[f"peak GiB, {n} GPUs"] for n in (2, 8)] == ["2.00", "2.00"]
    assert "peak GiB, 4 GPUs" not in row
    (row, more) = by_column(tables.scaling([eight, two, one, *(made_up(ALL, 8, world_size=n, **FAST) for n in (1, 8))]))
    assert (row["efficiency, 2 GPUs"], more["efficiency, 2 GPUs"]) == ("141%", "")
    (row,) = by_column(tables.scaling([out_of_memory(ALL, 4, **FAST), two]))
    assert (row["peak GiB, 1 GPU"], row["tokens/s, 1 GPU"], row["efficiency, 2 GPUs"]) == ("OOM", "", "")
    (row,) = by_column(tables.scaling([two]))
    assert (row["peak GiB, 1 GPU"], row["efficiency, 2 GPUs"]) == ("", "")
    assert tables.scaling([one]) == ""


def test_share_of_the_cores_is_no_setting_and_runs_without_one_have_a_star():
    def two(threads):
        omp = {"OMP_NUM_THREADS": threads} if threads else {}
        environment = {"cpu_count": 32, "local_ranks": 2, "omp": omp}
        return made_up(ALL, 4, world_size=2, **FAST, environment=environment)

    one = made_up(ALL, 4, **FAST)
    for run, efficiency in ((two("16"), "100%"), (two("32"), ""), (two(None), "100%*")):
        assert by_column(tables.scaling([one, run]))[0]["efficiency, 2 GPUs"] == efficiency


def test_cells_measured_twice_are_compared_by_their_number_of_tokens():
    runs = [("these", 8192, 0.0, 0.5), ("these", 16384, -0.25, 0.1), ("these", 65536, 0.0, -0.1)]
    found = pd.DataFrame(runs, columns=["settings", "tokens", "peak", "step"])
    assert rows(tables.repeats(found))[1] == ["these", "3", "25.00%", "-10% to +10%", "+50% to +50%"]


@pytest.mark.parametrize(("tokens", "budget"), [(1, 1), (37, 1), (300, 1), (37, 8), (300, 8)])
def test_chunks_are_those_of_liger(monkeypatch, tokens, budget):
    from liger_kernel.ops import fused_linear_cross_entropy as flce

    chunks = []

    class Kernel:
        def __getitem__(self, grid):
            chunks.append(grid[0])
            return lambda **_: None

    monkeypatch.setattr(flce, "liger_cross_entropy_kernel", Kernel())
    states, head = torch.randn(tokens, 4), torch.randn(57, 4)
    flce.fused_linear_cross_entropy_forward(states, head, torch.zeros(tokens, dtype=torch.long), chunk_mem_const=budget)
    shape = Shape("any")
    shape.__dict__["config"] = type("Config", (), {"vocab_size": 57, "hidden_size": 4})
    assert (chunks[0], len(chunks)) == (shape.chunk(tokens, budget), shape.chunks(tokens, budget))
