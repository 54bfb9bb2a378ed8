"""The chain of a Langevin bridge, whitened: where it starts, how it walks, the log density of its plain paths."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sb.bridges.langevin_schemes import NOISES, SCHEMES, Dynamics
from pyro_sb.ops.attention import CHUNK_ELEMENTS
from pyro_sb.ops.sinkhorn import log_affinity


@dataclass(frozen=True)
class SmoothedDraws:
    r"""The mixture of the draws' neighbourhoods that chains start from.

    .. math:: p_0(z | y) = \sum_j \pi_j(y)\, N(z; z_j, \sigma_j^2 I), \quad \pi_j(y) \propto w_j\, e^{-|y - y_j|^2 / 2}.

    Attributes:
        points: Centres :math:`z_j`. Shape ``(M, d)``.
        log_weights: Shape ``(M,)``.
        variance: :math:`\sigma_j^2`. Shape ``(M,)``.
        context: Contexts :math:`y_j` in units of their bandwidth, or None. Shape ``(M, k)``.
    """

    points: Tensor
    log_weights: Tensor
    variance: Tensor
    context: Tensor | None = None

    def sample(self, num: int, y: Tensor | None) -> Tensor:
        """Draws, a row of context each. Shape ``(num, d)``."""
        if y is None:
            index = torch.multinomial(self.log_weights.exp(), num, replacement=True)
        else:
            index = torch.cat([torch.multinomial(self._mixture(part).exp(), 1)[:, 0] for part in y.split(self._rows)])
        centre = self.points[index]
        return centre + self.variance[index, None].sqrt() * torch.randn_like(centre)

    def log_prob(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Log density with respect to the whitened volume. Shape ``(C,)``."""
        contexts = [None] * len(z.split(self._rows)) if y is None else y.split(self._rows)
        return torch.cat([self._log_prob(part, row) for part, row in zip(z.split(self._rows), contexts)])

    def _log_prob(self, z: Tensor, y: Tensor | None) -> Tensor:
        log_normal = log_affinity(z, self.points, self.variance.new_zeros(len(z)), 2 * self.variance)
        log_normal = log_normal - 0.5 * z.shape[1] * (2 * math.pi * self.variance).log()
        mixture = self.log_weights if y is None else self._mixture(y)
        return torch.logsumexp(log_normal + mixture, dim=1)

    def _mixture(self, y: Tensor) -> Tensor:
        return torch.log_softmax(log_affinity(y, self.context) + self.log_weights, dim=1)  # type: ignore[arg-type]

    @property
    def _rows(self) -> int:
        return max(1, CHUNK_ELEMENTS // len(self.points))


def walk(dynamics: Dynamics, scheme: str, z: Tensor, y: Tensor | None, num_steps: int) -> Iterator[Tensor]:
    """States after each of ``num_steps`` steps from ``z``. Shapes ``(C, d)``."""
    step, noises = SCHEMES[scheme], NOISES.get(scheme, 1)
    for _ in range(num_steps):
        z = step(dynamics, z, y, torch.randn(noises, *z.shape, dtype=z.dtype, device=z.device))
        yield z


def end_of_walk(dynamics: Dynamics, scheme: str, z: Tensor, y: Tensor | None, num_steps: int) -> Tensor:
    """The last state of a walk. Shape ``(C, d)``."""
    return deque(walk(dynamics, scheme, z, y, num_steps), maxlen=1)[0]


def log_path_ratio(dynamics: Dynamics, states: Tensor, y: Tensor | None) -> Tensor:
    r"""Log density of plain steps forwards, less that of the same steps walked backwards.

    .. math:: \sum_k \log F(z_{k+1} | z_k) - \log B(z_k | z_{k+1}), \qquad B = F.

    Any normalised B makes the weight exact; the plain chain is nearly reversible (on Gaussians exactly), so its own
    step is a good one.

    Args:
        dynamics: Of the bridge.
        states: Paths. Shape ``(num_steps + 1, C, d)``.
        y: Context of each path, or None. Shape ``(C, k)``.

    Returns:
        Shape ``(C,)``.
    """
    total = states.new_zeros(states.shape[1])
    for start, end in zip(states[:-1], states[1:]):
        total = total + dynamics.log_step(end, start, y) - dynamics.log_step(start, end, y)
    return total
