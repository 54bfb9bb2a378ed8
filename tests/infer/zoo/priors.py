"""Supports and priors: simplex, Cholesky, bounded, ordered, positive, circular, heavy-tailed, matrices, improper."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms

from tests.infer.zoo.registry import idiom, numbers

ONES = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


@idiom("beta", lambda: (torch.tensor(ONES),))
def beta(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


@idiom("gamma rate", lambda: (torch.tensor([3.0, 1.0, 4.0]),))
def gamma_rate(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@idiom("dirichlet", lambda: (torch.tensor([0, 1, 2, 2, 2, 1]),))
def dirichlet(y):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


@idiom("simplexes in a plate", lambda: (torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]),))
def simplexes(counts):
    with pyro.plate("rows", 2):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("counts", dist.Multinomial(4, p, validate_args=False), obs=counts)


@idiom("inverse gamma variance", lambda: (numbers(5),))
def inverse_gamma(y):
    var = pyro.sample("var", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, var.sqrt()), obs=y)


@idiom("LKJ correlation", lambda: (numbers(6, 0, 3),))
def lkj(y):
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    chol = pyro.sample("chol", dist.LKJCholesky(3, torch.tensor(2.0)))
    with pyro.plate("data", len(y)):
        tril = (scale[..., None] * chol).unsqueeze(-3)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=y)


@idiom("wishart precision", lambda: (numbers(5, 0, 2),), ours=True)
def wishart(y):
    tau = pyro.sample("tau", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=tau.unsqueeze(-3)), obs=y)


@idiom("wishart precision, 1-d", lambda: (numbers(5, 0, 1),), ours=True)
def wishart_of_one(y):
    tau = pyro.sample("tau", dist.Wishart(torch.tensor(3.0), torch.eye(1)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(1), precision_matrix=tau.unsqueeze(-3)), obs=y)


@idiom("flat Cholesky factor", lambda: (numbers(5, 0, 2),), ours=True)
def flat_cholesky(y):
    tril = pyro.sample("tril", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)))
    pyro.factor("prior", -tril.square().sum((-2, -1)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril.unsqueeze(-3)), obs=y)


@idiom("von Mises", lambda: (torch.tensor([0.3, -0.2, 0.9]),))
def von_mises(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.VonMises(mu, kappa), obs=y)


@idiom("uniform, bounded", lambda: (torch.tensor([0.4, 1.1]),))
def uniform(y):
    x = pyro.sample("x", dist.Uniform(-1.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@idiom("bounds by entry", lambda: (numbers(3),))
def bounds_by_entry(y):
    with pyro.plate("data", 3):
        x = pyro.sample("x", dist.Uniform(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.0, 3.0, 5.0])))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@idiom("half Cauchy scale", lambda: (numbers(4),))
def half_cauchy(y):
    scale = pyro.sample("scale", dist.HalfCauchy(2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


@idiom("multivariate normal", lambda: (numbers(3, 0, 2),))
def multivariate(y):
    mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(mu.unsqueeze(-2), torch.eye(2)), obs=y)


@idiom("Pareto and Weibull", lambda: (torch.tensor([1.5, 2.5]),))
def pareto(y):
    alpha = pyro.sample("alpha", dist.Weibull(2.0, 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Pareto(1.0, alpha), obs=y)


@idiom("chi-squared and Student", lambda: (numbers(4),))
def chi2(y):
    w = pyro.sample("w", dist.Chi2(3.0))
    t = pyro.sample("t", dist.StudentT(5.0, 0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(t, (1 / w).sqrt()), obs=y)


@idiom("Kumaraswamy", lambda: (torch.tensor(ONES),))
def kumaraswamy(y):
    p = pyro.sample("p", dist.Kumaraswamy(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Geometric(p), obs=y)


@idiom("logit-normal by transforms", lambda: (torch.tensor(ONES),))
def logit_normal(y):
    law = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.SigmoidTransform()])
    p = pyro.sample("p", law)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


@idiom("affine of a gamma", lambda: (torch.tensor([2.5, 3.0]),))
def affine_gamma(y):
    law = dist.TransformedDistribution(dist.Gamma(2.0, 1.0), [transforms.AffineTransform(1.0, 2.0)])
    x = pyro.sample("x", law)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@idiom("flat and improper", lambda: (numbers(4),))
def flat(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@idiom("flat by a mask", lambda: (numbers(4),))
def flat_by_mask(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@idiom("unit and delta", lambda: (numbers(4),))
def delta(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("copy", dist.Delta(mu), obs=mu)
    pyro.sample("fixed", dist.Delta(torch.tensor(2.0)), obs=torch.tensor(2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.sample("unit", dist.Unit(-mu.abs()), obs=mu.new_empty(mu.shape + (0,)))


@idiom("stick breaking", lambda: (numbers(5),))
def stick_breaking(y):
    with pyro.plate("sticks", 3):
        v = pyro.sample("v", dist.Beta(1.0, 2.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    ones = torch.ones(v.shape[:-1] + (1,))
    share = torch.cat([v, ones], -1) * torch.cat([ones, (1 - v).cumprod(-1)], -1)
    locs = torch.cat([loc, torch.zeros_like(ones)], -1)
    with pyro.plate("data", len(y)):
        parts = dist.Normal(locs.unsqueeze(-2), 1.0)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(share.unsqueeze(-2)), parts), obs=y)


@idiom("Gompertz by a factor", lambda: (torch.tensor([0.4, 1.0]),))
def gompertz(y):
    b = pyro.sample("b", dist.Gamma(2.0, 2.0))
    pyro.factor("y", (b.log() * 2 + (b[..., None] * y - (b[..., None] * y).exp() + 1).sum(-1)))


@idiom("negative half line", lambda: (numbers(3),))
def less_than(y):
    x = pyro.sample("x", dist.TransformedDistribution(dist.Exponential(1.0), [transforms.AffineTransform(0.0, -1.0)]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@idiom("correlation by corr_cholesky", lambda: (numbers(2),))
def improper_corr(y):
    chol = pyro.sample("chol", dist.ImproperUniform(constraints.corr_cholesky, (), (2, 2)))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=chol + 0.1 * torch.eye(2)), obs=y)


@idiom("soft and asymmetric Laplace", lambda: (numbers(3),))
def soft_laplace(y):
    x = pyro.sample("x", dist.SoftLaplace(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.AsymmetricLaplace(x, 1.0, 0.5), obs=y)
