"""The law of the ends of bridges from given points, as a Pyro distribution; and rows taken some at a time."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_sb.distributions import Draws

MOST = 2**22  # numbers in an array of rows, components and axes


class Planner(Protocol):
    """What a `Plan` asks of a bridge."""

    dim: int
    context_dim: int

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws."""
        ...

    def plan_log_prob_rows(self, x: Tensor, x0: Tensor, context: Tensor | None) -> Tensor:
        """Log density of the plan."""
        ...


class Plan:
    """The plan of a bridge as a `Law`, whose context is the source point with the bridge's own context."""

    density: str | None = "marginal"
    has_rsample = False

    def __init__(self, bridge: Planner) -> None:
        self.bridge, self.dim = bridge, bridge.dim

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """One draw of the plan a row."""
        x0, rows = self._split(context)
        return self.bridge.transport(x0, rows)

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws with their log density."""
        value = self.sample_rows(num, context)
        return Draws(value, self.log_prob_rows(value, context))

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Exact log density."""
        x0, rows = self._split(context)
        return self.bridge.plan_log_prob_rows(x, x0, rows)

    def _split(self, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert context is not None
        x0, rows = context[:, : self.dim], context[:, self.dim :]
        return x0, rows if self.bridge.context_dim else None


def chunked(function: Callable[..., Any], *rows: Tensor | None, width: int) -> Any:
    """A function of rows, evaluated some at a time, such that ``width`` numbers a row stay within memory."""
    num, size = next(len(r) for r in rows if r is not None), max(1, MOST // width)
    if num <= size:
        return function(*rows)
    parts = [function(*(None if r is None else r[i : i + size] for r in rows)) for i in range(0, num, size)]
    return torch.cat(parts)
