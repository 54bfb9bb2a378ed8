r"""A walk of many chains under frozen moves, each :math:`\pi`-invariant: one state a chain, the same move for all."""

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import IndependentMove, Move, Proposed, Transition

__all__ = ["ROLES", "TUNING_CHAINS", "Frozen", "Walk", "mean_step"]

ROLES = ("bridge", "index", "local", "jump")
"""Roles of the moves; the statistic ``move`` holds their positions here."""

TUNING_CHAINS = 64
"""Chains that moves are tuned on."""

ROWS_AHEAD = 256


@dataclass(frozen=True)
class Frozen:
    """Moves that warm-up learnt, by role: ``"bridge"``, ``"index"``, ``"local"``, ``"jump"``.

    Attributes:
        moves: The moves.
        probabilities: Of the move that a step begins with: they sum to one and do not depend on the state.
        acceptance: Acceptance rates measured while tuning.
        then: Roles of the moves that follow in every step.
    """

    moves: dict[str, Move]
    probabilities: dict[str, float]
    acceptance: dict[str, float]
    then: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: each move with its probability, acceptance rate and step."""
        parts = []
        for role, move in self.moves.items():
            size = mean_step(move)
            when = f"p {self.probabilities[role]:.2f}" if role in self.probabilities else "in every step"
            rate = f", accepts {self.acceptance[role]:.2f}" if role in self.acceptance else ""
            parts.append(f"{role} ({move.name}) {when}{rate}" + (f", step {size:.3g}" if size else ""))
        return "; ".join(parts)


def mean_step(move: Move) -> float:
    """A move's step size; of several targets side by side, the mean."""
    return float(move.step_size.mean()) if isinstance(move.step_size, Tensor) else float(move.step_size)


@runtime_checkable
class SharingMove(Protocol):
    """A move whose proposals share random numbers, such as the source points of a light bridge."""

    def shared(self) -> list[Tensor]:
        """What they share at present."""

    def share(self, points: list[Tensor]) -> None:
        """Share these, which `shared` gave."""


class Walk:
    """Chains under frozen moves; counts what it accepts.

    Every step one move is drawn, independently of the states, and applied to all chains; the moves of ``frozen.then``
    follow it. Proposals of a move that does not depend on the state are drawn for many steps ahead and evaluated in few
    calls. Where they are paths, a state keeps the log density of its own path until another move has moved it.

    Args:
        log_joint: Target.
        frozen: Moves and their probabilities.
        x: Start of the chains, float64. Shape ``(C, d)``.
        log_density: Target's log density there. Shape ``(C,)``.

    Attributes:
        log_q: Log density of the states' own paths, ``(C,)``; None where they are to be drawn.
    """

    def __init__(self, log_joint: LogJoint, frozen: Frozen, x: Tensor, log_density: Tensor) -> None:
        self.log_joint, self.frozen = log_joint, frozen
        self.x, self.log_density = x, log_density
        self.log_q: Tensor | None = None
        self.roles = list(frozen.moves)
        self._ahead: dict[str, list[Proposed]] = {role: [] for role, move in frozen.moves.items() if move.independent}
        self._in_warmup = True
        self.count_anew()

    def count_anew(self) -> None:
        """Set the counts to zero."""
        self.num_steps, self.num_divergences = 0, 0
        self.divergent_steps: list[int] = []
        self._accepted = {role: torch.zeros_like(self.log_density) for role in self.roles}
        self._tried = dict.fromkeys(self.roles, 0)

    def state(self) -> dict[str, Any]:
        """All that the chains need to go on, copied where it changes in place: tensors and plain values."""
        moves = self.frozen.moves
        return {
            "x": self.x,
            "log_density": self.log_density,
            "log_q": self.log_q,
            "ahead": {role: [tuple(step) for step in store] for role, store in self._ahead.items()},
            "shared": {role: move.shared() for role, move in moves.items() if isinstance(move, SharingMove)},
            "accepted": {role: total.clone() for role, total in self._accepted.items()},
            "tried": dict(self._tried),
            "num_steps": self.num_steps,
            "num_divergences": self.num_divergences,
            "divergent_steps": list(self.divergent_steps),
            "in_warmup": self._in_warmup,
        }

    @classmethod
    def resumed(cls, log_joint: LogJoint, frozen: Frozen, state: dict[str, Any]) -> "Walk":
        """The walk that was in this `state`, which stays as it is."""
        walk = cls(log_joint, frozen, state["x"], state["log_density"])
        walk.log_q = state["log_q"]
        if walk._ahead.keys() != state["ahead"].keys() or list(state["tried"]) != walk.roles:
            raise ValueError(f"the chains' state must be one of the moves {walk.roles}, got that of others.")
        for role, store in state["ahead"].items():
            walk._ahead[role] = [Proposed(*step) for step in store]
        for role, points in state["shared"].items():
            cast(SharingMove, frozen.moves[role]).share(points)
        walk._accepted = {role: total.clone() for role, total in state["accepted"].items()}
        walk._tried = dict(state["tried"])
        walk.num_steps, walk.num_divergences = state["num_steps"], state["num_divergences"]
        walk.divergent_steps, walk._in_warmup = list(state["divergent_steps"]), state["in_warmup"]
        return walk

    def forget_warmup(self) -> None:
        """Set the counts to zero, once: reports speak of the draws that are kept."""
        if self._in_warmup:
            self._in_warmup = False
            self.count_anew()

    def run(self, num_transitions: int) -> tuple[Tensor, dict[str, Tensor]]:
        """States ``(num_transitions, C, d)`` and statistics ``(num_transitions, C)`` of the next transitions.

        ``lp`` is the target's log density in the coordinates of the walk, and ``energy`` minus that: a potential,
        without a kinetic part. ``move`` is a position in :data:`ROLES`, of the move that the step began with.
        ``acceptance_rate`` is the mean over a step's moves; where several follow each other, each has its own too.
        """
        begins = [role for role in self.roles if role in self.frozen.probabilities]
        probabilities = torch.tensor([self.frozen.probabilities[role] for role in begins])
        drawn = torch.multinomial(probabilities, num_transitions, replacement=True).tolist()
        schedule = [(begins[index], *self.frozen.then) for index in drawn]
        self._draw_ahead(schedule)
        draws = torch.empty(num_transitions, *self.x.shape, dtype=self.x.dtype, device=self.x.device)
        lp = torch.empty(num_transitions, len(self.x), dtype=self.x.dtype, device=self.x.device)
        accept, diverging = torch.zeros_like(lp), torch.zeros_like(lp, dtype=torch.bool)
        each = {f"acceptance_{role}": torch.zeros_like(lp) for role in self.roles} if self.frozen.then else {}
        for i, scan in enumerate(schedule):
            for role in scan:
                moved = self._step(role)
                accept[i] += moved.accept_prob / len(scan)
                diverging[i] |= moved.diverging
                if each:
                    each[f"acceptance_{role}"][i] += moved.accept_prob / scan.count(role)
            draws[i], lp[i] = self.x, self.log_density
        self.num_steps += num_transitions
        codes = torch.tensor([ROLES.index(scan[0]) for scan in schedule], device=lp.device)
        sizes = [max(mean_step(self.frozen.moves[role]) for role in scan[-1:] + scan[:1]) for scan in schedule]
        figures = {
            "acceptance_rate": accept,
            "diverging": diverging,
            "energy": -lp,
            "lp": lp,
            "move": codes[:, None].expand_as(lp),
            "step_size": torch.tensor(sizes, dtype=lp.dtype, device=lp.device)[:, None].expand_as(lp),
        }
        return draws, figures | each

    def count_divergences(self, diverging: Tensor) -> None:
        """Count those of the transitions that have just been made, by chain: rows of several targets are one chain's.

        Args:
            diverging: Shape ``(num_transitions, num_chains)``.
        """
        begun = self.num_steps - len(diverging)
        self.divergent_steps.extend(begun + step for step in diverging.any(1).nonzero().flatten().tolist())
        self.num_divergences += int(diverging.sum())

    @property
    def acceptance_rate(self) -> float:
        """Mean acceptance probability over moves and chains."""
        return float(self.acceptance_by_chain.mean())

    @property
    def acceptance_by_chain(self) -> Tensor:
        """Mean acceptance probability of every chain. Shape ``(C,)``."""
        return torch.stack(list(self._accepted.values())).sum(0) / max(1, sum(self._tried.values()))

    def acceptance_by_role(self) -> dict[str, Tensor]:
        """Mean acceptance probability of every move and chain, ``(C,)`` each; NaN for a move that was not tried."""
        tried = torch.tensor(list(self._tried.values()), dtype=self.x.dtype, device=self.x.device)
        return {role: self._accepted[role] / tried[i] for i, role in enumerate(self.roles)}

    def _step(self, role: str) -> Transition:
        """Move all chains once."""
        move = self.frozen.moves[role]
        if role in self._ahead:
            ahead = self._ahead[role].pop()
            moved = cast(IndependentMove, move).accept(self.x, self.log_density, self.log_q, ahead)
        else:
            moved = move.step(self.log_joint, self.x, self.log_density)
        self.x, self.log_density, self.log_q = moved.x, moved.log_density, moved.log_q
        self._accepted[role] += moved.accept_prob
        self._tried[role] += 1
        return moved

    def _draw_ahead(self, schedule: list[tuple[str, ...]]) -> None:
        """Fill the stores for this schedule, in calls of bounded size; an empty one renews what proposals share."""
        for role, store in self._ahead.items():
            move = cast(IndependentMove, self.frozen.moves[role])
            missing = sum(scan.count(role) for scan in schedule) - len(store)
            if missing <= 0:
                continue
            if not store:
                move.renew()
                self.log_q = None
            fewest = ROWS_AHEAD // (len(self.x) * move.num_proposals)
            store.extend(move.ahead(self.log_joint, max(missing, fewest), len(self.x)))
