"""Long sequences: what was measured of them, and what was predicted of those that were not."""

import dataclasses
import functools

from doc import evidence
from src.config import RunConfig
from src.record import Record
from src.techniques import TITLES

# What was turned on, by its name: Hugging Face's code, the kernels, and all that the preset turns on.
LONGEST = "preset longest"
SETTINGS = (TITLES["none"], TITLES["all"], LONGEST)


def setting_of(record: Record) -> str:
    """What a run of a long sequence has turned on: one of `SETTINGS`, or the name of other kernels."""
    return LONGEST if record.run.preset == "longest" else record.run.title


def measured() -> list[Record]:
    """The measured runs of long sequences, the study's model first, from the shortest on."""
    runs = evidence.predictable(evidence.listed(evidence.DATA / "h200_long", "all_gpu"))

    def order(run: Record) -> tuple:
        config, setting = run.run, setting_of(run)
        place = SETTINGS.index(setting) if setting in SETTINGS else len(SETTINGS)
        return config.model_name != RunConfig.model_name, config.model_name, config.seq_length, place, run.run_name

    return sorted(runs, key=order)


def ladder() -> dict[str, tuple[Record, Record | None]]:
    """Setting -> the longest sequence that the study's model was trained on, and the next that it had no room for."""
    found, runs = {}, [run for run in measured() if run.run.model_name == RunConfig.model_name]
    for setting in SETTINGS:
        own = [run for run in runs if setting_of(run) == setting]
        if fitting := [r for r in own if r.status == "ok"]:
            beyond = [r for r in own if r.status == "oom" and r.run.seq_length > fitting[-1].run.seq_length]
            found[setting] = fitting[-1], next(iter(beyond), None)
    return found


@functools.cache
def predicted() -> dict[tuple[str, int], Record]:
    """Setting and tokens -> the prediction that the picture shows; its peak is there also if no card could hold it."""
    return {(setting_of(r), r.run.seq_length): r for r in evidence.folder("predicted_long").records}


@functools.cache
def largest() -> dict[tuple[str, int], Record]:
    """Setting and layers whose attention is kept -> the longest sequence predicted to fit an 80 GB card."""
    records = evidence.folder("predicted_long/largest").records
    own = [r for r in records if r.run.model_name == RunConfig.model_name]
    return {(setting_of(r), r.run.attention_kept): r for r in own}


def alike(first: Record, other: Record) -> bool:
    """Whether two runs differ in their numbers of steps alone."""
    steps = {"iterations": 1, "warmup": 1}
    return dataclasses.replace(first.run, **steps) == dataclasses.replace(other.run, **steps)


def changes(run: Record) -> list[str]:
    """What a predicted run of `LONGEST` changes of it."""
    return run.run.unusual("batch_size", "seq_length", "rope_scaling", "dry_run", "gpu_memory_gib", "preset")


def without(*parts: str) -> list[Record]:
    """The predictions at the most tokens in which these settings of `LONGEST` are changed first; "" is the whole."""
    own = {changes(r)[0].split()[0]: r for r in evidence.folder("predicted_long/without").records}
    own[""] = predicted()[LONGEST, max(r.run.seq_length for r in own.values())]
    return [own[part] for part in parts]


def foretold() -> list[float]:
    """Errors, without signs, largest first, of those predictions that were made before their run was measured.

    They are of steps after the first, so those runs are left out that have no other.
    """
    runs = [r for r in measured() if r.status == "ok" and r.run.warmup]
    pairs = [(predicted().get((setting_of(r), r.run.seq_length)), r) for r in runs]
    alike = ("model_name", "mlp_tile_tokens")
    own = [(p, r) for p, r in pairs if p and all(getattr(p.run, name) == getattr(r.run, name) for name in alike)]
    return sorted((abs(evidence.error(p, r)) for p, r in own if p.environment.date < r.environment.date), reverse=True)
