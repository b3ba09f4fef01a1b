"""The scripts on a GPU: what the CPU tests cannot reach."""

import json
import pickle

import pytest

from src import records
from src.config import PRESETS
from src.explain.reading import read
from src.measure import PHASES
from src.utils import GIB
from tests.helpers import ROOT, SCRIPT, run_python

pytestmark = pytest.mark.gpu
OFFLOAD_SCRIPT = ROOT / "deepspeed_liger_kernel.py"
TINY = ["--device", "cuda", "--model_name", "tiny-llama", "--iterations", "5"]


def run_on_gpu(folder, environment, *arguments, script=SCRIPT):
    """Run a script in `folder`; the finished process and the run's record."""
    done = run_python(script, *TINY, *arguments, env=environment, cwd=folder)
    (path,) = folder.glob("results/*.json")
    return done, records.load(path)


@pytest.mark.parametrize("flag", ["0", "1"], ids=["hugging-face", "liger"])
def test_run_is_measured_and_leaves_record_snapshot_trace_and_logs(tmp_path, gpu_environment, flag):
    kernels = [x for name in ("rope", "swiglu", "rms", "flce") for x in (f"--enable_{name}", flag)]
    done, record = run_on_gpu(tmp_path, gpu_environment, "--batch_size", "2", "--seq_length", "128", *kernels)
    assert done.returncode == 0, done.stderr
    assert (record["status"], record["mode"], record["config"]["device"]) == ("ok", "measured", "cuda")
    ran = {name: record["implementations"][name].startswith("liger_kernel.") for name in ("rope", "flce", "swiglu")}
    assert set(ran.values()) == {flag == "1"}

    assert len(record["step_seconds"]) == 5
    assert min(record["step_seconds"]) <= record["latency_s"] <= max(record["step_seconds"])
    assert record["throughput_tokens_per_s"] == pytest.approx(2 * 128 / record["latency_s"])
    assert 0 < record["load_peak_bytes"] <= record["peak_memory_bytes"] <= record["peak_reserved_bytes"]
    assert record["peak_reserved_bytes"] <= record["device_used_bytes"] <= record["environment"]["gpu_memory_bytes"]
    assert set(record["phase_peak_bytes"]) == set(PHASES)
    assert record["peak_phase"] in (*PHASES, "load")
    assert max(record["phase_peak_bytes"].values()) == pytest.approx(record["peak_memory_bytes"], rel=0.05)
    assert 0 < record["grad_norm"] < 100
    assert 7 < record["losses"][0] < 9  # ln 4096 is 8.3
    assert all(record["environment"][key] for key in ("gpu", "driver", "cuda", "torch", "triton", "liger_kernel"))

    check_snapshot_and_logs(tmp_path, record)


def check_snapshot_and_logs(folder, record):
    snapshot = pickle.loads((folder / "snap_shots" / f"{record['run_name']}.pickle").read_bytes())
    assert snapshot["segments"]
    actions = {event["action"] for event in snapshot["device_traces"][0]}
    assert {"alloc", "free_completed"} <= actions
    assert any(event.get("frames") for event in snapshot["device_traces"][0])
    check_breakdown(folder / "snap_shots" / f"{record['run_name']}.pickle", record)

    log_folder = folder / "logs" / record["run_name"]
    events = json.loads((log_folder / "step.pt.trace.json").read_text())["traceEvents"]
    assert set(PHASES) <= {event["name"] for event in events}
    assert "kernel" in {event.get("cat") for event in events}
    assert list(log_folder.glob("events.out.tfevents.*"))


def check_breakdown(path, record):
    breakdown = record["peak_breakdown"]
    peak = sum(breakdown.values())
    assert peak == record["breakdown_peak_bytes"] == pytest.approx(record["peak_memory_bytes"], rel=0.02)
    assert breakdown["unattributed"] < 0.03 * peak
    assert 0 <= breakdown["allocator_rounding"] < 0.02 * peak + 2**21
    timeline = read(path)
    assert timeline.breakdown() == breakdown
    assert [phase for _, phase in timeline.phases] == list(PHASES)
    assert timeline.peak_phase == record["peak_phase"]


def test_offloaded_run_is_measured_and_both_presets_train_alike(tmp_path, gpu_environment):
    runs = {}
    for preset in PRESETS:
        folder = tmp_path / preset
        folder.mkdir()
        arguments = ["--preset", preset, "--batch_size", "2", "--seq_length", "128"]
        done, runs[preset] = run_on_gpu(folder, gpu_environment, *arguments, script=OFFLOAD_SCRIPT)
        assert done.returncode == 0, done.stderr
        check_snapshot_and_logs(folder, runs[preset])
        record = runs[preset]
        assert (record["status"], record["mode"], record["script"]) == ("ok", "measured", "deepspeed")
        assert 0 < record["floor_s"] < record["latency_s"]
        assert 0 < record["peak_memory_bytes"] <= record["peak_reserved_bytes"] <= record["device_used_bytes"]
        assert record["throughput_tokens_per_s"] == pytest.approx(2 * 128 / record["latency_s"])
    # fp16 and bf16 round differently, to 11 and 8 bits.
    assert runs["fast"]["losses"] == pytest.approx(runs["seed"]["losses"], rel=0.01)
    assert runs["fast"]["grad_norm"] == pytest.approx(runs["seed"]["grad_norm"], rel=0.05)


@pytest.mark.parametrize("script", [SCRIPT, OFFLOAD_SCRIPT], ids=["one GPU", "offload"])
def test_running_out_of_memory_gives_status_3_and_a_record(tmp_path, gpu_environment, script):
    # The logits alone are 64 * 2048 * 4096 numbers of 16 bits: 1 GiB.
    arguments = ["--batch_size", "64", "--seq_length", "2048", "--enable_flce", "0", "--memory_limit_gib", "0.5"]
    done, record = run_on_gpu(tmp_path, gpu_environment, *arguments, script=script)
    assert done.returncode == 3, done.stderr
    assert "Out of memory" in done.stdout
    assert "Traceback" not in done.stderr
    assert record["status"] == "oom"
    assert record["error"]["requested_bytes"] > record["error"]["free_bytes"] >= 0
    assert record["error"]["allocated_bytes"] + record["error"]["free_bytes"] <= 0.5 * GIB
    assert record["latency_s"] is record["throughput_tokens_per_s"] is record["mfu"] is None


def test_memory_limit_beyond_the_card_gives_status_2(tmp_path, gpu_environment):
    done = run_python(SCRIPT, *TINY, "--memory_limit_gib", "100000", env=gpu_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("results/*"))
