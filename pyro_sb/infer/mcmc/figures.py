"""Figures of chains: effective sample sizes and R-hat of every number, and a kernel's own of every chain."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from pyro.ops import stats
from torch import Tensor

__all__ = [
    "SAME",
    "PerChain",
    "figures_of",
    "floating",
    "moving_entries",
    "per_chain",
    "site_diagnostics",
    "varying",
    "worst_r_hat",
]

SAME = 1.01  # R-hat of chains that agree


class PerChain(list[Any]):
    """A kernel's figure with one value a chain, which `per_chain` deals out."""


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
    """A site, by entry where some cannot vary: those are left out, and all of it where none varies.

    Such are data, zeros of a Cholesky factor, and what varies by rounding alone, as the diagonal of a correlation.
    """
    moving = varying(value)
    if moving.all():
        return {name: value}
    return {
        f"{name}{place}".replace(" ", ""): value[(slice(None), slice(None), *place)]
        for place in moving.nonzero().tolist()
    }


def varying(value: Tensor) -> Tensor:
    """Which entries of draws ``(chains, draws, *site)`` vary by more than rounding. Shape of the site."""
    flat = value.flatten(0, 1)
    low, high = flat.amin(0), flat.amax(0)
    rounding = 16 * torch.finfo(value.dtype).eps * torch.maximum(low.abs(), high.abs())
    return (high - low > rounding) | (low != low)  # NaN is shown


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
