"""Which settings to choose from at one size: those that no other beats in memory and speed. Needs no torch.

A setting is everything that can be turned on, gradient checkpointing and the dtype among it. Compared are runs that
train the same model on as many tokens a step, on the same machine.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from src import techniques
from src.config import RunConfig
from src.record import WRONG, Record
from src.study import answers
from src.study.answers import machine, plain_name, short_model
from src.techniques import TECHNIQUES, kernels_title
from src.utils import GIB, file_name

FEWEST = 3  # points of a figure
# What compared runs have in common, besides the tokens of a step: the model and how it is trained, and where.
_COMMON = ("model_name", "learning_rate", "pretrained", "seed", "memory_limit_gib", "world_size")
# What a point's words leave out, or say in other words.
_SAID = (*_COMMON, "dtype", "gradient_checkpointing", *set(answers.NOT_A_SETTING) - set(answers.COMPARED))


class Group(NamedTuple):
    """What compared runs have in common."""

    config: RunConfig  # what is not in common has its default
    sequences: int  # of an optimizer step, on all GPUs: micro-batches are one more thing to turn on
    seq_length: int
    machine: str

    @property
    def name(self) -> str:
        """The name of its figure, without a suffix."""
        size = f"{self.sequences}x{self.seq_length}"
        settings = self.config.settings_name
        return file_name(f"pareto_{self.config.script}_{size}{settings}_{plain_name(self.machine)}")


@dataclasses.dataclass(frozen=True)
class Point:
    """A setting that was measured."""

    record: Record  # the one that answers for the setting, with a parity that was measured in another run of it
    speeds: tuple[float, ...]  # tokens/s of all runs of the setting, ascending

    @property
    def gib(self) -> float:
        """Peak allocated memory."""
        return self.record.peak_memory_bytes / GIB

    @property
    def speed(self) -> float:
        """Tokens/s."""
        return self.record.throughput_tokens_per_s

    @property
    def is_wrong(self) -> bool:
        """Whether its gradients are less exact than Hugging Face's: its gains do not count."""
        return self.record.trains_wrongly

    @property
    def is_unchecked(self) -> bool:
        """Whether it computes otherwise than Hugging Face's code does, and nobody measured how exactly."""
        return not self.is_wrong and self.record.parity is None and changes_numerics(self.record.run)


@dataclasses.dataclass(frozen=True)
class Choices:
    """The settings that were run at one size, by their memory, and those that have no figures."""

    points: list[Point]
    absent: list[Record]

    @property
    def records(self) -> list[Record]:
        """All of them."""
        return [*(p.record for p in self.points), *self.absent]

    @functools.cached_property
    def frontier(self) -> list[Point]:
        """The points that no other beats, by their memory."""
        return frontier(self.points)

    @functools.cached_property
    def common(self) -> list[str]:
        """The words that hold for each of them, but for the kernels'."""
        first, *others = map(words, self.records)
        return [word for word in first[1:] if all(word in own for own in others)]

    def label(self, record: Record) -> str:
        """How a setting differs from Hugging Face's code with gradient checkpointing and from other ones here."""
        kernels, *more = words(record)
        kernels += f" {WRONG}" if record.trains_wrongly else ""
        return ", ".join([kernels, *(word for word in more if word not in self.common)])


def choices(found: Iterable[Record]) -> dict[Group, Choices]:
    """Of each group with enough settings its points and the others; those with most points first."""
    found = list(found)
    times, parities = answers.step_times(found), answers.parities(found)
    grouped: dict[Group, list[Record]] = defaultdict(list)
    for cells in answers.studies(found).values():
        for record in cells.values():
            grouped[_group(record)].append(answers.with_parity(record, parities))
    known = {group: _choices(own, times) for group, own in grouped.items()}
    enough = [group for group, own in known.items() if len(own.points) >= FEWEST]
    return {group: known[group] for group in sorted(enough, key=lambda g: (-len(known[g].points), g.name))}


def _group(record: Record) -> Group:
    config = record.run
    usual = {f.name: f.default for f in dataclasses.fields(config) if f.name not in _COMMON}
    common = dataclasses.replace(config, **usual)
    return Group(common, config.global_batch_size, config.seq_length, machine(record))


def _choices(own: Sequence[Record], times: answers.StepTimes) -> Choices:
    points = [Point(record, _speeds(record, times)) for record in own if _has_figures(record)]
    return Choices(
        points=sorted(points, key=lambda p: (p.gib, -p.speed, words(p.record))),
        absent=sorted((record for record in own if not _has_figures(record)), key=words),
    )


def _has_figures(record: Record) -> bool:
    return record.status == "ok" and None not in (record.peak_memory_bytes, record.throughput_tokens_per_s)


def _speeds(record: Record, times: answers.StepTimes) -> tuple[float, ...]:
    seconds = times.get(answers.place(record), [])
    return tuple(record.run.tokens_per_step / s for s in reversed(seconds))


def frontier(points: Iterable[Point]) -> list[Point]:
    """Those that train rightly and that no such other beats: none has as little memory and as much speed, or better.

    Two that are alike in both do not beat each other.
    """
    kept: list[Point] = []
    for point in sorted((p for p in points if not p.is_wrong), key=lambda p: (p.gib, -p.speed)):
        if not kept or point.speed > kept[-1].speed or (point.gib, point.speed) == (kept[-1].gib, kept[-1].speed):
            kept.append(point)
    return kept


def changes_numerics(config: RunConfig) -> bool:
    """Whether a run computes anything otherwise than Hugging Face's code in its dtype does."""
    changing = [t for t in TECHNIQUES.values() if t.changes_numerics]
    plain = dataclasses.replace(config, **{t.name: t.hugging_faces for t in changing})
    plain = dataclasses.replace(plain, **techniques.chosen(plain, ()))  # Gemma 2's eager attention is the usual one
    return any(getattr(config, t.name) != getattr(plain, t.name) for t in changing)


def words(record: Record) -> list[str]:
    """The kernels, the dtype, and each setting in which a run differs from the usual."""
    config = record.run
    checkpointing = [] if config.gradient_checkpointing else ["no checkpointing"]
    others = [word.removesuffix(" True") for word in config.unusual(*_SAID)]
    return [kernels_title(config).replace(" Kernel", ""), config.dtype, *checkpointing, *others]


def title(group: Group, own: Choices) -> str:
    """What the points have in common."""
    config = group.config
    parts = [short_model(config), f"{group.sequences:,} x {group.seq_length:,} tokens a step"]
    parts += ["ZeRO-3 offload"] if config.script == "deepspeed" else []
    parts += [group.machine]
    parts += [] if config.memory_limit_gib is None else [f"limited to {config.memory_limit_gib:g} GiB"]
    return ", ".join([*parts, *config.unusual("model_name", "memory_limit_gib"), *own.common])


def told(record: Record) -> tuple:
    """What tells a run from others of its setting, also where it stands for one without a limit."""
    return answers.place(record), record.environment.date, record.latency_s, record.peak_memory_bytes


def on_frontier(found: Iterable[Record]) -> set[tuple]:
    """What `told` says of the runs on the frontier of their size."""
    return {told(point.record) for own in choices(found).values() for point in own.frontier}
