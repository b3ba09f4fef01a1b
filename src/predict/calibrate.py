"""Measures how fast this machine's GPU is, for dry runs: at most a minute.

    python -m src.predict.calibrate my_gpu.json
    python all_gpu_liger_kernel.py --dry_run --gpu_rates my_gpu.json     # here or anywhere

Matrix products in three dtypes, attention forwards and backwards, copies, the moment between two kernels, and what the
CPU takes for a small training step. Sustained rates: each is measured for a moment after a warm-up. And, at best, what
the floor of an offloaded step is made of: PCIe and host memory, for deepspeed_liger_kernel.py --dry_run.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src import program
from src.utils import UsageError, aligned_table, check_writable

if TYPE_CHECKING:
    from src.predict.rates import OffloadRates, Rates

# Other imports stand in functions: --help and mistakes are answered at once.


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how long."""

    products: tuple[tuple[int, int, int], ...]  # M, N, K
    attention: tuple[tuple[int, int, int, int], ...]  # sequences, heads, tokens, width of a head
    copied_bytes: int
    seconds: float  # for each of about 20 measurements


# As in models of 1 to 8 billion weights: products at 8,192 tokens a step, attention at sequences of several lengths.
USUAL = Sizes(
    products=((8192, 2048, 8192), (8192, 8192, 2048), (8192, 4096, 4096), (4096, 14336, 4096)),
    attention=((16, 32, 1024, 64), (4, 32, 4096, 64), (4, 32, 2048, 128), (1, 32, 16384, 64)),
    copied_bytes=2**30,
    seconds=1.0,
)
TINY = Sizes(products=((32, 16, 64), (16, 64, 32)), attention=((1, 2, 16, 8),), copied_bytes=2**16, seconds=0.01)
# What the operations of a step get of the rate of a long copy: 2.98 of 4.27 TB/s on an H200. The first was fitted to
# steps that were measured (src/predict/rates.py), the second this command measured.
OF_A_COPY = 0.7


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str, about_s: float) -> float:
    """Seconds of one `call`, of as many as follow each other in half of `about_s`; the other half warms up."""
    call()
    _synchronize(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < about_s / 2 or count == 0:
        call()
        _synchronize(device)
        count += 1
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def product_flops(dtype_name: str, sizes: Sizes, device: str) -> float:
    """FLOP/s of matrix products: those of all sizes over the time of all."""
    import torch

    from src.model_utils import TORCH_DTYPES

    flops = seconds = 0.0
    for rows, columns, inner in sizes.products:
        left = torch.randn(rows, inner, device=device).to(TORCH_DTYPES[dtype_name])
        right = torch.randn(columns, inner, device=device).to(TORCH_DTYPES[dtype_name]).t()
        flops += 2 * rows * columns * inner
        seconds += seconds_of(lambda left=left, right=right: left @ right, device, sizes.seconds)
    return flops / seconds


def attention_flops(sizes: Sizes, device: str) -> tuple[float, float]:
    """FLOP/s of causal attention in bf16, forwards and backwards: those of all sizes over the time of all.

    The mask halves the FLOP.
    """
    flops = forward_s = backward_s = 0.0
    for shape in sizes.attention:
        batch, heads, tokens, width = shape
        flops += 2 * batch * heads * tokens * tokens * width / 2  # of one product; two forwards, five backwards
        seconds = _attention_seconds(shape, device, sizes.seconds)
        forward_s, backward_s = forward_s + seconds[0], backward_s + seconds[1]
    return 2 * flops / forward_s, 5 * flops / backward_s


def _attention_seconds(shape: tuple[int, int, int, int], device: str, about_s: float) -> tuple[float, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(*tensors, is_causal=True)

    output = forward()
    gradient = torch.randn_like(output)
    return seconds_of(forward, device, about_s), seconds_of(
        lambda: torch.autograd.grad(output, tensors, gradient, retain_graph=True), device, about_s
    )


def memory_bytes(sizes: Sizes, device: str) -> float:
    """Bytes/s, read and written, that a step gets, by the rate of copies."""
    import torch

    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return OF_A_COPY * 2 * sizes.copied_bytes / seconds_of(lambda: target.copy_(source), device, sizes.seconds)


def kernel_seconds(sizes: Sizes, device: str) -> float:
    """Seconds from one kernel's beginning to the next one's where both have next to nothing to do.

    They are launched while a long product runs, so that none waits for the CPU: what it takes with them less what it
    takes alone.
    """
    import torch

    rows, columns, inner = sizes.products[0]
    left, right = (torch.randn(shape, device=device) for shape in ((rows, inner), (inner, columns)))
    number, count = torch.zeros(1, device=device), 200

    def run(kernels: int) -> None:
        left @ right
        for _ in range(kernels):
            number.add_(1)

    more, none = (seconds_of(lambda kernels=k: run(kernels), device, sizes.seconds) for k in (count, 0))
    return max(more - none, count * 1e-7) / count


def cpu_slowness(device: str, about_s: float) -> float:
    """How many times as long as the CPUs of the fitted rates this one takes for a step of a tiny model.

    A GPU has next to nothing to do there, so that the step takes as long as its launches.
    """
    import torch

    from src.config import RunConfig
    from src.model_utils import build_model, patched
    from src.predict.fake_gpu import FakeGpu
    from src.predict.rates import FITTED
    from src.predict.step_time import step_time
    from src.techniques import kernels_only

    config = RunConfig(model_name="tiny-llama", dtype="bf16", gradient_checkpointing=False, **kernels_only())

    def step_on(place: str) -> Callable[[], None]:
        model = build_model(config, torch.device(place))
        tokens = torch.zeros((2, 32), dtype=torch.int64, device=place)

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            model.zero_grad()

        return step

    gpu = FakeGpu()
    with patched(), gpu.active():
        step = step_on("cuda")
        gpu.begin_counting()
        step()
        usual_s = step_time(gpu.end_counting(), FITTED).cpu_s
    with patched():
        return seconds_of(step_on(device), device, about_s) / usual_s


def offload_rates(name: str) -> "OffloadRates":
    """Those of the floor of an offloaded step, by its own measurements, on this machine's GPU of that name."""
    from src.config import RunConfig
    from src.machine import usable_cores
    from src.measure.devices import CudaRuntime
    from src.measure.machine_rates import host_rates, matmul_flops
    from src.model_utils import TORCH_DTYPES
    from src.predict.rates import OffloadRates

    runtime = CudaRuntime(RunConfig(dtype="fp32"))
    products = {dtype: matmul_flops(TORCH_DTYPES[dtype], runtime) for dtype in TORCH_DTYPES}
    host = {name.removesuffix("_per_s"): rate for name, rate in host_rates(runtime).items()}
    return OffloadRates(source=f"measured on {name}", cores=usable_cores(), matmul_flops=products, **host)


def measured_rates(sizes: Sizes, device: str, name: str) -> "Rates":
    """All of it, as the rates of a GPU of that name."""
    from src.model_utils import TORCH_DTYPES
    from src.predict.rates import FITTED, Rates

    slowness = cpu_slowness(device, sizes.seconds)
    forward, backward = attention_flops(sizes, device)
    return Rates(
        gpu=name,
        source=f"measured on {name}",
        matmul_flops={dtype: product_flops(dtype, sizes, device) for dtype in TORCH_DTYPES},
        attention_flops=forward,
        attention_backward_flops=backward,
        memory_bytes=memory_bytes(sizes, device),
        kernel_s=kernel_seconds(sizes, device),
        operation_s=FITTED.operation_s * slowness,
        triton_s=FITTED.triton_s * slowness,
        checkpointed_s=FITTED.checkpointed_s * slowness,
        offload=offload_rates(name) if device == "cuda" else None,  # a CPU has no PCIe to a host
    )


def _run() -> int:
    parser = program.Parser(
        prog="python -m src.predict.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the JSON to write, for --gpu_rates")
    file = parser.parse_args().file
    check_writable(file.parent)
    import torch

    from src.predict.rates import save

    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no CUDA GPU here, whose rates could be measured")
    rates = measured_rates(USUAL, "cuda", torch.cuda.get_device_name())
    save(rates, file)
    rows = [(f"products, {dtype}", f"{rate / 1e12:,.1f} TFLOP/s") for dtype, rate in rates.matmul_flops.items()]
    rows += [
        ("attention forwards", f"{rates.attention_flops / 1e12:,.1f} TFLOP/s"),
        ("attention backwards", f"{rates.attention_backward_flops / 1e12:,.1f} TFLOP/s"),
        ("memory, as a step gets it", f"{rates.memory_bytes / 1e12:,.2f} TB/s"),
        ("between two kernels", f"{rates.kernel_s * 1e6:,.1f} us"),
        ("an operation on the CPU", f"{rates.operation_s * 1e6:,.1f} us"),
        ("a Triton launch, estimated", f"{rates.triton_s * 1e6:,.1f} us"),
    ]
    rows += [
        ("host to GPU", f"{rates.offload.to_gpu_bytes / 1e9:,.1f} GB/s"),
        ("GPU to host", f"{rates.offload.to_host_bytes / 1e9:,.1f} GB/s"),
        (f"host memory, {rates.offload.cores} cores", f"{rates.offload.host_memory_bytes / 1e9:,.1f} GB/s"),
    ]
    print(f"{aligned_table(rows, 'lr')}\n\nrates    {file}")
    return 0


if __name__ == "__main__":
    program.begin()
    sys.exit(program.guarded(_run))
