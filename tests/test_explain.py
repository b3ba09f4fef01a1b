"""What src/explain says of a snapshot, where the answer is known: from records, by brute force, or by hand."""

import gzip
import itertools
import json
import pickle
import statistics

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src.explain.reading import read
from src.explain.refusal import largest_gap, reserved_bytes
from src.explain.replay import recorded
from src.explain.report import frames_compared, frames_table, groups, report, waterfall, waterfall_table
from src.explain.stacks import told
from src.explain.timeline import timeline, timelines_of
from tests.explain_history import BY_LABEL, MIB, PHASES, History, Random, category_of, frame, rounded
from tests.explain_stand_in import StandIn
from tests.helpers import ROOT

DATA = ROOT / "doc" / "data"
COMMITTED = sorted((DATA / "snapshots").glob("*.pickle.gz"))

# Each stands for a kind of fault that people met with real files: the categories in MiB, and who asked for what, when.
BEFORE, LLAMA = "before the trace", "forward forward (modeling_llama.py"
CASES = {
    "cpp_stacks": (
        "Peak 1,510.0 MiB in the backward phase",
        {"before_the_trace": 1000, "activations": 270, "logits_and_loss": 240},
        {f"{BEFORE} -": 1000, "backward backward of LogSoftmax": 240}
        | {f"{LLAMA}:1197)": 120, f"{LLAMA}:216)": 100, f"{LLAMA}:89)": 50},
    ),
    "adamw_states_and_gradients": (
        "Peak 4,020.0 MiB in the optimizer phase",
        {"optimizer_state": 2000, "optimizer_temporaries": 20, "gradients": 1000, "parameters": 1000},
        {f"{BEFORE} -": 1000, "optimizer main (train.py:42)": 2020, "backward gradient kept (AccumulateGrad)": 1000},
    ),
    "live_blocks_with_stacks": (
        "The history has no allocation and no release: 1,700.0 MiB were alive all the time",
        {"before_the_trace": 1400, "attention": 300},
        {f"{BEFORE} update (cache_utils.py:224)": 300, f"{BEFORE} quantise (quant.py:128)": 200, f"{BEFORE} -": 1200},
    ),
    "not_recorded": (
        "No history was recorded on GPU 0: 86.0 MiB is what was alive at the dump, and no peak is known.",
        {"unattributed": 86},
        {" -": 86},
    ),
    "unsplit_rest": (
        "Peak at least 100.9 MiB in the forward phase",
        {"activations": 100, "allocator_rounding": 0.87890625},
        {f"{LLAMA}:216)": 100},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_case_is_explained(name):
    head, breakdown, by = CASES[name]
    found = read(ROOT / "tests" / "data" / "snapshots" / f"{name}.pickle")
    assert {part: size / MIB for part, size in found.breakdown().items() if size} == breakdown
    sums = {}
    for group in groups(found):
        key = f"{group.phase} {group.origin}"
        sums[key] = sums.get(key, 0) + group.size / MIB
    assert sums == by
    assert report(found, 5).startswith(head)


def record_of(path):
    (of_run,) = DATA.rglob(f"h200_*/{path.name.removesuffix('.pickle.gz')}.json")
    return json.loads(of_run.read_text())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name[:-10])
def test_snapshot_of_ours_says_what_its_record_says(path):
    record, found = record_of(path), read(path)
    assert found.breakdown() == record["peak_breakdown"]
    assert sum(found.breakdown().values()) == found.measured_peak == record["breakdown_peak_bytes"]
    assert found.peak_phase == record["peak_phase"]
    assert [name for _, name in found.phases] == list(PHASES)


def without_labels(path):
    """One of our snapshots as if another program had recorded it: its stacks, and PyTorch's own marks."""
    snapshot = pickle.loads(gzip.decompress(path.read_bytes()))
    for event in itertools.chain(*snapshot["device_traces"]):
        event["user_metadata"] = ""
    notes = snapshot["external_annotations"]
    ours = ("owner", "phase", "peak")
    snapshot["external_annotations"] = [note for note in notes if note["name"].split()[0] not in ours]
    return snapshot


def test_measured_steps_are_attributed_without_our_labels():
    unknown, wrong = [], []
    for path in COMMITTED:
        truth, found = record_of(path)["peak_breakdown"], timeline(without_labels(path)).breakdown()
        peak = sum(found.values())
        unknown.append((found["unattributed"] + found.get("before_the_trace", 0)) / peak)
        # What is in another category than it should be is missing in one and too much in another.
        wrong.append(sum(abs(found.get(name, 0) - truth.get(name, 0)) for name in truth | found) / 2 / peak)
    assert statistics.median(unknown) < 0.01
    assert max(unknown) < 0.1
    assert statistics.median(wrong) < 0.05


def test_releases_of_earlier_blocks_name_who_asked_where_they_carry_the_allocation():
    for same in (True, False):
        step = History()
        step.there(512, MIB)
        step.alloc(2 * MIB, MIB, frames=["load /code/data.py:5"])
        step.free(2 * MIB, ["load /code/data.py:5" if same else "drop /code/data.py:9"])
        step.free(512, ["build /code/model.py:3"])
        (before,) = (group for group in groups(timeline(step.snapshot())) if group.phase == "before the trace")
        assert before.origin == ("build (model.py:3)" if same else "-")


@pytest.fixture(scope="module")
def trained():
    """Two steps of a small Llama, recorded on the CPU, and the sizes of its weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=500, max_position_embeddings=64))
    tokens, optimizer = torch.randint(0, 500, (2, 48)), torch.optim.AdamW(model.parameters())
    with StandIn(list(model.parameters())) as recorder:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return recorder, [rounded(p.nbytes) for p in model.parameters()]


@pytest.mark.parametrize(("stacks", "form"), [("python", "frames"), ("all", "frames"), ("all", "history")])
def test_recorded_training_is_attributed(trained, stacks, form):
    recorder, weights = trained
    found = timeline(recorder.snapshot(stacks, form))
    assert [name for _, name in found.phases] == list(PHASES) * 2
    step, second = (event for event, name in found.phases if name == "optimizer")
    parts = found.breakdown_at(second)
    assert parts["parameters"] == sum(weights)
    assert sum(weights) <= parts["gradients"] <= sum(weights) + 512
    assert parts["optimizer_state"] == 2 * sum(weights) + 512 * len(weights)
    assert found.breakdown_at(step - 1)["optimizer_state"] == 0
    at_peak = found.breakdown()
    assert (at_peak["unattributed"] + at_peak.get("before_the_trace", 0)) / sum(at_peak.values()) < 0.1
    assert {"attention", "mlp", "logits_and_loss", "hidden_states"} <= {name for name in at_peak if at_peak[name]}
    makers = {group.origin for group in groups(found)}
    assert any(maker.startswith("apply_rotary_pos_emb (modeling_llama.py:") for maker in makers)
    assert ("backward of LogSoftmax" in makers) == (stacks == "all")


# Frames, innermost first -> origin, phase, purpose.
TORCH, OPT = "/e/torch/nn/modules/module.py", "step /e/torch/optim/sgd.py:9"
STACKS = (
    (
        "torch::unwind::unwind() ??:0;gather_with_cpp() m.cpp:0;f /e/torch/nn/functional.py:1",
        "f (functional.py:1)",
        "",
        "",
    ),
    ("at::_ops::mm::call(at::Tensor const&) ??:0", "operator mm", "", ""),
    ("x::NativeLayerNormBackward0::apply(int) ??:0", "backward of NativeLayerNorm", "backward", "norm"),
    (f"{OPT};train_gelu /attention/train.py:3", "train_gelu (train.py:3)", "optimizer", "optimizer_temporaries"),
    # A closure: the model runs inside of the optimizer's step.
    (f"_call_impl {TORCH}:1;closure /c/fit.py:1;{OPT}", "closure (fit.py:1)", "forward", ""),
    (f"convert {TORCH}:1;to {TORCH}:2;run C:\\x\\run.py:7", "run (run.py:7)", "", "parameters"),
    ("backward /e/ops/swiglu.py:1;apply /e/torch/autograd/function.py:3", "backward (swiglu.py:1)", "backward", "mlp"),
    ("sdpa_kernel /c/a.py:1;compute_loss /c/b.py:2", "sdpa_kernel (a.py:1)", "", "attention"),
    ("run /attention/norm/mlp.py:1", "run (mlp.py:1)", "", ""),
    ("\x1b[2Jx <stdin>:1", "\\x1b[2Jx (<stdin>:1)", "", ""),
)


@pytest.mark.parametrize(("texts", "origin", "phase", "purpose"), STACKS)
def test_stack_tells_origin_phase_and_purpose(texts, origin, phase, purpose):
    found = told(tuple((f["name"], f["filename"], f["line"]) for f in map(frame, texts.split(";"))))
    assert (found.origin, found.phase, found.category) == (origin, phase, purpose)


@pytest.mark.parametrize("repeat", range(12))
def test_timeline_is_the_brute_force_replay(rng, repeat):
    history = Random(rng, rng.choice([1, 3, 12, 60]))
    beyond = rng.choice([None, rng.randrange(512 * 50)])
    curve = history.curve()
    if beyond is not None:
        history.step.note(f"peak {max(curve) + beyond}")
    found = timeline(history.step.snapshot())
    assert found.allocated.tolist() == curve
    assert (found.peak_bytes, found.peak_event) == (max(curve), curve.index(max(curve)) - 1)
    expected = history.bytes_at(found.peak_event)
    expected["allocator_rounding"] += beyond or 0
    assert found.breakdown() == expected
    assert sum(block.size for block in found.at_peak()) == max(curve)
    assert [sign for sign, _ in found.events] == [1 if e["action"] == "alloc" else -1 for e in events_of(history)]
    started = [phase for event, phase in history.phases.items() if event <= max(found.peak_event, 0)]
    assert found.peak_phase == (started or [""])[-1]
    numbers, parts = found.by_category(rng.choice([1, 3, 40, 10**4]))
    assert found.peak_event in numbers
    assert (np.diff(numbers) > 0).all()
    for i, number in enumerate(numbers):
        assert {name: part[i] for name, part in parts.items()} == {
            name: count for name, count in history.bytes_at(number).items() if name in parts
        }


def events_of(history):
    return [event for event in history.step.trace if event["action"] in ("alloc", "free_requested")]


@pytest.mark.parametrize("phase", PHASES)
def test_category_of_a_label(phase):
    for label in BY_LABEL:
        step = History()
        step.note(f"phase {phase}")
        step.alloc(512, 1, label)
        step.alloc(1024, 1, "model|")  # so that the snapshot has labels
        assert timeline(step.snapshot()).blocks[0].category == category_of(label, phase)


@pytest.mark.parametrize("repeat", range(5))
def test_comparisons_sum_to_the_difference_of_the_peaks(rng, repeat):
    a, b = (timeline(Random(rng, 20).step.snapshot()) for _ in range(2))
    difference = b.known_peak_bytes - a.known_peak_bytes
    for rows in (waterfall(a.breakdown(), b.breakdown()), frames_compared(a, b)):
        assert all(change == second - first for _, first, second, change in rows)
        assert sum(change for *_, change in rows) == difference
    last = f"{difference / MIB:+,.1f} MiB"
    for table in (waterfall_table(a.breakdown(), b.breakdown()), frames_table(a, b, 2)):
        assert table.splitlines()[-1].split(maxsplit=1)[0] == "peak"
        assert table.endswith(last)
    assert len(frames_table(a, b, 2).splitlines()) <= 5


def refused_history():
    """30 and 20 MiB are alive in segments of 60 and 40, with free gaps of 10, 20 and 20 between them."""
    step = History()
    step.there(10 * MIB, 30 * MIB, "build /code/model.py:1")
    step.alloc(160 * MIB, 20 * MIB, frames=["cross_entropy /e/torch/nn/functional.py:3", "fit /code/fit.py:2"])
    return step


@pytest.mark.parametrize(
    ("requested", "free", "advice"),
    [
        (45, 1, "less fragmentation"),
        (45, 50, "a higher limit for this process"),
        (15, 0, "nothing more than that gap"),
        (80, 5, "10.0 MiB more. parameters"),
    ],
)
def test_refused_request_is_the_headline(requested, free, advice):
    step = refused_history()
    step.reserved = [(0, 60 * MIB), (160 * MIB, 40 * MIB)]
    step.frames[10 * MIB] = [frame("from_pretrained /code/model.py:1")]
    step.other("oom", size=requested * MIB, device_free=free * MIB, frames=["forward /code/net.py:77"])
    # What came later is not counted: a segment given back, one taken, and a block.
    step.other("segment_free", 400 * MIB, 15 * MIB)
    step.other("segment_alloc", 600 * MIB, 10 * MIB)
    step.reserved.append((600 * MIB, 10 * MIB))
    step.alloc(600 * MIB, MIB)
    found = timeline(step.snapshot())
    (refused,) = found.refused
    assert reserved_bytes(found.device, refused) == 115 * MIB
    assert largest_gap(found, refused) == 20 * MIB
    first, second, third = report(found, 5).splitlines()[:3]
    assert first == f"Out of memory on GPU 0: {requested}.0 MiB were asked for by forward (net.py:77)"
    assert second == (
        f"free on the card {free}.0 MiB, reserved by PyTorch 115.0 MiB, "
        "of which allocated 50.0 MiB and unused 65.0 MiB (largest gap 20.0 MiB)"
    )
    assert third.startswith(f"What would have helped: {advice}")
    assert "alive then:\nparameters" in report(found, 5)


def test_fullest_of_several_gpus_comes_first_and_each_has_its_own_blocks():
    small, large = History(), History(device=2)
    small.alloc(512, 3 * MIB)
    small.alloc(10 * MIB, 2 * MIB)
    large.alloc(512, 7 * MIB)  # addresses of different GPUs may be alike
    snapshot = large.snapshot()
    snapshot["device_traces"][0] = small.trace
    snapshot["segments"] += small.segments()
    found = timeline(snapshot)
    assert (found.device.number, found.peak_bytes) == (2, 7 * MIB)
    everything = timelines_of(recorded(snapshot))
    assert [(each.device.number, each.peak_bytes) for each in everything] == [(2, 7 * MIB), (0, 5 * MIB)]


def test_users_own_categories_come_before_all_others():
    step = History()
    step.alloc(512, MIB, frames=["update /lib/kv.py:3", "forward /code/model.py:9"])
    step.alloc(8 * MIB, 2 * MIB, label="rollout")
    step.alloc(16 * MIB, 4 * MIB, frames=["forward /code/model.py:9"])
    (found,) = timelines_of(recorded(step.snapshot()), {"cache": r"kv\.py:3$", "rl": "^rollout$", "mlp": r"model\.py"})
    assert {name: size / MIB for name, size in found.breakdown().items() if size} == {"cache": 1, "rl": 2, "mlp": 4}


@pytest.mark.parametrize("note", ["owner parameters 99", "owner nonsense 512", "phase", "peak memory", "owner 7"])
def test_ranges_that_another_program_names_like_our_notes_do_no_harm(note):
    step = History()
    step.alloc(512, 5 * MIB, "model|")
    step.note(note)
    step.note("peak 99999", stage="END")
    found = timeline(step.snapshot())
    assert (found.known_peak_bytes, found.breakdown()["inputs"]) == (5 * MIB, 5 * MIB)


def test_peak_is_no_less_than_what_is_there_in_the_end():
    step = History()
    step.alloc(512, 5 * MIB)
    step.free(512)
    step.alloc(2**30, 4 * MIB)
    snapshot = step.snapshot()
    assert timeline(snapshot).known_peak_bytes == 5 * MIB
    (segment,) = snapshot["segments"]
    segment["total_size"] = segment["blocks"][0]["size"] = 8 * MIB  # a block can be larger than what was asked for
    assert timeline(snapshot).known_peak_bytes == 8 * MIB
