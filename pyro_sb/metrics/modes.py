"""Shares of the draws in each mode."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sb.checks import finite, floats
from pyro_sb.metrics.score import Score, cloud


def mode_shares(x: Any, centres: Any) -> Tensor:
    r"""Share of the draws that are nearer to a centre than to any other.

    Args:
        x: Draws. Shape ``(n, d)``.
        centres: Centres of the K modes. Shape ``(K, d)``.

    Returns:
        Shares that sum to 1, in float64. Shape ``(K,)``.

    Example:
        >>> mode_shares(torch.tensor([[0.1], [0.9], [1.2], [1.1]]), torch.tensor([[0.0], [1.0]]))
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    x, centres = cloud("x", x), cloud("centres", centres)
    if x.shape[-1] != centres.shape[-1]:
        raise ValueError(
            f"x and centres must have one dimension, got {x.shape[-1]} and {centres.shape[-1]}. "
            "Pass centres of shape (K, d)."
        )
    nearest = torch.cdist(x, centres.to(x.device)).argmin(-1)
    return torch.bincount(nearest, minlength=len(centres)).double() / len(x)


def mode_share_tv(x: Any, centres: Any, shares: Any = None) -> Score:
    r"""Total variation between the modes' shares among the draws and their true shares.

    .. math:: \tfrac12 \sum_{k=1}^{K} |\hat p_k - p_k|

    It is the part of a mistake that moves mass between modes: 0 is perfect, 1 - 1/K is one mode of K equal ones.

    Args:
        x: Draws of the model. Shape ``(n, d)``.
        centres: Centres of the K modes. Shape ``(K, d)``.
        shares: True shares, which sum to 1. Shape ``(K,)``. Omitted: equal.

    Returns:
        The total variation, with its floor: the expected value for n independent draws, by the Gaussian approximation
        of their counts, :math:`\tfrac12 \sum_k \sqrt{2 p_k (1 - p_k) / \pi n}`. (Draws with equal counts score 0.)

    Example:
        >>> mode_share_tv(torch.tensor([[0.1], [0.9], [1.2], [1.1]]), torch.tensor([[0.0], [1.0]]))
        0.25 (floor 0.199)
    """
    found = mode_shares(x, centres)
    num_modes, n = len(found), len(cloud("x", x))
    truth = torch.full_like(found, 1 / num_modes) if shares is None else _checked(shares, found)
    floor = (2 * truth * (1 - truth) / (math.pi * n)).sqrt().sum() / 2
    return Score(float((found - truth).abs().sum() / 2), floor=float(floor))


def _checked(shares: Any, found: Tensor) -> Tensor:
    truth = finite("shares", floats("shares", shares, found).detach())
    if truth.shape != found.shape or bool((truth < 0).any()) or abs(float(truth.sum()) - 1) > 1e-5:
        raise ValueError(
            f"shares must be {len(found)} numbers of at least 0 that sum to 1, got shape {tuple(truth.shape)} with sum "
            f"{float(truth.sum()):.6g}. Pass one a centre, or write shares / shares.sum()."
        )
    return truth
