"""The record of a run: its type, its files, and the one door through which it is filled and written."""

from src.record.record import (
    SCHEMA,
    WRONG,
    Environment,
    Failure,
    Frontier,
    GradientError,
    KernelCheck,
    Parity,
    Record,
    load,
    load_all,
    load_and_tell,
    save,
)

__all__ = [
    "SCHEMA",
    "WRONG",
    "Environment",
    "Failure",
    "Frontier",
    "GradientError",
    "KernelCheck",
    "Parity",
    "Record",
    "load",
    "load_all",
    "load_and_tell",
    "save",
]
