r"""One step of the affinity-based Langevin chain, and its four schemes, in whitened coordinates.

Coordinates are :math:`z = L^{-1}(x - \bar x)` with metric :math:`K = L L^\top`. With the bridge's conditional mean m
and covariance C over one unit of time, in which the reference has variance :math:`\epsilon \rho(z)`, step size s and
sampler diffusion :math:`G G^\top`,

.. math:: f(z) = z + s\, G G^\top (m(z) - z), \qquad g(z) = \sqrt{s\, \epsilon\, \rho(z)}\; G .

- plain: :math:`z' = f(z) + g(z) \xi`.
- split-step: :math:`z' = f(z + g(z) \xi)`; within the draws' convex hull if s is at most 1 and G is the identity.
- strang: :math:`y = f(z + g(z) \xi / \sqrt 2)` and :math:`z' = y + g(y) \xi' / \sqrt 2`.
- data-aware: :math:`z' = f(z) + \sqrt s\, G\, C(z)^{1/2} \xi`.

On a Gaussian of variance S and at s = 1, where :math:`m(z) = A z` with
:math:`A = \exp(-\operatorname{arsinh}(\epsilon / 2 S))`, the stationary variances are S / A, S A,
:math:`S \sqrt{1 + (\epsilon / 2 S)^2}` and S.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.ops.attention import CHUNK_ELEMENTS, Transitions
from pyro_sb.ops.sinkhorn import log_affinity


@dataclass(frozen=True)
class VariableBandwidth:
    r"""Variable bandwidth :math:`\rho = \hat\pi^\beta` from a Gaussian smoothing of the draws; its mean on them is 1.

    Off the draws :math:`\hat\pi` falls to zero and :math:`\rho` would grow without bound: it is kept within its range
    on the draws.
    """

    keys: Tensor  # draws in units of the pilot bandwidth, (M, k)
    log_weights: Tensor  # (M,)
    exponent: float
    offset: float = 0.0
    bounds: tuple[float, float] = (0.0, math.inf)

    def __call__(self, query: Tensor) -> Tensor:
        """Scale of the bandwidth at points ``(C, k)`` in the units of the keys. Shape ``(C,)``."""
        size = max(1, CHUNK_ELEMENTS // len(self.keys))
        parts = [torch.logsumexp(log_affinity(q, self.keys) + self.log_weights, dim=1) for q in query.split(size)]
        return (self.exponent * torch.cat(parts) + self.offset).exp().clamp(*self.bounds)

    @staticmethod
    def fit(keys: Tensor, weights: Tensor, exponent: float) -> "VariableBandwidth":
        """The pilot whose scale has weighted mean 1 on the draws."""
        raw = VariableBandwidth(keys, weights.log(), exponent)(keys)
        scale = raw / (weights * raw).sum()
        kept = scale[weights > 0]
        offset = -float((weights * raw).sum().log())
        return VariableBandwidth(keys, weights.log(), exponent, offset, (float(kept.min()), float(kept.max())))


@dataclass(frozen=True)
class Dynamics:
    """Transition law and options of a scheme's steps. ``y``: contexts of the rows in units of their bandwidth, or None.

    Attributes:
        law: Transition law; keys are (context, z), each in units of its bandwidth; values are z.
        epsilon: Reference variance over one unit of time.
        step_size: Time of one step; 1 is matched to the bandwidth.
        factor: Lower-triangular G, sampler diffusion in whitened coordinates; None is the identity.
        pilot: Variable bandwidth, or None; with ``pilot_units``, the factor from the law's keys to the pilot's, an
            axis each.
        score: Gradient of a log likelihood with respect to z, added by the split step; or None.
    """

    law: Transitions
    epsilon: float
    step_size: float = 1.0
    factor: Tensor | None = None
    pilot: VariableBandwidth | None = None
    pilot_units: Tensor | None = None
    score: Callable[[Tensor], Tensor] | None = None

    def query(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Rows in the units of the law's keys."""
        z = z / math.sqrt(self.epsilon)
        return z if y is None else torch.cat([y, z], dim=-1)

    def scale(self, query: Tensor) -> Tensor | None:
        """Variable bandwidth at a query, or None."""
        return None if self.pilot is None or self.pilot_units is None else self.pilot(query * self.pilot_units)

    def mean(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Conditional mean m(z). Shape ``(C, d)``."""
        query = self.query(z, y)
        return self.law.mean(query, self.scale(query))

    def moments(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Conditional mean and covariance. Shapes ``(C, d)`` and ``(C, d, d)``."""
        query = self.query(z, y)
        return self.law.moments(query, self.scale(query))

    def diffuse(self, direction: Tensor) -> Tensor:
        """G G^T applied to rows."""
        return direction if self.factor is None else direction @ self.factor @ self.factor.mT

    def colour(self, noise: Tensor) -> Tensor:
        """G applied to rows."""
        return noise if self.factor is None else noise @ self.factor.mT

    def pull(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """f(z): the mean itself where step and diffusion are the matched ones."""
        mean = self.mean(z, y)
        if self.step_size == 1 and self.factor is None:
            return mean
        return z + self.step_size * self.diffuse(mean - z)

    def noise_variance(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Variance of a step's noise along each whitened axis, before G. Shape ``(C, 1)``."""
        scale = self.scale(self.query(z, y))
        variance = z.new_full((len(z),), self.step_size * self.epsilon)
        return (variance if scale is None else variance * scale)[:, None]

    def kick(self, z: Tensor, y: Tensor | None, noise: Tensor, share: float = 1.0) -> Tensor:
        """g(z) noise, with a share of the variance. Shape ``(C, d)``."""
        return (share * self.noise_variance(z, y)).sqrt() * self.colour(noise)

    def push(self, z: Tensor, y: Tensor | None = None) -> Tensor | float:
        """Displacement by a likelihood's gradient in one step; 0 without one."""
        if self.score is None:
            return 0.0
        return 0.5 * self.noise_variance(z, y) * self.diffuse(self.score(z))

    def log_step(self, end: Tensor, start: Tensor, y: Tensor | None = None) -> Tensor:
        """Log density of the plain step from ``start`` to ``end``, for the whitened volume. Shape ``(C,)``."""
        residual, log_det = end - self.pull(start, y), 0.0
        if self.factor is not None:
            residual = torch.linalg.solve_triangular(self.factor, residual.mT, upper=False).mT
            log_det = float(self.factor.diagonal().log().sum())
        variance = self.noise_variance(start, y)[:, 0]
        dim = end.shape[-1]
        return -0.5 * (residual.square().sum(-1) / variance + dim * (2 * math.pi * variance).log()) - log_det


Scheme = Callable[[Dynamics, Tensor, Tensor | None, Tensor], Tensor]


def plain(dynamics: Dynamics, z: Tensor, y: Tensor | None, noise: Tensor) -> Tensor:
    """Mean, then noise: the one scheme whose steps have a density."""
    return dynamics.pull(z, y) + dynamics.kick(z, y, noise[0])


def split_step(dynamics: Dynamics, z: Tensor, y: Tensor | None, noise: Tensor) -> Tensor:
    """Noise (and a likelihood's gradient, if any), then mean."""
    return dynamics.pull(z + dynamics.kick(z, y, noise[0]) + dynamics.push(z, y), y)


def strang(dynamics: Dynamics, z: Tensor, y: Tensor | None, noise: Tensor) -> Tensor:
    """Half the noise, mean, half the noise: second order. Not in the papers."""
    mean = dynamics.pull(z + dynamics.kick(z, y, noise[0], 0.5), y)
    return mean + dynamics.kick(mean, y, noise[1], 0.5)


def data_aware(dynamics: Dynamics, z: Tensor, y: Tensor | None, noise: Tensor) -> Tensor:
    """Mean, then noise of the bridge's own conditional covariance, with a ridge where that is singular."""
    mean, covariance = dynamics.moments(z, y)
    step = (_root(covariance, dynamics.epsilon) @ noise[0][..., None])[..., 0]
    step = math.sqrt(dynamics.step_size) * dynamics.colour(step)
    return z + dynamics.step_size * dynamics.diffuse(mean - z) + step


def _root(covariance: Tensor, epsilon: float) -> Tensor:
    """Square roots of covariances, with a ridge of 1e-8 epsilon (float64); by eigenvalues where that fails."""
    dtype, device, dim = covariance.dtype, covariance.device, covariance.shape[-1]
    ridge = math.sqrt(torch.finfo(dtype).eps) * epsilon * torch.eye(dim, dtype=dtype, device=device)
    root, info = torch.linalg.cholesky_ex(covariance + ridge)
    failed = info > 0
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(covariance[failed])
        root[failed] = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return root


SCHEMES: dict[str, Scheme] = {"plain": plain, "split-step": split_step, "strang": strang, "data-aware": data_aware}
NOISES = {"strang": 2}  # normal vectors that a step takes; 1 where not named


@dataclass(frozen=True)
class SmoothedDraws:
    r"""The mixture of the draws' neighbourhoods that chains start from.

    .. math:: p_0(z | y) = \sum_j \pi_j(y)\, N(z; z_j, \sigma_j^2 I), \quad \pi_j(y) \propto w_j\, e^{-|y - y_j|^2 / 2}.

    Attributes:
        points: Centres :math:`z_j`. Shape ``(M, d)``.
        log_weights: Shape ``(M,)``.
        variance: :math:`\sigma_j^2`. Shape ``(M,)``.
        context: Contexts :math:`y_j` in units of their bandwidth, or None. Shape ``(M, k)``.
    """

    points: Tensor
    log_weights: Tensor
    variance: Tensor
    context: Tensor | None = None

    def sample(self, num: int, y: Tensor | None) -> Tensor:
        """Draws, a row of context each. Shape ``(num, d)``."""
        if y is None:
            index = torch.multinomial(self.log_weights.exp(), num, replacement=True)
        else:
            index = torch.cat([torch.multinomial(self._mixture(part).exp(), 1)[:, 0] for part in y.split(self._rows)])
        centre = self.points[index]
        return centre + self.variance[index, None].sqrt() * torch.randn_like(centre)

    def log_prob(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Log density with respect to the whitened volume. Shape ``(C,)``."""
        contexts = [None] * len(z.split(self._rows)) if y is None else y.split(self._rows)
        return torch.cat([self._log_prob(part, row) for part, row in zip(z.split(self._rows), contexts)])

    def _log_prob(self, z: Tensor, y: Tensor | None) -> Tensor:
        log_normal = log_affinity(z, self.points, self.variance.new_zeros(len(z)), 2 * self.variance)
        log_normal = log_normal - 0.5 * z.shape[1] * (2 * math.pi * self.variance).log()
        mixture = self.log_weights if y is None else self._mixture(y)
        return torch.logsumexp(log_normal + mixture, dim=1)

    def _mixture(self, y: Tensor) -> Tensor:
        return torch.log_softmax(log_affinity(y, self.context) + self.log_weights, dim=1)  # type: ignore[arg-type]

    @property
    def _rows(self) -> int:
        return max(1, CHUNK_ELEMENTS // len(self.points))


def smoothed_draws(law: Transitions, weights: Tensor, epsilon: float, context_dim: int) -> SmoothedDraws:
    """The draws, each smoothed by half a step of noise."""
    variance = torch.full_like(weights, 0.5 * epsilon)
    variance = variance if law.scale is None else variance * law.scale
    context = (law.keys + law.centre)[:, :context_dim] if context_dim else None
    return SmoothedDraws(law.values, weights.log(), variance, context)


def walk(dynamics: Dynamics, scheme: str, z: Tensor, y: Tensor | None, num_steps: int) -> Iterator[Tensor]:
    """States after each of ``num_steps`` steps from ``z``. Shapes ``(C, d)``."""
    step, noises = SCHEMES[scheme], NOISES.get(scheme, 1)
    for _ in range(num_steps):
        z = step(dynamics, z, y, torch.randn(noises, *z.shape, dtype=z.dtype, device=z.device))
        yield z


def end_of_walk(dynamics: Dynamics, scheme: str, z: Tensor, y: Tensor | None, num_steps: int) -> Tensor:
    """The last state of a walk. Shape ``(C, d)``."""
    return deque(walk(dynamics, scheme, z, y, num_steps), maxlen=1)[0]


def log_path_ratio(dynamics: Dynamics, states: Tensor, y: Tensor | None) -> Tensor:
    r"""Log density of plain steps forwards, less that of the same steps walked backwards.

    .. math:: \sum_k \log F(z_{k+1} | z_k) - \log B(z_k | z_{k+1}), \qquad B = F.

    Any normalised B makes the weight exact; the plain chain is nearly reversible (on Gaussians exactly), so its own
    step is a good one.

    Args:
        dynamics: Of the bridge.
        states: Paths. Shape ``(num_steps + 1, C, d)``.
        y: Context of each path, or None. Shape ``(C, k)``.

    Returns:
        Shape ``(C,)``.
    """
    total = states.new_zeros(states.shape[1])
    for start, end in zip(states[:-1], states[1:]):
        total = total + dynamics.log_step(end, start, y) - dynamics.log_step(start, end, y)
    return total
