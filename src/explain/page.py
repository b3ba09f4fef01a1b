"""One HTML page of a snapshot, or of two: its timeline, the blocks at the peak, and a search in their stacks.

The page needs no network and stays below 10 MB: it has as many points as a screen and the largest groups of blocks.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.explain.categories import colours, words
from src.explain.refusal import headline
from src.explain.report import frames_compared, groups, peak_line, waterfall
from src.explain.stacks import shown
from src.explain.timeline import Timeline
from src.utils import write_atomically

_POINTS = 1200  # of a timeline
_GROUPS = 1500  # of blocks, of all GPUs of a file together
_FRAMES = 60  # of a stack
_LETTERS = 300  # of a name: C++ templates have thousands
_ALL_LETTERS = 4_000_000  # of all frames together; what comes after them is shown without its stack


def save_page(files: Sequence[tuple[str, list[Timeline]]], path: Path) -> None:
    """Write the page of one or two named files, each with the timelines of its GPUs."""
    text = page(files)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def page(files: Sequence[tuple[str, list[Timeline]]]) -> str:
    """The page's HTML. All that comes from a file is in one block of JSON, which the page's script shows as text."""
    import jinja2

    frames = _Table()
    data: dict[str, Any] = {"files": [_file(name, timelines, frames) for name, timelines in files]}
    if len(files) == 2:
        a, b = (timelines[0] for _, timelines in files)
        by_category = [(words(name), *sizes) for name, *sizes in waterfall(a.breakdown(), b.breakdown())]
        by_frame = sorted(frames_compared(a, b), key=lambda row: -abs(row[3]))
        if rest := by_frame[_GROUPS:]:
            sums = (sum(row[i] for row in rest) for i in (1, 2, 3))
            by_frame = [*by_frame[:_GROUPS], (f"{len(rest)} others", *sums)]
        data["changes"] = {"category": by_category, "asked for by": [(_short(row[0]), *row[1:]) for row in by_frame]}
    data["frames"] = frames.texts
    # In a script element only "<" could end it, or begin a comment.
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    title = " and ".join(name for name, _ in files)
    return environment.get_template("page.html.j2").render(title=title, data=script)


class _Table:
    """Texts that many share, each once, as far as the page has room."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}
        self._letters = 0

    def place(self, text: str) -> int:
        if text not in self._places:
            self._letters += len(json.dumps(text))
            if self._letters > _ALL_LETTERS:
                text = "(left out: this page would be too large)"
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]


def _file(name: str, timelines: list[Timeline], frames: _Table) -> dict[str, Any]:
    most = max(_GROUPS // len(timelines), 100)
    return {"name": name, "gpus": [_gpu(timeline, most, frames) for timeline in timelines]}


def _gpu(timeline: Timeline, most: int, frames: _Table) -> dict[str, Any]:
    numbers, parts = timeline.by_category(_POINTS)
    colour_of, found = colours(timeline.names), groups(timeline)
    return {
        "number": timeline.device.number,
        "head": peak_line(timeline),
        "refused": headline(timeline) if timeline.refused else "",
        "peak": timeline.known_peak_bytes,
        "peakEvent": timeline.peak_event,
        "events": timeline.event_count,
        "numbers": numbers.tolist(),
        "parts": [[words(name), colour_of[name], part.tolist()] for name, part in parts.items()],
        "phases": timeline.phases if len(timeline.phases) <= 200 else [],
        "breakdown": [[words(name), colour_of[name], size] for name, size in timeline.breakdown().items() if size],
        "groups": [
            {
                "size": group.size,
                "blocks": group.blocks,
                "for": words(group.category),
                "in": group.phase or "-",
                "by": _short(group.origin),
                "stack": [frames.place(_short(shown(frame))) for frame in group.stack[:_FRAMES]],
            }
            for group in found[:most]
        ],
        "left": max(len(found) - most, 0),
        "leftBytes": sum(group.size for group in found[most:]),
    }


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
