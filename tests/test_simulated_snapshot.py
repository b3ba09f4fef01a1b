"""Simulated snapshots: in PyTorch's format, consistent, and made of what the prediction says."""

import itertools
import pickle
from collections import Counter

import pytest

import all_gpu_liger_kernel as script
from src.config import RunConfig
from src.dry_run import predict
from src.explain.reading import save
from src.simulated_snapshot import simulated_snapshot
from src.utils import MIB
from tests.helpers import HUGGING_FACE, SCRIPT, run_python

CONFIG = RunConfig(model_name="tiny-llama", batch_size=2, seq_length=96, device="cuda")


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers, and nothing that would need this project or PyTorch."""

    def find_class(self, module, name):
        raise AssertionError(f"{module}.{name} in a snapshot")


def load_plain(path):
    with path.open("rb") as file:
        return PlainUnpickler(file).load()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A prediction, the file of its snapshot, and the snapshot."""
    prediction = predict(CONFIG, script.build_experiment, record_frames=True)
    path = tmp_path_factory.mktemp("snapshots") / "simulated.pickle"
    save(simulated_snapshot(prediction.gpu, prediction.first_event), path)
    return prediction, path, load_plain(path)


def active_blocks(snapshot):
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    assert {block["state"] for block in blocks} <= {"active_allocated", "inactive"}
    return [block for block in blocks if block["state"] == "active_allocated"]


def sizes_backward(snapshot):
    """Bytes alive after each event of the trace, from the last to before the first."""
    live = sum(block["size"] for block in active_blocks(snapshot))
    sizes = [live]
    for event in reversed(snapshot["device_traces"][0]):
        live += {"alloc": -1, "free_requested": 0, "free_completed": 1}[event["action"]] * event["size"]
        sizes.append(live)
    return sizes


def test_blocks_tile_their_segments(simulated):
    _, _, snapshot = simulated
    for segment in snapshot["segments"]:
        blocks = segment["blocks"]
        assert blocks[0]["address"] == segment["address"]
        assert all(a["address"] + a["size"] == b["address"] for a, b in itertools.pairwise(blocks))
        assert sum(block["size"] for block in blocks) == segment["total_size"]
        active = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
        assert segment["active_size"] == segment["allocated_size"] == active
        assert segment["segment_type"] == ("small" if segment["total_size"] == 2 * MIB else "large")
    ordered = sorted(snapshot["segments"], key=lambda segment: segment["address"])
    assert all(a["address"] + a["total_size"] <= b["address"] for a, b in itertools.pairwise(ordered))


def test_segments_are_the_allocators(simulated):
    prediction, _, snapshot = simulated
    assert sum(segment["total_size"] for segment in snapshot["segments"]) == prediction.gpu.allocator.reserved_bytes
    assert sum(block["size"] for block in active_blocks(snapshot)) == prediction.gpu.allocator.allocated_bytes


def test_active_blocks_are_the_live_allocations(simulated):
    prediction, _, snapshot = simulated
    live = sorted((a.address, a.size) for a in prediction.gpu.allocations.values())
    assert sorted((block["address"], block["size"]) for block in active_blocks(snapshot)) == live


def test_trace_replayed_backward_reaches_the_predicted_peak(simulated):
    prediction, _, snapshot = simulated
    sizes = sizes_backward(snapshot)
    assert min(sizes) >= 0
    assert max(sizes) == prediction.peak_bytes


def test_trace_is_one_step_in_which_no_live_block_is_handed_out_twice(simulated):
    _, _, snapshot = simulated
    (trace,) = snapshot["device_traces"]
    live = {}
    for event in trace:
        end = event["addr"] + event["size"]
        if event["action"] == "alloc":
            assert not [other for other, size in live.items() if event["addr"] < other + size and other < end]
            live[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"], event["size"]) == event["size"]
    actions = Counter(event["action"] for event in trace)
    assert actions["free_requested"] == actions["free_completed"]
    assert [event["time_us"] for event in trace] == sorted(event["time_us"] for event in trace)


def after_a_step(tmp_path, **fields):
    """The snapshot of a dry run, and the bytes of what a step leaves: weights and the optimizer's state."""
    folders = {name: str(tmp_path / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
    config = RunConfig(**{**vars(CONFIG), "dry_run": True, **folders, **fields})
    assert script.main(config) == 0
    prediction = predict(config, script.build_experiment)
    return load_plain(config.snapshot_file), prediction


@pytest.mark.parametrize(
    "gradient_checkpointing",
    [
        True,
        False,
    ],
    ids=["recompute", "keep"],
)
def test_weights_and_optimizer_state_are_alive_at_both_ends_of_the_step(tmp_path, gradient_checkpointing):
    snapshot, prediction = after_a_step(tmp_path, gradient_checkpointing=gradient_checkpointing)
    kept = prediction.breakdown["parameters"] + prediction.breakdown["optimizer_state"]
    sizes = sizes_backward(snapshot)
    assert kept <= sizes[0] <= kept + 65 * MIB  # workspaces, the batch and the like
    assert sizes[-1] == sizes[0]
    assert max(sizes) == prediction.peak_bytes


def test_requests_of_the_forward_pass_lead_back_to_the_scripts_step(simulated):
    prediction, _, snapshot = simulated
    allocations = [event for event in snapshot["device_traces"][0] if event["action"] == "alloc"]
    made = [a for action, a in prediction.gpu.events[prediction.first_event :] if action == "alloc"]
    forward = [event for event, a in zip(allocations, made, strict=True) if a.phase == "forward"]
    assert len(forward) > 20
    for event in forward:
        assert [frame for frame in event["frames"] if frame["filename"] == str(SCRIPT) and frame["name"] == "step"], (
            event["frames"][0]
        )
        assert {"name", "filename", "line"} <= event["frames"][0].keys()
    lines = {frame["line"] for event in forward for frame in event["frames"] if frame["filename"] == str(SCRIPT)}
    text = SCRIPT.read_text().splitlines()
    assert {text[line - 1].strip() for line in lines} == {"loss = model(**batch).loss"}


def test_first_frame_names_operation_and_module(simulated):
    _, _, snapshot = simulated
    names = {event["frames"][0]["name"] for event in snapshot["device_traces"][0]}
    assert "aten.embedding.default in model.embed_tokens" in names
    assert any(name.endswith(" in model.layers.1.mlp.down_proj") for name in names)
    assert any(name.endswith(" in backward") for name in names)


def test_without_frames_the_operations_are_still_named(tmp_path):
    prediction = predict(CONFIG, script.build_experiment)
    save(simulated_snapshot(prediction.gpu, prediction.first_event), tmp_path / "plain.pickle")
    frames = [event["frames"] for event in load_plain(tmp_path / "plain.pickle")["device_traces"][0]]
    assert {len(stack) for stack in frames} == {1}


@pytest.mark.parametrize("strategy", [HUGGING_FACE, CONFIG.strategy], ids=["hugging-face", "liger"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["keep", "recompute"])
def test_every_snapshot_reaches_its_peak(tmp_path, strategy, gradient_checkpointing):
    snapshot, prediction = after_a_step(tmp_path, strategy=strategy, gradient_checkpointing=gradient_checkpointing)
    sizes = sizes_backward(snapshot)
    assert (min(sizes) >= 0, max(sizes)) == (True, prediction.peak_bytes)


def memory_viz(*arguments):
    done = run_python("-m", "torch.cuda._memory_viz", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pytorchs_own_tools_read_it(simulated, tmp_path):
    _, path, _ = simulated
    assert "segments" in memory_viz("stats", path)
    assert "entries" in memory_viz("trace", path)
    for plot in ("trace_plot", "segment_plot"):
        page = tmp_path / f"{plot}.html"
        memory_viz(plot, path, "-o", page)
        assert "<html" in page.read_text()[:1000].lower() or "<!doctype" in page.read_text()[:1000].lower()
