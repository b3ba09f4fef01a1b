"""Sequences beyond the positions that a model was made for."""

from src.techniques.technique import Config, Model, Technique


def _scale(model: Model, config: Config) -> None:
    """Of a model with several rotary embeddings, such as Gemma 3's, each."""
    if config.rope_scaling == 1:
        return
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.div_(config.rope_scaling)


ROPE_SCALING = Technique(
    name="rope_scaling",
    default=1.0,
    help="divide positions by this, so that sequences may be as many times longer than the model's positions: linear "
    "scaling (Chen et al. 2023), after the scaling that the model has of its own",
    tag="ropescaling",
    bounds=(1, 4096),
    to_model=_scale,
)
