"""What a model can look at besides its latents: whether it is still what it was."""

import functools
import types
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_PARAM_STORE
from torch import Tensor

from pyro_sb.fingerprint import OURS, names_of

__all__ = ["MOST_THINGS", "Sight"]

MOST_THINGS = 4_000  # that are watched: to look at so many takes some .1 ms
CODE = types.FunctionType | type | property | classmethod | staticmethod
CACHES = ("_inv", "_cached_x_y")  # of torch's transforms, made at every use
ATOMS = (type(None), bool, int, float, complex, str, bytes)
ATOMS += (torch.dtype, torch.device, types.ModuleType, torch.Generator)  # type: ignore[assignment]


class Sight:
    """The values that some objects lead to: closures, globals that a function names, attributes, entries of containers.

    A value is known by its identity: a tensor or an array that was written into is the same. Parameters in Pyro's store
    always belong to it.

    Attributes:
        things: Values that are watched.

    Example:
        >>> args = ([1.0, 2.0], "a name")
        >>> sight = Sight(args)
        >>> sight.same
        True
        >>> args[0][1] = 3.0
        >>> sight.same
        False
    """

    def __init__(self, *roots: Any) -> None:
        self._dicts: list[tuple[dict[Any, Any], list[Any]]] = []  # with the keys that are looked at
        self._wholes: list[tuple[Any, int]] = []  # whose number of entries is
        self._lists: list[list[Any]] = []
        self._cells: list[types.CellType] = []
        self._met = set[int]()
        self._kept: list[Any] = []
        queue = [_PYRO_PARAM_STORE, *roots]
        while queue and len(self._kept) <= MOST_THINGS:
            value = queue.pop()
            if not isinstance(value, ATOMS) and id(value) not in self._met:
                self._met.add(id(value))
                self._kept.append(value)  # so that no identity is given twice
                queue += self._led_to(value)
        self.things = list(self._now()) if not queue else []
        self.complete = not queue and len(self.things) <= MOST_THINGS

    @property
    def same(self) -> bool:
        """Whether every place holds what it held, and all could be watched."""
        if not self.complete or any(len(whole) != num for whole, num in self._wholes):
            return False
        return all(map(is_, self.things, self._now()))

    def _now(self) -> Iterator[Any]:
        for entries, keys in self._dicts:
            yield from map(entries.get, keys)
        for entry in self._lists:
            yield from entry
        for cell in self._cells:
            yield contents(cell)

    def _led_to(self, value: Any) -> list[Any]:
        """Values that one leads to; the places where they lie are watched."""
        if isinstance(value, Tensor) or type(value).__module__.split(".")[0] == "numpy":
            return []
        if isinstance(value, dict):
            return self._entries(value, list(value), whole=True)
        if isinstance(value, list):
            self._lists.append(value)
            self._wholes.append((value, len(value)))
            return list(value)
        if isinstance(value, tuple | set | frozenset):
            if isinstance(value, set):
                self._wholes.append((value, len(value)))
            return list(value)
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, type):
            members = [] if f"{value.__module__}.".startswith(OURS) else [*vars(value).values(), *value.__bases__]
            return [
                x for x in members if isinstance(x, types.FunctionType | type | property | classmethod | staticmethod)
            ]
        if isinstance(value, property):
            return [value.fget]
        if isinstance(value, classmethod | staticmethod):
            return [value.__func__]
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return [type(value)]
        keys = [key for key in attributes if key not in CACHES]
        return [*self._entries(attributes, keys, whole=True), type(value)]

    def _entries(self, entries: dict[Any, Any], keys: list[Any], whole: bool) -> list[Any]:
        self._dicts.append((entries, keys))
        if whole:
            self._wholes.append((entries, len(entries)))
        return [entries[key] for key in keys]

    def _of_function(self, value: types.FunctionType) -> list[Any]:
        cells = list(value.__closure__ or ())
        self._cells += cells
        if f"{value.__module__}.".startswith(OURS):  # a decorator of a library: what it wraps
            return list(map(contents, cells))
        names, scope = names_of(value.__code__), value.__globals__
        seen = self._entries(scope, sorted(names & scope.keys()), whole=False)
        modules = [x for x in seen if isinstance(x, types.ModuleType) and not f"{x.__name__}.".startswith(OURS)]
        for module in modules:  # of the user: what is named in them
            seen = seen + self._entries(vars(module), sorted(names & vars(module).keys()), whole=False)
        return [*seen, *map(contents, cells), value.__defaults__, value.__kwdefaults__, vars(value)]


def contents(cell: types.CellType) -> Any:
    """What a closure holds; the cell itself where it is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell
