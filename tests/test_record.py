"""Records: typed, whole or absent, written whichever way a run ends; files that are none are told in one line."""

import dataclasses
import errno
import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src.experiment import OutOfMemory
from src.explain.plot import figure
from src.explain.reading import read_all
from src.measure import Measurement, PhasePeaks
from src.offload_config import PRESETS, OffloadConfig
from src.record import SCHEMA, Failure, Frontier, KernelCheck, load, load_all, record
from src.record.record import HEADLINES
from src.record.recorder import Alone, Recorder, new_record
from src.record.report import files_written, last_comparable, report, summary
from src.record.tensorboard import write_tensorboard
from src.utils import GIB, MIB, UsageError, write_atomically
from tests.helpers import ROOT, tiny_config

H100 = "NVIDIA H100 80GB HBM3"
COMMITTED = sorted(ROOT.glob("doc/data/h100_single_gpu/*.json"))[0]
COMMITTED_SNAPSHOT = sorted(ROOT.glob("doc/data/snapshots/bs8_seq1024_rope*.pickle.gz"))[0]
PHASES = PhasePeaks({"forward": 1, "backward": 3, "optimizer": 2}, 1.5)


@pytest.fixture
def config(tmp_path):
    folders = {name: str(tmp_path / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
    return tiny_config(batch_size=2, seq_length=16, iterations=2, **folders)


def measurement_of(seconds=(0.25, 0.75), losses=(3.0, 2.5), peaks=(2 * MIB, 3 * MIB), reserved=(4 * MIB, 4 * MIB)):
    return Measurement(list(seconds), list(losses), list(peaks), list(reserved), 9 * MIB, 0)


def recorder_of(config, mode="measured", gpu=H100, team=None):
    recorder = Recorder(config, mode, torch.device("cpu"), team)
    recorder.record.environment.gpu = gpu
    recorder.record.model_flops_per_step = 10**12
    return recorder


def measured(config, **fields):
    recorder = recorder_of(config)
    recorder.add_measurement(measurement_of(**fields))
    recorder.add_phases(PHASES)
    recorder.record.status = "ok"
    return recorder.record


def test_record_survives_the_file_and_its_text_stands_beside_it(config):
    one = measured(config)
    record.save(one, config.record_file, summary)
    assert load(config.record_file) == one
    assert load_all([config.record_file.parent]) == [one]
    assert one.run == config
    assert config.record_file.with_suffix(".txt").read_text() == summary(one) + "\n"
    assert json.loads(config.record_file.read_text())["schema"] == SCHEMA
    config.record_file.with_name(".half.json").write_text("{")  # being written
    assert len(load_all([config.record_file.parent])) == 1


def test_figures_follow_from_the_steps(config):
    one = measured(config, seconds=[0.5, 0.25, 1.0])
    assert one.step_seconds == [0.5, 0.25, 1.0]
    assert (one.latency_s, one.latency_iqr_s) == (0.5, 0.375)
    assert one.throughput_tokens_per_s == 2 * 16 / 0.5
    assert one.mfu == pytest.approx(10**12 / 0.5 / 66.9e12)  # fp32
    assert (one.peak_memory_bytes, one.peak_reserved_bytes, one.device_used_bytes) == (3 * MIB, 4 * MIB, 9 * MIB)
    assert (one.loss, one.grad_norm, one.peak_phase) == (2.5, 1.5, "backward")
    assert one.phase_peak_bytes == PHASES.peak_bytes
    assert measured(config, seconds=[0.5]).latency_iqr_s is None


def test_what_was_not_measured_is_null(config):
    interpreted = recorder_of(config, "interpreted", gpu=None)
    interpreted.add_measurement(measurement_of(peaks=[None, None], reserved=[None, None]))
    interpreted.add_phases(PhasePeaks(dict.fromkeys(PHASES.peak_bytes), None))
    unknown = recorder_of(config, gpu="NVIDIA Imaginary 1000")
    unknown.add_measurement(measurement_of())
    times = ("step_seconds", "latency_s", "latency_iqr_s", "throughput_tokens_per_s", "mfu", "mfu_peak_flops")
    for key in (*times, "peak_memory_bytes", "peak_reserved_bytes", "peak_phase", "grad_norm"):
        assert getattr(interpreted.record, key) is None, key
    assert unknown.record.mfu is unknown.record.mfu_peak_flops is None
    assert unknown.record.throughput_tokens_per_s == 64
    known = {"schema_version", "run_name", "script", "mode", "config", "environment"}
    empty = new_record(config, "measured", {"gpu": None})
    assert {key for key, value in empty if value is not None} == known


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_infinity_become_null_in_strict_json(config, value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record.save(
        measured(config, losses=[1.0, value]).model_copy(update={"grad_norm": value}), config.record_file, summary
    )
    stored = json.loads(config.record_file.read_text(), parse_constant=refuse)
    assert (stored["losses"], stored["loss"], stored["grad_norm"]) == ([1.0, None], None, None)
    assert "not finite" in summary(load(config.record_file))


def test_record_of_the_first_schema_is_read_and_its_preset_has_its_new_name(tmp_path):
    values = json.loads(COMMITTED.read_text())
    assert values["schema"] == 1
    one = load(COMMITTED)
    assert (one.schema_version, one.latency_s, one.run_name) == (SCHEMA, values["latency_s"], values["run_name"])
    old = values | {"script": "deepspeed", "config": OffloadConfig(flce=False).to_dict() | {"preset": "seed"}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load(tmp_path / "old.json").run == OffloadConfig(flce=False, preset="original")


def nested(depth):
    return functools.reduce(lambda inner, _: [inner], range(depth), 0)


def told(path):
    """What is said of a file that is no record: one line that begins with its name."""
    with pytest.raises(UsageError) as error:
        load(path)
    (line,) = str(error.value).splitlines()
    prefix = f"{path} is not a record: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "Expecting value"),
        (b"\x80\x04\x95", "codec can't decode"),
        (b"[]", "it is no JSON object"),
        (b"null", "it is no JSON object"),
        (b"{}", "its schema is 'None', this version reads 1 to 2"),
        (b'{"schema": 99}', "its schema is '99', this version reads 1 to 2"),
        (b'{"schema": 2}', "run_name: Field required"),
        (b"[" * 100_000, "recursion"),
        (COMMITTED.read_bytes()[:-9], ""),
    ],
    ids=["empty", "pickle", "list", "null", "nothing", "newer", "only-schema", "deep", "cut"],
)
def test_file_that_is_no_record_is_told_in_one_line(tmp_path, content, text):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    assert text in told(path)
    with pytest.raises(UsageError, match="is no folder"):
        load_all([path])
    assert told(tmp_path / "missing.json")
    assert told(tmp_path)


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
    """A file with a record in which one field has another value: `mutated(values)` is its path."""
    path = tmp_path_factory.mktemp("mutated") / "record.json"

    def write(values):
        path.write_text(json.dumps(values))
        return path

    return write


WRONG = {
    "latency_s": ["1", [1.0], {}, True, nested(1000)],
    "peak_memory_bytes": ["1", 1.5, [], True],
    "step_seconds": [0.5, ["0.5"], [None], {}],
    "status": ["fine", 1, []],
    "mode": [None, "guessed"],
    "script": [None, "other", 1],
    "run_name": [None, 1],
    "config": [None, [], "x", 1],
    "environment": [None, [], {"gpu": 1}, {}],
    "peak_breakdown": [[], {"parameters": "1"}, {"parameters": None}],
    "error": ["full", {"type": "x"}, []],
    "frontier": [{"searched": "batch_size"}],
    "invented": [1, None],
}


@given(data=st.data())
def test_field_of_a_wrong_shape_is_told_by_its_name(mutated, data):
    name = data.draw(st.sampled_from(sorted(WRONG)))
    values = json.loads(COMMITTED.read_text()) | {name: data.draw(st.sampled_from(WRONG[name]))}
    assert told(mutated(values)).startswith(name)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"batch_size": 0}, "--batch_size must be from 1"),
        ({"batch_size": "8"}, "--batch_size must be int, got '8'"),
        ({"rope": None}, "must be bool"),
        ({"dtype": nested(900)}, "--dtype must be str"),
    ],
    ids=["zero", "text", "null", "deep"],
)
def test_configuration_that_cannot_be_is_told(mutated, fields, text):
    values = json.loads(COMMITTED.read_text())
    assert text in told(mutated(values | {"config": values["config"] | fields}))
    assert told(mutated(values | {"status": None})) == "it does not say what became of the run"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_value_in_any_field_gives_a_record_or_one_line(mutated, data):
    values = json.loads(COMMITTED.read_text())
    place = data.draw(st.sampled_from([values, values["config"], values["environment"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    path = mutated(values)
    try:
        one = load(path)
    except UsageError:
        told(path)
    else:
        assert summary(one) is not None


def test_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")

    def write(temporary, error=None):
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # or the move into place would not be atomic
        if error:
            raise error

    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_atomically(path, functools.partial(write, error=error))
        assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write_atomically(path, write)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


class SimulatedOutOfMemory(OutOfMemory):
    facts = {"requested_bytes": 3, "free_bytes": 2, "allocated_bytes": 1}  # noqa: RUF012


class Other(Alone):
    """A rank that keeps nothing."""

    keeps = False


def ended(config, error, team=None):
    """The recorder whose block ended with `error`; the error that went on; what was stored."""
    recorder = recorder_of(config, team=team)
    went_on = None
    try:
        with recorder:
            if error is not None:
                raise error
    except BaseException as caught:
        went_on = caught
    return recorder, went_on, load(config.record_file) if config.record_file.exists() else None


@pytest.mark.parametrize("team", [Alone(), Other()], ids=["first", "other-rank"])
@pytest.mark.parametrize(
    ("error", "status", "failure", "exit_status"),
    [
        (None, "ok", None, 0),
        (torch.OutOfMemoryError("CUDA out\nof"), "oom", {"type": "OutOfMemoryError", "message": "CUDA out"}, 3),
        (
            SimulatedOutOfMemory("full"),
            "oom",
            {"type": "SimulatedOutOfMemory", "message": "full", **SimulatedOutOfMemory.facts},
            3,
        ),
        (RuntimeError("first\nsecond"), "error", {"type": "RuntimeError", "message": "first"}, None),
        (ZeroDivisionError(), "error", {"type": "ZeroDivisionError", "message": "ZeroDivisionError"}, None),
    ],
    ids=["ok", "oom", "simulated-oom", "error", "wordless-error"],
)
def test_run_is_recorded_whichever_way_it_ends(config, team, error, status, failure, exit_status):
    recorder, went_on, stored = ended(config, error, team)
    assert went_on is (error if status == "error" else None)
    assert recorder.record.status == status
    if status == "ok" and not team.keeps:
        assert stored is None  # the first rank writes it
    else:
        assert (stored.status, stored.error) == (status, Failure(**failure) if failure else None)
    if exit_status is not None:
        assert recorder.finish() == exit_status


@pytest.mark.parametrize("error", [UsageError("no"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_run_that_was_not_carried_out_is_not_recorded(config, error):
    assert ended(config, error)[1:] == (error, None)


def test_failure_replaces_no_result_and_a_result_replaces_a_failure(config, capsys):
    _, _, failed = ended(config, RuntimeError("before"))
    _, _, fine = ended(config, None)
    assert (failed.status, fine.status) == ("error", "ok")
    _, went_on, stored = ended(config, ValueError("later"))
    assert (type(went_on), stored) == (ValueError, fine)
    assert "keeps the result of an earlier run; this one failed" in capsys.readouterr().err
    config.record_file.write_text("{")  # no result
    assert ended(config, ValueError("again"))[2].error.message == "again"


@pytest.mark.parametrize(("age_s", "kept"), [(-1, "the cause"), (3600, "Connection closed by peer")])
def test_first_ranks_failure_is_kept_if_it_is_of_this_run(config, age_s, kept):
    cause = new_record(
        config, "measured", {"gpu": None}, status="error", error=Failure(type="ValueError", message="the cause")
    )

    def fail():
        record.save(cause, config.record_file, summary)
        written = config.record_file.stat().st_mtime - age_s
        os.utime(config.record_file, (written, written))
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError), recorder_of(config):
        fail()
    assert load(config.record_file).error.message == kept


@pytest.mark.parametrize("name", ["result_dir", "snapshot_dir", "log_dir"])
def test_folder_that_cannot_be_written_is_a_usage_error_before_the_block(tmp_path, config, name):
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, **{name: str(tmp_path / "file" / "below")})
    with pytest.raises(UsageError, match=f"--{name}: cannot write to"), recorder_of(config):
        pytest.fail("the block ran")
    with recorder_of(config, team=Other()):  # needs no folders until it fails
        pass


def test_full_disk_costs_the_file_and_not_the_figures(config, monkeypatch, capsys):
    def full(self, text, **how):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder = recorder_of(config)
    recorder.add_measurement(measurement_of())
    recorder.add_phases(PHASES)
    with pytest.raises(OSError, match="No space left"), recorder:
        monkeypatch.setattr(Path, "write_text", full)
    assert summary(recorder.record) in capsys.readouterr().out
    assert "MFU" in summary(recorder.record)
    assert not list(Path(config.result_dir).iterdir())


def rows(one):
    """The printed figures: name -> the rest of its line."""
    return {name: " ".join(rest.split()) for name, rest in (x.split("  ", 1) for x in summary(one).splitlines())}


def test_report_has_the_figures_of_a_measured_run_and_names_its_files(config):
    one = measured(config, seconds=[0.5, 0.5])
    one.host_peak_bytes = 7 * MIB
    assert rows(one) == {
        "Peak memory allocated": "3.0 MiB in the backward phase",
        "Peak memory reserved": "4.0 MiB by PyTorch's allocator",
        "Memory used on the card": "9.0 MiB driver's view, all programs",
        "Latency": "500.00 ms median of 2 steps, IQR 0.00 ms",
        "Throughput": "64 tokens/s",
        "MFU": "3.0% of 67 TFLOP/s (data sheet, dense)",
        "Host memory peak": "7.0 MiB",
        "Loss": "2.5000 last timed step",
        "Gradient norm": "1.5000 one more step",
    }
    assert rows(one.model_copy(update={"grad_norm": math.nan}))["Gradient norm"] == "not finite one more step"
    assert "Gradient norm" not in rows(one.model_copy(update={"grad_norm": None}))
    assert rows(one.model_copy(update={"floor_s": 0.4}))["Floor"] == "400.00 ms the step takes 1.25 times as long"
    text = report(one)
    assert text.splitlines()[:2] == [
        f"Measured on {H100}: tiny-llama, batch 2 x 16 tokens, fp32",
        "Liger kernels: none; gradient checkpointing on",
    ]
    assert text.endswith(summary(one))
    prediction = one.model_copy(update={"mode": "predicted", "simulated_gpu": "Card"})
    assert report(prediction).startswith("Predicted for Card, not measured: tiny-llama")
    building = rows(one.model_copy(update={"load_peak_bytes": 4 * MIB}))["Peak while building"]
    assert building == "4.0 MiB more than in any step"
    record.save(one, config.record_file, report)
    assert files_written(config).splitlines() == [
        f"record   {config.record_file}",
        f"compare  python -m src.study compare OTHER.json {config.record_file}",
    ]


def test_last_run_that_differs_in_techniques_alone_is_named_to_compare_with(config):
    def keep(age_s, mode="measured", gpu=H100, status="ok", **settings):
        own = dataclasses.replace(config, **settings)
        one = new_record(own, mode, {"gpu": gpu}, status=status)
        record.save(one, own.record_file, summary)
        os.utime(own.record_file, (1e9 - age_s, 1e9 - age_s))
        return own.record_file

    keep(9)
    older, last = keep(8, rope=True), keep(7, flce=True)
    others = [{"seq_length": 17}, {"iterations": 3}, {"dry_run": True, "mode": "predicted", "rope": True}]
    others += [{"swiglu": True, "gpu": "NVIDIA X"}, {"rms_norm": True, "status": "oom"}]
    others += [{"flce": True, "dtype": "bf16"}, {"flce": True, "memory_limit_gib": 9.0}]
    for age_s, own in enumerate(others):
        keep(age_s, **own)
    config.record_file.with_name(config.record_file.name.replace("flceFalse", "x")).write_text("{")
    line = files_written(config).splitlines()[-1]
    assert line == f"compare  python -m src.study compare {last} {config.record_file}"
    last.unlink()
    assert last_comparable(config.record_file) == older


def test_text_has_what_was_searched_and_what_was_checked(config):
    search = new_record(
        dataclasses.replace(config, find_max="batch_size", dry_run=True), "predicted", {"gpu": None}, status="ok",
        simulated_gpu="Card", peak_memory_bytes=MIB,
        frontier=Frontier(searched="batch_size", limit_bytes=5 * MIB, predicted=7, measured=6),
    )  # fmt: skip
    lines = report(search).splitlines()
    assert lines[0] == "Predicted for Card, not measured: tiny-llama, batch 7 x 16 tokens, fp32"
    assert "Largest batch_size that fits 5.0 MiB of allocator memory: 7, measured on this GPU: 6" in lines
    check = {"implementations": {}, "losses": [8.0], "loss_difference": 0.0, "peak_memory_bytes": MIB}
    rows = [
        KernelCheck(kernels=k, gradient_difference=g, agrees=not g, **check) for k, g in zip(([], ["flce"]), (0.0, 0.5))
    ]
    text = report(new_record(config, "interpreted", {"gpu": None}, status="ok", kernel_check=rows))
    assert text.startswith("Checked on a CPU, the kernels in Triton's interpreter: tiny-llama")
    assert text.splitlines()[-1].split() == ["flce", "8.000000", "0.0e+00", "5.0e-01", "1.0", "MiB", "DIFFERS"]


def test_file_has_a_null_only_where_a_reader_would_miss_the_figure(config):
    record.save(new_record(config, "measured", {"gpu": None}, status="ok"), config.record_file, summary)
    stored = json.loads(config.record_file.read_text())
    assert {name for name, value in stored.items() if value is None} == set(HEADLINES)
    assert load(config.record_file).floor_s is None


def test_figures_of_several_gpus_are_of_all_or_of_the_fullest():
    config = OffloadConfig(batch_size=3, seq_length=32, gradient_accumulation_steps=2, world_size=2)
    one = measured(config, seconds=[0.5])
    assert (one.script, one.processes) == ("deepspeed", 2)
    assert one.throughput_tokens_per_s == 3 * 32 * 2 * 2 / 0.5
    assert one.mfu_peak_flops == 989.4e12 * 2  # fp16
    assert one.mfu == pytest.approx(10**12 / 0.5 / 989.4e12 / 2)
    assert rows(one)["Peak memory allocated"].endswith("phase, fullest GPU")
    assert config.description in report(one)


def tensorboard(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.parametrize("counted", [True, False])
def test_tensorboard_gets_the_figures_that_there_are(config, counted):
    peaks = {} if counted else {"peaks": [None, None], "reserved": [None, None]}
    recorder = recorder_of(config, "measured" if counted else "interpreted")
    recorder.record.implementations = {}
    measurement = measurement_of([0.5, 0.25], **peaks)
    recorder.add_measurement(measurement)
    for _ in range(2):  # the second replaces the first
        write_tensorboard(config.log_folder, recorder.record, measurement)
    events = tensorboard(config.log_folder)
    series = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {"step/loss": [3.0, 2.5], "summary/loss": [2.5]}
    if counted:
        expected |= {
            "step/peak_allocated_GiB": [2 / 1024, 3 / 1024],
            "step/peak_reserved_GiB": [4 / 1024, 4 / 1024],
            "step/seconds": [0.5, 0.25],
            "step/tokens_per_s": [2 * 16 / 0.5, 2 * 16 / 0.25],
            "summary/peak_GiB": [3 / 1024],
            "summary/reserved_GiB": [4 / 1024],
            "summary/step_s": [0.375],
            "summary/tokens_per_s": [pytest.approx(2 * 16 / 0.375)],
            "summary/mfu": [pytest.approx(10**12 / 0.375 / 66.9e12)],
        }
    assert series == expected
    hparams = {tag: events.summary_metadata[tag].plugin_data.content for tag in events.PluginTagToContent("hparams")}
    assert set(hparams) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert b"No Liger Kernel" in hparams["_hparams_/session_start_info"]
    assert b"summary/peak_GiB" in hparams["_hparams_/experiment"]


def row_of_hparams(folder, config, gpu=H100):
    """The columns of a run on TensorBoard's HPARAMS page."""
    own = dataclasses.replace(config, log_dir=str(folder / config.run_name))
    recorder = recorder_of(own, gpu=gpu)
    recorder.record.implementations = {}
    recorder.add_measurement(measurement_of())
    write_tensorboard(own.log_folder, recorder.record, recorder.measurement)
    content = tensorboard(own.log_folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = HParamsPluginData.FromString(content).session_start_info
    return {name: value.string_value for name, value in started.hparams.items()}


def test_hparams_tell_runs_apart_by_what_differs(tmp_path):
    usual = OffloadConfig(iterations=2, model_name="meta-llama/Llama-3.2-1B-Instruct")
    changes = [{"preset": "fast", **PRESETS["fast"]}, {"optimizer": "overlapped_cpu_adam", "dtype": "bf16"}]
    changes += [{"memory_limit_gib": 24.0}, {"world_size": 2}, {"flce": False}, {"gradient_checkpointing": False}]
    runs = [usual, *(dataclasses.replace(usual, **own) for own in changes)]
    rows = [row_of_hparams(tmp_path, run) for run in runs]
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)
    assert (rows[0]["model"], rows[1]["preset"], rows[3]["limit_GiB"]) == ("Llama-3.2-1B fp16", "fast", "24")
    assert (rows[4]["GPUs"], rows[5]["Kernels"]) == (f"2 x {H100}", "Liger Kernel w/o FLCE")
    assert rows[6]["others"] == "iterations 2, gradient_checkpointing False"


def test_memory_of_all_runs_on_a_card_is_drawn_on_one_scale():
    (found,) = read_all(COMMITTED_SNAPSHOT)
    drawn = figure({"x": found}, 80 * GIB)
    assert {axes.get_ylim() for axes in drawn.axes} == {(0, 80)}
