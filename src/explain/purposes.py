"""What each block is for: by our own labels and notes where there are any, else by its stack and its life time."""

import re
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np

from src.explain.categories import ACTIVATIONS, BEFORE, CATEGORIES, GATHER, LOSS_MODULE, OWNER, PEAK, PHASE, REDUCE
from src.explain.lifetimes import by_life_times
from src.explain.replay import Annotation, Device, Recorded
from src.explain.stacks import printable

# Part of a module's path -> category; the first that fits.
_BY_MODULE = (
    ("rotary_emb", "inputs"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
    ("norm", "norm"),
    ("embed_tokens", "hidden_states"),
    ("layers", "hidden_states"),
    ("model", "inputs"),
)


def sort_out(columns: Recorded, device: Device, patterns: Mapping[str, str]) -> dict[str, Any]:
    """The category and phase of every block and the phases of the step, as `Timeline` takes them."""
    names = list(dict.fromkeys([*CATEGORIES, ACTIVATIONS, BEFORE, *patterns]))
    codes = {name: code for code, name in enumerate(names)}
    notes = _Notes(columns.annotations, device)
    # Labels of another program have no bar; ours have one wherever a module of the model runs.
    if any("|" in label for label in columns.labels):
        phase_names, phase = _phases_of(device, notes.phases)
        category = _by_labels(columns.labels, device, phase_names, phase, codes)
        phases = notes.phases
    else:
        phase_names, phase, category, phases = by_life_times(columns, device, codes)
    for block, owner in notes.owners.items():
        category[block] = codes[owner]
    _by_patterns(columns, device, patterns, codes, category)
    return {
        "names": names,
        "category": category,
        "phase": phase,
        "phase_names": phase_names,
        "phases": phases,
        "measured_peak": notes.peak,
    }


class _Notes:
    """What our notes say; another program may name its ranges as it likes."""

    def __init__(self, annotations: list[Annotation], device: Device) -> None:
        self.phases: list[tuple[int, str]] = []
        self.peak: int | None = None
        self.owners: dict[int, str] = {}  # block -> category
        owners: list[tuple[str, int, int]] = []
        for note in annotations:
            kind, *rest = note.name.split(" ")
            if note.stage != "START":
                continue
            if kind == PHASE and len(rest) == 1:
                self.phases.append((int(np.searchsorted(device.times, note.time)), printable(rest[0])))
            elif kind == OWNER and len(rest) == 2 and rest[0] in CATEGORIES and _is_number(rest[1]):
                owners.append((rest[0], int(rest[1]), note.time))
            elif kind == PEAK and len(rest) == 1 and _is_number(rest[0]):
                self.peak = int(rest[0])
        self.phases.sort(key=lambda start: start[0])
        if owners:
            self._find_blocks(owners, device)

    def _find_blocks(self, owners: list[tuple[str, int, int]], device: Device) -> None:
        """A note belongs to the last block at its address that was allocated by then."""
        wanted = np.isin(device.address, np.array([address for _, address, _ in owners]).astype(np.int64))
        at: dict[int, list[tuple[int, int]]] = {}
        for block in np.flatnonzero(wanted).tolist():  # in the order of their allocation
            began = int(device.times[device.start[block]]) if device.start[block] >= 0 else -(2**63)
            at.setdefault(int(device.address[block]), []).append((began, block))
        for category, address, time in owners:
            lives = at.get(address, [])
            found = bisect_left(lives, (time + 1, -1)) - 1
            if found >= 0:
                self.owners[lives[found][1]] = category


def _is_number(text: str) -> bool:
    """Whether `text` is a number that an address or a size can be."""
    return text.isascii() and text.isdigit() and len(text) < 19


def _phases_of(device: Device, phases: list[tuple[int, str]]) -> tuple[list[str], np.ndarray]:
    """Names, and for each block the index of the phase in which it was allocated: "" before the first."""
    names = ["", *dict.fromkeys(name for _, name in phases)]
    of_starts = np.array([0, *(names.index(name) for _, name in phases)])
    place = np.searchsorted([start for start, _ in phases], device.start, side="right")
    return names, np.where(device.start >= 0, of_starts[place], 0)


def _by_labels(
    labels: list[str], device: Device, phase_names: list[str], phase: np.ndarray, codes: dict[str, int]
) -> np.ndarray:
    """The category of each block by who asked for it, as src/explain/recording.py labels it."""
    table = [[codes[_by_label(label, phase)] for phase in phase_names] for label in labels]
    category = np.array(table)[device.label, phase]
    category[device.start < 0] = codes["unattributed"]
    return category


def _by_label(label: str, phase: str) -> str:
    if phase == "optimizer":
        return "optimizer_temporaries"
    module = label.partition("|")[0]
    if module in (GATHER, REDUCE):
        return {GATHER: "gathered_parameters", REDUCE: "gradient_reduction"}[module]
    parts = module.split(".")
    if parts[0] == LOSS_MODULE or parts[-1] == "lm_head":
        return "logits_and_loss"
    # A tied embedding's second gradient, before it is added to the LM head's, and its partial sums.
    if parts[-1] == "embed_tokens" and phase == "backward":
        return "gradients"
    for part, category in _BY_MODULE:
        if any(part in name for name in parts):
            return category
    return "unattributed"


def _by_patterns(
    columns: Recorded, device: Device, patterns: Mapping[str, str], codes: dict[str, int], category: np.ndarray
) -> None:
    """Let the user's own patterns decide; of several that fit, the first."""
    for name, pattern in reversed(patterns.items()):
        fits = re.compile(pattern).search
        stacks = np.array([any(fits(f"{f[0]} {f[1]}:{f[2]}") for f in stack) for stack in columns.stacks], bool)
        labels = np.array([bool(fits(label)) for label in columns.labels], bool)
        category[stacks[device.stack] | labels[device.label]] = codes[name]
