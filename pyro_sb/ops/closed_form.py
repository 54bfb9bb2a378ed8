r"""Schrödinger and Schrödinger-Bass bridges between Gaussians in closed form: the oracles of the learnt bridges.

Time runs from 0 to 1, :math:`\epsilon` is the reference's variance over [0, 1]. Linear algebra is done in float64 and
handed back in the inputs' dtype.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.brownian import bridge_gain


def cross_covariance(cov0: Tensor, cov1: Tensor, epsilon: float) -> Tensor:
    r"""Cross-covariance of the Gaussian Schrödinger bridge.

    For :math:`x_0 \sim N(m_0, \Sigma_0)`, :math:`x_1 \sim N(m_1, \Sigma_1)` and a Brownian reference of variance
    :math:`\epsilon` over unit time,

    .. math:: C = \tfrac12 \Sigma_0^{1/2} (4\, \Sigma_0^{1/2} \Sigma_1 \Sigma_0^{1/2} + \epsilon^2 I)^{1/2}
              \Sigma_0^{-1/2} - \tfrac{\epsilon}{2} I = \Sigma_0 S,

    computed in the second form, with S of `bridge_gain`: a point source has C = 0.

    Args:
        cov0: Source covariance, symmetric positive semi-definite. Shape ``(*, d, d)``.
        cov1: Target covariance, symmetric positive semi-definite. Shape ``(*, d, d)``.
        epsilon: Reference variance over [0, 1], positive, in squared units of ``x``.

    Returns:
        ``Cov(x0, x1)`` under the bridge. Shape ``(*, d, d)``.

    References:
        The Schrödinger Bridge between Gaussian Measures has a Closed Form (Bunne et al., 2023),
        https://arxiv.org/abs/2202.05722

    Example:
        >>> cross_covariance(torch.eye(1), torch.eye(1), epsilon=1.0)
        tensor([[0.6180]])
    """
    return cov0 @ bridge_gain(cov0, cov1, epsilon)


class GaussianBridge(NamedTuple):
    r"""Schrödinger bridge between two Gaussians: its plan, marginals and affine drift. Made by `gaussian_bridge`.

    .. math:: dX = (A_t X + b_t)\, dt + \sqrt\epsilon\, dW, \quad A_t = (S - I) D_t^{-1}, \quad
              b_t = D_t^{-1} (m_1 - S m_0), \quad D_t = (1 - t) I + t S .

    Times are floats or tensors that broadcast with the batch shape. At t = 1 the drift is finite where the target's
    covariance is positive definite.

    Args:
        mean0: Source mean. Shape ``(*, d)``.
        cov0: Source covariance. Shape ``(*, d, d)``.
        mean1: Target mean. Shape ``(*, d)``.
        cov1: Target covariance. Shape ``(*, d, d)``.
        epsilon: Reference variance over [0, 1].
        gain: Matrix S of `bridge_gain`. Shape ``(*, d, d)``.
    """

    mean0: Tensor
    cov0: Tensor
    mean1: Tensor
    cov1: Tensor
    epsilon: float
    gain: Tensor

    @property
    def cross_covariance(self) -> Tensor:
        r""":math:`\mathrm{Cov}(x_0, x_1) = \Sigma_0 S`. Shape ``(*, d, d)``."""
        return self.cov0 @ self.gain

    def conditional(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean :math:`m_1 + S (x_0 - m_0)` and covariance :math:`\epsilon S` of the end given the start ``(*, d)``."""
        return self.mean1 + _matvec(self.gain, x0 - self.mean0), self.epsilon * self.gain

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and covariance of :math:`X_t`, a mean of the ends and a Brownian bridge. ``(*, d)`` and ``(*, d, d)``.

        .. math:: \Sigma_t = (1-t)^2 \Sigma_0 + t (1-t) (C + C^\top + \epsilon I) + t^2 \Sigma_1 .
        """
        vector = self._times(t)
        matrix = vector[..., None]
        mixed = self.cross_covariance + self.cross_covariance.mT + self.epsilon * _eye_like(self.cov0)
        mean = (1 - vector) * self.mean0 + vector * self.mean1
        return mean, (1 - matrix) ** 2 * self.cov0 + matrix * (1 - matrix) * mixed + matrix**2 * self.cov1

    def drift_matrix(self, t: float | Tensor) -> Tensor:
        """Matrix :math:`A_t` of the drift, symmetric: the drift is a gradient. Shape ``(*, d, d)``."""
        values, basis, widths = self._widths(t)
        return _from_basis(basis, (values - 1) / widths)

    def drift_offset(self, t: float | Tensor) -> Tensor:
        """Constant :math:`b_t` of the drift. Shape ``(*, d)``."""
        _, basis, widths = self._widths(t)
        return _matvec(_from_basis(basis, 1 / widths), self.mean1 - _matvec(self.gain, self.mean0))

    def drift(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Drift at ``x``. ``(*, d)`` to ``(*, d)``."""
        return _matvec(self.drift_matrix(t), x) + self.drift_offset(t)

    def _times(self, t: float | Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=self.gain.dtype, device=self.gain.device)[..., None]

    def _widths(self, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, basis = torch.linalg.eigh(self.gain)
        times = self._times(t)
        return values, basis, 1 - times + times * values


def gaussian_bridge(mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor, epsilon: float) -> GaussianBridge:
    """Schrödinger bridge from N(mean0, cov0) to N(mean1, cov1).

    Args:
        mean0: Source mean. Shape ``(*, d)``.
        cov0: Source covariance, symmetric positive semi-definite. Shape ``(*, d, d)``.
        mean1: Target mean. Shape ``(*, d)``.
        cov1: Target covariance, symmetric positive semi-definite. Shape ``(*, d, d)``.
        epsilon: Reference variance over [0, 1], positive, in squared units of ``x``.

    References:
        The Schrödinger Bridge between Gaussian Measures has a Closed Form (Bunne et al., 2023),
        https://arxiv.org/abs/2202.05722

    Example:
        >>> bridge = gaussian_bridge(torch.zeros(1), torch.zeros(1, 1), torch.ones(1), torch.eye(1), epsilon=1.0)
        >>> bridge.marginal(0.5)  # from a point at unit variance: Brownian motion with a drift
        (tensor([0.5000]), tensor([[0.5000]]))
        >>> bridge.drift(0.5, torch.tensor([7.0]))
        tensor([1.])
    """
    return GaussianBridge(mean0, cov0, mean1, cov1, epsilon, bridge_gain(cov0, cov1, epsilon))


class BassGaussian(NamedTuple):
    r"""Schrödinger-Bass bridge between centred Gaussians of commuting covariances. Made by `commuting_bass_bridge`.

    It minimises :math:`E \int_0^1 \tfrac12 |\alpha|^2 + \tfrac\beta2 |\sigma - \sqrt\epsilon I|_F^2\, dt` over
    :math:`dX = \alpha\, dt + \sigma\, dW` of given ends. In the common eigenbasis, along each axis,

    .. math:: X_t = k_t Y_t, \quad k_t = 1 + l_t / \beta, \quad l_t = \frac{S - 1}{1 - t + t S}, \quad
              \alpha = \frac{l_t}{k_t} x, \quad \sigma = \sqrt\epsilon\, k_t,

    where Y is the Schrödinger bridge of gain S between variances :math:`v_0 / k_0^2` and :math:`v_1 / k_1^2`. For
    other means, :math:`m_t = (1-t) m_0 + t m_1` and the drift is :math:`m_1 - m_0 + (l_t / k_t)(x - m_t)`. Methods give
    values along the axes, shape ``(*, d)``; `matrix` turns them into matrices. Times broadcast with the batch shape.

    Args:
        basis: Common eigenvectors, in columns. Shape ``(*, d, d)``.
        variance0: Eigenvalues of the source's covariance. Shape ``(*, d)``.
        variance1: Eigenvalues of the target's covariance. Shape ``(*, d)``.
        gain: S of `bass_gain`. Shape ``(*, d)``.
        epsilon: Reference variance over [0, 1].
        beta: Price of another diffusion coefficient; infinite for the Schrödinger bridge.
    """

    basis: Tensor
    variance0: Tensor
    variance1: Tensor
    gain: Tensor
    epsilon: float
    beta: float

    @property
    def cross_covariance(self) -> Tensor:
        r""":math:`\mathrm{Cov}(x_0, x_1)`, :math:`S k_1 v_0 / k_0` along each axis. Shape ``(*, d, d)``."""
        return self.matrix(self.gain * self.map_scale(1.0) * self.variance0 / self.map_scale(0.0))

    def map_scale(self, t: float | Tensor) -> Tensor:
        """Slope :math:`k_t > 0` of the Bass map from Y to X."""
        return 1 + self._slope(t) / self.beta

    def latent_variance(self, t: float | Tensor) -> Tensor:
        """Variance of :math:`Y_t`."""
        t, start = self._times(t), self.variance0 / self.map_scale(0.0) ** 2
        return (1 - t + t * self.gain) * ((1 - t + t * self.gain) * start + self.epsilon * t)

    def variance(self, t: float | Tensor) -> Tensor:
        """Variance of :math:`X_t`."""
        return self.map_scale(t) ** 2 * self.latent_variance(t)

    def drift_coefficient(self, t: float | Tensor) -> Tensor:
        r"""Factor :math:`l_t / k_t` of x in the optimal :math:`\alpha`."""
        return self._slope(t) / self.map_scale(t)

    def diffusion_coefficient(self, t: float | Tensor) -> Tensor:
        r"""Optimal :math:`\sigma = \sqrt\epsilon\, k_t`."""
        return math.sqrt(self.epsilon) * self.map_scale(t)

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with these eigenvalues in the common basis. ``(*, d)`` to ``(*, d, d)``."""
        return _from_basis(self.basis, values)

    def _slope(self, t: float | Tensor) -> Tensor:
        t = self._times(t)
        return (self.gain - 1) / (1 - t + t * self.gain)

    def _times(self, t: float | Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=self.gain.dtype, device=self.gain.device)[..., None]


def commuting_bass_bridge(cov0: Tensor, cov1: Tensor, epsilon: float, beta: float) -> BassGaussian:
    r"""Schrödinger-Bass bridge between centred Gaussians whose covariances commute.

    Args:
        cov0: Source covariance, symmetric positive semi-definite; zero for a point. Shape ``(*, d, d)``.
        cov1: Target covariance, symmetric positive definite. Shape ``(*, d, d)``.
        epsilon: Reference variance over [0, 1], positive, in squared units of ``x``.
        beta: Price of another diffusion coefficient, positive, without unit; ``math.inf`` for the Schrödinger bridge.

    Raises:
        ValueError: If the covariances do not commute: there is no closed form then.

    References:
        LightSBB-M (2026), https://arxiv.org/abs/2601.19312: the problem. The Gaussian solution is ours.

    Example:
        >>> bridge = commuting_bass_bridge(torch.eye(1), 10 * torch.eye(1), epsilon=1.0, beta=10.0)
        >>> bridge.gain, bridge.cross_covariance
        (tensor([2.8928]), tensor([[2.5916]]))
    """
    wide0, wide1 = torch.broadcast_tensors(cov0.double(), cov1.double())
    size0, size1 = (torch.linalg.matrix_norm(cov, keepdim=True) for cov in (wide0, wide1))
    commutator = torch.linalg.matrix_norm(wide0 @ wide1 - wide1 @ wide0, keepdim=True)
    bound = 100 * cov0.shape[-1] * torch.finfo(cov0.dtype).eps * size0 * size1
    if (commutator > bound).any():
        worst = (commutator / (size0 * size1)).nan_to_num(0.0).max()
        raise ValueError(
            f"cov0 and cov1 must commute, got |cov0 cov1 - cov1 cov0| = {worst:.1e} |cov0| |cov1|. Only then is the "
            "Schrödinger-Bass bridge known in closed form; gaussian_bridge (beta = inf) takes any covariances."
        )
    # Eigenvectors of a generic combination are common ones, also where one covariance has repeated eigenvalues; the
    # factor pi keeps eigenvalues apart that meet in a combination with rational weights and norms.
    generic = math.pi * wide0 / size0.clamp_min(1e-300) + wide1 / size1.clamp_min(1e-300)
    basis = torch.linalg.eigh(generic).eigenvectors
    variance0, variance1 = ((basis.mT @ cov @ basis).diagonal(dim1=-2, dim2=-1) for cov in (wide0, wide1))
    variance0 = variance0.clamp_min(0.0)
    gain = bass_gain(variance0, variance1, epsilon, beta)
    basis, variance0, variance1, gain = (part.to(cov0.dtype) for part in (basis, variance0, variance1, gain))
    return BassGaussian(basis, variance0, variance1, gain, epsilon, beta)


def bass_gain(variance0: Tensor, variance1: Tensor, epsilon: float, beta: float) -> Tensor:
    r"""Gain of the scalar Schrödinger-Bass bridge.

    It is the one root S above :math:`1/(1 + \beta)` of

    .. math:: k_1^2 \Big( S^2 \frac{v_0}{k_0^2} + \epsilon S \Big) = v_1, \quad k_0 = 1 + \frac{S - 1}{\beta}, \quad
              k_1 = 1 + \frac{1 - 1/S}{\beta} .

    With :math:`\kappa = 1/\beta` and :math:`u = S k_1 > 0` it reads :math:`v_0 u^2 (1+\kappa)^2 / (1 + \kappa u)^2 +
    \epsilon u^2 (1+\kappa) / (u + \kappa) = v_1`, whose left side increases in u for every :math:`\beta > 0`; it is
    solved by bisection of :math:`\log u`, to rounding. (At tiny :math:`\beta` all S lie near 1, and :math:`k_1` keeps a
    relative error of some :math:`10^{-16} / \beta^2`.)

    Args:
        variance0: Source variances, not negative. Shape ``(*)``.
        variance1: Target variances, positive. Shape ``(*)``.
        epsilon: Reference variance over [0, 1], positive.
        beta: Price of another diffusion coefficient, positive, ``math.inf`` allowed.

    Example:
        >>> bass_gain(torch.tensor([1.0, 0.0]), torch.tensor([0.1, 1.0]), epsilon=1.0, beta=10.0)
        tensor([0.2085, 1.0000])
    """
    if not (beta > 0 and 0 < epsilon < math.inf):
        raise ValueError(f"beta must be positive and epsilon positive and finite, got beta={beta}, epsilon={epsilon}.")
    if (variance0 < 0).any() or (variance1 <= 0).any():
        raise ValueError(
            f"Variances must be non-negative (source) and positive (target), got minima {float(variance0.min()):.3g} "
            f"and {float(variance1.min()):.3g}. The Bass map onto a point has no inverse."
        )
    v0, v1 = torch.broadcast_tensors(variance0.double(), variance1.double())
    kappa = 1.0 / beta
    a, b = v0 * (1 + kappa) ** 2, epsilon * (1 + kappa)
    low = 2 * v1 / (b + (b**2 + 4 * a * v1).sqrt())  # (1 + kappa u) >= 1 and u + kappa >= u: exact at beta = inf
    high = (v1 + (v1**2 + 4 * b * v1 * kappa).sqrt()) / (2 * b)  # without the first term: exact for a point source
    for _ in range(80):
        middle = low.sqrt() * high.sqrt()
        above = a * (middle / (1 + kappa * middle)) ** 2 + b * middle**2 / (middle + kappa) > v1
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low.sqrt() * high.sqrt() + kappa) / (1 + kappa)).to(variance1.dtype)


def bass_dual_value(gain: Tensor, variance0: Tensor, variance1: Tensor, epsilon: float, beta: float) -> Tensor:
    r"""Dual of the scalar Schrödinger-Bass problem at the potential of gain S; its maximum is the least cost.

    .. math:: G(S) = \frac{v_1}{2} \frac{l_1}{1 + l_1 / \beta} - \frac{v_0}{2} \frac{l_0}{1 + l_0 / \beta} -
              \frac\epsilon2 \log S, \qquad l_0 = S - 1, \quad l_1 = 1 - 1/S .

    It is minus infinity where :math:`l_0 \le -\beta` or :math:`l_1 \le -\beta`, that is where
    :math:`S \le 1/(1 + \beta)`. Other means add :math:`\tfrac12 |m_1 - m_0|^2`.

    Args:
        gain: S, positive. Shape ``(*)``.
        variance0: Source variances, not negative. Shape ``(*)``.
        variance1: Target variances, positive. Shape ``(*)``.
        epsilon: Reference variance over [0, 1], positive.
        beta: Price of another diffusion coefficient, positive, ``math.inf`` allowed.

    Example:
        >>> bass_dual_value(torch.tensor([1.0, 0.05]), torch.tensor(1.0), torch.tensor(2.0), epsilon=1.0, beta=10.0)
        tensor([0., -inf])
    """
    slope0, slope1 = gain - 1, 1 - 1 / gain
    scale0, scale1 = 1 + slope0 / beta, 1 + slope1 / beta
    value = 0.5 * (variance1 * slope1 / scale1 - variance0 * slope0 / scale0 - epsilon * gain.log())
    return torch.where((scale0 > 0) & (scale1 > 0), value, -math.inf)


def alternating_bass_scalar(
    variance0: Tensor, variance1: Tensor, epsilon: float, beta: float, num_iter: int, *, margin: float = 0.05
) -> Tensor:
    r"""Gains of the plain alternation of bridge and Bass map, each step exact; it need not converge.

    .. math:: S \leftarrow \frac{2 C_1}{\epsilon + \sqrt{\epsilon^2 + 4 C_0 C_1}}, \qquad C_0 = v_0 / k_0^2, \quad
              C_1 = v_1 / k_1^2,

    from the identity map (:math:`k_0 = k_1 = 1`), with S kept at or above :math:`(1 + \text{margin}) / (1 + \beta)`.

    Args:
        variance0: Source variances, not negative. Shape ``(*)``.
        variance1: Target variances, positive. Shape ``(*)``.
        epsilon: Reference variance over [0, 1], positive.
        beta: Price of another diffusion coefficient, positive, ``math.inf`` allowed.
        num_iter: Number of steps, at least 1.
        margin: Distance of the floor from :math:`1/(1 + \beta)`, where the map stops being monotone; positive.

    Returns:
        S after every step. Shape ``(num_iter, *)``.

    References:
        LightSBB-M (2026), https://arxiv.org/abs/2601.19312, Algorithm 1, without its learning errors. The floor is
        ours: without it the map may lose its inverse.

    Example:
        >>> alternating_bass_scalar(torch.tensor(1.0), torch.tensor(10.0), epsilon=1.0, beta=10.0, num_iter=5)
        tensor([2.7016, 2.8632, 2.8882, 2.8921, 2.8927])
    """
    floor, gains = (1 + margin) / (1 + beta), []
    start, end = torch.broadcast_tensors(variance0, variance1)
    for _ in range(num_iter):
        gain = (2 * end / (epsilon + (epsilon**2 + 4 * start * end).sqrt())).clamp_min(floor)
        start = variance0 / (1 + (gain - 1) / beta) ** 2
        end = variance1 / (1 + (1 - 1 / gain) / beta) ** 2
        gains.append(gain)
    return torch.stack(gains)


def _from_basis(basis: Tensor, values: Tensor) -> Tensor:
    return basis * values[..., None, :] @ basis.mT


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


# Iterative proportional fitting between Gaussians: the exact iterates that a learnt one is compared with


class GaussianPlan(NamedTuple):
    """Joint Gaussian law of a start and an end.

    Args:
        mean0: Shape ``(d,)``.
        mean1: Shape ``(d,)``.
        cov0: Shape ``(d, d)``.
        cov1: Shape ``(d, d)``.
        cross: ``Cov(x0, x1)``. Shape ``(d, d)``.
    """

    mean0: Tensor
    mean1: Tensor
    cov0: Tensor
    cov1: Tensor
    cross: Tensor

    def reversed(self) -> "GaussianPlan":
        """The same law with start and end exchanged."""
        return GaussianPlan(self.mean1, self.mean0, self.cov1, self.cov0, self.cross.mT)

    def with_end(self, mean: Tensor, cov: Tensor) -> "GaussianPlan":
        """The start's law given the end is kept, the end's own is replaced: a half step of the fitting."""
        gain = torch.linalg.solve(self.cov1, self.cross.mT).mT
        rest = self.cov0 - gain @ self.cross.mT
        start = self.mean0 + gain @ (mean - self.mean1)
        return GaussianPlan(start, mean, rest + gain @ cov @ gain.mT, cov, gain @ cov)


def gaussian_ipf(bridge: GaussianBridge, num_iterations: int, first: str = "target") -> list[GaussianPlan]:
    r"""Plans after every half step of iterative proportional fitting between two Gaussians.

    It starts from the Brownian reference run from one end; each half step keeps the law of one end given the other and
    replaces the other's own. The plans converge geometrically to the Schrödinger bridge's.

    Args:
        bridge: What is fitted: both ends and epsilon; covariances positive definite.
        num_iterations: Full iterations.
        first: The end that the reference is run from: ``"target"``, as the diffusion Schrödinger bridge does, whose
            first half step is then the score model, or ``"source"``.

    Returns:
        Two plans an iteration: with the other end's marginal right, then with the first one's.

    References:
        Diffusion Schrödinger Bridge with Applications to Score-Based Generative Modeling (De Bortoli et al., 2021),
        https://arxiv.org/abs/2106.01357, section 3.

    Example:
        >>> from pyro_sb.ops.closed_form import gaussian_bridge
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> bridge = gaussian_bridge(torch.zeros_like(one[0]), one, torch.zeros_like(one[0]), one, epsilon=1.0)
        >>> [round(plan.cross.item(), 3) for plan in gaussian_ipf(bridge, num_iterations=2)], round(5**0.5 / 2 - 0.5, 3)
        ([0.5, 0.667, 0.6, 0.625], 0.618)
    """
    if first not in ("source", "target"):
        raise ValueError(f"first must be 'source' or 'target', got {first!r}.")
    ends = [(bridge.mean0, bridge.cov0), (bridge.mean1, bridge.cov1)]
    if first == "target":
        ends.reverse()
    (mean, cov), other = ends
    noise = bridge.epsilon * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    plan, plans = GaussianPlan(mean, mean, cov, cov + noise, cov), []
    for _ in range(num_iterations):
        plan = plan.with_end(*other)
        plans.append(plan)
        plan = plan.reversed().with_end(mean, cov).reversed()
        plans.append(plan)
    return [plan.reversed() for plan in plans] if first == "target" else plans
