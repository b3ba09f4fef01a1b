"""The registry of everything that can be turned on: one entry is a feature.

Flags, run names, records, axes of grids, figure legends, kernel checks and dry runs follow from the entries.
"""

from collections.abc import Collection, Mapping
from typing import Any

from src.families import shipped
from src.techniques.attention import ATTENTION
from src.techniques.checkpointing import CHECKPOINTING
from src.techniques.compilation import COMPILATION
from src.techniques.kernels import KERNELS, lacking
from src.techniques.lora import LORA
from src.techniques.losses import LOSSES
from src.techniques.optimizers import OPTIMIZERS
from src.techniques.positions import ROPE_SCALING
from src.techniques.precision import MIXED_PRECISION
from src.techniques.technique import Config, Model, Technique
from src.utils import UsageError

# In the order in which they change a model.
REGISTRY = (
    *KERNELS,
    *LORA,
    *LOSSES,
    *CHECKPOINTING,
    *OPTIMIZERS,
    ATTENTION,
    ROPE_SCALING,
    MIXED_PRECISION,
    *COMPILATION,
)
TECHNIQUES: dict[str, Technique] = {t.name: t for t in REGISTRY}
KERNEL_NAMES = tuple(t.name for t in TECHNIQUES.values() if t.is_kernel)


def kernels_only(*names: str) -> dict[str, bool]:
    """The switches of all kernels, of which `names` are on. Raises `UsageError`."""
    if unknown := set(names) - set(KERNEL_NAMES):
        raise UsageError(f"unknown kernel {sorted(unknown)}: choose from {', '.join(KERNEL_NAMES)}")
    return {name: name in names for name in KERNEL_NAMES}


# The study's three strategies: the word of a grid -> switches, and the names that the study's figures use.
STRATEGIES: dict[str, Mapping[str, bool]] = {
    "none": kernels_only(),
    "no_flce": kernels_only("rope", "swiglu", "rms_norm"),
    "all": kernels_only(*KERNEL_NAMES),
}
TITLES = {"none": "No Liger Kernel", "no_flce": "Liger Kernel w/o FLCE", "all": "All Liger Kernel"}


def kernels_title(config: Config) -> str:
    """The study's name for the kernels of a run, or the kernels that are on."""
    for word, switches in STRATEGIES.items():
        if all(getattr(config, name) == is_on for name, is_on in switches.items()):
            return TITLES[word]
    return " + ".join(config.kernels) + " only"


def title(config: Config) -> str:
    """A run's kernels, and what else it has on that is compared with them."""
    others = [t for t in TECHNIQUES.values() if t.compared and not t.is_kernel and t.differs(config)]
    words = [t.name if isinstance(t.default, bool) else f"{t.name} {getattr(config, t.name)}" for t in others]
    return ", ".join([kernels_title(config), *words])


def without(config: Config) -> dict[str, Any]:
    """The settings that turn off, in a run, what is compared and what needs it: Hugging Face's own code."""
    return {t.name: t.hugging_faces for t in TECHNIQUES.values() if t.compared or t.needs}


def turned_on(config: Config) -> dict[str, Any]:
    """The settings in which a run differs from `without`, by name."""
    return {name: own for name, off in without(config).items() if (own := getattr(config, name)) != off}


def check(config: Config) -> None:
    """Raises `UsageError` if what a run turns on cannot be, or would do nothing."""
    known = shipped(config.model_name)
    if known is not None and (reason := lacking(config.kernels, known[0])):
        raise UsageError(reason)
    for technique in TECHNIQUES.values():
        if config.script not in technique.scripts:
            if technique.not_offloaded and technique.differs(config):
                raise UsageError(f"--{technique.name} is not for this script: {technique.not_offloaded}")
            continue
        missing = [TECHNIQUES[name] for name in technique.needs if not TECHNIQUES[name].is_on(config)]
        if missing and technique.differs(config):
            needed = missing[0].flag or missing[0].name
            value = " 1" if isinstance(missing[0].default, bool) else ""
            raise UsageError(f"--{technique.name} does nothing without --{needed}{value}")
        reason = technique.refusal(config) or (config.plans and technique.unpredicted(config))
        if reason:
            raise UsageError(reason)


def chosen(config: Config, given: Collection[str]) -> dict[str, Any]:
    """Values of settings that are not among the `given` ones and depend on others."""
    own = {t.name: t.chosen(config) for t in TECHNIQUES.values() if t.name not in given}
    if config.mixed_precision != "none" and "dtype" not in given:
        own["dtype"] = "fp32"
    return {name: value for name, value in own.items() if value is not None}


def warnings(config: Config) -> list[str]:
    """What a user must know of a run's techniques, a line each."""
    return [line for t in TECHNIQUES.values() if (line := t.warning(config))]


def gpu_only(config: Config) -> list[str]:
    """The flags of what a run has on that no CPU runs."""
    return [f"--{t.flag or t.name}" for t in TECHNIQUES.values() if t.gpu_only(config)]


def apply_to_model(model: Model, config: Config) -> None:
    """Do to a built model what the run's techniques do to it."""
    for technique in TECHNIQUES.values():
        if technique.to_model is not None:
            technique.to_model(model, config)


def forward_arguments(config: Config) -> dict[str, Any]:
    """What every call of the model gets beside the batch."""
    return {name: value for t in TECHNIQUES.values() for name, value in t.forward_arguments(config).items()}
