"""The floor of an offloaded step: its arithmetic, and the work it counts against independent counts."""

import dataclasses

import pytest
import torch
from src.floor import floor_seconds, work
from src.runtime import HostRuntime
from torch.utils.flop_counter import FlopCounterMode

from src import floor, records
from src.config import PRESETS, OffloadConfig
from src.model_utils import SHAPES, build_model
from tests.helpers import HUGGING_FACE, write_llama_folder

CPU, META = torch.device("cpu"), torch.device("meta")
RATES = {
    "matmul_flops_per_s": 100.0,
    "to_gpu_bytes_per_s": 10.0,
    "to_host_bytes_per_s": 5.0,
    "host_memory_bytes_per_s": 20.0,
}
NO_BYTES = {"forward_to_gpu": 0, "backward_to_gpu": 0, "to_host": 0, "adam": 0}


def offloaded(**fields):
    usual = {"model_name": "tiny-llama", "batch_size": 2, "seq_length": 32, "device": "cpu", "attention": "eager"}
    return OffloadConfig(**{**usual, "strategy": HUGGING_FACE, **fields})


# Operations forward and backward, bytes, micro-batches, and the parts: forward, backward, Adam, all in seconds.
BY_HAND = {
    "multiplying": (300, 700, {}, 1, (3, 7, 0), 3 + 7),
    "weights cross for the forward pass": (300, 700, {"forward_to_gpu": 40}, 1, (4, 7, 0), 4 + 7),
    "weights cross for the backward pass": (300, 700, {"backward_to_gpu": 90}, 1, (3, 9, 0), 3 + 9),
    "gradients cross": (300, 700, {"to_host": 40, "backward_to_gpu": 70}, 1, (3, 8, 0), 3 + 8),
    "Adam behind the forward pass": (300, 700, {"adam": 40}, 1, (3, 7, 2), 3 + 7),
    "Adam longer than the forward pass": (300, 700, {"adam": 100}, 1, (3, 7, 5), 5 + 7),
    "three micro-batches": (300, 700, {}, 3, (3, 7, 0), 3 * (3 + 7)),
    "Adam behind the first of three": (300, 700, {"adam": 100}, 3, (3, 7, 5), 5 + 7 + 2 * (3 + 7)),
    "everything at once": (
        *(300, 700, {"forward_to_gpu": 40, "backward_to_gpu": 60, "to_host": 40, "adam": 90}, 2),
        *((4, 8, 4.5), 4.5 + 8 + 4 + 8),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_floor_is_what_one_works_out_by_hand(case):
    forward, backward, moved, micro, expected, total = BY_HAND[case]
    parts = floor_seconds(forward, backward, NO_BYTES | moved, RATES, micro)
    assert [parts[f"{name}_s"] for name in ("forward", "backward", "adam")] == list(expected)
    assert parts["floor_s"] == total


def test_faster_machine_has_no_higher_floor_and_more_work_no_lower(rng):
    for _ in range(200):
        flops = [rng.uniform(1, 1000) for _ in range(2)]
        moved = {name: rng.uniform(1, 100) for name in NO_BYTES}
        rates = {name: rng.uniform(1, 100) for name in RATES}
        micro = rng.randint(1, 4)
        base = floor_seconds(*flops, moved, rates, micro)["floor_s"]
        for name in RATES:
            assert floor_seconds(*flops, moved, rates | {name: 2 * rates[name]}, micro)["floor_s"] <= base
        for name in moved:
            assert floor_seconds(*flops, moved | {name: 2 * moved[name]}, rates, micro)["floor_s"] >= base
        assert floor_seconds(*flops, moved, rates, micro + 1)["floor_s"] > base


@pytest.mark.parametrize("gradient_checkpointing", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_operations_are_what_a_counter_counts(rng, tmp_path, gradient_checkpointing, tied):
    layers, heads, head_dim = 3, 4, 12
    config = offloaded(
        model_name=write_llama_folder(tmp_path, num_hidden_layers=layers, tie_word_embeddings=tied),
        batch_size=rng.randint(1, 4),
        seq_length=rng.randint(8, 40),
        gradient_checkpointing=gradient_checkpointing,
        dtype="fp32",
        gradient_accumulation_steps=rng.randint(1, 3),
        world_size=rng.randint(1, 3),
    )
    model = build_model(config, CPU)
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
    assert backward == counted_backward.get_total_flops() - (3 if gradient_checkpointing else 2) * masked


# By hand, of tiny-llama: a layer is 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256 + 2 * 64 weights, besides are 4097 * 64.
LAYERS, REST = 2 * 61_568, 262_208


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_bytes_are_what_one_works_out_by_hand(dtype, width):
    config = offloaded(dtype=dtype)
    moved = work(build_model(config, META), config)[2]
    assert moved == {
        "forward_to_gpu": width * (LAYERS + REST),
        "backward_to_gpu": width * LAYERS,
        "to_host": width * (LAYERS + REST),
        "adam": 28 * (LAYERS + REST),  # gradient and weight 2 or 4 bytes each, 3 states of 4 bytes read and written
    }


def test_adam_with_bf16_states_moves_half():
    config = offloaded(**PRESETS["fast"] | {"optimizer_states": "bf16"})
    assert work(build_model(config, META), config)[2]["adam"] == (2 + 3 * 4) * (LAYERS + REST)


@pytest.mark.parametrize("model_name", list(SHAPES))
def test_recomputation_adds_at_most_a_forward_pass(model_name):
    config = offloaded(model_name=model_name)
    model = build_model(config, META)
    forward, backward, _ = work(model, config)
    kept = work(model, dataclasses.replace(config, gradient_checkpointing=False))
    assert kept[:2] == (forward, 2 * forward)
    assert 2 * forward < backward < 3 * forward


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("machines", [1, 2])
def test_work_is_of_one_micro_batch_and_rank(monkeypatch, world_size, steps, machines):
    monkeypatch.setenv("LOCAL_SIZE", "1")
    config = offloaded()
    model = build_model(config, META)
    forward, backward, moved = work(model, config)
    several = dataclasses.replace(config, world_size=world_size, gradient_accumulation_steps=steps)
    monkeypatch.setenv("LOCAL_SIZE", str(world_size // machines))
    divided = {name: moved[name] / (machines if name == "adam" else world_size) for name in moved}
    assert work(model, several) == (pytest.approx(forward), pytest.approx(backward), pytest.approx(divided))


@pytest.mark.parametrize("field", ["batch_size", "seq_length"])
def test_more_tokens_are_more_operations_and_no_more_bytes(field):
    config = offloaded()
    model = build_model(config, META)
    forward, backward, moved = work(model, config)
    more = work(model, dataclasses.replace(config, **{field: 2 * getattr(config, field)}))
    assert more[2] == moved
    if field == "batch_size":
        assert more[:2] == (2 * forward, 2 * backward)
    else:  # attention grows with the square
        assert (2 * forward < more[0] < 4 * forward, 2 * backward < more[1] < 4 * backward) == (True, True)


@pytest.fixture
def ranks(monkeypatch):
    """Sets this rank's rates (None: the GPU is full), and the inverse rates or the absence of another rank."""

    def ranks(mine, other):
        def measure_rates(dtype, runtime):
            if mine is None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return dict(zip(RATES, mine))

        others = iter([None] if other is None else [0, *(1 / rate for rate in other)])

        def max_over_ranks(value):
            theirs = next(others)
            return None if None in (value, theirs) else max(value, theirs)

        monkeypatch.setattr(floor, "measure_rates", measure_rates)
        monkeypatch.setattr(floor, "max_over_ranks", max_over_ranks)

    return ranks


def test_floor_of_a_run_is_that_of_the_slowest_rank(ranks):
    config = offloaded(gradient_accumulation_steps=2)
    model = build_model(config, META)
    ranks((1e9, 4e6, 3e6, 9e7), (2e9, 2e6, 5e6, 8e7))
    slowest = dict(zip(RATES, (1e9, 2e6, 3e6, 8e7)))
    found = floor.of_run(model, config, HostRuntime())
    expected = floor_seconds(*work(model, config), slowest, 2)
    assert set(found) <= set(records.EMPTY)
    assert found["floor_s"] == pytest.approx(expected.pop("floor_s"))
    assert found["floor"] == pytest.approx(expected | slowest)


@pytest.mark.parametrize("full", ["mine", "other"])
def test_gpu_without_room_has_no_floor(ranks, full):
    rates = {"mine": (1, 1, 1, 1), "other": (1, 1, 1, 1)} | {full: None}
    ranks(**rates)
    config = offloaded()
    assert floor.of_run(build_model(config, META), config, HostRuntime()) == {}
