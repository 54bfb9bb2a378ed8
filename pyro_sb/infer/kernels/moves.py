r"""The independence move of a bridge, on points or on paths, with one proposal or several tries."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.kernels.proposals import Proposals
from pyro_sb.infer.mcmc.frozen import Frozen
from pyro_sb.infer.mcmc.walk import ROWS_AHEAD, Walk
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import Transition, metropolis

__all__ = ["BridgeWalk", "ProposalMove", "Proposed", "choose"]

ROWS_A_CALL = 2048


class Proposed(NamedTuple):
    """N proposals for each of C chains: points ``(N, C, d)``, the target's log density and ``log_q`` ``(N, C)``."""

    x: Tensor
    log_density: Tensor
    log_q: Tensor


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

    def __init__(self, proposals: Proposals, num_proposals: int = 1) -> None:
        self.proposals, self.num_proposals = proposals, num_proposals
        self.cost = float(num_proposals)

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

    def accept(self, x: Tensor, log_density: Tensor, log_q: Tensor, ahead: Proposed) -> tuple[Transition, Tensor]:
        """One step on proposals that were scored ahead, and the ``log_q`` of the new states."""
        choice, log_ratio = choose(log_density - log_q, ahead.log_density - ahead.log_q)
        rows = choice[None]
        proposal = ahead.x.gather(0, rows[..., None].expand(1, *x.shape))[0]
        value, proposal_log_q = ahead.log_density.gather(0, rows)[0], ahead.log_q.gather(0, rows)[0]
        marked = torch.cat([proposal, proposal_log_q[:, None]], 1)  # one test decides on the point and its path
        moved = metropolis(torch.cat([x, log_q[:, None]], 1), log_density, marked, value, log_ratio)
        return moved._replace(x=moved.x[:, :-1]), moved.x[:, -1]

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain, from paths drawn backwards anew."""
        self.proposals.renew()
        (ahead,) = self.ahead(log_joint, 1, len(x))
        return self.accept(x, log_density, self.proposals.redraw(x), ahead)[0]


# The walk of chains that a bridge proposes to: each state with the log density of its own path


class BridgeWalk(Walk):
    """Chains under a bridge's move and a local one; paths are redrawn at the start and after every local move.

    Args:
        log_joint: Target.
        frozen: Moves and their probabilities; ``"bridge"`` is a `ProposalMove`.
        x: Start of the chains, float64. Shape ``(C, d)``.
        log_density: Target's log density there. Shape ``(C,)``.
    """

    def __init__(self, log_joint: LogJoint, frozen: Frozen, x: Tensor, log_density: Tensor) -> None:
        super().__init__(log_joint, frozen, x, log_density)
        move = frozen.moves["bridge"]
        assert isinstance(move, ProposalMove)
        self.bridge_move = move
        self._proposed: list[Proposed] = []
        self._log_q: Tensor | None = None  # of each state's path; None where it is yet to be drawn

    def _step(self, choice: int) -> Transition:
        if self.roles[choice] != "bridge":
            self._log_q = None
            return super()._step(choice)
        if self._log_q is None:
            self._log_q = self.bridge_move.proposals.redraw(self.x)
        moved, self._log_q = self.bridge_move.accept(self.x, self.log_density, self._log_q, self._proposed.pop())
        return moved

    def _draw_ahead(self, schedule: list[int]) -> None:
        """Fill the store for this schedule; what proposals share is renewed when it is empty."""
        missing = schedule.count(self.roles.index("bridge")) - len(self._proposed)
        if missing <= 0:
            return
        if not self._proposed:
            self.bridge_move.proposals.renew()
            self._log_q = None
        num_chains = len(self.x)
        fewest = ROWS_AHEAD // (num_chains * self.bridge_move.num_proposals)
        self._proposed.extend(self.bridge_move.ahead(self.log_joint, max(missing, fewest), num_chains))
