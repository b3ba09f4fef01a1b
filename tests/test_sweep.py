"""The grid runner: which cells there are, what becomes of each, and that nothing is lost or run twice.

A cell is a process forked from the sweep, and here the sweep is one forked from the tests, with a script of their own
in place of the real one: no GPU, and a process starts in a moment. The last tests run the real scripts.
"""

import contextlib
import dataclasses
import errno
import faulthandler
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter

import pytest
from src.dry_run import predict

import all_gpu_liger_kernel
from src import records, runtime, sweep
from src.config import STRATEGIES, RunConfig, Strategy, config_of
from src.utils import ExitStatus, UsageError, write_atomically
from tests.helpers import assert_one_error_line, run_python

GPU = "NVIDIA Imaginary 1000"
WORDS = dict(zip(("none", "no_flce", "all"), STRATEGIES.values()))


# Grids


def cells(*words, script="all_gpu", flags=("--device=cuda",)):
    """(strategy's word, batch size, length) of each cell."""
    found = sweep.cells_of(sweep.grid_axes(words), script, list(flags))
    word = {strategy: word for word, strategy in WORDS.items()}
    return [(word[c.config.strategy], c.config.batch_size, c.config.seq_length) for c in found]


BATCH = {(size, 1024) for size in (1, 4, 8, 16, 32, 64, 96, 112)}
SEQUENCE = {(4, length) for length in (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576)}


@pytest.mark.parametrize("script", ["all_gpu", "deepspeed"])
@pytest.mark.parametrize(("grid", "sizes"), [("batch", BATCH), ("sequence", SEQUENCE), ("study", BATCH | SEQUENCE)])
def test_grids_of_the_original(script, grid, sizes):
    found = cells(grid, script=script)
    assert len(found) == 3 * len(sizes) == {"batch": 24, "sequence": 24, "study": 45}[grid]
    assert set(found) == {(word, *size) for word in WORDS for size in sizes}


@pytest.mark.parametrize("words", [["study"], ["batch_size=8,1,4", "seq_length=64,2048,512"]], ids=" ".join)
def test_strategy_by_strategy_and_the_smallest_first(words):
    found = cells(*words)
    assert [word for word, _ in itertools.groupby(word for word, *_ in found)] == list(WORDS)
    for word in WORDS:
        tokens = [batch * length for name, batch, length in found if name == word]
        assert tokens == sorted(tokens)


def test_axes_are_multiplied_and_equal_cells_run_once(rng):
    batches = rng.sample(range(1, 100), 3)
    axes = [f"batch_size={','.join(map(str, [*batches, batches[0]]))}", "strategy=all,none", "seq_length=64,128"]
    rng.shuffle(axes)
    found = cells(*axes)
    assert Counter(found) == Counter(itertools.product(("none", "all"), batches, (64, 128)))
    assert found[0][0] == "all"  # the order of the command line


def test_any_setting_can_be_an_axis():
    words = ["strategy=all", "gradient_checkpointing=0,1", "dtype=bf16,fp32", "memory_limit_gib=24"]
    found = [cell.config for cell in sweep.cells_of(sweep.grid_axes(words), "all_gpu", ["--device=cuda"])]
    settings = {(config.gradient_checkpointing, config.dtype, config.memory_limit_gib) for config in found}
    assert len(found) == 4
    assert settings == set(itertools.product((False, True), ("bf16", "fp32"), (24.0,)))
    assert {(config.batch_size, config.seq_length) for config in found} == {(8, 1024)}  # the script's own


@pytest.mark.parametrize(
    ("word", "kernels"),
    [
        ("none", ()),
        ("no_flce", ("rope", "swiglu", "rms_norm")),
        ("all", ("rope", "swiglu", "rms_norm", "flce")),
        ("rope+flce", ("rope", "flce")),
        ("flce+rope", ("rope", "flce")),
        ("swiglu", ("swiglu",)),
    ],
)
@pytest.mark.parametrize("script", ["all_gpu", "deepspeed"])
def test_words_for_strategies(word, kernels, script):
    assert sweep.strategy_of(word) == Strategy.only(*kernels)
    (cell,) = sweep.cells_of(sweep.grid_axes([f"strategy={word}"]), script, ["--device=cuda"])
    assert cell.config.strategy.kernels == kernels


@pytest.mark.parametrize("word", ["", "everything", "rope+", "rope,flce", "none+rope"])
def test_unknown_strategy_is_a_usage_error(word):
    with pytest.raises(UsageError, match="unknown kernel"):
        sweep.strategy_of(word)


@pytest.mark.parametrize("word", ["everything", "batch_size", "batch_size=", "batch_size=1,,2", "=", "batch,sequence"])
def test_word_that_is_no_grid_is_a_usage_error(word):
    with pytest.raises(UsageError, match="is no grid"):
        sweep.grid_axes([word])


def test_grid_beside_axes_and_axis_given_twice_are_usage_errors():
    with pytest.raises(UsageError, match="'batch' is no grid"):
        sweep.grid_axes(["batch", "seq_length=64"])
    with pytest.raises(UsageError, match="batch_size is given twice"):
        sweep.grid_axes(["batch_size=1", "batch_size=2"])


# A sweep over a script of the tests


def finish(config, **fields):
    """What a script does at its end: save the record of `config`."""
    mode = "predicted" if config.dry_run else "measured"
    tokens = config.tokens_per_step
    record = records.EMPTY | {
        "run_name": config.run_name,
        "script": "all_gpu",
        "status": "ok",
        "mode": mode,
        "config": config.to_dict(),
        "peak_memory_bytes": 2**20 * tokens,
        "environment": {"gpu": GPU},
    }
    records.save(record | fields, config.record_file)
    return ExitStatus.DONE


def run_out_of_memory(config):
    sizes = {"requested_bytes": 3, "free_bytes": 2, "allocated_bytes": 1}
    finish(config, status="oom", peak_memory_bytes=None, error={"type": "OutOfMemoryError", "message": "full", **sizes})
    return ExitStatus.OUT_OF_MEMORY


@pytest.fixture(autouse=True)
def terminal():
    """As at a terminal whose end is heard, whether or not the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class Program:
    """A sweep in a process of its own, forked from the tests."""

    def __init__(self, folder, arguments):
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments)

    def _become(self, arguments):
        status = 99
        try:
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["sweep.py", *arguments]
            status = sweep.main()
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def kill(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Exit status (negative: the signal), stdout, stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.out.read_text(), self.err.read_text()


class FakeScript:
    """Stands for all_gpu_liger_kernel.py: `behave(config)` is its main. Keeps a journal of the cells that ran."""

    def __init__(self, folder):
        self.folder, self.results = folder, folder / "results"
        self.behave = finish
        self.DEFAULTS, self.CPU_DEFAULTS = RunConfig(result_dir=str(self.results)), {"model_name": "tiny-llama"}
        self.started, self.finished = folder / "started", folder / "finished"

    def main(self, config):
        self._note(self.started, config.run_name)
        status = self.behave(config)
        self._note(self.finished, config.run_name)
        return status

    @staticmethod
    def _note(journal, line):
        with journal.open("a") as file:
            file.write(f"{line}\n")

    def ran(self):
        """Names of the cells that started, in their order."""
        return self.started.read_text().splitlines() if self.started.exists() else []

    def forget(self):
        self.started.unlink(missing_ok=True)

    def start(self, *arguments):
        return Program(self.folder, [*arguments, "--device=cuda"])

    def __call__(self, *arguments):
        return self.start(*arguments).wait()

    def records(self):
        """(batch size, length) -> record, of one strategy."""
        found = records.load_all([self.results])
        by_size = {(r["config"]["batch_size"], r["config"]["seq_length"]): r for r in found}
        assert len(by_size) == len(found)
        return by_size

    def by_batch(self):
        return {batch: record for (batch, _), record in self.records().items()}

    def endings(self):
        """File name -> what became of the cell."""
        return {path.name: outcome(records.load(path)) for path in self.results.glob("[!.]*.json")}


def outcome(record):
    return record["run_name"], record["status"], record["mode"], record["peak_memory_bytes"], record["config"]


@pytest.fixture
def script(monkeypatch, tmp_path):
    fake = FakeScript(tmp_path)
    module = types.ModuleType("fake_script")
    vars(module).update(DEFAULTS=fake.DEFAULTS, CPU_DEFAULTS=fake.CPU_DEFAULTS, main=fake.main)
    monkeypatch.setitem(sys.modules, "fake_script", module)
    monkeypatch.setitem(sweep.SCRIPTS, "all_gpu", "fake_script")
    monkeypatch.setattr(runtime, "environment", lambda device: {"gpu": GPU, "device": device.type})
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK")
    monkeypatch.chdir(tmp_path)
    return fake


def is_alive(pid):
    """Whether a process runs; one that ended and that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition):
    """Give processes time to do what they will do; the test fails if they do not."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


def test_every_cell_leaves_its_record_and_what_has_one_is_not_run_again(script):
    status, stdout, stderr = script("batch_size=1,4", "seq_length=64,128", "strategy=none,all")
    assert (status, stderr) == (0, "")
    assert len(script.ran()) == len(set(script.ran())) == 8
    assert {path.stem for path in script.results.glob("*.json")} == set(script.ran())
    assert "No Liger Kernel, 1 x 64: peak 0.06 GiB" in stdout
    assert not list(script.results.glob("*.log"))
    before = {path: path.stat().st_mtime_ns for path in script.results.iterdir()}
    status, stdout, stderr = script("batch_size=1,4", "seq_length=64,128", "strategy=none,all")
    assert (status, stderr) == (0, "")
    assert "8 of 8 cells have a record already" in stdout
    assert {path: path.stat().st_mtime_ns for path in script.results.iterdir()} == before
    assert script("batch_size=1,4", "seq_length=64,256", "strategy=all")[0] == 0  # a grid that overlaps
    assert len(script.ran()) == 10


def test_flags_go_to_the_script_as_they_are(script, monkeypatch):
    seen = script.folder / "seen.json"

    def behave(config):
        told = {
            "argv": sys.argv,
            "config": config.to_dict(),
            "nvml": os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"),
        }
        seen.write_text(json.dumps(told))
        return finish(config)

    script.behave = behave
    flags = [
        "--dtype",
        "fp32",
        "--gradient_checkpointing=0",
        "--seed",
        "7",
        "--iterations=3",
        "--memory_limit_gib",
        "9",
    ]
    assert script("batch_size=2", "strategy=rope", *flags)[0] == 0
    told = json.loads(seen.read_text())
    config = RunConfig.from_dict(told["config"])
    assert config == dataclasses.replace(
        script.DEFAULTS,
        strategy=Strategy.only("rope"),
        batch_size=2,
        dtype="fp32",
        gradient_checkpointing=False,
        seed=7,
        iterations=3,
        memory_limit_gib=9.0,
        device="cuda",
        snapshot_dir="",  # of a whole grid: only if asked for
        log_dir="",
    )
    assert told["argv"][0] == "fake_script.py"
    assert told["argv"][-len(flags) - 1 : -1] == flags
    assert told["nvml"] == "1"  # PyTorch looks for a GPU without initialising CUDA, which no fork survives


def test_folders_for_snapshots_and_logs_can_be_asked_for(script):
    assert script("strategy=all", "--snapshot_dir=snapshots", "--log_dir", "logs")[0] == 0
    (record,) = script.records().values()
    assert (record["config"]["snapshot_dir"], record["config"]["log_dir"]) == ("snapshots", "logs")


# What becomes of a cell: name -> (what it does, type of the error recorded, what the message says)


def crash(config):
    faulthandler.disable()  # pytest's, which prints where
    os.kill(os.getpid(), signal.SIGSEGV)


def be_killed(config):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error(config):
    raise RuntimeError("first line\nsecond line")


def raise_usage_error(config):
    raise UsageError("take another")


def print_and_fail(config):
    print("starting")
    print("the last words", file=sys.stderr, flush=True)
    return ExitStatus.FAILED


def fail_silently(config):
    return ExitStatus.FAILED


def leave_python(config):
    raise SystemExit(5)


def leave_at_once(config):
    os._exit(7)


def claim_success(config):
    return ExitStatus.DONE


def record_error(config):
    finish(config, status="error", peak_memory_bytes=None, error={"type": "ValueError", "message": "its own words"})
    raise ValueError("its own words")


def hang(config):
    while True:
        time.sleep(60)


def garbage(content):
    def write(config):
        config.record_file.write_bytes(content)
        return ExitStatus.DONE

    return write


ENDINGS = {
    "segmentation fault": (crash, "Killed", "SIGSEGV"),
    "killed": (be_killed, "Killed", "SIGKILL; the system may have had too little host memory"),
    "exception": (raise_error, "Failed", "exit status 1: RuntimeError: first line second line"),
    "bad arguments": (raise_usage_error, "Failed", "exit status 2: take another"),
    "last words": (print_and_fail, "Failed", "exit status 1: the last words"),
    "nothing said": (fail_silently, "Failed", "exit status 1: it printed nothing"),
    "SystemExit": (leave_python, "Failed", "exit status"),
    "exit of the process": (leave_at_once, "Failed", "exit status 7"),
    "success without a record": (claim_success, "Failed", "exit status 0"),
    "error of its own": (record_error, "ValueError", "its own words"),
    "hangs": (hang, "TimedOut", "too long"),
    "empty record": (garbage(b""), "Failed", "exit status 0"),
    "half a record": (garbage(b'{"schema": 1, "status": "o'), "Failed", "exit status 0"),
    "bytes in place of a record": (garbage(b"\x80\x04\x95"), "Failed", "exit status 0"),
    "another schema": (garbage(b'{"schema": 99, "status": "ok"}'), "Failed", "exit status 0"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_failed_cell_is_recorded_as_what_it_was_and_the_sweep_goes_on(script, ending):
    act, kind, message = ENDINGS[ending]
    script.behave = lambda config: act(config) if config.batch_size == 2 else finish(config)
    status, stdout, stderr = script("batch_size=1,2,3", "strategy=all", "--timeout_s", "2")
    assert status == 1
    assert_one_error_line(stderr, "1 cells failed")
    found = script.by_batch()
    assert {batch: record["status"] for batch, record in found.items()} == {1: "ok", 2: "error", 3: "ok"}
    record = found[2]
    assert record["error"]["type"] == kind
    assert message in record["error"]["message"]
    assert record["error"]["message"] in stdout
    assert list(record) == list(records.EMPTY)
    config = config_of(record)
    assert (config.run_name, record["mode"], record["environment"]["gpu"]) == (record["run_name"], "measured", GPU)
    assert record["peak_memory_bytes"] is None
    # What it printed is kept; what those printed that went well is not.
    assert [log.stem for log in script.results.glob("*.log")] == [record["run_name"]]
    if ending == "last words":
        assert (script.results / f"{record['run_name']}.log").read_text() == "starting\nthe last words\n"
    # Failures are tried again, alone.
    script.forget()
    script.behave = finish
    assert script("batch_size=1,2,3", "strategy=all")[0] == 0
    assert script.ran() == [record["run_name"]]
    assert {record["status"] for record in script.by_batch().values()} == {"ok"}
    assert not list(script.results.glob("*.log"))


@pytest.mark.parametrize("content", [b'{"schema": 1}', b'{"schema": 1, "status": "oom"}'], ids=bytes.decode)
def test_record_that_says_nothing_of_the_run_is_none(script, content):
    script.behave = lambda config: garbage(content)(config) if config.batch_size == 2 else finish(config)
    status, _, stderr = script("batch_size=1,2,3", "strategy=all")
    assert status == 1, stderr
    assert {batch: record["status"] for batch, record in script.by_batch().items()} == {1: "ok", 2: "error", 3: "ok"}


def test_every_cell_can_fail(script):
    script.behave = crash
    status, _, stderr = script("batch_size=1,2", "strategy=none,all")
    assert status == 1
    assert_one_error_line(stderr, "4 cells failed")
    assert [r["error"]["type"] for r in records.load_all([script.results])] == 4 * ["Killed"]


def test_out_of_memory_is_a_result(script):
    script.behave = run_out_of_memory
    status, stdout, stderr = script("batch_size=2", "strategy=all")
    assert (status, stderr) == (0, "")
    assert "out of memory\n" in stdout
    (record,) = script.records().values()
    assert (record["status"], record["mode"], record["error"]["requested_bytes"]) == ("oom", "measured", 3)
    assert not list(script.results.glob("*.log"))
    script("batch_size=2", "strategy=all")
    assert len(script.ran()) == 1


def test_result_counts_whatever_becomes_of_the_cell_after_it(script):
    def behave(config):
        finish(config)
        crash(config)

    script.behave = behave
    assert script("strategy=all")[0] == 0
    (record,) = script.records().values()
    assert record["status"] == "ok"


def test_old_record_does_not_pass_for_a_new_one(script):
    script.behave = record_error
    script("strategy=all")
    (path,) = script.results.glob("*.json")
    old = path.stat().st_mtime - 60
    os.utime(path, (old, old))
    script.behave = claim_success
    assert script("strategy=all")[0] == 1
    assert records.load(path)["error"]["type"] == "Failed"


@pytest.mark.parametrize("ending", [hang, crash, finish])
def test_what_a_cell_started_ends_with_it(script, ending):
    pids = script.folder / "pids"

    def behave(config):
        started = subprocess.Popen(["sleep", "600"])
        pids.write_text(str(started.pid))
        return ending(config)

    script.behave = behave
    script("strategy=all", "--timeout_s", "1.5")
    pid = int(pids.read_text())
    wait_until(lambda: not is_alive(pid))


def test_cell_that_ends_before_it_could_do_anything_does_not_stop_the_sweep(script):
    script.behave = lambda config: time.sleep(5)
    program = script.start("strategy=all", "--timeout_s", "0")
    wait_until(lambda: list(script.results.glob("*.json")))
    assert program.wait()[0] == 1
    assert not script.finished.exists()


# Cells that need not be run


def too_large(*, largest):
    """A card with room for so many tokens."""
    return lambda config: run_out_of_memory(config) if config.tokens_per_step > largest else finish(config)


def statuses(script):
    return {size: (record["status"], record["mode"]) for size, record in script.records().items()}


def test_cells_beyond_one_that_ran_out_of_memory_are_inferred(script):
    script.behave = too_large(largest=1500)
    status, stdout, stderr = script("batch_size=1,2,4", "seq_length=512,1024,2048", "strategy=all")
    assert (status, stderr) == (0, "")
    # 1 x 2048 and 2 x 1024 are neither within nor beyond one another; 4 x 512 is beyond neither.
    measured = {(1, 2048), (2, 1024), (4, 512)}
    inferred = {(2, 2048), (4, 1024), (4, 2048)}
    assert statuses(script) == {
        **dict.fromkeys({(1, 512), (2, 512), (1, 1024)}, ("ok", "measured")),
        **dict.fromkeys(measured, ("oom", "measured")),
        **dict.fromkeys(inferred, ("oom", "inferred")),
    }
    assert len(script.ran()) == 6
    assert stdout.count("out of memory (inferred)") == 3
    names = {size: record["run_name"] for size, record in script.records().items()}
    for size in inferred:
        record = script.records()[size]
        assert list(record) == list(records.EMPTY)
        assert record["error"]["type"] == "Inferred"
        evidence = next(name for name in names.values() if f" {name} " in record["error"]["message"])
        (proof,) = (proof for proof in measured if names[proof] == evidence)
        assert all(small <= large for small, large in zip(proof, size))
        assert record["peak_memory_bytes"] is None
        assert record["environment"]["gpu"] == GPU
        assert record["environment"]["argv"][0] == "fake_script.py"


def test_every_cell_is_run_if_asked_for(script):
    script.behave = too_large(largest=1500)
    assert script("batch_size=1,2,4", "seq_length=1024,2048", "strategy=all", "--every_cell")[0] == 0
    assert len(script.ran()) == 6
    assert {mode for _, mode in statuses(script).values()} == {"measured"}


@pytest.mark.parametrize(
    "axis",
    ["strategy=none,all", "gradient_checkpointing=1,0", "dtype=bf16,fp32", "memory_limit_gib=24,23", "seed=1,2"],
)
def test_nothing_is_inferred_across_settings(script, axis):
    script.behave = too_large(largest=100)
    words = [axis] if axis.startswith("strategy") else [axis, "strategy=all"]
    assert script("batch_size=1,2,3", "seq_length=512", *words)[0] == 0
    found = [(r["config"]["batch_size"], r["mode"]) for r in records.load_all([script.results])]
    assert Counter(found) == {(1, "measured"): 2, (2, "inferred"): 2, (3, "inferred"): 2}


@pytest.mark.parametrize("act", [crash, raise_error, hang, claim_success, garbage(b"")], ids=lambda act: act.__name__)
def test_nothing_is_inferred_from_a_failure(script, act):
    script.behave = lambda config: act(config) if config.batch_size == 1 else finish(config)
    script("batch_size=1,2", "strategy=all", "--timeout_s", "1.5")
    assert [script.by_batch()[batch]["status"] for batch in (1, 2)] == ["error", "ok"]


def test_inferred_record_is_no_evidence_for_a_later_sweep(script):
    script.behave = too_large(largest=1500)
    script("batch_size=1,2,4", "seq_length=1024", "strategy=all")
    script.forget()
    # 4 was inferred from 2, which is not in this grid.
    script.behave = finish
    assert script("batch_size=1,4,8", "seq_length=1024", "strategy=all")[0] == 0
    assert {size: mode for (size, _), (_, mode) in statuses(script).items()} == dict.fromkeys((1, 2, 4, 8), "measured")
    assert [script.by_batch()[batch]["status"] for batch in (1, 2, 4, 8)] == ["ok", "oom", "ok", "ok"]
    assert len(script.ran()) == 2


def test_inferred_record_is_made_again_or_measured_and_never_replaces_a_measured_one(script):
    script.behave = too_large(largest=1500)
    grid = ["batch_size=1,2,4", "seq_length=1024", "strategy=all"]
    script(*grid)
    (path,) = (path for path in script.results.glob("*.json") if records.load(path)["mode"] == "inferred")
    path.unlink()
    path.write_bytes(b"")
    script(*grid)
    assert records.load(path)["mode"] == "inferred"
    assert len(script.ran()) == 2
    script(*grid, "--every_cell")
    assert len(script.ran()) == 3
    assert records.load(path)["mode"] == "measured"
    before = path.read_bytes()
    script(*grid)
    assert path.read_bytes() == before
    assert len(script.ran()) == 3


def test_measured_cell_beyond_one_that_ran_out_of_memory_stays(script):
    assert script("batch_size=4", "strategy=all")[0] == 0
    script.behave = run_out_of_memory
    assert script("batch_size=2,4,8", "strategy=all")[0] == 0
    assert {batch: record["mode"] for batch, record in script.by_batch().items()} == {
        2: "measured",
        4: "measured",
        8: "inferred",
    }
    assert script.by_batch()[4]["status"] == "ok"


# Cells that ran under a memory limit

LIMITED = ("batch_size=1,2,4,8", "strategy=all", "--memory_limit_gib=24")
FREE = LIMITED[:2]


def limited_card(retries):
    """A card whose runs under a limit try so many allocations again: batch size -> count; None runs out of memory."""

    def behave(config):
        count = retries[config.batch_size] if config.memory_limit_gib else 0
        return run_out_of_memory(config) if count is None else finish(config, allocation_retries=count)

    return behave


def test_run_that_never_met_its_limit_answers_for_the_one_without(script):
    script.behave = limited_card({1: 0, 2: 0, 4: 3, 8: None})
    assert script(*LIMITED)[0] == 0
    before = {path: path.read_bytes() for path in script.results.iterdir()}
    script.forget()
    status, stdout, stderr = script(*FREE)
    assert (status, stderr) == (0, "")
    assert "2 of 4 cells have a record already, 2 of them under a memory limit that they never met" in stdout
    sizes = [re.match(r"bs(\d+)_", name)[1] for name in script.ran()]
    assert sizes == ["4", "8"]
    assert not any("limit" in name for name in script.ran())
    assert before.items() <= {path: path.read_bytes() for path in script.results.iterdir()}.items()
    # The other way round nothing is known: a run without a limit does not say what it would have done under one.
    script.forget()
    assert script(*LIMITED[:2], "--memory_limit_gib=23")[0] == 0
    assert len(script.ran()) == 4


@pytest.mark.parametrize(
    "flags", ["--dtype=fp32", "--seed=7", "--gradient_checkpointing=0", "--iterations=3", "--model_name=tiny-llama"]
)
def test_run_under_a_limit_answers_only_for_its_own_settings(script, flags):
    script.behave = limited_card(dict.fromkeys((1, 2, 4, 8), 0))
    assert script(*LIMITED, flags)[0] == 0
    script.forget()
    assert script(*FREE)[0] == 0
    assert len(script.ran()) == 4


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": 1}', b"[]"], ids=bytes.decode)
def test_other_files_among_the_results_answer_for_nothing(script, content):
    script.results.mkdir()
    (script.results / "bs1_limit24.json").write_bytes(content)
    assert script(*FREE)[0] == 0
    assert len(script.ran()) == 4


def test_run_that_counted_no_retries_answers_for_nothing(script):
    assert script(*LIMITED)[0] == 0  # the records of `finish` do not say
    script.forget()
    assert script(*FREE)[0] == 0
    assert len(script.ran()) == 4


# A script whose runs share what they build


@pytest.fixture
def sharing(script):
    """`pids()` gives size and process of each cell that ran, in their order."""

    def main_of_sweep():
        return script.main

    sys.modules["fake_script"].main_of_sweep = main_of_sweep
    journal, behave = script.folder / "pids", script.behave

    def note(config):
        with journal.open("a") as file:
            file.write(f"{config.strategy.title} {config.batch_size} {os.getpid()}\n")
        return script.inner(config)

    script.inner, script.behave = behave, note
    script.pids = lambda: [line.rsplit(" ", 2) for line in journal.read_text().splitlines()]
    return script


def test_cells_that_differ_in_size_alone_share_a_process(sharing):
    assert sharing("batch_size=1,2,4", "strategy=none,all")[0] == 0
    by_strategy = {name: {pid for other, _, pid in sharing.pids() if other == name} for name, *_ in sharing.pids()}
    assert [len(pids) for pids in by_strategy.values()] == [1, 1]
    assert len(set.union(*by_strategy.values())) == 2
    sharing.forget()
    assert sharing("batch_size=1,2", "seq_length=64", "strategy=all", "--seed=1")[0] == 0
    assert len({pid for *_, pid in sharing.pids()[6:]}) == 1


@pytest.mark.parametrize("ending", ["segmentation fault", "exception", "hangs", "exit of the process", "out of memory"])
def test_what_one_cell_leaves_behind_is_not_the_next_ones(sharing, ending):
    act = run_out_of_memory if ending == "out of memory" else ENDINGS[ending][0]
    sharing.inner = lambda config: act(config) if config.batch_size == 2 else finish(config)
    sharing("batch_size=1,2,3", "strategy=all", "--timeout_s", "2", "--every_cell")
    one, two, three = (pid for *_, pid in sharing.pids())
    assert one == two != three
    assert sharing.by_batch()[3]["status"] == "ok"


def test_shared_process_ends_with_its_sweep(sharing):
    assert sharing("batch_size=1,2", "strategy=all")[0] == 0
    pid = int(sharing.pids()[0][-1])
    wait_until(lambda: not is_alive(pid))


def interrupt_while_forking():
    """Whether an interruption that comes in the midst of a fork ends what called it."""
    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if sweep._fork() == 0:
            os._exit(0)
    except KeyboardInterrupt:
        return True
    return False


def test_interruption_during_a_fork_is_heard():
    pid = os.fork()  # hooks of forks stay for good
    if pid == 0:
        os._exit(0 if interrupt_while_forking() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Interrupted sweeps

GRID = ("batch_size=1,2,4", "seq_length=512,1024", "strategy=none,all")


@pytest.fixture
def disturbed(script, rng):
    """A sweep that `interrupt` stops at a random point, and what an undisturbed one leaves."""

    def behave(config):
        time.sleep(0.03)
        return too_large(largest=1500)(config)

    script.behave = behave
    assert script(*GRID)[0] == 0
    undisturbed = script.endings()
    for path in script.results.iterdir():
        path.unlink()
    script.forget()

    def interrupt(number):
        program = script.start(*GRID)
        cell = rng.randrange(1, 4)
        wait_until(lambda: len(script.ran()) >= cell)
        time.sleep(rng.random() * 0.05)
        program.kill(number)
        return program.wait()

    return interrupt, undisturbed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("repetition", range(2))
def test_interrupted_sweep_goes_on_where_it_was(script, disturbed, number, repetition):
    interrupt, undisturbed = disturbed
    for _ in range(2):
        status, _, stderr = interrupt(number)
        if number == signal.SIGKILL:
            assert status == -number
        else:
            assert status == 130
            assert_one_error_line(stderr, "interrupted; the same command goes on where this one was")
        time.sleep(0.1)  # what a sweep that was killed left behind ends
        found = script.endings()
        assert found.items() <= undisturbed.items()
        measured = {name.removesuffix(".json") for name, (_, _, mode, *_) in found.items() if mode == "measured"}
        script.forget()
    assert script(*GRID)[0] == 0
    assert not measured & set(script.ran())
    assert len(script.ran()) == len(set(script.ran()))
    assert script.endings() == undisturbed


def start_cell_that_hangs(script):
    """A sweep in the middle of a cell: the program, and the processes of the cell."""
    pids = script.folder / "pids"

    def behave(config):
        child = subprocess.Popen(["sleep", "600"])
        write_atomically(pids, lambda path: path.write_text(f"{os.getpid()} {child.pid}"))
        return hang(config)

    script.behave = behave
    program = script.start("strategy=all")
    wait_until(pids.exists)
    return program, [int(pid) for pid in pids.read_text().split()]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_no_cell_survives_its_sweep(script, number):
    program, pids = start_cell_that_hangs(script)
    try:
        program.kill(number)
        status, _, stderr = program.wait()
        if number in (signal.SIGINT, signal.SIGTERM):
            assert status == 130
            assert_one_error_line(stderr, "interrupted")
        assert not list(script.results.glob("*.json"))  # it did not fail
        cell = pids[:1] if number == signal.SIGKILL else pids  # nobody is left to end what the cell started
        wait_until(lambda: not any(is_alive(pid) for pid in cell))
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_sweep_under_nohup_outlives_its_terminal(script):
    """Whoever started it chose that it ignores the end of the terminal."""

    def behave(config):
        os.kill(os.getppid(), signal.SIGHUP)
        return finish(config)

    script.behave = behave
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert script("batch_size=1,2", "strategy=all")[0] == 0
    assert len(script.by_batch()) == 2


def test_cell_ended_while_it_writes_leaves_a_folder_that_can_be_read(script):
    def behave(config):
        def write(path):
            path.write_text('{"schema": 1, "run_na')
            hang(config)

        write_atomically(config.record_file, write)

    script.behave = lambda config: behave(config) if config.batch_size == 2 else finish(config)
    script("batch_size=1,2", "strategy=all", "--timeout_s", "1.5")
    assert {batch: record["status"] for batch, record in script.by_batch().items()} == {1: "ok", 2: "error"}


# What is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("everything", "'everything' is no grid"),
        ("batch seq_length=64", "'batch' is no grid"),
        ("batch_size=1,,2", "is no grid"),
        ("batch_size=1 batch_size=2", "given twice"),
        ("strategy=everything", "unknown kernel"),
        ("batch_size=0", "--batch_size must be"),
        ("batch --memory_limit_gib -1", "--memory_limit_gib must be"),
        ("batch --gpu_memory_gib 24", "--gpu_memory_gib"),
    ],
)
def test_bad_grid_or_value_is_one_line_and_status_2(script, arguments, text):
    status, stdout, stderr = script(*arguments.split())
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, text)
    assert not script.ran()
    assert not script.results.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "grid"),
        ("batch_size=many", "batch_size"),
        ("no_such_setting=1", "no_such_setting"),
        ("dtype=int8", "int8"),
        ("batch --no_such_flag", "no_such_flag"),
        ("batch --enable_rope 2", "enable_rope"),
        ("batch --script nothing", "nothing"),
        ("batch --timeout_s soon", "timeout_s"),
    ],
)
def test_mistyped_arguments_give_status_2_and_say_which(script, arguments, text):
    status, stdout, stderr = script(*arguments.split())
    assert (status, stdout) == (2, "")
    assert "error: " in stderr.splitlines()[-1]
    assert text in stderr.splitlines()[-1]
    assert not script.ran()


@pytest.mark.parametrize("status", ["ok", "oom"])
def test_records_of_another_gpu_are_refused(script, monkeypatch, status):
    script.behave = finish if status == "ok" else run_out_of_memory
    assert script("batch_size=1,2", "strategy=all")[0] == 0
    script.forget()
    before = {path: path.read_bytes() for path in script.results.iterdir()}
    monkeypatch.setattr(runtime, "environment", lambda device: {"gpu": "NVIDIA Other"})
    status, _, stderr = script("batch_size=1,2,3", "strategy=all")
    assert status == 2
    assert_one_error_line(stderr, GPU)
    assert str(script.results) in stderr
    assert "--result_dir" in stderr
    assert not script.ran()
    assert {path: path.read_bytes() for path in script.results.iterdir()} == before
    # Another grid has no cell in common with what was measured there.
    assert script("batch_size=3", "strategy=all")[0] == 0


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_folder_that_cannot_be_written_is_one_line_before_anything_runs(script, folder):
    (script.folder / "file").write_text("kept")
    status, stdout, stderr = script("batch_size=1,2", "strategy=all", f"--result_dir={folder}")
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, "--result_dir: cannot write to")
    assert not script.ran()
    assert (script.folder / "file").read_text() == "kept"


def test_disk_that_fills_up_ends_the_sweep_in_one_line_and_loses_nothing(script, monkeypatch):
    full, save = script.folder / "full", records.save

    def save_if_there_is_room(record, path):
        if full.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(record, path)

    def fill_up(config):
        if config.batch_size == 2:
            full.touch()
        return finish(config)

    monkeypatch.setattr(records, "save", save_if_there_is_room)
    script.behave = fill_up
    status, _, stderr = script("batch_size=1,2,3", "strategy=all")
    assert status == 1
    assert_one_error_line(stderr, "No space left on device")
    assert list(script.by_batch()) == [1]
    full.unlink()
    script.behave = finish
    script.forget()
    assert script("batch_size=1,2,3", "strategy=all")[0] == 0
    assert len(script.ran()) == 2


def test_gpu_that_cannot_be_used_is_one_line(script, monkeypatch):
    def fail(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(runtime, "environment", fail)
    status, _, stderr = script("batch_size=1", "strategy=all")
    assert status == 2
    assert_one_error_line(stderr, "the GPU cannot be used")
    assert not script.ran()


# The real scripts

SWEEP = ("-m", "src.sweep")


def test_without_a_gpu_the_sweep_says_what_can_be_done(tmp_path):
    done = run_python(*SWEEP, "study", f"--result_dir={tmp_path}")
    assert done.returncode == 2
    assert_one_error_line(done.stderr, "--dry_run")
    assert not list(tmp_path.iterdir())


def test_dry_run_records_what_is_predicted(tmp_path):
    axes = ["batch_size=1,2", "seq_length=32", "strategy=none,all"]
    flags = ["--dry_run", "--model_name", "tiny-llama", "--dtype=fp32", f"--result_dir={tmp_path}"]
    done = run_python(*SWEEP, *axes, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    found = records.load_all([tmp_path])
    sizes = {(r["config"]["batch_size"], r["config"]["seq_length"], r["config"]["flce"]) for r in found}
    assert sizes == set(itertools.product((1, 2), (32,), (False, True)))
    for record in found:
        assert (record["status"], record["mode"]) == ("ok", "predicted")
        config = config_of(record)
        assert (config.model_name, config.dtype, config.snapshot_dir, config.log_dir) == ("tiny-llama", "fp32", "", "")
        prediction = predict(config, all_gpu_liger_kernel.build_experiment)
        assert record["peak_memory_bytes"] == prediction.peak_bytes
        assert record["peak_reserved_bytes"] == prediction.peak_reserved_bytes
        assert record["peak_breakdown"] == prediction.breakdown
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt"}


def test_tiny_model_runs_on_the_cpu(tmp_path):
    axes = ["batch_size=1", "seq_length=16", "strategy=none"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = ["--device", "cpu", "--iterations", "1", f"--result_dir={tmp_path}"]
    done = run_python(*SWEEP, *axes, *flags, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = records.load_all([tmp_path])
    assert (record["status"], record["mode"], record["config"]["model_name"]) == ("ok", "interpreted", "tiny-llama")
    assert record["losses"]
    assert (record["config"]["seq_length"], record["config"]["flce"]) == (16, False)
