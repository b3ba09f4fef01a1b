"""Runs a grid of experiments with either script; survives whatever becomes of a single one, and goes on where it was.

    python -m src.study study --dry_run                                     # predict the original's grids, no GPU
    python -m src.study study --script deepspeed --preset fast              # measure them
    python -m src.study study --script deepspeed --memory_limit_gib 24      # as on a 24 GB card
    python -m src.study study --script deepspeed --num_gpus 4               # each cell on four GPUs
    python -m src.study peers                                               # all techniques side by side at 8 x 1024
    python -m src.study peers batch_size=1,32 --model_name Qwen/Qwen3-0.6B
    python -m src.study batch_size=1,2,4 seq_length=512 strategy=none,all --dtype fp32
    python -m src.study compare results/A.json results/B.json               # two records side by side

A grid is `batch` (the original's batch sizes at 1024 tokens), `sequence` (its lengths at batch 4), `study` (both),
`peers` (everything that can be turned on; what needs a library that is not here is left out), or axes like
batch_size=1,2,4 over any setting, alone or after a grid; strategies are none, no_flce, all or kernels like rope+flce.
Other flags go to the script as they are. Each cell leaves its record in --result_dir; what has one is not run again,
nor without a memory limit what ran under one and never met it. A cell that crashes, hangs or is killed is recorded as
that, and the sweep goes on. Cells beyond one that ran out of memory with the same settings are not run but recorded as
`inferred`; --every_cell runs them.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from src import machine, program
from src.utils import UsageError


@contextlib.contextmanager
def _interruptible(numbers: Sequence[int]) -> Iterator[None]:
    """Let a request to terminate end the study as Ctrl-C does; one that is ignored, as under nohup, stays so."""
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_gpus(count: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < count:
        raise UsageError(f"--num_gpus {count}, but {found} here")


def _parsed() -> tuple[argparse.Namespace, list[str]]:
    parser = program.Parser(
        prog="python -m src.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("grid", nargs="+", help="batch, sequence, study, peers, or axes like batch_size=1,2,4")
    scripts = ("all_gpu", "deepspeed")
    parser.add_argument("--script", choices=scripts, default="all_gpu", help="which experiment (default: %(default)s)")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of a cell under --script deepspeed")
    parser.add_argument("--every_cell", action="store_true", help="run cells that cannot fit, too")
    parser.add_argument("--timeout_s", type=float, default=900, help="the longest a cell may take")
    arguments, flags = parser.parse_known_args()
    if arguments.num_gpus < 1 or (arguments.num_gpus > 1 and arguments.script != "deepspeed"):
        parser.error("--num_gpus must be 1 or more, and 1 without --script deepspeed")
    if not 0 < arguments.timeout_s < float("inf"):
        parser.error(f"--timeout_s must be a number of seconds greater than 0, got {arguments.timeout_s:g}")
    return arguments, flags


def _device(flags: list[str]) -> str | None:
    """The --device among the script's flags, None if none is named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    return parser.parse_known_args(flags)[0].device


def _sweep(arguments: argparse.Namespace, flags: list[str]) -> int:
    # Imported here, so that --help and mistakes need not wait for PyTorch. Triton reads a variable as it is imported.
    from src.study import grids

    axes = grids.grid_axes(arguments.grid)
    tolerant = arguments.grid[0] == grids.TOLERANT
    grids.check(axes, arguments.script, flags, tolerant=tolerant)
    device = _device(flags)
    runs_here = device is None and "--dry_run" not in {flag.partition("=")[0] for flag in flags}
    if runs_here and not machine.has_gpu():
        raise UsageError("no GPU here: --dry_run predicts the grid, --device cpu runs tiny models")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # look for a GPU without initialising CUDA
    from tqdm import tqdm

    from src.cli import warn
    from src.study.sweep import Sweep

    tqdm.monitor_interval = 0  # no thread beside a process that forks
    if runs_here:
        _require_gpus(arguments.num_gpus)
    # Snapshots and logs of a whole grid are asked for, not usual.
    flags = ["--snapshot_dir=", "--log_dir=", *flags]
    found, left_out = grids.tasks(axes, grids.script(arguments.script), flags, arguments.num_gpus, tolerant=tolerant)
    for reason in left_out:
        print(f"left out: {reason}")
    if arguments.script == "deepspeed" and any(task.config.parity for task in found):
        raise UsageError("--parity: a study keeps one engine for its sizes; bash run_ds.sh --parity 1 measures it")
    warn([task.config for task in found])
    return Sweep(found, timeout_s=arguments.timeout_s, every_cell=arguments.every_cell).run()


def _run() -> int:
    arguments, flags = _parsed()
    with _interruptible((signal.SIGTERM, signal.SIGHUP)):
        return _sweep(arguments, flags)


def main() -> int:
    """Run the grid on the command line, or compare two records; returns the exit status."""
    if sys.argv[1:2] == ["compare"]:
        from src.study import compare

        return program.guarded(lambda: compare.main(sys.argv[2:]))
    return program.guarded(_run, "interrupted; the same command goes on where this one was")


if __name__ == "__main__":
    program.begin()
    sys.exit(main())
