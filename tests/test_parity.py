"""Parity: the fp16 fault of FLCE's mean is seen, the way out removes it, and what is wrong on purpose is marked."""

import dataclasses

import pytest
import torch
from liger_kernel.transformers import rms_norm

from src import cli, techniques
from src.check import curves, parity
from src.cli import command_line
from src.config import RunConfig
from src.offload_config import OffloadConfig
from src.record import WRONG, GradientError
from src.record.report import parity_table
from src.study.tables import runs_table
from tests.helpers import tiny_config, write_llama_folder
from tests.made_up import ALL, NONE, made_up

CPU = torch.device("cpu")


def compared(*configs):
    """The parity of each, on the CPU."""
    return [found for _, found in parity.compare(configs, CPU)]


def test_mean_underflows_in_fp16_and_the_sum_does_not(tmp_path):
    """Of 2048 words and 1024 tokens, 1 / (words x tokens) is 5e-7: eight of the steps in which fp16 ends."""
    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 4}
    model = write_llama_folder(tmp_path, max_position_embeddings=512, **sizes)
    config = tiny_config(model_name=model, batch_size=2, seq_length=512, dtype="fp16", flce=True, flce_chunks=64)
    chunked = dataclasses.replace(config, flce=False, loss="chunked", flce_chunks=1, loss_chunks=64)
    mean, total, plain = compared(config, dataclasses.replace(config, flce_reduction="sum"), chunked)
    assert not mean.agrees
    assert mean.ratio > 2
    assert mean.run.worst_parameter == "model.norm.weight"
    assert total.agrees
    assert total.ratio < 1.2
    assert plain.agrees
    assert plain.ratio < 1.2
    # The batch is the runs' own: Hugging Face's error is the same for both.
    assert mean.hugging_face == total.hugging_face


def test_kernel_made_wrong_on_purpose_is_marked(tmp_path, monkeypatch):
    forward = rms_norm.LigerRMSNorm.forward
    config = tiny_config(model_name=write_llama_folder(tmp_path), seq_length=8, rms_norm=True)
    assert compared(config)[0].agrees
    monkeypatch.setattr(rms_norm.LigerRMSNorm, "forward", lambda self, x: 1.01 * forward(self, x))
    found = compared(config)[0]
    assert not found.agrees
    assert "WRONG" in parity_table(found)
    record = made_up(ALL, 8, parity=found)
    assert record.title == f"{ALL} {WRONG}"
    row = runs_table([record])[1]
    assert (row[0], row[-1]) == (f"{ALL} {WRONG}", "" if found.ratio is None else f"{found.ratio:.2f}")


def test_huggings_faces_code_against_itself_has_its_own_error(tmp_path):
    found = compared(tiny_config(model_name=write_llama_folder(tmp_path), seq_length=8, dtype="fp16"))[0]
    assert found.run == found.hugging_face
    assert found.ratio == 1
    assert 0 < found.run.gradient < 0.01


@pytest.mark.parametrize(
    ("run", "theirs", "agrees"),
    [
        ((0.015, 0.02), (0.01, 0.02), True),
        ((0.0151, 0.02), (0.01, 0.02), False),
        ((0.01, 0.031), (0.01, 0.02), False),
        ((9e-5, 9e-5), (0.0, 0.0), True),  # another order of sums in fp32
        ((None, 0.01), (0.01, 0.02), False),
        ((0.01, 0.01), (None, None), True),
    ],
)
def test_verdict(run, theirs, agrees):
    errors = [
        GradientError(loss=0.0, gradient=whole, worst=worst, worst_parameter="") for whole, worst in (run, theirs)
    ]
    assert parity.agrees(*errors) == agrees


@pytest.mark.parametrize("defaults", [RunConfig(), OffloadConfig()], ids=lambda c: c.script)
def test_fp16_takes_the_sum_unless_the_originals_way_is_named(defaults, capsys):
    words = ["--dtype", "fp16", "--device", "cuda"]
    usual = command_line(None, defaults, {}, words).config
    assert usual.flce_reduction == "sum"
    assert techniques.forward_arguments(usual)["num_items_in_batch"] == usual.batch_size * (usual.seq_length - 1)
    cli.warn([usual])
    assert capsys.readouterr().err == ""
    named = command_line(None, defaults, {}, [*words, "--flce_reduction", "mean"]).config
    assert techniques.forward_arguments(named) == {}
    assert cli.run(lambda config, planned: 0, cli.Command(named, named)) == 0
    assert capsys.readouterr().err.startswith("warning: fp16 with FLCE's mean trains wrongly")
    assert usual.run_name != named.run_name
    assert command_line(None, defaults, {}, ["--dtype", "bf16", "--device", "cuda"]).config.flce_reduction == "mean"


def test_records_of_the_originals_fp16_are_marked():
    assert made_up(ALL, 4, config=OffloadConfig).trains_wrongly
    assert not made_up(ALL, 4, config=OffloadConfig, flce_reduction="sum").trains_wrongly
    assert not made_up(NONE, 4, config=OffloadConfig).trains_wrongly


def test_curve_is_compared_with_hugging_faces_in_its_dtype():
    lines = [("bf16, Hugging Face", 2.0), ("bf16, x", 2.5), ("fp16, Hugging Face", 3.0), ("fp16, x", 3.25)]
    found = [{"variant": name, "config": {"dtype": name[:4]}, "losses": [loss] * 30} for name, loss in lines]
    assert curves.last_above(found, "bf16, x") == 0.5
    assert curves.last_above(found, "fp16, x") == 0.25
    assert curves.smoothed([0.0, 2.0, 4.0]) == [0.0, 1.0, 2.0]
