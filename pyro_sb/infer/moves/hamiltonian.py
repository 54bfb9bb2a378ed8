"""Hamiltonian Monte Carlo on rows: each row its own target, metric and step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.amortized.paired import PairedJoint
from pyro_sb.infer.amortized.simulator import Simulations
from pyro_sb.ops.leapfrog import PhasePoint, leapfrog

__all__ = ["Rows", "hmc_step", "rejuvenate", "start_rows"]

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
TARGET_ACCEPTANCE = 0.75
PILOT, SPREAD = 16, 20.0  # of rejuvenation: transitions that tune the step; its spread, for posteriors of many widths


class Rows(NamedTuple):
    """Points ``(C, d)`` with their log density ``(C,)`` and its gradient ``(C, d)``."""

    x: Tensor
    log_density: Tensor
    grad: Tensor


def start_rows(target: Target, x: Tensor) -> Rows:
    """Rows at given points."""
    return Rows(x, *target(x))


def hmc_step(
    target: Target, rows: Rows, scale: Tensor, step_size: Tensor | float, *, num_steps: int = 5, spread: float = 1.5
) -> tuple[Rows, Tensor]:
    r"""One transition of every row, exact for any metric and step.

    Args:
        target: Log density and gradient, ``(C, d)`` to ``(C,)`` and ``(C, d)``.
        rows: Where the rows stand.
        scale: Factor of the metric, ``(d, d)`` or ``(C, d, d)``.
        step_size: Leapfrog step in units of the metric, a number or ``(C, 1)``, multiplied by a factor that is
            log-uniform between ``1 / spread`` and 1 and independent of the state.
        num_steps: Leapfrog steps.
        spread: At least 1. Large values serve rows of many widths under one metric.

    Returns:
        The new rows, and the acceptance probabilities ``(C,)``.
    """
    x = rows.x
    jitter = step_size * spread ** -torch.rand(len(x), 1, dtype=x.dtype, device=x.device)
    start = PhasePoint(x, torch.randn_like(x), rows.log_density, rows.grad)
    end = leapfrog(start, target, scale, torch.as_tensor(jitter), num_steps)
    probability = torch.exp((start.energy - end.energy).clamp_max(0.0)).nan_to_num(0.0)
    accept = torch.rand_like(probability) < probability
    moved = Rows(
        torch.where(accept[:, None], end.x, x),
        torch.where(accept, end.log_density, rows.log_density),
        torch.where(accept[:, None], end.grad, rows.grad),
    )
    return moved, probability


def rejuvenate(
    joint: PairedJoint, pairs: Simulations, scale: Tensor, num: int, *, sweeps: int = 8, num_steps: int = 5
) -> Tensor:
    r"""Fresh latents for the same observations: the simulated pairs, moved within :math:`p(\theta | y)`.

    A simulated :math:`\theta` is an exact draw of :math:`p(\theta | y)` at its own y, so chains that start there and
    leave :math:`p(\theta | y)` invariant are stationary from their first step: every copy is a draw of the joint law,
    whatever the mixing. The simulator is not called; the model's density is.

    Args:
        joint: The model's log joint.
        pairs: N simulations.
        scale: Factor of the metric. Shape ``(d, d)``.
        num: Copies to make.
        sweeps: Transitions between copies.
        num_steps: Leapfrog steps a transition.

    Returns:
        Latents, the simulated ones first. Shape ``(num + 1, N, d)``.
    """

    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        return joint.value_and_grad(z, pairs.observations)

    copies, step_size = [pairs.latents], 0.5
    first = rows = start_rows(target, pairs.latents)
    for _ in range(PILOT):  # the step is tuned on rows that are thrown away, and frozen
        rows, probability = hmc_step(target, rows, scale, step_size, num_steps=num_steps, spread=SPREAD)
        step_size *= math.exp(0.8 * (float(probability.mean()) - TARGET_ACCEPTANCE))
    rows = first
    for _ in range(num):
        for _ in range(sweeps):
            rows, _ = hmc_step(target, rows, scale, step_size, num_steps=num_steps, spread=SPREAD)
        copies.append(rows.x)
    return torch.stack(copies)
