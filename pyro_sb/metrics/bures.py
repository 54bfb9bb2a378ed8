"""Bures-Wasserstein unexplained variance: the first two moments of a law, or of a plan's conditional laws."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sb.checks import finite, floats, number
from pyro_sb.metrics.score import Score, cloud

_BLOCK = 64  # source points whose draws are held in float64 at a time


class Moments(NamedTuple):
    r"""Exact mean and covariance of a law, or of a batch of laws.

    Attributes:
        mean: Shape ``(*batch, d)``.
        covariance: Symmetric positive semi-definite. Shape ``(*batch, d, d)``.
    """

    mean: Tensor
    covariance: Tensor


def bw2_uvp(model: Any, target: Any) -> Score:
    r"""Share of the target's variance that the model's first two moments leave unexplained, in percent.

    .. math:: \frac{100}{\mathrm{tr}\, S_*} \Big(|m - m_*|^2
        + \mathrm{tr}\big(S + S_* - 2 (S_*^{1/2} S S_*^{1/2})^{1/2}\big)\Big) :

    the squared distance of Bures and Wasserstein over the total variance. 0 is perfect; the constant at the target's
    mean scores 100. It sees nothing beyond two moments: put another metric beside it.

    Args:
        model: Draws, shape ``(n, d)``, or the exact `Moments`.
        target: The same of the target.

    Returns:
        The percentage, with its floor: the expected value for n draws of the target itself (and for m, where the target
        is draws too), to leading order in d/n and for Gaussian moments of order four. It is about
        :math:`100\, (1/n + d / 4n)` for a round law, and 0 where both are `Moments`.

    References:
        Do Neural Optimal Transport Solvers Work? (Korotin et al., 2021), https://arxiv.org/abs/2106.01954

    Example:
        >>> target = Moments(torch.zeros(2), torch.eye(2))
        >>> bw2_uvp(Moments(torch.tensor([0.1, 0.0]), torch.eye(2)), target)
        0.5 (floor 0)
    """
    (a, n), (b, m) = _moments("model", model, 1), _moments("target", target, 1)
    _agree(a, b)
    total = float(b.covariance.trace())
    if total <= 0:
        raise ValueError("target must have a positive total variance, got 0: a point explains itself.")
    noise = _expected_noise(b.covariance, n) + _expected_noise(b.covariance, m)
    return Score(100 * float(_squared_bures(a, b)) / total, floor=100 * float(noise) / total)


def cbw2_uvp(model: Any, target: Moments, variance: float) -> Score:
    r"""`bw2_uvp` of a plan's conditional laws, averaged over source points: it judges the coupling.

    .. math:: \frac{100}{\mathrm{variance}} \cdot \frac1P \sum_{p=1}^{P} BW_2^2\big(\pi(\cdot | x_p), \pi_*(\cdot | x_p)
        \big)

    Args:
        model: For each of the P source points n draws, shape ``(P, n, d)``, or the conditional `Moments`, shapes
            ``(P, d)`` and ``(P, d, d)``.
        target: Exact conditional `Moments` at the same points.
        variance: Total variance (trace of the covariance) of the target's marginal law, positive.

    Returns:
        The percentage, with its floor: the expected value for n draws a point of the exact plan, to leading order in
        d/n. For round conditionals that is the conditional share of the variance times
        :math:`100\, (1/n + d / 4n)`; it is 0 for `Moments`.

    References:
        Building the Bridge of Schrödinger: A Continuous Entropic Optimal Transport Benchmark (Gushchin et al., 2023),
        https://arxiv.org/abs/2306.10161

    Example:
        >>> target = Moments(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
        >>> cbw2_uvp(torch.randn(3, 100, 2), target, variance=4.0).floor  # doctest: +ELLIPSIS
        0.878...
    """
    cure = "Pass the trace of the covariance of the target's marginal."
    variance = number("variance", variance, "(0, inf)", cure)
    if not isinstance(target, Moments):
        raise TypeError(
            f"target must be the exact conditional Moments, got {type(target).__name__}. "
            "Write Moments(mean, covariance)."
        )
    (a, n), (b, _) = _moments("model", model, 2), _moments("target", target, 2)
    _agree(a, b)
    floor = _expected_noise(b.covariance, n).mean()
    return Score(100 * float(_squared_bures(a, b).mean()) / variance, floor=100 * float(floor) / variance)


def _moments(name: str, law: Any, ndim: int) -> tuple[Moments, int | None]:
    """Moments in float64, and the number of draws behind them (None: exact). ``ndim`` is that of a mean."""
    if not isinstance(law, Moments):
        batched = ndim == 2 and isinstance(law, Tensor) and law.dim() == 3
        blocks = [_sample_moments(cloud(name, rows, ndim + 1)) for rows in (law.split(_BLOCK) if batched else [law])]
        return Moments(*(torch.cat(part) for part in zip(*blocks))), floats(name, law).shape[-2]
    mean, covariance = (floats(f"{name}.{of}", part).detach().double() for of, part in zip(("mean", "covariance"), law))
    if mean.dim() != ndim or covariance.shape != (*mean.shape, mean.shape[-1]):
        wanted = "(d,) and (d, d)" if ndim == 1 else "(P, d) and (P, d, d)"
        raise ValueError(
            f"The moments of {name} must have shapes {wanted}, got {tuple(mean.shape)} and {tuple(covariance.shape)}."
        )
    return Moments(finite(name, mean), finite(name, covariance)), None


def _sample_moments(draws: Tensor) -> Moments:
    mean = draws.mean(-2)
    centred = draws - mean[..., None, :]
    return Moments(mean, centred.mT @ centred / (draws.shape[-2] - 1))


def _agree(model: Moments, target: Moments) -> None:
    if model.mean.shape != target.mean.shape:
        raise ValueError(
            f"model and target must have means of one shape, got {tuple(model.mean.shape)} and "
            f"{tuple(target.mean.shape)}. Give both the same source points and dimension."
        )


def _squared_bures(a: Moments, b: Moments) -> Tensor:
    """Squared Bures-Wasserstein distance. Shape ``(*batch,)``."""
    # The least |A - B U|^2 over rotations U, where A A' and B B' are the covariances; U is a polar factor of B' A.
    # Unlike the three traces it loses no digits where the laws are close.
    root_a, root_b = _root("model", a.covariance), _root("target", b.covariance)
    left, _, right = torch.linalg.svd(root_b.mT @ root_a)
    spread = (root_a - root_b @ left @ right).square().sum((-2, -1))
    return (a.mean - b.mean).square().sum(-1) + spread


def _root(name: str, covariance: Tensor) -> Tensor:
    values, vectors = _spectrum(name, covariance)
    return vectors * values.sqrt()[..., None, :]


def _spectrum(name: str, covariance: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    least = float((values.amin(-1) / values.abs().amax(-1).clamp(min=1e-300)).min())
    if least < -1e-6:
        raise ValueError(
            f"The covariance of {name} must be positive semi-definite, got an eigenvalue of {least:.1e} times the "
            "largest in size. Pass a covariance matrix, not its inverse or root."
        )
    return values.clamp(min=0), vectors


def _expected_noise(covariance: Tensor, num_draws: int | None) -> Tensor:
    r"""Expected squared distance of a Gaussian's sample moments from the exact ones, to leading order. ``(*batch,)``.

    The mean adds tr(S)/n. For a small symmetric E the squared distance of S + E from S is half the sum over i, j of
    E_ij^2 / (l_i + l_j) in S's eigenbasis, where the sample covariance has E E_ij^2 = l_i l_j (1 + [i = j]) / (n - 1).
    """
    values, _ = _spectrum("target", covariance)
    if num_draws is None:
        return torch.zeros_like(values[..., 0])
    total, pairs = values.sum(-1), values[..., :, None] + values[..., None, :]
    ratio = values[..., :, None] * values[..., None, :] / pairs.clamp(min=1e-300)
    return total / num_draws + (ratio.sum((-2, -1)) + total / 2) / (2 * (num_draws - 1))
