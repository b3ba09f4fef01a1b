"""The configuration: flags, run names and JSON follow from the fields and from the registry of techniques."""

import dataclasses
import json
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from src import techniques
from src.cli import command_line, parsed
from src.config import RunConfig
from src.families import SHAPES
from src.offload_config import CONFIGS, PRESETS, OffloadConfig
from src.overrides import normalised
from src.record import load
from src.record.record import record_files
from src.techniques import TECHNIQUES, Technique, kernels_only
from src.utils import UsageError
from tests.helpers import ALL_KERNELS, HUGGING_FACE, ROOT

BOTH = pytest.mark.parametrize("cls", CONFIGS.values(), ids=CONFIGS)
# Fields that say where files go, how errors look or what is written about a run: not what the run is.
NOT_IN_NAME = {"result_dir", "snapshot_dir", "log_dir", "debug", "breakdown", "phases", "parity", "step_per_print"}
# Values that are hard to write into a file name.
MODELS = ["org/model", "org--model", "a_b", "a/b", "a+b", "a%2Fb", "runs/x_fp32", "..", "é" * 90]
NUMBERS = [1.0, 11.0, 0.1, 0.1000001, 0.1 + 0.2, 0.3, 1e-5, 123456789.0, 123456790.0]


def complete(config, given):
    """With the values that follow from others, such as FLCE's reduction from fp16."""
    return dataclasses.replace(config, **techniques.chosen(config, given))


def values_of(f):
    """Valid values of a field other than None."""
    choices, bounds, kind = f.metadata["choices"], f.metadata["bounds"], f.type
    if choices:
        return st.sampled_from(choices)
    if f.name == "ds_override":
        return st.dictionaries(st.text(max_size=9), st.integers(), max_size=2).map(json.dumps).map(normalised)
    if kind is bool:
        return st.booleans()
    low, high = bounds or (None, None)
    if kind is int or kind == int | None:
        return st.integers(low, min(low + 20, high)) | st.integers(low, high)
    if kind is float or kind == float | None:
        return st.floats(low, high) | st.sampled_from([n for n in NUMBERS if low <= n <= high])
    return st.sampled_from(MODELS) | st.text(max_size=30)


def some_fields(cls):
    """A valid value for each of a few fields."""
    fields = st.lists(st.sampled_from(dataclasses.fields(cls)), unique=True, max_size=6)
    return fields.flatmap(lambda chosen: st.fixed_dictionaries({f.name: values_of(f) for f in chosen}))


def made(cls, values):
    """The configuration with these values; there may be none."""
    try:
        return cls(**values)
    except UsageError:
        assume(False)


def identity(config):
    """What a run name stands for."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_NAME}
    return values | {"device": values["device"].replace("auto", "cuda")}


@BOTH
@given(data=st.data())
def test_run_names_are_equal_exactly_if_the_runs_are(cls, data):
    one = made(cls, data.draw(some_fields(cls)))
    field = data.draw(st.sampled_from(dataclasses.fields(cls)))
    changed = {field.name: data.draw(values_of(field))} | data.draw(st.just({}) | some_fields(cls))
    other = made(cls, one.to_dict() | changed)
    assert (one.run_name == other.run_name) == (identity(one) == identity(other))
    assert len(one.run_name) < 200
    assert set(one.run_name) <= set(string.ascii_letters + string.digits + "._+-%~")


def test_close_values_have_names_of_their_own():
    runs = [{"learning_rate": n} for n in NUMBERS] + [{"model_name": n} for n in MODELS]
    runs += [{"model_name": "runs/x", "dtype": "fp32"}, {"model_name": "a", "attention": "eager"}]
    runs += [{"model_name": "a_eager"}, {"memory_limit_gib": 11.0}, {"gpu_memory_gib": 11.0}]
    assert len({RunConfig(**fields).run_name for fields in runs}) == len(runs)


@BOTH
@given(data=st.data())
def test_configuration_survives_json(cls, data):
    config = made(cls, data.draw(some_fields(cls)))
    assert cls.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@BOTH
@given(data=st.data())
def test_every_flag_sets_its_field_and_no_other(cls, data):
    without_flag = (
        cls.without_flag
        | {"gpu_memory_gib", "gpu_rates"}
        | {t.name for t in TECHNIQUES.values() if cls.script not in t.scripts and t.name != "optimizer"}
    )
    values = {k: v for k, v in data.draw(some_fields(cls)).items() if k not in without_flag}
    if values.keys() & {"dry_run", "find_max", "find_min"}:
        values.pop("parity", None)
    values["device"] = "cuda"  # otherwise a CPU's run would be refused for what it cannot do
    if "model_name" in values:
        values["model_name"] = data.draw(st.sampled_from([name for name in SHAPES if "/" in name]))
    words = []
    for f in (f for f in dataclasses.fields(cls) if f.name in values):
        names = [name for name in (*f.metadata["flags"], f.name) if cls is OffloadConfig or "liger" not in name]
        flag, value = f"--{data.draw(st.sampled_from(names))}", values[f.name]
        short = value is True and data.draw(st.booleans())
        words.append(flag if short else f"{flag}={int(value) if isinstance(value, bool) else value}")
    preset = cls.presets[values.get("preset", "original")]
    expected = complete(made(cls, preset | values | {"device": "cuda"}), values)
    try:
        techniques.check(expected)
    except UsageError:
        assume(False)
    assert command_line(None, cls(), {}, words).planned == expected


def test_a_dry_run_has_no_gradients_to_compare():
    with pytest.raises(UsageError, match="--parity compares gradients"):
        parsed(None, RunConfig(), {}, ["--dry_run", "--parity"])


@pytest.mark.parametrize(
    ("cls", "flag", "text", "field", "value"),
    [
        (RunConfig, "enable_rope", "0", "rope", False),
        (RunConfig, "enable_swiglu", "0", "swiglu", False),
        (RunConfig, "enable_rms", "0", "rms_norm", False),
        (RunConfig, "enable_flce", "0", "flce", False),
        (OffloadConfig, "enable_liger_rope", "0", "rope", False),
        (OffloadConfig, "enable_liger_swiglu", "0", "swiglu", False),
        (OffloadConfig, "enable_liger_rms", "0", "rms_norm", False),
        (OffloadConfig, "enable_liger_flce", "0", "flce", False),
        (OffloadConfig, "per_device_train_batch_size", "3", "batch_size", 3),
        (OffloadConfig, "max_seq_len", "32", "seq_length", 32),
        (OffloadConfig, "num_train_iterations", "7", "iterations", 7),
    ],
)
def test_original_flags_have_their_names(cls, flag, text, field, value):
    planned = command_line(None, cls(), {}, [f"--{flag}", text, "--device", "cuda"]).planned
    assert planned == complete(dataclasses.replace(cls(), **{field: value, "device": "cuda"}), {field})


def test_committed_records_have_the_names_of_their_runs():
    records = [load(path) for path in record_files([ROOT / "doc/data"])]
    assert len(records) > 600
    assert {record.script for record in records} == set(CONFIGS)
    for record in records:
        assert record.run.run_name == record.run_name


def test_run_name_begins_with_the_originals():
    assert RunConfig().run_name == "bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue"
    others = RunConfig(**kernels_only("swiglu"), batch_size=2, dtype="fp32", pretrained=True)
    assert others.run_name == "bs2_seq1024_ropeFalse_siluTrue_rmsFalse_flceFalse_fp32_pretrained1"
    offloaded = OffloadConfig(batch_size=2, gradient_accumulation_steps=3, world_size=2, flce=False, learning_rate=3e-4)
    assert offloaded.run_name == "bs12_seq1024_liger_rope1_silu1_rms1_flce0_accum3_lr0.0003_gpus2"
    fast = OffloadConfig(preset="fast", **PRESETS["fast"] | {"prefetch_layers": 2})
    assert fast.run_name == "bs4_seq1024_liger_rope1_silu1_rms1_flce1_fast_prefetch2"


def test_whole_number_has_one_name_whichever_way_it_is_written():
    for value in (10**6, 3 * 10**9):
        assert OffloadConfig(sub_group_size=value).run_name == OffloadConfig(sub_group_size=float(value)).run_name


def test_files_of_a_run_share_its_name_and_are_ignored_by_git():
    config = RunConfig(result_dir="r", snapshot_dir="s", log_dir="l")
    name = config.run_name
    files = config.record_file, config.snapshot_file, config.log_folder, config.trace_file.parent
    assert [str(path) for path in files] == [f"r/{name}.json", f"s/{name}.pickle", f"l/{name}", f"l/{name}"]
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"/{getattr(RunConfig(), name)}/" for name in ("result_dir", "snapshot_dir", "log_dir")} <= set(ignored)


@pytest.mark.parametrize(
    ("cls", "fields", "text"),
    [
        (RunConfig, {"batch_size": 0}, "--batch_size must be from 1"),
        (RunConfig, {"batch_size": 2.5}, "--batch_size must be int, got '2.5'"),
        (RunConfig, {"batch_size": 2**31, "seq_length": 4}, "--batch_size 2147483648 x --seq_length 4"),
        (RunConfig, {"seq_length": 1}, "--seq_length"),
        (RunConfig, {"dry_run": 1}, "--dry_run must be bool"),
        (RunConfig, {"seed": 2**63}, "--seed"),
        (RunConfig, {"dtype": "int8"}, "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
        (RunConfig, {"dtype": None}, "--dtype must be str"),
        (RunConfig, {"learning_rate": 0.0}, "--learning_rate"),
        (RunConfig, {"learning_rate": float("nan")}, "--learning_rate"),
        (RunConfig, {"memory_limit_gib": float("inf")}, "--memory_limit_gib"),
        (OffloadConfig, {"seq_length": 1}, "--max_seq_len"),
        (OffloadConfig, {"optimizer": "sgd"}, "--optimizer must be one of deepspeed_cpu_adam"),
        (OffloadConfig, {"optimizer": "overlapped_cpu_adam"}, "has no fp16"),
        (OffloadConfig, {"dtype": "fp32", "optimizer_states": "bf16"}, "--optimizer_states bf16 goes with"),
        (OffloadConfig, {"ds_override": "{"}, "--ds_override is not JSON"),
        (OffloadConfig, {"ds_override": "[" * 10**5}, "--ds_override is not JSON"),
        (OffloadConfig, {"ds_override": "[]"}, "--ds_override must be a JSON object"),
    ],
)
def test_value_that_no_run_can_have_is_a_usage_error(cls, fields, text):
    with pytest.raises(UsageError) as told:
        cls(**fields)
    assert text in str(told.value)


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        (HUGGING_FACE, "No Liger Kernel"),
        (kernels_only("rope", "swiglu", "rms_norm"), "Liger Kernel w/o FLCE"),
        (ALL_KERNELS, "All Liger Kernel"),
        (kernels_only("flce", "rope"), "rope + flce only"),
        (ALL_KERNELS | {"attention": "eager", "gradient_checkpointing": False}, "All Liger Kernel"),
    ],
)
def test_title_names_the_kernels_that_are_on(settings, title):
    config = RunConfig(**settings)
    assert config.title == title
    assert config.kernels == tuple(name for name in ("rope", "swiglu", "rms_norm", "flce") if settings[name])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"flce": False, "pieces": 2}, "--pieces does nothing without --enable_flce 1"),
        ({"flce": True, "pieces": 9}, "nine is too many"),
        ({"flce": False, "pieces": 0}, None),
        ({"flce": True, "pieces": 2}, None),
    ],
    ids=str,
)
def test_technique_that_would_do_nothing_or_cannot_be_is_a_usage_error(monkeypatch, values, text):
    pieces = Technique(
        name="pieces",
        default=0,
        help="a made-up one",
        needs=("flce",),
        refusal=lambda config: "nine is too many" if config.pieces == 9 else None,
        compared=True,
    )
    monkeypatch.setitem(TECHNIQUES, "pieces", pieces)

    class Config(RunConfig):
        pieces = values["pieces"]

    config = Config(flce=values["flce"])
    if text is None:
        techniques.check(config)
        assert config.title.endswith(", pieces 2") == (values["pieces"] == 2)
    else:
        with pytest.raises(UsageError, match=text):
            techniques.check(config)
