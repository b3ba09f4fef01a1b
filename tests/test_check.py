"""The check of the kernels: each Liger kernel computes what Hugging Face's code computes, and one that does not is
found.

Both are compared with a float64 reference; Liger may err by a small multiple of what Hugging Face's own code does.
"""

import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl
from liger_kernel.transformers import monkey_patch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from triton.language.extra import libdevice

import all_gpu_liger_kernel as script
from src.check import interpreter, kernels
from src.check.devices import TrackedHost
from src.measure import measure_phases
from src.model_utils import build_model
from src.record import load
from src.techniques import KERNEL_NAMES, kernels_only
from src.utils import UsageError
from tests import reference
from tests.helpers import ALL_KERNELS, HUGGING_FACE, tiny_config, write_llama_folder

EPS = torch.finfo(torch.float32).eps


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def assert_close_to_exact(what, ours, theirs, exact):
    error, reference_error = relative_error(ours, exact), relative_error(theirs, exact)
    assert error <= max(4 * reference_error, 8 * EPS), f"{what}: Liger {error:.1e}, Hugging Face {reference_error:.1e}"


def loss_and_gradients(model, input_ids, labels):
    loss = model(input_ids=input_ids, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("tied", "gradient_checkpointing"), [(True, True), (False, False)], ids=["tied", "untied"])
def test_whole_model_matches_hugging_face(rng, tmp_path, tied, gradient_checkpointing):
    heads = rng.randint(1, 3)
    shape = {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "tie_word_embeddings": tied}
    shape["num_hidden_layers"] = 1 if gradient_checkpointing else 2
    folder = write_llama_folder(tmp_path, vocab_size=rng.choice([101, 150, 249]), **shape)
    settings = {"model_name": folder, "gradient_checkpointing": gradient_checkpointing}
    input_ids = torch.randint(100, (2, 7))
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) < 0.3, reference.IGNORED)
    labels[:, -1] = input_ids[:, -1]

    model = build_model(tiny_config(**settings), torch.device("cpu"))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)  # the initial norm weights, all ones, would hide errors
    theirs = loss_and_gradients(model, input_ids, labels)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    loss = reference.llama_loss(weights, model.config, input_ids, labels)
    exact = {"loss": loss.detach(), **dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))}

    liger_model = build_model(tiny_config(**settings, **ALL_KERNELS), torch.device("cpu"))
    liger_model.load_state_dict(model.state_dict())
    ours = loss_and_gradients(liger_model, input_ids, labels)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in exact:
        assert_close_to_exact(name, ours[name], theirs[name], exact[name])


@triton.jit
def scale_kernel(x_ptr, y_ptr, factor, n, block: tl.constexpr):
    i = tl.arange(0, block)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, libdevice.rsqrt(x) * factor.to(tl.float32), mask=i < n)


def test_interpreter_takes_floats_has_rsqrt_and_keeps_no_argument_alive():
    interpreter.enable()  # once more: nothing is converted twice
    x, y = torch.tensor([4.0, 16.0, 0.25, 1.0]), torch.empty(4)
    scale_kernel[(1,)](x, y, 0.1, 4, block=4)
    assert torch.equal(y, torch.tensor([0.5, 0.25, 2.0, 1.0]) * torch.tensor(0.1))
    gone = weakref.ref(x)
    gc.disable()  # which would free what a reference cycle holds
    try:
        del x
        assert gone() is None
    finally:
        gc.enable()


def test_interpreter_that_was_not_asked_for_in_time_is_a_usage_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UsageError, match="set TRITON_INTERPRET=1 before Python starts"):
        interpreter.enable()


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ((), [set()]),
        (("flce",), [set(), {"flce"}]),
        (("rope", "swiglu"), [set(), {"rope"}, {"swiglu"}, {"rope", "swiglu"}]),
        (KERNEL_NAMES, [set(), *({name} for name in KERNEL_NAMES), set(KERNEL_NAMES)]),
    ],
)
def test_variants_are_hugging_faces_code_each_kernel_alone_and_all_together(on, expected):
    config = tiny_config(**kernels_only(*on), iterations=7)
    variants = kernels.variants(config)
    assert [set(variant.kernels) for variant in variants] == expected
    assert {variant.iterations for variant in variants} == {7}
    assert [kernels.label(variant) for variant in variants[:1]] == [""]
    assert variants[-1] == config


@pytest.fixture
def check(tmp_path):
    """The check of a small Llama with some kernels: its exit status and record."""
    folder = write_llama_folder(tmp_path / "model", vocab_size=500, num_hidden_layers=1)
    places = {"result_dir": str(tmp_path / "results"), "snapshot_dir": "", "log_dir": str(tmp_path / "logs")}

    def run(*on):
        sizes = {"seq_length": 6, "iterations": 2, "warmup": 0, "gradient_checkpointing": False}
        config = tiny_config(model_name=folder, **sizes, **kernels_only(*on), **places)
        return kernels.main(config, script.SCRIPT, None), load(config.record_file)

    return run


def test_check_records_each_kernel_beside_hugging_faces_code_and_no_figure_of_a_gpu(check, capsys):
    status, record = check("rope", "rms_norm")
    out = capsys.readouterr().out
    assert (status, record.status, record.mode, record.environment.gpu) == (0, "ok", "interpreted", None)
    rows = record.kernel_check
    assert [row.kernels for row in rows] == [[], ["rope"], ["rms_norm"], ["rope", "rms_norm"]]
    assert all(row.agrees for row in rows)
    assert out.count(" agrees") == 3
    assert "DIFFERS" not in out
    for row in rows:
        for name in KERNEL_NAMES:
            assert ("liger_kernel" in row.implementations[name]) == (name in row.kernels)
        assert len(row.losses) == 2
    # Not even a rounding apart would mean that the kernel did not run.
    assert rows[0].gradient_difference == 0 < rows[2].gradient_difference < kernels.TOLERANCE
    assert record.losses == rows[-1].losses
    assert record.implementations == rows[-1].implementations
    assert record.peak_memory_bytes == rows[-1].peak_memory_bytes > 0
    for key in ("latency_s", "throughput_tokens_per_s", "mfu", "step_seconds", "peak_reserved_bytes", "simulated_gpu"):
        assert getattr(record, key) is None, key
    assert str(record.run.record_file) in out
    assert str(record.run.log_folder) in out


def wrong_rope(q, k, cos, sin, **kwargs):
    return apply_rotary_pos_emb(q, k, cos, -sin, **kwargs)


class WrongMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 1.001


class WrongNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


def wrong_loss(self, hugging_face=LlamaForCausalLM.forward, **kwargs):
    output = hugging_face(self, **kwargs)
    output.loss = output.loss * 1.001
    return output


def wrong_gradient(self, hugging_face=LlamaForCausalLM.forward, **kwargs):
    output = hugging_face(self, **kwargs)
    output.loss = output.loss.detach() + 1.001 * (output.loss - output.loss.detach())
    return output


@pytest.mark.parametrize(
    ("kernel", "name", "wrong"),
    [
        ("rope", "liger_rotary_pos_emb", wrong_rope),
        ("swiglu", "LigerSwiGLUMLP", WrongMLP),
        ("rms_norm", "LigerRMSNorm", WrongNorm),
        ("flce", "llama_lce_forward", wrong_loss),
        ("flce", "llama_lce_forward", wrong_gradient),
    ],
)
def test_kernel_that_computes_something_else_fails_the_check(check, capsys, monkeypatch, kernel, name, wrong):
    monkeypatch.setattr(monkey_patch, name, wrong)
    status, record = check(kernel)
    assert status == 1
    assert capsys.readouterr().out.count("DIFFERS") == 1
    assert [row.agrees for row in record.kernel_check] == [True, False]


def test_fused_loss_saves_at_least_the_logits():
    def peak(settings):
        runtime = TrackedHost()
        with runtime.tracking():
            experiment = script.build_experiment(tiny_config(batch_size=2, seq_length=48, **settings), runtime)
            return measure_phases(experiment.step, runtime, experiment.grad_norm).peak_bytes["forward"]

    logits, weight_gradient = 2 * 48 * 4096 * 4, 4096 * 64 * 4  # which the fused loss has after the forward pass
    assert peak(HUGGING_FACE) - peak(kernels_only("flce")) >= logits - weight_gradient
