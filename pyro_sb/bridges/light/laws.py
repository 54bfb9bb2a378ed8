"""The law of the ends of bridges from given points, as a Pyro distribution; and rows taken some at a time."""

from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_sb.bridges.units import Units
from pyro_sb.distributions import Draws
from pyro_sb.ops.factor_mixture import FactorMixture
from pyro_sb.ops.log_quadratic import log_sum_exp


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


# Closed-form conditioning of Gaussian mixtures on some of their coordinates


def condition_mixture(
    log_weights: Tensor, locs: Tensor, covariances: Tensor, axes: list[int], observed: Tensor
) -> TorchDistributionMixin:
    r"""The law of the other coordinates of a Gaussian mixture given some.

    .. math:: p(b | a) = \sum_j \frac{w_j N(a; m_j^a, C_j^{aa})}{\sum_k w_k N(a; m_k^a, C_k^{aa})}\,
        N\big(b;\; m_j^b + C_j^{ba} (C_j^{aa})^{-1} (a - m_j^a),\; C_j^{bb} - C_j^{ba} (C_j^{aa})^{-1} C_j^{ab}\big)

    Args:
        log_weights: Logarithms of the weights, up to a constant. Shape ``(J,)``.
        locs: Means. Shape ``(J, d)``.
        covariances: Diagonals ``(J, d)`` or matrices ``(J, d, d)``.
        axes: The coordinates that are known, at least one and not all.
        observed: Their values. Shape ``(*batch, len(axes))``.

    Returns:
        A Pyro mixture over the other coordinates, in their order, with ``batch_shape == batch``.

    Example:
        >>> covariance = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> law = condition_mixture(torch.zeros(1), torch.zeros(1, 2), covariance, [0], torch.ones(3, 1))
        >>> law.mean.flatten(), law.variance.flatten()
        (tensor([0.5000, 0.5000, 0.5000]), tensor([0.7500, 0.7500, 0.7500]))
    """
    rest = [i for i in range(locs.shape[-1]) if i not in axes]
    gap = observed[..., None, :] - locs[:, axes]
    if covariances.dim() == locs.dim():
        known = Independent(Normal(locs[:, axes], covariances[:, axes].sqrt()), 1)
        log_gates = log_weights + known.log_prob(observed[..., None, :])
        means = locs[:, rest].expand(*gap.shape[:-1], len(rest))
        components = Independent(Normal(means, covariances[:, rest].sqrt().expand_as(means)), 1)
    else:
        block = covariances[:, axes][:, :, axes]
        cross = covariances[:, rest][:, :, axes]
        gain = torch.linalg.solve(block, cross.mT).mT
        log_gates = log_weights + MultivariateNormal(locs[:, axes], block).log_prob(observed[..., None, :])
        means = locs[:, rest] + (gain @ gap[..., None])[..., 0]
        schur = covariances[:, rest][:, :, rest] - gain @ cross.mT
        schur = 0.5 * (schur + schur.mT)
        components = MultivariateNormal(means, schur.expand(*means.shape, len(rest)))
    gates = log_gates - log_sum_exp(log_gates)[..., None]
    return MixtureSameFamily(Categorical(logits=gates), components)


# A conditional mixture at fixed contexts: its network is asked once, for any number of draws and densities


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
