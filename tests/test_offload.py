"""The ZeRO-3 offload experiment end to end on DeepSpeed's CPU accelerator, against a plain PyTorch loop.

One program per number of ranks builds all engines, one after the other (tests/offload_driver.py); a few tests start the
scripts themselves. The first run on a machine compiles two CPU optimizers: some minutes.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig, get_scheduler

import deepspeed_liger_kernel as script
from src import records
from src.cli import parse_config
from src.config import SCHEDULERS, OffloadConfig, config_of
from src.ds_utils import zero3_config
from src.model_utils import build_model, parameter_counts
from tests.helpers import ROOT, assert_one_error_line, run_python, write_llama_folder

SCRIPT = ROOT / "deepspeed_liger_kernel.py"
KERNELS = ("rope", "swiglu", "rms", "flce")
KERNELS_OFF = [word for name in KERNELS for word in (f"--enable_liger_{name}", "0")]
QUIET = ["--log_dir=", "--snapshot_dir=", "--device", "cpu"]
ENVIRONMENT = os.environ | {
    "DS_ACCELERATOR": "cpu",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}
PRESET_NAMES = ("seed", "fast")
PRESETS = pytest.mark.parametrize("preset", PRESET_NAMES)
OURS = "overlapped_cpu_adam"

# Sizes that neither 2 nor 4 ranks divide: their partitions are padded.
SHAPE = {"vocab_size": 499, "hidden_size": 30, "head_dim": 6, "intermediate_size": 77, "num_hidden_layers": 3}
SMALL = ["--preset", "fast", "--max_seq_len", 32, "--per_device_train_batch_size", 1, *KERNELS_OFF]
SHAPE |= {"num_attention_heads": 5, "num_key_value_heads": 1}
LAYERS, (LAYER, REST) = 3, parameter_counts(LlamaConfig(**SHAPE, tie_word_embeddings=True))
SEQ_LENGTH, GLOBAL_BATCH, STEPS = 32, 4, 3


def case(line="", **options):
    """A case of the driver: the flags of `line` after those that all share."""
    shared = ["--model_name", "{model}", "--max_seq_len", str(SEQ_LENGTH), *KERNELS_OFF, *QUIET]
    return {"args": [*shared, *line.split()], **options}


# What must not change what is computed. Weights are compared after the last step.
VARIANTS = {
    "as it is": "",
    "2 micro-batches": "--gradient_accumulation_steps 2",
    "4 micro-batches": "--gradient_accumulation_steps 4",
    "no checkpointing": "--gradient_checkpointing 0",
    "no clipping": "--gradient_clipping 0",
    "a weight at a time": "--fetch_layers 0 --sub_group_size 0 --reduce_bucket_size 1",
    "everything at a time": "--sub_group_size 1e9 --reduce_bucket_size 1e9",
    "layers fetched ahead": "--fetch_layers 1 --prefetch_layers 2",
    "other settings of Adam": "--beta_0 0.5 --beta_1 0.7 --weight_decay 0.5 --learning_rate 3e-3",
    "persistent parameters": '--ds_override {"zero_optimization":{"stage3_param_persistence_threshold":1000}}',
}


def reference_case(preset, variant, ranks, **options):
    line = f"--preset {preset} {VARIANTS[variant]}"
    micro = int(line.rpartition("--gradient_accumulation_steps ")[2]) if "micro" in variant else 1
    line += f" --per_device_train_batch_size {GLOBAL_BATCH // ranks // micro}"
    return case(line, **{"steps": STEPS, "late_s": 0.02 if preset == "fast" else 0, **options})


REFERENCES = {
    1: [(preset, variant) for preset in PRESET_NAMES for variant in VARIANTS],
    2: [(preset, variant) for preset in PRESET_NAMES for variant in VARIANTS if variant != "4 micro-batches"],
    4: [(preset, "as it is") for preset in PRESET_NAMES],
}

LIGER = {"rope": "rope", "swiglu": "swiglu", "rms": "rms_norm", "flce": "flce"}  # flag -> part of the model

# Flags -> what the engine then has.
FLAGS = {
    "--learning_rate 3e-3": {"lr": 3e-3},
    "--weight_decay 0.3": {"weight_decay": 0.3},
    "--beta_0 0.8": {"betas": (0.8, 0.95)},
    "--beta_1 0.99": {"betas": (0.9, 0.99)},
    "--gradient_clipping 0.3": {"clip": 0.3},
    "--gradient_clipping 0": {"clip": 0},
    "--sub_group_size 0": {"sub_groups": 9 * LAYERS + 2},
    "--sub_group_size 1e9": {"sub_groups": 1},
    "--reduce_bucket_size 12345": {"bucket": 12345},
    "--fetch_layers 0": {"leaves": 0},
    "--fetch_layers 1": {"leaves": LAYERS},
    "--fetch_layers": {"leaves": LAYERS},
    "--prefetch_layers 0": {"prefetch": 0},
    "--prefetch_layers 2": {"prefetch": 2 * LAYER, "live": REST + 4 * LAYER},
    '--ds_override {"zero_optimization":{"sub_group_size":1000000000},"steps_per_print":7}': {
        "sub_groups": 1,
        "print": 7,
        "clip": 0.9,
    },
    '--ds_override {"gradient_clipping":null}': {"clip": 1},  # DeepSpeed's default
    "--step_per_print 3": {"print": 3},
    "--gradient_accumulation_steps 3": {"accumulation": 3},
    "--gradient_checkpointing 0": {"checkpointing": False},
    "--gradient_checkpointing 1": {"checkpointing": True},
    "--gradient_checkpointing": {"checkpointing": True},
    "--attention eager": {"attention": "eager"},
    "--attention sdpa": {"attention": "sdpa"},
    "--optimizer deepspeed_cpu_adam": {"optimizer": "DeepSpeedCPUAdam", "zero": "DeepSpeedZeroOptimizer_Stage3"},
    f"--optimizer {OURS}": {"optimizer": "FusedCpuAdam", "zero": "OverlappedZero3"},
    f"--optimizer {OURS} --cpu_threads 3": {"threads": 3},
    "--dtype bf16": {"weight_dtypes": {"torch.bfloat16"}, "master_dtypes": {"torch.float32"}},
    "--dtype fp32": {"weight_dtypes": {"torch.float32"}, "master_dtypes": {"torch.float32"}},
    "--dtype bf16 --optimizer_states bf16": {"master_dtypes": {"torch.bfloat16"}},
}
FLAGS |= {f"--enable_{form}{flag} 1": {"liger": {part}} for flag, part in LIGER.items() for form in ("liger_", "")}

# A preset's own settings, without flags; and the defaults of both.
DEFAULTS = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "clip": 0.9, "checkpointing": True, "print": 10}
DEFAULTS |= {"accumulation": 1, "liger": set(), "attention": "sdpa", "weight_dtypes": {"torch.float32"}}
OF_PRESET = {
    "seed": {"optimizer": "DeepSpeedCPUAdam", "bucket": 1e5, "sub_groups": 9 * LAYERS + 2, "leaves": 0, "prefetch": 0},
    "fast": {"optimizer": "FusedCpuAdam", "bucket": LAYER, "sub_groups": LAYERS + 2, "leaves": LAYERS},
}
OF_PRESET["fast"] |= {"prefetch": LAYER}

# With betas of 0, no decay and no clipping, Adam moves a weight by the learning rate: steps show the rate in use.
MOVES_BY_RATE = "--beta_0 0 --beta_1 0 --weight_decay 0 --gradient_clipping 0 --warmup 1 --num_train_iterations 4"
SCHEDULES = [(name, warmup) for name in SCHEDULERS for warmup in (0, 2)]

CLIPPINGS = (0, 0.01, 100)

# (dtype, optimizer_states)
PRECISIONS = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
LONG = "--learning_rate 1e-3 --lr_scheduler_type constant"

BAD_ARGUMENTS = {
    "negative clipping": ("--gradient_clipping -1", "--gradient_clipping"),
    "no micro-batch": ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
    "batch of none": ("--per_device_train_batch_size 0", "--per_device_train_batch_size"),
    "beta of one": ("--beta_0 1", "--beta_0"),
    "ours in fp16": ("--preset fast --dtype fp16", "bf16"),
    "fp16 on a CPU": ("--preset seed --dtype fp16", "fp16"),
    "16-bit states of 32-bit weights": ("--optimizer_states bf16", "--optimizer_states"),
    "malformed override": ("--ds_override {", "--ds_override"),
    "override of another type": ("--ds_override []", "--ds_override"),
    "override that DeepSpeed refuses": ('--ds_override {"zero_optimization":{"stage":7}}', "stage"),
    "unknown model": ("--model_name nobody/nothing", "nobody/nothing"),
    "sequence beyond the model's": ("--max_seq_len 257", "256 positions"),
    "attention that is not installed": ("--is_flash_attn", "flash-attn"),
    "no GPU": ("--device cuda", "no CUDA GPU"),
    "limit without a GPU": ("--memory_limit_gib 4", "--memory_limit_gib"),
    "unwritable results": ("--result_dir {folder}/cases.json/below", "--result_dir"),
    "too little host memory": ("", "GiB of host memory"),
}
MISTYPED = ["--preset slow", "--optimizer sgd", "--lr_scheduler_type up", "--fetch_layers 2", "--no_such_flag"]

# Runs of a sweep after the first: another batch, another length, and the first's sizes again under another name.
KEPT = ["--per_device_train_batch_size 3", "--max_seq_len 48", "--num_train_iterations 3", "--max_seq_len 257"]


def one_rank_cases():
    cases = {("reference", *of): reference_case(*of, ranks=1) for of in REFERENCES[1]}
    cases["late"] = reference_case("fast", "as it is", ranks=1, late_s=0.1)
    cases["each"] = reference_case("fast", "as it is", ranks=1, each=True)
    for preset in PRESET_NAMES:
        cases["preset", preset] = case(f"--preset {preset}", steps=0)
        cases |= {("flags", preset, line): case(f"--preset {preset} {line}", steps=0) for line in FLAGS}
        cases["seed", preset] = case(f"--preset {preset} --seed 7", steps=1)
        cases["tiny", preset] = case(f"--preset {preset} --model_name tiny-llama", steps=1)
        for of in SCHEDULES:
            line = f"--preset {preset} {MOVES_BY_RATE} --lr_scheduler_type {of[0]} --num_warmup_steps {of[1]}"
            cases["schedule", preset, *of] = case(line, steps=6, each=True)
        for norm in CLIPPINGS:
            cases["clipping", preset, norm] = case(f"--preset {preset} --gradient_clipping {norm}", steps=1)
        for dtype, states in PRECISIONS:
            line = f"--preset {preset} {LONG} --dtype {dtype} --optimizer_states {states}"
            cases["precision", preset, dtype, states] = case(line, steps=15)
    for i, (name, (line, _)) in enumerate(BAD_ARGUMENTS.items()):
        cases["bad", name] = case(f"--result_dir {{folder}}/bad/{i} {line}")
    cases["bad", "too little host memory"]["free_gib"] = 0.1
    cases |= {("mistyped", line): case(line) for line in MISTYPED}
    cases["main"] = case(
        "--preset fast --gradient_accumulation_steps 2 --num_train_iterations 3 --warmup 2 "
        "--result_dir {folder}/main --log_dir {folder}/logs"
    )
    cases["shortest"] = case("--num_train_iterations 1 --warmup 0 --result_dir {folder}/shortest")
    for preset in PRESET_NAMES:
        line = f"--preset {preset} --num_train_iterations 2 --warmup 1 --result_dir {{folder}}/kept_{preset}"
        cases["kept", preset] = case(line, then=KEPT)
        cases["not kept", preset] = case(line.replace("kept", "not_kept"))
    failure = {"rank": 0, "marker": "{folder}/marker"}
    cases["oom"] = case("--preset fast --result_dir {folder}/oom", fails=failure)
    return cases


def free_port():
    """A port for a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(ranks, *arguments, **kwargs):
    """Run a program of several ranks under DeepSpeed's launcher."""
    command = [shutil.which("deepspeed", path=ENVIRONMENT["PATH"]), "--num_gpus", ranks, "--no_local_rank"]
    settings = {"env": ENVIRONMENT, "cwd": ROOT, "capture_output": True, "text": True}
    command += ["--log_level", "error", "--master_port", free_port(), *arguments]
    return subprocess.run([str(word) for word in command], **{**settings, **kwargs})


class Driver:
    """The driver's cases, run in one job; results by name."""

    def __init__(self, folder, cases, ranks, **kwargs):
        self.folder = folder
        model = write_llama_folder(folder / "model", **SHAPE)
        # JSON has no tuples as keys.
        text = json.dumps({repr(name): case for name, case in cases.items()})
        (folder / "cases.json").write_text(text.replace("{model}", model).replace("{folder}", str(folder)))
        arguments = ["tests.offload_driver", folder / "cases.json", folder / "results.pt"]
        if ranks == 1:
            self.done = run_python("-m", *arguments, env=ENVIRONMENT)
        else:
            self.done = launched(ranks, "--module", *arguments, **kwargs)
        assert self.done.returncode == 0, self.done.stderr
        self.results = torch.load(folder / "results.pt")

    def __getitem__(self, name):
        result = self.results[repr(name)]
        assert "error" not in result, result["error"]
        return SimpleNamespace(**result)

    def record(self, name):
        """The one record in a folder of this job's."""
        (path,) = (self.folder / name).glob("*.json")
        return records.load(path)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return Driver(tmp_path_factory.mktemp("one"), one_rank_cases(), ranks=1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    cases = {("reference", *of): reference_case(*of, ranks=2) for of in REFERENCES[2]}
    cases["late"] = reference_case("fast", "2 micro-batches", ranks=2, late_s=0.1)
    for preset in PRESET_NAMES:
        cases["preset", preset] = case(f"--preset {preset}", steps=0)
    cases["main"] = case("--result_dir {folder}/results{rank} --log_dir {folder}/logs{rank}")
    return Driver(tmp_path_factory.mktemp("two"), cases, ranks=2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    cases = {("reference", *of): reference_case(*of, ranks=4) for of in REFERENCES[4]}
    return Driver(tmp_path_factory.mktemp("four"), cases, ranks=4)


def parameter_vector(weights):
    return torch.cat([p.flatten() for p in weights.values()])


def plain_pytorch(result, steps=STEPS):
    """What the engine should have done, by the single-GPU experiment's model and PyTorch's own AdamW and clipping."""
    config = OffloadConfig.from_dict(result.config)
    model = build_model(config, torch.device("cpu"))
    for name, p in model.named_parameters():
        p.data.copy_(result.weights[0][name])
    tokens = torch.randint(
        SHAPE["vocab_size"], (GLOBAL_BATCH, SEQ_LENGTH), generator=torch.Generator().manual_seed(config.seed)
    )
    settings = {"lr": config.learning_rate, "betas": (config.beta_0, config.beta_1)}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, **settings)
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.num_warmup_steps, config.warmup + config.iterations + 1
    )
    losses, norms = [], []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping or math.inf).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return SimpleNamespace(tokens=tokens, losses=losses, norms=norms, weights=weights)


def assert_trained_as(result, expected):
    """Losses, norms and weights agree within what fp32 rounds, in sums of other orders."""
    assert result.losses == pytest.approx(expected.losses, rel=2e-6)
    assert result.norms == pytest.approx(expected.norms, rel=5e-5)
    first, last, wanted = map(parameter_vector, (result.weights[0], result.weights[-1], expected.weights))
    error = ((last - wanted).norm() / (wanted - first).norm()).item()
    assert error < 1e-3, f"weights moved {error:.1e} off"


@pytest.mark.parametrize(
    ("ranks", "preset", "variant"), [(ranks, *of) for ranks, runs in REFERENCES.items() for of in runs]
)
def test_trains_as_plain_pytorch_does(request, ranks, preset, variant):
    result = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[ranks])[
        "reference", preset, variant
    ]
    expected = plain_pytorch(result)
    assert torch.equal(result.inputs, expected.tokens[: GLOBAL_BATCH // ranks])
    assert_trained_as(result, expected)


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_weights_do_not_depend_on_the_number_of_ranks(request, one_rank, ranks, preset):
    of = "reference", preset, "as it is"
    several = request.getfixturevalue(ranks)[of]
    assert torch.equal(parameter_vector(several.weights[0]), parameter_vector(one_rank[of].weights[0]))


@PRESETS
def test_first_loss_is_that_of_a_guess(one_rank, preset):
    assert one_rank["tiny", preset].losses[0] == pytest.approx(math.log(4096), rel=0.02)


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_next_forward_pass_waits_for_late_updates(request, ranks):
    result = request.getfixturevalue(ranks)["late"]
    assert_trained_as(result, plain_pytorch(result))
    assert result.pending[0] > 1
    assert result.pending[1] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_overlapped_updates_make_the_weights_that_deepspeeds_do(one_rank, variant):
    seed, fast = (one_rank["reference", preset, variant] for preset in PRESET_NAMES)
    assert_trained_as(fast, SimpleNamespace(losses=seed.losses, norms=seed.norms, weights=seed.weights[-1]))


def test_weights_can_be_read_after_every_step(one_rank):
    each, last = one_rank["each"], one_rank["reference", "fast", "as it is"]
    assert len(each.weights) == STEPS + 2
    assert torch.equal(parameter_vector(each.weights[STEPS]), parameter_vector(last.weights[-1]))


def all_facts(result):
    liger = {name for name, part in result.facts["implementations"].items() if part.startswith("liger_kernel.")}
    return result.facts | result.facts["group"] | {"liger": liger}


@PRESETS
@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_preset_reaches_the_engine(request, ranks, preset):
    wanted = DEFAULTS | OF_PRESET[preset]
    shown = all_facts(request.getfixturevalue(ranks)["preset", preset])
    assert {name: shown[name] for name in wanted} == wanted


@PRESETS
@pytest.mark.parametrize("flags", FLAGS)
def test_flag_reaches_the_engine(one_rank, preset, flags):
    shown, wanted = all_facts(one_rank["flags", preset, flags]), FLAGS[flags]
    assert {name: shown[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--fp16_loss_scale_window 50", "loss_scale_window", 50),
        ("--fp16_initial_scale_power 5", "initial_scale_power", 5),
        ("--fp16_hysteresis 3", "hysteresis", 3),
    ],
)
def test_loss_scaling_reaches_deepspeeds_configuration(monkeypatch, flag, key, value):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--dtype", "fp16", *flag.split()])
    config = parse_config(None, script.DEFAULTS, cpu_defaults=script.CPU_DEFAULTS)
    fp16 = zero3_config(config, LlamaConfig(**SHAPE))["fp16"]
    assert (fp16["enabled"], fp16[key]) == (True, value)


@PRESETS
def test_seed_chooses_weights_and_tokens(one_rank, preset):
    one, other = one_rank["reference", preset, "as it is"], one_rank["seed", preset]
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(SHAPE["vocab_size"], tuple(other.inputs.shape), generator=generator)
    assert torch.equal(other.inputs, tokens)
    assert not torch.equal(other.inputs, one.inputs[: len(tokens)])
    for name, p in other.weights[0].items():
        assert "norm" in name or not torch.isclose(p, one.weights[0][name]).all(), name


@PRESETS
@pytest.mark.parametrize(("name", "warmup"), SCHEDULES)
def test_learning_rate_follows_its_schedule(one_rank, preset, name, warmup):
    result = one_rank["schedule", preset, name, warmup]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=result.config["learning_rate"])
    scheduler = get_scheduler(name, optimizer, warmup, 6)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    after = [parameter_vector(weights) for weights in result.weights[:7]]
    moved = [(after[i + 1] - after[i]).abs().max().item() for i in range(6)]
    assert result.lrs == pytest.approx(rates)
    assert moved == pytest.approx(rates, rel=2e-3, abs=1.2e-7)  # weights of 1 are as coarse


@PRESETS
@pytest.mark.parametrize("largest", CLIPPINGS)
def test_gradient_clipping_limits_what_adam_sees(one_rank, preset, largest):
    result = one_rank["clipping", preset, largest]
    (norm,) = result.norms
    assert norm > 0.1
    seen = result.moments.norm().item() / (1 - result.config["beta_0"])
    assert seen == pytest.approx(min(norm, largest or math.inf), rel=1e-3)


@PRESETS
@pytest.mark.parametrize(("dtype", "states"), PRECISIONS)
def test_every_precision_trains(one_rank, preset, dtype, states):
    result = one_rank["precision", preset, dtype, states]
    exact = one_rank["precision", preset, "fp32", "fp32"].losses
    assert result.state_dtypes == {{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[states]}
    assert result.losses == pytest.approx(exact, rel=0.03)
    assert exact[-1] < exact[0] - 0.5
    assert (exact[0] - result.losses[-1]) == pytest.approx(exact[0] - exact[-1], rel=0.1)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_give_status_2_one_line_and_no_record(one_rank, case):
    result, text = one_rank["bad", case], BAD_ARGUMENTS[case][1]
    assert_one_error_line(result.stderr, text)
    assert result.status == 2
    assert result.steps == 0
    assert not list(one_rank.folder.glob(f"bad/{list(BAD_ARGUMENTS).index(case)}/*.json"))


@pytest.mark.parametrize("line", MISTYPED)
def test_mistyped_arguments_give_status_2_and_the_usage(one_rank, line):
    result = one_rank["mistyped", line]
    assert result.status == 2
    assert result.stderr.startswith("usage: ")
    assert f"{SCRIPT.name}: error: " in result.stderr.splitlines()[-1]


def test_record_of_a_run_without_gpu(one_rank):
    result, record = one_rank["main"], one_rank.record("main")
    assert (result.status, result.stderr) == (0, "")
    assert (record["status"], record["mode"], record["script"]) == ("ok", "interpreted", "deepspeed")
    for key in ("peak_memory_bytes", "throughput_tokens_per_s", "latency_s", "step_seconds", "mfu", "floor_s"):
        assert record[key] is None, key
    assert len(record["losses"]) == 3
    assert all(map(math.isfinite, [*record["losses"], record["grad_norm"], record["loss"]]))
    assert record["host_peak_bytes"] > 2**28
    wanted = {"preset": "fast", "world_size": 1, "device": "cpu", "dtype": "fp32", "gradient_accumulation_steps": 2}
    assert {name: record["config"][name] for name in wanted} == wanted
    assert not [part for part in record["implementations"].values() if part.startswith("liger_kernel.")]
    assert f"{record['loss']:.4f}" in result.stdout
    for path in ((one_rank.folder / "main" / f"{record['run_name']}.json"), one_rank.folder / "logs"):
        assert str(path) in result.stdout


def test_tokens_and_operations_count_every_micro_batch(one_rank):
    twice, once = one_rank.record("main"), one_rank.record("shortest")
    assert config_of(once).tokens_per_step == 2 * SEQ_LENGTH
    assert config_of(twice).tokens_per_step == 4 * SEQ_LENGTH
    assert twice["model_flops_per_step"] == 2 * once["model_flops_per_step"]


def test_steps_are_the_warm_up_the_timed_and_one_more(one_rank):
    assert one_rank["main"].steps == 2 + 3 + 1 + 1  # and the one of the trace
    assert one_rank["shortest"].steps == 0 + 1 + 1
    assert len(one_rank.record("shortest")["losses"]) == 1


def test_logs_and_trace_are_left_where_asked_for(one_rank):
    folder = one_rank.folder / "logs" / one_rank.record("main")["run_name"]
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert (folder / "step.pt.trace.json").stat().st_size > 0


def test_out_of_memory_is_a_result(one_rank):
    result, record = one_rank["oom"], one_rank.record("oom")
    assert result.status == 3
    assert record["status"] == "oom"
    assert record["error"]["message"] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert (record["losses"], result.stderr) == (None, "")
    assert "Out of memory" in result.stdout


@PRESETS
def test_runs_of_a_sweep_share_an_engine_and_go_on_with_its_weights(one_rank, preset):
    result = one_rank["kept", preset]
    assert result.engines == 1
    found = sorted(records.load_all([one_rank.folder / f"kept_{preset}"]), key=lambda r: r["environment"]["date"])
    found.sort(key=lambda record: record["steps_before"])
    assert [record["steps_before"] for record in found] == [0, 4, 8, 12]  # each warms up, is timed, and does one more
    first, batch, length, again = found
    assert (batch["config"]["batch_size"], length["config"]["seq_length"]) == (3, 48)
    for record in found:
        assert (record["status"], record["skipped_steps"]) == ("ok", 0)
        assert len(record["losses"]) == record["config"]["iterations"]
        assert all(5 < loss < 8 for loss in record["losses"])  # ln 499 is 6.2
        # What is the process's own was not this run's.
        assert (record["host_peak_bytes"] is None) == (record is not first)
    assert batch["model_flops_per_step"] * 2 == first["model_flops_per_step"] * 3
    # The first is as any other; the last trains on its tokens again.
    (fresh,) = records.load_all([one_rank.folder / f"not_kept_{preset}"])
    for name in ("losses", "grad_norm", "steps_before", "implementations"):
        assert first[name] == fresh[name]
    assert again["losses"][0] < first["losses"][-1]
    # A length that the model cannot take is refused although there is an engine.
    assert result.status == 2
    assert_one_error_line(result.stderr, "256 positions")


def test_only_rank_0_writes_and_prints(two_ranks):
    first, second = two_ranks["main"].ranks
    assert (first["status"], second["status"]) == (0, 0)
    assert first["stdout"].count("Gradient norm") == 1
    assert (second["stdout"], second["stderr"]) == ("", "")
    assert {path.suffix for path in two_ranks.folder.glob("results0/*")} == {".json", ".txt"}
    assert len(list(two_ranks.folder.glob("logs0/*/*"))) == 2
    assert not [path for name in ("results1", "logs1") for path in two_ranks.folder.glob(f"{name}/**/*")]


@pytest.fixture(scope="module")
def launched_script(tmp_path_factory):
    """The script under DeepSpeed's launcher with 2 ranks: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("script")
    arguments = ["--preset", "fast", "--max_seq_len", SEQ_LENGTH, "--per_device_train_batch_size", 1, *KERNELS_OFF]
    arguments += ["--gradient_accumulation_steps", 2, "--warmup", 0, "--num_train_iterations", 3, *QUIET]
    model = write_llama_folder(folder / "model", **SHAPE)
    arguments += ["--step_per_print", 3]
    return launched(2, SCRIPT, "--model_name", model, *arguments, "--result_dir", folder / "results"), folder


def test_launched_script_writes_one_record_and_prints_once(launched_script):
    done, folder = launched_script
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for text in ("step=3, skipped=0", "No GPU in use", "Gradient norm", "Host memory peak", "ZeRO-3 offload", "record"):
        assert len([line for line in lines if text in line]) == 1, text
    assert len(set(lines)) == len(lines)
    assert sorted(path.suffix for path in folder.glob("results/*")) == [".json", ".txt"]


def test_launched_script_trains_as_one_process_does(launched_script, one_rank):
    (path,) = launched_script[1].glob("results/*.json")
    assert_trained_as_one_process(records.load(path), one_rank)


def assert_trained_as_one_process(record, one_rank):
    """The record of two processes, against PyTorch on the weights and tokens of one."""
    assert (record["config"]["world_size"], config_of(record).tokens_per_step) == (2, GLOBAL_BATCH * SEQ_LENGTH)
    # One step more than the losses has the gradient norm; both runs have schedules of 4 steps.
    same = one_rank["reference", "fast", "as it is"]
    expected = plain_pytorch(same, steps=STEPS + 1)
    assert record["losses"] == pytest.approx(expected.losses[:STEPS], rel=1e-5)
    assert record["grad_norm"] == pytest.approx(expected.norms[STEPS], rel=1e-4)


def shell_script(*arguments, folder, before=(), **variables):
    """run_ds.sh as on a machine without a GPU, started from elsewhere."""
    environment = {
        name: value for name, value in ENVIRONMENT.items() if name not in ("TRITON_INTERPRET", "DS_ACCELERATOR")
    }
    command = [*before, "bash", ROOT / "run_ds.sh", *map(str, arguments)]
    environment |= {"MASTER_PORT": str(free_port() if not before else 29500), **variables}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_shell_script_runs_every_kernel_without_gpu(tmp_path):
    arguments = ["--warmup", 0, "--log_dir=", "--snapshot_dir=", "--result_dir", tmp_path / "results"]
    done = shell_script(*arguments, folder=tmp_path, MAX_SEQ_LENGTH="32", NUM_TRAIN_ITERATIONS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No GPU in use") == 1
    assert "rope, swiglu, rms_norm, flce" in done.stdout
    (path,) = tmp_path.glob("results/*.json")
    record = records.load(path)
    ran = {name for name, part in record["implementations"].items() if part.startswith("liger_kernel.")}
    assert ran == set(LIGER.values())
    assert (record["config"]["preset"], record["config"]["model_name"]) == ("seed", "tiny-llama")
    assert record["loss"] == pytest.approx(math.log(4096), rel=0.02)


def test_shell_script_passes_bad_arguments_status_on(tmp_path):
    done = shell_script("--is_flash_attn", folder=tmp_path)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def processes_of(job):
    """Programs that were started with this job's mark in their environment."""
    return [process.info["cmdline"] for process in job_processes(job)]


def job_processes(job):
    """Those processes."""
    found = psutil.process_iter(["environ", "status", "cmdline"])
    mine = [process for process in found if (process.info["environ"] or {}).get("OFFLOAD_TEST_JOB") == job]
    return [process for process in mine if process.info["status"] != psutil.STATUS_ZOMBIE]


def test_rank_out_of_memory_ends_the_job_and_leaves_the_record(tmp_path):
    failure = {"rank": 1, "marker": str(tmp_path / "marker")}
    line = "--preset fast --num_train_iterations 100000 --result_dir {folder}/results"
    text = json.dumps({"main": case(line, fails=failure, limit_s=100)}).replace("{folder}", str(tmp_path))
    (tmp_path / "cases.json").write_text(text.replace("{model}", write_llama_folder(tmp_path / "model", **SHAPE)))
    job = uuid.uuid4().hex
    arguments = ["tests.offload_driver", tmp_path / "cases.json", tmp_path / "results.pt"]
    done = launched(2, "--module", *arguments, env=ENVIRONMENT | {"OFFLOAD_TEST_JOB": job})
    assert time.time() - (tmp_path / "marker").stat().st_mtime < 60
    assert done.returncode == 3
    assert processes_of(job) == []
    (record,) = (records.load(path) for path in tmp_path.glob("results/*.json"))
    assert (record["status"], record["config"]["world_size"]) == ("oom", 2)


# Several machines


@pytest.mark.parametrize(
    ("lines", "variables", "text"),
    [
        (None, {}, "is no file"),
        ("", {}, "names no machine"),
        ("# a slots=8\n\n", {}, "names no machine"),
        ("a\n", {}, "not 'a'"),
        ("a slots=8\nb slots=0\n", {}, "not 'b slots=0'"),
        ("a slots=many", {}, "not 'a slots=many'"),
        ("a slots=8 slots=2\n", {}, "not 'a slots=8 slots=2'"),
        ("a slots=8\nb slots=8\n\ta slots=2", {}, "a is there twice"),
        ("a slots=8\nb slots=2", {"NUM_GPUS": "4"}, "b slots=2"),
        ("a slots=8", {"NUM_GPUS": "0"}, "NUM_GPUS must be"),
        ("a slots=8 # a comment\r\nb slots=8\r\n", {"NODE_RANK": "2", "MASTER_ADDR": "a"}, "from 0 to 1"),
        ("a slots=8", {"NODE_RANK": "0"}, "needs MASTER_ADDR"),
        ("nobody.invalid slots=8", {}, "NODE_RANK and MASTER_ADDR"),  # no ssh, or no pdsh
    ],
)
def test_bad_hostfile_is_one_line_and_starts_nothing(tmp_path, lines, variables, text):
    if lines is not None:
        (tmp_path / "hosts").write_text(lines)
    done = shell_script(folder=tmp_path, HOSTFILE="hosts", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_error_line(done.stderr, text)


@pytest.mark.parametrize("variables", [{"NUM_GPUS": "two"}, {"NUM_GPUS": "0"}, {"NODE_RANK": "1"}], ids=str)
def test_bad_variables_of_the_shell_script_are_one_line(tmp_path, variables):
    done = shell_script(folder=tmp_path, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_error_line(done.stderr, next(iter(variables)))


@pytest.fixture
def two_machines():
    """Two network namespaces of this machine, joined by a cable: (name, interface, address) of each."""
    mark = uuid.uuid4().hex[:8]
    ends = [(f"machine{i}-{mark}", f"v{i}-{mark}", f"10.77.0.{i + 1}") for i in range(2)]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no ip")
    try:
        for name, _, _ in ends:
            ip("netns", "add", name)
        (one, interface, _), (other, peer, _) = ends
        ip("link", "add", interface, "netns", one, "type", "veth", "peer", "name", peer, "netns", other)
        for name, interface, address in ends:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for device in ("lo", interface):
                ip("-n", name, "link", "set", device, "up")
        yield ends
    finally:
        for name, _, _ in ends:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # and its end of the cable with it


def test_two_machines_train_as_one_process_does(two_machines, tmp_path, one_rank):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    model, started = write_llama_folder(tmp_path / "model", **SHAPE), []
    arguments = ["--preset", "fast", *KERNELS_OFF, *QUIET, "--model_name", model, "--warmup", "0"]
    variables = {"HOSTFILE": "hosts", "MASTER_ADDR": two_machines[0][2], "NUM_TRAIN_ITERATIONS": str(STEPS)}
    variables |= {"MAX_SEQ_LENGTH": str(SEQ_LENGTH), "PER_DEVICE_TRAIN_BATCH_SIZE": str(GLOBAL_BATCH // 2)}
    with ThreadPoolExecutor() as pool:
        for i, (name, interface, _) in enumerate(two_machines):
            # Gloo looks for an interface by the machine's name, which these share; NCCL looks at the interfaces.
            own = {"NODE_RANK": str(i), "GLOO_SOCKET_IFNAME": interface}
            words = [*arguments, "--result_dir", tmp_path / f"results{i}"]
            inside = ["ip", "netns", "exec", name]
            started.append(pool.submit(shell_script, *words, folder=tmp_path, before=inside, **variables, **own))
    first, second = (launch.result() for launch in started)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    assert not (tmp_path / "results1").exists()
    (path,) = tmp_path.glob("results0/*.json")
    assert_trained_as_one_process(records.load(path), one_rank)
