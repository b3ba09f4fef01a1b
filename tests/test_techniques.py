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
from src.optimizer_utils import build_optimizer
from src.predict.dry_run import predict
from src.techniques import losses
from src.techniques.host_checkpoints import HostCheckpoints
from src.utils import MIB, UsageError
from tests.helpers import HUGGING_FACE, tiny_config, write_llama_folder


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


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return tiny_config(model_name=write_llama_folder(tmp_path_factory.mktemp("model")), batch_size=2, iterations=1)


@pytest.fixture(scope="module")
def plain(tiny_run):
    return kernels.train(tiny_run, script.build_experiment)


@pytest.mark.parametrize(
    "setting",
    [
        {"loss": "liger"},
        {"loss": "chunked"},
        {"loss": "chunked", "loss_chunks": 2},
        pytest.param({"loss": "torch"}, marks=pytest.mark.skipif(not losses.torch_has_it(), reason="an older torch")),
        {"checkpoint_every": 2},
        {"checkpoint_part": "mlp", "checkpoint_every": 2},
        {"checkpoint_offload": "overlapped"},
        {"mlp_tiles": 3},
        {"mlp_tiles": 3, "gradient_checkpointing": False},
    ],
    ids=lambda setting: " ".join(map(str, setting.values())),
)
def test_technique_computes_what_hugging_faces_code_does(tiny_run, plain, setting):
    trained = kernels.train(dataclasses.replace(tiny_run, **setting), script.build_experiment)
    assert kernels.relative_difference(trained.gradient, plain.gradient) < kernels.TOLERANCE
    assert trained.measurement.losses == pytest.approx(plain.measurement.losses, rel=1e-6)


def test_inputs_kept_on_the_host_come_back_in_any_order_of_arguments():
    """PyTorch 2.11 saves an empty tensor before the arguments, PyTorch 2.13 does not."""
    kept, weights = HostCheckpoints(), [torch.randn(4, 4, requires_grad=True) for _ in range(4)]
    gradients = []
    for call in (lambda f, *args: f(*args), lambda f, *args: kept.call(f, *args, use_reentrant=False)):
        x = torch.ones(2, 4)
        for weight in weights:
            x = call(lambda empty, x, weight=weight: torch.tanh(x @ weight), torch.empty(0, requires_grad=True), x)
        x.sum().backward()
        gradients.append([w.grad.clone() for w in weights])
        for weight in weights:
            weight.grad = None
    assert all(map(torch.equal, *gradients))


def test_optimizer_in_the_backward_pass_updates_as_it_does_after_it(tmp_path):
    config = tiny_config(model_name=write_llama_folder(tmp_path), learning_rate=1e-2)
    ids, weights = torch.randint(199, (2, 8)), {}
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = build_model(config, torch.device("cpu"))
        optimizer = build_optimizer(model, dataclasses.replace(config, optimizer_in_backward=in_backward))
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            assert all(p.grad is None for p in model.parameters()) == in_backward
            optimizer.step()
            optimizer.zero_grad()
        weights[in_backward] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights[True], weights[False])


def test_peaks_of_techniques_differ_by_what_they_keep(tmp_path):
    """Here one layer's input is 2 MiB, and the logits are 32 MiB in bf16, of which the loss makes 64 MiB in fp32."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
    model = folder_of(tmp_path, "tiny-llama", num_hidden_layers=6, num_key_value_heads=4, **shape)
    config = RunConfig(model_name=model, batch_size=4, seq_length=1024, **HUGGING_FACE)

    def peaks(**settings):
        changed = dataclasses.replace(config, **settings)
        return predict(changed, script.build_experiment, simulate=script.SCRIPT.simulate).phases.peak_bytes

    whole, liger, chunked = (max(peaks(loss=loss).values()) / MIB for loss in ("model", "liger", "chunked"))
    assert whole - liger >= 64
    assert whole - chunked > 96
    # Of six inputs, four have left the GPU when the loss begins.
    here, tiled, there = (
        peaks(loss="chunked", optimizer="sgd", **own)["forward"] / MIB
        for own in ({}, {"checkpoint_part": "mlp"}, {"checkpoint_offload": "overlapped"})
    )
    assert here - there == 3 * 2
    assert tiled > here


REFUSED = {
    "a run has one loss": {"loss": "chunked", "flce": True},
    "--loss_chunks is for --loss chunked": {"loss": "liger", "loss_chunks": 2},
    "--loss_chunks does nothing without --loss": {"loss_chunks": 2},
    "--loss cce: it needs the package cut-cross-entropy: pip install -r requirements-extra.txt": {"loss": "cce"},
    "--fp8: it needs the package torchao": {"fp8": True},
    "--optimizer flash_adamw: it needs the package flashoptim": {"optimizer": "flash_adamw"},
    "--checkpoint_offload moves": {"checkpoint_offload": "blocking", "checkpoint_part": "mlp"},
    "--checkpoint_part does nothing without": {"checkpoint_part": "mlp", "gradient_checkpointing": False},
    "--mlp_tiles adds up": {"mlp_tiles": 2, "optimizer_in_backward": True},
    "--optimizer_in_backward updates": {"optimizer_in_backward": True, "gradient_accumulation_steps": 2},
    "--optimizer_in_backward cannot see": {"optimizer_in_backward": True, "dtype": "fp16"},
    "Liger's RMSNorm cannot be compiled": {"compile": "layers", "rms_norm": True},
    "--cuda_graph cannot hold a loss": {"cuda_graph": True, "flce": True},
    "--cuda_graph goes with --optimizer": {"cuda_graph": True, "optimizer": "adafactor"},
    "--cuda_graph needs --warmup 3": {"cuda_graph": True, "warmup": 2},
    "--compile is not predicted": {"compile": "layers", "dry_run": True},
    "Liger has no flce kernel for granite models: --enable_flce 0": {"model_name": "tiny-granite", "flce": True},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(monkeypatch, text):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where no optional library is installed
    with pytest.raises(UsageError) as caught:
        techniques.check(RunConfig(**{**HUGGING_FACE, **REFUSED[text]}))
    assert str(caught.value).startswith(text)


def test_a_loss_of_hidden_states_is_refused_where_the_model_changes_its_logits(tmp_path):
    model = folder_of(tmp_path, "tiny-gemma2", num_hidden_layers=1)
    with pytest.raises(UsageError, match="leaves out the final_logit_softcapping of gemma2 models: --loss liger"):
        build_model(tiny_config(model_name=model, attention="eager", loss="chunked"), torch.device("cpu"))


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
