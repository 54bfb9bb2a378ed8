r"""Gaussian-mixture Schrödinger potential :math:`v = \sum_j a_j N(r_j, \epsilon S_j)`, finite at both ends of time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.log_quadratic import LogSumQuadratic, covariance_factor

LAST_TIME, NUM_TIMES = 0.99, 32  # of bridge matching: the papers' cut, and the times that a minibatch shares


class MixturePotential(NamedTuple):
    r"""Adjusted Schrödinger potential :math:`v(y) = \sum_j a_j N(y;\, r_j, \epsilon S_j)` of a Brownian reference.

    It makes the plan a mixture, :math:`\pi(y_1 | y_0) = v(y_1) \exp(\langle y_0, y_1 \rangle / \epsilon) / c(y_0)`,
    and with :math:`h_1 = \exp(|y|^2 / 2 \epsilon)\, v`, :math:`h_t = h_1 * N(0, \epsilon (1 - t) I)` and
    :math:`D_j = (1 - t) I + t S_j`, up to one constant for all t,

    .. math:: \log h_t(y) = \log \sum_j \exp\Big\{\log a_j - \tfrac12 \log\det D_j + \tfrac{1}{2 \epsilon}
        \big[-t\, r_j^\top D_j^{-1} r_j + 2 r_j^\top D_j^{-1} y + y^\top (S_j - I) D_j^{-1} y\big]\Big\} .

    :math:`D_j` is positive definite on all of [0, 1]: no term explodes at t = 1. The drift is
    :math:`s(t, y) = \epsilon \nabla \log h_t(y)`.

    Args:
        log_weights: :math:`\log a_j`; they need not sum to one. Shape ``(*B, J)``.
        locs: :math:`r_j`. Shape ``(*B, J, d)``.
        scales: :math:`S_j`, positive definite: diagonals ``(*B, J, d)``, or matrices ``(*B, J, d, d)``.
        epsilon: Variance of the reference over [0, 1], positive.

    References:
        Light Schrödinger Bridge (Korotin, Gushchin and Burnaev, 2024), https://arxiv.org/abs/2310.01174, section 3. The
        regular form of the potential is derived here; the papers write a ratio that explodes as t tends to 1.

    Example:
        >>> potential = MixturePotential(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2), 1.0)
        >>> potential.drift(1.0, torch.ones(1, 2)).abs().max()  # the end of a Brownian motion: no drift at all
        tensor(0.)
    """

    log_weights: Tensor
    locs: Tensor
    scales: Tensor
    epsilon: float

    @property
    def diagonal(self) -> bool:
        """Whether covariances are diagonal."""
        return self.scales.dim() == self.locs.dim()

    def at(self, t: Tensor | float) -> LogSumQuadratic:
        r"""The function :math:`\log h_t`. A tensor t leads with the batch ``*B`` of potentials."""
        t = torch.as_tensor(t, dtype=self.locs.dtype, device=self.locs.device)
        t_vector, t_matrix = t[..., None, None], t[..., None, None, None]
        if self.diagonal:
            spread = (1 - t_vector) + t_vector * self.scales
            pulled = self.locs / spread
            quadratic, log_det = (self.scales - 1) / spread, spread.log().sum(-1)
        else:
            eye = torch.eye(self.locs.shape[-1], dtype=self.locs.dtype, device=self.locs.device)
            factor = covariance_factor((1 - t_matrix) * eye + t_matrix * self.scales)
            inverse = torch.cholesky_inverse(factor)
            pulled = (inverse @ self.locs[..., None])[..., 0]
            quadratic = (self.scales - eye) @ inverse
            quadratic = 0.5 * (quadratic + quadratic.mT)
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        energy = (self.locs * pulled).sum(-1)
        constant = self.log_weights - 0.5 * log_det - t[..., None] * energy / (2 * self.epsilon)
        return LogSumQuadratic(constant, pulled / self.epsilon, quadratic / self.epsilon)

    def normaliser(self) -> LogSumQuadratic:
        r"""The function :math:`\log c(y_0)`, which normalises the plan from :math:`y_0`."""
        return LogSumQuadratic(self.log_weights, self.locs / self.epsilon, self.scales / self.epsilon)

    def adjusted(self) -> LogSumQuadratic:
        r"""The function :math:`\log v(y_1)`, with its normaliser."""
        if self.diagonal:
            precision, log_det = 1 / self.scales, self.scales.log().sum(-1)
            pulled = self.locs * precision
        else:
            factor = covariance_factor(self.scales)
            precision, log_det = torch.cholesky_inverse(factor), 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            pulled = (precision @ self.locs[..., None])[..., 0]
        constant = self.log_weights - 0.5 * (log_det + (self.locs * pulled).sum(-1) / self.epsilon)
        constant = constant - 0.5 * self.locs.shape[-1] * math.log(2 * math.pi * self.epsilon)
        return LogSumQuadratic(constant, pulled / self.epsilon, -precision / self.epsilon)

    def drift(self, t: Tensor | float, y: Tensor) -> Tensor:
        r"""Drift :math:`s(t, y) = \epsilon \nabla \log h_t(y)`. Shape of ``y``, ``(*B, m, d)``."""
        return self.epsilon * self.at(t).gradient(y)

    def plan_log_prob(self, y1: Tensor, y0: Tensor) -> Tensor:
        r"""Log density of the plan :math:`\pi(y_1 | y_0)`. ``(*B, m, d)`` twice to ``(*B, m)``."""
        inner = (y0 * y1).sum(-1) / self.epsilon
        return self.adjusted().value(y1) + inner - self.normaliser().value(y0)

    def plan_sample(self, y0: Tensor) -> Tensor:
        r"""One draw of :math:`\sum_j w_j(y_0) N(r_j + S_j y_0, \epsilon S_j)` from each point. Shape of ``y0``."""
        gates = self.normaliser().gates(y0)
        try:
            index = torch.multinomial(gates.flatten(0, -2), 1).view(gates.shape[:-1])
        except RuntimeError:
            raise RuntimeError(
                "shares of a mixture must be numbers, got NaN or infinity: a point or a context is too far from those "
                "of the fit for its dtype. Check them, or fit in float64."
            ) from None
        noise = math.sqrt(self.epsilon) * torch.randn_like(y0)
        locs = _pick(self.locs, index)
        if self.diagonal:
            scales = _pick(self.scales, index)
            return locs + scales * y0 + scales.sqrt() * noise
        factors = _pick(covariance_factor(self.scales), index)
        pulled = (factors.mT @ y0[..., None]) + noise[..., None]  # S y0 + L z = L (L^T y0 + z)
        return locs + (factors @ pulled)[..., 0]

    def plan_components(self, y0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The plan from one point ``(d,)`` as a mixture: log weights ``(J,)``, means ``(J, d)``, covariances.

        For a potential without a batch; covariances are diagonals where S is.
        """
        log_gates = torch.log_softmax(self.normaliser().terms(y0[None])[0], -1)
        shift = self.scales * y0 if self.diagonal else (self.scales @ y0[:, None])[..., 0]
        return log_gates, self.locs + shift, self.epsilon * self.scales

    def plan_moments(self, y0: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and covariance of the plan from each point. Shapes ``(*B, m, d)`` and ``(*B, m, d, d)``."""
        mean, hessian = self.normaliser().gradient_and_hessian(y0)  # cumulants: gradient and Hessian of log c
        return self.epsilon * mean, self.epsilon * self.epsilon * hessian


def likelihood_loss(
    potential: MixturePotential, y0: Tensor, y1: Tensor, weights0: Tensor | None = None, weights1: Tensor | None = None
) -> Tensor:
    r"""Likelihood loss :math:`E \log c(y_0) - E \log v(y_1)` under equal or given weights of the rows."""
    log_c, log_v = potential.normaliser().value(y0), potential.adjusted().value(y1)
    return weighted_mean(log_c, weights0) - weighted_mean(log_v, weights1)


def matching_loss(potential: MixturePotential, y0: Tensor, y1: Tensor) -> Tensor:
    r"""Matching loss :math:`\tfrac{1}{2 \epsilon} \int_0^{.99} E | s(t, y_t) - (y_1 - y_t) / (1 - t) |^2 dt`.

    On Brownian bridges between rows ``(n, dim)`` as they are paired; a batched potential has one a row. Up to a
    constant and the cut it is the likelihood loss, with noise.
    """
    y0 = y0.expand_as(y1) if len(y0) == 1 else y0
    if potential.log_weights.dim() > 1:
        groups, y0, y1 = len(y0), y0[:, None], y1[:, None]
    else:
        many = potential.diagonal or y0.shape[-1] <= 32  # a time costs J factorisations where matrices are full
        groups = min(NUM_TIMES if many else NUM_TIMES // 4, len(y0))
        size = len(y0) // groups
        y0, y1 = (y[: groups * size].unflatten(0, (groups, size)) for y in (y0, y1))
    strata = torch.randperm(groups, device=y0.device) + torch.rand(groups, dtype=y0.dtype, device=y0.device)
    t = LAST_TIME * strata / groups
    times = t[:, None, None]
    yt = (1 - times) * y0 + times * y1 + (potential.epsilon * times * (1 - times)).sqrt() * torch.randn_like(y0)
    slope = (y1 - yt) / (1 - times)
    return LAST_TIME * (potential.drift(t, yt) - slope).square().sum(-1).mean() / (2 * potential.epsilon)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over all entries, or their sum by weights ``(n,)``."""
    return values.mean() if weights is None else weights / weights.sum() @ values.flatten()


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Entries of ``(*B, J, *event)`` by component ``(*B, m)``; result ``(*B, m, *event)``."""
    axis = index.dim() - 1
    event = values.shape[axis + 1 :]
    index = index.reshape(*index.shape, *[1] * len(event)).expand(*index.shape, *event)
    return torch.gather(values, axis, index)
