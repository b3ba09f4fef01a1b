"""Several ranks: what each says when it ends, that nothing of it stays behind, and who speaks if all fail alike."""

import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from src import ranks, records, runtime, sweep
from src.cli import parse_config, run
from src.config import OffloadConfig
from src.utils import UsageError
from tests.helpers import ROOT, assert_one_error_line, run_python
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

# A rank without torch: it starts in a moment. This process is its launcher.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from src import ranks
ranks._NEXT_S = {next_s}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what runs in its background
with ranks.watched():
    Path("pid").write_text(str(os.getpid()))
    status = 0
    {code}
sys.exit(status)
"""
SLEEP = "time.sleep(600)"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}


@pytest.fixture
def start(tmp_path):
    """Starts a rank of four and returns its watcher and, where `code` does not end, the rank itself."""
    started = []

    def start(code, *, next_s=0.2, waits=False, before=()):
        program = PROGRAM.format(code=code, next_s=next_s)
        (tmp_path / "pid").unlink(missing_ok=True)
        settings = {"env": ENVIRONMENT, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        watcher = subprocess.Popen([*before, sys.executable, "-c", program], **settings, text=True)
        started.append(watcher)
        if not waits:
            return watcher
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        return watcher, int((tmp_path / "pid").read_text())

    yield start
    for watcher in started:
        watcher.kill()
        watcher.wait()
        for pipe in (watcher.stdout, watcher.stderr):
            pipe.close()  # not read to its end: a process that stayed behind may have it


def ended(watcher):
    """Exit status and stderr."""
    stderr = watcher.communicate()[1]
    return watcher.returncode, stderr


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL; the system may have had too little host memory"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "ended by SIGTERM"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("os.abort()", "ended by SIGABRT"),
        ("os._exit(7)", "left in the middle of the run with exit status 7"),
        ("os._exit(0)", "left in the middle of the run with exit status 0"),
        ("sys.exit(0)", "left in the middle of the run with exit status 0"),
    ],
)
def test_rank_that_cannot_tell_is_told_of(start, code, text):
    status, stderr = ended(start(code))
    assert status == 1
    assert_one_error_line(stderr, f"rank 3: {text}")


@pytest.mark.parametrize("status", [0, 1, 2, 3, 130])
def test_rank_that_came_to_its_end_is_passed_on_in_silence(start, status):
    assert ended(start(f"status = {status}")) == (status, "")


def test_rank_that_dies_while_it_exits_is_told_of(start):
    status, stderr = ended(start("import atexit; atexit.register(os.abort)"))
    assert status == 1
    assert_one_error_line(stderr, "rank 3: ended by SIGABRT")


def test_rank_that_its_launcher_ends_is_silent(start):
    watcher, rank = start(SLEEP, next_s=60, waits=True)
    os.kill(rank, signal.SIGTERM)  # in this order, as DeepSpeed's launcher does
    wait_until(lambda: not is_alive(rank))
    watcher.terminate()
    assert ended(watcher) == (1, "")
    watcher, rank = start(SLEEP, waits=True)
    watcher.terminate()
    assert ended(watcher) == (1, "")
    wait_until(lambda: not is_alive(rank))
    watcher, rank = start(SLEEP, next_s=0, waits=True)
    watcher.send_signal(signal.SIGSTOP)  # it hears of both at once
    os.kill(rank, signal.SIGTERM)
    wait_until(lambda: not is_alive(rank))
    watcher.terminate()
    watcher.send_signal(signal.SIGCONT)
    assert ended(watcher) == (1, "")


def test_watcher_ended_by_somebody_else_tells_and_takes_its_rank_along(start):
    watcher, rank = start(SLEEP, waits=True)
    subprocess.run(["kill", str(watcher.pid)], check=True)
    status, stderr = ended(watcher)
    assert status == 1
    assert_one_error_line(stderr, "rank 3: ended by SIGTERM")
    wait_until(lambda: not is_alive(rank))


def test_no_rank_outlives_its_watcher_or_its_launcher(start):
    watcher, rank = start(SLEEP, waits=True)
    watcher.kill()
    wait_until(lambda: not is_alive(rank))
    launcher, rank = start(SLEEP, waits=True, before=["sh", "-c", '"$@"; true', "sh"])
    (watcher,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    wait_until(lambda: not (is_alive(rank) or is_alive(watcher.pid)))
    assert_one_error_line(launcher.communicate()[1], "rank 3: its launcher is gone")


def test_what_a_rank_started_ends_with_it(start, tmp_path):
    code = "Path('child').write_text(str(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)); os._exit(1)"
    watcher = start(code)
    watcher.wait()  # its pipes are the child's too
    wait_until(lambda: not is_alive(int((tmp_path / "child").read_text())))


def test_interruption_is_the_ranks_own_to_tell(start):
    code = f"""
    try: {SLEEP}
    except KeyboardInterrupt: status = 130"""
    watcher, rank = start(code, waits=True)
    for process in (watcher.pid, rank):
        os.kill(process, signal.SIGINT)
    assert ended(watcher) == (130, "")


def test_only_process_is_not_watched(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.watched():
        inside = os.getpid()
    assert inside == os.getpid()


def test_looking_for_a_gpu_leaves_the_process_able_to_fork(monkeypatch):
    """PyTorch's other way asks CUDA, which then fails in a fork."""
    name, asked = "PYTORCH_NVML_BASED_CUDA_CHECK", []
    monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(os.environ.get(name)) or True)
    assert runtime.resolve_device("auto") == "cuda"
    assert asked == ["1"]
    assert name not in os.environ


# Who speaks


@pytest.fixture
def waited(monkeypatch):
    """Makes this process a rank; returns the times it waited for others."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def be(rank, local_rank, world_size=8):
        waited.clear()
        names = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        return waited

    return be


def failing(error):
    def main(config):
        raise error

    return main


GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
NCCL = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0")


@pytest.mark.parametrize(
    ("error", "rank", "local_rank", "waits", "status", "line"),
    [
        (UsageError("take another"), 0, 0, False, 2, "take another"),
        (UsageError("take another"), 4, 0, False, 2, "take another"),
        (UsageError("take another"), 5, 1, True, 2, "take another"),
        (ValueError("bad"), 0, 0, False, 1, "rank 0: ValueError: bad"),
        (ValueError("bad"), 5, 1, False, 1, "rank 5: ValueError: bad"),
        (SystemExit(0), 1, 1, False, 1, "rank 1: SystemExit: 0"),
        (GLOO, 0, 0, True, 1, f"rank 0: RuntimeError: {GLOO}"),
        (NCCL, 5, 1, True, 1, f"rank 5: DistBackendError: {NCCL}"),
    ],
)
def test_rank_gives_way_to_those_that_tell_the_same_or_the_cause(
    waited, capsys, error, rank, local_rank, waits, status, line
):
    times = waited(rank, local_rank)
    assert run(failing(error), SimpleNamespace(debug=False)) == status
    assert bool(times) == waits
    assert_one_error_line(capsys.readouterr().err, f"error: {line}")
    times = waited(0, 0, world_size=1)
    run(failing(error), SimpleNamespace(debug=False))
    assert not times
    assert "rank 0: " not in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--batch_size", "0"], ["--batch_size", "many"], ["--no_such_flag"]], ids=" ".join)
def test_one_rank_tells_of_bad_arguments(waited, words):
    for rank, local_rank, waits in ((0, 0, False), (1, 1, True), (2, 0, False)):
        times = waited(rank, local_rank)
        with pytest.raises(SystemExit) as stopped:
            parse_config(None, OffloadConfig(device="cuda"), cpu_defaults={}, words=words)
        assert stopped.value.code == 2
        assert bool(times) == waits


# Sweeps of cells that are several processes


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
