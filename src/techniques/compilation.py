"""What PyTorch compiles or captures, and matrix products in 8 bits, which need it to be fast."""

from src.techniques.libraries import missing
from src.techniques.technique import Config, Model, Technique


def _compile(model: Model, config: Config) -> None:
    parts = {"none": [], "layers": model.model.layers, "model": [model.model]}[config.compile]
    for part in parts:
        part.compile()


def _refusal_of_compile(config: Config) -> str | None:
    if config.compile != "none" and config.rms_norm:
        return "Liger's RMSNorm cannot be compiled: --compile goes with --enable_rms 0"
    return None


def _in_8_bits(model: Model, config: Config) -> None:
    if config.fp8:
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model.model)


def _refusal_of_fp8(config: Config) -> str | None:
    if not config.fp8:
        return None
    if reason := missing("torchao"):
        return f"--fp8: {reason}"
    return None if config.dtype == "bf16" else "--fp8 goes with --dtype bf16: it is for what would be bf16 products"


def _refusal_of_graph(config: Config) -> str | None:
    if not config.cuda_graph:
        return None
    if config.flce or config.loss in ("liger", "cce", "cce_filtered"):
        return "--cuda_graph cannot hold a loss that waits for the GPU: --enable_flce 0, or --loss chunked"
    if config.compute_dtype == "fp16":
        return "--cuda_graph cannot hold fp16's loss scaler, which waits for the GPU"
    if config.optimizer not in ("adamw_fused", "sgd"):
        return f"--cuda_graph goes with --optimizer adamw_fused or sgd, not {config.optimizer}"
    if config.warmup < 3:
        return "--cuda_graph needs --warmup 3: two steps before the one that is captured"
    return None


def _not_predicted(config: Config) -> str | None:
    flag = "fp8" if config.fp8 else "compile" if config.compile != "none" else None
    return flag and f"--{flag} is not predicted: what compiled code keeps in memory is the compiler's choice"


# After everything else that changes a model: it is what they made that is compiled.
COMPILATION = (
    Technique(
        name="fp8",
        default=False,
        help="matrix products of the layers in 8-bit floating point (torchao); other numbers than bf16's",
        tag="fp8-",
        scripts=("all_gpu",),
        compared=True,
        changes_numerics=True,
        refusal=_refusal_of_fp8,
        gpu_only=lambda config: config.fp8,
        unpredicted=_not_predicted,
        to_model=_in_8_bits,
    ),
    Technique(
        name="compile",
        default="none",
        help="torch.compile each layer, or the whole model below the loss",
        tag="compile-",
        choices=("none", "layers", "model"),
        scripts=("all_gpu",),
        compared=True,
        changes_numerics=True,
        refusal=_refusal_of_compile,
        gpu_only=lambda config: config.compile != "none",
        unpredicted=_not_predicted,
        to_model=_compile,
    ),
    Technique(
        name="cuda_graph",
        default=False,
        help="launch the whole step at once: for small batches, where the GPU waits for the CPU to launch kernels",
        tag="graph",
        scripts=("all_gpu",),
        compared=True,
        refusal=_refusal_of_graph,
        gpu_only=lambda config: config.cuda_graph,
    ),
)
