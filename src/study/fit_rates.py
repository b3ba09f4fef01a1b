"""Fits the rates of src/predict/rates.py to measured steps, and says how far off predictions of them are.

    python -m src.study.fit_rates doc/data/h100_single_gpu doc/data/h100_techniques doc/data/study/h100_single_gpu \\
        --unseen doc/data/h200_single_gpu --file rates.json

    python -m src.study.fit_rates doc/data/h200_single_gpu doc/data/h200_peers --only memory_bytes

Simulates every measured setting anew: a quarter of an hour for those above. A fifth of the settings, chosen by a hash
of their names, is kept out of the fit and reported apart, and so is the folder of another GPU, if there is one. With
--only all other rates are those known of the GPU.
"""

import argparse
import dataclasses
import hashlib
import itertools
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src import program
from src.machine import GPUS, H100
from src.predict.dry_run import predict
from src.predict.rates import FITTED, Rates, of_card, save
from src.predict.step_time import StepTime, step_time
from src.record import Record, load_all
from src.study import grids
from src.techniques import TECHNIQUES
from src.utils import UsageError, aligned_table

MANY_TOKENS = 8192  # the time of a step of so many is meant to be predicted closely
SMALL_WEIGHT = 0.3  # of a smaller one, which launches bound: it differs from run to run
CLOSE = 0.03  # relative errors beyond count less and less: other programs may have disturbed a run
STEPS = 12  # of the fit; half of them change nothing any more


class Compared(NamedTuple):
    """A measured step, the folder of its record, and what was predicted of it."""

    run: Record
    folder: str
    predicted: StepTime

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted.seconds / self.run.latency_s - 1

    @property
    def is_close(self) -> bool:
        """Whether its time is meant to be predicted closely: that of a launch differs from run to run."""
        return is_large(self.run) and self.predicted.bound == "gpu"

    @property
    def sizes(self) -> tuple:
        """What runs whose times are compared have in common."""
        config = self.run.run
        return self.folder, config.model_name, config.batch_size, config.seq_length, config.gradient_accumulation_steps


def setting(run: Record) -> str:
    """The name of what ran, the same for its repeats, also under a limit of memory."""
    return dataclasses.replace(run.run, iterations=10, warmup=3, memory_limit_gib=None).run_name


def is_held_out(run: Record) -> bool:
    """Whether a run is kept out of the fit."""
    return int(hashlib.sha256(setting(run).encode()).hexdigest(), 16) % 5 == 0


def is_large(run: Record) -> bool:
    """Whether the time of a step is meant to be predicted closely."""
    return run.run.tokens_per_step >= MANY_TOKENS


def finished(runs: Iterable[Record]) -> list[Record]:
    """Those on one GPU that ended well, and whose operations a dry run can count."""
    ended = [r for r in runs if (r.mode, r.script, r.status) == ("measured", "all_gpu", "ok")]
    return [r for r in ended if not any(t.unpredicted(r.run) for t in TECHNIQUES.values())]


def rightly_ordered(found: Iterable[Compared], apart: float = 0.05) -> list[bool]:
    """Of each two settings of the same sizes whose measured times differ so much: whether the faster one was named."""
    verdicts = []
    groups = itertools.groupby(sorted(found, key=lambda c: c.sizes), lambda c: c.sizes)
    for a, b in itertools.chain.from_iterable(itertools.combinations(own, 2) for _, own in groups):
        fast, slow = sorted((a, b), key=lambda c: c.run.latency_s)
        if setting(a.run) != setting(b.run) and slow.run.latency_s >= (1 + apart) * fast.run.latency_s:
            verdicts.append(fast.predicted.seconds < slow.predicted.seconds)
    return verdicts


def summary(name: str, found: Sequence[Compared]) -> tuple[str, ...]:
    """How far off these predictions are, and how often they name the faster of two: a row of a table."""
    errors, pairs = [abs(c.error) for c in found], rightly_ordered(found)
    named = f"{sum(pairs)} of {len(pairs)}"
    return name, str(len(found)), f"{statistics.median(errors):.1%}", f"{max(errors):.1%}", named


def fit(
    predict: Callable[[Rates, Record], float], runs: Sequence[Record], start: Rates, only: Collection[str] = ()
) -> Rates:
    """The rates whose predictions come closest, by Gauss and Newton's method on the logarithms of rates and times.

    `only` names those that may change; all of them if it is empty.
    """
    logs = np.log(_numbers(start))
    free = np.eye(len(logs))[[not only or name in only for name in FITTED_NAMES]]

    def errors(at: np.ndarray) -> np.ndarray:
        own = _rates(np.exp(at), start)
        return np.array([np.log(predict(own, r) / r.latency_s) * (1 if is_large(r) else SMALL_WEIGHT) for r in runs])

    for _ in range(STEPS):
        now = errors(logs)
        slopes = np.stack([(errors(logs + step) - now) / 0.01 for step in free * 0.01], axis=1)
        weights = (1 + (now / CLOSE) ** 2) ** -0.25  # the square roots of soft L1's
        logs = logs + np.linalg.lstsq(slopes * weights[:, None], -now * weights)[0].clip(-0.3, 0.3) @ free
    return _rates(np.exp(logs), start)


# Of the rates, those that are one number each; 16-bit products have one rate, whatever the format.
_SINGLE = (
    "attention_flops",
    "attention_backward_flops",
    "memory_bytes",
    "kernel_s",
    "operation_s",
    "triton_s",
    "checkpointed_s",
)
FITTED_NAMES = ("matmul_flops of 16 bits", "matmul_flops of fp32", *_SINGLE)


def _numbers(rates: Rates) -> list[float]:
    return [rates.matmul_flops["bf16"], rates.matmul_flops["fp32"], *(getattr(rates, name) for name in _SINGLE)]


def _rates(numbers: Iterable[float], start: Rates) -> Rates:
    half, single, *others = map(float, numbers)
    products = {"bf16": half, "fp16": half, "fp32": single}
    return dataclasses.replace(start, matmul_flops=products, **dict(zip(_SINGLE, others)))


def compared(pairs: Iterable[tuple[Record, Record]], folder: str) -> list[Compared]:
    """The runs of a folder, beside the time that was predicted of each; from pairs of a prediction and a run."""
    return [
        Compared(run, folder, StepTime(p.predicted_latency_s, p.predicted_gpu_s, p.predicted_cpu_s))
        for p, run in pairs
        if p.predicted_latency_s is not None and run.status == "ok" and run.latency_s is not None
    ]


def by_fit(found: Sequence[Compared], fitted: Collection[str]) -> dict[str, list[Compared]]:
    """Those of the folders that the rates were `fitted` to, those of them held out, and those of no such setting."""
    known = {setting(c.run) for c in found if c.folder in fitted}
    return {
        "fitted": [c for c in found if c.folder in fitted and not is_held_out(c.run)],
        "held out": [c for c in found if c.folder in fitted and is_held_out(c.run)],
        "measured later": [c for c in found if setting(c.run) not in known],
    }


HEADER = ("steps", "runs", "median error", "largest", "faster one named")


def accuracy(groups: Mapping[str, Sequence[Compared]]) -> list[tuple[str, ...]]:
    """How far off predictions are: rows for each group, of `HEADER`, by what bounds a step and how large it is."""
    kinds: dict[str, Callable[[Compared], bool]] = {
        f"{MANY_TOKENS:,} tokens and more, bound by the GPU": lambda c: c.is_close,
        "as many, bound by launches": lambda c: is_large(c.run) and not c.is_close,
        "fewer tokens": lambda c: not is_large(c.run),
    }
    found = {f"{name}: {kind}": list(filter(own, runs)) for name, runs in groups.items() for kind, own in kinds.items()}
    return [summary(name, runs) for name, runs in found.items() if runs]


def _row(c: Compared) -> tuple[str, ...]:
    times = [f"{seconds * 1e3:,.1f} ms" for seconds in (c.run.latency_s, c.predicted.seconds)]
    return c.run.run_name, "held out" if is_held_out(c.run) else "", *times, f"{c.error:+.1%}"


def _parsed() -> argparse.Namespace:
    parser = program.Parser(
        prog="python -m src.study.fit_rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="records of one GPU; each folder a machine and its days")
    parser.add_argument("--unseen", type=Path, nargs="*", default=[], help="records of another GPU, to predict only")
    parser.add_argument(
        "--only", choices=_SINGLE, nargs="*", default=(), help="the rates that may change (default: all)"
    )
    parser.add_argument("--file", type=Path, help="the JSON to write the rates to, for --gpu_rates")
    return parser.parse_args()


def _run() -> int:
    arguments = _parsed()
    runs = [(str(folder), run) for folder in arguments.folders for run in finished(load_all([folder]))]
    unseen = [run for run in finished(load_all(arguments.unseen)) if run.environment.gpu in GPUS]
    if not runs:
        raise UsageError("no measured runs of one GPU in these folders")
    script, works = grids.script("all_gpu"), {}
    for name, run in {setting(run): run for run in [*(run for _, run in runs), *unseen]}.items():
        works[name] = predict(run.run, script.build_experiment, simulate=script.simulate).works
        print(f"simulated {name}", file=sys.stderr, flush=True)

    # Nobody counts the step of which the host does a part, or knows how long a copy to it takes that the CPU waits for.
    def has_time(run: Record) -> bool:
        own = works[setting(run)]
        return own is not None and step_time(own, FITTED) is not None

    runs = [(folder, run) for folder, run in runs if has_time(run)]
    unseen = [run for run in unseen if has_time(run)]

    def time(rates: Rates, run: Record) -> StepTime:
        return step_time(works[setting(run)], rates)

    start = of_card(GPUS.get(runs[0][1].environment.gpu, H100)) or FITTED
    training = [run for _, run in runs if not is_held_out(run)]
    rates = fit(lambda rates, run: time(rates, run).seconds, training, start, arguments.only)
    print(*dataclasses.asdict(rates).items(), sep="\n")
    if arguments.file:
        save(rates, arguments.file)
    found = [Compared(run, folder, time(rates, run)) for folder, run in runs]
    print(aligned_table([_row(c) for c in sorted(found, key=lambda c: c.run.run_name)], "llrrr"))
    others = [Compared(run, "", time(of_card(GPUS[run.environment.gpu]), run)) for run in unseen]
    groups = by_fit(found, list(map(str, arguments.folders))) | {"another GPU, unseen": others}
    print(aligned_table([HEADER, *accuracy(groups)], "lrrrr"))
    return 0


if __name__ == "__main__":
    program.begin()
    sys.exit(program.guarded(_run))
