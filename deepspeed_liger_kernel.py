"""What do the Liger kernels save when everything else is already offloaded?

    bash run_ds.sh                       # the original's settings; its variables are in the script
    bash run_ds.sh --preset fast         # ours, for speed, in no more GPU memory
    deepspeed --num_gpus 1 deepspeed_liger_kernel.py --enable_liger_flce 0 --per_device_train_batch_size 8

Llama under DeepSpeed's ZeRO-3 with weights, gradients and optimizer states in CPU memory, Adam on the CPU and gradient
checkpointing: what remains on the GPU is activations, and the kernels' effect on them shows. Measures, records and
logs as all_gpu_liger_kernel.py does. Without a GPU it runs the same engine on DeepSpeed's CPU accelerator with a tiny
Llama, the kernels in Triton's interpreter.

Caveats: host memory must hold weights, gradients and optimizer states, 16 (fast) to 20 (seed) bytes a parameter, and
what pinning rounds up. With `overlapped_cpu_adam` (preset fast) the update of a step runs behind the next
step's forward pass, so it counts in the next step's time; every timed step has exactly one.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from src import floor, interpreter, records
from src.attribution import record_breakdown
from src.cli import parse_config, run
from src.config import OffloadConfig
from src.ds_utils import (
    KeptEngine,
    OffloadExperiment,
    build_engine,
    init_distributed,
    max_over_ranks,
    over_ranks,
    phases_over_ranks,
    report_of_ranks,
    shut_down,
    sum_over_ranks,
)
from src.measure import Mark, measure, measure_phases, no_mark
from src.model_utils import flops_per_step, implementations
from src.offload import ranks
from src.profiler import trace_step, write_tensorboard
from src.random_data import micro_batches, set_seed
from src.recording import add_measurement, add_phases, new_record, recording
from src.runtime import CudaRuntime, HostRuntime, Runtime, host_peak_bytes
from src.utils import UsageError, is_rank0, keep_out_of_garbage_collection, print_rank0

DEFAULTS = OffloadConfig()
Build = Callable[[OffloadConfig, torch.device], Any]  # makes DeepSpeed's engine

# With stacks of releases too, a step under DeepSpeed failed on PyTorch 2.11: "returned NULL without an exception".
CONTEXT = "alloc"

# Without a GPU: what Triton's interpreter can run in a minute or two.
CPU_DEFAULTS = {
    "model_name": "tiny-llama",
    "batch_size": 2,
    "seq_length": 64,
    "iterations": 2,
    "warmup": 1,
    "dtype": "fp32",
    "optimizer_states": "fp32",
}


def build_experiment(config: OffloadConfig, runtime: Runtime, build: Build = build_engine) -> OffloadExperiment:
    """DeepSpeed's engine, fixed micro-batches, and the step that trains on them."""
    set_seed(config.seed)
    engine = build(config, runtime.device)
    batches = micro_batches(engine.module.config.vocab_size, config, runtime.device)

    def step(mark: Mark = no_mark) -> torch.Tensor:
        losses = []
        for batch in batches:
            mark("forward")
            loss = engine(**batch).loss
            losses.append(loss.detach())
            mark("backward")
            engine.backward(loss)
            if batch is batches[-1]:
                mark("optimizer")
            engine.step()
        return torch.stack(losses).mean()

    return OffloadExperiment(engine, step)


def main(config: OffloadConfig, build: Build = build_engine) -> int:
    """Run the experiment `config` describes, with the engine that `build` makes or keeps; returns the exit status."""
    ranks.check_environment()
    config = dataclasses.replace(config, world_size=ranks.world_size())
    on_gpu = config.device == "cuda"
    if not on_gpu and (config.dtype == "fp16" or config.memory_limit_gib is not None):
        raise UsageError("on a CPU there is no --dtype fp16 and no --memory_limit_gib")
    device = init_distributed(config.device)
    if not on_gpu:
        interpreter.enable()
        print_rank0("No GPU in use: DeepSpeed's CPU accelerator, the Liger kernels in Triton's interpreter.")
    runtime = CudaRuntime(config) if on_gpu else HostRuntime()
    record = new_record("measured" if on_gpu else "interpreted", config, device)
    with recording(record, config, keeps=is_rank0()):
        runtime.release_cache()  # of the run before, in a sweep
        runtime.reset_peak()
        experiment = build_experiment(config, runtime, build)
        steps_before, skipped_before = experiment.steps_done
        is_new = not steps_before
        if is_new:
            keep_out_of_garbage_collection()
        record |= {
            "implementations": implementations(experiment.engine.module),
            "model_flops_per_step": flops_per_step(experiment.engine.module, config),
            "load_peak_bytes": max_over_ranks(runtime.peak_bytes()[0] if is_new else None),
            "steps_before": steps_before,
        }
        measurement = over_ranks(measure(experiment.step, runtime, warmup=config.warmup, iterations=config.iterations))
        add_measurement(record, measurement)
        phases = measure_phases(experiment.step, runtime, lambda: None)
        add_phases(record, phases_over_ranks(phases, experiment.grad_norm()))
        record["host_peak_bytes"] = sum_over_ranks(host_peak_bytes()) if is_new else None  # the process's
        record["skipped_steps"] = experiment.steps_done[1] - skipped_before
        if on_gpu:
            experiment.finish_updates()
            record |= floor.of_run(experiment.engine.module, config, runtime)
    report_of_ranks(record, config)
    # The record is safe by now, whatever becomes of the diagnostic steps, in which every rank takes part.
    timeline = None
    if record["status"] == "ok" and on_gpu and config.breakdown:
        timeline = record_breakdown(experiment, record, config, context=CONTEXT, keeps=is_rank0())
        print_rank0("\n" + records.breakdown(record))
    if record["status"] == "ok" and config.log_dir:
        if is_rank0():
            write_tensorboard(config.log_folder, record, measurement, timeline)
        trace_step(experiment.step, config.trace_file, keeps=is_rank0())
    if record["status"] == "ok" and build is build_engine:
        shut_down(experiment)
    print_rank0("\n" + records.files_written(config))
    return records.exit_status(record)


def main_of_sweep() -> Callable[[OffloadConfig], int]:
    """`main` for several runs in one process, which differ in their sizes alone: they share an engine."""
    return functools.partial(main, build=KeptEngine())


if __name__ == "__main__":
    config = parse_config(__doc__, DEFAULTS, cpu_defaults=CPU_DEFAULTS)
    sys.exit(run(main, config))
