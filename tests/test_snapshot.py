"""The reader of memory snapshots: where the answer is known, on other programs' snapshots, and on hostile files."""

import gzip
import io
import itertools
import os
import pickle
import random
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from src import records
from src import snapshot as reader
from src.snapshot import CATEGORIES, GATHER, LOSS_MODULE, REDUCE, read, save, timeline, waterfall
from src.utils import GIB, MIB, UsageError, format_bytes
from tests.helpers import ROOT, assert_one_error_line, run_python, run_watched

DATA = ROOT / "doc" / "data"

# Labels as src/attribution.py writes them, and what they mean in the forward phase.
BY_LABEL = {
    "model.layers.3.self_attn.q_proj|": "attention",
    "model.layers.11.self_attn|ScaledDotProductBackward0": "attention",
    "model.layers.0.mlp.down_proj|MmBackward0": "mlp",
    "model.layers.1.mlp|recomputed": "mlp",
    "model.layers.1.input_layernorm|": "norm",
    "model.norm|MulBackward0": "norm",
    "model.layers.2|AddBackward0": "hidden_states",
    "model.embed_tokens|": "hidden_states",
    "model.rotary_emb|": "inputs",
    "model|": "inputs",
    "lm_head|": "logits_and_loss",
    f"{LOSS_MODULE}|NllLossBackward0": "logits_and_loss",
    GATHER: "gathered_parameters",
    REDUCE: "gradient_reduction",
    "": "unattributed",
    "|ToCopyBackward0": "unattributed",
    "unheard.of|": "unattributed",
}
OWNED = ("parameters", "gradients", "optimizer_state", "checkpoints", "inputs", "library_workspace")
PHASES = ("forward", "backward", "optimizer")


def category_of(label, phase):
    """What a block that nothing owns is for."""
    if phase == "optimizer":
        return "optimizer_temporaries"
    if phase == "backward" and label.startswith("model.embed_tokens"):
        return "gradients"
    return BY_LABEL[label]


def rounded(size):
    return (size + 511) // 512 * 512


class Recorder:
    """Writes down what an allocator does as PyTorch would; a microsecond passes from one thing to the next."""

    def __init__(self, device=0):
        self.device, self.time = device, 10**15
        self.trace, self.notes, self.sizes, self.before = [], [], {}, {}

    def _event(self, action, address, size, **more):
        self.time += 1
        event = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": self.time, "frames": []}
        self.trace.append(event | more)

    def there(self, address, size):
        """A block from before the first event."""
        self.sizes[address] = self.before[address] = size

    def alloc(self, address, size, label="", **more):
        self.sizes[address] = size
        self._event("alloc", address, size, user_metadata=label, **more)

    def free(self, address):
        self.before.pop(address, None)
        self._event("free_requested", address, self.sizes.pop(address))

    def noise(self, action):
        self._event(action, 0, 2 * MIB)

    def note(self, name, stage="START"):
        self.time += 1
        self.notes.append({"name": name, "stage": stage, "device": self.device, "time_us": self.time})

    def segments(self):
        return [
            {
                "device": self.device,
                "address": address - 512,
                "total_size": rounded(size) + 512,
                # Older versions of PyTorch do not say where a block begins.
                "blocks": [
                    {"size": 512, "requested_size": 512, "state": "inactive", "frames": []},
                    {"size": rounded(size), "requested_size": size, "state": "active_allocated", "frames": []},
                ],
            }
            for address, size in self.sizes.items()
        ]

    def snapshot(self):
        traces = [[] for _ in range(self.device)] + [self.trace]
        return {"segments": self.segments(), "device_traces": traces, "external_annotations": self.notes}


def filled(values):
    """`values` with a 0 for each other category."""
    return dict.fromkeys(CATEGORIES, 0) | values


def one_step():
    """A step with a peak of a + b + c + d, just before the optimizer's phase; e reuses the address of c."""
    step = Recorder()
    a, b, c, d = (512 * i for i in range(1, 100, 25))
    step.there(a, 5000)
    step.there(b, 700)
    step.note("phase forward")
    step.alloc(c, 1000, "model.layers.0.mlp|")
    step.note(f"owner parameters {a}")
    step.noise("segment_alloc")
    step.note("phase backward")
    step.alloc(d, 2000, "model.embed_tokens|EmbeddingBackward0")
    step.note(f"owner checkpoints {c}")
    step.free(c)
    step.noise("free_completed")
    step.free(b)
    step.alloc(c, 100, "model.layers.0|")
    step.note("phase optimizer")
    step.note(f"owner gradients {c}")
    step.alloc(b, 1, "")
    return step


def test_peak_phase_and_breakdown_of_a_step():
    found = timeline(one_step().snapshot())
    assert (found.peak_bytes, found.peak_event, found.peak_phase) == (5120 + 1024 + 1024 + 2048, 1, "backward")
    assert found.breakdown() == filled(
        {"parameters": 5120, "unattributed": 1024, "checkpoints": 1024, "gradients": 2048}
    )
    assert found.phases == [(0, "forward"), (1, "backward"), (5, "optimizer")]
    assert [found.phase_at(event) for event in range(-1, 6)] == ["", *("forward",), *("backward",) * 4, "optimizer"]


def test_note_belongs_to_the_block_that_lay_there_then():
    found = timeline(one_step().snapshot())
    at_address = [block for block in found.blocks if block.size in (1024, 512) and block.start >= 0]
    assert [(b.size, b.start, b.phase, b.category) for b in at_address] == [
        (1024, 0, "forward", "checkpoints"),
        (512, 4, "backward", "gradients"),
        (512, 5, "optimizer", "optimizer_temporaries"),
    ]


def test_blocks_from_before_are_alive_until_they_are_released():
    found = timeline(one_step().snapshot())
    assert sorted(block.size for block in found.initial) == [1024, 5120]
    assert found.allocated.tolist() == [6144, 7168, 9216, 8192, 7168, 7680, 8192]


def test_measured_peak_beyond_the_requests_is_rounding():
    step = one_step()
    step.note(f"peak {9216 + 4096}")
    found = timeline(step.snapshot())
    assert (found.measured_peak, found.peak_bytes) == (13312, 9216)
    assert found.breakdown()["allocator_rounding"] == 4096
    assert sum(found.breakdown().values()) == 13312


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 512), (512, 512), (513, 1024), (2**44 - 1, 2**44)])
def test_requests_are_rounded_up_to_the_allocators_blocks(size, taken):
    step = Recorder()
    step.alloc(512, size)
    step.free(512)
    assert timeline(step.snapshot()).peak_bytes == taken


def test_busiest_of_several_gpus_is_read():
    other, step = Recorder(), one_step()
    step.device = 2
    other.alloc(10**6, 10**9)
    snapshot = step.snapshot()
    snapshot["device_traces"][0] = other.trace
    snapshot["segments"] += other.segments()
    assert timeline(snapshot).breakdown() == timeline(one_step().snapshot()).breakdown()


def test_without_a_history_the_blocks_of_the_end_are_read():
    found = timeline({"segments": one_step().segments(), "device_traces": [[], []]})
    assert (found.peak_event, found.peak_bytes, found.peak_phase) == (-1, 5120 + 512 + 2048 + 512, "")
    assert found.breakdown() == filled({"unattributed": found.peak_bytes})
    assert "blocks alive" in reader.report(found, 3)


@pytest.mark.parametrize("note", ["owner parameters 99", "owner nonsense 512", "phase", "forward", "step 3"])
def test_notes_that_mean_nothing_change_nothing(note):
    step = one_step()
    step.note(note)
    assert timeline(step.snapshot()).breakdown() == timeline(one_step().snapshot()).breakdown()


def test_only_the_start_of_a_range_is_a_note():
    step = one_step()
    step.note("peak 99999", stage="END")
    assert timeline(step.snapshot()).measured_peak is None


@pytest.mark.parametrize("name", ["peak memory", "peak", "owner of the batch", "owner", "owner 7", "phase "])
def test_ranges_that_another_program_names_like_our_notes_do_no_harm(name):
    step = one_step()
    step.note(name)
    assert timeline(step.snapshot()).peak_bytes == 9216


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("label", BY_LABEL)
def test_category_of_a_label(phase, label):
    step = Recorder()
    step.note(f"phase {phase}")
    step.alloc(512, 1, label)
    step.alloc(1024, 1, "model|")  # so that the snapshot has labels
    found = timeline(step.snapshot())
    assert found.blocks[0].category == category_of(label, phase)
    assert (found.blocks[0].module, found.blocks[0].operation) == (label.split("|")[0], label.partition("|")[2])


class Random:
    """A random history, and what is known of it: for each block its size, first and last event, and category."""

    def __init__(self, rng, events):
        self.rng, self.step, self.known, self.phases = rng, Recorder(device=rng.randrange(3)), [], {}
        self.count, self.live, self.released, self.next_address = 0, {}, [], 10**9
        for _ in range(rng.randrange(6)):
            self._add(self.step.there, first=-1)
        self.phase = ""
        for phase in (*PHASES, *rng.choices(PHASES, k=2)):
            if rng.random() < 0.9:
                self.phase = phase
                self.step.note(f"phase {phase}")
                self.phases[self.count] = phase
            for _ in range(rng.randrange(events)):
                self._happen()
        self.peak_note = rng.choice([None, rng.randrange(512 * 50)])
        if self.peak_note is not None:
            self.step.note(f"peak {self.peak() + self.peak_note}")

    def _happen(self):
        if self.rng.random() < 0.3:
            self.step.noise(self.rng.choice(["free_completed", "segment_alloc", "segment_free", "oom", "snapshot"]))
        if self.live and self.rng.random() < 0.45:
            address = self.rng.choice(list(self.live))
            self.step.free(address)
            self.live.pop(address)["last"] = self.count
            self.released.append(address)
            self.count += 1
        else:
            label = self.rng.choice(list(BY_LABEL))
            self._add(lambda address, size: self.step.alloc(address, size, label), first=self.count, label=label)
            self.count += 1
        if self.live and self.rng.random() < 0.3:
            address, owner = self.rng.choice(list(self.live)), self.rng.choice(OWNED)
            self.step.note(f"owner {owner} {address}")
            self.live[address]["category"] = owner

    def _add(self, take, first, label=None):
        size = self.rng.choice([0, 1, 512, self.rng.randrange(5000), self.rng.randrange(10**7)])
        if self.released and self.rng.random() < 0.6:
            address = self.released.pop(self.rng.randrange(len(self.released)))
        else:
            self.next_address += 10**8
            address = self.next_address
        take(address, size)
        category = "unattributed" if first < 0 else category_of(label, self.phase)
        self.live[address] = {"size": rounded(size), "first": first, "last": np.inf, "category": category}
        self.known.append(self.live[address])

    def alive(self, event):
        """The blocks that are alive after an event."""
        return [block for block in self.known if block["first"] <= event < block["last"]]

    def bytes_at(self, event):
        """What each category has after an event."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for block in self.alive(event):
            totals[block["category"]] += block["size"]
        return totals

    def curve(self):
        return [sum(block["size"] for block in self.alive(event)) for event in range(-1, self.count)]

    def peak(self):
        return max(self.curve())


@pytest.fixture(params=[1, 3, 12, 60])
def history(request, rng):
    return Random(rng, request.param)


def described(blocks):
    return sorted((b["size"], b["first"], b["category"]) for b in blocks)


@pytest.mark.parametrize("repeat", range(15))
def test_timeline_is_the_brute_force_replay(history, repeat):
    found, curve = timeline(history.step.snapshot()), history.curve()
    assert found.allocated.tolist() == curve
    assert (found.peak_bytes, found.peak_event) == (max(curve), curve.index(max(curve)) - 1)
    assert sorted((b.size, b.start, b.category) for b in found.blocks) == described(history.known)
    assert sorted((b.size, b.start, b.category) for b in found.at_peak()) == described(history.alive(found.peak_event))
    expected = history.bytes_at(found.peak_event)
    expected["allocator_rounding"] += history.peak_note or 0
    assert found.breakdown() == expected
    started = [phase for event, phase in history.phases.items() if event <= max(found.peak_event, 0)]
    assert found.peak_phase == (started or [""])[-1]


@pytest.mark.parametrize("points", [1, 2, 3, 7, 40, 10**4])
def test_points_of_the_curve_are_true_and_the_peak_is_among_them(history, points):
    found, curve = timeline(history.step.snapshot()), history.curve()
    numbers, parts = found.by_category(points)
    assert 1 <= len(numbers) <= min(points, len(curve))
    assert (np.diff(numbers) > 0).all()
    assert found.peak_event in numbers
    for i, number in enumerate(numbers):
        assert {name: part[i] for name, part in parts.items()} == {
            name: count for name, count in history.bytes_at(number).items() if name in parts
        }
    assert sum(parts.values(), np.zeros(len(numbers), int)).tolist() == [curve[number + 1] for number in numbers]
    assert list(parts) == [name for name in CATEGORIES if name in parts]


@pytest.mark.parametrize("repeat", range(10))
def test_waterfall_sums_to_the_difference_of_the_peaks(rng, repeat):
    a, b = (timeline(Random(rng, 20).step.snapshot()).breakdown() for _ in range(2))
    rows = waterfall(a, b)
    assert [name for name, *_ in rows] == [name for name in CATEGORIES if a[name] or b[name]]
    assert all((first, second, change) == (a[name], b[name], second - first) for name, first, second, change in rows)
    assert sum(change for *_, change in rows) == sum(b.values()) - sum(a.values())


def test_file_is_read_as_it_was_written(rng, tmp_path):
    step, plain, packed = Random(rng, 30).step, tmp_path / "a.pickle", tmp_path / "a.pickle.gz"
    save(step.snapshot(), plain)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(plain).breakdown() == read(packed).breakdown() == timeline(step.snapshot()).breakdown()


@pytest.mark.parametrize("path", sorted((DATA / "snapshots").glob("*.pickle.gz")), ids=lambda path: path.name[:-10])
def test_snapshot_of_a_gpu_says_what_its_record_says(cli, path):
    (of_run,) = DATA.rglob(f"h200_*/{path.name.removesuffix('.pickle.gz')}.json")
    record, found = records.load(of_run), read(path)
    breakdown = {name: count for name, count in found.breakdown().items() if count}
    assert breakdown == {name: count for name, count in record["peak_breakdown"].items() if count}
    assert sum(breakdown.values()) == found.measured_peak == record["breakdown_peak_bytes"]
    assert found.measured_peak == pytest.approx(record["peak_memory_bytes"], rel=0.01)
    assert [phase for _, phase in found.phases] == list(PHASES)
    assert found.peak_phase == record["peak_phase"]
    assert breakdown["unattributed"] < 0.001 * found.peak_bytes
    assert 0 <= breakdown.get("allocator_rounding", 0) < 3 * MIB
    assert cli(path)[0] == 0


def frames(*stack):
    """A stack, innermost first, of "file:function"."""
    return [{"filename": file, "line": 7, "name": name} for file, _, name in (part.partition(":") for part in stack)]


MODELING = "/site-packages/transformers/models/llama/modeling_llama.py"


@pytest.mark.parametrize(
    ("stack", "category"),
    [
        (["/torch/nn/functional.py:cross_entropy", "/own/train.py:step"], "logits_and_loss"),
        (["/own/fused.py:forward", "/own/fused.py:CrossEntropyFunction"], "logits_and_loss"),
        (["/torch/optim/adamw.py:_init_group", "/torch/optim/optimizer.py:wrapper"], "optimizer_temporaries"),
        (["/site-packages/torch/optim/adamw.py:step", f"{MODELING}:eager_attention_forward"], "optimizer_temporaries"),
        ([f"{MODELING}:eager_attention_forward", f"{MODELING}:mlp"], "attention"),
        ([":LlamaAttention", ":norm"], "attention"),
        (["/own/model.py:swiglu", "/own/model.py:attention"], "mlp"),
        (["/own/model.py:rms_norm", "/own/model.py:attention"], "norm"),
        (["/home/loss/norm/attention.py:main"], "unattributed"),
        ([], "unattributed"),
    ],
    ids=str,
)
def test_other_programs_blocks_are_sorted_by_their_stacks(stack, category):
    step = Recorder()
    step.alloc(512, 3000, None, frames=frames(*stack))
    for event in step.trace:
        del event["user_metadata"], event["time_us"]
    snapshot = step.snapshot()
    del snapshot["external_annotations"]
    found = timeline(snapshot)
    assert found.breakdown() == filled({category: 3072})
    assert (found.peak_phase, found.measured_peak) == ("", None)


def test_report_names_the_innermost_line_of_the_program_itself():
    step = Recorder()
    stack = frames("??:alloc", "/x/torch/nn/linear.py:forward", "/own/train.py:loop", "/own/main.py:main")
    for i in range(3):
        step.alloc(10**6 * i, 2 * MIB, frames=stack)
    (line,) = [line for line in reader.report(timeline(step.snapshot()), 5).splitlines() if "loop" in line]
    assert line.split() == ["6.0", "MiB", "3", "unattributed", "before", "loop", "(train.py:7)"]


def test_report_takes_layers_together_and_lists_as_many_as_asked_for():
    step = Recorder()
    step.note("phase forward")
    for layer, size in itertools.product(range(4), (1, 2)):
        step.alloc(10**8 * (1 + 2 * layer + size), size * MIB, f"model.layers.{layer}.mlp.{'ab'[size - 1]}|MmBackward0")
    found = timeline(step.snapshot())
    assert reader.largest(found, 9) == [
        (8 * MIB, 4, "mlp", "forward", "model.layers.*.mlp.b MmBackward0"),
        (4 * MIB, 4, "mlp", "forward", "model.layers.*.mlp.a MmBackward0"),
    ]
    assert reader.largest(found, 1) == reader.largest(found, 9)[:1]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the program in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["snapshot", *map(str, arguments)])
        try:
            status = reader.main()
        except SystemExit as stopped:
            status = stopped.code
        return int(status), *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path):
    """A step, and one that has 3 MiB more of attention, as files."""
    larger = one_step()
    larger.alloc(10**8, 3 * MIB, "model.layers.0.self_attn|")
    larger.note("peak 4000000")
    paths = tmp_path / "a.pickle", tmp_path / "b.pickle.gz"
    save(one_step().snapshot(), paths[0])
    paths[1].write_bytes(gzip.compress(pickle.dumps(larger.snapshot())))
    return paths


def test_program_tells_the_peak_of_a_file(cli, files):
    status, stdout, stderr = cli(files[0])
    assert (status, stderr) == (0, "")
    assert stdout.startswith(
        f"{files[0]}\nPeak {format_bytes(9216)} in the backward phase, after event 2 of 6, 4 blocks"
    )
    for name in ("parameters", "checkpoints", "gradients", "unattributed"):
        assert f"\n{name}" in stdout
    assert "mlp" in stdout
    assert "B - A" not in stdout


def test_program_compares_two_files(cli, files):
    status, stdout, stderr = cli(*files)
    assert (status, stderr) == (0, "")
    a, b = (read(file).breakdown() for file in files)
    *_, peak = table = stdout[stdout.index("at the peak") :].splitlines()
    assert peak.split() == ["peak", *f"{format_bytes(9216)} {format_bytes(4_000_000)} +3.8 MiB".split()]
    changes = [abs(b[name] - a[name]) for line in table[1:-1] for name in [line.split("  ")[0].replace(" ", "_")]]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == sum(1 for name in CATEGORIES if a[name] or b[name])


@pytest.mark.parametrize("top", [0, 1, 2, 100])
def test_top_is_how_many_groups_are_listed(cli, files, top):
    status, stdout, _ = cli(files[0], "--top", top)
    assert status == 0
    listed = stdout.split("largest")[1].strip().splitlines()[1:]
    assert len(listed) == min(top, 4)


def height(png):
    """Of a picture that has been drawn, in pixels."""
    with Image.open(png) as image:
        image.load()
        assert image.format == "PNG"
        assert 1000 < image.width < 4000
        assert len(image.convert("RGB").getcolors(2**24)) > 20
        return image.height


def test_plot_has_a_row_for_each_file(cli, files, tmp_path):
    one, two = tmp_path / "plots" / "one.png", tmp_path / "plots" / "two.png"
    for paths, png in ((files[:1], one), (files, two)):
        status, stdout, stderr = cli(*paths, "--plot", png)
        assert (status, stderr) == (0, "")
        assert str(png) in stdout
    assert 1.4 * height(one) < height(two) < 2.5 * height(one)


@pytest.mark.parametrize("name", ["a.pickle", "a.limit24.pickle.gz"])
def test_plot_of_files_whose_names_begin_alike_has_both(cli, files, tmp_path, name):
    alike, png = tmp_path / "other" / name, tmp_path / "two.png"
    save(one_step().snapshot(), alike)
    assert cli(*files, "--plot", png)[0] == 0
    expected = height(png)
    assert cli(files[0], alike, "--plot", png)[0] == 0
    assert height(png) == expected


@pytest.mark.parametrize("place", ["a.pickle/below.png", "folder"])
def test_plot_that_cannot_be_written_is_one_line(cli, files, tmp_path, place):
    (tmp_path / "folder").mkdir()
    status, _, stderr = cli(files[0], "--plot", tmp_path / place)
    assert status == 2
    assert_one_error_line(stderr, place)


@pytest.mark.parametrize("traces", [[], [[]]])
@pytest.mark.parametrize("plot", [False, True])
def test_snapshot_of_an_empty_gpu_is_no_failure(cli, tmp_path, traces, plot):
    save({"segments": [], "device_traces": traces}, tmp_path / "empty.pickle")
    status, _, stderr = cli(tmp_path / "empty.pickle", *(["--plot", tmp_path / "empty.png"] if plot else []))
    assert "Traceback" not in stderr
    assert (status, stderr) == (0, "") or status == 2


def test_large_snapshot_is_read_in_little_memory(tmp_path):
    stack = frames(*(f"/some/where/file_{i}.py:a_function_{i}{'_of_a_long_name' * 20}" for i in range(12)))
    step = Recorder()
    step.alloc(512, 3 * MIB, "model.layers.0.mlp|", frames=stack)
    step.free(512)
    events = [body(event | {"frames": stack}) for event in step.trace]
    path, count = tmp_path / "large.pickle", 200 * 10**6 // len(b"".join(events))
    with path.open("wb") as file:
        file.write(b"\x80\x03}(" + body("segments") + body([]) + body("device_traces") + b"](](")
        for _ in range(count // 1000):
            file.write(b"".join(events) * 1000)
        file.write(b"eeu.")
    assert path.stat().st_size > 195 * 10**6
    done, resident = run_watched("-m", "src.snapshot", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Peak {format_bytes(3 * MIB)}, after event 1 of {2000 * (count // 1000):,}, 1 blocks" in done.stdout
    assert resident < 4 * GIB


def body(value):
    """`value` pickled without references, to be put among others."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=3)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue().removeprefix(b"\x80\x03").removesuffix(b".")


def test_reader_and_plot_need_no_torch():
    code = "import sys, src.snapshot, src.memory_plot; print(sorted(n for n in sys.modules if n.startswith('torch')))"
    done = run_python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    """Pickles that would run something, by name."""
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "builtins.eval": Calls(eval, touch),
        "builtins.exec": Calls(exec, touch),
        "builtins.open": Calls(open, str(marker), "w"),
        "torch": torch.ones(2),
        "torch class": torch.nn.Linear,
        "numpy": np.ones(2),
        "random": random.Random(0),
        "range": range(3),
    }


HOSTILE = list(hostile(""))


@pytest.mark.parametrize("where", ["alone", "inside"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_executed(cli, tmp_path, name, protocol, where):
    marker, path, thing = tmp_path / "marker", tmp_path / "hostile.pickle", hostile(tmp_path / "marker")[name]
    snapshot = one_step().snapshot() | {"allocator_settings": thing}
    path.write_bytes(pickle.dumps(thing if where == "alone" else snapshot, protocol))
    status, stdout, stderr = cli(path)
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, str(path))
    assert not marker.exists()
    if name in ("os.system", "builtins.open"):
        pickle.loads(path.read_bytes())
        assert marker.exists()  # so it would have been


def with_event(**changes):
    """A snapshot, one of whose events is another; None takes a key away."""
    snapshot = one_step().snapshot()
    changed = {key: value for key, value in (snapshot["device_traces"][0][2] | changes).items() if value is not None}
    snapshot["device_traces"][0][2] = changed
    return snapshot


def with_block(**changes):
    snapshot = one_step().snapshot()
    snapshot["segments"][0]["blocks"][1] |= changes
    return snapshot


def with_note(name, **changes):
    step = one_step()
    step.note(name)
    step.notes[-1] |= changes
    return step.snapshot()


OTHER_OBJECTS = {
    "list": [1, 2],
    "number": 7,
    "text": "segments",
    "none": None,
    "no keys": {},
    "no traces": {"segments": []},
    "no segments": {"device_traces": [[]]},
    "traces are a number": {"segments": [], "device_traces": 3},
    "traces are a dict": {"segments": [], "device_traces": {"a": 1}},
    "trace of numbers": {"segments": [], "device_traces": [[1, 2]]},
    "segments are a number": {"segments": 3, "device_traces": [[]]},
    "segments of texts": {"segments": ["a"], "device_traces": [[]]},
    "annotations are a number": one_step().snapshot() | {"external_annotations": 3},
    "event without a size": with_event(size=None),
    "event without an action": with_event(action=None),
    "negative size": with_event(size=-512),
    "huge size": with_event(size=10**30),
    "size is a float": with_event(size=512.0),
    "size is a text": with_event(size="512"),
    "address is a list": with_event(addr=[]),
    "label is a list": with_event(user_metadata=["model"]),
    "label is a number": with_event(user_metadata=3),
    "frames are numbers": with_event(user_metadata="", frames=[1, 2]),
    "frames are a number": with_event(user_metadata="", frames=3),
    "time is a text": with_event(time_us="now"),
    "negative block": with_block(size=-1),
    "huge block": with_block(size=2**70),
    "note of a time that is a text": with_note("phase x", time_us="now"),
    "note of a name that is a number": with_note(3),
    "more bytes than 64 bits can count": {
        "segments": [],
        "device_traces": [[{"action": "alloc", "addr": i, "size": 2**48 - 1} for i in range(2**15 + 1)]],
    },
}


@pytest.mark.parametrize("name", OTHER_OBJECTS)
def test_pickle_of_something_else_is_one_line(cli, tmp_path, name):
    path = tmp_path / "other.pickle"
    save(OTHER_OBJECTS[name], path)
    status, _, stderr = cli(path, "--top", 1000)
    assert status == 2
    assert_one_error_line(stderr, str(path))


@pytest.mark.parametrize("digits", [30, 400, 9999])
def test_peak_that_no_gpu_can_have_is_no_failure(cli, tmp_path, digits):
    save(with_note("peak " + "9" * digits), tmp_path / "odd.pickle")
    status, _, stderr = cli(tmp_path / "odd.pickle", "--plot", tmp_path / "odd.png")
    assert status in (0, 2)
    if status:
        assert_one_error_line(stderr, "odd.pickle")


def broken_files():
    """Files that are no pickles, by name."""
    whole = pickle.dumps(one_step().snapshot())
    packed = gzip.compress(whole)
    return {
        "empty": b"",
        "text": b"not a pickle at all\n",
        "binary": random.Random(7).randbytes(5000),
        "json": b'{"segments": [], "device_traces": []}',
        "cut short": whole[: len(whole) // 2],
        "without its end": whole[:-1],
        "packed and cut short": packed[: len(packed) // 2],
        "packed without its end": packed[:-5],
        "packed with a wrong sum": packed[:-8] + b"\0" * 8,
        "packed and damaged": packed[:60] + bytes(40) + packed[100:],
        "only the mark of gzip": b"\x1f\x8b",
        "persistent id": b"\x80\x02X\x01\0\0\0aQ.",
        "extension": b"\x80\x02\x82\x01.",
        "reference to nothing": b"\x80\x02h\x07.",
        "out of band": b"\x80\x05\x97.",
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_file_is_one_line(cli, tmp_path, name):
    path = tmp_path / "broken.pickle"
    path.write_bytes(broken_files()[name])
    status, stdout, stderr = cli(path)
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, str(path))


@pytest.mark.parametrize("repeat", range(30))
def test_damaged_file_is_read_or_one_line(cli, tmp_path, rng, repeat):
    data, path = bytearray(pickle.dumps(Random(rng, 8).step.snapshot(), rng.choice([0, 2, 4]))), tmp_path / "damaged"
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    status, _, stderr = cli(path)
    assert status in (0, 2)
    if status:
        assert_one_error_line(stderr, str(path))


@pytest.mark.parametrize("name", ["missing.pickle", "folder", "a.pickle/below"])
@pytest.mark.parametrize("second", [False, True])
def test_file_that_is_none_is_one_line(cli, tmp_path, files, name, second):
    (tmp_path / "folder").mkdir()
    status, _, stderr = cli(*files[: int(second)], tmp_path / name)
    assert status == 2
    assert_one_error_line(stderr, name)


@pytest.mark.parametrize("packed", [False, True])
def test_file_beyond_the_limit_is_unpacked_no_further(cli, tmp_path, monkeypatch, packed):
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 10**6)
    read_bytes = []
    unpack = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda *args: read_bytes.append(len(out := unpack(*args))) or out)
    path, data = tmp_path / "bomb.pickle", b"\x80\x04" + bytes(200 * 10**6)
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    status, stdout, stderr = cli(path)
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, "larger than")
    assert sum(read_bytes) < 40 * 10**6


def test_file_at_the_limit_is_read(files, monkeypatch):
    unpacked = len(gzip.decompress(files[1].read_bytes()))
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", unpacked)
    assert sum(read(files[1]).breakdown().values()) == 4_000_000
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", unpacked - 1)
    with pytest.raises(UsageError, match="larger than"):
        read(files[1])


def shared(depth):
    """A list that has few parts, and 2^depth of them when written out."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


DEEP = 10**6
BOMBS = {
    "memo of 2^32": b"\x80\x04]r" + struct.pack("<I", 2**32 - 1) + b".",
    "memo of 2^30": b"\x80\x04]r" + struct.pack("<I", 2**30) + b".",
    "memo in text": b"(lp" + b"9" * 18 + b"\n.",
    "text of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "bytes of 16 GiB": b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b"abc.",
    "frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "number of 10^5 digits": b"I" + b"9" * 10**5 + b"\n.",
    "lists in lists": b"\x80\x04" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "tuples in tuples": b"\x80\x04)" + b"\x85" * DEEP + b".",
    "dicts in dicts": b"\x80\x04" + (b"}" + body("a")) * 10**5 + b"}" + b"s" * 10**5 + b".",
    "size of lists in lists": pickle.dumps(with_event(size="size of")).replace(
        b"\x8c\x07size of", b"]" * DEEP + b"a" * (DEEP - 1)
    ),
    "size of shared lists": pickle.dumps(with_event(size=shared(60))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_file_that_would_fill_the_machine_is_one_line(tmp_path, name):
    path = tmp_path / "bomb.pickle"
    path.write_bytes(BOMBS[name])
    done, resident = run_watched("-m", "src.snapshot", path, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_error_line(done.stderr, str(path))
    assert resident < GIB


def test_text_that_no_terminal_can_show_is_no_failure(tmp_path):
    step = one_step()
    step.alloc(10**8, 3 * MIB, "model.layers.0.self_attn\ud800|")
    save(step.snapshot(), tmp_path / "odd.pickle")
    done = run_python("-m", "src.snapshot", tmp_path / "odd.pickle")
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
