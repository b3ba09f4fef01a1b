"""The longest sequences, or the largest batch, that fit: one size far beyond, then around where it points.

Memory grows in proportion to the tokens of a step, beside what is always there. How much of it the allocator cannot use
is not known before: so what is expected is tried, and the limit is closed in on from both sides, for a few rounds: the
answer was seen to fit, and is about the largest.
"""

from collections.abc import Callable, Sequence

from src.advise.levers import CHECKPOINTING, IN_BACKWARD, MLP_TILES, ON_HOST, Choice, liger
from src.advise.outcomes import Evaluate, Outcome, Trial
from src.advise.request import Request
from src.advise.search import kernels_of, resident_bytes
from src.predict.frontier import GRANULARITY, largest_size
from src.utils import UsageError

FAR = 64  # times the given size
ROUNDS = 4  # of two sizes each, for the choice that reaches furthest
FIRST_GUESSES = (0.95, 0.99)  # of what is expected; the others get the first of them alone
CLOSE = 0.05  # of a size that fits: nothing is tried between it and one that does not
BELOW = (0.88, 0.955)  # of a size that did not fit, although it was expected to
LESS = 0.9  # of a size that did not fit


class SizeSearch:
    """Finds the largest size of a few lean choices; that of the one that reaches furthest most closely."""

    def __init__(self, request: Request, evaluate: Evaluate, tell: Callable[[str], None] = lambda line: None) -> None:
        self.request, self._evaluate, self._tell = request, evaluate, tell
        self._step = GRANULARITY[request.searched]
        self._given = getattr(request.base, request.searched)
        self._found: dict[Choice, dict[int, Outcome]] = {}  # choice -> size -> outcome

    def run(self) -> list[Outcome]:
        """Of each choice the outcome at the largest size that was seen to fit; of one that does not, at the given.

        Raises `UsageError` if the model takes no size that is searched.
        """
        if not self._most:
            most = largest_size(self.request.base, self.request.searched)
            what = self.request.searched.replace("_", " ")
            raise UsageError(f"--goal {self.request.goal} goes in steps of {self._step}, the largest {what} is {most}")
        far = self._rounded(FAR * self._given)
        self._try([(choice, far) for choice in self._choices()])
        self._try([(choice, far) for choice in self._in_pieces(far)])
        expected = {choice: self._expected(own[far]) for choice, own in self._found.items()}
        furthest = max(expected, key=expected.__getitem__)
        others = {choice: FIRST_GUESSES[0] * size for choice, size in expected.items() if choice != furthest}
        self._narrow(furthest, expected[furthest], others)
        without = [choice for choice, own in self._found.items() if not any(o.fits for o in own.values())]
        self._try([(choice, self._given) for choice in without])
        return [self._best(own) for own in self._found.values()]

    def _choices(self) -> list[Choice]:
        kernels = liger(kernels_of(self.request))
        tiles = (MLP_TILES,) if self.request.searched == "seq_length" else ()
        # The one whose dry runs take longest first.
        lean = [(ON_HOST, *tiles, IN_BACKWARD), (CHECKPOINTING, IN_BACKWARD), (CHECKPOINTING,)]
        return [Choice((kernels, *levers)) for levers in lean]

    def _in_pieces(self, far: int) -> list[Choice]:
        """The leanest choice with its MLPs in pieces, if they have most of the memory: else that costs time alone."""
        leanest, own = next(iter(self._found.items()))
        if leanest.has(MLP_TILES) or own[far].largest_part != "mlp":
            return []
        kernels, on_host, *others = leanest.levers
        return [Choice((kernels, on_host, MLP_TILES, *others))]

    def _expected(self, far: Outcome) -> int:
        """About the largest size, from one far beyond it."""
        resident = resident_bytes(far)
        size = getattr(far.config, self.request.searched)
        return max(int(size * (self.request.room_bytes - resident) / max(far.peak_bytes - resident, 1)), 0)

    def _narrow(self, choice: Choice, expected: int, others: dict[Choice, float]) -> None:
        """Close in on the limit of a choice; takes the others along until they fit."""
        for _ in range(ROUNDS):
            own = self._found[choice]
            low = max((size for size, outcome in own.items() if outcome.fits), default=0)
            high = min((size for size, outcome in own.items() if not outcome.fits), default=self._most + self._step)
            pair = self._between(low, high, expected)
            if not pair and not others:
                break
            self._try([*((choice, size) for size in pair), *((c, self._rounded(size)) for c, size in others.items())])
            others = {c: LESS * size for c, size in others.items() if not self._best(self._found[c]).fits}

    def _between(self, low: int, high: int, expected: int) -> list[int]:
        """What to try between a size that fits and one that does not; nothing if they are close."""
        if high - low <= max(self._step, CLOSE * low):
            return []
        sizes = {self._rounded(size) for size in self._next(low, high, expected)}
        return sorted(size for size in sizes if low < size < high) or [low + self._step]

    def _next(self, low: int, high: int, expected: int) -> Sequence[float]:
        """Sizes to try between one that fits, or 0, and one that does not: first what is expected."""
        guesses = [share * expected for share in FIRST_GUESSES]
        if any(low < self._rounded(guess) < high for guess in guesses):
            return guesses
        if high <= self._most and low < BELOW[0] * high:
            return [share * high for share in BELOW]
        if high > self._most:
            return 1.05 * low, 1.1 * low
        return low + (high - low) / 3, high - (high - low) / 3

    @property
    def _most(self) -> int:
        return largest_size(self.request.base, self.request.searched) // self._step * self._step

    def _rounded(self, size: float) -> int:
        return min(max(int(size) // self._step * self._step, self._step), self._most)

    def _best(self, own: dict[int, Outcome]) -> Outcome:
        fitting = [size for size, outcome in own.items() if outcome.fits]
        return own[max(fitting)] if fitting else own[min(own)]

    def _try(self, asked: Sequence[tuple[Choice, int]]) -> None:
        searched = self.request.searched
        trials = [t for choice, size in asked if (t := _trial(self.request, choice, **{searched: size}))]
        if not trials:
            return
        self._tell(f"dry runs: {'; '.join(f'{c.name}, {searched} {getattr(own, searched):,}' for c, own in trials)}")
        for outcome in _told(self._evaluate(trials)):
            own = self._found.setdefault(outcome.choice, {})
            own[getattr(outcome.config, searched)] = outcome


def _told(found: Sequence[Outcome | UsageError]) -> list[Outcome]:
    """Those that could be predicted. Raises `UsageError` if none could."""
    outcomes = [one for one in found if isinstance(one, Outcome)]
    if found and not outcomes:
        raise found[0]
    return outcomes


def _trial(request: Request, choice: Choice, **sizes: int) -> Trial | None:
    """The run of a choice; None if this model, or this machine for want of a library, cannot have it."""
    try:
        return choice, request.with_settings(**choice.values, **sizes)
    except UsageError:
        return None
