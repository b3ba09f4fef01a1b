"""From a question to advice: the dry runs that it takes, side by side, and what they mean."""

from collections.abc import Callable

from src.advise.outcomes import side_by_side
from src.advise.ranking import Advice, Known, advice
from src.advise.request import Request
from src.advise.search import Search
from src.advise.sizes import SizeSearch


def answer(request: Request, known: Known, tell: Callable[[str], None] = lambda line: None) -> Advice:
    """What to turn on."""
    search = SizeSearch if request.searched else Search
    with side_by_side(request) as evaluate:
        return advice(request, search(request, evaluate, tell).run(), known)
