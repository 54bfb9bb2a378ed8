r"""Laws of a Gaussian-mixture bridge in its own units: process :math:`X_t = Y_t + s(t, Y_t) / \beta`, and plan."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_sb.bridges.ends import Batch
from pyro_sb.bridges.light.parameters import MixtureParameters
from pyro_sb.bridges.rows import chunked
from pyro_sb.bridges.units import Units
from pyro_sb.distributions import Draws
from pyro_sb.nn import TimeNet
from pyro_sb.ops.bass import DENSE_DIM, BassMap
from pyro_sb.ops.factor_mixture import FactorMixture
from pyro_sb.ops.log_quadratic import log_sum_exp
from pyro_sb.ops.mixture import MixturePotential, likelihood_loss, weighted_mean


class LearnedMap(TimeNet):
    """Network in place of the inverse :math:`Y_t(x)`."""


class MixtureProcess(NamedTuple):
    r"""Process :math:`X_t = Y_t + s(t, Y_t) / \beta` in the bridge's units, with Y of one Gaussian-mixture potential.

    Y is a Schrödinger bridge with drift s, and X is Y for infinite beta. Both ends are centred: the origin is the
    source's mean at t = 0 and the target's at t = 1. Points are rows ``(n, dim)``, contexts standardised rows
    ``(n, context_dim)`` or None; long arrays are taken some rows at a time.

    Args:
        parameters: Give the potential, a batch of them where there are contexts.
        epsilon: Variance of the reference over [0, 1].
        beta: Price of volatility, above 1 or infinite.
        source_variance: Variance of the source, averaged over the axes; 0 where it is a point.
        learned_map: Network in place of the inverse of the Bass map; None for the exact one.
    """

    parameters: MixtureParameters
    epsilon: float
    beta: float
    source_variance: float
    learned_map: LearnedMap | None = None

    @property
    def floor(self) -> float:
        """Smallest eigenvalue of S: components keep 1e-6 of the target's variance, or the Bass map its inverse."""
        if self.learned_map is not None:  # the paper has no floor
            return 1e-6 / self.epsilon
        bass = 0.0 if math.isinf(self.beta) else 1.05 / (1 + self.beta)
        variance = 1e-6 * float(self.parameters.axes.min()) ** 2  # the axes are 1 where none is narrow
        root = math.sqrt(self.epsilon**2 + 4 * self.source_variance * variance)
        return max(2 * variance / (self.epsilon + root), bass)  # S that carries the source to that variance

    @property
    def factored(self) -> bool:
        """Whether, given contexts, the ends are a mixture that is known by the factors of its precisions."""
        return self.parameters.factored and self.source_variance == 0 and math.isinf(self.beta)

    @property
    def width(self) -> int:
        """Numbers that a row of points takes at once."""
        return self.parameters.locs.numel()

    @property
    def row_width(self) -> int:
        """Numbers that a row of contexts takes where it has full covariances."""
        return self.width * self.parameters.locs.shape[-1]

    def potential(self, context: Tensor | None = None) -> MixturePotential:
        """The potential, a batch of them for contexts."""
        return self.parameters(context, self.epsilon)

    def law(self, context: Tensor) -> FactorMixture:
        """The mixture of the ends at each context, where `factored`."""
        return self.parameters.law(context, self.epsilon)

    def take(self, potential: MixturePotential) -> None:
        """Make a potential without a batch the process's own; eigenvalues of S are raised to the floor."""
        self.parameters.set(potential, self.floor)

    def lift(self, z: Tensor, context: Tensor | None) -> tuple[MixturePotential, Tensor]:
        """The potential of each row's context, and the rows in the shape that it takes."""
        potential = self.potential(context)
        return potential, z if context is None else z[:, None, :]

    def frozen(self, z: Tensor, context: Tensor | None) -> tuple[MixturePotential, Tensor]:
        """The same without gradient to the parameters: densities of a fitted bridge pass it to points alone."""
        with torch.no_grad():
            potential = self.lift(z, context)[0]
        log_weights, locs, scales, epsilon = potential
        potential = MixturePotential(log_weights.detach(), locs.detach(), scales.detach(), epsilon)
        return potential, z if context is None else z[:, None, :]

    def bass(self, potential: MixturePotential, t: float | Tensor) -> BassMap:
        """The map from Y to X at time t."""
        return BassMap(potential.at(t), self.epsilon, self.beta)

    def invert(self, potential: MixturePotential, t: float | Tensor, points: Tensor) -> Tensor:
        """Y_t at points, exact, with its first three derivatives where points carry gradients; or the learnt one."""
        if self.learned_map is not None:
            return self.learned_map(torch.as_tensor(t), points)
        bass = self.bass(potential, t)
        with torch.no_grad():
            inverse = bass.inverse(points)
        if not inverse.residual <= (1e-3 if points.dtype == torch.float32 else 1e-9):  # NaN is refused too
            raise RuntimeError(
                f"the inverse of the Bass map must be found, got a residual of {inverse.residual:.2g} after "
                f"{inverse.iterations} Newton steps. Fit in float64, or raise beta (now {self.beta:g})."
            )
        if not (torch.is_grad_enabled() and points.requires_grad):
            return inverse.points
        once = bass.newton_step(inverse.points, points)  # from a constant k steps have 2^k - 1 derivatives right
        return bass.newton_step(once, points)

    def residual(self, t: float, z: Tensor, context: Tensor | None) -> float:
        """Largest :math:`|X_t(Y_t(z)) - z|` relative to :math:`1 + |z|`, of the inverse in use."""
        potential, points = self.frozen(z, context)
        bass = self.bass(potential, t)
        if self.learned_map is None:
            return bass.inverse(points).residual
        found = self.learned_map(torch.tensor(t).to(z), z)
        return float(((bass.forward(found) - points).abs().amax(-1) / (1 + points.abs().amax(-1))).max())

    def likelihood(self, source: Tensor, target: Batch) -> Tensor:
        r"""Likelihood loss :math:`E \log c(y_0) - E \log v(y_1)` of points of both sides, each at its context."""
        if self.factored and target.context is not None:  # -log of the plan's density from the source
            return -weighted_mean(self.law(target.context).log_prob(target.points), target.weights)
        source, target = paired(source, target)
        potential, y1 = self.lift(target.points, target.context)
        y0 = self.lift(source, target.context)[1]
        own = None if target.context is None else target.weights  # source rows belong to contexts, or weigh the same
        return likelihood_loss(potential, y0, y1, own, target.weights)

    def dual(self, source: Tensor, target: Batch) -> float:
        """The dual G (`DualProblem`) of points of both sides, each at its context."""
        source, target = paired(source, target)
        potential, points1 = self.lift(target.points, target.context)
        points0 = self.lift(source, target.context)[1]
        start, end = self.bass(potential, 0.0), self.bass(potential, 1.0)
        y0, y1 = start.inverse(points0), end.inverse(points1)
        if max(y0.residual, y1.residual) > 1e-2:
            return -math.inf  # the minimum was not found, and a value above it would flatter
        own = None if target.context is None else target.weights
        value = weighted_mean(end.objective(y1.points, points1), target.weights)
        return float(value - weighted_mean(start.objective(y0.points, points0), own))

    def move(self, z: Tensor, context: Tensor | None, t: float = 1.0) -> Tensor:
        """States at time t of processes that leave from points."""

        def move(z: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.frozen(z, context)
            y0 = self.invert(potential, 0.0, points)
            y = potential.plan_sample(y0)
            if t < 1:
                y = y0 + t * (y - y0) + math.sqrt(self.epsilon * t * (1 - t)) * torch.randn_like(y)
            return self.bass(potential, t).forward(y).reshape(z.shape)

        return chunked(move, z, context, width=self.width)

    def path(self, z: Tensor, context: Tensor | None, times: Tensor) -> Iterator[Tensor]:
        """States at the times after the first, along Brownian bridges Y between both ends of the plan."""
        potential, points = self.frozen(z, context)
        y = self.invert(potential, 0.0, points)
        if self.factored and context is not None:
            y1 = self.law(context).sample().reshape(y.shape)
        else:
            y1 = potential.plan_sample(y)
        for now, then in zip(times[:-1], times[1:]):
            share = (then - now) / (1 - now)  # Brownian bridge from y at `now` to y1 at 1
            spread = (self.epsilon * share * (1 - then)).clamp_min(0.0).sqrt()
            y = y + share * (y1 - y) + spread * torch.randn_like(y)
            yield self.bass(potential, then).forward(y).reshape(z.shape)

    def ends(self, context: Tensor) -> Tensor:
        """A draw of the end at each context, where `factored`."""
        return chunked(lambda context: self.law(context).sample(), context, width=self.row_width)

    def drift(self, t: float, z: Tensor, context: Tensor | None) -> Tensor:
        """Drift :math:`s(t, Y_t(z))`."""

        def drift(z: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.frozen(z, context)
            return potential.drift(t, self.invert(potential, t, points)).reshape(z.shape)

        return chunked(drift, z, context, width=self.width)

    def jacobian(self, t: float, z: Tensor, context: Tensor | None) -> Tensor:
        """Derivative of the Bass map at :math:`Y_t(z)`. Shape ``(n, dim, dim)``."""

        def jacobian(z: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.frozen(z, context)
            bass = self.bass(potential, t)
            return bass.jacobian(self.invert(potential, t, points)).reshape(*z.shape, z.shape[-1])

        return chunked(jacobian, z, context, width=self.row_width)

    def end_log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        """Log density of the ends, where `factored`; no gradient goes to parameters."""

        def log_prob(z: Tensor, context: Tensor) -> Tensor:
            with torch.no_grad():
                law = self.law(context)
            return law.log_prob(z)

        return chunked(log_prob, z, context, width=self.row_width)

    def plan_log_prob(self, z1: Tensor, z0: Tensor, context: Tensor | None) -> Tensor:
        r"""Log density of the plan, :math:`\log \pi(y_1 | y_0) - \log\det(I + \nabla s(1, y_1) / \beta)`."""

        def log_prob(z1: Tensor, z0: Tensor, context: Tensor | None) -> Tensor:
            potential, points = self.frozen(z1, context)
            y0 = self.invert(potential, 0.0, self.frozen(z0, context)[1])
            y1 = self.invert(potential, 1.0, points)
            value = potential.plan_log_prob(y1, y0) - self.bass(potential, 1.0).log_det(y1)
            return value.reshape(len(z1))

        return chunked(log_prob, z1, z0, context, width=self.width * min(z1.shape[-1], DENSE_DIM))

    def mean_log_prob(self, z1: Tensor, z0: Tensor, context: Tensor | None) -> Tensor:
        r"""Log of the plan's density averaged over source points, :math:`\log \tfrac1M \sum_i \pi(z_1 | z_0^{(i)})`.

        Source points are ``(M, dim)`` for all rows, or with contexts also ``(n, M, dim)``.
        """
        if context is not None:
            z0 = z0.expand(len(z1), *z0.shape[-2:])

        def log_prob(z1: Tensor, context: Tensor | None, given: Tensor | None) -> Tensor:
            potential, points = self.frozen(z1, context)
            y0 = self.invert(potential, 0.0, z0 if given is None else given)
            y1 = self.invert(potential, 1.0, points)
            inner = y1 @ y0.mT / self.epsilon - potential.normaliser().value(y0)[..., None, :]
            mean = torch.logsumexp(inner, -1) - math.log(y0.shape[-2])
            value = potential.adjusted().value(y1) + mean - self.bass(potential, 1.0).log_det(y1)
            return value.reshape(len(z1))

        width = self.width if context is None else self.width * z0.shape[-2]
        return chunked(log_prob, z1, context, None if context is None else z0, width=width)


def paired(source: Tensor, target: Batch) -> tuple[Tensor, Batch]:
    """Ends as they are without context; with one, a source row for each of its rows."""
    if target.context is None:
        return source, target
    if len(source) == 1:
        return source.expand_as(target.points), target
    return source[torch.arange(len(target.points), device=source.device) % len(source)], target


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
    if observed.dim() == 0 or observed.shape[-1] != len(axes):
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
