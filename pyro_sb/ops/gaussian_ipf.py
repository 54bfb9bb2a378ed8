"""Iterative proportional fitting between Gaussians: the exact iterates that a learnt one is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.gaussian import GaussianBridge


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
        >>> from pyro_sb.ops.gaussian import gaussian_bridge
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
