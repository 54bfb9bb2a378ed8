"""Law q(u | y) of a model's unconstrained latents: a conditional bridge on whitened residuals of a regression on y."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, SigmoidTransform

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.light.laws import FixedMixture
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.distributions import Draws
from pyro_sb.fingerprint import fingerprint
from pyro_sb.ops.regression import regress

__all__ = ["GuideLaw", "LatentLaw", "Residuals", "from_probit", "is_logit", "log_slope", "to_probit"]

LARGEST = 600.0  # logits beyond it have no float64 probability


@dataclass
class Residuals:
    r"""Latents as whitened residuals of an affine regression on features.

    .. math:: r = L^{-1} (t - W^\top (1, f)), \qquad t = u \text{ or } \Phi^{-1}(\sigma(u))

    Args:
        bounded: Which coordinates are logits of an interval; they become probits. Shape ``(d,)``.
        weights: W. Shape ``(F + 1, d)``.
        factor: L, the Cholesky factor of the residuals' covariance. Shape ``(d, d)``.
    """

    bounded: Tensor
    weights: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, latents: Tensor, features: Tensor, bounded: Tensor, judged: Tensor) -> "Residuals":
        r"""Ridge regression by generalised cross-validation, and the covariance of what it leaves.

        Copies with the same features count once, by their mean. Where held-out residuals vary more than those learnt
        from, the covariance is raised to them: many features and few simulations flatter themselves.

        Args:
            latents: R copies of N simulations. Shape ``(R, N, d)``.
            features: Of the observations, ``(N, F)``, or of each copy, ``(R, N, F)``.
            bounded: Which coordinates are logits. Shape ``(d,)``.
            judged: Which simulations are held out. Shape ``(N,)``.
        """
        normal = torch.where(bounded, to_probit(latents), latents)
        learnt, dim = ~judged, latents.shape[-1]
        target, rows = normal.mean(0)[learnt], features
        if features.dim() == 2:
            rows = features[learnt]
        else:
            target, rows = normal[:, learnt].reshape(-1, dim), features[:, learnt].flatten(0, 1)
        affine = regress(target, rows, rows.new_full((len(rows),), 1 / len(rows)))
        residual = normal - affine(features)
        own, others = residual[:, learnt].reshape(-1, dim), residual[:, judged].reshape(-1, dim)
        raised = (others.square().mean(0) / own.square().mean(0).clamp_min(1e-12)).clamp_min(1.0).sqrt()
        covariance = own.T.cov().reshape(dim, dim) * raised * raised[:, None]
        jitter = 1e-6 * covariance.diagonal().clamp_min(1e-12)
        weights = torch.cat([affine.location[None], affine.slope.T])
        return cls(bounded, weights, torch.linalg.cholesky(covariance + torch.diag(jitter)))

    def encode(self, u: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        r"""Residuals of latents, and :math:`\log |\partial r / \partial u|`. ``(*, d)`` and ``(*, F)``."""
        normal = torch.where(self.bounded, to_probit(u), u)
        white, log_scale = self.whitened(normal, features)
        slope = torch.where(self.bounded, log_slope(u), torch.zeros_like(u)).sum(-1)
        return white, slope + log_scale

    def whitened(self, normal: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        r"""Residuals of points t, and :math:`-\log\det L`. ``(*, d)`` and ``(*, F)``."""
        residual = normal - with_ones(features) @ self.weights
        white = torch.linalg.solve_triangular(self.factor, residual.reshape(-1, residual.shape[-1]).T, upper=False).T
        return white.reshape(residual.shape), -self.factor.diagonal().log().sum()

    def decode(self, residual: Tensor, features: Tensor) -> Tensor:
        """Latents of residuals. ``(*, d)`` and ``(*, F)`` to ``(*, d)``."""
        normal = self.coloured(residual, features)
        return torch.where(self.bounded, from_probit(normal), normal)

    def coloured(self, residual: Tensor, features: Tensor) -> Tensor:
        """Points t of residuals: the inverse of `whitened`. ``(*, d)`` and ``(*, F)`` to ``(*, d)``."""
        return residual @ self.factor.T + with_ones(features) @ self.weights

    def to(self, like: Tensor) -> "Residuals":
        """On another device, in another dtype."""
        return Residuals(self.bounded.to(like.device), self.weights.to(like), self.factor.to(like))


@dataclass
class LatentLaw:
    r"""A conditional bridge on the residuals: draws of u with the log density that corrects them.

    Args:
        bridge: Fitted on residuals, given contexts.
        residuals: Their coordinates.
        context: What the bridge is called on. Shape ``(B, C)``.
        features: Regressors of the affine map. Shape ``(B, F)``.
    """

    bridge: Bridge
    residuals: Residuals
    context: Tensor
    features: Tensor

    def word(self) -> str:
        """What tells it from other laws: a fingerprint of its bridge, coordinates, contexts and features."""
        residuals = self.residuals
        given = [self.context, self.features, residuals.bounded, residuals.weights, residuals.factor]
        return fingerprint(type(self.bridge).__name__, self.bridge.state_dict(), given)

    @property
    def marginal(self) -> bool:
        """Whether the density of a point is known; else that of its path."""
        return self.bridge.density == "marginal"

    @cached_property
    def fixed(self) -> FixedMixture | None:
        """The bridge at these contexts, its network asked once; None where it must be asked for every draw."""
        return self.bridge.fixed(self.context) if isinstance(self.bridge, MixtureBridge) else None

    def sample(self, num: int) -> Tensor:
        """Draws by the bridge's own sampler. Shape ``(num, B, d)``."""
        with torch.no_grad():
            law = self.fixed
            residual = self.bridge(self.context).sample((num,)) if law is None else law.sample(num)
            return self.residuals.decode(residual, self.features)

    def draws(self, num: int) -> Draws:
        """Draws with the log density that corrects them: of the point, or of its path. Shapes ``(num, B, ...)``."""
        with torch.no_grad():
            if self.fixed is None:
                residual, log_q = self.bridge(self.context).draws((num,))
            else:
                residual = self.fixed.sample(num)
                log_q = self.fixed.log_prob(residual)
            u = self.residuals.decode(residual, self.features)
            return Draws(u, log_q + self.residuals.encode(u, self.features)[1])

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of points, where the bridge has one. ``(*, B, d)`` to ``(*, B)``."""
        residual, slope = self.residuals.encode(u, self.features)
        law = self.fixed
        value = self.bridge(self.context).log_prob(residual) if law is None else law.log_prob(residual)
        return value + slope

    def path_log_prob(self, u: Tensor, num_paths: int = 1) -> Tensor:
        r"""The density of a point, or of a path drawn backwards from it; for more paths the log mean of their weights.

        One path is what a Metropolis step on paths needs. With many it is a lower bound of the density in the mean.
        """
        if self.marginal:
            return self.log_prob(u)
        with torch.no_grad():
            residual, slope = self.residuals.encode(u, self.features)
            shape = residual.shape[:-1]
            rows = residual.flatten(0, -2), self.context.expand(*shape, -1).flatten(0, -2)
            total = torch.stack([self.bridge.redraw_rows(*rows) for _ in range(num_paths)])
            return (total.logsumexp(0) - math.log(num_paths)).reshape(shape) + slope

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient. ``(*, B, d)`` to ``(*, B)`` and ``(*, B, d)``."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.log_prob(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad


def is_logit(transform: Transform) -> bool:
    """Whether Pyro's transform, constrained to unconstrained, is a logit of an interval."""
    inner = transform.inv
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    first = inner.parts[0] if isinstance(inner, ComposeTransform) and inner.parts else inner
    return isinstance(first, SigmoidTransform)


def to_probit(u: Tensor) -> Tensor:
    r"""Probits of logits, computed in float64 from the nearer tail.

    Example:
        >>> to_probit(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.6160])
    """
    wide = u.double().clamp(-LARGEST, LARGEST)
    tail = torch.special.ndtri(torch.sigmoid(torch.where(wide > 0, -wide, wide)))  # |u| has no slope at 0
    return torch.where(wide > 0, -tail, tail).to(u)


def from_probit(t: Tensor) -> Tensor:
    r"""Logits of probits, :math:`\log \Phi(t) - \log \Phi(-t)`."""
    wide = t.double()
    return (torch.special.log_ndtr(wide) - torch.special.log_ndtr(-wide)).to(t)


def log_slope(u: Tensor) -> Tensor:
    r""":math:`\log dt / du` at logits u."""
    wide = u.double().clamp(-LARGEST, LARGEST)
    t = torch.special.ndtri(torch.sigmoid(-wide.abs()))
    logistic = torch.nn.functional.logsigmoid(wide) + torch.nn.functional.logsigmoid(-wide)
    return (logistic + 0.5 * t.square() + 0.5 * math.log(2 * math.pi)).to(u)


def with_ones(features: Tensor) -> Tensor:
    """A column of ones before the features."""
    return torch.cat([torch.ones_like(features[..., :1]), features], -1)


class GuideLaw(TorchDistribution):
    """Law of the unconstrained latents at one observation, or at each row of a batch.

    Where the density of a point is unknown, ``log_prob`` answers for the last draw alone, by the density of its path:
    what ``Importance`` and the ELBO ask, and exact for them.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, law: LatentLaw, num_rows: int | None = None) -> None:
        self.law = law
        self._last: tuple[Tensor, Tensor] | None = None
        batch_shape = torch.Size([] if num_rows is None else [num_rows])
        super().__init__(batch_shape, law.residuals.weights.shape[1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "GuideLaw":
        """Refused but for its own rows: the joint site stands outside the model's plates."""
        if torch.Size(batch_shape) != self.batch_shape:
            raise NotImplementedError(
                f"a posterior's guide cannot stand in a plate, got {tuple(batch_shape)}. Call Predictive without "
                "parallel=True, or draw by posterior.sample(n)."
            )
        return self

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws. Shape ``(*sample_shape, *batch_shape, d)``."""
        value, log_q = self.law.draws(max(torch.Size(sample_shape).numel(), 1))
        shape = torch.Size(sample_shape) + self.batch_shape
        value, log_q = value.reshape(*shape, value.shape[-1]), log_q.reshape(shape)
        self._last = value, log_q
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a point; of the last draw where paths alone have one."""
        if self.law.marginal:
            return self.law.log_prob(value) if self.batch_shape else self.law.log_prob(value[..., None, :])[..., 0]
        if self._last is None or value.shape != self._last[0].shape or not torch.equal(value, self._last[0]):
            raise NotImplementedError(
                'this posterior knows the density of its own last draw alone, got another point. Use bridge="light".'
            )
        return self._last[1]
