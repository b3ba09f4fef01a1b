"""A GPU that is not there: tensors without data that report a CUDA device and take simulated memory.

Inside `FakeGpu.active()` code that asks for CUDA gets PyTorch's fake tensors. They carry shapes and dtypes through real
autograd, real optimizers and Liger's own Python wrappers; nothing is computed. PyTorch builds for CPUs cannot make fake
CUDA tensors, so the fakes are CPU tensors that say `cuda` to Python. What a GPU would allocate beyond the tensors that
operations return (library workspaces, temporaries inside kernels) is listed in `_TEMPORARIES`. All tensors are counted
as the GPU's, so are the numbers that some optimizers keep on the host, 512 bytes each.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from src.config import RunConfig
from src.machine import H100, Gpu
from src.predict.allocator import CachingAllocator, Piece
from src.predict.live_memory import LiveMemory
from src.predict.rates import Rates
from src.predict.work import WAIT, Work, triton_work, work_of
from src.utils import UsageError

aten = torch.ops.aten
_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")


def _matmul_workspace_bytes(card: Gpu) -> int:
    """cuBLAS workspace of one thread and stream (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
    return 4096 * 8 * 1024 if card.capability[0] == 9 else (4096 * 2 + 16 * 8) * 1024


def _embedding_backward_bytes(grad: torch.Tensor, indices: torch.Tensor, *_: Any) -> list[int]:
    """Sorted indices and partial sums per row (aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu)."""
    count = indices.numel()
    if count <= 3072:
        return []
    rows = count + count // 10  # at most this many partial sums, in fp32
    return [8 * count] * 6 + [8 * rows, 4 * rows * grad.shape[-1]]


def _cudnn_attention_backward_bytes(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> list[int]:
    """cuDNN's workspace: dQ and a row sum in fp32 and, with grouped queries, dK and dV of every query head.

    Found on an H100 with PyTorch 2.11 and cuDNN 9: 129 MiB in the snapshot of 8 x 1024 tokens, 32 heads of 64 and 8
    key heads. On an H200 the same holds to 1 KiB for one sequence of 8,192 to 1,048,576 tokens
    (doc/data/long/attention_h200.jsonl, whose workspace has the forward pass's row sums in it, freed at the end). So it
    does, to 256 bytes, for Gemma 3's heads of 256 in a snapshot of 4 x 1024 tokens there: 16,843,008 bytes under the
    mask of a sliding window, where keys are repeated for every head before, and 33,620,224 in layers without.
    """
    batch, heads, length, width = query.shape
    rows = batch * heads * length
    grouped = 2 * 2 * rows * width if key.shape[1] != heads else 0
    return [4 * rows * width + 4 * rows + grouped]


def _flash_attention_backward_bytes(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> list[int]:
    """FlashAttention 2's fp32 dQ, row sums, and ungrouped dK and dV (aten/.../cuda/flash_attn/flash_api.cpp)."""
    batch, heads, length, width = query.shape
    rows = batch * heads * (-(-length // 128) * 128)
    grouped = [2 * batch * heads * length * width] * 2 if key.shape[1] != heads else []
    return [4 * rows, 4 * rows * (-(-width // 32) * 32), *grouped]


def _softmax_backward_bytes(grad: torch.Tensor, *_: Any) -> list[int]:
    """The product of gradient and output (aten/src/ATen/native/cuda/SoftMax.cu)."""
    return [grad.numel() * grad.element_size()]


def _logsumexp_bytes(values: torch.Tensor, dims: Sequence[int], *_: Any) -> list[int]:
    """The maxima, and the exponentials of what is left without them (aten/src/ATen/native/ReduceOps.cpp)."""
    reduced = math.prod(values.shape[dim] for dim in dims)
    return [values.nbytes // reduced, values.nbytes]


# Memory that a CUDA kernel takes and gives back while it runs, besides its outputs: bytes of each request.
_TEMPORARIES: dict[Callable, Callable[..., list[int]]] = {
    aten.embedding_dense_backward.default: _embedding_backward_bytes,
    aten._softmax_backward_data.default: _softmax_backward_bytes,
    aten.logsumexp.default: _logsumexp_bytes,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_attention_backward_bytes,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward_bytes,
}

# The CPU goes on only once the GPU has done everything before.
_WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}

_MATMULS = {aten.mm.default, aten.mm.out, aten.bmm.default, aten.addmm.default, aten.addmm.out, aten.baddbmm.default}


@dataclass(eq=False)
class Allocation:
    """One request for memory: when, by what, and where it went."""

    size: int
    address: int
    phase: str
    module: str  # who asked for it, as src/explain/recording.py labels it
    operation: str
    frames: tuple[tuple[str, int, str], ...]  # (file, line, function), innermost first
    owner: str = ""  # its category, where src/explain/recording.py noted one


class FakeGpu(LiveMemory):
    """Gives fake tensors memory on a simulated `card`, and remembers every request.

    `limit_bytes` bounds what can be reserved; without it everything fits.
    """

    def __init__(self, card: Gpu = H100, limit_bytes: int | None = None) -> None:
        super().__init__(CachingAllocator(limit_bytes))
        self.card = card
        self.phase = "load"
        self.phase_starts: list[tuple[int, str]] = []  # (number of the first event, phase)
        self.events: list[tuple[str, Allocation]] = []  # ("alloc" | "free", which), in order
        self.allocations: dict[Piece, Allocation] = {}  # of the live blocks
        self.record_frames = False
        self.load_peak_bytes = 0  # while what runs was built
        self.works: list[Work] | None = None  # what operations ask of the GPU, in their order; None: not counted
        self._module = ""
        self._inside_operation = False
        self._workspaces: set[bool] = set()  # cuBLAS keeps one for the main thread and one for autograd's

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let everything in the block run on this GPU."""
        with contextlib.ExitStack() as stack:
            for patch in self._patches():
                stack.enter_context(patch)
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what a library compiles runs as it is
            # An operation without a shape rule must fail rather than allocate real gigabytes.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False))
            stack.enter_context(self)
            yield

    def host_peak_bytes(self) -> int | None:
        """Host memory that the whole job has taken at most; None: not simulated."""
        return None

    def floor(self, model: torch.nn.Module, config: RunConfig, rates: Rates) -> dict[str, float] | None:
        """What a step must at least take, and what that is made of; None: nothing is offloaded, or it is not known."""
        return None

    def begin_steps(self) -> None:
        """What runs is built; its first step follows."""

    def begin_counting(self) -> None:
        """From now on, note what operations ask of the GPU."""
        self.works = []

    def end_counting(self) -> list[Work] | None:
        """What they asked for since then; None: not counted."""
        works, self.works = self.works, None
        return works

    def set_label(self, label: str) -> None:
        """Who asks for memory from now on: "module|operation"."""
        self._module = label.partition("|")[0]

    def own(self, category: str, tensor: torch.Tensor) -> None:
        """Note what the block of `tensor` is for."""
        block = self.block_of(tensor)
        if block is not None:
            self.allocations[block].owner = category

    def enter_phase(self, phase: str) -> None:
        """Another phase of the step begins."""
        self.phase = phase
        self.phase_starts.append((len(self.events), phase))

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor in parts, as a quantised one: what it does with each of them comes here
        if func in _WAITING and self.works is not None:
            self.works.append(WAIT)
        if func is aten._local_scalar_dense.default:
            return _any_value(args[0].dtype)
        if func is aten.equal.default:
            return True
        if func is aten._fused_sgd_.default:  # works in place; PyTorch has no shape rule for it
            self._note_work(func, args, kwargs or {}, None)
            return None
        if func is aten.nonzero.default:  # as if every element counted: no result is larger
            func, args = aten.new_empty.default, (args[0], (args[0].numel(), args[0].dim()))
            kwargs = {"dtype": torch.int64}
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        inside, self._inside_operation = self._inside_operation, True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside_operation = inside
        self._take_temporaries(func, args)
        self._note_work(func, args, kwargs, result)
        return result

    def _few(self, *tiles: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """In place of `one_by_one`: the first two and the last, and the work of the second as often as it is there.

        From the second on each finds the same free blocks, and leaves them.
        """
        each = list(zip(*tiles))
        if len(each) <= 3:
            yield from each
            return
        yield each[0]
        start = 0 if self.works is None else len(self.works)
        yield each[1]
        if self.works is not None:
            self.works += self.works[start:] * (len(each) - 3)
        yield each[-1]

    def _note_work(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        if self.works is not None and (work := work_of(func, args, kwargs, result)) is not None:
            self._append(work)

    def _append(self, work: Work) -> None:
        has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self.works.append(work._replace(checkpointed=True) if has_hooks else work)

    def allocate(self, count: int, func: Callable | None) -> Piece:
        block = super().allocate(count, func)
        allocation = Allocation(
            size=block.size,
            address=block.address,
            phase=self.phase,
            module=self._module,
            operation=str(func) if func is not None else "workspace",
            frames=_frames() if self.record_frames else (),
            owner="library_workspace" if func is None else "",
        )
        self.allocations[block] = allocation
        self.events.append(("alloc", allocation))
        return block

    def free(self, block: Piece) -> None:
        super().free(block)
        self.events.append(("free", self.allocations.pop(block)))

    def _take_temporaries(self, func: Callable, args: Sequence[Any]) -> None:
        """What a kernel takes besides its outputs, and gives back at its end."""
        if func in _MATMULS:
            thread = torch._C._current_autograd_node() is not None
            if thread not in self._workspaces:
                self._workspaces.add(thread)
                self.allocate(_matmul_workspace_bytes(self.card), None)
        if func in _TEMPORARIES:
            for block in [self.allocate(count, func) for count in _TEMPORARIES[func](*args)]:
                self.free(block)

    def _patches(self) -> Iterator[contextlib.AbstractContextManager]:
        """Everything that would ask a real GPU, or that treats fake tensors unlike real ones."""
        card = self.card
        properties = SimpleNamespace(
            name=card.name,
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=card.memory_bytes,
            multi_processor_count=card.multiprocessors,
            gcnArchName="",
        )

        def device(tensor: FakeTensor) -> torch.device:
            if tensor.fake_mode.in_kernel_invocation:
                return torch.device("meta")
            return tensor.fake_device if self._inside_operation else _CUDA

        yield mock.patch.object(FakeTensor, "device", property(device))
        yield mock.patch.object(FakeTensor, "is_cuda", property(lambda tensor: True), create=True)
        replacements = {
            "torch.cuda._initialized": False,
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.device": lambda device: contextlib.nullcontext(),
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.is_bf16_supported": lambda including_emulation=True: card.capability[0] >= 8,
            "torch.cuda.get_device_capability": lambda device=None: card.capability,
            "torch.cuda.get_device_properties": lambda device=None: properties,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.nn.functional.scaled_dot_product_attention": _attention,
            "transformers.masking_utils.is_tracing": lambda *_: False,
            "src.techniques.tiles.one_by_one": self._few,
            "torch.is_autocast_enabled": lambda device_type="cuda": _autocast_is_enabled("cpu"),
            "torch.get_autocast_dtype": lambda device_type="cuda": _autocast_dtype("cpu"),
        }

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            """A launch writes to memory that its caller allocated, so leaving it out changes no peak."""
            if self.works is not None:
                self._append(triton_work(kernel, args, kwargs))

        for launcher in (
            "triton.runtime.jit.JITFunction",
            "triton.runtime.interpreter.InterpretedFunction",
            "triton.runtime.autotuner.Autotuner",
            "triton.runtime.autotuner.Heuristics",
        ):
            replacements[f"{launcher}.run"] = launch
        for name, replacement in replacements.items():
            yield mock.patch(name, replacement)
        yield mock.patch.object(torch.nn.Module, "_apply", _convert)
        yield mock.patch.object(torch.amp.autocast, "__init__", _autocast_of_fakes)


def _convert(module: torch.nn.Module, convert: Callable, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, which would exchange fake parameters for others, and cannot while anything else holds them."""
    for part in module.modules() if recurse else (module,):
        for parameter in part.parameters(recurse=False):
            new = convert(parameter.detach())
            if new.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
                parameter.data = new
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = convert(buffer)
    return module


_autocast = torch.amp.autocast.__init__
_autocast_is_enabled, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


def _autocast_of_fakes(self: torch.amp.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    """Autocast as PyTorch dispatches it for fake tensors, which are the CPU's: of what a decoder runs, to the same."""
    _autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _any_value(dtype: torch.dtype) -> bool | int | float:
    """A stand-in for a number that would have to be computed; shapes here do not depend on any."""
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention through the kernel that PyTorch picks on a GPU.

    Half precision takes cuDNN's on Hopper, for heads of up to 256, and FlashAttention elsewhere; neither makes a length
    x length tensor. In fp32 only the plain formula takes grouped queries
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    if _autocast_is_enabled("cpu"):
        query, key, value = (tensor.to(_autocast_dtype("cpu")) for tensor in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and torch.cuda.get_device_capability()[0] == 9 and query.shape[-1] <= 256:
        bias = None if attn_mask is None else _as_numbers(attn_mask, query.dtype)
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, query.requires_grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if half and attn_mask is not None:  # no record says which kernel PyTorch takes then, nor what that needs
        raise UsageError(
            "attention under a mask, as of a sliding window that a sequence fills, is not predicted in half precision "
            "for this GPU: take a --seq_length that is no longer than the window, or a script's --attention eager"
        )
    if half:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def _as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores, as PyTorch makes it of one that says what may be seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, *(torch.tensor(number, dtype=dtype, device=mask.device) for number in (0, -torch.inf)))


def _frames() -> tuple[tuple[str, int, str], ...]:
    """The Python stack outside this module and PyTorch's dispatching, innermost first."""
    frames, frame = [], sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("src.predict.fake_gpu", "src.predict.live_memory", "torch._dynamo", "torch._compile")):
            frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(frames)
