r"""Tails of chains against a weighted population: shares beyond the population's quantiles, with z."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.diagnostics.reports.lines import Line
from pyro_sb.infer.mcmc.figures import site_diagnostics
from pyro_sb.infer.population.build import CUT
from pyro_sb.weights import normalise, pareto_k

__all__ = ["TailAudit", "audit_tails"]

LEVELS = (0.005, 0.01, 0.025, 0.05)
"""Shares of the population beyond the points that are compared, each side."""
SHOWN = (0.01, 0.05, 0.95, 0.99)
"""Quantiles of the details."""
LOOK, BAD = 3.5, 5.0  # standard errors
NEAR, FAR = 1.25, 1.5  # ratios of shares that may be, and that a verdict of bad asks for
EFFECTIVE = 20.0  # draws of the population in a tail
PIECES = 16  # parts of the chains that the spread is taken between
VISITED = 8  # chains that must have been in a tail for their spread to be a guide
VISIT, LEAST_VISIT = 0.2, 10  # of the draws due in a tail, and of a chain, that one visit may take; in draws
STAYED = 1  # the level whose visits are counted
COLUMNS = 16  # coordinates at a time


@dataclass(frozen=True, eq=False, repr=False)
class TailAudit:
    r"""Shares of draws in the tails of a weighted population, in unconstrained coordinates.

    For each coordinate, side and level q, the chains' share beyond the population's quantile of q. Its error is that
    of the spread between chains, times :math:`\sqrt{q / \hat p}` where they have less there than is due, as a share
    that is too small has too small a spread; where few chains were there, that of their effective size. The
    population's is by the delta method.

    Attributes:
        names: Names of the d coordinates.
        points: The population's quantiles: lower tail, upper tail. Shape ``(2, 4, d)``.
        shares: The draws' shares beyond them. Shape ``(2, 4, d)``.
        ratio: Over the population's. Shape ``(2, 4, d)``.
        z: Differences in standard errors; NaN where the population has under 20 effective draws. ``(2, 4, d)``.
        population_quantiles: Its 1, 5, 95 and 99 % quantiles. Shape ``(4, d)``.
        quantiles: Those of the draws. Shape ``(4, d)``.
        longest: Draws of the longest visit of one chain beyond the points of 1 %. Shape ``(2, d)``.
        sizes: Chains, and draws of each.
        num: Weighted draws of the population.
        k_hat: Pareto's k of their weights.
        excess: Nats by which walking chains exceeded the population's weights: above 4 it may miss tails itself.
        converged: Whether R-hat and the effective sizes are what they should be.
    """

    names: tuple[str, ...]
    points: Tensor
    shares: Tensor
    ratio: Tensor
    z: Tensor
    population_quantiles: Tensor
    quantiles: Tensor
    longest: Tensor
    sizes: tuple[int, int]
    num: int
    k_hat: float
    excess: float
    converged: bool

    @property
    def flagged(self) -> Tensor:
        """Where the shares differ by more than chance and by more than a quarter. Shape ``(2, 4, d)``, boolean."""
        off = (self.ratio > NEAR) | (self.ratio < 1 / NEAR)
        return off & (self.z.abs() > threshold(len(self.names)))

    @property
    def stuck(self) -> Tensor:
        """Tails in which one chain stayed for a fifth of its draws, and of those due to all chains. ``(2, d)``."""
        num_chains, num_draws = self.sizes
        due = LEVELS[STAYED] * num_chains * num_draws
        return self.longest >= max(VISIT * due, VISIT * num_draws, LEAST_VISIT)

    @property
    def verdict(self) -> str:
        """The worst: "ok", "look", "bad", or "-" where the population has too few draws in its tails."""
        if bool(self.z.isnan().all()):
            return "-"
        far = (self.ratio > FAR) | (self.ratio < 1 / FAR)
        beyond = BAD - LOOK + threshold(len(self.names))
        if bool((self.flagged & far & (self.z.abs() > beyond)).any()) and self.k_hat <= 0.7:
            return "bad"
        doubtful = bool(self.flagged.any()) or bool(self.stuck.any()) or self.excess > CUT
        return "look" if doubtful else "ok"

    @property
    def line(self) -> Line:
        """The worst of them."""
        if self.verdict == "-":
            return Line("tails", f"{self.num} weighted draws", "-", "too few of the population in its tails to tell")
        short = not self.converged and self.excess <= CUT and self.verdict == "look"
        if bool(self.stuck.any()) and not bool(self.flagged.any()):
            return self._stuck_line(short)
        z = self.z.abs().nan_to_num(-1.0)
        z = torch.where(self.flagged, z + z.max() + 1, z)
        rest, axis = divmod(int(z.argmax()), z.shape[2])
        side, level = divmod(rest, z.shape[1])
        place = (side, level, axis)
        where = f"P({self.names[axis]} {'<>'[side]} {float(self.points[place]):.3g})"
        value = f"{where} {float(self.shares[place]):.4f} for {LEVELS[level]}, z {float(self.z[place]):.1f}"
        return Line("tails", value, self.verdict, self._note(bool(self.ratio[place] < 1)), short)

    def _stuck_line(self, short: bool) -> Line:
        side, axis = divmod(int(self.longest.argmax()), len(self.names))
        place = f"{self.names[axis]} {'<>'[side]} {float(self.points[side, STAYED, axis]):.3g}"
        stay = f"for {int(self.longest[side, axis])} of {self.sizes[1]} draws"
        value = f"one chain stayed at {place} {stay}"
        note = f"a {LEVELS[STAYED]:.0%} tail, whose share rests on few visits: run longer, with a local move"
        return Line("tails", value, self.verdict, note, short)

    def _note(self, less: bool) -> str:
        cut = f"the population misses regions itself (excess {self.excess:.1f} nats): tails may be cut in both"
        if bool(self.flagged.any()):
            what = "draws hardly enter a tail" if less else "draws are too often in a tail"
            vague = f"; the population's weights are no sure guide (k-hat {self.k_hat:.2f})" if self.k_hat > 0.7 else ""
            more = f"; {cut}" if self.excess > CUT else ""
            return f"{what}: run longer, with a local move{vague}{more}"
        return cut if self.excess > CUT else "shares beyond the population's quantiles, the worst"


def threshold(dim: int) -> float:
    """Standard errors that the worst of d coordinates exceeds in one report of a hundred, at least 3.5.

    Near levels of a side are nearly one test, so that there are some six of a coordinate.
    """
    tail = torch.tensor(1 - 0.01 / (2 * 6 * dim), dtype=torch.float64)
    return max(LOOK, float(torch.special.ndtri(tail)))


def audit_tails(
    points: Tensor,
    log_weights: Tensor,
    draws: Tensor,
    names: tuple[str, ...],
    excess: float = 0.0,
    converged: bool = True,
) -> TailAudit:
    """Chains' tails against a population's.

    Args:
        points: Weighted draws of the population, independent of its fit. Shape ``(n, d)``.
        log_weights: Their log weights, not normalised. Shape ``(n,)``.
        draws: Shape ``(chains, draws, d)``.
        names: Of the coordinates.
        excess: As `Population.excess`.
        converged: Whether R-hat and the effective sizes are what they should be.
    """
    weights, draws = normalise(log_weights.double()), draws.double()
    parts = [
        _tails(points[:, at : at + COLUMNS].double(), weights, draws[..., at : at + COLUMNS])
        for at in range(0, points.shape[1], COLUMNS)
    ]
    fields = Fields(*(torch.cat(values, -1).cpu() for values in zip(*parts, strict=True)))
    return TailAudit(
        tuple(names),
        **fields._asdict(),
        sizes=(draws.shape[0], draws.shape[1]),
        num=len(points),
        k_hat=pareto_k(log_weights),
        excess=excess,
        converged=converged,
    )


def _tails(points: Tensor, weights: Tensor, draws: Tensor) -> "Fields":
    """Fields of the audit, from ``points`` to ``quantiles``, of some coordinates."""
    flat, levels = draws.flatten(0, 1), weights.new_tensor(LEVELS)
    ordered, order = points.sort(0)
    low, high = Tail.of(ordered, weights[order]), Tail.of(ordered.flip(0), weights[order.flip(0)])
    pieces = _pieces(draws)
    below = torch.stack([(pieces < place).double().mean(1) for place in low.places])
    above = torch.stack([(pieces > place).double().mean(1) for place in high.places])
    by_piece = torch.stack([below, above])  # (2, 4, pieces, d)
    shares, due = by_piece.mean(2), levels[None, :, None]
    spread = by_piece.var(2) if len(pieces) > 1 else torch.zeros_like(shares)
    own = spread / len(pieces) * (due / shares.clamp_min(1 / len(flat))).clamp_min(1.0)
    blind = ((by_piece > 0).sum(2) < VISITED) | (len(draws) < PIECES)  # the spread is no guide
    size = _effective(draws) if bool(blind.any()) else flat.new_ones(draws.shape[2])
    floor = due * (1 - due) / torch.where(blind, size, float(len(flat)))
    variance = torch.maximum(own, floor) + torch.stack([low.variance, high.variance])
    enough = torch.stack([low.effective, high.effective]) >= EFFECTIVE
    return Fields(
        torch.stack([low.places, high.places]),
        shares,
        shares / due,
        torch.where(enough, (shares - due) / variance.sqrt(), torch.nan),
        ordered.gather(0, _reached(weights[order].cumsum(0), SHOWN)),
        torch.stack([torch.quantile(column, weights.new_tensor(SHOWN)) for column in _thinned(flat).unbind(1)], 1),
        torch.stack([_longest(draws < low.places[STAYED]), _longest(draws > high.places[STAYED])]),
    )


class Fields(NamedTuple):
    """Fields of the audit by coordinate, which is the last dimension."""

    points: Tensor
    shares: Tensor
    ratio: Tensor
    z: Tensor
    population_quantiles: Tensor
    quantiles: Tensor
    longest: Tensor


def _longest(inside: Tensor) -> Tensor:
    """Longest visit of a chain, in draws, by coordinate. ``(chains, draws, d)`` to ``(d,)``."""
    time = torch.arange(1, inside.shape[1] + 1, device=inside.device)[:, None]
    left = torch.where(inside, 0, time).cummax(1).values
    return (time - left).amax((0, 1)).double()


class Tail(NamedTuple):
    """Tails of a weighted sample on one side: their ends, the shares' variances, effective draws. ``(4, d)`` each."""

    places: Tensor
    variance: Tensor
    effective: Tensor

    @classmethod
    def of(cls, ordered: Tensor, weights: Tensor) -> "Tail":
        """From points in order, the outermost first, and their weights. Shape ``(n, d)``."""
        mass, square = weights.cumsum(0), weights.square().cumsum(0)
        index = _reached(mass, LEVELS).clamp_min(1)  # points before it lie beyond it
        inside, total, p = square.gather(0, index - 1), square[-1], weights.new_tensor(LEVELS)[:, None]
        variance = inside * (1 - p).square() + (total - inside) * p.square()
        effective = mass.gather(0, index - 1).square() / inside.clamp_min(1e-300)
        return cls(ordered.gather(0, index), variance, effective)


def _reached(mass: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Rows at which cumulated weights ``(n, d)`` reach the levels. Shape ``(4, d)``."""
    wanted = mass.new_tensor(levels).expand(mass.shape[1], -1).contiguous()
    return torch.searchsorted(mass.T.contiguous(), wanted).T.clamp_max(len(mass) - 1)


def _pieces(draws: Tensor) -> Tensor:
    """Chains, or parts of them where there are few. Shape ``(pieces, draws, d)``."""
    num_chains, num_draws, dim = draws.shape
    parts = min(max(1, -(-PIECES // num_chains)), max(1, num_draws // 4))
    size = num_draws // parts
    return draws[:, : parts * size].reshape(num_chains * parts, size, dim)


def _effective(draws: Tensor) -> Tensor:
    """Effective draws of each coordinate, at most as many as there are. Shape ``(d,)``."""
    num_chains, num_draws, _ = draws.shape
    if num_draws < 4:
        return draws.new_full((draws.shape[2],), float(num_chains))
    return site_diagnostics(draws)["n_eff"].nan_to_num(1.0).clamp(1.0, num_chains * num_draws)


def _thinned(flat: Tensor, most: int = 2**23) -> Tensor:
    """At most as many rows as `torch.quantile` takes."""
    return flat[:: math.ceil(len(flat) / most)]
