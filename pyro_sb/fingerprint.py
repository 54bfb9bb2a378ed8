r"""Fingerprints: short texts that differ where models, arguments or data do, so that nothing resumes another's work.

A function is known by its source (its byte code where there is none), its defaults, and the values that it closes over
and finds in its module; an object by its class and attributes; a tensor by its numbers, shape and dtype.
"""

import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["OURS", "differences", "fingerprint", "named", "names_of"]

OURS = ("torch.", "pyro.", "numpy.", "pyro_sb.", "builtins.", "math.")  # whose code a version tells, not its source


def __dir__() -> list[str]:
    return sorted(__all__)


def fingerprint(*values: Any) -> str:
    """Sixteen hexadecimal digits of the values.

    Example:
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2)), fingerprint(1) == fingerprint(1.0)
        (True, False)
    """
    return _Walk().of(values).hexdigest()[:16]


def named(model: Any) -> str:
    """A model's name with its fingerprint, for messages."""
    inner = getattr(model, "func", model)
    return f"{getattr(inner, '__name__', type(inner).__name__)} ({fingerprint(model)})"


def differences(saved: Any, present: dict[str, str]) -> str:
    """The entries that differ between a file and what it is wanted for, both named; empty where none does.

    Example:
        >>> differences({"model": "a", "size": "3"}, {"model": "b", "size": "3"})
        'model is a there and b here'
    """
    if not isinstance(saved, dict):
        return "it names nothing that it was made from"
    gone = [
        f"{name} is {saved.get(name, 'not named')} there and {value} here"
        for name, value in present.items()
        if saved.get(name) != value
    ]
    gone += [f"{name} is {saved[name]} there and not named here" for name in saved.keys() - present.keys()]
    return "; ".join(gone[:4])


class _Walk:
    """One walk over a nest of values; what was met before counts by the order in which it was met."""

    def __init__(self) -> None:
        self.sum, self.met = hashlib.sha256(), dict[int, int]()
        self.kept: list[Any] = []  # so that no id is given twice

    def of(self, value: Any) -> Any:
        """The hash with a value taken in."""
        self.take(value)
        return self.sum

    def note(self, *words: Any) -> None:
        """Take words in."""
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode()
            self.sum.update(str(len(data)).encode() + b":" + data)

    def take(self, value: Any) -> None:
        """Take any value in."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            return self.note(type(value).__name__, repr(value))
        if id(value) in self.met:
            return self.note("met", self.met[id(value)])
        self.met[id(value)] = len(self.met)
        self.kept.append(value)
        if isinstance(value, Tensor | np.ndarray):
            return self.numbers(value)
        if isinstance(value, Mapping):
            return self.pairs("mapping", value)
        if isinstance(value, list | tuple | torch.Size):
            self.note(type(value).__name__, len(value))
            return self.each(value)
        if isinstance(value, set | frozenset):
            return self.note("set", *sorted(_Walk().of(each).hexdigest() for each in value))
        if isinstance(value, types.ModuleType | torch.dtype | torch.device | torch.Generator):
            return self.note(type(value).__name__, "" if isinstance(value, torch.Generator) else value)
        return self.code(value)

    def each(self, values: Any) -> None:
        """Take values in, one after the other."""
        for value in values:
            self.take(value)

    def pairs(self, kind: str, value: Mapping[Any, Any]) -> None:
        """Take names and values in, whatever their order."""
        self.note(kind, len(value))
        for key in sorted(value, key=repr):
            self.note(repr(key))
            self.take(value[key])

    def numbers(self, value: Tensor | np.ndarray) -> None:
        """Take a tensor or an array in."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.to_dense() if value.layout != torch.strided else value
            self.note("tensor", value.dtype, tuple(value.shape))
            array = value.float() if value.dtype == torch.bfloat16 else value.resolve_conj().resolve_neg()
            self.note(array.contiguous().numpy().tobytes())
        elif value.dtype.kind == "O":
            self.each(value.tolist())
        else:
            self.note("array", value.dtype, value.shape, np.ascontiguousarray(value).tobytes())

    def code(self, value: Any) -> None:
        """Take a function, a class or an object in."""
        if isinstance(value, functools.partial):
            self.note("partial")
            return self.each((value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            self.note("method")
            return self.each((value.__func__, value.__self__))
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, types.BuiltinFunctionType | type):
            self.note("name", value.__module__, value.__qualname__)
            return self.source(value) if isinstance(value, type) else None
        self.note("object", type(value).__module__, type(value).__qualname__)
        self.source(type(value))
        if hasattr(value, "to_numpy"):  # frames and series
            return self.numbers(np.asarray(value.to_numpy()))
        if isinstance(value, nn.Module):
            self.pairs("state", value.state_dict())
            self.pairs("modules", dict(value.named_children()))
        attributes = getattr(value, "__dict__", {})
        self.pairs("attributes", {k: v for k, v in attributes.items() if not (k.startswith("_") and _is_cache(k, v))})

    def function(self, value: types.FunctionType) -> None:
        """Take a function in: its source, and the values that it looks at."""
        self.note("function", value.__qualname__)
        self.source(value)
        self.each((value.__defaults__, value.__kwdefaults__))
        self.each([cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)])
        if f"{value.__module__}.".startswith(OURS):
            return
        names = names_of(value.__code__)
        self.pairs("globals", {n: value.__globals__[n] for n in names & value.__globals__.keys()})

    def source(self, value: Any) -> None:
        """Take the source of a function or a class in; its byte code where there is none."""
        if f"{getattr(value, '__module__', '')}.".startswith(OURS):
            return
        if getattr(value, "__name__", "") == "<lambda>":  # there may be two in a line
            self.bytecode(value.__code__)
        try:
            self.note("source", inspect.getsource(value))
        except (OSError, TypeError):
            self.bytecode(getattr(value, "__code__", None))
            for name, member in sorted(vars(value).items()) if isinstance(value, type) else ():
                self.note(name)
                self.bytecode(getattr(member, "__code__", None))

    def bytecode(self, code: types.CodeType | None) -> None:
        """Take byte code in, that of inner functions too."""
        if code is None:
            return
        self.note("code", code.co_code, code.co_names)
        for constant in code.co_consts:
            self.bytecode(constant) if isinstance(constant, types.CodeType) else self.take(constant)


def names_of(code: types.CodeType) -> set[str]:
    """Names that a function and those inside it look up in the module."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(names_of, inner))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that is not bound yet
        return False


def _is_cache(name: str, value: Any) -> bool:
    """Whether a private attribute is a module's bookkeeping, or holds what is in its state already."""
    return name in ("_parameters", "_buffers", "_modules", "_backward_hooks", "_forward_hooks") or "cache" in name
