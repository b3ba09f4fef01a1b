"""What each operation of a step asks of a GPU: floating-point operations, and bytes that it reads and writes.

Operations of PyTorch are told by their schema, Triton kernels by their source: both say which tensors are read and
which are written. Each tensor is counted once for either; what a kernel reads again is taken to come from a cache.
"""

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from src.predict.live_memory import tensors_in

aten = torch.ops.aten
# What an operation is, as far as its time depends on it. "memory" and "triton" are bound by the bytes they move; "none"
# launches no kernel; in "wait" the CPU waits until the GPU has done everything before; "unknown" has arithmetic that
# nobody counts here, so that no time follows.
Unit = Literal["matmul", "attention", "attention_backward", "memory", "triton", "none", "wait", "unknown"]


class Work(NamedTuple):
    """One operation that the CPU carries out or launches."""

    operation: str
    unit: Unit
    dtype: torch.dtype | None = None
    flops: int = 0
    moved_bytes: int = 0
    checkpointed: bool = False  # Python handles each tensor that autograd keeps of it, as in a checkpointed layer


NO_KERNEL, WAIT = Work("no kernel", "none"), Work("wait", "wait")

# They make a tensor without a value of its own, and launch no kernel. Views are told by their schemas.
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
# They write to their first argument without reading it.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
# They look up a few numbers of their arguments: what they move is their result.
_LOOKING_UP = {"embedding", "gather", "index_select", "nll_loss_forward", "nll_loss_backward"}
# Products of a matrix, or several, with another: where in the arguments the two are.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}


class _Schema(NamedTuple):
    """What an operation's schema says of its arguments."""

    name: str
    has_kernel: bool
    read: tuple[bool, ...]
    written: tuple[bool, ...]
    names: tuple[str, ...]


@functools.cache
def _schema(func: Any) -> _Schema:
    schema = func._schema
    name = schema.name.partition("::")[2]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    read = [name not in _LOOKING_UP and not (a.is_out and w) for a, w in zip(schema.arguments, written)]
    if name in _OVERWRITING:
        read[0] = False
    has_kernel = not is_view and name not in _EMPTY
    return _Schema(name, has_kernel, tuple(read), tuple(written), tuple(a.name for a in schema.arguments))


def work_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Work | None:
    """What PyTorch's operation `func` asked for; None if it only looked at a tensor's description or named a part."""
    if func.namespace in ("prim", "profiler"):
        return None
    schema = _schema(func)
    if not schema.has_kernel:
        return NO_KERNEL
    values = [*args, *(kwargs.get(name) for name in schema.names[len(args) :])]
    moved = 0
    for value, read, written in zip(values, schema.read, schema.written):
        moved += (read + written) * sum(map(unique_bytes, tensors_in(value)))
    if not any(schema.written):
        moved += sum(map(unique_bytes, tensors_in(result)))
    if schema.name in _PRODUCTS:
        return _product(schema.name, values[_PRODUCTS[schema.name] :], moved)
    if schema.name.startswith("_scaled_dot_product"):
        return _attention(schema, values, moved)
    # What a library registers may do anything; PyTorch lists those of its own that multiply matrices.
    is_unknown = func.namespace != "aten" or func.overloadpacket in flop_registry
    return Work(schema.name, "unknown" if is_unknown else "memory", moved_bytes=moved)


def unique_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the numbers in a tensor; those that it repeats, where it is expanded, are in memory once."""
    if 0 not in tensor.stride():
        return tensor.numel() * tensor.element_size()
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride) * tensor.element_size()


def _product(name: str, matrices: Sequence[torch.Tensor], moved: int) -> Work:
    left, right = matrices[:2]
    return Work(name, "matmul", left.dtype, 2 * left.numel() * right.shape[-1], moved)


def _attention(schema: _Schema, values: Sequence[Any], moved: int) -> Work:
    """Products of queries x keys x width, 2 forwards and 5 backwards, 2 operations each.

    A causal mask leaves out half. How fast kernels are under other masks was not measured.
    """
    named = dict(zip(schema.names, values))
    (batch, heads, queries, width), keys = named["query"].shape, named["key"].shape[-2]
    is_backward = "backward" in schema.name
    flops = (10 if is_backward else 4) * batch * heads * queries * keys * width
    unit: Unit = "attention_backward" if is_backward else "attention"
    if named.get("attn_bias") is not None:
        unit = "unknown"
    return Work(schema.name, unit, named["query"].dtype, flops // 2 if named["is_causal"] else flops, moved)


def triton_work(kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Work:
    """What the launch of a Triton kernel asks for, by the tensors that it is given."""
    while hasattr(kernel, "fn"):  # what tunes it, and what compiles it
        kernel = kernel.fn
    traffic = _traffic(kernel)
    moved = sum(
        traffic.get(name, 1) * unique_bytes(tensor)
        for name, tensor in {**dict(zip(traffic, args)), **kwargs}.items()
        if isinstance(tensor, torch.Tensor)
    )
    return Work(kernel.__name__, "unknown" if _multiplies(kernel) else "triton", moved_bytes=moved)


@functools.cache
def _multiplies(kernel: Callable) -> bool:
    """Whether a Triton kernel, or one that it calls, multiplies matrices, whose sizes its tensors do not tell.

    Without a source it may.
    """
    nodes = list(ast.walk(_parsed(kernel)))
    if any(isinstance(node, ast.Attribute) and node.attr.startswith("dot") for node in nodes):
        return True
    names = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    called = [getattr(kernel.__globals__.get(name), "fn", None) for name in names]
    return len(nodes) == 1 or any(_multiplies(other) for other in called if other is not None)


@functools.cache
def _traffic(kernel: Callable) -> dict[str, int]:
    """Of each argument of a Triton kernel, in their order: 2 if it is read and written, else 1.

    Found in the source: what it loads from and stores to, followed through the assignments that make one pointer of
    another. An argument that it does neither with goes to a function of its own: counted once.
    """
    names = list(inspect.signature(kernel).parameters)
    roots: dict[str, set[str]] = {name: {name} for name in names}
    read, written = set(), set()
    for node in _in_order(_parsed(kernel)):
        if isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    roots[target.id] = _pointers(node.value, roots) | roots.get(target.id, set())
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            pointers, does = _pointers(node.args[0], roots), node.func.attr.partition("_")[0]
            read |= pointers if does in ("load", "atomic") else set()
            written |= pointers if does in ("store", "atomic") else set()
    return {name: max(1, (name in read) + (name in written)) for name in names}


def _parsed(kernel: Callable) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kernel)))
    except OSError:
        return ast.parse("")


def _in_order(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes as the source has them."""
    for child in ast.iter_child_nodes(tree):
        yield child
        yield from _in_order(child)


def _pointers(expression: ast.AST, roots: Mapping[str, set[str]]) -> set[str]:
    """The arguments that an address is made of; what it was loaded from is none of them."""
    if isinstance(expression, ast.Call):
        return set()
    if isinstance(expression, ast.Name):
        return roots.get(expression.id, set())
    return set().union(*(_pointers(child, roots) for child in ast.iter_child_nodes(expression)))
