"""The largest batch or sequence that fits: predicted anywhere, and measured too where there is a GPU.

And the fewest GPUs that a model fits, which are only predicted.
"""

import dataclasses
import sys
from collections.abc import Callable

import torch

from src.config import MAX_TOKENS, RunConfig, limit_bytes
from src.experiment import Build, Script
from src.machine import H100, Gpu, this_gpu
from src.model_utils import load_model_config
from src.predict.allocator import SimulatedOutOfMemory
from src.predict.dry_run import Prediction, Simulate, predict, tell_unchecked
from src.record import Frontier
from src.record.recorder import Recorder
from src.record.report import files_written, summary
from src.utils import GIB, HostMemoryError, format_bytes, print_rank0

# Sizes are searched in these steps; GPUs in powers of two up to this.
GRANULARITY = {"batch_size": 1, "seq_length": 128}
MOST_GPUS = 1024


def search(fits: Callable[[int], bool], granularity: int, largest: int, *, roughly: bool = False) -> int:
    """The largest multiple of `granularity` up to `largest` for which `fits` holds, 0 if none.

    `fits` must hold up to some size and fail beyond it. Doubles the size until it fails, then bisects. `roughly`:
    beyond 256 times the granularity not every multiple is tried, but some within 1 %.
    """
    low, high = 0, 1  # in units of the granularity: `low` fits, `high` is not known to
    limit = largest // granularity
    while high <= limit and fits(high * granularity):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > (_step(low) if roughly else 1):
        middle = (low + high) // 2
        if fits(middle * granularity):
            low = middle
        else:
            high = middle
    return low * granularity


def _step(size: int) -> int:
    """The difference between sizes that are tried near `size`, a power of two up to a 128th of it."""
    return 1 << max(0, size.bit_length() - 8)


def fewest(fits: Callable[[int], bool], largest: int) -> int:
    """The smallest power of two up to `largest` for which `fits` holds, 0 if none.

    From below: with too few GPUs memory ends early, so that trying them takes little time.
    """
    number = 1
    while number <= largest:
        if fits(number):
            return number
        number *= 2
    return 0


def largest_size(config: RunConfig, searched: str) -> int:
    """The bound of a search: tokens that can be counted, and for sequences the model's positions."""
    if searched == "batch_size":
        return MAX_TOKENS // config.seq_length
    positions = load_model_config(dataclasses.replace(config, pretrained=False)).max_position_embeddings
    return min(positions, MAX_TOKENS // config.batch_size)


def fills_positions(config: RunConfig) -> bool:
    """Whether its sequences are as long as the model's positions allow, to within a step of the search."""
    return config.seq_length + GRANULARITY["seq_length"] > largest_size(config, "seq_length")


def predicted_frontier(
    config: RunConfig, build: Build, card: Gpu, limit: int, simulate: Simulate | None = None
) -> tuple[int, Prediction | None]:
    """The size or number of GPUs that is searched for, where `card` may reserve `limit` bytes, and its prediction."""
    predictions: dict[int, Prediction] = {}

    def fits(size: int) -> bool:
        try:
            sized = _sized(config, size)
            predictions[size] = predict(sized, build, card=card, limit_bytes=limit, simulate=simulate)
        except SimulatedOutOfMemory:
            _tell(f"{_name(config)} {size:,}: does not fit")
            return False
        except HostMemoryError:
            _tell(f"{_name(config)} {size:,}: does not fit into the host's memory")
            return False
        _tell(f"{_name(config)} {size:,}: fits, peak {format_bytes(predictions[size].peak_bytes)}")
        return True

    if config.searched == "world_size":
        size = fewest(fits, MOST_GPUS)
    else:
        roughly = config.searched == "seq_length"
        size = search(fits, GRANULARITY[config.searched], largest_size(config, config.searched), roughly=roughly)
    return size, predictions.get(size)


def measured_frontier(config: RunConfig, measure: Callable[[RunConfig], int], expected: int) -> int:
    """The largest size that runs on this GPU, found by running sizes around `expected`; each run leaves its record.

    A card smaller than this one is measured by capping the allocator.
    """
    granularity = GRANULARITY[config.find_max]
    granularity *= _step(expected // granularity) if config.find_max == "seq_length" else 1
    limit = limit_bytes(config)
    quiet = dataclasses.replace(
        config,
        snapshot_dir="",
        log_dir="",
        gpu_memory_gib=None,
        memory_limit_gib=None if limit is None else limit / GIB,
    )

    def runs(size: int) -> bool:
        if size == 0:
            return True
        _tell(f"measuring {config.find_max} {size:,}")
        return measure(dataclasses.replace(_sized(quiet, size), find_max=None)) == 0

    size = max(expected, granularity)
    if runs(size):
        while size + granularity <= largest_size(config, config.find_max) and runs(size + granularity):
            size += granularity
        return size
    size = max(size - granularity, 0)
    while not runs(size):
        size = max(size - granularity, 0)
    return size


def main(config: RunConfig, script: Script) -> int:
    """Search, print and record the frontier; returns the exit status."""
    # Engines of several sizes cannot follow each other in one process, so offloaded runs are searched for on fakes.
    on_gpu = torch.cuda.is_available() and not config.dry_run and script.main_for_many is None
    card = this_gpu() if on_gpu else H100
    limit = limit_bytes(config) or card.memory_bytes - card.context_bytes
    recorder = Recorder(config, "predicted", torch.device("cpu"))
    record = recorder.record
    with recorder:
        size, prediction = predicted_frontier(config, script.build_experiment, card, limit, script.simulate)
        record.simulated_gpu = card.name
        record.frontier = Frontier(searched=config.searched, limit_bytes=limit, predicted=size)
        if prediction is None:
            # Raises what does not fit.
            predict(
                _sized(config, _easiest(config)),
                script.build_experiment,
                card=card,
                limit_bytes=limit,
                simulate=script.simulate,
            )
        prediction.fill(record)
        print_rank0(_summary(config, prediction, card, limit))
        if on_gpu:
            record.frontier.measured = measured_frontier(config, script.main, size)
            print_rank0(f"Measured on this GPU: the largest {config.find_max} that runs is {record.frontier.measured}")
    if record.status == "oom":
        easiest = f"{_name(config)} {_easiest(config):,}"
        print_rank0(f"Predicted ({card.name}): not even {easiest} fits {format_bytes(limit)} of allocator memory")
        print_rank0(summary(record))
    print_rank0(f"\n{files_written(config)}")
    answer = record.frontier and record.frontier.predicted
    tell_unchecked(_sized(config, answer or _easiest(config)), script)
    return record.exit_status


def _tell(line: str) -> None:
    """Progress, which is no part of the answer."""
    print(line, file=sys.stderr, flush=True)


def _sized(config: RunConfig, size: int) -> RunConfig:
    return dataclasses.replace(config, **{config.searched: size})


def _name(config: RunConfig) -> str:
    """What is searched for, as a user calls it."""
    return "num_gpus" if config.searched == "world_size" else config.searched


def _easiest(config: RunConfig) -> int:
    """What fits if anything does."""
    return MOST_GPUS if config.searched == "world_size" else GRANULARITY[config.searched]


def _summary(config: RunConfig, prediction: Prediction, card: Gpu, limit: int) -> str:
    largest = max(prediction.breakdown, key=prediction.breakdown.__getitem__)
    size = f"{_name(config)} {getattr(prediction.config, config.searched)}"
    host = prediction.host_peak_bytes
    host_words = "" if host is None else f"; host memory of the whole job {format_bytes(host)}"
    which = "smallest power of two" if config.searched == "world_size" else "largest"
    end = ""
    if config.searched == "seq_length" and fills_positions(prediction.config):
        end = "\nIt is the model's positions that end there, not the memory: --rope_scaling goes beyond them"
    return (
        f"Predicted ({card.name}): {size} is the {which} that fits {format_bytes(limit)} of allocator memory\n"
        f"peak {format_bytes(prediction.peak_bytes)} in the {prediction.phases.phase} phase; "
        f"largest part: {largest.replace('_', ' ')}, {format_bytes(prediction.breakdown[largest])}{host_words}{end}"
    )
