"""Advice put to the test: seventeen situations that no record had, their first two choices predicted and then measured.

    python -m src.advise.trial table.jsonl --advise      # anywhere: asks for advice, and keeps what is predicted
    python -m src.advise.trial table.jsonl               # on the GPU: measures what has no figures yet

The second goes on where it was stopped: the file is written after each run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src import program
from src.advise.request import check_gpu, request
from src.config import RunConfig
from src.utils import GIB, UsageError, aligned_table, write_atomically

CHOICES = 2  # of each situation
WARMUP, ITERATIONS = 3, 5  # of each measurement; a CUDA graph needs three steps before it is timed

_1B, _3B, _8B = (f"meta-llama/Llama-3.{size}" for size in ("2-1B", "2-3B", "1-8B"))


def _of(model: str, batch_size: int, seq_length: int, goal: str, gpu_memory_gib: float | None = None) -> dict[str, Any]:
    sizes = {"batch_size": batch_size, "seq_length": seq_length}
    return {"model_name": model, **sizes, "goal": goal, "gpu_memory_gib": gpu_memory_gib}


# Models, sizes and memory limits (in GiB, context included) that no record had. All on the GPU that measures them.
SITUATIONS: tuple[Mapping[str, Any], ...] = (
    _of("Qwen/Qwen3-4B", 2, 4096, "speed"),
    _of("Qwen/Qwen3-0.6B", 16, 2048, "speed", 80),
    _of("Qwen/Qwen2.5-0.5B", 2, 512, "speed", 24),
    _of(_3B, 4, 3072, "speed", 80),
    _of(_3B, 8, 2048, "fit", 40),
    _of(_1B, 12, 1024, "fit", 24),
    _of("Qwen/Qwen3-0.6B", 4, 512, "largest", 16),
    _of("allenai/OLMo-2-0425-1B", 8, 2048, "speed", 80),
    _of("HuggingFaceTB/SmolLM3-3B", 4, 2048, "speed", 48),
    _of("ibm-granite/granite-3.1-2b-base", 4, 2048, "fit", 24),
    _of(_8B, 2, 2048, "speed", 80),
    _of(_1B, 1, 1024, "longest", 14),
    # Asked later: where Liger's kernels do not fit but some layers need not be checkpointed; where MLPs are large.
    _of(_8B, 4, 2048, "speed", 80),
    _of("Qwen/Qwen3-0.6B", 16, 2048, "speed", 40),
    _of(_1B, 14, 1024, "speed", 24),
    _of(_3B, 2, 2048, "speed", 24),
    _of("allenai/OLMo-2-0425-1B", 4, 2048, "largest", 24),
)

Row = dict[str, Any]


def advised(situation: Mapping[str, Any], gpu: str, tell: Callable[[str], None]) -> list[Row]:
    """A row for each of the first choices, without measured figures."""
    from src.advise.answer import answer
    from src.advise.ranking import shipped_parities

    found = answer(request(gpu=gpu, **situation), shipped_parities(), tell)
    return [
        {
            "situation": dict(situation),
            "gpu": found.request.card.name,
            "limit_bytes": found.request.limit_bytes,
            "rank": rank,
            "choice": outcome.choice.name,
            "config": outcome.config.to_dict(),
            "predicted_peak_bytes": outcome.peak_bytes,
            "predicted_s": outcome.seconds,
            "predicted_bound": outcome.bound,
            "status": None,
            "measured_peak_bytes": None,
            "measured_s": None,
            "environment": None,
        }
        for rank, outcome in enumerate(found.pareto[:CHOICES], start=1)
    ]


def measure(row: Row, run: Callable[..., Any]) -> None:
    """Fill in what a run of the row's configuration shows, under the memory that was asked about."""
    config = RunConfig.from_dict(row["config"])
    limit_gib = row["limit_bytes"] / GIB
    config = dataclasses.replace(config, dry_run=False, warmup=WARMUP, iterations=ITERATIONS)
    record = run(dataclasses.replace(config, memory_limit_gib=limit_gib))
    if record is None:
        row["status"] = "error"
        return
    row["status"], row["environment"] = record.status, record.environment.model_dump()
    row["measured_peak_bytes"], row["measured_s"] = record.peak_memory_bytes, record.latency_s


def table(rows: list[Row]) -> str:
    """What was predicted, beside what was measured."""
    shown = [("model", "batch x seq", "choice", "peak off", "ms a step", "predicted", "off", "")]
    for row in rows:
        config, time, guess = row["config"], row["measured_s"], row["predicted_s"]
        peak = row["measured_peak_bytes"]
        shown.append(
            (
                config["model_name"].rsplit("/")[-1],
                f"{config['batch_size']} x {config['seq_length']}",
                row["choice"],
                "" if not peak else f"{row['predicted_peak_bytes'] / peak - 1:+.2%}",
                "" if not time else f"{time * 1e3:,.1f}",
                "not known" if not guess else f"{guess * 1e3:,.1f}",
                "" if not time or not guess else f"{guess / time - 1:+.1%}",
                row["status"] or "not measured",
            )
        )
    return aligned_table(shown, "lrlrrrrl")


def _save(rows: list[Row], file: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def _load(file: Path) -> list[Row]:
    """The rows of a table. Raises `UsageError` if it is none."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: no table of --advise ({error})") from error


def _run() -> int:
    parser = program.Parser(
        prog="python -m src.advise.trial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the table, a row of JSON a line")
    parser.add_argument("--advise", action="store_true", help="ask for advice, and begin the table")
    parser.add_argument("--gpu", default="h100", help="the GPU that will measure (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.advise:
        rows: list[Row] = []
        for situation in SITUATIONS:
            rows += advised(situation, arguments.gpu, lambda line: print(line, file=sys.stderr, flush=True))
            _save(rows, arguments.file)
    else:
        rows = _load(arguments.file)
        check_gpu("--advise needs none")
        from src.advise.measured import run_here

        for row in rows:
            if row["status"] is None:
                print(f"{row['config']['model_name']}: {row['choice']}", file=sys.stderr, flush=True)
                measure(row, run_here)
                _save(rows, arguments.file)
    print(table(rows))
    return 0


if __name__ == "__main__":
    program.begin()
    sys.exit(program.guarded(_run))
