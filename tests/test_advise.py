"""Advice on situations whose answer is on record, from kept dry runs; one is run again, so that they stay true."""

import dataclasses
import functools
import itertools
import re

import pytest
import torch
import transformers
from liger_kernel.transformers import LigerSwiGLUMLP

from doc import evidence
from src.advise import lines, measured, outcomes
from src.advise.levers import (
    CHECKPOINTING,
    CHUNKED_LOSS,
    CUDA_GRAPH,
    EVERY_SECOND,
    IN_BACKWARD,
    LARGER_CHUNKS,
    LORA,
    MLP_TILES,
    OFFLOAD,
    ON_HOST,
    Choice,
    checkpointing,
    liger,
    mlp_checkpointing,
)
from src.advise.outcomes import Outcome, outcome, side_by_side
from src.advise.partly import spacings
from src.advise.ranking import ALIKE, advice, shipped_parities, why
from src.advise.report import report, rows
from src.advise.request import request
from src.advise.search import Search, resident_bytes
from src.advise.sizes import CLOSE, SizeSearch
from src.cli import parsed
from src.machine import GPUS, gpu_named
from src.predict.allocator import SimulatedOutOfMemory
from src.predict.dry_run import predict
from src.study import grids
from src.study.answers import Cell, experiment, settings
from src.utils import GIB, UsageError
from tests.advise_situations import SITUATIONS, kept, values
from tests.helpers import assert_one_error_line, run_python, write_llama_folder

KNOWN = shipped_parities()
LLAMA_1B = "meta-llama/Llama-3.2-1B"


@functools.cache
def answer(name):
    """The advice on one of the situations."""
    asked = request(**SITUATIONS[name])
    search = SizeSearch if asked.searched else Search
    return advice(asked, search(asked, kept(asked)).run(), KNOWN)


@functools.cache
def on_record():
    """The measured runs of one H100, by what was run."""
    runs = [r for place in ("h100_single_gpu", "h100_techniques") for r in evidence.folder(place).records]
    runs += evidence.folder("study/h100_single_gpu").records
    return {experiment(r): r for r in runs if r.mode == "measured" and r.run.memory_limit_gib is None}


def measured_runs(name):
    """What of a situation's choices was measured, as (outcome, record); first what was predicted to be fastest."""
    found = [(o, on_record().get(_experiment(o.config))) for o in answer(name).ranked]
    return sorted(((o, r) for o, r in found if r is not None), key=lambda pair: pair[0].seconds)


def _experiment(config):
    return settings(config), Cell(config.title, config.batch_size, config.seq_length), False


@pytest.mark.parametrize("name", ["roomy", "logits fill it", "few tokens"])
def test_what_is_predicted_to_be_faster_was_measured_to_be_and_what_is_advised_to_fit_did(name):
    pairs = measured_runs(name)
    assert len(pairs) >= 2
    for fast, slow in itertools.pairwise(pairs):
        if slow[0].seconds > 1.05 * fast[0].seconds:
            assert fast[1].latency_s < slow[1].latency_s
    assert all(run.status == "ok" for _, run in pairs)


def test_with_room_nothing_is_computed_twice_and_the_kernels_are_on():
    first = answer("roomy").ranked[0]
    assert not first.config.gradient_checkpointing
    assert {"rope", "swiglu", "rms_norm"} <= set(first.config.kernels)
    assert f"{answer('roomy').plain.seconds / first.seconds:.2f} times as fast" in why(answer("roomy"))


def test_logits_that_do_not_fit_are_what_binds_and_flce_makes_room():
    found = answer("logits fill it")
    assert not found.plain.fits
    assert found.plain.largest_part == "logits_and_loss"
    assert found.ranked[0].config.flce
    assert found.ranked[0].config.gradient_checkpointing is False  # as on record: 48 GiB


def test_few_tokens_are_bound_by_launches_which_a_graph_does_away_with():
    found = answer("few tokens")
    assert found.plain.bound == "launches"
    assert found.ranked[0].choice.has(CUDA_GRAPH)


def test_small_card_takes_the_least_change_that_fits():
    found = answer("small card")
    assert not found.plain.fits
    assert found.ranked[0].choice.effort == min(o.choice.effort for o in found.ranked) == 1
    assert found.ranked[0].peak_bytes <= found.request.room_bytes
    more = answer("twice the batch")  # on record: neither checkpointing nor the kernels alone are enough there
    assert more.ranked[0].choice.effort > 1


def test_largest_batch_is_the_one_that_was_measured_but_for_the_memory_that_advice_leaves_free():
    frontier = next(r.frontier for r in evidence.folder("h100_single_gpu").records if r.frontier and r.run.flce)
    found = answer("largest batch")
    same = next(o for o in found.ranked if o.choice.has(CHECKPOINTING) and not o.config.optimizer_in_backward)
    assert 0.75 * frontier.measured <= same.config.batch_size <= frontier.measured
    first = found.ranked[0]
    assert first.config.batch_size >= same.config.batch_size
    bigger = dataclasses.replace(first.config, batch_size=int(first.config.batch_size * (1 + CLOSE)) + 1)
    assert not outcome((first.choice, bigger), found.request).fits


@pytest.mark.parametrize(("bytes_a_token", "reserved", "most"), [(5e4, 1.0, 6), (2e5, 1.0, 13), (2e5, 1.1, 17)])
def test_search_for_a_size_ends_close_to_the_largest_after_few_dry_runs(bytes_a_token, reserved, most):
    asked = request(model_name=LLAMA_1B, gpu="h100", batch_size=8, seq_length=1024, goal="longest")
    runs = []

    def evaluate(trials):
        for choice, config in trials:
            peak = int(7 * GIB + config.tokens_per_step * bytes_a_token)
            parts = {"parameters": 2 * GIB, "optimizer_state": 5 * GIB, "mlp": peak - 7 * GIB}
            runs.append(
                Outcome(choice, config, peak * reserved <= asked.room_bytes, peak, "backward", parts, 1.0, "gpu")
            )
        return runs[-len(trials) :]

    found = SizeSearch(asked, evaluate).run()
    largest = min(131072, (asked.room_bytes / reserved - 7 * GIB) / bytes_a_token / 8)
    assert 0.97 * largest <= max(o.config.seq_length for o in found if o.fits) <= largest
    assert len(runs) <= most


# Of a made-up model: GiB of activations and of gradients, and what gaps add to memory, where MLPs are checkpointed and
# elsewhere.
WORLDS = {
    "activations": (20, 2, 1.0, 1.0),
    "gaps": (20, 2, 1.08, 1.08),
    "gradients": (8, 5, 1.0, 1.0),
    "gradients and gaps": (8, 5, 1.08, 1.0),
}


def made_up(choice, config, room_bytes, world):
    """What a choice takes, if each of 16 layers takes as much as another, and gradients come as activations go."""
    activations, gradients, mlp_gaps, gaps = WORLDS[world]
    layers, mlp = 16, config.checkpoint_part == "mlp"
    share = -(-layers // config.checkpoint_every) / layers if config.gradient_checkpointing else 0
    kept, again = (0.5, 0.1) if mlp else (0.02, 0.3)
    gradients = 0.1 if config.optimizer_in_backward else gradients
    loss, seconds = {1: (0, 1.0), 16: (1, 0.9)}[config.flce_chunks] if config.flce else (10, 0.95)
    peak = (8 + max(gradients, loss + activations * (1 - (1 - kept) * share))) * GIB
    parts = {"parameters": 2 * GIB, "optimizer_state": 6 * GIB, "activations": peak - 8 * GIB}
    fits, seconds = peak * (mlp_gaps if mlp else gaps) <= room_bytes, seconds + again * share
    return Outcome(choice, config, fits, int(peak), "backward", parts, seconds, "gpu")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("memory", [9.3, 10.8, 11.5, 13, 15, 16, 17, 18, 20, 25, 30, 33, 36, 50])
def test_no_combination_of_what_is_searched_is_faster_than_the_advice(memory, world):
    asked = request(model_name=LLAMA_1B, gpu="h100", batch_size=8, seq_length=1024, gpu_memory_gib=memory)
    runs = []

    def evaluate(trials):
        runs.extend(choice for choice, _ in trials)
        return [made_up(*trial, asked.room_bytes, world) for trial in trials]

    found = Search(asked, evaluate).run()
    kernels = liger(["rope", "swiglu", "rms_norm", "flce"])
    losses = [(kernels,), (kernels, LARGER_CHUNKS), (liger(["rope", "swiglu", "rms_norm"]),)]
    checkpoints = [(), *((lever(every),) for lever in (checkpointing, mlp_checkpointing) for every in spacings(16))]
    every = [Choice((*own, *more, *one)) for own in losses for more in ((), (IN_BACKWARD,)) for one in checkpoints]
    evaluated = [made_up(choice, asked.with_settings(**choice.values), asked.room_bytes, world) for choice in every]
    fitting = [o.seconds for o in evaluated if o.fits]
    best = min((o.seconds for o in found if o.fits and not o.choice.has(LORA)), default=None)
    assert (best is None) == (not fitting)
    if fitting:
        assert best <= min(fitting) * (1 + ALIKE)
    assert len(set(runs)) == len(runs) <= 28


def test_what_no_dry_run_can_predict_is_left_out_but_kernels_that_are_missing_are_told():
    asked = request(model_name=LLAMA_1B, gpu="h100", batch_size=8, seq_length=1024, gpu_memory_gib=25)
    runs = []

    def evaluate(trials, refuses):
        runs.extend(choice for choice, _ in trials)
        outcomes = [made_up(*trial, asked.room_bytes, "activations") for trial in trials]
        return [UsageError("not here") if refuses(o.choice) else o for o in outcomes]

    found = Search(asked, functools.partial(evaluate, refuses=lambda choice: choice.has(LARGER_CHUNKS))).run()
    assert len(set(runs)) == len(runs) > len(found)
    with pytest.raises(UsageError, match="not here"):
        Search(asked, functools.partial(evaluate, refuses=lambda choice: choice.levers)).run()


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_largest_batch_takes_mlps_in_pieces_where_they_have_most_of_the_memory(part):
    asked = request(model_name=LLAMA_1B, gpu="h100", batch_size=8, seq_length=1024, goal="largest")

    def evaluate(trials):
        found = []
        for choice, config in trials:
            peak = int(7 * GIB + config.tokens_per_step * (1e5 if choice.has(MLP_TILES) else 2e5))
            parts = {"parameters": 2 * GIB, "optimizer_state": 5 * GIB, part: peak - 7 * GIB}
            found.append(Outcome(choice, config, peak <= asked.room_bytes, peak, "backward", parts, 1.0, "gpu"))
        return found

    found = SizeSearch(asked, evaluate).run()
    assert any(o.choice.has(MLP_TILES) for o in found) == (part == "mlp")


def test_half_precision_never_takes_flces_mean_which_trains_wrongly():
    found = answer("half precision").ranked
    assert all(o.config.flce_reduction == "sum" for o in found if o.config.flce)
    wrong = dataclasses.replace(found[0], config=found[0].config.__class__(dtype="fp16", flce_reduction="mean"))
    wrong = dataclasses.replace(wrong, config=dataclasses.replace(wrong.config, gradient_checkpointing=True))
    assert wrong not in advice(answer("half precision").request, [*found, wrong], KNOWN).ranked


def test_small_model_is_better_off_without_flce_as_on_record():
    ranked = answer("small model").ranked
    without = next(o for o in ranked if o.config.kernels == ("rope", "swiglu", "rms_norm") and o.config.loss == "model")
    whole = next(
        o for o in ranked if o.config.flce and o.config.flce_chunks == 1 and not o.config.gradient_checkpointing
    )
    assert without.seconds < whole.seconds


def test_weights_and_states_that_no_card_holds_go_to_the_host_before_anything_is_trained_otherwise():
    found = answer("too large a model")
    assert resident_bytes(found.plain) > found.request.room_bytes
    first, *others = found.ranked
    assert first.choice.has(OFFLOAD)
    assert first.seconds is None  # what the host does has no rates
    assert first.host_bytes > 2**37  # as on record: 8 billion weights, with fp32 states
    assert all(o.choice.training for o in others)
    (adapters,) = (o for o in others if o.choice.has(LORA))
    only = dataclasses.replace(found, ranked=[adapters])
    assert "It trains otherwise than asked: adapters only." in report(only, KNOWN)


@pytest.mark.parametrize("name", SITUATIONS)
def test_whole_answer_is_marked_predicted_and_its_lines_can_be_run(name):
    found = answer(name)
    text = report(found, KNOWN)
    assert "All figures are predicted" in text
    assert all(o.fits and o.peak_bytes <= found.request.room_bytes for o in found.ranked)
    for choice in found.pareto:
        code = lines.python(choice.config)
        compile(code.replace("...", "None"), "advice", "exec")
    arguments = {}
    whole = lines.python(found.ranked[0].config)
    if found.ranked[0].choice.has(OFFLOAD):
        return  # DeepSpeed's configuration is a file
    call = whole.partition("arguments = ")[2].partition("\n)")[0] + "\n)"
    exec(f"arguments = {call}", {"TrainingArguments": transformers.TrainingArguments}, arguments)
    assert arguments["arguments"].use_liger_kernel or "apply_liger_kernel(" in whole


def test_lines_leave_nothing_for_the_trainer_to_overwrite(tmp_path):
    folder = write_llama_folder(tmp_path)
    transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    asked = request(model_name=folder, gpu="h100", batch_size=1, seq_length=16)
    kernels = liger(["rope", "swiglu", "rms_norm", "flce"])
    code = lines.python(asked.with_settings(**Choice((kernels, mlp_checkpointing(2), LARGER_CHUNKS)).values))
    assert "use_liger_kernel" not in code  # the Trainer would put the kernels in as it begins to train
    built: dict = {}
    exec(code.partition("arguments =")[0], built)
    mlp, other = (layer.mlp for layer in built["model"].model.layers)
    assert isinstance(mlp, LigerSwiGLUMLP) or mlp.forward.args[0].__func__ is LigerSwiGLUMLP.forward
    assert mlp.forward.func is torch.utils.checkpoint.checkpoint
    assert not hasattr(other.forward, "func")  # of one layer in two
    assert built["model"].forward.keywords == {"chunk_mem_const": 16}


@pytest.mark.parametrize("lever", [checkpointing(2), mlp_checkpointing(2)])
def test_lines_of_a_graph_do_not_read_the_state_of_random_numbers(lever):
    asked = request(model_name=LLAMA_1B, gpu="h100", batch_size=1, seq_length=1024)
    kernels = liger(["rope", "swiglu", "rms_norm"])
    for more, said in (((), False), ((CHUNKED_LOSS, CUDA_GRAPH), True)):
        code = lines.python(asked.with_settings(**Choice((kernels, *more, lever)).values))
        assert ("preserve_rng_state" in code) is said


def test_trainer_checkpoints_the_layers_that_are_advised(tmp_path):
    folder = write_llama_folder(tmp_path, num_hidden_layers=4)
    asked = request(model_name=folder, gpu="h100", batch_size=1, seq_length=16)
    example = dict.fromkeys(("input_ids", "labels"), torch.arange(16))
    for lever, checkpointed in ((CHECKPOINTING, [True] * 4), (EVERY_SECOND, [True, False] * 2)):
        code = lines.python(asked.with_settings(**Choice((lever,)).values))
        kwargs = eval(re.search(r"gradient_checkpointing_kwargs=(.*),\n", code)[1])
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
        )
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder))
        transformers.Trainer(model, arguments, train_dataset=[example]).train()
        assert [layer.gradient_checkpointing for layer in model.model.layers] == checkpointed


def test_lines_of_the_longest_sequences_compute_what_the_script_does(tmp_path):
    folder = write_llama_folder(tmp_path)
    transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    asked = request(model_name=folder, gpu="h100", batch_size=1, seq_length=16, dtype="fp32")
    code = lines.python(asked.with_settings(**Choice((ON_HOST, MLP_TILES)).values)).replace("16384", "5")
    built: dict = {}
    exec(code.partition("arguments =")[0], built)
    ids, gradients = torch.arange(16)[None], []
    for model in (built["model"].train(), transformers.LlamaForCausalLM.from_pretrained(folder).train()):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(own, plain, atol=1e-6) for own, plain in zip(*gradients, strict=True))


def test_lines_for_a_folder_have_the_names_of_its_family(tmp_path):
    transformers.Gemma2Config(num_hidden_layers=2).save_pretrained(tmp_path)
    asked = request(model_name=str(tmp_path), gpu="h100", batch_size=1, seq_length=16, dtype="fp32")
    code = lines.python(asked.with_settings(**liger(["swiglu", "rms_norm"]).values, attention="eager"))
    assert '"geglu": True' in code
    assert '"swiglu"' not in code


def test_command_measures_what_is_advised():
    for name in SITUATIONS:
        config = answer(name).ranked[0].config
        script = grids.script(config.script)
        words = lines.words(config)[2:]
        again = parsed(None, script.defaults, {}, [*words, "--device", "cuda"]).config
        assert again == dataclasses.replace(config, dry_run=False), name


def test_kept_dry_runs_are_those_of_today():
    asked = request(**SITUATIONS["tiny"])
    first = answer("tiny").ranked[0]
    assert values(outcome((first.choice, first.config), asked)) == values(first)


def test_choice_fits_only_if_later_steps_do_with_nothing_left_free(monkeypatch):
    asked = request(**SITUATIONS["tiny"])
    first = answer("tiny").ranked[0]
    trial = first.choice, first.config
    reserved = predict(first.config, grids.script("all_gpu").build_experiment).peak_reserved_bytes
    scarce = dataclasses.replace(asked, limit_bytes=int(1.2 * reserved))
    assert outcome(trial, scarce).fits
    limits = []

    def refused_later(*words, limit_bytes, steps_more=True, **more):
        limits.append(limit_bytes)
        found = predict(*words, limit_bytes=limit_bytes, steps_more=False, **more)
        return dataclasses.replace(found, refused=SimulatedOutOfMemory(requested_bytes=1)) if steps_more else found

    monkeypatch.setattr(outcomes, "predict", refused_later)
    assert not outcome(trial, scarce).fits
    assert limits == [scarce.room_bytes, scarce.limit_bytes]
    assert outcome(trial, asked).fits  # there memory is plenty, and no more steps are tried


def test_of_times_that_no_prediction_tells_apart_the_least_change_is_first():
    asked = request(**SITUATIONS["tiny"])
    base = Outcome(Choice(), asked.base, True, GIB, "forward", {"mlp": GIB}, 1.0, "gpu")
    graph = dataclasses.replace(base, choice=Choice((CUDA_GRAPH,)), seconds=1 / (1 + ALIKE / 2))
    assert advice(asked, [graph, base], {}).ranked == [base, graph]
    assert advice(asked, [dataclasses.replace(graph, seconds=0.9), base], {}).ranked[0].seconds == 0.9


def test_offloaded_choice_has_no_time_but_says_what_it_takes_at_least():
    asked = request(**SITUATIONS["tiny"], gpu_rates="h100")
    choice, config = Choice((OFFLOAD,)), asked.with_settings(offloaded=True)
    found = outcome((choice, config), asked)
    assert (found.seconds, found.config.gpu_rates) == (None, "h100")
    (_, row) = rows(advice(asked, [found], {}), {})
    assert f"at least {found.floor_s * 1e3:,.1f}" in row
    (_, row) = rows(advice(asked, [dataclasses.replace(found, floor_s=None)], {}), {})
    assert "not known" in row


def test_a_model_of_few_positions_has_no_longest_sequence(tmp_path):
    folder = write_llama_folder(tmp_path, max_position_embeddings=64)
    asked = request(model_name=folder, gpu="h100", batch_size=1, seq_length=16, goal="longest")
    with pytest.raises(UsageError, match="goes in steps of 128, the largest seq length is 64"):
        SizeSearch(asked, None).run()


def test_measured_choices_say_how_far_off_predictions_were():
    found = answer("roomy")
    record = next(iter(on_record().values()))
    ran = []

    def run(config):
        ran.append(config)
        if len(ran) == 2:
            return None
        if len(ran) == 3:
            return record.model_copy(update={"status": "error", "latency_s": None, "peak_memory_bytes": None})
        return record.model_copy(update={"latency_s": 0.1, "peak_memory_bytes": found.pareto[0].peak_bytes})

    own = measured.measure_first(found, run)
    assert len(own) == 3 <= len(found.pareto)
    assert not any(config.dry_run for config in ran)
    assert {config.memory_limit_gib for config in ran} == {found.request.limit_bytes / GIB}
    assert own[0].time_error == pytest.approx(found.pareto[0].seconds / 0.1 - 1)
    text = measured.measured_report(own, record.environment.gpu)
    assert "+0.0%" in text
    assert text.count("(failed)") == 2
    assert "not comparable" not in text
    assert "the advice is for an NVIDIA X, so the times are not" in measured.measured_report(own, "NVIDIA X")


def test_dry_runs_side_by_side_are_those_of_one_process_and_what_cannot_be_predicted_says_why():
    asked = request(**SITUATIONS["tiny"])
    first = answer("tiny").ranked[0]
    wrong = dataclasses.replace(first.config, compile="layers", rms_norm=False, gradient_checkpointing=False)
    with side_by_side(asked) as evaluate:
        found = evaluate([(first.choice, first.config), (Choice(), dataclasses.replace(wrong, model_name="nothing"))])
    assert values(found[0]) == values(first)
    assert isinstance(found[1], UsageError)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
def test_a_gpu_is_found_however_it_is_written(name):
    assert gpu_named(name) is GPUS["NVIDIA GeForce RTX 4090"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--gpu h1000 --batch_size 8 --seq_length 1024", "unknown GPU"),
        ("--gpu h100 --batch_size 0 --seq_length 1024", "--batch_size must be"),
        ("--gpu h100 --batch_size 1 --seq_length 999999", "positions"),
        ("--gpu h100 --batch_size 1 --seq_length 8 --gpu_memory_gib nan", "--gpu_memory_gib"),
        ("--gpu h100 --batch_size 1 --seq_length 8 --goal best", "--goal"),
    ],
)
def test_mistakes_are_told_in_one_line(words, text):
    done = run_python("-m", "src.advise", "--model_name", "meta-llama/Llama-3.2-1B", *words.split())
    assert done.returncode == 2
    assert_one_error_line(done.stderr, text)


def test_trial_without_a_gpu_says_what_it_can_do_here(tmp_path):
    table = tmp_path / "table.json"
    table.write_text("[]")
    done = run_python("-m", "src.advise.trial", table)
    assert done.returncode == 2
    assert_one_error_line(done.stderr, "--advise needs none")
    assert "--measure" not in done.stderr
