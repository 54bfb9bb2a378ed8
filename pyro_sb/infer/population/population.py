r"""Weighted population :math:`w = p / \rho` of an unnormalised target :math:`p`, with its log evidence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import check_format
from pyro_sb.files import read_file, write_file
from pyro_sb.infer.model.log_joint import Evaluations
from pyro_sb.infer.model.run import html_table
from pyro_sb.infer.moves.mode_jumps import ModeJump
from pyro_sb.infer.population.regions import HOPELESS
from pyro_sb.infer.population.rounds import temper_weights
from pyro_sb.infer.population.settle import Settled
from pyro_sb.infer.population.sources import Source
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.plain import from_plain, to_plain
from pyro_sb.weights import log_evidence, normalise, pareto_k, systematic_resample

__all__ = ["POOR_SHARE", "Population", "honest_evidence"]

POOR_SHARE = 0.1
"""Effective share of the population under which it is called poor."""

FORMAT = 1  # of a saved population


@dataclass(frozen=True, repr=False)
class Population:
    r"""Weighted draws of an unnormalised target :math:`p`, drawn from a fitted mixture :math:`\rho`.

    Attributes:
        points: Draws of the proposal, unconstrained. Shape ``(N, d)``.
        log_weights: :math:`\log p - \log \rho` at the points, not normalised. Shape ``(N,)``.
        log_density: :math:`\log p` at the points. Shape ``(N,)``.
        proposal: The mixture :math:`\rho`, normalised: ``core`` and its guard of wide components.
        core: The mixture without its guard.
        log_evidence: Estimate of :math:`\log \int p` from these draws, in nats.
        log_evidence_error: Its standard error, in nats.
        ess_share: Effective sample size over N of importance weights against the proposal, in [0, 1], judged on the
            draws of all rounds; above 20 dimensions on its own draws and on states of chains, by the smaller.
        num_modes: Distinct maxima met by all sources; 0 if there was none or no search.
        funnel: Whether the search ended without a maximum.
        stages: What was done, in order: readable claims with their figures.
        evaluations: Rows of the log joint that it cost, density alone and with gradient.
        sources: What each source of regions met; none for given points.
        excess: Nats by which the largest weights of walking chains exceed those of the draws: above 1 there are regions
            that the mixture misses.
        rare: Share of the evidence in maxima that three ascents or fewer met: more of their kind may be unmet.
        settled: Chains that settled in the regions, in many dimensions: their states, metric and step; None without.
        jump: The jump between several regions that they settled in; None without.
    """

    points: Tensor
    log_weights: Tensor
    log_density: Tensor
    proposal: StudentMixture
    core: StudentMixture
    log_evidence: float
    log_evidence_error: float
    ess_share: float
    num_modes: int
    funnel: bool
    stages: tuple[str, ...]
    evaluations: Evaluations
    sources: tuple[Source, ...] = ()
    excess: float = 0.0
    rare: float = 0.0
    settled: Settled | None = None
    jump: ModeJump | None = None

    @property
    def states(self) -> Tensor | None:
        """States of the chains where no mixture serves as a proposal: moves are fitted to them, and chains start there.

        Shape ``(M, d)``; None where the weighted draws serve.
        """
        return None if self.settled is None or self.ess_share >= HOPELESS else self.settled.points

    @property
    def weights(self) -> Tensor:
        """Weights that sum to one. Shape ``(N,)``."""
        return normalise(self.log_weights)

    def resample(self, num: int) -> Tensor:
        """Indices of ``num`` draws by weight. Shape ``(num,)``."""
        return torch.multinomial(self.weights, num, replacement=True)

    def distinct(self, num: int = 1024) -> tuple[Tensor, Tensor]:
        """At most ``num`` distinct points with weights: systematic draws, their multiplicities as weights.

        Weights with fewer than 50 effective draws are flattened first; that costs acceptance, never exactness. Where no
        mixture serves as a proposal they are states of the chains, with equal weights.
        """
        if self.states is not None:
            index = torch.randperm(len(self.states), device=self.states.device)[:num]
            return self.states[index], self.states.new_full((len(index),), 1.0 / len(index))
        enough = min(0.5 * len(self.points), 50.0 + 10.0 * self.points.shape[1])
        weights = normalise(temper_weights(self.log_weights, enough))
        index, counts = systematic_resample(weights, num).unique(return_counts=True)
        return self.points[index], counts.to(self.points.dtype) / num

    def save(self, path: str | Path) -> None:
        """Write one file of tensors and plain values, whole or not at all, read back by `load`."""
        write_file({"format": FORMAT, "kind": "Population", "population": to_plain(self)}, path)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None) -> "Population":
        """A saved population, as ``KernelLangevin(model, start=population.points)`` may start from it.

        Args:
            path: What `save` wrote. Read with ``weights_only=True``: no code in the file is run.
            map_location: As in `torch.load`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no whole file of a population.

        Example:
            >>> import tempfile
            >>> from pyro_sb.infer.model.log_joint import LogJoint
            >>> from pyro_sb.infer.population import populate
            >>> joint = LogJoint.from_batched(lambda z: -z.square().sum(-1) / 2, dim=2)
            >>> path = tempfile.mkdtemp() + "/population.pt"
            >>> population = populate(joint, 100)
            >>> population.save(path)
            >>> Population.load(path).log_evidence == population.log_evidence
            True
        """
        saved = read_file(path, map_location)
        if not isinstance(saved, dict) or saved.get("kind") != "Population":
            raise ValueError(f"{path} must hold what Population.save wrote, got other contents.")
        check_format(str(path), saved.get("format"), FORMAT)
        try:
            made = from_plain(saved["population"])
            rows, dim = made.points.shape
            sizes = [
                len(made.log_weights),
                len(made.log_density),
                *(m.locs.shape[1] for m in (made.core, made.proposal)),
            ]
            fits = isinstance(made, cls) and sizes == [rows, rows, dim, dim]
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold a population as this version writes it, got another ({error})."
            ) from error
        if not fits:
            raise ValueError(
                f"{path} must hold a population whose parts are of one size, got {sizes} for {rows} x {dim}."
            )
        return made

    def __repr__(self) -> str:
        evaluations = self.evaluations
        modes = f", {self.num_modes} maxima found" if self.num_modes else ""
        lines = [
            f"Population of {len(self.points)} draws in {self.points.shape[1]} dimensions: effective share "
            f"{self.ess_share:.3f}",
            f"  log evidence {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}",
            f"  mixture of {self.core.num_components} component{'s' * (self.core.num_components > 1)}{modes}",
            f"  {evaluations.density} evaluations, {evaluations.gradient} with gradient, in {len(self.stages)} stages:",
        ]
        shown = self.stages if len(self.stages) <= 6 else (*self.stages[:2], "...", *self.stages[-3:])
        return "\n".join([*lines, *(f"    {stage}" for stage in shown)])

    def _repr_html_(self) -> str:
        """Table of the figures and stages."""
        return html_table(
            f"Population of {len(self.points)} draws in {self.points.shape[1]} dimensions",
            [
                ("effective share", f"{self.ess_share:.3f}"),
                ("log evidence", f"{self.log_evidence:.3f} +- {self.log_evidence_error:.3f}"),
                ("components", str(self.core.num_components)),
                ("maxima found", str(self.num_modes)),
                ("evaluations", f"{self.evaluations.density}, {self.evaluations.gradient} with gradient"),
                *((f"stage {i}", stage) for i, stage in enumerate(self.stages, 1)),
            ],
        )


def honest_evidence(log_weights: Tensor) -> tuple[float, float]:
    r"""Log evidence and an error that the tail of the weights widens.

    The delta method's error is that of weights with a variance, k-hat under a half; beyond, the mean of N weights
    converges as :math:`N^{k - 1}` and not as :math:`N^{-1/2}`, so the error is multiplied by :math:`N^{k - 1/2}`.

    Args:
        log_weights: Log of target over a proposal that was fixed before its draws. Shape ``(N,)``.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), section 3.2, https://arxiv.org/abs/1507.02646
    """
    value, error = log_evidence(log_weights)
    k = pareto_k(log_weights)
    return value, error * len(log_weights) ** max(0.0, min(k, 1.0) - 0.5)
