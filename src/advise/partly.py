"""Between a step that keeps all activations, which does not fit, and one that computes every layer again.

Two dry runs, with none and with all of the layers checkpointed, say roughly what to expect of any number between: as if
each layer took as much off the peak as another. Where gradients make the peak of the second, choices between take less
than that. So this says only where to look: whether a choice fits, and what it takes, says its own dry run.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from src.advise.levers import Choice, Lever
from src.advise.outcomes import Outcome

AT_ONCE = 3  # dry runs of a round


@dataclass(frozen=True)
class Expected:
    """What a choice is expected to take."""

    choice: Choice
    peak_bytes: float
    seconds: float


@dataclass(frozen=True)
class Span:
    """A way to checkpoint, `lever(1)` all of the layers and `lever(n)` one in n, with what it does from end to end."""

    lever: Callable[[int], Lever]
    layers: int
    none: Outcome
    whole: Outcome

    def options(self, base: Outcome) -> Iterator[Expected]:
        """What a choice without checkpointing is expected to be with it: all of the layers first, one of them last."""
        saved, added = self.none.peak_bytes - self.whole.peak_bytes, self.whole.seconds - self.none.seconds
        for every in spacings(self.layers):
            share = math.ceil(self.layers / every) / self.layers
            choice = Choice((*base.choice.levers, self.lever(every)))
            yield Expected(choice, base.peak_bytes - share * saved, base.seconds + share * added)


def spacings(layers: int) -> list[int]:
    """For more and more of the layers left alone: one in how many is checkpointed."""
    return sorted({math.ceil(layers / count) for count in range(1, layers + 1)})


def next_tries(
    options: Iterable[Iterable[Expected]], known: Mapping[Choice, Outcome], room_bytes: int, seconds: float
) -> list[Choice]:
    """What to try next, the fastest first, to find what takes less than `seconds`.

    Of each base and span (`options`, the leanest first) the fastest that is expected to fit, else the leanest: more may
    fit than is expected. Nothing is tried twice, nor what keeps more than one of its kind that was refused.
    """
    tries = []
    for own in options:
        possible = itertools.takewhile(lambda o: o.choice not in known or known[o.choice].fits, own)
        untried = [o for o in possible if o.choice not in known and o.seconds < seconds]
        tries += [o for o in untried if o.peak_bytes <= room_bytes][-1:] or untried[:1]
    return [o.choice for o in sorted(tries, key=lambda o: o.seconds)[:AT_ONCE]]
