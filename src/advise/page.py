"""The page of `python -m src.advise --page`: a question in; what fits, what the peak is made of, what to turn on out.

It runs on a CPU, asks for no login, and neither the server nor the page makes a connection beyond this machine.
`src/advise/space/` has what a Hugging Face Space needs beside the repository, and says how to push it.
"""

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from src.advise import lines, visit
from src.advise.chart import chart
from src.advise.ranking import Advice, shipped_parities
from src.advise.report import HEADER, binding, bindings, head, room, rows, verdict
from src.advise.request import GOALS
from src.advise.visit import Chosen, Refused
from src.architecture import LARGEST_FILE_BYTES
from src.config import DTYPES
from src.explain import plot
from src.families import SHAPES
from src.machine import GPUS

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read as Gradio is imported

import fastapi
import gradio as gr
import uvicorn

HOST = "127.0.0.1"
_FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # Gradio's own come from the network
_INTRODUCTION = """# What should I turn on?
When you train this model on this GPU: does it fit, what is the peak made of, what is faster. All figures are predicted
by dry runs on this machine's CPU; an answer takes half a minute to one, or one to two for the longest sequences or the
largest batch."""
_KEPT = 3600, 3600  # seconds between removals of uploads and pictures, and their age then
_WIDTHS = ["4%", "29%", "11%", "8%", "9%", "10%", "11%", "7%", "11%"]  # of the columns of HEADER


class Shown(NamedTuple):
    """What the page shows of an answer, part by part."""

    status: str = ""
    fits: str = ""
    peak: Figure | None = None
    advice: str = ""
    choices: list[list[str]] | None = None
    chart: Figure | None = None
    command: str = ""
    program: str = ""


def page() -> gr.Blocks:
    """The page, to be served."""
    visit.prepare()
    with gr.Blocks(
        title="What should I turn on?", analytics_enabled=False, fill_width=True, delete_cache=_KEPT
    ) as blocks:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                asked = _questions()
                button = gr.Button("Answer", variant="primary", elem_id="answer")
            with gr.Column(scale=3):
                shown = _places()
        button.click(_updates, asked, shown, api_name="answer", show_progress="hidden", concurrency_limit=1)
    return blocks


def serve() -> None:
    """Open the page on this machine, for this machine alone, until Ctrl-C."""
    app = gr.mount_gradio_app(fastapi.FastAPI(), page(), "/", **look())
    with _loopback() as place:
        url = f"http://{HOST}:{place.getsockname()[1]}/"
        print(f"page     {url} (Ctrl-C ends it)", flush=True)
        if sys.platform == "darwin" or any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY")):
            threading.Timer(2, webbrowser.open, (url,)).start()
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[place])


def look() -> dict[str, Any]:
    """How Gradio serves the page: no fonts and links from elsewhere, no upload larger than a config.json may be."""
    theme = gr.themes.Default(font=_FONTS[0], font_mono=_FONTS[1])
    return {"theme": theme, "footer_links": [], "max_file_size": LARGEST_FILE_BYTES, "ssr_mode": False}


def _loopback() -> socket.socket:
    """Where to listen: Gradio's usual port, or any that is free."""
    try:
        return socket.create_server((HOST, 7860))
    except OSError:
        return socket.create_server((HOST, 0))


def _questions() -> list[gr.components.Component]:
    """The fields, in the order of `answered`'s arguments."""
    gpus = [(gpu.name, gpu.word) for gpu in GPUS.values()]
    goals = [(words, goal) for goal, words in GOALS.items()]
    return [
        gr.Dropdown(list(SHAPES), value=next(iter(SHAPES)), label="Model", elem_id="model"),
        gr.File(label="or its config.json, which then counts", file_types=[".json"], height=140, elem_id="config"),
        gr.Dropdown(gpus, value="h100", label="GPU", elem_id="gpu"),
        gr.Textbox(label="Memory in GiB", placeholder="as usual for this GPU", elem_id="memory"),
        gr.Number(8, label="Sequences a step (batch)", precision=0, elem_id="batch"),
        gr.Number(1024, label="Tokens a sequence", precision=0, elem_id="length"),
        gr.Dropdown(list(DTYPES), value="bf16", label="Weights and states", elem_id="dtype"),
        gr.Radio(goals, value="speed", label="Wanted", elem_id="goal"),
        gr.CheckboxGroup(visit.NAMES, label="What you turn on, to see whether it fits", elem_id="techniques"),
    ]


def _places() -> list[gr.components.Component]:
    """Where an answer is shown, in the order of `Shown`, once it is there. Text as it is: a config.json has no HTML."""
    hidden = {"interactive": False, "visible": False}
    code = {"wrap_lines": True, "show_line_numbers": False}
    return [
        gr.Textbox("Not asked yet.", label="Status", interactive=False, elem_id="status", lines=1, max_lines=4),
        gr.Textbox(label="Does what you chose fit?", elem_id="fits", lines=2, **hidden),
        gr.Plot(show_label=False, format="png", elem_id="peak", visible=False),
        gr.Textbox(label="What to turn on", elem_id="advice", lines=4, **hidden),
        gr.Dataframe(headers=HEADER, label="Choices", wrap=True, column_widths=_WIDTHS, elem_id="choices", **hidden),
        gr.Plot(show_label=False, format="png", elem_id="chart", visible=False),
        gr.Code(label="The first choice: here", language="shell", elem_id="command", **hidden, **code),
        gr.Code(label="The first choice: in your program", language="python", elem_id="program", **hidden, **code),
    ]


def _updates(*asked: Any) -> Iterator[list[dict[str, Any]]]:
    """What `answered` shows, for Gradio: a place without content is hidden."""
    for shown in answered(*asked):
        yield [gr.update(value=value, visible=bool(value)) for value in shown]


def answered(
    model: str | None,
    config_file: str | None,
    gpu: str | None,
    memory_gib: str | None,
    batch_size: int | None,
    seq_length: int | None,
    dtype: str | None,
    goal: str | None,
    techniques: list[str] | None,
) -> Iterator[Shown]:
    """What the page shows, more of it the more is known."""
    question = {"model_name": model, "gpu": gpu, "batch_size": batch_size, "seq_length": seq_length}
    empty = [name for name, value in (question | {"dtype": dtype, "goal": goal}).items() if value is None]
    if empty:
        yield Shown(f"Not possible: {empty[0].replace('_', ' ')} is empty.")
        return
    try:
        question["gpu_memory_gib"] = float(memory_gib) if memory_gib else None
    except ValueError:
        yield Shown(f"Not possible: {memory_gib[:60]!r} is no number of GiB.")
        return
    question |= {"dtype": dtype, "goal": goal}
    shown = Shown("Working …")
    yield shown
    for message in visit.answers(question, techniques or [], config_file):
        if isinstance(message, Refused):
            shown = shown._replace(status=f"Not possible: {message.reason}")
        elif isinstance(message, Chosen):
            shown = shown._replace(fits=_fits(message), peak=_peak(message))
        elif isinstance(message, Advice):
            shown = _with_advice(shown, message)
        else:
            shown = shown._replace(status=f"Working … {message}")
        yield shown


def _fits(chosen: Chosen) -> str:
    outcome = chosen.outcome
    word = "Yes" if outcome.fits else "No"
    return f"{word}: {outcome.choice.name}, of {room(chosen.request)}. Binding: {binding(outcome)}."


def _peak(chosen: Chosen) -> Figure:
    return plot.figure({f"{chosen.outcome.choice.name}, predicted": chosen.timeline})


def _with_advice(shown: Shown, advice: Advice) -> Shown:
    known = shipped_parities()
    told = "\n".join([head(advice.request), bindings(advice), *verdict(advice)])
    if not advice.ranked:
        return shown._replace(status="Done: nothing fits.", advice=told)
    first = advice.ranked[0]
    return shown._replace(
        status="Done.",
        advice=told,
        choices=rows(advice, known)[1:],
        chart=chart(advice),
        command=lines.command(first.config),
        program=lines.python(first.config),
    )
