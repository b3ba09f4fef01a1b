"""Parity: the fp16 fault of FLCE's mean is seen, the way out removes it, and what is wrong on purpose is marked."""

import json

import pytest
import torch

from src import techniques
from src.check import curves, parity
from src.check.convergence import VARIANTS
from src.cli import command_line
from src.config import RunConfig
from src.offload_config import OffloadConfig
from src.record import WRONG, GradientError, Parity
from src.record.report import parity_table
from src.study.tables import runs_table
from src.techniques import kernels_only
from tests.helpers import tiny_config, write_llama_folder
from tests.made_up import ALL, NONE, made_up

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small Llama and many tokens: 1 / (words x tokens) is 2e-7, four of the steps in which fp16 ends."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "head_dim": 4,
    }
    model = write_llama_folder(folder, **sizes)
    return {"model_name": model, "batch_size": 4, "seq_length": 512, "dtype": "fp16"}


def test_mean_underflows_in_fp16_and_the_sum_does_not(wide):
    config = tiny_config(**wide, **{"flce": True}, flce_chunks=1024)
    found = {
        reduction: parity.measure_parity(RunConfig(**config.to_dict() | {"flce_reduction": reduction}), CPU)
        for reduction in ("mean", "sum")
    }
    print({k: parity_table(v) for k, v in found.items()})
    assert not found["mean"].agrees
    assert found["sum"].agrees
    assert found["sum"].ratio < 1.2
