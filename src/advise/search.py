"""Which choices are worth a dry run, round by round: what cannot help where the first ones are bound is left out."""

import math
from collections.abc import Callable, Sequence

from src.advise.levers import (
    ADAFACTOR,
    CHECKPOINTING,
    CHUNKED_LOSS,
    CUDA_GRAPH,
    EVERY_SECOND,
    IN_BACKWARD,
    LARGER_CHUNKS,
    LORA,
    MLP_CHECKPOINTING,
    OFFLOAD,
    ON_HOST,
    Choice,
    Lever,
    liger,
)
from src.advise.outcomes import Evaluate, Outcome, Trial
from src.advise.request import Request
from src.model_utils import family_of, load_model_config
from src.techniques import KERNEL_NAMES
from src.utils import UsageError


class Search:
    """Finds the outcomes that advice for given sizes is chosen from. `tell` hears how far it is."""

    def __init__(self, request: Request, evaluate: Evaluate, tell: Callable[[str], None] = lambda line: None) -> None:
        self.request, self._evaluate, self._tell = request, evaluate, tell
        self.outcomes: dict[Choice, Outcome] = {}
        self._kernels = kernels_of(request)
        self.plain, self.liger = Choice(), Choice((liger(self._kernels),))

    def run(self) -> list[Outcome]:
        """What was found. Raises `UsageError` if no dry run can predict the model."""
        self._try([self.plain, self.liger])
        self._try(self._second_round())
        self._try(self._third_round())
        if not any(o.fits for o in self.outcomes.values()):
            self._try(self._last_resorts())
        return list(self.outcomes.values())

    def _second_round(self) -> list[Choice]:
        first = self.outcomes[self.liger]
        if not first.fits and resident_bytes(first) >= self.request.room_bytes:
            return []  # nothing that is computed again, and no other loss, makes room for what is always there
        choices = [self._with(CHECKPOINTING)]
        if not self.outcomes[self.plain].fits:
            choices.append(Choice((CHECKPOINTING,)))  # the least change, if it is enough
        if first.fits and self.request.goal == "speed":
            choices += self._faster(first)
        return [*choices, self._with(MLP_CHECKPOINTING)]

    def _third_round(self) -> list[Choice]:
        """Between what fits and what would be faster."""
        first, fitting = self.outcomes[self.liger], [o for o in self.outcomes.values() if o.fits]
        if self.request.goal != "speed" or first.fits or not fitting:
            return []
        leaner = min(fitting, key=lambda o: o.seconds or math.inf).choice
        return [
            self._with(EVERY_SECOND),
            *([Choice((*leaner.levers, LARGER_CHUNKS))] if self._has_flce(leaner) else []),
        ]

    def _has_flce(self, choice: Choice) -> bool:
        return choice.values.get("flce", False)

    def _faster(self, first: Outcome) -> list[Choice]:
        """What may be faster than Liger's kernels as they are, where they fit."""
        choices = []
        if "flce" in self._kernels:
            others = liger([name for name in self._kernels if name != "flce"])
            choices = [self._with(LARGER_CHUNKS), Choice((others,))]
            if first.bound == "launches":  # a graph does away with launches, and with nothing else
                choices.append(Choice((others, CHUNKED_LOSS, CUDA_GRAPH)))
        return choices

    def _last_resorts(self) -> list[Choice]:
        """Where nothing fits: with less of what is always there, at last by training otherwise."""
        lean = [self._with(CHECKPOINTING, IN_BACKWARD), self._with(ON_HOST, IN_BACKWARD)]
        others = [self._with(CHECKPOINTING, IN_BACKWARD, ADAFACTOR), self._with(CHECKPOINTING, LORA)]
        return [self._with(OFFLOAD), *lean, *others]  # the one that takes longest first

    def _with(self, *levers: Lever) -> Choice:
        return Choice((*self.liger.levers, *levers))

    def _try(self, choices: Sequence[Choice]) -> None:
        trials = [trial for choice in choices if (trial := trial_of(self.request, choice))]
        if not trials:
            return
        self._tell(f"dry runs: {'; '.join(choice.name for choice, _ in trials)}")
        for outcome in told(self._evaluate(trials)):
            self.outcomes[outcome.choice] = outcome


def told(found: Sequence[Outcome | UsageError]) -> list[Outcome]:
    """Those that could be predicted. Raises `UsageError` if none could."""
    outcomes = [one for one in found if isinstance(one, Outcome)]
    if found and not outcomes:
        raise found[0]
    return outcomes


def kernels_of(request: Request) -> list[str]:
    """Those of Liger's kernels that there are for the model."""
    known = family_of(load_model_config(request.base)).liger_switches
    return [name for name in KERNEL_NAMES if name in known]


def resident_bytes(outcome: Outcome) -> int:
    """What is there at the end of every backward pass: weights, as many gradients, optimizer state."""
    return 2 * outcome.breakdown["parameters"] + outcome.breakdown["optimizer_state"]


def trial_of(request: Request, choice: Choice, **sizes: int) -> Trial | None:
    """The run of a choice; None if this model, or this machine for want of a library, cannot have it."""
    try:
        return choice, request.with_settings(**choice.values, **sizes)
    except UsageError:
        return None
