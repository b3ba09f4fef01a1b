"""Records made up for tests of what reads them."""

from src import records, study
from src.config import STRATEGIES, RunConfig
from src.utils import GIB, median_and_iqr

NONE, NO_FLCE, ALL = STRATEGIES
GPU = "NVIDIA Imaginary 1000"


def make(name, batch_size, seq_length=1024, *, config=RunConfig, gpu=GPU, seconds=None, peak=None, **settings):
    """A record of a measured run with the strategy that figures call `name`."""
    known = {field: settings.pop(field) for field in list(settings) if field in records.EMPTY}
    config = config(strategy=STRATEGIES[name], batch_size=batch_size, seq_length=seq_length, device="cuda", **settings)
    record = records.EMPTY | {
        "run_name": config.run_name,
        "script": config.script,
        "status": "ok",
        "mode": "measured",
        "config": config.to_dict(),
        "environment": {"gpu": gpu},
    }
    if known.get("status", "ok") == "ok":
        seconds = seconds or [0.5, 0.25, 0.75, 1.0]
        latency, iqr = median_and_iqr(seconds)
        record |= {
            "peak_memory_bytes": peak or 2 * GIB,
            "step_seconds": seconds,
            "latency_s": latency,
            "latency_iqr_s": iqr,
            "throughput_tokens_per_s": config.tokens_per_step / latency,
            "mfu": 0.4,
        }
    return record | known


def out_of_memory(*cell, **fields):
    error = {"type": "OutOfMemoryError", "message": "full", "requested_bytes": 3, "free_bytes": 2, "allocated_bytes": 1}
    return make(*cell, status="oom", error=error, **fields)


def inferred(*cell, **fields):
    return out_of_memory(*cell, mode="inferred", **fields)


def failed(*cell, **fields):
    return make(*cell, status="error", error={"type": "Killed", "message": "ended by SIGSEGV"}, **fields)


def predicted(*cell, **fields):
    known = {"mode": "predicted", "simulated_gpu": "NVIDIA H100", "gpu": None, "dry_run": True}
    fields = {**known, **fields}
    return make(*cell, **fields) | {"step_seconds": None, "latency_s": None, "throughput_tokens_per_s": None}


def grids(names=STRATEGIES, without=(), **settings):
    """Both of the original's grids, but for some cells."""
    cells = [cell for cell in study.GRID if cell.strategy in names and cell not in without]
    return [make(*cell, **settings) for cell in cells]
