"""Which choices are worth a dry run, round by round: what cannot help where the first ones are bound is left out."""

import math
from collections.abc import Callable, Sequence

from src.advise.levers import (
    ADAFACTOR,
    CHECKPOINTING,
    CHUNKED_LOSS,
    CUDA_GRAPH,
    IN_BACKWARD,
    LARGER_CHUNKS,
    LORA,
    MLP_CHECKPOINTING,
    OFFLOAD,
    ON_HOST,
    Choice,
    Lever,
    checkpointing,
    liger,
    mlp_checkpointing,
)
from src.advise.outcomes import Evaluate, Outcome
from src.advise.partly import Span, next_tries
from src.advise.request import Request
from src.model_utils import family_of, load_model_config
from src.techniques import KERNEL_NAMES
from src.utils import UsageError

ROUNDS = 4  # of choices between what fits and what is faster
WORTH = 0.01  # another dry run: no prediction tells apart what differs by twice as much


class Search:
    """Finds the outcomes that advice for given sizes is chosen from. `tell` hears how far it is."""

    def __init__(self, request: Request, evaluate: Evaluate, tell: Callable[[str], None] = lambda line: None) -> None:
        self.request, self._evaluate, self._tell = request, evaluate, tell
        self.outcomes: dict[Choice, Outcome] = {}
        self.failed: dict[Choice, UsageError] = {}  # what the model or this machine cannot have, or no dry run can tell
        self._kernels = kernels_of(request)
        self._layers = load_model_config(request.base).num_hidden_layers
        self.plain = Choice()
        self._begun: tuple[Lever, ...] = ()  # levers that every choice begins with, beside the kernels

    def run(self) -> list[Outcome]:
        """What was found. Raises `UsageError` if no dry run can predict the model, or it cannot have the kernels."""
        self._try([self.plain, self._with()])
        for error in self.failed.values():
            raise error
        self._look()
        if self._is_tight():
            self._begin_with(IN_BACKWARD)
            self._look()
        if not self._fitting:
            self._try(self._last_resorts())
        return list(self.outcomes.values())

    @property
    def _fitting(self) -> list[Outcome]:
        """What fits, the fastest first."""
        return sorted((o for o in self.outcomes.values() if o.fits), key=lambda o: o.seconds or math.inf)

    def _is_tight(self) -> bool:
        """Whether nothing fits, or nothing that is faster than to compute every layer again."""
        if self.request.goal != "speed" or not self._fitting:
            return not self._fitting
        fastest = self._fitting[0]
        return fastest.seconds is not None and fastest.choice.has(CHECKPOINTING)

    def _look(self) -> None:
        """Around what every choice begins with."""
        if self._is_full(self._with()):
            return
        self._try(self._leaner_and_faster())
        for _ in range(ROUNDS if self.request.goal == "speed" else 0):
            self._try(self._partly_checkpointed())

    def _begin_with(self, lever: Lever) -> None:
        """Pull it in whatever follows, if the model can have it."""
        self._try([self._with(lever)])
        if self._with(lever) in self.outcomes:
            self._begun += (lever,)

    def _is_full(self, choice: Choice) -> bool:
        """Whether what is always there is too much: nothing that is computed again, and no other loss, makes room."""
        found = self.outcomes[choice]
        return not found.fits and resident_bytes(found) >= self.request.room_bytes

    def _leaner_and_faster(self) -> list[Choice]:
        choices = [self._with(CHECKPOINTING)]
        if not self.outcomes[self.plain].fits:
            choices.append(Choice((*self._begun, CHECKPOINTING)))  # the least change, if it is enough
        if self.request.goal == "speed":
            choices += self._faster()
        return [*choices, self._with(MLP_CHECKPOINTING)]

    def _faster(self) -> list[Choice]:
        """What may be faster than Liger's kernels as they are."""
        choices = []
        if "flce" in self._kernels:
            others = (liger([name for name in self._kernels if name != "flce"]), *self._begun)
            choices = [self._with(LARGER_CHUNKS), Choice(others)]
            if self.outcomes[self._with()].bound == "launches":  # which a graph does away with, and with nothing else
                choices.append(Choice((*others, CHUNKED_LOSS, CUDA_GRAPH)))
        return choices

    def _partly_checkpointed(self) -> list[Choice]:
        """Some of the layers checkpointed, where what would be faster than all that fits does not fit."""
        bases = [o for o in self.outcomes.values() if self._lacks_room(o)]
        options = [span.options(base) for base in bases for span in self._spans()]
        fastest = next((o.seconds or math.inf for o in self._fitting), math.inf)
        return next_tries(options, self.outcomes, self.request.room_bytes, fastest / (1 + WORTH))

    def _lacks_room(self, outcome: Outcome) -> bool:
        """Whether it has a time, and could fit with some of its layers checkpointed."""
        if outcome.fits or outcome.seconds is None or outcome.config.gradient_checkpointing:
            return False
        begun = outcome.choice != self.plain and all(map(outcome.choice.has, self._begun))
        return begun and not self._is_full(outcome.choice)

    def _spans(self) -> list[Span]:
        none = self.outcomes[self._with()]
        ends = [(lever, self.outcomes.get(self._with(lever(1)))) for lever in (checkpointing, mlp_checkpointing)]
        return [Span(lever, self._layers, none, whole) for lever, whole in ends if whole is not None]

    def _last_resorts(self) -> list[Choice]:
        """Where nothing fits: with less of what is always there, at last by training otherwise."""
        ways = [
            (OFFLOAD,),  # the one that takes longest first
            (IN_BACKWARD, CHECKPOINTING),
            (IN_BACKWARD, ON_HOST),
            (IN_BACKWARD, CHECKPOINTING, ADAFACTOR),
            (CHECKPOINTING, LORA),
        ]
        return [Choice((liger(self._kernels), *levers)) for levers in ways]

    def _with(self, *levers: Lever) -> Choice:
        return Choice((liger(self._kernels), *self._begun, *levers))

    def _try(self, choices: Sequence[Choice]) -> None:
        trials = []
        for choice in dict.fromkeys(choices):
            if choice in self.outcomes or choice in self.failed:
                continue
            try:
                trials.append((choice, self.request.with_settings(**choice.values)))
            except UsageError as error:
                self.failed[choice] = error
        if not trials:
            return
        self._tell(f"dry runs: {'; '.join(choice.name for choice, _ in trials)}")
        for (choice, _), found in zip(trials, self._evaluate(trials), strict=True):
            if isinstance(found, Outcome):
                self.outcomes[choice] = found
            else:
                self.failed[choice] = found


def kernels_of(request: Request) -> list[str]:
    """Those of Liger's kernels that there are for the model."""
    known = family_of(load_model_config(request.base)).liger_switches
    return [name for name in KERNEL_NAMES if name in known]


def resident_bytes(outcome: Outcome) -> int:
    """What is there at the end of every backward pass: weights, states, gradients unless they go at once."""
    weights = outcome.breakdown["parameters"]
    gradients = 0 if outcome.config.optimizer_in_backward else weights
    return weights + gradients + outcome.breakdown["optimizer_state"]
