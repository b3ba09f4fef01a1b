"""Runs offload experiments one after the other, in one process or in each rank of a job, and saves what they showed.

    python -m tests.offload_driver CASES.json RESULTS.pt

A case is a command line, `args`, with "{rank}" for the rank. `steps` builds its engine and trains that many steps;
without it the script's main() runs. What else a case can ask for stands where it is used.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cpuinfo
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import z3_leaf_module

import deepspeed_liger_kernel as script
from src import ds_utils, interpreter
from src.attribution import Attribution
from src.cli import parse_config, run
from src.config import OFFLOAD_OPTIMIZERS, OffloadConfig
from src.kernel_check import patched
from src.model_utils import implementations
from src.offload import ranks
from src.optimizer_utils import build_offload_optimizer
from src.runtime import HostRuntime
from src.utils import GIB, is_rank0

# DeepSpeed asks for every optimizer; the answer takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)

RANK = int(os.environ.get("RANK", "0"))


def parsed(args):
    sys.argv = ["deepspeed_liger_kernel.py", *(arg.replace("{rank}", str(RANK)) for arg in args)]
    return parse_config(script.__doc__, script.DEFAULTS, cpu_defaults=script.CPU_DEFAULTS)


def mean_over_ranks(value):
    values = ds_utils._gathered(value)
    return sum(values) / len(values)


def weights(model):
    """All weights, as they are now: call it only when no update is running."""
    with GatheredParameters(list(model.parameters())):
        return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def moments(optimizer):
    """This rank's share of Adam's first moment."""
    return torch.cat([state["exp_avg"].flatten().float() for state in optimizer.state.values() if "exp_avg" in state])


def facts(engine):
    """What flags set."""
    zero, model = engine.optimizer, engine.module
    adam = zero.optimizer
    coordinator = zero.parameter_offload.get_param_coordinator()
    return {
        "group": {name: value for name, value in adam.param_groups[0].items() if name != "params"},
        "optimizer": type(adam).__name__,
        "zero": type(zero).__name__,
        "threads": getattr(adam, "threads", None),
        "master_dtypes": {str(group.dtype) for group in zero.fp32_partitioned_groups_flat},
        "weight_dtypes": {str(p.dtype) for p in model.parameters()},
        "clip": zero.clip_grad,
        "sub_groups": len(zero.fp16_groups),
        "bucket": zero.reduce_bucket_size,
        "prefetch": coordinator._PartitionedParameterCoordinator__prefetch_bucket_sz,
        "live": coordinator._PartitionedParameterCoordinator__max_n_available_params,
        "leaves": sum(z3_leaf_module(module) for module in model.modules()),
        "accumulation": engine.gradient_accumulation_steps(),
        "print": engine.steps_per_print(),
        "checkpointing": model.is_gradient_checkpointing,
        "attention": model.config._attn_implementation,
        "implementations": implementations(model),
    }


def late(update, seconds):
    """Every update begins late, so that whoever does not wait for it reads old weights."""

    def wait_and_update(*args, **kwargs):
        time.sleep(seconds)
        update(*args, **kwargs)

    return wait_and_update


class Watching(Attribution):
    """Tells what it notes, of tensors that are not on a GPU too."""

    def watch(self, model, result):
        self.parameters, self.result = dict(model.named_parameters()), result
        return self

    def own(self, category, tensors):
        for tensor in tensors:
            self.result["owned"].add(category)
            if category == "gradients":
                self.result["gradients"] += [name for name, p in self.parameters.items() if p.grad is tensor]


def labelled_step(experiment, config, result):
    """A step whose labels and notes go to `result`, with the methods that are replaced before and after it."""
    names = [name for name, _ in experiment.model.named_parameters()]
    result |= {"labels": [], "phases": [], "owned": set(), "gradients": [], "names": names}
    sink = SimpleNamespace(set_label=result["labels"].append, enter_phase=result["phases"].append)
    attribution = Watching(sink, experiment, gradient_checkpointing=config.gradient_checkpointing)
    zero = experiment.engine.optimizer
    owners = [*experiment.model.modules(), zero, zero.parameter_offload.get_param_coordinator()]
    result["before"] = [list(vars(owner)) for owner in owners]
    loss = attribution.watch(experiment.model, result).step()
    result["after"] = [list(vars(owner)) for owner in owners]
    return loss


def train(case):
    """The engine's own figures, step by step.

    `each` keeps the weights after every step, `late_s` delays updates, `labelled` is a step that is attributed.
    """
    config = dataclasses.replace(parsed(case["args"]), world_size=ranks.world_size())
    experiment = script.build_experiment(config, HostRuntime())
    engine, adam, inputs = experiment.engine, experiment.engine.optimizer.optimizer, []
    engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True
    )
    if case.get("late_s"):
        adam.update = late(adam.update, case["late_s"])
    result = {"config": config.to_dict(), "facts": facts(engine), "losses": [], "norms": [], "lrs": []}
    result["weights"] = [weights(engine.module)]
    for number in range(case["steps"]):
        result["lrs"].append(adam.param_groups[0]["lr"])
        labelled = number == case.get("labelled")
        loss = labelled_step(experiment, config, result) if labelled else experiment.step()
        result["losses"].append(mean_over_ranks(loss.item()))
        result["norms"].append(experiment.grad_norm())
        if case.get("each"):
            experiment.finish_updates()
            result["weights"].append(weights(engine.module))
    pending = getattr(engine.optimizer, "_pending", {})
    result["pending"] = [len(pending)]
    experiment.finish_updates()
    result["pending"].append(len(pending))
    if case["steps"]:
        result |= {"weights": [*result["weights"], weights(engine.module)], "moments": moments(adam)}
        result["state_dtypes"] = {str(state["exp_avg"].dtype) for state in adam.state.values() if "exp_avg" in state}
    result["inputs"] = torch.cat(inputs[: config.gradient_accumulation_steps]) if inputs else None
    engine.destroy()
    return result


def failing(step, failure, built):
    """A step that at its second call, on one rank, runs out of memory."""

    def fail(*args):
        built["steps"] += 1
        if failure and built["steps"] == 2 and failure["rank"] == RANK:
            Path(failure["marker"]).touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line.")
        return step(*args)

    return fail


def run_main(case):
    """What main() prints and returns, on each rank. `fails` breaks its second step, `free_gib` is the host's memory.

    `then` are the flags that each further run of a sweep adds.
    """
    built = {"steps": 0}

    def build(config, runtime, *engine):
        experiment = build_experiment(config, runtime, *engine)
        return ds_utils.OffloadExperiment(experiment.engine, failing(experiment.step, case.get("fails"), built))

    build_experiment = script.build_experiment
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(script, "build_experiment", build))
        engines = stack.enter_context(mock.patch.object(ds_utils, "build_engine", wraps=ds_utils.build_engine))
        main = script.main_of_sweep() if "then" in case else script.main
        try:
            for flags in ["", *case.get("then", [])]:
                status = run(main, parsed([*case["args"], *flags.split()]))
        except SystemExit as stopped:
            status = stopped.code
    printed = {"stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    return {"status": int(status), **printed, "steps": built["steps"], "engines": engines.call_count}


def compile_optimizers():
    """Compile what a machine's first run compiles; no case's time counts that."""
    for optimizer in OFFLOAD_OPTIMIZERS:
        build_offload_optimizer(torch.nn.Linear(1, 1), OffloadConfig(optimizer=optimizer, dtype="fp32"))


def main():
    cases_file, results_file = sys.argv[1:]
    with open(cases_file) as file:
        cases = json.load(file)
    ds_utils.init_distributed("cpu")
    interpreter.enable()
    compile_optimizers()
    results = {}
    for name, case in cases.items():
        # Ranks that wait for each other in vain end with where they are.
        faulthandler.dump_traceback_later(case.get("limit_s", 60), exit=True)
        # Tiny models fit; the check's allowance for each process is a GPU's.
        free_bytes = case.get("free_gib", 2**20) * GIB
        with patched(), mock.patch.object(ds_utils, "_available_host_bytes", return_value=free_bytes):
            try:
                if "steps" in case:
                    results[name] = train(case)
                else:
                    results[name] = run_main(case)
                    if case.get("fails") and ranks.world_size() > 1:
                        sys.exit(results[name]["status"])  # as the program does; other ranks wait in vain
                    results[name]["ranks"] = ds_utils._gathered(dict(results[name]))
            except Exception:
                results[name] = {"error": traceback.format_exc()}
                if ranks.world_size() > 1:
                    raise
    faulthandler.cancel_dump_traceback_later()
    if is_rank0():
        torch.save(results, results_file)
    torch.distributed.barrier()
    ds_utils._leave_job()


if __name__ == "__main__":
    main()
