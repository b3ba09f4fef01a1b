"""What an entry of the registry says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = Any  # a RunConfig of src/config.py, whose fields are made from the registry
Model = Any  # a causal language model of Hugging Face's


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One thing that can be turned on. Its flag, part of the run name, entry in the record and checks follow from here.

    Hooks may import torch, this module and its entries at the top may not: naming and planning runs stays instant.
    """

    name: str  # of the configuration's field, the record's entry, the flag and the axis of a grid
    default: bool | int | float | str
    help: str  # one sentence
    tag: str | None = None  # begins its part of the run name; None: it is in the original's own name already
    flag: str | None = None  # the original's spelling, where it is another
    offload_flag: str | None = None  # the same, of the offloaded script
    aliases: tuple[str, ...] = ()  # other spellings, such as a family's own name for it
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None  # smallest and largest value
    needs: tuple[str, ...] = ()  # others that must be on, or a value other than the default would do nothing
    # Drawn beside the kernels, as another strategy. Otherwise runs with another value have figures of their own.
    compared: bool = False
    changes_numerics: bool = False  # it computes the same sums in another order, or rounds elsewhere
    liger_switch: str | None = None  # of a Liger kernel: the usual name of the switch in Liger's patch of a family
    scripts: tuple[str, ...] = ("all_gpu", "deepspeed")
    not_offloaded: str = ""  # why the offloaded script has it not, where users may look for it there
    refusal: Callable[[Config], str | None] = lambda config: None  # why a run with it cannot be, in one line
    warning: Callable[[Config], str | None] = lambda config: None  # what a user must know before it runs, in one line
    gpu_only: Callable[[Config], bool] = lambda config: False  # whether a run with it cannot be on a CPU
    unpredicted: Callable[[Config], str | None] = lambda config: None  # why no dry run can say what it needs
    # The value of a run that names none, where it depends on the run's other settings; None: the default.
    chosen: Callable[[Config], Any] = lambda config: None

    # What it does, in the order of a run.
    to_model: Callable[[Model, Config], None] | None = None  # to the built model
    forward_arguments: Callable[[Config], dict[str, Any]] = lambda config: {}  # of every call of the model
    implementation: Callable[[Model], object] | None = None  # the function or class that is in place in a built model

    def is_on(self, config: Config) -> bool:
        """Whether a run has it: a switch that is on, or another value than the default."""
        value = getattr(config, self.name)
        return value if isinstance(value, bool) else value != self.default

    @property
    def hugging_faces(self) -> bool | int | float | str:
        """The value of a run with Hugging Face's own code."""
        return False if self.is_kernel else self.default

    @property
    def is_kernel(self) -> bool:
        """Whether it is one of Liger's kernels."""
        return self.liger_switch is not None

    def differs(self, config: Config) -> bool:
        """Whether a run has another value than the default."""
        return getattr(config, self.name) != self.default
