"""The edges of a program: Ctrl-C, and a standard output that cannot be written.

Imports nothing but `sys`, and programs import the rest in functions: so Ctrl-C is one line from the first moment.
"""

import sys
from collections.abc import Callable

CLOSED_PIPE = 141  # what a shell shows of a program that a closed pipe has ended


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
        return 130
    except BrokenPipeError:
        _discard_the_rest()
        return CLOSED_PIPE
    except OSError as error:
        print(f"error: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        _discard_the_rest()
        return 1


def _discard_the_rest() -> None:
    """Python writes what is left as it ends: where it goes, nothing can fail."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
