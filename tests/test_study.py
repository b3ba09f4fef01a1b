"""Studies: which runs a grid has, what becomes of each, and that nothing is lost or run twice. Runs are forked from
this process and take a moment: a script of the tests' own stands for the real one.
"""

import dataclasses
import errno
import faulthandler
import itertools
import json
import os
import select
import signal
import sys
import types
from collections import Counter

import pytest
import torch

import all_gpu_liger_kernel
import deepspeed_liger_kernel
from src import machine
from src.config import RunConfig
from src.experiment import Script
from src.record import Failure, GradientError, Parity, load_all, save
from src.record import record as record_module
from src.record.recorder import new_record
from src.study import __main__ as study
from src.study import grids, workers
from src.study.grids import grid_axes, tasks
from src.techniques import KERNEL_NAMES, TITLES
from src.utils import ExitStatus, UsageError, write_atomically
from tests.helpers import assert_one_error_line, write_llama_folder

GPU = "NVIDIA Imaginary 1000"
SCRIPTS = {"all_gpu": all_gpu_liger_kernel.SCRIPT, "deepspeed": deepspeed_liger_kernel.SCRIPT}


def runs(*words, script="all_gpu", flags=("--device=cuda",), **options):
    return [task.config for task in tasks(grid_axes(words), SCRIPTS[script], list(flags), **options).found]


BATCH = {(size, 1024) for size in (1, 4, 8, 16, 32, 64, 96, 112)}
SEQUENCE = {(4, length) for length in (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576)}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("grid", "sizes"), [("batch", BATCH), ("sequence", SEQUENCE), ("study", BATCH | SEQUENCE)])
def test_grids_are_the_originals_strategy_by_strategy_and_the_smallest_first(script, grid, sizes):
    found = [(run.title, run.batch_size, run.seq_length) for run in runs(grid, script=script)]
    assert Counter(found) == Counter((title, *size) for title in TITLES.values() for size in sizes)
    assert [title for title, _ in itertools.groupby(title for title, *_ in found)] == list(TITLES.values())
    for title in TITLES.values():
        tokens = [batch * length for name, batch, length in found if name == title]
        assert tokens == sorted(tokens)


def test_axes_are_multiplied_over_any_setting_and_equal_runs_are_one():
    found = runs("strategy=all,none", "batch_size=8,1,8", "gradient_checkpointing=0,1", "dtype=bf16,fp32")
    settings = [(run.title, run.batch_size, run.gradient_checkpointing, run.dtype) for run in found]
    kernels = ("All Liger Kernel", "No Liger Kernel")
    assert Counter(settings) == Counter(itertools.product(kernels, (1, 8), (False, True), ("bf16", "fp32")))
    assert settings[0][0] == "All Liger Kernel"  # the order of the command line
    words = {"none": (), "no_flce": ("rope", "swiglu", "rms_norm"), "all": KERNEL_NAMES, "flce+rope": ("rope", "flce")}
    assert [run.kernels for run in runs(f"strategy={','.join(words)}")] == list(words.values())
    # Runs that can share an engine stand together.
    shared = [(title, checkpointing, dtype) for title, _, checkpointing, dtype in settings]
    assert len(list(itertools.groupby(shared))) == 8
    (several,) = runs("strategy=all", script="deepspeed", flags=["--device=cuda", "--preset=fast"], num_gpus=4)
    assert (several.world_size, several.preset, several.optimizer) == (4, "fast", "overlapped_cpu_adam")


def test_label_says_what_tells_a_cell_apart():
    words, flags = ["batch_size=2", "learning_rate=1e-3,1e-4", "strategy=none"], ["--device=cuda"]
    labels = [task.label for task in grids.tasks(grids.grid_axes(words), grids.script("all_gpu"), flags).found]
    assert labels == ["No Liger Kernel, 2 x 1024, learning_rate 1e-3", "No Liger Kernel, 2 x 1024, learning_rate 1e-4"]


def test_grid_that_cannot_be_is_a_usage_error():
    wrong = {"everything": "'everything' is no grid", "seq_length=64 batch": "'batch' is no grid"}
    wrong |= {"batch seq_length=64": "the grid batch has values of seq_length of its own"}
    wrong |= {"peers study": "'study' is no grid"}
    wrong |= {"peers strategy=none": "the grid peers has values of strategy of its own"}
    wrong |= {"batch_size=1,,2": "is no grid", "seed=1 seed=2": "seed is given twice", "strategy=x": "unknown kernel"}
    for words, text in wrong.items():
        with pytest.raises(UsageError, match=text):
            runs(*words.split())


def finish(config, status="ok", **fields):
    """What a script does at its end: save the record of `config`."""
    mode = "predicted" if config.dry_run else "measured"
    peak = 2**20 * config.tokens_per_step if status == "ok" else None
    record = new_record(config, mode, {"gpu": GPU}, **{"status": status, "peak_memory_bytes": peak, **fields})
    save(record, config.record_file, str)
    return {"ok": ExitStatus.DONE, "oom": ExitStatus.OUT_OF_MEMORY, "error": ExitStatus.FAILED}[status]


def run_out_of_memory(config):
    full = Failure(type="OutOfMemoryError", message="full", requested_bytes=3, free_bytes=2, allocated_bytes=1)
    return finish(config, status="oom", error=full)


class FakeScript:
    """Stands for all_gpu_liger_kernel.py: `behave(config)` is its main. Keeps a journal of what ran."""

    def __init__(self, folder, run_study):
        self.results, self.journal, self.behave, self._run_study = folder / "results", folder / "ran", finish, run_study
        self.defaults = RunConfig(result_dir=str(self.results))
        self.script = Script(
            name="fake_script", defaults=self.defaults, cpu_defaults={}, build_experiment=None, main=self.main
        )

    def main(self, config):
        with self.journal.open("a") as file:
            print(json.dumps([config.run_name, os.getpid(), sys.argv]), file=file)
        return self.behave(config)

    def ran(self):
        """Name, process and arguments of the runs that began since this was last asked."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        self.journal.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def __call__(self, *arguments):
        """Exit status, stdout and stderr of a study."""
        return self._run_study(*arguments, "--device=cuda")

    def found(self):
        """(batch size, length) -> status and mode, of one strategy."""
        return {(r.run.batch_size, r.run.seq_length): (r.status, r.mode) for r in load_all([self.results])}

    def contents(self):
        return {path: path.read_bytes() for path in self.results.iterdir()}


@pytest.fixture
def run_study(monkeypatch, capfd):
    def run_study(*arguments):
        with monkeypatch.context() as patch, open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err:
            patch.setattr(sys, "argv", ["study", *arguments])
            patch.setattr(sys, "stdout", out)  # on the file descriptors that a run's output goes to
            patch.setattr(sys, "stderr", err)
            status = study.main()
        return status, *capfd.readouterr()

    return run_study


@pytest.fixture
def script(monkeypatch, tmp_path, run_study):
    fake = FakeScript(tmp_path, run_study)
    module = types.ModuleType("fake_script")
    module.SCRIPT = fake.script
    monkeypatch.setitem(sys.modules, "fake_script", module)
    monkeypatch.setitem(grids.SCRIPTS, "all_gpu", "fake_script")
    monkeypatch.setattr(machine, "environment", lambda on_gpu: {"gpu": GPU if on_gpu else None})
    monkeypatch.chdir(tmp_path)
    return fake


def test_every_run_leaves_its_record_and_what_has_one_is_not_run_again(script):
    grid = ("batch_size=1,4", "seq_length=64,128", "strategy=none,all")
    status, stdout, stderr = script(*grid)
    assert (status, stderr) == (0, "")
    ran = [name for name, *_ in script.ran()]
    assert len(ran) == len(set(ran)) == 8
    assert {path.stem for path in script.results.glob("*.json")} == set(ran)
    assert not list(script.results.glob("*.log"))
    assert "No Liger Kernel, 1 x 64: peak 0.06 GiB" in stdout
    before = script.contents()
    status, stdout, stderr = script(*grid)
    assert (status, stderr, script.ran()) == (0, "", [])
    assert "8 of 8 cells have a record already" in stdout
    assert script.contents() == before
    assert script("batch_size=1,4", "seq_length=64,256", "strategy=all")[0] == 0  # a grid that overlaps
    assert len(script.ran()) == 2


def test_parity_is_measured_once_of_runs_that_compute_alike(script):
    same = GradientError(loss=0.0, gradient=0.1, worst=0.1, worst_parameter="norm")
    told = {"tokens": 64, "dtype": "bf16", "loss_scale": None, "reference_loss": 1.0, "ratio": 1.0, "agrees": True}
    parity = Parity(**told, run=same, hugging_face=same)
    script.behave = lambda config: finish(config, parity=parity if config.parity else None)
    assert script("batch_size=1,2", "seq_length=64", "strategy=all", "checkpoint_every=1,2,4", "--parity")[0] == 0
    assert script("batch_size=1", "seq_length=64", "strategy=none", "--parity")[0] == 0
    compared = [record.run for record in load_all([script.results]) if record.parity is not None]
    assert sorted((run.title, run.batch_size) for run in compared) == [
        *(("All Liger Kernel", size) for size in (1, 2)),
        ("No Liger Kernel", 1),
    ]


# What becomes of a run: what it does, type of the error recorded, what the message says


def kill_itself(number):
    def act(config):
        faulthandler.disable()  # pytest's, which prints where
        os.kill(os.getpid(), number)

    return act


def raise_error(error):
    def act(config):
        raise error

    return act


def write_garbage(config):
    config.record_file.write_bytes(b'{"schema": 1, "status": "o')
    return ExitStatus.DONE


def hang(config):
    while True:
        signal.pause()


OWN_ERROR = Failure(type="ValueError", message="its own words")
ENDINGS = {
    "segmentation fault": (kill_itself(signal.SIGSEGV), "Killed", "SIGSEGV"),
    "killed": (kill_itself(signal.SIGKILL), "Killed", "SIGKILL; the system may have had too little host memory"),
    "exception": (raise_error(RuntimeError("one\ntwo")), "Failed", "exit status 1: RuntimeError: one two"),
    "last words": (lambda config: sys.exit("the last words"), "Failed", "the last words"),
    "exit of the process": (lambda config: os._exit(7), "Failed", "exit status 7: it printed nothing"),
    "half a record": (write_garbage, "Failed", "exit status 0"),
    "error of its own": (lambda config: finish(config, "error", error=OWN_ERROR), "ValueError", "its own words"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_failed_run_is_recorded_as_what_it_was_and_the_study_goes_on(script, ending):
    act, kind, message = ENDINGS[ending]
    script.behave = lambda config: act(config) if config.batch_size == 1 else finish(config)
    status, stdout, stderr = script("batch_size=1,2", "strategy=all")
    assert status == 1
    assert_one_error_line(stderr, "1 cells failed")
    failed, finished = sorted(load_all([script.results]), key=lambda record: record.config["batch_size"])
    assert (failed.status, failed.mode, failed.error.type, finished.status) == ("error", "measured", kind, "ok")
    assert message in failed.error.message
    assert failed.environment.gpu == GPU
    assert f"failed: {failed.error.message}" in stdout
    script.behave = finish
    script.ran()
    assert script("batch_size=1,2", "strategy=all")[0] == 0  # failures are tried again
    assert [name for name, *_ in script.ran()] == [failed.run_name]


def test_run_starts_afresh_where_a_library_has_initialised_cuda(run_study, monkeypatch, tmp_path):
    def no_fork():
        raise AssertionError("CUDA cannot be used in a fork of this process")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(workers, "_fork", no_fork)
    small = ["batch_size=1", "seq_length=8", "strategy=none", "--iterations=1", "--warmup=0", "--device=cpu"]
    assert run_study(*small, f"--result_dir={tmp_path}")[0] == 0
    (record,) = load_all([tmp_path])
    assert (record.status, record.mode) == ("ok", "interpreted")


def test_run_that_hangs_is_ended_with_what_it_started(script):
    child = script.results.parent / "child"

    def hang_with_child(config):
        if pid := os.fork():
            child.write_text(str(pid))
        hang(config)

    script.behave = hang_with_child
    assert script("batch_size=1", "strategy=all", "--timeout_s=2")[0] == 1
    (record,) = load_all([script.results])
    assert (record.status, record.error.type) == ("error", "TimedOut")
    # A busy machine may not have come that far.
    children = [int(child.read_text())] if child.exists() else []
    assert all(map(has_ended, [*children, *(pid for _, pid, _ in script.ran())]))


def has_ended(pid):
    """Whether a process ends, or has ended: what is killed does so in its own time."""
    try:
        return bool(select.select([os.pidfd_open(pid)], [], [], 60)[0])
    except ProcessLookupError:
        return True


def test_runs_beyond_one_that_ran_out_of_memory_are_inferred(script):
    script.behave = lambda config: (run_out_of_memory if config.tokens_per_step > 1500 else finish)(config)
    grid = ("batch_size=1,2,4", "seq_length=512,1024,2048", "strategy=all")
    assert script(*grid)[0] == 0
    # 1 x 2048 and 2 x 1024 are neither within nor beyond one another; 4 x 512 is beyond neither.
    fits, full = {(1, 512), (2, 512), (1, 1024)}, {(1, 2048), (2, 1024), (4, 512)}
    beyond = {(2, 2048), (4, 1024), (4, 2048)}
    wanted = dict.fromkeys(fits, ("ok", "measured")) | dict.fromkeys(full, ("oom", "measured"))
    assert script.found() == wanted | dict.fromkeys(beyond, ("oom", "inferred"))
    assert len(script.ran()) == 6
    every = load_all([script.results])
    full = {record.run_name: record.run for record in every if (record.status, record.mode) == ("oom", "measured")}
    for record in (record for record in every if record.mode == "inferred"):
        (proof,) = (run for name, run in full.items() if f" {name} " in record.error.message)
        assert (proof.batch_size <= record.run.batch_size, proof.seq_length <= record.run.seq_length) == (True, True)
        assert (record.error.type, record.environment.gpu, record.peak_memory_bytes) == ("Inferred", GPU, None)
    # What was inferred is no evidence and no result: it is inferred again, or measured if asked for.
    script(*grid)
    assert script.ran() == []
    script.behave = finish
    assert script("batch_size=4", "seq_length=2048", "strategy=all")[0] == 0  # in another grid, without the evidence
    assert len(script.ran()) == 1
    script(*grid, "--every_cell")
    assert len(script.ran()) == 2


def test_nothing_is_inferred_across_settings(script):
    script.behave = run_out_of_memory
    assert script("batch_size=1,2", "strategy=all", "seed=1,2", "dtype=bf16,fp32", "memory_limit_gib=23,24")[0] == 0
    found = Counter((record.run.batch_size, record.mode) for record in load_all([script.results]))
    assert found == {(1, "measured"): 8, (2, "inferred"): 8}


def test_run_that_never_met_its_limit_answers_for_the_one_without(script):
    def limited_card(config):
        if config.memory_limit_gib is None:
            return finish(config)
        retries = {1: 0, 2: 3, 4: None}[config.batch_size]  # None: the record does not say
        return finish(config, allocation_retries=retries)

    script.behave = limited_card
    grid = ("batch_size=1,2,4", "strategy=all")
    assert script(*grid, "--memory_limit_gib=24")[0] == 0
    script.ran()
    status, stdout, _ = script(*grid)
    assert (status, len(script.ran())) == (0, 2)
    assert "1 of 3 cells have a record already, 1 of them under a memory limit that they never met" in stdout
    assert script(*grid, "--memory_limit_gib=23")[0] == 0  # what is known without a limit says nothing of one
    assert len(script.ran()) == 3


def test_runs_that_differ_in_size_alone_share_a_process_where_the_script_can(script):
    sys.modules["fake_script"].SCRIPT = dataclasses.replace(script.script, main_for_many=lambda: script.main)
    assert script("batch_size=1,2", "seq_length=64,128", "strategy=none,all")[0] == 0
    processes = [pid for _, pid, _ in script.ran()]
    assert [len(list(group)) for _, group in itertools.groupby(processes)] == [4, 4]
    script.behave = run_out_of_memory  # after which comes another process, without what this one leaves behind
    assert script("batch_size=3,4", "strategy=none", "--every_cell")[0] == 0
    assert len({pid for _, pid, _ in script.ran()}) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_study_ends_its_run_and_goes_on_where_it_was(script, number):
    def interrupt(config):
        if config.batch_size == 2:
            os.kill(os.getppid(), number)
            hang(config)
        return finish(config)

    script.behave = interrupt
    grid = ("batch_size=1,2,4", "strategy=all")
    status, _, stderr = script(*grid)
    assert status == 130
    assert_one_error_line(stderr, "interrupted; the same command goes on where this one was")
    first, second = script.ran()
    assert has_ended(second[1])
    assert [record.run_name for record in load_all([script.results])] == [first[0]]  # the other did not fail
    script.behave = finish
    assert script(*grid)[0] == 0
    assert len(script.ran()) == 2


def test_records_of_another_gpu_are_refused(script, monkeypatch):
    assert script("batch_size=1", "strategy=all")[0] == 0
    before = script.contents()
    monkeypatch.setattr(machine, "environment", lambda on_gpu: {"gpu": "NVIDIA Other"})
    script.ran()
    status, _, stderr = script("batch_size=1,2", "strategy=all")
    assert (status, script.ran(), script.contents()) == (2, [], before)
    assert_one_error_line(stderr, f"{script.results} has records of {GPU}: take another --result_dir")
    assert script("batch_size=3", "strategy=all")[0] == 0  # another grid has no run in common with those


@pytest.mark.parametrize("content", [b"", b'{"schema": 99}', b"my notes"])
def test_file_that_is_no_record_is_not_replaced_and_the_others_are_run(script, content):
    script("batch_size=2", "strategy=all")
    (path,) = script.results.glob("*.json")
    path.write_bytes(content)
    script.ran()
    status, _, stderr = script("batch_size=1,2", "strategy=all")
    assert (status, len(script.ran()), path.read_bytes()) == (1, 1, content)
    assert_one_error_line(stderr, f"skipped, not replaced: {path} is not a record")


def test_record_that_a_full_disk_left_without_its_text_is_made_again(script, monkeypatch):
    def full_at_first(path, write):
        if path.suffix == ".txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(record_module, "write_atomically", full_at_first)
        assert script("batch_size=1", "strategy=all")[0] == 1
    assert script("batch_size=1", "strategy=all")[0] == 0
    assert len(list(script.results.glob("*.json"))) == len(list(script.results.glob("*.txt"))) == 1


def test_real_script_predicts_a_grid(run_study, tmp_path):
    model = write_llama_folder(tmp_path / "model", num_hidden_layers=1)
    flags = ["--dry_run", "--model_name", model, "--dtype=fp32", f"--result_dir={tmp_path / 'results'}"]
    status, _, stderr = run_study("batch_size=2", "seq_length=32", "strategy=none,all", *flags)
    assert (status, stderr) == (0, "")
    found = load_all([tmp_path / "results"])
    assert sorted(record.run.title for record in found) == [TITLES["all"], TITLES["none"]]
    for record in found:
        assert (record.status, record.mode, record.run.dtype, record.run.batch_size) == ("ok", "predicted", "fp32", 2)
        assert sum(record.peak_breakdown.values()) == record.peak_memory_bytes
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".txt"}


def test_parity_in_a_study_of_the_offloaded_script_is_refused(run_study, tmp_path):
    grid = ["batch_size=1", "--script", "deepspeed", "--device", "cpu", "--result_dir", str(tmp_path)]
    status, _, stderr = run_study(*grid, "--parity", "1")
    assert (status, list(tmp_path.iterdir())) == (2, [])
    assert_one_error_line(stderr, "bash run_ds.sh --parity 1")


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        (["--device", "cpu"], "cpu"),
        (["--dtype=fp32", "--device=cuda"], "cuda"),
        (["--result_dir", "cpu"], None),  # a folder of that name lets no kernel be interpreted
    ],
)
def test_device_is_that_of_its_own_flag(flags, device):
    assert study._device(flags) == device
