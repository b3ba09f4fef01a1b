"""The offloaded experiment before it runs: its configuration, flags, presets, DeepSpeed's settings and host memory."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from src.random_data import micro_batches
from transformers import LlamaForCausalLM

import deepspeed_liger_kernel as script
from src import ds_utils
from src.cli import parse_config
from src.config import (
    DTYPES,
    OFFLOAD_OPTIMIZERS,
    PRESETS,
    SCHEDULERS,
    STATES,
    OffloadConfig,
    RunConfig,
    Strategy,
    UsageError,
    config_of,
    make_parser,
)
from src.ds_utils import (
    _merged,
    check_host_memory,
    host_bytes_needed,
    max_over_ranks,
    over_ranks,
    phases_over_ranks,
    sum_over_ranks,
    zero3_config,
)
from src.measure import Measurement, PhasePeaks
from src.model_utils import SHAPES, build_model, load_model_config, parameter_counts
from src.optimizer_utils import build_scheduler
from src.utils import GIB
from tests.helpers import HUGGING_FACE, ROOT

CPU, META = torch.device("cpu"), torch.device("meta")
FAST = PRESETS["fast"]
FIELDS = [f.name for f in dataclasses.fields(OffloadConfig) if f.name != "strategy"]
KERNELS = [f.name for f in dataclasses.fields(Strategy)]
NOT_IN_NAME = {"result_dir", "snapshot_dir", "log_dir", "debug", "step_per_print"}


def settings_of(config, **fields):
    config = dataclasses.replace(config, **fields)
    shape = load_model_config(dataclasses.replace(config, pretrained=False))  # not the Hub's
    return zero3_config(config, shape)


def tiny(**fields):
    return OffloadConfig(**{"model_name": "tiny-llama", "seq_length": 64, **fields})


def fast(**fields):
    return tiny(**{"preset": "fast", **FAST, **fields})


def counts(model_name):
    return parameter_counts(load_model_config(OffloadConfig(model_name=model_name)))


@pytest.fixture
def parse(monkeypatch):
    """What a command line gives, on a GPU unless it says otherwise."""

    def parse(*arguments, defaults=script.DEFAULTS):
        device = () if "--device" in arguments else ("--device", "cuda")
        monkeypatch.setattr(sys, "argv", ["script.py", *device, *map(str, arguments)])
        return parse_config(None, defaults, cpu_defaults=script.CPU_DEFAULTS)

    return parse


@pytest.fixture
def refused(parse, capsys):
    """The one line that a command line is refused with, status 2."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            parse(*arguments)
        assert stopped.value.code == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        return stderr

    return refused


def random_value(f, rng):
    """A valid value for a field."""
    if choices := f.metadata["argparse"].get("choices"):
        return rng.choice(list(choices))
    if isinstance(f.default, bool):
        return rng.random() < 0.5
    drawn = {
        "model_name": lambda: rng.choice(list(SHAPES)),
        "ds_override": lambda: rng.choice(["{}", '{"steps_per_print": 3}', '{"fp16": {"auto_cast": null}}']),
        "reduce_bucket_size": lambda: rng.choice([None, 1.0, 1e5, 5e8, rng.randint(1, 2**40)]),
        "sub_group_size": lambda: rng.choice([None, 0, 1e9, rng.randint(0, 2**40)]),
        "memory_limit_gib": lambda: rng.choice([None, 12.5]),
        "cpu_threads": lambda: rng.choice([None, 1, 13]),
        "beta_0": rng.random,
        "beta_1": rng.random,
        "fp16_initial_scale_power": lambda: rng.randint(0, 32),
        "seq_length": lambda: rng.randint(2, 2048),
    }
    if f.name in drawn:
        return drawn[f.name]()
    if isinstance(f.default, int):
        return rng.randint(1, 12)
    return rng.choice([1e-5, 0.1 + 0.2, rng.random()]) if isinstance(f.default, float) else rng.choice(["x", f.default])


def random_config(rng):
    """A valid configuration in which each field is at its default or drawn."""
    without_flag = {"dry_run", "gpu_memory_gib", "find_max"}
    while True:
        fields = [f for f in dataclasses.fields(OffloadConfig) if f.name not in {"strategy", *without_flag}]
        values = {f.name: random_value(f, rng) for f in fields if rng.random() < 0.5}
        values |= {name: rng.random() < 0.5 for name in KERNELS}
        with contextlib.suppress(UsageError):  # of conflicts, see below
            return OffloadConfig.from_dict(values)


# DeepSpeed's configuration


def test_settings_follow_from_the_configuration_alone(rng):
    for _ in range(200):
        config = random_config(rng)
        settings = settings_of(config)
        assert settings == settings_of(OffloadConfig.from_dict(config.to_dict()))
        assert json.loads(json.dumps(settings)) == settings


def test_seed_preset_is_the_originals_configuration():
    settings = settings_of(OffloadConfig())
    zero = settings["zero_optimization"]
    pinned = {"device": "cpu", "pin_memory": True}
    assert zero["stage"] == 3
    assert zero["offload_param"] == zero["offload_optimizer"] == pinned
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["stage3_max_live_parameters"] == 0
    assert zero["stage3_prefetch_bucket_size"] == 0
    assert zero["sub_group_size"] == 0
    assert zero["reduce_bucket_size"] == 1e5
    assert "leaf_module" not in zero
    assert settings["gradient_clipping"] == 0.9
    expected = {"enabled": True, "loss_scale_window": 100, "initial_scale_power": 7, "hysteresis": 1}
    assert settings["fp16"] == expected
    assert "bf16" not in settings
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["steps_per_print"] == 10


@pytest.mark.parametrize("model_name", list(SHAPES))
@pytest.mark.parametrize("world_size", [1, 3])
def test_fast_preset_handles_a_layer_at_a_time(model_name, world_size):
    layer, rest = counts(model_name)
    settings = settings_of(fast(model_name=model_name, world_size=world_size))
    zero = settings["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == layer
    assert world_size * zero["sub_group_size"] - layer in range(world_size)
    # The layer at work, the one before and the one fetched ahead, and the embedding.
    assert zero["stage3_max_live_parameters"] == 3 * layer + rest
    assert zero["stage3_max_reuse_distance"] == 0
    assert zero["leaf_module"] == {"classes": ["LlamaDecoderLayer"]}
    assert settings["bf16"]["enabled"]
    assert "fp16" not in settings


@pytest.mark.parametrize(
    ("fields", "bf16_in_deepspeed"),
    [
        ({"optimizer": "deepspeed_cpu_adam", "optimizer_states": "fp32"}, False),
        ({"optimizer": "deepspeed_cpu_adam", "optimizer_states": "bf16"}, True),
        ({"optimizer": "overlapped_cpu_adam", "optimizer_states": "bf16"}, False),  # keeps its states itself
    ],
)
def test_deepspeed_is_told_of_bf16_states_if_it_keeps_them(fields, bf16_in_deepspeed):
    bf16 = settings_of(tiny(dtype="bf16", **fields))["bf16"]
    assert bf16["bf16_master_weights_and_grads"] is bf16["bf16_optimizer_states"] is bf16_in_deepspeed


def test_fp32_has_no_section_of_its_own():
    assert not {"fp16", "bf16"} & set(settings_of(tiny(dtype="fp32")))


def test_deepspeed_takes_the_settings_of_any_configuration(rng):
    for _ in range(200):
        config = random_config(rng)
        zero = settings_of(config)["zero_optimization"]
        taken = DeepSpeedZeroConfig(**zero)
        assert taken.stage == 3
        assert taken.offload_param.device == taken.offload_optimizer.device == "cpu"
        assert taken.offload_param.pin_memory
        assert taken.offload_optimizer.pin_memory
        assert taken.max_live_parameters == zero["stage3_max_live_parameters"]
        assert taken.prefetch_bucket_size == zero["stage3_prefetch_bucket_size"]
        assert taken.param_persistence_threshold == 0
        # What the model knows is all that was set: no setting is misspelt.
        assert not taken.model_extra


# Vectors from RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("original", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        # Needs a repair of `_merged`; then the mark goes.
        pytest.param({"a": "foo"}, {"a": {"b": "c"}}, {"a": {"b": "c"}}),
    ],
)
def test_overrides_merge_as_rfc_7396_says(original, patch, result):
    before = json.dumps([original, patch])
    assert _merged(original, patch) == result
    assert json.dumps([original, patch]) == before


def test_override_changes_what_it_names_and_nothing_else():
    override = '{"zero_optimization": {"overlap_comm": false, "sub_group_size": null}, "wall_clock_breakdown": true}'
    plain, changed = settings_of(tiny()), settings_of(tiny(ds_override=override))
    assert changed["zero_optimization"].pop("overlap_comm") is False
    assert changed.pop("wall_clock_breakdown") is True
    del plain["zero_optimization"]["overlap_comm"], plain["zero_optimization"]["sub_group_size"]
    del plain["wall_clock_breakdown"]
    assert changed == plain


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "null", "[]", "3", '"x"'])
def test_override_that_is_no_json_object_is_a_usage_error(text, refused):
    with pytest.raises(UsageError, match="--ds_override"):
        OffloadConfig(ds_override=text)
    assert "--ds_override" in refused("--ds_override", text)


# Sizes


@pytest.mark.parametrize("model_name", list(SHAPES))
def test_parameter_counts_are_the_models(model_name):
    config = OffloadConfig(model_name=model_name, strategy=HUGGING_FACE)
    model = build_model(config, META)
    layer, rest = parameter_counts(model.config)
    assert {sum(p.numel() for p in part.parameters()) for part in model.model.layers} == {layer}
    assert layer * len(model.model.layers) + rest == sum(p.numel() for p in model.parameters())


def test_parameter_counts_hold_for_any_shape(rng):
    for _ in range(10):
        shape = load_model_config(tiny())
        shape.update(
            {
                "vocab_size": rng.randint(1, 99),
                "hidden_size": rng.randint(1, 9) * 4,
                "intermediate_size": rng.randint(1, 99),
                "num_hidden_layers": rng.randint(1, 3),
                "num_attention_heads": 6,
                "num_key_value_heads": rng.choice([1, 2, 3, 6]),
                "head_dim": rng.randint(1, 9) * 2,
                "tie_word_embeddings": rng.random() < 0.5,
            }
        )
        with META:
            model = LlamaForCausalLM(shape)
        layer, rest = parameter_counts(shape)
        assert layer * shape.num_hidden_layers + rest == sum(p.numel() for p in model.parameters())


def needed(**fields):
    config = OffloadConfig(**fields)
    return host_bytes_needed(config, load_model_config(config))


# Llama 3.2 1B. A layer: 2048 * 64 * 2 * (32 + 8) + 3 * 2048 * 8192 + 2 * 2048 weights; besides: (128256 + 1) * 2048.
LAYERS, REST = 16 * 60_821_504, 262_670_336
ALL = LAYERS + REST
# Pinned memory comes in powers of two.
WEIGHTS_16, WEIGHTS_32 = 2**32, 2**33  # for 2,471,628,800 and 4,943,257,600 bytes
REST_16, REST_32 = 2**29, 2**30  # for 525,340,672 and 1,050,681,344 bytes
BY_HAND = {
    "seed": ({}, 3 * 4 * ALL + 2 * WEIGHTS_16 + 2 * ALL + REST_32 + 4 * LAYERS),
    "fast": (FAST, 3 * 4 * ALL + 2 * WEIGHTS_16 + 2 * ALL),
    "fast, bf16 states": (FAST | {"optimizer_states": "bf16"}, 2 * 2 * ALL + 2 * WEIGHTS_16 + 2 * ALL),
    "fast, fp32": (FAST | {"dtype": "fp32"}, 2 * 4 * ALL + 2 * WEIGHTS_32 + 4 * ALL),
    "DeepSpeed, bf16 states": (
        {"dtype": "bf16", "optimizer_states": "bf16"},
        3 * 2 * ALL + 2 * WEIGHTS_16 + 2 * ALL + REST_16 + 2 * LAYERS,
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("world_size", [1, 2])
def test_host_memory_is_what_one_works_out_by_hand(case, world_size):
    fields, expected = BY_HAND[case]
    assert needed(**fields, world_size=world_size) == expected + 4 * GIB * world_size


@pytest.mark.parametrize("preset", PRESETS)
def test_more_takes_more_host_memory(preset):
    fields = {"preset": preset, **PRESETS[preset], "seq_length": 64}
    by_model = [needed(model_name=name, **fields) for name in sorted(SHAPES, key=lambda name: sum(counts(name)))]
    assert by_model == sorted(by_model)
    assert len(set(by_model)) == len(by_model)
    by_processes = [needed(world_size=n, **fields) for n in (1, 2, 8)]
    assert by_processes == sorted(by_processes)
    bf16 = {**fields, "dtype": "bf16"}
    assert needed(**{**bf16, "optimizer_states": "bf16"}) < needed(**{**bf16, "optimizer_states": "fp32"})


@pytest.fixture
def host(monkeypatch):
    """Sets the free memory of this host and how many of the processes run on it."""

    def host(available, **environment):
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(ds_utils, "_available_host_bytes", lambda: available)

    return host


@pytest.mark.parametrize("preset", PRESETS)
def test_too_little_host_memory_is_a_usage_error_with_figures(host, preset):
    config = OffloadConfig(preset=preset, **PRESETS[preset])
    model_config = load_model_config(config)
    takes = host_bytes_needed(config, model_config)
    host(takes)
    check_host_memory(config, model_config)
    host(takes - 1)
    with pytest.raises(
        UsageError, match=rf"{takes / GIB:.1f} GiB of host memory.*{(takes - 1) / GIB:.1f} GiB are free"
    ):
        check_host_memory(config, model_config)


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize(("world_size", "local"), [(4, 4), (4, 2), (4, 1), (1, 2)])
def test_each_machine_needs_the_share_of_its_processes(host, variable, world_size, local):
    config = OffloadConfig(world_size=world_size)
    model_config = load_model_config(config)
    share = host_bytes_needed(config, model_config) * min(local, world_size) // world_size
    host(share, **{variable: local})
    check_host_memory(config, model_config)
    host(share - 1, **{variable: local})
    with pytest.raises(UsageError):
        check_host_memory(config, model_config)


def test_free_host_memory_is_that_of_the_machine_or_less():
    import psutil

    assert 0 < ds_utils._available_host_bytes() <= psutil.virtual_memory().total


# The configuration, its name and its record


def test_run_name_starts_with_the_originals(rng):
    assert OffloadConfig().run_name == "bs4_seq1024_liger_rope1_silu1_rms1_flce1"
    for _ in range(200):
        config = random_config(rng)
        kernels = config.strategy
        original = (
            f"bs{config.batch_size * config.gradient_accumulation_steps * config.world_size}_seq{config.seq_length}"
            f"_liger_rope{int(kernels.rope)}_silu{int(kernels.swiglu)}_rms{int(kernels.rms_norm)}"
            f"_flce{int(kernels.flce)}"
        )
        assert config.run_name == original or config.run_name.startswith(original + "_")


@pytest.mark.parametrize("preset", PRESETS)
def test_run_name_leaves_out_what_the_preset_says(preset):
    name = OffloadConfig(preset=preset, **PRESETS[preset]).run_name
    expected = "bs4_seq1024_liger_rope1_silu1_rms1_flce1"
    assert name == (expected if preset == "seed" else f"{expected}_{preset}")


def test_run_names_are_equal_exactly_if_the_runs_are(rng):
    identities = {}
    for _ in range(5_000):
        config = random_config(rng)
        values = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_NAME}
        values["device"] = values["device"].replace("auto", "cuda")
        assert identities.setdefault(config.run_name, values) == values, config.run_name
    assert len(identities) == len({json.dumps(values) for values in identities.values()})


def test_same_global_batch_in_other_parts_has_another_name():
    parts = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 4, 1), (2, 1, 4)]
    configs = [OffloadConfig(batch_size=b, gradient_accumulation_steps=a, world_size=w) for b, a, w in parts]
    assert {config.global_batch_size for config in configs} == {8}
    assert {config.tokens_per_step for config in configs} == {8 * 1024}
    assert len({config.run_name for config in configs}) == len(parts)


@pytest.mark.parametrize(("b", "a", "w", "s"), [(1, 1, 1, 2), (3, 5, 7, 11), (4, 2, 8, 1024)])
def test_tokens_count_every_micro_batch_and_process(b, a, w, s):
    config = OffloadConfig(batch_size=b, gradient_accumulation_steps=a, world_size=w, seq_length=s)
    assert (config.global_batch_size, config.tokens_per_step) == (b * a * w, b * a * w * s)


def test_configuration_survives_json(rng):
    for _ in range(200):
        config = random_config(rng)
        values = json.loads(json.dumps(config.to_dict()))
        assert set(values) == {*FIELDS, *KERNELS}
        assert OffloadConfig.from_dict(values) == config
        assert config_of({"script": "deepspeed", "config": values}) == config


def test_record_tells_which_script_its_configuration_is_of():
    for config in (RunConfig(batch_size=3), OffloadConfig(batch_size=3)):
        read = config_of({"script": config.script, "config": config.to_dict()})
        assert (type(read), read) == (type(config), config)


def test_description_names_what_is_several():
    description = OffloadConfig(gradient_accumulation_steps=3, world_size=2).description
    assert "batch 4 x 1024 tokens x 3 micro-batches x 2 processes" in description
    assert "micro-batches" not in OffloadConfig().description
    assert "processes" not in OffloadConfig().description


def test_global_batch_is_the_same_however_it_is_divided(monkeypatch):
    def whole(world_size, steps, seed=42):
        fields = {"batch_size": 8 // world_size // steps, "gradient_accumulation_steps": steps, "seed": seed}
        config = tiny(world_size=world_size, **fields)
        batches = []
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            torch.manual_seed(rank)
            batches += [batch["input_ids"] for batch in micro_batches(99, config, CPU)]
        assert {tuple(batch.shape) for batch in batches} == {(config.batch_size, config.seq_length)}
        assert len(batches) == world_size * steps
        return torch.cat(batches)

    expected = whole(1, 1)
    assert expected.max() < 99
    for world_size, steps in ((1, 4), (2, 1), (2, 2), (8, 1)):
        assert torch.equal(whole(world_size, steps), expected)
    assert not torch.equal(whole(1, 1, seed=43), expected)


@pytest.fixture
def other_rank(monkeypatch):
    """Sets what another rank contributes to what is gathered."""

    def other_rank(value):
        monkeypatch.setattr(ds_utils, "_gathered", lambda mine: [mine, value])

    return other_rank


def test_measurement_of_several_ranks_is_that_of_the_slowest_and_fullest(other_rank):
    other_rank(Measurement([1.0, 4.0], [1.0, 2.0], [10, 40], [None, 9], 7))
    merged = over_ranks(Measurement([2.0, 3.0], [3.0, 2.5], [20, 30], [5, 6], 8))
    assert merged == Measurement([2.0, 4.0], [2.0, 2.25], [20, 40], [None, 9], 8)
    other_rank(Measurement([1.0], [1.0], [None], [None], None))
    merged = over_ranks(Measurement([2.0], [3.0], [None], [None], 5))
    assert merged == Measurement([2.0], [2.0], [None], [None], None)


def test_phases_and_sums_of_several_ranks(other_rank):
    other_rank({"forward": 3, "backward": 4, "optimizer": None})
    phases = phases_over_ranks(PhasePeaks({"forward": 5, "backward": 1, "optimizer": 2}, None), 1.5)
    assert phases == PhasePeaks({"forward": 5, "backward": 4, "optimizer": None}, 1.5)
    other_rank(5)
    assert (sum_over_ranks(3), max_over_ranks(3), max_over_ranks(7), max_over_ranks(None)) == (8, 5, 7, None)


def test_learning_rate_runs_over_the_optimizer_steps_of_the_run():
    config = tiny(warmup=2, iterations=7, num_warmup_steps=2, learning_rate=0.5, lr_scheduler_type="linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = build_scheduler(optimizer, config)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0, 0.25, *(0.5 * (1 - i / 8) for i in range(9))]
    assert rates == pytest.approx(expected)


# Flags


BOUNDS = {
    "batch_size": (0,),
    "seq_length": (1,),
    "iterations": (0,),
    "world_size": (0, 2**20 + 1),
    "gradient_accumulation_steps": (0, 2**20 + 1),
    "weight_decay": (-0.1, float("nan"), float("inf")),
    "beta_0": (-0.1, 1.0, float("nan")),
    "beta_1": (-0.1, 1.0, float("nan")),
    "gradient_clipping": (-0.1, float("nan"), float("inf")),
    "num_warmup_steps": (-1,),
    "fp16_loss_scale_window": (0,),
    "fp16_initial_scale_power": (-1, 33),
    "fp16_hysteresis": (0,),
    "prefetch_layers": (-1,),
    "step_per_print": (0,),
    "reduce_bucket_size": (0, float("nan"), 2.0**41),
    "sub_group_size": (-1, float("nan"), 2.0**41),
    "cpu_threads": (0,),
    "learning_rate": (0.0, float("nan"), float("inf")),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BOUNDS.items() for value in values])
def test_value_that_no_run_can_have_is_a_usage_error_with_its_flag(refused, name, value):
    flag = OffloadConfig.original_flags.get(name, name)
    with pytest.raises(UsageError, match=f"--{flag} "):
        OffloadConfig(**{name: value})
    if name not in OffloadConfig.without_flag:
        assert f"--{flag} " in refused(f"--{flag}", value)


@pytest.mark.parametrize("name", ["reduce_bucket_size", "sub_group_size", "beta_0", "gradient_clipping"])
def test_smallest_value_of_a_bound_is_taken(name):
    smallest = 1 if name == "reduce_bucket_size" else 0
    assert getattr(OffloadConfig(**{name: smallest}), name) == smallest


@pytest.mark.parametrize("optimizer", OFFLOAD_OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", STATES)
def test_conflict_is_a_usage_error(refused, optimizer, dtype, states):
    fields = {"optimizer": optimizer, "dtype": dtype, "optimizer_states": states}
    flags = [part for name, value in fields.items() for part in (f"--{name}", value)]
    if optimizer == "overlapped_cpu_adam" and dtype == "fp16":
        expected = "has no fp16"
    elif states == "bf16" and dtype != "bf16":
        expected = "--optimizer_states bf16"
    else:
        assert OffloadConfig(**fields).to_dict().items() >= fields.items()
        return
    with pytest.raises(UsageError, match=expected):
        OffloadConfig(**fields)
    assert expected in refused(*flags)


# The original's flag, the same in this repository's spelling, and the field they set.
SPELLINGS = [
    ("per_device_train_batch_size", "batch_size", "batch_size", 3),
    ("max_seq_len", "seq_length", "seq_length", 33),
    ("num_train_iterations", "iterations", "iterations", 3),
    ("enable_liger_rope", "enable_rope", "rope", False),
    ("enable_liger_swiglu", "enable_swiglu", "swiglu", False),
    ("enable_liger_rms", "enable_rms", "rms_norm", False),
    ("enable_liger_flce", "enable_flce", "flce", False),
    *((name, name, name, 3) for name in ("gradient_accumulation_steps", "seed", "num_warmup_steps", "step_per_print")),
    *((name, name, name, 0.25) for name in ("learning_rate", "weight_decay", "beta_0", "beta_1", "gradient_clipping")),
    *((f"fp16_{name}",) * 3 + (3,) for name in ("loss_scale_window", "initial_scale_power", "hysteresis")),
    ("reduce_bucket_size", "reduce_bucket_size", "reduce_bucket_size", 5e6),
    ("sub_group_size", "sub_group_size", "sub_group_size", 5e6),
    ("model_name", "model_name", "model_name", "tiny-llama"),
    *(("lr_scheduler_type",) * 3 + (name,) for name in SCHEDULERS),
]


@pytest.mark.parametrize(("original", "common", "field", "value"), SPELLINGS)
def test_flag_of_the_original_and_the_common_one_set_the_same_field(parse, original, common, field, value):
    text = int(value) if isinstance(value, bool) else value
    for flag in {original, common}:
        assert parse(f"--{flag}", text).to_dict() == parse().to_dict() | {field: value}


@pytest.mark.parametrize("kernel", ["rope", "swiglu", "rms", "flce"])
def test_kernel_flag_without_a_value_is_on_as_in_the_original(parse, kernel):
    assert parse(f"--enable_liger_{kernel}", "0", f"--enable_liger_{kernel}") == parse()


def test_flags_of_launchers_and_of_the_original_are_taken(parse):
    assert parse("--local_rank=1") == parse("--local_rank", "0") == parse()
    assert parse("--is_flash_attn").attention == "flash_attention_2"
    assert parse("--preset", "fast", "--is_flash_attn").attention == "flash_attention_2"
    assert parse("--is_flash_attn", "--attention", "eager").attention == "eager"
    assert parse("--device", "cpu", "--is_flash_attn").attention == "flash_attention_2"


def test_what_only_a_launcher_or_a_dry_run_sets_has_no_flag(parse, capsys):
    options = {option for action in make_parser(None, OffloadConfig())._actions for option in action.option_strings}
    assert not options & {"--world_size", "--dry_run", "--gpu_memory_gib", "--find_max", "--strategy"}
    for arguments in (["--dry_run"], ["--world_size", "2"]):
        with pytest.raises(SystemExit) as stopped:
            parse(*arguments)
        assert stopped.value.code == 2
        assert f"unrecognized arguments: {arguments[0]}" in capsys.readouterr().err


def test_flags_of_the_original_are_not_the_single_gpu_scripts(parse, capsys):
    for name in ("--local_rank", "--is_flash_attn", "--per_device_train_batch_size"):
        with pytest.raises(SystemExit):
            parse(name, defaults=RunConfig())
        assert f"unrecognized arguments: {name}" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_values_of_a_preset_arrive(parse, preset):
    config = parse("--preset", preset)
    assert config.to_dict().items() >= PRESETS[preset].items()
    assert config == OffloadConfig(preset=preset, device="cuda", **PRESETS[preset])


def test_without_a_preset_the_seeds_values_are_the_defaults(parse):
    assert parse() == OffloadConfig(device="cuda") == parse("--preset", "seed")


OVERRIDING = {
    "dtype": "fp32",
    "optimizer": "deepspeed_cpu_adam",
    "optimizer_states": "bf16",
    "reduce_bucket_size": 7e6,
    "sub_group_size": 0.0,
    "fetch_layers": False,
    "prefetch_layers": 3,
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("preset_first", [True, False])
def test_flag_comes_before_the_preset(parse, name, preset_first):
    value = OVERRIDING[name]
    flag, preset = [f"--{name}", int(value) if isinstance(value, bool) else value], ["--preset", "fast"]
    arguments = [*preset, *flag] if preset_first else [*flag, *preset]
    assert parse(*arguments).to_dict() == parse(*preset).to_dict() | {name: value}


@pytest.mark.parametrize("preset", PRESETS)
def test_without_a_gpu_its_defaults_come_before_the_presets(parse, preset):
    config = parse("--device", "cpu", "--preset", preset)
    expected = PRESETS[preset] | script.CPU_DEFAULTS | {"device": "cpu", "preset": preset}
    assert config.to_dict() == OffloadConfig().to_dict() | expected


@pytest.mark.parametrize("name", script.CPU_DEFAULTS)
def test_flag_comes_before_the_defaults_without_a_gpu(parse, name):
    other = {"dtype": "bf16", "optimizer_states": "bf16", "model_name": "meta-llama/Llama-3.2-1B"}
    value = other.get(name, 7)
    flags = ["--dtype", "bf16"] if name == "optimizer_states" else []
    config = parse("--device", "cpu", *flags, f"--{name}", value)
    assert getattr(config, name) == value


def test_program_turns_the_interpreter_on_where_there_is_no_gpu(monkeypatch, parse):
    restarts = []
    monkeypatch.setattr("src.interpreter.restart_interpreted", lambda: restarts.append(1))
    parse()
    assert not restarts
    parse("--device", "cpu")
    assert restarts


# run_ds.sh

SHELL = ROOT / "run_ds.sh"
ORIGINAL = """
    NUM_GPUS MODEL_NAME FP16_LOSS_SCALE_WINDOW FP16_INITIAL_SCALE_POWER FP16_HYSTERESIS REDUCE_BUCKET_SIZE
    GRADIENT_CLIPPING PER_DEVICE_TRAIN_BATCH_SIZE NUM_TRAIN_ITERATIONS GRADIENT_ACCUMULATION_STEPS MAX_SEQ_LENGTH
    LEARNING_RATE WEIGHT_DECAY BETA_0 BETA_1 SUB_GROUP_SIZE STEP_PER_PRINT SEED ENABLE_LIGER_ROPE
    ENABLE_LIGER_SWIGLU ENABLE_LIGER_RMS ENABLE_FLCE HOSTFILE
"""
VARIABLES = ORIGINAL.split()


@pytest.fixture
def launched(tmp_path):
    """Runs the shell script where the supervisor only tells how it was called: flags of DeepSpeed's launcher, and
    arguments of our script."""

    def launched(*arguments, gpu=True, cwd=tmp_path, **variables):
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        asked = f'case "$*" in -c*) exit {int(not gpu)};; *offload.variables*) exit 0;; esac\n'
        for name, line in (("python", asked + "printf '%s\\0' \"$@\""), ("pdsh", ""), ("ssh", "")):
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)
        environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **variables}
        done = subprocess.run(["bash", SHELL, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = done.stdout.split("\0")[:-1]
        i = words.index("deepspeed_liger_kernel.py")
        return words[:i], words[i + 1 :]

    return launched


def test_shell_script_names_every_variable_of_the_original():
    text = SHELL.read_text()
    for name in VARIABLES:
        assert re.search(rf"^{name}=\${{{name}:-[^}}]*}}", text, re.MULTILINE), name


def test_defaults_of_the_shell_script_are_the_scripts(launched, parse):
    assert parse(*launched()[1]) == parse()
    assert parse(*launched("--preset", "fast")[1]) == parse("--preset", "fast")
    assert parse("--device", "cpu", *launched(gpu=False)[1]) == parse("--device", "cpu")


ARRIVES = {
    **{name: (name.lower(), 3) for name in VARIABLES if name.startswith("FP16")},
    **{name: (name.lower(), 0.25) for name in ("LEARNING_RATE", "WEIGHT_DECAY", "BETA_0", "BETA_1")},
    **{name: (name.lower(), 3) for name in ("GRADIENT_ACCUMULATION_STEPS", "STEP_PER_PRINT", "SEED")},
    **{name: (name.lower(), 77.0) for name in ("REDUCE_BUCKET_SIZE", "SUB_GROUP_SIZE", "GRADIENT_CLIPPING")},
    "MODEL_NAME": ("model_name", "a folder/with blanks"),
    "PER_DEVICE_TRAIN_BATCH_SIZE": ("batch_size", 3),
    "NUM_TRAIN_ITERATIONS": ("iterations", 3),
    "MAX_SEQ_LENGTH": ("seq_length", 33),
    "ENABLE_LIGER_ROPE": ("rope", False),
    "ENABLE_LIGER_SWIGLU": ("swiglu", False),
    "ENABLE_LIGER_RMS": ("rms_norm", False),
    "ENABLE_FLCE": ("flce", False),
}


def test_each_variable_is_the_launchers_or_a_fields():
    assert {*ARRIVES, "NUM_GPUS", "HOSTFILE"} == set(VARIABLES)


@pytest.mark.parametrize("name", ARRIVES)
def test_variable_of_the_shell_script_arrives_in_its_field(launched, parse, name):
    field, value = ARRIVES[name]
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        text = str(int(value)) if isinstance(value, bool) else str(value)
        changed = parse("--device", device, *launched(gpu=gpu, **{name: text})[1])
        assert changed.to_dict() == parse("--device", device).to_dict() | {field: value}


def test_launcher_gets_its_variables(launched, tmp_path):
    hosts = tmp_path / "my hosts"
    hosts.write_text("one slots=8\ntwo slots=8\n")
    before, _ = launched()
    assert before[before.index("--num_gpus") + 1] == "1"
    assert "--hostfile" not in before
    before, _ = launched(NUM_GPUS="8", HOSTFILE="my hosts", MASTER_PORT="12345")
    for flag, value in (("--num_gpus", "8"), ("--hostfile", str(hosts)), ("--master_port", "12345")):
        assert before[before.index(flag) + 1] == value


def test_arguments_of_the_shell_script_come_last(launched, parse):
    _, arguments = launched("--max_seq_len", "8", "--ds_override", '{"a": 1}', MAX_SEQ_LENGTH="16")
    config = parse(*arguments)
    assert (config.seq_length, config.ds_override) == (8, '{"a": 1}')


# The extension cache


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The file that says that another process compiles CPU Adam."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def announced(capsys, **fields):
    ds_utils._announce_compilation(OffloadConfig(**fields))
    return capsys.readouterr()


def test_lock_that_nobody_holds_is_told_of_in_one_line(lock, capsys, monkeypatch):
    lock.touch()
    told = announced(capsys)
    assert str(lock) in told.err
    assert "delete the file" in told.err
    assert told.err.count("\n") == 1
    assert lock.exists()
    assert not announced(capsys, **FAST).err  # waits for another file
    monkeypatch.setenv("WORLD_SIZE", "8")
    for local_rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert announced(capsys).err.count("\n") == lines


def test_lock_that_is_older_than_any_compilation_is_a_usage_error(lock, capsys):
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(UsageError, match="delete it"):
        announced(capsys)
    assert lock.exists()
    assert not announced(capsys, **FAST).err


def test_lock_of_a_compilation_that_runs_is_not_told_of(lock, capsys):
    holds = "import sys; from torch.utils.file_baton import FileBaton; print(FileBaton(sys.argv[1]).try_acquire());"
    command = [sys.executable, "-uc", holds + "sys.stdin.read()", str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as compiling:
        assert compiling.stdout.readline() == "True\n"
        assert not announced(capsys).err
        os.utime(lock, (0, 0))  # however long it takes
        assert not announced(capsys).err
        compiling.kill()
    lock.touch()
    assert announced(capsys).err


def test_compilation_is_announced_unless_it_is_done(lock, capsys):
    assert not announced(capsys).err
    assert "Compiling deepspeed_cpu_adam" in announced(capsys).out
    (lock.parent / "cpu_adam.so").touch()
    assert not announced(capsys).out
