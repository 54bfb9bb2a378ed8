"""Variances that the networks of a diffusion Schrödinger bridge leave: of the end ahead, or of each step."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sb.bridges.dsb_data import Pairs, Paths
from pyro_sb.bridges.dsb_half import Given, HalfBridge, knot_times

LEAST = 1e-6  # of a variance, in its units


def measured_spread(
    half: HalfBridge, pairs: Pairs, given: Callable[[HalfBridge, Tensor | None], Given], epsilon: float
) -> Tensor:
    """Log variances of the end given the state, in units of the Gaussian bridge's. Shape ``(NUM_KNOTS, dim)``."""
    logs = []
    for u in knot_times(half.gain):
        rows = pairs.at(u.expand(len(pairs.begin)), slice(None), epsilon)
        known = given(half, rows.context)
        miss = half.goal(rows.u, rows.states, rows.ends, known, epsilon) - half.answer(rows.u, rows.states, known)
        logs.append(miss.square().mean(0).clamp_min(LEAST).log())
    return torch.stack(logs)


def measured_steps(
    half: HalfBridge, paths: Paths, given: Callable[[HalfBridge, Tensor | None], Given], epsilon: float
) -> Tensor:
    r"""Log variances of each step given the state before it, in units of the reference's. Shape ``(K, dim)``.

    With these and the regressed means the moments of each step are those of the paths, in the directions of the
    half's basis. Between Gaussians whose covariances commute that is their reversal, for any number of steps; with the
    reference's own variance it is that only in the limit of many.
    """
    known, logs = given(half, paths.context), []
    for u, then, x, ahead in zip(paths.times[:-1], paths.times[1:], paths.states[:-1], paths.states[1:]):
        miss = ahead @ half.basis - half.step(u, then, x, known, epsilon).mean
        logs.append((miss.square().mean(0) / (epsilon * (then - u))).clamp_min(LEAST).log())
    return torch.stack(logs)
