"""Llama in plain tensor algebra, to run in float64: what Hugging Face's code and Liger's kernels approximate."""

import torch

IGNORED = -100


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x, angles):
    """Rotary embedding of x (..., seq, head_dim) by angles (..., seq, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(x, gate, up, down):
    gated = x @ gate.T
    return (gated * gated.sigmoid() * (x @ up.T)) @ down.T


def next_token_loss(logits, labels):
    """Mean cross-entropy of predicting each label, but the first of a sequence and the ignored ones."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    of_label = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - of_label)[labels != IGNORED].mean()


def attention(q, k, v):
    """Causal attention of q (batch, heads, seq, head_dim) to k and v, which have fewer heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def llama_loss(weights, config, input_ids, labels):
    """Loss of a Llama whose weights have Hugging Face's names; `config` is its LlamaConfig."""
    batch, seq = input_ids.shape
    powers = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(seq, dtype=torch.float64), config.rope_parameters["rope_theta"] ** -powers)
    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if f"layers.{i}." in k}
        h = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (
            (h @ w[f"self_attn.{p}_proj.weight"].T).view(batch, seq, -1, config.head_dim).transpose(1, 2) for p in "qkv"
        )
        mixed = attention(rotate(q, angles), rotate(k, angles), v)
        x = x + mixed.transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T
        h = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + swiglu(h, *(w[f"mlp.{p}_proj.weight"] for p in ("gate", "up", "down")))
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return next_token_loss(x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T, labels)
