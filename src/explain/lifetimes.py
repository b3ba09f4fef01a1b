"""What the blocks of another program are for: what their stacks say, and where and for how long they live.

A block made in the backward pass that is alive when the optimizer steps is a gradient. One made in a step that
outlives it is optimizer state. What is there before the trace and through all of it, in a program that trains, is
weights, as far as there are gradients of the same size, and then optimizer state.
"""

import re
from collections import Counter

import numpy as np

from src.explain.categories import ACTIVATIONS, BEFORE
from src.explain.replay import Annotation, Device, Recorded
from src.explain.stacks import BACKWARD, FORWARD, OPTIMIZER, by_siblings, told

_NAMES = ["", FORWARD, BACKWARD, OPTIMIZER]
_FORWARD, _BACKWARD, _OPTIMIZER = 1, 2, 3
_MARK = re.compile(r"(forward|backward|optimizer)", re.IGNORECASE)
# Where the stack says this, the life time of a block adds nothing.
_CERTAIN = ("parameters", "gathered_parameters", "gradient_reduction", "library_workspace")
_CUBLAS_WORKSPACE = (4096 * 2 + 16 * 8) * 1024  # aten/src/ATen/cuda/CublasHandlePool.cpp; no tensor has this size
_STATES = 4  # tensors of a weight's size that an optimizer may keep: two moments, a maximum, an fp32 copy


def by_life_times(
    columns: Recorded, device: Device, codes: dict[str, int]
) -> tuple[list[str], np.ndarray, np.ndarray, list[tuple[int, str]]]:
    """Names of phases, the phase and the category of each block as numbers, and the phases of the history."""
    return _Sorter(columns, device, codes).result()


class _Sorter:
    def __init__(self, columns: Recorded, device: Device, codes: dict[str, int]) -> None:
        self._device, self._codes = device, codes
        self._count = len(device.times)
        self._made = device.start >= 0
        used = np.unique(device.stack).tolist()  # those of this GPU
        tellings = [told(columns.stacks[number]) for number in used]
        names = by_siblings(tellings)
        place = np.zeros(len(columns.stacks), int)
        place[used] = range(len(used))
        place = place[device.stack]

        def of_blocks(values: list) -> np.ndarray:
            return np.array(values)[place] if len(place) else np.array(values[:0])

        phases = [_NAMES.index(t.phase) for t in tellings]
        # Without C++ frames, autograd's own threads have no stack; everything else has one.
        has_cpp = any("::" in name for stack in columns.stacks for name, _, _ in stack)
        if 0 in used and not has_cpp and any(t.phase == FORWARD for t in tellings):
            phases[used.index(0)] = _BACKWARD
        self._told_phase = of_blocks(phases).astype(int)
        self._category = of_blocks([codes.get(name, -1) for name in names]).astype(int)
        self._makes_state = of_blocks([t.makes_state for t in tellings]).astype(bool)
        self._accumulates = of_blocks([t.accumulates for t in tellings]).astype(bool)
        self._checkpointed = of_blocks([t.checkpointed for t in tellings]).astype(bool)
        self._of_event = self._event_phases(columns.annotations)
        self._runs = _runs(self._of_event)
        # A block can outlive the last step only if that is over.
        self._is_over = bool(self._runs) and (self._runs[-1][1] != _OPTIMIZER or self._ends(columns.annotations))

    def result(self) -> tuple[list[str], np.ndarray, np.ndarray, list[tuple[int, str]]]:
        phase = np.zeros(len(self._made), int)
        phase[self._made] = self._of_event[self._device.start[self._made]]
        phase[~self._made] = 0
        self._sort_made(phase)
        self._sort_before()
        self._sort_residents()
        self._sort_by_sizes(phase)
        self._fill(phase)
        return _NAMES, phase, self._category, [(start, _NAMES[code]) for start, code in self._runs if code]

    def _event_phases(self, annotations: list[Annotation]) -> np.ndarray:
        """The phase of each event: what its stack says, else what the program's marks say, else as before it."""
        found = np.zeros(self._count, int)
        made = self._made & (self._told_phase > 0)
        found[self._device.start[made]] = self._told_phase[made]
        marked = self._marked(annotations)
        found = np.where(found > 0, found, marked)
        last = np.maximum.accumulate(np.where(found > 0, np.arange(self._count), 0))
        return found[last] if self._count else found

    def _ends(self, annotations: list[Annotation]) -> bool:
        """Whether PyTorch noted the end of a step after the last event."""
        ended = [note.time for note in annotations if note.stage == "END" and "Optimizer.step" in note.name]
        return bool(ended) and max(ended) >= self._device.times[-1]

    def _marked(self, annotations: list[Annotation]) -> np.ndarray:
        """The phase of each event by ranges such as "Optimizer.step#AdamW.step" and "## forward ##"."""
        marked, open_ranges = np.zeros(self._count, int), {}
        for note in sorted(annotations, key=lambda note: note.time):
            word = _MARK.search(note.name)
            if word is None:
                continue
            event = int(np.searchsorted(self._device.times, note.time))
            if note.stage == "START":
                open_ranges[note.name] = event
            elif note.name in open_ranges:
                inside = marked[open_ranges.pop(note.name) : event]
                inside[inside == 0] = _NAMES.index(word[0].lower())  # an inner range has ended before
        for name, event in open_ranges.items():  # the history ends inside of it
            inside = marked[event:]
            inside[inside == 0] = _NAMES.index(_MARK.search(name)[0].lower())
        return marked

    def _next_run(self, codes: tuple[int, ...]) -> np.ndarray:
        """For each event the first of the next run of one of these phases, or the number of events."""
        starts = [start for start, code in self._runs if code in codes]
        following = np.array([*starts, self._count])
        return following[np.searchsorted(starts, np.arange(self._count), side="right")]

    def _sort_made(self, phase: np.ndarray) -> None:
        """Blocks that the history saw allocated."""
        device, codes = self._device, self._codes
        if not self._count:
            return
        start = np.maximum(device.start, 0)
        survives = device.end > self._next_run((_FORWARD, _BACKWARD))[start]
        survives |= (device.end == self._count) & (self._makes_state | self._is_over)
        in_step = self._made & (phase == _OPTIMIZER)
        self._category[in_step] = np.where(survives, codes["optimizer_state"], codes["optimizer_temporaries"])[in_step]

        boundary = self._next_run((_FORWARD, _OPTIMIZER))[start]
        outlives = (device.end >= boundary) & (boundary < self._count) | (
            (device.end == self._count) & (boundary == self._count)
        )
        uncertain = ~np.isin(self._category, [codes[name] for name in _CERTAIN])
        in_backward = self._made & (phase == _BACKWARD)
        self._category[in_backward & uncertain & (outlives | self._accumulates)] = codes["gradients"]
        # A fused loss makes gradients in the forward pass. Logits that a variable still holds go in the next forward
        # pass, and a single number is the loss itself.
        released_in_step = np.append(self._of_event, 0)[device.end] == _OPTIMIZER
        in_forward = self._made & (phase == _FORWARD)
        self._category[in_forward & uncertain & outlives & released_in_step & (device.size > 512)] = codes["gradients"]

        kept = device.end > self._next_run((_BACKWARD,))[start]
        self._category[in_forward & uncertain & self._checkpointed & kept] = codes["checkpoints"]
        workspace = self._made & (phase > 0) & (device.size == _CUBLAS_WORKSPACE) & (device.end == self._count)
        self._category[workspace] = codes["library_workspace"]

    def _sort_before(self) -> None:
        """Blocks from before the history: some have a stack, others are released in a phase that tells."""
        device, codes = self._device, self._codes
        before = ~self._made
        self._category[before & (self._told_phase == _OPTIMIZER)] = codes["optimizer_state"]
        throughout = before & (device.end == self._count)
        self._category[throughout & self._accumulates] = codes["gradients"]
        released = before & (device.end < self._count)
        if released.any():
            into = np.zeros(len(before), int)
            into[released] = self._of_event[device.end[released]]
            unknown = released & (self._category < 0)
            self._category[unknown & (into == _BACKWARD)] = codes[ACTIVATIONS]
            self._category[unknown & (into == _OPTIMIZER)] = codes["gradients"]

    def _sort_residents(self) -> None:
        """Blocks that are there all the time, of a program that trains: weights and optimizer state, by their sizes."""
        device, codes = self._device, self._codes
        steps = any(code == _OPTIMIZER for _, code in self._runs)
        gradients = Counter(device.requested[self._largest_gradients()].tolist())
        first_model = next((start for start, code in self._runs if code == _FORWARD), self._count)
        resident = (device.start < first_model) & (device.end == self._count) & (self._category < 0)
        weights = device.requested[self._category == codes["parameters"]]
        missing = gradients - Counter(weights.tolist())
        states = Counter({size: _STATES * count for size, count in gradients.items()})
        for block in np.flatnonzero(resident).tolist():
            size = int(device.requested[block])
            if missing[size] > 0:
                missing[size] -= 1
                self._category[block] = codes["parameters"]
            elif steps and (of := next((s for s in (size, size // 2) if states[s] > 0), None)):
                states[of] -= 1
                self._category[block] = codes["optimizer_state"]

    def _largest_gradients(self) -> np.ndarray:
        """The gradients that are alive at once, at the step that has most of them."""
        device = self._device
        is_gradient = self._category == self._codes["gradients"]
        moments = [start for start, code in self._runs if code == _OPTIMIZER] or [self._count]
        alive = [is_gradient & (device.start < moment) & (device.end >= moment) for moment in moments[:8]]
        return max(alive, key=lambda chosen: int(device.size[chosen].sum()))

    def _sort_by_sizes(self, phase: np.ndarray) -> None:
        """In the backward pass, the gradient of an activation is as large as the activation.

        Where autograd's threads have no stack, this is all that tells the one from the other.
        """
        size, unknown = self._device.size, self._category < 0
        forward, backward = phase == _FORWARD, unknown & (phase == _BACKWARD) & (self._device.stack == 0)
        of_size: dict[int, set[int]] = {}
        for kind in np.unique(np.stack([size[forward], self._category[forward]], axis=1), axis=0).tolist():
            of_size.setdefault(kind[0], set()).add(kind[1])
        for found in np.unique(size[backward]).tolist():
            if len(of_size.get(found, ())) == 1:
                self._category[backward & (size == found)] = of_size[found].pop()

    def _fill(self, phase: np.ndarray) -> None:
        """Name what nothing has told."""
        unknown = self._category < 0
        self._category[unknown & ((phase == _FORWARD) | (phase == _BACKWARD))] = self._codes[ACTIVATIONS]
        if self._device.recorded:
            self._category[unknown & ~self._made] = self._codes[BEFORE]
        self._category[self._category < 0] = self._codes["unattributed"]


def _runs(phases: np.ndarray) -> list[tuple[int, int]]:
    """(first event, phase) of each stretch of one phase."""
    starts = np.flatnonzero(np.diff(phases, prepend=-1))
    return list(zip(starts.tolist(), phases[starts].tolist()))
