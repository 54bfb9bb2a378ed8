import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_median

from pyro_sb.infer.model.log_joint import log_joint
from tests.infer.models import Y, narrow, quadratic


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


# ---- refusals, in our words ----


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def poisson_latent():
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    pyro.sample("count", dist.Poisson(rate))


def sequential_site():
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("coin", dist.Bernoulli(p), infer={"enumerate": "sequential"})


def bernoulli_vector():
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("coins", dist.Bernoulli(p).expand([3]).to_event(1))


def a_potential(z):
    return 0.5 * z["a"].square().sum()


def no_latents(y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def discrete_alone():
    pyro.sample("coin", dist.Bernoulli(0.5))


def no_bijection():
    pyro.sample("x", dist.ProjectedNormal(torch.zeros(2)))


def moving_support():
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Uniform(0.0, top))


def nan_data(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def sites_come_and_go():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    if mu > 0:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def random_density():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("noise", torch.randn(()) * mu)


NAN = torch.tensor([1.0, torch.nan, 2.0])
INF = torch.tensor([1.0, torch.inf])


@pytest.mark.parametrize(
    "model, args, error, message",
    [
        (subsampled, (Y,), NotImplementedError, "Plate 'data' must hold all its data, got subsample_size 2 of 8"),
        (poisson_latent, (), NotImplementedError, "Discrete site 'count' must have a finite support.*got Poisson"),
        (sequential_site, (), NotImplementedError, "'coin' must be enumerated exactly and in parallel.*'sequential'"),
        (bernoulli_vector, (), NotImplementedError, "'coins' must be enumerable, got a vector.*in a plate"),
        (no_latents, (Y,), ValueError, "continuous latent site, got none. Leave out obs="),
        (a_potential, ({"a": Y},), ValueError, "got none. It has no pyro.sample at all.*potential_fn="),
        (discrete_alone, (), ValueError, r"continuous latent site, got only discrete ones, \['coin'\]"),
        (
            no_bijection,
            (),
            NotImplementedError,
            "Site 'x' must have a support with a bijection.*ProjectedNormal on Sphere",
        ),
        (moving_support, (), NotImplementedError, "Site 'x' must have a fixed support.*low \\+ \\(high - low\\) \\* u"),
        (nan_data, (NAN,), ValueError, "Observed site 'y' must not hold NaN, got 1 in 3 values"),
        (nan_data, (INF,), ValueError, "finite at some start, got none.*observed site 'y' .log density -inf"),
        (narrow, (torch.tensor(5000.0),), ValueError, "observed site 'x'.*pass init_strategy or initial_params"),
        (sites_come_and_go, (), ValueError, "same latent sites at every run, got .*extra"),
        (random_density, (), ValueError, "log joint must be the same at every run"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(model, args, error, message):
    for seed in range(3):
        pyro.set_rng_seed(seed)
        with pytest.raises(error, match=message):
            log_joint(model, args=args)


def test_mixtures_have_the_support_of_their_components():
    parts = dist.LogNormal(torch.zeros(2), torch.tensor([1.0, 2.0]))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    joint = log_joint(lambda: pyro.sample("x", mixture))
    z = torch.linspace(-2, 2, 5)
    torch.testing.assert_close(joint.log_prob(z[:, None]), mixture.log_prob(z.exp()) + z)


def angle():
    pyro.sample("x", dist.ImproperUniform(UnknownInterval(), (), ()))


class UnknownInterval(constraints.Constraint):
    """A support that torch has never heard of."""

    def check(self, value):
        return value > 0


def test_a_support_without_a_bijection_needs_the_users_transform():
    with pytest.raises(NotImplementedError, match="Site 'x' must have a support with a bijection"):
        log_joint(angle)


def a_vector(params):
    return params["a"]


def infinite(params):
    return params["a"] * torch.inf


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({}, ValueError, "Exactly one of model and potential_fn must be given, got neither"),
        ({"model": no_latents, "potential_fn": quadratic}, ValueError, "got both"),
        ({"potential_fn": quadratic}, ValueError, "potential_fn needs initial_params"),
        ({"potential_fn": quadratic, "init_strategy": init_to_median}, ValueError, "init_strategy.*need a model"),
        ({"potential_fn": a_vector, "initial_params": {"a": torch.ones(2)}}, ValueError, "must return one number"),
        (
            {"potential_fn": infinite, "initial_params": {"a": torch.ones(())}},
            ValueError,
            "must be finite at some start",
        ),
        ({"model": no_latents, "jit_compile": True}, NotImplementedError, "jit_compile must be False"),
    ],
)
def test_bad_arguments_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        log_joint(**given)
