"""Each entry of the registry: what its flag does to the run, its name, its peak and its numbers."""

import dataclasses
import json
from pathlib import Path

import pytest

import all_gpu_liger_kernel as script
from src import techniques
from src.check import interpreter, kernels
from src.config import RunConfig
from src.families import shipped
from src.offload_config import OffloadConfig
from src.predict.dry_run import predict
from src.utils import UsageError

TINY = RunConfig(model_name="tiny-llama", batch_size=1, seq_length=64, iterations=1, warmup=0, dtype="fp32")


def largest_difference(config: RunConfig) -> float:
    """How far the gradients of a run are from Hugging Face's, relative, in Triton's interpreter."""
    interpreter.enable()
    off = dataclasses.replace(config, **techniques.without(config))
    ours, theirs = (kernels.train(c, script.build_experiment) for c in (config, off))
    return kernels.relative_difference(ours.gradient, theirs.gradient)


def test_flce_chunks_names_the_run_and_needs_its_kernel() -> None:
    assert RunConfig(flce_chunks=8).run_name == RunConfig().run_name + "_chunks8"
    assert OffloadConfig(flce_chunks=8).run_name == OffloadConfig().run_name + "_chunks8"
    assert RunConfig(flce_chunks=8).title == "All Liger Kernel, flce_chunks 8"
    with pytest.raises(UsageError, match="--flce_chunks does nothing without --enable_flce 1"):
        techniques.check(RunConfig(flce_chunks=8, flce=False))


def sizes_in_loss(config: RunConfig) -> set[int]:
    """Bytes of the blocks that the simulated step asks for in the loss."""
    events = predict(config, script.build_experiment).gpu.events
    return {allocation.size for action, allocation in events if action == "alloc" and allocation.module == "loss"}


def test_flce_chunks_is_the_memory_of_a_chunks_logits() -> None:
    """Liger's chunk is as many tokens as have logits (V x 2 bytes each) of C inputs (tokens x H x 2 bytes)."""
    config = RunConfig(model_name="tiny-llama", batch_size=4, seq_length=1024)  # V = 4096, H = 64
    logits = {chunks: chunks * 4 * 1024 * 64 * 2 for chunks in (1, 8)}
    found = {chunks: sizes_in_loss(dataclasses.replace(config, flce_chunks=chunks)) for chunks in logits}
    assert logits[1] in found[1]
    assert logits[8] not in found[1]
    assert logits[8] in found[8]


def test_flce_chunks_computes_what_hugging_face_computes() -> None:
    assert largest_difference(dataclasses.replace(TINY, flce_chunks=4)) < kernels.TOLERANCE


def test_checkpoint_every_names_the_run_and_needs_checkpointing() -> None:
    assert RunConfig(checkpoint_every=2).run_name == RunConfig().run_name + "_every2"
    with pytest.raises(UsageError, match="--checkpoint_every does nothing without --gradient_checkpointing 1"):
        techniques.check(RunConfig(checkpoint_every=2, gradient_checkpointing=False))


def test_checkpoint_every_leaves_every_other_layer_its_activations(tmp_path: Path) -> None:
    shape = shipped("tiny-llama")[1] | {"model_type": "llama", "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = RunConfig(model_name=str(tmp_path), batch_size=16, seq_length=1024)
    settings = ({}, {"checkpoint_every": 2}, {"gradient_checkpointing": False})  # of four layers: all, two, none
    predictions = [predict(dataclasses.replace(config, **own), script.build_experiment) for own in settings]
    every, second, none = (p.peak_bytes for p in predictions)
    assert every < second < none
    layers = predictions[1].experiment.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False]


def test_checkpoint_every_computes_the_same() -> None:
    own, usual = dataclasses.replace(TINY, checkpoint_every=2, flce=False), dataclasses.replace(TINY, flce=False)
    gradients = [kernels.train(config, script.build_experiment).gradient for config in (own, usual)]
    assert (gradients[0] == gradients[1]).all()


def test_qwen3_is_a_family() -> None:
    """Every kernel that Liger has for it computes what Hugging Face's code does."""
    config = dataclasses.replace(TINY, model_name="tiny-qwen3")
    assert largest_difference(config) < kernels.TOLERANCE
