"""Log-sum-exp of quadratics: the one functional form that every Gaussian-mixture bridge evaluates."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL_DIM = 4  # up to here second moments by one product beat centred slopes


class LogSumQuadratic(NamedTuple):
    r"""The function :math:`\ell(y) = \log \sum_j \exp\{c_j + b_j^\top y + \tfrac12 y^\top Q_j y\}`.

    Each tensor may lead with a batch ``*B`` of functions; points then have shape ``(*B, m, d)``, m for each of them.
    A diagonal :math:`Q_j` is held as its diagonal.

    Args:
        constant: :math:`c`. Shape ``(*B, J)``.
        linear: :math:`b`. Shape ``(*B, J, d)``.
        quadratic: Q, symmetric. Shape ``(*B, J, d)`` where diagonal, else ``(*B, J, d, d)``.

    Example:
        >>> bowl = LogSumQuadratic(torch.zeros(1), torch.zeros(1, 2), -torch.ones(1, 2))
        >>> bowl.value(torch.ones(3, 2))
        tensor([-1., -1., -1.])
    """

    constant: Tensor
    linear: Tensor
    quadratic: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether Q is held as its diagonal."""
        return self.quadratic.dim() == self.linear.dim()

    def terms(self, y: Tensor) -> Tensor:
        """The J exponents at each point. ``(*B, m, d)`` to ``(*B, m, J)``."""
        linear = self.constant[..., None, :] + y @ self.linear.mT
        if self.diagonal:
            return linear + 0.5 * y.square() @ self.quadratic.mT
        return linear + 0.5 * (self._product(y) * y[..., None, :]).sum(-1)

    def value(self, y: Tensor) -> Tensor:
        """The function itself. ``(*B, m, d)`` to ``(*B, m)``."""
        return log_sum_exp(self.terms(y))

    def gates(self, y: Tensor) -> Tensor:
        """Softmax of the exponents. ``(*B, m, d)`` to ``(*B, m, J)``."""
        return torch.softmax(self.terms(y), -1)

    def gradient(self, y: Tensor) -> Tensor:
        r""":math:`\nabla \ell = \sum_j w_j (b_j + Q_j y)` with the gates w. Shape of ``y``."""
        if self.diagonal:
            gates = self.gates(y)
            return gates @ self.linear + (gates @ self.quadratic) * y
        _, gates, slopes = self._gates_and_slopes(y)
        return (gates[..., None, :] @ slopes)[..., 0, :]

    def gradient_and_hessian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Gradient and Hessian :math:`\sum_j w_j Q_j + \operatorname{Cov}_w(b_j + Q_j y)`.

        Shapes ``(*B, m, d)`` and ``(*B, m, d, d)``.
        """
        return self.second_order(y)[1:]

    def second_order(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, gradient and Hessian together. Shapes ``(*B, m)``, ``(*B, m, d)`` and ``(*B, m, d, d)``."""
        if self.diagonal and y.shape[-1] <= SMALL_DIM:
            return self._second_order_small(y)
        value, gates, slopes = self._gates_and_slopes(y)
        mean = (gates[..., None, :] @ slopes)[..., 0, :]
        centred = slopes - mean[..., None, :]
        spread = (gates[..., None] * centred).mT @ centred
        return value, mean, spread + self._mean_quadratic(gates)

    def hessian_product(self, y: Tensor) -> "HessianProduct":
        """The Hessian at each point as a linear map, without a matrix."""
        value, gates, slopes = self._gates_and_slopes(y)
        mean = (gates[..., None, :] @ slopes)[..., 0, :]
        return HessianProduct(self, value, mean, gates, slopes - mean[..., None, :])

    def _second_order_small(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same by one matrix product of the gates with moments of b and Q, without an array ``(m, J, d)``."""
        b, q, dim = self.linear, self.quadratic, y.shape[-1]
        outer = [(u[..., :, None] * v[..., None, :]).flatten(-2) for u, v in ((b, b), (b, q), (q, q))]
        terms = self.terms(y)
        moments = torch.softmax(terms, -1) @ torch.cat([b, q, *outer], -1)
        mean_b, mean_q = moments[..., :dim], moments[..., dim : 2 * dim]
        bb, bq, qq = moments[..., 2 * dim :].unflatten(-1, (3, dim, dim)).unbind(-3)
        cross = bq * y[..., None, :]
        mean = mean_b + mean_q * y
        second = bb + cross + cross.mT + qq * (y[..., :, None] * y[..., None, :])
        return log_sum_exp(terms), mean, second - mean[..., :, None] * mean[..., None, :] + torch.diag_embed(mean_q)

    def _gates_and_slopes(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value ``(*B, m)``, gates ``(*B, m, J)`` and the exponents' gradients ``(*B, m, J, d)``."""
        linear, product = self.linear[..., None, :, :], self._product(y)
        terms = self.constant[..., None, :] + ((linear + 0.5 * product) * y[..., None, :]).sum(-1)
        return log_sum_exp(terms), torch.softmax(terms, -1), linear + product

    def _product(self, y: Tensor) -> Tensor:
        """Q_j y for every component. ``(*B, m, d)`` to ``(*B, m, J, d)``."""
        if self.diagonal:
            return self.quadratic[..., None, :, :] * y[..., None, :]
        *_, num, dim, _ = self.quadratic.shape
        return (y @ self.quadratic.flatten(-3, -2).mT).unflatten(-1, (num, dim))

    def _mean_quadratic(self, gates: Tensor) -> Tensor:
        """Sum of w_j Q_j. ``(*B, m, J)`` to ``(*B, m, d, d)``."""
        if self.diagonal:
            return torch.diag_embed(gates @ self.quadratic)
        dim = self.quadratic.shape[-1]
        return (gates @ self.quadratic.flatten(-2)).unflatten(-1, (dim, dim))


class HessianProduct(NamedTuple):
    """The Hessian of a `LogSumQuadratic` at m points, applied to a vector at each in O(J d) (diagonal Q).

    Args:
        function: The function.
        value: Its value. Shape ``(*B, m)``.
        gradient: Its gradient. Shape ``(*B, m, d)``.
        gates: Its gates at the points. Shape ``(*B, m, J)``.
        centred: Gradients of the exponents less their mean. Shape ``(*B, m, J, d)``.
    """

    function: LogSumQuadratic
    value: Tensor
    gradient: Tensor
    gates: Tensor
    centred: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Hessian times a vector at each point. ``(*B, m, d)`` to ``(*B, m, d)``."""
        along = self.gates * (self.centred @ v[..., None])[..., 0]
        spread = (along[..., None, :] @ self.centred)[..., 0, :]
        if self.function.diagonal:
            return spread + (self.gates @ self.function.quadratic) * v
        return spread + (self.gates[..., None, :] @ self.function._product(v))[..., 0, :]

    def diagonal(self) -> Tensor:
        """The Hessians' diagonals. Shape ``(*B, m, d)``."""
        spread = (self.gates[..., None] * self.centred.square()).sum(-2)
        quadratic = self.function.quadratic
        own = quadratic if self.function.diagonal else quadratic.diagonal(dim1=-2, dim2=-1)
        return spread + self.gates @ own


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp over the last axis through `torch.log_softmax`, whose kernel is some four times faster on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(terms: Tensor) -> Tensor:
        return terms.amax(-1) - torch.log_softmax(terms, -1).amax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (terms,) = ctx.saved_tensors
        return slope[..., None] * torch.softmax(terms, -1)


def log_sum_exp(terms: Tensor) -> Tensor:
    r"""The sum :math:`\log \sum_j e^{u_j}` over the last axis, twice differentiable. ``(*, J)`` to ``(*)``.

    Example:
        >>> log_sum_exp(torch.zeros(2, 4).exp().log())
        tensor([1.3863, 1.3863])
    """
    return _LogSumExp.apply(terms)


def covariance_factor(matrix: Tensor) -> Tensor:
    """Cholesky factors of covariances ``(*, d, d)``; an error in words where rounding has spoilt one.

    Example:
        >>> covariance_factor(4 * torch.eye(1))
        tensor([[2.]])
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool((failed > 0).any()):
        raise torch.linalg.LinAlgError(
            "covariances must be positive definite, got some that rounding has spoilt: a point or a context far from "
            "those of the fit, or axes of very different widths. Check them, or fit in float64."
        )
    return factor
