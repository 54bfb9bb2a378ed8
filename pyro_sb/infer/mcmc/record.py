r"""The draws of a run as they arrive: blocks of steps of every chain."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from pyro.ops import stats
from torch import Tensor

__all__ = [
    "Block",
    "PerChain",
    "Record",
    "floating",
    "in_chunks",
    "moving_entries",
    "per_chain",
    "site_diagnostics",
    "states",
    "agreeing",
    "worst_r_hat",
]


SAME, SAME_OF_MANY, MANY = 1.01, 1.02, 8  # R-hat of chains that agree, and of so many or more


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


def moving_entries(name: str, value: Tensor) -> dict[str, Tensor]:
    """A site, by entry where some are constant (data): those are left out, Pyro's table has no figures beside them."""
    moving = (value != value[:1, :1]).flatten(0, 1).any(0)
    if moving.all() or not moving.any():
        return {name: value}
    return {
        f"{name}{place}".replace(" ", ""): value[(slice(None), slice(None), *place)]
        for place in moving.nonzero().tolist()
    }


def agreeing(num_chains: int) -> float:
    r"""R-hat up to which chains agree.

    Of chains that agree, :math:`\hat R^2 - 1` is one over the effective draws of half a chain, whatever their number.
    So 1.01 asks for a hundred of each chain: what four chains need for 400. Of more chains the means are
    known before that, and all that R-hat must tell is whether each has left its start: 1.02, fifty of each.

    References:
        Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021), section 4, for four
        chains; Nested R-hat (Margossian et al., 2024), section 2, for many.
    """
    return SAME_OF_MANY if num_chains >= MANY else SAME


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
