"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.config import RunConfig
from src.techniques import KERNEL_NAMES, kernels_only

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "all_gpu_liger_kernel.py"
HUGGING_FACE = kernels_only()  # the settings of a run with Hugging Face's own code
ALL_KERNELS = kernels_only(*KERNEL_NAMES)
STRATEGIES = [HUGGING_FACE, *map(kernels_only, KERNEL_NAMES), ALL_KERNELS]


def near_host_peak(record):
    """What a prediction of the host memory of a measured run is to equal: its peak, within a few per cent.

    By half a GiB differs what a process takes beside tensors.
    """
    return pytest.approx(record.host_peak_bytes, rel=0.05, abs=2**29)


def strategy_id(strategy):
    """The kernels that are on, as a test id."""
    return "+".join(name for name, is_on in strategy.items() if is_on) or "none"


def tiny_config(**fields):
    """A `RunConfig` that builds and trains on a CPU in a moment; Hugging Face's code unless told otherwise."""
    defaults = {"model_name": "tiny-llama", "batch_size": 1, "seq_length": 16, "dtype": "fp32", "device": "cpu"}
    return RunConfig(**HUGGING_FACE | defaults | fields)


def write_llama_folder(folder, **shape):
    """A local folder with the config.json of a small Llama."""
    small = {
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    from transformers import LlamaConfig

    LlamaConfig(**{**small, **shape}).save_pretrained(folder)
    return str(folder)


def run_python(*arguments, env=None, cwd=ROOT):
    """Run Python as a program of its own; its stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env or os.environ, cwd=cwd, capture_output=True, text=True
    )


WATCHED = """
import resource, subprocess, sys
try:
    status = subprocess.run(sys.argv[2:], timeout=float(sys.argv[1])).returncode
except subprocess.TimeoutExpired:
    status = "it took too long"
print("rss_kib", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def run_watched(*arguments, timeout=300, **kwargs):
    """As `run_python`: (the process, its largest resident set in bytes)."""
    done = run_python("-c", WATCHED, timeout, sys.executable, *arguments, **kwargs)
    before, _, after = done.stderr.rpartition("rss_kib ")
    kib, _, late = after.partition("\n")
    done.stderr = before + late
    return done, int(kib) * 1024


def assert_one_error_line(stderr, text):
    """What a user sees of a mistake: one line, which says what it is."""
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert text in stderr
