"""From the command line to an exit status."""

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from src import interpreter
from src.config import PRESETS, OffloadConfig, RunConfig, make_parser, to_config
from src.offload import ranks
from src.runtime import resolve_device
from src.utils import ExitStatus, UsageError


def parse_config(
    description: str | None,
    defaults: RunConfig,
    *,
    cpu_defaults: Mapping[str, Any],
    words: Sequence[str] | None = None,
) -> RunConfig:
    """The command line as a configuration, of the type of `defaults`, whose device is 'cuda' or 'cpu'.

    `words` stand for the command line. `cpu_defaults` replace `defaults` where the run will be on a CPU. Bad arguments
    end the program with status 2.
    """
    parser = make_parser(description, defaults)
    if isinstance(defaults, OffloadConfig):
        _add_original_flags(parser)
    arguments = parser.parse_args(words)
    try:
        plans = _plans(arguments)
        device = "cuda" if plans else resolve_device(arguments.device)
        # What a preset or a CPU changes are defaults: flags come before them.
        if isinstance(defaults, OffloadConfig):
            parser.set_defaults(**PRESETS[arguments.preset])
        if device == "cpu":
            interpreter.restart_interpreted()
            parser.set_defaults(**cpu_defaults)
        arguments = parser.parse_args(words)
        return dataclasses.replace(to_config(arguments, type(defaults)), device=device)
    except UsageError as error:
        sys.exit(_refused(error))


def _plans(arguments: argparse.Namespace) -> bool:
    """Whether a dry run or a search is asked for: they plan for a GPU, whether there is one or not."""
    plans = bool(getattr(arguments, "dry_run", False) or getattr(arguments, "find_max", None))
    if getattr(arguments, "gpu_memory_gib", None) is not None and not plans:
        raise UsageError("--gpu_memory_gib is for --dry_run and --find_max; --memory_limit_gib caps a measured run")
    return plans


def _add_original_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the original that set another field, or that launchers add."""
    parser.add_argument(
        "--is_flash_attn",
        dest="attention",
        action="store_const",
        const="flash_attention_2",
        default=argparse.SUPPRESS,
        help="the same as --attention flash_attention_2",
    )
    # Launchers pass it on; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(main: Callable[[RunConfig], int], config: RunConfig) -> int:
    """The exit status of `main(config)`; an exception becomes one line on stderr, with --debug a traceback too."""
    try:
        return main(config)
    except KeyboardInterrupt:
        ranks.tell("interrupted")
        return ExitStatus.INTERRUPTED
    except (Exception, SystemExit) as error:  # whoever leaves in the middle has not done what was asked
        if config.debug:
            traceback.print_exc()
        if isinstance(error, UsageError):
            return _refused(error)
        if _comes_from_another_rank(error):
            ranks.give_way(waited=error)
        hint = "" if config.debug else " (--debug shows where)"
        ranks.tell(f"{ranks.name()}{type(error).__name__}: {error}{hint}")
        return ExitStatus.FAILED


def _refused(error: UsageError) -> int:
    """The exit status of a run that cannot be, for a reason that other ranks find as well."""
    if not ranks.is_first_here():
        ranks.give_way()
    ranks.tell(error)
    return ExitStatus.BAD_ARGUMENTS


def _comes_from_another_rank(error: BaseException) -> bool:
    """Whether it is a collective that failed, most likely because another rank has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
