"""Closed-form conditioning of Gaussian mixtures on some of their coordinates."""

import torch
from pyro.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_sb.ops.log_quadratic import log_sum_exp


def condition_mixture(
    log_weights: Tensor, locs: Tensor, covariances: Tensor, axes: list[int], observed: Tensor
) -> TorchDistributionMixin:
    r"""The law of the other coordinates of a Gaussian mixture given some.

    .. math:: p(b | a) = \sum_j \frac{w_j N(a; m_j^a, C_j^{aa})}{\sum_k w_k N(a; m_k^a, C_k^{aa})}\,
        N\big(b;\; m_j^b + C_j^{ba} (C_j^{aa})^{-1} (a - m_j^a),\; C_j^{bb} - C_j^{ba} (C_j^{aa})^{-1} C_j^{ab}\big)

    Args:
        log_weights: Logarithms of the weights, up to a constant. Shape ``(J,)``.
        locs: Means. Shape ``(J, d)``.
        covariances: Diagonals ``(J, d)`` or matrices ``(J, d, d)``.
        axes: The coordinates that are known, at least one and not all.
        observed: Their values. Shape ``(*batch, len(axes))``.

    Returns:
        A Pyro mixture over the other coordinates, in their order, with ``batch_shape == batch``.

    Example:
        >>> covariance = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> law = condition_mixture(torch.zeros(1), torch.zeros(1, 2), covariance, [0], torch.ones(3, 1))
        >>> law.mean.flatten(), law.variance.flatten()
        (tensor([0.5000, 0.5000, 0.5000]), tensor([0.7500, 0.7500, 0.7500]))
    """
    rest = [i for i in range(locs.shape[-1]) if i not in axes]
    gap = observed[..., None, :] - locs[:, axes]
    if covariances.dim() == locs.dim():
        known = Independent(Normal(locs[:, axes], covariances[:, axes].sqrt()), 1)
        log_gates = log_weights + known.log_prob(observed[..., None, :])
        means = locs[:, rest].expand(*gap.shape[:-1], len(rest))
        components = Independent(Normal(means, covariances[:, rest].sqrt().expand_as(means)), 1)
    else:
        block = covariances[:, axes][:, :, axes]
        cross = covariances[:, rest][:, :, axes]
        gain = torch.linalg.solve(block, cross.mT).mT
        log_gates = log_weights + MultivariateNormal(locs[:, axes], block).log_prob(observed[..., None, :])
        means = locs[:, rest] + (gain @ gap[..., None])[..., 0]
        schur = covariances[:, rest][:, :, rest] - gain @ cross.mT
        schur = 0.5 * (schur + schur.mT)
        components = MultivariateNormal(means, schur.expand(*means.shape, len(rest)))
    gates = log_gates - log_sum_exp(log_gates)[..., None]
    return MixtureSameFamily(Categorical(logits=gates), components)
