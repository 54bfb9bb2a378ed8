"""The record of many chains: blocks of states as they arrive, with what belongs to them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "BlockDraws", "Record", "blocks", "in_chunks", "states"]


class Block(NamedTuple):
    r"""Consecutive states of every chain, as ``sample_block`` returns them.

    Attributes:
        draws: Unconstrained sites, each of shape ``(num_transitions, num_chains, *site)``.
        stats: One value a transition and chain, such as ``acceptance_rate``, ``energy``, ``step_size``, ``diverging``,
            ``move``, ``lp``. Each of shape ``(num_transitions, num_chains)``.
    """

    draws: dict[str, Tensor]
    stats: dict[str, Tensor]


def blocks(num_steps: int, single: bool, done: int = 0) -> Iterator[tuple[int, int]]:
    """(start, size) of each block; num_steps alone decides, so that a seed fixes the draws. Ctrl-C loses one block.

    Args:
        num_steps: Steps in all.
        single: Whether blocks are single steps.
        done: Steps that were made before, in blocks of the same size.
    """
    size = 1 if single else min(64, max(8, -(-num_steps // 16)))
    for start in range(done, num_steps, size):
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

    Attributes:
        num_draws: Draws of a chain so far.
        num_diverging: Draws so far that diverged, of all chains.
        warmup_seconds: Wall time until the first draw.
        seconds: Wall time of all.
        rest: The chains' state after the last draw, as the kernel gave it.
    """

    def __init__(self, save_params: Sequence[str] | None) -> None:
        self.num_draws = 0
        self.num_diverging = 0
        self.warmup_seconds = self.seconds = 0.0
        self.rest: Any = None
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

    def add(self, block: Block, rest: Any = None) -> None:
        """Keep a block, with the deterministic sites at its states, and the chains' state after it."""
        deterministic, discrete, log_joint = {}, {}, self._log_joint
        if log_joint.deterministic_sites and (self._wanted is None or set(self._wanted) - set(block.draws)):
            z = states(block, log_joint)
            discrete = in_chunks(log_joint.discrete, z)
            deterministic = in_chunks(log_joint.deterministic, z, discrete)
        self._blocks.append(BlockDraws(self._kept(block.draws), self._kept(deterministic), discrete, block.stats))
        self.num_draws += next(iter((block.draws | block.stats).values())).shape[0]
        self.num_diverging += int(block.stats["diverging"].sum()) if "diverging" in block.stats else 0
        self.rest = rest

    def state(self) -> dict[str, Any]:
        """All that was recorded, as tensors and plain values; blocks become one."""
        if len(self._blocks) > 1:
            columns = zip(*self._blocks, strict=True)
            self._blocks = [BlockDraws(*({name: torch.cat([x[name] for x in c]) for name in c[0]} for c in columns))]
        return {
            "draws": [block._asdict() for block in self._blocks],
            "num_draws": self.num_draws,
            "num_diverging": self.num_diverging,
            "seconds": [self.warmup_seconds, self.seconds],
        }

    def resume(self, state: dict[str, Any], rest: Any) -> None:
        """Take up a record that was in this `state`, after `open`."""
        self._blocks = [BlockDraws(**draws) for draws in state["draws"]]
        self.num_draws, self.num_diverging = state["num_draws"], state["num_diverging"]
        self.warmup_seconds, self.seconds = state["seconds"]
        self.rest = rest

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
