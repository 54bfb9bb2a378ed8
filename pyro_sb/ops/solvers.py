r"""Solvers that run a linear noising process backwards, from noise to the target, given a denoiser.

A denoiser is the mean of the target given the state, :math:`\hat x(\tau, x)`, in the eigenbasis of
`pyro_sb.ops.linear_sde.LinearSDE`. Times fall from 1 to 0 as `LinearSDE.grid` gives them. Every solver returns the
states at all of them, source first, and ends in a denoising step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.linear_sde import LinearSDE
from pyro_sb.ops.log_quadratic import covariance_factor

Denoiser = Callable[[Tensor, Tensor], Tensor]


def multistep(denoise: Denoiser, sde: LinearSDE, times: Tensor, x: Tensor) -> list[Tensor]:
    r"""Exponential integrator of the probability flow, second order, one evaluation a step.

    .. math:: x' = \frac{s'}{s} x - m' (e^{-h} - 1) \Big(\hat x_k + \frac{h}{2 h_{prev}} (\hat x_k - \hat x_{k-1})\Big),

    each direction with its own :math:`m, s` and step h of log-SNR. Exact where the target is a point.

    Args:
        denoise: ``(tau, x)`` to the mean of the target given x, of the shape of x.
        sde: The noising process.
        times: Falling from 1 to 0. Shape ``(K + 1,)``.
        x: States at the first time. Shape ``(*, d)``.

    Returns:
        K + 1 tensors of the shape of x.

    References:
        DPM-Solver++ (Lu et al., 2022), https://arxiv.org/abs/2211.01095, algorithm 2 (2M); here for each direction.
    """
    states, before, h_before = [x], x, None
    for now, then in zip(times[:-1], times[1:]):
        estimate = denoise(now, x)
        if then == 0:
            x = estimate
        else:
            law, next_law = sde.at(now), sde.at(then)
            h = sde.log_snr(then) - sde.log_snr(now)
            guess = estimate if h_before is None else estimate + (estimate - before) * h / (2 * h_before)
            x = (next_law.variance / law.variance).sqrt() * x - next_law.factor * torch.expm1(-h) * guess
            before, h_before = estimate, h
        states.append(x)
    return states


def heun(denoise: Denoiser, sde: LinearSDE, times: Tensor, x: Tensor, spread: Tensor) -> list[Tensor]:
    r"""Heun's method for the probability flow in the angles of `Flow`: exact for a Gaussian target of variance spread.

    Args:
        denoise: As in `multistep`; two evaluations a step, one at the last.
        sde: The noising process.
        times: Falling from 1 to 0. Shape ``(K + 1,)``.
        x: States at the first time. Shape ``(*, d)``.
        spread: Variances of the target. Shape ``(d,)``.

    Returns:
        K + 1 tensors of the shape of x.
    """
    flow, states = Flow(sde, spread), [x]
    for now, then in zip(times[:-1], times[1:]):
        if then == 0:
            x = denoise(now, x)
        else:
            step, w = flow.angle(then) - flow.angle(now), x * flow.inner(now)
            slope = flow.slope(denoise, now, w)
            ahead = flow.slope(denoise, then, w + step * slope)
            x = (w + 0.5 * step * (slope + ahead)) / flow.inner(then)
        states.append(x)
    return states


class Flow(NamedTuple):
    r"""The probability flow in normalised states and angles.

    .. math:: \frac{dw_i}{d\phi_i} = -N_i(w), \qquad w = \frac{x}{\sqrt V}, \quad \phi = \arctan\frac{s}{m \sqrt v},
              \quad N = \frac{\hat x - c_{skip} x}{c_{out}} .

    A Gaussian target of variance v has N = 0: it stands still. Each direction has its own angle.

    Args:
        sde: The noising process.
        spread: Variances v of the target. Shape ``(d,)``.
    """

    sde: LinearSDE
    spread: Tensor

    def angle(self, tau: Tensor) -> Tensor:
        """Angles at a time ``(*)``, from 0 (target) towards a right one (noise). Shape ``(*, d)``."""
        law = self.sde.at(tau)
        return torch.atan2(law.variance.sqrt(), law.factor * self.spread.sqrt())

    def inner(self, tau: Tensor) -> Tensor:
        r""":math:`V^{-1/2}` at a time. Shape ``(*, d)``."""
        law = self.sde.at(tau)
        return (law.factor.square() * self.spread + law.variance).rsqrt()

    def slope(self, denoise: Denoiser, tau: Tensor, w: Tensor) -> Tensor:
        """The derivative of w along its angles. Shape of ``w``."""
        angle = self.angle(tau)
        return (angle.cos() * w - denoise(tau, w / self.inner(tau)) / self.spread.sqrt()) / angle.sin()


def euler(denoise: Denoiser, sde: LinearSDE, times: Tensor, x: Tensor) -> list[Tensor]:
    r"""Euler's method for the probability flow :math:`dx = -\tfrac12 (D x + \nabla \log p)\, dW`: a reference.

    Arguments and result as in `multistep`.
    """
    states = [x]
    for now, then in zip(times[:-1], times[1:]):
        estimate = denoise(now, x)
        growth = sde.schedule.integral(now) - sde.schedule.integral(then)
        x = estimate if then == 0 else x + 0.5 * growth * (sde.rates * x + score(sde, now, x, estimate))
        states.append(x)
    return states


def euler_maruyama(denoise: Denoiser, sde: LinearSDE, times: Tensor, x: Tensor) -> list[Tensor]:
    r"""Euler-Maruyama for the generating SDE :math:`dx = -(\tfrac12 D x + \nabla \log p)\, dW + d\bar w_W`.

    Arguments and result as in `multistep`.
    """
    states = [x]
    for now, then in zip(times[:-1], times[1:]):
        estimate = denoise(now, x)
        growth = sde.schedule.integral(now) - sde.schedule.integral(then)
        drift = 0.5 * sde.rates * x + score(sde, now, x, estimate)
        x = estimate if then == 0 else x + growth * drift + growth.sqrt() * torch.randn_like(x)
        states.append(x)
    return states


def score(sde: LinearSDE, tau: Tensor, x: Tensor, estimate: Tensor) -> Tensor:
    r"""Gradient of the log density of the noised target, :math:`(m \hat x - x) / s^2`. Shape of ``x``."""
    law = sde.at(tau)
    return (law.factor * estimate - x) / law.variance


class Conditional(NamedTuple):
    """Gaussian model of the target given a state.

    Args:
        mean: Shape ``(*, d)``.
        covariance: Shape ``(*, d, d)``, or variances ``(*, d)``.
    """

    mean: Tensor
    covariance: Tensor


class StepLaw(NamedTuple):
    """Gaussian law of one step: covariance as a Cholesky factor ``(*, d, d)``, or standard deviations ``(*, d)``."""

    mean: Tensor
    scale: Tensor

    def sample(self) -> Tensor:
        """A draw for each row."""
        noise = torch.randn_like(self.mean)
        if self.scale.dim() == self.mean.dim():
            return self.mean + self.scale * noise
        return self.mean + (self.scale @ noise[..., None])[..., 0]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of ``x``. Shape ``(*)``."""
        if self.scale.dim() == self.mean.dim():
            noise, log_scale = (x - self.mean) / self.scale, self.scale.log().expand_as(x)
        else:
            gap = (x - self.mean)[..., None]
            noise = torch.linalg.solve_triangular(self.scale, gap, upper=False)[..., 0]
            log_scale = self.scale.diagonal(dim1=-2, dim2=-1).log()
        return -(0.5 * noise.square() + log_scale).sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


Model = Callable[[Tensor, Tensor], Conditional]


def step_law(sde: LinearSDE, now: Tensor, then: Tensor, x: Tensor, given: Conditional) -> StepLaw:
    r"""Law of the state at the cleaner time ``then`` given the state x at ``now``.

    By Bayes' rule, given the target :math:`x_0` too, the state is Gaussian with mean :math:`g x + h x_0` and variance
    q, where :math:`g = s'^2 m / (m' s^2)`, :math:`h = m' - g m`, :math:`q = s'^2 (1 - g m / m')`. With the model
    N(mean, C) of the target given x the step is :math:`N(g x + h\, mean, q + h C h)`; the last one is N(mean, C),
    never noiseless.
    """
    if then == 0:
        gain, pull, rest = torch.zeros_like(sde.rates), torch.ones_like(sde.rates), torch.zeros_like(sde.rates)
    else:
        law, next_law, noising = sde.at(now), sde.at(then), sde.between(then, now)
        gain = next_law.variance * noising.factor / law.variance
        pull = next_law.factor - gain * law.factor
        rest = next_law.variance * noising.variance / law.variance
    mean = gain * x + pull * given.mean
    if given.covariance.dim() == x.dim():
        return StepLaw(mean, (rest + pull.square() * given.covariance).sqrt())
    covariance = pull[:, None] * given.covariance * pull + rest.diag()
    return StepLaw(mean, covariance_factor(covariance))


class Path(NamedTuple):
    r"""A path of the generating chain and its log density.

    Args:
        states: K + 1 tensors ``(*, d)``, source first.
        log_ratio: :math:`\sum_k \log F(x_{k+1} | x_k) - \log B(x_k | x_{k+1})`, without the start. Shape ``(*)``.
    """

    states: list[Tensor]
    log_ratio: Tensor


def ancestral(model: Model, sde: LinearSDE, times: Tensor, x: Tensor) -> Path:
    r"""Draws by the steps of `step_law`, with the log density that makes importance weights exact.

    For :math:`x_0 \sim p_0` and :math:`\log q = \log p_0(x_0) + \text{log\_ratio}`, the mean of
    :math:`p(x_K) / q` is the normaliser of p for any number of steps and any model: the noising steps B are exact
    Gaussians that sum to one.

    Args:
        model: ``(tau, x)`` to a Gaussian model of the target given x.
        sde: The noising process.
        times: Falling from 1 to 0. Shape ``(K + 1,)``.
        x: States at the first time. Shape ``(*, d)``.
    """
    states, log_ratio = [x], x.new_zeros(x.shape[:-1])
    for now, then in zip(times[:-1], times[1:]):
        law = step_law(sde, now, then, x, model(now, x))
        ahead = law.sample()
        log_ratio = log_ratio + law.log_prob(ahead) - sde.between(then, now).log_prob(x, ahead)
        x = ahead
        states.append(x)
    return Path(states, log_ratio)


def noising(model: Model, sde: LinearSDE, times: Tensor, x: Tensor) -> Path:
    """The same for a path drawn backwards: from its end x, a draw of the target, by the noising steps B."""
    states = [x]
    log_ratio = x.new_zeros(x.shape[:-1])
    for then, now in zip(times.flip(0)[:-1], times.flip(0)[1:]):
        kernel, end = sde.between(then, now), states[-1]
        start = kernel.sample(end)
        law = step_law(sde, now, then, start, model(now, start))
        log_ratio = log_ratio + law.log_prob(end) - kernel.log_prob(start, end)
        states.append(start)
    return Path(states[::-1], log_ratio)


# Density along the probability flow: an approximation that no correction uses

EXACT_UP_TO = 20  # dimensions with an exact divergence


def flow_change(
    goal: Callable[[Tensor, Tensor], Tensor], flow: Flow, times: Tensor, z: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""End of the flow from clean states, and what to add to its log density there to have theirs.

    Heun's method in the flow's angles, :math:`dw_i / d\phi_i = -N_i`, with
    :math:`d \log p(w) = \sum_i \partial_i N_i\, d\phi_i` along it: exact for a Gaussian target, whose N is zero.

    Args:
        goal: N, a function of the time and of normalised states.
        flow: The angles.
        times: Rising from the first noisy time to 1. Shape ``(K,)``.
        z: Clean states in the eigenbasis. Shape ``(n, d)``.
        probes: Random signs for the divergence above 20 dimensions. Shape ``(num, d)``.

    Returns:
        Noisy states ``(n, d)`` at the last time, and the change ``(n,)``.
    """
    step = flow.angle(times[0])  # from the target itself to the first noisy time: Euler
    w = z / flow.spread.sqrt()
    slope, rates = slope_and_rates(goal, times[0], w, probes)
    w, change = w + step * slope, rates @ step - 0.5 * flow.spread.log().sum()
    slope, rates = slope_and_rates(goal, times[0], w, probes)
    for now, then in zip(times[:-1], times[1:]):
        step = flow.angle(then) - flow.angle(now)
        ahead = -goal(then, w + step * slope)
        w = w + 0.5 * step * (slope + ahead)
        slope, next_rates = slope_and_rates(goal, then, w, probes)
        change = change + 0.5 * (rates + next_rates) @ step
        rates = next_rates
    last = flow.inner(times[-1])
    return w / last, change - last.log().sum()


def slope_and_rates(
    goal: Callable[[Tensor, Tensor], Tensor], tau: Tensor, w: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope -N of the flow and its diagonal derivatives, estimated above 20 dimensions. Shape ``(n, d)`` each."""
    exact = w.shape[-1] <= EXACT_UP_TO
    signs = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) if exact else probes
    diagonal = torch.zeros_like(w)
    with torch.enable_grad():
        point = w.detach().requires_grad_()
        slope = -goal(tau, point)
        for sign in signs:
            (across,) = torch.autograd.grad(slope, point, sign.expand_as(w), retain_graph=True)
            diagonal = diagonal + across * sign
    return slope.detach(), diagonal if exact else diagonal / len(signs)
