"""Rows that a conditional bridge learns from, made of simulations, and the file of an unfinished fit."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.files import checkpoint_path, read_file, write_file
from pyro_sb.fingerprint import differences
from pyro_sb.infer.amortized.features import Features
from pyro_sb.infer.amortized.latent_law import Residuals, is_logit
from pyro_sb.infer.amortized.paired import PairedJoint
from pyro_sb.infer.amortized.simulator import Simulations, Simulator
from pyro_sb.infer.moves.moves import HamiltonianStep, Rows, adapted, hmc_step, jittered, start_rows
from pyro_sb.ops.regression import regress

__all__ = ["Kept", "Store", "TrainingSet", "bounded_axes", "exchangeable_sites", "rejuvenate", "training_set"]

logger = logging.getLogger(__name__)
ROWS = 100_000  # rows that rejuvenation aims at
MOST_COPIES = 19
PERMUTATIONS = 4
PILOT = 16  # transitions of rejuvenation that tune the step
SPREAD, TARGET_ACCEPT = 20.0, 0.75  # of its steps: posteriors have many widths


class TrainingSet(NamedTuple):
    """Rows to learn from, several to a simulation.

    Attributes:
        residuals: Coordinates of the latents.
        latents: Unconstrained. Shape ``(M, d)``.
        context: What the bridge sees. Shape ``(M, C)``.
        features: Regressors. Shape ``(M, F)``.
        held_out: Rows to judge by: all rows of a tenth of the simulations. Shape ``(M,)``, bool.
        num_simulations: How many simulations the rows come from.
    """

    residuals: Residuals
    latents: Tensor
    context: Tensor
    features: Tensor
    held_out: Tensor
    num_simulations: int


def training_set(
    simulator: Simulator,
    pairs: Simulations,
    features: Features,
    joint: PairedJoint | None,
    *,
    num_copies: int | None,
    missing: float,
    held_out: float,
) -> TrainingSet:
    r"""Rejuvenated copies of the simulations, in the coordinates of their residuals.

    Args:
        simulator: The model.
        pairs: N simulations.
        features: Features of an observation, fitted.
        joint: The model's log joint, or None: then there is one copy.
        num_copies: Copies beside the simulations themselves; None: up to 100,000 rows in all, 19 copies at most.
        missing: Largest share of an observation's entries that are hidden in a row; 0: none is.
        held_out: Share of the simulations to judge by.
    """
    num, device = len(pairs.latents), pairs.latents.device
    if num_copies is None:
        num_copies = min(MOST_COPIES, max(4, ROWS // num - 1)) if joint is not None else 0
    latents = pairs.latents[None]
    if num_copies and joint is not None:
        latents = rejuvenate(joint, pairs, proposal_factor(pairs, features), num_copies)
    repeats = len(latents) if not missing else max(len(latents), 4)
    latents = latents[torch.arange(repeats, device=device) % len(latents)]
    observed = pairs.observations.to(latents)
    judged = torch.zeros(num, dtype=torch.bool, device=device)
    judged[torch.randperm(num, device=device)[: max(1, round(held_out * num))]] = True
    if missing:
        hidden = hide(observed.repeat(repeats, 1), simulator, missing)
        design, context = features.design(hidden), features.context(hidden)
        residuals = Residuals.fit(latents, design.unflatten(0, (repeats, num)), bounded_axes(simulator), judged)
    else:  # the copies share their observations
        design = features.design(observed)
        residuals = Residuals.fit(latents, design, bounded_axes(simulator), judged)
        design = design.repeat(repeats, 1)
        context = features.context(observed).repeat(repeats, 1) if features.raw else design
    return TrainingSet(residuals, latents.flatten(0, 1), context, design, judged.repeat(repeats), num)


def rejuvenate(
    joint: PairedJoint, pairs: Simulations, scale: Tensor, num: int, *, sweeps: int = 8, num_steps: int = 5
) -> Tensor:
    r"""Fresh latents for the same observations: the simulated pairs, moved within :math:`p(\theta | y)`.

    A simulated :math:`\theta` is an exact draw of :math:`p(\theta | y)` at its own y, so chains that start there and
    leave :math:`p(\theta | y)` invariant are stationary from their first step: every copy is a draw of the joint law,
    whatever the mixing. The simulator is not called; the model's density is.

    Args:
        joint: The model's log joint.
        pairs: N simulations.
        scale: Factor of the metric. Shape ``(d, d)``.
        num: Copies to make.
        sweeps: Transitions between copies.
        num_steps: Leapfrog steps a transition.

    Returns:
        Latents, the simulated ones first. Shape ``(num + 1, N, d)``.
    """

    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        return joint.value_and_grad(z, pairs.observations)

    def moved(rows: Rows, step_size: float) -> HamiltonianStep:
        steps = jittered(step_size, SPREAD, rows.x)
        return hmc_step(target, rows.with_momentum(), scale, steps, num_steps)

    copies, step_size = [pairs.latents], 0.5
    first = rows = start_rows(target, pairs.latents)
    for _ in range(PILOT):  # the step is tuned on rows that are thrown away, and frozen
        rows, accept_prob, *_ = moved(rows, step_size)
        step_size = adapted(step_size, accept_prob, TARGET_ACCEPT, 0.8)
    rows = first
    for _ in range(num):
        for _ in range(sweeps):
            rows = moved(rows, step_size).rows
        copies.append(rows.x)
    return torch.stack(copies)


def proposal_factor(pairs: Simulations, features: Features) -> Tensor:
    """Cholesky factor of the latents' covariance given an affine function of the observation."""
    design = features.design(pairs.observations.to(pairs.latents))
    affine = regress(pairs.latents, design, design.new_full((len(design),), 1 / len(design)))
    residual = pairs.latents - affine(design)
    covariance = residual.T.cov().reshape(residual.shape[1], residual.shape[1])
    return torch.linalg.cholesky(covariance + 1e-6 * torch.diag(covariance.diagonal().clamp_min(1e-12)))


def bounded_axes(simulator: Simulator) -> Tensor:
    """Mask of the unconstrained coordinates that are logits of an interval. Shape ``(dim,)``."""
    packing = simulator.prototype.packing
    transforms = simulator.prototype.transforms
    marks = [torch.full((shape.numel(),), is_logit(transforms[name])) for name, shape in packing.shapes.items()]
    return torch.cat(marks).to(packing.device)


def hide(observed: Tensor, simulator: Simulator, most: float) -> Tensor:
    """NaN at random entries, whole events at a time: none in a quarter of the rows, else a random share up to most."""
    share = most * torch.rand(len(observed), 1, device=observed.device)
    share = torch.where(torch.rand_like(share) < 0.25, torch.zeros_like(share), share)
    parts = []
    for name, shape in simulator.data.shapes.items():
        width = shape[len(shape) - simulator.event_dims.get(name, 0) :].numel()
        gone = torch.rand(len(observed), shape.numel() // width, device=observed.device) < share
        parts.append(gone.repeat_interleave(width, 1))
    return torch.where(torch.cat(parts, 1), torch.full_like(observed, torch.nan), observed)


def exchangeable_sites(simulator: Simulator, pairs: Simulations, joint: PairedJoint) -> dict[str, int]:
    """Observed sites whose items may be permuted without a change of the log joint, with their number of items.

    Items run along all dimensions but those of a joint event, or along the first alone. Simulations that a permutation
    leaves as they are show nothing: a site without any other is not found.
    """
    y = pairs.observations[:4096].to(pairs.latents)
    z = pairs.latents[: len(y)]
    found, start = {}, 0
    for name, shape in simulator.data.shapes.items():
        part = slice(start, start + shape.numel())
        start += shape.numel()
        free = shape[: len(shape) - simulator.event_dims[name]]
        for count in dict.fromkeys([free.numel(), *free[:1]]):
            if count < 2:
                continue
            items = y[:, part].unflatten(1, (count, -1))
            moves = [
                torch.cat([y[:, : part.start], items[:, order].flatten(1), y[:, part.stop :]], 1)
                for order in permutations(count, y)
            ]
            if all(same_density(joint, z, y, moved) for moved in moves):
                found[name] = count
                break
    return found


def permutations(count: int, like: Tensor) -> list[Tensor]:
    """A roll and a swap, which generate all permutations, and random ones, which a slow trend feels more."""
    still = torch.arange(count, device=like.device)
    swap = torch.cat([still[1:2], still[:1], still[2:]])
    random = [torch.randperm(count, device=like.device) for _ in range(PERMUTATIONS)]
    return [still.roll(1), swap, *(order for order in random if not torch.equal(order, still))]


def same_density(joint: PairedJoint, z: Tensor, y: Tensor, moved: Tensor) -> bool:
    """Whether the log joint is the same at other observations, judged by up to 16 rows where they differ."""
    rows = (moved != y).any(1).nonzero()[:16, 0]
    if not len(rows):
        return False
    before, after = joint.log_prob(z[rows], y[rows]), joint.log_prob(z[rows], moved[rows])
    good = torch.isfinite(before)
    rounding = 512 * torch.finfo(z.dtype).eps  # a permutation changes the order of a sum, a trend much more than that
    return bool(good.any()) and torch.allclose(after[good], before[good], rtol=rounding, atol=rounding)


class Kept(NamedTuple):
    """Simulations and rows of an unfinished fit."""

    simulations: Simulations
    rows: TrainingSet
    exchangeable: dict[str, int]


class Store:
    """One file of tensors and plain values beside a checkpoint; nothing where there is no checkpoint.

    Args:
        checkpoint: Path of the bridge's checkpoint.
        arguments: What a fit must share to go on with the file, in words.
    """

    def __init__(self, checkpoint: str | Path | None, arguments: dict[str, str]) -> None:
        path = checkpoint_path(checkpoint)
        self.path = None if path is None else Path(f"{path}.simulations")
        self.arguments = arguments

    def read(self) -> Kept | None:
        """The file's content; None if there is no file; an error if it belongs to another fit."""
        if self.path is None or not self.path.exists():
            return None
        saved = read_file(self.path)
        differ = differences(saved.get("arguments") if isinstance(saved, dict) else None, self.arguments)
        if differ:
            raise ValueError(
                f"{self.path} must be of this fit, got one that was cut off in another: {differ}. Fit with what is "
                "there, write another path, or remove the file."
            )
        residuals = Residuals(*saved["residuals"])
        return Kept(
            Simulations(*saved["simulations"]),
            TrainingSet(residuals, *saved["rows"]),
            saved["exchangeable"],
        )

    def write(self, simulations: Simulations, rows: TrainingSet, exchangeable: dict[str, int]) -> None:
        """Put it there, as a whole or not at all."""
        if self.path is None:
            return
        residuals = rows.residuals
        state = {
            "arguments": self.arguments,
            "simulations": list(simulations),
            "residuals": [residuals.bounded, residuals.weights, residuals.factor],
            "rows": [rows.latents, rows.context, rows.features, rows.held_out, rows.num_simulations],
            "exchangeable": exchangeable,
        }
        write_file(state, self.path)

    def clear(self) -> None:
        """Remove it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
