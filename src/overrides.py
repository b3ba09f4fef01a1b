"""What --ds_override says: a part of DeepSpeed's configuration, as its users have it. Needs no torch.

Configurations written for Hugging Face's Trainer leave values open as "auto". Here such a value is ours: that of the
flags and the preset. What would say something else than a flag, or than what the script does, is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.utils import UsageError, first_line

AUTO = "auto"

# What the script sets from its own flags: DeepSpeed's key -> the flag. Its batches are made by them, too.
_FLAGS = {
    "train_micro_batch_size_per_gpu": ("batch_size", "per_device_train_batch_size"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", "gradient_accumulation_steps"),
}
_ADAM = ("adam", "adamw")
_OLD_NAMES = {"bfloat16": "bf16"}


def normalised(text: str) -> str:
    """`text`, or the file that it names, as JSON of one form, so that a record and its name do not depend on spaces.

    Raises `UsageError` if it is neither.
    """
    path = Path(text)
    if not text.lstrip().startswith("{") and _is_file(path):
        try:
            text = path.read_text()
        except (OSError, ValueError) as error:
            raise UsageError(f"--ds_override: cannot read {path}: {first_line(error)}") from error
    return json.dumps(_loaded(text), separators=(",", ":"), sort_keys=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False


def _loaded(text: str) -> dict[str, Any]:
    try:
        overrides = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--ds_override is not JSON, and no file: {error}") from error
    if not isinstance(overrides, dict):
        raise UsageError("--ds_override must be a JSON object")
    return {_OLD_NAMES.get(key, key): value for key, value in overrides.items()}


def parsed(text: str) -> dict[str, Any]:
    """What is to be merged into DeepSpeed's configuration: without what is "auto", and without what describes our own
    optimizer and learning-rate schedule. Raises `UsageError`."""
    overrides = _loaded(text)
    for section in ("optimizer", "scheduler"):
        _check_leaves_open(overrides.pop(section, None), section)
    return _without_auto(overrides)


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if value != AUTO}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _check_leaves_open(section: Any, name: str) -> None:
    """Raises `UsageError` unless everything that a section says about numbers is "auto"."""
    if section is None:
        return
    if not isinstance(section, dict):
        raise UsageError(f"--ds_override: {name} must be a JSON object")
    kind = section.get("type", AUTO)
    if name == "optimizer" and kind != AUTO and str(kind).lower() not in _ADAM:
        raise UsageError(f"--ds_override: optimizer {kind!r} is none of this script's; it trains with AdamW")
    fixed = [key for key, value in dict(section.get("params") or {}).items() if value != AUTO]
    if fixed:
        flags = {"optimizer": "--learning_rate, --beta_0, --beta_1, --weight_decay", "scheduler": "--lr_scheduler_type"}
        raise UsageError(f"--ds_override: {name}.params.{fixed[0]} has no effect here: give {flags[name]}")


def zero_section(overrides: dict[str, Any]) -> dict[str, Any]:
    """The part about ZeRO. Raises `UsageError` if it is no object."""
    zero = overrides.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UsageError("--ds_override: zero_optimization must be a JSON object")
    return zero


def stage(overrides: dict[str, Any]) -> int:
    """The stage of ZeRO, 3 where nothing is said. Raises `UsageError` unless it is 1, 2 or 3."""
    number = zero_section(overrides).get("stage", 3)
    if type(number) is not int or not 1 <= number <= 3:
        raise UsageError(f"--ds_override: zero_optimization.stage must be 1, 2 or 3, got {str(number)[:20]}")
    return number


def is_offloaded(overrides: dict[str, Any], what: str) -> bool:
    """Whether `offload_param` or `offload_optimizer` is on the CPU, as it is where nothing is said."""
    section = zero_section(overrides).get(what, {})
    if section is None:
        return False
    if not isinstance(section, dict):
        raise UsageError(f"--ds_override: zero_optimization.{what} must be a JSON object or null")
    device = section.get("device", "cpu")
    if device not in ("cpu", "none"):
        raise UsageError(f"--ds_override: {what} on {str(device)[:20]!r} is not known here: cpu or none")
    return device == "cpu"


def says_more(overrides: dict[str, Any]) -> bool:
    """Whether there is anything in it but the stage and what is offloaded."""
    own = {"stage", "offload_param", "offload_optimizer"}
    return bool(overrides.keys() - {"zero_optimization"} or zero_section(overrides).keys() - own)


def warnings(config: Any) -> list[str]:
    """What an `OffloadConfig` keeps on the cpu although the override reads as if DeepSpeed kept it on the GPU.

    A whole file of others' names the stage; what it does not offload, DeepSpeed would not.
    """
    zero = zero_section(config.ds_overrides)
    kept = {"offload_param": config.weights_on_cpu, "offload_optimizer": config.optimizer_on_cpu}
    names = [name for name, on_cpu in kept.items() if on_cpu and "stage" in zero and name not in zero]
    return [
        f'--ds_override does not name {name}, which stays on the cpu here; "{name}": null changes that'
        for name in names
    ]


def check(config: Any) -> None:
    """Raises `UsageError` if the override of an `OffloadConfig` cannot be, or does not go with its other settings."""
    for refusal in _refusals(config, config.ds_overrides):
        raise UsageError(f"--ds_override: {refusal}")


def _refusals(config: Any, overrides: dict[str, Any]) -> Iterator[str]:
    for key, (field, flag) in _FLAGS.items():
        own = getattr(config, field)
        if key in overrides and overrides[key] != own:
            yield f"{key} {overrides[key]} is not {own}, what the flags say: leave it out and give --{flag}"
    for dtype in ("fp16", "bf16"):
        section = overrides.get(dtype)
        if isinstance(section, dict) and section.get("enabled", dtype == config.dtype) != (dtype == config.dtype):
            yield f"{dtype}.enabled {section['enabled']} does not go with --dtype {config.dtype}"
    zero3 = config.zero_stage == 3
    if not zero3 and zero_section(overrides).get("offload_param"):
        yield "offload_param is for stage 3"
    whole = zero3 and config.weights_on_cpu and config.optimizer_on_cpu
    if config.optimizer == "overlapped_cpu_adam" and not whole:
        yield "overlapped_cpu_adam, of preset fast, needs stage 3 with both on the cpu: take --preset original"
    if config.optimizer == "overlapped_cpu_adam" and overrides.get("zero_force_ds_cpu_optimizer"):
        yield "zero_force_ds_cpu_optimizer wants DeepSpeed's Adam, not ours of preset fast: set it to false"
    if config.optimizer_states == "bf16" and not (zero3 and config.optimizer_on_cpu):
        yield "--optimizer_states bf16 needs stage 3 and the optimizer on the cpu"
