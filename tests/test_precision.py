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
from src.predict.dry_run import predict
from src.utils import UsageError
from tests.helpers import HUGGING_FACE, tiny_config, write_llama_folder

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


def test_lora_settings_without_a_rank_are_refused():
    with pytest.raises(UsageError, match="--lora_alpha does nothing without --lora_rank"):
        techniques.check(RunConfig(lora_alpha=32))
