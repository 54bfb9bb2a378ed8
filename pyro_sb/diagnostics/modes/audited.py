"""Shares of modes among populations and draws: their differences in standard errors, and a reading in words."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sb.diagnostics.reports.lines import Line, as_html, as_text, worst
from pyro_sb.infer.population.population import POOR_SHARE, Population

__all__ = ["ModeAudit", "effective_size"]

LOOK = 3.0  # standard errors
FAR = 99  # standard errors, beyond which a figure says no more
VAGUE = 0.1  # standard error of a share of the draws above which it says nothing
LEAST_SHARE = 1e-3  # of a population in a mode that chains are asked for
UNLIKELY = 0.01  # probability of so few crossings below which they are called too few
SHOWN = 2  # modes in the repr
MORE = "raise num_particles"  # what a report says in other words
GLOBAL = "use a global move"
SECOND = 'audit="full" holds a second one of another kind against it'


@dataclass(frozen=True, eq=False, repr=False)
class ModeAudit:
    r"""Shares of the modes among populations and, where there are draws, among them.

    Attributes:
        shares: Of each of P populations: two that differ in kind, or one, a run's own. Shape ``(P, K)``.
        errors: Their standard errors. Shape ``(P, K)``.
        centres: A point in the middle of each mode, unconstrained. Shape ``(K, dim)``.
        names: Names of the unconstrained numbers.
        chain_shares: Of the draws. Shape ``(K,)``; None without draws.
        chain_errors: Their standard errors: of independent draws of the run's effective size, or of the chains'
            spread, whichever is larger. Shape ``(K,)``; None without draws.
        by_chain: Each chain's shares. Shape ``(C, K)``; None without draws.
        populations: The populations.
        evaluations: Rows of the log joint that it cost.
        places: The centres as `where` shows them: in the sites' own space where that has as many numbers. Shape
            ``(K, dim)``; None for ``centres``.
        place_names: Their names.
        chain_sizes: Effective number of draws of each chain by itself. Shape ``(C,)``; None without draws.
        kinds: What each population started from: ``"search"``, ``"prior"``, ``"wide law"``, ``"given points"``.
    """

    shares: Tensor
    errors: Tensor
    centres: Tensor
    names: tuple[str, ...]
    chain_shares: Tensor | None
    chain_errors: Tensor | None
    by_chain: Tensor | None
    populations: tuple[Population, ...]
    evaluations: int
    places: Tensor | None = None
    place_names: tuple[str, ...] = ()
    chain_sizes: Tensor | None = None
    kinds: tuple[str, ...] = ()

    @property
    def num_modes(self) -> int:
        """K."""
        return len(self.centres)

    @property
    def pooled(self) -> Tensor:
        """Shares of all populations together, by precision. Shape ``(K,)``."""
        size = torch.tensor([effective_size(population) for population in self.populations], dtype=torch.float64)
        return ((size[:, None] * self.shares).sum(0) / size.sum()).clamp(0, 1)

    @property
    def z(self) -> Tensor:
        """Difference of two populations' shares in standard errors. ``(K,)``; zeros for one mode, or one population."""
        if len(self.shares) == 1:
            return torch.zeros_like(self.shares[0])
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
        """Modes that all populations see, and no draw of the run does."""
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

    def table(self, most: int | None = None) -> str:
        """Shares of every mode, or of the ``most`` largest, a row each."""
        shown = self.num_modes if most is None or self.num_modes <= most + 1 else most  # not one line for one left
        two = len(self.shares) > 1
        header = ["mode", "population 1", "population 2", "z"] if two else ["mode", "population"]
        header += [] if self.chain_shares is None else ["draws", "z"]
        rows = [[*header, "where"]]
        where = self.where
        for k in range(shown):
            row = [str(k), *(f"{s:.4f} +- {e:.4f}" for s, e in zip(self.shares[:, k], self.errors[:, k]))]
            row += [_shown(float(self.z[k]))] if two else []
            if self.chain_shares is not None and self.chain_errors is not None and self.chain_z is not None:
                row += [f"{self.chain_shares[k]:.4f} +- {self.chain_errors[k]:.4f}", _shown(float(self.chain_z[k]))]
            rows.append([*row, where[k]])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
        return text if shown == self.num_modes else f"{text}\n... and {self.num_modes - shown} more: see table()"

    def __repr__(self) -> str:
        title = f"Mode audit: {self.num_modes} mode{'s' * (self.num_modes > 1)}, verdict {self.verdict}"
        return f"{as_text(title, self.lines)}\n{self.table(most=SHOWN)}"

    def _repr_html_(self) -> str:
        return as_html("Mode audit", self.lines) + f"<pre>{self.table()}</pre>"

    def plot(self, ax: Any = None, **kwargs: Any) -> Any:
        """Shares side by side: `pyro_sb.plots.plot_modes`, with its ``figsize`` and keyword arguments."""
        from pyro_sb.plots import plot_modes

        return plot_modes(self, ax=ax, **kwargs)

    def _population_line(self) -> Line:
        share = min(population.ess_share for population in self.populations)
        z, found = float(self.z.abs().max()), f"{self.num_modes} mode{'s' * (self.num_modes > 1)}"
        shown = f"<= {z:.1f}" if z <= FAR else f"> {FAR}"
        value = f"{found}, |z| {shown}" if self.num_modes > 1 else found
        alone = ((self.shares > 0).sum(0) == 1) & (self.pooled > LEAST_SHARE)
        threshold = _threshold(self.num_modes)
        if share < POOR_SHARE:
            note = f"a population is poor (effective share {share:.3f}): {MORE}"
            return Line("populations", value, "look", note)
        if len(self.shares) == 1:
            return Line("populations", found, "ok", f"the run's own; {SECOND}")
        if not z <= threshold + 1:
            return Line("populations", value, "bad", f"they disagree on the shares: trust neither, {MORE}")
        if bool(alone.any()):
            modes = alone.nonzero().flatten().tolist()
            note = f"mode {modes} was found by one alone, so there may be more: {MORE}"
            return Line("populations", value, "look", note)
        if z > threshold:
            return Line("populations", value, "look", f"the shares differ: {MORE} and look again")
        kinds = f" ({' and '.join(self.kinds)})" if self.kinds else ""
        return Line("populations", value, "ok", f"two agree{kinds}; what both miss stays unseen")

    def _chain_line(self) -> Line:
        value = self._worst_share()
        whose = "the population sees" if len(self.shares) == 1 else "both populations see"
        if self.missing:
            lost = ", ".join(f"{k} (share {float(self.pooled[k]):.3f})" for k in self.missing)
            return Line(
                "draws",
                value,
                "bad",
                f"no draw in mode {lost}, which {whose}: use KernelLangevin or BridgeMH",
            )
        assert self.chain_z is not None and self.chain_shares is not None and self.chain_errors is not None
        strange = (self.shares == 0).all(0) & (self.chain_shares > LEAST_SHARE)
        if bool(strange.any()):
            note = f"mode {strange.nonzero().flatten().tolist()} is theirs alone: {MORE}, or pass start="
            return Line("draws", value, "look", note)
        z, threshold, error = (
            float(self.chain_z.abs().max()),
            _threshold(self.num_modes),
            float(self.chain_errors.max()),
        )
        if not z <= threshold + 1:
            return Line("draws", value, "bad", f"their shares are wrong: {GLOBAL}, or start chains from a population")
        if z > threshold:
            note = "the draws' shares differ: run longer and look again"
            return Line("draws", value, "look", note, short=True)
        if error > VAGUE:
            cure = (
                "draw more" if self._crossed > 0 else f"no chain left its mode, so more draws would not help: {GLOBAL}"
            )
            note = f"their own error is {error:.2f}, too large to tell: {cure}"
            return Line("draws", value, "look", note, short=self._crossed > 0)
        alike = "shares as among the populations" if self.num_modes > 1 else "all in the mode that the populations see"
        return Line("draws", value, "ok", alike)

    def _worst_share(self) -> str:
        """The share of the draws that is farthest from the populations'."""
        if self.num_modes == 1:
            return "one mode"
        assert self.chain_z is not None and self.chain_shares is not None
        k = int(self.chain_z.abs().argmax())
        ours, theirs, z = float(self.chain_shares[k]), float(self.pooled[k]), _shown(float(self.chain_z[k]))
        return f"mode {k}: share {ours:.3f}, populations {theirs:.3f}, z {z}"

    @property
    def _crossed(self) -> float:
        """Share of the chains that saw two modes."""
        assert self.by_chain is not None
        return float((self.by_chain.max(1).values < 1).double().mean())

    def _crossing_line(self) -> Line:
        """Crossings, held against those of independent draws, as many as each chain's effective size."""
        from scipy.stats import binom

        assert self.by_chain is not None and self.chain_sizes is not None
        num, crossed = len(self.by_chain), self._crossed
        due = float((1 - self.pooled.pow(self.chain_sizes[:, None]).sum(1)).clamp(0, 1).mean())
        value = f"{crossed:.0%} of {num} chains saw two modes"
        if crossed > 0.2:
            return Line("crossing", value, "ok", "chains cross between modes")
        few = float(binom.cdf(round(crossed * num), num, due)) < UNLIKELY
        if crossed == 0.0 and few:
            note = f"no chain left its mode, so starts decide the shares: {GLOBAL}"
            return Line("crossing", value, "bad" if num < 20 else "look", note)
        if few:
            return Line("crossing", value, "look", f"chains hardly cross between modes, {due:.0%} should: {GLOBAL}")
        if crossed == 0.0:
            return Line("crossing", value, "-", f"too few draws to tell: about {due * num:.1f} of {num} chains should")
        return Line("crossing", value, "ok", "as many as draws by the populations' shares would")

    @property
    def where(self) -> list[str]:
        """`differing` in words, for each mode."""
        return [", ".join(f"{name} = {value:.3g}" for name, value in parts) for parts in self.differing]

    @property
    def differing(self) -> list[list[tuple[str, float]]]:
        """For each mode, name and value of the coordinates in which modes differ most: one for two modes, else two."""
        spread = self.centres.amax(0) - self.centres.amin(0)
        wanted = 1 if self.num_modes < 3 else min(2, len(self.names))
        axes = spread.argsort(descending=True)[:wanted].tolist()
        places, names = (self.centres, self.names) if self.places is None else (self.places, self.place_names)
        return [[(names[i], float(place[i])) for i in axes] for place in places]


def effective_size(population: Population) -> float:
    """Effective number of draws of a population's weights."""
    return float(1 / population.weights.double().square().sum())


def _z(difference: Tensor, variance: Tensor) -> Tensor:
    same = (difference.abs() < 1e-9) & ~variance.isnan()
    return torch.where(same, 0.0, difference / variance.clamp_min(1e-300).sqrt())


def _shown(z: float) -> str:
    return f"{z:.1f}" if not abs(z) > FAR else f"> {FAR}" if z > 0 else f"< -{FAR}"


def _threshold(num_modes: int) -> float:
    """Standard errors that the largest of K differences stays under, but for one audit in 370."""
    tail = 0.0027 / 2 / max(num_modes, 1)
    return max(LOOK, math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * tail, dtype=torch.float64))))
