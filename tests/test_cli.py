"""The script as a user meets it: exit status, one clear line for an error, and what a run without a GPU leaves."""

import json
import os
import runpy
import sys

import pytest
import torch
from liger_kernel.transformers import monkey_patch
from src.runtime import CudaRuntime, peak_flops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from src import cli, records
from src.config import RunConfig, Strategy
from src.utils import GIB, UsageError
from tests.helpers import SCRIPT, assert_one_error_line, run_python

SMALL = ["--iterations", "1", "--batch_size", "1", "--seq_length", "16"]
NO_KERNEL = ["--enable_rope", "0", "--enable_swiglu", "0", "--enable_rms", "0", "--enable_flce", "0"]


def only_kernel(flag):
    """Arguments that leave one kernel on."""
    i = NO_KERNEL.index(flag)
    return NO_KERNEL[:i] + NO_KERNEL[i + 2 :]


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Run the script in this process, in an empty folder: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stopped.value.code, *capsys.readouterr()

    return run


BAD_ARGUMENTS = {
    "batch of none": ("--batch_size 0", "--batch_size"),
    "negative warm-up": ("--warmup -1", "--warmup"),
    "unknown model": ("--model_name nobody/nothing", "nobody/nothing"),
    "sequence beyond the model's": ("--seq_length 2049", "2048 positions"),
    "full-size model without a GPU": ("--model_name meta-llama/Llama-3.2-1B", "needs a GPU"),
    "no GPU": ("--device cuda", "no CUDA GPU"),
    "bf16 in the interpreter": ("--dtype bf16", "fp32"),
    "fp16 in the interpreter": ("--dtype fp16", "fp32"),
    "limit without a GPU": ("--memory_limit_gib 4", "--memory_limit_gib"),
    "unwritable results": ("--result_dir file/below", "--result_dir"),
    "unwritable logs": ("--log_dir file/below", "--log_dir"),
    "weights that cannot be had offline": ("--pretrained", "cannot load 'tiny-llama'"),
    "attention that is not installed": ("--attention flash_attention_2", "flash-attn"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_status_2_one_line_and_no_record(run_script, tmp_path, case):
    arguments, text = BAD_ARGUMENTS[case]
    (tmp_path / "file").touch()
    status, _, stderr = run_script(*arguments.split())
    assert status == 2
    assert_one_error_line(stderr, text)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("case", ["batch of none", "unknown model", "no GPU"])
def test_program_says_what_is_wrong_in_one_line(tmp_path, case):
    arguments, text = BAD_ARGUMENTS[case]
    done = run_python(SCRIPT, *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert_one_error_line(done.stderr, text)


@pytest.mark.parametrize("arguments", ["--dtype int8", "--enable_rope 2", "--batch_size many", "--no_such_flag"])
def test_mistyped_arguments_give_status_2_and_the_usage(run_script, arguments):
    status, _, stderr = run_script(*arguments.split())
    assert status == 2
    assert stderr.startswith("usage: ")
    assert f"{SCRIPT.name}: error: " in stderr.splitlines()[-1]


def test_help_names_every_flag_of_the_order(run_script):
    status, stdout, _ = run_script("--help")
    assert status == 0
    flags = "model_name batch_size seq_length iterations enable_rope enable_swiglu enable_rms enable_flce result_dir"
    assert all(f"--{flag} " in stdout for flag in flags.split())


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("first\n  second"), 1, "error: RuntimeError: first second"),
        (UsageError("do that\ninstead"), 2, "error: do that instead\n"),
    ],
    ids=["unexpected", "usage"],
)
def test_error_is_one_line_and_with_debug_a_traceback_too(capsys, error, status, line, debug):
    def fail(config):
        raise error

    assert cli.run(fail, RunConfig(debug=debug)) == status
    stderr = capsys.readouterr().err
    assert ("Traceback" in stderr) == debug
    assert line in stderr
    assert debug or stderr.count("\n") == 1
    if status == 1:
        assert ("--debug" in stderr) == (not debug)


def test_interrupt_gives_the_shells_status(capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    assert cli.run(interrupt, RunConfig(debug=True)) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_exit_status_of_main_is_the_programs():
    assert [cli.run(lambda config, status=status: status, RunConfig()) for status in (0, 1, 3)] == [0, 1, 3]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """One run of the program on a machine without a GPU: its folder, its output and its record."""
    folder = tmp_path_factory.mktemp("run")
    # As a user starts it: the program itself turns Triton's interpreter on.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_python(SCRIPT, *SMALL, "--iterations", "2", env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("results/*.json")
    return folder, done, records.load(path)


def test_run_without_gpu_prints_no_error_and_names_its_files(checked):
    _, done, record = checked
    assert done.stderr == ""
    assert f"results/{record['run_name']}.json" in done.stdout
    assert f"logs/{record['run_name']}" in done.stdout
    assert done.stdout.count(" agrees") == 5
    assert "DIFFERS" not in done.stdout


def test_run_without_gpu_records_no_figure_that_takes_one(checked):
    _, _, record = checked
    assert (record["status"], record["mode"], record["script"]) == ("ok", "interpreted", "all_gpu")
    for key in ("latency_s", "latency_iqr_s", "throughput_tokens_per_s", "mfu", "step_seconds", "peak_reserved_bytes"):
        assert record[key] is None, key
    assert (record["config"]["device"], record["environment"]["gpu"]) == ("cpu", None)
    assert record["config"]["model_name"] == "tiny-llama"
    assert record["peak_memory_bytes"] > 0
    assert record["run_name"].startswith("bs1_seq16_ropeTrue_siluTrue_rmsTrue_flceTrue")


def test_run_without_gpu_checks_every_kernel_alone_and_together(checked):
    _, _, record = checked
    rows = record["kernel_check"]
    kernels = list(Strategy().kernels)
    assert [row["kernels"] for row in rows] == [[], *([name] for name in kernels), kernels]
    for row in rows:
        assert row["agrees"]
        assert len(row["losses"]) == 2
        ran = row["implementations"]
        assert [name for name in kernels if ran[name].startswith("liger_kernel.")] == row["kernels"]
    assert record["losses"] == rows[-1]["losses"]
    assert record["loss"] == rows[-1]["losses"][-1]


def scalars(folder):
    """Every series of a TensorBoard folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_without_gpu_writes_logs_that_tensorboard_reads(checked):
    folder, _, record = checked
    series = scalars(folder / "logs" / record["run_name"])
    assert pytest.approx(record["losses"]) in [values for tag, values in series.items() if tag.endswith("/loss")]
    assert [len(values) for tag, values in series.items() if "peak_allocated" in tag] == [2]
    assert not [tag for tag in series if any(word in tag for word in ("time", "seconds", "step_s", "tokens", "mfu"))]


def test_repeated_run_replaces_its_own_files(run_script, tmp_path):
    def run():
        assert run_script(*SMALL, *NO_KERNEL)[0] == 0
        (logs,) = tmp_path.glob("logs/*")
        return sorted(path.name for path in tmp_path.glob("results/*")), scalars(logs)

    assert run() == run()


def wrong_rope(q, k, cos, sin, **kwargs):
    return apply_rotary_pos_emb(q, k, cos, -sin, **kwargs)


class WrongMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 1.001


class WrongNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


def wrong_loss(self, hugging_face=LlamaForCausalLM.forward, **kwargs):
    output = hugging_face(self, **kwargs)
    output.loss = output.loss * 1.001
    return output


def wrong_gradient(self, hugging_face=LlamaForCausalLM.forward, **kwargs):
    output = hugging_face(self, **kwargs)
    output.loss = output.loss.detach() + 1.001 * (output.loss - output.loss.detach())
    return output


@pytest.mark.parametrize(
    ("flag", "name", "wrong"),
    [
        ("--enable_rope", "liger_rotary_pos_emb", wrong_rope),
        ("--enable_swiglu", "LigerSwiGLUMLP", WrongMLP),
        ("--enable_rms", "LigerRMSNorm", WrongNorm),
        ("--enable_flce", "llama_lce_forward", wrong_loss),
        ("--enable_flce", "llama_lce_forward", wrong_gradient),
    ],
)
def test_kernel_that_computes_something_else_fails_the_check(run_script, tmp_path, monkeypatch, flag, name, wrong):
    monkeypatch.setattr(monkey_patch, name, wrong)
    status, stdout, _ = run_script(*SMALL, *only_kernel(flag))
    assert status == 1
    assert stdout.count("DIFFERS") == 1
    (path,) = tmp_path.glob("results/*.json")
    assert [row["agrees"] for row in json.loads(path.read_text())["kernel_check"]] == [True, False]


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
    return fractions


def test_bf16_on_a_card_without_it_gives_status_2(run_script, old_card):
    status, _, stderr = run_script("--model_name", "tiny-llama")
    assert status == 2
    assert_one_error_line(stderr, "Old Card has no bf16")


def test_memory_limit_is_the_fraction_of_the_card(old_card):
    CudaRuntime(RunConfig(dtype="fp16", memory_limit_gib=6))
    assert old_card == [0.75]


def test_memory_limit_beyond_the_card_is_a_usage_error(old_card):
    with pytest.raises(UsageError, match=r"8\.0 GiB"):
        CudaRuntime(RunConfig(dtype="fp16", memory_limit_gib=8.5))
    assert old_card == []


def test_retries_are_counted_from_the_runs_beginning(old_card, monkeypatch, rng):
    counts = sorted(rng.sample(range(100), 2))
    readings = iter(counts)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": next(readings)})
    assert CudaRuntime(RunConfig(dtype="fp16")).allocation_retries() == counts[1] - counts[0]


@pytest.mark.parametrize(
    ("gpu", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("Tesla T4", None),
        (None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H200 NVL", None),
    ],
)
def test_peak_of_a_card_is_known_only_if_it_is_listed(gpu, flops):
    assert peak_flops(gpu, "bf16") == flops
