"""The two chains of a diffusion Schrödinger bridge, run and weighed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.bridges.dsb_half import Given, HalfBridge

StepMean = Callable[[Tensor, Tensor, Tensor, Given], Tensor]


class Chain(NamedTuple):
    """A half with its grid: ``times`` of its own, from 0 to 1."""

    half: HalfBridge
    times: Tensor
    epsilon: float

    def run(self, x: Tensor, given: Given) -> list[Tensor]:
        """States at all times from those at the first, K + 1 of ``(n, dim)``."""
        states = [x]
        for u, then in zip(self.times[:-1], self.times[1:]):
            law = self.half.step(u, then, states[-1], given, self.epsilon)
            states.append(law.sample() @ self.half.basis.T)
        return states

    def log_prob(self, k: int, x: Tensor, ahead: Tensor, given: Given) -> Tensor:
        """Log density of the state after step k given that before. Shape ``(n,)``."""
        law = self.half.step(self.times[k], self.times[k + 1], x, given, self.epsilon)
        return law.log_prob(ahead @ self.half.basis)

    def mean(self, k: int, x: Tensor, given: Given) -> Tensor:
        """Mean of the state after step k, F(x) or B(x) of the paper. Shape ``(n, dim)``."""
        law = self.half.step(self.times[k], self.times[k + 1], x, given, self.epsilon)
        return law.mean @ self.half.basis.T


def log_ratio(states: list[Tensor], ahead: tuple[Chain, Given], back: tuple[Chain, Given]) -> Tensor:
    r""":math:`\sum_k \log F(x_{k+1} | x_k) - \log B(x_k | x_{k+1})` of paths, from the source on. Shape ``(n,)``."""
    total = torch.zeros_like(states[0][:, 0])
    last = len(states) - 2
    for k, (x, then) in enumerate(zip(states[:-1], states[1:])):
        forwards = ahead[0].log_prob(k, x, then, ahead[1])
        total = total + forwards - back[0].log_prob(last - k, then, x, back[1])
    return total
