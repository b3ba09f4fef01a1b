"""The ZeRO-3 offload experiment on DeepSpeed's CPU accelerator, against a plain PyTorch loop. Engines run in forks of
this process: a job cannot be started twice in one, and importing everything again would take longer than all of them.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import os
import threading
import traceback
from multiprocessing import get_context
from types import SimpleNamespace

import cpuinfo
import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from transformers import get_scheduler

import deepspeed_liger_kernel as script
from src import ds_utils
from src.ds_utils import free_port, init_distributed
from src.experiment import no_mark
from src.measure.devices import HostRuntime
from src.model_utils import build_model
from src.offload import host_memory
from src.offload.team import gathered
from src.offload_config import PRESETS, OffloadConfig
from src.record import load, load_all
from tests.helpers import HUGGING_FACE, write_llama_folder

pytestmark = pytest.mark.usefixtures("compiled_adam")

# Sizes that 2 ranks do not divide: their partitions are padded.
SHAPE = {"vocab_size": 499, "hidden_size": 30, "head_dim": 6, "intermediate_size": 77, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 5, "num_key_value_heads": 1}
SEQ_LENGTH, GLOBAL_BATCH, STEPS = 32, 4, 3

# What must not change what is computed, or changes it as it changes PyTorch's.
VARIANTS = {
    "as it is": {},
    "2 micro-batches": {"gradient_accumulation_steps": 2, "batch_size": 2},
    "other settings of Adam": {"beta_0": 0.5, "beta_1": 0.7, "weight_decay": 0.5, "gradient_clipping": 0.05},
    "LoRA": {"lora_rank": 3},
    "other settings of ZeRO": {
        "gradient_checkpointing": False,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 1e9,
        "fetch_layers": True,
        "prefetch_layers": 2,
        "ds_override": '{"zero_optimization": {"stage3_param_persistence_threshold": 1000}}',
    },
}
CASES = list(itertools.product(PRESETS, VARIANTS))
VARIANTS["long sequences"] = {"mlp_tile_tokens": 7, "checkpoint_offload": "overlapped", "attention_kept": 2}
VARIANTS["long sequences"] |= {"flce": True, "flce_tokens": 50}
CASES.append(("fast", "long sequences"))  # the other preset fetches no whole layers


def config_of(preset, folder, **fields):
    usual = {"dtype": "fp32", "batch_size": GLOBAL_BATCH, "seq_length": SEQ_LENGTH, "device": "cpu", **HUGGING_FACE}
    usual |= {"log_dir": "", "snapshot_dir": "", "result_dir": str(folder / "results"), "learning_rate": 1e-3}
    return OffloadConfig(preset=preset, model_name=str(folder / "model"), **{**PRESETS[preset], **usual, **fields})


def in_forks(count, work, *arguments):
    """What `work(*arguments)` returns in each of `count` processes that make a job."""
    context, port = get_context("fork"), str(free_port())
    connections, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        target_arguments = (theirs, {name: str(value) for name, value in variables.items()}, work, arguments)
        processes.append(context.Process(target=_serve, args=target_arguments))
        processes[-1].start()
        theirs.close()
        connections.append(ours)
    try:
        return [connection.recv() for connection in connections]  # EOFError: it died, and has printed why
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(connection, variables, work, arguments):
    os.environ |= variables
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # DeepSpeed asks every time; it takes a second
    host_memory.available_host_bytes = lambda: 2**50  # of this machine's, no test's concern
    try:
        init_distributed("cpu")
        connection.send(work(*arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # what this process registered for its own end is not the fork's


def weights_of(model):
    """All weights, as they are now: call it only when no update is running."""
    with GatheredParameters(list(model.parameters())):
        # NumPy's arrays go through a pipe as they are; tensors would be shared.
        return {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}


def run_as_late_as_can_be(zero):
    """Let each update run only when somebody waits for it, so that whoever does not wait reads old weights."""
    allowed, freed = threading.Semaphore(0), set()
    update, wait = zero.optimizer.update, zero._wait

    def late(*args, **kwargs):
        allowed.acquire()
        update(*args, **kwargs)

    def free_and_wait(sub_group):
        pending = list(zero._pending)
        for other in pending[: pending.index(sub_group) + 1] if sub_group in pending else []:  # updates have an order
            if other not in freed:
                freed.add(other)
                allowed.release()
        wait(sub_group)
        freed.discard(sub_group)

    zero.optimizer.update, zero._wait = late, free_and_wait


def train(config):
    """A few steps of an engine, and what it showed."""
    experiment = script.build_experiment(config, HostRuntime())
    zero, inputs = experiment.engine.optimizer, []
    overlapped = config.optimizer == "overlapped_cpu_adam"
    if overlapped:
        run_as_late_as_can_be(zero)
    experiment.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True
    )
    found = {"losses": [], "norms": [], "zero": type(zero).__name__, "before": weights_of(experiment.model)}
    for _ in range(STEPS):
        losses = gathered(experiment.step(no_mark).item())
        found["losses"].append(sum(losses) / len(losses))
        found["norms"].append(experiment.grad_norm())
    found["pending"] = len(zero._pending) if overlapped else None
    experiment.finish_updates()
    found |= {"after": weights_of(experiment.model), "inputs": torch.cat(inputs)[:GLOBAL_BATCH].tolist()}
    experiment.engine.destroy()
    return found


def train_all(configs):
    return {name: train(config) for name, config in configs.items()}


def run_mains(config):
    """Exit statuses of runs as a study makes them, the last of them out of memory, and what they printed."""
    built, build_engine, build_experiment = [], ds_utils.build_engine, script.build_experiment

    def without_room(*args):
        experiment = build_experiment(*args)

        def step(mark):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line.")

        return dataclasses.replace(experiment, step=step)

    ds_utils.build_engine = lambda *args: built.append(args) or build_engine(*args)
    main, statuses, printed = script.main_for_many(), [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for fields in ({}, {"batch_size": 3}, {"seq_length": 48}):
            statuses.append(int(main(dataclasses.replace(config, **fields))))
        script.build_experiment = without_room
        statuses.append(int(main(dataclasses.replace(config, batch_size=1))))
    return {"statuses": statuses, "engines": len(built), "printed": printed.getvalue()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    write_llama_folder(folder / "model", **SHAPE)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """What an engine of each preset and variant showed, in one process."""
    cases = {case: config_of(case[0], folder, **VARIANTS[case[1]]) for case in CASES}
    (found,) = in_forks(1, train_all, cases)
    return {case: SimpleNamespace(config=cases[case], **found[case]) for case in cases}


def plain_pytorch(result):
    """What the engine should have done, by Hugging Face's model and PyTorch's own AdamW and clipping."""
    config = result.config
    model = build_model(config, torch.device("cpu"))
    for name, p in model.named_parameters():
        p.data.copy_(torch.from_numpy(result.before[name]))
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(SHAPE["vocab_size"], (GLOBAL_BATCH, SEQ_LENGTH), generator=generator)
    settings = {"lr": config.learning_rate, "betas": (config.beta_0, config.beta_1)}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, **settings)
    steps = config.warmup + config.iterations + 1
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.num_warmup_steps, steps)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return SimpleNamespace(tokens=tokens, losses=losses, norms=norms, weights=dict(model.named_parameters()))


def assert_trained_as(result, expected):
    """Losses, norms and weights agree within what fp32 rounds, in sums of other orders."""
    assert result.losses == pytest.approx(expected.losses, rel=2e-6)
    assert result.norms == pytest.approx(expected.norms, rel=5e-5)
    first, last = (torch.cat([torch.from_numpy(w).flatten() for w in all_.values()]) for all_ in
                   (result.before, result.after))  # fmt: skip
    wanted = torch.cat([w.detach().flatten() for w in expected.weights.values()])
    assert (last - wanted).norm() < 1e-3 * (wanted - first).norm()


@pytest.mark.parametrize(("preset", "variant"), CASES)
def test_trains_as_plain_pytorch_does(trained, preset, variant):
    result = trained[preset, variant]
    expected = plain_pytorch(result)
    assert result.zero == {"original": "DeepSpeedZeroOptimizer_Stage3", "fast": "OverlappedZero3"}[preset]
    assert result.inputs == expected.tokens.tolist()
    assert_trained_as(result, expected)
    assert result.losses[0] == pytest.approx(math.log(499), rel=0.02)  # that of a guess
    changed = {name for name, weights in result.after.items() if (weights != result.before[name]).any()}
    assert changed == {name for name in result.after if variant != "LoRA" or "lora_" in name}
    if variant == "as it is" and preset == "fast":
        assert result.pending > 1  # the last step's updates had not been waited for


def test_two_ranks_train_as_one(folder):
    fields = {"batch_size": 1, "gradient_accumulation_steps": 2, "world_size": 2}
    configs = {preset: config_of(preset, folder, **fields) for preset in PRESETS}
    first, second = in_forks(2, train_all, configs)
    for preset, config in configs.items():
        result = SimpleNamespace(config=config, **first[preset])
        expected = plain_pytorch(result)
        assert [first[preset]["inputs"][:2], second[preset]["inputs"][:2]] == [
            expected.tokens[:2].tolist(),
            expected.tokens[2:].tolist(),
        ]
        assert second[preset]["losses"] == result.losses
        assert_trained_as(result, expected)


def test_coarser_weights_and_states_train_nearly_alike(folder, trained):
    config = config_of("fast", folder, dtype="bf16", optimizer_states="bf16")
    (found,) = in_forks(1, train, config)
    assert found["losses"] == pytest.approx(trained["fast", "as it is"].losses, rel=0.01)


def test_runs_of_a_study_share_an_engine_and_leave_a_record_each(folder):
    config = config_of("fast", folder, iterations=2, warmup=1, gradient_accumulation_steps=2)
    (found,) = in_forks(1, run_mains, config)
    assert found["statuses"] == [0, 0, 0, 3]
    assert found["engines"] == 1
    records = sorted(load_all([folder / "results"]), key=lambda record: record.steps_before)
    full = load(dataclasses.replace(config, batch_size=1).record_file)
    first, batch, length = (record for record in records if record.status == "ok")
    assert [r.steps_before for r in (first, batch, length)] == [0, 4, 8]  # each warms up, is timed, and does one more
    assert (batch.run.batch_size, length.run.seq_length) == (3, 48)
    for record in (first, batch, length):
        assert (record.mode, record.skipped_steps, len(record.losses)) == ("interpreted", 0, 2)
        assert (record.latency_s, record.peak_memory_bytes, record.floor_s) == (None, None, None)
        assert all(5 < loss < 7 for loss in record.losses)
        assert (record.host_peak_bytes is None) == (record is not first)  # what is the process's is not this run's
    assert batch.model_flops_per_step * 4 == first.model_flops_per_step * 3
    assert (full.status, full.error.message) == ("oom", "CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert found["printed"].count("Gradient norm") == 3
    assert found["printed"].count("Out of memory") == 1
