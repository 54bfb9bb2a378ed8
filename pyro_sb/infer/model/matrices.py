r"""Bijections from vectors to triangular and positive definite matrices, for which torch has none from R^n."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["CholeskyVector", "PositiveDefiniteVector"]


class CholeskyVector(Transform):
    r"""A vector of :math:`d (d + 1) / 2` numbers, row by row, to a lower triangular matrix with a positive diagonal.

    .. math:: L_{ii} = \exp(u_{ii}), \quad \log |\partial L / \partial u| = \sum_i u_{ii}.

    Example:
        >>> CholeskyVector()(torch.tensor([0.0, 2.0, 0.0]))
        tensor([[1., 0.],
                [2., 1.]])
    """

    domain = constraints.real_vector
    codomain: constraints.Constraint = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def _call(self, u: Tensor) -> Tensor:
        return lower(u, torch.exp)

    def _inverse(self, matrix: Tensor) -> Tensor:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).log()
        matrix = matrix.tril(-1) + torch.diag_embed(diagonal)
        rows, columns = torch.tril_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
        return matrix[..., rows, columns]

    def log_abs_det_jacobian(self, u: Tensor, matrix: Tensor) -> Tensor:
        """Shape ``(*batch,)``."""
        return log_diagonal(u).sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """``(*batch, d (d + 1) / 2)`` to ``(*batch, d, d)``."""
        return torch.Size((*shape[:-1], side(shape[-1]), side(shape[-1])))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """``(*batch, d, d)`` to ``(*batch, d (d + 1) / 2)``."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class PositiveDefiniteVector(CholeskyVector):
    r"""The same vector to :math:`L L^\top`.

    .. math:: \log |\partial L L^\top / \partial u| = d \log 2 + \sum_{i=1}^d (d - i + 2) u_{ii}.

    Example:
        >>> PositiveDefiniteVector()(torch.tensor([0.0, 2.0, 0.0]))
        tensor([[1., 2.],
                [2., 5.]])
    """

    codomain: constraints.Constraint = constraints.positive_definite

    def _call(self, u: Tensor) -> Tensor:
        factor = super()._call(u)
        return factor @ factor.mT

    def _inverse(self, matrix: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(matrix))

    def log_abs_det_jacobian(self, u: Tensor, matrix: Tensor) -> Tensor:
        """Shape ``(*batch,)``."""
        diagonal = log_diagonal(u)
        dim = diagonal.shape[-1]
        powers = torch.arange(dim + 1, 1, -1, dtype=u.dtype, device=u.device)
        return dim * math.log(2.0) + (powers * diagonal).sum(-1)


def side(length: int) -> int:
    """Rows of a triangular matrix with so many entries."""
    return (math.isqrt(8 * length + 1) - 1) // 2


def log_diagonal(u: Tensor) -> Tensor:
    """Entries of the diagonal. ``(*, d (d + 1) / 2)`` to ``(*, d)``."""
    steps = torch.arange(1, side(u.shape[-1]) + 1, device=u.device)
    return u[..., steps * (steps + 1) // 2 - 1]


def lower(u: Tensor, diagonal: Any) -> Tensor:
    """The lower triangular matrix of a vector, its diagonal mapped; without writing in place, for vmap."""
    dim = side(u.shape[-1])
    rows, columns = torch.tril_indices(dim, dim, device=u.device)
    places = torch.zeros(dim, dim, dtype=torch.long, device=u.device)
    places[rows, columns] = torch.arange(len(rows), device=u.device)
    matrix = u[..., places.flatten()].reshape(*u.shape[:-1], dim, dim)
    on = torch.eye(dim, dtype=torch.bool, device=u.device)
    below = torch.ones(dim, dim, dtype=torch.bool, device=u.device).tril(-1)
    return torch.where(on, diagonal(torch.where(on, matrix, 0.0)), torch.where(below, matrix, 0.0))
