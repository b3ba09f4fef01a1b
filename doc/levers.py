"""What was tried to make an offloaded step faster, and what it was expected to do; doc/tables.py adds what it did."""

from dataclasses import dataclass

from src.config import PRESETS, OffloadConfig, make_parser, to_config


@dataclass(frozen=True)
class Lever:
    """One setting that was tried."""

    flags: str  # of deepspeed_liger_kernel.py
    what: str
    predicted: str
    verdict: str = ""
    variables: str = ""  # of the environment

    @property
    def run_name(self) -> str:
        """The run that measured it."""
        parser = make_parser(None, OffloadConfig())
        arguments = self.flags.split()
        parser.set_defaults(**PRESETS[parser.parse_args(arguments).preset])
        return to_config(parser.parse_args(arguments), OffloadConfig).run_name


_TUNED = "--dtype bf16 --fetch_layers 1 --reduce_bucket_size 6.1e7 --sub_group_size 1e8"

LEVERS = (
    Lever("", "the original's settings", "the reference"),
    Lever(
        "--dtype bf16",
        "bf16 in place of fp16",
        "over 1 s less: no scan of all gradients on the CPU for overflow",
        "kept",
    ),
    Lever(
        _TUNED,
        "and whole layers: fetched, reduced and updated at a time",
        "0.3 s less: fewer and larger copies, fewer hooks",
        "kept",
    ),
    Lever(
        f"{_TUNED} --prefetch_layers 1",
        "and the next layer fetched ahead",
        "0.05 s less: copies run while the GPU multiplies",
        "slower with DeepSpeed's Adam, takes less memory; kept for ours",
    ),
    Lever(
        f"{_TUNED} --optimizer_states bf16",
        "DeepSpeed's bf16 master weights and moments",
        "half of Adam's memory traffic; rounds to nearest, so small updates are lost",
        "not kept: changes what is learned",
    ),
    Lever(
        '--ds_override {"zero_optimization":{"offload_optimizer":{"ratio":0.9}}} ' + _TUNED,
        "a tenth of the optimizer states on the GPU",
        "a tenth less of Adam, 1.5 GiB more on the GPU",
        "not kept: costs memory",
    ),
    Lever(
        '--ds_override {"zero_optimization":{"stage":2,"offload_param":null,"leaf_module":null}} --dtype bf16',
        "ZeRO-2: weights stay on the GPU",
        "no fetches, 2.3 GiB more on the GPU",
        "not kept: costs memory",
    ),
    Lever(
        '--ds_override {"zero_optimization":{"zenflow":{}}} --dtype bf16',
        "ZenFlow: the largest gradients are applied on the GPU, the others later",
        "most of Adam off the critical path",
        "does not run: with DeepSpeed 0.19.8 the first forward pass ends with an IndexError, tried on the CPU; changes "
        "what is learned",
    ),
    Lever(
        "--preset fast",
        "our Adam: one pass over memory, behind the next forward pass; one crossing of PCIe per gradient, its norm "
        "taken on the GPU without an fp64 copy",
        "forward pass hidden, no passes for scaling and converting: half of the time, over 1 GiB less",
        "kept: preset fast",
    ),
    Lever("--preset fast --cpu_threads 8", "half of the threads", "slower: memory needs more than 8", "not kept"),
    Lever(
        "--preset fast",
        "threads bound to cores",
        "none",
        "not kept: the main thread is bound too, and what it starts shares its core",
        variables="OMP_PLACES=cores OMP_PROC_BIND=close",
    ),
    Lever(
        "--preset fast --prefetch_layers 0",
        "no layer fetched ahead",
        "0.05 s more",
        "not kept: DeepSpeed then keeps layers for their next use, which is faster and costs memory",
    ),
    Lever("--preset fast --fetch_layers 0", "each weight fetched alone", "0.05 s more: more hooks", "not kept"),
    Lever(
        '--preset fast --ds_override {"zero_optimization":{"memory_efficient_linear":false}}',
        "PyTorch's linear layers in place of DeepSpeed's",
        "0.02 s less: no Python in each",
        "not kept: slower",
    ),
    Lever(
        '--preset fast --ds_override {"zero_optimization":{"stage3_max_reuse_distance":1000000000,'
        '"stage3_max_live_parameters":2000000000}}',
        "layers stay on the GPU between forward and backward pass",
        "no second fetch; 1.5 GiB more on the GPU",
        "not kept: costs memory",
    ),
    Lever(
        "--preset fast --optimizer_states bf16",
        "our bf16 master weights and moments, rounded stochastically",
        "half of Adam's memory traffic",
        "an option, not the preset: changes rounding",
    ),
)
