"""Draws the study's figures from records, and lists them in a table.

    python drawing.py                      # the records in results/, or those of the study if there are none
    python drawing.py results doc/data     # records of several folders
    python drawing.py --table markdown     # or csv: a table in place of figures

Writes PNG files into the current folder: throughput and peak memory by batch size (comparison_2_strategies.png,
comparison_3_strategies.png) and by sequence length at batch 4 (comparison_fixed_batch_4_2_strategies.png,
comparison_fixed_batch_4_3_strategies.png), latency.png, and predicted_vs_measured.png where predictions are among the
records. Runs of other settings or machines are drawn by themselves; those that have most of the original's grids have
the names above, ZeRO-3 offload first, the others add settings and machine to them.
"""

import argparse
import sys
from pathlib import Path
from typing import TextIO

from src.record import Record, load_all
from src.study import figures, tables
from src.utils import ExitStatus, UsageError, error_line

STUDY = Path(__file__).parent / "doc" / "data" / "study"


def load(folders: list[Path], notes: TextIO) -> list[Record]:
    """The records in `folders`; if none are named, the user's own, or else the study's, as `notes` then says."""
    searched = folders or [Path("results")]
    found = load_all(searched)
    if not found and not folders:
        print("No records in results/: these are the study's own.", file=notes)
        found = load_all([STUDY])
    if not found:
        raise UsageError(f"no records below {', '.join(map(str, searched))}")
    return found


def main() -> int:
    """Draw or list the records; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*")
    parser.add_argument("--table", choices=tables.FORMATS, help="print a table and draw nothing")
    arguments = parser.parse_args()
    try:
        found = load(arguments.folder, sys.stderr if arguments.table else sys.stdout)
        if arguments.table:
            print(tables.FORMATS[arguments.table](tables.runs_table(found)))
            return ExitStatus.DONE
        named = list(figures.all_figures(found))
        for name, figure in named:
            figure.savefig(name, dpi=150)
            print(name)
        if not named:
            print("Nothing to draw: figures compare two strategies at two sizes. --table markdown lists the records.")
    except UsageError as error:
        error_line(error)
        return ExitStatus.BAD_ARGUMENTS
    except OSError as error:
        error_line(error)
        return ExitStatus.FAILED
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
