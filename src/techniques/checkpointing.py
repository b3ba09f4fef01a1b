"""What of the forward pass is kept for the backward pass, and what is computed again."""

from src.techniques.technique import Config, Model, Technique


def _checkpoint(model: Model, config: Config) -> None:
    if config.gradient_checkpointing:
        kwargs = {"use_reentrant": False}
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=kwargs, every_n_layers=config.checkpoint_every
        )


CHECKPOINTING = (
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
)
