"""The floor of an offloaded step: its arithmetic, and the work it counts against a counter and counts by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from src.model_utils import build_model
from src.offload import floor
from src.offload.floor import floor_seconds, work
from src.offload.team import combined
from src.offload_config import OffloadConfig
from tests.helpers import HUGGING_FACE, write_llama_folder

NAMES = ("matmul_flops_per_s", "to_gpu_bytes_per_s", "to_host_bytes_per_s", "host_memory_bytes_per_s")
RATES = dict(zip(NAMES, (100.0, 10.0, 5.0, 20.0)))
NO_BYTES = {"forward_to_gpu": 0, "backward_to_gpu": 0, "to_host": 0, "adam": 0}

# Of 300 operations forward and 700 backward: bytes, micro-batches, seconds of forward, backward and Adam, and of all.
BY_HAND = {
    "multiplying": ({}, 1, (3, 7, 0), 3 + 7),
    "weights cross for the forward pass": ({"forward_to_gpu": 40}, 1, (4, 7, 0), 4 + 7),
    "weights cross for the backward pass": ({"backward_to_gpu": 90}, 1, (3, 9, 0), 3 + 9),
    "gradients cross": ({"to_host": 40, "backward_to_gpu": 70}, 1, (3, 8, 0), 3 + 8),
    "Adam behind the forward pass": ({"adam": 40}, 1, (3, 7, 2), 3 + 7),
    "Adam longer than the forward pass": ({"adam": 100}, 1, (3, 7, 5), 5 + 7),
    "Adam behind the first of three": ({"adam": 100}, 3, (3, 7, 5), 5 + 7 + 2 * (3 + 7)),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_floor_is_what_one_works_out_by_hand(case):
    moved, micro, (forward, backward, adam), total = BY_HAND[case]
    parts = floor_seconds(300, 700, NO_BYTES | moved, RATES, micro)
    assert parts == {"forward_s": forward, "backward_s": backward, "adam_s": adam, "floor_s": total}


def offloaded(**fields):
    usual = {"model_name": "tiny-llama", "batch_size": 2, "seq_length": 32, "device": "cpu", "attention": "eager"}
    return OffloadConfig(**{**usual, **HUGGING_FACE, **fields})


@pytest.mark.parametrize("gradient_checkpointing", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 5}, {"lora_rank": 5, "lora_targets": "attention"}], ids=str)
def test_operations_are_what_a_counter_counts(tmp_path, gradient_checkpointing, tied, lora):
    layers, heads, head_dim = 3, 4, 12
    config = offloaded(
        model_name=write_llama_folder(tmp_path, num_hidden_layers=layers, tie_word_embeddings=tied),
        batch_size=3,
        seq_length=25,
        gradient_checkpointing=gradient_checkpointing,
        dtype="fp32",
        gradient_accumulation_steps=2,
        world_size=3,
        **lora,
    )
    model = build_model(config, torch.device("cpu"))
    ids = torch.randint(199, (config.batch_size, config.seq_length))
    with FlopCounterMode(display=False) as counted_forward:
        loss = model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as counted_backward:
        loss.backward()
    # "eager" multiplies the masked half of attention's two products, too; and the angles are an outer product.
    masked = layers * 2 * config.batch_size * heads * config.seq_length**2 * head_dim
    angles = config.seq_length * head_dim
    forward, backward, _ = work(model, config)
    assert forward == counted_forward.get_total_flops() - masked - angles
    counted = counted_backward.get_total_flops() - (3 if gradient_checkpointing else 2) * masked
    if lora and not gradient_checkpointing:
        # Behind the first layer's inputs nothing is trained: the products that read them give no gradient for them.
        first = [p for name, p in model.model.layers[0].self_attn.named_parameters() if name[0] in "qkv"]
        counted += 2 * ids.numel() * sum(p.numel() for p in first if p.shape[1] == 48)
    assert backward == counted


# By hand, of tiny-llama: a layer is 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256 + 2 * 64 weights, besides are 4097 * 64.
LAYERS, REST = 2 * 61_568, 262_208


@pytest.fixture(scope="module")
def model():
    return build_model(offloaded(), torch.device("meta"))


def test_bytes_are_what_one_works_out_by_hand(model):
    for dtype, states, width, update in (("fp16", "fp32", 2, 28), ("fp32", "fp32", 4, 28), ("bf16", "bf16", 2, 14)):
        assert work(model, offloaded(dtype=dtype, optimizer_states=states))[2] == {
            "forward_to_gpu": width * (LAYERS + REST),
            "backward_to_gpu": width * LAYERS,
            "to_host": width * (LAYERS + REST),
            "adam": update * (LAYERS + REST),  # gradient, weight, and three states read and written
        }


def test_frozen_weights_cross_to_the_gpu_alone():
    adapters = 2 * 5 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 256))
    config = offloaded(dtype="bf16", lora_rank=5)
    moved = work(build_model(config, torch.device("meta")), config)[2]
    assert moved["forward_to_gpu"] == 2 * (LAYERS + adapters + REST)
    assert moved["backward_to_gpu"] == 2 * (LAYERS + adapters)
    assert (moved["to_host"], moved["adam"]) == (2 * adapters, 28 * adapters)


def test_work_is_of_one_micro_batch_and_rank_but_adams_of_the_machine(model, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    forward, backward, moved = work(model, offloaded())
    monkeypatch.setenv("LOCAL_SIZE", "2")
    several = work(model, offloaded(world_size=4, gradient_accumulation_steps=3))
    divided = {name: moved[name] / (2 if name == "adam" else 4) for name in moved}
    assert several == (pytest.approx(forward), pytest.approx(backward), pytest.approx(divided))


@pytest.mark.parametrize("full", [None, "mine", "other"])
def test_floor_of_a_run_is_that_of_the_slowest_rank_or_none_if_one_is_full(model, monkeypatch, full):
    mine, other = dict(zip(RATES, (1e9, 4e6, 3e6, 9e7))), dict(zip(RATES, (2e9, 2e6, 5e6, 8e7)))
    theirs = iter([None if full == "other" else 0, *(1 / rate for rate in other.values())])

    def measure_rates(dtype, runtime):
        if full == "mine":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return mine

    monkeypatch.setattr(floor, "measure_rates", measure_rates)
    monkeypatch.setattr(floor, "largest", lambda own: combined(max, [[own], [next(theirs)]])[0])
    config = offloaded(gradient_accumulation_steps=2)
    seconds, parts = floor.of_run(model, config, SimpleNamespace(release_cache=lambda: None))
    if full:
        assert (seconds, parts) == (None, None)
    else:
        slowest = {name: min(mine[name], other[name]) for name in RATES}
        expected = floor_seconds(*work(model, config), slowest, 2)
        assert seconds == pytest.approx(expected.pop("floor_s"))
        assert parts == pytest.approx(expected | slowest)
