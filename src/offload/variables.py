"""Finds environment variables that are meant for run_ds.sh and that it does not know: `... run_ds.sh` exits with 2.

Nobody would notice otherwise: the run goes on with the default, and its record says so only to who looks.
The script's own lines, NAME=${NAME:-default}, are the list of what it knows.
"""

import os
import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path

from src.utils import ExitStatus, error_line


def _words(text: str) -> set[str]:
    return set(text.split())


# In names that others use as well, such as NODE_NAME of batch systems.
_ANYBODYS = _words("NAME NODE MASTER ADDR PORT RANK HOSTFILE NUM")
# What people call the same things, and flags that have no variable.
_ALSO = _words("LEN LR GPU GRAD ACCUM CLIP ITERS ITERATION MICRO GLOBAL NORM RMSNORM WARMUP DTYPE OPTIMIZER")
_ALONE = _words("BATCH DTYPE FLCE GPUS ITERATIONS ITERS LR MODEL OPTIMIZER ROPE STEPS SWIGLU WARMUP")
_ALIKE = 0.9  # NUM_GPU is a slip of the pen, NUM_CPUS (0.88) another variable


def known_variables(script: str) -> list[str]:
    """The variables that the text of a shell script takes from the environment."""
    return re.findall(r"^([A-Z][A-Z0-9_]*)=\$\{\1:-", script, re.MULTILINE)


def is_meant(name: str, known: Iterable[str]) -> bool:
    """Whether whoever set `name` may have thought of a variable of ours."""
    words = {word for other in known for word in other.split("_")} - _ANYBODYS | _ALSO
    parts = name.split("_")
    if name.startswith("ENABLE_") or name in _ALONE:
        return True
    if len(parts) > 1 and all(part in words or part == "NUM" for part in parts):
        return True
    return any(_likeness(name, other) >= _ALIKE for other in known)


def _likeness(name: str, other: str) -> float:
    return SequenceMatcher(None, name, other).ratio()


def closest(name: str, known: Iterable[str]) -> str:
    """The variable of ours that shares most words with `name`, and most letters of those that share as many."""
    words = set(name.split("_"))
    return max(known, key=lambda other: (len(words & set(other.split("_"))), _likeness(name, other)))


def main(script: str) -> int:
    known = known_variables(Path(script).read_text())
    strangers = [name for name in sorted(os.environ) if os.environ[name] and name not in known]
    meant = [f"{name} (did you mean {closest(name, known)}?)" for name in strangers if is_meant(name, known)]
    if not meant:
        return ExitStatus.DONE
    error_line(f"{script} has no variable {', '.join(meant)}; unset it, or give a flag: --help lists them")
    return ExitStatus.BAD_ARGUMENTS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
