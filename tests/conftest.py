"""Every test runs on the CPU, with Liger's kernels in Triton's interpreter and no network; tests marked gpu start the
scripts as programs of their own on the GPU.

Shapes and values are drawn anew in every run. A failing test prints its seed: TEST_SEED=<seed> repeats it.
"""

import os
import random
import signal

os.environ |= {
    "TRITON_INTERPRET": "1",  # read when Triton is imported
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",  # read when DeepSpeed is imported
    "OMP_NUM_THREADS": "1",  # on tensors this small, threads only wait for each other
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # look for a GPU without initialising CUDA
}

import hypothesis
import pytest
import torch

from src.check import interpreter

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
HAS_GPU = torch.cuda.is_available()
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests, whether the machine has a GPU or not
interpreter.enable()

from src.model_utils import patched  # noqa: E402 - imports Triton

CPU_ONLY = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
SEED = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**31))
LIMIT_S = 900  # for a test that hangs; the first that needs DeepSpeed's CPU Adam compiles it, minutes on a busy machine

# A busy machine is no failure. What is found is printed, not kept in a folder, and is short enough not to be shrunk.
PHASES = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.shrink]
hypothesis.settings.register_profile("here", deadline=None, database=None, max_examples=100, phases=PHASES)
hypothesis.settings.load_profile("here")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def time_limit():
    """End a test that hangs."""

    def end(*_):
        raise TimeoutError(f"the test took longer than {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def rng(request):
    """A random generator of this test's own; torch's global one is seeded from it."""
    print(f"TEST_SEED={SEED}")
    rng = random.Random(f"{SEED} {request.node.name}")
    torch.manual_seed(rng.randrange(2**31))
    return rng


@pytest.fixture(autouse=True)
def unpatched():
    """Undo what a test let Liger replace in Hugging Face's code."""
    with patched():
        yield


@pytest.fixture
def gpu_environment():
    """Environment variables of a program that may use the GPU."""
    environment = {k: v for k, v in os.environ.items() if k not in CPU_ONLY}
    return environment if VISIBLE_GPUS is None else environment | {"CUDA_VISIBLE_DEVICES": VISIBLE_GPUS}


@pytest.fixture(scope="session")
def compiled_adam():
    """Both CPU optimizers, compiled: once on a machine, some minutes, which no test's own limit counts."""
    from src.offload_config import OFFLOAD_OPTIMIZERS, OffloadConfig
    from src.optimizer_utils import build_offload_optimizer

    for optimizer in OFFLOAD_OPTIMIZERS:
        build_offload_optimizer(torch.nn.Linear(1, 1), OffloadConfig(optimizer=optimizer, dtype="fp32"))
