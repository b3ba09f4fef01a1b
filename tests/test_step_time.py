"""The predicted time of a step: against counts made by hand, and against the steps that were measured on an H100."""

import dataclasses
import json
import statistics

import pytest
import torch
import triton
from torch.nn.functional import embedding, scaled_dot_product_attention

import all_gpu_liger_kernel as script
from doc import evidence
from src import machine
from src.machine import GPUS, H100, Gpu
from src.model_utils import load_model_config
from src.offload.simulated import one_gpu
from src.predict import calibrate
from src.predict.dry_run import predict
from src.predict.fake_gpu import FakeGpu
from src.predict.fake_machine import FakeMachine
from src.predict.rates import FITTED, rates_asked_for, save
from src.predict.step_time import step_time
from src.predict.work import NO_KERNEL, WAIT, Work, triton_work, work_of
from src.record.recorder import new_record
from src.record.report import report
from src.study.answers import REPEATS
from src.study.fit_rates import finished, is_large, rightly_ordered, setting
from src.utils import UsageError
from tests.helpers import ALL_KERNELS, HUGGING_FACE, tiny_config

TOKENS, WIDTH = 64, 32
BYTES = 2 * TOKENS * WIDTH  # of a tensor of that shape in 16 bits
PRODUCT = 2 * TOKENS * TOKENS * WIDTH  # FLOP of it with its transpose


def works_of(run):
    """What `run` asks of a GPU, given a tensor of TOKENS x WIDTH in 16 bits; views left out."""
    gpu = FakeGpu()
    with gpu.active():
        tensor = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        gpu.begin_counting()
        run(tensor)
        return [work for work in gpu.end_counting() if work is not NO_KERNEL]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dry run that takes a second, with all of Liger's kernels."""
    folders = {"result_dir": str(tmp_path_factory.mktemp("results")), "snapshot_dir": "", "log_dir": ""}
    return tiny_config(device="cuda", dtype="bf16", dry_run=True, batch_size=2, **ALL_KERNELS, **folders)


@pytest.fixture(scope="module")
def prediction(tiny):
    return predict(tiny, script.build_experiment)


def test_a_product_and_its_gradient_have_the_flops_and_bytes_of_two_products():
    def multiply(x):
        product = x @ x.detach().T
        product.backward(torch.ones_like(product))

    products = [w for w in works_of(multiply) if w.unit == "matmul"]
    moved = 2 * BYTES + 2 * TOKENS * TOKENS
    assert [(w.dtype, w.flops, w.moved_bytes) for w in products] == [(torch.bfloat16, PRODUCT, moved)] * 2


def test_causal_attention_has_half_the_flops_of_two_products_and_backwards_of_five():
    def attend(x):
        query = x.view(1, TOKENS, 4, WIDTH // 4).transpose(1, 2)
        scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    forward, backward = (w for w in works_of(attend) if w.unit.startswith("attention"))
    assert (forward.unit, backward.unit) == ("attention", "attention_backward")
    assert (forward.flops, backward.flops) == (PRODUCT, 5 * PRODUCT / 2)
    assert forward.moved_bytes >= 4 * BYTES  # query, key, value and output


@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (lambda x: x.T[:2], []),  # what only looks at it
        (lambda x: x + x, [3 * BYTES]),
        (lambda x: x.add_(x), [3 * BYTES]),
        (lambda x: x[:1].expand(TOKENS, WIDTH) + x, [2 * WIDTH + 2 * BYTES]),  # a row that is read again is cached
        (lambda x: torch.empty_like(x).copy_(x), [2 * BYTES]),
        (lambda x: torch.add(x, x, out=torch.empty_like(x)), [3 * BYTES]),
        (lambda x: x.zero_(), [BYTES]),
        (lambda x: embedding(torch.zeros(2, dtype=torch.int64, device="cuda"), x), [16, 2 * 2 * WIDTH]),
    ],
)
def test_operations_move_what_they_read_and_what_they_write(run, moved):
    with torch.no_grad():
        assert [work.moved_bytes for work in works_of(run)] == moved


def test_triton_kernels_move_what_their_source_loads_and_stores(tiny, prediction):
    shape, tokens = load_model_config(tiny), tiny.tokens_per_step
    launched = {work.operation: work.moved_bytes for work in prediction.works if work.unit == "triton"}
    gate = 2 * tokens * shape.intermediate_size
    assert launched["_swiglu_forward_kernel"] == 3 * gate
    assert launched["_swiglu_backward_kernel"] == 5 * gate  # both of its inputs become gradients, in place
    heads = 2 * tokens * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    assert (
        launched["_triton_rope"] == 2 * heads + 2 * 2 * tiny.seq_length * shape.head_dim
    )  # in place; cosines and sines


def test_gpu_waits_for_launches_and_the_cpu_waits_only_where_it_is_told_to():
    rates = dataclasses.replace(FITTED, memory_bytes=1.0, kernel_s=0.0, operation_s=1.0, triton_s=4.0)
    long, short, triton = Work("long", "memory", moved_bytes=10), Work("short", "memory"), Work("own", "triton")
    assert step_time([long, short, short], rates).seconds == 11  # launched while the GPU works
    assert step_time([long, WAIT, short, short], rates).seconds == 13  # launched when it is idle
    assert step_time([short, NO_KERNEL, triton], rates).seconds == 6
    assert [step_time(works, rates).bound for works in ([long], [triton, short])] == ["gpu", "launches"]
    assert step_time([long, triton, NO_KERNEL], rates.without_launches()).seconds == 10


def test_checkpointed_operations_keep_the_cpu_busy_for_longer(tiny, prediction):
    plain = predict(dataclasses.replace(tiny, gradient_checkpointing=False), script.build_experiment)
    assert not any(work.checkpointed for work in plain.works)
    own = [work for work in prediction.works if work.checkpointed]
    assert len(prediction.works) - len(plain.works) < len(own) < len(prediction.works)  # once, and computed again
    assert FITTED.cpu_seconds(own[0]) > FITTED.cpu_seconds(own[0]._replace(checkpointed=False))


@triton.jit
def _product_of_tiles(a, b):
    triton.language.dot(a, b)


@triton.jit
def _kernel_that_calls_it(a, b):
    _product_of_tiles(a, b)


def test_where_an_operation_may_do_anything_no_time_is_told():
    known, unknown = Work("known", "memory"), Work("product", "unknown")
    assert step_time([known, unknown], FITTED) is None
    assert triton_work(_kernel_that_calls_it, [], {}).unit == "unknown"
    scaled = torch.ops.aten._scaled_mm.default
    assert work_of(scaled, [torch.zeros(2, 2)] * 4, {}, torch.zeros(2, 2)).unit == "unknown"


def test_captured_step_has_no_launches_and_one_that_waits_for_copies_no_time(tiny):
    losses = {"flce": False, "loss": "chunked", "gradient_checkpointing": False}
    graph = predict(dataclasses.replace(tiny, cuda_graph=True, **losses), script.build_experiment).step_time
    assert (graph.cpu_s, graph.seconds) == (0, pytest.approx(graph.gpu_s))
    beside, waiting = (
        predict(dataclasses.replace(tiny, checkpoint_offload=how), script.build_experiment, simulate=one_gpu).step_time
        for how in ("overlapped", "blocking")
    )
    here = predict(tiny, script.build_experiment, simulate=one_gpu).step_time
    assert (beside.gpu_s, waiting) == (pytest.approx(here.gpu_s, rel=0.01), None)


def test_autocast_multiplies_in_16_bits_what_is_kept_in_32(tiny):
    mixed = dataclasses.replace(tiny, dtype="fp32", mixed_precision="bf16", **HUGGING_FACE)
    products = [work for work in predict(mixed, script.build_experiment).works if work.unit == "matmul"]
    in_16_bits = sum(work.flops for work in products if work.dtype is torch.bfloat16)
    assert in_16_bits > 0.95 * sum(work.flops for work in products)  # the rotary table is made in 32


def test_rates_twice_as_high_halve_the_time(prediction):
    flops = {f.name: 2 * getattr(FITTED, f.name) for f in dataclasses.fields(FITTED) if f.name.startswith("attention")}
    products = {dtype: 2 * rate for dtype, rate in FITTED.matmul_flops.items()}
    seconds = {name: getattr(FITTED, name) / 2 for name in ("kernel_s", "operation_s", "triton_s", "checkpointed_s")}
    twice = dataclasses.replace(FITTED, matmul_flops=products, memory_bytes=2 * FITTED.memory_bytes, **flops, **seconds)
    assert step_time(prediction.works, twice).seconds == pytest.approx(prediction.step_time.seconds / 2)


def test_the_record_keeps_the_prediction_apart_from_what_is_measured(tiny, prediction):
    record = new_record(tiny, "predicted", machine.environment(on_gpu=False))
    prediction.fill(record)
    assert record.predicted_latency_s == prediction.step_time.seconds
    assert (record.predicted_bound, record.predicted_rates) == ("launches", FITTED.source)
    assert record.latency_s is record.throughput_tokens_per_s is record.mfu is record.step_seconds is None
    assert f"{record.predicted_latency_s * 1e3:,.1f} ms" in report(record).partition("Latency, predicted")[2]


def test_a_step_of_which_the_host_does_a_part_is_not_counted():
    machine_with_host = FakeMachine()
    machine_with_host.begin_counting()
    assert machine_with_host.end_counting() is None


@pytest.fixture(scope="module")
def compared():
    """Measured runs of many tokens, each with the committed prediction of its step; by how they bear on the fit."""
    return {name: [c for c in own if is_large(c.run)] for name, own in evidence.timed().items()}


@pytest.mark.parametrize(
    ("group", "least"),
    [
        ("H100, fitted", 8),
        ("H100, held out", 8),
        ("H100, measured later", 8),
        ("H200, fitted", 8),
        ("H200, held out", 4),
    ],
)
def test_steps_of_many_tokens_that_the_gpu_bounds_are_predicted_also_those_that_nothing_was_fitted_to(
    compared, group, least
):
    errors = [abs(c.error) for c in compared[group] if c.is_close]
    assert len(errors) >= least
    assert statistics.median(errors) < 0.05
    assert max(errors) < 0.15


def test_what_was_measured_later_is_of_no_setting_that_was_fitted():
    places = (*evidence.FITTED_RUNS["h100"], "study/h100_single_gpu")  # of src/study/fit_rates.py's own example
    fitted = {setting(run) for place in places for run in finished(evidence.folder(place).records)}
    assert not fitted & {setting(c.run) for c in evidence.timed()["H100, measured later"]}


def test_steps_that_launches_bound_are_predicted_no_worse_than_the_same_run_repeats(compared):
    launched = [c for own in compared.values() for c in own if not c.is_close]
    assert len(launched) >= 3
    assert all(REPEATS[0] <= c.run.latency_s / c.predicted.seconds - 1 <= REPEATS[1] for c in launched)


def test_the_faster_of_two_settings_is_named(compared):
    named = [verdict for own in compared.values() for verdict in rightly_ordered(own)]
    assert len(named) > 50
    assert sum(named) / len(named) > 0.95


def test_committed_predictions_are_those_of_today():
    runs = finished(evidence.folder("h100_single_gpu").records)
    run = next(r for r in runs if r.run.model_name == "tiny-llama" and r.run.kernels)
    ((kept, _),) = evidence.predictions([run])
    assert predict(run.run, script.build_experiment).step_time.seconds == pytest.approx(kept.predicted_latency_s)


def test_another_gpus_rates_are_the_same_shares_of_its_data_sheet():
    other = GPUS["NVIDIA A100-SXM4-80GB"]
    rates = rates_asked_for(other.name, H100)
    assert rates.matmul_flops["bf16"] / FITTED.matmul_flops["bf16"] == pytest.approx(312 / 989.4)
    assert rates.memory_bytes / FITTED.memory_bytes == pytest.approx(2.039 / 3.35)
    assert "data sheet" in rates.source
    assert rates.offload is None  # it tells nothing of the machine around the GPU
    assert rates_asked_for(None, H100) is FITTED
    assert rates_asked_for(None, Gpu(other.name, (8, 0), 108)) == rates  # as PyTorch tells of it
    assert rates_asked_for(None, Gpu("another", (8, 0), 108)) is None


def test_rates_measured_here_are_those_that_a_dry_run_takes_from_the_file(tmp_path):
    rates = calibrate.measured_rates(calibrate.TINY, "cpu", "a CPU")
    assert min(*rates.matmul_flops.values(), rates.attention_flops, rates.memory_bytes, rates.operation_s) > 0
    save(rates, tmp_path / "rates.json")
    assert rates_asked_for(str(tmp_path / "rates.json"), H100) == rates


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"gpu": "x"}', '{"matmul_flops": 1}'])
def test_file_that_has_no_rates_is_told(tmp_path, text):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(UsageError, match="no file of rates"):
        rates_asked_for(str(tmp_path / "rates.json"), H100)


@pytest.mark.parametrize("absurd", [{"kernel_s": 1e-300}, {"memory_bytes": 1e400}, {"operation_s": -1}, {"source": 5}])
def test_rates_that_no_machine_has_are_told(tmp_path, absurd):
    (tmp_path / "rates.json").write_text(json.dumps(dataclasses.asdict(FITTED) | absurd))
    with pytest.raises(UsageError, match="no file of rates"):
        rates_asked_for(str(tmp_path / "rates.json"), H100)
