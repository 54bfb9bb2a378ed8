"""Density along the probability flow of a diffusion: an approximation that no correction uses."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sb.ops.solvers import Flow

EXACT_UP_TO = 20  # dimensions with an exact divergence


def flow_change(
    goal: Callable[[Tensor, Tensor], Tensor], flow: Flow, times: Tensor, z: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""End of the flow from clean states, and what to add to its log density there to have theirs.

    Heun's method in the flow's angles, :math:`dw_i / d\phi_i = -N_i`, with
    :math:`d \log p(w) = \sum_i \partial_i N_i\, d\phi_i` along it: exact for a Gaussian target, whose N is zero.

    Args:
        goal: N, a function of the time and of normalised states.
        flow: The angles.
        times: Rising from the first noisy time to 1. Shape ``(K,)``.
        z: Clean states in the eigenbasis. Shape ``(n, d)``.
        probes: Random signs for the divergence above 20 dimensions. Shape ``(num, d)``.

    Returns:
        Noisy states ``(n, d)`` at the last time, and the change ``(n,)``.
    """
    step = flow.angle(times[0])  # from the target itself to the first noisy time: Euler
    w = z / flow.spread.sqrt()
    slope, rates = slope_and_rates(goal, times[0], w, probes)
    w, change = w + step * slope, rates @ step - 0.5 * flow.spread.log().sum()
    slope, rates = slope_and_rates(goal, times[0], w, probes)
    for now, then in zip(times[:-1], times[1:]):
        step = flow.angle(then) - flow.angle(now)
        ahead = -goal(then, w + step * slope)
        w = w + 0.5 * step * (slope + ahead)
        slope, next_rates = slope_and_rates(goal, then, w, probes)
        change = change + 0.5 * (rates + next_rates) @ step
        rates = next_rates
    last = flow.inner(times[-1])
    return w / last, change - last.log().sum()


def slope_and_rates(
    goal: Callable[[Tensor, Tensor], Tensor], tau: Tensor, w: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope -N of the flow and its diagonal derivatives, estimated above 20 dimensions. Shape ``(n, d)`` each."""
    exact = w.shape[-1] <= EXACT_UP_TO
    signs = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) if exact else probes
    diagonal = torch.zeros_like(w)
    with torch.enable_grad():
        point = w.detach().requires_grad_()
        slope = -goal(tau, point)
        for sign in signs:
            (across,) = torch.autograd.grad(slope, point, sign.expand_as(w), retain_graph=True)
            diagonal = diagonal + across * sign
    return slope.detach(), diagonal if exact else diagonal / len(signs)
