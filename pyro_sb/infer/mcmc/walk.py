r"""A walk of many chains under frozen moves, each :math:`\pi`-invariant, and the record of its states.

One state a chain, the same move for all; blocks of states as they arrive, and figures of their convergence.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from pyro.ops import stats
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import IndependentMove, Move, Proposed, Transition

__all__ = [
    "ROLES",
    "SAME",
    "TUNING_CHAINS",
    "Block",
    "Frozen",
    "PerChain",
    "Record",
    "Walk",
    "blocks",
    "figures_of",
    "floating",
    "in_chunks",
    "moving_entries",
    "per_chain",
    "site_diagnostics",
    "states",
    "worst_r_hat",
]

ROLES = ("bridge", "index", "local", "jump")
"""Roles of the moves; the statistic ``move`` holds their positions here."""

TUNING_CHAINS = 64
"""Chains that moves are tuned on."""

ROWS_AHEAD = 256
SAME = 1.01  # R-hat of chains that agree


@dataclass(frozen=True)
class Frozen:
    """Moves that warm-up learnt, by role: ``"bridge"``, ``"index"``, ``"local"``.

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
        self._clear()

    def _clear(self) -> None:
        self.num_steps, self.num_divergences = 0, 0
        self.divergent_steps: list[int] = []
        self._accepted = {role: torch.zeros_like(self.log_density) for role in self.roles}
        self._tried = dict.fromkeys(self.roles, 0)

    def forget_warmup(self) -> None:
        """Set the counts to zero, once: reports speak of the draws that are kept."""
        if self._in_warmup:
            self._in_warmup = False
            self._clear()

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


class Block(NamedTuple):
    r"""Consecutive states of every chain, as ``sample_block`` returns them.

    Attributes:
        draws: Unconstrained sites, each of shape ``(num_transitions, num_chains, *site)``.
        stats: One value a transition and chain, such as ``acceptance_rate``, ``energy``, ``step_size``, ``diverging``,
            ``move``, ``lp``. Each of shape ``(num_transitions, num_chains)``.
    """

    draws: dict[str, Tensor]
    stats: dict[str, Tensor]


class PerChain(list[Any]):
    """A kernel's figure with one value a chain, which `per_chain` deals out."""


def blocks(num_steps: int, single: bool) -> Iterator[tuple[int, int]]:
    """(start, size) of each block; num_steps alone decides, so that a seed fixes the draws. Ctrl-C loses one block."""
    size = 1 if single else min(64, max(8, -(-num_steps // 16)))
    for start in range(0, num_steps, size):
        yield start, min(size, num_steps - start)


class BlockDraws(NamedTuple):
    """A block with what belongs to its states: kept sites, deterministic and enumerated ones, statistics."""

    sites: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    discrete: dict[str, Tensor]
    stats: dict[str, Tensor]


class Record:
    """Draws as they arrive: blocks of the sites to keep, their deterministic sites and statistics.

    One draw of a model's enumerated sites a state serves the deterministic sites and `discrete`.
    """

    def __init__(self, save_params: Sequence[str] | None) -> None:
        self.num_draws = 0
        self.num_diverging = 0
        self.warmup_seconds = self.seconds = 0.0
        self._wanted = save_params
        self._log_joint: Any = None
        self._blocks: list[BlockDraws] = []

    def open(self, log_joint: Any) -> None:
        """Learn the model's sites; refuse unknown names before any work is done."""
        self._log_joint = log_joint
        if self._wanted is None:
            return
        known = set(log_joint.site_shapes) | set(log_joint.deterministic_sites)
        unknown = sorted(set(self._wanted) - known)
        if unknown:
            raise ValueError(f"save_params must name sites of the model, got {unknown}. Known sites: {sorted(known)}.")

    def add(self, block: Block) -> None:
        """Keep a block, with the deterministic sites at its states."""
        deterministic, discrete, log_joint = {}, {}, self._log_joint
        if log_joint.deterministic_sites and (self._wanted is None or set(self._wanted) - set(block.draws)):
            z = states(block, log_joint)
            discrete = in_chunks(log_joint.discrete, z)
            deterministic = in_chunks(log_joint.deterministic, z, discrete)
        self._blocks.append(BlockDraws(self._kept(block.draws), self._kept(deterministic), discrete, block.stats))
        self.num_draws += next(iter((block.draws | block.stats).values())).shape[0]
        self.num_diverging += int(block.stats["diverging"].sum()) if "diverging" in block.stats else 0

    def _kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name].detach() for name in sorted(values) if self._wanted is None or name in self._wanted}

    def sites(self) -> dict[str, Tensor]:
        """Unconstrained draws, each of shape (chains, draws, *site)."""
        return _joined([block.sites for block in self._blocks])

    def deterministic(self) -> dict[str, Tensor]:
        """Deterministic sites, each of shape (chains, draws, *site)."""
        return _joined([block.deterministic for block in self._blocks])

    def discrete(self) -> dict[str, Tensor]:
        """The draws of enumerated sites behind the deterministic ones, (chains, draws, *site); empty if none were."""
        return _joined([block.discrete for block in self._blocks])

    def statistics(self) -> dict[str, Tensor]:
        """Statistics, each of shape (chains, draws)."""
        return _joined([block.stats for block in self._blocks])


def states(block: Block, log_joint: Any) -> Tensor:
    """The vectors of a block, (steps, chains, dim), also where the model has no continuous latent."""
    if block.draws:
        return log_joint.pack(block.draws)
    return torch.zeros(*next(iter(block.stats.values())).shape, 0)


def _joined(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks of (steps, chains, ...) to (chains, draws, ...)."""
    return {name: torch.cat([block[name] for block in blocks]).transpose(0, 1).contiguous() for name in blocks[0]}


def in_chunks(
    function: Callable[..., dict[str, Tensor]], z: Tensor, beside: dict[str, Tensor] | None = None, rows: int = 4096
) -> dict[str, Tensor]:
    """Apply a row-wise function to (*batch, dim), and to tensors beside it, in pieces that fit in memory."""
    last, pieces = z.dim() - 2, []
    for start in range(0, max(1, z.shape[:-1].numel()), rows):
        part = slice(start, start + rows)
        given = [] if beside is None else [{name: x.flatten(0, last)[part] for name, x in beside.items()}]
        pieces.append(function(z.flatten(0, last)[part], *given))
    return {name: torch.cat([piece[name] for piece in pieces]).unflatten(0, z.shape[:-1]) for name in pieces[0]}


def site_diagnostics(value: Tensor) -> OrderedDict[str, Tensor]:
    """Effective sample size and split R-hat over (chains, draws, ...); NaN of constant entries."""
    value = floating(value)
    moving = (value != value[:1, :1]).flatten(0, 1).any(0)
    columns = value[:, :, moving]  # a constant would spoil Pyro's figures of its neighbours
    figures = OrderedDict(n_eff=value.new_full(moving.shape, torch.nan), r_hat=value.new_full(moving.shape, torch.nan))
    if value.shape[1] >= 4 and bool(moving.any()):
        figures["n_eff"][moving] = stats.effective_sample_size(columns)
        figures["r_hat"][moving] = stats.split_gelman_rubin(columns)
    return figures


def figures_of(samples: dict[str, Tensor], most: int) -> Iterator[tuple[str, list[float]]]:
    """Mean, sd, 5 % and 95 % quantiles, n_eff and r_hat of at most so many numbers, by name.

    Args:
        samples: Draws by site, ``(chains, draws, *site)``.
        most: How many numbers.
    """
    for name, value in samples.items():
        value = floating(value)
        convergence = site_diagnostics(value)
        columns = value.flatten(0, 1)
        levels = torch.tensor([0.05, 0.95], dtype=columns.dtype, device=columns.device)
        figures = [columns.mean(0), columns.std(0), *columns.quantile(levels, 0), *convergence.values()]
        for index in product(*map(range, value.shape[2:])):
            if most == 0:
                return
            most -= 1
            yield name + (f"[{', '.join(map(str, index))}]" if index else ""), [float(x[index]) for x in figures]


def moving_entries(name: str, value: Tensor) -> dict[str, Tensor]:
    """A site, by entry where some are constant (data): those are left out, Pyro's table has no figures beside them."""
    moving = (value != value[:1, :1]).flatten(0, 1).any(0)
    if moving.all() or not moving.any():
        return {name: value}
    return {
        f"{name}{place}".replace(" ", ""): value[(slice(None), slice(None), *place)]
        for place in moving.nonzero().tolist()
    }


def worst_r_hat(samples: dict[str, Tensor]) -> tuple[str, float]:
    """The number of the largest split R-hat, and that: of the draws or of their normal scores, whichever is smaller.

    One draw of a heavy tail moves the first and ties move the second; chains that disagree move both.

    Args:
        samples: Draws by site, ``(chains, draws, *site)``, at least four a chain.
    """
    name, worst = "", -math.inf
    for site, value in samples.items():
        if value.is_complex() or not value.numel():
            continue
        found = stats.split_gelman_rubin(floating(value)).reshape(-1).nan_to_num(-math.inf, math.inf, -math.inf)
        high = (found > max(worst, SAME)).nonzero().flatten().tolist()
        for i in sorted(high, key=found.tolist().__getitem__, reverse=True):
            if float(found[i]) <= worst:
                break
            column = floating(value).flatten(2)[..., i] if value.dim() > 2 else floating(value)
            figure = min(float(found[i]), float(stats.split_gelman_rubin(_normal_scores(column))))
            if figure > worst:
                index = list(product(*map(range, value.shape[2:])))[i]
                name, worst = site + (f"[{', '.join(map(str, index))}]" if index else ""), figure
    return name, worst


def _normal_scores(column: Tensor) -> Tensor:
    """Normal quantiles of the ranks of all draws ``(chains, draws)``."""
    ranks = column.reshape(-1).argsort().argsort().to(torch.float64)
    return torch.special.ndtri((ranks + 0.625) / (ranks.numel() + 0.25)).reshape(column.shape)


def per_chain(diagnostics: dict[str, Any], diverging: Tensor | None, num_chains: int) -> list[dict[str, Any]]:
    """Diagnostics of each chain, with its diverging draws as indices.

    What is marked as `PerChain` is dealt out; anything else belongs to every chain.
    """
    chains = [{key: _entry(value, i) for key, value in diagnostics.items()} for i in range(num_chains)]
    for i, chain in enumerate(chains):
        chain.setdefault("divergences", [])
        if diverging is not None:
            chain["divergences"] = diverging[i].nonzero().flatten().tolist()
    return chains


def _entry(value: Any, i: int) -> Any:
    if isinstance(value, PerChain):
        return value[i]
    return value.tolist() if isinstance(value, Tensor) else value


def floating(value: Tensor) -> Tensor:
    """Whole numbers and booleans as floats, for statistics."""
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())
