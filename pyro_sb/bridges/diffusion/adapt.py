r"""The matrix D = I - 2 A of the noising: its rules, and the stochastic approximation of A."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.checks import check_choice, finite, floats, number, whole
from pyro_sb.ops.linear_sde import LinearSDE, fixed_point_rates, tolerance_rates
from pyro_sb.ops.solvers import Model, score, step_law

DRIFT_RULES = ("closed-form", "tolerance", "stochastic", "identity")
SMALLEST, LARGEST = 0.3, 8.0  # rates that keep the noising well posed
NUM_PARTICLES, NUM_GRID = 1024, 60


class Adaptation(NamedTuple):
    """Options of the stochastic approximation of A.

    Args:
        num_stages: How often A moves, at least 1.
        zeta: Interaction coefficient, positive.
    """

    num_stages: int
    zeta: float

    def read(self) -> "Adaptation":
        """The same, as numbers that a fit can use; an error where one is none."""
        return Adaptation(whole("num_stages", self.num_stages), number("zeta", self.zeta, "(0, inf)", "Omit it for 1."))


def best_matrix(model: Model, sde: LinearSDE, times: Tensor, x: Tensor, zeta: float = 1.0) -> Tensor:
    r"""The symmetric A that is best for paths simulated with the present one, in the present eigenbasis.

    The forward part of the likelihood bound is quadratic in A,

    .. math:: J(A) = \int \beta\, E\big[\tfrac12 |A x|^2 + x^\top A^\top s_b + \zeta\, \mathrm{tr} A\big] d\tau , \qquad
              s_b = \nabla \log p - A_k x ,

    so its minimiser solves :math:`A Q + Q A = -(G + G^\top) - 2 \zeta W I`, with :math:`Q = \int \beta E[x x^\top]`
    and :math:`G = \int \beta E[s_b x^\top]` along the generating SDE.

    Args:
        model: ``(tau, x)`` to a Gaussian model of the target given x: its covariance makes long steps right.
        sde: The noising process with the present D.
        times: Falling from 1 to 0. Shape ``(K + 1,)``.
        x: Draws of the source. Shape ``(n, d)``.
        zeta: The interaction coefficient.

    Returns:
        A in the eigenbasis. Shape ``(d, d)``.

    References:
        Variational Schrödinger Diffusion Models (Deng et al., 2024), https://arxiv.org/abs/2405.04795. They step along
        the gradient with Adam; the Lyapunov equation is ours.
    """
    present = 0.5 * (1 - sde.rates)
    squares, crosses, integrals = [], [], sde.schedule.integral(times[:-1])
    for now, then in zip(times[:-1], times[1:]):
        given = model(now, x)
        backward = score(sde, now, x, given.mean) - present * x
        squares.append(x.T @ x / len(x))
        crosses.append(backward.T @ x / len(x))
        if then > 0:
            x = step_law(sde, now, then, x, given).sample()
    growth = integrals[:-1] - integrals[1:]
    weights = 0.5 * torch.cat([growth, growth[:0].new_zeros(1)]) + 0.5 * torch.cat([growth.new_zeros(1), growth])
    q = torch.einsum("k,kij->ij", weights, torch.stack(squares))
    g = torch.einsum("k,kij->ij", weights, torch.stack(crosses))
    eye = torch.eye(len(q), dtype=q.dtype, device=q.device)
    return lyapunov(q, -(g + g.T) - 2 * zeta * weights.sum() * eye)


def lyapunov(q: Tensor, right: Tensor) -> Tensor:
    """The symmetric A with ``A q + q A = right``, for q symmetric positive definite.

    Example:
        >>> lyapunov(torch.eye(1), torch.eye(1))
        tensor([[0.5000]])
    """
    values, vectors = torch.linalg.eigh(q)
    inner = vectors.T @ right @ vectors / (values[:, None] + values)
    return vectors @ inner @ vectors.T


def project(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and rates of D = I - 2 A, the rates held within bounds that keep the noising well posed."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    rates, basis = torch.linalg.eigh(eye - (matrix + matrix.T))
    return basis, rates.clamp(SMALLEST, LARGEST)


def step_size(stage: int) -> float:
    """Robbins-Monro weight of a stage, counted from 0: their sum is infinite, that of their squares is not."""
    return min(0.3, 2 / (stage + 1) ** 0.75)


def check_drift_matrix(drift_matrix: str | Tensor, dim: int) -> str | Tensor:
    """A rule's name, or D as a symmetric positive definite matrix on the CPU."""
    if isinstance(drift_matrix, str):
        check_choice("drift_matrix", drift_matrix, DRIFT_RULES)
        return drift_matrix
    matrix = floats("drift_matrix", drift_matrix).detach().cpu()
    if matrix.shape != (dim, dim):
        raise ValueError(f"drift_matrix must name a rule or be D of shape ({dim}, {dim}), got {tuple(matrix.shape)}.")
    if not torch.allclose(finite("drift_matrix", matrix), matrix.T):
        raise ValueError("drift_matrix must be a symmetric matrix D, got one that is not. Write (D + D.T) / 2.")
    smallest = float(torch.linalg.eigvalsh(matrix.double())[0])
    if smallest <= 0:
        raise ValueError(f"D must be positive definite, got an eigenvalue of {smallest:.3g}. D is I - 2 A: lower A.")
    return matrix


def axes_of(rule: str | Tensor, values: Tensor, vectors: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of D.

    Args:
        rule: Its name, or D.
        values: Eigenvalues of the target's covariance. Shape ``(d,)``.
        vectors: Its eigenvectors in columns. Shape ``(d, d)``.
        total: Integral of the noise rate.
    """
    if isinstance(rule, Tensor):
        rates, vectors = torch.linalg.eigh(rule.to(values))
    elif rule == "tolerance":
        rates = tolerance_rates(values.sqrt(), total)
    elif rule == "identity":
        rates = torch.ones_like(values)
    else:
        rates = fixed_point_rates(values, total)
    return vectors, rates
