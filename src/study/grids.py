"""Grids of runs: the original's two, and axes like batch_size=1,2,4 over any setting."""

import dataclasses
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from src.cli import parsed
from src.config import RunConfig
from src.offload_config import CONFIGS
from src.study.answers import BATCH_SIZES, FIXED_BATCH, FIXED_LENGTH, SEQ_LENGTHS
from src.techniques import STRATEGIES, TECHNIQUES, kernels_only
from src.utils import UsageError

if TYPE_CHECKING:  # it imports torch; a mistake in a grid is told before that
    from src.experiment import Script

Axes = dict[str, list[str]]  # setting -> values, as on a command line

_BATCH: Axes = {"seq_length": [str(FIXED_LENGTH)], "batch_size": [str(size) for size in BATCH_SIZES]}
_SEQUENCE: Axes = {"batch_size": [str(FIXED_BATCH)], "seq_length": [str(length) for length in SEQ_LENGTHS]}


def _peer(strategy: str, **settings: object) -> Axes:
    """A cell of the grid `peers`."""
    return {"strategy": [strategy], **{name: [str(value)] for name, value in settings.items()}}


# Everything that can be turned on: alone beside what it replaces, then what goes well together.
_KEPT: dict[str, object] = {"gradient_checkpointing": 0}
_COMPILED: dict[str, object] = {"flce_chunks": 16, "compile": "layers"}
_LEAST: dict[str, object] = {"optimizer_in_backward": 1, "checkpoint_offload": "overlapped"}
_PEERS = [
    *(_peer(strategy, **kept) for kept in ({}, _KEPT) for strategy in STRATEGIES),
    *(_peer("all", flce_chunks=chunks) for chunks in (4, 16)),
    _peer("all", flce_chunks=16, flce_accumulation="fp32"),
    *(_peer("no_flce", loss=loss) for loss in ("liger", "cce", "cce_filtered", "torch", "chunked")),
    _peer("no_flce", loss="chunked", loss_chunks=16),
    _peer("all", checkpoint_every=2),
    _peer("all", checkpoint_part="mlp"),
    *(_peer("all", checkpoint_offload=how) for how in ("blocking", "overlapped")),
    _peer("all", mlp_tiles=4),
    _peer("all", mlp_tiles=4, **_KEPT),
    *(_peer("none", compile=part, **_KEPT) for part in ("layers", "model")),
    *(_peer("flce", **_COMPILED, **kept) for kept in ({}, _KEPT)),
    _peer("flce", flce_chunks=16, compile="model", **_KEPT),
    _peer("flce", **_COMPILED, fp8=1, **_KEPT),  # the whole body in fp8 was still compiling after 90 s
    _peer("no_flce", loss="chunked", loss_chunks=16, cuda_graph=1, **_KEPT),
    _peer("rope+swiglu", loss="chunked", loss_chunks=16, compile="layers", cuda_graph=1, **_KEPT),
    *(
        _peer("all", optimizer=name)
        for name in ("adamw_foreach", "adafactor", "sgd", "adamw_8bit", "adamw_4bit", "adamw_cpu", "flash_adamw")
    ),
    _peer("all", optimizer_in_backward=1),
    *(_peer("all", optimizer=name, **_LEAST) for name in ("adamw_fused", "adamw_4bit", "adafactor")),
]
# Name -> axes of each part.
GRIDS: dict[str, list[Axes]] = {
    "batch": [_BATCH],
    "sequence": [_SEQUENCE],
    "study": [_BATCH, _SEQUENCE],
    "peers": _PEERS,
}
TOLERANT = "peers"  # what this machine or a dry run cannot do of it is left out, and told

SCRIPTS = {"all_gpu": "all_gpu_liger_kernel", "deepspeed": "deepspeed_liger_kernel"}


def script(name: str) -> "Script":
    """One of the two scripts. Imports it, and with it torch."""
    return importlib.import_module(SCRIPTS[name]).SCRIPT


@dataclass(frozen=True)
class Task:
    """One run of a grid."""

    config: RunConfig
    arguments: tuple[str, ...]  # of the script
    swept: tuple[str, ...] = ()  # those of them that are the grid's

    @property
    def label(self) -> str:
        """What tells it apart, for a person."""
        sizes = f"{self.config.batch_size} x {self.config.seq_length}"
        words = {name: value for word in self.swept for name, _, value in [word.removeprefix("--").partition("=")]}
        told = ("batch_size", "seq_length", *(t.name for t in TECHNIQUES.values() if t.compared))
        others = [f"{name} {value}" for name, value in words.items() if name not in told]
        return ", ".join([self.config.title, sizes, *others])


def grid_axes(words: Sequence[str]) -> list[Axes]:
    """The axes of each part of the grid that `words` name: a grid, and axes over all of it. Raises `UsageError`."""
    if words[0] in GRIDS:
        parts, axes = GRIDS[words[0]], _axes(words[1:])
        if own := [name for name in axes if any(name in part for part in parts)]:
            raise UsageError(f"the grid {words[0]} has values of {own[0]} of its own")
        return [axes | part for part in parts]
    return [_axes(words)]


def _axes(words: Sequence[str]) -> Axes:
    axes: Axes = {}
    for word in words:
        name, separator, values = word.partition("=")
        if not separator or not all(values.split(",")):
            raise UsageError(f"{word!r} is no grid: take one of {', '.join(GRIDS)}, or axes like batch_size=1,2,4")
        if name in axes:
            raise UsageError(f"{name} is given twice")
        axes[name] = values.split(",")
    return axes


def strategy_of(word: str) -> dict[str, bool]:
    """The kernels' switches that a word names: none, no_flce, all, or kernels like rope+flce. Raises `UsageError`."""
    try:
        return dict(STRATEGIES[word]) if word in STRATEGIES else kernels_only(*word.split("+"))
    except UsageError as error:
        raise UsageError(f"strategy={word}: {error}, or one of {', '.join(STRATEGIES)}") from error


def check(axes: Sequence[Axes], script_name: str, flags: Sequence[str], *, tolerant: bool = False) -> None:
    """Raises `UsageError`, as `tasks` would, if a word or flag cannot be. Needs no torch."""
    plain = SimpleNamespace(defaults=CONFIGS[script_name](), cpu_defaults={})
    tasks(axes, plain, [*flags, "--device=cuda"], tolerant=tolerant)


class Tasks(NamedTuple):
    """The runs of a grid."""

    found: list[Task]
    left_out: list[str]  # why others cannot be, each reason once


def tasks(
    axes: Sequence[Axes], of: "Script", flags: Sequence[str], num_gpus: int = 1, *, tolerant: bool = False
) -> Tasks:
    """Every run of the grid once: strategy by strategy, the smallest first, so that the largest can be inferred.

    Those that differ in their sizes alone stand together. Raises `UsageError` if one cannot be, or, where the grid is
    `tolerant`, if none can.
    """
    found: dict[str, Task] = {}
    left_out: set[str] = set()
    for part in axes:
        names = [name for name in part if name != "strategy"]
        for word in part.get("strategy", list(STRATEGIES)):
            kernels = [f"--{name}={int(is_on)}" for name, is_on in strategy_of(word).items()]
            for values in itertools.product(*(part[name] for name in names)):
                own = [f"--{name}={value}" for name, value in zip(names, values)]
                try:
                    task = _task(of, [*kernels, *own, *flags], num_gpus, own)
                except UsageError as error:
                    if not tolerant:
                        raise
                    left_out.add(str(error))
                    continue
                found.setdefault(task.config.run_name, task)
    if left_out and not found:
        raise UsageError(min(left_out))
    order = {key: i for i, key in enumerate(dict.fromkeys(t.config.but_for_sizes for t in found.values()))}
    by_size = sorted(found.values(), key=lambda task: (order[task.config.but_for_sizes], task.config.tokens_per_step))
    return Tasks(by_size, sorted(left_out))


def _task(of: "Script", arguments: list[str], num_gpus: int, swept: Sequence[str]) -> Task:
    config = parsed(None, of.defaults, of.cpu_defaults, arguments).config
    if num_gpus > 1:
        config = dataclasses.replace(config, world_size=num_gpus)
    return Task(config, tuple(arguments), tuple(swept))
