"""One thing said in many ways: expand, to_event, keywords, dicts, partials, classes, dtypes, names, effects."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import HaarReparam, LocScaleReparam, ProjectedNormalReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam

from tests.infer.zoo.registry import idiom, numbers


@idiom("expand and to_event", lambda: (numbers(4),))
def expanded(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


@idiom("expand_by", lambda: (numbers(4),))
def expanded_by(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand_by([4]).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


@idiom("plate around a vector", lambda: (numbers(3, 0, 2),))
def plate_of_vectors(y):
    with pyro.plate("data", 3):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@idiom("matrix event", lambda: (numbers(2, 0, 3),))
def matrix_event(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=y)


@idiom("undeclared batch of a latent", lambda: (numbers(3),))
def undeclared(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@idiom("keywords and defaults", kwargs=lambda: {"y": numbers(3), "scale": 2.0})
def keywords(*, y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@idiom("dict of data", lambda: ({"x": numbers(3), "y": numbers(3, 1)},))
def dict_of_data(data):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data["y"])):
        pyro.sample("y", dist.Normal(b * data["x"], 1.0), obs=data["y"])


@idiom("partial", made=True)
def a_partial():
    return partial(keywords, y=numbers(3), scale=3.0)


@idiom("lambda", made=True)
def a_lambda():
    return lambda: pyro.sample("x", dist.Normal(1.0, 2.0))


@idiom("conditioned", made=True)
def conditioned():
    def joint():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1.0))

    return pyro.condition(joint, data={"y": numbers(3)})


@idiom("callable object", lambda: (numbers(3),), made=True)
def callable_object():
    class Model:
        def __call__(self, y):
            keywords(y=y)

    return Model()


@idiom("bound method", lambda: (numbers(3),), made=True)
def bound_method():
    class Model:
        scale = 0.5

        def go(self, y):
            keywords(y=y, scale=self.scale)

    return Model().go


@idiom("module with parameters", lambda: (numbers(3),), made=True)
def module_with_parameters():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

        def forward(self, y):
            keywords(y=y, scale=self.scale)

    return Model()


@idiom("pyro.param in a plate", lambda: (numbers(3),))
def param_in_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        scale = pyro.param("scale_of_each", lambda: torch.ones(3), constraint=constraints.positive)
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@idiom("no data at all")
def prior_alone():
    tau = pyro.sample("tau", dist.Gamma(3.0, 1.0))
    pyro.sample("x", dist.Normal(tau, 1.0))


@idiom("returned values", lambda: (numbers(3),))
def returned(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        y = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.deterministic("gap", y - mu[..., None] if mu.dim() else y - mu)
    return {"mu": mu, "gap": (y - mu)}


@idiom("deterministic of everything", lambda: (numbers(3),))
def deterministics(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("squared", mu**2)
    with pyro.plate("data", 3):
        e = pyro.deterministic("e", y - mu)
        pyro.sample("zero", dist.Normal(0.0, 1.0), obs=e)


@idiom("data from a deterministic", lambda: (numbers(3),))
def data_of_latents(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("residual", dist.Normal(0.0, 2.0), obs=y - mu)


@idiom("reparam by a strategy", lambda: (numbers(3),))
@poutine.reparam(config=lambda site: LocScaleReparam(0.0) if site["name"] == "theta" else None)
def by_strategy(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("data", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@idiom("TransformReparam", lambda: (numbers(3),))
@poutine.reparam(config={"x": TransformReparam()})
def transform_reparam(y):
    law = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()])
    x = pyro.sample("x", law)
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(0.0, x), obs=y)


@idiom("projected normal, reparametrised", lambda: (torch.tensor([0.3, 0.4]),))
@poutine.reparam(config={"direction": ProjectedNormalReparam()})
def direction(y):
    d = pyro.sample("direction", dist.ProjectedNormal(torch.zeros(2)))
    pyro.sample("y", dist.Normal(d, 0.5).to_event(1), obs=y)


@idiom("Haar wavelets", lambda: (numbers(4),))
@poutine.reparam(config={"x": HaarReparam(dim=-1)})
def haar(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@idiom("block and lift", lambda: (numbers(3),), made=True)
def lifted():
    def with_param(y):
        mu = pyro.param("lifted_mu", torch.tensor(0.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return poutine.lift(with_param, prior={"lifted_mu": dist.Normal(0.0, 1.0)})


@idiom("names with dots and spaces", lambda: (numbers(3),))
def odd_names(y):
    mu = pyro.sample("a.b c", dist.Normal(0.0, 1.0))
    with pyro.plate("the data", 3):
        pyro.sample("y/1", dist.Normal(mu, 1.0), obs=y)


@idiom("scopes", lambda: (numbers(3),), made=True, route=None)
def scoped():
    from pyro.contrib.autoname import scope

    def part(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)

    def model(y):
        with scope(prefix="left"):
            part(y)
        with scope(prefix="right"):
            part(-y)

    return model


@idiom("latents of two units", lambda: (numbers(3),))
def large_and_small(y):  # latents of very different units
    big = pyro.sample("big", dist.Normal(0.0, 1e5))
    small = pyro.sample("small", dist.Normal(0.0, 1e-5))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(big * 1e-5 + small * 1e5, 1.0), obs=y)


@idiom("float32 within float64", lambda: (numbers(3).float(),))
def single_precision(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float32), 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, torch.ones(3, dtype=torch.float32)), obs=y)


@idiom("integers as data", lambda: (torch.tensor([1, 4, 2]),))
def integer_data(y):
    rate = pyro.sample("rate", dist.Exponential(0.5))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@idiom("numbers as data", lambda: (3.0, 7, 10))
def plain_numbers(y, k, n):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("k", dist.Binomial(n, p), obs=torch.tensor(float(k)))
    pyro.sample("y", dist.Normal(10 * p, 2.0), obs=torch.tensor(y))


@idiom("sum by hand", lambda: (numbers(3),), route=None)
def potential_like(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("y", dist.Normal(mu, 1.0).log_prob(y).sum())


@idiom("python if", lambda: (numbers(3),), route=None)
def python_if(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@idiom("torch.where", lambda: (numbers(3),))
def torch_where(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, torch.where(mu > 0, 1.0, 2.0)), obs=y)


@idiom("float() of the data", lambda: (numbers(3),))
def item_within(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, 1.0 + float(y[0]) ** 2), obs=y)


@idiom("Cauchy of Cauchy", lambda: (numbers(3),))
def cauchy_prior(y):
    mu = pyro.sample("mu", dist.Cauchy(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Cauchy(mu, 1.0), obs=y)
