"""Several ranks: what each says when it ends, that nothing of it stays behind, and who speaks if all fail alike."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from src import ranks
from src.cli import parse_config, run
from src.config import OffloadConfig, UsageError
from tests.helpers import ROOT, assert_one_error_line
from tests.test_sweep import is_alive, wait_until

# A rank without torch: it starts in a moment. This process is its launcher.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from src import ranks
ranks._GRACE_S = {grace}
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

    def start(code, *, grace=0.2, waits=False, before=()):
        program = PROGRAM.format(code=code, grace=grace)
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
        watcher.communicate()


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
    watcher, rank = start(SLEEP, grace=60, waits=True)
    os.kill(rank, signal.SIGTERM)  # in this order, as DeepSpeed's launcher does
    wait_until(lambda: not is_alive(rank))
    watcher.terminate()
    assert ended(watcher) == (1, "")
    watcher, rank = start(SLEEP, waits=True)
    watcher.terminate()
    assert ended(watcher) == (1, "")
    wait_until(lambda: not is_alive(rank))


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
