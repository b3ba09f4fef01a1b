"""The search for the largest size that fits: predicted on any machine, and measured around the prediction."""

import dataclasses
import types

import pytest
import torch
from src.allocator import SimulatedOutOfMemory
from src.dry_run import limit_bytes, predict
from src.fake_gpu import H100
from src.frontier import GRANULARITY, largest_size, measured_frontier, predicted_frontier, search

import all_gpu_liger_kernel as script
from src import frontier, records
from src.config import RunConfig
from src.utils import GIB, MIB
from tests.helpers import HUGGING_FACE

ROOM = 140 * MIB  # for a few sizes of tiny-llama


@pytest.fixture
def config(tmp_path):
    """A search over tiny-llama."""
    folders = {name: str(tmp_path / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
    sizes = {"model_name": "tiny-llama", "batch_size": 3, "seq_length": 256}
    return RunConfig(device="cuda", find_max="batch_size", strategy=HUGGING_FACE, **sizes, **folders)


def counting(threshold):
    """A predicate that holds up to `threshold`, and the list of sizes it was asked about."""
    asked = []

    def fits(size):
        asked.append(size)
        return size <= threshold

    return fits, asked


@pytest.mark.parametrize("repeat", range(40))
def test_search_finds_what_trying_every_size_does(rng, repeat):
    granularity, largest = rng.choice([1, 2, 7, 128]), rng.randint(1, 3000)
    threshold = rng.choice([0, granularity - 1, granularity, rng.randint(0, 3500), largest, 10**9])
    fits, asked = counting(threshold)
    sizes = range(granularity, largest + 1, granularity)
    assert search(fits, granularity, largest) == max((size for size in sizes if size <= threshold), default=0)
    assert set(asked) <= set(sizes)
    assert len(asked) == len(set(asked)) <= 2 * max(1, len(sizes)).bit_length()


@pytest.mark.parametrize(("threshold", "calls"), [(0, 1), (1, 2), (2**20, 21), (2**19, 40), (700_000, 40)])
def test_search_asks_a_logarithmic_number_of_times(threshold, calls):
    fits, asked = counting(threshold)
    assert search(fits, 1, 2**20) == threshold
    assert len(asked) <= calls


def test_search_goes_no_further_than_a_few_sizes_beyond_what_fits():
    # A prediction of a size that is far too large is not for free either.
    fits, asked = counting(100)
    search(fits, 1, 2**20)
    assert max(asked) == 128


def test_largest_sequence_is_the_models_whatever_was_asked_for(config):
    assert largest_size(dataclasses.replace(config, find_max="seq_length")) == 2048
    llama = {"find_max": "seq_length", "model_name": "meta-llama/Llama-3.1-8B", "pretrained": True}
    assert largest_size(dataclasses.replace(config, **llama)) == 131072


@pytest.mark.parametrize(("find_max", "limit"), [("batch_size", ROOM), ("seq_length", ROOM)])
def test_predicted_frontier_fits_and_the_next_size_does_not(config, find_max, limit):
    config = dataclasses.replace(config, find_max=find_max)
    size, prediction = predicted_frontier(config, script.build_experiment, H100, limit)
    assert size % GRANULARITY[find_max] == 0
    assert 0 < size < largest_size(config)
    assert prediction.peak_bytes <= prediction.peak_reserved_bytes <= limit

    def predict_size(size):
        return predict(dataclasses.replace(config, **{find_max: size}), script.build_experiment, limit_bytes=limit)

    assert predict_size(size).peak_bytes == prediction.peak_bytes
    with pytest.raises(SimulatedOutOfMemory):
        predict_size(size + GRANULARITY[find_max])


def test_predicted_frontier_of_no_room_is_zero(config):
    assert predicted_frontier(config, script.build_experiment, H100, MIB) == (0, None)


def test_predicted_frontier_ends_at_the_models_positions(config):
    config = dataclasses.replace(config, find_max="seq_length", batch_size=1)
    assert predicted_frontier(config, script.build_experiment, H100, GIB)[0] == 2048


class FakeMeasurements:
    """Runs of which those beyond `threshold` run out of memory."""

    def __init__(self, threshold):
        self.threshold = threshold
        self.ran = []

    def __call__(self, config):
        self.ran.append(config)
        return 0 if max(config.batch_size, config.seq_length) <= self.threshold else 3

    def sizes(self, find_max):
        return [getattr(config, find_max) for config in self.ran]


@pytest.mark.parametrize(
    ("expected", "threshold", "sizes"),
    [
        (20, 20, [20, 21]),
        (20, 22, [20, 21, 22, 23]),
        (20, 18, [20, 19, 18]),
        (0, 3, [1, 2, 3, 4]),
    ],
    ids=["exact", "too-low", "too-high", "nothing-expected"],
)
def test_measured_frontier_is_found_around_the_prediction(config, expected, threshold, sizes):
    config = dataclasses.replace(config, seq_length=2)
    measure = FakeMeasurements(threshold)
    assert measured_frontier(config, measure, expected) == threshold
    assert measure.sizes("batch_size") == sizes


def test_measured_frontier_where_nothing_runs_is_zero(config):
    measure = FakeMeasurements(0)
    assert measured_frontier(config, measure, 2) == 0
    assert set(measure.sizes("batch_size")) == {1, 2}


@pytest.mark.parametrize(("threshold", "size"), [(1000, 896), (10**9, 2048)], ids=["memory", "positions"])
def test_measured_sequences_are_multiples_up_to_the_models_positions(config, threshold, size):
    config = dataclasses.replace(config, find_max="seq_length")
    measure = FakeMeasurements(threshold)
    assert measured_frontier(config, measure, 1024) == size
    assert all(sequence % 128 == 0 and sequence <= 2048 for sequence in measure.sizes("seq_length"))


def test_measured_runs_are_plain_runs_with_records_only(config):
    measure = FakeMeasurements(512)
    measured_frontier(dataclasses.replace(config, memory_limit_gib=24), measure, 511)
    for ran in measure.ran:
        assert (ran.find_max, ran.snapshot_dir, ran.log_dir, ran.memory_limit_gib) == (None, "", "", 24)
        assert (ran.seq_length, ran.result_dir) == (256, config.result_dir)
    assert len({ran.run_name for ran in measure.ran}) == len(measure.ran)


def test_smaller_card_is_measured_by_capping_the_allocator(config):
    config, measure = dataclasses.replace(config, gpu_memory_gib=24), FakeMeasurements(512)
    measured_frontier(config, measure, 512)
    for ran in measure.ran:
        assert int(ran.memory_limit_gib * GIB) == pytest.approx(limit_bytes(config), abs=1)


def never(config):
    pytest.fail("measured without a GPU")


SMALL_CARD = (H100.context_bytes + ROOM) / GIB


def test_without_a_gpu_the_frontier_is_predicted_and_recorded(config, capsys):
    config = dataclasses.replace(config, dry_run=True, gpu_memory_gib=SMALL_CARD)
    assert frontier.main(config, script.build_experiment, never) == 0
    record = records.load(config.record_file)
    assert (record["status"], record["mode"]) == ("ok", "predicted")
    found, limit = record["frontier"], limit_bytes(config)
    assert (found["searched"], found["limit_bytes"], found.get("measured")) == ("batch_size", limit, None)
    prediction = predict(dataclasses.replace(config, batch_size=found["predicted"]), script.build_experiment)
    assert record["peak_memory_bytes"] == prediction.peak_bytes <= limit
    assert record["peak_breakdown"] == prediction.breakdown
    assert record["latency_s"] is record["loss"] is None
    assert f"batch_size {found['predicted']} " in capsys.readouterr().out


def test_card_with_room_for_no_size_gives_status_3_and_says_so(config, capsys):
    config = dataclasses.replace(config, dry_run=True, memory_limit_gib=0.01)
    assert frontier.main(config, script.build_experiment, never) == 3
    record = records.load(config.record_file)
    assert (record["status"], record["frontier"]["predicted"], record["peak_memory_bytes"]) == ("oom", 0, None)
    assert record["error"]["requested_bytes"] > 0
    assert "Out of memory" in capsys.readouterr().out


@pytest.fixture
def gpu(monkeypatch):
    """A small GPU as far as planning asks; predictions are made as without one."""
    properties = types.SimpleNamespace(
        name="Small Card", total_memory=H100.context_bytes + ROOM, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    cuda = types.SimpleNamespace(is_available=lambda: True, get_device_properties=lambda *_: properties)
    monkeypatch.setattr(frontier, "torch", types.SimpleNamespace(cuda=cuda, device=torch.device))


@pytest.mark.parametrize("error", [-2, 0, 3])
def test_on_a_gpu_both_numbers_are_recorded(config, gpu, monkeypatch, capsys, error):
    prediction, asked, ran = predict(config, script.build_experiment), [], []

    def predicted(_config, _build, card, limit):
        asked.append((card.name, card.capability, limit))
        return 5, prediction

    def measure(run):
        ran.append(run.batch_size)
        return 0 if run.batch_size <= 5 + error else 3

    monkeypatch.setattr(frontier, "predicted_frontier", predicted)
    assert frontier.main(config, script.build_experiment, measure) == 0
    found = records.load(config.record_file)["frontier"]
    assert (found["limit_bytes"], found["predicted"], found["measured"]) == (ROOM, 5, 5 + error)
    assert asked == [("Small Card", (9, 0), ROOM)]
    assert ran[0] == 5
    assert f"that runs is {5 + error}\n" in capsys.readouterr().out


def test_dry_run_on_a_machine_with_a_gpu_measures_nothing(config, gpu):
    config = dataclasses.replace(config, dry_run=True, find_max="seq_length", batch_size=1)
    assert frontier.main(config, script.build_experiment, never) == 0
    found = records.load(config.record_file)["frontier"]
    assert found["limit_bytes"] == H100.memory_bytes - H100.context_bytes  # not this machine's
    assert found["predicted"] == 2048
