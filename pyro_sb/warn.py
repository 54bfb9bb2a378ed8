"""The one way in which the package warns: at the user's own line, not at one of ours, Pyro's or torch's."""

import inspect
import warnings

__all__ = ["warn"]

INNER = {"pyro_sb", "pyro", "torch", "contextlib", "functools"}
"""Packages between the user's call and what it meets."""


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the innermost line of the call stack that is the user's.

    Args:
        message: What follows for the result, the figure, and what to change.
        category: Kind of the warning.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and _inner(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _inner(module: str) -> bool:
    return module.split(".")[0] in INNER
