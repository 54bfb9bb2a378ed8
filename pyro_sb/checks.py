r"""The one gate for what users hand over: a number, a count, a choice, a tensor, points, draws, weights, a shape.

Each reader returns the argument in the form that the code works with, or refuses it: the message names the argument,
says what must hold, what came, and what to write instead. A value of another kind is a `TypeError`, one out of range
a `ValueError`. Tensors come from anything that holds numbers: tensors, nested lists of numbers or tensors, arrays of
any stride and byte order, frames and series.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat

import numpy as np
import torch
from pyro.distributions import is_validation_enabled
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_sb.warn import warn

__all__ = [
    "answered",
    "as_draws",
    "as_weights",
    "broadcast",
    "check_choice",
    "check_memory",
    "finite",
    "flag",
    "floats",
    "generator_of",
    "number",
    "one_time",
    "points",
    "sample_size",
    "whole",
    "widths",
]

MOST_COUNT = 2**53  # above it floats skip whole numbers
WORDS = {
    "(0, inf)": "be positive and finite",
    "(0, inf]": "be positive",
    "[0, inf)": "be at least 0 and finite",
    "(1, inf]": "be above 1",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def number(name: str, value: Any, interval: str = "(-inf, inf)", cure: str = "") -> float:
    """A number in an interval, as a float.

    Args:
        name: What it is, for messages.
        value: A number of Python, of numpy, or a tensor that holds one.
        interval: Such as ``"[0, 1)"``.
        cure: What to write instead.

    Example:
        >>> number("ema", 2, "[0, 1)", "Write None for no average.")
        Traceback (most recent call last):
        ValueError: ema must lie in [0, 1), got 2. Write None for no average.
    """
    must = WORDS.get(interval, f"lie in {interval}" if interval != "(-inf, inf)" else "be finite")
    if not _is_number(value):
        raise TypeError(_refusal(name, f"{must}, a number", shown(value), cure))
    low, high = (float(end) for end in interval[1:-1].split(","))
    read = float(value)
    above = read >= low if interval[0] == "[" else read > low
    if not (above and (read <= high if interval[-1] == "]" else read < high)):
        raise ValueError(_refusal(name, must, shown(value), cure))
    return read


def whole(
    name: str, value: Any, least: int = 1, most: int | None = None, cure: str = "Omit it for the default."
) -> int:
    """A whole number of at least ``least``, as an int: ``1e4`` is one, infinity and 2.5 are none.

    Example:
        >>> whole("num_steps", float("inf"))
        Traceback (most recent call last):
        ValueError: num_steps must be at least 1, a whole number, got inf. Omit it for the default.
    """
    must = f"be at least {least}" if most is None else f"be from {least} to {most}"
    if not _is_number(value):
        raise TypeError(_refusal(name, f"{must}, a whole number", shown(value), cure))
    read = float(value)
    if not math.isfinite(read) or read != math.floor(read) or read > MOST_COUNT:
        raise ValueError(_refusal(name, f"{must}, a whole number", shown(value), cure))
    if read < least or (most is not None and read > most):
        raise ValueError(_refusal(name, must, shown(value), cure))
    return int(value)


def one_time(t: Any) -> float:
    """One time of a bridge, from 0 at the source to 1 at the target."""
    if isinstance(t, Tensor | np.ndarray) and t.ndim:
        raise ValueError(f"t must be one time in [0, 1], got shape {tuple(t.shape)}. Write a loop, or t[i].")
    return number("t", t, "[0, 1]", "Time runs from source to target: write 0.5.")


def flag(name: str, value: Any) -> bool:
    """True or False; of a number or a text nobody knows which is meant."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of the names; refused where it is none."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {shown(value)}.")
    return value


def widths(name: str, value: Any) -> tuple[int, ...]:
    """Widths of a network's layers, at least one."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray | Tensor):
        raise TypeError(f"{name} must name the widths of layers, got {shown(value)}. Write {name}=(64, 64).")
    read = tuple(whole(f"each width of {name}", width, cure=f"Write {name}=(64, 64).") for width in value)
    if not read:
        raise ValueError(f"{name} must name at least one layer, got (). Write {name}=(64, 64), or omit it.")
    return read


def check_memory(name: str, value: int, numbers: float, cure: str) -> None:
    """Refuse a size whose arrays nobody has the memory for.

    Args:
        name: Of the argument.
        value: The argument.
        numbers: How many numbers it would take, at 4 bytes each.
        cure: What to write instead.
    """
    size = 4 * numbers / 2**30
    if size > min(32, 0.5 * _memory()):
        raise ValueError(f"{name} must fit in memory, got {value}, which would take {size:.3g} GiB. {cure}")


def sample_size(shape: Any, name: str = "sample_shape") -> Size:
    """A shape of draws: a tuple of whole numbers that are not negative."""
    if isinstance(shape, Tensor):
        shape = shape.tolist()
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        cure = f" Write ({shape},)." if _is_number(shape) else " Write (1000,)."
        raise TypeError(f"{name} must be a tuple of whole numbers, got {shown(shape)}.{cure}")
    return Size([whole(f"each size in {name}", size, 0, cure="Write (1000,).") for size in shape])


def broadcast(names: str, *shapes: Size) -> Size:
    """The shape that shapes broadcast to; an error with their names where they do not."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"{names} must have batch shapes that broadcast, got {', '.join(str(tuple(shape)) for shape in shapes)}. "
            "Write x[:, None] for every point at every context."
        ) from None


def generator_of(generator: Any) -> torch.Generator | None:
    """A generator of torch's, or None for its global one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {shown(generator)}. Write torch.Generator().manual_seed(0)."
        )
    return generator


def floats(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """A floating tensor of anything that holds real numbers; NaN and infinity pass.

    Args:
        name: What it is, for messages.
        value: Tensor, array, frame, series, number, or a nest of lists of these.
        like: A tensor whose dtype and device are taken. Omitted: the value's own; numbers of Python and whole ones take
            torch's default dtype, half precision is raised to float32 with a warning.

    Example:
        >>> floats("x", np.arange(3)[::-1])
        tensor([2., 1., 0.])
    """
    read = _tensor(name, value)
    if read.is_complex():
        raise ValueError(f"{name} must be real, got {read.dtype}. Write {name}.real, or put both parts in columns.")
    if read.layout != torch.strided:
        read = read.to_dense()
    if like is not None:
        return read.to(like)
    if not read.is_floating_point():
        return read.to(torch.get_default_dtype())
    if read.dtype not in (torch.float32, torch.float64):
        warn(f"{name} is {str(read.dtype).removeprefix('torch.')}, too short for a fit: it is raised to float32.")
        return read.float()
    return read


def finite(name: str, value: Tensor, cure: str = "Remove or impute them.", *, in_chains: bool = False) -> Tensor:
    """The tensor, if it holds no NaN and no infinity.

    Args:
        name: What it is, for messages.
        value: The tensor.
        cure: What to write instead.
        in_chains: Whether models evaluate it, at states of trajectories that may diverge: it is then checked as Pyro
            checks values, while validation is on, and never inside `torch.func.vmap`.
    """
    if in_chains and not is_validation_enabled():
        return value
    try:
        fine = bool(torch.isfinite(value).all())
    except RuntimeError:  # inside torch.func.vmap no branch may look at values
        fine = in_chains
    if not fine:
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} of {value.numel()} numbers. {cure}")
    return value


def answered(name: str, value: Tensor) -> Tensor:
    """What a bridge answers, if it holds no NaN; in chains, where Pyro's validation is off, nothing is looked at."""
    try:
        strange = is_validation_enabled() and bool(torch.isnan(value).any())
    except RuntimeError:  # inside torch.func.vmap no branch may look at values
        strange = False
    if strange:
        raise RuntimeError(
            f"{name} must be numbers, got NaN in {int(torch.isnan(value).sum())} of {value.numel()}: points or context "
            f"lie too far from those of the fit for {value.dtype}. Check them, or fit in float64."
        )
    return value


def points(name: str, x: Any, dim: int, like: Tensor) -> Tensor:
    """Finite points ``(*, dim)`` in the dtype and on the device of a tensor, with their gradients."""
    read = floats(name, x, like)
    if read.dim() == 0 or read.shape[-1] != dim:
        raise ValueError(
            f"{name} must have shape (*, {dim}), got {tuple(read.shape)}. Put coordinates in the last axis."
        )
    return finite(name, read, in_chains=True)


def as_draws(name: str, value: Any, dim: int, *, num_draws: int = 1024, like: Tensor | None = None) -> Tensor:
    """Draws as a finite tensor ``(N, dim)``, from whatever holds numbers or from a distribution.

    Args:
        name: What it is, for messages.
        value: Array or tensor of shape ``(N, dim)``, a frame, or a distribution whose event has this size. A series is
            a column.
        dim: Expected number of columns.
        num_draws: How many draws a distribution gives.
        like: A tensor whose dtype and device are taken. Omitted: the value's own (integers become the default dtype).

    Example:
        >>> as_draws("target", [[0, 1], [2, 3]], 2)
        tensor([[0., 1.],
                [2., 3.]])
    """
    draws = floats(name, value.sample((num_draws,)) if isinstance(value, Distribution) else value, like)
    if dim == 1 and draws.dim() == 1 and _is_frame(value):
        draws = draws[:, None]
    if draws.dim() != 2 or draws.shape[1] != dim:
        cure = (
            f" Write {name}[:, None]." if draws.dim() == 1 and dim == 1 else " Put draws in rows; dim is the bridge's."
        )
        raise ValueError(f"{name} must have shape (draws, {dim}), got {tuple(draws.shape)}.{cure}")
    if len(draws) < 2:
        raise ValueError(f"{name} must hold at least 2 draws, got {len(draws)}. Pass a sample of the law.")
    bad = int((~torch.isfinite(draws)).any(1).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in {bad} of {len(draws)} draws. Remove those rows."
        )
    return draws.detach()


def as_weights(weights: Any, like: Tensor) -> Tensor:
    """Normalised weights of the rows of ``like``; refused where negative, not finite, or all on one draw."""
    if weights is None:
        return like.new_full((len(like),), 1 / len(like))
    weights = floats("weights", weights, like).detach()
    if weights.shape != like.shape[:1]:
        raise ValueError(
            f"weights must have shape ({len(like)},), one a draw, got {tuple(weights.shape)}. Omit them for equal ones."
        )
    negative, strange = int((weights < 0).sum()), int((~torch.isfinite(weights)).sum())
    if negative or strange:
        raise ValueError(
            f"weights must be finite and non-negative, got {negative} negative and {strange} NaN or infinite of "
            f"{len(weights)}. Pass weights, not log weights: (log_w - log_w.max()).exp()."
        )
    if not bool((weights > 0).any()):
        raise ValueError(
            f"weights must not all be zero, got {len(weights)} zeros. "
            "Pass (log_w - log_w.max()).exp() if they underflowed."
        )
    weights = weights / weights.max()
    weights = weights / weights.sum()
    effective = 1 / float(weights.square().sum())
    if effective < 1.5:
        raise ValueError(
            f"weights must count for more than one draw, got 1 / sum w^2 = {effective:.3g} of {len(weights)}. "
            "Use draws that overlap the target, or temper the weights: weights ** 0.1."
        )
    return weights


def shown(value: Any) -> str:
    """What came, short enough for a message."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def _memory() -> float:
    """Memory of this machine in GiB; 16 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return 16.0


def _refusal(name: str, must: str, came: str, cure: str) -> str:
    return f"{name} must {must}, got {came}." + (f" {cure}" if cure else "")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | np.bool_ | str | bytes | complex | np.complexfloating):
        return False
    if isinstance(value, Tensor | np.ndarray):
        kind = value.dtype.is_complex or value.dtype == torch.bool if isinstance(value, Tensor) else value.dtype.kind
        return value.ndim == 0 and kind in (False, "i", "u", "f")
    return isinstance(value, SupportsFloat)


def _is_frame(value: Any) -> bool:
    """Whether it is a frame or a series, of pandas or of a library like it."""
    return hasattr(value, "to_numpy") and not isinstance(value, Tensor | np.ndarray)


def _tensor(name: str, value: Any) -> Tensor:
    """A tensor of any numeric dtype."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _stacked(name, value)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"{name} must hold numbers alone, got a masked array with {int(np.ma.getmaskarray(value).sum())} masked "
            "entries. Leave those rows out, or fill them in."
        )
    if value is None or isinstance(value, str | bytes | dict | set | Distribution):
        raise TypeError(f"{name} must hold numbers, got {shown(value)}. Pass a tensor or an array.")
    try:
        array = np.asarray(value.to_numpy() if _is_frame(value) else value)
    except Exception as error:
        raise TypeError(f"{name} must hold numbers, got {shown(value)}: {error}. Pass a tensor or an array.") from error
    return _from_numpy(name, array, python=isinstance(value, int | float))


def _stacked(name: str, value: Sequence[Any]) -> Tensor:
    """A nest of lists: of numbers as numpy reads them, in torch's default dtype; of tensors and arrays one by one."""
    inner = value
    while isinstance(inner, Sequence) and not isinstance(inner, str) and len(inner):
        inner = inner[0]
    try:
        if not isinstance(inner, Tensor) and not hasattr(inner, "dtype"):
            return _from_numpy(name, np.asarray(value), python=True)
        return torch.stack([_tensor(name, each) for each in value])
    except (ValueError, RuntimeError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(
            f"{name} must have rows of one length, got {shown(value)}. Pass a tensor or an array."
        ) from None


def _from_numpy(name: str, array: np.ndarray, python: bool) -> Tensor:
    """An array's tensor, which owns its numbers where torch cannot share them; ``python`` numbers have no dtype."""
    kind = array.dtype.kind
    if kind not in "biufc":
        kinds = {"O": "objects", "U": "text", "S": "text", "M": "dates", "m": "time spans"}
        raise TypeError(
            f"{name} must hold numbers, got {kinds.get(kind, str(array.dtype))} (dtype {array.dtype}). "
            f"Write {name}.astype(float), without columns that are no numbers."
        )
    if kind == "u" or array.dtype.itemsize > 8 and kind == "f":
        array = array.astype(np.float64)
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    return tensor.to(torch.get_default_dtype()) if python and kind == "f" else tensor
