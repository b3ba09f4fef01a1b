"""Which of the outcomes is the answer, and why. Needs no torch."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.advise.outcomes import Outcome
from src.advise.request import Request
from src.check.curves import parities
from src.config import RunConfig
from src.record import Parity, load_all
from src.study import answers
from src.utils import GIB

# Predicted times that differ by less are alike: on record, half of the predictions are further off (see doc/data).
ALIKE = 0.02
Known = dict[tuple, Parity]  # by what gradients depend on, see answers.numerics
DATA = Path(__file__).resolve().parents[2] / "doc" / "data"
PARITIES, PEERS = DATA / "parity" / "h100.jsonl", DATA / "h100_peers"


@dataclass(frozen=True)
class Advice:
    """The answer: `ranked` are the choices that fit, the best one first; `plain` is Hugging Face's code as it is."""

    request: Request
    ranked: list[Outcome]
    plain: Outcome | None
    least: Outcome  # that takes least memory, whether it fits or not

    @property
    def pareto(self) -> list[Outcome]:
        """Of those ranked the first, and each that no other beats in memory and time."""
        return [o for o in self.ranked if o is self.ranked[0] or not any(_beats(other, o) for other in self.ranked)]


def advice(request: Request, outcomes: Sequence[Outcome], known: Known) -> Advice:
    """What to turn on. Leaves out what is known to train wrongly."""
    sound = [o for o in outcomes if (parity := parity_of(o.config, known)) is None or parity.agrees]
    plain = next((o for o in outcomes if not o.choice.levers), None)
    return Advice(
        request=request,
        ranked=ranked(request, [o for o in sound if o.fits]),
        plain=plain,
        least=min(outcomes, key=lambda o: o.peak_bytes),
    )


def ranked(request: Request, fitting: Sequence[Outcome]) -> list[Outcome]:
    """The best one first. What trains otherwise than asked comes last, whatever the goal."""
    if request.searched:
        return sorted(fitting, key=lambda o: (-getattr(o.config, request.searched), _time(o), o.choice.effort))
    if request.goal == "fit":
        return sorted(fitting, key=lambda o: (bool(o.choice.training), o.choice.effort, _time(o), o.peak_bytes))
    found = sorted(fitting, key=lambda o: (bool(o.choice.training), _time(o), o.peak_bytes))
    alike = [o for o in found if bool(o.choice.training) == bool(found[0].choice.training)]
    alike = [o for o in alike if _time(o) <= _time(alike[0]) * (1 + ALIKE)]
    return sorted(found, key=lambda o: o is not min(alike, key=lambda o: (o.choice.effort, _time(o))))


def why(advice: Advice) -> str:
    """One sentence: why the first is first."""
    first, others = advice.ranked[0], advice.ranked[1:]
    if advice.request.searched:
        return _why_largest(advice)
    if advice.request.goal == "fit":
        return f"First because it fits with the least to change{_against(advice)}."
    if first.seconds is None:
        return "First because it fits; no dry run can tell its time."
    alike = [o for o in others if o.seconds and o.seconds <= first.seconds * (1 + ALIKE) and not o.choice.training]
    more = f"; no prediction tells it from {alike[0].choice.name}, for which there is more to change" if alike else ""
    return f"First because none that fits is predicted to be faster{_against(advice)}{more}."


def _why_largest(advice: Advice) -> str:
    from src.predict.frontier import fills_positions  # it imports torch, which the dry runs have done by now

    first, searched = advice.ranked[0], advice.request.searched
    size, part = f"{searched} {getattr(first.config, searched):,}", first.largest_part.replace("_", " ")
    reason = f"First because no other choice was seen to fit so much: {size}; most of the memory is then {part}."
    if searched == "seq_length" and fills_positions(first.config):
        reason += " Longer ones would be beyond the model's positions."
    if len(advice.ranked) > 1:
        reason += " Of the others larger sizes may fit, too: they were not searched as closely."
    return reason


def _against(advice: Advice) -> str:
    first, plain = advice.ranked[0], advice.plain
    if plain is None or plain is first:
        return ""
    if not plain.fits:
        return f", while Hugging Face's code as it is would take {plain.peak_bytes / GIB:.1f} GiB"
    if first.seconds is None or plain.seconds is None:
        return ""
    return f": {plain.seconds / first.seconds:.2f} times as fast as Hugging Face's code as it is"


def _time(outcome: Outcome) -> float:
    return outcome.seconds or math.inf


def _beats(a: Outcome, b: Outcome) -> bool:
    """Whether `a` is no worse than `b` in memory, time and size, and better in one."""
    pairs = [(a.peak_bytes, b.peak_bytes), (_time(a), _time(b)), (-a.config.tokens_per_step, -b.config.tokens_per_step)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def shipped_parities() -> Known:
    """How exact gradients were in what is on record; of each the worst."""
    compared = list(parities(PARITIES)) if PARITIES.exists() else []
    compared += [(r.run, r.parity) for r in load_all([PEERS]) if r.parity is not None] if PEERS.exists() else []
    known: Known = {}
    for config, parity in compared:
        key = answers.numerics(_plain_name(config))
        known[key] = max(known.get(key, parity), parity, key=lambda p: (not p.agrees, p.ratio or math.inf))
    return known


def parity_of(config: RunConfig, known: Known) -> Parity | None:
    """What is on record for the numerics of a run."""
    return known.get(answers.numerics(_plain_name(config)))


def _plain_name(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, model_name=config.model_name.removesuffix("-Instruct"))
