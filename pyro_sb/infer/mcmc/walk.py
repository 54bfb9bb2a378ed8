"""The chains' walk under frozen moves: one state a chain, one move a step for all chains."""

import torch
from torch import Tensor

from pyro_sb.infer.mcmc.frozen import Frozen
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import IndexMove, Transition

ROLES = ("bridge", "index", "local")
"""Roles of the moves; the statistic ``move`` holds their positions here."""

ROWS_A_CALL = 2048
ROWS_AHEAD = 256


class Walk:
    """Chains under a mixture of frozen moves; counts what it accepts.

    Every step one move is drawn, independently of the states, and applied to all chains. Proposals of an index move
    that does not depend on the state are drawn for many steps ahead and evaluated in few calls.

    Args:
        log_joint: Target.
        frozen: Moves and their probabilities.
        x: Start of the chains, float64. Shape ``(C, d)``.
        log_density: Target's log density there. Shape ``(C,)``.
    """

    def __init__(self, log_joint: LogJoint, frozen: Frozen, x: Tensor, log_density: Tensor) -> None:
        self.log_joint, self.frozen = log_joint, frozen
        self.x, self.log_density = x, log_density
        self.roles = list(frozen.moves)
        self._ahead: list[tuple[Tensor, Tensor, Tensor]] = []
        self._in_warmup = True
        self._clear()

    def _clear(self) -> None:
        self.num_steps, self.num_divergences = 0, 0
        self.divergent_steps: list[int] = []
        self._accepted = torch.zeros(len(self.roles), len(self.x), dtype=self.x.dtype, device=self.x.device)
        self._tried = [0] * len(self.roles)

    def forget_warmup(self) -> None:
        """Start the counts anew, once: reports speak of the draws that are kept."""
        if self._in_warmup:
            self._in_warmup = False
            self._clear()

    def run(self, num_steps: int) -> tuple[Tensor, dict[str, Tensor]]:
        """States ``(num_steps, C, d)`` and statistics ``(num_steps, C)`` of the next steps.

        ``lp`` is the target's log density in the coordinates of the walk, and ``energy`` minus that: a potential,
        without a kinetic part. ``move`` is a position in :data:`ROLES`.
        """
        probabilities = torch.tensor([self.frozen.probabilities[role] for role in self.roles])
        schedule = torch.multinomial(probabilities, num_steps, replacement=True).tolist()
        self._draw_ahead(schedule)
        draws = torch.empty(num_steps, *self.x.shape, dtype=self.x.dtype, device=self.x.device)
        lp = torch.empty(num_steps, len(self.x), dtype=self.x.dtype, device=self.x.device)
        accept, diverging = torch.empty_like(lp), torch.zeros_like(lp, dtype=torch.bool)
        for i, choice in enumerate(schedule):
            moved = self._step(choice)
            self.x, self.log_density = moved.x, moved.log_density
            draws[i], lp[i], accept[i], diverging[i] = moved.x, moved.log_density, moved.accept_prob, moved.diverging
        self._count(schedule, accept, diverging)
        steps = [self.frozen.moves[role].step_size for role in self.roles]
        column = torch.tensor(schedule, device=self.x.device)[:, None]
        codes = torch.tensor([ROLES.index(role) for role in self.roles], device=self.x.device)
        stats = {
            "acceptance_rate": accept,
            "diverging": diverging,
            "energy": -lp,
            "lp": lp,
            "move": codes[column].expand_as(lp),
            "step_size": torch.tensor(steps, dtype=lp.dtype, device=lp.device)[column].expand_as(lp),
        }
        return draws, stats

    @property
    def acceptance_rate(self) -> float:
        """Mean acceptance probability over steps and chains."""
        return float(self._accepted.sum()) / max(1, self.num_steps * len(self.x))

    @property
    def acceptance_by_chain(self) -> Tensor:
        """Mean acceptance probability of every chain. Shape ``(C,)``."""
        return self._accepted.sum(0) / max(1, self.num_steps)

    def acceptance_by_role(self) -> dict[str, Tensor]:
        """Mean acceptance probability of every move and chain, ``(C,)`` each; NaN for a move that was not tried."""
        tried = torch.tensor(self._tried, dtype=self.x.dtype, device=self.x.device)
        return dict(zip(self.roles, self._accepted / tried[:, None], strict=True))

    def _step(self, choice: int) -> Transition:
        move = self.frozen.moves[self.roles[choice]]
        if isinstance(move, IndexMove) and move.transition is None:
            return move.accept(self.x, self.log_density, *self._ahead.pop())
        return move.step(self.log_joint, self.x, self.log_density)

    def _draw_ahead(self, schedule: list[int]) -> None:
        """Fill the store of independence proposals for this schedule, in calls of bounded size."""
        move = self.frozen.moves.get("index")
        if not isinstance(move, IndexMove) or move.transition is not None:
            return
        missing = schedule.count(self.roles.index("index")) - len(self._ahead)
        if missing <= 0:
            return
        num_chains = len(self.x)
        missing = max(missing, ROWS_AHEAD // num_chains)
        proposals = move.mixture.sample(missing * num_chains)
        values = torch.cat([self.log_joint.log_prob(part) for part in proposals.split(ROWS_A_CALL)])
        mixture_values = torch.cat([move.mixture.log_prob(part) for part in proposals.split(ROWS_A_CALL)])
        fresh = zip(
            proposals.split(num_chains), values.split(num_chains), mixture_values.split(num_chains), strict=True
        )
        self._ahead.extend(fresh)

    def _count(self, schedule: list[int], accept: Tensor, diverging: Tensor) -> None:
        for i, choice in enumerate(schedule):
            self._accepted[choice] += accept[i]
            self._tried[choice] += 1
        steps = diverging.any(1).nonzero().flatten().tolist()
        self.divergent_steps.extend(self.num_steps + step for step in steps)
        self.num_divergences += int(diverging.sum())
        self.num_steps += len(schedule)
