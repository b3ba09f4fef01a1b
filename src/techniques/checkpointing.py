"""What of the forward pass is kept for the backward pass, where, and what is computed again."""

import functools
from typing import Any

from src.techniques.technique import Config, Model, Technique


def _checkpoint(model: Model, config: Config) -> None:
    if not config.gradient_checkpointing:
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if config.cuda_graph:
        kwargs["preserve_rng_state"] = False  # reading it waits for the GPU; nothing here is random
    if config.checkpoint_part == "mlp":
        _checkpoint_mlps(model, config.checkpoint_every, kwargs)
        return
    offload = {"offload": True} if config.checkpoint_offload == "blocking" else {}
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs=kwargs, every_n_layers=config.checkpoint_every, **offload
    )
    if config.checkpoint_offload == "overlapped":
        from src.techniques.host_checkpoints import HostCheckpoints

        kept = HostCheckpoints(ahead=not config.attention_kept)
        for index, layer in enumerate(model.model.layers):
            keeps = index < config.attention_kept
            layer._gradient_checkpointing_func = functools.partial(kept.call, keep_attention=keeps, **kwargs)


def _checkpoint_mlps(model: Model, every: int, kwargs: dict[str, Any]) -> None:
    from torch.utils.checkpoint import checkpoint

    for layer in model.model.layers[::every]:
        layer.mlp.forward = functools.partial(checkpoint, layer.mlp.forward, **kwargs)


def _tile(model: Model, config: Config) -> None:
    """By number with Liger's function, by size with ours, which an optimizer in the backward pass can use."""
    if config.mlp_tile_tokens:
        from src.techniques.tiles import in_tiles

        for layer in model.model.layers:
            weights = [weight for weight in layer.mlp.parameters() if weight.requires_grad]
            layer.mlp.forward = functools.partial(in_tiles, layer.mlp.forward, weights, config.mlp_tile_tokens)
    if config.mlp_tiles == 1:
        return
    from liger_kernel.ops import apply_tiled_mlp

    for layer in model.model.layers:
        whole = layer.mlp.forward
        layer.mlp.forward = functools.partial(
            apply_tiled_mlp,
            lambda _, tokens, whole=whole: whole(tokens),
            layer.mlp,
            num_shards=config.mlp_tiles,
            compute_params=list(layer.mlp.parameters()),
        )


def _refusal_of_offload(config: Config) -> str | None:
    if config.checkpoint_offload == "none":
        return None
    if config.checkpoint_part == "mlp":
        return "--checkpoint_offload moves the layers' inputs, which --checkpoint_part mlp does not keep"
    if config.checkpoint_offload == "blocking" and config.script != "all_gpu":
        return "--checkpoint_offload blocking is for one GPU: overlapped"
    if config.cuda_graph:
        return "--checkpoint_offload waits for copies, which --cuda_graph 1 cannot hold"
    return None


def _refusal_of_tiles(config: Config) -> str | None:
    if config.mlp_tiles > 1 and config.optimizer_in_backward:
        return "--mlp_tiles adds up the MLPs' gradients tile by tile: --optimizer_in_backward 1 would take a part"
    if config.mlp_tiles > 1 and config.mlp_tile_tokens:
        return "--mlp_tiles says how many pieces, --mlp_tile_tokens how large they are: one of them"
    return None


def _refusal_of_tile_tokens(config: Config) -> str | None:
    """ZeRO-3 that fetches weight by weight has let those go that a tile's backward pass needs."""
    if config.mlp_tile_tokens and config.script == "deepspeed" and not config.fetch_layers:
        return "--mlp_tile_tokens under ZeRO-3 needs whole layers: --fetch_layers 1, as --preset fast and longest have"
    return None


def _refusal_of_kept_attention(config: Config) -> str | None:
    if not config.attention_kept:
        return None
    if config.checkpoint_offload != "overlapped":
        return "--attention_kept keeps it on the host, with --checkpoint_offload overlapped"
    if config.attention != "sdpa":
        return f"--attention_kept keeps what --attention sdpa returns, not {config.attention}"
    if config.device == "cuda" and config.compute_dtype == "fp32":
        return "--attention_kept needs bf16 or fp16: in fp32 attention is no fused kernel"
    return None


CHECKPOINTING = (
    # Before checkpoints: those are made of what this leaves.
    Technique(
        name="mlp_tiles",
        default=1,
        help="Liger's tiled MLP: so many pieces of a sequence, one after the other, each computed again backwards",
        tag="tiles",
        bounds=(1, 2**16),
        scripts=("all_gpu",),
        compared=True,
        changes_numerics=True,
        refusal=_refusal_of_tiles,
        to_model=_tile,
    ),
    Technique(
        name="mlp_tile_tokens",
        default=0,
        help="tiled MLP with pieces of so many tokens, whatever the length; 0: in one piece",
        tag="tiletokens",
        bounds=(0, 2**31),
        compared=True,
        changes_numerics=True,
        refusal=_refusal_of_tile_tokens,
    ),
    Technique(
        name="gradient_checkpointing",
        default=True,
        help="recompute each layer in the backward pass",
        tag="gc",
        to_model=_checkpoint,
    ),
    Technique(
        name="checkpoint_every",
        default=1,
        help="recompute every N-th layer only, from the first; the others keep their activations",
        tag="every",
        bounds=(1, 1024),
        needs=("gradient_checkpointing",),
        compared=True,
    ),
    Technique(
        name="checkpoint_part",
        default="layer",
        help="what is recomputed: the layer, or its MLP alone",
        tag="part-",
        choices=("layer", "mlp"),
        scripts=("all_gpu",),
        needs=("gradient_checkpointing",),
        compared=True,
    ),
    Technique(
        name="checkpoint_offload",
        default="none",
        help="keep the layers' inputs on the host: blocking, as transformers copies them, or overlapped with the step",
        tag="offload-",
        choices=("none", "blocking", "overlapped"),
        needs=("gradient_checkpointing",),
        compared=True,
        refusal=_refusal_of_offload,
        gpu_only=lambda config: config.checkpoint_offload == "blocking",
    ),
    Technique(
        name="attention_kept",
        default=0,
        help="in the first N layers what attention returned is kept on the host, too, and attention not computed again",
        tag="keptattention",
        bounds=(0, 1024),
        needs=("gradient_checkpointing", "checkpoint_offload"),
        compared=True,
        refusal=_refusal_of_kept_attention,
    ),
)
