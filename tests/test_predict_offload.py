"""Predictions of offloaded runs: against what GPUs measured, and against what real ranks gather on CPUs."""

import dataclasses
import functools
import json
import statistics
from collections import Counter

import pytest
from transformers.integrations import is_deepspeed_zero3_enabled

import deepspeed_liger_kernel as script
from doc import evidence
from src import overrides
from src.measure.devices import HostRuntime
from src.model_utils import load_model_config
from src.offload import simulated
from src.offload.host_memory import PROCESS_BYTES, STEPS_BYTES, host_bytes_needed
from src.offload.simulated import SimulatedRank, unchecked
from src.offload_config import PRESETS, OffloadConfig
from src.predict import dry_run
from src.predict.allocator import SimulatedOutOfMemory
from src.predict.dry_run import FakeRuntime, predict
from src.predict.fake_machine import FakeMachine
from src.record import load
from src.utils import GIB, MIB, UsageError
from tests.helpers import HUGGING_FACE, ROOT, assert_one_error_line, near_host_peak, run_python, write_llama_folder
from tests.test_offload import config_of, folder, in_forks  # noqa: F401 - the fixture

CASES = ROOT / "tests" / "data" / "ds"
SCRIPT = ROOT / "deepspeed_liger_kernel.py"


def committed(name):
    return load(ROOT / "doc" / "data" / f"{name}.json")


# Against what GPUs measured


def test_committed_predictions_are_within_a_thousandth_of_every_offloaded_peak():
    every = evidence.predictions(evidence.offloaded_runs())
    pairs = [pair for pair in every if pair[1].status == "ok"]
    foreseen = [prediction.status == "oom" for prediction, run in every if run.status == "oom"]
    assert (len(pairs) > 100, len(foreseen) > 15, sum(foreseen) >= len(foreseen) - 2) == (True, True, True)
    assert {run.processes for _, run in pairs} == {1, 2, 4}
    errors = [abs(evidence.error(*pair)) for pair in pairs]
    assert max(errors) < 1e-3
    assert statistics.median(errors) < 1e-5
    for prediction, run in pairs:
        assert prediction.peak_phase == run.peak_phase
        if run.load_peak_bytes is not None:
            assert prediction.load_peak_bytes == pytest.approx(run.load_peak_bytes, rel=1e-5)
        if run.host_peak_bytes is not None:
            assert prediction.predicted_host_bytes == near_host_peak(run), run.run_name


@pytest.mark.parametrize(
    "name",
    [
        "h100_offload/bs4_seq1024_liger_rope1_silu1_rms1_flce1",
        "h100_two_gpus/bs8_seq1024_liger_rope1_silu1_rms1_flce1_warmup2_fast_gpus2",
    ],
)
def test_prediction_made_now_is_what_the_gpu_measured(name):
    run = committed(name)
    found = predict(run.run, script.build_experiment, simulate=SimulatedRank)
    assert found.peak_bytes == pytest.approx(run.peak_memory_bytes, rel=1e-4)
    assert found.phases.peak_bytes == pytest.approx(run.phase_peak_bytes, rel=1e-3)
    assert found.load_peak_bytes == pytest.approx(run.load_peak_bytes, rel=1e-5)
    assert found.host_peak_bytes == pytest.approx(run.host_peak_bytes, rel=0.05)
    assert found.breakdown["unattributed"] < 0.01 * found.peak_bytes
    assert sum(found.breakdown.values()) == found.peak_bytes
    assert found.implementations == run.implementations
    assert not unchecked(run.run)


# Against real ranks


def fetches(config, runtime):
    """In the order of a step, the elements that each fetch gathers and the bytes that this rank gives to it; and the
    elements of each parameter that is let go."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    experiment = script.build_experiment(config, runtime)
    experiment.step()
    coordinator, log = experiment.engine.optimizer.parameter_offload.get_param_coordinator(), []
    names = "_PartitionedParameterCoordinator__all_gather_params", "_PartitionedParameterCoordinator__release_param"
    gather, release = (getattr(coordinator, name) for name in names)

    def logged_gather(params, forward):
        wanted = [p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        given = sum(p.ds_tensor.nbytes for p in wanted)
        log.append(("gather", sum(p.ds_numel for p in wanted), given))
        gather(params, forward)

    def logged_release(param, *args):
        if param.ds_status == ZeroParamStatus.AVAILABLE and not param.ds_active_sub_modules:
            log.append(("release", param.ds_numel, 1))
        release(param, *args)

    setattr(coordinator, names[0], logged_gather)
    setattr(coordinator, names[1], logged_release)
    experiment.step()
    experiment.finish_updates()
    experiment.engine.destroy()
    # A set of parameters is let go in any order.
    return [entry for entry in log if entry[0] == "gather"], sorted(entry for entry in log if entry[0] == "release")


def real_fetches(configs):
    return [fetches(config, HostRuntime()) for config in configs]


@pytest.mark.usefixtures("compiled_adam")
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_gather_and_let_go_what_the_simulated_one_does(folder, ranks):  # noqa: F811
    usual = {"batch_size": 2 // ranks, "world_size": ranks}
    configs = [config_of(preset, folder, **usual) for preset in PRESETS]
    configs += [config_of("fast", folder, **usual, lora_rank=3)]
    found = in_forks(ranks, real_fetches, configs)
    for number, config in enumerate(configs):
        rank = SimulatedRank(config, evidence.machine.H100)
        runtime = FakeRuntime(rank)
        with runtime.tracking():
            simulated = fetches(dataclasses.replace(config, dry_run=True, device="cuda"), runtime)
        assert [own[number] for own in found] == [simulated] * ranks
        assert len(simulated[0]) > 5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_host_check_of_frozen_weights_asks_for_what_the_simulated_ranks_take(tmp_path, tied):
    sizes = {"vocab_size": 20000, "hidden_size": 256, "intermediate_size": 1000, "tie_word_embeddings": tied}
    model = write_llama_folder(tmp_path, num_hidden_layers=3, num_attention_heads=8, head_dim=32, **sizes)
    fast = PRESETS["fast"] | HUGGING_FACE
    config = OffloadConfig(preset="fast", model_name=model, seq_length=32, lora_rank=4, world_size=2, **fast)
    process = 2 * PROCESS_BYTES
    found = predict(config, script.build_experiment, simulate=SimulatedRank).host_peak_bytes - process
    assert host_bytes_needed(config, load_model_config(config)) - process == pytest.approx(found, rel=0.05)


def test_host_check_of_weights_on_the_gpu_asks_for_what_the_simulated_ranks_take(tmp_path):
    sizes = {"vocab_size": 20000, "hidden_size": 256, "intermediate_size": 1000}
    model = write_llama_folder(tmp_path, num_hidden_layers=3, num_attention_heads=8, head_dim=32, **sizes)
    zero = json.dumps({"zero_optimization": {"offload_param": None}})
    config = OffloadConfig(model_name=model, seq_length=32, batch_size=1, world_size=2, ds_override=zero)
    process = 2 * (PROCESS_BYTES + STEPS_BYTES)
    found = predict(config, script.build_experiment, simulate=SimulatedRank).host_peak_bytes - process
    assert host_bytes_needed(config, load_model_config(config)) - process == pytest.approx(found, rel=0.05)


# Memory in two places


def test_tensors_live_where_they_were_asked_for():
    import torch

    machine = FakeMachine()
    with machine.active():
        host = torch.zeros(1000)
        pinned = host.pin_memory()
        assert (machine.host.live_bytes, machine.live_bytes) == (4000 + 4096, 0)
        gpu = pinned.to("cuda")
        assert (gpu.device.type, gpu.is_cuda, machine.live_bytes) == ("cuda", True, 4096)
        back = gpu.to("cpu", torch.float64)
        assert (back.device.type, back.dtype, machine.host.live_bytes) == ("cpu", torch.float64, 8096 + 8000)
        del pinned, host
        assert machine.host.live_bytes == 4096 + 8000  # pinned memory is kept ...
        kept = torch.empty(900).pin_memory()
        assert machine.host.live_bytes == 4096 + 8000  # ... and given to who asks for as much
        kept.copy_(gpu[:900])
        assert (gpu + 1).is_cuda
        assert not kept.is_cuda


# --ds_override as DeepSpeed's users have it


def settings_of(**fields):
    from src.ds_utils import _check_accepted, zero3_config
    from src.model_utils import load_model_config

    config = OffloadConfig(**fields)
    settings = zero3_config(config, load_model_config(config))
    _check_accepted(settings)
    return settings


@pytest.mark.parametrize("name", ["hf_zero3_auto", "llamafactory_z3_offload_auto", "zero3_no_offload"])
@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_other_projects_are_filled_in_with_our_values(name, preset):
    text = overrides.normalised(str(CASES / f"{name}.json"))
    assert text == overrides.normalised((CASES / f"{name}.json").read_text())
    own = {"preset": preset, **PRESETS[preset]}
    if (preset, name) == ("fast", "zero3_no_offload"):
        with pytest.raises(UsageError, match="needs stage 3 with both on the cpu: take --preset original"):
            OffloadConfig(ds_override=text, **own)
        return
    plain, changed = settings_of(**own), settings_of(ds_override=text, **own)
    assert '"auto"' not in json.dumps(changed)
    assert not {"optimizer", "scheduler"} & set(changed)
    for key in ("train_micro_batch_size_per_gpu", "gradient_clipping", "gradient_accumulation_steps"):
        assert changed[key] == plain[key]
    zero = changed["zero_optimization"]
    assert zero["reduce_bucket_size"] == plain["zero_optimization"]["reduce_bucket_size"]
    if name == "hf_zero3_auto":
        assert zero["sub_group_size"] == zero["stage3_max_live_parameters"] == 1e9
    if name == "zero3_no_offload":
        assert not {"offload_param", "offload_optimizer"} & set(zero)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "stage must be 1, 2 or 3"),
        ({"zero_optimization": []}, "zero_optimization must be a JSON object"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param on 'nvme' is not known here"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param is for stage 3"),
        ({"optimizer": {"type": "Lion"}}, "it trains with AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer.params.lr has no effect here"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "give --lr_scheduler_type"),
        ({"train_micro_batch_size_per_gpu": 3}, "give --per_device_train_batch_size"),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled True does not go with --dtype fp16"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(override, text):
    with pytest.raises(UsageError, match=text):
        OffloadConfig(ds_override=overrides.normalised(json.dumps(override)))


def test_deepspeeds_adam_is_not_forced_beside_ours():
    forced = json.dumps({"zero_force_ds_cpu_optimizer": True})
    assert OffloadConfig(ds_override=forced).optimizer == "deepspeed_cpu_adam"
    with pytest.raises(UsageError, match="wants DeepSpeed's Adam"):
        OffloadConfig(**PRESETS["fast"], ds_override=forced)


@pytest.mark.parametrize(
    ("zero", "kept"),
    [
        ({"stage": 3}, ["offload_param", "offload_optimizer"]),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, ["offload_param"]),
        ({"stage": 2}, ["offload_optimizer"]),
        ({"stage": 3, "offload_param": None, "offload_optimizer": None}, []),
        ({"stage3_max_live_parameters": 1e9}, []),
    ],
    ids=str,
)
def test_what_a_file_does_not_offload_and_stays_offloaded_is_told(zero, kept):
    told = overrides.warnings(OffloadConfig(ds_override=json.dumps({"zero_optimization": zero})))
    assert [line.split()[4].rstrip(",") for line in told] == kept


def test_stages_and_places_are_told():
    def told(zero):
        config = OffloadConfig(ds_override=json.dumps({"zero_optimization": zero}))
        return config.zero_stage, config.weights_on_cpu, config.optimizer_on_cpu

    assert told({}) == (3, True, True)
    assert told({"stage": 2}) == (2, False, True)
    assert told({"offload_optimizer": {"device": "none"}}) == (3, True, False)
    assert told({"offload_param": None}) == (3, False, True)
    assert "ZeRO-3 offload, preset original" in OffloadConfig().description
    config = OffloadConfig(ds_override='{"zero_optimization":{"stage":1,"offload_optimizer":null}}', world_size=64)
    assert "ZeRO-1 with weights on the GPU and optimizer on the GPU" in config.description
    assert unchecked(config) == ["ZeRO-1", "weights on the GPU", "optimizer on the GPU", "64 GPUs"]
    other = OffloadConfig(ds_override='{"zero_optimization":{"stage3_max_live_parameters":1e9}}')
    assert unchecked(other) == ["--ds_override's other values"]
    long = OffloadConfig(**OffloadConfig.presets["longest"])
    assert not unchecked(long)
    assert len(unchecked(dataclasses.replace(long, world_size=4))) == 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags of a dry run that takes seconds."""
    place = tmp_path_factory.mktemp("tiny")
    flags = {"model_name": "tiny-llama", "max_seq_len": 64, "result_dir": place, "log_dir": "", "snapshot_dir": ""}
    return [f"--{name}={value}" for name, value in flags.items()], place


def predicted_parts(preset="original", simulate=SimulatedRank, **fields):
    """Of a tiny model's peak, by category."""
    own = {"model_name": "tiny-llama", "seq_length": 64, "dtype": "bf16", "preset": preset} | HUGGING_FACE | fields
    return predict(OffloadConfig(**PRESETS[preset] | own), script.build_experiment, simulate=simulate)


@functools.cache
def tiny_parameters():
    import torch

    from src.model_utils import build_model
    from tests.helpers import tiny_config

    return sum(p.numel() for p in build_model(tiny_config(), torch.device("meta")).parameters())


def test_host_memory_of_a_run_is_its_own_whatever_ran_before(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 300, "max_position_embeddings": 2**13}
    places = {"result_dir": str(tmp_path), "log_dir": "", "snapshot_dir": ""}
    settings = OffloadConfig.presets["longest"] | {"preset": "longest", "dry_run": True} | places
    model = write_llama_folder(tmp_path, num_hidden_layers=3, num_attention_heads=4, head_dim=64, **sizes)
    own = [OffloadConfig(**settings | {"model_name": model, "seq_length": n}) for n in (2**13, 2**12)]
    dry_run.many(own, script.SCRIPT)
    alone = [predict(config, script.build_experiment, simulate=SimulatedRank).host_peak_bytes for config in own]
    assert [load(config.record_file).predicted_host_bytes for config in own] == alone
    assert alone[0] > alone[1]


def test_each_stage_holds_what_its_definition_says():
    # Rajbhandari et al. 2020, table 1: per rank 12 bytes of states, and 2 of weights, over the ranks that share them.
    count, ranks, block = tiny_parameters(), 4, 2 * MIB
    for stage, share_of_weights in ((1, 1), (2, 1), (3, ranks)):
        zero = {"stage": stage, "offload_optimizer": None, "offload_param": None}
        found = predicted_parts(world_size=ranks, ds_override=json.dumps({"zero_optimization": zero}))
        resident = 12 * count // ranks + 2 * count // share_of_weights
        engine = found.experiment.resident()
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for own in engine.values() for t in own}
        assert sum(held.values()) >= resident
        assert found.peak_bytes >= resident
        assert found.peak_bytes < resident + 8 * count + 100 * block
        parts = found.breakdown["parameters"], found.breakdown["optimizer_state"]
        assert parts == pytest.approx((2 * count // share_of_weights, 12 * count // ranks), abs=block // 8)


class Counting(SimulatedRank):
    """Counts the operations that it sees."""

    operations = 0

    def __torch_dispatch__(self, *args, **kwargs):
        self.operations += 1
        return super().__torch_dispatch__(*args, **kwargs)


def test_without_the_pieces_of_other_ranks_only_the_time_is_another(monkeypatch):
    def predicted(ranks):
        found = predicted_parts("fast", Counting, world_size=ranks)
        # A set of parameters is let go in any order.
        requests = Counter((what, a.size, a.phase, a.operation) for what, a in found.gpu.events)
        sizes = found.phases, found.peak_reserved_bytes, found.host_peak_bytes, found.breakdown
        return found.gpu.operations, (requests, *sizes)

    few, without = predicted(6)  # some pieces are padded
    assert without[-1]["gathered_parameters"] > 100 * without[-1]["inputs"]
    monkeypatch.setattr(simulated, "only_own_pieces", lambda: ())
    many, as_deepspeed_does = predicted(6)
    assert without == as_deepspeed_does
    assert many > 1.1 * few


@pytest.mark.parametrize(("limit", "fits"), [(75 * MIB, True), (MIB, False)])
def test_fewest_gpus_fit_and_half_of_them_do_not(limit, fits, tmp_path, capsys):
    zero = json.dumps({"zero_optimization": {"offload_optimizer": None, "offload_param": None}})
    sizes = {"model_name": "tiny-llama", "batch_size": 1, "seq_length": 64, "dtype": "bf16", "ds_override": zero}
    places = {"result_dir": str(tmp_path), "snapshot_dir": "", "log_dir": ""}
    config = OffloadConfig(**sizes, **places, find_min="num_gpus", memory_limit_gib=limit / GIB)
    assert script.main(config) == (0 if fits else 3)
    record = load(config.record_file)
    count = record.frontier.predicted
    assert record.frontier.searched == "world_size"
    if not fits:
        assert (count, record.status, record.peak_memory_bytes) == (0, "oom", None)
        return
    assert record.processes == count > 1
    assert record.peak_reserved_bytes <= limit
    assert record.predicted_host_bytes > count * GIB
    told = capsys.readouterr()
    assert f"num_gpus {count} is the smallest power of two" in told.out
    assert told.err.startswith("num_gpus 1: does not fit\n")
    assert f"num_gpus {count // 2}: does not fit\nnum_gpus {count}: fits" in told.err


def test_build_that_fails_leaves_no_later_model_partitioned():
    zero = json.dumps({"zero_optimization": {"offload_optimizer": None, "offload_param": None}})
    sizes = {"model_name": "tiny-llama", "seq_length": 64, "dtype": "bf16", "ds_override": zero}
    with pytest.raises(SimulatedOutOfMemory) as failed:  # it holds the frames of what was built
        predict(OffloadConfig(**sizes), script.build_experiment, simulate=SimulatedRank, limit_bytes=MIB)
    assert any(frame.name == "build_engine" for frame in failed.traceback)
    assert not is_deepspeed_zero3_enabled()


def test_two_searches_are_refused():
    with pytest.raises(UsageError, match="give one of them"):
        OffloadConfig(find_min="num_gpus", find_max="batch_size")


def test_search_and_card_print_what_fits(tiny):
    flags, place = tiny
    found = run_python(SCRIPT, *flags, "--dry_run", "--num_gpus", "5", "--gpu_memory_gib", "4", "--preset", "fast")
    assert found.returncode == 0, found.stderr
    assert "Host memory peak" in found.stdout
    assert "It fits" in found.stdout
    assert "Not checked against a measurement: 5 GPUs, tiny-llama" in found.stdout
    assert not found.stderr
    (record,) = map(load, place.glob("*.json"))
    assert (record.mode, record.processes, record.host_peak_bytes) == ("predicted", 5, None)
    assert record.predicted_host_bytes > 5 * 2**30


def test_launcher_is_not_asked_for_a_dry_run(tiny, monkeypatch):
    import os
    import subprocess

    flags, _ = tiny
    variables = {"NUM_GPUS": "5", "MODEL_NAME": "tiny-llama", "MAX_SEQ_LENGTH": "32"}
    command = ["bash", ROOT / "run_ds.sh", "--dry_run", *flags[2:]]
    found = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "x 5 processes" in found.stdout


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num_gpus", "2"], "--num_gpus is for --dry_run and searches"),
        (["--dry_run", "--num_gpus", "0"], "--num_gpus must be from 1"),
        (["--dry_run", "--ds_override", "no/such/file.json"], "--ds_override is not JSON, and no file"),
    ],
)
def test_bad_requests_are_one_line(flags, text):
    found = run_python(SCRIPT, *flags)
    assert found.returncode == 2
    assert_one_error_line(found.stderr, text)
