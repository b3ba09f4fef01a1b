"""The measurement contract: what is inside the clock, what is counted, and that nothing else runs or stays alive."""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import types

import numpy as np
import pytest
import torch

import all_gpu_liger_kernel as script
from src import measure as measure_module
from src import recording, records
from src.attribution import record_breakdown, record_step
from src.config import Strategy
from src.explain.categories import LOSS_MODULE, PHASE
from src.explain.reading import read
from src.explain.timeline import timeline
from src.live_memory import LiveMemory
from src.measure import PHASES, measure, measure_phases, no_mark
from src.profiler import trace_step
from src.runtime import CpuRuntime, HostRuntime
from src.utils import MIB, median_and_iqr
from tests.helpers import HUGGING_FACE, strategy_id, tiny_config

LARGE_LOGITS = {"batch_size": 2, "seq_length": 96}


class LoggingRuntime:
    """A device that writes down what is asked of it; its n-th peak is 100 n bytes."""

    device = torch.device("cpu")

    def __init__(self, log):
        self.log = log
        self.peaks = 0

    def tracking(self):
        return contextlib.nullcontext()

    def synchronize(self):
        self.log.append("synchronize")

    def release_cache(self):
        self.log.append("release_cache")

    def reset_peak(self):
        self.log.append("reset_peak")

    def peak_bytes(self):
        self.log.append("peak")
        self.peaks += 1
        return 100 * self.peaks, 1000 * self.peaks

    def device_used_bytes(self):
        return 12345

    def allocation_retries(self):
        return 3


@pytest.fixture
def log(monkeypatch):
    """A log in which the clock's readings appear, too; the clock advances by 1, 2, 4... seconds."""
    log = []

    def perf_counter():
        log.append("clock")
        return float(2 ** log.count("clock"))

    monkeypatch.setattr(measure_module, "time", types.SimpleNamespace(perf_counter=perf_counter))
    return log


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("iterations", [1, 3])
def test_clock_holds_one_synchronised_step_and_warmup_is_outside(log, warmup, iterations):
    def step(mark):
        log.append("step")
        return torch.tensor(float(log.count("step")))

    result = measure(step, LoggingRuntime(log), warmup=warmup, iterations=iterations)
    timed_step = ["reset_peak", "synchronize", "clock", "step", "synchronize", "clock", "peak"]
    assert log == ["step"] * warmup + ["synchronize", "release_cache"] + timed_step * iterations
    # The clock read 2, 4, 8, 16...
    assert result.step_seconds == [2.0 * 4**i for i in range(iterations)]
    assert result.losses == [warmup + 1.0 + i for i in range(iterations)]
    assert result.peak_allocated_bytes == [100 * (i + 1) for i in range(iterations)]
    assert (result.peak_memory_bytes, result.reserved_bytes) == (100 * iterations, 1000 * iterations)
    assert result.device_used_bytes == 12345


def test_reserved_memory_is_none_where_nothing_is_reserved():
    result = measure(lambda mark: torch.tensor(0.0), CpuRuntime(), warmup=0, iterations=2)
    assert result.reserved_bytes is None


def test_phase_peaks_are_read_when_the_phase_ends_and_reset_when_it_begins(log):
    def step(mark):
        for phase in PHASES:
            mark(phase)
            log.append(phase)

    phases = measure_phases(step, LoggingRuntime(log), lambda: log.append("norm") or 1.5)
    assert log == [
        *("reset_peak", "forward", "peak"),
        *("reset_peak", "backward", "peak"),
        *("norm", "reset_peak", "optimizer", "peak"),
    ]
    assert phases.peak_bytes == {"forward": 100, "backward": 200, "optimizer": 300}
    assert (phases.phase, phases.grad_norm) == ("optimizer", 1.5)


@pytest.mark.parametrize("count", [2, 4])
def test_phase_that_comes_back_with_each_micro_batch_keeps_its_highest_peak(rng, count):
    readings = [rng.randrange(1000) for _ in range(2 * count + 1)]
    norms = []

    class Runtime(LoggingRuntime):
        def peak_bytes(self):
            return readings[super().peak_bytes()[0] // 100 - 1], None

    def step(mark):
        for _ in range(count):
            mark("forward")
            mark("backward")
        mark("optimizer")

    phases = measure_phases(step, Runtime([]), lambda: norms.append(1.5) or 1.5)
    *passes, optimizer = readings
    assert phases.peak_bytes == {"forward": max(passes[::2]), "backward": max(passes[1::2]), "optimizer": optimizer}
    assert phases.peak_bytes[phases.phase] == max(readings)
    assert (phases.grad_norm, norms) == (1.5, [1.5])


def test_where_nothing_counts_there_is_no_peak_and_no_phase_that_sets_it():
    def step(mark):
        for phase in ("forward", "backward", "forward", "backward", "optimizer"):
            mark(phase)
        return torch.tensor(2.0)

    result = measure(step, HostRuntime(), warmup=1, iterations=2)
    assert result.peak_allocated_bytes == result.peak_reserved_bytes == [None, None]
    assert result.peak_memory_bytes is result.reserved_bytes is result.device_used_bytes is None
    assert len(result.step_seconds) == 2
    phases = measure_phases(step, HostRuntime(), lambda: None)
    assert phases.peak_bytes == dict.fromkeys(PHASES)
    assert phases.phase is phases.grad_norm is None


WEIGHTS, WORKSPACE = (2**20, 5 * MIB), (2**30, 2 * MIB)  # address and size


class History:
    """The allocator's history as PyTorch would switch it on a GPU with two blocks; notes are kept while it is on."""

    def __init__(self):
        self.on, self.settings, self.label, self.labels, self.notes = False, {}, "", [], []
        self.blocks = dict([WEIGHTS, WORKSPACE])

    def switch(self, enabled="all", **settings):
        self.on = enabled is not None
        if self.on:
            self.settings, self.labels, self.notes = settings, [], []

    def set_label(self, label):
        self.label = label
        self.labels.append(label)

    def note(self, name):
        if self.on:
            self.notes.append({"name": name, "stage": "START", "device": 0, "time_us": len(self.notes)})

    def segments(self):
        kinds = {"device": 0, "state": "active_allocated", "frames": []}
        return [
            kinds | {"address": address, "blocks": [kinds | {"address": address, "size": size}]}
            for address, size in self.blocks.items()
        ]

    def snapshot(self):
        event = {"action": "alloc", "addr": WEIGHTS[0] * 2, "size": MIB, "time_us": 10**9, "user_metadata": self.label}
        annotations = [dict(note) for note in self.notes]
        return {"segments": self.segments(), "device_traces": [[event]], "external_annotations": annotations}


@pytest.fixture
def history(monkeypatch):
    history = History()

    class Noted(torch.profiler.record_function):
        def __init__(self, name):
            history.note(name)
            super().__init__(name)

    monkeypatch.setattr(torch.profiler, "record_function", Noted)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", history.switch)
    monkeypatch.setattr(torch.cuda.memory, "_set_memory_metadata", history.set_label)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", history.snapshot)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", history.segments)
    monkeypatch.setattr(torch.cuda.memory, "memory_snapshot", history.segments)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 10 * MIB)
    forget = functools.partial(history.blocks.pop, WORKSPACE[0], None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", forget, raising=False)
    return history


class Watched:
    """An experiment whose steps write down in `steps` whether a profiler or the history is on."""

    def __init__(self, history, marks=PHASES):
        self.history, self.marks, self.steps, self.model = history, marks, [], torch.nn.Linear(2, 2)

    def step(self, mark=no_mark):
        self.steps.append({"profiled": torch.autograd._profiler_enabled(), "on": self.history.on})
        for phase in self.marks:
            mark(phase)

    def resident(self):
        return {}

    def gradients(self):
        return []

    def labelling(self, attribution):
        return contextlib.nullcontext()


def watched_config(folder):
    folders = {name: str(folder / name) for name in ("result_dir", "snapshot_dir")}
    return tiny_config(device="cuda", gradient_checkpointing=False, **folders)


@pytest.mark.parametrize("keeps", [True, False])
def test_rank_that_keeps_nothing_takes_part_in_the_diagnostic_steps(tmp_path, history, keeps):
    marks = ("forward", "backward", "forward", "backward", "optimizer")
    config = watched_config(tmp_path)
    experiment, record = Watched(history, marks), recording.new_record("measured", config, torch.device("cpu"))
    record |= {"status": "ok", "peak_memory_bytes": 10 * MIB}
    found = record_breakdown(experiment, record, config, keeps=keeps)
    trace_step(experiment.step, tmp_path / "trace", keeps=keeps)
    assert [(step["on"], step["profiled"]) for step in experiment.steps] == [(True, False), (False, True)]
    assert not history.on
    assert [phase for _, phase in found.phases] == list(marks)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    files = [config.snapshot_file, config.record_file, config.record_file.with_suffix(".txt"), tmp_path / "trace"]
    assert written == ({file.relative_to(tmp_path) for file in files} if keeps else set())
    if keeps:
        assert records.load(config.record_file)["peak_breakdown"] == found.breakdown()
        events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
        begun = sorted((e["ts"], e["name"]) for e in events if e["name"] in PHASES and e["cat"] == "user_annotation")
        assert [name for _, name in begun] == list(marks)


@pytest.mark.parametrize("context", ["all", "alloc", None])
def test_history_of_a_step_is_bounded_and_has_notes_peak_and_workspaces(history, context):
    experiment = Watched(history)
    snapshot = record_step(experiment, gradient_checkpointing=False, context=context)
    assert history.settings["max_entries"] >= 10_000
    assert (history.settings["context"], history.settings["global_record_annotations"]) == (context, True)
    assert (history.on, history.label) == (False, "")
    names = [note["name"] for note in snapshot["external_annotations"]]
    assert names[:3] == [f"{PHASE} {phase}" for phase in PHASES]
    found = timeline(snapshot)
    assert found.measured_peak == 10 * MIB
    assert {name: count for name, count in found.breakdown().items() if count} == {
        "unattributed": 6 * MIB,
        "library_workspace": WORKSPACE[1],
        "allocator_rounding": 2 * MIB,
    }


def test_step_that_fails_leaves_no_snapshot_and_the_history_off(tmp_path, history):
    class Model(torch.nn.Linear):
        def forward(self):
            return types.SimpleNamespace(loss=self.weight.exp().sum())

    class Failing(Watched):
        def step(self, mark):
            mark("forward")
            loss = self.model().loss
            mark("backward")
            self.model.weight.register_hook(self.fail)
            loss.backward()

        def fail(self, _gradient):
            assert self.history.label == f"{LOSS_MODULE}|ExpBackward0"
            raise torch.OutOfMemoryError("CUDA out of memory.")

    config = watched_config(tmp_path)
    record = recording.new_record("measured", config, torch.device("cpu"))
    experiment = Failing(history)
    experiment.model = Model(2, 2)
    with pytest.raises(torch.OutOfMemoryError):
        record_breakdown(experiment, record, config)
    assert (history.on, history.label) == (False, "")
    assert record["peak_breakdown"] is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu_script(monkeypatch, tmp_path, history):
    """The script's path for a GPU, run on the CPU: `run(**fields)` gives its exit status, record, config and steps."""

    def run(fail_at=None, **fields):
        folders = {name: str(tmp_path / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
        config = tiny_config(**{"device": "cuda", "warmup": 2, "iterations": 3, **folders, **fields})
        steps = []
        build = script.build_experiment

        def build_and_watch(*args):
            experiment = build(*args)

            def step(mark=no_mark):
                steps.append({"profiled": torch.autograd._profiler_enabled(), "on": history.on})
                if len(steps) == fail_at:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return experiment.step(mark)

            return dataclasses.replace(experiment, step=step)

        monkeypatch.setattr(script, "build_experiment", build_and_watch)
        monkeypatch.setattr(script, "CudaRuntime", lambda config: LoggingRuntime([]))
        status = script.main(config)
        return status, records.load(config.record_file), config, steps

    return run


def test_timed_steps_run_without_profiler_and_memory_history(gpu_script):
    status, _, config, steps = gpu_script()
    *plain, snapshot, trace = steps
    assert status == 0
    assert len(plain) == config.warmup + config.iterations + 1
    assert not any(step["profiled"] or step["on"] for step in plain)
    assert (snapshot["on"], snapshot["profiled"]) == (True, False)
    assert (trace["on"], trace["profiled"]) == (False, True)


def test_gpu_run_leaves_a_measured_record_snapshot_and_trace(gpu_script, capsys):
    _, record, config, _ = gpu_script()
    assert (record["status"], record["mode"], record["script"]) == ("ok", "measured", "all_gpu")
    assert len(record["step_seconds"]) == len(record["losses"]) == config.iterations
    assert record["latency_s"] == np.median(record["step_seconds"])
    assert record["throughput_tokens_per_s"] == config.tokens_per_step / record["latency_s"]
    assert list(record["phase_peak_bytes"]) == list(PHASES)
    found = read(config.snapshot_file)
    assert [phase for _, phase in found.phases] == list(PHASES)
    assert (record["peak_breakdown"], record["breakdown_peak_bytes"]) == (found.breakdown(), 10 * MIB)
    # The timed steps' peak, and that of the step that was recorded, which is not among them.
    assert record["peak_memory_bytes"] == 100 * (config.iterations + 1)
    difference = (10 * MIB - record["peak_memory_bytes"]) / MIB
    assert f"recorded in one more step, whose peak differs by {difference:+,.1f} MiB" in capsys.readouterr().out
    assert "library workspace" in config.record_file.with_suffix(".txt").read_text()
    events = json.loads(config.trace_file.read_text())["traceEvents"]
    assert set(PHASES) <= {event["name"] for event in events}
    assert list(config.log_folder.glob("events.out.tfevents.*"))


def test_without_snapshot_and_log_folders_the_record_still_has_the_breakdown(gpu_script, tmp_path):
    _, record, config, steps = gpu_script(snapshot_dir="", log_dir="")
    assert len(steps) == config.warmup + config.iterations + 2
    assert record["breakdown_peak_bytes"] == 10 * MIB
    assert [path.name for path in tmp_path.iterdir()] == ["result_dir"]


def test_breakdown_takes_no_step_if_it_is_not_asked_for(gpu_script):
    _, record, config, steps = gpu_script(breakdown=False, log_dir="")
    assert len(steps) == config.warmup + config.iterations + 1
    assert (record["status"], record["allocation_retries"]) == ("ok", 3)
    assert record["peak_breakdown"] is record["breakdown_peak_bytes"] is None
    assert not config.snapshot_file.exists()
    assert config.run_name == dataclasses.replace(config, breakdown=True).run_name


@pytest.mark.parametrize("fail_at", [1, 4], ids=["warm-up", "timed-step"])
def test_running_out_of_memory_gives_status_3_and_a_record_without_figures(gpu_script, capsys, fail_at):
    status, record, _, _ = gpu_script(fail_at=fail_at)
    assert (status, record["status"]) == (3, "oom")
    assert record["implementations"]
    assert record["latency_s"] is record["peak_memory_bytes"] is None
    assert "Out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", [HUGGING_FACE, Strategy()], ids=strategy_id)
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["keep", "recompute"])
def test_nothing_of_a_step_is_alive_in_the_next(strategy, gradient_checkpointing):
    runtime = CpuRuntime()
    gc.collect()
    gc.disable()  # what only the garbage collector can free would be alive in the next step, too
    try:
        with runtime.tracking() as memory:
            config = tiny_config(strategy=strategy, gradient_checkpointing=gradient_checkpointing)
            experiment = script.build_experiment(config, runtime)
            live = []
            for _ in range(3):
                loss = experiment.step()
                live.append(memory.live_bytes)
            assert loss.grad_fn is None
            weights = sum(p.nbytes for p in experiment.model.parameters())
    finally:
        gc.enable()
    assert live[0] == live[1] == live[2]
    # The weights, the two moments of AdamW and a few blocks for the batch and the like; not the logits.
    logits = 16 * 4096 * 4
    assert 3 * weights <= live[0] < 3 * weights + logits / 2


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["keep", "recompute"])
def test_highest_phase_peak_is_the_steps_peak(gradient_checkpointing):
    runtime = CpuRuntime()
    with runtime.tracking():
        config = tiny_config(**LARGE_LOGITS, gradient_checkpointing=gradient_checkpointing)
        experiment = script.build_experiment(config, runtime)
        experiment.step()
        measurement = measure(experiment.step, runtime, warmup=0, iterations=1)
        phases = measure_phases(experiment.step, runtime, experiment.grad_norm)
    assert list(phases.peak_bytes) == list(PHASES)
    assert max(phases.peak_bytes.values()) == phases.peak_bytes[phases.phase] == measurement.peak_memory_bytes


def test_fused_loss_saves_at_least_the_logits():
    def peak(strategy):
        runtime = CpuRuntime()
        with runtime.tracking():
            experiment = script.build_experiment(tiny_config(**LARGE_LOGITS, strategy=strategy), runtime)
            return measure_phases(experiment.step, runtime, experiment.grad_norm).peak_bytes["forward"]

    logits = 2 * 96 * 4096 * 4
    assert peak(HUGGING_FACE) - peak(Strategy.only("flce")) >= logits


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("fp32", 1), ("bf16", 1), ("fp16", 2**16)],
)
def test_grad_norm_is_that_of_all_gradients_without_the_loss_scale(dtype, scale):
    experiment = script.build_experiment(tiny_config(dtype=dtype), CpuRuntime())
    by_hand = []

    def grad_norm():
        squares = [p.grad.double().square().sum().item() for p in experiment.model.parameters()]
        by_hand.append(math.sqrt(sum(squares)) / scale)
        return experiment.grad_norm()

    phases = measure_phases(experiment.step, CpuRuntime(), grad_norm)
    assert 1 < by_hand[0] < 10
    assert phases.grad_norm == pytest.approx(by_hand[0], rel=1e-4)


@pytest.mark.parametrize(("count", "allocated"), [(0, 0), (1, 512), (512, 512), (513, 1024), (5000, 5120)])
def test_live_memory_rounds_up_to_the_allocators_blocks(count, allocated):
    with LiveMemory() as memory:
        tensor = torch.empty(count, dtype=torch.uint8)
        assert (tensor.nbytes, memory.live_bytes) == (count, allocated)


def test_live_memory_counts_storages_once_and_forgets_them_when_they_are_freed():
    with LiveMemory() as memory:
        a = torch.empty(1000)  # 4000 bytes: 8 blocks
        b = a.view(10, 100)[2:].T
        a.add_(1)
        assert memory.live_bytes == 8 * 512
        del a
        assert memory.live_bytes == 8 * 512  # b is a view of it
        c, indices = torch.ones(100).topk(10)  # 512 bytes, and 40 and 80 bytes of results
        assert memory.live_bytes == 8 * 512 + 2 * 512
        assert memory.peak_bytes == 8 * 512 + 3 * 512
        del b
        assert memory.live_bytes == 2 * 512
        assert memory.peak_bytes == 8 * 512 + 3 * 512
        memory.reset_peak()
        assert memory.peak_bytes == 2 * 512
    del c, indices
    assert memory.live_bytes == 0


def test_live_memory_counts_what_autograd_saves_until_the_backward_pass():
    with LiveMemory() as memory:
        x = torch.ones(256, requires_grad=True)  # 2 blocks
        loss = x.exp().sum()  # exp keeps its result, 2 blocks; the loss is one
        assert memory.live_bytes == 5 * 512
        loss.backward()
        assert memory.live_bytes == 5 * 512  # the gradient in place of the saved result
        del loss
        assert memory.live_bytes == 4 * 512


def test_live_memory_counts_a_tensor_made_outside_once_an_operation_returns_it():
    outside = torch.ones(1000)
    with LiveMemory() as memory:
        assert memory.live_bytes == 0
        outside.view(-1)
        outside.view(10, 100)
        assert memory.live_bytes == 4096


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 11])
def test_median_and_iqr_are_numpys(rng, count):
    values = [rng.expovariate(1) for _ in range(count)]
    median, iqr = median_and_iqr(values)
    first, third = np.percentile(values, [25, 75])
    assert median == pytest.approx(np.median(values))
    assert iqr == (None if count == 1 else pytest.approx(third - first))
