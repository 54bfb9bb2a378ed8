"""The mode audit: two independent populations of one target, their modes' shares side by side, the chains beside."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sb.diagnostics.draws_of import target_of, unconstrained_draws
from pyro_sb.diagnostics.lines import Line, as_html, as_text, worst
from pyro_sb.diagnostics.mode_clusters import Modes, find_modes
from pyro_sb.diagnostics.simulated import number_names
from pyro_sb.infer.joint import LogJoint
from pyro_sb.infer.population import POOR_SHARE, Population, populate
from pyro_sb.infer.record import site_diagnostics

__all__ = ["ModeAudit", "mode_audit"]

LOOK, BAD = 3.0, 4.0  # standard errors
POOLED = 1024  # draws of each population, and of the run, that modes are looked for in
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
        size = torch.tensor([_size(population) for population in self.populations], dtype=torch.float64)
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
        """The coordinate in which the modes differ most, for each."""
        if self.num_modes == 1:
            axis = 0
        else:
            axis = int((self.centres.std(0)).argmax())
        return [f"{self.names[axis]} = {float(centre[axis]):.3g}" for centre in self.centres]


def mode_audit(
    target: Any = None,
    x: Any = None,
    *,
    potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    initial_params: dict[str, Tensor] | None = None,
    num_particles: int = 1024,
    start: str | Tensor = "search",
    max_modes: int = 20,
) -> ModeAudit:
    r"""Two independent weighted populations of a target, and whether a run's draws have the same modes.

    R-hat and ESS compare chains with each other: chains that all miss a mode agree perfectly. A population (a
    multi-start search, tempering, importance sampling from a fitted mixture) comes to its modes another way, and two
    of them that agree have shares with standard errors that the draws can be held against.

    **Modes** are Gaussian-mixture clusters (scikit-learn, number by BIC) of both populations and the draws, joined
    wherever the log joint between two clusters' middles falls less than two nats below the lower of them.

    **Shares** of a population are self-normalised importance estimates. What both populations and the draws miss stays
    unseen: "ok" is not a proof.

    Args:
        target: A Pyro model; a finished `MCMC`, ours or Pyro's, whose model and draws are then audited; a conditioned
            `Posterior`; or a `LogJoint`.
        x: Draws beside: a finished run, a `Posterior`, an ArviZ container, a dict of sites in their own space
            ``(chain, draw, *site)``, or unconstrained draws ``(chain, draw, dim)`` or ``(draw, dim)``. Omitted: those
            of ``target``, if it is a run.
        potential_fn: Minus the log joint of one chain, instead of a target; with ``initial_params``.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        initial_params: Unconstrained values of the sites: shapes for ``potential_fn``, hints for a model.
        num_particles: Draws of each population, at least 50.
        start: Where populations start, as in `KernelLangevin`.
        max_modes: Clusters looked for, at least 1.

    Raises:
        TypeError: No target.
        ValueError: Draws that lack a site of the model, or are not finite.

    References:
        Self-normalised importance sampling and its standard error: Monte Carlo theory, methods and examples (Owen,
        2013), chapter 9, equation (9.9). The audit is ours.

    Example:
        >>> def two_modes(z):
        ...     return torch.logsumexp(torch.stack([-(z + 5) ** 2, -(z - 5) ** 2]).sum(-1) / 2, 0)
        >>> joint = LogJoint.from_batched(lambda z: two_modes(z), dim=1)
        >>> stuck = 5 + torch.randn(4, 500, 1, dtype=torch.float64)  # R-hat is 1.00
        >>> audit = mode_audit(joint, stuck)
        >>> audit.num_modes, audit.verdict, len(audit.missing)
        (2, 'bad', 1)
    """
    if max_modes < 1:
        raise ValueError(f"max_modes must be at least 1, got {max_modes}. Omit it for 20.")
    joint, own = target_of(target, potential_fn, args, dict(kwargs or {}), initial_params)
    x = own if x is None else x
    draws = None if x is None else unconstrained_draws(x, joint)
    before = joint.evaluations.density + joint.evaluations.gradient
    hints = (
        None
        if initial_params is None or potential_fn is not None
        else joint.pack(initial_params).reshape(-1, joint.dim)
    )
    populations = (
        _population(joint, num_particles, start, hints),
        _population(joint, num_particles, start, hints),
    )
    clouds = [population.points[population.resample(POOLED)] for population in populations]
    if draws is not None:
        flat = draws.flatten(0, 1)
        clouds.append(flat[torch.linspace(0, len(flat) - 1, min(POOLED, len(flat))).round().long()])
    modes = find_modes(joint, torch.cat([cloud.double().cpu() for cloud in clouds]), max_modes)
    return _made(joint, populations, modes, draws, joint.evaluations.density + joint.evaluations.gradient - before)


def _population(joint: LogJoint, num: int, start: str | Tensor, hints: Tensor | None) -> Population:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The population is poor", RuntimeWarning)  # the audit says so
        return populate(joint, num, start=start, hints=hints)


def _made(
    joint: LogJoint, populations: tuple[Population, Population], modes: Modes, draws: Tensor | None, evaluations: int
) -> ModeAudit:
    inside = [modes.labels(population.points)[:, None] == torch.arange(modes.num) for population in populations]
    weights = [population.weights.double().cpu() for population in populations]
    shares = torch.stack([w @ member.double() for w, member in zip(weights, inside)])
    sizes = torch.tensor([_size(population) for population in populations], dtype=torch.float64)
    pooled = (sizes[:, None] * shares).sum(0) / sizes.sum()
    spread = torch.stack([w.square() @ (member.double() - pooled).square() for w, member in zip(weights, inside)])
    binomial = pooled * (1 - pooled) / sizes[:, None]  # the first is blind to a mode that the population missed
    errors = torch.maximum(spread, binomial).sqrt()
    by_chain = chain_shares = chain_errors = None
    if draws is not None:
        labels = modes.labels(draws.flatten(0, 1)).reshape(draws.shape[:2])
        by_chain = torch.stack([(labels == k).double().mean(1) for k in range(modes.num)], 1)
        chain_shares = by_chain.mean(0)
        chain_errors = _chain_errors(draws, by_chain, labels, pooled)
    order = pooled.argsort(descending=True)
    names = number_names(joint.site_shapes)
    given = [None if value is None else value[..., order] for value in (chain_shares, chain_errors, by_chain)]
    return ModeAudit(
        shares=shares[:, order],
        errors=errors[:, order],
        centres=modes.centres[order],
        names=names,
        chain_shares=given[0],
        chain_errors=given[1],
        by_chain=given[2],
        populations=populations,
        evaluations=evaluations,
    )


def _chain_errors(draws: Tensor, by_chain: Tensor, labels: Tensor, pooled: Tensor) -> Tensor:
    """Standard errors of the chains' shares, no smaller than the run itself would claim."""
    num_chains, num_draws = labels.shape
    if num_draws >= 4:
        n_eff = float(site_diagnostics(draws.double())["n_eff"].nan_to_num(0.0).min())
    else:
        n_eff = float(num_chains * num_draws)
    size = min(max(n_eff, 1.0), num_chains * num_draws)
    claimed = pooled * (1 - pooled) / size
    if num_chains < 2 or num_draws == 1:
        return claimed.sqrt()
    return torch.maximum(claimed, by_chain.var(0) / num_chains).sqrt()


def _size(population: Population) -> float:
    """Effective number of draws of a population's weights."""
    return float(1 / population.weights.double().square().sum())


def _z(difference: Tensor, variance: Tensor) -> Tensor:
    return torch.where(difference.abs() < 1e-9, 0.0, difference / variance.clamp_min(1e-300).sqrt())


def _threshold(num_modes: int) -> float:
    """Standard errors that the largest of K differences stays under, but for one audit in 370."""
    tail = 0.0027 / 2 / max(num_modes, 1)
    return max(LOOK, math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * tail, dtype=torch.float64))))
