"""Two records side by side, as `python -m src.study compare` prints them."""

import json
import sys

import pytest
from hypothesis import given, settings

from src.offload_config import OffloadConfig
from src.record import KernelCheck, Parity, load_all
from src.study import __main__ as study
from src.study.compare import cautions, comparison
from src.utils import MIB
from tests.helpers import ROOT, assert_one_error_line, run_python
from tests.made_up import ALL, BAD, NO_FLCE, NONE, anything, failed, made_up, out_of_memory, predicted

PLACE = ROOT / "doc" / "data" / "h100_single_gpu"
PAIR = [PLACE / f"bs8_seq1024_rope{on}_silu{on}_rms{on}_flce{on}.json" for on in (False, True)]


def rows(text):
    """First words of each line -> the rest of its cells."""
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {line[0]: line[1:] for line in cells if line}


def told(a, b, times=None):
    return cautions(a, b, times or {})


@pytest.fixture
def compare(monkeypatch, capsys):
    def run(*files):
        monkeypatch.setattr(sys, "argv", ["study", "compare", *map(str, files)])
        return study.main(), *capsys.readouterr()

    return run


def test_two_records_stand_side_by_side(compare):
    status, stdout, stderr = compare(*PAIR)
    assert (status, stderr) == (0, "")
    a, b = (json.loads(path.read_text()) for path in PAIR)
    shown = rows(stdout)
    assert shown["kernels"] == [NONE, ALL]
    first, second = a["peak_memory_bytes"] / MIB, b["peak_memory_bytes"] / MIB
    peak = [f"{first:,.1f} MiB", f"{second:,.1f} MiB", f"{second - first:+,.1f} MiB", f"{second / first:.2f}"]
    assert shown["peak memory allocated"] == peak
    assert shown["step, median"][:2] == [f"{r['latency_s'] * 1e3:,.2f} ms" for r in (a, b)]
    assert shown["throughput"][2] == f"{b['throughput_tokens_per_s'] - a['throughput_tokens_per_s']:+,.0f} tokens/s"
    assert "flce" not in shown  # the kernels' names say it
    assert "dtype" not in shown  # the same


def test_memory_is_compared_by_category_and_what_was_not_measured_says_so():
    a = made_up(NONE, 4, peak_breakdown={"logits_and_loss": 3 * MIB, "mlp": MIB}, peak=4 * MIB)
    b = predicted(ALL, 4, peak_breakdown={"mlp": 2 * MIB}, peak=2 * MIB)
    shown = rows(comparison(a, b, "ab"))
    assert shown["logits and loss"] == ["3.0 MiB", "0.0 MiB", "-3.0 MiB"]
    assert shown["throughput"] == [f"{a.throughput_tokens_per_s:,.0f} tokens/s", "not measured"]
    assert rows(comparison(out_of_memory(NONE, 4), b, "ab"))["peak memory allocated"] == ["OOM", "2.0 MiB"]
    assert rows(comparison(failed(NONE, 4), b, "ab"))["peak memory allocated"] == ["failed", "2.0 MiB"]


def test_settings_of_one_script_alone_are_told_where_they_are_unusual():
    a, b = made_up(ALL, 8), made_up(ALL, 8, config=OffloadConfig, weight_decay=0.5)
    shown = rows(comparison(a, b, "ab"))
    assert shown["script"] == ["all_gpu", "deepspeed"]
    assert shown["weight_decay"] == ["-", "0.5"]
    assert "beta_0" not in shown


WRONG = {"gradient": 1.0, "loss": 1.0, "worst": 1.0, "worst_parameter": "x"}
PARITY = {"tokens": 8, "dtype": "bf16", "loss_scale": None, "reference_loss": 1.0, "run": WRONG, "hugging_face": WRONG}


@pytest.mark.parametrize(
    ("b", "text"),
    [
        (made_up(ALL, 4, gpu="NVIDIA X"), "not comparable in time, other machines: NVIDIA Imaginary 1000; NVIDIA X"),
        (made_up(ALL, 8), "not comparable in memory and time, other sizes"),
        (made_up(ALL, 2, 2048), "not comparable in memory and time, other lengths"),
        (
            made_up(ALL, 4, model_name="tiny-llama"),
            "not comparable, other models: meta-llama/Llama-3.2-1B-Instruct and",
        ),
        (predicted(ALL, 4), "not comparable in time: they were not measured alike"),
        (made_up(ALL, 4, mode="interpreted"), "B was checked on a CPU: nothing in it was timed"),
        (made_up(ALL, 4, parity=Parity(**PARITY, ratio=2.0, agrees=False)), "B †: its gradients are less exact"),
        (out_of_memory(ALL, 4), "B has no figures of its own: full"),
    ],
    ids=["machine", "size", "length", "model", "prediction", "interpreted", "parity", "oom"],
)
def test_what_cannot_be_compared_is_told(b, text):
    lines = [line for line in told(made_up(NONE, 4), b) if "one run each" not in line]
    assert [line for line in lines if line.startswith(text)], lines
    assert not [line for line in told(made_up(NONE, 4), made_up(ALL, 4)) if "one run each" not in line]


def test_spread_between_runs_is_told(compare, tmp_path):
    for folder, name, seconds in (("x", ALL, 0.2), ("x", NONE, 0.3), ("y", ALL, 0.25), ("y", NONE, 0.24)):
        (tmp_path / folder).mkdir(exist_ok=True)
        record = made_up(name, 4, seconds=[seconds])
        (tmp_path / folder / f"{record.run_name}.json").write_text(json.dumps(record.model_dump(by_alias=True)))
    names = {name: made_up(name, 4).run_name for name in (ALL, NONE)}
    _, stdout, _ = compare(tmp_path / "x" / f"{names[NONE]}.json", tmp_path / "y" / f"{names[ALL]}.json")
    assert "- A, ms a step: 2 runs: 240.0 to 300.0\n- B, ms a step: 2 runs: 200.0 to 250.0\n" in stdout
    assert "no difference in time is shown" in stdout
    _, stdout, _ = compare(tmp_path / "y" / f"{names[ALL]}.json", tmp_path / "x" / f"{names[NONE]}.json")
    assert "no difference in time is shown" in stdout
    _, stdout, _ = compare(*(tmp_path / folder / f"{names[ALL]}.json" for folder in "xy"))
    assert "the same experiment on the same machine" in stdout
    assert told(made_up(ALL, 4), made_up(NONE, 4))[-1].startswith("one run each: below 16,384 tokens a step")
    assert told(made_up(ALL, 16), made_up(NONE, 16)) == []


def test_terminal_obeys_no_text_of_a_record():
    bad = made_up(ALL, 4, status="error", gpu=BAD, error={"type": "x", "message": BAD}, peak_breakdown={BAD: 1})
    text = comparison(bad, made_up(NONE, 4, model_name=BAD, peak_breakdown={"mlp": 1}), (BAD, "b"))
    assert "\\x1b[31m" in text
    assert "\x1b" not in text


def test_file_that_is_no_record_is_one_line(compare, tmp_path):
    status, _, stderr = compare(PAIR[0], tmp_path / "x")
    assert status == 2
    assert_one_error_line(stderr, f"{tmp_path / 'x'} is not a record: ")


def test_comparing_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['compare', *sys.argv[1:]]; from src.study.__main__ import main; main()"
    done = run_python("-c", f"{code}; assert not {{'torch', 'matplotlib', 'pandas'}} & set(sys.modules)", *PAIR)
    assert (done.returncode, done.stderr) == (0, "")


@settings(max_examples=50)
@given(written=anything(2))
def test_any_two_records_are_compared(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    for i, values in enumerate(written):
        (folder / f"{i}.json").write_text(json.dumps(values))
    for a in (found := load_all([folder], lambda error: None)):
        for b in (*found, made_up(NO_FLCE, 4), CHECKED):
            text = comparison(a, b, "ab", found)
            assert "\x1b" not in text


CHECK = {"implementations": {}, "losses": [8.0], "loss_difference": 0.0, "gradient_difference": 0.0, "agrees": True}
CHECKED = made_up(ALL, 2, mode="interpreted", kernel_check=[KernelCheck(kernels=[], peak_memory_bytes=MIB, **CHECK)])
