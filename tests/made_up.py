"""Records made up for tests of what reads them."""

from src.config import RunConfig
from src.record import Record
from src.study.answers import GRID
from src.techniques import STRATEGIES, TITLES
from src.utils import GIB, quartiles

NONE, NO_FLCE, ALL = TITLES.values()
GPU = "NVIDIA Imaginary 1000"
SWITCHES = {TITLES[word]: switches for word, switches in STRATEGIES.items()}


def made_up(kernels, batch_size, seq_length=1024, *, config=RunConfig, gpu=GPU, seconds=None, peak=None, **settings):
    """The record of a measured run. `kernels` is the study's name for them, `settings` the run's or the record's."""
    own = {name: settings.pop(name) for name in list(settings) if name in Record.model_fields}
    sizes = {"batch_size": batch_size, "seq_length": seq_length, "device": "cuda"}
    run = config(**{**SWITCHES[kernels], **sizes, **settings})
    record = {
        "run_name": run.run_name,
        "script": run.script,
        "status": "ok",
        "mode": "measured",
        "config": run.to_dict(),
        "environment": {"gpu": gpu, "date": "2026-01-01T00:00:00+00:00"} | own.pop("environment", {}),
    }
    if own.get("status", "ok") == "ok":
        seconds = seconds or [0.5, 0.25, 0.75, 1.0]
        first, latency, third = quartiles(seconds)
        record |= {
            "peak_memory_bytes": peak or 2 * GIB,
            "step_seconds": seconds,
            "latency_s": latency,
            "latency_iqr_s": third - first,
            "throughput_tokens_per_s": run.tokens_per_step / latency,
            "mfu": 0.4,
        }
    return Record(**record | own)


def out_of_memory(*cell, **fields):
    """One that had no room."""
    sizes = {"requested_bytes": 3, "free_bytes": 2, "allocated_bytes": 1}
    return made_up(*cell, status="oom", error={"type": "OutOfMemoryError", "message": "full"} | sizes, **fields)


def inferred(*cell, **fields):
    """One that was not run, because a smaller one had no room."""
    return out_of_memory(*cell, mode="inferred", **fields)


def failed(*cell, **fields):
    """One that ended by itself."""
    return made_up(*cell, status="error", error={"type": "Killed", "message": "ended by SIGSEGV"}, **fields)


def predicted(*cell, **fields):
    """One that was simulated."""
    known = {"mode": "predicted", "simulated_gpu": "NVIDIA H100 80GB HBM3", "gpu": None, "dry_run": True}
    figures = {"step_seconds": None, "latency_s": None, "throughput_tokens_per_s": None}
    return made_up(*cell, **{**known, **fields, **figures})


def grids(names=(NONE, NO_FLCE, ALL), without=(), **settings):
    """Both of the original's grids, but for some cells."""
    return [made_up(*cell, **settings) for cell in GRID if cell.strategy in names and cell not in without]
