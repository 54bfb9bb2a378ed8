"""Gaussian mixtures by the factors of their precisions: densities and draws without a factorisation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class FactorMixture(NamedTuple):
    r"""Batch of mixtures :math:`\sum_j w_j N(r_j, (P_j^\top P_j)^{-1})` with :math:`P_j = D_j (I + N_j)`.

    .. math:: \log N = \log\det D - \tfrac12 |D (I + N) (x - r)|^2 - \tfrac d2 \log 2\pi

    A network that gives D and N gives a density for a few products; nothing is factored, and nothing fails in float32.

    Args:
        log_weights: :math:`\log w_j`; they need not sum to one. Shape ``(n, J)``.
        locs: :math:`r_j`. Shape ``(n, J, d)``.
        log_diagonals: Logarithms of the diagonals :math:`D_j`. Shape ``(n, J, d)``.
        lower: :math:`N_j`, strictly lower triangular. Shape ``(n, J, d, d)``.

    Example:
        >>> locs = torch.zeros(1, 1, 2)
        >>> mixture = FactorMixture(torch.zeros(1, 1), locs, torch.zeros_like(locs), torch.zeros(1, 1, 2, 2))
        >>> mixture.log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    log_weights: Tensor
    locs: Tensor
    log_diagonals: Tensor
    lower: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of a point a row. ``(*, n, d)`` to ``(*, n)``."""
        offset = x[..., None, :] - self.locs
        if x.shape[-1] > 1:  # of one axis there is nothing below the diagonal
            offset = offset + (self.lower @ offset[..., None])[..., 0]
        white = self.log_diagonals.exp() * offset
        terms = torch.log_softmax(self.log_weights, -1) + self.log_diagonals.sum(-1) - 0.5 * white.square().sum(-1)
        return torch.logsumexp(terms, -1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def sample(self, num: int | None = None) -> Tensor:
        """One draw a row, ``(n, d)``; or ``num`` draws a row, ``(num, n, d)``."""
        count = 1 if num is None else num
        index = torch.multinomial(torch.softmax(self.log_weights, -1), count, replacement=True).T
        index = index[0] if num is None else index
        rows = torch.arange(len(self.locs), device=index.device)
        scales = (-self.log_diagonals[rows, index]).exp()
        scaled = torch.randn_like(scales) * scales
        solve = torch.linalg.solve_triangular  # it reads the lower half alone, and ones on the diagonal
        return (
            self.locs[rows, index]
            + solve(self.lower[rows, index], scaled[..., None], upper=False, unitriangular=True)[..., 0]
        )

    def covariances(self) -> Tensor:
        """Covariances of the components. Shape ``(n, J, d, d)``."""
        inverse = torch.linalg.solve_triangular(
            self.lower, torch.diag_embed((-self.log_diagonals).exp()), upper=False, unitriangular=True
        )
        return inverse @ inverse.mT
