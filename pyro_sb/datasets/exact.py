r"""The models of `posterior_task` on data that need no files, with references by quadrature.

Given one scale (sigma of a regression, tau of eight schools) everything else is Gaussian, so the posterior is an
integral over one number; the mixture's five parameters are integrated by Gauss and Hermite's rule about their mode.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sb.checks import check_choice
from pyro_sb.datasets.posteriors import (
    POSTERIORS,
    PosteriorTask,
    ark,
    both_modes,
    eight_schools_centered,
    eight_schools_noncentered,
    interaction,
    kidscore_interaction,
    lagged,
    logearn_interaction,
    low_dim_gauss_mix,
    low_dim_gauss_mix_unordered,
)

NUM_DRAWS = 2000


def exact_task(name: str) -> PosteriorTask:
    r"""A posterior whose reference is computed here, by quadrature: the models of `posterior_task`, without its files.

    Eight schools has its own sixteen numbers (Rubin, 1981); the other data are simulated (seed 0) from the same models:

    - ``"low_dim_gauss_mix"``: 1,000 draws of .6 N(-2.75, 1) + .4 N(2.75, 1);
    - ``"arK"``: 200 values of a stationary series, beta (.5, -.3, .2, .1, -.2), alpha .3, sigma .5;
    - ``"logearn_interaction"``: 1,000 people, beta (7, .03, .3, 0), sigma .9, heights in inches;
    - ``"kidscore_interaction"``: 400 mothers and children, beta (-10, 50, 1, -.5), sigma 18, IQs of mean 92 and 102.

    Means and standard deviations are exact to 1e-4 standard deviations (the mixture's; the others' to 1e-8), so
    ``reference_mcse`` is zero. The 2,000 ``reference_draws`` are independent draws of the posterior (seed 1); those of
    ``"low_dim_gauss_mix_unordered"`` are followed by their mirror images.

    Args:
        name: One of `POSTERIORS`.

    Returns:
        The task, in float64.

    Raises:
        ValueError: If the name is none of these.

    References:
        Estimation in Parallel Randomized Experiments (Rubin, 1981), table 1: effects and standard errors of eight
        schools, https://doi.org/10.3102/10769986006004377

    Example:
        >>> task = exact_task("eight_schools_noncentered")
        >>> task.parameters[-2:], [round(float(mean), 3) for mean in task.reference_mean[-2:]]
        (('mu', 'tau'), [4.397, 3.598])
        >>> samples = {"theta": torch.zeros(4, 100, 8), "mu": torch.zeros(4, 100), "tau": torch.ones(4, 100)}
        >>> task.columns(samples).shape
        torch.Size([4, 100, 10])
    """
    check_choice("name", name, POSTERIORS)
    model, args, parameters, reference = _TASKS[name]()
    mean, sd, draws = reference
    return PosteriorTask(name, model, args, parameters, mean, sd, torch.zeros_like(mean), draws)


_Moments = tuple[Tensor, Tensor, Tensor]  # mean, sd, draws
_Task = tuple[Callable[..., None], tuple[Tensor, ...], tuple[str, ...], _Moments]


# --- Gaussian given a scale ----------------------------------------------------------------------------------------


def _schools(model: Callable[..., None]) -> _Task:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
    prior_precision = torch.cat([torch.ones_like(y), y.new_tensor([1 / 25])])  # of z and mu

    def effects(tau: Tensor) -> Tensor:  # theta = tau z + mu
        return torch.cat([tau[:, None, None] * torch.eye(8, dtype=y.dtype), y.new_ones(len(tau), 8, 1)], -1)

    def given(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = effects(tau) / sigma[:, None]
        precision = x.mT @ x + torch.diag(prior_precision)
        return precision, x.mT @ (y / sigma), dist.HalfCauchy(y.new_tensor(5.0)).log_prob(tau)

    def quantities(tau: Tensor) -> Tensor:  # theta and mu out of z and mu
        mu = torch.eye(9, dtype=y.dtype)[-1:].expand(len(tau), 1, 9)
        return torch.cat([effects(tau), mu], -2)

    names = (*(f"theta[{j}]" for j in range(1, 9)), "mu", "tau")
    return model, (sigma, y), names, _scale_mixture(given, quantities, low=-25.0, high=12.0)


def _regression(x: Tensor, y: Tensor, log_prior: Callable[[Tensor], Tensor], precision: float = 0.0) -> _Moments:
    """Of beta ~ N(0, 1 / precision) and sigma, given y ~ N(x beta, sigma)."""
    gram, moment, square = x.T @ x, x.T @ y, y.square().sum()
    prior_precision = precision * torch.eye(x.shape[-1], dtype=x.dtype)

    def given(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = sigma[:, None, None] ** -2
        log_rest = log_prior(sigma) - len(y) * sigma.log() - square * inverse[:, 0, 0] / 2
        return gram * inverse + prior_precision, moment * inverse[:, 0], log_rest

    def quantities(sigma: Tensor) -> Tensor:
        return torch.eye(x.shape[-1], dtype=x.dtype).expand(len(sigma), -1, -1)

    centre = float((square - moment @ torch.linalg.solve(gram, moment)).div(len(y)).log() / 2)
    reach = 15 / math.sqrt(2 * len(y))  # fifteen standard deviations of log sigma
    return _scale_mixture(given, quantities, low=centre - reach, high=centre + reach)


def _scale_mixture(
    given: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    quantities: Callable[[Tensor], Tensor],
    *,
    low: float,
    high: float,
    num: int = 2001,
) -> _Moments:
    r"""Mean, sd and draws of (A(s) b, s) where b is Gaussian given s.

    .. math:: p(b, s) \propto \exp(-\tfrac12 b^\top Q(s) b + h(s)^\top b + c(s))

    The trapezoidal rule over log s: the integrand is smooth and vanishes at both ends, so its error falls faster than
    any power of the step.

    Args:
        given: s, shape ``(g,)``, to Q, h, c. Shapes ``(g, k, k)``, ``(g, k)``, ``(g,)``.
        quantities: s to A. Shape ``(g, p - 1, k)``.
        low: Least log s.
        high: Largest log s.
        num: Points.
    """
    generator = torch.Generator().manual_seed(1)
    log_s = torch.linspace(low, high, num, dtype=torch.float64)

    def conditional(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        precision, h, c = given(s)
        root = torch.linalg.cholesky(precision)
        half = torch.linalg.solve_triangular(root, h[..., None], upper=False)
        log_mass = c + half.square().sum((-1, -2)) / 2 - root.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        spread = quantities(s) @ torch.linalg.inv(root).mT  # A b = spread (half + noise)
        return log_mass, spread @ half, spread

    log_mass, centre, spread = conditional(log_s.exp())
    weight = (log_mass + log_s).softmax(0)
    centre = torch.cat([centre[..., 0], log_s.exp()[:, None]], -1)
    within = torch.cat([spread.square().sum(-1), torch.zeros(num, 1, dtype=torch.float64)], -1)
    mean = weight @ centre
    sd = (weight @ (within + (centre - mean).square())).sqrt()

    # log s of the draws: from its distribution function, linear between the points
    steps = torch.cat([weight.new_zeros(1), (weight[1:] + weight[:-1]).cumsum(0) / 2])
    uniform = torch.rand(NUM_DRAWS, dtype=torch.float64, generator=generator)
    drawn = torch.from_numpy(np.interp(uniform.numpy(), (steps / steps[-1]).numpy(), log_s.numpy())).exp()
    _, middle, spread = conditional(drawn)
    noise = torch.randn(NUM_DRAWS, spread.shape[-1], 1, dtype=torch.float64, generator=generator)
    return mean, sd, torch.cat([(middle + spread @ noise)[..., 0], drawn[:, None]], -1)


def _coefficients(num: int) -> tuple[str, ...]:
    return tuple(f"beta[{k}]" for k in range(1, num + 1))


def _half_cauchy(sigma: Tensor) -> Tensor:
    return dist.HalfCauchy(sigma.new_tensor(2.5)).log_prob(sigma)


def _ark() -> _Task:
    generator = torch.Generator().manual_seed(0)
    beta, burn_in = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.2], dtype=torch.float64), 100
    noise = 0.5 * torch.randn(burn_in + 200, dtype=torch.float64, generator=generator)
    series = [noise.new_zeros(())] * 5
    for shock in noise:
        series.append(0.3 + beta @ torch.stack(series[:-6:-1]) + shock)
    lags, y = lagged(torch.stack(series[-200:]), 5)
    x = torch.cat([torch.ones_like(y)[:, None], lags], -1)
    reference = _regression(x, y, _half_cauchy, precision=0.01)
    return ark, (lags, y), ("alpha", *_coefficients(5), "sigma"), reference


def _logearn() -> _Task:
    generator = torch.Generator().manual_seed(0)
    male = (torch.rand(1000, dtype=torch.float64, generator=generator) < 0.4).double()
    height = 64.5 + 5.5 * male + 2.6 * torch.randn(1000, dtype=torch.float64, generator=generator)
    x = interaction(height, male)
    y = x @ x.new_tensor([7.0, 0.03, 0.3, 0.0]) + 0.9 * torch.randn(1000, dtype=x.dtype, generator=generator)
    reference = _regression(x, y, torch.zeros_like)
    return logearn_interaction, (x, y), (*_coefficients(4), "sigma"), reference


def _kidscore() -> _Task:
    generator = torch.Generator().manual_seed(0)
    school = (torch.rand(400, dtype=torch.float64, generator=generator) < 0.8).double()
    iq = 92 + 10 * school + 14 * torch.randn(400, dtype=torch.float64, generator=generator)
    x = interaction(school, iq)
    y = x @ x.new_tensor([-10.0, 50.0, 1.0, -0.5]) + 18 * torch.randn(400, dtype=x.dtype, generator=generator)
    reference = _regression(x, y, _half_cauchy)
    return kidscore_interaction, (x, y), (*_coefficients(4), "sigma"), reference


# --- the mixture ---------------------------------------------------------------------------------------------------

_MIXTURE = ("mu[1]", "mu[2]", "sigma[1]", "sigma[2]", "theta")


def _mixture() -> _Task:
    y, reference = _mixture_mode()
    return low_dim_gauss_mix, (y,), _MIXTURE, reference


def _both_modes() -> _Task:
    y, reference = _mixture_mode()
    return low_dim_gauss_mix_unordered, (y,), _MIXTURE, both_modes(*reference)


@functools.cache
def _mixture_mode() -> tuple[Tensor, _Moments]:
    """1,000 observations, and the mode of the mixture's posterior that they were simulated near."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(1000, dtype=torch.float64, generator=generator) < 0.6
    y = torch.where(first, -2.75, 2.75) + torch.randn(1000, dtype=torch.float64, generator=generator)

    def log_density(phi: Tensor) -> Tensor:
        return torch.cat([_mixture_log_density(part, y) for part in phi.split(500)])

    # Where the components are known, each parameter has a normal law of its own, to order 1 / N.
    parts, share = (y[first], y[~first]), first.double().mean()
    start = torch.stack([*(p.mean() for p in parts), *(p.std().log() for p in parts), share.logit()])
    sizes = torch.tensor([len(p) for p in parts])
    spread = torch.cat([sizes**-0.5, (2 * sizes) ** -0.5, (len(y) * share * (1 - share))[None] ** -0.5]).double()
    mean, covariance = start, spread.square().diag()
    for _ in range(2):  # the rule moves to the mode and takes its shape
        phi, weight = _hermite(log_density, mean, covariance, 3)
        mean = weight @ phi
        covariance = (phi - mean).T @ (weight[:, None] * (phi - mean))
    phi, weight = _hermite(log_density, mean, covariance, 6)
    values = _mixture_quantities(phi)
    centre = weight @ values
    sd = (weight @ (values - centre).square()).sqrt()

    # Draws by rejection from a normal law 1.2 times as wide; its bound is the largest ratio met.
    generator.manual_seed(1)
    noise = torch.randn(4 * NUM_DRAWS, 5, dtype=y.dtype, generator=generator)
    phi = mean + 1.2 * noise @ torch.linalg.cholesky(covariance).T
    ratio = log_density(phi) + noise.square().sum(-1) / 2
    kept = torch.rand(len(phi), dtype=y.dtype, generator=generator).log() < ratio - ratio.max()
    return y, (centre, sd, _mixture_quantities(phi[kept][:NUM_DRAWS]))


def _hermite(
    log_density: Callable[[Tensor], Tensor], mean: Tensor, covariance: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """Points about a normal law, ``num`` an axis, and their weights under a density: ``(m, d)``, ``(m,)``."""
    axis, weight = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(num))
    nodes = torch.cartesian_prod(*[axis] * len(mean))
    log_weight = torch.cartesian_prod(*[weight.log()] * len(mean)).sum(-1)
    points = mean + nodes @ torch.linalg.cholesky(covariance).T
    return points, (log_weight + log_density(points) + nodes.square().sum(-1) / 2).softmax(0)


def _mixture_log_density(phi: Tensor, y: Tensor) -> Tensor:
    """Of phi = (mu1, mu2, log sigma1, log sigma2, logit theta), given y; up to a constant, without the ordering."""
    mu, log_sigma, logit = phi[:, :2], phi[:, 2:4], phi[:, 4:]
    log_share = torch.cat([logsigmoid(logit), logsigmoid(-logit)], -1)
    prior = -(mu.square() + (2 * log_sigma).exp()).sum(-1) / 8 + log_sigma.sum(-1) + 5 * log_share.sum(-1)
    standard = (y[:, None] - mu[:, None]) / log_sigma[:, None].exp()
    return prior + ((log_share - log_sigma)[:, None] - standard.square() / 2).logsumexp(-1).sum(-1)


def _mixture_quantities(phi: Tensor) -> Tensor:
    return torch.cat([phi[:, :2], phi[:, 2:4].exp(), phi[:, 4:].sigmoid()], -1)


_TASKS: dict[str, Callable[[], _Task]] = {
    "eight_schools_noncentered": lambda: _schools(eight_schools_noncentered),
    "eight_schools_centered": lambda: _schools(eight_schools_centered),
    "low_dim_gauss_mix": _mixture,
    "low_dim_gauss_mix_unordered": _both_modes,
    "arK": _ark,
    "logearn_interaction": _logearn,
    "kidscore_interaction": _kidscore,
}
