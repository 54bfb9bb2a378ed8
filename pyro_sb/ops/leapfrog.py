"""Batched Hamiltonian dynamics with a dense metric."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class SharedFactors(NamedTuple):
    r"""A matrix for each row c, ``matrices[which[c]]``, of few that rows share: products without copies of them.

    Attributes:
        matrices: Shape ``(K, d, d)``.
        which: Shape ``(C,)``.
    """

    matrices: Tensor
    which: Tensor

    @property
    def mT(self) -> "SharedFactors":
        """The transposed matrices."""
        return SharedFactors(self.matrices.mT, self.which)


class PhasePoint(NamedTuple):
    r"""Positions, whitened momenta, log densities and gradients of a batch of trajectories.

    The Hamiltonian is :math:`H(x, r) = -\log \pi(x) + |r|^2 / 2` with :math:`r = L^\top p` standard normal, so the
    mass matrix is :math:`(L L^\top)^{-1}` for the metric :math:`L L^\top`.
    """

    x: Tensor
    momentum: Tensor
    log_density: Tensor
    grad: Tensor

    @property
    def energy(self) -> Tensor:
        """Hamiltonian of every trajectory. Shape ``(C,)``."""
        return 0.5 * self.momentum.square().sum(-1) - self.log_density


def leapfrog(
    point: PhasePoint, value_and_grad: ValueAndGrad, scale: Tensor | SharedFactors, step_size: Tensor, num_steps: int
) -> PhasePoint:
    r"""Leapfrog trajectories; volume preserving, and reversed by flipping the momentum.

    .. math:: r \mathrel{+}= \tfrac{h}{2} L^\top \nabla \log\pi(x), \quad x \mathrel{+}= h L r, \quad r \mathrel{+}=
    \tfrac{h}{2} L^\top \nabla\log\pi(x)

    Args:
        point: Start, with its gradient. Shapes ``(C, d)`` and ``(C,)``.
        value_and_grad: Batched log density and gradient, ``(C, d)`` to ``(C,)`` and ``(C, d)``.
        scale: Metric factor L, shape ``(d, d)`` or ``(C, d, d)``, or one a row of few.
        step_size: Step h in units of the metric, shape ``()`` or ``(C, 1)``.
        num_steps: Number of leapfrog steps, at least 1; each costs one gradient.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), equations 5.18 to 5.20, https://arxiv.org/abs/1206.1901
    """
    x, momentum, log_density, grad = point
    kick = 0.5 * step_size * matvec(scale.mT, grad)
    for _ in range(num_steps):
        momentum = momentum + kick
        x = x + step_size * matvec(scale, momentum)
        log_density, grad = value_and_grad(x)
        kick = 0.5 * step_size * matvec(scale.mT, grad)
        momentum = momentum + kick
    return PhasePoint(x, momentum, log_density, grad)


def matvec(matrix: Tensor | SharedFactors, vector: Tensor) -> Tensor:
    """Product of one matrix ``(d, d)``, or of one a row ``(C, d, d)``, with the rows of ``(C, d)``."""
    if isinstance(matrix, SharedFactors):
        out = torch.empty_like(vector)
        for k in matrix.which.unique().tolist():
            rows = matrix.which == k
            out[rows] = vector[rows] @ matrix.matrices[k].mT
        return out
    return vector @ matrix.mT if matrix.ndim == 2 else torch.einsum("cij,cj->ci", matrix, vector)
