"""What do the Liger kernels cost and save when one GPU trains Llama?

    python all_gpu_liger_kernel.py                                   # every Liger kernel
    python all_gpu_liger_kernel.py --enable_rope 0 --enable_swiglu 0 --enable_rms 0 --enable_flce 0   # none
    python all_gpu_liger_kernel.py --batch_size 16 --memory_limit_gib 24   # what a 24 GB card would do
    python all_gpu_liger_kernel.py --dry_run                         # predict the peak; needs no GPU
    python all_gpu_liger_kernel.py --dry_run --gpu_memory_gib 24 --find_max batch_size

Trains on random tokens for a few steps and reports peak memory, latency and throughput; leaves a record in results/,
a memory snapshot in snap_shots/ and TensorBoard logs in logs/. Without a GPU it checks the kernels instead: see
src/kernel_check.py.

Caveats: Liger replaces code for the whole process, so compare strategies in separate runs. --dtype names the dtype of
weights, gradients and optimizer state alike; fp16 adds a loss scaler, and its optimizer state underflows: use it to
measure, not to train.
"""

import sys

from src import dry_run, frontier, kernel_check, records
from src.attribution import record_breakdown
from src.cli import parse_config, run
from src.config import RunConfig, Strategy
from src.experiment import Experiment
from src.measure import Mark, measure, measure_phases, no_mark
from src.model_utils import build_model, flops_per_step, implementations
from src.optimizer_utils import build_loss_scaler, build_optimizer
from src.profiler import trace_step, write_tensorboard
from src.random_data import random_batch, set_seed
from src.recording import add_measurement, add_phases, new_record, recording
from src.runtime import CudaRuntime, Runtime
from src.utils import print_rank0

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
    strategy=Strategy(rope=ENABLE_ROPE, swiglu=ENABLE_SWIGLU, rms_norm=ENABLE_RMS, flce=ENABLE_FLCE),
)


def build_experiment(config: RunConfig, runtime: Runtime) -> Experiment:
    """Model, optimizer, one fixed batch, and the step that trains on it."""
    set_seed(config.seed)
    model = build_model(config, runtime.device)
    optimizer = build_optimizer(model, config)
    scaler = build_loss_scaler(config, runtime.device)
    batch = random_batch(model.config.vocab_size, config.batch_size, config.seq_length, runtime.device)

    def step(mark: Mark = no_mark):
        mark("forward")
        loss = model(**batch).loss
        mark("backward")
        scaler.scale(loss).backward()
        mark("optimizer")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Experiment(model, optimizer, scaler, step)


def main(config: RunConfig) -> int:
    """Run the experiment `config` describes; returns the exit status."""
    if config.find_max:
        return frontier.main(config, build_experiment, main)
    if config.dry_run:
        return dry_run.main(config, build_experiment)
    if config.device == "cpu":
        return kernel_check.main(config, build_experiment, DEFAULTS)
    runtime = CudaRuntime(config)
    record = new_record("measured", config, runtime.device)
    with recording(record, config):
        runtime.reset_peak()
        experiment = build_experiment(config, runtime)
        record |= {
            "implementations": implementations(experiment.model),
            "model_flops_per_step": flops_per_step(experiment.model, config),
            "load_peak_bytes": runtime.peak_bytes()[0],
        }
        measurement = measure(experiment.step, runtime, warmup=config.warmup, iterations=config.iterations)
        add_measurement(record, measurement)
        add_phases(record, measure_phases(experiment.step, runtime, experiment.grad_norm))
    print_rank0(records.report(record, config))
    # The record is safe by now, whatever becomes of the diagnostic steps.
    if record["status"] == "ok":
        timeline = None
        if config.breakdown:
            timeline = record_breakdown(experiment, record, config)
            print_rank0("\n" + records.breakdown(record))
        if config.log_dir:
            write_tensorboard(config.log_folder, record, measurement, timeline)
            trace_step(experiment.step, config.trace_file)
    print_rank0("\n" + records.files_written(config))
    return records.exit_status(record)


if __name__ == "__main__":
    sys.exit(run(main, parse_config(__doc__, DEFAULTS, cpu_defaults=kernel_check.DEFAULTS)))
