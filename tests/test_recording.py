"""Recording: labels are the modules that ask for memory, notes what blocks are for, and neither changes a step.

Which module made an autograd node is found a second way here: from the graph between a module's inputs and outputs.
"""

import contextlib
from collections import Counter

import pytest
import torch

import all_gpu_liger_kernel as script
from src.config import RunConfig
from src.experiment import PHASES, no_mark
from src.explain.categories import LOSS_MODULE
from src.explain.recording import Attribution
from src.explain.timeline import timeline
from src.measure.devices import HostRuntime
from src.model_utils import patched
from src.predict import dry_run
from src.predict.fake_gpu import FakeGpu
from src.predict.live_memory import tensors_in
from src.predict.simulated_snapshot import simulated_snapshot
from src.utils import round_up
from tests.helpers import ALL_KERNELS, HUGGING_FACE, tiny_config

CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "recompute"])


class Sink:
    """Keeps what it is told; its label is what a block that is asked for now would get."""

    def __init__(self):
        self.label, self.labels, self.phases, self.owned = None, [], [], []

    def set_label(self, label):
        self.label = label
        self.labels.append(label)

    def own(self, category, tensor):
        self.owned.append(category)

    def enter_phase(self, phase):
        self.phases.append(phase)


def experiment_of(**fields):
    return script.build_experiment(tiny_config(seq_length=4, **fields), HostRuntime())


def labelled_step(experiment, sink, mark=no_mark, checkpointing=False):
    return Attribution(sink, experiment).step(mark)


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


@CHECKPOINTING
def test_every_autograd_node_is_labelled_with_the_module_that_made_it(checkpointing):
    experiment = experiment_of(gradient_checkpointing=checkpointing)
    makers, sink, ran = Makers(experiment.model), Sink(), []

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

    labelled_step(experiment, sink, mark, checkpointing)
    assert len(ran) == 2 * len(makers.of) > 80
    assert {part for maker, _ in ran for part in maker.split(".")} >= {"self_attn", "mlp", "norm", "0", "1"}
    assert (LOSS_MODULE, "NllLossBackward0") in ran


@CHECKPOINTING
def test_label_is_the_module_that_runs_and_its_callers_again_when_it_is_done(checkpointing):
    experiment = experiment_of(gradient_checkpointing=checkpointing)
    sink, seen = Sink(), {"forward": [], "backward": []}

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
    labelled_step(experiment, sink, checkpointing=checkpointing)
    layers = {name for name in seen["forward"] if name.startswith("model.layers.")}
    assert {LOSS_MODULE, "model", "model.embed_tokens", "model.rotary_emb", "model.norm"} < set(seen["forward"])
    recomputed = set(seen["backward"])
    assert len(layers) > 20
    # Nothing is recomputed that no gradient needs: the last operation of a layer.
    last = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert layers - last <= recomputed <= layers if checkpointing else not recomputed


def hooks(model):
    """All hooks of a model's modules and parameters."""
    owners = [*model.modules(), *model.parameters()]
    return [
        (name, list(value.items()))
        for owner in owners
        for name, value in vars(owner).items()
        if "hooks" in name and isinstance(value, dict)
    ]


@pytest.mark.parametrize("fail_in", [None, *PHASES])
def test_phases_begin_the_optimizer_has_no_label_and_no_hook_is_left(fail_in):
    experiment, sink, in_optimizer, during = experiment_of(), Sink(), [], []
    experiment.optimizer.register_step_pre_hook(lambda *_: in_optimizer.append(sink.label))
    experiment.optimizer.register_step_post_hook(lambda *_: in_optimizer.append(sink.label))
    before = hooks(experiment.model)

    def mark(phase):
        during.append(sum(len(found) for _, found in hooks(experiment.model)))
        if phase == fail_in:
            raise ZeroDivisionError

    with contextlib.nullcontext() if fail_in is None else pytest.raises(ZeroDivisionError):
        labelled_step(experiment, sink, mark, checkpointing=True)
    assert hooks(experiment.model) == before
    assert max(during) > 40
    if fail_in is None:
        assert (sink.phases, in_optimizer) == (list(PHASES), ["", ""])
        assert sink.owned == []  # no tensor is on a GPU
        told = len(sink.labels)
        experiment.step(no_mark)
        assert len(sink.labels) == told


def test_step_of_several_micro_batches_is_labelled_throughout():
    sink = Sink()
    labelled_step(experiment_of(gradient_accumulation_steps=3), sink)
    assert sink.phases == ["forward", "backward"] * 3 + ["optimizer"]
    backward = Counter(label for label in sink.labels if label.endswith("Backward0"))
    assert len(backward) > 40
    assert all(count % 3 == 0 for count in backward.values())


def trained(step_of, **fields):
    """Gradients and losses of two steps, and the weights at the end."""
    experiment, found = experiment_of(**fields), []
    for _ in range(2):
        found.append(step_of(experiment, lambda phase: found.extend(experiment.gradients() * (phase == "optimizer"))))
    return [tensor.detach().clone() for tensor in (*found, *experiment.model.parameters())]


@CHECKPOINTING
def test_labels_change_no_gradient(rng, checkpointing):
    fields = {"gradient_checkpointing": checkpointing, "seed": rng.randrange(1000)}
    plain = trained(lambda experiment, mark: experiment.step(mark), **fields)
    labelled = trained(lambda experiment, mark: labelled_step(experiment, Sink(), mark, checkpointing), **fields)
    assert len(plain) == 2 * 20 + 2 + 20
    assert all(torch.equal(a, b) for a, b in zip(plain, labelled, strict=True))


def on_gpu(rng, **fields):
    shape = {"batch_size": rng.randrange(1, 4), "seq_length": rng.randrange(32, 99)}
    return RunConfig(model_name="tiny-llama", device="cuda", **shape, **fields)


class NoAttribution:
    """Runs the step and labels nothing."""

    def __init__(self, sink, experiment, **_):
        self.step = experiment.step


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


@pytest.mark.parametrize(
    ("kernels", "checkpointing"), [(HUGGING_FACE, True), (ALL_KERNELS, False)], ids=["none", "all"]
)
def test_every_request_of_a_dry_run_is_attributed_and_labels_change_no_byte(monkeypatch, rng, kernels, checkpointing):
    config = on_gpu(rng, **kernels)
    prediction = dry_run.predict(config, script.build_experiment)
    made = [a for action, a in prediction.gpu.events[prediction.first_event :] if action == "alloc"]
    known = [a for a in made if a.operation in OPERATIONS]
    assert {a.operation for a in known} >= set(list(OPERATIONS)[: 4 if kernels["flce"] else None])
    for a in known:
        assert a.module.endswith(OPERATIONS[a.operation]), (a.operation, a.module)
    assert {a.module for a in made if a.phase == "optimizer"} <= {""}
    in_layers = [Counter(a.operation for a in known if f"layers.{i}." in a.module) for i in range(2)]
    assert in_layers[0] == in_layers[1] != Counter()

    found = timeline(simulated_snapshot(prediction.gpu, prediction.first_event))
    _, parts = found.by_category(10**6)
    assert parts["unattributed"].max() <= 4 * 512  # the loss scale's numbers and the like, 512 bytes each
    assert found.breakdown() == prediction.breakdown
    assert (found.peak_phase, found.peak_bytes) == (prediction.phases.phase, prediction.peak_bytes)
    assert [phase for _, phase in found.phases] == list(PHASES)

    monkeypatch.setattr(dry_run, "Attribution", NoAttribution)
    without = dry_run.predict(config, script.build_experiment)
    assert (without.phases, without.peak_reserved_bytes) == (prediction.phases, prediction.peak_reserved_bytes)
    requests = [[(action, a.address, a.size) for action, a in p.gpu.events] for p in (prediction, without)]
    assert requests[0] == requests[1]
    assert {a.module for _, a in without.gpu.events} == {""}


@pytest.mark.parametrize(("dtype", "checkpointing"), [("bf16", True), ("fp32", False)])
def test_owned_blocks_are_the_ones_there_are(rng, checkpointing, dtype):
    config = on_gpu(rng, gradient_checkpointing=checkpointing, dtype=dtype)
    gpu, owned = FakeGpu(), Counter()
    runtime, own = dry_run.FakeRuntime(gpu), gpu.own
    with patched(), runtime.tracking():
        experiment = script.build_experiment(config, runtime)
        experiment.step(no_mark)
        gpu.own = lambda category, tensor: (owned.update([category]), own(category, tensor))
        labelled_step(experiment, gpu, checkpointing=checkpointing)
        sizes = sorted(round_up(p.nbytes, 512) for p in experiment.model.parameters())
        made = [a for action, a in gpu.events if action == "alloc"]
    checkpoints = 2 if checkpointing else 0
    assert owned["parameters"] == owned["gradients"] == len(sizes) == 20
    assert (owned["optimizer_state"], owned["checkpoints"]) == (3 * 20, checkpoints)
    assert sorted(a.size for a in made if a.owner == "parameters") == sizes
    assert sorted(a.size for a in made if a.owner == "gradients") == sizes
    hidden = round_up(config.tokens_per_step * 64 * {"bf16": 2, "fp32": 4}[dtype], 512)
    assert [a.size for a in made if a.owner == "checkpoints"] == [hidden] * checkpoints
    tokens = round_up(8 * config.tokens_per_step, 512)
    assert [a.size for a in made if a.owner == "inputs"] == [tokens]
