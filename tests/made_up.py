"""Records made up for tests of what reads them."""

from hypothesis import strategies as st

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


BAD = "=1+1|\x1b[31m\n$\\frac$"  # of which a spreadsheet, a table, a terminal or matplotlib would make something

_SOME = st.none() | st.integers(-1, 2**40) | st.floats() | st.text(max_size=4) | st.lists(st.floats(0, 9), max_size=2)
_VALUES = {
    "status": st.sampled_from(["ok", "oom", "error"]),
    "mode": st.sampled_from(["measured", "predicted", "interpreted", "inferred"]),
    "error": st.none() | st.just({"type": "x", "message": BAD}),
    "peak_breakdown": st.none() | st.dictionaries(st.sampled_from(["mlp", "norm", BAD]), st.integers(0, 2**62)),
    "frontier": st.none()
    | st.builds(dict, searched=st.just("batch_size"), limit_bytes=st.just(1), predicted=st.integers(0, 2**20)),
    "environment": st.builds(dict, gpu=st.none() | st.text(max_size=9), date=st.text(max_size=3)),
}
_OFTEN = ("status", "mode", "latency_iqr_s", "step_seconds", "peak_memory_bytes", "frontier", "simulated_gpu")


@st.composite
def anything(draw, count=4):
    """The contents of `count` files, of which many are records: each is one in which some fields have any value."""
    found, right = [], made_up(NONE, 1, peak_breakdown={"mlp": GIB}).model_dump(by_alias=True)
    for i in range(count):
        names = draw(st.lists(st.sampled_from([*_OFTEN, "environment", *sorted(right)]), max_size=4, unique=True))
        own = {name: draw(_VALUES.get(name, _SOME)) for name in names if name not in ("schema", "script")}
        settings = {"batch_size": 1 + i // 2, "flce": bool(i % 2), "dry_run": own.get("mode") == "predicted"}
        found.append(right | {"config": right["config"] | settings} | own)
    return found
