"""Simulation-based calibration: ranks of true parameters among posterior draws, over data sets of the prior."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_sb.diagnostics.calibration.bands import Bands, ecdf, ecdf_bands, ecdf_p_values
from pyro_sb.diagnostics.calibration.simulated import JointDraws, calibration_draws
from pyro_sb.infer.amortized.amortized import AmortizedPosterior

__all__ = ["Calibration", "Regions", "coverage", "sbc", "sbc_ranks", "tarp"]

LEVELS = (0.5, 0.9)
SHOWN = 7  # parameters in the repr
LOOK, BAD = 0.05, 0.01  # smallest p of all parameters, corrected for their number


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    r"""Ranks of S true parameter vectors among L posterior draws each.

    Attributes:
        ranks: Draws below the truth, 0 to L, ties broken at random. Shape ``(S, parameters)``.
        names: Name of each parameter, one for each number in the latent sites: ``"mu"``, ``"theta[3]"``.
        num_draws: L.
        uniforms: :math:`(\text{rank} + U) / (L + 1)` with U uniform: uniform where the posterior is exact. Shape
            ``(S, parameters)``.

    Example:
        >>> truths, draws = torch.randn(500, 2), torch.randn(99, 500, 2)
        >>> calibration = Calibration.of(truths, draws, names=("a", "b"))
        >>> calibration.ranks.shape
        torch.Size([500, 2])
        >>> bool((calibration.p_values > 0.01).all())
        True
    """

    ranks: Tensor
    names: tuple[str, ...]
    num_draws: int
    uniforms: Tensor
    jointly: ClassVar[bool] = False  # whether one region holds all parameters, not an interval each

    @classmethod
    def of(cls, latents: Tensor, draws: Tensor, names: Sequence[str] | None = None) -> "Calibration":
        """Calibration of anybody's draws ``(L, S, parameters)`` for truths ``(S, parameters)``."""
        ranks = sbc_ranks(latents, draws).flatten(1).cpu()
        labels = tuple(names) if names is not None else tuple(f"[{i}]" for i in range(ranks.shape[1]))
        if len(labels) != ranks.shape[1]:
            raise ValueError(f"names must hold one name for each of {ranks.shape[1]} parameters, got {len(labels)}.")
        uniforms = (ranks + torch.rand(ranks.shape, dtype=torch.float64)) / (len(draws) + 1)
        return cls(ranks, labels, len(draws), uniforms)

    @property
    def p_values(self) -> Tensor:
        """Kolmogorov-Smirnov p of each parameter's `uniforms` against the uniform law. Shape ``(parameters,)``."""
        from scipy.stats import kstest

        columns = self.uniforms.T.numpy()
        return torch.tensor([float(kstest(column, "uniform").pvalue) for column in columns], dtype=torch.float64)

    @property
    def band_p_values(self) -> Tensor:
        """The same by the simultaneous bands of the ECDF (`ecdf_p_values`), which see the tails better."""
        return ecdf_p_values(self.uniforms)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the smallest p, and that p: of P parameters, .01 / P is as rare as .01 of one."""
        p_values = self.p_values
        index = int(p_values.argmin())
        return self.names[index], float(p_values[index])

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"look"`` (p under .05) or ``"bad"`` (under .01), by the smallest p of the bands times P."""
        p = float(self.band_p_values.min()) * len(self.names)
        return "ok" if p > LOOK else "look" if p > BAD else "bad"

    def bands(self, level: float = 0.95) -> Bands:
        """Simultaneous bands for the difference of one parameter's ECDF from the diagonal: `ecdf_bands`."""
        return ecdf_bands(len(self.uniforms), level=level)

    def ecdf_difference(self, points: Tensor) -> Tensor:
        """ECDF of `uniforms` less the points, which are in (0, 1). ``(K,)`` to ``(K, parameters)``."""
        return ecdf(self.uniforms, points) - points[:, None]

    def coverage(self, levels: Sequence[float] = LEVELS) -> Tensor:
        """Share of truths in the central interval of each level, as `coverage`. Shape ``(levels, parameters)``."""
        return _coverage(self.ranks, self.num_draws, levels)

    @property
    def credibility(self) -> Tensor:
        """Smallest level whose interval holds the truth: uniform where calibrated. Shape ``(S, parameters)``."""
        return (2 * self.uniforms - 1).abs()

    def __repr__(self) -> str:
        p_values, bands, covered = self.p_values, self.band_p_values, self.coverage()
        order = torch.minimum(p_values, bands).argsort().tolist()[:SHOWN]
        width = max(len("parameter"), *(len(self.names[i]) for i in order))
        lines = [
            f"{type(self).__name__}: {len(self.ranks)} data sets, {self.num_draws} draws each; worst parameters first",
            f"{'parameter'.ljust(width)}    KS p  band p" + "".join(f"  in {level:4.0%}" for level in LEVELS),
        ]
        for i in order:
            shares = "".join(f"  {share:7.3f}" for share in covered[:, i].tolist())
            lines.append(f"{self.names[i].ljust(width)}  {float(p_values[i]):6.2g}  {float(bands[i]):6.2g}{shares}")
        if len(self.names) > SHOWN:
            lines.append(f"... and {len(self.names) - SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


class Regions(Calibration):
    """Calibration of credible regions that grow from one side: a rank is the share of draws that a region holds."""

    jointly = True

    def coverage(self, levels: Sequence[float] = LEVELS) -> Tensor:
        """Share of truths in the region of each level. Shape ``(levels, quantities)``."""
        return _coverage(self.ranks, self.num_draws, levels, central=False)

    @property
    def credibility(self) -> Tensor:
        """Smallest level whose region holds the truth."""
        return self.uniforms


def sbc(
    x: AmortizedPosterior | Callable[..., Any],
    num_data_sets: int = 200,
    num_draws: int = 100,
    *,
    corrected: bool | str = False,
    sampler: Callable[[Any], Any] | None = None,
    observed: Sequence[str] = ("y",),
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Calibration:
    r"""Simulation-based calibration of an amortised posterior, or of any sampler of a model.

    Fresh pairs :math:`(\theta, y)` come from the model. For each y the posterior is drawn from (an amortised one: for
    all data sets side by side); where it is exact, :math:`\theta` and its draws are exchangeable, so that the rank of
    each of its numbers is uniform on 0 to L. A hump means intervals too wide, a bowl too narrow, a slope a bias.

    Uniform ranks are necessary and not sufficient: the prior itself, drawn whatever y is, has them too.

    Args:
        x: A fitted `AmortizedPosterior`; or a Pyro model with its observed sites left open.
        num_data_sets: Number of pairs S, at least 20; fewer come where the simulator gives some that are not finite.
        num_draws: Draws L for each, at least 20.
        corrected: False: draws of the bridge. ``"importance"``: resampled from 2000 weighted ones. True or ``"mcmc"``:
            last states of independent chains (`Posterior.mcmc`).
        sampler: Of a model: from an observation (a dict, for several observed sites) to draws ``(n, *site)`` by site,
            n at least L, or to a finished MCMC. Evenly spaced draws are taken; ranks ask for independent ones, so let
            it draw so many more that their effective number is L.
        observed: A model's observed sites.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        RuntimeError: ``amortized`` is not fitted.
        TypeError: ``x`` is neither.
        ValueError: Too few data sets or draws; an unknown correction; a model without observed sites, or without a
            sampler.

    Warns:
        RuntimeWarning: The draws of ``sampler`` are autocorrelated: at the typical data set fewer than L / 2 effective
            ones of some number (by chain, where it returns a finished MCMC).

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018), algorithm 1,
        https://arxiv.org/abs/1804.06788. We add uniform noise to the discrete ranks, for tests of continuous laws.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 0.5))
        >>> amortized = AmortizedPosterior(model, bridge="light")
        >>> history = amortized.fit(num_simulations=500, num_updates=200, progress=False)
        >>> calibration = sbc(amortized, num_data_sets=100)
        >>> calibration.names
        ('mu',)
        >>> calibration.worst[1] > 1e-3
        True
    """
    joint: JointDraws = calibration_draws(
        x,
        num_data_sets,
        num_draws,
        corrected=corrected,
        sampler=sampler,
        observed=observed,
        args=args,
        kwargs=kwargs,
    )
    return Calibration.of(joint.truths, joint.draws, joint.names)


def sbc_ranks(latents: Tensor, draws: Tensor) -> Tensor:
    r"""Ranks of true values among draws: how many draws lie below, ties broken at random.

    Args:
        latents: True values, one for each of S data sets. Shape ``(S, *)``.
        draws: L posterior draws for each data set. Shape ``(L, S, *)``.

    Returns:
        Ranks, 0 to L. Shape ``(S, *)``, integer.

    Raises:
        ValueError: Shapes that do not match, no draws, or NaN.

    Example:
        >>> sbc_ranks(torch.tensor([0.5, -1.0]), torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
        tensor([1, 0])
    """
    if latents.dim() < 1 or draws.shape[1:] != latents.shape or not len(draws) or not len(latents):
        raise ValueError(
            "draws must have the shape (L, S, *) for latents of shape (S, *), with L and S at least 1, got "
            f"{tuple(draws.shape)} and {tuple(latents.shape)}."
        )
    bad = int(torch.isnan(latents).sum()) + int(torch.isnan(draws).sum())
    if bad:
        raise ValueError(f"latents and draws must not hold NaN, which has no rank, got {bad}. Leave those out.")
    below, equal = (draws < latents).sum(0), (draws == latents).sum(0)
    noise = torch.rand(below.shape, dtype=torch.float64, device=below.device)
    return below + (noise * (equal + 1)).long()


def coverage(draws: Tensor, truths: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    r"""Expected coverage: share of truths that lie in the central intervals of their draws.

    The interval of level a lies between the quantiles (1 - a) / 2 and (1 + a) / 2. A truth with rank r among L draws
    counts by the share of :math:`[r, r + 1] / (L + 1)` that lies between the two: without a bias for any L.
    `tarp` is the same for regions of all parameters together.

    Args:
        draws: L posterior draws for each of S data sets. Shape ``(L, S, *)``.
        truths: True values. Shape ``(S, *)``.
        levels: In (0, 1).

    Returns:
        Shares, near the levels where the draws are calibrated: s.e. ``sqrt(a (1 - a) / S)``. Shape ``(levels, *)``.

    Example:
        >>> draws = torch.randn(99, 2000)
        >>> share = coverage(2 * draws, torch.randn(2000), levels=[0.5])  # twice too wide
        >>> 0.75 < float(share) < 0.9
        True
    """
    return _coverage(sbc_ranks(truths, draws), len(draws), levels)


def tarp(
    draws: Tensor, truths: Tensor, *, centres: Tensor | None = None, generator: torch.Generator | None = None
) -> Regions:
    r"""Tests of accuracy with random points: expected coverage of balls in the space of all parameters.

    Around a random point r the posterior's region of level a is the ball that holds a share a of its draws. Where the
    posterior is exact it holds the truth with probability a, so that the share of draws nearer to r than the truth,

    .. math:: f = \tfrac1L \#\{l : |\theta_l - r| < |\theta - r|\} ,

    is uniform. Unlike intervals of one parameter after the other, balls see wrong correlations.

    Distances are taken in units of each parameter's standard deviation over the truths. As with SBC, points that do
    not depend on the data cannot tell the prior from the posterior: pass ``centres`` that do.

    Args:
        draws: L posterior draws for each of S data sets. Shape ``(L, S, parameters)``; as `calibration_draws` gives.
        truths: Shape ``(S, parameters)``.
        centres: Points, one a data set. Shape ``(S, parameters)``. Omitted: uniform in the box that holds all
            truths.
        generator: For those.

    Returns:
        A `Calibration` of the one quantity ``"tarp"``, whose regions grow from the centres.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al., 2023), algorithm 2,
        https://arxiv.org/abs/2302.03026

    Example:
        >>> truths, draws = torch.randn(500, 3), torch.randn(99, 500, 3)
        >>> tarp(draws, truths).verdict, tarp(0.5 * draws, truths).verdict
        ('ok', 'bad')
    """
    if truths.dim() != 2 or draws.shape[1:] != truths.shape:
        raise ValueError(
            "draws must have the shape (L, S, parameters) for truths of shape (S, parameters), got "
            f"{tuple(draws.shape)} and {tuple(truths.shape)}."
        )
    if centres is not None and centres.shape != truths.shape:
        raise ValueError(f"centres must be one point a data set, {tuple(truths.shape)}, got {tuple(centres.shape)}.")
    truths, draws = truths.double(), draws.double()
    unit = truths.std(0)
    unit = torch.where(unit > 0, unit, 1.0)
    if centres is None:
        low, high = truths.amin(0), truths.amax(0)
        device = truths.device if generator is None else generator.device
        share = torch.rand(truths.shape, dtype=truths.dtype, device=device, generator=generator)
        centres = low + share.to(truths.device) * (high - low)
    far = [((points - centres) / unit).norm(dim=-1)[..., None] for points in (truths, draws)]
    made = Calibration.of(far[0], far[1], ("tarp",))
    return Regions(made.ranks, made.names, made.num_draws, made.uniforms)


def _coverage(ranks: Tensor, num_draws: int, levels: Sequence[float], central: bool = True) -> Tensor:
    rows = []
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"levels must lie in (0, 1), got {level}. Write 0.9 for 90 %.")
        low = (num_draws + 1) * (1 - level) / 2 if central else 0.0
        high = low + (num_draws + 1) * level
        inside = (ranks + 1).double().clamp(low, high) - ranks.double().clamp(low, high)
        rows.append(inside.mean(0))
    return torch.stack(rows)
