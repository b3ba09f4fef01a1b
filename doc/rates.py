"""Fits the rates of src/predict/rates.py to steps measured on an H100, and says how far predictions are off.

    python -m doc.rates        # simulates every measured setting anew, which takes a quarter of an hour

A fifth of the settings, chosen by a hash of their names, is kept out of the fit and reported apart.
"""

import dataclasses
import hashlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from doc import evidence
from src.machine import GPUS
from src.predict import dry_run
from src.predict.rates import FITTED, Rates, of_card
from src.predict.step_time import step_time
from src.record import Record
from src.study import grids
from src.utils import aligned_table

FOLDERS = ("h100_single_gpu", "h100_techniques", "study/h100_single_gpu")  # a machine and its days each
UNSEEN = "h200_single_gpu"  # another GPU, predicted from its data sheet and the rates of the H100
MANY_TOKENS = 8192  # the time of a step of so many is meant to be predicted closely
SMALL_WEIGHT = 0.3  # of a smaller one, which the CPU bounds: it differs from run to run
CLOSE = 0.03  # relative errors beyond count less and less: other programs may have disturbed a run
STEPS = 12  # of the fit; half of them change nothing any more


class Compared(NamedTuple):
    """A measured step, the folder of its record, and the step's predicted time in seconds."""

    run: Record
    folder: str
    predicted_s: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted_s / self.run.latency_s - 1

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


def runs_of(folder: str) -> list[Record]:
    """The runs on one GPU that ended well."""
    return [r for r in evidence.folder(folder).records if (r.mode, r.script, r.status) == ("measured", "all_gpu", "ok")]


def rightly_ordered(found: Iterable[Compared], apart: float = 0.05) -> list[bool]:
    """Of each two settings of the same sizes whose measured times differ so much: whether the faster one was named."""
    answers = []
    groups = itertools.groupby(sorted(found, key=lambda c: c.sizes), lambda c: c.sizes)
    for a, b in itertools.chain.from_iterable(itertools.combinations(own, 2) for _, own in groups):
        fast, slow = sorted((a, b), key=lambda c: c.run.latency_s)
        if setting(a.run) != setting(b.run) and slow.run.latency_s >= (1 + apart) * fast.run.latency_s:
            answers.append(fast.predicted_s < slow.predicted_s)
    return answers


def summary(name: str, found: Sequence[Compared]) -> tuple[str, ...]:
    """How far off these predictions are, and how often they name the faster of two: a row of a table."""
    errors, pairs = [abs(c.error) for c in found], rightly_ordered(found)
    named = f"{sum(pairs)} of {len(pairs)}"
    return name, str(len(found)), f"{statistics.median(errors):.1%}", f"{max(errors):.1%}", named


def fit(predict: Callable[[Rates, Record], float], runs: Sequence[Record]) -> Rates:
    """The rates whose predictions come closest, by Gauss and Newton's method on the logarithms of rates and times."""
    logs = np.log(_numbers(FITTED))

    def errors(at: np.ndarray) -> np.ndarray:
        own = _rates(np.exp(at))
        return np.array([np.log(predict(own, r) / r.latency_s) * (1 if is_large(r) else SMALL_WEIGHT) for r in runs])

    for _ in range(STEPS):
        now = errors(logs)
        slopes = np.stack([(errors(logs + step) - now) / 0.01 for step in np.eye(len(logs)) * 0.01], axis=1)
        weights = (1 + (now / CLOSE) ** 2) ** -0.25  # the square roots of soft L1's
        logs = logs + np.linalg.lstsq(slopes * weights[:, None], -now * weights)[0].clip(-0.3, 0.3)
    return _rates(np.exp(logs))


def _numbers(rates: Rates) -> list[float]:
    own = [rates.attention_flops, rates.attention_backward_flops, rates.memory_bytes]
    return [
        rates.matmul_flops["bf16"],
        rates.matmul_flops["fp32"],
        *own,
        rates.kernel_s,
        rates.operation_s,
        rates.triton_s,
    ]


def _rates(numbers: Iterable[float]) -> Rates:
    half, single, *others = map(float, numbers)
    names = ("attention_flops", "attention_backward_flops", "memory_bytes", "kernel_s", "operation_s", "triton_s")
    products = {"bf16": half, "fp16": half, "fp32": single}  # 16 bits are 16 bits: their peaks are the same
    return dataclasses.replace(FITTED, matmul_flops=products, **dict(zip(names, others)))


def main() -> None:
    """Fit, and print the rates, every prediction beside its measurement, and the errors."""
    runs, unseen = [(folder, run) for folder in FOLDERS for run in runs_of(folder)], runs_of(UNSEEN)
    build, works = grids.script("all_gpu").build_experiment, {}
    for name, run in {setting(run): run for run in [*(run for _, run in runs), *unseen]}.items():
        works[name] = dry_run.predict(run.run, build).works
        print(f"simulated {name}", flush=True)

    def predict(rates: Rates, run: Record) -> float:
        return step_time(works[setting(run)], rates).seconds

    rates = fit(predict, [run for _, run in runs if not is_held_out(run)])
    print(*dataclasses.asdict(rates).items(), sep="\n")
    found = [Compared(run, folder, predict(rates, run)) for folder, run in runs]
    print(aligned_table([_row(c) for c in sorted(found, key=lambda c: c.run.run_name)], "llrrr"))
    of_other = of_card(GPUS[unseen[0].environment.gpu])
    other = [Compared(run, UNSEEN, predict(of_other, run)) for run in unseen]
    parts = {
        f"{MANY_TOKENS:,} tokens and more": [c for c in found if is_large(c.run)],
        "  fitted": [c for c in found if is_large(c.run) and not is_held_out(c.run)],
        "  held out": [c for c in found if is_large(c.run) and is_held_out(c.run)],
        "fewer tokens": [c for c in found if not is_large(c.run)],
        f"as many, {of_other.gpu}": [c for c in other if is_large(c.run)],
    }
    header = ("", "runs", "median error", "largest", "faster one named")
    print(aligned_table([header, *(summary(name, own) for name, own in parts.items())], "lrrrr"))


def _row(c: Compared) -> tuple[str, ...]:
    times = [f"{seconds * 1e3:,.1f} ms" for seconds in (c.run.latency_s, c.predicted_s)]
    return c.run.run_name, "held out" if is_held_out(c.run) else "", *times, f"{c.error:+.1%}"


if __name__ == "__main__":
    main()
