"""One direction of a diffusion Schrödinger bridge: from where its paths begin to the end ahead of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_sb.bridges.base import Fitted, chunked
from pyro_sb.nn import ResidualNet, embedding_size
from pyro_sb.ops.brownian import bridge_gain, step_towards
from pyro_sb.ops.regression import Affine
from pyro_sb.ops.solvers import StepLaw

NUM_KNOTS = 32  # of the table of residual variances
LATEST = 0.999  # own time of the last state that a network sees
FLOOR = 1e-6  # smallest gain, in units of the largest
INPUT_FLOOR = 1e-2  # smallest variance that states are scaled by, in units of the mean


class Guide(NamedTuple):
    """Means and covariance of one end: what the Gaussian bridge knows of it."""

    affine: Affine
    covariance: Tensor


class Given(NamedTuple):
    """Means and features that a half has of rows of contexts.

    Args:
        begin: Mean of where paths begin. Shape ``(dim,)`` or ``(n, dim)``.
        ahead: Mean of the end ahead. The same.
        features: What the network sees. Shape ``(n, num_features)``, or None.
    """

    begin: Tensor
    ahead: Tensor
    features: Tensor | None

    def rows(self, index: Tensor | slice) -> "Given":
        """Some of the rows."""
        begin, ahead = (v if v.dim() == 1 else v[index] for v in (self.begin, self.ahead))
        return Given(begin, ahead, None if self.features is None else self.features[index])


class HalfBridge(Fitted):
    r"""The end ahead of a state, :math:`E[y | x_u]`, as that of the Gaussian Schrödinger bridge and what it misses.

    In own time u, 0 where paths begin and 1 at the end ahead, and in the eigenbasis U of the Gaussian bridge's gain,

    .. math:: \hat y = m_1 + U\big(g_u\, U^\top (x - m_u) + c_u N_\theta(u, w)\big), \quad
              g_u = \frac{s}{1 - u + u s}, \quad c_u^2 = \epsilon (1 - u)\, g_u ,

    with s the gain's eigenvalues and w the state less :math:`m_u`, scaled per direction by the Gaussian bridge's
    deviations. :math:`c_u^2` is the variance of y given x between Gaussians. So the network starts at the closed form,
    its goal has about unit variance at every time, and the reference's epsilon is untouched: this is a choice of
    coordinates for N, not whitening. The variance of y that the network leaves is measured per direction, in units of
    :math:`c_u^2`, in a table over u.

    A half may have steps of its own instead (`take_steps`): Euler-Maruyama's, of the reference's variance
    :math:`\epsilon h` or of one measured for each step and direction.

    Args:
        dim: Size of the state.
        context_dim: Size of the context.
        hidden: Widths of the network.
        embedding: A module from contexts to features; None for the contexts themselves.
    """

    begin_location: Tensor
    begin_slope: Tensor
    ahead_location: Tensor
    ahead_slope: Tensor
    basis: Tensor
    gain: Tensor
    variances: Tensor
    log_spread: Tensor
    step_starts: Tensor
    step_logs: Tensor
    shapes = {
        "begin_location": "d", "begin_slope": "d F", "ahead_location": "d", "ahead_slope": "d G", "basis": "d d",
        "gain": "d", "variances": "v d", "log_spread": "k d", "step_starts": "K", "step_logs": "K d",
    }  # fmt: skip

    def __init__(self, dim: int, context_dim: int, hidden: tuple[int, ...], embedding: nn.Module | None) -> None:
        super().__init__()
        self.dim, self.embedding = dim, embedding
        num_features = context_dim if embedding is None else embedding_size(embedding, context_dim)
        self.net = ResidualNet(dim, dim, context_dim=num_features, hidden=hidden)
        for name in HalfBridge.shapes:
            self.register_buffer(name, torch.empty(0))

    def sizes(self) -> dict[str, int]:
        """Size of the state."""
        return {"d": self.dim}

    @torch.no_grad()
    def adopt(self, begin: Guide, ahead: Guide, epsilon: float) -> None:
        """Take the Gaussian bridge between two ends; the network starts at zero."""
        cov0, cov1 = begin.covariance.double(), ahead.covariance.double()
        gain = bridge_gain(cov0, cov1, epsilon)
        values, basis = torch.linalg.eigh(gain)
        cross = cov0 @ gain
        middle = cross + cross.mT + epsilon * torch.eye(len(cov0), dtype=cov0.dtype, device=cov0.device)
        variances = [(basis * (matrix @ basis)).sum(0) for matrix in (cov0, middle, cov1)]
        like = begin.affine.location
        self.begin_location, self.begin_slope = begin.affine.location.to(like), begin.affine.slope.to(like)
        self.ahead_location, self.ahead_slope = ahead.affine.location.to(like), ahead.affine.slope.to(like)
        self.basis, self.gain = basis.to(like), values.clamp_min(FLOOR * float(values[-1])).to(like)
        self.variances = torch.stack(variances).to(like)
        self.log_spread = like.new_zeros(NUM_KNOTS, len(like))
        self.step_starts, self.step_logs = like.new_empty(0), like.new_empty(0, len(like))
        self.net.reset()

    @torch.no_grad()
    def take_steps(self, times: Tensor) -> None:
        r"""Take steps of the reference's variance :math:`\epsilon h` at these times ``(K + 1,)``."""
        self.step_starts = times[:-1].to(self.gain)
        self.step_logs = self.gain.new_zeros(len(times) - 1, len(self.gain))

    def given(self, context: Tensor | None, summary: Tensor | None) -> Given:
        """Both means and the features of standardised contexts in rows, ``summary`` being what regressions see."""
        begin = Affine(self.begin_location, self.begin_slope)(summary if self.begin_slope.numel() else None)
        ahead = Affine(self.ahead_location, self.ahead_slope)(summary if self.ahead_slope.numel() else None)
        return Given(begin, ahead, context if context is None or self.embedding is None else self.embedding(context))

    def answer(self, u: Tensor, x: Tensor, given: Given) -> Tensor:
        """The network's N. Times ``()`` or ``(n,)``, states ``(n, dim)``."""
        return self.net(u, self._inner(u, x, given), given.features)

    def goal(self, u: Tensor, x: Tensor, end: Tensor, given: Given, epsilon: float) -> Tensor:
        """Goal of N where the end ahead is ``end``. Shape ``(n, dim)``."""
        gap = (end - given.ahead - self._guided(u, x, given)) @ self.basis
        return gap / self._scale(u, epsilon)

    def end(self, u: Tensor, x: Tensor, given: Given, epsilon: float) -> Tensor:
        """Mean of the end ahead. Shape ``(n, dim)``."""
        learnt = (self._scale(u, epsilon) * self.answer(u, x, given)) @ self.basis.T
        return given.ahead + self._guided(u, x, given) + learnt

    def step(self, u: Tensor, then: Tensor, x: Tensor, given: Given, epsilon: float) -> StepLaw:
        """Law of the state at own time ``then`` given that at u, in the eigenbasis."""
        own = len(self.step_starts) > 0
        spread = epsilon * (1 - u) if own else self._scale(u, epsilon).square() * self._log_spread(u).exp()
        law = step_towards(x @ self.basis, self.end(u, x, given, epsilon) @ self.basis, spread, u, then, epsilon)
        return StepLaw(law.mean, law.scale * (0.5 * self._step_log(u, then)).exp()) if own else law

    def drift_scale(self, u: Tensor, epsilon: float) -> Tensor:
        """Drift, in the eigenbasis, per unit of N. Shape ``(*, dim)``."""
        return self._scale(u, epsilon) / (1 - u[..., None])

    def _guided(self, u: Tensor, x: Tensor, given: Given) -> Tensor:
        """The Gaussian bridge's mean of the end, less the end's own mean."""
        return (self._gain_at(u[..., None]) * (self._centred(u, x, given) @ self.basis)) @ self.basis.T

    def _inner(self, u: Tensor, x: Tensor, given: Given) -> Tensor:
        """Normalised states in the eigenbasis."""
        u = u[..., None]
        start, middle, last = self.variances
        variance = (1 - u).square() * start + u * (1 - u) * middle + u.square() * last
        variance = variance.maximum(INPUT_FLOOR * variance.mean(-1, keepdim=True))
        return self._centred(u[..., 0], x, given) @ self.basis * variance.rsqrt()

    def _centred(self, u: Tensor, x: Tensor, given: Given) -> Tensor:
        return x - torch.lerp(given.begin, given.ahead, u[..., None])

    def _gain_at(self, u: Tensor) -> Tensor:
        return self.gain / (1 - u + u * self.gain)

    def _scale(self, u: Tensor, epsilon: float) -> Tensor:
        u = u[..., None]
        return (epsilon * (1 - u) * self._gain_at(u)).sqrt()

    def _log_spread(self, u: Tensor) -> Tensor:
        """Log of the measured variance in units of the Gaussian bridge's, between the knots. Shape ``(*, dim)``."""
        position = (knot_place(u) * (NUM_KNOTS - 1)).clamp(0, NUM_KNOTS - 1)
        low = position.floor().clamp_max(NUM_KNOTS - 2)
        index = low.long()
        return torch.lerp(self.log_spread[index], self.log_spread[index + 1], (position - low)[..., None])

    def _step_log(self, u: Tensor, then: Tensor) -> Tensor:
        """Log variance in units of the reference's, of the step that holds this one; shorter ones have less of it."""
        index = torch.searchsorted(self.step_starts, 0.5 * (u + then), right=True) - 1
        sizes = torch.cat([self.step_starts, torch.ones_like(self.step_starts[:1])]).diff()
        return self.step_logs[index] * ((then - u) / sizes[index]).clamp_max(1)


def knot_times(like: Tensor) -> Tensor:
    """Times of the table of variances: closer towards the end ahead. Shape ``(NUM_KNOTS,)``."""
    place = torch.linspace(0, 1, NUM_KNOTS, dtype=torch.float64)
    return (LATEST * (1 - (1 - place) ** 3)).to(like)


def knot_place(u: Tensor) -> Tensor:
    """Place of a time among the knots, from 0 to 1."""
    return 1 - (1 - u / LATEST).clamp_min(0) ** (1 / 3)


def spread_times(num: int, like: Tensor) -> Tensor:
    """Times to learn at, stratified: half uniform, half by the arcsine law, which visits both ends more. ``(num,)``."""
    place = (torch.arange(num) // 2 + torch.rand(num)) / ((num + 1) // 2)
    place = place[torch.randperm(num)].clamp_max(1).to(like)
    ends = torch.sin(0.5 * math.pi * place).square()
    uniform = torch.arange(num, device=like.device) % 2 == 0
    return LATEST * torch.where(uniform, place, ends)


class Chain(NamedTuple):
    """A half with its grid: ``times`` of its own, from 0 to 1."""

    half: HalfBridge
    times: Tensor
    epsilon: float

    def run(self, x: Tensor, given: Given) -> list[Tensor]:
        """States at all times from those at the first, K + 1 of ``(n, dim)``."""
        states = [x]
        for u, then in zip(self.times[:-1], self.times[1:]):
            law = self.half.step(u, then, states[-1], given, self.epsilon)
            states.append(law.sample() @ self.half.basis.T)
        return states

    def log_prob(self, k: int, x: Tensor, ahead: Tensor, given: Given) -> Tensor:
        """Log density of the state after step k given that before. Shape ``(n,)``."""
        law = self.half.step(self.times[k], self.times[k + 1], x, given, self.epsilon)
        return law.log_prob(ahead @ self.half.basis)

    def mean(self, k: int, x: Tensor, given: Given) -> Tensor:
        """Mean of the state after step k, F(x) or B(x) of the paper. Shape ``(n, dim)``."""
        law = self.half.step(self.times[k], self.times[k + 1], x, given, self.epsilon)
        return law.mean @ self.half.basis.T


def log_ratio(states: list[Tensor], ahead: tuple[Chain, Given], back: tuple[Chain, Given]) -> Tensor:
    r""":math:`\sum_k \log F(x_{k+1} | x_k) - \log B(x_k | x_{k+1})` of paths, from the source on. Shape ``(n,)``."""
    total = torch.zeros_like(states[0][:, 0])
    last = len(states) - 2
    for k, (x, then) in enumerate(zip(states[:-1], states[1:])):
        forwards = ahead[0].log_prob(k, x, then, ahead[1])
        total = total + forwards - back[0].log_prob(last - k, then, x, back[1])
    return total


def chunked_rows(function: Callable[[Tensor, Given], Tensor], x: Tensor, given: Given) -> Tensor:
    """A function of states and what is given of them, evaluated some rows at a time."""
    index = torch.arange(len(x), device=x.device)
    return chunked(lambda rows: function(x[rows], given.rows(rows)), index, width=8 * x.shape[1])
