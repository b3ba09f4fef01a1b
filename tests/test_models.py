"""Building models: families, shapes and counts are right, each kernel reaches its part, and off means off."""

import dataclasses
import itertools
import json
import math
import sys

import httpx
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

import all_gpu_liger_kernel as script
from src import model_utils, techniques
from src.architecture import LARGEST_FILE_BYTES
from src.config import RunConfig
from src.experiment import random_batches_of_rank
from src.families import FAMILIES, SHAPES
from src.measure.devices import HostRuntime
from src.model_utils import (
    TORCH_DTYPES,
    apply_kernels,
    build_model,
    flops_per_step,
    implementations,
    load_model_config,
    parameter_counts,
    patched,
)
from src.offload_config import OffloadConfig
from src.techniques import KERNEL_NAMES, kernels_only
from src.techniques.optimizers import CHOICES
from src.utils import UsageError
from tests.helpers import (
    ALL_KERNELS,
    HUGGING_FACE,
    strategy_id,
    tiny_config,
    write_llama_folder,
)

CPU, META = torch.device("cpu"), torch.device("meta")
ALL_SETS = [kernels_only(*names) for n in range(5) for names in itertools.combinations(KERNEL_NAMES, n)]
ONE_OF_EACH_FAMILY = [next(iter(family.shapes)) for family in FAMILIES.values()]
# Published on the models' pages.
PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ibm-granite/granite-3.1-2b-base": 2_533_531_648,
    "ibm-granite/granite-3.1-8b-base": 8_170_848_256,
}


def small_folder(folder, family, **shape):
    """A local folder with the config.json of a small model of a family."""
    tiny = next(shape for name, shape in family.shapes.items() if name.startswith("tiny-"))
    sizes = {"vocab_size": 199, "hidden_size": 48, "intermediate_size": 88, "head_dim": 12, "num_hidden_layers": 3}
    getattr(transformers, family.config)(**tiny | sizes | shape).save_pretrained(folder)
    return str(folder)


def of_shape(name, **fields):
    """A run of a shipped shape with the attention that its family needs."""
    config = tiny_config(model_name=name, **fields)
    return dataclasses.replace(config, **techniques.chosen(config, fields))


def can_have(family, kernels):
    """Whether Liger has every kernel that is on for a family."""
    return {name for name, is_on in kernels.items() if is_on} <= family.liger_switches.keys()


def replaceable(family):
    """What Liger may replace in Hugging Face's code."""
    module = sys.modules[family.module]
    return vars(module) | {"forward": getattr(module, family.causal_lm).forward} | vars(torch.nn.functional)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [(name, kernels) for name in ONE_OF_EACH_FAMILY for kernels in ALL_SETS if can_have(SHAPES[name][0], kernels)],
    ids=lambda value: value if isinstance(value, str) else strategy_id(value),
)
def test_kernels_replace_their_own_parts_and_patched_undoes_it(name, kernels):
    family = SHAPES[name][0]
    before = replaceable(family)
    with patched():
        model = build_model(of_shape(name, **kernels), META)
        ran = implementations(model)
        for kernel in KERNEL_NAMES:
            assert ran[kernel].startswith("liger_kernel." if kernels[kernel] else "transformers."), kernel
        assert ran["cross_entropy"] == "torch.nn.functional.cross_entropy"
        assert ran["decoder_layer"] == f"{family.module}.{family.decoder_layer}"
        # What `implementations` reads off one module holds for all.
        classes = {type(module) for module in model.modules()}
        for kernel, part in {"swiglu": "MLP", "rms_norm": "Norm"}.items():
            homes = {c.__module__.split(".")[0] for c in classes if part in c.__name__}
            assert homes == {"liger_kernel" if kernels[kernel] else "transformers"}
        assert (replaceable(family) == before) == (kernels == HUGGING_FACE)
    assert replaceable(family) == before


def test_without_kernels_it_is_hugging_faces_code_and_liger_is_not_even_imported(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # importing it is an error
    for family in FAMILIES.values():
        code, forward = sys.modules[family.module], getattr(sys.modules[family.module], family.causal_lm).forward
        model = build_model(of_shape(next(iter(family.shapes))), META)
        assert type(model) is getattr(code, family.causal_lm)
        assert {type(layer) for layer in model.model.layers} == {getattr(code, family.decoder_layer)}
        for module in model.modules():
            assert type(module) is getattr(code, type(module).__name__, type(module))
            assert "liger" not in f"{type(module).__module__} {type(module).forward.__module__}"
        assert type(model).forward is forward
    with pytest.raises(UsageError, match=r"pip install -r requirements.txt, or switch them off: --enable_rope 0 "):
        build_model(tiny_config(rope=True), META)


def test_kernel_that_liger_lacks_for_a_family_is_a_usage_error():
    other = dataclasses.replace(next(iter(FAMILIES.values())), liger_switches={"flce": "fused_linear_cross_entropy"})
    with pytest.raises(UsageError, match="no rope kernel for llama models: --enable_rope 0"):
        apply_kernels(RunConfig(), other)
    apply_kernels(RunConfig(**kernels_only("flce")), other)


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith(("tiny-", "small-"))])
def test_shipped_shape_has_the_published_parameter_count(name):
    config = of_shape(f"{name}-Instruct", dtype="bf16")
    model = build_model(config, META)
    total = sum(p.numel() for p in model.parameters())
    assert total == PARAMETERS[name]
    layer, rest = parameter_counts(load_model_config(config))
    assert layer == sum(p.numel() for p in model.model.layers[-1].parameters())
    assert rest + layer * len(model.model.layers) == total
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False], ids=["tied-head", "own-head"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_flops_are_what_a_counter_counts_less_the_masked_half_of_attention(rng, tmp_path, family, tied):
    batch, length, pieces = rng.randint(1, 4), rng.randint(8, 40), rng.randint(1, 2)
    config = tiny_config(
        model_name=small_folder(tmp_path, family, tie_word_embeddings=tied),
        attention="eager",  # two matrix products, of which the counter counts the whole S x S
        gradient_checkpointing=False,
        batch_size=batch,
        seq_length=length,
        gradient_accumulation_steps=pieces,
    )
    experiment = script.build_experiment(config, HostRuntime())
    with FlopCounterMode(display=False) as counter:
        experiment.step()
    heads, head_dim, layers = 4, 12, 3
    masked = 3 * layers * 2 * batch * heads * length**2 * head_dim  # half of 2 products, 3 times for backward
    angles = 2 * length * head_dim // 2  # of the rotary embedding, an outer product
    assert flops_per_step(experiment.model, config) == counter.get_total_flops() - pieces * (masked + angles)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "olmo2", "smollm3", "granite"])
def test_flops_need_no_width_of_heads_in_the_file(tmp_path, name):
    config = tiny_config(model_name=small_folder(tmp_path, FAMILIES[name], num_attention_heads=4, hidden_size=48))
    told = flops_per_step(build_model(config, META), config)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["head_dim"]  # most public files have none
    file.write_text(json.dumps(values))
    assert not hasattr(build_model(config, META).config, "head_dim")
    assert flops_per_step(build_model(config, META), config) == told


def test_flops_of_the_study_are_those_counted_by_hand():
    config = RunConfig(**HUGGING_FACE)
    attention = 2048 * 2048 * 2 + 2048 * 512 * 2
    products = 16 * (attention + 3 * 2048 * 8192) + 2048 * 128256  # the head is the embedding, too
    tokens = 8 * 1024
    causal = 16 * 3 * 2 * 2 * tokens * 1024 * 2048 // 2
    assert flops_per_step(build_model(config, META), config) == 6 * products * tokens + causal


def losses(**fields):
    step = script.build_experiment(tiny_config(**fields), HostRuntime()).step
    return [step().item() for _ in range(2)]


def test_seed_is_the_training_and_the_first_loss_is_that_of_guessing():
    first = losses(seed=1, seq_length=128)
    assert first == losses(seed=1, seq_length=128) != losses(seed=2, seq_length=128)
    assert first[0] == pytest.approx(math.log(4096), abs=0.3)


def test_micro_batches_train_as_one_batch_of_their_size():
    def trained(**sizes):
        experiment = script.build_experiment(tiny_config(**sizes, seed=3), HostRuntime())
        gradients = []
        loss = experiment.step(lambda phase: gradients.extend(experiment.gradients() if phase == "optimizer" else ()))
        return torch.cat([loss.reshape(1), *(g.flatten() for g in gradients)])

    torch.testing.assert_close(trained(batch_size=2, gradient_accumulation_steps=2), trained(batch_size=4))


def test_ranks_share_one_batch_whichever_way_it_is_cut(monkeypatch):
    def tokens(ranks, pieces):
        config = OffloadConfig(
            batch_size=12 // ranks // pieces, gradient_accumulation_steps=pieces, world_size=ranks, seq_length=4
        )
        found = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            torch.manual_seed(rank)
            found += [b["input_ids"] for b in random_batches_of_rank(99, config, CPU)]
        assert len(found) == ranks * pieces
        return torch.cat(found)

    whole = tokens(1, 1)
    assert whole.shape == (12, 4)
    assert whole.unique().numel() > 20
    for ranks, pieces in ((2, 1), (1, 3), (2, 3)):
        assert torch.equal(tokens(ranks, pieces), whole)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_weights_gradients_and_optimizer_state_have_the_dtype_asked_for(dtype):
    experiment = script.build_experiment(tiny_config(dtype=dtype), HostRuntime())
    gradients = []
    experiment.step(lambda phase: gradients.extend(experiment.gradients() if phase == "optimizer" else []))
    state = experiment.resident()["optimizer_state"]
    model = list(experiment.model.parameters())
    moments = [value for value in state if value.numel() > 1]
    assert (len(gradients), len(moments)) == (len(model), 2 * len(model))
    assert {tensor.dtype for tensor in model + gradients + moments} == {TORCH_DTYPES[dtype]}


@pytest.mark.parametrize("optimizer", [name for name, own in CHOICES.items() if own.library == "torch.optim"])
def test_optimizer_lowers_the_loss(optimizer):
    config = tiny_config(optimizer=optimizer, learning_rate=0.05 if optimizer == "sgd" else 1e-3)
    experiment = script.build_experiment(config, HostRuntime())
    first, *_, last = (experiment.step().item() for _ in range(4))
    assert last < first
    chosen = CHOICES[optimizer]
    assert type(experiment.optimizer).__name__ == chosen.name
    assert experiment.optimizer.defaults["lr"] == config.learning_rate
    assert {name: experiment.optimizer.defaults[name] for name in chosen.settings} == chosen.settings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_recomputes_every_layer(checkpointing):
    experiment = script.build_experiment(tiny_config(gradient_checkpointing=checkpointing), HostRuntime())
    ran = []
    for i, layer in enumerate(experiment.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    experiment.step()
    assert sorted(ran) == ([0, 0, 1, 1] if checkpointing else [0, 1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_local_folder_gives_the_shape_and_with_pretrained_the_weights(tmp_path, dtype):
    folder = write_llama_folder(tmp_path, num_hidden_layers=3, vocab_size=77)
    saved = build_model(tiny_config(model_name=folder, seed=1), CPU)
    assert (len(saved.model.layers), saved.lm_head.out_features) == (3, 77)
    saved.save_pretrained(folder)
    loaded = build_model(tiny_config(model_name=folder, pretrained=True, dtype=dtype, **ALL_KERNELS), CPU)
    assert loaded.training
    for (name, expected), (_, actual) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(actual, expected.to(TORCH_DTYPES[dtype])), name


@pytest.mark.parametrize(
    ("config_json", "text"),
    [
        (None, "has no config.json"),
        ("", "is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("x" * (LARGEST_FILE_BYTES + 1), "more than 16,777,216 bytes"),
        ("[]", "the whole: Input should be a valid dictionary"),
        ("{}", "model_type: Field required"),
        (GPT2Config(n_embd=8, n_head=2).to_json_string(), "is a 'gpt2' model; known families: llama"),
    ],
    ids=["missing", "empty", "deep", "large", "list", "no-model-type", "other-family"],
)
def test_folder_without_a_usable_config_is_a_usage_error(tmp_path, config_json, text):
    if config_json is not None:
        (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(UsageError, match=f"^cannot use .*{text}"):
        load_model_config(tiny_config(model_name=str(tmp_path)))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"hidden_size": 0}, "hidden_size: .* greater than or equal to 1"),
        ({"hidden_size": 10**12}, "hidden_size: .* less than or equal to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: .* less than or equal to"),
        ({"num_labels": 10**9}, "num_labels: .* less than or equal to"),
        ({"vocab_size": "100"}, "vocab_size: .* valid integer"),
        ({"num_key_value_heads": 3}, "3 num_key_value_heads do not divide 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "do not divide hidden_size"),
        ({"head_dim": 15}, "odd"),
        ({"attention_dropout": 7}, "attention_dropout: .* less than 1"),
        ({"hidden_act": "evil"}, "evil"),
        ({"rope_parameters": {"rope_type": "evil"}}, "evil"),
        ({"torch_dtype": "float77"}, "float77"),
        ({"pad_token_id": 10**9}, "Padding_idx"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "its head is that of"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        # The cases of public reports.
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "are quantised"),
        ({"model_type": "Yi", "auto_map": {"AutoConfig": "configuration_yi.YiConfig"}}, "which is never run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_cannot_be_or_is_not_honoured_is_a_usage_error(tmp_path, values, text):
    folder = write_llama_folder(tmp_path)
    load_model_config(tiny_config(model_name=folder))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UsageError, match=f"^cannot use .*{text}"):
        load_model_config(tiny_config(model_name=folder))


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2", "meta-llama/Llama-3.2-1B-Instruct-Instruct"])
def test_model_that_cannot_be_had_is_a_usage_error_that_says_what_can(name):
    with pytest.raises(UsageError, match=r"unknown model .* meta-llama/"):
        build_model(tiny_config(model_name=name), META)


def test_hub_that_does_not_answer_is_not_waited_for_and_a_gated_model_needs_its_licence(monkeypatch):
    model_name = "meta-llama/Llama-3.2-1B-Instruct"

    def refuse(*_args, **_kwargs):
        raise GatedRepoError("gated", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))

    monkeypatch.setattr(model_utils, "_hub_is_unreachable", lambda: True)
    with pytest.raises(UsageError, match=r"cannot load .* cannot be reached, and no copy is here"):
        build_model(tiny_config(model_name=model_name, pretrained=True), META)
    monkeypatch.setattr(model_utils, "_hub_is_unreachable", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UsageError, match=r"cannot load .* gated: accept its licence .* 'hf auth login'"):
        build_model(tiny_config(model_name=model_name, pretrained=True), META)
    with pytest.raises(UsageError, match=r"tiny-llama is a shape that nobody trained"):
        build_model(tiny_config(pretrained=True), META)


def test_family_whose_attention_sdpa_leaves_out_takes_eager(tmp_path):
    assert of_shape("tiny-gemma2").attention == "eager"
    assert of_shape("tiny-gemma3").attention == "sdpa"
    folder = small_folder(tmp_path, FAMILIES["gemma2"])
    build_model(tiny_config(model_name=folder, attention="eager"), META)
    with pytest.raises(UsageError, match="needs --attention eager: its attention scores are capped"):
        build_model(tiny_config(model_name=folder), META)


def test_sequence_may_be_as_long_as_the_model_allows_and_no_longer(tmp_path):
    folder = write_llama_folder(tmp_path, max_position_embeddings=32)
    build_model(tiny_config(model_name=folder, seq_length=32), META)
    with pytest.raises(UsageError, match="32 positions"):
        build_model(tiny_config(model_name=folder, seq_length=33), META)
