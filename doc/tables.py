"""Tables made from records, in Markdown: the peak and speed of every measured run, and every prediction beside it.

python -m doc.tables measured doc/data > doc/measured.md
python -m doc.tables predicted doc/data/h100_single_gpu > doc/predicted_vs_measured.md
python -m doc.tables offload doc/data > doc/offload.md
python -m doc.tables scaling doc/data > doc/scaling.md
python -m doc.tables levers doc/data/h200_offload > doc/levers.md
python -m doc.tables peak doc/data > doc/peak.md
python -m doc.tables original doc/data > doc/original.md
python -m doc.tables best doc/data > doc/best.md
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm

import all_gpu_liger_kernel as single_gpu
from doc.best import best_document
from doc.levers import LEVERS
from doc.original import NOT_MEASURED, original_document
from src import records
from src.allocator import SimulatedOutOfMemory
from src.config import DTYPES, PRESETS, RunConfig, Strategy, config_of
from src.dry_run import predict
from src.explain.report import waterfall
from src.fake_gpu import H100
from src.figures import setting_words
from src.model_utils import SHAPES, TORCH_DTYPES
from src.study import gpu_name, thread_variables, without_its_limit
from src.tables import markdown, number_or_empty
from src.utils import GIB, MIB, UsageError, error_line


def load_all(
    folder: Path, script: str | None = "all_gpu", modes: Collection[str] = ("measured",)
) -> list[dict[str, Any]]:
    """Every record of a script, or of both, of these modes below `folder`, by model, settings, tokens and kernels."""
    order = {"all_gpu": _order, "deepspeed": _offload_order}
    runs = [r for r in records.load_all([folder]) if r["mode"] in modes and script in (None, r["script"])]
    if not runs:
        raise UsageError(f"no measured records of {script or 'any'} script below {folder}")
    return [run for name in order for run in sorted((r for r in runs if r["script"] == name), key=order[name])]


def _order(record: dict[str, Any]) -> tuple:
    config = record["config"]
    models = list(SHAPES)
    model = config["model_name"].removesuffix("-Instruct")
    return (
        models.index(model) if model in models else len(models),
        DTYPES.index(config["dtype"]),
        config["optimizer"] != RunConfig.optimizer,
        config["optimizer"],
        config["memory_limit_gib"] is not None,
        not config["gradient_checkpointing"],
        config["seq_length"],
        config["batch_size"],
        len(RunConfig.from_dict(config).strategy.kernels),
        record["run_name"],
    )


def _offload_order(record: dict[str, Any]) -> tuple:
    config = config_of(record)
    usual = all(getattr(config, name) == value for name, value in PRESETS[config.preset].items())
    return (
        config.model_name,
        config.world_size,
        not usual,
        config.seq_length,
        config.batch_size,
        len(config.strategy.kernels),
        list(PRESETS).index(config.preset),
        record["run_name"],
    )


def _cell(record: dict[str, Any]) -> list[str]:
    """What tells a run apart from the others in a table."""
    config = config_of(record)
    model = config.model_name.removeprefix("meta-llama/").removesuffix("-Instruct")
    settings = [config.dtype, *([] if config.optimizer == "adamw_fused" else [config.optimizer])]
    settings += [] if config.memory_limit_gib is None else [f"limit {config.memory_limit_gib:g} GiB"]
    checkpointing = "yes" if config.gradient_checkpointing else "no"
    sizes = f"{config.batch_size} x {config.seq_length}"
    return [config.strategy.title, model, ", ".join(settings), checkpointing, sizes, gpu_name(record)]


def machines(runs: list[dict[str, Any]]) -> str:
    """A line for each machine and set of versions that the runs were measured with."""
    names = ["gpu", "driver", "cuda", "torch", "triton", "transformers", "liger_kernel", "python"]
    if any(run["script"] == "deepspeed" for run in runs):
        names += ["deepspeed", "cpu", "cpu_count"]
    found = {tuple(f"{name} {run['environment'].get(name)}" for name in names) for run in runs}
    return "\n".join("Measured on: " + ", ".join(values) + "." for values in sorted(found))


def milliseconds(record: dict[str, Any], digits: int) -> str:
    """Median step time and half of its interquartile range."""
    return f"{record['latency_s'] * 1e3:,.{digits}f} ± {record['latency_iqr_s'] * 1e3 / 2:,.{digits}f}"


def offload_table(runs: list[dict[str, Any]]) -> str:
    """Peak and speed of each offloaded run, what bounds it, and the host memory it took."""
    rows = []
    for record in runs:
        config = config_of(record)
        sizes = f"{config.batch_size} x {config.seq_length}"
        cell = [_offload_settings(record), config.strategy.title, sizes, gpu_name(record)]
        if record["status"] == "oom":
            rows.append([*cell, "OOM", "", "", "", "", ""])
            continue
        rows.append(
            [
                *cell,
                f"{record['peak_memory_bytes'] / GIB:,.2f}",
                milliseconds(record, 0),
                f"{record['throughput_tokens_per_s']:,.0f}",
                *_floor(record),
                number_or_empty(record["host_peak_bytes"], GIB, "{:,.1f}"),
            ]
        )
    header = ["preset, and what differs from it", "kernels", "batch x seq", "GPU", "peak GiB"]
    return markdown(
        [*header, "ms a step (median ± IQR/2)", "tokens/s", "floor ms", "times the floor", "host GiB"], rows
    )


def _floor(record: dict[str, Any]) -> list[str]:
    """The floor and how many times as long the step took; nothing if the GPU had no room left to measure rates."""
    if record["floor_s"] is None:
        return ["", ""]
    return [f"{record['floor_s'] * 1e3:,.0f}", f"{record['latency_s'] / record['floor_s']:.1f}"]


_EFFICIENCY = (
    "Efficiency: tokens/s of n GPUs over n times those of one. Each GPU's process updates its part of the weights, on "
    "its share of the machine's cores. Where Adam on the CPU bounds the step, a machine with more cores for n GPUs can "
    "give more than n times."
)


def scaling_table(runs: list[dict[str, Any]]) -> str:
    """Each experiment that ran on several GPUs: peak of the fullest, tokens/s of all, and what part of n times one's.

    Compares runs on the same kind of GPU that differ in their number and in nothing else; a cell without a record, or
    an efficiency without a run on one GPU, stays empty.
    """
    found: dict[tuple, dict[int, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["environment"]["date"]):  # of two alike, the later
        run = without_its_limit(run) or run
        alone = dataclasses.replace(config_of(run), world_size=1)
        key = (alone.run_name, run["environment"]["gpu"], *thread_variables(run))
        found.setdefault(key, {})[config_of(run).world_size] = run
    found = {key: by_count for key, by_count in found.items() if max(by_count) > 1}
    if not found:
        return "No run on several GPUs has been measured."
    counts = sorted({1, 2, 4, 8}.union(*found.values()))
    rows = []
    for by_count in sorted(found.values(), key=lambda by_count: _offload_order(by_count[min(by_count)])):
        run = next(iter(by_count.values()))
        config = dataclasses.replace(config_of(run), world_size=1)
        sizes = f"{config.batch_size} x {config.seq_length}"
        cell = [_offload_settings(run | {"config": config.to_dict()}), config.strategy.title, sizes, gpu_name(run)]
        speed = {n: run["throughput_tokens_per_s"] for n, run in by_count.items() if run["status"] == "ok"}
        peaks = [_peak_or_oom(by_count.get(n)) for n in counts]
        speeds = [f"{speed[n]:,.0f}" if n in speed else "" for n in counts]
        efficiencies = [f"{speed[n] / (n * speed[1]):.0%}" if {1, n} <= speed.keys() else "" for n in counts[1:]]
        rows.append([*cell, *peaks, *speeds, *efficiencies])
    columns = [("peak GiB", counts), ("tokens/s", counts), ("efficiency", counts[1:])]
    of_counts = [f"{what}, {n} GPU{'s' * (n > 1)}" for what, sizes in columns for n in sizes]
    table = markdown(["preset, and what differs from it", "kernels", "batch per GPU x seq", "GPU", *of_counts], rows)
    return f"{table}\n\n{_EFFICIENCY}"


def _peak_or_oom(record: dict[str, Any] | None) -> str:
    """Nothing for a run that has no record."""
    if record is None:
        return ""
    return "OOM" if record["status"] == "oom" else f"{record['peak_memory_bytes'] / GIB:,.2f}"


def levers_table(runs: list[dict[str, Any]]) -> str:
    """A row for each lever."""
    found = {(run["run_name"], *thread_variables(run)): run for run in runs}
    rows = []
    for lever in LEVERS:
        run = found.get((lever.run_name, *lever.variables.split()))
        measured = [milliseconds(run, 0), f"{run['peak_memory_bytes'] / GIB:,.2f}"] if run else [NOT_MEASURED, ""]
        flags = " ".join(filter(None, (lever.variables, lever.flags)))
        rows.append([lever.what, f"`{flags}`" if flags else "none", lever.predicted, *measured, lever.verdict])
    header = ["lever", "flags", "predicted", "measured ms a step (median ± IQR/2)", "peak GiB", "verdict"]
    return markdown(header, rows).replace("---:", ":---", 2)


def _offload_settings(record: dict[str, Any]) -> str:
    """The preset and every setting that differs from it, except for those with a column."""
    config = config_of(record)
    return ", ".join([config.preset, *config.unusual("preset", "batch_size", "seq_length"), *thread_variables(record)])


def peak_table(runs: list[dict[str, Any]]) -> str:
    """What the peaks of runs with and without Liger kernels are made of, and what the kernels took away.

    Shows each pair of committed runs, of any script, that differ in all kernels and in nothing else.
    """
    return "\n\n".join(_peak_pair(none, every) for none, every in _pairs(runs))


def _pairs(runs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs with a breakdown without any and with all Liger kernels, otherwise the same."""
    told = {(run["environment"]["gpu"], run["script"], run["run_name"]): run for run in runs if run["peak_breakdown"]}
    pairs = []
    for (gpu, script, _), run in told.items():
        config = config_of(run)
        other = (gpu, script, dataclasses.replace(config, strategy=Strategy()).run_name)
        if config.strategy == Strategy.only() and other in told:
            pairs.append((run, told[other]))
    return pairs


def _peak_pair(none: dict[str, Any], every: dict[str, Any]) -> str:
    config, a, b = config_of(none), none["peak_breakdown"], every["peak_breakdown"]
    peaks = sum(a.values()), sum(b.values())
    changes = [*sorted(waterfall(a, b), key=lambda row: row[3]), ("peak", *peaks, peaks[1] - peaks[0])]
    rows = [
        [name.replace("_", " "), f"{first / MIB:,.1f}", f"{second / MIB:,.1f}", f"{change / MIB:+,.1f}"]
        for name, first, second, change in changes
    ]
    titles = [f"{title}, MiB" for title in (config.strategy.title, config_of(every).strategy.title)]
    text = (
        f"Without Liger's kernels the peak comes in the {none['peak_phase']} phase, and logits and what the loss makes "
        f"of them are {a['logits_and_loss'] / peaks[0]:.0%} of it. Fused linear cross-entropy never has them whole: "
        f"with all kernels the peak is {peaks[1] / peaks[0]:.0%} of that, in the {every['peak_phase']} phase, and its "
        f"largest part is {_largest(b)}."
    )
    title = f"## {setting_words(none)}, {config.batch_size} x {config.seq_length} tokens"
    return "\n\n".join([title, markdown(["at the peak", *titles, "difference"], rows), text])


def _largest(breakdown: dict[str, int]) -> str:
    name = max(breakdown, key=breakdown.__getitem__)
    return f"{name.replace('_', ' ')}, {breakdown[name] / sum(breakdown.values()):.0%}"


CELL_HEADER = ["kernels", "model", "settings", "checkpointing", "batch x seq", "GPU"]


def measured_table(runs: list[dict[str, Any]]) -> str:
    """Peak, latency, throughput and MFU of each run."""
    rows = []
    for record in runs:
        cell = _cell(record)
        if record["status"] == "oom":
            rows.append([*cell, "OOM", "", "", ""])
        else:
            speed = [milliseconds(record, 1), f"{record['throughput_tokens_per_s']:,.0f}"]
            mfu = "" if record["mfu"] is None else f"{record['mfu']:.1%}"
            rows.append([*cell, f"{record['peak_memory_bytes'] / GIB:,.2f}", *speed, mfu])
    header = [*CELL_HEADER, "peak GiB", "ms a step (median ± IQR/2)", "tokens/s", "MFU"]
    return markdown(header, rows)


def predicted_table(runs: list[dict[str, Any]]) -> str:
    """Measured and predicted peak, the error, and what two other estimators say."""
    rows, errors = [], []
    for record in tqdm(runs, desc="dry runs", unit="run", leave=False, disable=None):
        config = RunConfig.from_dict(record["config"])
        others = [f"{count / GIB:,.2f}" for count in other_estimates(config)]
        if record["status"] == "ok":
            measured, predicted = record["peak_memory_bytes"], predict(config, single_gpu.build_experiment).peak_bytes
            errors.append(predicted / measured - 1)
            figures = [f"{measured / GIB:,.3f}", f"{predicted / GIB:,.3f}", f"{errors[-1]:+.3%}"]
        else:
            figures = ["OOM", "fits" if _fits(config, record) else "OOM", ""]
        rows.append([*_cell(record), *figures, *others])
    header = [*CELL_HEADER, "measured GiB", "predicted GiB", "error", "accelerate", "DeepSpeed"]
    worst = max(abs(error) for error in errors)
    return f"{markdown(header, rows)}\n\n{len(errors)} peaks; the largest error is {worst:.3%}."


def _fits(config: RunConfig, record: dict[str, Any]) -> bool:
    limit = record["environment"]["gpu_memory_bytes"] - H100.context_bytes
    if config.memory_limit_gib is not None:
        limit = min(limit, int(config.memory_limit_gib * GIB))
    try:
        predict(config, single_gpu.build_experiment, limit_bytes=limit)
    except SimulatedOutOfMemory:
        return False
    return True


def other_estimates(config: RunConfig) -> tuple[int, int]:
    """Bytes by accelerate's and by DeepSpeed's estimator for one GPU; neither asks for batch, sequence or kernels.

    accelerate: its rule for Adam with everything in the weights' dtype, four times the weights. DeepSpeed: model states
    under ZeRO-2 with nothing offloaded, which assumes mixed precision.
    """
    from accelerate.commands.estimate import estimate_training_usage
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    weights = _weights(config.model_name)
    count = weights * TORCH_DTYPES[config.dtype].itemsize
    accelerate = estimate_training_usage(count, "float32")["step"]
    _, deepspeed = estimate_zero2_model_states_mem_needs(weights, num_gpus_per_node=1, num_nodes=1, cpu_offload=False)
    return accelerate, deepspeed


def _weights(model_name: str) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from src.model_utils import load_model_config

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_model_config(RunConfig(model_name=model_name))).num_parameters()


@dataclasses.dataclass(frozen=True)
class Document:
    """A document made from records."""

    title: str
    make: Callable[[list[dict[str, Any]]], str]
    script: str | None = None  # whose records it shows, None for both
    modes: tuple[str, ...] = ("measured",)

    def text(self, folder: Path, command: str) -> str:
        """All of it, from the records below `folder`."""
        runs = load_all(folder, self.script, self.modes)
        measured = machines([run for run in runs if run["mode"] == "measured"])
        return f"# {self.title}\n\nMade by `{command}`.\n{measured}\n\n{self.make(runs)}"


TABLES = {
    "measured": Document("Measured peak memory and speed, one GPU", measured_table, "all_gpu"),
    "predicted": Document("Predicted and measured peak memory, one GPU", predicted_table, "all_gpu"),
    "offload": Document("Measured peak memory and speed, ZeRO-3 offload", offload_table, "deepspeed"),
    "scaling": Document("Several GPUs under ZeRO-3 offload: peak, throughput and scaling", scaling_table, "deepspeed"),
    "peak": Document("What the peak is made of, with and without Liger kernels", peak_table),
    "levers": Document(
        "What makes an offloaded step faster: Llama 3.2 1B, all kernels, 4 x 1024", levers_table, "deepspeed"
    ),
    "original": Document(
        "The original's published figures beside ours", original_document, "deepspeed", ("measured", "inferred")
    ),
    "best": Document("Best settings that fit", best_document, modes=("measured", "inferred", "predicted")),
}


def main() -> int:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    try:
        command = f"python -m doc.tables {arguments.table} {arguments.folder}"
        print(TABLES[arguments.table].text(arguments.folder, command))
    except UsageError as error:
        error_line(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
