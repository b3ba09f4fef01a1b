"""Predictions: against what GPUs measured, against figures made by hand, and the search and snapshots made of them."""

import dataclasses
import functools
import itertools
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz

import all_gpu_liger_kernel as script
from doc import evidence
from src.config import RunConfig, limit_bytes
from src.explain.categories import CATEGORIES
from src.explain.reading import read
from src.machine import H100, Gpu, gpu_named
from src.model_utils import build_model
from src.predict import frontier
from src.predict.allocator import SimulatedOutOfMemory, rounded
from src.predict.dry_run import predict
from src.predict.frontier import measured_frontier, predicted_frontier, search
from src.record import load
from src.utils import GIB, MIB, UsageError
from tests.helpers import HUGGING_FACE, ROOT, SCRIPT, write_llama_folder

# Measured on an H100 or H200, which allocate alike, with Llama 3.2 1B.
MEASURED = {
    "none": "h200_single_gpu/bs4_seq1024_ropeFalse_siluFalse_rmsFalse_flceFalse",
    "no_flce": "h200_single_gpu/bs4_seq1024_ropeTrue_siluTrue_rmsTrue_flceFalse",
    "all": "h200_single_gpu/bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue",
    "no checkpointing": "h100_single_gpu/bs8_seq1024_ropeTrue_siluTrue_rmsTrue_flceTrue_gc0",
}
OUT_OF_MEMORY = "h100_single_gpu/bs16_seq1024_ropeFalse_siluFalse_rmsFalse_flceFalse_limit24"


def committed(name):
    return load(ROOT / "doc" / "data" / f"{name}.json")


@functools.cache
def predicted(config):
    """The prediction for `config`, made once."""
    return predict(config, script.build_experiment)


def of_record(name):
    return predicted(committed(MEASURED[name]).run)


def test_where_memory_is_scarce_later_steps_have_to_fit_too():
    config = RunConfig(model_name="tiny-llama", batch_size=2, seq_length=64, device="cuda")
    reserved = predict(config, script.build_experiment).peak_reserved_bytes

    def after_steps(greedy, limit_bytes, **more):
        """How many steps were simulated, of which one wants all of the memory for itself, and whether all fitted."""
        steps = []

        def build(config, runtime):
            experiment = script.build_experiment(config, runtime)

            def step(mark):
                steps.append(torch.empty(reserved if len(steps) == greedy else 0, dtype=torch.uint8, device="cuda"))
                return experiment.step(mark)

            return dataclasses.replace(experiment, step=step)

        found = predict(config, build, limit_bytes=limit_bytes, strict=False, **more)
        return len(steps), found.refused is None

    scarce = int(1.02 * reserved)
    assert after_steps(None, scarce) == (4, True)
    assert after_steps(3, scarce) == (4, False)  # the one after that which is shown
    assert after_steps(1, scarce)[1] is False
    assert after_steps(None, scarce, steps_more=False) == (2, True)
    assert after_steps(None, 2 * reserved) == (2, True)


@pytest.mark.parametrize("name", MEASURED)
def test_prediction_is_what_the_gpu_measured(name):
    prediction, record = of_record(name), committed(MEASURED[name])
    assert prediction.phases.peak_bytes == record.phase_peak_bytes
    # A timed step holds one block more than the step of the phases: the loss of the step before.
    assert prediction.peak_bytes == record.peak_memory_bytes - 512
    assert prediction.load_peak_bytes == record.load_peak_bytes
    assert prediction.phases.phase == record.peak_phase
    assert prediction.implementations == record.implementations
    assert prediction.model_flops == record.model_flops_per_step
    # What stays cached depends on the order of requests, which no run repeats exactly.
    assert prediction.peak_reserved_bytes == pytest.approx(record.peak_reserved_bytes, rel=0.01)


@pytest.mark.parametrize("name", MEASURED)
def test_breakdown_sums_to_the_peak_and_is_what_the_gpus_snapshot_showed(name):
    prediction, shown = of_record(name), committed(MEASURED[name]).peak_breakdown
    assert list(prediction.breakdown) == list(CATEGORIES)
    assert sum(prediction.breakdown.values()) == prediction.peak_bytes
    assert prediction.breakdown["unattributed"] < 0.01 * prediction.peak_bytes
    if shown is not None:
        # A snapshot has what was asked for; a prediction counts what a block has beyond that as the block's.
        tolerance = 2 * MIB + shown["allocator_rounding"]
        assert {key: prediction.breakdown[key] for key in shown} == pytest.approx(shown, abs=tolerance)


def parameter_bytes(config):
    """Of all parameters: what requests of their sizes take."""
    return sum(rounded(p.nbytes) for p in build_model(config, torch.device("meta")).parameters())


def test_run_that_ran_out_of_memory_does_in_the_prediction_at_the_same_request():
    record = committed(OUT_OF_MEMORY)
    with pytest.raises(SimulatedOutOfMemory) as caught:
        predict(record.run, script.build_experiment, limit_bytes=limit_bytes(record.run))
    facts, error = caught.value.facts, record.error
    assert 0 <= error.requested_bytes - facts["requested_bytes"] < 2 * MIB  # PyTorch tells the segment's size
    assert facts["allocated_bytes"] == pytest.approx(error.allocated_bytes, rel=0.001)
    assert facts["free_bytes"] == pytest.approx(error.free_bytes, rel=0.01)


def test_run_whose_second_step_ran_out_of_memory_does_so_in_the_prediction():
    rows = map(json.loads, (ROOT / "doc/data/advice/h200.jsonl").read_text().splitlines())
    row = next(r for r in rows if r["status"] == "oom" and r["config"]["seq_length"] == 35840)
    with pytest.raises(SimulatedOutOfMemory):
        predict(RunConfig.from_dict(row["config"]), script.build_experiment, limit_bytes=row["limit_bytes"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration for a GPU whose prediction takes a second, with folders of its own."""
    folder = tmp_path_factory.mktemp("predictions")
    model = write_llama_folder(folder / "model", num_hidden_layers=1, vocab_size=4096, max_position_embeddings=512)
    folders = {name: str(folder / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
    sizes = {"model_name": model, "batch_size": 2, "seq_length": 128}
    return RunConfig(**sizes, **folders, **HUGGING_FACE, device="cuda")


def test_micro_batches_after_the_first_find_gradients_beside_their_own_memory(small):
    once, twice, thrice = (
        predicted(dataclasses.replace(small, gradient_accumulation_steps=count)) for count in (1, 2, 3)
    )
    assert (once.phases.phase, once.breakdown["gradients"]) == ("backward", 0)
    assert twice.breakdown["gradients"] == parameter_bytes(small)
    # Besides: the other micro-batch's tokens and its loss.
    tokens = 2 * 128 * 8
    assert twice.peak_bytes - once.peak_bytes == parameter_bytes(small) + tokens + 512
    assert thrice.peak_bytes - twice.peak_bytes == tokens + 512
    assert twice.model_flops == 2 * once.model_flops


@pytest.fixture(scope="module")
def dry_runs(small):
    """Dry runs as a user starts them, on cards with room and without: (exit status, configuration) of each."""
    cards = {"fits": {"gpu_memory_gib": 4.0}, "full": {"memory_limit_gib": 30 * MIB / GIB}}
    configs = {name: dataclasses.replace(small, dry_run=True, **card) for name, card in cards.items()}
    return {name: (script.main(config), config) for name, config in configs.items()}


def test_dry_run_records_its_prediction_and_nothing_that_was_not_simulated(small, dry_runs):
    status, config = dry_runs["fits"]
    record, prediction = load(config.record_file), predicted(small)
    assert (status, record.status, record.mode, record.simulated_gpu) == (0, "ok", "predicted", H100.name)
    assert record.peak_memory_bytes == prediction.peak_bytes == max(record.phase_peak_bytes.values())
    assert record.peak_breakdown == prediction.breakdown
    assert record.peak_reserved_bytes == prediction.peak_reserved_bytes
    measured_only = [record.latency_s, record.mfu, record.losses, record.grad_norm, record.host_peak_bytes]
    assert measured_only == [None] * 5


def test_a_run_of_one_step_alone_has_no_optimizer_state_before_it(small):
    one_step = dataclasses.replace(small, warmup=0, iterations=1)
    first, later = (predicted(config) for config in (one_step, dataclasses.replace(one_step, warmup=1)))
    states = 2 * later.breakdown["parameters"]
    workspace = later.breakdown["library_workspace"] / 2  # of the backward pass
    more = later.phases.peak_bytes["forward"] - first.phases.peak_bytes["forward"]
    assert more == pytest.approx(states + workspace, rel=1e-3)
    assert later.phases.peak_bytes == predicted(small).phases.peak_bytes


def test_card_that_is_too_small_gives_status_3_and_the_peak_all_the_same(small, dry_runs):
    status, config = dry_runs["full"]
    record = load(config.record_file)
    assert (status, record.status, record.peak_memory_bytes) == (3, "oom", predicted(small).peak_bytes)
    assert record.error.free_bytes + record.error.allocated_bytes == 30 * MIB
    assert limit_bytes(dry_runs["fits"][1]) == 4 * GIB - H100.context_bytes
    with pytest.raises(UsageError, match="--gpu_memory_gib"):
        limit_bytes(dataclasses.replace(config, gpu_memory_gib=0.5))


def test_dry_run_always_says_whether_it_fits_its_card(small, dry_runs, capsys):
    large = dataclasses.replace(small, dry_run=True, batch_size=2**14, seq_length=256)
    assert script.main(large) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "It does NOT fit an NVIDIA H100 80GB HBM3: 80,312.0 MiB for PyTorch's allocator."
    record = load(large.record_file)
    assert (record.status, record.peak_memory_bytes > H100.memory_bytes) == ("oom", True)
    unused = record.error.reserved_bytes - record.error.allocated_bytes
    assert 0 <= record.error.largest_gap_bytes <= unused
    assert script.main(dataclasses.replace(small, dry_run=True)) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("It fits an NVIDIA H100 80GB HBM3: 80,312.0 MiB")
    assert script.main(dataclasses.replace(small, dry_run=True, checkpoint_offload="blocking")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "No time is predicted: no rate is known of copies that the CPU waits for."


def test_snapshot_read_back_gives_the_predictions_breakdown(small, dry_runs):
    found = read(dry_runs["fits"][1].snapshot_file)
    assert found.breakdown() == predicted(small).breakdown
    assert [phase for _, phase in found.phases] == ["forward", "backward", "optimizer"]
    assert found.peak_phase == predicted(small).phases.phase


def test_snapshot_is_one_that_pytorchs_own_tools_read(small, dry_runs):
    snapshot = pickle.loads(dry_runs["fits"][1].snapshot_file.read_bytes())
    for segment in snapshot["segments"]:
        blocks = segment["blocks"]
        assert blocks[0]["address"] == segment["address"]
        assert all(a["address"] + a["size"] == b["address"] for a, b in itertools.pairwise(blocks))
        assert sum(block["size"] for block in blocks) == segment["total_size"]
    live = peak = sum(segment["active_size"] for segment in snapshot["segments"])
    for event in reversed(snapshot["device_traces"][0]):  # from the end of the step to its beginning
        live += {"alloc": -1, "free_requested": 0, "free_completed": 1}[event["action"]] * event["size"]
        peak = max(peak, live)
    assert peak == predicted(small).peak_bytes
    forward = [event for event in snapshot["device_traces"][0] if "aten.embedding.default" in event["user_metadata"]]
    assert forward[0]["frames"][0]["name"] == "aten.embedding.default in model.embed_tokens"
    assert any((f["filename"], f["name"]) == (str(SCRIPT), "step") for f in forward[0]["frames"])
    assert "segments" in _memory_viz.segsum(snapshot)


@settings(max_examples=200)
@given(granularity=st.sampled_from([1, 7, 128]), largest=st.integers(1, 3000), threshold=st.integers(0, 3500))
def test_search_finds_what_trying_every_size_does(granularity, largest, threshold):
    asked = []
    found = search(lambda size: asked.append(size) or size <= threshold, granularity, largest)
    sizes = range(granularity, largest + 1, granularity)
    assert found == max((size for size in sizes if size <= threshold), default=0)
    assert set(asked) <= set(sizes)
    assert len(asked) == len(set(asked)) <= 2 * max(1, len(sizes)).bit_length()
    assert max(asked, default=0) <= max(2 * threshold, granularity)  # a size far too large is not for free either


@pytest.mark.parametrize("threshold", [99_000, 99_456, 104_000, 100])
def test_measured_length_is_found_in_steps_of_a_128th_or_less(small, threshold):
    sizes, expected, step = [], 777 * 128, 4 * 128

    def measure(config):
        sizes.append(config.seq_length)
        return 0 if config.seq_length <= threshold else 3

    asked = dataclasses.replace(small, find_max="seq_length", model_name="meta-llama/Llama-3.2-1B")
    found = measured_frontier(asked, measure, expected)
    assert found <= threshold < (found + step if found else 128)
    assert len(sizes) <= abs(expected - threshold) / step + 2
    assert min(sizes) > 0


@pytest.mark.parametrize(("expected", "threshold"), [(20, 20), (20, 22), (20, 18), (0, 3), (2, 0)])
def test_measured_frontier_is_found_around_the_prediction(small, expected, threshold):
    ran = []

    def measure(config):
        ran.append(config)
        return 0 if config.batch_size <= threshold else 3

    config = dataclasses.replace(small, find_max="batch_size", gpu_memory_gib=24)
    assert measured_frontier(config, measure, expected) == threshold
    assert len(ran) == len({run.run_name for run in ran}) <= abs(expected - threshold) + 2
    for run in ran:  # plain runs, with records only, on a card of that size
        assert (run.find_max, run.snapshot_dir, run.log_dir, run.gpu_memory_gib) == (None, "", "", None)
        assert int(run.memory_limit_gib * GIB) == pytest.approx(limit_bytes(config), abs=1)


@pytest.fixture(scope="module")
def searched(small):
    """A search on a small card as a user starts it: its configuration and record."""
    config = dataclasses.replace(small, dry_run=True, find_max="batch_size", memory_limit_gib=100 * MIB / GIB)
    assert script.main(config) == 0
    return config, load(config.record_file)


def test_predicted_frontier_fits_and_the_next_size_does_not(searched):
    config, record = searched
    size, limit = record.frontier.predicted, record.frontier.limit_bytes
    assert (record.mode, limit, record.frontier.measured) == ("predicted", 100 * MIB, None)
    assert size > 1

    def predict_size(size):
        return predict(dataclasses.replace(config, batch_size=size), script.build_experiment, limit_bytes=limit)

    assert predict_size(size).peak_bytes == record.peak_memory_bytes <= limit
    with pytest.raises(SimulatedOutOfMemory):
        predict_size(size + 1)


def test_frontier_without_room_is_zero_and_status_3(small):
    config = dataclasses.replace(small, dry_run=True, find_max="seq_length", memory_limit_gib=MIB / GIB)
    assert predicted_frontier(config, script.build_experiment, H100, MIB) == (0, None)
    assert script.main(config) == 3
    record = load(config.record_file)
    assert (record.status, record.frontier.predicted, record.peak_memory_bytes) == ("oom", 0, None)


@pytest.mark.parametrize(("room", "ends"), [(GIB, True), (100 * MIB, False)], ids=["roomy", "small"])
def test_search_says_where_it_is_the_positions_that_end(small, capsys, room, ends):
    config = dataclasses.replace(small, dry_run=True, find_max="seq_length", memory_limit_gib=room / GIB)
    assert script.main(config) == 0
    assert (load(config.record_file).frontier.predicted == 512) == ends
    assert ("--rope_scaling goes beyond them" in capsys.readouterr().out) == ends


def test_on_a_gpu_what_fits_this_card_is_predicted_and_measured(small, monkeypatch):
    card = Gpu("Small Card", (9, 0), 132, memory_bytes=H100.context_bytes + GIB)
    prediction, asked = predicted(small), []

    def predicted_seven(_config, _build, *where):
        asked.append(where)
        return 7, prediction

    monkeypatch.setattr(frontier, "predicted_frontier", predicted_seven)
    monkeypatch.setattr(frontier, "this_gpu", lambda: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    measuring = dataclasses.replace(script.SCRIPT, main=lambda config: 0 if config.batch_size <= 6 else 3)
    config = dataclasses.replace(small, find_max="batch_size")
    assert frontier.main(config, measuring) == 0
    found = load(config.record_file).frontier
    assert asked == [(card, GIB, script.SCRIPT.simulate)]
    assert (found.limit_bytes, found.predicted, found.measured) == (GIB, 7, 6)


def test_window_that_a_sequence_fills_is_refused_where_no_record_says_what_its_mask_needs():
    """Hugging Face makes a mask once a sequence is as long as the window."""
    config = RunConfig(model_name="tiny-gemma3", batch_size=1, seq_length=511, **HUGGING_FACE)
    filled, ada = dataclasses.replace(config, seq_length=512), gpu_named("rtx4090")
    for own, card in ((config, ada), (filled, H100)):
        assert predict(own, script.build_experiment, card=card).peak_bytes > 0
    with pytest.raises(UsageError, match="a sliding window that a sequence fills, is not predicted"):
        predict(filled, script.build_experiment, card=ada)


def test_phases_under_a_mask_are_those_that_a_gpu_measured():
    run = evidence.folder("h200_people").find("all", model_name="google/gemma-3-1b-pt", batch_size=4, iterations=5)
    found = predict(run.run, script.build_experiment)
    for phase, measured in run.phase_peak_bytes.items():
        assert found.phases.peak_bytes[phase] == pytest.approx(measured, rel=2e-4)
    assert found.step_time is None  # the kernel's speed is not known
    events = found.gpu.events[found.first_event :]
    sizes = [own.size for kind, own in events if kind == "alloc" and "cudnn_attention_backward" in own.operation]
    # What that run's snapshot has: the layers' workspaces, under the mask of a window and without.
    for workspace, layers in ((16_843_008, 22), (33_620_224, 4)):
        assert sum(abs(size - workspace) < 1024 for size in sizes) == layers
