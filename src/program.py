"""What every command does alike: tell a mistake, an interruption, or an output that cannot be written, in one line."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from src.utils import ExitStatus, UsageError, error_line

# transformers imports torchao where it is installed, which then warns of kernels for other GPUs and of its own code.
_TALKATIVE = ("torchao", "torch.utils._pytree")


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` for a mistake; the usage that argparse would print before it is longer than a screen."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help says more)")


class _Interrupted:
    """Ends the program at once: an exception would end in some library's hands."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def __call__(self, *_signal: object) -> NoReturn:
        self._tell("interrupted")
        os._exit(ExitStatus.INTERRUPTED)


def begin(tell: Callable[[str], None] = error_line) -> None:
    """To be called first: while libraries are imported, Ctrl-C ends the program with one line, by `tell`.

    A locale's alphabet may lack characters of ours or of a folder's name: they are printed as escapes.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as it is under nohup
        signal.signal(signal.SIGINT, _Interrupted(tell))


def guarded(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit status of `main`, and of writing what it has printed."""
    if isinstance(signal.getsignal(signal.SIGINT), _Interrupted):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UsageError as error:
        error_line(error)
        return ExitStatus.BAD_ARGUMENTS
    except KeyboardInterrupt:
        error_line(interrupted)
        return ExitStatus.INTERRUPTED
    except OSError as error:
        error_line(f"cannot write: {error}")
        _drop_output()
        return ExitStatus.FAILED


def _drop_output() -> None:
    """Let Python not try once more, as it ends, to write what could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
