"""Simulated memory: the caching allocator's rules, and what of a step is counted as live."""

import itertools

import pytest
import torch
from src.allocator import MIB, CachingAllocator, SimulatedOutOfMemory, rounded
from src.live_memory import LiveMemory
from torch.profiler import ProfilerActivity, profile

LM_HEAD_BYTES = 128256 * 2048 * 2  # of Llama 3.2 1B in bf16: 501 MiB


def chain(first):
    """The blocks of a segment, in order."""
    while first is not None:
        yield first
        first = first.next


def segment_bytes(first):
    return sum(block.size for block in chain(first))


def free_blocks(allocator, small):
    """The free blocks of the small or the large pool, as (size, address): small segments have 2 MiB, others more."""
    return [
        (block.size, block.address)
        for first in allocator.segments.values()
        if (segment_bytes(first) == 2 * MIB) == small
        for block in chain(first)
        if block.is_free
    ]


def assert_consistent(allocator, live):
    """The books agree with the blocks in `live` and with the segments they lie in."""
    assert allocator.allocated_bytes == sum(block.size for block in live)
    assert allocator.reserved_bytes == sum(map(segment_bytes, allocator.segments.values()))
    in_segments = []
    for address, first in allocator.segments.items():
        assert (first.address, first.previous) == (address, None)
        for left, right in itertools.pairwise(chain(first)):
            assert left.address + left.size == right.address
            assert right.previous is left
            assert not (left.is_free and right.is_free)  # or they would have been merged
        in_segments += [block for block in chain(first) if not block.is_free]
    assert {id(block) for block in in_segments} == {id(block) for block in live}
    ordered = sorted(live, key=lambda block: block.address)
    assert all(left.address + left.size <= right.address for left, right in itertools.pairwise(ordered))


def random_bytes(rng):
    """A request's size: small, large, or close to where a rule changes."""
    edge = rng.choice([512, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 502 * MIB]) + rng.randint(-513, 513)
    return max(1, rng.choice([rng.randint(1, 4096), rng.randint(1, 2 * MIB), rng.randint(1, 64 * MIB), edge]))


@pytest.mark.parametrize("repeat", range(5))
def test_random_requests_keep_the_books_and_take_the_best_fit(rng, repeat):
    allocator, live, allocated, reserved = CachingAllocator(), [], [0], [0]
    for _ in range(400):
        action = rng.random()
        if action < 0.02:
            allocator.release_cached()
            assert not [first for first in allocator.segments.values() if first.is_free and first.next is None]
        elif action < 0.04:
            allocator.reset_peak()
            allocated, reserved = [allocator.allocated_bytes], [allocator.reserved_bytes]
        elif action < 0.5 and live:
            allocator.free(live.pop(rng.randrange(len(live))))
        else:
            count = random_bytes(rng)
            size = rounded(count)
            fitting = [free for free in free_blocks(allocator, small=size <= MIB) if free[0] >= size]
            before = allocator.reserved_bytes
            block = allocator.allocate(count)
            live.append(block)
            assert block.size >= size
            assert block.size - size <= (0 if size <= MIB else MIB)
            if fitting:
                assert block.address == min(fitting)[1]
                assert allocator.reserved_bytes == before
        allocated.append(allocator.allocated_bytes)
        reserved.append(allocator.reserved_bytes)
        assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (max(allocated), max(reserved))
        assert_consistent(allocator, live)
    rng.shuffle(live)
    for block in live:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    assert_consistent(allocator, [])
    allocator.release_cached()
    assert (allocator.reserved_bytes, allocator.segments) == (0, {})


@pytest.mark.parametrize("repeat", range(3))
def test_random_requests_under_a_limit_never_reserve_more(rng, repeat):
    limit, live, refused = rng.randint(50, 500) * MIB, [], 0
    allocator = CachingAllocator(limit)
    for _ in range(500):
        if live and rng.random() < 0.45:
            allocator.free(live.pop(rng.randrange(len(live))))
            continue
        count, refusal = random_bytes(rng), None
        try:
            live.append(allocator.allocate(count))
        except SimulatedOutOfMemory as error:
            refusal = error.facts
        if refusal:
            refused += 1
            assert refusal["allocated_bytes"] == allocator.allocated_bytes
            assert refusal["free_bytes"] == limit - allocator.allocated_bytes
            # It gave back what it could before it gave up.
            assert not [first for first in allocator.segments.values() if first.is_free and first.next is None]
        assert allocator.peak_reserved_bytes <= limit
        assert_consistent(allocator, live)
    assert refused


@pytest.mark.parametrize(
    ("count", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # leaves 1 MiB and 512 bytes, which is split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # leaves 1 MiB, which is not
        (LM_HEAD_BYTES, 502 * MIB, 502 * MIB),
        (LM_HEAD_BYTES - MIB, 500 * MIB, 500 * MIB),
    ],
)
def test_first_request_gets_the_block_and_segment_of_the_real_allocator(count, block, segment):
    allocator = CachingAllocator()
    assert allocator.allocate(count).size == block
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (block, segment)


def test_small_and_large_requests_share_no_segment():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(15 * MIB))
    allocator.allocate(MIB)
    assert allocator.reserved_bytes == 16 * MIB + 2 * MIB
    allocator.free(allocator.allocate(MIB + 1))
    assert allocator.reserved_bytes == 16 * MIB + 2 * MIB  # in the cached 16 MiB


def separate_free_blocks(allocator, *sizes):
    """Free blocks that cannot merge, of these sizes in MiB, in segments of their own."""
    blocks = [allocator.allocate(size * MIB) for size in sizes]
    for block in blocks:
        allocator.free(block)
    return blocks


def test_best_fit_is_the_smallest_that_is_large_enough_then_the_lowest_address():
    allocator = CachingAllocator()
    large, small, exact, twin = separate_free_blocks(allocator, 40, 12, 20, 20)
    got = [allocator.allocate(count) for count in (19 * MIB, 20 * MIB, 14 * MIB)]
    assert [block.address for block in got] == [exact.address, twin.address, large.address]
    assert [block.size for block in got] == [20 * MIB, 20 * MIB, 14 * MIB]
    assert allocator.allocate(12 * MIB) is small
    assert allocator.reserved_bytes == 92 * MIB


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_neighbours_merge_in_whatever_order_they_are_freed(order):
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved_bytes == 20 * MIB
    for i in order:
        allocator.free(blocks[i])
    assert allocator.allocate(20 * MIB).address == blocks[0].address
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (20 * MIB, 20 * MIB)


def test_live_block_keeps_its_neighbours_apart():
    allocator = CachingAllocator()
    first, _, last = [allocator.allocate(6 * MIB) for _ in range(3)]
    allocator.free(first)
    allocator.free(last)  # and the 2 MiB behind it
    allocator.allocate(8 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(7 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_cached_segment_is_released_only_when_all_of_it_is_free():
    allocator = CachingAllocator()
    half, other_half = allocator.allocate(10 * MIB - 512), allocator.allocate(9 * MIB)
    allocator.free(half)
    allocator.release_cached()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(other_half)
    allocator.release_cached()
    assert allocator.reserved_bytes == 0
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (19 * MIB - 512, 20 * MIB)


def test_limit_releases_cached_segments_before_it_gives_up():
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    kept = allocator.allocate(30 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(70 * MIB)  # all there is, without the cached 60
    assert allocator.reserved_bytes == 100 * MIB
    with pytest.raises(SimulatedOutOfMemory) as caught:
        allocator.allocate(32 * MIB - 5)
    assert caught.value.facts == {"requested_bytes": 32 * MIB, "free_bytes": 0, "allocated_bytes": 100 * MIB}
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (100 * MIB, 100 * MIB)
    allocator.free(kept)
    assert allocator.allocate(30 * MIB) is kept


def test_out_of_memory_tells_the_segment_that_was_asked_for():
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    allocator.allocate(88 * MIB)
    with pytest.raises(SimulatedOutOfMemory) as caught:
        allocator.allocate(8 * MIB)
    assert caught.value.facts == {"requested_bytes": 20 * MIB, "free_bytes": 12 * MIB, "allocated_bytes": 88 * MIB}


COUNT = MIB // 4  # float32 numbers of one MiB


def gradient_peak(build):
    """Peak, in MiB, of the backward pass of the loss that `build` makes; a few scalars round it up."""
    with LiveMemory() as memory:
        loss = build()
        memory.reset_peak()
        loss.backward()
    return memory.peak_bytes // MIB


def leaf():
    return torch.ones(COUNT, requires_grad=True)


@pytest.mark.parametrize("uses", [1, 2, 3, 5])
def test_gradients_of_a_leaf_used_several_times_are_summed_in_place(uses):
    x = []

    def build():
        x.append(leaf())
        return sum((x[0] * (i + 2)).sum() for i in range(uses))

    # The leaf, the sum and the gradient that is added to it; out of place, the new sum would come on top.
    assert gradient_peak(build) == 1 + min(uses, 2)
    assert torch.equal(x[0].grad, torch.full((COUNT,), sum(range(2, uses + 2)) * 1.0))


def test_gradients_of_an_intermediate_result_are_summed_in_place():
    def build():
        y = leaf() * 2
        return (y * 3).sum() + (y * 4).sum()

    # The leaf (y is needed by nobody), the sum and the gradient that is added to it.
    assert gradient_peak(build) == 3


def test_gradient_of_which_a_view_is_held_is_not_reused():
    kept = []

    def build():
        x = leaf()
        other = (x * 3).sum()
        branch = x.view(2, -1)
        branch.register_hook(lambda gradient: kept.append(gradient))
        # Later nodes run first in the backward pass: the gradient of `branch`, held by the hook, reaches `x` unchanged
        # and before the other.
        return other + (branch * 4).sum()

    # The leaf, the gradient that is held, the one that is added to it, and their sum.
    assert gradient_peak(build) == 4
    assert torch.equal(kept[0].flatten(), torch.full((COUNT,), 4.0))


def random_graph(rng):
    """A function that builds a loss of a random graph of elementwise operations on 1 MiB tensors."""
    plan = [(rng.choice("+*ev3"), rng.random(), rng.random()) for _ in range(rng.randint(4, 14))]

    def build():
        nodes = [leaf(), leaf()]
        for operation, first, second in plan:
            a, b = nodes[int(first * len(nodes))], nodes[int(second * len(nodes))]
            if operation == "+":
                nodes.append(a + b)
            elif operation == "*":
                nodes.append(a * b)
            elif operation == "e":
                nodes.append((a * 1e-3).exp())
            elif operation == "v":
                nodes.append(a.view(2, -1).mul(2).view(-1))
            else:
                nodes.append(a * 3)
        return sum(node.sum() for node in nodes)

    return build


def allocators_peak(build):
    """Peak, in MiB, that PyTorch's CPU allocator itself reports for forward and backward, with no mode in between."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        build().backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes)) // MIB


@pytest.mark.parametrize("repeat", range(12))
def test_peak_of_a_random_graph_is_that_of_the_real_allocator(rng, repeat):
    build = random_graph(rng)
    with LiveMemory() as memory:
        build().backward()
    assert memory.peak_bytes // MIB == allocators_peak(build)
