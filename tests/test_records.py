"""Records: whole or absent, strict JSON, and written whichever way a run ends."""

import contextlib
import dataclasses
import io
import json
import math
import os
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import recording, records
from src.config import OffloadConfig
from src.explain.timeline import timeline
from src.measure import Measurement, PhasePeaks
from src.profiler import write_tensorboard
from src.utils import MIB, UsageError, write_atomically
from tests.helpers import tiny_config


@pytest.fixture
def config(tmp_path):
    folders = {name: str(tmp_path / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
    return tiny_config(batch_size=2, seq_length=16, **folders)


def new_record(config, **fields):
    return recording.new_record("measured", config, torch.device("cpu")) | fields


def measured_record(config, losses=(3.0, 2.5), seconds=(0.25, 0.75)):
    record = new_record(config, status="ok", model_flops_per_step=10**12)
    record["environment"]["gpu"] = "NVIDIA H100 80GB HBM3"
    peaks = {"peak_allocated_bytes": [2 * MIB, 3 * MIB, MIB], "peak_reserved_bytes": [4 * MIB, 4 * MIB, 4 * MIB]}
    recording.add_measurement(record, Measurement(list(seconds), list(losses), **peaks, device_used_bytes=9 * MIB))
    recording.add_phases(record, PhasePeaks({"forward": 1, "backward": 3, "optimizer": 2}, 1.5))
    return record


def test_new_record_has_every_field_and_measured_nothing(config):
    record = new_record(config)
    known = {"schema", "run_name", "script", "mode", "config", "environment"}
    assert list(record) == list(records.EMPTY)
    assert {key for key, value in record.items() if value is not None} == known
    assert record["config"] == config.to_dict()


def test_record_survives_the_file(config):
    record = measured_record(config)
    records.save(record, config.record_file)
    assert records.load(config.record_file) == record


def test_figures_follow_from_the_steps(config):
    record = measured_record(config, seconds=[0.5, 0.25, 1.0])
    assert record["step_seconds"] == [0.5, 0.25, 1.0]
    assert (record["latency_s"], record["latency_iqr_s"]) == (0.5, 0.375)
    assert record["throughput_tokens_per_s"] == 2 * 16 / 0.5
    assert record["mfu"] == pytest.approx(10**12 / 0.5 / 66.9e12)  # fp32
    assert (record["peak_memory_bytes"], record["peak_reserved_bytes"]) == (3 * MIB, 4 * MIB)
    assert record["device_used_bytes"] == 9 * MIB
    assert (record["loss"], record["grad_norm"], record["peak_phase"]) == (2.5, 1.5, "backward")


def test_unknown_gpu_gets_no_mfu(config):
    record = new_record(config, model_flops_per_step=10**12)
    record["environment"]["gpu"] = "NVIDIA Imaginary 1000"
    recording.add_measurement(record, Measurement([0.5], [1.0], [1], [1], 1))
    assert record["mfu"] is record["mfu_peak_flops"] is None
    assert record["throughput_tokens_per_s"] == 64


@pytest.mark.parametrize("mode", ["interpreted", "predicted"])
def test_times_that_are_not_a_gpus_are_left_out(config, mode):
    record = new_record(config, mode=mode)
    recording.add_measurement(record, Measurement([0.5], [1.0], [1], [None], None))
    for key in ("step_seconds", "latency_s", "latency_iqr_s", "throughput_tokens_per_s", "mfu", "mfu_peak_flops"):
        assert record[key] is None, key


def test_loading_can_be_the_peak_of_a_run(config):
    record = measured_record(config) | {"load_peak_bytes": 3 * MIB + 1}
    recording.add_phases(record, PhasePeaks({"forward": 1, "backward": 3, "optimizer": 2}, 1.5))
    assert record["peak_phase"] == "load"


def test_peak_that_nothing_counted_stays_null(config):
    record = new_record(config, mode="interpreted")
    recording.add_measurement(record, Measurement([0.5], [1.0], [None], [None], None))
    recording.add_phases(record, PhasePeaks(dict.fromkeys(("forward", "backward", "optimizer")), None))
    for key in ("peak_memory_bytes", "peak_reserved_bytes", "device_used_bytes", "peak_phase", "grad_norm"):
        assert record[key] is None, key
    records.save(record, config.record_file)
    assert records.load(config.record_file) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_infinity_become_null_in_strict_json(config, value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    records.save(measured_record(config, losses=[1.0, value]) | {"grad_norm": value}, config.record_file)
    stored = json.loads(config.record_file.read_text(), parse_constant=refuse)
    assert (stored["losses"], stored["loss"], stored["grad_norm"]) == ([1.0, None], None, None)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema": 1', b"[]", b"null", b"{}", b'{"schema": 99}', b'{"benchmark": {}}', b"\x80\x04\x95"],
    ids=str,
)
def test_file_that_is_no_record_is_a_usage_error(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"record\.json"):
        records.load(path)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_record_that_cannot_be_opened_is_a_usage_error(tmp_path, name):
    with pytest.raises(UsageError):
        records.load(tmp_path / name)


def test_every_shorter_part_of_a_record_is_refused(config):
    records.save(measured_record(config), config.record_file)
    text = config.record_file.read_text().rstrip()
    for length in range(0, len(text), 97):
        config.record_file.write_text(text[:length])
        with pytest.raises(UsageError):
            records.load(config.record_file)


def test_record_of_an_older_version_loads_with_its_missing_fields_null(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 1, "run_name": "old"}')
    assert records.load(path) == records.EMPTY | {"run_name": "old"}


def test_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # or the move into place would not be atomic
        temporary.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_has_the_permissions_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "atomic", lambda temporary: temporary.write_text(""))
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_block_that_ends_well_is_recorded_as_ok(config):
    record = measured_record(config) | {"status": None}
    with recording.recording(record, config):
        pass
    assert records.load(config.record_file)["status"] == "ok"
    assert records.exit_status(record) == 0


def test_running_out_of_memory_is_recorded_and_ends_only_the_block(config):
    record = new_record(config)
    with recording.recording(record, config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
    stored = records.load(config.record_file)
    assert stored["status"] == "oom"
    assert stored["error"]["type"] == "OutOfMemoryError"
    assert stored["error"]["message"] == "CUDA out of memory. Tried to allocate 2 GiB."
    assert records.exit_status(stored) == 3


@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), ZeroDivisionError()], ids=repr)
def test_another_exception_is_recorded_and_goes_on(config, error):
    with pytest.raises(type(error)), recording.recording(new_record(config), config):
        raise error
    stored = records.load(config.record_file)
    assert stored["status"] == "error"
    assert stored["error"]["type"] == type(error).__name__
    assert stored["error"]["message"] in ("first", "ZeroDivisionError")


@pytest.mark.parametrize("error", [UsageError("no"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_was_never_carried_out_is_not_recorded(config, error):
    with pytest.raises(type(error)), recording.recording(new_record(config), config):
        raise error
    assert not config.record_file.exists()


def test_rank_that_keeps_nothing_writes_nothing_when_all_is_well(config, tmp_path):
    record = new_record(config)
    with recording.recording(record, config, keeps=False):
        pass
    assert record["status"] == "ok"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "goes_on"),
    [(torch.OutOfMemoryError("CUDA out of memory."), "oom", False), (RuntimeError("no"), "error", True)],
    ids=["oom", "error"],
)
def test_any_rank_tells_of_a_failure(config, error, status, goes_on):
    expected = pytest.raises(type(error)) if goes_on else contextlib.nullcontext()
    with expected, recording.recording(new_record(config), config, keeps=False):
        raise error
    assert records.load(config.record_file)["status"] == status


@pytest.mark.parametrize(("age_s", "kept"), [(0, "ValueError"), (3600, "RuntimeError")])
def test_rank_that_fails_for_want_of_another_keeps_what_that_one_recorded(config, age_s, kept):
    told = new_record(config) | {"status": "error", "error": {"type": "ValueError", "message": "the cause"}}

    def fail():
        records.save(told, config.record_file)
        written = time.time() - age_s  # an hour ago: of an earlier run
        os.utime(config.record_file, (written, written))
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError), recording.recording(new_record(config), config):
        fail()
    assert records.load(config.record_file)["error"]["type"] == kept


def test_rank_that_keeps_nothing_needs_no_folders_until_it_fails(tmp_path, config):
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, result_dir=str(tmp_path / "file" / "below"))
    with recording.recording(new_record(config), config, keeps=False):
        pass
    with pytest.raises(UsageError, match="--result_dir"), recording.recording(new_record(config), config):
        pytest.fail("the block ran")


@pytest.mark.parametrize("name", ["result_dir", "snapshot_dir", "log_dir"])
def test_folder_that_cannot_be_written_is_a_usage_error_before_the_block(tmp_path, config, name):
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, **{name: str(tmp_path / "file" / "below")})
    with pytest.raises(UsageError, match=f"--{name}"), recording.recording(new_record(config), config):
        pytest.fail("the block ran")


def test_summary_of_a_measured_run_has_its_three_figures(config):
    summary = records.summary(measured_record(config, seconds=[0.5, 0.5]))
    for figure in ("3.0 MiB", "500.00 ms", "64 tokens/s", "IQR 0.00 ms", "backward phase", "67 TFLOP/s"):
        assert figure in summary
    assert all(line == line.rstrip() for line in summary.splitlines())


def rows(record):
    """The printed figures: name -> the rest of its line."""
    lines = records.summary(record).splitlines()
    return {name: " ".join(rest.split()) for name, rest in (line.split("  ", 1) for line in lines)}


def test_summary_has_the_floor_of_a_run_that_has_one(config):
    record = measured_record(config, seconds=[0.5, 0.5])
    assert "Floor" not in rows(record)
    assert rows(record | {"floor_s": 0.4})["Floor"] == "400.00 ms the step takes 1.25 times as long"


def test_summary_of_a_run_without_peaks_has_the_other_figures(config):
    record = new_record(config, mode="interpreted", status="ok")
    recording.add_measurement(record, Measurement([0.5], [3.0, 2.5], [None], [None], None))
    recording.add_phases(record, PhasePeaks({"forward": None}, 1.5))
    assert set(rows(record)) == {"Host memory peak", "Loss", "Gradient norm"}
    assert rows(record)["Loss"].startswith("2.5000")
    assert rows(record)["Gradient norm"].startswith("1.5000")


@pytest.mark.parametrize("world_size", [1, 2])
def test_figures_of_several_gpus_are_of_all_or_of_the_fullest(world_size):
    config = OffloadConfig(batch_size=3, seq_length=32, gradient_accumulation_steps=2, world_size=world_size)
    record = measured_record(config, seconds=[0.5])
    assert record["script"] == "deepspeed"
    assert record["throughput_tokens_per_s"] == 3 * 32 * 2 * world_size / 0.5
    assert record["mfu_peak_flops"] == 989.4e12 * world_size  # fp16
    assert record["mfu"] == pytest.approx(10**12 / 0.5 / 989.4e12 / world_size)
    assert ("fullest GPU" in rows(record)["Peak memory allocated"]) == (world_size > 1)
    assert config.description in records.report(record, config)


@pytest.mark.parametrize(
    "config",
    [tiny_config(batch_size=2, iterations=2), OffloadConfig(batch_size=2, seq_length=16, iterations=2)],
    ids=["RunConfig", "OffloadConfig"],
)
@pytest.mark.parametrize("counted", [True, False])
def test_tensorboard_gets_the_figures_that_there_are(tmp_path, config, counted):
    record = new_record(config, mode="measured" if counted else "interpreted")
    peaks = ([MIB, 3 * MIB], [4 * MIB, 4 * MIB]) if counted else ([None, None], [None, None])
    measurement = Measurement([0.5, 0.25], [3.0, 2.5], *peaks, None)
    record |= {"implementations": {}, "model_flops_per_step": 1}
    recording.add_measurement(record, measurement)
    write_tensorboard(tmp_path, record, measurement)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    series = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {"step/loss": [3.0, 2.5], "summary/loss": [2.5]}
    if counted:
        expected |= {
            "step/peak_allocated_MiB": [1, 3],
            "step/peak_reserved_MiB": [4, 4],
            "step/seconds": [0.5, 0.25],
            "step/tokens_per_s": [2 * 16 / 0.5, 2 * 16 / 0.25],
            "summary/peak_GiB": [3 / 1024],
            "summary/reserved_GiB": [4 / 1024],
            "summary/step_s": [0.375],
            "summary/tokens_per_s": [pytest.approx(2 * 16 / 0.375)],
        }
    assert series == expected


def test_tensorboard_gets_the_timeline_and_what_the_peak_is_made_of(tmp_path, config):
    record = measured_record(config)
    event = {"action": "alloc", "addr": 512, "size": 3 * MIB, "time_us": 1, "user_metadata": "model.layers.0.mlp|"}
    found = timeline({"segments": [], "device_traces": [[event, event | {"action": "free_requested"}]]})
    recording.add_breakdown(record, found)
    record["implementations"] = {}
    write_tensorboard(tmp_path, record, Measurement([0.5], [3.0], [MIB], [MIB], None), found)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["memory/timeline"]
    (image,) = events.Images("memory/timeline")
    with Image.open(io.BytesIO(image.encoded_image_string)) as drawing:
        assert (drawing.width, drawing.height) == (image.width, image.height)
        assert drawing.width > 800
        assert len(drawing.convert("RGB").getcolors(2**24)) > 10
    assert "peak_breakdown/text_summary" in events.Tags()["tensors"]
    (text,) = events.Tensors("peak_breakdown/text_summary")
    (table,) = text.tensor_proto.string_val
    assert b"| mlp | " in table
    assert b"3.0 MiB" in table
    assert b"attention" not in table


def test_summary_of_running_out_of_memory_says_what_was_asked_for_and_free(config):
    error = {"type": "OutOfMemoryError", "message": "", "requested_bytes": 3 * MIB, "free_bytes": MIB}
    summary = records.summary(new_record(config, status="oom", error=error | {"allocated_bytes": None}))
    assert [line.split()[-2:] for line in summary.splitlines()[1:3]] == [["3.0", "MiB"], ["1.0", "MiB"]]
    assert "n/a" in summary


def test_summary_of_an_error_is_its_message(config):
    record = new_record(config, status="error", error={"type": "RuntimeError", "message": "what went wrong"})
    assert "what went wrong" in records.summary(record)


def test_summary_can_be_made_of_a_loaded_record_whose_loss_was_nan(config):
    records.save(measured_record(config, losses=[1.0, math.nan]), config.record_file)
    assert "Loss" in records.summary(records.load(config.record_file))


def test_text_beside_the_record_is_its_summary(config):
    record = measured_record(config)
    records.save(record, config.record_file)
    text = config.record_file.parent / f"{config.run_name}.txt"
    assert text.read_text() == records.summary(record) + "\n"


def test_report_has_the_figures_and_names_the_files_that_were_written(config):
    record = measured_record(config)
    records.save(record, config.record_file)
    assert records.summary(record) in records.report(record, config)
    written = records.files_written(config)
    assert str(config.record_file) in written
    assert str(config.snapshot_file) not in written


def test_disk_that_is_full_costs_the_file_and_not_the_figures(config, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_atomically", full)
    record = measured_record(config)
    with pytest.raises(OSError, match="No space left"), recording.recording(record, config):
        pass
    assert records.summary(record) in capsys.readouterr().out
