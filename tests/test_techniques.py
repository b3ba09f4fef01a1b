"""Entries of the registry beyond the four kernels: what a flag does to the run, its name, its peak and its numbers."""

import dataclasses
import json

import pytest
import torch

import all_gpu_liger_kernel as script
from src import techniques
from src.check import kernels
from src.config import RunConfig
from src.families import FAMILIES, shipped
from src.model_utils import build_model, patched
from src.offload_config import OffloadConfig
from src.predict.dry_run import predict
from src.utils import UsageError
from tests.helpers import tiny_config, write_llama_folder


def difference(config, other):
    """How far the gradients of two runs are from each other, relative, in Triton's interpreter."""
    ours, theirs = (kernels.train(c, script.build_experiment) for c in (config, other))
    return kernels.relative_difference(ours.gradient, theirs.gradient)


def folder_of(tmp_path, model_name, **shape):
    """A local folder with the config.json of a shipped shape, with other sizes."""
    family, sizes = shipped(model_name)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": family.model_type} | shape))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("setting", "tag", "needs"),
    [
        ({"flce_chunks": 8}, "_chunks8", {"flce": False}),
        ({"flce_reduction": "sum"}, "_sum", {"flce": False}),
        ({"flce_accumulation": "fp32"}, "_accumulate-fp32", {"flce": False}),
        ({"checkpoint_every": 2}, "_every2", {"gradient_checkpointing": False}),
    ],
)
def test_technique_names_the_run_and_needs_what_it_changes(setting, tag, needs):
    for config in (RunConfig, OffloadConfig):
        assert config(**setting).run_name == config().run_name + tag
        with pytest.raises(UsageError, match=f"--{next(iter(setting))} does nothing without --"):
            techniques.check(config(**setting, **needs))


def test_what_is_compared_is_in_the_title():
    assert RunConfig(flce_chunks=8).title == "All Liger Kernel, flce_chunks 8"
    assert RunConfig(flce=False, checkpoint_every=2).title == "Liger Kernel w/o FLCE, checkpoint_every 2"
    assert RunConfig(gradient_checkpointing=False).title == "All Liger Kernel"


def sizes_in_loss(config):
    """Bytes of the blocks that the simulated step asks for in the loss."""
    events = predict(config, script.build_experiment).gpu.events
    return {allocation.size for action, allocation in events if action == "alloc" and allocation.module == "loss"}


def test_flce_chunks_is_the_memory_of_a_chunks_logits():
    """Liger's chunk is as many tokens as have logits (V x 2 bytes each) of C inputs (tokens x H x 2 bytes)."""
    config = RunConfig(model_name="tiny-llama", batch_size=4, seq_length=1024)  # V = 4096, H = 64
    logits = {chunks: chunks * 4 * 1024 * 64 * 2 for chunks in (1, 8)}
    found = {chunks: sizes_in_loss(dataclasses.replace(config, flce_chunks=chunks)) for chunks in logits}
    assert logits[1] in found[1]
    assert logits[8] not in found[1]
    assert logits[8] in found[8]


@pytest.mark.parametrize("setting", [{"flce_chunks": 4}, {"flce_reduction": "sum"}, {"flce_accumulation": "fp32"}])
def test_flce_computes_the_same_however_it_is_set(tmp_path, setting):
    config = tiny_config(model_name=write_llama_folder(tmp_path, num_hidden_layers=1), flce=True)
    assert difference(dataclasses.replace(config, **setting), dataclasses.replace(config, flce=False)) < 1e-5


def test_checkpoint_every_leaves_every_other_layer_its_activations(tmp_path):
    model = folder_of(tmp_path, "tiny-llama", num_hidden_layers=4)
    config = RunConfig(model_name=model, batch_size=16, seq_length=1024)
    settings = ({}, {"checkpoint_every": 2}, {"gradient_checkpointing": False})  # of four layers: all, two, none
    predictions = [predict(dataclasses.replace(config, **own), script.build_experiment) for own in settings]
    every, second, none = (p.peak_bytes for p in predictions)
    assert every < second < none
    layers = predictions[1].experiment.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False]


def test_checkpoint_every_computes_the_same(tmp_path):
    config = tiny_config(model_name=write_llama_folder(tmp_path))
    assert difference(dataclasses.replace(config, checkpoint_every=2), config) == 0


@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if family.model_type != "llama"],
    ids=lambda family: family.model_type,
)
def test_kernels_of_every_family_compute_what_hugging_faces_code_does(tmp_path, family):
    tiny = next(name for name in family.shapes if name.startswith("tiny-"))
    model = folder_of(tmp_path, tiny, num_hidden_layers=1, vocab_size=99, hidden_size=16, intermediate_size=24)
    attention = "eager" if family.not_sdpa else "sdpa"
    config = tiny_config(model_name=model, attention=attention, **dict.fromkeys(family.liger_switches, True))
    ids = torch.randint(99, (2, 5))
    gradients, weights = {}, None
    for name, own in (("theirs", techniques.without(config)), ("ours", {})):
        with patched():
            built = build_model(dataclasses.replace(config, **own), torch.device("cpu"))
            if weights is None:  # away from where norms begin, which would hide how they use their weights
                weights = {key: value + 0.1 * torch.randn_like(value) for key, value in built.state_dict().items()}
            built.load_state_dict(weights)
            built(input_ids=ids, labels=ids).loss.backward()
            gradients[name] = torch.cat([p.grad.flatten() for p in built.parameters()])
    error = torch.linalg.vector_norm(gradients["ours"] - gradients["theirs"])
    assert error < kernels.TOLERANCE * torch.linalg.vector_norm(gradients["theirs"])
