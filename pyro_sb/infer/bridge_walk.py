"""The walk of chains that a bridge proposes to: each state with the log density of its own path."""

from torch import Tensor

from pyro_sb.infer.bridge_moves import ProposalMove, Proposed
from pyro_sb.infer.frozen import Frozen
from pyro_sb.infer.moves import Transition
from pyro_sb.infer.potential import LogJoint
from pyro_sb.infer.walk import ROWS_AHEAD, Walk

__all__ = ["BridgeWalk"]


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
