r"""Steps towards an end that is known up to a Gaussian, under a Brownian reference of variance epsilon over [0, 1].

Both directions of a bridge use them: ``u`` is the time since a path left its own beginning, whichever end that is.
"""

import math

import torch
from torch import Tensor

from pyro_sb.ops.solvers import StepLaw

SCHEDULES = ("constant", "triangular")
LEAST = 0.05  # smallest step of the triangular schedule over its largest


def step_times(num_steps: int, schedule: str = "constant") -> Tensor:
    r"""Times of a chain from 0 to 1, in float64.

    ``"constant"`` has equal steps; those of ``"triangular"`` grow linearly from both ends to the middle, 20 times
    the first at most: a chain needs them small where a law is sharp. The two are the schedules of diffusion
    Schrödinger bridges, whose step sizes are :math:`\gamma_k = \epsilon (t_{k+1} - t_k) / 2`.

    Args:
        num_steps: K, at least 1.
        schedule: One of the two.

    Returns:
        Shape ``(K + 1,)``; symmetric about 1/2.

    References:
        Diffusion Schrödinger Bridge with Applications to Score-Based Generative Modeling (De Bortoli et al., 2021),
        https://arxiv.org/abs/2106.01357, appendix on experiments.

    Example:
        >>> step_times(4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {list(SCHEDULES)}, got {schedule!r}.")
    sizes = torch.ones(num_steps, dtype=torch.float64)
    if schedule == "triangular" and num_steps > 2:
        place = torch.linspace(-1, 1, num_steps, dtype=torch.float64)
        sizes = LEAST + (1 - LEAST) * (1 - place.abs())
    times = torch.cat([sizes.new_zeros(1), sizes.cumsum(0) / sizes.sum()])
    times[-1] = 1.0
    return times


def pinned(begin: Tensor, end: Tensor, u: Tensor, epsilon: float) -> Tensor:
    r"""A point of the Brownian bridge between two ends, :math:`(1-u) x + u y + \sqrt{\epsilon u (1-u)}\, z`.

    Args:
        begin: x. Shape ``(n, d)``.
        end: y. Shape ``(n, d)``.
        u: Times in [0, 1]. Shape ``(n,)``.
        epsilon: The reference's variance over [0, 1].

    Example:
        >>> pinned(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), epsilon=1.0)
        tensor([[1., 1.]])
    """
    u = u[:, None]
    return torch.lerp(begin, end, u) + (epsilon * u * (1 - u)).sqrt() * torch.randn_like(begin)


def step_towards(x: Tensor, end: Tensor, spread: Tensor, u: Tensor, then: Tensor, epsilon: float) -> StepLaw:
    r"""Law of a path's state at time ``then``, given its state x at u and what is known of its end.

    Given the end y too, the state is that of a Brownian bridge. With :math:`y | x \sim N(\hat y, \rho)`,
    :math:`h = u' - u` and :math:`s = 1 - u`,

    .. math:: x' \sim N\Big(x + \tfrac{h}{s} (\hat y - x),\; \epsilon h \tfrac{s - h}{s} + \tfrac{h^2}{s^2} \rho\Big) .

    With the reference's own :math:`\rho = \epsilon s` the variance is :math:`\epsilon h`: Euler-Maruyama. With the
    right moments of y the step has the right moments, however long it is.

    Args:
        x: States. Shape ``(n, d)``.
        end: :math:`\hat y`. Shape ``(n, d)``.
        spread: Variances :math:`\rho`. Shape ``(d,)`` or ``(n, d)``.
        u: Present time in [0, 1). Shape ``()``.
        then: Time of the step's end, in (u, 1]. Shape ``()``.
        epsilon: The reference's variance over [0, 1].

    Example:
        >>> now, then = torch.tensor(0.5), torch.tensor(1.0)
        >>> step_towards(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.25]), now, then, epsilon=1.0)
        StepLaw(mean=tensor([[1.]]), scale=tensor([[0.5000]]))
    """
    left, share = 1 - u, (then - u) / (1 - u)
    variance = epsilon * left * share * (1 - share) + share.square() * spread
    return StepLaw(x + share * (end - x), variance.sqrt().expand_as(x))


def bridge_gain(cov0: Tensor, cov1: Tensor, epsilon: float) -> Tensor:
    r"""Matrix S of the law of the end given the start, :math:`x_1 | x_0 \sim N(m_1 + S (x_0 - m_0), \epsilon S)`.

    .. math:: S = \Sigma_1^{1/2}\, 2 \big(\epsilon I + (\epsilon^2 I + 4\, \Sigma_1^{1/2} \Sigma_0 \Sigma_1^{1/2})^{1/2}
              \big)^{-1} \Sigma_1^{1/2}, \qquad S \Sigma_0 S + \epsilon S = \Sigma_1 .

    No covariance is inverted, so both may be singular.

    Args:
        cov0: Source covariance, symmetric positive semi-definite. Shape ``(*, d, d)``.
        cov1: Target covariance, symmetric positive semi-definite. Shape ``(*, d, d)``.
        epsilon: Reference variance over [0, 1], positive, in squared units of ``x``.

    Returns:
        Symmetric positive semi-definite S. Shape ``(*, d, d)``.

    References:
        The Schrödinger Bridge between Gaussian Measures has a Closed Form (Bunne et al., 2023),
        https://arxiv.org/abs/2202.05722. They take roots of :math:`\Sigma_0` and invert it; this is the same S.

    Example:
        >>> bridge_gain(torch.zeros(1, 1), torch.eye(1), epsilon=0.5)
        tensor([[2.]])
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be positive and finite, got {epsilon}. It is the reference's variance over [0, 1]."
        )
    values, axes = torch.linalg.eigh(cov1.double())
    root = axes * values.clamp_min(0.0).sqrt()[..., None, :] @ axes.mT
    squares, basis = torch.linalg.eigh(root @ cov0.double() @ root)
    weight = 2.0 / (epsilon + (epsilon**2 + 4.0 * squares.clamp_min(0.0)).sqrt())
    half = root @ basis * weight.sqrt()[..., None, :]
    return (half @ half.mT).to(cov1.dtype)
