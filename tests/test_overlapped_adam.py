"""The fused CPU Adam against PyTorch's AdamW in fp64 and fp32, its stochastic rounding, and merging of copies."""

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from src.overlapped_adam import FusedCpuAdam, _runs

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIZES = [1, 17, 2**15 - 1, 2**15, 100_003]  # a thread takes 2**15 elements at a time
SIGMAS = 6

pytestmark = pytest.mark.usefixtures("rng")


def adam(master, *, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, states="fp32", **settings):
    optimizer = FusedCpuAdam(
        [torch.nn.Parameter(master)], lr=lr, betas=betas, weight_decay=weight_decay, states=states, **settings
    )
    optimizer.init_state(master)
    return optimizer


def update(optimizer, weights, master, gradients, scale=1.0):
    group = optimizer.param_groups[0]
    optimizer.update(weights, master, gradients, scale=scale, lr=group["lr"], group=group)


def adamw(initial, gradients, dtype, **settings):
    """PyTorch's AdamW in `dtype`: the weights after a step for each of `gradients`."""
    weights = torch.nn.Parameter(initial.to(dtype))
    optimizer = torch.optim.AdamW([weights], foreach=False, **settings)
    for gradient in gradients:
        weights.grad = gradient.to(dtype)
        optimizer.step()
    return weights.detach()


def assert_as_exact_as_fp32(actual, initial, gradients, **settings):
    """The error against fp64 is that of fp32 arithmetic, which PyTorch's own AdamW has, too."""
    exact = adamw(initial, gradients, FP64, **settings)
    error = (actual.double() - exact).abs()
    steps, lr = len(gradients), settings["lr"]
    # Half a unit in the last place of the weight a step, and of each update what rounding the betas to fp32 costs.
    relative = 8 * 2**-24 / (1 - max(settings["betas"]))
    assert (error <= steps * (2 * 2**-24 * (exact.abs() + steps * lr) + relative * lr)).all()
    if len(actual) > 1000:
        fp32_error = (adamw(initial, gradients, FP32, **settings).double() - exact).abs()
        assert error.mean() <= 1.5 * fp32_error.mean()


def random_settings(rng, **settings):
    betas = (rng.uniform(0.8, 0.95), rng.uniform(0.9, 0.99))
    return {"lr": rng.uniform(1e-4, 1e-2), "betas": betas, "weight_decay": 0.0, **settings}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1 / 384])
def test_fp32_is_adamw(rng, size, weight_decay, scale):
    settings = random_settings(rng, weight_decay=weight_decay)
    initial, gradients = torch.randn(size), torch.randn(5, size)
    weights = initial.clone()
    optimizer = adam(weights, **settings)
    for gradient in gradients:
        update(optimizer, weights, weights, gradient / scale, scale)
    assert_as_exact_as_fp32(weights, initial, gradients, **settings)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1 / 256])  # a power of two: bf16 gradients stay what they are
def test_bf16_weights_are_the_nearest_of_a_master_that_is_fp32_adamw(rng, size, weight_decay, scale):
    settings = random_settings(rng, weight_decay=weight_decay)
    initial, gradients = torch.randn(size), torch.randn(5, size).bfloat16()
    master, weights = initial.clone(), torch.empty(size, dtype=BF16)
    optimizer = adam(master, **settings)
    for gradient in gradients:
        update(optimizer, weights, master, gradient / scale, scale)
        assert torch.equal(weights, master.bfloat16())
    assert_as_exact_as_fp32(master, initial, gradients, **settings)


@pytest.mark.parametrize("value", [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf, -torch.inf, torch.nan])
def test_bf16_weights_round_special_values_as_pytorch_does(value):
    # Halves of the last place go to the even neighbour, and what is beyond the largest bf16 is infinite.
    master, weights = torch.full((33,), value), torch.empty(33, dtype=BF16)
    update(adam(master), weights, master, torch.zeros(33, dtype=BF16))
    assert torch.equal(weights.view(torch.int16), master.bfloat16().view(torch.int16)) or weights.isnan().all()


def test_learning_rate_of_each_step_is_the_one_given(rng):
    initial, gradients = torch.randn(1000), torch.randn(3, 1000)
    weights, expected = initial.clone(), torch.nn.Parameter(initial.double())
    optimizer, reference = adam(weights), torch.optim.AdamW([expected], betas=(0.9, 0.95), weight_decay=0)
    for gradient in gradients:
        reference.param_groups[0]["lr"] = lr = rng.uniform(1e-4, 1e-2)
        optimizer.update(weights, weights, gradient, scale=1.0, lr=lr, group=optimizer.param_groups[0])
        expected.grad = gradient.double()
        reference.step()
    torch.testing.assert_close(weights.double(), expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_is_deepspeeds_cpu_adam(rng, weight_decay):
    settings = random_settings(rng, weight_decay=weight_decay)
    initial, gradients = torch.randn(100_003), torch.randn(5, 100_003)
    weights, expected = initial.clone(), torch.nn.Parameter(initial.clone())
    optimizer, deepspeeds = adam(weights, **settings), DeepSpeedCPUAdam([expected], **settings)
    for gradient in gradients:
        update(optimizer, weights, weights, gradient)
        expected.grad = gradient.clone()
        deepspeeds.step()
    assert_as_exact_as_fp32(weights, initial, gradients, **settings)
    torch.testing.assert_close(weights, expected.detach(), rtol=1e-6, atol=1e-6)


def test_partitions_have_moments_and_steps_of_their_own():
    first, second = torch.zeros(10), torch.zeros(10)
    optimizer = adam(first)
    optimizer.init_state(second)
    for _ in range(3):
        update(optimizer, first, first, torch.ones(10))
    update(optimizer, second, second, torch.ones(10))
    torch.testing.assert_close(first, torch.full((10,), -3e-3))
    torch.testing.assert_close(second, torch.full((10,), -1e-3))


@pytest.mark.parametrize("states", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_result_does_not_depend_on_the_number_of_threads(states, threads):
    dtype = {"fp32": FP32, "bf16": BF16}[states]
    initial, gradient = torch.randn(200_001).to(dtype), torch.randn(200_001).to(dtype)

    def stepped(threads):
        weights = initial.clone()
        update(adam(weights, states=states, threads=threads), weights, weights, gradient)
        return weights

    assert torch.equal(stepped(threads), stepped(2))


def bf16_step(initial, gradient, moments, *, seed=0, weight_decay=0.1, count_before=0):
    """Weights and both moments after a step with bf16 states."""
    weights = initial.clone()
    optimizer = adam(weights, lr=1e-2, weight_decay=weight_decay, states="bf16", seed=seed)
    optimizer.updates = count_before
    return _step_from(optimizer, weights, gradient, moments)


def fp32_step(initial, gradient, moments, *, weight_decay=0.1):
    """The same step before rounding."""
    weights = initial.float()
    optimizer = adam(weights, lr=1e-2, weight_decay=weight_decay)
    return _step_from(optimizer, weights, gradient.float(), moments)


def _step_from(optimizer, weights, gradient, moments):
    state = optimizer.state[weights]
    for name, moment in zip(("exp_avg", "exp_avg_sq"), moments):
        state[name].copy_(moment)
    state["step"] = 4
    update(optimizer, weights, weights, gradient)
    return weights, state["exp_avg"], state["exp_avg_sq"]


def random_bf16_state(count):
    """Weights, gradient and both moments, of many magnitudes and both signs."""
    magnitude = torch.exp2(torch.randint(-20, 3, (count,)))
    weights, gradient, first = ((torch.randn(count) * magnitude).bfloat16() for _ in range(3))
    return weights, gradient, (first, (torch.rand(count) * magnitude**2).bfloat16())


def neighbours(exact):
    """The bf16 values that enclose fp32 values, in magnitude; the same value twice where it is a bf16."""
    bits = exact.view(torch.int32)
    lower = (bits & ~0xFFFF).view(FP32)
    upper = ((bits + 0xFFFF) & ~0xFFFF).view(FP32)
    return lower, upper


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 10])
def test_bf16_states_round_to_a_neighbour_and_to_the_exact_value_in_the_mean(seed):
    count = 500_000
    state = random_bf16_state(count)
    for rounded, exact in zip(bf16_step(*state, seed=seed), fp32_step(*state)):
        lower, upper = neighbours(exact)
        # The last bit of the fp32 result may differ from one compilation to the other.
        inexact = ((exact - lower).abs() > exact.abs() * 2**-20) & ((upper - exact).abs() > exact.abs() * 2**-20)
        rounded = rounded.float()
        assert ((rounded == lower) | (rounded == upper))[inexact].all()
        assert ((rounded - exact).abs() <= 2**-7 * exact.abs()).all()
        up = (rounded == upper)[inexact].double()
        share = ((exact - lower) / (upper - lower))[inexact].double()
        standard_error = (share * (1 - share)).sum().sqrt()
        assert 0.25 * count < inexact.sum()
        assert abs((up - share).sum()) < SIGMAS * standard_error
        # Not in the mean alone: where the exact value is near the upper neighbour, that is taken as often.
        for tenth in range(10):
            here = (share * 10).int() == tenth
            error = (up - share)[here].sum().abs()
            assert error < SIGMAS * (share * (1 - share))[here].sum().sqrt() + 1


def test_rounding_errors_of_weights_moments_and_neighbouring_elements_are_independent():
    count = 500_000
    state = random_bf16_state(count)
    errors = []
    for rounded, exact in zip(bf16_step(*state), fp32_step(*state)):
        lower, upper = neighbours(exact)
        spacing = (upper - lower).where(upper != lower, torch.inf)
        errors.append((rounded.float() - exact) / spacing)
    weights, first, second = errors
    pairs = [(weights, first), (weights, second), (first, second)]
    pairs += [(error[:-distance], error[distance:]) for error in errors for distance in (1, 8, 2**15)]
    for one, other in pairs:
        assert torch.corrcoef(torch.stack((one, other)))[0, 1].abs() < SIGMAS / len(one) ** 0.5


def test_seed_and_step_decide_how_bf16_states_are_rounded():
    state = random_bf16_state(10_000)
    weights = bf16_step(*state, seed=3)[0]
    assert torch.equal(weights, bf16_step(*state, seed=3)[0])
    for other in (bf16_step(*state, seed=4)[0], bf16_step(*state, seed=3, count_before=1)[0]):
        assert 0.2 < (weights != other).float().mean() < 0.8


def test_repeated_steps_are_rounded_anew():
    initial = torch.randn(10_000).bfloat16()
    optimizer = adam(initial, states="bf16")
    results = []
    for _ in range(2):
        weights = initial.clone()
        optimizer.init_state(weights)
        update(optimizer, weights, weights, torch.ones(10_000, dtype=BF16))
        results.append(weights)
    assert not torch.equal(*results)


@pytest.mark.parametrize("sign", [1, -1])
def test_updates_far_below_the_last_place_move_bf16_weights_in_the_mean(sign):
    count, steps, lr = 100_000, 200, 1e-5
    weights = torch.ones(count, dtype=BF16)
    assert torch.equal((weights - sign * lr).bfloat16(), weights)  # rounding to nearest would not move them
    optimizer = adam(weights, lr=lr, states="bf16")
    for _ in range(steps):
        update(optimizer, weights, weights, torch.full((count,), sign, dtype=BF16))
    moved = 1 - weights.double()
    standard_error = moved.std() / count**0.5
    assert abs(moved.mean() - sign * lr * steps) < SIGMAS * standard_error + 0.01 * lr * steps


def test_second_moment_in_bf16_shrinks_without_gradients():
    count, steps = 50_000, 300
    weights = torch.zeros(count, dtype=BF16)
    optimizer = adam(weights, betas=(0.9, 0.999), states="bf16")
    second = optimizer.state[weights]["exp_avg_sq"].fill_(1)
    assert torch.equal(second * 0.999, second)  # rounding to nearest would not shrink it
    for _ in range(steps):
        update(optimizer, weights, weights, torch.zeros(count, dtype=BF16))
    standard_error = second.double().std() / count**0.5
    assert abs(second.double().mean() - 0.999**steps) < SIGMAS * standard_error + 1e-4


def test_what_is_a_bf16_value_stays_it():
    weights = torch.randn(10_000).bfloat16()
    expected = weights.clone()
    update(adam(weights, states="bf16"), weights, weights, torch.zeros(10_000, dtype=BF16))
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_non_finite_gradient_spoils_its_own_element_only(states):
    dtype = {"fp32": FP32, "bf16": BF16}[states]
    weights, gradient = torch.ones(100, dtype=dtype), torch.ones(100, dtype=dtype)
    gradient[7] = torch.nan
    update(adam(weights, states=states), weights, weights, gradient)
    assert weights.isnan().nonzero().tolist() == [[7]]


def test_moments_have_the_dtype_of_the_states():
    weights = torch.zeros(5, dtype=BF16)
    for states, dtype in (("fp32", FP32), ("bf16", BF16)):
        state = adam(weights, states=states).state[weights]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (dtype, dtype)


WRONG = {
    "another size": ({"gradients": torch.zeros(9)}, "same number"),
    "master of another size": ({"master": torch.zeros(11)}, "same number"),
    "gradients of another dtype": ({"gradients": torch.zeros(10, dtype=BF16)}, "weights' dtype"),
    "not contiguous": ({"gradients": torch.zeros(20)[::2]}, "contiguous"),
    "not on the CPU": ({"gradients": torch.zeros(10, device="meta")}, "on the CPU"),
    "fp16": ({name: torch.zeros(10, dtype=torch.float16) for name in ("weights", "gradients")}, "dtypes"),
    "fp64": ({name: torch.zeros(10, dtype=FP64) for name in ("weights", "gradients")}, "dtypes"),
    "master in bf16": ({"master": torch.zeros(10, dtype=BF16)}, "dtypes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_value_error_and_changes_nothing(case):
    tensors, text = WRONG[case]
    arguments = {"weights": torch.zeros(10), "gradients": torch.ones(10), "master": torch.zeros(10), **tensors}
    optimizer = adam(arguments["master"])
    weights, master = arguments["weights"].clone(), arguments["master"].clone()
    with pytest.raises(ValueError, match=text):
        update(optimizer, **arguments)
    assert torch.equal(arguments["weights"], weights)
    assert torch.equal(arguments["master"], master)


def test_moments_of_two_dtypes_are_a_value_error():
    weights = torch.zeros(10)
    optimizer = adam(weights)
    optimizer.state[weights]["exp_avg_sq"] = torch.zeros(10, dtype=BF16)
    with pytest.raises(ValueError, match="both moments"):
        update(optimizer, weights, weights, torch.ones(10))


def test_step_is_refused():
    with pytest.raises(NotImplementedError, match="update"):
        adam(torch.zeros(1)).step()


def test_states_of_another_dtype_are_refused():
    with pytest.raises(KeyError):
        adam(torch.zeros(1), states="fp16")


def random_parts(rng):
    """Gradients and their places, each in a few storages, with and without gaps between them."""
    sizes = [rng.choice([1, 2, 5, 30]) for _ in range(rng.randint(0, 12))]

    def laid_out(make):
        views, storages, storage, offset = [], [], None, 0
        for size in sizes:
            if storage is None or rng.random() < 0.2:
                storage, offset = make(1000), rng.choice([0, 3])
                storages.append(storage)
            offset += rng.choice([0, 0, 0, 2])
            views.append(storage.narrow(0, offset, size))
            offset += size
        return views, storages

    gradients, _ = laid_out(torch.randn)
    places, storages = laid_out(torch.zeros)
    parts = list(zip(range(len(sizes)), gradients, places))
    if rng.random() < 0.3:
        rng.shuffle(parts)
    return parts, storages


def test_copying_run_by_run_is_copying_part_by_part(rng):
    merged = 0
    for _ in range(500):
        parts, storages = random_parts(rng)
        for _, gradient, place in parts:
            place.copy_(gradient)
        expected = [storage.clone() for storage in storages]
        for storage in storages:
            storage.zero_()
        runs = _runs(parts)
        for _, gradient, place in runs:
            place.copy_(gradient)
        for storage, copy in zip(storages, expected, strict=True):
            assert torch.equal(storage, copy)
        # A run ends exactly where the next part lies elsewhere on either side.
        starts = [part for i, part in enumerate(parts) if i == 0 or not adjacent(parts[i - 1], part)]
        assert [part_id for part_id, _, _ in runs] == [part_id for part_id, _, _ in starts]
        merged += len(parts) - len(runs)
    assert merged > 100


def adjacent(part, other):
    """Whether `other` begins, on both sides, where `part` ends."""
    return all(
        one.data_ptr() + one.nbytes == two.data_ptr()
        and one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
        for one, two in zip(part[1:], other[1:])
    )
