r"""Laws of a Gaussian-mixture bridge: draws, paths, densities, the plan, and a mixture given some of its axes."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_sb.bridges.base import chunked
from pyro_sb.bridges.data import Units
from pyro_sb.bridges.light.process import MixtureProcess
from pyro_sb.distributions import Draws
from pyro_sb.ops.bass import DENSE_DIM
from pyro_sb.ops.factor_mixture import FactorMixture
from pyro_sb.ops.log_quadratic import log_sum_exp


class MixtureLaws(NamedTuple):
    r"""Draws, paths and densities of a `MixtureProcess`, in the bridge's units.

    Points are rows ``(n, dim)``, contexts standardised rows ``(n, context_dim)`` or None; long arrays are taken some
    rows at a time, and no gradient goes to parameters.

    Args:
        process: The process.
    """

    process: MixtureProcess

    def residual(self, t: float, z: Tensor, context: Tensor | None) -> float:
        """Largest :math:`|X_t(Y_t(z)) - z|` relative to :math:`1 + |z|`, of the inverse in use."""
        potential, points = self.process.frozen(z, context)
        bass = self.process.bass(potential, t)
        if self.process.learned_map is None:
            return bass.inverse(points).residual
        found = self.process.learned_map(torch.tensor(t).to(z), z)
        return float(((bass.forward(found) - points).abs().amax(-1) / (1 + points.abs().amax(-1))).max())

    def move(self, z: Tensor, context: Tensor | None, t: float = 1.0) -> Tensor:
        """States at time t of processes that leave from points."""

        def move(z: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.process.frozen(z, context)
            y0 = self.process.invert(potential, 0.0, points)
            y = potential.plan_sample(y0)
            if t < 1:
                y = y0 + t * (y - y0) + math.sqrt(self.process.epsilon * t * (1 - t)) * torch.randn_like(y)
            return self.process.bass(potential, t).forward(y).reshape(z.shape)

        return chunked(move, z, context, width=self.process.width)

    def path(self, z: Tensor, context: Tensor | None, times: Tensor) -> Iterator[Tensor]:
        """States at the times after the first, along Brownian bridges Y between both ends of the plan."""
        potential, points = self.process.frozen(z, context)
        y = self.process.invert(potential, 0.0, points)
        if self.process.factored and context is not None:
            y1 = self.process.law(context).sample().reshape(y.shape)
        else:
            y1 = potential.plan_sample(y)
        for now, then in zip(times[:-1], times[1:]):
            share = (then - now) / (1 - now)  # Brownian bridge from y at `now` to y1 at 1
            spread = (self.process.epsilon * share * (1 - then)).clamp_min(0.0).sqrt()
            y = y + share * (y1 - y) + spread * torch.randn_like(y)
            yield self.process.bass(potential, then).forward(y).reshape(z.shape)

    def ends(self, context: Tensor) -> Tensor:
        """A draw of the end at each context, where `factored`."""
        return chunked(lambda context: self.process.law(context).sample(), context, width=self.process.row_width)

    def drift(self, t: float, z: Tensor, context: Tensor | None) -> Tensor:
        """Drift :math:`s(t, Y_t(z))`."""

        def drift(z: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.process.frozen(z, context)
            return potential.drift(t, self.process.invert(potential, t, points)).reshape(z.shape)

        return chunked(drift, z, context, width=self.process.width)

    def jacobian(self, t: float, z: Tensor, context: Tensor | None) -> Tensor:
        """Derivative of the Bass map at :math:`Y_t(z)`. Shape ``(n, dim, dim)``."""

        def jacobian(z: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.process.frozen(z, context)
            bass = self.process.bass(potential, t)
            return bass.jacobian(self.process.invert(potential, t, points)).reshape(*z.shape, z.shape[-1])

        return chunked(jacobian, z, context, width=self.process.row_width)

    def end_log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        """Log density of the ends, where `factored`; no gradient goes to parameters."""

        def log_prob(z: Tensor, context: Tensor) -> Tensor:
            return self.process.frozen_law(context).log_prob(z)

        return chunked(log_prob, z, context, width=self.process.row_width)

    def plan_log_prob(self, z1: Tensor, z0: Tensor, context: Tensor | None) -> Tensor:
        r"""Log density of the plan, :math:`\log \pi(y_1 | y_0) - \log\det(I + \nabla s(1, y_1) / \beta)`."""

        def log_prob(z1: Tensor, z0: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.process.frozen(z1, context)
            y0 = self.process.invert(potential, 0.0, self.process.frozen(z0, context)[1])
            y1 = self.process.invert(potential, 1.0, points)
            value = potential.plan_log_prob(y1, y0) - self.process.bass(potential, 1.0).log_det(y1)
            return value.reshape(len(z1))

        return chunked(log_prob, z1, z0, context, width=self.process.width * min(z1.shape[-1], DENSE_DIM))

    def mean_log_prob(self, z1: Tensor, z0: Tensor, context: Tensor | None) -> Tensor:
        r"""Log of the plan's density averaged over source points, :math:`\log \tfrac1M \sum_i \pi(z_1 | z_0^{(i)})`.

        Source points are ``(M, dim)`` for all rows, or with contexts also ``(n, M, dim)``.
        """
        if context is not None:
            z0 = z0.expand(len(z1), *z0.shape[-2:])

        def log_prob(z1: Tensor, context: Tensor | None, given: Tensor | None) -> Tensor:
            potential, points = self.process.frozen(z1, context)
            y0 = self.process.invert(potential, 0.0, z0 if given is None else given)
            y1 = self.process.invert(potential, 1.0, points)
            inner = y1 @ y0.mT / self.process.epsilon - potential.normaliser().value(y0)[..., None, :]
            mean = torch.logsumexp(inner, -1) - math.log(y0.shape[-2])
            value = potential.adjusted().value(y1) + mean - self.process.bass(potential, 1.0).log_det(y1)
            return value.reshape(len(z1))

        width = self.process.width if context is None else self.process.width * z0.shape[-2]
        return chunked(log_prob, z1, context, None if context is None else z0, width=width)


class Planner(Protocol):
    """Bridge as a `Plan` knows it."""

    dim: int
    context_dim: int

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws."""
        ...

    def plan_log_prob_rows(self, x: Tensor, x0: Tensor, context: Tensor | None) -> Tensor:
        """Log density of the plan."""
        ...


class Plan:
    """Plan of a bridge as a `Law`, whose context is the source point with the bridge's own context."""

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


def condition_mixture(
    log_weights: Tensor, locs: Tensor, covariances: Tensor, axes: list[int], observed: Tensor
) -> TorchDistributionMixin:
    r"""Law of the other coordinates of a Gaussian mixture given some, in closed form.

    .. math:: p(b | a) = \sum_j \frac{w_j N(a; m_j^a, C_j^{aa})}{\sum_k w_k N(a; m_k^a, C_k^{aa})}\,
        N\big(b;\; m_j^b + C_j^{ba} (C_j^{aa})^{-1} (a - m_j^a),\; C_j^{bb} - C_j^{ba} (C_j^{aa})^{-1} C_j^{ab}\big)

    Args:
        log_weights: Logarithms of the weights, up to a constant. Shape ``(J,)``.
        locs: Means. Shape ``(J, d)``.
        covariances: Diagonals ``(J, d)`` or matrices ``(J, d, d)``.
        axes: The coordinates that are known, at least one and not all; negative ones count from the end.
        observed: Their values. Shape ``(*batch, len(axes))``.

    Returns:
        A Pyro mixture over the other coordinates, in their order, with ``batch_shape == batch``.

    Example:
        >>> covariance = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> law = condition_mixture(torch.zeros(1), torch.zeros(1, 2), covariance, [0], torch.ones(3, 1))
        >>> law.mean.flatten(), law.variance.flatten()
        (tensor([0.5000, 0.5000, 0.5000]), tensor([0.7500, 0.7500, 0.7500]))
    """
    dim = locs.shape[-1]
    axes = [int(a) % dim if -dim <= int(a) < dim else dim for a in axes]
    if dim in axes or len(set(axes)) != len(axes) or not 0 < len(axes) < dim:
        raise ValueError(
            f"axes must be distinct axes of {dim}, at least one and not all, got {axes}. "
            "Write the columns of what is known."
        )
    if observed.dim() == 0 or observed.shape[-1] != len(axes) or not observed.numel():
        raise ValueError(f"observed must have shape (*batch, {len(axes)}), got {tuple(observed.shape)}.")
    rest = [i for i in range(dim) if i not in axes]
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


class FixedMixture(NamedTuple):
    r"""Law of a bridge's draws at B contexts, its network asked once for any number of draws and densities.

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
