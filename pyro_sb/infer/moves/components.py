r"""Regions of a frozen mixture's components, :math:`r_k(x) = w_k \rho_k(x) / \rho(x)`, their factors inverted once."""

import torch
from torch import Tensor

from pyro_sb.ops.leapfrog import SharedFactors
from pyro_sb.ops.student_mixture import StudentMixture, student_log_density, tail_weight

__all__ = ["Components"]

COPIED = 2**18
"""Numbers that copies of factors, one a row, may hold: above it products run component by component."""


class Components:
    """Whitened coordinates, responsibilities and metrics of a mixture that no longer changes.

    Args:
        mixture: The mixture.

    Attributes:
        log_det: Log determinants of the factors. Shape ``(K,)``.
    """

    def __init__(self, mixture: StudentMixture) -> None:
        self.mixture = mixture
        trils = mixture.scale_trils
        eye = torch.eye(trils.shape[-1], dtype=trils.dtype, device=trils.device)
        self.inverse = torch.linalg.solve_triangular(trils, eye.expand_as(trils), upper=False)
        self.offset = torch.einsum("kij,kj->ki", self.inverse, mixture.locs)
        self.log_det = trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def whiten(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Coordinates :math:`L_k^{-1} (x - m_k)`, ``(C, K, d)``, and log responsibilities ``(C, K)``."""
        white, _, log_share = self._parts(x)
        return white, log_share

    def draw(self, x: Tensor) -> Tensor:
        """A component for each row, by responsibility. ``(C, d)`` to ``(C,)``."""
        return torch.multinomial(self._parts(x)[2].exp(), 1).squeeze(-1)

    def share_and_score(self, x: Tensor, component: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log r_k(x)` and its gradient, of one component a row: ``(C,)`` and ``(C, d)``.

        .. math:: \nabla \log r_k = \sum_l (\delta_{kl} - r_l) \nabla \log \rho_l
        """
        white, squared, log_share = self._parts(x)
        pull = log_share.exp()
        pull[torch.arange(len(x), device=x.device), component] -= 1.0
        pull = pull * tail_weight(squared, self.mixture.df, x.shape[-1])
        score = (pull[..., None] * white).flatten(1) @ self.inverse.flatten(0, 1)
        return log_share.gather(1, component[:, None])[:, 0], score

    def factors(self, component: Tensor) -> Tensor | SharedFactors:
        """Factors of the components of the rows ``(C,)``: one for all, copies, or by index where copies are large."""
        trils = self.mixture.scale_trils
        if len(trils) == 1:
            return trils[0]
        large = len(component) * trils[0].numel() > COPIED
        return SharedFactors(trils, component) if large else trils[component]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        white = torch.addmm(-self.offset.flatten(), x, self.inverse.flatten(0, 1).T).view(len(x), *self.offset.shape)
        squared = white.square().sum(-1)
        log_density = student_log_density(squared, self.mixture.df, x.shape[-1]) - self.log_det
        return white, squared, torch.log_softmax(self.mixture.log_weights + log_density, -1)
