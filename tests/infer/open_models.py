"""Pyro models with open observed sites, and the same models with the data held: the oracles of pairs."""

import pyro
import pyro.distributions as dist
import torch


def iid(num=5):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", num):
        pyro.sample("y", dist.Normal(mu, 0.5))


def iid_vector(num=6):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 0.5).expand([num]).to_event(1))


def bounded_and_positive(num=4):
    p = pyro.sample("p", dist.Uniform(-1.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", num):
        pyro.sample("y", dist.Normal(p, scale))


def vectors():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    cov = torch.eye(2) + 0.5
    pyro.sample("y", dist.MultivariateNormal(beta * share[..., None], covariance_matrix=cov))


def joint_rows(num=3):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", num):
        pyro.sample("y", dist.MultivariateNormal(beta, covariance_matrix=torch.eye(2) + 0.5))


def plate_latents(num=3):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("rows", num):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0))


def poisson(x):
    a = pyro.sample("a", dist.Normal(0.5, 0.5))
    b = pyro.sample("b", dist.Normal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson((a + b * x).exp()))


def needs_vmap(x):  # x @ beta is wrong for a batch of betas
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1))


def needs_loop():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0))


def two_sites():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(mu, 0.5))
    pyro.sample("b", dist.Normal(mu, 1.0).expand([2]).to_event(1))


def discrete():
    k = pyro.sample("k", dist.Bernoulli(0.3))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu + k, 1.0))
