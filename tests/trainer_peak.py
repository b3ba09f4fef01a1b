"""The peak of a steady step of Hugging Face's Trainer: Llama 3.2 1B, random fp32 weights, under bf16 or fp16 autocast.

    python -m tests.trainer_peak bf16 OUT.json [--cpu]

8 x 1024 tokens, gradient checkpointing, fused AdamW, no clipping: the settings of
all_gpu_liger_kernel.py --mixed_precision bf16 with every kernel off. --cpu tries the script on a tiny model.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from src.config import RunConfig
from src.model_utils import build_model
from src.techniques import kernels_only

PRECISION, OUT, ON_CPU = sys.argv[1], Path(sys.argv[2]), "--cpu" in sys.argv
STEPS, WARMUP = 8, 3


class Peaks(TrainerCallback):
    """Peak allocated and seconds of each step, read as src/measure/steps.py reads them."""

    def __init__(self):
        self.peak_bytes, self.reserved_bytes, self.seconds = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if not ON_CPU:
            if state.global_step == WARMUP:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if not ON_CPU:
            torch.cuda.synchronize()
            self.peak_bytes.append(torch.cuda.max_memory_allocated())
            self.reserved_bytes.append(torch.cuda.max_memory_reserved())
        self.seconds.append(time.perf_counter() - self.begun)


batch, length, name = (2, 32, "tiny-llama") if ON_CPU else (8, 1024, RunConfig().model_name)
config = RunConfig(model_name=name, dtype="fp32", gradient_checkpointing=False, **kernels_only())
torch.manual_seed(config.seed)
model = build_model(config, torch.device("cpu" if ON_CPU else "cuda"))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(model.config.vocab_size, (batch, length))] * STEPS
peaks = Peaks()
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=batch,
    max_steps=STEPS,
    bf16=PRECISION == "bf16",
    fp16=PRECISION == "fp16",
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    optim="adamw_torch_fused",
    max_grad_norm=0,
    learning_rate=config.learning_rate,
    report_to=[],
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
    use_cpu=ON_CPU,
)
Trainer(model, arguments, train_dataset=rows, callbacks=[peaks]).train()
found = {
    "what": f"transformers.Trainer, {PRECISION}=True, {name}, {batch} x {length}, fp32 weights, checkpointing",
    "gpu": None if ON_CPU else torch.cuda.get_device_name(),
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    "peak_memory_bytes": max(peaks.peak_bytes[WARMUP:], default=None),
    "peak_reserved_bytes": max(peaks.reserved_bytes[WARMUP:], default=None),
    "latency_s": statistics.median(peaks.seconds[WARMUP:]),
    "peak_memory_bytes_of_each_step": peaks.peak_bytes,
    "seconds_of_each_step": peaks.seconds,
}
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found))
