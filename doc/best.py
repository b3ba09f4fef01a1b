"""The largest sizes and the fastest one that fit 80 GB and 24 GiB, for each strategy, from measured records."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from src.fake_gpu import H100
from src.frontier import GRANULARITY
from src.tables import markdown

from doc.original import LINES, MODEL, NOT_MEASURED, OFFLOAD, Line, bracket
from src import study
from src.config import STRATEGIES, RunConfig, config_of
from src.model_utils import SHAPES
from src.study import Record
from src.utils import GIB

POSITIONS = SHAPES[MODEL]["max_position_embeddings"]
BUDGETS = {"80 GB": H100.memory_bytes, "24 GiB": 24 * GIB}
SETTINGS: dict[str, RunConfig] = {
    "one GPU, bf16, checkpointing": RunConfig(),
    "one GPU, bf16, no checkpointing": RunConfig(gradient_checkpointing=False),
    **{f"ZeRO-3 offload, preset {name}": config for name, config in OFFLOAD.items()},
}

Runs = dict[tuple[str, str, str], list[Record]]  # (setting, strategy, GPU) -> records

EXPLANATION = f"""Llama 3.2 1B. 80 GB is the memory of an {H100.name}, {H100.memory_bytes / GIB:.2f} GiB.

**What counts as fitting.** A run that ended well, and

- that ran under a `--memory_limit_gib` no larger than the budget, or
- after whose steps the driver saw no more than the budget in use: what PyTorch's allocator had reserved, plus the CUDA
  context and what libraries took beside it.

Reserved, not allocated: a card must hold what the allocator holds, gaps included. This is strict: an allocator with
less memory returns cached blocks before it gives up, so a run that took more may still fit; it is shown with what it
took. A run under a limit of 24 GiB had all of that for its allocator; a card of 24 GiB has less, by its context
({H100.context_bytes / GIB:.2f} GiB on the H100). `OOM` ran out of memory with no less than the budget; `OOM*` was
not run, as a smaller one ran out of memory. `none larger measured`: the largest that was tried fits.

The columns `predicted` are no measurements: `--dry_run --find_max` for a card of that size, its context taken off, in
steps of {GRANULARITY["batch_size"]} sequence and {GRANULARITY["seq_length"]} tokens, up to the model's {POSITIONS:,}
positions."""


def best_document(runs: Sequence[Record]) -> str:
    """A table for each budget, and the fastest run that fits."""
    grouped, predictions = _grouped(runs), _predictions(runs)
    parts = [EXPLANATION, _coverage(grouped)]
    for name, budget in BUDGETS.items():
        parts += [f"## {name}", _table(grouped, predictions, budget), *_fastest_of_all(grouped, budget)]
    return "\n\n".join(parts)


def _coverage(grouped: Runs) -> str:
    """How much of the original's grids has a record; the sizes below are no limits where some are missing."""
    lines = []
    for setting in SETTINGS:
        cells: dict[str, set[study.Cell]] = defaultdict(set)
        for (name, _, gpu), own in grouped.items():
            if name == setting:
                cells[gpu] |= {study.cell(record) for record in own if record["status"] != "error"}
        counts = [f"{gpu} {len(found & set(study.GRID))}" for gpu, found in sorted(cells.items())]
        lines.append(f"- {setting}: {', '.join(counts) or NOT_MEASURED}")
    return "\n".join([f"Cells of the original's grids that have a record, of {len(study.GRID)}:", "", *lines])


def fits(record: Record, budget: int) -> bool:
    """Whether a run is known to fit `budget` bytes."""
    limit = record["config"]["memory_limit_gib"]
    within_limit = limit is not None and limit * GIB <= budget
    used = record["device_used_bytes"]
    return record["status"] == "ok" and (within_limit or (used is not None and used <= budget))


def excess(record: Record, budget: int) -> str | None:
    """What shows that a run takes more than `budget` bytes, None if nothing does."""
    used = record["device_used_bytes"]
    if record["status"] == "ok":
        return None if used is None or fits(record, budget) else f"took {used / GIB:,.2f} GiB"
    limit = record["config"]["memory_limit_gib"]
    had = record["environment"]["gpu_memory_bytes"] if limit is None else limit * GIB + H100.context_bytes
    if record["status"] == "oom" and had >= budget:
        return "OOM*" if record["mode"] == "inferred" else "OOM"
    return None


def _grouped(runs: Iterable[Record]) -> Runs:
    """The measured records of each setting, strategy and GPU, whatever memory they were limited to."""
    names = {config: name for name, config in SETTINGS.items()}
    grouped: Runs = defaultdict(list)
    for record in filter(study.is_measured, runs):
        config = dataclasses.replace(study.settings(config_of(record)), memory_limit_gib=None)
        if config in names and not study.thread_variables(record):
            grouped[names[config], study.cell(record).strategy, study.gpu_name(record)].append(record)
    return grouped


def _predictions(runs: Iterable[Record]) -> dict[tuple, int]:
    """(setting, strategy, what was searched, bytes of the card) -> the largest size predicted to fit."""
    names = {config: name for name, config in SETTINGS.items()}
    found = {}
    for record in runs:
        frontier = record["frontier"]
        if frontier is None or record["simulated_gpu"] != H100.name or not _is_on_a_line(record, frontier["searched"]):
            continue
        plain = {"find_max": None, "gpu_memory_gib": None, "memory_limit_gib": None}
        name = names.get(dataclasses.replace(study.settings(config_of(record)), **plain))
        card_bytes = frontier["limit_bytes"] + H100.context_bytes
        found[name, study.cell(record).strategy, frontier["searched"], card_bytes] = frontier["predicted"]
    return found


def _is_on_a_line(record: Record, searched: str) -> bool:
    fixed = {"batch_size": ("seq_length", study.FIXED_LENGTH), "seq_length": ("batch_size", study.FIXED_BATCH)}
    field, value = fixed[searched]
    return record["config"][field] == value


def _table(grouped: Runs, predictions: dict[tuple, int], budget: int) -> str:
    rows = []
    for setting in SETTINGS:
        gpus = dict.fromkeys(gpu for name, _, gpu in grouped if name == setting) or [""]
        for gpu in sorted(gpus):
            for strategy in STRATEGIES:
                own = grouped.get((setting, strategy, gpu), [])
                predicted = [predictions.get((setting, strategy, line.field, budget)) for line in LINES]
                if gpu and not own and set(predicted) == {None}:
                    continue
                rows.append(
                    [
                        setting,
                        strategy,
                        gpu,
                        *(_largest(own, line, budget) for line in LINES),
                        _fastest(own, budget),
                        *("not predicted" if size is None else f"{size:,}" if size else "none" for size in predicted),
                    ]
                )
    header = ["settings", "kernels", "GPU", *(line.what for line in LINES), "fastest that fits, tokens/s"]
    return markdown([*header, *(f"predicted: {line.what}" for line in LINES)], rows)


def _largest(own: Sequence[Record], line: Line, budget: int) -> str:
    """The largest size along a line that fits, and what shows that there it ends."""
    on_line: dict[int, list[Record]] = defaultdict(list)
    for record in own:
        if _is_on_a_line(record, line.field):
            on_line[getattr(study.cell(record), line.field)].append(record)
    fitting = [size for size, found in on_line.items() if any(fits(record, budget) for record in found)]
    reasons = {size: [excess(r, budget) for r in found] for size, found in on_line.items() if size not in fitting}
    too_large = {size: min(filter(None, told)) for size, told in reasons.items() if any(told)}
    return bracket(fitting, too_large)


def _fastest_run(own: Iterable[Record], budget: int) -> Record | None:
    fitting = [record for record in own if fits(record, budget)]
    return max(fitting, key=lambda record: record["throughput_tokens_per_s"], default=None)


def _fastest(own: Sequence[Record], budget: int) -> str:
    record = _fastest_run(own, budget)
    if record is None:
        return "none fits" if any(excess(r, budget) for r in own) else NOT_MEASURED
    return f"{record['throughput_tokens_per_s']:,.0f} at {_sizes(record)}"


def _sizes(record: Record) -> str:
    return "{} x {}".format(*study.cell(record)[1:])


def _fastest_of_all(grouped: Runs, budget: int) -> Iterator[str]:
    """A sentence for each GPU."""
    for gpu in sorted({gpu for _, _, gpu in grouped}):
        fastest = {key: _fastest_run(own, budget) for key, own in grouped.items() if key[2] == gpu}
        found = [(run["throughput_tokens_per_s"], key, _sizes(run)) for key, run in fastest.items() if run]
        if found:
            speed, (setting, strategy, _), sizes = max(found)
            best = f"{setting}, {strategy}, {sizes}: {speed:,.0f} tokens/s"
            yield f"The fastest of those measured on an {gpu} that fit: {best}."
