"""Do the kernels train as Hugging Face's code does? Loss curves of a small model on real text, on one GPU.

    python -m src.check.convergence curves.jsonl            # 300 steps of each variant
    python -m src.check.convergence curves.jsonl --steps 20 --device cpu

Same weights and same batches for all. Weights and gradients are in the dtype named, with fp32 master weights and
moments, as under DeepSpeed; fp16 has the original's fixed loss scale, 2^7. The text is the Python language reference
that comes with Python itself (pydoc_data.topics, PSF License), a word or punctuation mark a token.
"""

import argparse
import collections
import dataclasses
import json
import os
import pydoc_data.topics
import re
import sys
from pathlib import Path
from typing import Any

from src import machine, program
from src.config import RunConfig
from src.techniques import STRATEGIES
from src.utils import ExitStatus, UsageError, write_atomically

VOCABULARY = 16384  # of the shape small-llama
LOSS_SCALE = 2.0**7
CONFIG = RunConfig(model_name="small-llama", batch_size=8, seq_length=512, learning_rate=3e-4)

# Name -> settings. Under fp16 also as the original did it, with FLCE's mean.
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16, Hugging Face": {"dtype": "bf16", **STRATEGIES["none"]},
    "bf16, all kernels": {"dtype": "bf16", **STRATEGIES["all"]},
    "fp16, Hugging Face": {"dtype": "fp16", **STRATEGIES["none"]},
    "fp16, all kernels (sum)": {"dtype": "fp16", **STRATEGIES["all"], "flce_reduction": "sum"},
    "fp16, all kernels (mean)": {"dtype": "fp16", **STRATEGIES["all"], "flce_reduction": "mean"},
}


def tokens_of_text() -> list[int]:
    """The text as numbers below `VOCABULARY`, the most frequent words first; all other words are number 0."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(pydoc_data.topics.topics.values()))
    frequent = collections.Counter(words).most_common(VOCABULARY - 1)
    number = {word: i + 1 for i, (word, _) in enumerate(frequent)}
    return [number.get(word, 0) for word in words]


def train(config: RunConfig, steps: int, device: str) -> list[float]:
    """The loss of each of `steps` steps."""
    import torch

    from src.experiment import set_seed
    from src.model_utils import build_model, patched
    from src.techniques import forward_arguments

    text = torch.tensor(tokens_of_text())
    draw = torch.Generator().manual_seed(config.seed)
    scale = LOSS_SCALE if config.dtype == "fp16" else 1.0
    with patched():
        set_seed(config.seed)
        model = build_model(dataclasses.replace(config, dtype="fp32"), torch.device(device))
        masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        model = model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype])
        optimizer = torch.optim.AdamW(masters, lr=config.learning_rate)
        losses = []
        for _ in range(steps):
            starts = torch.randint(len(text) - config.seq_length, (config.batch_size,), generator=draw)
            ids = torch.stack([text[start : start + config.seq_length] for start in starts]).to(device)
            loss = model(input_ids=ids, labels=ids, **forward_arguments(config)).loss
            (loss * scale).backward()
            for master, parameter in zip(masters, model.parameters()):
                master.grad, parameter.grad = parameter.grad.float() / scale, None
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, model.parameters()):
                    parameter.copy_(master)
            losses.append(loss.item())
    return losses


def main() -> int:
    """Train every variant and write its curve; returns the exit status."""
    return program.guarded(_main)


def _main() -> int:
    parser = program.Parser(
        prog="python -m src.check.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a line of JSON for each variant")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise UsageError(f"--steps must be 1 or more, got {arguments.steps}")
    if arguments.file.exists():
        raise UsageError(f"{arguments.file} is there already: name another file")
    _run(arguments.file, arguments.steps, arguments.device)
    return ExitStatus.DONE


def _run(file: Path, steps: int, device: str) -> None:
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while it is imported
        from src.check import interpreter

        interpreter.enable()
    elif not machine.has_gpu():
        raise UsageError("no GPU here: --device cpu runs a few --steps in Triton's interpreter")
    environment, lines = machine.environment(on_gpu=device == "cuda"), []
    for name, settings in VARIANTS.items():
        config = dataclasses.replace(CONFIG, **settings)
        losses = train(config, steps, device)
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
        told = {"variant": name, "config": config.to_dict(), "losses": losses, "environment": environment}
        lines.append(json.dumps(told))
        write_atomically(file, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))
    print(f"curves   {file}")


if __name__ == "__main__":
    program.begin()
    sys.exit(main())
