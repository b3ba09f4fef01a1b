"""The model of PyTorch's caching allocator: against a naive one, and against constants of the real one."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from src.predict.allocator import CachingAllocator, SimulatedOutOfMemory
from src.predict.live_memory import LiveMemory
from src.utils import MIB

LM_HEAD_BYTES = 128256 * 2048 * 2  # of Llama 3.2 1B in bf16: 501 MiB


class NaiveAllocator:
    """The same rules, each as it is told in PyTorch's comments, over one list of [address, size, free] a segment."""

    def __init__(self, limit=None):
        self.limit, self.segments, self.next_address = limit, [], 0

    def reserved(self):
        return sum(size for segment in self.segments for _, size, _ in segment)

    def allocated(self):
        return sum(size for segment in self.segments for _, size, free in segment if not free)

    def allocate(self, count):
        size = max(512, -(-count // 512) * 512)
        small = size <= MIB
        of_pool = [s for s in self.segments if (sum(size for _, size, _ in s) == 2 * MIB) == small]
        fitting = [(b[1], b[0], s, b) for s in of_pool for b in s if b[2] and b[1] >= size]
        if fitting:
            *_, segment, block = min(fitting, key=lambda found: found[:2])
        else:
            own = -(-size // (2 * MIB)) * 2 * MIB
            segment = self.new_segment(2 * MIB if small else 20 * MIB if size < 10 * MIB else own)
            if segment is None:
                return None
            (block,) = segment
        rest = block[1] - size
        if rest >= 512 if small else rest > MIB:
            segment.insert(segment.index(block) + 1, [block[0] + size, rest, True])
            block[1] = size
        block[2] = False
        return block[0], block[1]

    def new_segment(self, size):
        if self.limit is not None and self.reserved() + size > self.limit:
            self.release_cached()
            if self.reserved() + size > self.limit:
                return None
        self.segments.append([[self.next_address, size, True]])
        self.next_address += size
        return self.segments[-1]

    def free(self, address):
        for segment in self.segments:
            for block in segment:
                if block[0] == address:
                    block[2] = True
            for left, right in reversed(list(itertools.pairwise(segment))):
                if left[2] and right[2]:
                    left[1] += right[1]
                    segment.remove(right)

    def release_cached(self):
        self.segments = [s for s in self.segments if len(s) > 1 or not s[0][2]]


EDGES = [512, MIB, 2 * MIB, 10 * MIB, 11 * MIB, 20 * MIB]
SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 64 * MIB),
    st.builds(lambda edge, off: max(1, edge + off), st.sampled_from(EDGES), st.integers(-513, 513)),
)
ACTIONS = st.one_of(
    SIZES, SIZES, st.tuples(st.just("free"), st.integers(0, 10**6)), st.just("release"), st.just("reset")
)


@settings(max_examples=150)
@given(actions=st.lists(ACTIONS, max_size=60), limit=st.sampled_from([None, 30 * MIB, 90 * MIB]))
def test_does_what_a_naive_allocator_does(actions, limit):
    allocator, naive, live = CachingAllocator(limit), NaiveAllocator(limit), []
    base, peak, peak_reserved = allocator._next_address, 0, 0
    for action in actions:
        if action == "release":
            allocator.release_cached()
            naive.release_cached()
        elif action == "reset":
            allocator.reset_peak()
            peak = peak_reserved = 0
        elif isinstance(action, tuple):
            if live:
                block = live.pop(action[1] % len(live))
                naive.free(block.address - base)
                allocator.free(block)
        elif (expected := naive.allocate(action)) is None:
            with pytest.raises(SimulatedOutOfMemory) as caught:
                allocator.allocate(action)
            facts = caught.value.facts
            assert (facts["allocated_bytes"], facts["free_bytes"]) == (naive.allocated(), limit - naive.allocated())
            gaps = [size for segment in naive.segments for _, size, is_free in segment if is_free]
            assert (facts["reserved_bytes"], facts["largest_gap_bytes"]) == (naive.reserved(), max(gaps, default=0))
        else:
            live.append(allocator.allocate(action))
            assert (live[-1].address - base, live[-1].size) == expected
        peak, peak_reserved = max(peak, naive.allocated()), max(peak_reserved, naive.reserved())
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (naive.allocated(), naive.reserved())
        assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (peak, peak_reserved)


def test_stream_is_given_no_block_of_another():
    allocator = CachingAllocator()
    block = allocator.allocate(30 * MIB)
    allocator.free(block)
    allocator.stream = "other"
    assert allocator.allocate(30 * MIB) is not block
    allocator.stream = None
    assert allocator.allocate(30 * MIB) is block
    assert allocator.reserved_bytes == 60 * MIB


def test_lenient_allocator_notes_the_first_refusal_and_goes_on_as_without_a_limit():
    lenient, free = CachingAllocator(50 * MIB, strict=False), CachingAllocator()
    for size in (30, 40, 50):
        lenient.allocate(size * MIB)
        free.allocate(size * MIB)
        assert (lenient.refused is None) == (size == 30)
    assert lenient.refused.facts["requested_bytes"] == 40 * MIB
    assert (lenient.allocated_bytes, lenient.reserved_bytes) == (free.allocated_bytes, free.reserved_bytes)


@pytest.mark.parametrize(
    ("count", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # leaves 1 MiB and 512 bytes, which is split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # leaves 1 MiB, which is not
        (LM_HEAD_BYTES, 502 * MIB, 502 * MIB),  # as an H100's snapshot shows it
    ],
)
def test_first_request_gets_the_block_and_segment_of_the_real_allocator(count, block, segment):
    allocator = CachingAllocator()
    assert allocator.allocate(count).size == block
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (block, segment)


COUNT = MIB // 4  # float32 numbers of one MiB


class Residual(torch.nn.Module):
    """A layer as of a transformer: the gradient of what it returns goes two ways, which meet at its input."""

    def forward(self, inputs):
        return inputs + inputs * 3


HOOKED = Residual()
HOOKED.register_full_backward_hook(lambda *_: None)  # a layer's hook keeps that gradient, so that they meet elsewhere


def loss_of(plan):
    """The loss of a graph of elementwise operations on tensors of 1 MiB: `plan` has operations and their inputs."""
    nodes = [torch.ones(COUNT, requires_grad=True) for _ in range(2)]
    for operation, first, second in plan:
        a, b = nodes[first % len(nodes)], nodes[second % len(nodes)]
        made = {"+": lambda: a + b, "*": lambda: a * b, "e": lambda: (a * 1e-3).exp(), "3": lambda: a * 3}  # noqa: B023
        made["h"] = lambda: HOOKED(a)  # noqa: B023
        nodes.append(a.view(2, -1).mul(2).view(-1) if operation == "v" else made[operation]())
    return sum(node.sum() for node in nodes)


def real_peak(plan):
    """Peak, in MiB, that PyTorch's CPU allocator itself reports for forward and backward, with no mode in between."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(plan).backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes)) // MIB


NODE = st.tuples(st.sampled_from("+*ev3h"), st.integers(0, 99), st.integers(0, 99))


@settings(max_examples=20)
@example(plan=[("h", 1, 0), ("h", 2, 0)])
@given(plan=st.lists(NODE, min_size=2, max_size=12))
def test_peak_of_a_graph_is_that_of_the_real_allocator(plan):
    # Gradients that meet are added in place without a mode, out of place under one: they are counted as in place.
    with LiveMemory() as memory:
        loss_of(plan).backward()
    assert memory.peak_bytes // MIB == real_peak(plan)
