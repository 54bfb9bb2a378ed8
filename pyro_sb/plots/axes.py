"""Axes of pictures, and numbers for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "OURS",
    "SOURCE",
    "TARGET",
    "WARN",
    "Size",
    "array",
    "check_coords",
    "check_is",
    "one_axes",
    "row_of_axes",
    "styled",
]

TARGET, OURS, SOURCE, WARN = "0.35", "C0", "C1", "C3"


Size = tuple[float, float] | None


def one_axes(ax: Any, figsize: Size = None) -> Any:
    """The axes given, or new ones of this size in inches."""
    if ax is None:
        return pyplot().subplots(figsize=figsize, layout="constrained")[1]
    _check_no_size(figsize, "ax")
    return ax


def row_of_axes(axes: Any, num: int, *, figsize: Size = None, height: float = 2.8, width: float = 3.4) -> np.ndarray:
    """An array of as many axes as asked for."""
    if axes is None:
        size = (width * num, height) if figsize is None else figsize
        return np.atleast_1d(pyplot().subplots(1, num, figsize=size, layout="constrained")[1])
    _check_no_size(figsize, "axes")
    axes = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(axes) < num:
        raise ValueError(
            f"axes must hold at least {num}, one a picture, got {len(axes)}. Write plt.subplots(1, {num})."
        )
    return axes


def _check_no_size(figsize: Size, given: str) -> None:
    if figsize is not None:
        raise ValueError(f"figsize is a new figure's, got {given} too, which have theirs. Leave one of them out.")


def styled(kwargs: Mapping[str, Any], artist: str, **defaults: Any) -> dict[str, Any]:
    """Keyword arguments of an artist, the user's before our own whichever way they are spelt (``lw``, ``c``)."""
    pyplot()
    from matplotlib import cbook, collections, lines, patches

    kinds = {"line": lines.Line2D, "patch": patches.Patch, "points": collections.PathCollection}
    ours, theirs = (cbook.normalize_kwargs(dict(given), kinds[artist]) for given in (defaults, kwargs))
    return ours | theirs


def check_is(name: str, value: Any, kind: str, maker: str) -> None:
    """A TypeError that says where an object of the class so named comes from; pictures import no diagnostics."""
    if kind not in [base.__name__ for base in type(value).__mro__]:
        raise TypeError(f"{name} must be a {kind}, got {type(value).__name__}. Write {maker}.")


def pyplot() -> Any:
    """Matplotlib, imported when the first picture is drawn."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib. Write pip install 'pyro-sb[plot]'.") from error
    return plt


def array(value: Any) -> np.ndarray:
    """Numbers for Matplotlib."""
    return torch.as_tensor(value).detach().cpu().numpy()


def check_coords(name: str, coords: Sequence[int], dim: int) -> None:
    """Coordinates that draws of this many have."""
    coords = list(coords)
    bad = [coord for coord in coords if not isinstance(coord, (int, np.integer)) or not -dim <= coord < dim]
    if bad or not coords:
        raise ValueError(f"{name} must be coordinates from 0 to {dim - 1}, got {list(coords)}. Omit it for the first.")
