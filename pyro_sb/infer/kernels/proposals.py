"""What an independence move proposes from: a bridge, or an amortised posterior at its observation."""

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.distributions import Draws
from pyro_sb.infer.amortized.latent_law import LatentLaw

__all__ = ["BridgeProposals", "PosteriorProposals", "Proposals"]

ROWS_A_CALL = 4096


class Proposals(Protocol):
    r"""A law on the unconstrained vector whose draws carry the log density of all that they leave behind.

    With F the law of a draw and its path, and B a normalised law of the path given its end, ``log_q`` is
    :math:`\log F - \log B`. A chain whose state is x and a path targets :math:`\pi(x) B(\text{path} | x)`; where the
    density of the point is known, there is no path.
    """

    def renew(self) -> None:
        """Draw anew what proposals share; log densities of states must then be redrawn too."""
        ...

    def draws(self, num: int) -> Draws:
        """Independent proposals ``(num, dim)`` in float64, and their ``log_q`` ``(num,)``."""
        ...

    def redraw(self, x: Tensor) -> Tensor:
        """The ``log_q`` of states ``(num, dim)``, each with a path drawn backwards from it. Shape ``(num,)``."""
        ...


class BridgeProposals:
    r"""Proposals of a bridge.

    With ``num_paths`` M > 1 each proposal has M - 1 further paths, drawn backwards from its end, and

    .. math:: \text{log\_q} = \log \tfrac1M \sum_j \exp(\text{log\_q}_j) ,

    which is again that of a normalised law, of the end and M paths in random order, and nearer the marginal density.

    Args:
        bridge: Fitted, with a density.
        context: What it is called on. Shape ``(context_dim,)``; None for an unconditional bridge.
        num_paths: M, at least 1.
    """

    def __init__(self, bridge: Bridge, context: Tensor | None = None, num_paths: int = 1) -> None:
        self.bridge, self.context = bridge, context
        self.num_paths = num_paths if bridge.density == "path" else 1
        self.renew()

    def renew(self) -> None:
        """Draw the source points of a light bridge anew; of other bridges nothing is shared."""
        self.law = self.bridge.proposal_law()

    @torch.no_grad()
    def draws(self, num: int) -> Draws:
        """Draws with their log density."""
        parts = [self._draws(min(ROWS_A_CALL, num - begin)) for begin in range(0, num, ROWS_A_CALL)]
        return Draws(*(torch.cat(each) for each in zip(*parts, strict=True)))

    @torch.no_grad()
    def redraw(self, x: Tensor) -> Tensor:
        """Log density of points, or of paths drawn backwards from them."""
        parts = x.to(self.bridge.like()).split(ROWS_A_CALL)
        return torch.cat([self._mean([self._redraw(part) for _ in range(self.num_paths)]) for part in parts])

    def _draws(self, num: int) -> Draws:
        value, log_q = self.law.draws_rows(num, self._contexts(num))
        further = [self._redraw(value) for _ in range(self.num_paths - 1)]
        return Draws(value.double(), self._mean([log_q, *further]))

    def _redraw(self, rows: Tensor) -> Tensor:
        return self.law.redraw_rows(rows, self._contexts(len(rows)))

    def _mean(self, log_q: list[Tensor]) -> Tensor:
        return torch.stack(log_q).double().logsumexp(0) - math.log(len(log_q))

    def _contexts(self, num: int) -> Tensor | None:
        return None if self.context is None else self.context.expand(num, -1)


class PosteriorProposals:
    """Proposals of an amortised posterior at one observation, in the model's unconstrained coordinates.

    Args:
        law: Its law, of one observation.
        num_paths: As in `BridgeProposals`.
    """

    def __init__(self, law: LatentLaw, num_paths: int = 1) -> None:
        self.law, self.num_paths = law, 1 if law.marginal else num_paths

    def renew(self) -> None:
        """Nothing is shared."""

    @torch.no_grad()
    def draws(self, num: int) -> Draws:
        """Draws with their log density."""
        value, log_q = self.law.draws(num)
        if self.num_paths > 1:
            further = self.law.path_log_prob(value, self.num_paths - 1) + math.log(self.num_paths - 1)
            log_q = torch.logaddexp(log_q, further) - math.log(self.num_paths)
        return Draws(value[:, 0].double(), log_q[:, 0].double())

    @torch.no_grad()
    def redraw(self, x: Tensor) -> Tensor:
        """Log density of points, or of paths drawn backwards from them."""
        return self.law.path_log_prob(x[:, None].to(self.law.context), self.num_paths)[:, 0].double()
