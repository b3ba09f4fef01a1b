"""How fast a GPU works through what a step asks of it, and how fast its CPU launches that.

Few numbers, each with a meaning of its own, so that what holds for one model holds for another: an operation takes as
long as its arithmetic or its memory traffic, whichever is longer, and a moment to begin.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from src.machine import GPUS, H100, H200, Gpu, gpu_named
from src.model_utils import TORCH_DTYPES
from src.predict.work import Work
from src.utils import UsageError, first_line

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class OffloadRates:
    """What the floor of an offloaded step is made of, see src/offload/floor.py. FLOP/s and bytes/s, at best.

    Of one GPU, and of the host beside it: no data sheet of a GPU tells these.
    """

    source: str  # where the numbers come from, for a person
    cores: int  # of the host that the process could use
    # Of one large product, by dtype, where it is known. More than `Rates.matmul_flops`, which those of a model reach:
    # with them the floor would not be one.
    matmul_flops: Mapping[str, float]
    to_gpu_bytes: float  # over PCIe
    to_host_bytes: float
    host_memory_bytes: float  # read and written, as Adam does


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a training step gets out of a GPU and its CPU. FLOP, bytes and seconds."""

    gpu: str
    source: str  # where the numbers come from, for a person
    matmul_flops: Mapping[str, float]  # FLOP/s by dtype
    attention_flops: float  # FLOP/s in 16 bits, forwards; a causal mask halves the FLOP
    attention_backward_flops: float
    memory_bytes: float  # bytes/s, read and written
    kernel_s: float  # from the end of one kernel until the next one works
    operation_s: float  # of the CPU, for each operation of PyTorch's, with the Python code around it
    triton_s: float  # of the CPU, for each launch of a Triton kernel, with the Python code around it
    checkpointed_s: float  # of the CPU, more for each of them in a part that is checkpointed, or computed again
    offload: OffloadRates | None = None  # None: not known, also in files of earlier versions

    def seconds(self, work: Work) -> float:
        """How long the GPU works on an operation."""
        if work.unit in ("none", "wait"):
            return 0.0
        arithmetic = work.flops / self._flops(work) if work.flops else 0.0
        return max(arithmetic, work.moved_bytes / self.memory_bytes) + self.kernel_s

    def cpu_seconds(self, work: Work) -> float:
        """How long the CPU is busy with an operation; a wait is none."""
        own = {"triton": self.triton_s, "wait": 0.0}.get(work.unit, self.operation_s)
        return own + self.checkpointed_s if work.checkpointed else own

    def _flops(self, work: Work) -> float:
        """FLOP/s. A dtype that has no rate of its own, such as fp64, is taken to be as slow as fp32."""
        products = self.matmul_flops.get(_NAMES.get(work.dtype, "fp32"), self.matmul_flops["fp32"])
        if work.unit == "matmul":
            return products
        rate = self.attention_flops if work.unit == "attention" else self.attention_backward_flops
        return rate * products / self.matmul_flops["bf16"]

    def without_launches(self) -> "Rates":
        """Of a step that is one CUDA graph: the CPU launches it at once."""
        return dataclasses.replace(self, operation_s=0.0, triton_s=0.0, checkpointed_s=0.0)


_FAR = 1e9  # times faster or slower than an H100, and a rate is a mistake: times made of it would have no meaning

# By src/study/fit_rates.py, which says how far off these predictions are.
FITTED = Rates(
    gpu=H100.name,
    source="fitted to steps measured on an H100",
    matmul_flops={"bf16": 673e12, "fp16": 673e12, "fp32": 47.3e12},
    attention_flops=485e12,
    attention_backward_flops=401e12,
    memory_bytes=2.47e12,
    kernel_s=2.3e-6,
    operation_s=15.4e-6,
    triton_s=105e-6,
    checkpointed_s=8.9e-6,
    # Of the records under doc/data/, see tests/test_offload_floor.py.
    offload=OffloadRates(
        source="medians of 88 floors measured on one H100 with 16 cores",
        cores=16,
        matmul_flops={"bf16": 753e12, "fp16": 734e12},
        to_gpu_bytes=54.8e9,
        to_host_bytes=54.9e9,
        host_memory_bytes=130e9,
    ),
)


# The same processor beside faster memory: only that rate was fitted (`--only memory_bytes`).
FITTED_H200 = dataclasses.replace(
    FITTED,
    gpu=H200.name,
    source="those of an H100, with memory's fitted to steps measured on an H200",
    memory_bytes=2.98e12,
    offload=None,  # nobody took the median of what its machines measured
)


def of_card(card: Gpu) -> Rates | None:
    """The rates of a GPU: fitted, or the shares of its data sheet that an H100 reaches; None where that is unknown."""
    for fitted in (FITTED, FITTED_H200):
        if card.name == fitted.gpu:
            return fitted
    card = GPUS.get(card.name, card)  # what PyTorch tells of a GPU has no data sheet
    if card.peak_flops is None or card.memory_bytes_per_s is None:
        return None
    products = {
        dtype: rate * card.peak_flops[dtype] / H100.peak_flops[dtype] for dtype, rate in FITTED.matmul_flops.items()
    }
    faster = products["bf16"] / FITTED.matmul_flops["bf16"]
    return dataclasses.replace(
        FITTED,
        gpu=card.name,
        source=f"its data sheet, of which an H100 reaches {FITTED.matmul_flops['bf16'] / H100.peak_flops['bf16']:.0%} "
        f"in products and {FITTED.memory_bytes / H100.memory_bytes_per_s:.0%} in memory",
        matmul_flops=products,
        attention_flops=FITTED.attention_flops * faster,
        attention_backward_flops=FITTED.attention_backward_flops * faster,
        memory_bytes=FITTED.memory_bytes * card.memory_bytes_per_s / H100.memory_bytes_per_s,
        offload=None,
    )


def rates_asked_for(name: str | None, card: Gpu) -> Rates | None:
    """The rates that --gpu_rates names, a GPU or a file of src/predict/calibrate.py; without it those of `card`."""
    if name is None:
        return of_card(card)
    try:
        return of_card(gpu_named(name))
    except UsageError:
        return load(Path(name))


def save(rates: Rates, path: Path) -> None:
    """Write them as JSON. Raises OSError."""
    path.write_text(json.dumps(dataclasses.asdict(rates), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Rates:
    """Read them back. Raises `UsageError` if the file has none, or such as no machine has."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        offload = values.get("offload")
        rates = Rates(**values | {"offload": None if offload is None else OffloadRates(**offload)})
        words = [rates.gpu, rates.source] + ([] if rates.offload is None else [rates.offload.source])
        if not all(isinstance(word, str) for word in words):
            raise ValueError("gpu and source must be words")
        for name, number, usual in _numbers(rates):
            if not usual / _FAR <= number <= usual * _FAR:
                raise ValueError(f"{name} is {number}, where an H100 has {usual:g}")
        return rates
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        known = ", ".join(gpu.word for gpu in GPUS.values())
        raise UsageError(f"--gpu_rates {path}: no file of rates ({first_line(error)}), nor one of: {known}") from error


def _numbers(rates: Rates) -> Iterator[tuple[str, float, float]]:
    """Name and value of each rate, beside the H100's."""
    for dtype in TORCH_DTYPES:
        yield f"matmul_flops of {dtype}", rates.matmul_flops[dtype], FITTED.matmul_flops[dtype]
    for name, number in vars(rates).items():
        if name not in ("gpu", "source", "matmul_flops", "offload"):
            yield name, number, getattr(FITTED, name)
    if rates.offload is not None:
        for dtype, number in rates.offload.matmul_flops.items():
            yield f"offload's matmul_flops of {dtype}", number, FITTED.matmul_flops[dtype]
        for name in ("cores", "to_gpu_bytes", "to_host_bytes", "host_memory_bytes"):
            yield f"offload's {name}", getattr(rates.offload, name), getattr(FITTED.offload, name)
