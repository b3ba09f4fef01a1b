"""Sweeps of cells that are several processes."""

import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from src import records, runtime, sweep
from src.config import OffloadConfig
from tests.helpers import assert_one_error_line, run_python
from tests.test_sweep import (
    FakeScript,
    Program,
    be_killed,
    finish,
    hang,
    is_alive,
    leave_at_once,
    run_out_of_memory,
    wait_until,
)


def test_looking_for_a_gpu_leaves_the_process_able_to_fork(monkeypatch):
    """PyTorch's other way asks CUDA, which then fails in a fork."""
    name, asked = "PYTORCH_NVML_BASED_CUDA_CHECK", []
    monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(os.environ.get(name)) or True)
    assert runtime.resolve_device("auto") == "cuda"
    assert asked == ["1"]
    assert name not in os.environ


@pytest.fixture
def sweep_of(monkeypatch, tmp_path):
    """Runs a sweep on three GPUs, over a script whose ranks do what `behave(rank, config)` says."""
    fake = FakeScript(tmp_path)

    def sweep_of(behave, *arguments):
        def main(config):
            fake._note(fake.started, f"{os.environ['RANK']} {os.getpid()}")
            rank = int(os.environ["RANK"])
            places = [int(os.environ[name]) for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
            assert places == [rank, 3, 3]
            assert config.world_size == 3
            return behave(rank, config)

        module = SimpleNamespace(
            DEFAULTS=OffloadConfig(result_dir=str(fake.results)), CPU_DEFAULTS=fake.CPU_DEFAULTS, main=main
        )
        monkeypatch.setitem(sys.modules, "fake_script", module)
        monkeypatch.setitem(sweep.SCRIPTS, "deepspeed", "fake_script")
        flags = ["--script=deepspeed", "--num_gpus=3", "--device=cuda"]
        status, _, stderr = Program(tmp_path, ["strategy=all", *arguments, *flags]).wait()
        started = [line.split() for line in fake.ran()]
        wait_until(lambda: not any(is_alive(int(pid)) for _, pid in started))
        return status, stderr, sorted(int(rank) for rank, _ in started), fake

    monkeypatch.setattr(runtime, "environment", lambda device: {"gpu": "NVIDIA Imaginary 1000"})
    return sweep_of


def first_saves(rank, config):
    return finish(config) if rank == 0 else 0


def test_sweep_starts_every_rank_and_does_not_run_again_what_has_a_record(sweep_of):
    status, stderr, ran, fake = sweep_of(first_saves, "batch_size=1,2")
    assert (status, stderr, ran) == (0, "", [0, 0, 1, 1, 2, 2])
    assert {record["config"]["world_size"] for record in fake.records().values()} == {3}
    assert all(path.stem.endswith("_gpus3") for path in fake.results.glob("*.json"))
    assert not list(fake.results.glob("*.log"))
    assert sweep_of(first_saves, "batch_size=1,2")[2] == ran


def second_ends(end):
    """The second rank ends so; the others wait for it in vain."""
    return lambda rank, config: end(config) if rank == 1 else hang(config)


def killed_and_recorded_as_another_failure(rank, config):
    if rank == 0:
        finish(config, status="error", error={"type": "RuntimeError", "message": "Connection closed by peer"})
    if rank == 1:
        wait_until(config.record_file.exists)
        be_killed(config)
    return hang(config)


@pytest.mark.parametrize(
    ("behave", "kind", "message"),
    [
        (second_ends(be_killed), "Killed", "rank 1: ended by SIGKILL; the system may have had too little host memory"),
        (second_ends(leave_at_once), "Failed", "rank 1: exit status 7: it printed nothing"),
        (second_ends(hang), "TimedOut", "it took too long and was ended"),
        (killed_and_recorded_as_another_failure, "Killed", "rank 1: ended by SIGKILL"),
    ],
)
def test_rank_that_fails_ends_its_cell_and_the_sweep_goes_on(sweep_of, behave, kind, message):
    def main(rank, config):
        return behave(rank, config) if config.batch_size == 1 else first_saves(rank, config)

    status, stderr, _, fake = sweep_of(main, "batch_size=1,2", "--timeout_s=3")
    assert status == 1
    assert_one_error_line(stderr, "1 cells failed")
    failed, ok = (fake.by_batch()[size] for size in (1, 2))
    assert (failed["status"], failed["error"]["type"], ok["status"]) == ("error", kind, "ok")
    assert failed["error"]["message"].startswith(message)


def test_rank_out_of_memory_is_a_result(sweep_of):
    status, _, ran, fake = sweep_of(second_ends(run_out_of_memory), "batch_size=1,2")
    assert status == 0
    assert 1 in ran
    assert len(ran) <= 3  # one cell; others may be ended before they begin
    assert [(record["status"], record["mode"]) for _, record in sorted(fake.by_batch().items())] == [
        ("oom", "measured"),
        ("oom", "inferred"),
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num_gpus=0"], "--num_gpus must be"),
        (["--num_gpus=2"], "--num_gpus must be"),
        (["--num_gpus=2", "--script=deepspeed"], "--num_gpus 2, but 1 here"),
    ],
)
def test_number_of_gpus_that_cannot_be_is_one_line(monkeypatch, capsys, flags, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "batch_size=1", *flags])
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    assert sweep.main() == 2
    assert_one_error_line(capsys.readouterr().err, text)


def test_sweep_on_two_processes_of_the_real_script(tmp_path):
    grid = ["batch_size=1", "seq_length=16", "strategy=none", "--script=deepspeed", "--num_gpus=2"]
    flags = ["--preset=fast", "--device=cpu", "--iterations=2", "--warmup=0", f"--result_dir={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_python("-m", "src.sweep", *grid, *flags, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = records.load_all([tmp_path])
    assert (record["status"], record["mode"], record["config"]["world_size"]) == ("ok", "interpreted", 2)
    assert record["losses"][0] == pytest.approx(math.log(4096), rel=0.02)
