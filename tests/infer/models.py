"""Pyro models that exercise every habit the batched log joint must know, each with the route that should serve it."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex

from pyro_sb.infer.model.log_joint import LogJoint, log_joint

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
X = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(7, 3).cos()


class Case(NamedTuple):
    model: Callable
    args: tuple = ()
    kwargs: dict = {}
    route: str = "plate"


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(f64(5.0).squeeze()))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(f64(0.0).squeeze(), 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def beta_bernoulli(y):
    p = pyro.sample("p", dist.Beta(f64(2.0, 3.0), f64(1.0, 1.0)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p).to_event(1), obs=y)


def simplex_and_cholesky(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
    rate = pyro.sample("rate", dist.Gamma(f64(2.0).squeeze(), 1.0))
    chol = pyro.sample("chol", dist.LKJCholesky(3, rate.new_tensor(2.0)))
    pyro.factor("tie", rate * chol[..., 2, 0])
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Multinomial(6, p), obs=counts)


def mixture_vindex(x):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2, dtype=torch.float64)))
    loc = pyro.sample("loc", dist.Normal(f64(0.0, 0.0), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(weight))
        pyro.deterministic("centre", Vindex(loc)[..., which])
        pyro.sample("x", dist.Normal(Vindex(loc)[..., which], 1.0), obs=x)


def mixture_plain(x):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2, dtype=torch.float64)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(f64(0.0).squeeze(), 3.0))
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(weight))
        centre = pyro.deterministic("centre", loc[which])
        pyro.sample("x", dist.Normal(centre, 1.0), obs=x)


def grouped(x, vindex):
    loc = pyro.sample("loc", dist.Normal(f64(-1.0, 0.0, 1.0), 1.0).to_event(1))
    shift = pyro.sample("shift", dist.Categorical(f64(0.7, 0.3)))  # one for all data
    with pyro.plate("data", len(x)):
        high = pyro.sample("high", dist.Categorical(torch.stack([f64(0.8, 0.2), f64(0.2, 0.8)])[shift]))
        which = high + shift
        pyro.sample("x", dist.Normal(Vindex(loc)[..., which] if vindex else loc[which], 1.0), obs=x)


def hmm(x, vindex):
    stay = pyro.sample("stay", dist.Dirichlet(torch.ones(2, 2, dtype=torch.float64)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(f64(-1.0, 1.0), 1.0).to_event(1))
    state = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        row = Vindex(stay)[..., state, :] if vindex else stay[state]
        state = pyro.sample(f"state_{t}", dist.Categorical(row))
        pyro.sample(f"x_{t}", dist.Normal(Vindex(loc)[..., state] if vindex else loc[state], 1.0), obs=x[t])


def regression_right(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def regression_left(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.T, 1.0), obs=y)


def undeclared_batches(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0))
    pyro.sample("y", dist.Normal(beta[..., :1] + beta[..., 1:] * x, 1.0), obs=y)


def improper(y):
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    pyro.factor("cuts_prior", -(cuts**2).sum(-1, keepdim=True))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def masked_and_scaled(y, mask, observed):
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 5.0))
    with pyro.plate("data", len(y)):
        with poutine.mask(mask=mask), poutine.scale(scale=0.3):
            pyro.sample("y", dist.Normal(mu, 10.0), obs=y)
        pyro.sample("fixed", dist.Normal(f64(0.0).squeeze(), 10.0), obs=y)  # no latent, hence no chain dimension
        pyro.sample("again", dist.Normal(mu, 12.0), obs=y, obs_mask=observed)


def nested_plates(y):
    scale = pyro.sample("scale", dist.LogNormal(f64(0.0).squeeze(), 1.0))
    rows = pyro.plate("rows", y.shape[0], dim=-2)
    columns = pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(f64(0.0).squeeze(), scale))
    with columns:
        b = pyro.sample("b", dist.Normal(f64(0.0).squeeze(), 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


@poutine.reparam(config={"theta": LocScaleReparam(0.0)})
def reparametrised(y, sigma):
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(f64(5.0).squeeze()))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def with_param(y):
    scale = pyro.param("scale", f64(2.0).squeeze(), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.fixed = PyroModule[torch.nn.Linear](3, 2).double()
        self.weight = PyroSample(dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    def forward(self, x, y):
        mean = (torch.tanh(self.fixed(x)) * self.weight).sum(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def control_flow(y):
    mu = pyro.sample("mu", dist.Normal(f64(0.0).squeeze(), 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def data_as_keywords(*, y, sigma):
    eight_schools(y, sigma)


def narrow(x):  # finite near x alone: no uniform start finds it
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    pyro.sample("x", dist.Uniform(mu - 0.1, mu + 0.1), obs=x)


def quadratic(params):
    return (params["a"] ** 2).sum() / 2 + (params["b"] - 1.0) ** 2


COUNTS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 6.0, 0.0], [2.0, 2.0, 2.0], [5.0, 1.0, 0.0]], dtype=torch.float64)
BITS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([True, False, True, True, False, True, True, True])
SMALL = Y[:5] / 10

CASES = {
    "eight schools": Case(eight_schools, (Y, SIGMA)),
    "keywords": Case(data_as_keywords, (), {"y": Y, "sigma": SIGMA}),
    "beta-bernoulli": Case(beta_bernoulli, (BITS,)),
    "dirichlet, gamma, lkj, multinomial, factor": Case(simplex_and_cholesky, (COUNTS,)),
    "mixture, Vindex": Case(mixture_vindex, (SMALL,)),
    "mixture, plain index": Case(mixture_plain, (SMALL,), route="vmap"),
    "grouped, Vindex": Case(grouped, (SMALL, True)),
    "grouped, plain index": Case(grouped, (SMALL, False), route="vmap"),
    "hmm, Vindex": Case(hmm, (SMALL, True)),
    "hmm, plain index": Case(hmm, (SMALL, False), route="vmap"),
    "regression, X @ beta": Case(regression_right, (X, Y[:7]), route="vmap"),
    "regression, beta @ X.T": Case(regression_left, (X, Y[:7])),
    "undeclared batches": Case(undeclared_batches, (X[:, 0], Y[:7])),
    "improper, ordered": Case(improper, (Y,)),
    "mask, obs_mask, scale": Case(masked_and_scaled, (Y, MASK, ~MASK)),
    "nested plates": Case(nested_plates, (X,)),
    "reparam": Case(reparametrised, (Y, SIGMA)),
    "param": Case(with_param, (Y,)),
    "PyroModule": Case(Network(), (X, Y[:7])),
    "control flow": Case(control_flow, (Y,), route="loop"),
}


def joint_of(name) -> LogJoint:
    case = CASES[name]
    with warnings.catch_warnings():
        if case.route == "loop":
            warnings.simplefilter("ignore", RuntimeWarning)
        return log_joint(case.model, args=case.args, kwargs=case.kwargs)
