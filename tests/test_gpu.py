"""The scripts on a GPU: what the CPU tests cannot reach."""

import json
import pickle

import pytest

from src.experiment import PHASES
from src.explain.reading import read
from src.machine import H100
from src.offload_config import PRESETS
from src.record import load
from src.utils import GIB
from tests.helpers import ROOT, SCRIPT, run_python

pytestmark = pytest.mark.gpu
OFFLOAD_SCRIPT = ROOT / "deepspeed_liger_kernel.py"
TINY = ["--device", "cuda", "--model_name", "tiny-llama", "--iterations", "5"]


def run_on_gpu(folder, environment, *arguments, script=SCRIPT):
    """Run a script in `folder`; the finished process and the run's record."""
    done = run_python(script, *TINY, *arguments, env=environment, cwd=folder)
    (path,) = folder.glob("results/*.json")
    return done, load(path)


@pytest.mark.parametrize("flag", ["0", "1"], ids=["hugging-face", "liger"])
def test_run_is_measured_and_leaves_record_snapshot_trace_and_logs(tmp_path, gpu_environment, flag):
    kernels = [x for name in ("rope", "swiglu", "rms", "flce") for x in (f"--enable_{name}", flag)]
    sizes = ["--batch_size", "2", "--seq_length", "128", "--gradient_accumulation_steps", "2"]
    done, record = run_on_gpu(tmp_path, gpu_environment, *sizes, *kernels)
    assert done.returncode == 0, done.stderr
    assert (record.status, record.mode, record.config["device"]) == ("ok", "measured", "cuda")
    ran = {name: record.implementations[name].startswith("liger_kernel.") for name in ("rope", "flce", "swiglu")}
    assert set(ran.values()) == {flag == "1"}

    assert len(record.step_seconds) == 5
    assert min(record.step_seconds) <= record.latency_s <= max(record.step_seconds)
    assert record.throughput_tokens_per_s == pytest.approx(2 * 2 * 128 / record.latency_s)
    assert 0 < record.load_peak_bytes <= record.peak_memory_bytes <= record.peak_reserved_bytes
    assert record.peak_reserved_bytes <= record.device_used_bytes <= record.environment.gpu_memory_bytes
    assert set(record.phase_peak_bytes) == set(PHASES)
    assert max(record.phase_peak_bytes.values()) == pytest.approx(record.peak_memory_bytes, rel=0.05)
    assert 0 < record.grad_norm < 100
    assert 7 < record.losses[0] < 9  # ln 4096 is 8.3
    assert all((record.environment.gpu, record.environment.driver, record.environment.triton))
    check_snapshot_and_logs(tmp_path, record, micro_batches=2)
    if record.environment.gpu == H100.name:
        (tmp_path / "dry").mkdir()
        _, predicted = run_on_gpu(tmp_path / "dry", gpu_environment, *sizes, *kernels, "--dry_run")
        assert predicted.phase_peak_bytes == pytest.approx(record.phase_peak_bytes, rel=0.01)


def check_snapshot_and_logs(folder, record, micro_batches=1):
    path = folder / "snap_shots" / f"{record.run_name}.pickle"
    snapshot = pickle.loads(path.read_bytes())
    assert any(event.get("frames") for event in snapshot["device_traces"][0])

    peak = sum(record.peak_breakdown.values())
    assert peak == record.breakdown_peak_bytes == pytest.approx(record.peak_memory_bytes, rel=0.02)
    assert record.peak_breakdown["unattributed"] < 0.03 * peak
    assert 0 <= record.peak_breakdown["allocator_rounding"] < 0.02 * peak + 2**21
    timeline = read(path)
    assert timeline.breakdown() == record.peak_breakdown
    assert [phase for _, phase in timeline.phases] == [*PHASES[:2] * micro_batches, PHASES[2]]
    assert timeline.peak_phase == record.peak_phase

    log_folder = folder / "logs" / record.run_name
    events = json.loads((log_folder / "step.pt.trace.json").read_text())["traceEvents"]
    assert set(PHASES) <= {event["name"] for event in events}
    assert "kernel" in {event.get("cat") for event in events}
    assert list(log_folder.glob("events.out.tfevents.*"))


def test_offloaded_run_is_measured_and_both_presets_train_alike(tmp_path, gpu_environment):
    runs = {}
    for preset in PRESETS:
        folder = tmp_path / preset
        folder.mkdir()
        arguments = ["--preset", preset, "--batch_size", "2", "--seq_length", "128"]
        done, record = run_on_gpu(folder, gpu_environment, *arguments, script=OFFLOAD_SCRIPT)
        assert done.returncode == 0, done.stderr
        check_snapshot_and_logs(folder, record)
        assert (record.status, record.mode, record.script) == ("ok", "measured", "deepspeed")
        assert 0 < record.floor_s < record.latency_s
        assert 0 < record.peak_memory_bytes <= record.peak_reserved_bytes <= record.device_used_bytes
        runs[preset] = record
    # fp16 and bf16 round differently, to 11 and 8 bits.
    assert runs["fast"].losses == pytest.approx(runs["original"].losses, rel=0.01)
    assert runs["fast"].grad_norm == pytest.approx(runs["original"].grad_norm, rel=0.05)


@pytest.mark.parametrize("script", [SCRIPT, OFFLOAD_SCRIPT], ids=["one GPU", "offload"])
def test_running_out_of_memory_gives_status_3_and_a_record(tmp_path, gpu_environment, script):
    # The logits alone are 64 * 2048 * 4096 numbers of 16 bits: 1 GiB.
    arguments = ["--batch_size", "64", "--seq_length", "2048", "--enable_flce", "0", "--memory_limit_gib", "0.5"]
    done, record = run_on_gpu(tmp_path, gpu_environment, *arguments, script=script)
    assert done.returncode == 3, done.stderr
    assert "Out of memory" in done.stdout
    assert record.status == "oom"
    assert record.error.requested_bytes > record.error.free_bytes >= 0
    assert record.error.allocated_bytes + record.error.free_bytes <= 0.5 * GIB
    assert record.latency_s is record.throughput_tokens_per_s is record.mfu is None
