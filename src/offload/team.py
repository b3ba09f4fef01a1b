"""What several ranks showed, taken together: the slowest and fullest stand for the job."""

from collections.abc import Callable
from typing import Any

import torch

from src.config import RunConfig
from src.measure import Measurement, PhasePeaks
from src.offload import ranks
from src.record import Record
from src.utils import is_rank0


def gathered(value: Any) -> list[Any]:
    """`value` of every rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def combined(combine: Callable[[list[Any]], Any], columns: list[list[Any]]) -> list[Any]:
    """`combine` over the ranks, entry by entry; None where a rank has none."""
    return [None if None in entries else combine(list(entries)) for entries in zip(*columns)]


def largest(value: float | None) -> float | None:
    """The largest of every rank's `value`, None if a rank has none."""
    return combined(max, [[v] for v in gathered(value)])[0]


class Ranks:
    """All processes of the job; every one of them calls each of these."""

    @property
    def keeps(self) -> bool:
        """Whether this rank writes the record."""
        return is_rank0()

    def measurement(self, own: Measurement) -> Measurement:
        """What the slowest and fullest ranks showed; losses are averaged."""
        every = gathered(own)
        return Measurement(
            step_seconds=combined(max, [m.step_seconds for m in every]),
            losses=combined(lambda losses: sum(losses) / len(losses), [m.losses for m in every]),
            peak_allocated_bytes=combined(max, [m.peak_allocated_bytes for m in every]),
            peak_reserved_bytes=combined(max, [m.peak_reserved_bytes for m in every]),
            device_used_bytes=combined(max, [[m.device_used_bytes] for m in every])[0],
            allocation_retries=combined(max, [[m.allocation_retries] for m in every])[0],
        )

    def phases(self, own: PhasePeaks) -> PhasePeaks:
        """The fullest rank's peak of each phase; the norm is of all ranks' gradients already."""
        every = gathered(own.peak_bytes)
        return PhasePeaks(
            {name: combined(max, [[p[name]] for p in every])[0] for name in own.peak_bytes}, own.grad_norm
        )

    def largest(self, own: int | None) -> int | None:
        """The largest of every rank's number."""
        return largest(own)

    def total(self, own: int) -> int:
        """The sum of every rank's number."""
        return sum(gathered(own))

    def tell_out_of_memory(self, config: RunConfig) -> None:
        """The first rank has printed the report; another tells only if it alone ran out of memory."""
        if not is_rank0():
            ranks.give_way()
            ranks.tell(f"{ranks.name()}out of GPU memory, see {config.record_file}")

    def leave_draft(self, record: Record, config: RunConfig) -> None:
        """Leave with the supervisor the record that it completes and saves if this job is ended from outside."""
        ranks.leave_draft(record.model_dump(by_alias=True), config.record_file)
