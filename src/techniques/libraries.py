"""Libraries that few runs need."""

import importlib.util


def missing(name: str) -> str | None:
    """What to do where an optional library cannot be imported, in one line; None if it is there."""
    if importlib.util.find_spec(name) is not None:
        return None
    return f"it needs the package {name.replace('_', '-')}: pip install -r requirements-extra.txt"
