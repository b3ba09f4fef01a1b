"""From the command line to an exit status."""

import dataclasses
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from src import interpreter
from src.config import RunConfig, UsageError, make_parser, to_config
from src.runtime import resolve_device
from src.utils import ExitStatus, error_line


def parse_config(description: str | None, defaults: RunConfig, *, cpu_defaults: Mapping[str, Any]) -> RunConfig:
    """The command line as a `RunConfig` whose device is 'cuda' or 'cpu'.

    `cpu_defaults` replace `defaults` where the run will be on a CPU. Bad arguments end the program with status 2.
    """
    parser = make_parser(description, defaults)
    arguments = parser.parse_args()
    try:
        # A dry run and a search plan for a GPU, whether there is one or not.
        plans = arguments.dry_run or arguments.find_max
        if arguments.gpu_memory_gib is not None and not plans:
            raise UsageError("--gpu_memory_gib is for --dry_run and --find_max; --memory_limit_gib caps a measured run")
        device = "cuda" if plans else resolve_device(arguments.device)
        if device == "cpu":
            interpreter.restart_interpreted()
            parser.set_defaults(**cpu_defaults)
            arguments = parser.parse_args()
        return dataclasses.replace(to_config(arguments), device=device)
    except UsageError as error:
        error_line(error)
        sys.exit(ExitStatus.BAD_ARGUMENTS)


def run(main: Callable[[RunConfig], int], config: RunConfig) -> int:
    """The exit status of `main(config)`; an exception becomes one line on stderr, with --debug a traceback too."""
    try:
        return main(config)
    except KeyboardInterrupt:
        error_line("interrupted")
        return ExitStatus.INTERRUPTED
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if isinstance(error, UsageError):
            error_line(error)
            return ExitStatus.BAD_ARGUMENTS
        hint = "" if config.debug else " (--debug shows where)"
        error_line(f"{type(error).__name__}: {error}{hint}")
        return ExitStatus.FAILED
