"""Predictions: against what a GPU measured, consistent in themselves, without side effects, and as a program."""

import dataclasses
import functools
import gc
import multiprocessing
import os
import pickle
import runpy
import socket
import sys
from dataclasses import dataclass

import liger_kernel.transformers
import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import all_gpu_liger_kernel as script
from src import model_utils, records
from src.allocator import SimulatedOutOfMemory, rounded
from src.config import MAX_TOKENS, OPTIMIZERS, STRATEGIES, RunConfig, Strategy
from src.dry_run import forecast, limit_bytes, predict
from src.explain.categories import CATEGORIES
from src.fake_gpu import H100
from src.model_utils import KERNELS, Kernel, build_model
from src.utils import GIB, MIB, UsageError
from tests.helpers import HUGGING_FACE, ROOT, SCRIPT, assert_one_error_line, run_watched, strategy_id
from tests.helpers import STRATEGIES as EACH_STRATEGY

LOGITS_BYTES_PER_TOKEN = 2 * 128256  # of Llama 3 in bf16


def load_evidence():
    """The records of single-GPU runs that were measured on the card that predictions are for."""
    loaded = [records.load(path) for path in sorted((ROOT / "doc" / "data").rglob("*.json"))]
    return [
        record
        for record in loaded
        if (record["script"], record["mode"]) == ("all_gpu", "measured") and record["environment"]["gpu"] == H100.name
    ]


EVIDENCE = load_evidence()


def measured(status):
    """Parametrises a test by the records of this status."""
    of_status = [record for record in EVIDENCE if record["status"] == status]
    return pytest.mark.parametrize("record", of_status, ids=[record["run_name"] for record in of_status])


@functools.cache
def predicted(config):
    """The prediction for `config`, made once."""
    return predict(config, script.build_experiment)


def predicted_in_worker(config):
    """The prediction without its GPU and model, which cannot be sent."""
    return dataclasses.replace(predict(config, script.build_experiment), gpu=None, experiment=None)


def simulated(record):
    """The configuration of a record's run without what bears on no prediction: many runs have the same."""
    config = RunConfig.from_dict(record["config"])
    usual = dict.fromkeys(("result_dir", "snapshot_dir", "log_dir"), "") | {"iterations": 1, "warmup": 1}
    return dataclasses.replace(config, **usual, memory_limit_gib=None)


@pytest.fixture(scope="module")
def of_record():
    """The prediction for a record's run; those of all records are made once, on all cores."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        configs = dict.fromkeys(simulated(record) for record in EVIDENCE if record["status"] == "ok")
        pending = {config: pool.apply_async(predicted_in_worker, [config]) for config in configs}
        yield lambda record: pending[simulated(record)].get(timeout=300)


def gpu_config(**fields):
    """A `RunConfig` as for the script on a GPU; the default is the study's."""
    return RunConfig(**{"device": "cuda", **fields})


def tiny(**fields):
    return gpu_config(**{"model_name": "tiny-llama", "batch_size": 2, "seq_length": 64, **fields})


def figures(prediction):
    """All that must be the same whenever it is predicted."""
    return prediction.phases, prediction.breakdown, prediction.peak_reserved_bytes, prediction.load_peak_bytes


def test_evidence_covers_the_study():
    assert sum(record["status"] == "ok" for record in EVIDENCE) >= 50
    assert sum(record["status"] == "oom" for record in EVIDENCE) >= 3
    ran = [RunConfig.from_dict(record["config"]) for record in EVIDENCE]
    assert {config.strategy for config in ran} >= set(STRATEGIES.values())
    assert {config.gradient_checkpointing for config in ran} == {False, True}
    assert {config.optimizer for config in ran} == set(OPTIMIZERS)


@measured("ok")
def test_prediction_is_what_the_gpu_measured(of_record, record):
    prediction = of_record(record)
    assert prediction.peak_bytes == pytest.approx(record["peak_memory_bytes"], rel=0.01)
    assert prediction.load_peak_bytes == pytest.approx(record["load_peak_bytes"], rel=0.01)
    assert prediction.phases.phase == record["peak_phase"]
    assert prediction.phases.peak_bytes == pytest.approx(record["phase_peak_bytes"], rel=0.01)
    assert prediction.implementations == record["implementations"]
    assert prediction.model_flops == record["model_flops_per_step"]
    # What stays cached depends on the order of requests, which no run repeats exactly.
    assert prediction.peak_reserved_bytes == pytest.approx(record["peak_reserved_bytes"], rel=0.1)


def test_predictions_are_within_a_tenth_of_a_percent_but_adafactors(of_record):
    errors = {
        record["run_name"]: of_record(record).peak_bytes / record["peak_memory_bytes"] - 1
        for record in EVIDENCE
        if record["status"] == "ok" and record["config"]["optimizer"] != "adafactor"
    }
    assert {name: error for name, error in errors.items() if abs(error) > 0.001} == {}


def limit_of(record):
    """What the run could reserve: its own limit, or the card less its CUDA context."""
    limit = limit_bytes(RunConfig.from_dict(record["config"]))
    return limit or record["environment"]["gpu_memory_bytes"] - H100.context_bytes


# In the prediction what this run reserves fills its limit to the last byte; on the GPU it was a little more.
ON_THE_EDGE = "bs96_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue_warmup2_limit24"


@measured("oom")
def test_what_ran_out_of_memory_does_in_the_prediction_at_the_same_request(record):
    if record["run_name"] == ON_THE_EDGE:
        prediction = predict(simulated(record), script.build_experiment, limit_bytes=limit_of(record))
        assert prediction.peak_reserved_bytes > limit_of(record) - MIB
        return
    config = RunConfig.from_dict(record["config"])
    with pytest.raises(SimulatedOutOfMemory) as caught:
        predict(config, script.build_experiment, limit_bytes=limit_of(record))
    facts, error = caught.value.facts, record["error"]
    # PyTorch tells the size of the segment, a multiple of 2 MiB.
    assert 0 <= error["requested_bytes"] - facts["requested_bytes"] < 2 * MIB
    assert facts["allocated_bytes"] == pytest.approx(error["allocated_bytes"], rel=0.01)
    assert facts["free_bytes"] == pytest.approx(error["free_bytes"], rel=0.01)


LIMITED = [record for record in EVIDENCE if record["status"] == "ok" and record["config"]["memory_limit_gib"]]
NEVER_MET = [record for record in LIMITED if record["allocation_retries"] == 0]
LIMITED = [record for record in LIMITED if record not in NEVER_MET]
FULLEST = sorted(EVIDENCE, key=lambda record: record["peak_reserved_bytes"] or 0)[-2:]


@pytest.mark.parametrize("record", LIMITED + FULLEST, ids=lambda record: record["run_name"])
def test_what_fitted_does_in_the_prediction(of_record, record):
    config, limit = RunConfig.from_dict(record["config"]), limit_of(record)
    prediction = predict(config, script.build_experiment, limit_bytes=limit)
    assert prediction.peak_bytes <= prediction.peak_reserved_bytes <= limit
    assert prediction.peak_bytes == of_record(record).peak_bytes


@pytest.mark.parametrize("record", NEVER_MET, ids=lambda record: record["run_name"])
def test_run_that_never_met_its_limit_reserves_less_in_the_prediction(of_record, record):
    assert of_record(record).peak_reserved_bytes <= limit_of(record)


@measured("ok")
def test_breakdown_sums_to_the_peak(of_record, record):
    prediction = of_record(record)
    assert list(prediction.breakdown) == list(CATEGORIES)
    assert sum(prediction.breakdown.values()) == prediction.peak_bytes
    assert min(prediction.breakdown.values()) >= 0


def parameter_bytes(config):
    """Of each parameter, what a request of its size takes."""
    return [rounded(p.nbytes) for p in build_model(config, torch.device("meta")).parameters()]


HUGGING_FACE_1B, LIGER_1B = gpu_config(strategy=HUGGING_FACE), gpu_config()


@pytest.mark.parametrize("config", [HUGGING_FACE_1B, LIGER_1B], ids=["hugging-face", "liger"])
def test_parameters_and_optimizer_state_at_the_peak(config):
    parts, parameters = predicted(config).breakdown, parameter_bytes(config)
    assert len(parameters) == 146
    assert parts["parameters"] == sum(parameters) + MIB  # the embedding's block is 1 MiB larger than its 501
    # Two moments and, for the fused AdamW, one number a parameter, a block of 512 bytes.
    assert parts["optimizer_state"] == pytest.approx(2 * sum(parameters) + 512 * len(parameters), abs=4 * MIB)


@pytest.mark.parametrize(
    ("optimizer", "copies", "numbers"),
    # adamw_loop keeps its step counts on the host; a dry run counts their 512 bytes each all the same.
    [("adamw_fused", 2, 1), ("adamw_loop", 2, 1), ("sgd", 0, 0)],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_parameters_and_optimizer_state_of_small_blocks_are_exact(optimizer, copies, numbers, dtype):
    config = tiny(optimizer=optimizer, dtype=dtype)
    parts, parameters = predicted(config).breakdown, parameter_bytes(config)
    assert parts["parameters"] == sum(parameters)
    assert parts["optimizer_state"] == copies * sum(parameters) + numbers * 512 * len(parameters)


def test_loss_peak_of_hugging_face_is_logits_and_checkpoints():
    parts = predicted(HUGGING_FACE_1B).breakdown
    tokens = HUGGING_FACE_1B.tokens_per_step
    assert parts["checkpoints"] == 16 * tokens * 2048 * 2  # one layer input of bf16 for each of 16 layers
    # 12 bytes a logit, where the logits themselves have 2: the loss is taken in fp32.
    assert parts["logits_and_loss"] == pytest.approx(6 * tokens * LOGITS_BYTES_PER_TOKEN, rel=0.01)
    assert parts["gradients"] == 0


def test_fused_loss_leaves_no_logits_at_the_peak():
    parts = predicted(LIGER_1B).breakdown
    assert parts["logits_and_loss"] < 0.001 * LIGER_1B.tokens_per_step * LOGITS_BYTES_PER_TOKEN
    assert parts["gradients"] > 0.9 * parts["parameters"]
    assert predicted(HUGGING_FACE_1B).peak_bytes - predicted(LIGER_1B).peak_bytes > 4 * 8192 * LOGITS_BYTES_PER_TOKEN


# Of 1B in bf16: bytes of one hidden state, of one of the MLP's inner tensors, and of what attention keeps in a layer
# (queries, keys and values of 32 and 8 heads, its result, and a number a row).
HIDDEN, INNER = 8192 * 2048 * 2, 8192 * 8192 * 2
ATTENTION = HIDDEN * 5 // 2 + 8192 * 32 * 4 + 2 * 512


@pytest.mark.parametrize(
    ("strategy", "inner", "norms", "hidden"),
    [
        (HUGGING_FACE, 64, 132, 0),  # four inner tensors a layer; the norm keeps its input in fp32
        (Strategy(), 49, 32, 32),  # three, and one that is being recomputed; the norm keeps its input as it is
    ],
    ids=["hugging-face", "liger"],
)
def test_without_checkpointing_every_layer_keeps_what_it_needs(strategy, inner, norms, hidden):
    parts = predicted(gpu_config(strategy=strategy, gradient_checkpointing=False)).breakdown
    assert parts["checkpoints"] == 0
    assert parts["attention"] == 16 * ATTENTION
    assert parts["mlp"] == inner * INNER
    assert parts["norm"] == pytest.approx(norms * HIDDEN, rel=0.001)
    assert parts["hidden_states"] == hidden * HIDDEN


WITH_BREAKDOWN = [
    record
    for record in map(records.load, sorted((ROOT / "doc" / "data").rglob("*.json")))
    if (record["script"], record["mode"]) == ("all_gpu", "measured") and record["peak_breakdown"]
]


@pytest.mark.parametrize("record", WITH_BREAKDOWN, ids=lambda record: record["run_name"])
def test_breakdown_is_what_the_gpus_snapshot_showed(record):
    parts, shown = predicted(RunConfig.from_dict(record["config"])).breakdown, record["peak_breakdown"]
    # A snapshot has what was asked for; a prediction counts what a block has beyond that as the block's.
    beyond = shown["allocator_rounding"]
    assert beyond < 0.001 * record["peak_memory_bytes"]
    assert {name: parts.get(name, 0) for name in shown} == pytest.approx(shown, abs=2 * MIB + beyond)


@measured("ok")
def test_every_category_of_the_peak_is_known(of_record, record):
    prediction = of_record(record)
    assert prediction.breakdown["unattributed"] < 0.03 * prediction.peak_bytes


def test_prediction_repeats_whatever_was_predicted_before():
    first = figures(predict(tiny(), script.build_experiment))
    assert figures(predict(tiny(), script.build_experiment)) == first
    predict(tiny(strategy=HUGGING_FACE, batch_size=5, dtype="fp32"), script.build_experiment)
    with pytest.raises(SimulatedOutOfMemory):
        predict(tiny(), script.build_experiment, limit_bytes=4 * MIB)
    assert figures(predict(tiny(), script.build_experiment)) == first
    assert figures(predict(LIGER_1B, script.build_experiment)) == figures(predicted(LIGER_1B))


def test_garbage_of_the_program_changes_no_prediction():
    first = figures(predict(tiny(strategy=HUGGING_FACE), script.build_experiment))
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        cycle = [torch.ones(1000)]
        cycle.append(cycle)
        del cycle
        assert figures(predict(tiny(strategy=HUGGING_FACE), script.build_experiment)) == first
    finally:
        gc.set_threshold(*thresholds)


@pytest.mark.parametrize("strategy", EACH_STRATEGY, ids=strategy_id)
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["keep", "recompute"])
def test_every_strategy_can_be_predicted(strategy, gradient_checkpointing):
    prediction = predicted(tiny(strategy=strategy, gradient_checkpointing=gradient_checkpointing))
    ran = prediction.implementations
    assert [name for name in KERNELS if ran[name].startswith("liger_kernel.")] == list(strategy.kernels)
    assert sum(prediction.breakdown.values()) == prediction.peak_bytes <= prediction.peak_reserved_bytes


@pytest.mark.parametrize(
    "fields",
    [
        *({"optimizer": name} for name in OPTIMIZERS),
        {"dtype": "fp16"},
        {"dtype": "fp32"},
        {"attention": "eager"},
        {"batch_size": 1, "seq_length": 2},
        {"model_name": "meta-llama/Llama-3.2-3B", "batch_size": 1, "seq_length": 3001},
    ],
    ids=str,
)
def test_every_setting_can_be_predicted(fields):
    prediction = predicted(tiny(**fields))
    assert sum(prediction.breakdown.values()) == prediction.peak_bytes <= prediction.peak_reserved_bytes
    assert prediction.load_peak_bytes < prediction.peak_bytes


def test_prediction_needs_no_network_no_gpu_and_no_weights(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("asked for the network, the GPU or weights")

    monkeypatch.setattr(socket, "socket", fail)
    monkeypatch.setattr(torch._C, "_cuda_init", fail, raising=False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    assert figures(predict(tiny(pretrained=True), script.build_experiment)) == figures(predicted(tiny()))
    assert not torch.cuda.is_initialized()


def patched_state():
    """Everything that a dry run replaces, and what it leaves running."""
    state = {f"modeling_llama.{name}": value for name, value in vars(modeling_llama).items()}
    for owner in (FakeTensor, JITFunction, InterpretedFunction, LlamaForCausalLM):
        state |= {f"{owner.__name__}.{name}": value for name, value in vars(owner).items()}
    for owner in (torch.nn.functional, torch.cuda, torch.cuda.amp.common, triton.runtime.autotuner.Autotuner):
        state |= {f"{owner.__name__}.{name}": value for name, value in vars(owner).items()}
    state["is_tracing"] = sys.modules["transformers.masking_utils"].is_tracing
    return state | {"modes": list(_get_current_dispatch_mode_stack()), "gc": gc.isenabled()}


def failing_build(config, runtime):
    raise ZeroDivisionError


def failing_step(config, runtime):
    experiment = script.build_experiment(config, runtime)

    def step(mark):
        experiment.step(mark)
        raise ZeroDivisionError

    return dataclasses.replace(experiment, step=step)


@pytest.mark.parametrize(
    ("build", "limit", "error"),
    [
        (script.build_experiment, None, None),
        (script.build_experiment, MIB, SimulatedOutOfMemory),
        (script.build_experiment, 66 * MIB, SimulatedOutOfMemory),
        (failing_build, None, ZeroDivisionError),
        (failing_step, None, ZeroDivisionError),
    ],
    ids=["good", "no-room-for-weights", "no-room-for-a-step", "failing-build", "failing-step"],
)
def test_everything_patched_is_restored(build, limit, error):
    predicted(tiny(strategy=Strategy()))  # what is imported at first use is imported
    before = patched_state()
    if error is None:
        predict(tiny(), build)
    else:
        with pytest.raises(error):
            predict(tiny(), build, limit_bytes=limit)
    after = patched_state()
    changed = [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)]
    assert [name for name in changed if name != "modes"] == []
    assert after["modes"] == before["modes"] == []
    assert after["gc"]
    plain = torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4))
    assert plain.device.type == "cpu"
    assert plain.sum().item() == 8.0


@pytest.mark.parametrize("held", ["from-the-start", "in-the-step"])
def test_step_and_build_are_the_scripts_own(held):
    def build(config, runtime):
        experiment = script.build_experiment(config, runtime)

        def extra():
            return torch.empty(64 * MIB, dtype=torch.uint8, device=runtime.device)

        kept = [extra()] if held == "from-the-start" else []

        def step(mark):
            kept_in_step = [] if kept else [extra()]
            loss = experiment.step(mark)
            del kept_in_step
            return loss

        return dataclasses.replace(experiment, step=step)

    prediction = predict(tiny(), build)
    assert prediction.peak_bytes == predicted(tiny()).peak_bytes + 64 * MIB
    assert sum(prediction.breakdown.values()) == prediction.peak_bytes


def test_forecast_shows_a_strategy_that_is_added_to_the_registry(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "Only RoPE", Strategy.only("rope"))
    table = forecast(tiny(), script.build_experiment, STRATEGIES).splitlines()
    assert all(name in table[0] for name in STRATEGIES)
    assert [line.split("  ")[0] for line in table[1:-2]] == [name.replace("_", " ") for name in CATEGORIES]
    (peaks,) = [line for line in table if line.startswith("peak memory")]
    expected = [predicted(tiny(strategy=strategy)).peak_bytes / MIB for strategy in STRATEGIES.values()]
    assert [float(value) for value in peaks.removeprefix("peak memory").replace("MiB", "").split()] == [
        pytest.approx(peak, abs=0.06) for peak in expected
    ]


@triton.jit
def doubling_kernel(x, n):
    """A kernel that is new to the study."""
    i = triton.language.program_id(0)
    triton.language.store(x + i, 2 * triton.language.load(x + i), mask=i < n)


@dataclass(frozen=True, kw_only=True)
class GrownStrategy(Strategy):
    """The study's kernels and a new one."""

    doubled_norm: bool = True


def test_new_kernel_in_the_registry_runs_dry_without_new_code(monkeypatch):
    launches, others = [], Strategy.only("rope", "swiglu", "flce")
    peak_without = predicted(tiny(strategy=others)).peak_bytes

    class DoubledNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            y = super().forward(x)
            launches.append(y.shape)
            doubling_kernel[(y.numel(),)](y, y.numel())
            return y

    def apply_liger(doubled_norm, **switches):
        apply_old(**switches)
        if doubled_norm:
            modeling_llama.LlamaRMSNorm = DoubledNorm

    apply_old = liger_kernel.transformers.apply_liger_kernel_to_llama
    monkeypatch.setattr(liger_kernel.transformers, "apply_liger_kernel_to_llama", apply_liger)
    kernel = Kernel("doubled_norm", lambda model: type(model.model.layers[0].input_layernorm))
    monkeypatch.setitem(model_utils.KERNELS, "doubled_norm", kernel)
    strategy = GrownStrategy(**dataclasses.asdict(others), doubled_norm=True)
    prediction = predict(tiny(strategy=strategy), script.build_experiment)
    assert prediction.implementations["doubled_norm"].endswith("DoubledNorm")
    assert set(launches) == {(2, 64, 64)}
    # It works in place, and nothing is computed: the peak is that of the code around it.
    assert prediction.peak_bytes == peak_without


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"gpu_memory_gib": 24}, 24 * GIB - H100.context_bytes),
        ({"memory_limit_gib": 24}, 24 * GIB),
        ({"memory_limit_gib": 24, "gpu_memory_gib": 24}, 24 * GIB - H100.context_bytes),
        ({"memory_limit_gib": 2.5, "gpu_memory_gib": 24}, int(2.5 * GIB)),
    ],
    ids=str,
)
def test_limit_is_the_smaller_of_the_card_without_its_context_and_the_cap(fields, limit):
    assert limit_bytes(gpu_config(**fields)) == limit


def test_card_that_is_smaller_than_its_context_is_a_usage_error():
    with pytest.raises(UsageError, match="--gpu_memory_gib"):
        limit_bytes(gpu_config(gpu_memory_gib=0.5))


@pytest.fixture
def run_script(monkeypatch, capfd, tmp_path):
    """Run the script in this process, in an empty folder: (exit status, stdout, stderr, record or None)."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--dry_run", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        paths = list(tmp_path.glob("results/*.json"))
        return stopped.value.code, *capfd.readouterr(), records.load(paths[0]) if paths else None

    return run


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--model_name nobody/nothing", "nobody/nothing"),
        ("--model_name nobody/nothing --pretrained", "nobody/nothing"),
        ("--gpu_memory_gib 0", "--gpu_memory_gib"),
        ("--gpu_memory_gib nan", "--gpu_memory_gib"),
        ("--gpu_memory_gib 0.5", "--gpu_memory_gib"),
        ("--attention flash_attention_2", "flash-attn"),
        ("--batch_size 2000000000", "--batch_size"),
        ("--batch_size 2147483648 --seq_length 131072 --enable_flce 0", "--batch_size"),
        ("--dtype fp16 --optimizer adamw_loop", "fp16"),
        ("--model_name tiny-llama --seq_length 2049", "2048 positions"),
        ("--snapshot_dir file/below", "--snapshot_dir"),
    ],
)
def test_bad_arguments_give_status_2_and_one_line(run_script, tmp_path, arguments, text):
    (tmp_path / "file").touch()
    status, _, stderr, record = run_script(*arguments.split())
    assert (status, record) == (2, None)
    assert_one_error_line(stderr, text)


def test_largest_step_that_can_be_asked_for_is_predicted():
    config = gpu_config(batch_size=MAX_TOKENS // 1024, strategy=HUGGING_FACE)
    assert predicted(config).peak_bytes > 6 * MAX_TOKENS * LOGITS_BYTES_PER_TOKEN


def test_card_that_is_large_enough_gives_status_0(run_script):
    status, stdout, _, record = run_script("--model_name", "tiny-llama", "--gpu_memory_gib", 4, "--snapshot_dir", "")
    assert (status, record["status"]) == (0, "ok")
    assert "Out of memory" not in stdout


@pytest.fixture
def run_program(tmp_path):
    """Run the dry run as a user does, with Triton's compiler: (process, record, its largest resident set in bytes)."""

    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done, resident = run_watched(SCRIPT, "--dry_run", *arguments, env=environment, cwd=tmp_path)
        assert done.stderr == ""
        (path,) = tmp_path.glob("results/*.json")
        return done, records.load(path), resident

    return run


MEASURED_ONLY = [
    *("step_seconds", "latency_s", "latency_iqr_s", "throughput_tokens_per_s", "mfu", "mfu_peak_flops"),
    *("losses", "loss", "grad_norm", "device_used_bytes"),
]


def test_program_predicts_and_leaves_record_and_snapshot(run_program, tmp_path):
    arguments = ["--model_name", "tiny-llama", "--batch_size", "2", "--seq_length", "128"]
    done, record, _ = run_program(*arguments)
    assert done.returncode == 0
    assert (record["status"], record["mode"], record["script"]) == ("ok", "predicted", "all_gpu")
    assert {key: record[key] for key in MEASURED_ONLY} == dict.fromkeys(MEASURED_ONLY)
    assert record["environment"]["gpu"] is None
    assert sum(record["peak_breakdown"].values()) == record["peak_memory_bytes"]
    assert record["peak_memory_bytes"] == max(record["phase_peak_bytes"].values())
    # Triton's interpreter, on in this process and off in that one, makes no difference.
    prediction = predicted(tiny(seq_length=128))
    assert record["peak_breakdown"] == prediction.breakdown
    assert record["peak_reserved_bytes"] == prediction.peak_reserved_bytes
    snapshot = tmp_path / "snap_shots" / f"{record['run_name']}.pickle"
    assert pickle.loads(snapshot.read_bytes())["device_traces"][0]
    for shown in (f"results/{record['run_name']}.json", f"snap_shots/{record['run_name']}.pickle", "At the peak:"):
        assert shown in done.stdout


def test_program_says_that_a_card_is_too_small_in_little_memory(run_program):
    done, record, resident = run_program("--gpu_memory_gib", "8")
    assert done.returncode == 3
    assert (record["status"], record["mode"]) == ("oom", "predicted")
    assert "Out of memory" in done.stdout
    assert record["peak_memory_bytes"] == predicted(LIGER_1B).peak_bytes
    assert record["error"]["requested_bytes"] > 0
    assert record["error"]["free_bytes"] + record["error"]["allocated_bytes"] == 8 * GIB - H100.context_bytes
    assert {key: record[key] for key in MEASURED_ONLY} == dict.fromkeys(MEASURED_ONLY)
    assert resident < 2 * GIB


def test_program_predicts_8b_in_little_memory(run_program):
    done, record, resident = run_program("--model_name", "meta-llama/Llama-3.1-8B-Instruct")
    assert (done.returncode, record["status"]) == (0, "ok")
    assert record["peak_memory_bytes"] > 4 * 2 * 8.03e9  # weights, gradients and AdamW's moments, almost
    assert resident < 2 * GIB
