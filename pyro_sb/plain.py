r"""Objects of this package as tensors and plain values, and back: what a file may hold of moves and populations.

An object is a dict of its attributes with the name of its class. Back from a file no constructor is called, so no code
that the file could choose is run: the attributes are put into an empty object of a class of this package.
"""

import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["from_plain", "is_plain", "to_plain"]

CLASS, STATE, KNOWN = "~class", "~state", "~known"


def __dir__() -> list[str]:
    return sorted(__all__)


def is_plain(value: Any) -> bool:
    """Whether a nest holds tensors and plain values alone, as a file may.

    Example:
        >>> is_plain({"a": [1, torch.ones(2)]}), is_plain(print)
        (True, False)
    """
    if type(value) is dict:
        return all(isinstance(key, str | int) for key in value) and all(map(is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, Tensor)


def to_plain(value: Any, known: Mapping[str, Any] | None = None, name: str = "value") -> Any:
    """A nest of tensors, plain values and objects of this package, without the objects.

    Args:
        value: The nest.
        known: Objects that are named and not written: whoever reads has them.
        name: Of the value, for messages.

    Raises:
        ValueError: Something else is in it, such as a function or a network.

    Example:
        >>> from pyro_sb.ops.student_mixture import StudentMixture
        >>> mixture = StudentMixture(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None], torch.tensor([5.0]))
        >>> to_plain(mixture)["~class"]
        'pyro_sb.ops.student_mixture:StudentMixture'
        >>> from_plain(to_plain(mixture)).df
        tensor([5.])
    """
    for word, each in (known or {}).items():
        if value is each:
            return {KNOWN: word}
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):  # numpy's float64 is one
        return float(value) if isinstance(value, float) else int(value)
    if type(value) in (list, tuple, torch.Size):
        kind = tuple if isinstance(value, tuple) else list
        return kind(to_plain(each, known, f"{name}[{i}]") for i, each in enumerate(value))
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("~") for key in value):
        return {key: to_plain(each, known, f"{name}[{key!r}]") for key, each in value.items()}
    if not _is_ours(type(value)):
        raise ValueError(
            f"{name} must be tensors, plain values and objects of this package to be saved, got a "
            f"{type(value).__name__}. Leave it out, or keep the run in this process."
        )
    state = {key: to_plain(each, known, f"{name}.{key}") for key, each in _attributes(value).items()}
    return {CLASS: f"{type(value).__module__}:{type(value).__qualname__}", STATE: state}


def from_plain(saved: Any, known: Mapping[str, Any] | None = None) -> Any:
    """The nest that `to_plain` took apart.

    Args:
        saved: As a file gives it.
        known: The objects that were named.

    Raises:
        ValueError: It asks for a class that this package does not have, or for an object that is not there.
    """
    if type(saved) in (list, tuple):
        return type(saved)(from_plain(each, known) for each in saved)
    if not isinstance(saved, dict):
        return saved
    if KNOWN in saved:
        if saved[KNOWN] not in (known or {}):
            raise ValueError(f"the file asks for {saved[KNOWN]!r}, which is not at hand: it was altered.")
        return (known or {})[saved[KNOWN]]
    if CLASS not in saved:
        return {key: from_plain(each, known) for key, each in saved.items()}
    kind, state = _named(saved[CLASS]), {key: from_plain(each, known) for key, each in saved[STATE].items()}
    if issubclass(kind, tuple):
        return kind(**state)
    made = object.__new__(kind)
    vars(made).update(state)
    return made


def _is_ours(kind: type) -> bool:
    """Whether a class is one of this package that its attributes make."""
    return kind.__module__.startswith("pyro_sb.") and not issubclass(kind, nn.Module | list | dict | Exception)


def _attributes(value: Any) -> dict[str, Any]:
    """A named tuple's fields, or an object's attributes but for those that are computed when they are asked for."""
    if isinstance(value, tuple):
        return value._asdict()  # type: ignore[attr-defined]
    kept = vars(value).items()
    return {key: each for key, each in kept if not isinstance(getattr(type(value), key, None), cached_property)}


def _named(name: Any) -> type:
    """The class of this name, of a module that is loaded."""
    module, _, path = str(name).partition(":")
    found: Any = sys.modules.get(module) if module.startswith("pyro_sb.") else None
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or found.__module__ != module or not _is_ours(found):
        raise ValueError(f"the file asks for {name}, which is no class of this version that a file may hold.")
    return found
