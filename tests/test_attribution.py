"""Attribution: labels are the modules that ask for memory, notes what blocks are for, and neither changes a step.

Which module made an autograd node is found a second way here: from the graph between a module's inputs and outputs.
"""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch

import all_gpu_liger_kernel as script
from src import dry_run
from src.allocator import rounded
from src.attribution import Attribution
from src.config import RunConfig, Strategy
from src.dry_run import predict
from src.explain.categories import GATHER, LOSS_MODULE, REDUCE
from src.explain.timeline import timeline
from src.fake_gpu import FakeGpu
from src.live_memory import tensors_in
from src.measure import PHASES, no_mark
from src.runtime import CpuRuntime
from src.simulated_snapshot import simulated_snapshot
from tests.helpers import HUGGING_FACE, strategy_id, tiny_config
from tests.test_offload import LAYERS, PRESET_NAMES, STEPS, Driver, reference_case

BOTH = pytest.mark.parametrize("strategy", [HUGGING_FACE, Strategy()], ids=strategy_id)
CHECKPOINTING = pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["keep", "recompute"])


class Recorder:
    """A sink that keeps what it is told; its label is what a block that is asked for now would get."""

    def __init__(self):
        self.label, self.labels, self.phases, self.owned = None, [], [], []

    def set_label(self, label):
        self.label = label
        self.labels.append(label)

    def own(self, category, tensor):
        self.owned.append((category, tensor.untyped_storage().nbytes()))

    def enter_phase(self, phase):
        self.phases.append(phase)


def experiment_of(**fields):
    return script.build_experiment(tiny_config(**fields), CpuRuntime())


def labelled_step(experiment, sink, mark=no_mark, **fields):
    return Attribution(sink, experiment, **{"gradient_checkpointing": False, **fields}).step(mark)


def grad_fns(values):
    return [tensor.grad_fn for tensor in tensors_in(values) if tensor.grad_fn is not None]


class Makers:
    """Which module made each autograd node: whatever lies between its inputs and its outputs and no inner one made."""

    def __init__(self, model):
        self.of, self.stack = {}, []
        for path, module in model.named_modules():
            module.register_forward_pre_hook(self._enters(path or LOSS_MODULE), with_kwargs=True)
            module.register_forward_hook(self._leaves)

    def _enters(self, name):
        def enter(module, args, kwargs):
            if not torch._C._current_autograd_node():  # not in a recomputation
                self._claim(grad_fns([args, kwargs]))
                self.stack.append(name)

        return enter

    def _leaves(self, module, args, output):
        if not torch._C._current_autograd_node():
            self._claim(grad_fns(output))
            self.stack.pop()

    def _claim(self, waiting):
        while waiting:
            node = waiting.pop()
            if node not in self.of and not node.name().endswith("AccumulateGrad"):
                self.of[node] = self.stack[-1]
                waiting += [following for following, _ in node.next_functions if following is not None]


@BOTH
@CHECKPOINTING
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_autograd_node_is_labelled_with_the_module_that_made_it(strategy, gradient_checkpointing, dtype):
    experiment = experiment_of(strategy=strategy, gradient_checkpointing=gradient_checkpointing, dtype=dtype)
    makers, sink, ran = Makers(experiment.model), Recorder(), []

    def watch(node, maker):
        def check(*_):
            assert sink.label == f"{maker}|{node.name()}"
            ran.append((maker, node.name()))

        node.register_prehook(lambda _: check())
        node.register_hook(check)  # whatever was recomputed meanwhile

    def mark(phase):
        if phase == "backward":
            for node, maker in makers.of.items():
                watch(node, maker)

    labelled_step(experiment, sink, mark, gradient_checkpointing=gradient_checkpointing)
    assert len(ran) == 2 * len(makers.of) > 80
    modules = {name for name, _ in experiment.model.named_modules()} | {LOSS_MODULE}
    assert {maker for maker, _ in ran} <= modules
    assert {part for maker, _ in ran for part in maker.split(".")} >= {"self_attn", "mlp", "norm", "0", "1"}
    assert (LOSS_MODULE, "NllLossBackward0") in ran or strategy.flce


@BOTH
@CHECKPOINTING
def test_label_is_the_module_that_runs_and_its_callers_again_when_it_is_done(strategy, gradient_checkpointing):
    experiment = experiment_of(strategy=strategy, gradient_checkpointing=gradient_checkpointing)
    sink, seen = Recorder(), {"forward": [], "backward": []}

    def watched(name, forward):
        def run(*args, **kwargs):
            phase = sink.phases[-1]
            label = f"{name}|{'recomputed' if phase == 'backward' else ''}"
            assert sink.label == label
            seen[phase].append(name)
            result = forward(*args, **kwargs)
            assert sink.label == label
            return result

        return run

    for path, module in experiment.model.named_modules():
        module.forward = watched(path or LOSS_MODULE, module.forward)
    labelled_step(experiment, sink, gradient_checkpointing=gradient_checkpointing)
    layers = [name for name in seen["forward"] if name.startswith("model.layers.")]
    assert {LOSS_MODULE, "model", "model.embed_tokens", "model.rotary_emb", "model.norm"} < set(seen["forward"])
    recomputed = set(seen["backward"])
    assert len(layers) > 20
    # Nothing is recomputed that no gradient needs: the last operation of a layer.
    assert set(layers) - recomputed <= {f"model.layers.{i}.mlp.down_proj" for i in range(2)} or not recomputed
    assert recomputed <= set(layers)
    assert bool(recomputed) == gradient_checkpointing


@CHECKPOINTING
def test_phases_begin_and_the_optimizer_has_no_label(gradient_checkpointing):
    experiment, sink, marks = experiment_of(gradient_checkpointing=gradient_checkpointing), Recorder(), []
    in_optimizer = []
    experiment.optimizer.register_step_pre_hook(lambda *_: in_optimizer.append(sink.label))
    experiment.optimizer.register_step_post_hook(lambda *_: in_optimizer.append(sink.label))
    labelled_step(experiment, sink, marks.append, gradient_checkpointing=gradient_checkpointing)
    assert (sink.phases, marks) == (list(PHASES), list(PHASES))
    assert in_optimizer == ["", ""]
    assert sink.owned == []  # no tensor is on a GPU


def hooks(model):
    """All hooks of a model's modules and parameters."""
    owners = [*model.modules(), *model.parameters()]
    return [
        (name, list(value.items()))
        for owner in owners
        for name, value in vars(owner).items()
        if "hooks" in name and isinstance(value, dict)
    ]


@pytest.mark.parametrize("fail_in", [None, *PHASES, "model.layers.1.mlp"])
@CHECKPOINTING
def test_no_hook_is_left_whichever_way_the_step_ends(fail_in, gradient_checkpointing):
    experiment = experiment_of(gradient_checkpointing=gradient_checkpointing)
    before, during, sink = hooks(experiment.model), [], Recorder()

    def fail_at(place):
        during.append(len([hook for _, found in hooks(experiment.model) for hook in found]))
        if place == fail_in:
            raise ZeroDivisionError

    handle = experiment.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: fail_at("model.layers.1.mlp"))
    with contextlib.nullcontext() if fail_in is None else pytest.raises(ZeroDivisionError):
        labelled_step(experiment, sink, fail_at, gradient_checkpointing=gradient_checkpointing)
    handle.remove()
    assert hooks(experiment.model) == before
    assert max(during) > 40
    for p in experiment.model.parameters():
        p.grad = None
    told = len(sink.labels)
    experiment.step(no_mark)
    assert len(sink.labels) == told


def trained(label, steps=2, **fields):
    """Gradients and losses of some steps, all of them labelled or none, and the weights at the end."""
    experiment, gradients, losses = experiment_of(**fields), [], []

    def mark(phase):
        if phase == "optimizer":
            gradients.extend(p.grad.clone() for p in experiment.model.parameters())

    for _ in range(steps):
        if label:
            loss = labelled_step(
                experiment, Recorder(), mark, gradient_checkpointing=fields.get("gradient_checkpointing", True)
            )
        else:
            loss = experiment.step(mark)
        losses.append(loss)
    return [*gradients, *losses, *(p.detach() for p in experiment.model.parameters())]


@BOTH
@CHECKPOINTING
def test_labels_change_no_gradient(rng, strategy, gradient_checkpointing):
    fields = {"strategy": strategy, "gradient_checkpointing": gradient_checkpointing, "seed": rng.randrange(1000)}
    plain, labelled = (trained(label, **fields) for label in (False, True))
    assert len(plain) == 2 * 20 + 2 + 20
    assert all(torch.equal(a, b) for a, b in zip(plain, labelled, strict=True))


class NoAttribution:
    """Runs the step and labels nothing."""

    def __init__(self, sink, experiment, **_):
        self.step = experiment.step


def on_gpu(rng, **fields):
    shape = {"batch_size": rng.randrange(1, 4), "seq_length": rng.randrange(32, 99)}
    return RunConfig(model_name="tiny-llama", device="cuda", **shape, **fields)


@BOTH
@CHECKPOINTING
def test_labels_change_no_byte_of_memory(monkeypatch, rng, strategy, gradient_checkpointing):
    config = on_gpu(rng, strategy=strategy, gradient_checkpointing=gradient_checkpointing)
    with_labels = predict(config, script.build_experiment)
    monkeypatch.setattr(dry_run, "Attribution", NoAttribution)
    without = predict(config, script.build_experiment)
    assert with_labels.phases == without.phases
    assert with_labels.peak_reserved_bytes == without.peak_reserved_bytes
    assert [(action, a.address, a.size) for action, a in with_labels.gpu.events] == [
        (action, a.address, a.size) for action, a in without.gpu.events
    ]
    assert {a.module for _, a in without.gpu.events} == {""}


# Operation -> what the path of its module ends with, where it can be told.
OPERATIONS = {
    "aten.embedding.default": "embed_tokens",
    "aten.embedding_dense_backward.default": "embed_tokens",
    "aten._scaled_dot_product_cudnn_attention.default": "self_attn",
    "aten._scaled_dot_product_cudnn_attention_backward.default": "self_attn",
    "aten.silu.default": "act_fn",
    "aten.silu_backward.default": "act_fn",
    "aten.rsqrt.default": "norm",
    "aten.cos.default": "rotary_emb",
    "aten._log_softmax.default": LOSS_MODULE,
    "aten._log_softmax_backward_data.default": LOSS_MODULE,
    "aten.nll_loss_backward.default": LOSS_MODULE,
}


@BOTH
@CHECKPOINTING
@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_loop"])
def test_requests_of_known_operations_have_their_module(rng, strategy, gradient_checkpointing, optimizer):
    config = on_gpu(rng, strategy=strategy, gradient_checkpointing=gradient_checkpointing, optimizer=optimizer)
    prediction = predict(config, script.build_experiment)
    made = [a for action, a in prediction.gpu.events[prediction.first_event :] if action == "alloc"]
    known = [a for a in made if a.operation in OPERATIONS]
    assert {a.operation for a in known} >= set(OPERATIONS if strategy == HUGGING_FACE else list(OPERATIONS)[:4])
    for a in known:
        assert a.module.endswith(OPERATIONS[a.operation]), (a.operation, a.module)
    assert {a.module for a in made if a.phase == "optimizer"} <= {""}
    layers = Counter((a.module.split(".")[2], a.operation) for a in known if "layers." in a.module)
    assert {layer for layer, _ in layers} == {"0", "1"}
    assert {name: count for (layer, name), count in layers.items() if layer == "0"} == {
        name: count for (layer, name), count in layers.items() if layer == "1"
    }


@BOTH
@CHECKPOINTING
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_owned_blocks_are_the_ones_there_are(rng, strategy, gradient_checkpointing, dtype):
    config = on_gpu(rng, strategy=strategy, gradient_checkpointing=gradient_checkpointing, dtype=dtype)
    gpu = FakeGpu()
    runtime, owned, at_optimizer = dry_run.FakeRuntime(gpu), [], []
    with dry_run.patched(), runtime.tracking():
        experiment = script.build_experiment(config, runtime)
        experiment.step(no_mark)
        own = gpu.own
        gpu.own = lambda category, tensor: (owned.append(category), own(category, tensor))
        parameters = list(experiment.model.parameters())

        def mark(phase):
            if phase == "optimizer":
                at_optimizer.extend(gpu.block_of(p.grad) for p in parameters)

        labelled_step(experiment, gpu, mark, gradient_checkpointing=gradient_checkpointing)
        sizes = sorted(rounded(p.nbytes) for p in parameters)
        in_step = [a for action, a in gpu.events if action == "alloc"]
    counts = Counter(owned)
    assert counts["parameters"] == counts["gradients"] == len(parameters) == 20
    assert counts["optimizer_state"] == 3 * 20
    assert counts["checkpoints"] == (2 if gradient_checkpointing else 0)
    assert sorted(a.size for a in in_step if a.owner == "parameters") == sizes
    assert sorted(a.size for a in in_step if a.owner == "gradients") == sizes
    hidden = rounded(config.tokens_per_step * 64 * {"bf16": 2, "fp32": 4}[dtype])
    assert [a.size for a in in_step if a.owner == "checkpoints"] == [hidden] * counts["checkpoints"]
    tokens = rounded(8 * config.tokens_per_step)
    assert [a.size for a in in_step if a.owner == "inputs"] == [tokens] * (1 if counts["inputs"] else 0)


@BOTH
@CHECKPOINTING
def test_every_moment_of_a_dry_run_is_attributed(rng, strategy, gradient_checkpointing):
    prediction = predict(
        on_gpu(rng, strategy=strategy, gradient_checkpointing=gradient_checkpointing), script.build_experiment
    )
    found = timeline(simulated_snapshot(prediction.gpu, prediction.first_event))
    numbers, parts = found.by_category(10**6)
    assert len(numbers) == len(found.events) + 1
    # The loss scale's numbers and the like, 512 bytes each.
    assert parts["unattributed"].max() <= 4 * 512
    assert found.breakdown() == prediction.breakdown
    assert found.peak_phase == prediction.phases.phase
    assert found.peak_bytes == prediction.peak_bytes
    assert [phase for _, phase in found.phases] == list(PHASES)


def test_step_of_several_micro_batches_is_labelled_throughout():
    one = experiment_of()
    batch = {}
    one.model.register_forward_pre_hook(lambda module, args, kwargs: batch.update(kwargs), with_kwargs=True)

    def step(mark):
        for _ in range(3):
            mark("forward")
            loss = one.model(**batch).loss
            mark("backward")
            loss.backward()
        mark("optimizer")
        return loss.detach()

    one.step(no_mark)
    sink = Recorder()
    labelled_step(dataclasses.replace(one, step=step), sink)
    assert sink.phases == ["forward", "backward"] * 3 + ["optimizer"]
    backward = Counter(label for label in sink.labels if label.endswith("Backward0"))
    assert len(backward) > 40
    assert all(count % 3 == 0 for count in backward.values())


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """Each preset with and without its second step labelled."""
    cases = {
        (preset, variant, label): reference_case(preset, variant, ranks=1, labelled=label)
        for preset in PRESET_NAMES
        for variant in ("as it is", "2 micro-batches")
        for label in (None, 1)
    }
    return Driver(tmp_path_factory.mktemp("labelled"), cases, ranks=1)


@pytest.mark.parametrize("variant", ["as it is", "2 micro-batches"])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_offloaded_step_says_what_zero_asks_for_and_trains_on(offloaded, preset, variant):
    plain, result = (offloaded[preset, variant, label] for label in (None, 1))
    passes = 2 if "2" in variant else 1
    labels = Counter(result.labels)
    assert labels[GATHER] > 2 * LAYERS
    assert labels[REDUCE] >= len(result.names) * passes
    assert result.phases == ["forward", "backward"] * passes + ["optimizer"]
    assert any(label.startswith("model.layers.2.mlp") for label in labels)
    assert sorted(result.gradients) == sorted(result.names * passes)
    assert {"parameters", "gradient_reduction", "optimizer_state", "checkpoints"} <= set(result.owned)
    assert result.after == result.before
    assert len(plain.losses) == STEPS
    assert (result.losses, result.norms) == (plain.losses, plain.norms)
    assert all(torch.equal(result.weights[-1][name], plain.weights[-1][name]) for name in result.names)
