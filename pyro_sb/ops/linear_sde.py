r"""Linear noising processes in an eigenbasis: transition laws, log-SNR grids, rates of the drift, preconditioning.

The process is :math:`dx = -\tfrac12 \beta_\tau D x\, d\tau + \sqrt{\beta_\tau}\, dw` with a symmetric D of eigenvalues
:math:`d_i`. Everything here lives in D's eigenbasis, where each direction is on its own. Noising time :math:`\tau` runs
from 0 (draws of the target) to 1 (noise): it is 1 less a bridge's time.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HALVINGS = 64  # of a bisection in float64: to the last bit


class Schedule(NamedTuple):
    r"""Noise rate :math:`\beta_\tau = b_{\min} + \tau^r (b_{\max} - b_{\min})` for :math:`\tau` in [0, 1].

    Args:
        b_min: Rate at 0, positive.
        b_max: Rate at 1, at least ``b_min``.
        power: r, not negative; 0 with ``b_min = b_max`` is the constant rate.

    Example:
        >>> Schedule(0.1, 10.0, 1.7).integral(torch.tensor(1.0))
        tensor(3.7667)
    """

    b_min: float = 0.1
    b_max: float = 10.0
    power: float = 1.7

    def rate(self, tau: Tensor) -> Tensor:
        r""":math:`\beta_\tau`, of the shape of ``tau``."""
        return self.b_min + tau**self.power * (self.b_max - self.b_min)

    def integral(self, tau: Tensor) -> Tensor:
        r""":math:`W_\tau = \int_0^\tau \beta = b_{\min} \tau + (b_{\max} - b_{\min}) \tau^{r+1} / (r+1)`."""
        return self.b_min * tau + (self.b_max - self.b_min) * tau ** (self.power + 1) / (self.power + 1)

    @property
    def total(self) -> float:
        r""":math:`W_1`."""
        return self.b_min + (self.b_max - self.b_min) / (self.power + 1)

    def time(self, integral: Tensor) -> Tensor:
        r"""The :math:`\tau` at which W has this value, by bisection."""
        return bisect(lambda tau: self.integral(tau) - integral.double(), integral.double() * 0, 1.0).to(integral)


class NoisingStep(NamedTuple):
    """Gaussian law of the state given an earlier one: mean ``factor * x``, independent directions.

    Args:
        factor: Shape ``(*, d)``.
        variance: Shape ``(*, d)``.
    """

    factor: Tensor
    variance: Tensor

    def log_prob(self, x: Tensor, given: Tensor) -> Tensor:
        """Log density of ``x`` given the earlier state, ``(*, d)`` each. Shape ``(*)``."""
        squares = (x - self.factor * given).square() / self.variance
        return -0.5 * (squares + (2 * math.pi * self.variance).log()).sum(-1)

    def sample(self, given: Tensor) -> Tensor:
        """A draw for each row."""
        return self.factor * given + self.variance.sqrt() * torch.randn_like(given)


class LinearSDE(NamedTuple):
    r"""A noising process with independent directions, :math:`m_i = e^{-W d_i / 2}`, :math:`s_i^2 = (1-e^{-W d_i})/d_i`.

    A rate of 0 is the limit :math:`m_i = 1`, :math:`s_i^2 = W`: Brownian motion, or the variance-exploding process.

    Args:
        rates: Eigenvalues of D. Shape ``(d,)``.
        schedule: The noise rate.

    References:
        Variational Schrödinger Diffusion Models (Deng et al., 2024), https://arxiv.org/abs/2405.04795. Their matrix
        fractions are this for a static symmetric D; between two times W is replaced by its growth.

    Example:
        >>> law = variance_preserving(1).at(torch.tensor(1.0))
        >>> round((law.factor**2 + law.variance).item(), 6)
        1.0
    """

    rates: Tensor
    schedule: Schedule

    def at(self, tau: Tensor) -> NoisingStep:
        """Law at ``tau`` of shape ``(*)`` given the state at 0; ``(*, d)`` each."""
        return self._over(self.schedule.integral(tau))

    def between(self, earlier: Tensor, later: Tensor) -> NoisingStep:
        """Law at the later (noisier) time given the state at the earlier one."""
        return self._over(self.schedule.integral(later) - self.schedule.integral(earlier))

    def log_snr(self, tau: Tensor) -> Tensor:
        r"""Log signal-to-noise ratio :math:`\log (m_i / s_i)` of each direction. Shape ``(*, d)``."""
        law = self.at(tau)
        return law.factor.log() - 0.5 * law.variance.log()

    def time_at(self, mean_log_snr: Tensor) -> Tensor:
        r"""The :math:`\tau` at which the mean log-SNR of the directions has this value, by bisection in log tau."""
        exact = LinearSDE(self.rates.double(), self.schedule)
        wanted = mean_log_snr.double()
        root = bisect(lambda log_tau: wanted - exact.log_snr(log_tau.exp()).mean(-1), wanted * 0 - 100.0, 0.0)
        return root.exp().to(mean_log_snr)

    def grid(self, num_steps: int, last: Tensor | float) -> Tensor:
        r"""Times from 1 down to ``last`` > 0, uniform in mean log-SNR, then 0. Shape ``(num_steps + 1,)``.

        Example:
            >>> variance_preserving(2).grid(3, 0.01)
            tensor([1.0000, 0.3114, 0.0100, 0.0000])
        """
        zero = self.rates.new_zeros(1)
        ends = self.log_snr(torch.cat([zero + 1, zero + last])).mean(-1)
        inner = torch.linspace(0, 1, num_steps, dtype=zero.dtype, device=zero.device)
        times = self.time_at(torch.lerp(ends[0], ends[1], inner))
        times[0] = 1.0
        if num_steps > 1:
            times[-1] = last
        return torch.cat([times, zero])

    def _over(self, growth: Tensor) -> NoisingStep:
        growth = growth[..., None]
        exponent = growth * self.rates
        return NoisingStep((-0.5 * exponent).exp(), growth * share_left(exponent))


def share_left(x: Tensor) -> Tensor:
    """The function ``(1 - exp(-x)) / x``, 1 at 0.

    Example:
        >>> share_left(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.6321])
    """
    safe = torch.where(x == 0, 1.0, x)
    return torch.where(x == 0, 1.0, -torch.expm1(-safe) / safe)


def variance_preserving(dim: int, schedule: Schedule | None = None) -> LinearSDE:
    """The VP process, D = I: unit variance is kept."""
    return LinearSDE(torch.ones(dim), schedule or Schedule())


def variance_exploding(dim: int, max_variance: float, power: float = 1.7) -> LinearSDE:
    """The VE process, D = 0: pure noise, of this variance at time 1 and growing as a power of time."""
    return LinearSDE(torch.zeros(dim), Schedule(0.0, max_variance * (power + 1), power))


def brownian(dim: int, epsilon: float) -> LinearSDE:
    """Brownian motion of variance epsilon over unit time: D = 0 at a constant rate."""
    return LinearSDE(torch.zeros(dim), Schedule(epsilon, epsilon, 0.0))


def bisect(increasing: Callable[[Tensor], Tensor], low: Tensor, high: float) -> Tensor:
    """Root of an elementwise increasing function between ``low`` and ``high``; an end where the sign does not change.

    Example:
        >>> bisect(lambda x: x**2 - 2, torch.zeros(1, dtype=torch.float64), 2.0)
        tensor([1.4142], dtype=torch.float64)
    """
    high_end = torch.full_like(low, high)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high_end)
        above = increasing(middle) > 0
        low, high_end = torch.where(above, low, middle), torch.where(above, middle, high_end)
    return 0.5 * (low + high_end)


def fixed_point_rates(variances: Tensor, total: float) -> Tensor:
    r"""Rates d whose noised marginal has unit variance at the end, the fixed point of the variational score.

    .. math:: e^{-W d} v + (1 - e^{-W d}) / d = 1 ,

    one root for each eigenvalue v of the target's covariance: the source is then N(0, I) exactly, and a unit variance
    keeps d = 1. Both terms fall in d.

    Args:
        variances: v, positive. Shape ``(*)``.
        total: W at noising time 1, positive.

    References:
        The fixed point of the stochastic approximation in Variational Schrödinger Diffusion Models (Deng et al., 2024),
        https://arxiv.org/abs/2405.04795, with coefficient zeta = 1 and a standard normal source; derived here.

    Example:
        >>> fixed_point_rates(torch.tensor([1.0, 350.0]), 3.77)
        tensor([1.0000, 1.7735])
    """
    v = variances.double()

    def deficit(rate: Tensor) -> Tensor:
        return 1 - (-total * rate).exp() * v - total * share_left(total * rate)

    highest = float(v.max().clamp_min(1.0).log() / total) + 2.0 + 2.0 / total
    return bisect(deficit, torch.full_like(v, -highest), highest).to(variances)


def tolerance_rates(deviations: Tensor, total: float, tolerance: float = 0.05, smallest: float = 0.3) -> Tensor:
    r"""Rates that shrink every direction's standard deviation to the tolerance: :math:`d = (2/W) \log(sd/0.05)`.

    Args:
        deviations: Standard deviations of the target, positive. Shape ``(*)``.
        total: W at noising time 1, positive.
        tolerance: What is left of them at noising time 1.
        smallest: Lowest rate, for directions that are narrow from the start.

    Example:
        >>> tolerance_rates(torch.tensor([2.1, 18.7]), 3.77)
        tensor([1.9828, 3.1428])
    """
    return (2 / total * (deviations / tolerance).log()).clamp_min(smallest)


class Preconditioning(NamedTuple):
    r"""Coefficients of a denoiser by a network N, for each direction: :math:`c_{skip} x + c_{out} N(c_{in} x)`.

    With :math:`V = m^2 v + s^2`: :math:`c_{skip} = m v / V`, :math:`c_{out} = s \sqrt{v / V}`,
    :math:`c_{in} = V^{-1/2}`. For a target of variance v the network's input and its goal have unit variance, and
    :math:`c_{out}^2` is the variance of the target given x where it is Gaussian.

    Args:
        skip: Shape ``(*, d)``.
        out: Shape ``(*, d)``.
        inner: Shape ``(*, d)``.
    """

    skip: Tensor
    out: Tensor
    inner: Tensor


def preconditioning(law: NoisingStep, variances: Tensor) -> Preconditioning:
    """The coefficients for a target of these variances ``(d,)``, at the times of a law given the state at 0.

    Example:
        >>> preconditioning(NoisingStep(torch.ones(1), torch.ones(1)), torch.ones(1)).skip
        tensor([0.5000])
    """
    total = law.factor.square() * variances + law.variance
    return Preconditioning(law.factor * variances / total, (law.variance * variances / total).sqrt(), total.rsqrt())


def start_covariance(sde: LinearSDE, covariance: Tensor) -> Tensor:
    r"""Covariance :math:`m_T S m_T + \Sigma_T` of the noised target at time 1, for S ``(d, d)`` in the eigenbasis."""
    law = sde.at(sde.rates.new_ones(()))
    return law.factor[:, None] * covariance * law.factor + law.variance.diag()
