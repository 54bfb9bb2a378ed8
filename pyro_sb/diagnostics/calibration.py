"""Simulation-based calibration: do a posterior's draws know as much as they claim, over data sets of the prior?"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from scipy import stats
from torch import Tensor

from pyro_sb.infer.amortized import AmortizedPosterior
from pyro_sb.infer.posterior import Posterior
from pyro_sb.infer.simulate import Simulator

__all__ = ["Calibration", "coverage", "sbc", "sbc_ranks"]

Sites = dict[str, Tensor]
LEVELS = (0.5, 0.9)
PROPOSALS, STARTS = 2000, 500  # draws of the bridge, a data set, that are weighted; that chains start from
STEPS = 10  # of each chain, after its warm-up; its last state is the draw
ROWS = 2**18  # draws corrected at once, over all data sets
SHOWN = 12  # parameters in the repr


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
        columns = self.uniforms.T.numpy()
        return torch.tensor([float(stats.kstest(column, "uniform").pvalue) for column in columns], dtype=torch.float64)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the smallest p, and that p: of P parameters, .01 / P is as rare as .01 of one."""
        p_values = self.p_values
        index = int(p_values.argmin())
        return self.names[index], float(p_values[index])

    def coverage(self, levels: Sequence[float] = LEVELS) -> Tensor:
        """Share of truths in the central interval of each level, as `coverage`. Shape ``(levels, parameters)``."""
        return _coverage(self.ranks, self.num_draws, levels)

    def __repr__(self) -> str:
        p_values, covered = self.p_values, self.coverage()
        order = p_values.argsort().tolist()[:SHOWN]
        width = max(len("parameter"), *(len(self.names[i]) for i in order))
        lines = [
            f"Calibration: {len(self.ranks)} data sets, {self.num_draws} draws each; worst parameters first",
            f"{'parameter'.ljust(width)}    KS p" + "".join(f"  in {level:4.0%}" for level in LEVELS),
        ]
        for i in order:
            shares = "".join(f"  {share:7.3f}" for share in covered[:, i].tolist())
            lines.append(f"{self.names[i].ljust(width)}  {float(p_values[i]):6.2g}{shares}")
        if len(self.names) > SHOWN:
            lines.append(f"... and {len(self.names) - SHOWN} more")
        return "\n".join(lines)


def sbc(
    amortized: AmortizedPosterior, num_data_sets: int = 200, num_draws: int = 100, *, corrected: bool | str = False
) -> Calibration:
    r"""Simulation-based calibration of an amortised posterior: ranks of true parameters among posterior draws.

    Fresh pairs :math:`(\theta, y)` come from the fitted posterior's simulator. For each y the posterior is drawn from,
    all data sets side by side; where it is exact, :math:`\theta` and its draws are exchangeable, so that the rank of
    each of its numbers is uniform on 0 to L. A hump means intervals too wide, a bowl too narrow, a slope a bias.

    Uniform ranks are necessary and not sufficient: the prior itself, drawn whatever y is, has them too.

    Args:
        amortized: Fitted.
        num_data_sets: Number of pairs S, at least 20; fewer come where the simulator gives some that are not finite.
        num_draws: Draws L for each, at least 20.
        corrected: False: draws of the bridge. ``"importance"``: resampled from 2000 weighted ones. True or ``"mcmc"``:
            last states of independent chains (`Posterior.mcmc`).

    Raises:
        RuntimeError: ``amortized`` is not fitted.
        ValueError: Too few data sets or draws; an unknown correction.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018), algorithm 1,
        https://arxiv.org/abs/1804.06788. We add uniform noise to the discrete ranks, for Kolmogorov and Smirnov's test.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 0.5))
        >>> amortized = AmortizedPosterior(model, bridge="light")
        >>> history = amortized.fit(num_simulations=500, num_steps=200, progress=False)
        >>> calibration = sbc(amortized, num_data_sets=100)
        >>> calibration.names
        ('mu',)
        >>> calibration.worst[1] > 1e-3
        True
    """
    _check_least("num_data_sets", num_data_sets, 20)
    _check_least("num_draws", num_draws, 20)
    ways: dict[bool | str, str] = {False: "bridge", True: "mcmc", "mcmc": "mcmc", "importance": "importance"}
    if corrected not in ways:
        raise ValueError(f'corrected must be False, True, "importance" or "mcmc", got {corrected!r}.')
    if amortized.bridge is None:
        raise RuntimeError("sbc needs a fitted posterior: call amortized.fit(*model_args, num_simulations=...) first.")
    source: Simulator = amortized.simulator
    pairs = source.simulate(num_data_sets, keep_finite=True)
    truths = source.prototype.packing.unpack(pairs.latents)
    truths = {name: transform.inv(truths[name]) for name, transform in source.prototype.transforms.items()}
    block = len(pairs.latents) if not corrected else max(1, ROWS // PROPOSALS)
    parts = []
    for observations in pairs.observations.split(block):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="y lies", category=RuntimeWarning)  # y is the model's own
            posterior = amortized.condition(source.data.unpack(observations))
        parts.append(_flat(_drawn(posterior, num_draws, ways[corrected]), lead=2))
    return Calibration.of(_flat(truths, lead=1), torch.cat(parts, 1), _names(truths))


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
    r"""Share of truths that lie in the central intervals of their draws.

    The interval of level a lies between the quantiles (1 - a) / 2 and (1 + a) / 2. A truth with rank r among L draws
    counts by the share of :math:`[r, r + 1] / (L + 1)` that lies between the two: without a bias for any L.

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


def _coverage(ranks: Tensor, num_draws: int, levels: Sequence[float]) -> Tensor:
    rows = []
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"levels must lie in (0, 1), got {level}. Write 0.9 for 90 %.")
        low, high = (num_draws + 1) * (1 - level) / 2, (num_draws + 1) * (1 + level) / 2
        inside = (ranks + 1).double().clamp(low, high) - ranks.double().clamp(low, high)
        rows.append(inside.mean(0))
    return torch.stack(rows)


def _drawn(posterior: Posterior, num: int, way: str) -> Sites:
    """Draws ``(num, B, *site)`` of a batch, that are independent of each other."""
    if way == "bridge":
        return posterior.sample(num)
    if way == "importance":
        return posterior.importance(PROPOSALS).resample(num)
    chains = posterior.mcmc(STEPS, num_chains=num, num_proposals=max(num, STARTS))
    return {name: value[:, -1] for name, value in chains.get_samples(group_by_chain=True).items()}


def _flat(sites: Sites, lead: int) -> Tensor:
    """All sites' numbers side by side."""
    return torch.cat([value.reshape(*value.shape[:lead], -1) for value in sites.values()], -1)


def _names(sites: Sites) -> tuple[str, ...]:
    """``name[i, j]`` for each number of ``(S, *site)``, in the order of `_flat`."""
    names = []
    for name, value in sites.items():
        for index in product(*map(range, value.shape[1:])):
            names.append(f"{name}[{', '.join(map(str, index))}]" if index else name)
    return tuple(names)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}: fewer tell nothing of a law.")
