"""From the command line to an exit status. Imports no torch: `--help` and usage errors come at once."""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from src import families, machine, overrides, program, techniques
from src.config import RunConfig
from src.offload import ranks
from src.offload_config import CPU_DEFAULTS, OffloadConfig
from src.techniques import KERNEL_NAMES, TECHNIQUES
from src.utils import ExitStatus, UsageError


class Command(NamedTuple):
    """What a command line asks for."""

    config: RunConfig  # what runs here; its device is "cuda" or "cpu"
    planned: RunConfig  # what the same line would run on a GPU


def command_line(
    description: str | None, defaults: RunConfig, cpu_defaults: Mapping[str, Any], words: Sequence[str] | None = None
) -> Command:
    """Parse the command line, or `words`. Bad arguments end the program with status 2.

    `cpu_defaults` stand in for `defaults` where the run will be on a CPU. There, Triton is told to interpret kernels:
    it chooses while it is imported, so call this before anything imports it.
    """
    if words is None:
        program.begin(ranks.tell)  # one line for the whole job
    try:
        command = parsed(description, defaults, cpu_defaults, words)
        if find_spec("torch") is None:
            raise UsageError(f"{sys.executable} has no PyTorch: activate your environment, see README.md")
        return command
    except UsageError as error:
        sys.exit(_refused(error))


def parsed(
    description: str | None, defaults: RunConfig, cpu_defaults: Mapping[str, Any], words: Sequence[str] | None
) -> Command:
    """The same, for those who go on after bad arguments. Raises `UsageError`."""
    given = vars(make_parser(description, defaults).parse_args(words))
    given.pop("local_rank", None)  # launchers pass it on; the environment says the same
    ranks.check_environment(defaults.script)
    if "ds_override" in given:
        given["ds_override"] = overrides.normalised(given["ds_override"])
    preset = defaults.presets[given.get("preset", defaults.preset)]
    planned = _complete(dataclasses.replace(defaults, **preset | given | {"device": "cuda"}), given)
    device = "cuda" if _plans(planned, given) else given.get("device", defaults.device)
    if device == "auto":
        device = "cuda" if machine.has_gpu() else "cpu"
    config = planned
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        own = preset | dict(cpu_defaults) | given | {"device": "cpu"}
        config = _complete(dataclasses.replace(defaults, **own), given)
        if refusal := config.refusal_on_cpu():
            raise UsageError(refusal)
    return Command(config, planned)


def _complete(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """With the values that follow from others. Raises `UsageError` if what is turned on cannot be."""
    complete = dataclasses.replace(config, **techniques.chosen(config, given))
    techniques.check(complete)
    families.check_name(complete.model_name, pretrained=complete.pretrained)
    return complete


def _plans(config: RunConfig, given: Mapping[str, Any]) -> bool:
    """Whether a dry run or a search is asked for: they plan for a GPU, whether there is one or not."""
    if config.gpu_memory_gib is not None and not config.plans:
        raise UsageError("--gpu_memory_gib is for --dry_run and searches; --memory_limit_gib caps a measured run")
    if config.gpu_rates is not None and not config.plans:
        raise UsageError("--gpu_rates is for --dry_run and searches: a run shows how fast it is")
    if config.parity and config.plans:
        raise UsageError("--parity compares gradients, of which a dry run has none: leave one of the two out")
    if "world_size" in given and not config.plans:
        raise UsageError("--num_gpus is for --dry_run and searches; a run has as many as its launcher starts")
    return config.plans


def make_parser(description: str | None, defaults: RunConfig) -> argparse.ArgumentParser:
    """An argparse parser with an option per field of `defaults`; what is not given has no attribute in its result."""
    parser = program.Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    kernels = parser.add_argument_group("kernels: 1 runs Liger's, 0 Hugging Face's own code")
    for f in dataclasses.fields(defaults):
        if f.name in defaults.without_flag:
            continue
        technique = TECHNIQUES.get(f.name)
        if technique is not None and defaults.script not in technique.scripts and not _redefined(f):
            if technique.not_offloaded:  # `techniques.check` says why
                help = f"not for this script: {technique.not_offloaded}"
                parser.add_argument(f"--{f.name}", choices=technique.choices, help=help)
            continue
        _add_option(kernels if f.name in KERNEL_NAMES else parser, f, getattr(defaults, f.name), defaults)
    if isinstance(defaults, OffloadConfig):
        parser.add_argument(
            "--is_flash_attn",
            dest="attention",
            action="store_const",
            const="flash_attention_2",
            help="the same as --attention flash_attention_2",
        )
        parser.add_argument("--num_gpus", dest="world_size", type=int, help="GPUs of a dry run, from 1 (default: 1)")
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _redefined(f: dataclasses.Field) -> bool:
    """Whether a script has another field of the same name in place of a technique's."""
    return f.metadata["choices"] != TECHNIQUES[f.name].choices


def _add_option(parser: Any, f: dataclasses.Field, default: Any, defaults: RunConfig) -> None:
    technique, flags = TECHNIQUES.get(f.name), [*f.metadata["flags"], f.name]
    if technique is not None and technique.offload_flag and not isinstance(defaults, OffloadConfig):
        flags.remove(technique.offload_flag)
    shown = "" if default is None else f" (default: {int(default) if f.type is bool else default})"
    kwargs: dict[str, Any] = {"dest": f.name, "help": (f.metadata["help"] + shown).replace("%", "%%")}
    if f.type is bool:
        kwargs |= {"type": _flag01, "metavar": "0|1", "nargs": "?", "const": True}
    else:
        kwargs["type"] = next(kind for kind in (int, float, str) if kind in _kinds(f))
    if f.metadata["choices"]:
        kwargs["choices"] = f.metadata["choices"]
    parser.add_argument(*(f"--{flag}" for flag in flags), **kwargs)


def _kinds(f: dataclasses.Field) -> tuple[type, ...]:
    return getattr(f.type, "__args__", (f.type,))


def _flag01(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"expected 0 or 1, got {text!r}")
    return text == "1"


def warn(configs: Sequence[RunConfig]) -> None:
    """Say, a line each, what a user must know of runs before they start."""
    if ranks.is_first_here():
        for line in dict.fromkeys(line for config in configs for line in _warnings(config)):
            print("warning:", line, file=sys.stderr, flush=True)


def _warnings(config: RunConfig) -> list[str]:
    more = overrides.warnings(config) if isinstance(config, OffloadConfig) else []
    return [*techniques.warnings(config), *more]


def run(main: Callable[..., int], command: Command) -> int:
    """The exit status of `main`; an exception becomes one line on stderr, with --debug a traceback too."""
    warn([command.config])
    return program.guarded(lambda: run_config(lambda config: main(config, command.planned), command.config))


def run_config(main: Callable[[RunConfig], int], config: RunConfig) -> int:
    """The same, of a configuration alone."""
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
    """Whether it is a collective that failed, most likely because another rank has ended.

    NCCL's errors have a type of their own; gloo's are plain ones, so the place where they are raised tells.
    """
    import torch

    places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)[-3:]]
    in_collective = any("torch/distributed/" in place or "deepspeed/comm/" in place for place in places)
    return in_collective or isinstance(error, torch.distributed.DistError)


if __name__ == "__main__":  # python -m src.cli ARGUMENTS: whether the offloaded script would take them
    command_line(None, OffloadConfig(), CPU_DEFAULTS)
