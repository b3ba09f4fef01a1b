"""What a stack tells of a block: who in the program asked for it, in which phase, and what for.

Stacks come in three forms: Python frames only, C++ and Python frames mixed (PyTorch's default), and, for work of
autograd's threads recorded without C++ frames, none at all. The innermost frame comes first.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from src.explain.replay import Frame, Stack
from src.utils import printable

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"

_PYTHON = re.compile(r"\.pyx?$|^<")  # a notebook's cell is a .py file, or begins with <
_TORCH = re.compile(
    r"(^|/)(site|dist)-packages/(torch|triton)/|(^|/)torch/(_\w+|amp|autograd|cuda|distributed|functional|fx|jit|"
    r"library|nn|optim|overrides|profiler|utils)(/|\.py$)"
)
_NODE = re.compile(r"(\w+?)Backward\d*::|\b(AccumulateGrad)::")  # of autograd, in a C++ frame
_OPERATOR = re.compile(r"\bat::_ops::(\w+)")
_PLUMBING = re.compile(r"torch/(nn/modules/module|utils/_contextlib|_tensor|autograd/\w+)\.py$")

# Rules are regular expressions on "FILE:FUNCTION", in lower case. FILE is the whole path where a rule names a
# library's file. A rule for names alone sees the file's last part only for functions called "forward" or "backward",
# because a program may lie in a folder of any name.
_OPTIMIZER = re.compile(
    r"torch/optim/(?!lr_scheduler|swa_utils)|torch/amp/grad_scaler\.py|bitsandbytes/optim/|apex/(contrib/)?optimizers/|"
    r"deepspeed/ops/(adam|lamb|lion)/|torchao/optim/|galore_torch/|transformers/optimization\.py|"
    r"/optimizers?/[^:]*:(\w+\.)?step$|:(clip_grad_(norm|value)_*|\w*get_total_norm|\w*get_grad_norm\w*)$"
)
_STATE = re.compile(r":(\w+\.)?(_?init_group|init_state|get_state_buffer|_init_state|initialize_optimizer_states)$")
_MODULE = re.compile(r"torch/nn/modules/module\.py:(module\.)?_(wrapped_)?call_impl$|:(\w+\.)?forward$")
_BACKWARD = re.compile(
    r":(\w+\.)?backward$|:_engine_run_backward$|torch/utils/checkpoint\.py:(\w+\.)*(unpack_hook|recompute_fn)$"
)
_CHECKPOINT = re.compile(r"/checkpoint(ing)?\.py:")
_FILE_RULES = (
    (
        "gathered_parameters",
        r"all_?gather|:(\w+\.)?_?unshard$|zero/(partition_parameters|partitioned_param_coordinator)\.py:(?!.*reduce)",
    ),
    ("gradient_reduction", r":\S*(reduce_scatter|foreach_reduce|reduce_ipg_grads|average_tensor)|ddp_comm_hooks/"),
    (
        "parameters",
        r"torch/nn/modules/module\.py:(module\.)?(_apply|convert|to|cuda|to_empty|_load_from_state_dict)$|"
        r"torch/nn/(parameter|init)\.py:|torch/nn/modules/\w+\.py:(\w+\.)?(__init__|reset_parameters)$|"
        r"transformers/(modeling_utils|core_model_loading)\.py:|:(\w+\.)?(from_pretrained|load_state_dict|"
        r"set_module_tensor_to_device|load_checkpoint\w*)$|/safetensors/",
    ),
    ("inputs", r":(\w+\.)?(_prepare_inputs?|send_to_device|move_(data_)?to_device|get_batch|pin_memory)$"),
    ("hidden_states", r"torch/nn/modules/sparse\.py:"),
    ("norm", r"torch/nn/modules/\w*norm\w*\.py:"),
    ("logits_and_loss", r"torch/nn/modules/loss\.py:|transformers/loss/"),
    ("attention", r"transformers/integrations/\w*attention\w*\.py:|/cache_utils\.py:"),
    ("mlp", r"transformers/activations\.py:|torch/nn/modules/activation\.py:(?!multihead)"),
)
_NAME_RULES = (
    ("library_workspace", r"workspace|cublashandlepool"),
    ("gradient_reduction", r"c10d::reducer"),
    ("inputs", r"rotary_?emb(edding)?s?(\.forward|:forward)"),
    (
        "logits_and_loss",
        r"cross_?entropy|log_?softmax|nll_?loss|lm_?head|kl_?div|^logits?_|loss(?!_?scal)(function|_fn|backward)?$",
    ),
    ("attention", r"attention|attn|sdpa|rotary|rope(?!r)|rotate_half|repeat_kv|kv_?cache|scaleddotproduct"),
    ("mlp", r"(^|[^a-z])mlp|llamamlp|mlp(\.|:)|swiglu|geglu|silu|gelu|feed_?forward|(^|_)experts?|(^|_)moe"),
    ("norm", r"(layer|rms|group|batch|instance)_?norm|(^|\.)_?norm$|norm:"),
    ("hidden_states", r"^embedding|embeddingbackward"),
)
_RULES = [(name, re.compile(rule), True) for name, rule in _FILE_RULES]
_RULES += [(name, re.compile(rule), False) for name, rule in _NAME_RULES]
_OUTSIDE_MODULES = re.compile(r"(^|\.|_)(compute_loss|training_step|train_step|main|train|<module>)$")


@dataclass(frozen=True)
class Told:
    """What a stack tells."""

    origin: str  # who in the program asked, "" if nobody is named
    phase: str  # "" if nothing shows it
    category: str  # "" if nothing shows it
    makes_state: bool  # the optimizer sets up its state
    checkpointed: bool  # inside gradient checkpointing
    accumulates: bool  # autograd keeps a gradient
    multiplies: bool  # in PyTorch's linear layer
    calls: Stack  # the program's own forward functions, outermost first


@functools.cache
def _path(file: str) -> str:
    return file.replace("\\", "/")


@functools.cache
def _is_python(frame: Frame) -> bool:
    return bool(_PYTHON.search(frame[1])) and "::" not in frame[0]


@functools.cache
def _is_programs(frame: Frame) -> bool:
    return _is_python(frame) and not _TORCH.search(_path(frame[1]))


@functools.cache
def _key(frame: Frame) -> str:
    """What rules for files see."""
    name = frame[0] if _is_python(frame) else frame[0].replace("(anonymous namespace)::", "").partition("(")[0]
    return f"{_path(frame[1])}:{name}".lower()


def _category(frame: Frame) -> str:
    """What one frame says the memory is for, "" if nothing."""
    key = _key(frame)
    file, _, name = key.rpartition(":") if _is_python(frame) else ("", "", key.partition(":")[2])
    if _OUTSIDE_MODULES.search(name):
        return ""
    if name.rpartition(".")[2] in ("forward", "backward", "__call__"):
        name = f"{name} {file.rpartition('/')[2].removesuffix('.py')}:{name}" if "." not in name else name
    for category, rule, sees_path in _RULES:
        if rule.search(key if sees_path else name):
            return category
    return ""


def shown(frame: Frame) -> str:
    """A frame as a reader sees it."""
    return printable(f"{frame[0]} ({_path(frame[1]).rpartition('/')[2]}:{frame[2]})")


@functools.cache
def _node(frame: Frame) -> str:
    """What an autograd node of C++ does, "" if the frame is none."""
    found = None if _is_python(frame) else _NODE.search(frame[0])
    if not found:
        return ""
    return f"backward of {found[1]}" if found[1] else "gradient kept (AccumulateGrad)"


def origin(stack: Stack) -> str:
    """The program's own frame that asked, or the autograd node; else what is nearest to it."""
    for frame in stack:
        if _is_programs(frame):
            return shown(frame)
        if node := _node(frame):
            return node
    for frame in stack:
        if _is_python(frame) and not _PLUMBING.search(_path(frame[1])):
            return shown(frame)
    operators = (_OPERATOR.search(frame[0]) for frame in stack)
    return next((f"operator {found[1]}" for found in operators if found), "")


@dataclass(frozen=True)
class _Shows:
    """What one frame shows."""

    backward: bool
    module: bool
    optimizer: bool
    state: bool
    checkpoint: bool
    accumulates: bool
    multiplies: bool
    category: str


@functools.cache
def _shows(frame: Frame) -> _Shows:
    """What a frame shows; asked once for each, for thousands of stacks share it."""
    key = _key(frame)
    return _Shows(
        backward=bool(_node(frame) or "torch::autograd::engine" in key or _BACKWARD.search(key)),
        module=bool(_MODULE.search(key)),
        optimizer=bool(_OPTIMIZER.search(key)),
        state=bool(_STATE.search(key)),
        checkpoint=bool(_CHECKPOINT.search(key)),
        accumulates="accumulategrad::" in key,
        multiplies="torch/nn/modules/linear.py:" in key,
        category=_category(frame),
    )


def told(stack: Stack) -> Told:
    """What `stack` tells."""
    phase, category, in_module, makes_state = "", "", False, False
    frames = [_shows(frame) for frame in stack]
    for shows in frames:
        if shows.backward:
            phase = BACKWARD
        in_module = in_module or shows.module
        # With a closure, the model runs inside of `step`: what it asks for is not the optimizer's.
        if shows.optimizer and not phase and not in_module:
            phase = OPTIMIZER
        makes_state = makes_state or (phase == OPTIMIZER and shows.state)
        category = category or shows.category
    phase = phase or (FORWARD if in_module else "")
    return Told(
        origin=origin(stack),
        phase=phase,
        category="optimizer_temporaries" if phase == OPTIMIZER else category,
        makes_state=makes_state,
        checkpointed=any(shows.checkpoint for shows in frames),
        accumulates=any(shows.accumulates for shows in frames),
        multiplies=any(shows.multiplies for shows in frames),
        calls=tuple(_calls(stack)),
    )


def _calls(stack: Stack) -> Iterator[Frame]:
    """The program's own forward functions, outermost first."""
    for frame in reversed(stack):
        if _is_programs(frame) and frame[0].rpartition(".")[2] == "forward":
            yield frame


def by_siblings(tellings: list[Told]) -> list[str]:
    """The category of each stack; one that tells none has that of the others which went through the same call.

    `self.mlp(x)` in a decoder layer is one line: its activation function is known by name, its matrix products are not.
    A product that the model itself asks for, outside of its layers, makes the logits.
    """
    evidence: dict[Frame, set[str]] = {}
    for telling in tellings:
        if telling.category in ("attention", "mlp"):
            for call in telling.calls:
                evidence.setdefault(call, set()).add(telling.category)
    # Where only one of the two is known by name, its evidence stands for calls that lead to both.
    if len(set().union(*evidence.values())) < 2:
        evidence.clear()
    models = {telling.calls[0][:2] for telling in tellings if len(telling.calls) > 2}
    return [telling.category or _beside(telling, evidence, models) for telling in tellings]


def _beside(telling: Told, evidence: dict[Frame, set[str]], models: set[tuple[str, str]]) -> str:
    for call in telling.calls:  # the outermost that leads to one category only
        if len(evidence.get(call, ())) == 1:
            return next(iter(evidence[call]))
    if telling.multiplies and len(telling.calls) == 1 and telling.calls[0][:2] in models:
        return "logits_and_loss"
    return ""
