"""Building models: each strategy reaches what it should and nothing else, in the dtype and shape asked for."""

import itertools
import math

import pytest
import torch
from src.kernel_check import patched
from src.random_data import set_seed
from src.runtime import CpuRuntime
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import all_gpu_liger_kernel as script
from src.config import OPTIMIZERS, RunConfig, Strategy
from src.model_utils import KERNELS, TORCH_DTYPES, build_model, flops_per_step, implementations
from src.utils import UsageError
from tests.helpers import HUGGING_FACE, STRATEGIES, run_python, strategy_id, tiny_config, write_llama_folder

CPU, META = torch.device("cpu"), torch.device("meta")
ALL_STRATEGIES = [
    Strategy.only(*names) for n in range(len(KERNELS) + 1) for names in itertools.combinations(KERNELS, n)
]


@pytest.mark.parametrize("strategy", ALL_STRATEGIES, ids=strategy_id)
def test_strategy_replaces_the_chosen_parts_and_no_others(strategy):
    cross_entropy = torch.nn.functional.cross_entropy
    model = build_model(tiny_config(strategy=strategy), META)
    ran = implementations(model)
    for name in KERNELS:
        assert ran[name].startswith("liger_kernel." if getattr(strategy, name) else "transformers."), name
    assert ran["cross_entropy"] == "torch.nn.functional.cross_entropy"
    assert torch.nn.functional.cross_entropy is cross_entropy
    # What `implementations` reads off one module holds for all.
    classes = {type(module).__name__ for module in model.modules()}
    assert ("LigerSwiGLUMLP" in classes, "LlamaMLP" in classes) == (strategy.swiglu, not strategy.swiglu)
    assert ("LigerRMSNorm" in classes, "LlamaRMSNorm" in classes) == (strategy.rms_norm, not strategy.rms_norm)


def test_without_kernels_liger_is_not_even_imported():
    code = """
import sys, torch
from transformers.models.llama import modeling_llama

def replaceable():
    return vars(modeling_llama) | {"forward": modeling_llama.LlamaForCausalLM.forward} | vars(torch.nn.functional)

before = replaceable()
from all_gpu_liger_kernel import build_experiment
from src.runtime import CpuRuntime
from tests.helpers import tiny_config
build_experiment(tiny_config(), CpuRuntime()).step()
assert replaceable() == before
assert not [name for name in sys.modules if name.startswith("liger_kernel")]
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_patched_undoes_what_liger_replaced():
    def replaceable():
        return vars(modeling_llama) | {"forward": LlamaForCausalLM.forward}

    before = replaceable()
    with patched():
        build_model(tiny_config(strategy=Strategy()), META)
        assert replaceable() != before
    assert replaceable() == before


def test_every_strategy_starts_from_the_same_weights():
    def weights(strategy):
        set_seed(7)
        return build_model(tiny_config(strategy=strategy), CPU).state_dict()

    expected = weights(HUGGING_FACE)
    for strategy in STRATEGIES[1:]:
        actual = weights(strategy)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected), strategy


def losses(**fields):
    step = script.build_experiment(tiny_config(**fields), CpuRuntime()).step
    return [step().item() for _ in range(2)]


def test_the_same_seed_trains_the_same_and_another_seed_does_not():
    assert losses(seed=1) == losses(seed=1) != losses(seed=2)


def test_first_loss_is_that_of_guessing():
    # Random weights of Llama's initial size predict almost uniformly over the vocabulary.
    assert losses(seq_length=128)[0] == pytest.approx(math.log(4096), abs=0.3)


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that the script builds."""
    built, build = [], script.build_optimizer

    def build_and_keep(*args):
        built.append(build(*args))
        return built[-1]

    monkeypatch.setattr(script, "build_optimizer", build_and_keep)
    return built


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_weights_gradients_and_optimizer_state_have_the_dtype_asked_for(optimizers, dtype):
    experiment = script.build_experiment(tiny_config(dtype=dtype), CpuRuntime())
    gradients = []
    experiment.step(lambda phase: gradients.extend(experiment.gradients() if phase == "optimizer" else []))
    state = [value for values in optimizers[0].state.values() for name, value in values.items() if name != "step"]
    weights = list(experiment.model.parameters())
    assert (len(gradients), len(state)) == (len(weights), 2 * len(weights))
    assert {tensor.dtype for tensor in weights + gradients + state} == {TORCH_DTYPES[dtype]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_lowers_the_loss(optimizers, optimizer):
    config = tiny_config(optimizer=optimizer, learning_rate=0.05 if optimizer == "sgd" else 1e-3)
    step = script.build_experiment(config, CpuRuntime()).step
    first, *_, last = (step().item() for _ in range(4))
    assert last < first
    assert type(optimizers[0]).__name__ == OPTIMIZERS[optimizer][0]
    assert optimizers[0].defaults["lr"] == config.learning_rate


def test_fp16_with_an_optimizer_that_cannot_unscale_is_a_usage_error():
    with pytest.raises(UsageError, match="unscales"):
        script.build_experiment(tiny_config(dtype="fp16", optimizer="adamw_loop"), CpuRuntime())


@pytest.mark.parametrize("strategy", [HUGGING_FACE, Strategy()], ids=strategy_id)
@pytest.mark.parametrize(("gradient_checkpointing", "forwards_per_step"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_recomputes_every_layer(strategy, gradient_checkpointing, forwards_per_step):
    config = tiny_config(strategy=strategy, gradient_checkpointing=gradient_checkpointing)
    experiment = script.build_experiment(config, CpuRuntime())
    ran = []
    for i, layer in enumerate(experiment.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    experiment.step()
    assert sorted(ran) == [0] * forwards_per_step + [1] * forwards_per_step


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementation_is_the_one_asked_for(attention):
    assert build_model(tiny_config(attention=attention), META).config._attn_implementation == attention


@pytest.mark.parametrize("suffix", ["", "-Instruct"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Llama-3.2-1B", 1_235_814_400), ("Llama-3.2-3B", 3_212_749_824), ("Llama-3.1-8B", 8_030_261_248)],
)
def test_shipped_shape_has_the_published_parameter_count(name, parameters, suffix):
    model = build_model(RunConfig(model_name=f"meta-llama/{name}{suffix}"), META)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("tied", [True, False], ids=["tied-head", "own-head"])
def test_flops_per_step_is_what_a_counter_counts_less_the_masked_half_of_attention(rng, tmp_path, tied):
    folder = write_llama_folder(tmp_path, num_hidden_layers=3, tie_word_embeddings=tied)
    batch_size, seq_length = rng.randint(1, 4), rng.randint(8, 40)
    # "eager" writes attention as two matrix products, of which the counter counts the whole S x S.
    config = tiny_config(
        model_name=folder,
        attention="eager",
        gradient_checkpointing=False,
        batch_size=batch_size,
        seq_length=seq_length,
    )
    experiment = script.build_experiment(config, CpuRuntime())
    with FlopCounterMode(display=False) as counter:
        experiment.step()
    heads, head_dim, layers = 4, 12, 3
    masked = 3 * layers * 2 * batch_size * heads * seq_length**2 * head_dim  # half of 2 products, 3 times for backward
    angles = 2 * seq_length * head_dim // 2  # of the rotary embedding, an outer product
    assert flops_per_step(experiment.model, config) == counter.get_total_flops() - masked - angles


def test_local_folder_gives_the_shape(tmp_path):
    folder = write_llama_folder(tmp_path, num_hidden_layers=3, vocab_size=77)
    model = build_model(tiny_config(model_name=folder), META)
    assert (len(model.model.layers), model.lm_head.out_features) == (3, 77)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pretrained_local_folder_gives_the_weights(tmp_path, dtype):
    folder = write_llama_folder(tmp_path)
    saved = build_model(tiny_config(model_name=folder, seed=1), CPU)
    saved.save_pretrained(folder)
    torch.manual_seed(2)
    config = tiny_config(model_name=folder, pretrained=True, dtype=dtype, strategy=Strategy())
    loaded = build_model(config, CPU)
    assert loaded.training
    for (name, expected), (_, actual) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(actual, expected.to(TORCH_DTYPES[dtype])), name


@pytest.mark.parametrize("pretrained", [False, True])
def test_folder_of_another_architecture_is_a_usage_error(tmp_path, pretrained):
    GPT2Config(n_embd=8, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'gpt2'"):
        build_model(tiny_config(model_name=str(tmp_path), pretrained=pretrained), CPU)


@pytest.mark.parametrize(
    "config_json",
    [
        None,
        "",
        "{}",
        '{"model_type": "llama", "hidden_size": 50}',
    ],
    ids=["missing", "empty", "no-model-type", "impossible-shape"],
)
def test_folder_without_a_usable_config_is_a_usage_error(tmp_path, config_json):
    if config_json is not None:
        (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(UsageError):
        build_model(tiny_config(model_name=str(tmp_path)), CPU)


def test_pretrained_folder_without_weights_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot load"):
        build_model(tiny_config(model_name=write_llama_folder(tmp_path), pretrained=True), CPU)


def test_pretrained_without_access_is_a_usage_error_that_says_how_to_get_it():
    with pytest.raises(UsageError, match="hf auth login"):
        build_model(tiny_config(model_name="meta-llama/Llama-3.2-1B", pretrained=True), CPU)


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2", "meta-llama/Llama-3.2-1B-Instruct-Instruct"])
def test_unknown_model_is_a_usage_error_that_names_the_known_ones(name):
    with pytest.raises(UsageError, match=r"unknown model .* meta-llama/"):
        build_model(tiny_config(model_name=name), META)


def test_sequence_may_be_as_long_as_the_model_allows_and_no_longer(tmp_path):
    folder = write_llama_folder(tmp_path, max_position_embeddings=32)
    build_model(tiny_config(model_name=folder, seq_length=32), META)
    with pytest.raises(UsageError, match="32 positions"):
        build_model(tiny_config(model_name=folder, seq_length=33), META)
