"""Memory against speed of the choices that are worth taking, numbered as in the list. All predicted."""

from matplotlib.figure import Figure

from src.advise.ranking import Advice
from src.study.bars import empty_figure, plain
from src.utils import GIB

_CHOICE = {"marker": "o", "color": "#1f3a5f", "markeredgecolor": "black"}
_PLAIN = {"marker": "o", "color": "white", "markeredgecolor": "black"}
_LIMIT = {"color": "#b30000", "linestyle": "--", "linewidth": 1}


def chart(advice: Advice) -> Figure | None:
    """A point for each choice whose time is predicted, and a line where memory ends; None if none has a time."""
    named = [(str(rank), o) for rank, o in enumerate(advice.pareto, start=1)]
    if advice.plain is not None and advice.plain not in advice.pareto:
        named.append(("Hugging Face's code", advice.plain))
    points = [(name, o) for name, o in named if o.tokens_per_s]
    if not points:
        return None
    drawing = empty_figure(7, 4.2)
    axes = drawing.subplots()
    for name, o in points:
        style = _PLAIN if o is advice.plain else _CHOICE
        axes.plot(o.peak_bytes / GIB, o.tokens_per_s, linestyle="", markersize=7, **style)
        place = (o.peak_bytes / GIB, o.tokens_per_s)
        axes.annotate(plain(name), place, (6, 4), textcoords="offset points", fontsize=9)
    limit = advice.request.limit_bytes / GIB
    highest = max(o.peak_bytes for _, o in points) / GIB
    if highest > 0.5 * limit:  # elsewhere the line would push the points into a corner
        axes.axvline(limit, label=f"memory ends: {limit:.1f} GiB", **_LIMIT)
        axes.legend(fontsize=8, frameon=False)
    axes.set_title("memory against speed, numbered as in the list", fontsize=10)
    axes.margins(0.15)
    axes.set(xlabel="GiB allocated at the peak, predicted", ylabel="tokens/s, predicted", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.12g}")
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
