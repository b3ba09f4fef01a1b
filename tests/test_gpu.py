"""The script on a GPU: what the CPU tests cannot reach."""

import json
import pickle

import pytest

from src import records
from src.measure import PHASES
from src.utils import GIB
from tests.helpers import SCRIPT, run_python

pytestmark = pytest.mark.gpu
TINY = ["--device", "cuda", "--model_name", "tiny-llama", "--iterations", "5"]


def run_on_gpu(folder, environment, *arguments):
    """Run the script in `folder`; the finished process and the run's record."""
    done = run_python(SCRIPT, *TINY, *arguments, env=environment, cwd=folder)
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

    snapshot = pickle.loads((tmp_path / "snap_shots" / f"{record['run_name']}.pickle").read_bytes())
    assert snapshot["segments"]
    actions = {event["action"] for event in snapshot["device_traces"][0]}
    assert {"alloc", "free_completed"} <= actions
    assert any(event.get("frames") for event in snapshot["device_traces"][0])

    log_folder = tmp_path / "logs" / record["run_name"]
    events = json.loads((log_folder / "step.pt.trace.json").read_text())["traceEvents"]
    assert set(PHASES) <= {event["name"] for event in events}
    assert "kernel" in {event.get("cat") for event in events}
    assert list(log_folder.glob("events.out.tfevents.*"))


def test_running_out_of_memory_gives_status_3_and_a_record(tmp_path, gpu_environment):
    # The logits alone are 64 * 2048 * 4096 bf16 numbers: 1 GiB.
    arguments = ["--batch_size", "64", "--seq_length", "2048", "--enable_flce", "0", "--memory_limit_gib", "0.5"]
    done, record = run_on_gpu(tmp_path, gpu_environment, *arguments)
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
