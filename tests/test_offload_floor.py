"""The floor of an offloaded step: its arithmetic, and the work it counts against a counter and counts by hand.

And the floor that a dry run states, at rates that are compared with what the committed records measured.
"""

import dataclasses
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deepspeed_liger_kernel as script
from doc import evidence
from src import machine
from src.measure import machine_rates
from src.measure.devices import HostRuntime
from src.model_utils import TORCH_DTYPES, build_model
from src.offload import floor
from src.offload.floor import floor_seconds, work
from src.offload.simulated import SimulatedRank
from src.offload.team import combined
from src.offload_config import OffloadConfig
from src.predict import calibrate
from src.predict.dry_run import predict
from src.predict.rates import FITTED, OffloadRates, load, save
from src.record.recorder import new_record
from src.record.report import report
from src.utils import UsageError
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


def test_weights_that_stay_on_the_gpu_have_no_floor(model):
    config = offloaded(ds_override='{"zero_optimization": {"offload_param": null}}')
    assert floor.of_run(model, config, None) == (None, None)


# The floor of a dry run

KNOWN = OffloadRates(
    source="by hand", cores=3, matmul_flops={"fp16": 1e30}, to_gpu_bytes=10, to_host_bytes=5, host_memory_bytes=20
)


def test_predicted_floor_is_work_by_hand_over_the_rates(model):
    found = floor.predicted(model, offloaded(dtype="fp16", gradient_accumulation_steps=3), KNOWN)
    trained = LAYERS + REST
    forward, backward, adam = 2 * trained / 10, 2 * trained / 5, 28 * trained / 20
    expected = {"forward_s": forward, "backward_s": backward, "adam_s": adam, "host_cores": 3}
    expected |= dict(zip(NAMES, (1e30, 10, 5, 20))) | {"floor_s": adam + backward + 2 * (forward + backward)}
    assert found == pytest.approx(expected)


ON_GPU = json.dumps({"zero_optimization": {"offload_param": None, "offload_optimizer": None}})


@pytest.mark.parametrize(
    ("rates", "fields"),
    [(None, {}), (KNOWN, {"dtype": "bf16"}), (KNOWN, {"world_size": 2}), (KNOWN, {"ds_override": ON_GPU})],
    ids=["no rates", "another dtype", "several GPUs", "not offloaded"],
)
def test_no_floor_is_predicted_where_it_is_not_known(model, rates, fields):
    assert floor.predicted(model, offloaded(**{"dtype": "fp16"} | fields), rates) is None


def test_dry_run_states_the_floor_apart_from_a_measured_one(model):
    config = offloaded(dtype="bf16", device="cuda", dry_run=True)
    record = new_record(config, "predicted", machine.environment(on_gpu=False))
    predict(config, script.build_experiment, simulate=SimulatedRank).fill(record)
    expected = floor.predicted(model, config, FITTED.offload)
    assert record.predicted_floor_s == pytest.approx(expected.pop("floor_s"))
    assert record.predicted_floor == pytest.approx(expected)
    assert record.predicted_floor_rates == FITTED.offload.source
    assert record.floor_s is record.floor is record.predicted_latency_s is None
    told = f"{record.predicted_floor_s * 1e3:,.1f} ms  a bound from below, not the step's time; rates: medians of"
    assert told in report(record).partition("Floor, predicted")[2]


def test_h100s_rates_are_the_medians_of_its_records():
    places = "h100_offload", "h100_scaling", "study/h100_offload"
    runs = [r for place in places for r in evidence.folder(place).records if r.floor and r.processes == 1]
    own = FITTED.offload
    assert {(r.environment.gpu, r.environment.cpu_count) for r in runs} == {(FITTED.gpu, own.cores)}
    assert f"medians of {len(runs)} floors" in own.source
    for name, rate in zip(NAMES[1:], (own.to_gpu_bytes, own.to_host_bytes, own.host_memory_bytes)):
        assert rate == pytest.approx(statistics.median(r.floor[name] for r in runs), rel=5e-3)
    assert own.matmul_flops.keys() == {r.run.dtype for r in runs}
    for dtype, rate in own.matmul_flops.items():
        measured = statistics.median(r.floor[NAMES[0]] for r in runs if r.run.dtype == dtype)
        assert rate == pytest.approx(measured, rel=5e-3)


def test_rate_is_of_the_shortest_of_several_runs(monkeypatch):
    durations, now = iter([3.0, 2.0, 5.0, 2.5, 4.0, 2.25, 3.0]), [0.0]
    monkeypatch.setattr(machine_rates, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work():
        now[0] += next(durations)

    assert machine_rates._best_seconds(work, HostRuntime()) == 2.0


@pytest.fixture
def timed(monkeypatch):
    """Small measurements on the CPU, each of which takes half a second by its clock."""
    monkeypatch.setattr(machine_rates, "WIDTH", 8)
    monkeypatch.setattr(machine_rates, "HOST_BYTES", 4096)
    monkeypatch.setattr(machine_rates, "_best_seconds", lambda work, runtime: (work(), 0.5)[1])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr("src.measure.devices.CudaRuntime", lambda config: HostRuntime())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "1")


@pytest.mark.usefixtures("timed")
def test_rates_of_a_floor_are_what_moves_over_the_time_it_takes():
    found = floor.measure_rates(torch.bfloat16, HostRuntime())
    assert found == dict(zip(NAMES, (2 * 8**3 / 0.5, 2048 / 0.5, 2048 / 0.5, 2 * 4096 / 0.5)))
    own = calibrate.offload_rates("Card")
    assert own == OffloadRates(
        source="measured on Card",
        cores=machine.usable_cores(),
        matmul_flops=dict.fromkeys(TORCH_DTYPES, found[NAMES[0]]),
        **{name.removesuffix("_per_s"): found[name] for name in NAMES[1:]},
    )


def test_file_keeps_the_rates_of_a_floor_and_an_older_one_has_none(tmp_path):
    file = tmp_path / "rates.json"
    save(FITTED, file)
    assert load(file) == FITTED
    values = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in values.items() if name != "offload"}))
    assert load(file) == dataclasses.replace(FITTED, offload=None)


@pytest.mark.parametrize(
    "absurd", [5, {"cores": -1}, {"to_gpu_bytes": 1e-300}, {"matmul_flops": {"fp8": 1e15}}, {"source": 5}], ids=str
)
def test_rates_of_a_floor_that_no_machine_has_are_told(tmp_path, absurd):
    file = tmp_path / "rates.json"
    values = dataclasses.asdict(FITTED)
    file.write_text(json.dumps(values | {"offload": absurd if absurd == 5 else values["offload"] | absurd}))
    with pytest.raises(UsageError, match="no file of rates"):
        load(file)
