"""Gaussian mixtures by the factors of their precisions: densities and draws without a factorisation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class FactorMixture(NamedTuple):
    r"""Batch of mixtures :math:`\sum_j w_j N(r_j, (P_j^\top P_j)^{-1})` with lower triangular :math:`P_j`.

    .. math:: \log N = \log\det P - \tfrac12 |P (x - r)|^2 - \tfrac d2 \log 2\pi

    A network that gives P gives a density for a few products; nothing is factored, and nothing fails in float32.

    Args:
        log_weights: :math:`\log w_j`; they need not sum to one. Shape ``(n, J)``.
        locs: :math:`r_j`. Shape ``(n, J, d)``.
        factors: :math:`P_j`, with a positive diagonal. Shape ``(n, J, d, d)``.

    Example:
        >>> mixture = FactorMixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.eye(2)[None, None])
        >>> mixture.log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    log_weights: Tensor
    locs: Tensor
    factors: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of a point a row. ``(n, d)`` to ``(n,)``."""
        white = (self.factors @ (x[:, None] - self.locs)[..., None])[..., 0]
        log_det = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        terms = torch.log_softmax(self.log_weights, -1) + log_det - 0.5 * white.square().sum(-1)
        return torch.logsumexp(terms, -1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def sample(self) -> Tensor:
        """One draw a row. Shape ``(n, d)``."""
        index = torch.multinomial(torch.softmax(self.log_weights, -1), 1)[:, 0]
        rows = torch.arange(len(index), device=index.device)
        noise = torch.randn_like(self.locs[:, 0])[..., None]
        return (
            self.locs[rows, index]
            + torch.linalg.solve_triangular(self.factors[rows, index], noise, upper=False)[..., 0]
        )

    def covariances(self) -> Tensor:
        """Covariances of the components. Shape ``(n, J, d, d)``."""
        eye = torch.eye(self.locs.shape[-1], dtype=self.locs.dtype, device=self.locs.device)
        inverse = torch.linalg.solve_triangular(self.factors, eye.expand_as(self.factors), upper=False)
        return inverse @ inverse.mT
