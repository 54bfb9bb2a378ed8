"""What a mode audit found: shares of the modes, how far they are apart, and what that means in words."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sb.diagnostics.lines import Line, as_html, as_text, worst
from pyro_sb.infer.population import POOR_SHARE, Population

__all__ = ["ModeAudit", "effective_size"]

LOOK = 3.0  # standard errors
VAGUE = 0.1  # standard error of a share of the draws above which it says nothing
LEAST_SHARE = 1e-3  # of a population in a mode that chains are asked for


@dataclass(frozen=True, eq=False, repr=False)
class ModeAudit:
    r"""Shares of the modes among two populations and, where there are draws, among them.

    Attributes:
        shares: Of each population. Shape ``(2, K)``.
        errors: Their standard errors. Shape ``(2, K)``.
        centres: A point in the middle of each mode, unconstrained. Shape ``(K, dim)``.
        names: Names of the unconstrained numbers.
        chain_shares: Of the draws. Shape ``(K,)``; None without draws.
        chain_errors: Their standard errors: of independent draws of the run's effective size, or of the chains'
            spread, whichever is larger. Shape ``(K,)``; None without draws.
        by_chain: Each chain's shares. Shape ``(C, K)``; None without draws.
        populations: The two populations.
        evaluations: Rows of the log joint that it cost.
    """

    shares: Tensor
    errors: Tensor
    centres: Tensor
    names: tuple[str, ...]
    chain_shares: Tensor | None
    chain_errors: Tensor | None
    by_chain: Tensor | None
    populations: tuple[Population, Population]
    evaluations: int

    @property
    def num_modes(self) -> int:
        """K."""
        return len(self.centres)

    @property
    def pooled(self) -> Tensor:
        """Shares of both populations together, by precision. Shape ``(K,)``."""
        size = torch.tensor([effective_size(population) for population in self.populations], dtype=torch.float64)
        return (size[:, None] * self.shares).sum(0) / size.sum()

    @property
    def z(self) -> Tensor:
        """Difference of the populations' shares in standard errors. Shape ``(K,)``; zeros for a single mode."""
        return _z(self.shares[0] - self.shares[1], self.errors[0].square() + self.errors[1].square())

    @property
    def chain_z(self) -> Tensor | None:
        """Difference of the draws' shares from the pooled ones in standard errors. Shape ``(K,)``."""
        if self.chain_shares is None or self.chain_errors is None:
            return None
        own = 1 / (1 / self.errors.square().clamp_min(1e-300)).sum(0)
        return _z(self.chain_shares - self.pooled, own + self.chain_errors.square())

    @property
    def missing(self) -> list[int]:
        """Modes that both populations see, and no draw of the run does."""
        if self.chain_shares is None:
            return []
        seen = (self.shares > 0).all(0) & (self.pooled > LEAST_SHARE) & (self.chain_shares == 0)
        chain_z = self.chain_z
        assert chain_z is not None
        return (seen & (chain_z.abs() > LOOK)).nonzero().flatten().tolist()

    @property
    def verdict(self) -> str:
        """The worst of `lines`: "ok", "look" or "bad"."""
        return worst(self.lines)

    @property
    def lines(self) -> list[Line]:
        """The audit as lines of a report."""
        lines = [self._population_line()]
        if self.chain_shares is not None:
            lines.append(self._chain_line())
            if self.num_modes > 1:
                lines.append(self._crossing_line())
        return lines

    def table(self) -> str:
        """Shares of every mode, a row each."""
        header = ["mode", "population 1", "population 2", "z"]
        header += [] if self.chain_shares is None else ["draws", "z"]
        rows = [[*header, "where"]]
        where = self.where
        for k in range(self.num_modes):
            row = [str(k), *(f"{s:.4f} +- {e:.4f}" for s, e in zip(self.shares[:, k], self.errors[:, k]))]
            row.append(f"{self.z[k]:.1f}")
            if self.chain_shares is not None and self.chain_errors is not None and self.chain_z is not None:
                row += [f"{self.chain_shares[k]:.4f} +- {self.chain_errors[k]:.4f}", f"{self.chain_z[k]:.1f}"]
            rows.append([*row, where[k]])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    def __repr__(self) -> str:
        title = f"Mode audit: {self.num_modes} mode{'s' * (self.num_modes > 1)}, verdict {self.verdict}"
        return f"{as_text(title, self.lines)}\n{self.table()}"

    def _repr_html_(self) -> str:
        return as_html("Mode audit", self.lines) + f"<pre>{self.table()}</pre>"

    def plot(self, ax: Any = None) -> Any:
        """Shares side by side: `pyro_sb.plots.plot_modes`."""
        from pyro_sb.plots import plot_modes

        return plot_modes(self, ax=ax)

    def _population_line(self) -> Line:
        share = min(population.ess_share for population in self.populations)
        z, found = float(self.z.abs().max()), f"{self.num_modes} mode{'s' * (self.num_modes > 1)}"
        value = f"{found}, |z| <= {z:.1f}" if self.num_modes > 1 else found
        alone = ((self.shares > 0).sum(0) == 1) & (self.pooled > LEAST_SHARE)
        threshold = _threshold(self.num_modes)
        if share < POOR_SHARE:
            note = f"a population is poor (effective share {share:.3f}): raise num_particles"
            return Line("populations", value, "look", note)
        if z > threshold + 1:
            note = "they disagree on the shares: trust neither, raise num_particles"
            return Line("populations", value, "bad", note)
        if bool(alone.any()):
            modes = alone.nonzero().flatten().tolist()
            note = f"mode {modes} was found by one alone, so there may be more: raise num_particles"
            return Line("populations", value, "look", note)
        if z > threshold:
            return Line("populations", value, "look", "the shares differ: raise num_particles and look again")
        return Line("populations", value, "ok", "two agree; what both miss stays unseen")

    def _chain_line(self) -> Line:
        chain_z = self.chain_z
        assert chain_z is not None and self.chain_shares is not None
        worst_mode, threshold = int(chain_z.abs().argmax()), _threshold(self.num_modes)
        z = float(chain_z[worst_mode].abs())
        pair = f"{float(self.chain_shares[worst_mode]):.3f} for {float(self.pooled[worst_mode]):.3f}"
        value = f"mode {worst_mode}: {pair}, z {float(chain_z[worst_mode]):.1f}" if self.num_modes > 1 else "one mode"
        if self.missing:
            lost = ", ".join(f"{k} (share {float(self.pooled[k]):.3f})" for k in self.missing)
            note = f"no draw in mode {lost}, which both populations see: use KernelLangevin or BridgeMH"
            return Line("draws", value, "bad", note)
        strange = (self.shares == 0).all(0) & (self.chain_shares > LEAST_SHARE)
        if bool(strange.any()):
            note = f"mode {strange.nonzero().flatten().tolist()} is theirs alone: raise num_particles, or pass start="
            return Line("draws", value, "look", note)
        if z > threshold + 1:
            return Line(
                "draws", value, "bad", "their shares are wrong: use a global move, or start chains from a population"
            )
        if z > threshold:
            return Line("draws", value, "look", "the draws' shares differ: run longer and look again")
        assert self.chain_errors is not None
        error = float(self.chain_errors.max())
        if error > VAGUE:
            return Line("draws", value, "look", f"their own error is {error:.2f}, too large to tell: draw more")
        return Line("draws", value, "ok", "shares as among the populations")

    def _crossing_line(self) -> Line:
        assert self.by_chain is not None
        crossed = float((self.by_chain.max(1).values < 1).double().mean())
        value = f"{crossed:.0%} of {len(self.by_chain)} chains saw two modes"
        if crossed == 0.0:
            note = "no chain left its mode, so starts decide the shares: use a global move"
            return Line("crossing", value, "bad" if len(self.by_chain) < 20 else "look", note)
        return Line("crossing", value, "ok" if crossed > 0.2 else "look", "chains cross between modes")

    @property
    def where(self) -> list[str]:
        """The coordinates in which the modes differ most (one for two modes, else two), for each."""
        spread = self.centres.amax(0) - self.centres.amin(0)
        wanted = 1 if self.num_modes < 3 else min(2, len(self.names))
        axes = spread.argsort(descending=True)[:wanted].tolist()
        return [", ".join(f"{self.names[i]} = {float(centre[i]):.3g}" for i in axes) for centre in self.centres]


def effective_size(population: Population) -> float:
    """Effective number of draws of a population's weights."""
    return float(1 / population.weights.double().square().sum())


def _z(difference: Tensor, variance: Tensor) -> Tensor:
    return torch.where(difference.abs() < 1e-9, 0.0, difference / variance.clamp_min(1e-300).sqrt())


def _threshold(num_modes: int) -> float:
    """Standard errors that the largest of K differences stays under, but for one audit in 370."""
    tail = 0.0027 / 2 / max(num_modes, 1)
    return max(LOOK, math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * tail, dtype=torch.float64))))
