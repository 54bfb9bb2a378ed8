r"""Independence moves of a bridge, :math:`\min\{1, w' / w\}` with :math:`w = \pi(x) / q`: on points or on paths."""

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.proposals import held_sources
from pyro_sb.distributions import Draws
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import ROWS_A_CALL, Proposed, Transition, metropolis

__all__ = ["BridgeProposals", "ProposalMove", "Proposals", "choose"]

BRIDGE_ROWS = 4096
"""Rows of one call of a bridge."""


class Proposals(Protocol):
    r"""A law on the unconstrained vector whose draws carry the log density of all that they leave behind.

    With F the law of a draw and its path, and B a normalised law of the path given its end, ``log_q`` is
    :math:`\log F - \log B`. A chain whose state is x and a path targets :math:`\pi(x) B(\text{path} | x)`; where the
    density of the point is known, there is no path.
    """

    def renew(self) -> None:
        """Draw what proposals share; log densities of states must then be redrawn too."""
        ...

    def shared(self) -> list[Tensor]:
        """What proposals share at present."""
        ...

    def share(self, points: list[Tensor]) -> None:
        """Share these, which `shared` gave."""
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
        """Draw the source points of a light bridge; other bridges share nothing."""
        self.law = self.bridge.proposal_law()

    def shared(self) -> list[Tensor]:
        """Source points that the law holds at present."""
        law = held_sources(self.law)
        return [] if law is None else [law.points]

    def share(self, points: list[Tensor]) -> None:
        """Hold these source points."""
        law = held_sources(self.law)
        if law is not None and points:
            law.points = points[0]

    @torch.no_grad()
    def draws(self, num: int) -> Draws:
        """Draws with their log density."""
        parts = [self._draws(min(BRIDGE_ROWS, num - begin)) for begin in range(0, num, BRIDGE_ROWS)]
        return Draws(*(torch.cat(each) for each in zip(*parts, strict=True)))

    @torch.no_grad()
    def redraw(self, x: Tensor) -> Tensor:
        """Log density of points, or of paths drawn backwards from them."""
        parts = x.to(self.bridge.like()).split(BRIDGE_ROWS)
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


def choose(log_weight: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""One of N independent proposals, drawn by weight, and the log ratio to accept it with.

    .. math:: J \sim w_J / W, \quad W = \sum_i w_i , \qquad \alpha = \min\Big\{1, \frac{W}{W - w_J + w(x)}\Big\}

    For N = 1 it is Metropolis-Hastings, :math:`\min(1, w' / w)`. For more it is multiple-try Metropolis with the other
    proposals as its reference set: both sides of :math:`\pi(x) \prod_i q(x_i)\, w_J / W\, \alpha` are

    .. math:: \pi(x)\, \pi(x_J) \prod_{i \ne J} q(x_i)\; \min\{1 / W, 1 / (W - w_J + w(x))\} ,

    symmetric in x and :math:`x_J`. It moves at least as often to each proposal as iterated sampling importance
    resampling does, which takes :math:`x_J` with probability :math:`w_J / (W + w(x))`.

    Args:
        log_weight: Log of target over proposal density at the chains' states. Shape ``(C,)``.
        log_weights: The same of the proposals. Shape ``(N, C)``; NaN is a weight of zero.

    Returns:
        J, shape ``(C,)``, and :math:`\log W - \log(W - w_J + w(x))`, shape ``(C,)``.

    References:
        The multiple-try method and local optimization in Metropolis sampling (Liu, Liang and Wong, 2000), section 2.
        i-SIR: Particle Markov chain Monte Carlo methods (Andrieu, Doucet and Holenstein, 2010).

    Example:
        >>> choose(torch.zeros(1), torch.full((1, 1), -0.5))
        (tensor([0]), tensor([-0.5000]))
    """
    log_weights = log_weights.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    noise = -torch.empty_like(log_weights).exponential_().log()
    choice = (log_weights + noise).argmax(0)
    others = log_weights.scatter(0, choice[None], -torch.inf)
    rest = torch.logaddexp(others.logsumexp(0), log_weight)
    return choice, log_weights.logsumexp(0) - rest


class ProposalMove:
    r"""Independence Metropolis-Hastings from `Proposals`, in the space of paths where the density is that of paths.

    A state x keeps its own ``log_q``. A proposal :math:`x'` is accepted with :math:`\min(1, w' / w)`,
    :math:`w = \exp(\log \pi(x) - \text{log\_q})`, or by `choose` among several. That leaves
    :math:`\pi(x) B(\text{path} | x)` invariant, whatever the bridge, as long as ``log_q`` belongs to a path of B given
    the state: after any other move it must be redrawn.

    Args:
        proposals: The law.
        num_proposals: Tries N a step.
    """

    name = "bridge"
    step_size = 0.0
    target_accept = 0.0
    independent = True

    def __init__(self, proposals: Proposals, num_proposals: int = 1) -> None:
        self.proposals, self.num_proposals = proposals, num_proposals
        self.cost = float(num_proposals)

    def renew(self) -> None:
        """Draw what proposals share."""
        self.proposals.renew()

    def shared(self) -> list[Tensor]:
        """What proposals share at present, such as source points."""
        return self.proposals.shared()

    def share(self, points: list[Tensor]) -> None:
        """Share these."""
        self.proposals.share(points)

    def ahead(self, log_joint: LogJoint, num_steps: int, num_chains: int) -> list[Proposed]:
        """Proposals for many steps, which do not depend on the states: drawn and scored in few calls.

        Rows that go to the log joint have the chain as their fastest index, and a call holds whole steps.
        """
        x, log_q = self.proposals.draws(num_steps * self.num_proposals * num_chains)
        rows = num_chains * max(1, ROWS_A_CALL // num_chains)
        log_density = torch.cat([log_joint.log_prob(part) for part in x.split(rows)])
        shape = (num_steps, self.num_proposals, num_chains)
        return [
            Proposed(*parts)
            for parts in zip(x.unflatten(0, shape), log_density.reshape(shape), log_q.reshape(shape), strict=True)
        ]

    def accept(self, x: Tensor, log_density: Tensor, log_q: Tensor | None, ahead: Proposed) -> Transition:
        """One step on proposals that were scored ahead; the path of a state without ``log_q`` is drawn backwards."""
        log_q = self.proposals.redraw(x) if log_q is None else log_q
        choice, log_ratio = choose(log_density - log_q, ahead.log_density - ahead.log_q)
        rows = choice[None]
        proposal = Proposed(
            ahead.x.gather(0, rows[..., None].expand(1, *x.shape))[0],
            ahead.log_density.gather(0, rows)[0],
            ahead.log_q.gather(0, rows)[0],
        )
        moved, probability, _ = metropolis(Proposed(x, log_density, log_q), proposal, log_ratio)
        return Transition(
            moved.x, moved.log_density, probability, torch.zeros_like(probability, dtype=torch.bool), moved.log_q
        )

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain, from paths drawn backwards."""
        self.renew()
        (ahead,) = self.ahead(log_joint, 1, len(x))
        return self.accept(x, log_density, None, ahead)
