"""Long sequences: what is kept, in pieces or on the host, computes what plain checkpointing does, and is counted."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import all_gpu_liger_kernel as script
from src import cli, ds_utils, techniques
from src.config import LONGEST, PRESETS, RunConfig
from src.model_utils import build_model, load_model_config
from src.offload import host_memory
from src.offload.host_memory import PROCESS_BYTES, check_kept_on_host, host_bytes_needed, kept_on_host_bytes
from src.offload_config import PRESETS as OFFLOAD_PRESETS
from src.offload_config import OffloadConfig
from src.predict.dry_run import predict
from src.predict.fake_gpu import FakeGpu
from src.predict.frontier import search
from src.techniques import host_checkpoints, kept_attention
from src.techniques.pinned import SMALLEST_BYTES, PinnedBuffers, piece_sizes
from src.utils import GIB, MIB, HostMemoryError, UsageError
from tests.helpers import assert_one_error_line, tiny_config, write_llama_folder

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.fixture
def attention_calls(monkeypatch):
    """How often PyTorch's fused attention is computed; grows as it is."""
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in kept_attention.FUSED_ATTENTION:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        yield calls


def gradients(config, steps=1):
    """Of a model with weights that depend on the seed alone, after some passes; and the model."""
    torch.manual_seed(0)
    model = build_model(config, torch.device("cpu"))
    ids = torch.randint(199, (config.batch_size, config.seq_length), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, model


@pytest.mark.parametrize("kept", [1, 3, LAYERS])
def test_attention_that_is_kept_is_not_computed_again_and_changes_no_gradient(model, attention_calls, kept):
    plain, _ = gradients(tiny_config(model_name=model, batch_size=2))
    assert len(attention_calls) == 2 * LAYERS
    del attention_calls[:]
    config = tiny_config(model_name=model, batch_size=2, checkpoint_offload="overlapped", attention_kept=kept)
    own, _ = gradients(config, steps=2)
    assert len(attention_calls) == 2 * (2 * LAYERS - kept)
    assert all(torch.equal(own[name], plain[name]) for name in plain)


def test_pieces_are_powers_of_two_and_waste_less_than_the_smallest(rng):
    for count in (1, SMALLEST_BYTES, 3 * SMALLEST_BYTES, 768 * MIB, *(rng.randrange(1, 2**40) for _ in range(100))):
        sizes = piece_sizes(count)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert 0 <= sum(sizes) - count < SMALLEST_BYTES
    assert piece_sizes(768 * MIB) == [512 * MIB, 256 * MIB]


def test_buffers_are_used_again():
    buffers = PinnedBuffers()
    for count in (5 * MIB, 4 * MIB, MIB + 1):
        pieces = buffers.take(count, pin=False)
        assert sum(piece.numel() for piece in pieces) >= count
        buffers.give_back(pieces)
    assert buffers.allocated_bytes == 5 * MIB + MIB  # the last takes one of a MiB from the first, and one more


@pytest.mark.parametrize("own", [{}, {"attention_kept": 2}, {"attention_kept": 9, "checkpoint_every": 3}])
def test_host_memory_is_estimated_as_it_is_taken(model, monkeypatch, own):
    """By a run, with pieces as small as its tensors, and by a dry run."""
    made = []
    monkeypatch.setattr("src.techniques.pinned.SMALLEST_BYTES", 64)
    monkeypatch.setattr(host_checkpoints, "PinnedBuffers", lambda: made.append(PinnedBuffers()) or made[-1])
    config = tiny_config(model_name=model, batch_size=3, seq_length=40, checkpoint_offload="overlapped", **own)
    gradients(config, steps=2)
    estimate = kept_on_host_bytes(config, load_model_config(config))
    assert made[0].allocated_bytes == estimate > 0
    planned = dataclasses.replace(config, device="cuda", dtype="bf16", seq_length=256)
    needed = kept_on_host_bytes(planned, load_model_config(planned)) + PROCESS_BYTES
    predicted = predict(planned, script.build_experiment, simulate=script.SCRIPT.simulate).host_peak_bytes
    assert predicted == pytest.approx(needed, abs=64 * 1024)  # beside it, a few numbers of the optimizer


def test_offloaded_runs_count_it_too():
    settings = OFFLOAD_PRESETS["fast"] | {"preset": "fast", "device": "cuda", "batch_size": 1, "seq_length": 2**17}
    plain = OffloadConfig(**settings, model_name="meta-llama/Llama-3.1-8B")
    kept = dataclasses.replace(plain, checkpoint_offload="overlapped", attention_kept=8)
    shape = load_model_config(plain)
    # Once the engine stands, the gradients' memory is pinned: what was there before that is free again.
    before = 2 * 8_030_261_248  # weights of Llama 3.1 8B
    more = host_bytes_needed(kept, shape) - host_bytes_needed(plain, shape)
    assert more == 31 * GIB + 8 * (GIB + 16 * MIB) + GIB // 2 - before
    with pytest.raises(UsageError, match="blocking is for one GPU"):
        techniques.check(dataclasses.replace(plain, checkpoint_offload="blocking"))
    with pytest.raises(UsageError, match="--mlp_tile_tokens under ZeRO-3 needs whole layers"):
        techniques.check(dataclasses.replace(plain, mlp_tile_tokens=64, fetch_layers=False))


def test_a_run_in_an_engine_that_is_kept_is_told_of_a_host_that_is_too_small(monkeypatch):
    built = SimpleNamespace(set_train_micro_batch_size=lambda size: None)
    monkeypatch.setattr(ds_utils, "build_engine", lambda config, device: built)
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: GIB)
    engine = ds_utils.KeptEngine()
    for seq_length in (2**15, 2**14, 2**15):
        engine(OffloadConfig(**OffloadConfig.presets["longest"] | {"device": "cuda", "seq_length": seq_length}), None)
    longer = OffloadConfig(**OffloadConfig.presets["longest"] | {"device": "cuda", "seq_length": 2**16})
    with pytest.raises(HostMemoryError, match=r"65,536 tokens keep .* more .* 1\.00 GiB are free"):
        engine(longer, None)
    engine(dataclasses.replace(longer, dry_run=True), None)


def test_a_host_that_is_too_small_is_told_before_anything_is_built():
    settings = PRESETS["longest"] | {"preset": "longest", "device": "cuda", "dry_run": True, "rope_scaling": 8.0}
    config = RunConfig(**settings, seq_length=2**20, host_memory_gib=121)
    shape = load_model_config(config)
    # 15 inputs of 4 GiB; 16 times an output of 4 GiB and 128 MiB of statistics.
    assert kept_on_host_bytes(config, shape) == 15 * 4 * GIB + 16 * (4 * GIB + 128 * MIB)
    with pytest.raises(HostMemoryError, match=r"127\.50 GiB .* 121\.00 GiB of --host.* --attention_kept 14 or a"):
        check_kept_on_host(config, shape)
    check_kept_on_host(dataclasses.replace(config, attention_kept=14), shape)
    check_kept_on_host(dataclasses.replace(config, host_memory_gib=None), shape)  # a dry run is of another machine


@pytest.mark.parametrize("own", [{"mlp_tile_tokens": 7}, {"mlp_tile_tokens": 7, "swiglu": True}, {"flce_tokens": 9}])
def test_what_is_computed_in_pieces_has_the_same_gradients(model, own):
    config = tiny_config(model_name=model, batch_size=2, flce="flce_tokens" in own)
    plain, _ = gradients(dataclasses.replace(config, flce=False))
    found, _ = gradients(dataclasses.replace(config, **own))
    for name, wanted in plain.items():
        assert torch.linalg.vector_norm(found[name] - wanted) < 1e-5 * torch.linalg.vector_norm(wanted), name


def test_tiles_compute_in_the_dtypes_of_the_forward_pass(model):
    config = tiny_config(model_name=model, mixed_precision="bf16")
    plain, own = (gradients(dataclasses.replace(config, mlp_tile_tokens=n))[0] for n in (0, 5))
    assert all(torch.linalg.vector_norm(own[n] - plain[n]) < 0.02 * torch.linalg.vector_norm(plain[n]) for n in plain)


def test_a_dry_run_of_few_tiles_has_the_memory_and_work_of_all(tmp_path, monkeypatch):
    model = write_llama_folder(tmp_path, num_hidden_layers=1)
    own = {"mlp_tile_tokens": 32, "flce_tokens": 64, "batch_size": 2, "seq_length": 128}
    config = RunConfig(**PRESETS["longest"] | own, preset="longest", model_name=model, device="cuda")

    def figures():
        found = predict(config, script.build_experiment, simulate=script.SCRIPT.simulate)
        flops = sum(work.flops for work in found.works)
        return found.peak_bytes, found.peak_reserved_bytes, flops, len(found.works)

    few = figures()
    monkeypatch.setattr(FakeGpu, "_few", lambda self, *tiles: zip(*tiles))
    assert few == figures()


def test_rope_scaling_divides_positions(model):
    """Tokens at twice the distance are to each other as they were, and sequences may be twice as long."""
    plain, scaled = (
        build_model(tiny_config(model_name=model, rope_scaling=factor), torch.device("cpu")) for factor in (1.0, 2.0)
    )
    positions, hidden = torch.arange(6)[None], torch.empty(1)
    for of_plain, of_scaled in zip(
        plain.model.rotary_emb(hidden, positions), scaled.model.rotary_emb(hidden, 2 * positions)
    ):
        assert torch.equal(of_plain, of_scaled)
    with pytest.raises(UsageError, match=r"300 is beyond the 256 positions of .*: --rope_scaling 2 divides"):
        load_model_config(tiny_config(model_name=model, seq_length=300))
    assert load_model_config(tiny_config(model_name=model, seq_length=300, rope_scaling=2.0))


REFUSED = {
    "--attention_kept does nothing without --checkpoint_offload": {"attention_kept": 2, "checkpoint_offload": "none"},
    "--attention_kept keeps it on the host": {"attention_kept": 2, "checkpoint_offload": "blocking"},
    "--attention_kept keeps what --attention sdpa": {"attention_kept": 2, "attention": "eager"},
    "--attention_kept needs bf16": {"attention_kept": 2, "dtype": "fp32"},
    "--mlp_tiles says how many": {"mlp_tiles": 2, "mlp_tile_tokens": 64},
    "--flce_tokens does nothing without --enable_flce 1": {"flce_tokens": 64, "flce": False},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(text):
    with pytest.raises(UsageError) as caught:
        techniques.check(RunConfig(**{"checkpoint_offload": "overlapped", "device": "cuda"} | REFUSED[text]))
    assert str(caught.value).startswith(text)


def test_cut_cross_entropy_is_refused_where_its_kernels_would_count_wrongly(model, monkeypatch):
    monkeypatch.setattr("src.techniques.losses._LARGEST_CUT", 48 * 32)  # width x tokens
    monkeypatch.setattr("src.techniques.losses.missing", lambda package: None)
    config = tiny_config(model_name=model, loss="cce", seq_length=32)
    build_model(config, torch.device("cpu"))
    with pytest.raises(UsageError, match="--loss cce counts in 32 bits, too few for 33 tokens x 48: at most 32 tokens"):
        build_model(dataclasses.replace(config, seq_length=33), torch.device("cpu"))


def test_flags_override_the_preset_and_name_the_run():
    words = ["--preset", "longest", "--dry_run", "--attention_kept", "14", "--seq_length", "4096"]
    config = cli.parsed("", script.DEFAULTS, script.CPU_DEFAULTS, words).config
    assert {name: getattr(config, name) for name in PRESETS["longest"]} == PRESETS["longest"] | {"attention_kept": 14}
    assert config.run_name.endswith("_keptattention14_dryrun1_longest")
    assert RunConfig.from_dict(config.to_dict()) == config
    offloaded = cli.parsed("", OffloadConfig(), {}, words).config
    wanted = OFFLOAD_PRESETS["fast"] | LONGEST | {"attention_kept": 14}
    assert {name: getattr(offloaded, name) for name in wanted} == wanted
    assert offloaded.run_name.endswith("_keptattention14_dryrun1_longest")


def test_the_longest_length_is_found_within_a_hundredth_in_few_trials():
    for longest in (3000, 196_608, 1_000_000):
        tried = []

        def fits(size, longest=longest, tried=tried):
            tried.append(size)
            return size <= longest

        found = search(fits, 128, 2**21, roughly=True)
        assert longest - max(128, longest // 100) < found <= longest
        assert len(tried) <= 24


def test_a_host_that_is_too_small_ends_the_command_with_status_2(tmp_path, capsys):
    words = ["--preset", "longest", "--dry_run", "--seq_length", "131072", "--host_memory_gib", "8"]
    words += ["--result_dir", str(tmp_path), "--snapshot_dir", ""]
    command = cli.parsed("", script.DEFAULTS, script.CPU_DEFAULTS, words)
    assert cli.run(script.main, command) == 2
    told = capsys.readouterr().err
    assert_one_error_line(
        told, "17.25 GiB in host memory at 131,072 tokens, more than the 8.00 GiB of --host_memory_gib"
    )
    assert not list(tmp_path.iterdir())
