"""Several ranks: however a job ends, one line says why, nothing of it stays behind, and its record is kept.

Most jobs here are made of ranks without torch, and DeepSpeed's launchers are stood in for: they start in a moment.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from types import SimpleNamespace

import psutil
import pytest
import torch

from src.cli import command_line, run_config
from src.machine import core_share
from src.offload_config import OffloadConfig
from src.record import load
from src.utils import UsageError
from tests.helpers import ROOT, assert_one_error_line
from tests.made_up import NONE, failed

# A rank: it comes to where every rank has come, and does what a test says. `lost` is where it is hung up.
RANK = """
import os, signal, sys, time
from pathlib import Path
from src.offload import ranks
me = ranks.rank()
def lost(): time.sleep(600)
if me == 0:
    import json
    ranks.leave_draft(json.loads(Path("made_up.json").read_text()), Path("record.json"))
Path(f"{{me}}.new").write_text(str(os.getpid()))
Path(f"{{me}}.new").rename(f"pid{{me}}")
while not (Path("pid0").exists() and Path("pid1").exists()): time.sleep(0.02)
{code}
"""
# The supervisor, which is told to be less patient, and to take the launcher on PATH: mostly the stand-in's.
SUPERVISOR = """
import shutil, sys
from src.offload import launch
launch._STOPPED_S = 1
launch.launcher = lambda: [shutil.which("deepspeed")]
sys.exit(launch.main(sys.argv[1:]))
"""
FLAGS = ["--num_gpus", "2", "--no_local_rank", "--log_level", "critical", "--module", "src.offload.rank"]
LIMIT_S = 300  # for what takes seconds, on a machine that does much else


def wait_until(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class Started:
    """A job that was started, in `folder`."""

    def __init__(self, folder, words, environment):
        self.mark, self.folder = uuid.uuid4().hex, folder
        # In its own session, so that no shell's signals come to it; SIGINT is not ignored there.
        self.process = subprocess.Popen(
            words,
            env=environment | {"RANKS_TEST_JOB": self.mark},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def left(self):
        """Processes of this job that have not ended."""
        found = psutil.process_iter(["environ", "status"])
        mine = [process for process in found if (process.info["environ"] or {}).get("RANKS_TEST_JOB") == self.mark]
        return [process for process in mine if process.info["status"] != psutil.STATUS_ZOMBIE]

    def pid(self, who):
        """Of the supervisor, of a launcher or of a rank, once both ranks have begun."""
        paths = [self.folder / f"pid{rank}" for rank in range(2)]
        wait_until(lambda: all(path.exists() for path in paths) or self.process.poll() is not None)
        if who == "supervisor":
            return self.process.pid
        inner = psutil.Process(int(paths[0].read_text())).parent()
        return {"rank 1": int(paths[1].read_text()), "inner": inner.pid, "outer": inner.parent().pid}[who]

    def send(self, number, who):
        os.kill(self.pid(who), number)

    def ended(self):
        """Exit status and stderr; nothing of the job is left."""
        stderr = self.process.communicate(timeout=LIMIT_S)[1]
        wait_until(lambda: not self.left())
        return self.process.returncode, stderr

    def record(self):
        return load(path) if (path := self.folder / "record.json").exists() else None


@pytest.fixture
def begin(tmp_path):
    """Starts jobs, and ends what is left of them."""
    started = []

    def begin(words, **environment):
        started.append(Started(tmp_path, words, os.environ | {"PYTHONPATH": str(ROOT), **environment}))
        return started[-1]

    yield begin
    for one in started:
        for process in one.left():
            process.kill()
        one.process.communicate()


@pytest.fixture
def start(begin, tmp_path):
    """Starts a job of two ranks that do `code`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    launcher = programs / "deepspeed"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/stand_in_launcher.py" "$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "made_up.json").write_text(failed(NONE, 1, config=OffloadConfig).model_dump_json(by_alias=True))

    def start(code, path=f"{programs}{os.pathsep}{os.environ['PATH']}", before=()):
        (tmp_path / "rank.py").write_text(RANK.format(code=code))
        return begin([*before, sys.executable, "-c", SUPERVISOR, *FLAGS, "rank.py"], PATH=path)

    return start


# A rank ends


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL; the system may have had too little host memory"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "ended by SIGTERM"),
        ("os.abort()", "ended by SIGABRT; rank 0 was in"),
        ("os._exit(0)", "left in the middle of the run with exit status 0"),
        ("import atexit; atexit.register(os._exit, 9); sys.exit(0)", "with exit status 9"),
    ],
)
def test_rank_that_cannot_tell_is_told_of_and_kept_in_the_record(start, code, text):
    started = start(f"if me == 1: {code}\nlost()")
    status, stderr = started.ended()
    assert status == 1
    assert_one_error_line(stderr, text)
    assert stderr.startswith("error: rank 1: ")
    assert started.record().status == "error"
    assert text in started.record().error.message


@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        ("sys.exit(0)", 0, None),
        ("sys.exit(3 if me == 1 else lost())", 3, None),  # what it ends with it has told of itself
        ("raise ValueError('bad')", 1, ": ValueError: bad"),
        ("import no_such_library", 1, "No module named 'no_such_library'"),
    ],
)
def test_rank_that_comes_to_its_end_speaks_for_itself_and_once(start, code, status, line):
    started = start(code)
    ended, stderr = started.ended()
    assert ended == status
    assert stderr == "" if line is None else assert_one_error_line(stderr, line) is None
    assert started.record() is None


def test_ranks_see_the_gpus_that_were_shown_to_the_job_by_any_name(start, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5,7")
    status, stderr = start("Path(f'gpus{me}').write_text(os.environ['CUDA_VISIBLE_DEVICES'])").ended()
    assert (status, stderr) == (0, "")
    assert [(tmp_path / f"gpus{rank}").read_text() for rank in range(2)] == ["3,GPU-5"] * 2


def test_stopped_rank_is_not_waited_for(start):
    started = start("lost()")
    started.send(signal.SIGSTOP, "rank 1")
    status, stderr = started.ended()
    assert status == 1
    assert_one_error_line(stderr, "rank 1: stopped by a signal (SIGSTOP)")
    assert started.record().error.type == "TimedOut"


def test_rank_that_does_not_come_to_a_collective_is_told_of_with_where_it_is(start):
    started = start("ranks.give_way(waited='timed out') if me == 0 else lost()")
    status, stderr = started.ended()
    assert status == 1
    assert_one_error_line(stderr, "rank 1: did not come to where rank 0 waited for it; rank 1 was in")
    assert stderr.endswith("in lost\n")


# Launchers and the command end


@pytest.mark.parametrize(
    ("who", "number", "text"),
    [
        ("inner", signal.SIGKILL, "DeepSpeed's inner launcher was ended by a signal"),
        ("inner", signal.SIGHUP, "DeepSpeed's inner launcher was ended by a signal"),
        ("inner", signal.SIGTERM, "DeepSpeed's launcher was ended by a signal"),
        ("outer", signal.SIGKILL, "DeepSpeed's launcher was ended by SIGKILL"),
        ("outer", signal.SIGTERM, "DeepSpeed's launcher was ended by SIGTERM"),
        ("supervisor", signal.SIGINT, "interrupted"),
        ("supervisor", signal.SIGTERM, "ended by SIGTERM"),
        ("supervisor", signal.SIGHUP, "ended by SIGHUP"),
        ("supervisor", signal.SIGKILL, "the command that started this job was killed"),
    ],
)
def test_signal_to_launcher_or_command_ends_the_job_with_one_line(start, who, number, text):
    started = start("lost()")
    started.send(number, who)
    status, stderr = started.ended()
    killed = number == signal.SIGKILL
    assert status == (1 if who != "supervisor" else -number if killed else 128 + number)
    assert_one_error_line(stderr, text)
    assert text in started.record().error.message


def test_stopped_rank_does_not_outlive_a_killed_command(start):
    started = start("lost()")
    started.send(signal.SIGSTOP, "rank 1")
    started.send(signal.SIGKILL, "supervisor")
    started.ended()


def test_signal_that_nohup_ignores_stays_ignored(start, tmp_path):
    started = start("while not Path('go').exists(): time.sleep(0.05)", before=["nohup"])
    started.send(signal.SIGHUP, "supervisor")
    (tmp_path / "go").touch()
    assert started.ended()[0] == 0


# Without a supervisor here, as under pdsh


def test_rank_without_supervisor_ends_with_its_launcher_only(begin, tmp_path):
    (tmp_path / "rank.py").write_text("import os, time; open('pid', 'w').close(); time.sleep(600)")
    words = [sys.executable, ROOT / "tests" / "stand_in_launcher.py", "inner", *FLAGS, "rank.py", "--master_port", "1"]
    started = begin([str(word) for word in words])
    wait_until((tmp_path / "pid").exists)
    started.process.kill()
    status, stderr = started.ended()
    assert status == -signal.SIGKILL
    assert "its launcher is gone" in stderr


# The real launcher, the real script


def test_killed_rank_under_deepspeeds_launcher(start):
    started = start("lost()", path=os.environ["PATH"])
    started.send(signal.SIGKILL, "rank 1")
    status, stderr = started.ended()
    assert status == 1
    assert_one_error_line(stderr, "rank 1: ended by SIGKILL")


# A package that touches the accelerator when it is imported: CUDA, too, cannot be used in a fork of that process.
ACCELERATOR = """
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "transformers":
            os.register_at_fork(after_in_child=lambda: open(os.environ["FORKED"], "a").close())
            with open(os.environ["TOUCHED"], "a") as file: file.write(f"{os.getpid()}\\n")
sys.meta_path.insert(0, Finder)
"""


GRID = [sys.executable, "-m", "src.study", "batch_size=1", "seq_length=16", "strategy=none", "--iterations=1"]
GRID += ["--script=deepspeed", "--num_gpus=2", "--device=cpu"]


# A grid's own process imports everything, too, and asks a fork for the machine's facts; its ranks are no forks.
@pytest.mark.parametrize(("command", "importing"), [(["bash", f"{ROOT}/run_ds.sh"], 2), (GRID, 3)], ids=["run", "grid"])
def test_no_rank_of_the_real_script_works_in_a_fork_after_imports(begin, tmp_path, monkeypatch, command, importing):
    monkeypatch.delenv("OMP_NUM_THREADS")
    (tmp_path / "sitecustomize.py").write_text(ACCELERATOR)
    off = dict.fromkeys(["ENABLE_FLCE", "ENABLE_LIGER_ROPE", "ENABLE_LIGER_SWIGLU", "ENABLE_LIGER_RMS"], "0")
    small = {"NUM_GPUS": "2", "MAX_SEQ_LENGTH": "16", "PER_DEVICE_TRAIN_BATCH_SIZE": "1", "NUM_TRAIN_ITERATIONS": "1"}
    notes = {name: str(tmp_path / name.lower()) for name in ("FORKED", "TOUCHED")}
    flags = ["--warmup", "0", "--log_dir=", "--snapshot_dir=", "--result_dir", str(tmp_path / "results")]
    started = begin([*command, *flags], **off, **small, **notes, PYTHONPATH=f"{tmp_path}:{ROOT}")
    status, stderr = started.ended()
    assert status == 0, stderr
    (path,) = tmp_path.glob("results/*.json")
    record = load(path)
    assert record.config["world_size"] == record.environment.local_ranks == 2
    assert record.environment.omp == {"OMP_NUM_THREADS": str(core_share(2))}
    assert len(set((tmp_path / "touched").read_text().split())) >= importing
    assert command is GRID or not (tmp_path / "forked").exists()


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
    # gloo's errors are plain ones, raised in PyTorch's module.
    place = torch.distributed.distributed_c10d.__file__ if error is GLOO else __file__

    def main(config):
        exec(compile("raise error", place, "exec"), {"error": error})

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
    assert run_config(failing(error), SimpleNamespace(debug=False)) == status
    assert bool(times) == waits
    assert_one_error_line(capsys.readouterr().err, f"error: {line}")
    times = waited(0, 0, world_size=1)
    run_config(failing(error), SimpleNamespace(debug=False))
    assert not times
    assert "rank 0: " not in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--batch_size", "0"], ["--batch_size", "many"], ["--no_such_flag"]], ids=" ".join)
def test_one_rank_tells_of_bad_arguments(waited, words):
    for rank, local_rank, waits in ((0, 0, False), (1, 1, True), (2, 0, False)):
        times = waited(rank, local_rank)
        with pytest.raises(SystemExit) as stopped:
            command_line(None, OffloadConfig(device="cuda"), {}, words)
        assert stopped.value.code == 2
        assert bool(times) == waits
