r"""Five posteriors of posteriordb as Pyro models, two of them in two forms, on posteriordb's own data.

The models are rank-polymorphic: they index from the right (``mu[..., 0]``, ``beta @ x.T``), so a latent may carry
leading chain dimensions and one run of the model then answers for all chains. They take dtype and device from their
data, whatever torch's default dtype is. `pyro_sb.datasets.exact` has the same models on data that need no files.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_sb.checks import check_choice
from pyro_sb.datasets.originals import read_posterior


@dataclass(frozen=True, eq=False)
class PosteriorTask:
    r"""A Pyro model with its data and what its posterior is known to be.

    Attributes:
        name: One of `POSTERIORS`.
        model: The Pyro model, called as ``model(*args)``.
        args: The data.
        parameters: The p scalar quantities of the reference in its own naming, counted from 1: ``"theta[1]"``. They are
            latents or deterministic sites of the model.
        reference_mean: Posterior means, by quadrature or from posteriordb's 10,000 draws. Shape ``(p,)``.
        reference_sd: Posterior standard deviations. Shape ``(p,)``.
        reference_mcse: Monte Carlo standard errors of ``reference_mean``, zero for quadrature. Shape ``(p,)``.
        reference_draws: Independent draws of the posterior, or every fifth of posteriordb's. Shape ``(num_draws, p)``.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    parameters: tuple[str, ...]
    reference_mean: Tensor
    reference_sd: Tensor
    reference_mcse: Tensor
    reference_draws: Tensor

    def columns(self, samples: dict[str, Tensor]) -> Tensor:
        r"""The reference's scalar quantities out of constrained samples by site.

        Args:
            samples: Site name to tensor of shape ``(*batch, *site_shape)``, deterministic sites included.

        Returns:
            One column a parameter, in the order of ``parameters``. Shape ``(*batch, p)``.

        Raises:
            KeyError: If a site of the reference is missing.
        """
        return torch.stack([_column(samples, name) for name in self.parameters], -1)


def posterior_task(name: str, *, root: str | Path | None = None) -> PosteriorTask:
    r"""A posterior of posteriordb as a Pyro model, with posteriordb's data and reference draws.

    The files are not part of this package: ``git clone --depth 1 https://github.com/stan-dev/posteriordb`` brings them.
    `exact_task` has the same models with data and references that need no files.

    The centred eight schools has the non-centred one's posterior in theta, mu, tau, and so its reference. Without its
    ordering the mixture has two modes, mirror images of each other (swap the components, theta to 1 - theta), each of
    mass 1/2 and more than a hundred standard deviations apart; its reference is the ordered one mirrored, exactly.

    Args:
        name: ``"eight_schools_noncentered"``, ``"eight_schools_centered"``, ``"low_dim_gauss_mix"``,
            ``"low_dim_gauss_mix_unordered"``, ``"arK"``, ``"logearn_interaction"`` or ``"kidscore_interaction"``.
        root: A checkout of posteriordb, or a folder of ``NAME.data.json`` and ``NAME.npz`` (keys ``draws``, ``params``,
            ``reference_mean``, ``reference_sd``, ``n_reference``). Omitted: the environment variable
            ``PYRO_SB_POSTERIORDB`` names it.

    Returns:
        The task, in float64.

    Raises:
        ValueError: If the name is none of these.
        FileNotFoundError: If no folder is named, or it does not hold the posterior.

    References:
        posteriordb: Testing, Benchmarking and Developing Bayesian Inference Algorithms (Magnusson et al., 2024),
        https://arxiv.org/abs/2407.04967

    Example:
        >>> posterior_task("arK", root="nowhere")
        Traceback (most recent call last):
        FileNotFoundError: root (or PYRO_SB_POSTERIORDB) must be a checkout of posteriordb ...
    """
    check_choice("name", name, _TASKS)
    stored, model, arguments = _TASKS[name]
    data, reference = read_posterior(stored, root)
    mean, sd = torch.from_numpy(reference.mean), torch.from_numpy(reference.sd)
    mcse = sd / math.sqrt(reference.num_draws)  # Stan's draws are thinned: near independent
    draws = torch.from_numpy(reference.draws)
    if name.endswith("unordered"):
        # The mean is that of (x + mirror image of x) / 2, which knows each mode's mass exactly.
        mcse = ((draws + mirrored(draws)) / 2).std(0) / math.sqrt(reference.num_draws)
        mean, sd, draws = both_modes(mean, sd, draws)
    return PosteriorTask(name, model, arguments(data), reference.parameters, mean, sd, mcse, draws)


def eight_schools_noncentered(sigma: Tensor, y: Tensor) -> None:
    r"""Eight schools with :math:`\theta_j = \mu + \tau z_j`, :math:`z_j \sim N(0, 1)`.

    Args:
        sigma: Standard errors of the schools' effects, positive. Shape ``(J,)``.
        y: Effects. Shape ``(J,)``.
    """
    mu, tau = _population(y)
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * z, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(sigma: Tensor, y: Tensor) -> None:
    r"""Eight schools with :math:`\theta_j \sim N(\mu, \tau)`: the same posterior, but a funnel.

    Args:
        sigma: Standard errors of the schools' effects, positive. Shape ``(J,)``.
        y: Effects. Shape ``(J,)``.
    """
    mu, tau = _population(y)
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def low_dim_gauss_mix(y: Tensor) -> None:
    r"""A mixture of two Gaussians with ordered means :math:`\mu_1 < \mu_2`.

    .. math:: y_n \sim \theta N(\mu_1, \sigma_1) + (1 - \theta) N(\mu_2, \sigma_2)

    The prior of the means is proportional to :math:`N(\mu_1; 0, 2) N(\mu_2; 0, 2)` on the ordered pairs: a flat law on
    that support, times the density as a factor. (The normaliser, 1/2, is left out: it is the same for every draw.)

    Args:
        y: Observations. Shape ``(N,)``.
    """
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(y.new_zeros(()), 2.0).log_prob(mu).sum(-1))
    _two_gaussians(mu, y)


def low_dim_gauss_mix_unordered(y: Tensor) -> None:
    r"""The same mixture with :math:`\mu_1, \mu_2 \sim N(0, 2)` and no ordering: two mirrored modes of mass 1/2.

    Args:
        y: Observations. Shape ``(N,)``.
    """
    _two_gaussians(pyro.sample("mu", dist.Normal(y.new_zeros(2), 2.0).to_event(1)), y)


def ark(lags: Tensor, y: Tensor) -> None:
    r"""Autoregression :math:`y_t \sim N(\alpha + \sum_k \beta_k y_{t-k}, \sigma)`.

    Args:
        lags: The series before each observation, latest first: ``lags[t, k - 1]`` is :math:`y_{t-k}`. Shape ``(T, K)``.
        y: Observations. Shape ``(T,)``.
    """
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    _linear(alpha[..., None] + beta @ lags.T, sigma, y)


def logearn_interaction(x: Tensor, y: Tensor) -> None:
    r"""Linear regression :math:`y \sim N(x \beta, \sigma)` with flat priors on :math:`\beta` and :math:`\sigma > 0`.

    Args:
        x: Covariates: 1, height, male, height times male, not centred. Shape ``(N, 4)``.
        y: Log earnings. Shape ``(N,)``.
    """
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[-1:]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    _linear(beta @ x.T, sigma, y)


def kidscore_interaction(x: Tensor, y: Tensor) -> None:
    r"""Linear regression :math:`y \sim N(x \beta, \sigma)`, :math:`\beta` flat, :math:`\sigma \sim` HalfCauchy(2.5).

    Args:
        x: Covariates: 1, mother's school, mother's IQ, their product, not centred. Shape ``(N, 4)``.
        y: Scores. Shape ``(N,)``.
    """
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[-1:]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    _linear(beta @ x.T, sigma, y)


def _population(y: Tensor) -> tuple[Tensor, Tensor]:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    return mu, pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))


def _two_gaussians(mu: Tensor, y: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(2 * y.new_ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    first = theta.log() + dist.Normal(mu[..., 0], sigma[..., 0]).log_prob(y)
    second = (-theta).log1p() + dist.Normal(mu[..., 1], sigma[..., 1]).log_prob(y)
    with pyro.plate("data", len(y)):
        # The sum over components written out: MixtureSameFamily expands its weights over the data, which takes
        # 15 times as long at 256 chains (5 times with the gradient).
        pyro.factor("y", torch.logaddexp(first, second))


def _linear(mean: Tensor, sigma: Tensor, y: Tensor) -> None:
    # One event and no plate: chains x N in one matrix product, beta (C, k) @ x.T.
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def interaction(first: Tensor, second: Tensor) -> Tensor:
    """Covariates of a regression on two variables and their product: 1, first, second, product. Shape ``(N, 4)``."""
    return torch.stack([torch.ones_like(first), first, second, first * second], -1)


def lagged(y: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The ``order`` values before each observation, latest first, ``(T - order, order)``; the observations."""
    return y.unfold(0, order, 1)[:-1].flip(-1), y[order:]


def mirrored(draws: Tensor) -> Tensor:
    """Draws of (mu1, mu2, sigma1, sigma2, theta) of a mixture, its two components swapped. Shape ``(*, 5)``."""
    return torch.cat([draws[..., [1, 0, 3, 2]], 1 - draws[..., 4:]], -1)


def both_modes(mean: Tensor, sd: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sd and draws of a law of a mixture's parameters in equal parts with its mirror image."""
    flipped, variance = mirrored(mean), sd.square()
    between = (mean - flipped).square() / 4
    spread = ((variance + variance[[1, 0, 3, 2, 4]]) / 2 + between).sqrt()
    return (mean + flipped) / 2, spread, torch.cat([draws, mirrored(draws)])


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _schools(data: dict) -> tuple[Tensor, ...]:
    return _tensor(data["sigma"]), _tensor(data["y"])


def _series(data: dict) -> tuple[Tensor, ...]:
    return lagged(_tensor(data["y"]), data["K"])


def _earnings(data: dict) -> tuple[Tensor, ...]:
    return interaction(_tensor(data["height"]), _tensor(data["male"])), _tensor(data["earn"]).log()


def _scores(data: dict) -> tuple[Tensor, ...]:
    return interaction(_tensor(data["mom_hs"]), _tensor(data["mom_iq"])), _tensor(data["kid_score"])


def _observations(data: dict) -> tuple[Tensor, ...]:
    return (_tensor(data["y"]),)


def _column(samples: dict[str, Tensor], parameter: str) -> Tensor:
    site, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", parameter).groups()  # type: ignore[union-attr]  # our own names
    if site not in samples:
        raise KeyError(f"samples must hold the site {site!r} for {parameter!r}, got {sorted(samples)}.")
    return samples[site] if index is None else samples[site][..., int(index) - 1]


_TASKS: dict[str, tuple[str, Callable[..., None], Callable[[dict], tuple[Tensor, ...]]]] = {
    "eight_schools_noncentered": ("eight_schools-eight_schools_noncentered", eight_schools_noncentered, _schools),
    "eight_schools_centered": ("eight_schools-eight_schools_noncentered", eight_schools_centered, _schools),
    "low_dim_gauss_mix": ("low_dim_gauss_mix-low_dim_gauss_mix", low_dim_gauss_mix, _observations),
    "low_dim_gauss_mix_unordered": ("low_dim_gauss_mix-low_dim_gauss_mix", low_dim_gauss_mix_unordered, _observations),
    "arK": ("arK-arK", ark, _series),
    "logearn_interaction": ("earnings-logearn_interaction", logearn_interaction, _earnings),
    "kidscore_interaction": ("kidiq-kidscore_interaction", kidscore_interaction, _scores),
}

POSTERIORS: tuple[str, ...] = tuple(_TASKS)
"""Names that :func:`posterior_task` and :func:`exact_task` know."""
