"""Every idiom of the zoo: its log joint is Pyro's, and where a grid knows the answer, so are its draws."""

import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.ops.stats import effective_sample_size

from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from tests.infer.zoo.check import agreement
from tests.infer.zoo.registry import zoo

ZOO = zoo()
# at most two numbers: a grid integrates the log joint, which the first test holds against Pyro's
QUICK = (
    "taxi: few valid starts",
    "mixture, MixtureSameFamily",
    "switchpoint, summed",
    "imputed classes",
    "wishart precision, 1-d",
    "second-order markov",
    "folded normal",
    "survival, Weibull",
)
LONG = (
    "beta",
    "gamma rate",
    "dirichlet",
    "inverse gamma variance",
    "half Cauchy scale",
    "uniform, bounded",
    "affine of a gamma",
    "negative half line",
    "logit-normal by transforms",
    "von Mises",
    "Kumaraswamy",
    "Cauchy of Cauchy",
    "conjugate normal",
    "no data at all",
    "obs_mask, all there",
    "flat and improper",
    "censored by a factor",
    "censored by cdf",
    "truncated normal",
    "survival, Cox",
    "beta regression",
    "robust, Student and Laplace",
    "zero inflation",
    "zero inflation by a latent",
    "occupancy",
    "robust outliers",
    "two discrete sites",
    "one-hot latent, fixed",
    "mixture, Bernoulli times",
    "mixture, logsumexp factor",
    "mixture, ordered locs",
    "mixture, config_enumerate",
    "autoregression",
    "GaussianHMM",
    "linear state space, Kalman by hand",
    "changepoint by markov",
    "SIR, deterministic",
    "growth curve by an ODE",
    "Hawkes process",
    "coalescent by waiting times",
    "gaussian process, by hand",
    "torch.where",
)


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def test_the_zoo_is_large():
    assert len(ZOO) >= 140


PYROS = [name for name, idiom in ZOO.items() if idiom.pyro]


@pytest.mark.parametrize("name, dtype", [(n, torch.float64) for n in PYROS] + [(n, torch.float32) for n in PYROS[::5]])
@pytest.mark.filterwarnings("ignore:Singular sample:UserWarning")  # of Pyro's own run of a Wishart
def test_differences_and_gradients_are_pyros(name, dtype):
    torch.set_default_dtype(dtype)
    idiom = ZOO[name]
    with warnings.catch_warnings():
        if idiom.route is None or idiom.route == "loop":
            warnings.filterwarnings("ignore", "Chains are evaluated one by one", RuntimeWarning)
        found = agreement(idiom)
    assert idiom.route in (None, found.route)
    assert found.values < 1e6 * found.eps and found.gradients < 1e6 * found.eps  # 2e-10 nats in float64


def copying(model):
    """The model with a deterministic copy of every discrete site that is not data."""

    def copied(*args, **kwargs):
        with poutine.trace() as tracer:
            model(*args, **kwargs)
        for name, site in list(tracer.trace.nodes.items()):
            if site["type"] == "sample" and site["fn"].has_enumerate_support and not name.endswith("_observed"):
                value = torch.as_tensor(site["value"])
                pyro.deterministic(f"{name}_copy", value, event_dim=value.dim())

    return copied


KINDS = "mixture", "hmm", "classes", "labels", "group", "latent", "switchpoint, s", "occupancy", "discrete", "markov"
WITH_DISCRETE = [name for name in ZOO if any(kind in name for kind in KINDS)]


@pytest.mark.parametrize("name", WITH_DISCRETE)
@pytest.mark.filterwarnings("ignore:.*Found vars in model but not guide:UserWarning")
def test_one_draw_of_discrete_sites_is_behind_everything(name):
    model, args, kwargs = ZOO[name].build()
    joint = log_joint(copying(model), args=args, kwargs=kwargs)
    z = joint.start(1).expand(20, -1)
    drawn = joint.discrete(z)
    found = joint.deterministic(z, drawn)
    for site, value in drawn.items():
        assert torch.equal(found[f"{site}_copy"].to(value), value)
    again = joint.discrete(z)
    assert drawn.keys() == again.keys() == joint.prototype.enumerated.keys()


def grid(joint: LogJoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Points that hold the mass, and their probabilities: a wide box first, then the part of it that counts."""
    low, high = torch.full((joint.dim,), -40.0), torch.full((joint.dim,), 40.0)
    for num in (401, 201) if joint.dim == 2 else (8001, 4001):
        axes = [torch.linspace(float(a), float(b), num) for a, b in zip(low, high)]
        points = torch.cartesian_prod(*axes).reshape(-1, joint.dim)
        log_density = torch.cat([joint.log_prob(part) for part in points.split(100_000)])
        held = points[log_density > log_density.max() - 25.0]
        step = (high - low) / (num - 1)
        low, high = held.amin(0) - step, held.amax(0) + step
    return points, log_density.softmax(0)


def z_scores(draws: torch.Tensor, points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of means and of mean squares about the exact mean. ``draws``: (chain, draw, dim)."""
    mean = weights @ points
    worst = []
    for power in (1, 2):
        exact, found = weights @ (points - mean) ** power, (draws - mean) ** power
        spread = (weights @ ((points - mean) ** power - exact) ** 2).sqrt()
        ess = effective_sample_size(found).clamp(max=draws.shape[:2].numel())
        worst.append((found.mean((0, 1)) - exact) / (spread / ess.sqrt()))
    return torch.cat(worst)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_draws_are_those_of_the_grid(name):
    model, args, kwargs = ZOO[name].build()
    joint = log_joint(model, args=args, kwargs=kwargs)
    points, weights = grid(joint)
    mcmc = MCMC(KernelLangevin(model), num_samples=100, num_chains=64, disable_progbar=True)
    pyro.set_rng_seed(1)
    mcmc.run(*args, **kwargs)
    sites = mcmc.get_samples(group_by_chain=True)
    draws = joint.pack({k: joint.transforms[k](sites[k]) for k in joint.site_shapes})
    assert z_scores(draws, points, weights).abs().max() < 4.5
