"""The edges of a program: Ctrl-C, and a standard output that cannot be written.

Imports next to nothing: what a program imports first is there at once, and Ctrl-C is one line from then on.
"""

import os
import sys
from collections.abc import Callable

INTERRUPTED = 130
CLOSED_PIPE = 141  # what a shell shows of a program that a closed pipe has ended


def one_line_for_interrupts() -> None:
    """From now on, Ctrl-C that nothing catches is one line: for a program that has yet to import what takes long."""

    def told(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    sys.excepthook = told


def guarded(main: Callable[[], int]) -> int:
    """The exit status of `main`. Ctrl-C and a full disk at standard output are one line, a closed pipe is silent.

    A reader such as `head` closes the pipe when it has enough: nothing is wrong.
    """
    try:
        if sys.stdout is None:
            print("error: there is no standard output to write to", file=sys.stderr)
            return 1
        sys.stdout.reconfigure(errors="backslashreplace")  # texts may have letters that the terminal does not
        try:
            status = main()
        except SystemExit as ending:  # argparse's, after --help or a mistake
            status = ending.code
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_the_rest()
        return CLOSED_PIPE
    except OSError as error:
        print(f"error: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        _discard_the_rest()
        return 1


def _discard_the_rest() -> None:
    """Python writes what is left as it ends: where it goes, nothing can fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
