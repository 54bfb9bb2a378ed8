"""What every picture needs: axes, and numbers for them."""

from typing import Any

import numpy as np
import torch

__all__ = ["OURS", "SOURCE", "TARGET", "WARN", "array", "one_axes", "row_of_axes"]

TARGET, OURS, SOURCE, WARN = "0.35", "C0", "C1", "C3"


def one_axes(ax: Any) -> Any:
    """The axes given, or new ones."""
    if ax is not None:
        return ax
    return pyplot().subplots(layout="constrained")[1]


def row_of_axes(axes: Any, num: int, *, height: float = 2.8, width: float = 3.4) -> np.ndarray:
    """An array of as many axes as asked for."""
    if axes is None:
        return np.atleast_1d(pyplot().subplots(1, num, figsize=(width * num, height), layout="constrained")[1])
    axes = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(axes) < num:
        raise ValueError(
            f"axes must hold at least {num}, one a picture, got {len(axes)}. Write plt.subplots(1, {num})."
        )
    return axes


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
