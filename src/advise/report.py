"""Advice in words: what binds, the choices worth taking, why the first is first, and lines to copy."""

from src.advise import lines
from src.advise.levers import UNPREDICTED
from src.advise.outcomes import Outcome
from src.advise.ranking import Advice, Known, parity_of, why
from src.advise.request import GOALS, LEFT_FREE, Request
from src.predict.rates import rates_asked_for
from src.study.pareto import changes_numerics
from src.utils import GIB, aligned_table

_RATES_UNKNOWN = "the speed of this GPU is not known here, so no time is predicted"

HEADER = ["", "what to turn on", "batch x seq", "peak GiB", "ms a step", "tokens/s", "numbers", "parity", "needs"]


def report(advice: Advice, known: Known) -> str:
    """The whole answer."""
    parts = [head(advice.request), *filter(None, [bindings(advice)])]
    if not advice.ranked:
        return "\n\n".join([*parts, *verdict(advice)])
    first = advice.ranked[0]
    parts += [aligned_table(rows(advice, known), "llrrrrlrl"), *verdict(advice)]
    parts += [f"Here:\n\n{lines.command(first.config)}", f"In your program:\n\n{lines.python(first.config)}"]
    return "\n\n".join([*parts, f"Not predicted, so not ranked: {UNPREDICTED}."])


def verdict(advice: Advice) -> list[str]:
    """Why the first choice is first, and what it changes beside memory and time; or that nothing fits. Paragraphs."""
    if not advice.ranked:
        least = advice.least
        return [f"Nothing fits: {least.choice.name} takes least, {_gib(least)} GiB (predicted)."]
    training = advice.ranked[0].choice.training
    return [why(advice), *([f"It trains otherwise than asked: {training}."] if training else [])]


def room(request: Request) -> str:
    """The memory that there is, and what of it is left free."""
    return f"{request.limit_bytes / GIB:.1f} GiB for PyTorch, of which {LEFT_FREE:.0%} are left free"


def head(request: Request) -> str:
    """What was asked, and where the figures come from."""
    base, card = request.base, request.card
    model = base.model_name.rsplit("/")[-1]
    rates = rates_asked_for(base.gpu_rates, card)
    source = _RATES_UNKNOWN if rates is None else f"times by rates: {rates.source}"
    return (
        f"{model}, {base.batch_size} x {base.seq_length:,} tokens, {base.dtype}, on an {card.name} with "
        f"{room(request)}. Wanted: {GOALS[request.goal]}.\n"
        f"All figures are predicted ({source})."
    )


def bindings(advice: Advice) -> str:
    """What binds Hugging Face's code, and what the first choice, a line each."""
    first = advice.ranked[0] if advice.ranked else None
    named = [("Hugging Face's code as it is", advice.plain), ("the first choice", first)]
    return "\n".join(f"What binds {name}: {binding(o)}." for name, o in named if o is not None)


def binding(outcome: Outcome) -> str:
    """The phase and the category of its peak, and whether the GPU or launching takes the time."""
    part = outcome.largest_part
    share = outcome.breakdown[part] / outcome.peak_bytes
    memory = f"{_gib(outcome)} GiB in the {outcome.phase} phase, {share:.0%} of it {part.replace('_', ' ')}"
    time = {"gpu": "the GPU's work", "launches": "launching from the CPU", None: "not known"}[outcome.bound]
    fits = "" if outcome.fits else ", which does not fit"
    return f"memory, {memory}{fits}; time, {time}"


def rows(advice: Advice, known: Known) -> list[list[str]]:
    """A table: its header, the choices worth taking by their rank, and Hugging Face's code as it is."""
    found = [[str(i), *_row(o, known)] for i, o in enumerate(advice.pareto, start=1)]
    plain = advice.plain
    if plain is not None and plain not in advice.pareto:
        found.append(["" if plain.fits else "does not fit", *_row(plain, known)])
    return [HEADER, *found]


def _row(outcome: Outcome, known: Known) -> list[str]:
    config, parity = outcome.config, parity_of(outcome.config, known)
    speed = outcome.tokens_per_s
    return [
        outcome.choice.name,
        f"{config.batch_size} x {config.seq_length}",
        _gib(outcome),
        _step(outcome),
        "" if speed is None else f"{speed:,.0f}",
        outcome.choice.training or ("rounded otherwise" if changes_numerics(config) else "the same"),
        "" if parity is None or parity.ratio is None else f"{parity.ratio:.2f}",
        ", ".join(needed(outcome)),
    ]


def _step(outcome: Outcome) -> str:
    """In ms. Of an offloaded step only what it takes at least: how much more is not known."""
    if outcome.seconds is not None:
        return f"{outcome.seconds * 1e3:,.1f}"
    return "not known" if outcome.floor_s is None else f"at least {outcome.floor_s * 1e3:,.1f}"


def needed(outcome: Outcome) -> list[str]:
    """The libraries beside PyTorch and transformers, and memory beside the GPU's."""
    config = outcome.config
    wanted = {
        "liger-kernel": config.kernels,
        "peft": config.lora_rank,
        "deepspeed": config.script == "deepspeed",
    }
    host = [] if outcome.host_bytes is None else [f"{outcome.host_bytes / GIB:.0f} GiB of host memory"]
    return [*(name for name, is_needed in wanted.items() if is_needed), *host]


def _gib(outcome: Outcome) -> str:
    return f"{outcome.peak_bytes / GIB:.2f}"
