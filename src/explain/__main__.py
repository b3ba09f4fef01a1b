"""What a memory snapshot shows: who took the GPU's memory, what for, and when.

    python -m src.explain snapshot.pickle                      # the peak, or why memory ran out
    python -m src.explain BEFORE.pickle AFTER.pickle           # what the change cost or saved, by category and by frame
    python -m src.explain snapshot.pickle --html page.html     # to look around in: one page that needs no network
    python -m src.explain snapshot.pickle --category "kv_cache=cache_utils\\.py"

Reads what torch.cuda.memory._dump_snapshot() of any PyTorch program wrote, gzipped or not. Nothing in it is executed.
Snapshots of this project say what each block is for; in those of others it follows from the stacks, from PyTorch's own
marks, and from how long a block lives.
"""

import argparse
import sys
from pathlib import Path

from src import program
from src.utils import UsageError

# Other imports stand in functions: --help and mistakes are answered at once.


def _run() -> int:
    arguments = _parse()
    if sys.stdout is None:
        raise UsageError("there is no standard output to write to")
    from src.explain import outputs

    patterns = outputs.patterns(arguments.category)
    files = [file for file in (arguments.file, arguments.second) if file is not None]
    outputs.check(arguments.plot, arguments.html, files)
    from src.explain.reading import read_all
    from src.explain.report import frames_table, gpus_table, report, waterfall_table

    found = [read_all(file, patterns) for file in files]
    fullest = [timelines[0] for timelines in found]
    for label, file, timelines in zip("AB", files, found):
        print(f"{f'{label}: ' if len(files) > 1 else ''}{file}")
        if len(timelines) > 1:
            print(gpus_table(timelines), f"\nGPU {timelines[0].device.number}:", sep="\n")
        print(report(timelines[0], arguments.top), "", sep="\n")
    if len(files) > 1:
        print(waterfall_table(*(timeline.breakdown() for timeline in fullest)))
        print("", frames_table(*fullest, arguments.top), sep="\n")
    outputs.write(arguments.plot, arguments.html, files, found)
    return 0


def main() -> int:
    """Read one snapshot or compare two; returns the exit status."""
    return program.guarded(_run)


def _parse() -> argparse.Namespace:
    parser = program.Parser(
        prog="python -m src.explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a snapshot, or the one from before a change")
    parser.add_argument("second", type=Path, nargs="?", metavar="FILE2", help="the one from after it")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the timelines and what the peaks are made of")
    parser.add_argument("--html", type=Path, metavar="HTML", help="write a page with timeline, blocks and search")
    help_text = "a category of your own: blocks whose stack (FUNCTION FILE:LINE) or label matches; can be repeated"
    parser.add_argument("--category", action="append", default=[], metavar="NAME=REGEX", help=help_text)
    parser.add_argument("--top", type=int, default=12, help="groups of blocks to list (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.top < 0:
        parser.error("--top must not be negative")
    return arguments


if __name__ == "__main__":
    program.begin()
    sys.exit(main())
