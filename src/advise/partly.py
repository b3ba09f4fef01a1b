"""Between a step that keeps all activations, which does not fit, and one that computes every layer again.

Each checkpointed layer takes about as much off the peak as another, and adds as much time. So two dry runs, with none
and with all of the layers checkpointed, say what to expect of any number between. That is where to look: whether a
choice fits and what it takes says its own dry run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from src.advise.levers import Choice, Lever
from src.advise.outcomes import Outcome


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
    all: Outcome

    def options(self, base: Outcome) -> Iterator[Expected]:
        """What a choice without checkpointing is expected to be with it: all of the layers first, one of them last."""
        saved, added = self.none.peak_bytes - self.all.peak_bytes, self.all.seconds - self.none.seconds
        for every in spacings(self.layers):
            share = math.ceil(self.layers / every) / self.layers
            choice = Choice((*base.choice.levers, self.lever(every)))
            yield Expected(choice, base.peak_bytes - share * saved, base.seconds + share * added)


def spacings(layers: int) -> list[int]:
    """For more and more of the layers left alone: one in how many is checkpointed."""
    return sorted({math.ceil(layers / count) for count in range(1, layers + 1)})


def worth_a_dry_run(options: Sequence[Sequence[Expected]], room_bytes: int, seconds: float) -> list[Choice]:
    """The fastest option that is expected to fit, and of each span the next one, where faster: more may fit.

    `options` are those of each base and span, the leanest first. Nothing that would take `seconds` or more is named.
    """
    fitting = [o for own in options for o in own if o.peak_bytes <= room_bytes and o.seconds < seconds]
    fastest = min(fitting, key=lambda o: o.seconds, default=None)
    if fastest is not None:
        seconds = fastest.seconds
    beyond = [next((o for o in own if o.peak_bytes > room_bytes), None) for own in options]
    named = [fastest, *(o for o in beyond if o is not None and o.seconds < seconds)]
    return [o.choice for o in named if o is not None]
