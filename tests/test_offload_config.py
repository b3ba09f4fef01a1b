"""The offloaded run before it runs: DeepSpeed's settings, overrides, and the host memory that it will take."""

import json

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from src.ds_utils import _merged, zero3_config
from src.measure import Measurement, PhasePeaks
from src.model_utils import load_model_config, parameter_counts
from src.offload import host_memory, team
from src.offload.host_memory import check_host_memory, host_bytes_needed
from src.offload_config import PRESETS, OffloadConfig
from src.record import load
from src.utils import GIB, UsageError
from tests.helpers import ROOT, near_host_peak

LAYER, REST = 60_821_504, 262_670_336  # weights of Llama 3.2 1B: of one of 16 layers, and besides


def of_preset(name, **fields):
    return OffloadConfig(preset=name, **{**PRESETS[name], **fields})


def settings_of(config):
    settings = zero3_config(config, load_model_config(config))
    assert json.loads(json.dumps(settings)) == settings
    return settings, settings["zero_optimization"]


def test_original_preset_is_the_originals_configuration():
    settings, zero = settings_of(of_preset("original"))
    pinned = {"device": "cpu", "pin_memory": True}
    sizes = {"reduce_bucket_size": 100_000, "sub_group_size": 0, "stage3_param_persistence_threshold": 0}
    sizes |= {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    offload = {"offload_param": pinned, "offload_optimizer": pinned}
    assert zero == {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, **offload, **sizes}
    assert settings["fp16"] == {"enabled": True, "loss_scale_window": 100, "initial_scale_power": 7, "hysteresis": 1}
    assert (settings["gradient_clipping"], settings["train_micro_batch_size_per_gpu"]) == (0.9, 4)
    assert (settings["gradient_accumulation_steps"], "bf16" in settings) == (1, False)


@pytest.mark.parametrize("world_size", [1, 3])
def test_fast_preset_handles_a_layer_at_a_time(world_size):
    settings, zero = settings_of(of_preset("fast", world_size=world_size, gradient_accumulation_steps=2))
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == LAYER
    assert zero["sub_group_size"] == -(-LAYER // world_size)
    # The layer at work, the one before and the one fetched ahead, and what is no layer.
    assert zero["stage3_max_live_parameters"] == 3 * LAYER + REST
    assert zero["stage3_max_reuse_distance"] == 0
    assert zero["leaf_module"] == {"classes": ["LlamaDecoderLayer"]}
    of_ours = dict.fromkeys(("bf16_master_weights_and_grads", "bf16_optimizer_states"), False)  # kept by ours
    assert settings["bf16"] == {"enabled": True, **of_ours}
    assert (settings["gradient_accumulation_steps"], settings["zero_allow_untested_optimizer"]) == (2, True)


ALL_SETTINGS = {"dtype": "fp32", "fetch_layers": True, "prefetch_layers": 3}


@pytest.mark.parametrize("fields", [{"dtype": "bf16", "optimizer_states": "bf16"}, ALL_SETTINGS, PRESETS["fast"]])
def test_deepspeed_knows_every_setting(fields):
    _, zero = settings_of(OffloadConfig(**fields))
    taken = DeepSpeedZeroConfig(**zero)
    assert not taken.model_extra  # what it does not know: no setting is misspelt
    assert taken.max_live_parameters == zero["stage3_max_live_parameters"]
    assert taken.prefetch_bucket_size == zero["stage3_prefetch_bucket_size"]


# Vectors from RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("original", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"a": "foo"}, {"a": {"b": "c"}}, {"a": {"b": "c"}}),
    ],
)
def test_overrides_merge_as_rfc_7396_says(original, patch, result):
    before = json.dumps([original, patch])
    assert _merged(original, patch) == result
    assert json.dumps([original, patch]) == before


def test_override_changes_what_it_names_and_nothing_else():
    override = '{"zero_optimization": {"overlap_comm": false, "sub_group_size": null}, "wall_clock_breakdown": true}'
    (plain, _), (changed, zero) = settings_of(OffloadConfig()), settings_of(OffloadConfig(ds_override=override))
    assert (zero.pop("overlap_comm"), changed.pop("wall_clock_breakdown")) == (False, True)
    del plain["zero_optimization"]["overlap_comm"], plain["zero_optimization"]["sub_group_size"]
    del plain["wall_clock_breakdown"]
    assert changed == plain


def committed_host_peaks():
    found = [load(path) for path in sorted((ROOT / "doc" / "data").rglob("*liger_rope*.json"))]
    # An override can change what is offloaded.
    return [r for r in found if r.host_peak_bytes and r.mode == "measured" and r.run.ds_override == "{}"]


def test_host_memory_is_within_a_few_per_cent_of_every_committed_record():
    found = committed_host_peaks()
    assert len(found) > 30
    assert {r.run.optimizer_states for r in found} == {"fp32", "bf16"}
    assert {r.processes for r in found} == {1, 2, 4}
    for record in found:
        shape = load_model_config(record.run)
        assert host_bytes_needed(record.run, shape) == near_host_peak(record), record.run_name


def test_host_memory_is_what_one_works_out_by_hand():
    count = 16 * LAYER + REST
    assert parameter_counts(load_model_config(OffloadConfig())) == (LAYER, REST)
    process = 3 * 2**29
    for world_size in (1, 2):
        share = count // world_size
        # Pinned memory comes in powers of two: 4 GiB for all weights in 16 bits, 512 MiB for REST, 1 GiB in 32.
        pinned = (2 * 2**32 + 2**29) // world_size + 2 * share
        config = of_preset("original", world_size=world_size)
        gradients, infinities = (2**30 + 4 * 16 * LAYER) // world_size, 3 * share
        expected = 12 * share + pinned + gradients + infinities + process + 2**29  # more of the process, in a step
        assert host_bytes_needed(config, load_model_config(config)) == world_size * expected
        config = of_preset("fast", world_size=world_size, optimizer_states="bf16")
        expected = 4 * share + pinned + 2 * share + process
        assert host_bytes_needed(config, load_model_config(config)) == world_size * expected


@pytest.mark.parametrize(("world_size", "local"), [(1, 1), (4, 4), (4, 2)])
def test_host_with_a_byte_too_little_is_refused_with_figures(monkeypatch, world_size, local):
    config = of_preset("original", world_size=world_size)
    shape = load_model_config(config)
    share = host_bytes_needed(config, shape) * local // world_size  # of the job, on this machine
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: share)
    check_host_memory(config, shape)
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: share - 1)
    with pytest.raises(UsageError, match=rf"{share / GIB:.1f} GiB of host memory.*--preset fast"):
        check_host_memory(config, shape)


def test_slowest_and_fullest_ranks_stand_for_the_job(monkeypatch):
    def with_other(theirs):
        monkeypatch.setattr(team, "gathered", lambda own: [own, theirs])
        return team.Ranks()

    mine = Measurement([1.0, 4.0], [2.0, 3.0], [10, 40], [50, None], 70, 0)
    theirs = Measurement([2.0, 3.0], [4.0, 5.0], [20, 30], [60, 90], 60, 2)
    both = Measurement([2.0, 4.0], [3.0, 4.0], [20, 40], [60, None], 70, 2)
    assert with_other(theirs).measurement(mine) == both
    peaks = {"forward": 5, "backward": 6, "optimizer": None}
    phases = with_other(peaks).phases(PhasePeaks({"forward": 7, "backward": 3, "optimizer": 1}, 0.5))
    assert phases == PhasePeaks({"forward": 7, "backward": 6, "optimizer": None}, 0.5)
    assert (with_other(3).total(4), with_other(3).largest(4), with_other(None).largest(4)) == (7, 4, None)
