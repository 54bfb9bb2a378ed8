"""The rows' Pyro models, as a user spells them for one chain; NumPyro's beside them: `numpyro_models.py`."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_sb.datasets import posteriors

RHO = 0.9
STEP = math.sqrt(1 - RHO**2)


def log_series(x: Tensor) -> Tensor:
    """Log density of a stationary AR(1) of sds 1."""
    return dist.Normal(0.0, 1.0).log_prob(x[..., 0]) + dist.Normal(RHO * x[..., :-1], STEP).log_prob(x[..., 1:]).sum(-1)


def flat(zero: Tensor) -> Tensor:
    """A vector without a prior."""
    return pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), zero.shape))


def autoregression(zero: Tensor) -> None:
    pyro.factor("series", log_series(flat(zero)))


def modes(zero: Tensor) -> None:
    x, place = flat(zero), torch.zeros_like(zero)
    place[0] = 5.0
    low = math.log(0.3) + dist.Normal(-place, 1.0).log_prob(x).sum(-1)
    high = math.log(0.7) + dist.Normal(place, 1.0).log_prob(x).sum(-1)
    pyro.factor("target", torch.logaddexp(low, high))


def unlike(zero: Tensor) -> None:
    x, place = flat(zero), torch.zeros_like(zero)
    place[0] = 5.0
    sds = torch.logspace(math.log10(0.3), math.log10(2.0), len(zero))
    low = math.log(0.3) + log_series(x + place)
    high = math.log(0.7) + dist.Normal(place, sds).log_prob(x).sum(-1)
    pyro.factor("target", torch.logaddexp(low, high))


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def hierarchy_centred(y: Tensor) -> None:
    mu, tau, sigma = population()
    with pyro.plate("groups", y.shape[1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("rows", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def hierarchy(y: Tensor) -> None:
    mu, tau, sigma = population()
    with pyro.plate("groups", y.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z, event_dim=0)
        with pyro.plate("rows", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def population() -> tuple[Tensor, Tensor, Tensor]:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    return mu, tau, pyro.sample("sigma", dist.HalfNormal(2.0))


def slopes(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.Exponential(torch.ones(2)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, torch.tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    pyro.deterministic("rho", root[..., 1, 0])
    with pyro.plate("groups", y.shape[1], dim=-1):
        effects = pyro.sample("effects", dist.MultivariateNormal(mu, scale_tril=scale[..., None] * root))
        with pyro.plate("rows", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(effects[..., 0] + effects[..., 1] * x, sigma), obs=y)


def items(y: Tensor) -> None:
    people, questions = pyro.plate("people", y.shape[0], dim=-2), pyro.plate("items", y.shape[1], dim=-1)
    with questions:
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
    with people:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with people, questions:
        pyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=y)


def process(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.5, 0.5))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    cov = amplitude**2 * torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 1e-6 * torch.eye(len(x))
    f = pyro.deterministic("f", level + torch.linalg.cholesky(cov) @ z)
    with pyro.plate("places", len(x)):
        pyro.sample("y", dist.Poisson(f.exp()), obs=y)


def volatility(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    states = [z[..., 0] * sigma / (1 - phi**2).sqrt()]
    for t in range(1, len(y)):
        states.append(phi * states[-1] + sigma * z[..., t])
    h = pyro.deterministic("h", torch.stack([mu + state for state in states], -1))
    with pyro.plate("days", len(y)):
        pyro.sample("y", dist.Normal(0.0, (h / 2).exp()), obs=y)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """Piironen and Vehtari (2017): five covariates expected, a slab of scale 2."""
    num, dim = x.shape
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    spread = pyro.sample("spread", dist.HalfCauchy(1.0))
    local = pyro.sample("local", dist.HalfCauchy(torch.ones(dim)).to_event(1))
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 8.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    tau = spread * sigma * (5 / (dim - 5) / math.sqrt(num))
    shrunk = local * (slab / (slab + tau**2 * local**2)).sqrt()
    beta = pyro.deterministic("beta", z * tau * shrunk)
    with pyro.plate("rows", num):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def network(x: Tensor, y: Tensor, at: Tensor) -> None:
    """3 covariates, 20 tanh units: 100 weights. They have symmetries, so its values at further points are looked at."""
    first = pyro.sample("first", dist.Normal(torch.zeros(3, 20), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    last = pyro.sample("last", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    pyro.deterministic("f", torch.tanh(at @ first + bias) @ last)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ first + bias) @ last, 0.2), obs=y)


# posteriordb's further ones


def flat_line(x: Tensor, y: Tensor) -> None:
    line(x, y, pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ())))


def cauchy_line(x: Tensor, y: Tensor) -> None:
    line(x, y, pyro.sample("sigma", dist.HalfCauchy(2.5)))


def line(x: Tensor, y: Tensor, sigma: Tensor) -> None:
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def normal_line(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def garch(y: Tensor, first: Tensor) -> None:
    """alpha1 and beta1 flat on the triangle: beta1 = (1 - alpha1) u, whose Jacobian is 1 - alpha1."""
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    u = pyro.sample("u", dist.Uniform(0.0, 1.0))
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * u)
    pyro.factor("triangle", torch.log1p(-alpha1))
    variance = first**2 + 0 * mu
    scales = [variance.sqrt()]
    for t in range(1, len(y)):
        variance = alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variance
        scales.append(variance.sqrt())
    pyro.factor("y", dist.Normal(mu[..., None], torch.stack(scales, -1)).log_prob(y).sum(-1))


def hmm(y: Tensor) -> None:
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    moves = torch.stack([theta1, theta2], -2).log()
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), moves, dist.Normal(mu[..., None, :], 1.0), len(y)), obs=y)


def gp_pois(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    cov = alpha**2 * torch.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-10 * torch.eye(len(x))
    f = pyro.deterministic("f", torch.linalg.cholesky(cov) @ z)
    with pyro.plate("places", len(x)):
        pyro.sample("k", dist.Poisson(f.exp()), obs=k)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        *(autoregression, modes, unlike, logistic, hierarchy_centred, hierarchy, slopes, items, process, volatility),
        *(horseshoe, network, flat_line, cauchy_line, normal_line, diamonds, garch, hmm, gp_pois),
        *(posteriors.eight_schools_noncentered, posteriors.eight_schools_centered, posteriors.ark),
        *(posteriors.low_dim_gauss_mix, posteriors.low_dim_gauss_mix_unordered),
    )
}
