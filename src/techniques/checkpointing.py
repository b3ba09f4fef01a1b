"""What of the forward pass is kept for the backward pass, and what is computed again."""

from src.techniques.technique import Config, Model, Technique


def _checkpoint(model: Model, config: Config) -> None:
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


CHECKPOINTING = (
    Technique(
        name="gradient_checkpointing",
        default=True,
        help="recompute each layer in the backward pass",
        tag="gc",
        to_model=_checkpoint,
    ),
)
