"""The experiment on a GPU that is not there: what its peak will be, what the peak is made of, and whether it fits.

The script's own `build_experiment` and step run on fake tensors (see fake_gpu.py), so a prediction follows every
change of the experiment. Nothing is computed: there is no loss, and the time of the step is what its operations would
take at the rates of a GPU (see rates.py).
"""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from src.config import RunConfig, room
from src.experiment import Build, Experiment, Mark, OutOfMemory, Script, Step, no_mark
from src.explain.categories import CATEGORIES
from src.explain.reading import save
from src.explain.recording import Attribution
from src.explain.timeline import Timeline, timeline
from src.machine import H100, Gpu
from src.measure import PhasePeaks, measure_phases
from src.model_utils import flops_per_step, implementations, patched
from src.predict.fake_gpu import FakeGpu
from src.predict.rates import Rates, rates_asked_for
from src.predict.simulated_snapshot import simulated_snapshot
from src.predict.step_time import StepTime, step_time
from src.predict.work import Work
from src.record import Record
from src.record.recorder import Recorder
from src.utils import aligned_table, format_bytes, print_rank0

CLOSE = 0.7  # part of the memory that may be reserved, from which on a step more is simulated

# What runs a configuration on a card, of which the allocator may reserve so many bytes.
Simulate = Callable[[RunConfig, Gpu, int | None], FakeGpu]


class FakeRuntime:
    """A `FakeGpu` behind the interface of a device; fake tensors live between `tracking()`'s enter and exit."""

    device = torch.device("cuda", 0)

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def tracking(self) -> contextlib.AbstractContextManager:
        """Enter before building the model."""
        return self.gpu.active()

    def synchronize(self) -> None:
        """Nothing runs."""

    def release_cache(self) -> None:
        """As on a GPU between warm-up and timed steps."""
        gc.collect()
        self.gpu.allocator.release_cached()

    def reset_peak(self) -> None:
        """Let both peaks start again from now."""
        self.gpu.allocator.reset_peak()

    def peak_bytes(self) -> tuple[int, int | None]:
        """Peak allocated and peak reserved since the last reset."""
        return self.gpu.allocator.peak_allocated_bytes, self.gpu.allocator.peak_reserved_bytes

    def device_used_bytes(self) -> int | None:
        """No driver, no view of it."""
        return None

    def allocation_retries(self) -> int | None:
        """Simulated, but not counted."""
        return None

    def captured(self, step: Step) -> Step:
        """The step itself: what it asks for while it is captured is what its replays use."""
        return step


@dataclass(frozen=True)
class Prediction:
    """What one simulated step showed: the run's only one, or one after the optimizer's state is made. In bytes."""

    config: RunConfig
    load_peak_bytes: int
    phases: PhasePeaks
    peak_reserved_bytes: int
    host_peak_bytes: int | None  # of the whole job; None: not simulated
    timeline: Timeline = field(repr=False)  # of the step's memory
    model_flops: int
    works: list[Work] | None  # what the step asks of the GPU; None: not counted, as part of it is on the host
    rates: Rates | None  # of the GPU; None: not known
    floor: dict[str, float] | None  # of an offloaded step, see src/offload/floor.py; None: not known
    implementations: dict[str, str]
    gpu: FakeGpu = field(repr=False)
    experiment: Experiment = field(repr=False)  # while it lives, so does its memory on `gpu`
    first_event: int  # where the events of the step begin

    refused: OutOfMemory | None  # what the card had no room for

    @property
    def peak_bytes(self) -> int:
        """Peak allocated."""
        return max(self.phases.peak_bytes.values())

    @property
    def breakdown(self) -> dict[str, int]:
        """Category -> bytes at the peak; sums to `peak_bytes`."""
        return self.timeline.breakdown()

    @property
    def step_time(self) -> StepTime | None:
        """What the step takes; None where an operation's work or the GPU's rates are not known."""
        return None if self.works is None or self.rates is None else step_time(self.works, self.rates)

    def fill(self, record: Record) -> None:
        """Put the prediction into a record; what was not simulated stays None."""
        record.simulated_gpu = self.gpu.card.name
        record.implementations = self.implementations
        record.model_flops_per_step = self.model_flops
        record.load_peak_bytes = self.load_peak_bytes
        record.peak_memory_bytes = self.peak_bytes
        record.peak_reserved_bytes = self.peak_reserved_bytes
        record.predicted_host_bytes = self.host_peak_bytes
        record.phase_peak_bytes = self.phases.peak_bytes
        record.peak_phase = self.phases.phase
        record.peak_breakdown = self.breakdown
        record.breakdown_peak_bytes = self.peak_bytes
        if (time := self.step_time) is not None:
            record.predicted_latency_s, record.predicted_bound = time.seconds, time.bound
            record.predicted_gpu_s, record.predicted_cpu_s = time.gpu_s, time.cpu_s
            record.predicted_rates = self.rates.source
        if self.floor is not None:
            parts = dict(self.floor)
            record.predicted_floor_s, record.predicted_floor = parts.pop("floor_s"), parts
            record.predicted_floor_rates = self.rates.offload.source


def predict(
    config: RunConfig,
    build: Build,
    *,
    card: Gpu = H100,
    limit_bytes: int | None = None,
    record_frames: bool = False,
    simulate: Simulate | None = None,
    strict: bool = True,
    steps_more: bool = True,
) -> Prediction:
    """Simulate `config` on `card`, or what `simulate` makes of it; `limit_bytes` bounds what may be reserved.

    `record_frames` keeps the Python stack of every request of the step, for a snapshot. `steps_more` simulates more
    steps where memory is scarce, to see whether these fit as well.

    Raises `SimulatedOutOfMemory` if the experiment does not fit into `limit_bytes`; if it is not `strict`, the
    prediction is of a larger card and has that error.
    """
    gpu = FakeGpu(card, limit_bytes) if simulate is None else simulate(config, card, limit_bytes)
    gpu.allocator.strict = strict
    with simulation(gpu, build) as predicted:
        return predicted(config, record_frames, steps_more)


@contextlib.contextmanager
def simulation(gpu: FakeGpu, build: Build) -> Iterator[Callable[..., Prediction]]:
    """What predicts, on one simulated GPU, one run after the other.

    They can only be several if `build` keeps what it builds, and they differ in their sizes alone.
    """
    runtime = FakeRuntime(gpu)
    with patched(), _without_garbage_collector(), runtime.tracking():
        yield functools.partial(_predicted, runtime, build)


def _predicted(
    runtime: FakeRuntime, build: Build, config: RunConfig, record_frames: bool = False, steps_more: bool = True
) -> Prediction:
    gpu = runtime.gpu
    # The weights' values do not matter, so they are never loaded, and no network is used.
    config = dataclasses.replace(config, pretrained=False, dry_run=True)
    gpu.allocator.refused = None
    rates = _rates(config, gpu.card)
    experiment = build(config, runtime)
    if not experiment.steps_before:
        gpu.load_peak_bytes = runtime.peak_bytes()[0]
        gpu.begin_steps()
        # The first step makes the optimizer's state: its peak is another. A run of one step alone shows that one.
        if config.warmup + config.iterations > 1:
            experiment.step(no_mark)
            if steps_more and is_close(gpu):
                experiment.step(no_mark)
    runtime.release_cache()
    runtime.reset_peak()  # of what ran before
    gpu.record_frames, first_event = record_frames, len(gpu.events)
    reserved = 0
    attribution = Attribution(gpu, experiment)

    def step(mark: Mark) -> torch.Tensor:
        def enter_phase(phase: str) -> None:
            nonlocal reserved
            reserved = max(reserved, runtime.peak_bytes()[1])
            mark(phase)

        return attribution.step(enter_phase)

    gpu.begin_counting()
    phases = measure_phases(step, runtime, lambda: None)
    works = gpu.end_counting()
    prediction = Prediction(
        config=config,
        load_peak_bytes=gpu.load_peak_bytes,
        phases=phases,
        peak_reserved_bytes=max(reserved, runtime.peak_bytes()[1]),
        host_peak_bytes=gpu.host_peak_bytes(),
        timeline=timeline(simulated_snapshot(gpu, first_event)),
        model_flops=flops_per_step(experiment.model, config),
        works=works,
        rates=rates,
        floor=None if rates is None else gpu.floor(experiment.model, config, rates),
        implementations=implementations(experiment.model),
        gpu=gpu,
        experiment=experiment,
        first_event=first_event,
        refused=gpu.allocator.refused,
    )
    return _after_another_step(prediction) if steps_more and is_close(gpu) else prediction


def _after_another_step(prediction: Prediction) -> Prediction:
    """The same, and whether the next step fits as well."""
    gpu, events = prediction.gpu, len(prediction.gpu.events)
    gpu.record_frames = False
    prediction.experiment.step(no_mark)
    del gpu.events[events:]
    return dataclasses.replace(prediction, refused=gpu.allocator.refused)


def is_close(gpu: FakeGpu) -> bool:
    """Whether memory is so scarce that a step may fit and the next one not, which finds it in other pieces."""
    allocator = gpu.allocator
    if allocator.limit_bytes is None or allocator.refused is not None:  # nothing can be refused, or something was
        return False
    return allocator.peak_reserved_bytes > CLOSE * allocator.limit_bytes


def _rates(config: RunConfig, card: Gpu) -> Rates | None:
    own = rates_asked_for(config.gpu_rates, card)
    return own.without_launches() if own is not None and config.cuda_graph else own


@contextlib.contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Keep Python's collector from freeing tensors at moments that differ from run to run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def card_in_words(config: RunConfig, card: Gpu = H100) -> str:
    """The card that a dry run is for, and what the allocator may reserve of it."""
    own = config.gpu_memory_gib is not None or config.memory_limit_gib is not None
    size = "the memory asked for" if own else f"an {card.name}"
    return f"{size}: {format_bytes(room(config, card))} for PyTorch's allocator"


def main(config: RunConfig, script: Script, predicted: Callable[..., Prediction] | None = None) -> int:
    """Predict the experiment, record and print it; returns the exit status, 3 if it does not fit the card."""
    recorder = Recorder(config, "predicted", torch.device("cpu"))
    with recorder:
        recorder.record.simulated_gpu = H100.name
        predicted = predicted or functools.partial(
            predict, build=script.build_experiment, limit_bytes=room(config), simulate=script.simulate, strict=False
        )
        prediction = predicted(config, record_frames=bool(config.snapshot_dir))
        prediction.fill(recorder.record)
        if config.snapshot_dir:
            save(simulated_snapshot(prediction.gpu, prediction.first_event), config.snapshot_file)
        if prediction.refused is not None:
            raise prediction.refused
    status = recorder.finish()
    answer = "fits" if recorder.record.status == "ok" else "does NOT fit"
    print_rank0(f"\nIt {answer} {card_in_words(config)}.")
    unknown = [work.operation for work in prediction.works or () if work.unit == "unknown"]
    if unknown and recorder.record.status == "ok":
        print_rank0(f"No time is predicted: no rate is known of {unknown[0]}.")
    tell_unchecked(config, script)
    return status


def tell_unchecked(config: RunConfig, script: Script) -> None:
    """Say what of a prediction no measured record shows."""
    if missing := script.unchecked(config):
        print_rank0(f"Not checked against a measurement: {', '.join(missing)}")


class KeptDryRuns:
    """`main` for several dry runs that differ in their sizes alone: they share what `build` keeps.

    Until it is closed, everything in the process runs on the simulated GPU.
    """

    def __init__(self, build: Build) -> None:
        self._build = build
        self._predicted: Callable[..., Prediction] | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()

    def __call__(self, config: RunConfig, script: Script) -> int:
        """The exit status of one run.

        One that keeps checkpoints on the host is alone: what is pinned for its size would count in the next one's.
        """
        if config.checkpoint_offload != "none":
            return main(config, script)
        if self._predicted is None:
            gpu = script.simulate(config, H100, room(config))
            gpu.allocator.strict = False
            self._predicted = self._open.enter_context(simulation(gpu, self._build))
        return main(config, script, self._predicted)


def many(configs: Iterable[RunConfig], script: Script) -> None:
    """`main` of each; those that differ in their sizes alone share what the script can keep."""
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(config.but_for_sizes, []).append(config)
    for alike in groups.values():
        with contextlib.ExitStack() as stack:
            run = stack.enter_context(script.kept_dry_runs()) if script.kept_dry_runs else main
            for config in alike:
                run(config, script)


def forecast(config: RunConfig, script: Script, variants: Mapping[str, Mapping[str, object]]) -> str:
    """A table of what a step of `config` would need and take with each variant's settings in place of its own."""
    configs = {name: dataclasses.replace(config, **own) for name, own in variants.items()}
    build, simulate = script.build_experiment, script.simulate
    predictions = {name: predict(own, build, simulate=simulate) for name, own in configs.items()}
    rows = [("", *predictions)]
    for category in CATEGORIES:
        rows.append((category.replace("_", " "), *(format_bytes(p.breakdown[category]) for p in predictions.values())))
    rows.append(("peak memory", *(format_bytes(p.peak_bytes) for p in predictions.values())))
    rows.append(("in the phase", *(p.phases.phase for p in predictions.values())))
    times = [prediction.step_time for prediction in predictions.values()]
    if None not in times:
        rows.append(("step, predicted", *(f"{time.seconds * 1e3:,.1f} ms" for time in times)))
    return aligned_table(rows)
