"""Mixed precision against Hugging Face's own Trainer, and LoRA: what is trained, kept and computed."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import all_gpu_liger_kernel as script
from src import techniques
from src.cli import command_line
from src.config import RunConfig
from src.model_utils import build_model, flops_per_step
from src.offload_config import OffloadConfig
from src.predict.dry_run import predict
from src.utils import UsageError
from tests.helpers import ALL_KERNELS, HUGGING_FACE, assert_one_error_line, strategy_id, tiny_config, write_llama_folder

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts what runs: each operation with dtypes and shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = tuple((x.dtype, tuple(x.shape)) for x in args if isinstance(x, torch.Tensor))
        self.counts[func, tensors] += 1
        return func(*args, **(kwargs or {}))


class WatchedTrainer(Trainer):
    def training_step(self, *args, **kwargs):
        with Operations() as self.seen:
            self.loss = super().training_step(*args, **kwargs)
        return self.loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_does_what_the_trainer_does(tmp_path, checkpointing):
    config = tiny_config(model_name=write_llama_folder(tmp_path / "model"), gradient_checkpointing=checkpointing)
    ids = torch.randint(199, (2, 16))
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, mixed_precision="bf16"), CPU)
    with Operations() as ours:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        **{"use_cpu": True, "bf16": True, "max_steps": 1, "per_device_train_batch_size": 2, "max_grad_norm": 0},
        **{"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        **{"report_to": [], "save_strategy": "no", "disable_tqdm": True},
    )
    plain = build_model(dataclasses.replace(config, gradient_checkpointing=False), CPU)
    trainer = WatchedTrainer(plain, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    assert loss.item() == pytest.approx(trainer.loss.item(), rel=1e-6)
    assert not ours.counts - trainer.seen.counts
    # The Trainer counts tokens and micro-batches: a few operations on the loss, which is a single number.
    assert all(shape == () for _, tensors in trainer.seen.counts - ours.counts for _, shape in tensors)


def test_mixed_precision_keeps_weights_in_fp32_unless_told_otherwise():
    words = ["--mixed_precision", "bf16", "--device", "cuda"]
    config = command_line(None, RunConfig(), {}, words).config
    assert (config.dtype, config.compute_dtype) == ("fp32", "bf16")
    assert config.run_name.endswith("_fp32_mixed-bf16")
    with pytest.raises(UsageError, match="keeps weights in fp32: leave --dtype bf16 out"):
        techniques.check(dataclasses.replace(config, dtype="bf16"))


@pytest.mark.parametrize(("targets", "count"), [("linear", 7), ("attention", 4)])
def test_lora_trains_adapters_alone(tmp_path, targets, count):
    config = tiny_config(model_name=write_llama_folder(tmp_path), lora_rank=3, lora_targets=targets)
    model = build_model(config, CPU)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * count  # two matrices, in each of two layers
    assert all(3 in p.shape and p.dtype == torch.float32 and "lora_" in name for name, p in trained.items())
    ids = torch.randint(199, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    # Frozen weights need 4 operations a token and adapters 6, where training all needs 6; attention is the same.
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    adapters = sum(p.numel() for p in trained.values())
    everything = dataclasses.replace(config, lora_rank=0, lora_targets="linear")
    saved = flops_per_step(build_model(everything, CPU), everything) - flops_per_step(model, config)
    assert saved == 16 * (2 * (weights - adapters) - 6 * adapters)


def test_flce_makes_no_gradient_of_a_head_that_is_not_trained(tmp_path):
    """4,096 words x 48 bf16 numbers: with all weights trained, and with adapters, of the size of no other tensor."""
    model = write_llama_folder(tmp_path, num_hidden_layers=1, vocab_size=4096)
    config = RunConfig(model_name=model, batch_size=1, seq_length=128, **HUGGING_FACE | {"flce": True})
    sizes = {}
    for rank in (0, 4):
        gpu = predict(dataclasses.replace(config, lora_rank=rank), script.build_experiment).gpu
        in_loss = [a.size for kind, a in gpu.events if kind == "alloc" and a.module == "loss"]
        sizes[rank] = in_loss.count(4096 * 48 * 2)
    assert sizes[0] >= 1
    assert sizes[4] == 0


def test_dry_run_lets_flce_see_autocast(tmp_path):
    """FLCE takes 2 tokens x 4,096 words at a time here; under autocast their logits and a copy of the head in bf16."""
    model = write_llama_folder(tmp_path, num_hidden_layers=1, vocab_size=4096)
    config = RunConfig(model_name=model, batch_size=1, seq_length=128, dtype="fp32", **HUGGING_FACE | {"flce": True})
    sizes = {}
    for mixed in ("none", "bf16"):
        gpu = predict(dataclasses.replace(config, mixed_precision=mixed), script.build_experiment).gpu
        sizes[mixed] = {a.size for kind, a in gpu.events if kind == "alloc" and a.module == "loss"}
    logits, head = 2 * 4096, 4096 * 48
    assert [2 * head in sizes[mixed] for mixed in ("none", "bf16")] == [False, True]
    assert [4 * logits in sizes[mixed] for mixed in ("none", "bf16")] == [True, False]
    assert 2 * logits in sizes["bf16"]


WIDE = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 256}


def four_bit_config(folder, **fields):
    """Of a Llama whose weights torchao can quantise; of 16 x 128 tokens, so that its layers' inputs weigh something."""
    pytest.importorskip("torchao")
    model = write_llama_folder(folder, **WIDE)
    usual = {"dtype": "bf16", "lora_rank": 4, "lora_base": "nf4", "batch_size": 16, "seq_length": 128}
    return tiny_config(**{**usual, "model_name": model, **fields})


@pytest.mark.parametrize("kernels", [HUGGING_FACE, ALL_KERNELS], ids=strategy_id)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_is_lora_on_weights_that_were_rounded_to_4_bits(tmp_path, kernels, checkpointing):
    """Against the same adapters on weights of the values that the 4 bits stand for."""
    usual = {"batch_size": 1, "seq_length": 16, "dtype": "fp32", "gradient_checkpointing": checkpointing}
    config = four_bit_config(tmp_path, **usual, **kernels)
    torch.manual_seed(0)
    model = build_model(config, CPU)
    torch.manual_seed(0)
    plain = build_model(dataclasses.replace(config, lora_base="model"), CPU)
    frozen = 0
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        if hasattr(ours, "quantized_data"):
            frozen += 1
            rounded = ours.detach().to(torch.float32)
            assert 0.05 < (rounded - theirs).norm() / theirs.norm() < 0.15
            theirs.data.copy_(rounded)
        elif ours.requires_grad:  # the second matrix of each adapter is zero at first
            torch.nn.init.normal_(ours, std=0.1)
            theirs.data.copy_(ours)
    assert frozen == 2 * 7
    ids, found = torch.randint(199, (1, 16)), []
    for own in (model, plain):
        loss = own(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in own.parameters() if p.requires_grad)])
    assert len(found[0]) == 1 + 2 * 2 * 7
    assert all(map(torch.equal, *found))


def test_dry_run_counts_4_bit_weights_as_torchao_makes_them(tmp_path):
    config = four_bit_config(tmp_path)
    sizes = [
        -(-part.untyped_storage().nbytes() // 512) * 512
        for weight in build_model(config, CPU).parameters()
        for part in ([getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
                     if hasattr(weight, "quantized_data") else [weight])
    ]  # fmt: skip
    found = predict(config, script.build_experiment)
    assert found.breakdown["parameters"] == sum(sizes)
    assert found.breakdown["unattributed"] < 0.01 * found.peak_bytes
    assert found.load_peak_bytes > sum(2 * p.numel() for p in build_model(config, CPU).parameters())  # in bf16 first


REFUSED_4_BITS = {
    "does nothing without --lora_rank": {"lora_rank": 0},
    "--mixed_precision none": {"dtype": "fp32", "mixed_precision": "bf16"},
    "--compile none": {"compile": "layers"},
}


@pytest.mark.parametrize("message", REFUSED_4_BITS)
def test_4_bit_weights_that_cannot_be_are_refused(message):
    pytest.importorskip("torchao")
    with pytest.raises(UsageError, match=message):
        techniques.check(RunConfig(**{"lora_rank": 4, "lora_base": "nf4"} | REFUSED_4_BITS[message]))


def test_4_bits_of_a_weight_that_has_no_whole_blocks_are_refused(tmp_path):
    pytest.importorskip("torchao")
    config = tiny_config(model_name=write_llama_folder(tmp_path), dtype="bf16", lora_rank=4, lora_base="nf4")
    with pytest.raises(UsageError, match=r"takes 16,384 numbers at a time, and self_attn.q_proj of .* has 48 x 48"):
        build_model(config, CPU)


@pytest.mark.parametrize("words", [["--mixed_precision", "bf16"], ["--lora_rank", "4", "--lora_base", "nf4"]])
def test_offloaded_script_says_why_it_has_it_not(words, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(None, OffloadConfig(), {}, words)
    assert ended.value.code == 2
    assert_one_error_line(capsys.readouterr().err, f"{words[-2]} is not for this script: DeepSpeed")


def test_lora_settings_without_a_rank_are_refused():
    with pytest.raises(UsageError, match="--lora_alpha does nothing without --lora_rank"):
        techniques.check(RunConfig(lora_alpha=32))
