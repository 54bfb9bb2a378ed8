"""Rows taken some at a time, within bounded memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST = 2**22  # numbers in an array of rows, components and axes


def chunked(function: Callable[..., Any], *rows: Tensor | None, width: int) -> Any:
    """A function of rows, evaluated some at a time, such that ``width`` numbers a row stay within memory."""
    num, size = next(len(r) for r in rows if r is not None), max(1, MOST // width)
    if num <= size:
        return function(*rows)
    parts = [function(*(None if r is None else r[i : i + size] for r in rows)) for i in range(0, num, size)]
    return torch.cat(parts)
