"""The lines to copy: this repository's command, and the same for Hugging Face's Trainer or plain PyTorch."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping

from src import families
from src.config import RunConfig, flag_of
from src.techniques import KERNEL_NAMES

# What a command need not say: that it is a dry run, for which card, and where.
_LEFT_OUT = ("dry_run", "device", "gpu_memory_gib", "gpu_rates")
_SCRIPTS = {"all_gpu": ("python", "all_gpu_liger_kernel.py"), "deepspeed": ("bash", "run_ds.sh")}
_DEEPSPEED = """\
# The Trainer takes a configuration of DeepSpeed's: stage 3, offload_param and offload_optimizer to the CPU.
# What this repository's script hands over, with its faster Adam, is in src/ds_utils.py."""
_GRAPH = """\
# The Trainer cannot capture a step; this repository's GraphedStep can, in a loop of your own:
from src.measure.graph import GraphedStep
step = GraphedStep(step, on_capture=lambda peak_bytes: None)  # step(mark) runs one step and returns its loss"""
_IN_BACKWARD = """\
def update(weight, optimizer):
    optimizer.step()
    optimizer.zero_grad()
for weight in model.parameters():  # instead of the Trainer's optimizer, and without clipping: a loop of your own
    own = {optimizer}
    weight.register_post_accumulate_grad_hook(functools.partial(update, optimizer=own))"""
_OPTIMIZERS = {
    "adamw_fused": "torch.optim.AdamW([weight], lr=learning_rate, fused=True)",
    "adafactor": "torch.optim.Adafactor([weight], lr=learning_rate)",
}
_MLP = """\
for layer in model.model.layers{spaced}:
    layer.mlp.forward = functools.partial(checkpoint, layer.mlp.forward, {kwargs})"""
_IN_TILES = """\
for layer in model.model.layers:
    weights = [weight for weight in layer.mlp.parameters() if weight.requires_grad]
    layer.mlp.forward = functools.partial(in_tiles, layer.mlp.forward, weights, {tokens})"""
_ON_HOST = """\
keep = functools.partial(HostCheckpoints().call, use_reentrant=False)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
for layer in model.model.layers:
    layer._gradient_checkpointing_func = keep"""
_LORA = """\
model = get_peft_model(model, LoraConfig(r={rank}, lora_alpha={alpha}, target_modules="all-linear"))"""
_CHUNKED = """\
model.forward = MethodType(forward_with(chunked, {{"chunks": {chunks}}}), model)  # it takes input_ids and labels"""


def command(config: RunConfig) -> str:
    """What measures a run here."""
    return shlex.join(words(config))


def words(config: RunConfig) -> list[str]:
    """The same, word by word: the script, and the flags of what differs from its defaults."""
    found = list(_SCRIPTS[config.script])
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value != config.usual(f) and f.name not in _LEFT_OUT:
            found += [f"--{flag_of(f)}", str(int(value) if isinstance(value, bool) else value)]
    return found


def python(config: RunConfig) -> str:
    """The same for the Trainer, as far as it has switches, and plain PyTorch beside it."""
    if config.script == "deepspeed":
        return _DEEPSPEED
    before = list(_before_trainer(config))
    return "\n".join([*_imports(config), "", *_model(config), *before, *_trainer(config), *_after_trainer(config)])


def _imports(config: RunConfig) -> Iterator[str]:
    if _uses_functools(config):
        yield "import functools"
    yield "import torch"
    if config.lora_rank:
        yield "from peft import LoraConfig, get_peft_model"
    yield "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments"
    if _liger_by_hand(config):
        yield "from transformers.integrations.liger import apply_liger_kernel"
    if config.checkpoint_part == "mlp":
        yield "from torch.utils.checkpoint import checkpoint"
    if config.mlp_tile_tokens:
        yield "from src.techniques.tiles import in_tiles  # of this repository"
    if config.checkpoint_offload == "overlapped":
        yield "from src.techniques.host_checkpoints import HostCheckpoints  # of this repository"
    if config.loss == "chunked":
        yield "from types import MethodType"
        yield "from src.techniques.loss_functions import chunked, forward_with  # of this repository"


def _uses_functools(config: RunConfig) -> bool:
    own = config.checkpoint_part == "mlp" or config.mlp_tile_tokens or config.checkpoint_offload != "none"
    return bool(own or config.flce_chunks > 1 or config.optimizer_in_backward)


def _model(config: RunConfig) -> Iterator[str]:
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[config.dtype]
    if config.dtype == "fp16":
        yield "# For measuring: the Trainer scales no loss of a model in fp16, whose gradients underflow. bf16 trains."
    yield f'model = AutoModelForCausalLM.from_pretrained("{config.model_name}", dtype=torch.{dtype})'


def _liger_by_hand(config: RunConfig) -> bool:
    """Whether Liger's kernels must be there before something else is put on top of them.

    The Trainer puts them into the model only as it begins to train, and would overwrite that.
    """
    on_top = config.flce_chunks > 1 or config.mlp_tile_tokens or config.checkpoint_part == "mlp"
    return bool(config.kernels and on_top)


def _before_trainer(config: RunConfig) -> Iterator[str]:
    if config.lora_rank:
        yield _LORA.format(rank=config.lora_rank, alpha=config.lora_alpha)
    if config.loss == "chunked":
        yield _CHUNKED.format(chunks=config.loss_chunks)
    if _liger_by_hand(config):
        yield f"apply_liger_kernel(model, {_switches(config)})"
    if config.mlp_tile_tokens:
        yield _IN_TILES.format(tokens=config.mlp_tile_tokens)
    if config.checkpoint_part == "mlp":
        spaced = f"[::{config.checkpoint_every}]" if config.checkpoint_every > 1 else ""
        kwargs = ", ".join(f"{name}={value}" for name, value in _checkpoint_kwargs(config).items())
        yield _MLP.format(spaced=spaced, kwargs=kwargs)
    if config.flce_chunks > 1:
        yield f"model.forward = functools.partial(model.forward, chunk_mem_const={config.flce_chunks})"
    if config.checkpoint_offload == "overlapped":
        yield _ON_HOST


def _checkpoint_kwargs(config: RunConfig) -> dict[str, bool | int]:
    """What PyTorch's checkpoint is told. A graph cannot hold the reading of random numbers' state, which waits."""
    return {"use_reentrant": False} | ({"preserve_rng_state": False} if config.cuda_graph else {})


def _trainer(config: RunConfig) -> Iterator[str]:
    yield "arguments = TrainingArguments("
    yield '    output_dir="out",'
    yield f"    per_device_train_batch_size={config.batch_size},"
    yield "    max_grad_norm=0.0,  # clipping is no part of the prediction"
    optimizer = {"adamw_fused": "adamw_torch_fused", "adafactor": "adafactor"}[config.optimizer]
    yield f'    optim="{optimizer}",'
    if config.kernels and not _liger_by_hand(config):
        yield "    use_liger_kernel=True,"
        yield f"    liger_kernel_config={_switches(config)},"
    if config.gradient_checkpointing and (config.checkpoint_part, config.checkpoint_offload) == ("layer", "none"):
        yield "    gradient_checkpointing=True,"
        every = {"every_n_layers": config.checkpoint_every} if config.checkpoint_every > 1 else {}
        yield f"    gradient_checkpointing_kwargs={_dict(_checkpoint_kwargs(config) | every)},"
    yield ")"
    yield f"trainer = Trainer(model=model, args=arguments, train_dataset=...)  # of {config.seq_length} tokens each"


def _switches(config: RunConfig) -> str:
    """Liger's own names of the kernels, and its cross-entropy off: alone it is for models that make logits."""
    names = _family(config).liger_switches
    switches = {names[kernel]: getattr(config, kernel) for kernel in KERNEL_NAMES if kernel in names}
    return _dict(switches | {"cross_entropy": False})


def _dict(values: Mapping[str, bool | int]) -> str:
    """As Python writes it, with the quotation marks that the other lines have."""
    return json.dumps(values).replace("true", "True").replace("false", "False")


def _family(config: RunConfig) -> families.Family:
    known = families.shipped(config.model_name)
    if known is not None:
        return known[0]
    from src.model_utils import family_of, load_model_config  # they import torch, which few lines need

    return family_of(load_model_config(config))


def _after_trainer(config: RunConfig) -> Iterator[str]:
    if config.optimizer_in_backward:
        yield _IN_BACKWARD.format(optimizer=_OPTIMIZERS[config.optimizer])
    if config.cuda_graph:
        yield _GRAPH
