r"""Pairs of laws whose entropic plan is known: a Gaussian source and a Gaussian-mixture end potential.

With :math:`\phi(y) = \sum_n a_n N(y; b_n, S_n)` and :math:`C(x) = \sum_n a_n N(x; b_n, S_n + \epsilon I)`,

.. math:: \pi(y | x) = \phi(y) N(y; x, \epsilon I) / C(x)

is the plan of the source and of the law of :math:`y`, which has no density in closed form, but exact draws. The
family `mix5` of `make_pair` is ours: scores on it are not to be compared with those on the published pairs of
https://arxiv.org/abs/2306.10161, whose variance splits otherwise.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.distributions import MultivariateNormal

FLOAT = torch.float64


@dataclass(frozen=True, eq=False)
class KnownPlan:
    r"""A source, an end potential, and everything that follows: draws, conditional laws, the bridge's drift.

    Given x, the end is a mixture: component n has weight :math:`w_n(x) \propto a_n N(x; b_n, S_n + \epsilon I)`, mean
    :math:`b_n + G_n (x - b_n)` and covariance :math:`\epsilon G_n`, where :math:`G_n = S_n (S_n + \epsilon I)^{-1}`.

    Args:
        source: Law of x0, d-dimensional, in float64.
        log_weights: :math:`\log a_n`. Shape ``(K,)``.
        locs: Centres :math:`b_n`. Shape ``(K, d)``.
        axes: Eigenvectors of :math:`S_n`, in columns. Shape ``(K, d, d)``.
        variances: Eigenvalues of :math:`S_n`, positive. Shape ``(K, d)``.
        epsilon: Reference variance over [0, 1].
    """

    source: MultivariateNormal
    log_weights: Tensor
    locs: Tensor
    axes: Tensor
    variances: Tensor
    epsilon: float

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.locs.shape[-1]

    @cached_property
    def target_variance(self) -> float:
        r"""Trace of the target's covariance: :math:`E\, \mathrm{tr}\, \mathrm{Cov}(y|x)` and the spread of the means.

        From 50,000 source draws of a generator of its own, the conditional part exact: good to some 0.3 %.
        """
        generator = torch.Generator().manual_seed(0)
        totals = [self._first_moments(self.sample_source(5_000, generator)) for _ in range(10)]
        means = torch.cat([mean for mean, _ in totals])
        return float(means.var(0).sum() + torch.cat([trace for _, trace in totals]).mean())

    def sample_source(self, num: int, generator: Generator | None = None) -> Tensor:
        """Draws of x0. Shape ``(num, d)``."""
        noise = torch.randn(num, self.dim, generator=generator, dtype=FLOAT)
        return self.source.loc + noise @ self.source.scale_tril.mT

    def sample_target(self, num: int, generator: Generator | None = None) -> Tensor:
        """Draws of x1, each from its own x0. Shape ``(num, d)``."""
        return self.sample_plan(num, generator)[1]

    def sample_plan(self, num: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Pairs ``(x0, x1)`` of the plan. Shapes ``(num, d)``."""
        x0 = self.sample_source(num, generator)
        return x0, self.conditional_sample(x0, 1, generator)[0]

    def conditional_sample(self, x0: Tensor, num: int, generator: Generator | None = None) -> Tensor:
        """Draws of x1 given each x0. ``(n, d)`` to ``(num, n, d)``."""
        index = torch.multinomial(self.log_gates(x0).exp(), num, replacement=True, generator=generator).T
        noise = torch.randn(num, *x0.shape, generator=generator, dtype=FLOAT)
        draws = torch.empty_like(noise)
        for n, (mean, axes, gains) in enumerate(zip(self._component_means(x0), self.axes, self._gains)):
            chosen = index == n
            spread = noise[chosen] * (self.epsilon * gains).sqrt() @ axes.T
            draws[chosen] = mean.expand_as(noise)[chosen] + spread
        return draws

    def conditional_moments(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(n, d)`` and covariance ``(n, d, d)`` of x1 given each x0 ``(n, d)``."""
        gates, means = self.log_gates(x0).exp(), self._component_means(x0)
        mean = torch.einsum("nk,knd->nd", gates, means)
        within = self.epsilon * torch.einsum("kij,kj,klj->kil", self.axes, self._gains, self.axes)
        offsets = gates.T.sqrt()[..., None] * (means - mean)
        return mean, torch.einsum("nk,kij->nij", gates, within) + torch.einsum("kni,knj->nij", offsets, offsets)

    def conditional_log_prob(self, x1: Tensor, x0: Tensor) -> Tensor:
        """Log density of x1 given x0. Shapes ``(n, d)`` to ``(n,)``."""
        offsets = x1 - self._component_means(x0)
        widths = self.epsilon * self._gains
        squared = (torch.einsum("knd,kdj->knj", offsets, self.axes).square() / widths[:, None]).sum(-1)
        normaliser = (widths.log().sum(-1) + self.dim * math.log(2 * math.pi))[:, None]
        return torch.logsumexp(self.log_gates(x0) - 0.5 * (squared + normaliser).T, -1)

    def log_gates(self, x0: Tensor) -> Tensor:
        """Log weights of the components of x1 given x0, normalised. ``(n, d)`` to ``(n, K)``."""
        return torch.log_softmax(self._log_heat(x0, torch.tensor(self.epsilon, dtype=FLOAT))[0], -1)

    def drift(self, t: float | Tensor, x: Tensor) -> Tensor:
        r"""Drift of the bridge, :math:`\epsilon \nabla \log \sum_n a_n N(x; b_n, S_n + \epsilon (1 - t) I)`.

        Args:
            t: Time in [0, 1], one or one a point. Shape ``()`` or ``(n,)``.
            x: Points. Shape ``(n, d)``.
        """
        heat = self.epsilon * (1 - torch.as_tensor(t, dtype=FLOAT))
        log_heat, rotated, widths = self._log_heat(x, heat)
        pulls = torch.einsum("kdj,knj->knd", self.axes, -rotated / widths)
        return self.epsilon * torch.einsum("nk,knd->nd", torch.softmax(log_heat, -1), pulls)

    @cached_property
    def _gains(self) -> Tensor:
        return self.variances / (self.variances + self.epsilon)

    def _log_heat(self, x: Tensor, heat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of each heated component at x ``(n, K)``, with offsets in its axes ``(K, n, d)`` and their variances."""
        rotated = torch.einsum("nd,kdj->knj", x, self.axes) - torch.einsum("kd,kdj->kj", self.locs, self.axes)[:, None]
        widths = self.variances[:, None] + heat[..., None]  # (K, 1, d) or (K, n, d)
        squared, log_det = (rotated.square() / widths).sum(-1), widths.log().sum(-1)
        log_density = -0.5 * (squared + log_det + self.dim * math.log(2 * math.pi))
        return (self.log_weights[:, None] + log_density).T, rotated, widths

    def _component_means(self, x0: Tensor) -> Tensor:
        gains = torch.einsum("kij,kj,klj->kil", self.axes, self._gains, self.axes)
        return self.locs[:, None] + torch.einsum("knd,kdj->knj", x0 - self.locs[:, None], gains)

    def _first_moments(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and trace of the covariance of x1 given x0, without the matrices."""
        gates, means = self.log_gates(x0).exp(), self._component_means(x0)
        mean = torch.einsum("nk,knd->nd", gates, means)
        spread = (means - mean).square().sum(-1).T + self.epsilon * self._gains.sum(-1)
        return mean, (gates * spread).sum(-1)


def make_pair(dim: int, epsilon: float, seed: int, num_components: int = 5) -> KnownPlan:
    """A pair of the family `mix5`: N(0, I), and a potential of centres at radius 5 and random full covariances.

    Their eigenvalues are log-spaced from 0.1 to 1; every component takes an equal share of the mass.

    Args:
        dim: Dimension d, at least 1.
        epsilon: Reference variance over [0, 1], positive.
        seed: Seed of a generator of the pair's own.
        num_components: Number K of components.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_components, dim, generator=generator, dtype=FLOAT)
    locs = 5.0 * directions / directions.norm(dim=-1, keepdim=True)
    axes = torch.linalg.qr(torch.randn(num_components, dim, dim, generator=generator, dtype=FLOAT)).Q
    variances = torch.logspace(-1, 0, dim, dtype=FLOAT).expand(num_components, dim)
    source = MultivariateNormal(torch.zeros(dim, dtype=FLOAT), torch.eye(dim, dtype=FLOAT))
    plan = KnownPlan(source, torch.zeros(num_components, dtype=FLOAT), locs, axes, variances, epsilon)
    batches = [plan.log_gates(plan.sample_source(5_000, generator)) for _ in range(10)]
    return KnownPlan(source, balanced_log_weights(torch.cat(batches)), locs, axes, variances, epsilon)


def balanced_log_weights(log_gates: Tensor, tol: float = 1e-8, max_iter: int = 500) -> Tensor:
    r"""The :math:`\log a` for which the mean of :math:`\mathrm{softmax}(\log a + \text{log\_gates})` is uniform.

    It is the maximum of the concave :math:`\frac1K \sum_n \log a_n - \mathrm{mean} \log \sum_n a_n g_n`, found by
    damped Newton steps: scaling by the masses alone crawls where the gates are nearly 0 or 1 (small epsilon, large d).

    Args:
        log_gates: Log gates for equal weights. Shape ``(n, K)``.
        tol: Largest gap of a mass from 1/K.
        max_iter: Largest number of steps.
    """
    num = log_gates.shape[-1]
    log_weights, damping = torch.zeros(num, dtype=log_gates.dtype), 1e-3

    def value(candidate: Tensor) -> Tensor:
        return candidate.mean() - torch.logsumexp(candidate + log_gates, -1).mean()

    for _ in range(max_iter):
        gates = torch.softmax(log_weights + log_gates, -1)
        mass = gates.mean(0)
        gap = 1 / num - mass
        if gap.abs().max() < tol:
            return log_weights - torch.logsumexp(log_weights, 0)
        curvature = torch.diag(mass) - gates.T @ gates / len(gates)
        step = torch.linalg.solve(curvature + damping * torch.eye(num, dtype=gates.dtype), gap)
        if value(log_weights + step) >= value(log_weights) - 1e-12:  # near the maximum values differ by rounding
            log_weights, damping = log_weights + step, max(damping / 10, 1e-9)
        else:
            damping *= 10
    raise RuntimeError(f"Masses must be equal to {tol:.0e}, got a gap of {gap.abs().max():.1e} after {max_iter} steps.")
