"""A conditional mixture at fixed contexts: its network is asked once, for any number of draws and densities."""

from typing import NamedTuple

from torch import Tensor

from pyro_sb.bridges.mixture_checks import Units
from pyro_sb.ops.factor_mixture import FactorMixture


class FixedMixture(NamedTuple):
    r"""The law of a bridge's draws at B contexts.

    Args:
        law: In the bridge's units, a row a context.
        units: Those of the target.
    """

    law: FactorMixture
    units: Units

    def sample(self, num: int) -> Tensor:
        """Draws ``(num, B, d)``."""
        return self.units.back(self.law.sample(num))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of points, differentiable in them. ``(*, B, d)`` to ``(*, B)``."""
        return self.law.log_prob(self.units.to(x)) - x.shape[-1] * self.units.scale.log()
