r"""Power tails from Gaussian ones: an odd, increasing map of each coordinate, with its inverse and derivatives."""

import torch
from torch import Tensor


def power_tail(z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Map that turns sub-Gaussian tails into power tails of index :math:`\nu`, coordinate by coordinate.

    .. math:: \psi_\nu(z) = \operatorname{sign}(z) \sqrt{\nu (e^{z^2 / \nu} - 1)}

    Odd, analytic and increasing, with :math:`\psi(0) = 0`, :math:`\psi'(0) = 1`, :math:`\psi''(0) = 0`; the identity
    at :math:`\nu = \infty`. The half z < 0 has an index of its own, and the two halves join with two continuous
    derivatives. For Z standard normal, :math:`P(\psi_\nu(Z) > x) \propto x^{-\nu} / \sqrt{\log x}`. It is Wallace's
    normalising transformation read backwards: for X Student-t of :math:`\nu` degrees of freedom,
    :math:`\psi_\nu^{-1}(X)` has the density

    .. math:: q(z) \propto \frac{e^{-z^2 / 2} |z|}{\sqrt{1 - e^{-z^2 / \nu}}} ,

    a normal one but for a factor that grows like :math:`|z|`.

    Args:
        z: Points. Shape ``(*, d)``.
        lower: Index of the tail below zero, positive; ``inf`` leaves that half alone. Shape ``(d,)``.
        upper: The same above zero. Shape ``(d,)``.

    Returns:
        Shape ``(*, d)``. Infinite only where the value exceeds the dtype's largest number.

    References:
        Bounds on normal approximations to Student's and the chi-square distributions (Wallace, 1959), Annals of
        Mathematical Statistics 30, 1121-1130.

    Example:
        >>> power_tail(torch.tensor([[-2.0, 0.0, 2.0]]), torch.full((3,), 2.0), torch.full((3,), torch.inf))
        tensor([[-3.5746,  0.0000,  2.0000]])
    """
    return z * (0.5 * _log_ratio(_exponent(z, lower, upper))).exp()


def gaussian_tail(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Inverse of `power_tail`, :math:`\psi_\nu^{-1}(x) = \operatorname{sign}(x) \sqrt{\nu \log(1 + x^2 / \nu)}`.

    Args:
        x: Points. Shape ``(*, d)``.
        lower: Index of the tail below zero, positive; ``inf`` leaves that half alone. Shape ``(d,)``.
        upper: The same above zero. Shape ``(d,)``.

    Returns:
        Shape ``(*, d)``. Finite wherever ``x`` is.

    Example:
        >>> gaussian_tail(torch.tensor([[-3.5746, 1e30]]), torch.full((2,), 2.0), torch.full((2,), 2.0))
        tensor([[-2.0000, 16.5808]])
    """
    root = _index(x, lower, upper).sqrt()
    near = (x / root).abs() < 1e-2
    v = torch.where(near, x / root, 0.0).square()
    series = x * (1 - v / 2 + v.square() / 3 - v**3 / 4).sqrt()  # the bracket is log(1 + v) / v
    root, a = torch.where(near, 1.0, root), torch.where(near, 1.0, x / root).abs()
    small, large = a.clamp(max=1.0), a.clamp(min=1.0)  # a^2 overflows before log(1 + a^2) does
    log1p = torch.where(a < 1, small.square().log1p(), 2 * large.log() + large.reciprocal().square().log1p())
    return torch.where(near, series, x.sign() * root * log1p.sqrt())


def log_derivative(z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Logarithm of the slope of `power_tail`.

    .. math:: \log \psi_\nu'(z) = u + \tfrac12 \log \frac{u}{e^u - 1}, \qquad u = \frac{z^2}{\nu}

    Args:
        z: Points, before the map. Shape ``(*, d)``.
        lower: Index of the tail below zero. Shape ``(d,)``.
        upper: Index of the tail above zero. Shape ``(d,)``.

    Returns:
        Shape ``(*, d)``; at least 0, and finite also where the slope itself overflows.

    Example:
        >>> log_derivative(torch.tensor([[0.0, 2.0]]), torch.full((2,), 2.0), torch.full((2,), 2.0))
        tensor([[0.0000, 1.4193]])
    """
    u = _exponent(z, lower, upper)
    return u - 0.5 * _log_ratio(u)


def curvature(z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Second derivative of `power_tail` over the first, :math:`\psi'' / \psi' = (\log \psi')'`: Itô's correction.

    .. math:: \frac{\psi_\nu''(z)}{\psi_\nu'(z)} = \frac{2 z}{\nu}
        \Big(1 - \frac12 \Big(\frac{1}{1 - e^{-u}} - \frac1u\Big)\Big), \qquad u = \frac{z^2}{\nu}

    Args:
        z: Points, before the map. Shape ``(*, d)``.
        lower: Index of the tail below zero. Shape ``(d,)``.
        upper: Index of the tail above zero. Shape ``(d,)``.

    Returns:
        Shape ``(*, d)``.

    Example:
        >>> curvature(torch.tensor([[0.0, 2.0]]), torch.full((2,), 2.0), torch.full((2,), 2.0))
        tensor([[0.0000, 1.3435]])
    """
    u = _exponent(z, lower, upper)
    near = u < 0.3
    s = torch.where(near, u, 0.0)
    v = s.square()
    series = 0.5 + s * (1 / 12 + v * (-1 / 720 + v * (1 / 30240 + v * (-1 / 1209600 + v / 47900160))))
    far = torch.where(near, 1.0, u)
    slope = torch.where(near, series, -1 / torch.expm1(-far) - 1 / far)  # of _log_ratio
    return 2 * z / _index(z, lower, upper) * (1 - 0.5 * slope)


def _index(z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The index that belongs to the sign of each coordinate."""
    return torch.where(z < 0, lower, upper)


def _exponent(z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The exponent u = z^2 / nu, kept finite."""
    return (z / _index(z, lower, upper).sqrt()).square().clamp(max=0.25 * torch.finfo(z.dtype).max)


def _log_ratio(u: Tensor) -> Tensor:
    """The function log((e^u - 1) / u) of u >= 0, zero at 0; smooth there, and no overflow."""
    near = u < 0.3
    s = torch.where(near, u, 0.0)
    v = s.square()
    series = s / 2 + v * (1 / 24 + v * (-1 / 2880 + v * (1 / 181440 + v * (-1 / 9676800 + v / 479001600))))
    far = torch.where(near, 1.0, u)
    return torch.where(near, series, far + torch.log(-torch.expm1(-far)) - far.log())
