"""The measurement contract: what is inside the clock, what is counted, and that nothing else runs or stays alive."""

import contextlib
import dataclasses
import gc
import json
import math
import types
import weakref

import numpy as np
import pytest
import torch

import all_gpu_liger_kernel as script
from src.check.devices import TrackedHost
from src.experiment import PHASES, no_mark
from src.explain.reading import read
from src.measure import measure, measure_phases, steps
from src.measure.devices import HostRuntime
from src.measure.graph import GraphedStep
from src.record import load
from src.utils import MIB, quartiles
from tests.helpers import HUGGING_FACE, kernels_only, tiny_config


class LoggingRuntime:
    """A device that writes down what is asked of it; its n-th peak is 100 n bytes."""

    device = torch.device("cpu")

    def __init__(self, log, peaks=None):
        self.log = log
        self.peaks = iter(peaks or [(100 * n, 1000 * n) for n in range(1, 99)])

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
        return next(self.peaks)

    def device_used_bytes(self):
        return 12345

    def allocation_retries(self):
        return 3


@pytest.fixture
def log(monkeypatch):
    """A log in which the clock's readings appear, too; they are 2, 4, 8... seconds."""
    log = []

    def perf_counter():
        log.append("clock")
        return float(2 ** log.count("clock"))

    monkeypatch.setattr(steps, "time", types.SimpleNamespace(perf_counter=perf_counter))
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
    assert result.step_seconds == [2.0 * 4**i for i in range(iterations)]
    assert result.losses == [warmup + 1.0 + i for i in range(iterations)]
    assert result.peak_allocated_bytes == [100 * (i + 1) for i in range(iterations)]
    assert (result.peak_memory_bytes, result.reserved_bytes) == (100 * iterations, 1000 * iterations)
    assert (result.device_used_bytes, result.allocation_retries) == (12345, 3)


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


def micro_batches(mark):
    for _ in range(2):
        mark("forward")
        mark("backward")
    mark("optimizer")
    return torch.tensor(2.0)


def test_phase_that_comes_back_with_each_micro_batch_keeps_its_highest_peak():
    norms = []
    runtime = LoggingRuntime([], [(n, None) for n in (5, 9, 7, 8, 9)])
    phases = measure_phases(micro_batches, runtime, lambda: norms.append(1.5) or 1.5)
    assert phases.peak_bytes == {"forward": 7, "backward": 9, "optimizer": 9}
    assert (phases.phase, phases.grad_norm, norms) == ("backward", 1.5, [1.5])


def test_where_nothing_counts_there_is_no_peak_and_no_phase_that_sets_it():
    result = measure(micro_batches, HostRuntime(), warmup=1, iterations=2)
    assert result.peak_allocated_bytes == result.peak_reserved_bytes == [None, None]
    assert result.peak_memory_bytes is result.reserved_bytes is result.device_used_bytes is None
    assert len(result.step_seconds) == 2
    phases = measure_phases(micro_batches, HostRuntime(), lambda: None)
    assert phases.peak_bytes == dict.fromkeys(PHASES)
    assert phases.phase is phases.grad_norm is None
    assert measure(micro_batches, TrackedHost(), warmup=0, iterations=1).reserved_bytes is None


class History:
    """The CUDA allocator's history, as far as a step on a CPU can tell; `on` while it is recording."""

    def __init__(self, monkeypatch):
        self.on = False
        self.notes = []
        history = self

        class Noted(torch.profiler.record_function):
            def __init__(self, name):
                history.notes.append({"name": name, "stage": "START", "device": 0, "time_us": len(history.notes)})
                super().__init__(name)

        def switch(enabled="all", **settings):
            history.on = enabled is not None

        monkeypatch.setattr(torch.profiler, "record_function", Noted)
        memory = torch.cuda.memory
        monkeypatch.setattr(memory, "_record_memory_history", switch)
        monkeypatch.setattr(memory, "_set_memory_metadata", lambda label: None)
        monkeypatch.setattr(memory, "_snapshot", self.snapshot)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 10 * MIB)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def snapshot(self):
        event = {"action": "alloc", "addr": 2**20, "size": MIB, "time_us": 10**9, "user_metadata": ""}
        return {"segments": [], "device_traces": [[event]], "external_annotations": list(self.notes)}


@pytest.fixture
def gpu_script(monkeypatch, tmp_path):
    """The script's path for a GPU, run on the CPU: `run(**fields)` gives its exit status, record, config and steps."""
    history = History(monkeypatch)
    build = script.build_experiment

    def run(fail_at=None, **fields):
        folders = {name: str(tmp_path / name) for name in ("result_dir", "snapshot_dir", "log_dir")}
        config = tiny_config(**{"device": "cuda", "warmup": 2, "iterations": 3, **folders, **fields})
        steps = []

        def build_and_watch(*args):
            experiment = build(*args)

            def step(mark=no_mark):
                steps.append("profiled " * torch.autograd._profiler_enabled() + "recorded" * history.on)
                if len(steps) == fail_at:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return experiment.step(mark)

            return dataclasses.replace(experiment, step=step)

        monkeypatch.setattr(script, "build_experiment", build_and_watch)
        monkeypatch.setattr(script, "CudaRuntime", lambda config: LoggingRuntime([]))
        return script.main(config), load(config.record_file), config, steps

    return run


def test_gpu_run_times_plain_steps_and_leaves_record_snapshot_logs_and_trace(gpu_script, capsys):
    status, record, config, steps = gpu_script()
    # Warm-up, timed steps and the phases'; then, with the record safe, one for the snapshot and one for the trace.
    assert (status, steps) == (0, [""] * (2 + 3 + 1) + ["recorded", "profiled "])
    assert (record.status, record.mode, record.script) == ("ok", "measured", "all_gpu")
    assert len(record.step_seconds) == len(record.losses) == 3
    assert record.latency_s == np.median(record.step_seconds)
    assert record.throughput_tokens_per_s == config.tokens_per_step / record.latency_s
    assert record.load_peak_bytes == 100
    assert record.peak_memory_bytes == 100 * (1 + 3)  # the timed steps', not that of the step that was recorded
    assert list(record.phase_peak_bytes) == list(PHASES)
    found = read(config.snapshot_file)
    assert (record.peak_breakdown, record.breakdown_peak_bytes) == (found.breakdown(), 10 * MIB)
    difference = (10 * MIB - record.peak_memory_bytes) / MIB
    out = capsys.readouterr().out
    assert f"recorded in one more step, whose peak differs by {difference:+,.1f} MiB" in out
    assert all(str(file) in out for file in (config.record_file, config.snapshot_file, config.log_folder))
    events = json.loads(config.trace_file.read_text())["traceEvents"]
    begun = sorted((e["ts"], e["name"]) for e in events if e["name"] in PHASES and e["cat"] == "user_annotation")
    assert [name for _, name in begun] == list(PHASES)
    assert list(config.log_folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("fields", "extra", "files"),
    [
        ({"snapshot_dir": "", "log_dir": ""}, ["recorded"], {"result_dir"}),
        ({"breakdown": False, "log_dir": ""}, [], {"result_dir", "snapshot_dir"}),
    ],
)
def test_diagnostic_step_is_taken_only_for_what_is_asked_for(gpu_script, tmp_path, fields, extra, files):
    _, record, config, steps = gpu_script(iterations=1, warmup=0, **fields)
    assert steps == ["", "", *extra]
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (record.peak_breakdown is not None) == config.breakdown
    assert not config.snapshot_file.is_file()


@pytest.mark.parametrize("fail_at", [1, 4], ids=["warm-up", "timed-step"])
def test_running_out_of_memory_gives_status_3_and_a_record_without_figures(gpu_script, capsys, fail_at):
    status, record, _, steps = gpu_script(fail_at=fail_at)
    assert (status, record.status, len(steps)) == (3, "oom", fail_at)
    assert record.implementations
    assert record.latency_s is record.peak_memory_bytes is None
    assert "Out of memory" in capsys.readouterr().out


def test_nothing_of_a_model_that_is_updated_in_the_backward_pass_outlives_it():
    experiment = script.build_experiment(tiny_config(optimizer_in_backward=True), HostRuntime())
    experiment.step()
    parameters = [weakref.ref(parameter) for parameter in experiment.model.parameters()]
    del experiment
    gc.collect()
    assert not any(own() is not None for own in parameters)


@pytest.mark.parametrize(
    ("kernels", "checkpointing"), [(HUGGING_FACE, False), (HUGGING_FACE, True), (kernels_only("swiglu"), False)]
)
def test_nothing_of_a_step_is_alive_in_the_next(kernels, checkpointing):
    runtime = TrackedHost()
    gc.collect()
    gc.disable()  # what only the garbage collector can free would be alive in the next step, too
    try:
        with runtime.tracking() as memory:
            experiment = script.build_experiment(tiny_config(**kernels, gradient_checkpointing=checkpointing), runtime)
            live = []
            for _ in range(2):
                loss = experiment.step()
                live.append(memory.live_bytes)
            assert loss.grad_fn is None
            weights = sum(p.nbytes for p in experiment.model.parameters())
    finally:
        gc.enable()
    assert live[0] == live[1]
    # The weights, the two moments of AdamW and a few blocks for the batch and the like; not the logits.
    logits = 16 * 4096 * 4
    assert 3 * weights <= live[0] < 3 * weights + logits / 2


@pytest.mark.parametrize(("dtype", "scale"), [("fp32", 1), ("bf16", 1), ("fp16", 2**16)])
def test_grad_norm_is_that_of_all_gradients_without_the_loss_scale(dtype, scale):
    experiment = script.build_experiment(tiny_config(dtype=dtype), HostRuntime())
    by_hand = []

    def grad_norm():
        squares = [p.grad.double().square().sum().item() for p in experiment.model.parameters()]
        by_hand.append(math.sqrt(sum(squares)) / scale)
        return experiment.grad_norm()

    phases = measure_phases(experiment.step, HostRuntime(), grad_norm)
    assert 1 < by_hand[0] < 10
    assert phases.grad_norm == pytest.approx(by_hand[0], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 11])
def test_quartiles_are_numpys(rng, count):
    values = [rng.expovariate(1) for _ in range(count)]
    assert quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_a_graph_is_let_go_before_a_step_whose_phases_are_marked(monkeypatch):
    """It holds the memory of a step. On a stand-in for CUDA; what is captured runs no kernels."""
    told, alive = [], weakref.WeakSet()

    class Graph:
        def __init__(self):
            alive.add(self)

        def replay(self):
            told.append("replay")

    def cuda_context(*_args, **_kwargs):
        return contextlib.nullcontext()

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": cuda_context}
    stand_ins |= {"CUDAGraph": Graph, "graph": cuda_context, "max_memory_allocated": lambda: 7}
    stand_ins |= {name: lambda: None for name in ("synchronize", "reset_peak_memory_stats")}
    stand_ins["empty_cache"] = lambda: told.append(f"cache emptied beside {len(alive)} graphs")
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    step = GraphedStep(lambda mark: told.append(f"step beside {len(alive)} graphs"), told.append)
    for mark in (no_mark, no_mark, no_mark, print, no_mark):
        step(mark)
    captured = ["step beside 1 graphs", 7, "replay"]
    let_go = ["cache emptied beside 0 graphs", 0, "step beside 0 graphs"]
    assert told == ["step beside 0 graphs"] * 2 + captured + let_go + captured
