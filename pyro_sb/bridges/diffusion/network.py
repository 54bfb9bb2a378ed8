"""The two networks of a variational diffusion: the mean of the target given a noised state, and its covariance."""

import torch
from torch import Tensor, nn

from pyro_sb.nn import ResidualNet, embedding_size

FULL_UP_TO = 20  # dimensions with a full covariance


class DiffusionNet(nn.Module):
    r"""Denoiser and covariance head in normalised states, with the user's embedding of the context.

    The state is :math:`w = \cos\phi\, \zeta + \sin\phi\, \varepsilon` with the target's residual :math:`\zeta` and
    noise of unit variance; the mean net's goal is :math:`\sin\phi\, \zeta - \cos\phi\, \varepsilon`, of unit
    variance too. The head models the covariance of what the net misses, by a Cholesky factor of its precision.

    Args:
        dim: Size of the state.
        context_dim: Size of the context.
        hidden: Widths of the mean net.
        covariance_hidden: Widths of the head.
        embedding: The user's module from ``(n, context_dim)`` to ``(n, out_dim)``; None for the context itself.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        hidden: tuple[int, ...],
        covariance_hidden: tuple[int, ...],
        embedding: nn.Module | None,
    ) -> None:
        super().__init__()
        self.dim, self.full = dim, dim <= FULL_UP_TO
        self.embedding = embedding
        num_features = context_dim if embedding is None else embedding_size(embedding, context_dim)
        self.mean = ResidualNet(dim, dim, context_dim=num_features, hidden=hidden)
        below = dim * (dim - 1) // 2 if self.full else 0
        self.covariance = ResidualNet(dim, dim + below, context_dim=num_features, hidden=covariance_hidden)

    def reset(self) -> None:
        """New networks; the embedding stays as the user made it."""
        self.mean.reset()
        self.covariance.reset()

    def features(self, context: Tensor | None) -> Tensor | None:
        """Features of standardised contexts."""
        return context if context is None or self.embedding is None else self.embedding(context)

    def goal(self, time: Tensor, w: Tensor, basis: Tensor, features: Tensor | None) -> Tensor:
        """The mean net's answer in the eigenbasis; it sees and speaks the user's axes, so a turned basis is no break.

        Args:
            time: Place on the log-SNR scale, 0 at the source and 1 at the target. Shape ``()`` or ``(n,)``.
            w: Normalised states in the eigenbasis. Shape ``(n, dim)``.
            basis: Eigenvectors in columns. Shape ``(dim, dim)``.
            features: Shape ``(n, num_features)``.
        """
        return self.mean(time, w @ basis.T, features) @ basis

    def precision_factor(self, time: Tensor, w: Tensor, basis: Tensor, features: Tensor | None) -> Tensor:
        """Lower Cholesky factor ``(n, dim, dim)`` of the precision in units of the analytic one, or ``(n, dim)``."""
        out = self.covariance(time, w @ basis.T, features)
        diagonal = (4 * torch.tanh(out[..., : self.dim] / 4)).exp()
        if not self.full:
            return diagonal
        factor = torch.diag_embed(diagonal)
        row, column = torch.tril_indices(self.dim, self.dim, -1, device=out.device)
        factor[..., row, column] = out[..., self.dim :]
        return factor


def factor_loss(factor: Tensor, missed: Tensor) -> Tensor:
    """Minus the Gaussian log density of ``missed`` ``(n, dim)`` per dimension, up to a constant. Shape ``(n,)``."""
    if factor.dim() == missed.dim():
        whitened, log_scale = factor * missed, factor.log()
    else:
        whitened = (factor.mT @ missed[..., None])[..., 0]
        log_scale = factor.diagonal(dim1=-2, dim2=-1).log()
    return (0.5 * whitened.square() - log_scale).mean(-1)


def factor_covariance(factor: Tensor, scale: Tensor) -> Tensor:
    """Covariance ``(n, dim, dim)`` or variances ``(n, dim)`` of a precision's factor, each axis times ``scale``."""
    if factor.dim() == 2:
        return (scale / factor).square()
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False) * scale
    return inverse.mT @ inverse
