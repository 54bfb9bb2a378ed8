"""Plates: nested, crossed, in sequence, subsampled to themselves, with missing data."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from tests.infer.zoo.registry import idiom, numbers


@idiom("conjugate normal", lambda: (numbers(6),))
def conjugate_normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@idiom("schools, centred", lambda: (3 * numbers(5), numbers(5, 1).abs() + 1))
def schools_centred(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@idiom("schools, LocScaleReparam()", lambda: (3 * numbers(5),))
def schools_learnt_centring(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with poutine.reparam(config={"theta": LocScaleReparam(0.5)}), pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@idiom("crossed plates", lambda: (numbers(3, 0, 4),))
def crossed(y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, tau))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.StudentT(4.0, a + b, 1.0), obs=y)


@idiom("nested plates, three deep", lambda: (numbers(2, 0, 3, 4),))
def three_deep(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("classes", 4, dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("schools", 3, dim=-2):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            with pyro.plate("years", 2, dim=-3):
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)


@idiom("sequential plate", lambda: (numbers(4),), route=None)
def sequential_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(y)):
        theta = pyro.sample(f"theta_{i}", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(theta, 0.5), obs=y[i])


@idiom("group index", lambda: (numbers(9), torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 1])), route=None)
def group_index(y, group):
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)


@idiom("group index from the right", lambda: (numbers(9), torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 1])))
def group_index_right(y, group):
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[..., group], 1.0), obs=y)


@idiom("centre over a plate", lambda: (numbers(8),), route=None)
def centre_over_plate(y):
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
    pyro.sample("centre", dist.Normal(a.mean(), 0.5), obs=torch.tensor(0.0))
    with pyro.plate("data", 8):
        pyro.sample("y", dist.Normal(a[..., torch.arange(8) % 4], 1.0), obs=y)


@idiom("plate_stack", lambda: (numbers(2, 0, 3),))
def plate_stack(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate_stack("plates", (2, 3)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@idiom("plate of one", lambda: (numbers(1),))
def plate_of_one(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@idiom("subsample of the whole", lambda: (numbers(5),))
def subsample_whole(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample=torch.arange(5)) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


@idiom("pyro.subsample", lambda: (numbers(5),))
def pyro_subsample(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=pyro.subsample(y, event_dim=0))


@idiom("masked by poutine", lambda: (numbers(5), torch.tensor([True, True, False, True, False])))
def masked_by_poutine(y, there):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=there):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@idiom("masked distribution", lambda: (numbers(5), torch.tensor([True, True, False, True, False])))
def masked_distribution(y, there):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(there), obs=y)


@idiom("scaled by poutine", lambda: (numbers(5), numbers(5, 1).abs()))
def weighted_likelihood(y, weights):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.scale(scale=weights):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@idiom(
    "imputation",
    lambda: (torch.tensor([1.2, 0.4, 2.0, torch.nan, torch.nan, 0.9]), torch.tensor([1, 1, 1, 0, 0, 1]).bool()),
)
def imputation(y, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)


@idiom("imputed covariate", lambda: (numbers(6), numbers(6, 1), torch.tensor([True, True, False, True, False, True])))
def imputed_covariate(x, y, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


@idiom("imputed positive", lambda: (numbers(4).exp(), torch.tensor([True, False, True, False])))
def imputed_positive(y, seen):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Gamma(2.0, rate), obs=torch.where(seen, y, 0.0), obs_mask=seen)


@idiom("imputed vectors", lambda: (numbers(4, 0, 2), torch.tensor([True, False, True, True])))
def imputed_vectors(y, seen):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(loc, torch.eye(2) + 0.5), obs=y, obs_mask=seen)


@idiom("imputed shares", lambda: (numbers(4, 0, 3).softmax(-1), torch.tensor([True, False, True, True])))
def imputed_shares(y, seen):
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Dirichlet(a[..., None] * torch.ones(3)), obs=y, obs_mask=seen)


@idiom(
    "imputed classes", lambda: (torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([True, False, True, True, False]))
)
def imputed_classes(y, seen):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        y = pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=seen)
        pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor([0.9, 1.4, 0.3, 1.1, -0.5]))


@idiom("obs_mask, all there", lambda: (numbers(4),), pyro=False)
def nothing_missing(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(mu.exp()), obs=y.abs().round(), obs_mask=torch.ones(4, dtype=torch.bool))


@idiom("obs_mask, all missing", lambda: (numbers(4),))
def everything_missing(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=torch.zeros(4, dtype=torch.bool))
