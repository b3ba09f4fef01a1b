"""What a dry run says of one choice, and the processes in which dry runs work side by side."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from src import machine
from src.advise.levers import Choice
from src.advise.request import Request
from src.config import RunConfig
from src.explain.timeline import Timeline
from src.predict.dry_run import is_close, predict
from src.study import grids
from src.utils import UsageError, keep_out_of_garbage_collection

MOST_PROCESSES = 6


@dataclass(frozen=True)
class Outcome:
    """A choice on one GPU. Everything is predicted."""

    choice: Choice
    config: RunConfig
    fits: bool
    peak_bytes: int
    phase: str  # that the peak is in
    breakdown: dict[str, int]  # category -> bytes at the peak
    seconds: float | None  # of a step; None: no dry run can tell
    bound: str | None  # "gpu" or "launches"
    host_bytes: int | None = None  # of the whole job; None: nothing of it is kept on the host
    floor_s: float | None = None  # an offloaded step takes no less; None: not known

    @property
    def tokens_per_s(self) -> float | None:
        """The speed."""
        return self.seconds and self.config.tokens_per_step / self.seconds

    @property
    def largest_part(self) -> str:
        """The category that has most of the peak."""
        return max(self.breakdown, key=self.breakdown.__getitem__)


Trial = tuple[Choice, RunConfig]
# Says what dry runs show, in the order of the trials; of a choice that cannot be predicted, why.
Evaluate = Callable[[Sequence[Trial]], list[Outcome | UsageError]]


def outcome(trial: Trial, request: Request) -> Outcome:
    """One dry run. Raises `UsageError` if the choice cannot be."""
    return outcome_and_timeline(trial, request)[0]


def outcome_and_timeline(trial: Trial, request: Request) -> tuple[Outcome, Timeline]:
    """One dry run, and its memory over the step. Raises `UsageError` if the choice cannot be."""
    choice, config = trial
    script = grids.script(config.script)
    dry_run = functools.partial(
        predict, config, script.build_experiment, card=request.card, simulate=script.simulate, strict=False
    )
    found = dry_run(limit_bytes=request.room_bytes, steps_more=False)
    # A step that leaves some memory free can be followed by one that finds it in other pieces and needs it all: on an
    # H200 one was, and ran out of memory (doc/advice.md). So more steps are tried, with nothing left free.
    fits = found.refused is None
    if fits and is_close(found.gpu):
        fits = dry_run(limit_bytes=request.limit_bytes).refused is None
    time = found.step_time
    shown = Outcome(
        choice=choice,
        config=config,
        fits=fits,
        peak_bytes=found.peak_bytes,
        phase=found.phases.phase,
        breakdown=found.breakdown,
        seconds=time and time.seconds,
        bound=time and time.bound,
        host_bytes=found.host_peak_bytes,
        floor_s=found.floor and found.floor["floor_s"],
    )
    return shown, found.timeline


@contextlib.contextmanager
def side_by_side(request: Request) -> Iterator[Evaluate]:
    """What evaluates trials in a few processes, forked from this one, which has imported everything."""
    grids.script("all_gpu")
    fork = multiprocessing.get_context("fork")
    count = min(machine.usable_cores(), MOST_PROCESSES)
    with concurrent.futures.ProcessPoolExecutor(count, fork, _begin) as pool:

        def evaluate(trials: Sequence[Trial]) -> list[Outcome | UsageError]:
            running = [pool.submit(outcome, trial, request) for trial in trials]
            return list(map(_result, running))

        yield evaluate


def _begin() -> None:
    torch.set_num_threads(1)  # nothing is computed
    keep_out_of_garbage_collection()


def _result(running: concurrent.futures.Future) -> Outcome | UsageError:
    try:
        return running.result()
    except UsageError as error:
        return error
