"""What do the Liger kernels cost and save when one GPU trains a language model?

    python all_gpu_liger_kernel.py                                   # every Liger kernel
    python all_gpu_liger_kernel.py --enable_rope 0 --enable_swiglu 0 --enable_rms 0 --enable_flce 0   # none
    python all_gpu_liger_kernel.py --batch_size 16 --memory_limit_gib 24   # what a 24 GB card would do
    python all_gpu_liger_kernel.py --dry_run                         # predict the peak; needs no GPU
    python all_gpu_liger_kernel.py --dry_run --gpu_memory_gib 24 --find_max batch_size
    python all_gpu_liger_kernel.py --preset longest --seq_length 131072   # tokens in the hundred thousands

Trains on random tokens for a few steps and reports peak memory, latency and throughput; leaves a record in results/,
a memory snapshot in snap_shots/ and TensorBoard logs in logs/. Without a GPU it forecasts the memory and checks the
kernels instead: see src/check/kernels.py.

Caveats: Liger replaces code for the whole process, so compare strategies in separate runs. --dtype names the dtype of
weights, gradients and optimizer state alike; fp16 adds a loss scaler, and its optimizer state underflows: use it to
measure, not to train.
"""

from src.cli import command_line
from src.config import RunConfig

# The defaults; flags of the same names, in lower case, override them.
MODEL_NAME = "meta-llama/Llama-3.2-1B-Instruct"
BATCH_SIZE = 8
SEQ_LENGTH = 1024
ITERATIONS = 10
ENABLE_ROPE = True
ENABLE_SWIGLU = True
ENABLE_RMS = True
ENABLE_FLCE = True

DEFAULTS = RunConfig(
    model_name=MODEL_NAME,
    batch_size=BATCH_SIZE,
    seq_length=SEQ_LENGTH,
    iterations=ITERATIONS,
    rope=ENABLE_ROPE,
    swiglu=ENABLE_SWIGLU,
    rms_norm=ENABLE_RMS,
    flce=ENABLE_FLCE,
)

# Without a GPU: small enough for Triton's interpreter, with logits that dominate memory as they do at full size.
CPU_DEFAULTS = {
    "model_name": "tiny-llama",
    "batch_size": 2,
    "seq_length": 32,
    "iterations": 1,
    "warmup": 0,
    "dtype": "fp32",
    "learning_rate": 1e-3,
}

if __name__ == "__main__":  # before PyTorch is imported: --help does not wait, and Triton learns whether to interpret
    COMMAND = command_line(__doc__, DEFAULTS, CPU_DEFAULTS)

import sys

import torch

from src.check import kernels
from src.check.parity import measure_parity
from src.cli import run
from src.experiment import Experiment, Mark, Runtime, Script, no_mark, random_batches, set_seed
from src.measure import measure, measure_phases
from src.measure.devices import CudaRuntime
from src.model_utils import build_model, load_model_config
from src.offload.host_memory import check_kept_on_host
from src.offload.simulated import one_gpu
from src.optimizer_utils import build_loss_scaler, build_optimizer
from src.predict import dry_run, frontier
from src.record.recorder import Recorder


def build_experiment(config: RunConfig, runtime: Runtime) -> Experiment:
    """Model, optimizer, fixed batches, and the step that trains on them."""
    check_kept_on_host(config, load_model_config(config))
    set_seed(config.seed)
    model = build_model(config, runtime.device)
    optimizer = build_optimizer(model, config)
    scaler = build_loss_scaler(config, runtime.device)
    batches = random_batches(model.config.vocab_size, config, runtime.device)
    # Each micro-batch's share of the gradient; None is the whole.
    share = torch.tensor(1 / len(batches), device=runtime.device) if len(batches) > 1 else None

    def step(mark: Mark = no_mark) -> torch.Tensor:
        losses = []
        for batch in batches:
            mark("forward")
            loss = model(**batch).loss
            losses.append(loss.detach())
            mark("backward")
            scaler.scale(loss).backward(share)
        mark("optimizer")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    return Experiment(model, optimizer, scaler, runtime.captured(step) if config.cuda_graph else step)


def main(config: RunConfig, planned: RunConfig | None = None) -> int:
    """Run what `config` describes; `planned` is what a GPU would run in its place. Returns the exit status."""
    if config.searched:
        return frontier.main(config, SCRIPT)
    if config.dry_run:
        return dry_run.main(config, SCRIPT)
    if config.device == "cpu":
        return kernels.main(config, SCRIPT, planned)
    runtime = CudaRuntime(config)
    recorder = Recorder(config, "measured", runtime.device)
    experiment = None
    with recorder:
        runtime.release_cache()  # of the run before, in a search
        runtime.reset_peak()
        experiment = build_experiment(config, runtime)
        recorder.add_model(experiment, runtime)
        recorder.add_measurement(measure(experiment.step, runtime, warmup=config.warmup, iterations=config.iterations))
        if config.phases:
            recorder.add_phases(measure_phases(experiment.step, runtime, experiment.grad_norm))
    status = recorder.finish(experiment)
    if config.parity:
        del experiment  # three models come and go on the GPU now
        runtime.release_cache()
        recorder.add_parity(lambda: measure_parity(config, runtime.device))
    return status


SCRIPT = Script(
    name="all_gpu_liger_kernel",
    defaults=DEFAULTS,
    cpu_defaults=CPU_DEFAULTS,
    build_experiment=build_experiment,
    main=main,
    simulate=one_gpu,
)

if __name__ == "__main__":
    sys.exit(run(main, COMMAND))
