"""What is checked before a job of several ranks begins, and the record that is kept of one that was ended."""

import os
import socket
import subprocess
import time

import pytest
import torch

from src.offload import command, job, join, kept_record, ranks, variables
from src.offload_config import OffloadConfig
from src.record import load
from src.utils import UsageError
from tests.helpers import ROOT, assert_one_error_line
from tests.made_up import NONE, failed, made_up, out_of_memory


@pytest.mark.parametrize(
    ("before", "since", "kind", "kept"),
    [
        (None, None, "Killed", "error"),
        ("ok", None, "Killed", "ok"),  # a failure replaces no result
        ("error", None, "Killed", "error"),
        (None, "ok", "Killed", "ok"),
        (None, "oom", "Killed", "oom"),
        (None, "error", "Killed", "error"),  # a rank that lost the other blames the network
    ],
)
def test_record_says_what_happened_unless_the_run_had_its_result(tmp_path, before, since, kind, kept):
    path, started = tmp_path / "record.json", time.time() - 10
    make = {"ok": made_up, "error": failed, "oom": out_of_memory}
    for status, moment in ((before, started - 10), (since, started + 5)):
        if status:
            path.write_text(make[status](NONE, 1, config=OffloadConfig).model_dump_json(by_alias=True))
            os.utime(path, (moment, moment))
    notes, unchanged = job.Job(tmp_path), path.exists() and path.read_text()
    kept_record.keep(notes, kind, "rank 1", started)
    assert (path.exists() and path.read_text()) == unchanged  # no draft: there was no run yet
    notes.note(
        "draft",
        {"path": str(path), "record": made_up(NONE, 2, config=OffloadConfig, status=None).model_dump(by_alias=True)},
    )
    kept_record.keep(notes, kind, "rank 1", started)
    record = load(path)
    assert record.status == kept
    is_draft = kept == "error" and since is None  # and no record that was there
    assert record.run.batch_size == (2 if is_draft else 1)
    assert kept != "error" or (record.error.type, record.error.message) == (kind, "rank 1")


# Before a job begins


def test_a_job_takes_the_gpus_that_are_shown_to_it(monkeypatch):
    words = ["--log_level", "critical", "--num_gpus", "2", "--module", "src.offload.rank"]
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv(job.GPUS_VARIABLE, "of another job")

    def taken(words=words):
        command.take_shown_gpus(words)
        return os.environ.get(job.GPUS_VARIABLE)

    for shown, expected in {"3, 5,7": "3,5", "GPU-a,MIG-b": "GPU-a,MIG-b"}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert taken([*words, "--hostfile", "hosts"]) is None
        assert taken() == expected
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert taken() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UsageError, match="shows 1"):
        taken()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert taken() is None


def test_ports_of_two_jobs_differ_and_ranks_can_listen_there():
    with command.port_flags([]) as one, command.port_flags([]) as other:
        assert one[1] != other[1]
        store = torch.distributed.TCPStore("127.0.0.1", int(one[1]), 2, is_master=True, wait_for_workers=False)
        assert store.port == int(one[1])
        taken = ["--master_port", one[1]]
        with pytest.raises(UsageError, match=f"{one[1]} is in use"), command.port_flags(taken):
            pass
        for elsewhere in (["--hostfile", "h"], ["--hostfile", "h", "--no_ssh", "--node_rank", "1"]):
            with command.port_flags([*elsewhere, *taken]) as flags:
                assert flags == []


def test_deepspeed_that_is_not_on_the_path_is_run_as_a_module(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert command.launcher()[1:] == ["-m", "deepspeed.launcher.runner"]
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        command.launcher()


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "1", "RANK": "5"},
        {"LOCAL_SIZE": "0"},
        {"MASTER_PORT": "99999"},
        {"DS_ACCELERATOR": "garbage"},
    ],
    ids=str,
)
def test_environment_that_cannot_be_is_a_usage_error(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks.name() == ""
    with pytest.raises(UsageError, match=next(iter(reversed(variables)))):
        ranks.check_environment()


@pytest.mark.parametrize(("rank", "whom"), [(0, "rank 1 of 2"), (1, "rank 0 at 127.0.0.1")])
def test_lone_rank_says_whom_it_waits_for_and_ends(monkeypatch, capsys, rank, whom):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"waited 1 s in vain for {whom}"):
        join.meet(bound_s=1, silent_s=0)
    assert f"rank {rank}: waiting up to 1 s for {whom}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks_here", "told", "threads"), [("2", None, "3"), ("8", None, "1"), ("2", "5", "5"), ("1", None, None)]
)
def test_ranks_of_a_machine_share_its_cores_unless_told_otherwise(monkeypatch, ranks_here, told, threads):
    monkeypatch.setattr("src.machine.usable_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_SIZE", ranks_here)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", told or "")
    if told is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    ranks.share_cores()
    assert os.environ.get("OMP_NUM_THREADS") == threads


KNOWN = variables.known_variables((ROOT / "run_ds.sh").read_text())


@pytest.mark.parametrize(
    "name", ["BATCH_SIZE", "SEQ_LENGTH", "ENABLE_FOO", "NUM_GPU", "LR", "MAX_STEPS", "LEARNING_RAET"]
)
def test_variable_that_is_meant_for_the_script_is_found(name):
    assert variables.is_meant(name, KNOWN)


def test_variables_of_others_are_not_ours():
    others = "NODE_NAME NUM_CPUS DEBUG LOG_DIR OMP_NUM_THREADS WORLD_SIZE CUDA_VISIBLE_DEVICES SLURM_NTASKS HF_HOME"
    names = [name for name in [*others.split(), *os.environ] if name not in KNOWN]
    assert not [name for name in names if variables.is_meant(name, KNOWN)]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"BATCH_SIZE": "1"}, "no variable BATCH_SIZE (did you mean PER_DEVICE_TRAIN_BATCH_SIZE?)"),
        ({"ENABLE_FLCE": "0", "ENABLE_LIGER_FLCE": "1"}, "set one of them"),
        ({"HOSTFILE": "hosts"}, "'-oProxyCommand=id' is no name of a machine"),
        ({"MASTER_ADDR": "-x"}, "MASTER_ADDR must be"),
        ({"DS_ACCELERATOR": "garbage"}, "DS_ACCELERATOR must be"),
    ],
    ids=str,
)
def test_bad_variable_of_the_shell_script_is_one_line(tmp_path, settings, text):
    (tmp_path / "hosts").write_text("-oProxyCommand=id slots=1\n")
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        ["bash", ROOT / "run_ds.sh"], env=environment | settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_error_line(done.stderr, text)


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [("--help", 0, "--sub_group_size"), ("--seq_length many", 2, "invalid int value: 'many'")],
)
def test_shell_script_helps_and_refuses_before_anything_loads_torch(tmp_path, words, status, text):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('loaded')")
    (tmp_path / "torch" / "version.py").write_text("cuda = None")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", ROOT / "run_ds.sh", *words.split()], env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert text in (done.stderr if status else done.stdout)
    assert "loaded" not in done.stderr
