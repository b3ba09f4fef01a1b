"""The configuration: flags, run names and JSON all follow from the dataclass fields."""

import dataclasses
import json
import string

import pytest

import all_gpu_liger_kernel as script
from src.config import RunConfig, Strategy, make_parser, to_config
from src.utils import UsageError
from tests.helpers import ROOT, run_python

FIELDS = [f for f in dataclasses.fields(RunConfig) if f.name != "strategy"]
FLAGS = [f.name for f in (*FIELDS, *dataclasses.fields(Strategy))]
# Fields that say where files go or how errors look; two runs that differ in these alone are one experiment.
NOT_IN_NAME = {"result_dir", "snapshot_dir", "log_dir", "debug"}


def parse(*arguments, defaults=None):
    return to_config(make_parser(None, defaults or RunConfig()).parse_args(list(map(str, arguments))))


OPTIONS = {option.dest: option for option in make_parser(None, RunConfig())._actions if option.dest in FLAGS}


def another_value(option):
    """A valid value for `option` that is not its default."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    if isinstance(option.default, bool):
        return not option.default
    if option.default is None:
        return 12.5
    return option.default * 2 if isinstance(option.default, int | float) else option.default + "-other"


def arguments_for(option, value):
    if option.nargs == 0:
        return [option.option_strings[0]]
    return [option.option_strings[0], int(value) if isinstance(value, bool) else value]


def test_config_is_made_without_importing_torch():
    done = run_python("-c", "import sys, src.config; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_script_constants_are_the_defaults():
    defaults = script.DEFAULTS
    assert (defaults.model_name, defaults.batch_size, defaults.seq_length, defaults.iterations) == (
        script.MODEL_NAME,
        script.BATCH_SIZE,
        script.SEQ_LENGTH,
        script.ITERATIONS,
    )
    assert defaults.strategy == Strategy(
        rope=script.ENABLE_ROPE, swiglu=script.ENABLE_SWIGLU, rms_norm=script.ENABLE_RMS, flce=script.ENABLE_FLCE
    )


def test_without_flags_the_defaults_hold():
    defaults = RunConfig(batch_size=3, dtype="fp16", memory_limit_gib=5.5, strategy=Strategy.only("rope"))
    assert parse(defaults=defaults) == defaults


@pytest.mark.parametrize("name", FLAGS)
def test_flag_overrides_its_field_and_no_other(name):
    option = OPTIONS[name]
    value = another_value(option)
    changed = parse(*arguments_for(option, value)).to_dict()
    assert changed == RunConfig().to_dict() | {name: value}
    assert type(changed[name]) is type(value)


@pytest.mark.parametrize("flag", ["enable_rope", "enable_swiglu", "enable_rms", "enable_flce"])
def test_kernel_flags_have_the_names_of_the_script_constants(flag):
    kernel = {"enable_rms": "rms_norm"}.get(flag, flag.removeprefix("enable_"))
    assert hasattr(script, flag.upper())
    assert parse(f"--{flag}", 0).strategy == dataclasses.replace(Strategy(), **{kernel: False})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--enable_rope", "2"],
        ["--enable_rope", "True"],
        ["--dtype", "int8"],
        ["--batch_size", "2.5"],
        ["--batch", "2"],  # an abbreviation would change its meaning when a flag is added
        ["--no_such_flag"],
    ],
    ids=" ".join,
)
def test_mistyped_flag_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"seq_length": 0},
        {"iterations": 0},
        {"iterations": -1},
        {"warmup": -1},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"memory_limit_gib": 0.0},
        {"memory_limit_gib": float("nan")},
        {"memory_limit_gib": float("inf")},
        {"seq_length": 1},
        {"seed": 2**64},
        {"batch_size": 2**31},
        {"learning_rate": float("inf")},
    ],
    ids=str,
)
def test_value_that_no_run_can_have_is_a_usage_error(fields):
    (name,) = fields
    with pytest.raises(UsageError, match=f"--{name}"):
        RunConfig(**fields)


def test_unknown_kernel_is_a_usage_error():
    with pytest.raises(UsageError, match="rope"):
        Strategy.only("ropes")


PATH_PARTS = ["a", "runs", "tiny-llama", "meta-llama", "Llama-3.2-1B", "\u00fc x%2F", "\u00e9" * 30, "..", ".", "#1?"]


def random_value(option, rng):
    """A valid value for `option`, of the kinds that are hard to write into a file name."""
    if option.dest == "model_name":
        return "/".join(rng.choices(PATH_PARTS, k=rng.randint(1, 9)))
    if option.choices:
        return rng.choice(list(option.choices))
    if isinstance(option.default, bool):
        return rng.random() < 0.5
    if isinstance(option.default, int):
        return rng.choice([2, 11, 1000, 2**16])
    if isinstance(option.default, str):
        return rng.choice(["", "x"])
    return rng.choice([1.0, 11.0, 0.1, 0.1000001, 0.1 + 0.2, 0.3, rng.random()])


def random_config(rng):
    """A config in which each field is at its default or drawn."""
    return RunConfig.from_dict({name: random_value(OPTIONS[name], rng) for name in FLAGS if rng.random() < 0.6})


def identity(config):
    """What a run name stands for."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_NAME}
    return tuple((values | {"device": values["device"].replace("auto", "cuda")}).items())


def test_run_names_are_equal_exactly_if_the_runs_are(rng):
    runs_by_name = {}
    for _ in range(20_000):
        config = random_config(rng)
        assert runs_by_name.setdefault(config.run_name, identity(config)) == identity(config), config.run_name
    assert len(runs_by_name) == len(set(runs_by_name.values()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model_name": "org/model"}, {"model_name": "org--model"}),
        ({"model_name": "runs/ckpt", "dtype": "fp32"}, {"model_name": "runs/ckpt_fp32"}),
    ],
    ids=["separator", "tag"],
)
def test_run_name_tells_a_models_name_from_its_own_punctuation(one, other):
    assert RunConfig(**one).run_name != RunConfig(**other).run_name


def test_run_name_starts_with_the_originals():
    assert RunConfig().run_name == "bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue"
    others = RunConfig(strategy=Strategy.only("swiglu"), batch_size=2, dtype="fp32", pretrained=True)
    assert others.run_name == "bs2_seq1024_ropeFalse_siluTrue_rmsFalse_flceFalse_fp32_pretrained1"


def test_run_name_is_one_file_name_with_nothing_to_quote(rng):
    for _ in range(2_000):
        assert set(random_config(rng).run_name.replace("%", "")) <= set(string.ascii_letters + string.digits + "._+-")


def test_run_name_is_short_however_long_the_path_of_a_local_folder():
    config = RunConfig(model_name="/home/" + "x" * 5000, dtype="fp32", gradient_checkpointing=False, seed=12345)
    assert len(config.run_name) < 200


def test_run_name_does_not_depend_on_whether_the_gpu_was_asked_for_or_found():
    assert RunConfig(device="auto").run_name == RunConfig(device="cuda").run_name != RunConfig(device="cpu").run_name


def test_config_survives_json(rng):
    for _ in range(200):
        config = random_config(rng)
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_another_version_can_be_read():
    values = RunConfig(batch_size=3).to_dict() | {"field_of_the_future": 1}
    del values["attention"]
    assert RunConfig.from_dict(values) == RunConfig(batch_size=3)


def test_files_of_a_run_share_its_name():
    config = RunConfig(result_dir="r", snapshot_dir="s", log_dir="l")
    name = config.run_name
    files = config.record_file, config.snapshot_file, config.log_folder, config.trace_file.parent
    assert [str(path) for path in files] == [f"r/{name}.json", f"s/{name}.pickle", f"l/{name}", f"l/{name}"]


def test_results_of_a_run_are_git_ignored():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"/{getattr(RunConfig(), name)}/" for name in ("result_dir", "snapshot_dir", "log_dir")} <= set(ignored)
