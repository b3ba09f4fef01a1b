"""A question of the page, answered in a process of its own: whatever ends it, the page goes on.

The server has threads, and a process with threads is not to be forked: the processes come from a fork server, which
has imported everything.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from src.advise.answer import answer
from src.advise.levers import LEVERS, Choice, Lever, liger
from src.advise.outcomes import Outcome, outcome_and_timeline
from src.advise.ranking import Advice, shipped_parities
from src.advise.request import Request, request
from src.advise.search import kernels_of
from src.explain.timeline import Timeline
from src.utils import UsageError, first_line

LONGEST_S = 300  # of an answer
LIGER = "Liger kernels"  # of them those that the model can have
FOLDER = "your-model"  # what the folder of a config.json that was dropped in is called
_PROCESSES = multiprocessing.get_context("forkserver")
_BY_NAME: dict[str, Lever] = {lever.name: lever for lever in LEVERS}
NAMES = [LIGER, *_BY_NAME]


@dataclass(frozen=True)
class Chosen:
    """What the dry run of the techniques that a visitor chose shows."""

    request: Request
    outcome: Outcome
    timeline: Timeline


@dataclass(frozen=True)
class Refused:
    """Why there is no answer, in one line."""

    reason: str


# How far it is, then what was chosen, then the advice; or at any moment a refusal, which is the last.
Message = str | Chosen | Advice | Refused


def prepare() -> None:
    """Let processes begin with everything imported."""
    _PROCESSES.set_forkserver_preload(["all_gpu_liger_kernel", __name__])


def answers(question: Mapping[str, Any], techniques: Sequence[str], config_file: str | None) -> Iterator[Message]:
    """What there is to say, as it is found out. `question` is that of `request`; a config.json replaces its model."""
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        if config_file is not None:
            own = Path(folder, FOLDER)
            own.mkdir()
            shutil.copyfile(config_file, own / "config.json")
            question = {**question, "model_name": str(own)}
        process = _PROCESSES.Process(target=_work, args=(theirs, question, techniques))
        process.start()
        theirs.close()
        try:
            yield from _heard(ours)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it forked
            process.kill()
            process.join()
            ours.close()


def _heard(connection: Connection) -> Iterator[Message]:
    deadline = time.monotonic() + LONGEST_S
    try:
        while connection.poll(max(deadline - time.monotonic(), 0)):
            message = connection.recv()
            yield message
            if isinstance(message, Advice | Refused):
                return
        yield Refused(f"it took longer than {LONGEST_S} s and was ended")
    except EOFError:
        yield Refused("the process of the dry runs was killed: perhaps the machine has too little memory")


def _work(connection: Connection, question: Mapping[str, Any], techniques: Sequence[str]) -> None:
    with contextlib.suppress(PermissionError):
        os.setsid()
    try:
        asked = request(**question)
        connection.send("dry run of what you chose")
        connection.send(_chosen(asked, techniques))
        connection.send(answer(asked, shipped_parities(), tell=connection.send))
    except UsageError as error:
        own = question["model_name"]
        connection.send(Refused(str(error).replace(own, FOLDER) if os.path.isdir(own) else str(error)))
    except Exception as error:  # told to the visitor in a line, and in full to whoever runs the page
        traceback.print_exc()
        connection.send(Refused(f"{type(error).__name__}: {first_line(error)}"))


def _chosen(asked: Request, names: Sequence[str]) -> Chosen:
    chosen = Choice(tuple(liger(kernels_of(asked)) if name == LIGER else _BY_NAME[name] for name in names))
    config = asked.with_settings(**chosen.values)
    return Chosen(asked, *outcome_and_timeline((chosen, config), asked))
