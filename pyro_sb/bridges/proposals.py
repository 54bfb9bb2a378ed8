"""Laws that chains propose from: a bridge with its shared random numbers held, or carried through a bijection."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_sb.distributions import Draws, PathLaw


class SourceBridge(Protocol):
    """A bridge that `HeldSources` can hold the sources of."""

    dim: int

    def transport(self, x0: Tensor) -> Tensor:
        """Source points to draws."""
        ...

    def log_prob_from(self, x: Tensor, x0: Tensor) -> Tensor:
        """Log of the plan's density averaged over source points."""
        ...


class HeldSources:
    r"""A bridge from M fixed source points: a finite mixture of plans, with an exact marginal density.

    .. math:: q(x) = \tfrac1M \sum_i \pi(x | x_0^{(i)})

    The M points are draws of the source, so this is what the path weight of a light bridge conditions on: the path is
    redrawn by drawing new points.

    Args:
        bridge: Without context.
        points: The source points. Shape ``(M, dim)``.
    """

    def __init__(self, bridge: SourceBridge, points: Tensor) -> None:
        self.bridge, self.points, self.dim = bridge, points, bridge.dim

    def draws_rows(self, num: int, context: Tensor | None = None) -> Draws:
        """Ends of bridges from points chosen with replacement, with their log density."""
        index = torch.randint(len(self.points), (num,), device=self.points.device)
        value = self.bridge.transport(self.points[index])
        return Draws(value, self.bridge.log_prob_from(value, self.points))

    def redraw_rows(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of points ``(num, dim)``. Shape ``(num,)``."""
        return self.bridge.log_prob_from(x, self.points)


class MappedLaw:
    """A law carried through a bijection of the space, with the log determinant taken off its density.

    Args:
        law: In the inner coordinates.
        transform: From them to the outer ones, with ``log_abs_det_jacobian`` of shape ``(num,)``.
    """

    def __init__(self, law: PathLaw, transform: Transform) -> None:
        self.law, self.transform, self.dim = law, transform, law.dim

    def draws_rows(self, num: int, context: Tensor | None = None) -> Draws:
        """Draws of the inner law, mapped, with their log density."""
        z, log_q = self.law.draws_rows(num, context)
        x = self.transform(z)
        return Draws(x, log_q - self.transform.log_abs_det_jacobian(z, x))

    def redraw_rows(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The inner law's at the inverse of points, less the log determinant."""
        z = self.transform.inv(x)
        return self.law.redraw_rows(z, context) - self.transform.log_abs_det_jacobian(z, x)


def held_sources(law: Any) -> HeldSources | None:
    """The law inside others that holds source points; None where there is none."""
    while isinstance(law, MappedLaw):
        law = law.law
    return law if isinstance(law, HeldSources) else None
