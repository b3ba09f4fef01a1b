"""What do the Liger kernels save when everything else is already offloaded?

    bash run_ds.sh                       # the original's settings; its variables are in the script
    bash run_ds.sh --preset fast         # ours, for speed, in no more GPU memory
    bash run_ds.sh --preset longest --max_seq_len 131072   # one sequence, as long as host memory allows
    deepspeed --num_gpus 1 deepspeed_liger_kernel.py --enable_liger_flce 0 --per_device_train_batch_size 8
    NUM_GPUS=8 bash run_ds.sh --dry_run  # predict GPU and host memory; needs no GPU

A model under DeepSpeed's ZeRO-3 with weights, gradients and optimizer states in CPU memory, Adam on the CPU and
gradient checkpointing: what remains on the GPU is activations, and the kernels' effect on them shows. Measures, records
and logs as all_gpu_liger_kernel.py does. Without a GPU it runs the same engine on DeepSpeed's CPU accelerator with a
tiny Llama, the kernels in Triton's interpreter.

Caveats: host memory must hold weights, gradients and optimizer states, 16 (fast) to 20 (original) bytes a parameter,
and what pinning rounds up. With `overlapped_cpu_adam` (preset fast) the update of a step runs behind the next step's
forward pass, so it counts in the next step's time; every timed step has exactly one.
"""

from src.cli import command_line
from src.offload import ranks
from src.offload_config import CPU_DEFAULTS, OffloadConfig

DEFAULTS = OffloadConfig()

if __name__ == "__main__":  # before PyTorch is imported: --help does not wait, and Triton learns whether to interpret
    COMMAND = command_line(__doc__, DEFAULTS, CPU_DEFAULTS)
    ranks.share_cores()

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from src.check import interpreter
from src.check.parity import measure_parity
from src.cli import run
from src.ds_utils import KeptEngine, build_engine, init_distributed, shut_down
from src.experiment import Mark, Runtime, Script, no_mark, random_batches_of_rank, set_seed
from src.measure import measure, measure_phases
from src.measure.devices import CudaRuntime, HostRuntime
from src.offload import floor
from src.offload.experiment import OffloadExperiment
from src.offload.simulated import SimulatedRank, unchecked
from src.offload.team import Ranks
from src.predict import dry_run, frontier
from src.record.recorder import Recorder
from src.utils import UsageError, keep_out_of_garbage_collection, print_rank0

Build = Callable[[OffloadConfig, torch.device], Any]  # makes DeepSpeed's engine


def build_experiment(config: OffloadConfig, runtime: Runtime, build: Build = build_engine) -> OffloadExperiment:
    """DeepSpeed's engine, fixed micro-batches, and the step that trains on them."""
    set_seed(config.seed)
    engine = build(config, runtime.device)
    batches = random_batches_of_rank(engine.module.config.vocab_size, config, runtime.device)

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

    return OffloadExperiment(engine, step, engine.global_steps, engine.skipped_steps)


def main(
    config: OffloadConfig,
    planned: OffloadConfig | None = None,
    build: Build = build_engine,
    predict: Callable[..., int] = dry_run.main,
) -> int:
    """Run what `config` describes, with the engine that `build` makes or keeps; returns the exit status."""
    if config.plans:
        return frontier.main(config, SCRIPT) if config.searched else predict(config, SCRIPT)
    ranks.check_environment()
    config = dataclasses.replace(config, world_size=ranks.world_size())
    on_gpu = config.device == "cuda"
    if not on_gpu and (refusal := config.refusal_on_cpu()):
        raise UsageError(refusal)
    device = init_distributed(config.device)
    if not on_gpu:
        interpreter.enable()
        print_rank0("No GPU in use: DeepSpeed's CPU accelerator, the Liger kernels in Triton's interpreter.")
    runtime = CudaRuntime(config) if on_gpu else HostRuntime()
    recorder = Recorder(config, "measured" if on_gpu else "interpreted", device, Ranks())
    experiment = None
    with recorder:
        runtime.release_cache()  # of the run before, in a study
        runtime.reset_peak()
        experiment = build_experiment(config, runtime, build)
        if not experiment.steps_before:
            keep_out_of_garbage_collection()
        recorder.add_model(experiment, runtime)
        recorder.add_measurement(measure(experiment.step, runtime, warmup=config.warmup, iterations=config.iterations))
        phases = measure_phases(experiment.step, runtime, lambda: None)
        recorder.add_phases(dataclasses.replace(phases, grad_norm=experiment.grad_norm()))
        recorder.record.skipped_steps = experiment.skipped_steps
        if on_gpu:
            experiment.finish_updates()
            recorder.record.floor_s, recorder.record.floor = floor.of_run(experiment.model, config, runtime)
    status = recorder.finish(experiment)
    if recorder.record.status == "ok" and build is build_engine:
        shut_down(experiment)
        if config.parity:
            del experiment
            recorder.add_parity(lambda: measure_parity(config, runtime.device))
    return status


def main_for_many() -> Callable[..., int]:
    """`main` for several runs in one process, which differ in their sizes alone: they share an engine."""
    return functools.partial(main, build=KeptEngine(), predict=kept_dry_runs())


def kept_dry_runs() -> dry_run.KeptDryRuns:
    """The same, of dry runs."""
    return dry_run.KeptDryRuns(functools.partial(build_experiment, build=KeptEngine()))


SCRIPT = Script(
    name="deepspeed_liger_kernel",
    defaults=DEFAULTS,
    cpu_defaults=CPU_DEFAULTS,
    build_experiment=build_experiment,
    main=main,
    main_for_many=main_for_many,
    simulate=SimulatedRank,
    kept_dry_runs=kept_dry_runs,
    unchecked=unchecked,
)

if __name__ == "__main__":
    sys.exit(run(main, COMMAND))
