"""A script as a user meets it: what a command line asks for, exit statuses, and one clear line for an error."""

import os
import runpy
import sys

import pytest
import torch

import all_gpu_liger_kernel as script
import deepspeed_liger_kernel as offload_script
from src import cli, machine, program
from src.config import RunConfig
from src.measure.devices import CudaRuntime
from src.offload import ranks
from src.offload_config import OffloadConfig
from src.utils import GIB, UsageError
from tests.helpers import ROOT, SCRIPT, assert_one_error_line, run_python, tiny_config

SCRIPTS = [SCRIPT, ROOT / "deepspeed_liger_kernel.py"]

# Runs a script with the words that follow, and says on stdout whether anything had imported PyTorch.
WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", sorted({"torch", "transformers", "triton", "deepspeed", "numpy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("--help", 0, ""),
        ("--batch_size 0", 2, "error: --"),
        ("--batch_size many", 2, "argument --"),
        ("--enable_flce 2", 2, "expected 0 or 1, got '2'"),
        ("--batch 2", 2, "unrecognized arguments: --batch 2"),  # or it would change its meaning with a new flag
        ("--attention eager --no_such_flag", 2, "unrecognized arguments: --no_such_flag"),
        ("--attention flash_attention_2", 2, "pip install flash-attn"),
        ("--model_name nobody/nothing", 2, "unknown model 'nobody/nothing': use one of meta-llama/"),
        ("--model_name " + "x" * 1001, 2, "--model_name must have at most 1000 characters, got 1001"),
        ("--device cpu --dtype fp16", 2, "on a CPU"),
        ("--device cpu --memory_limit_gib 4", 2, "on a CPU there is no"),
    ],
)
def test_help_and_usage_errors_come_without_torch(path, words, status, text):
    done = run_python("-c", WITHOUT_TORCH, path, *words.split())
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "imported: []"), done.stderr
    assert "Traceback" not in done.stderr
    assert text in (done.stderr.splitlines() or [""])[-1]


def test_help_names_every_flag_of_the_order(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.command_line(script.__doc__, script.DEFAULTS, {}, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    flags = "model_name batch_size seq_length iterations enable_rope enable_swiglu enable_rms enable_flce result_dir"
    assert all(f"--{flag}" in text.replace(",", " ").split() for flag in flags.split())
    assert script.__doc__.strip().splitlines()[0] in text
    assert "(default: 1024)" in text


def test_scripts_defaults_are_the_studys_and_the_originals():
    assert (RunConfig(), OffloadConfig()) == (script.DEFAULTS, offload_script.DEFAULTS)
    assert (script.BATCH_SIZE, script.SEQ_LENGTH, script.ITERATIONS, script.ENABLE_FLCE) == (8, 1024, 10, True)


@pytest.fixture
def gpu(monkeypatch):
    """Lets a test say whether there is a GPU; the environment is restored."""
    monkeypatch.delenv("TRITON_INTERPRET")
    return lambda there: monkeypatch.setattr(machine, "has_gpu", lambda: there)


@pytest.mark.parametrize(
    ("there", "words", "device", "batch", "dtype"),
    [
        (True, "", "cuda", 8, "bf16"),
        (False, "", "cpu", 2, "fp32"),
        (True, "--device cpu --batch_size 3", "cpu", 3, "fp32"),
        (False, "--device cuda", "cuda", 8, "bf16"),
        (False, "--dry_run", "cuda", 8, "bf16"),
        (False, "--find_max batch_size --dtype fp16", "cuda", 8, "fp16"),
    ],
)
def test_defaults_of_a_cpu_stand_in_only_where_the_run_will_be_on_one(gpu, there, words, device, batch, dtype):
    gpu(there)
    config, planned = cli.command_line(None, script.DEFAULTS, script.CPU_DEFAULTS, words.split())
    assert (config.device, config.batch_size, config.dtype) == (device, batch, dtype)
    assert (planned.device, planned.model_name) == ("cuda", "meta-llama/Llama-3.2-1B-Instruct")
    assert os.environ.get("TRITON_INTERPRET") == ("1" if device == "cpu" else None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ("original", "fp16", "deepspeed_cpu_adam", 1e5, 0)),
        ("--preset fast", ("fast", "bf16", "overlapped_cpu_adam", None, 1)),
        # What is given counts, in front of the preset or behind it; a launcher adds its own.
        ("--prefetch_layers 3 --preset fast --local_rank 0", ("fast", "bf16", "overlapped_cpu_adam", None, 3)),
    ],
)
def test_preset_gives_what_no_flag_does(gpu, words, expected):
    gpu(True)
    config = cli.command_line(None, offload_script.DEFAULTS, offload_script.CPU_DEFAULTS, words.split()).config
    keys = ("preset", "dtype", "optimizer", "reduce_bucket_size", "prefetch_layers")
    assert tuple(getattr(config, key) for key in keys) == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"seq_length": 2049}, "2048 positions"),
        ({"model_name": "nobody/nothing"}, "unknown model 'nobody/nothing': use one of meta-llama/"),
        ({"model_name": "meta-llama/Llama-3.2-1B-Instruct"}, "needs a GPU"),
        ({"device": "cuda"}, "no CUDA GPU"),
        ({"dtype": "bf16"}, "fp32"),
        ({"memory_limit_gib": 4}, "--memory_limit_gib"),
        ({"result_dir": "file/below"}, "--result_dir: cannot write to 'file/below'"),
        ({"log_dir": "file/below"}, "--log_dir"),
        ({"snapshot_dir": "file/below"}, "--snapshot_dir"),
        ({"pretrained": True}, "tiny-llama is a shape that nobody trained"),
        ({"dry_run": True, "gpu_memory_gib": 0.1}, "no room beside the CUDA context"),
    ],
    ids=str,
)
def test_run_that_cannot_be_gives_status_2_one_line_and_no_record(tmp_path, monkeypatch, capsys, fields, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    config = tiny_config(**fields)
    assert cli.run(script.main, cli.Command(config, None)) == 2
    assert_one_error_line(capsys.readouterr().err, text)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("first\n  second"), 1, "error: RuntimeError: first second"),
        (SystemExit(0), 1, "error: SystemExit: 0"),  # whoever leaves in the middle has not done what was asked
        (UsageError("do that\ninstead"), 2, "error: do that instead\n"),
    ],
    ids=["unexpected", "left", "usage"],
)
def test_error_is_one_line_and_with_debug_a_traceback_too(capsys, error, status, line, debug):
    def fail(config):
        raise error

    assert cli.run_config(fail, RunConfig(debug=debug)) == status
    stderr = capsys.readouterr().err
    assert ("Traceback" in stderr) == debug
    assert line in stderr
    assert debug or stderr.count("\n") == 1
    assert ("--debug" in stderr) == (status == 1 and not debug)


def test_interrupt_gives_the_shells_status(capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    assert cli.run_config(interrupt, RunConfig(debug=True)) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_main_gets_both_configurations_and_its_status_is_the_programs():
    command = cli.Command(tiny_config(), RunConfig())
    for status in (0, 1, 3):
        assert cli.run(lambda *both, status=status: status if both == command else 99, command) == status


def test_rank_says_which_it_is_and_lets_the_first_failure_speak(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(ranks, "give_way", lambda **_: waited.append(1))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def run(error):
        def fail(config):
            raise error

        waited.clear()
        return cli.run_config(fail, RunConfig()), bool(waited), capsys.readouterr().err.split(" (")[0].strip()

    assert run(RuntimeError("mine")) == (1, False, "error: rank 1: RuntimeError: mine")
    assert run(torch.distributed.DistError("peer")) == (1, True, "error: rank 1: DistError: peer")
    assert run(UsageError("all of us")) == (2, True, "error: all of us")


@pytest.fixture
def old_card(monkeypatch):
    """A GPU of 8 GiB without bf16, as far as `CudaRuntime` asks; gives the fraction of memory that was set."""
    fractions = []
    properties = type("Properties", (), {"total_memory": 8 * GIB})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda value, device: fractions.append(value))
    retries = iter([7, 10])
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": next(retries)})
    return fractions


def test_card_is_asked_for_no_more_than_it_has(old_card, capsys):
    assert cli.run(script.main, cli.Command(tiny_config(device="cuda", dtype="bf16"), None)) == 2
    assert_one_error_line(capsys.readouterr().err, "Old Card has no bf16: use --dtype fp16 or fp32")
    with pytest.raises(UsageError, match=r"--memory_limit_gib 8.5 is more than the GPU's 8\.0 GiB"):
        CudaRuntime(tiny_config(memory_limit_gib=8.5))
    assert old_card == []
    runtime = CudaRuntime(tiny_config(memory_limit_gib=6))
    assert old_card == [0.75]
    assert runtime.allocation_retries() == 10 - 7  # of this run, not of the one before


def test_program_tells_its_status_to_the_shell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--device", "cuda", "--model_name", "tiny-llama"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert_one_error_line(capsys.readouterr().err, "no CUDA GPU")


def test_interruption_while_libraries_are_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    for command in ([SCRIPT], ["-m", "src.study", "batch_size=1", "--dry_run"]):
        done = run_python(*command, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert (done.returncode, done.stdout) == (130, "")
        assert_one_error_line(done.stderr, "error: interrupted")


def test_output_that_cannot_be_written_is_one_line_and_any_alphabet_will_do(capfd, monkeypatch):
    assert program.guarded(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))) == 1
    assert_one_error_line(capfd.readouterr().err, "cannot write: [Errno 28] No space left on device")
    ascii_only = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    code = "from src import program; program.begin(); print('†'); program.guarded(lambda: print('ü') or 0)"
    assert run_python("-c", code, env=os.environ | ascii_only).stdout == "\\u2020\n\\xfc\n"
