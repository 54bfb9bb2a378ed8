"""The rows' NumPyro models, the same laws as `pyro_models.py`; recursions by `lax.scan`, as JAX asks for."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.distributions import constraints

from benchmarks.lib import numpyro_nuts

RHO = 0.9
STEP = math.sqrt(1 - RHO**2)


def log_series(x: Array) -> Array:
    return dist.Normal(0.0, 1.0).log_prob(x[0]) + dist.Normal(RHO * x[:-1], STEP).log_prob(x[1:]).sum()


def flat(zero: Array) -> Array:
    return numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), zero.shape))


def autoregression(zero: Array) -> None:
    numpyro.factor("series", log_series(flat(zero)))


def modes(zero: Array) -> None:
    x, place = flat(zero), jnp.zeros_like(zero).at[0].set(5.0)
    low = math.log(0.3) + dist.Normal(-place, 1.0).log_prob(x).sum()
    high = math.log(0.7) + dist.Normal(place, 1.0).log_prob(x).sum()
    numpyro.factor("target", jnp.logaddexp(low, high))


def unlike(zero: Array) -> None:
    x, place = flat(zero), jnp.zeros_like(zero).at[0].set(5.0)
    sds = jnp.geomspace(0.3, 2.0, len(zero))
    low = math.log(0.3) + log_series(x + place)
    high = math.log(0.7) + dist.Normal(place, sds).log_prob(x).sum()
    numpyro.factor("target", jnp.logaddexp(low, high))


def logistic(x: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def hierarchy_centred(y: Array) -> None:
    mu, tau, sigma = population()
    with numpyro.plate("groups", y.shape[1], dim=-1):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        with numpyro.plate("rows", y.shape[0], dim=-2):
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def hierarchy(y: Array) -> None:
    mu, tau, sigma = population()
    with numpyro.plate("groups", y.shape[1], dim=-1):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * z)
        with numpyro.plate("rows", y.shape[0], dim=-2):
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def population() -> tuple[Array, Array, Array]:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    return mu, tau, numpyro.sample("sigma", dist.HalfNormal(2.0))


def slopes(x: Array, y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 2.0).to_event(1))
    scale = numpyro.sample("scale", dist.Exponential(jnp.ones(2)).to_event(1))
    root = numpyro.sample("root", dist.LKJCholesky(2, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.deterministic("rho", root[1, 0])
    with numpyro.plate("groups", y.shape[1], dim=-1):
        effects = numpyro.sample("effects", dist.MultivariateNormal(mu, scale_tril=scale[:, None] * root))
        with numpyro.plate("rows", y.shape[0], dim=-2):
            numpyro.sample("y", dist.Normal(effects[..., 0] + effects[..., 1] * x, sigma), obs=y)


def items(y: Array) -> None:
    people, questions = numpyro.plate("people", y.shape[0], dim=-2), numpyro.plate("items", y.shape[1], dim=-1)
    with questions:
        slope = numpyro.sample("slope", dist.LogNormal(0.0, 0.5))
        difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 2.0))
    with people:
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with people, questions:
        numpyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=y)


def process(x: Array, y: Array) -> None:
    length = numpyro.sample("length", dist.LogNormal(0.5, 0.5))
    amplitude = numpyro.sample("amplitude", dist.HalfNormal(1.0))
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    cov = amplitude**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 1e-6 * jnp.eye(len(x))
    f = numpyro.deterministic("f", level + jnp.linalg.cholesky(cov) @ z)
    with numpyro.plate("places", len(x)):
        numpyro.sample("y", dist.Poisson(jnp.exp(f)), obs=y)


def volatility(y: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(y)), 1.0).to_event(1))
    first = z[0] * sigma / jnp.sqrt(1 - phi**2)

    def step(state: Array, noise: Array) -> tuple[Array, Array]:
        state = phi * state + sigma * noise
        return state, state

    _, states = lax.scan(step, first, z[1:])
    h = numpyro.deterministic("h", mu + jnp.concatenate([first[None], states]))
    with numpyro.plate("days", len(y)):
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y)


def horseshoe(x: Array, y: Array) -> None:
    num, dim = x.shape
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    spread = numpyro.sample("spread", dist.HalfCauchy(1.0))
    local = numpyro.sample("local", dist.HalfCauchy(jnp.ones(dim)).to_event(1))
    slab = numpyro.sample("slab", dist.InverseGamma(2.0, 8.0))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
    tau = spread * sigma * (5 / (dim - 5) / math.sqrt(num))
    shrunk = local * jnp.sqrt(slab / (slab + tau**2 * local**2))
    beta = numpyro.deterministic("beta", z * tau * shrunk)
    with numpyro.plate("rows", num):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def network(x: Array, y: Array, at: Array) -> None:
    first = numpyro.sample("first", dist.Normal(jnp.zeros((3, 20)), 1.0).to_event(2))
    bias = numpyro.sample("bias", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
    last = numpyro.sample("last", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
    numpyro.deterministic("f", jnp.tanh(at @ first + bias) @ last)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ first + bias) @ last, 0.2), obs=y)


def flat_line(x: Array, y: Array) -> None:
    line(x, y, numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ())))


def cauchy_line(x: Array, y: Array) -> None:
    line(x, y, numpyro.sample("sigma", dist.HalfCauchy(2.5)))


def line(x: Array, y: Array, sigma: Array) -> None:
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def normal_line(x: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(x: Array, y: Array) -> None:
    b = numpyro.sample("b", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def garch(y: Array, first: Array) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = numpyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    u = numpyro.sample("u", dist.Uniform(0.0, 1.0))
    beta1 = numpyro.deterministic("beta1", (1 - alpha1) * u)
    numpyro.factor("triangle", jnp.log1p(-alpha1))

    def step(variance: Array, last: Array) -> tuple[Array, Array]:
        variance = alpha0 + alpha1 * (last - mu) ** 2 + beta1 * variance
        return variance, variance

    _, variances = lax.scan(step, first**2, y[:-1])
    scales = jnp.sqrt(jnp.concatenate([first[None] ** 2, variances]))
    numpyro.factor("y", dist.Normal(mu, scales).log_prob(y).sum())


def hmm(y: Array) -> None:
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    moves, seen = jnp.log(jnp.stack([theta1, theta2])), dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(forward: Array, observed: Array) -> tuple[Array, None]:
        return jax.nn.logsumexp(forward[:, None] + moves, 0) + observed, None

    forward, _ = lax.scan(step, seen[0], seen[1:])
    numpyro.factor("y", jax.nn.logsumexp(forward))


def gp_pois(x: Array, k: Array) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    cov = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-10 * jnp.eye(len(x))
    f = numpyro.deterministic("f", jnp.linalg.cholesky(cov) @ z)
    with numpyro.plate("places", len(x)):
        numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        *(autoregression, modes, unlike, logistic, hierarchy_centred, hierarchy, slopes, items, process, volatility),
        *(horseshoe, network, flat_line, cauchy_line, normal_line, diamonds, garch, hmm, gp_pois),
        *(numpyro_nuts.eight_schools_noncentered, numpyro_nuts.eight_schools_centered, numpyro_nuts.ark),
        *(numpyro_nuts.low_dim_gauss_mix, numpyro_nuts.low_dim_gauss_mix_unordered),
    )
}
