r"""Coordinates in which a bent or opening target is straight: :math:`z_i = m_i(z_c) + e^{b_i z_c} u_i`."""

from typing import Any

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.population import Population

__all__ = ["Sheared", "sheared"]

GAIN = 0.5  # nats that the map must gain over a linear one
LEAST = 0.05  # nats that a coordinate must gain to be mapped
REACH = 8.0  # sds of the coordinate that the others follow, beyond which they follow no more
LARGEST_DIM = 64
ROUNDS = 6


class Sheared:
    r"""Map between a target's vector z and the vector u of coordinates that follow one of them, c.

    .. math:: z_c = u_c, \qquad z_i = m_i(t) + e^{b_i t} u_i, \quad t = (z_c - \mu) / \sigma \text{ cut at eight}

    with quadratic :math:`m_i`: one coupling layer of a flow, in which a banana is straight and a funnel a cylinder.
    Densities in u carry the Jacobian, so that chains in u, mapped to z, target the same law.

    Args:
        centred: Log joint of z.
        column: c.
        place: :math:`\mu, \sigma`. Shape ``(2,)``.
        bend: Coefficients of :math:`m_i` in 1, t and its square; zeros for c. Shape ``(3, d)``.
        slopes: :math:`b_i`; zero for c. Shape ``(d,)``.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), equations 4 and 5, https://arxiv.org/abs/1605.08803
    """

    def __init__(self, centred: LogJoint, column: int, place: Tensor, bend: Tensor, slopes: Tensor) -> None:
        self.centred, self.column, self.place, self.bend, self.slopes = centred, column, place, bend, slopes
        self.sites = [name for name, shape in centred.site_shapes.items() if shape.numel()]
        self.log_joint = LogJoint.from_batched(self._log_density, centred.dim, device=centred.device)

    def forward(self, u: Tensor) -> Tensor:
        """``(*batch, dim)`` to ``(*batch, dim)``: the target's vector z at u."""
        mean, log_scale = self._moments(u)
        return mean + log_scale.exp() * u

    def inverse(self, z: Tensor) -> Tensor:
        """``(*batch, dim)`` to ``(*batch, dim)``: the vector u at z."""
        mean, log_scale = self._moments(z)
        return (z - mean) * (-log_scale).exp()

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = ((x[..., self.column] - self.place[0]) / self.place[1]).clamp(-REACH, REACH)[..., None]
        return self.bend[0] + self.bend[1] * t + self.bend[2] * t.square(), self.slopes * t

    def _log_density(self, u: Tensor) -> Tensor:
        value: Tensor = Evaluated.apply(self.forward(u), self.centred)
        return value + self._moments(u)[1].sum(-1)


class Evaluated(torch.autograd.Function):
    """A log joint whose gradient is the one that it knows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, joint: LogJoint) -> Tensor:
        """``(C, dim)`` to ``(C,)``."""
        if not ctx.needs_input_grad[0]:
            return joint.log_prob(z)
        value, grad = joint.value_and_grad(z)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """Of the sum of the values."""
        return grads[0][:, None] * ctx.saved_tensors[0], None


def sheared(joint: LogJoint, population: Population) -> Sheared | None:
    r"""The map that gains most over a linear one on a population's draws; None if that is under half a nat.

    For every c, weighted least squares of the other coordinates on 1, t and its square, and of the logarithms of the
    squared residuals on t, in turns, from the distances to the median on. The gain of a coordinate is that of its log
    residual sd, which is the normal log density's as t has mean 0.
    """
    dim = joint.dim
    if not 2 <= dim <= LARGEST_DIM:
        return None
    points, weights = population.distinct()
    mean = weights @ points
    sd = (weights @ (points - mean).square()).sqrt()
    if not bool((sd > 0).all()):
        return None
    x, best = (points - mean) / sd, (GAIN, -1)
    fits: dict[int, tuple[Tensor, Tensor]] = {}
    for c in range(dim):
        bend, slopes, gain = _followed(x, weights, c)
        fits[c] = bend, slopes
        best = max(best, (float(gain.sum()), c))
    c = best[1]
    if c < 0:
        return None
    bend, slopes = fits[c]
    bend = bend * sd
    follows = (bend[1:].abs().sum(0) > 0) | (slopes != 0)
    bend[0] = torch.where(follows, bend[0] + mean, 0.0)
    return Sheared(joint, c, torch.stack([mean[c], sd[c]]), bend, slopes)


def _followed(x: Tensor, weights: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients ``(3, d)``, slopes ``(d,)`` and gains in nats ``(d,)`` of coordinates that follow c."""
    t = x[:, c].clamp(-REACH, REACH)
    design = torch.stack([torch.ones_like(t), t, t.square()], 1)
    linear = _least_squares(design[:, :2], x, weights[:, None].expand_as(x))
    plain = (weights @ (x - design[:, :2] @ linear).square()).clamp_min(1e-12)
    order = x.argsort(0)
    half = (weights[order].cumsum(0) < 0.5).sum(0, keepdim=True).clamp_max(len(x) - 1)
    residual = x - x.gather(
        0, order.gather(0, half)
    )  # least squares would bury a narrow end under the wide one's noise
    for _ in range(ROUNDS):
        size = 0.5 * (residual.square() + 1e-12).log()
        slopes = _least_squares(design[:, :2], size, weights[:, None].expand_as(x))[1].clamp(-4.0, 4.0)
        scale = (slopes * t[:, None]).exp()
        bend = _least_squares(design, x, weights[:, None] / scale.square())
        residual = x - design @ bend
    gain = 0.5 * (plain / (weights @ (residual / scale).square()).clamp_min(1e-12)).log() - slopes * (weights @ t)
    kept = (gain > LEAST) & (torch.arange(len(gain), device=gain.device) != c)
    return torch.where(kept, bend, 0.0), torch.where(kept, slopes, 0.0), torch.where(kept, gain, 0.0)


def _least_squares(design: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Weighted, a set of weights for each column: ``(n, k)``, ``(n, d)`` and ``(n, d)`` to ``(k, d)``."""
    gram = torch.einsum("nk,nd,nl->dkl", design, weights, design)
    right = torch.einsum("nk,nd->dk", design, weights * y)
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(design.shape[1]).to(gram)
    return torch.linalg.solve(gram + ridge, right[..., None])[..., 0].T
