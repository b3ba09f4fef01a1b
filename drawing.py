"""Draws the study's figures from records, and lists them in a table.

    python drawing.py                      # the records in results/, or those of the study if there are none
    python drawing.py results doc/data     # records of several folders
    python drawing.py --table markdown     # or csv: a table in place of figures

Writes PNG files into --out: throughput and peak memory by batch size (comparison_2_strategies.png,
comparison_3_strategies.png) and by sequence length at batch 4 (comparison_fixed_batch_4_2_strategies.png,
comparison_fixed_batch_4_3_strategies.png), latency.png, and predicted_vs_measured.png where predictions are among the
records; those four also into the current folder. Runs of other settings or machines are drawn by themselves; those that
have most of the original's grids have the names above, ZeRO-3 offload first, the others add settings and machine to
them. Runs that are no grid are drawn as what their peaks are made of (peaks.png), kernels checked without a GPU as
kernel_check.png. The names of pictures of predictions begin with predicted_. Where three settings or more were run at
one size, pareto_*.png has memory against speed of each, and a line through those that no other beats.

Exit status 1: a file that is no record was skipped; 2: there is nothing to draw.
"""

from src import program

if __name__ == "__main__":  # before the other imports: Ctrl-C while they are read is one line
    program.begin()

import argparse
import functools
import io
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from src.record import Record, load_and_tell
from src.utils import ExitStatus, UsageError, write_atomically

RESULTS = "results"
STUDY = Path(__file__).resolve().parent / "doc" / "data" / "study"
# These also go where the original wrote them.
ORIGINALS = (
    "comparison_2_strategies.png",
    "comparison_3_strategies.png",
    "comparison_fixed_batch_4_2_strategies.png",
    "comparison_fixed_batch_4_3_strategies.png",
)


def _parsed() -> argparse.Namespace:
    parser = program.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="where figures go (default: %(default)s)")
    parser.add_argument("--table", choices=("markdown", "csv"), help="print a table and draw nothing")
    return parser.parse_args()


def load(folders: list[Path]) -> tuple[list[Record], bool, bool]:
    """The records in `folders`, whether all files there are records, and whether they are the study's.

    If no folder is named, they are the user's own, or else the study's, as stderr then says. Raises `UsageError`.
    """
    searched = folders or [Path(RESULTS)]
    found, is_whole = load_and_tell(searched)
    if found:
        return found, is_whole, False
    if folders or not is_whole:
        raise UsageError(f"no records below {', '.join(map(str, searched))}")
    study = os.path.relpath(STUDY)
    print(f"No records in {RESULTS}/: some of the study's own instead; name {study} for all.", file=sys.stderr)
    return *load_and_tell([STUDY]), True


def draw(found: Sequence[Record], out: Path, most: int | None) -> None:
    """Write the figures of at most so many studies of a kind, and name them. Raises `UsageError` if there are none."""
    from src.study import answers, figures

    is_empty = True
    for name, figure in figures.all_figures(found, most):
        is_empty, picture = False, io.BytesIO()
        figure.savefig(picture, dpi=150, format="png")
        content = picture.getvalue()
        for path in dict.fromkeys([out / name, Path(name) if name in ORIGINALS else out / name]):
            write_atomically(path, functools.partial(Path.write_bytes, data=content))
            print(path)
    if is_empty:
        kinds = Counter(r.mode if r.status == "ok" else answers.absence(r) for r in found)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise UsageError(f"nothing to draw: no peak and no kernel check in {told}; --table markdown lists them")


def run() -> int:
    """Draw or list the records; returns the exit status."""
    arguments = _parsed()
    found, is_whole, is_study = load(arguments.folder)
    if arguments.table:
        from src.study import tables

        print(tables.FORMATS[arguments.table](tables.runs_table(found)))
    else:
        draw(found, arguments.out, 1 if is_study else None)
    return ExitStatus.DONE if is_whole else ExitStatus.FAILED


def main() -> int:
    """The same, whatever becomes of it."""
    return program.guarded(run)


if __name__ == "__main__":
    sys.exit(main())
