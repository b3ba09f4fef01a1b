"""The fused CPU Adam: its C++ update against PyTorch's AdamW in fp64, its stochastic rounding, its merged copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.offload.overlapped_adam import FusedCpuAdam, _runs

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIGMAS = 6

pytestmark = pytest.mark.usefixtures("rng", "compiled_adam")


def adam(master, *, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, **fields):
    optimizer = FusedCpuAdam([torch.nn.Parameter(master)], lr=lr, betas=betas, weight_decay=weight_decay, **fields)
    optimizer.init_state(master)
    return optimizer


def update(optimizer, weights, master, gradients, scale=1.0, lr=None):
    group = optimizer.param_groups[0]
    optimizer.update(weights, master, gradients, scale=scale, lr=lr or group["lr"], group=group)


def adamw(initial, gradients, rates, dtype=FP64, **fields):
    """PyTorch's AdamW: the weights after a step for each of `gradients`, at each of `rates`."""
    weights = torch.nn.Parameter(initial.to(dtype))
    optimizer = torch.optim.AdamW([weights], foreach=False, **fields)
    for gradient, rate in zip(gradients, rates):
        optimizer.param_groups[0]["lr"], weights.grad = rate, gradient.to(dtype)
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize("size", [1, 17, 2**15, 100_003])  # a thread takes 2**15 elements at a time
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_update_is_adamws_as_exactly_as_fp32_can(rng, size, dtype):
    fields = {"betas": (rng.uniform(0.8, 0.95), rng.uniform(0.9, 0.99)), "weight_decay": rng.choice([0.0, 0.1])}
    scale, rates = 1 / 256, [rng.uniform(1e-4, 1e-2) for _ in range(4)]  # the scale of a clipped, scaled gradient
    initial, gradients = torch.randn(size), torch.randn(4, size).to(dtype)
    master = initial.clone()
    weights = master if dtype == FP32 else torch.empty(size, dtype=BF16)
    optimizer = adam(master, **fields)
    for gradient, rate in zip(gradients, rates):
        update(optimizer, weights, master, gradient / scale, scale, rate)
        assert torch.equal(weights, master.to(dtype))  # the weights are the nearest to their master
    exact = adamw(initial, gradients, rates, **fields)
    error = (master.double() - exact).abs()
    # A step rounds the weight twice, after its decay and after its update: half a unit in the last place each. And of
    # each update, what rounding the betas to fp32 costs.
    assert (error <= 2**-21 * exact.abs() + 4 * 1e-2 * 2**-21 / (1 - max(fields["betas"]))).all()
    if size > 1000:
        fp32_error = (adamw(initial, gradients, rates, FP32, **fields).double() - exact).abs()
        assert error.mean() <= 1.5 * fp32_error.mean()


def test_threads_do_not_change_the_result_and_the_seed_and_the_step_do():
    initial, gradient = torch.randn(100_001).to(BF16), torch.randn(100_001).to(BF16)

    def stepped(threads, seed=3, updates=0):
        weights = initial.clone()
        optimizer = adam(weights, states="bf16", threads=threads, seed=seed)
        optimizer.updates = updates
        update(optimizer, weights, weights, gradient)
        return weights

    assert torch.equal(stepped(1), stepped(3))
    for other in (stepped(1, seed=4), stepped(1, updates=1)):
        assert 0.2 < (stepped(1) != other).float().mean() < 0.8


def step_from(state, dtype):
    """Weights and moments after one step from `state`, of which fp32 is bf16 before rounding."""
    weights, gradient, *moments = (tensor.to(dtype, copy=True) for tensor in state)
    optimizer = adam(weights, lr=1e-2, weight_decay=0.1, states={BF16: "bf16", FP32: "fp32"}[dtype], seed=42)
    kept = optimizer.state[weights]
    kept["exp_avg"].copy_(moments[0])
    kept["exp_avg_sq"].copy_(moments[1])
    kept["step"] = 4
    update(optimizer, weights, weights, gradient)
    return weights, kept["exp_avg"], kept["exp_avg_sq"]


def test_bf16_states_round_to_a_neighbour_to_the_exact_value_in_the_mean_and_independently():
    count = 400_000
    magnitude = torch.exp2(torch.randint(-20, 3, (count,)))
    state = [(torch.randn(count) * magnitude).bfloat16() for _ in range(3)]
    state.append((torch.rand(count) * magnitude**2).bfloat16())
    errors = []
    for rounded, exact in zip(step_from(state, BF16), step_from(state, FP32)):
        bits, rounded = exact.view(torch.int32), rounded.float()
        lower, upper = (bits & ~0xFFFF).view(FP32), ((bits + 0xFFFF) & ~0xFFFF).view(FP32)
        # The last bit of the fp32 result may differ from one compilation to the other.
        inexact = ((exact - lower).abs() > exact.abs() * 2**-20) & ((upper - exact).abs() > exact.abs() * 2**-20)
        assert ((rounded == lower) | (rounded == upper))[inexact].all()
        assert 0.25 * count < inexact.sum()
        up, share = (rounded == upper).double(), ((exact - lower) / (upper - lower)).double()
        # Not in the mean alone: where the exact value is near the upper neighbour, that is taken as often.
        for tenth in range(10):
            here = inexact & ((share * 10).int() == tenth)
            spread = (share * (1 - share))[here].sum().sqrt()
            assert (up - share)[here].sum().abs() < SIGMAS * spread + 1
        errors.append((rounded - exact) / (upper - lower).where(upper != lower, torch.inf))
    pairs = [(errors[0], errors[1]), (errors[0], errors[2]), (errors[1], errors[2])]
    pairs += [(error[:-distance], error[distance:]) for error in errors for distance in (1, 2**15)]
    for pair in pairs:
        assert torch.corrcoef(torch.stack(pair))[0, 1].abs() < SIGMAS / len(pair[0]) ** 0.5


def test_wrong_input_is_a_value_error_and_changes_nothing():
    of_bf16 = torch.zeros(10, dtype=BF16)
    gradients = {"same number": torch.zeros(9), "weights' dtype": of_bf16, "contiguous": torch.ones(20)[::2]}
    for text, wrong in gradients.items():
        with pytest.raises(ValueError, match=text):
            update(adam(weights := torch.zeros(10)), weights, weights, wrong)
        assert not weights.any()
    with pytest.raises(ValueError, match="dtypes"):
        update(adam(of_bf16), torch.zeros(10), of_bf16, torch.ones(10))


# Of each part: size, gap before it, and whether it begins a storage of its own, on either side of the copy.
PART = st.tuples(st.sampled_from([1, 2, 30]), *[st.sampled_from([0, 0, 0, 2])] * 2, *[st.integers(0, 4)] * 2)


@settings(max_examples=100)
@given(parts=st.lists(PART, max_size=12))
def test_copying_run_by_run_is_copying_part_by_part(parts):
    def laid_out(side, make):
        views, storages, offset = [], [], 0
        for size, *gaps_and_breaks in parts:
            gap, breaks = gaps_and_breaks[side], gaps_and_breaks[2 + side] == 0
            if not storages or breaks:
                storages.append(make(500))  # where the next part has the same offset as it would have had
            views.append(storages[-1].narrow(0, offset + gap, size))
            offset += gap + size
        return views, storages

    gradients, _ = laid_out(0, torch.randn)
    places, storages = laid_out(1, torch.zeros)
    runs = _runs(list(zip(range(len(parts)), gradients, places)))
    for _, gradient, place in runs:
        place.copy_(gradient)
    for gradient, place in zip(gradients, places):
        assert torch.equal(gradient, place)
    assert sum((storage != 0).sum() for storage in storages) == sum(size for size, *_ in parts)
    # A run ends exactly where the next part lies elsewhere on either side.
    breaks = sum(gap > 0 or other > 0 or 0 in ends for _, gap, other, *ends in parts[1:])
    assert len(runs) == min(len(parts), 1 + breaks)
