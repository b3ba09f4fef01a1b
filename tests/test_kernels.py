"""Each Liger kernel against Hugging Face's code, forward and backward, on fresh random inputs.

Both are compared with a float64 reference; Liger may err by a small multiple of what Hugging Face's own code does.
"""

import pytest
import torch
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb
from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss
from torch.func import functional_call
from transformers import LlamaConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from src.config import Strategy
from src.model_utils import build_model
from tests import reference
from tests.helpers import STRATEGIES, strategy_id, tiny_config, write_llama_folder

EPS = torch.finfo(torch.float32).eps
REPEATS = pytest.mark.parametrize("repeat", range(3))


def odd_size(rng, low, high):
    """A size that is no power of two."""
    return rng.choice([n for n in range(low, high) if n & (n - 1)])


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def outputs_and_gradients(function, inputs, grad_outputs, dtype):
    """Outputs of `function(*inputs)`, then the gradient of each input."""
    # Liger works in place: it gets copies of its own.
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    outputs = as_tuple(function(*inputs))
    values = [y.detach().clone() for y in outputs]
    return values + list(torch.autograd.grad(outputs, inputs, [g.to(dtype, copy=True) for g in grad_outputs]))


def assert_as_accurate(liger, hugging_face, exact, inputs):
    """Outputs and gradients of `liger` are about as close to those of `exact` as Hugging Face's are."""
    grad_outputs = [torch.randn_like(y) for y in as_tuple(exact(*inputs))]
    expected = outputs_and_gradients(exact, inputs, grad_outputs, torch.float64)
    ours = outputs_and_gradients(liger, inputs, grad_outputs, torch.float32)
    theirs = outputs_and_gradients(hugging_face, inputs, grad_outputs, torch.float32)
    for i, values in enumerate(zip(ours, theirs, expected, strict=True)):
        what = f"output {i}" if i < len(grad_outputs) else f"gradient of input {i - len(grad_outputs)}"
        assert_close_to_exact(what, *values)


def assert_close_to_exact(what, ours, theirs, exact):
    error, reference_error = relative_error(ours, exact), relative_error(theirs, exact)
    assert error <= max(4 * reference_error, 8 * EPS), f"{what}: Liger {error:.1e}, Hugging Face {reference_error:.1e}"


@REPEATS
def test_rope_matches_hugging_face_with_grouped_queries(rng, repeat):
    # From two tokens on: of one, Liger 0.8.5 takes a wrong stride.
    batch, seq, kv_heads, group = rng.randint(1, 3), rng.randint(2, 24), rng.randint(1, 3), rng.randint(2, 4)
    head_dim = 2 * odd_size(rng, 3, 40)
    angles = torch.rand(rng.choice([1, batch]), seq, head_dim // 2, dtype=torch.float64) * 2 * torch.pi
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).float() for f in (torch.cos, torch.sin))
    inputs = [torch.randn(batch, heads, seq, head_dim) for heads in (kv_heads * group, kv_heads)]
    assert_as_accurate(
        lambda q, k: liger_rotary_pos_emb(q, k, cos, sin),
        lambda q, k: apply_rotary_pos_emb(q, k, cos, sin),
        lambda q, k: (reference.rotate(q, angles[:, None]), reference.rotate(k, angles[:, None])),
        inputs,
    )


@REPEATS
def test_swiglu_matches_hugging_face(rng, repeat):
    hidden, intermediate = odd_size(rng, 5, 100), odd_size(rng, 5, 200)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=1)
    ours, theirs = LigerSwiGLUMLP(config), LlamaMLP(config)

    def with_weights(module):
        names = [f"{p}_proj.weight" for p in ("gate", "up", "down")]
        return lambda x, *weights: functional_call(module, dict(zip(names, weights)), x)

    inputs = [torch.randn(rng.randint(1, 3), rng.randint(1, 24), hidden)]
    inputs += [torch.randn(intermediate, hidden), torch.randn(intermediate, hidden), torch.randn(hidden, intermediate)]
    assert_as_accurate(with_weights(ours), with_weights(theirs), reference.swiglu, inputs)


@REPEATS
def test_rms_norm_matches_hugging_face(rng, repeat):
    hidden, eps = odd_size(rng, 5, 300), rng.choice([1e-6, 1e-5])
    ours, theirs = LigerRMSNorm(hidden, eps), LlamaRMSNorm(hidden, eps)
    scale = 10.0 ** rng.uniform(-3, 3)  # at the small end eps matters
    assert_as_accurate(
        lambda x, weight: functional_call(ours, {"weight": weight}, x),
        lambda x, weight: functional_call(theirs, {"weight": weight}, x),
        lambda x, weight: reference.rms_norm(x, weight, eps),
        [torch.randn(rng.randint(1, 3), rng.randint(1, 24), hidden) * scale, torch.randn(hidden)],
    )


@pytest.mark.parametrize("ignored", [0.0, 0.5], ids=["all-labels", "half-ignored"])
@REPEATS
def test_fused_linear_cross_entropy_matches_hugging_face(rng, repeat, ignored):
    batch, seq, hidden, vocab = rng.randint(1, 3), rng.randint(4, 24), odd_size(rng, 9, 80), odd_size(rng, 81, 400)
    labels = torch.randint(vocab, (batch, seq))
    # The label that is kept lets the loss be defined.
    labels[:, :-1][torch.rand(batch, seq - 1) < ignored] = reference.IGNORED
    assert_as_accurate(
        lambda x, weight: LigerForCausalLMLoss(x, weight, labels, hidden_size=hidden),
        lambda x, weight: ForCausalLMLoss(x @ weight.T, labels, vocab_size=vocab),
        lambda x, weight: reference.next_token_loss(x @ weight.T, labels),
        [torch.randn(batch, seq, hidden), torch.randn(vocab, hidden) / hidden**0.5],
    )


def loss_and_gradients(model, input_ids, labels):
    loss = model(input_ids=input_ids, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("tied", "gradient_checkpointing"), [(True, True), (False, False)], ids=["tied", "untied"])
@pytest.mark.parametrize("strategy", [*STRATEGIES[1:], Strategy(flce=False)], ids=strategy_id)
def test_whole_model_matches_hugging_face(rng, tmp_path, strategy, tied, gradient_checkpointing):
    heads = rng.randint(1, 3)
    shape = {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "tie_word_embeddings": tied}
    folder = write_llama_folder(tmp_path, vocab_size=odd_size(rng, 100, 250), **shape)
    settings = {"model_name": folder, "gradient_checkpointing": gradient_checkpointing}
    input_ids = torch.randint(100, (2, 16))
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) < 0.3, reference.IGNORED)
    labels[:, -1] = input_ids[:, -1]

    model = build_model(tiny_config(**settings), torch.device("cpu"))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)  # the initial norm weights, all ones, would hide errors
    theirs = loss_and_gradients(model, input_ids, labels)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    loss = reference.llama_loss(weights, model.config, input_ids, labels)
    exact = {"loss": loss.detach(), **dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))}

    liger_model = build_model(tiny_config(**settings, strategy=strategy), torch.device("cpu"))
    liger_model.load_state_dict(model.state_dict())
    ours = loss_and_gradients(liger_model, input_ids, labels)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in exact:
        assert_close_to_exact(name, ours[name], theirs[name], exact[name])
