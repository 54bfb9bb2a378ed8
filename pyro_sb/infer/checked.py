"""The fastest of several routes to a batched density that agrees with the single chain's, at every batch size."""

import logging
import warnings
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sb.infer.agreement import Oracle, value_and_grad

__all__ = ["CheckedDensity"]

logger = logging.getLogger(__name__)

Route = Any  # an object with a `name` that maps (C, dim) to (C,)


class CheckedDensity:
    r"""A batched density that may change its route, never its values.

    The first of ``routes`` that agrees with the oracle at several batch sizes is used. A plate of chains can still go
    wrong in silence where the number of chains equals another size of the model, so each new batch size is checked on
    one row.

    Args:
        routes: Fastest first; a loop, which is taken to be right, last.
        oracle: The single chain's density at a few points; None to trust the first route.
    """

    def __init__(self, routes: list[Route], oracle: Oracle | None) -> None:
        self.routes = routes
        self.oracle = oracle
        self.objections: list[str] = []
        self.sizes_checked: set[int] = set()
        self._settle()

    @property
    def route(self) -> str:
        """Name of the route in use."""
        return self.routes[0].name

    def __call__(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and, if asked, gradients ``(C, dim)``, as the route in use gives them, NaN included."""
        if not len(z):
            return z.new_zeros(0), torch.zeros_like(z)
        value, grad = self._attempt(z, gradient)
        if self.route != "plate" or len(z) in self.sizes_checked:
            return value, grad
        if self._confirmed(z, value):
            self.sizes_checked.add(len(z))
            return value, grad
        self._demote(f"wrong values for {len(z)} chains")
        return self(z, gradient)

    def _attempt(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """One call of the route; a row whose matrix cannot be factored gets NaN and does not spoil its neighbours."""
        try:
            with pyro.validation_enabled(False):
                if gradient:
                    return value_and_grad(self.routes[0], z)
                with torch.no_grad():
                    return self.routes[0](z), torch.empty_like(z)
        except torch.linalg.LinAlgError:
            if len(z) == 1:
                return z.new_full((1,), torch.nan), torch.zeros_like(z)
            halves = [self._attempt(half, gradient) for half in z.tensor_split(2)]
            return torch.cat([value for value, _ in halves]), torch.cat([grad for _, grad in halves])

    def _confirmed(self, z: Tensor, value: Tensor) -> bool:
        """Whether the single chain agrees: a batch size that equals a data size can broadcast in silence."""
        if self.oracle is None:
            return True
        if len(z) > 1 and bool((z == z[0]).all()):  # equal rows hide mixed-up chains, so spread them
            z = z + torch.linspace(-0.05, 0.05, len(z), dtype=z.dtype, device=z.device)[:, None]
            value, _ = self._attempt(z, gradient=False)
        with pyro.validation_enabled(False):
            return self.oracle.confirms(z, value)

    def _demote(self, objection: str) -> None:
        """Drop the route in use for the next one that agrees with the single chain; the loop always does."""
        self.objections.append(f"{self.routes.pop(0).name}: {objection}")
        self._settle()

    def _settle(self) -> None:
        """Make the first route that agrees with the oracle the one in use, and warn if only the loop is left."""
        while self.route != "loop" and self.oracle is not None:
            with pyro.validation_enabled(False):
                objection = self.oracle.objection(self.routes[0])
            if objection is None:
                logger.info("log joint by route %r (%s)", self.route, "; ".join(self.objections) or "first choice")
                return
            self.objections.append(f"{self.routes.pop(0).name}: {objection}")
        if self.route == "loop":
            warnings.warn(
                "Chains are evaluated one by one, which is slow: no batched route agrees with the single chain "
                f"({'; '.join(self.objections)}). Write the model so that batches of chains can pass: dim=-1 in sums, "
                "Vindex for indices, torch.where for Python's if, no .item().",
                RuntimeWarning,
                stacklevel=4,
            )
