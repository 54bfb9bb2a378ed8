"""Mixtures in every spelling, and other sums over what was not seen."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

from tests.infer.zoo.registry import idiom, numbers


def two_heaps():
    return (torch.cat([numbers(4) * 0.5 - 2, numbers(3, 1) * 0.5 + 2]),)


@idiom("mixture, MixtureSameFamily", two_heaps)
def same_family(y):
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        weights = dist.Categorical(torch.stack([w, 1 - w], -1))
        parts = dist.Normal(torch.stack([-m, m], -1), 1.0)
        pyro.sample("y", dist.MixtureSameFamily(weights, parts), obs=y)


@idiom("mixture, Bernoulli times", two_heaps)
def bernoulli_times(y):
    m = pyro.sample("m", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.deterministic("side", z)
        pyro.sample("y", dist.Normal((2 * z - 1) * m, 1.0), obs=y)


@idiom("mixture, logsumexp factor", two_heaps)
def by_factor(y):
    m = pyro.sample("m", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        low, high = dist.Normal(-m, 1.0).log_prob(y), dist.Normal(m, 1.0).log_prob(y)
        pyro.factor("y", torch.logaddexp(low, high) - 0.6931471805599453)


@idiom("mixture, ordered locs", two_heaps)
def ordered_mixture(y):
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    locs = pyro.sample("locs", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(Vindex(locs)[..., z], 1.0), obs=y)


@idiom("mixture, config_enumerate", two_heaps)
@config_enumerate
def decorated(y):
    m = pyro.sample("m", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(torch.where(z == 0, -m, m), 1.0), obs=y)


@idiom("mixture of vectors", lambda: (torch.cat([numbers(3, 0, 2) - 2, numbers(3, 1, 2) + 2]),), route=None)
def vector_mixture(y):
    with pyro.plate("parts", 2):
        loc = pyro.sample("loc", dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2)))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.MultivariateNormal(loc[z], torch.eye(2)), obs=y)


@idiom("zero inflation", lambda: (torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0, 2.0]),))
def zero_inflated(y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


@idiom("zero inflation by a latent", lambda: (torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0, 2.0]),))
def zero_inflated_by_latent(y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        on = pyro.sample("on", dist.Bernoulli(1 - gate))
        pyro.sample("y", dist.Poisson(rate * on + 1e-8), obs=y)


@idiom("occupancy", lambda: (torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),))
def occupancy(seen):
    psi = pyro.sample("psi", dist.Beta(1.0, 1.0))
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("sites", 4, dim=-2):
        there = pyro.sample("there", dist.Bernoulli(psi))
        with pyro.plate("visits", 3, dim=-1):
            pyro.sample("seen", dist.Bernoulli(p * there), obs=seen)


@idiom("switchpoint, summed", lambda: (torch.tensor([4.0, 5.0, 4.0, 1.0, 0.0, 1.0]),))
def switchpoint(y):
    early = pyro.sample("early", dist.Exponential(0.5))
    late = pyro.sample("late", dist.Exponential(0.5))
    switch = pyro.sample("switch", dist.Categorical(torch.ones(6)))
    rate = torch.where(torch.arange(6) < switch[..., None], early[..., None], late[..., None])
    pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


@idiom("switchpoint, continuous", lambda: (torch.tensor([4.0, 5.0, 4.0, 1.0, 0.0, 1.0]),))
def continuous_switchpoint(y):
    early, late = pyro.sample("early", dist.Exponential(0.5)), pyro.sample("late", dist.Exponential(0.5))
    when = pyro.sample("when", dist.Uniform(0.0, 6.0))
    with pyro.plate("data", 6):
        share = torch.sigmoid(4 * (torch.arange(6) + 0.5 - when))
        pyro.sample("y", dist.Poisson(early + share * (late - early)), obs=y)


@idiom("annotators", lambda: (torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 1]]),), route=None)
def dawid_skene(labels):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("annotators", 3, dim=-1):
        with pyro.plate("classes", 2, dim=-2):
            confusion = pyro.sample("confusion", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("items", 4, dim=-2):
        z = pyro.sample("z", dist.Categorical(share))
        with pyro.plate("votes", 3, dim=-1):
            pyro.sample("labels", dist.Categorical(Vindex(confusion)[..., z, torch.arange(3), :]), obs=labels)


@idiom("robust outliers", lambda: (torch.tensor([0.1, -0.2, 0.3, 9.0, 0.0]),))
def robust_outliers(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    bad = pyro.sample("bad", dist.Beta(1.0, 5.0))
    with pyro.plate("data", len(y)):
        is_bad = pyro.sample("is_bad", dist.Bernoulli(bad))
        pyro.sample("y", dist.Normal(mu, 0.5 + 8.0 * is_bad), obs=y)


@idiom("two discrete sites", lambda: (numbers(4),))
def two_discrete(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    shift = pyro.sample("shift", dist.Bernoulli(0.3))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * shift))
        pyro.deterministic("both", z + 10 * shift)
        pyro.sample("y", dist.Normal(m + z + 2 * shift, 1.0), obs=y)


@idiom("binomial latent", lambda: (torch.tensor([2.0, 3.0, 1.0]),))
def binomial_latent(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        n = pyro.sample("n", dist.Binomial(4, 0.7))
        pyro.sample("y", dist.Normal(n * p, 0.5), obs=y)


@idiom("one-hot latent", lambda: (torch.tensor([2.0, 3.0, 1.0]),), route=None)
def one_hot_latent(y):
    m = pyro.sample("m", dist.Normal(torch.arange(3.0), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
        pyro.sample("y", dist.Normal((z * m[..., None, :]).sum(-1), 0.5), obs=y)


@idiom("one-hot latent, fixed", lambda: (torch.tensor([2.0, 0.2, 1.0]),))
def one_hot_of_known(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(m + (z * torch.arange(3.0)).sum(-1), 0.5), obs=y)


@idiom("mixture with missing data", lambda: (numbers(5), torch.tensor([True, False, True, True, False])))
def mixture_with_gaps(y, seen):
    m = pyro.sample("m", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal((2 * z - 1) * m, 1.0), obs=y, obs_mask=seen)


@idiom("hmm with missing data", lambda: (numbers(4), torch.tensor([True, False, True, True])), route=None)
def hmm_with_gaps(y, seen):
    m = pyro.sample("m", dist.Normal(1.0, 1.0))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample(f"y_{t}", dist.Normal(m * z, 1.0), obs=y[t], obs_mask=seen[t])


@idiom("hmm, missing classes", lambda: (torch.tensor([1.0, 0.0, 1.0]), torch.arange(3) != 1), route=None)
def hmm_with_missing_classes(y, seen):
    p = pyro.sample("p", dist.Beta(2.0, 1.0))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample(f"y_{t}", dist.Bernoulli(0.1 + 0.8 * p * z), obs=y[t], obs_mask=seen[t])


@idiom("labels partly seen", lambda: (numbers(5), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]), torch.arange(5) < 2))
def semi_supervised(y, label, seen):
    m = pyro.sample("m", dist.Normal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3), obs=label, obs_mask=seen)
        pyro.sample("y", dist.Normal((2 * z - 1) * m, 1.0), obs=y)
