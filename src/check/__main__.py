"""How exact the gradients of several settings are, on a GPU: a line of JSON for each, with the references in common.

    python -m src.check parity.jsonl batch_size=1,8,32 dtype=bf16,fp16,fp32
    python -m src.check parity.jsonl batch_size=4 --model_name meta-llama/Llama-3.1-8B-Instruct

The strategies are none, no_flce and all, and under fp16 all kernels with FLCE's mean, as the original has it. Other
flags are those of all_gpu_liger_kernel.py. What is in the file already is not measured again.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

from src import program
from src.utils import ExitStatus, UsageError, error_line


def main() -> int:
    """Compare, and write what was found; returns the exit status."""
    return program.guarded(_run, "interrupted; the same command goes on where this one was")


def _run() -> int:
    parser = program.Parser(
        prog="python -m src.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("axes", nargs="*", metavar="NAME=VALUE,VALUE")
    arguments, flags = parser.parse_known_args()
    _compare_all(arguments.file, arguments.axes, flags)
    return ExitStatus.DONE


def _compare_all(file: Path, axes: list[str], flags: list[str]) -> None:
    import torch

    from src import machine
    from src.check.parity import compare
    from src.cli import command_line
    from src.config import RunConfig
    from src.techniques import STRATEGIES, without

    if not torch.cuda.is_available():
        raise UsageError("no GPU here: python all_gpu_liger_kernel.py --parity compares a tiny model on the CPU")
    done = {json.loads(line)["run_name"] for line in file.read_text().splitlines()} if file.exists() else set()
    environment, device = machine.environment(on_gpu=True), torch.device("cuda", 0)
    pairs = [axis.partition("=") for axis in axes]
    for values in itertools.product(*(value.split(",") for _, _, value in pairs)):
        words = [f"--{name}={value}" for (name, _, _), value in zip(pairs, values)]
        config = command_line(None, RunConfig(), {}, [*words, *flags]).config
        off = without(config)
        variants = [dataclasses.replace(config, **off | STRATEGIES[word]) for word in ("none", "no_flce")]
        variants += [config, *([dataclasses.replace(config, flce_reduction="mean")] if config.dtype == "fp16" else [])]
        variants = [variant for variant in dict.fromkeys(variants) if variant.run_name not in done]
        try:
            for variant, parity in compare(variants, device) if variants else ():
                told = {"run_name": variant.run_name, "config": variant.to_dict(), "parity": parity.model_dump()}
                with file.open("a") as lines:
                    lines.write(json.dumps(told | {"environment": environment}) + "\n")
                ratio = "" if parity.ratio is None else f"{parity.ratio:.2f} times Hugging Face's error"
                print(f"{variant.run_name}: {ratio}, {'agrees' if parity.agrees else 'WRONG'}", flush=True)
                torch.cuda.empty_cache()
        except torch.OutOfMemoryError:
            error_line(f"{' '.join(words)}: out of GPU memory, not compared")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    program.begin()
    sys.exit(main())
