"""What the command writes: checked before anything is read, so that nothing is lost and nobody waits for a refusal."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.utils import UsageError

if TYPE_CHECKING:
    from src.explain.timeline import Timeline

PAGE_MARK = b"<!DOCTYPE html>\n<!-- written by python -m src.explain -->"
_PNG_MARK = b"\x89PNG\r\n\x1a\n"


def patterns(given: Sequence[str]) -> dict[str, str]:
    """Categories of the user's own, from NAME=REGEX. Raises `UsageError`."""
    found = {}
    for text in given:
        name, equals, pattern = text.partition("=")
        name = "_".join(name.split())
        if not (name and equals and pattern):
            raise UsageError(f"--category: {text!r} is not of the form NAME=REGEX")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--category: {pattern!r} is no regular expression: {error}") from error
        found[name] = f"(?:{found[name]})|(?:{pattern})" if name in found else pattern
    return found


def check(plot: Path | None, html: Path | None, inputs: Sequence[Path]) -> None:
    """Raises `UsageError` if an output would replace an input, or anything but a file of its own kind."""
    for flag, path, mark, kind in (("--plot", plot, _PNG_MARK, "PNG"), ("--html", html, PAGE_MARK, "page of ours")):
        if path is None:
            continue
        try:
            if any(_same(path, other) for other in inputs):
                raise UsageError(f"{flag}: {path} is what is to be read")
            _check_kind(flag, path, mark, kind)
        except OSError as error:
            raise UsageError(f"{flag}: cannot write {path}: {error.strerror}") from error
    if plot is not None and html is not None and os.path.abspath(plot) == os.path.abspath(html):
        raise UsageError("--plot and --html name the same file")


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _check_kind(flag: str, path: Path, mark: bytes, kind: str) -> None:
    if not os.path.lexists(path):
        return
    # Not through a link: the link would be replaced, not what it leads to.
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise UsageError(f"{flag}: {path} is there and is no regular file; name another")
    with path.open("rb") as file:
        if file.read(len(mark)) != mark:
            raise UsageError(f"{flag}: {path} is there and is no {kind}; name another, or remove it")


def write(plot: Path | None, html: Path | None, files: Sequence[Path], found: "Sequence[list[Timeline]]") -> None:
    """Write what was asked for, and say so. Raises `UsageError` if it cannot be written."""
    names = [file.name.split(".")[0] for file in files]
    if len(set(names)) < len(names):
        names = list(map(str, files))
    if plot is not None:
        from src.explain.plot import save_plot

        _written("--plot", plot, lambda: save_plot({n: each[0] for n, each in zip(names, found)}, plot))
    if html is not None:
        from src.explain.page import save_page

        _written("--html", html, lambda: save_page(list(zip(names, found)), html))


def _written(flag: str, path: Path, save) -> None:
    try:
        save()
    except OSError as error:
        raise UsageError(f"{flag}: cannot write {path}: {error.strerror}") from error
    print(f"\n{flag.removeprefix('--'):<8} {path}")
