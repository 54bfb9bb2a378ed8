"""Regressions of all likelihoods, censored and truncated data, item response, survival, networks, processes."""

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample

from tests.infer.zoo.registry import idiom, numbers


def table(n=7, d=2):
    x = numbers(n, 0, d)
    return x, x.sum(-1) + 0.3 * numbers(n, 1)


@idiom("linear, PyroModule", lambda: (numbers(6, 0, 2), numbers(6, 1)), made=True, route=None)
def linear_module():
    class Linear(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
            return mean

    return Linear()


@idiom("bayesian network of layers", lambda: (numbers(6, 0, 2), numbers(6, 1)), made=True, route=None)
def neural_network():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.first, self.second = PyroModule[torch.nn.Linear](2, 3), PyroModule[torch.nn.Linear](3, 1)
            for layer in (self.first, self.second):
                layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
                layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))
            self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x, y):
            mean = self.second(torch.tanh(self.first(x))).squeeze(-1)
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mean, self.noise), obs=y)

    return Net()


@idiom("logistic", lambda: (numbers(6, 0, 2), (numbers(6, 1) > 0).to(torch.get_default_dtype())))
def logistic(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a[..., None] + b @ x.T), obs=y)


@idiom("negative binomial", lambda: (numbers(6), torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 0.0])))
def negative_binomial(x, y):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Exponential(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.GammaPoisson(k, k / (a + b * x).exp()), obs=y)


@idiom("softmax", lambda: (numbers(6, 0, 2), torch.tensor([0, 1, 2, 1, 0, 2])), route=None)
def softmax(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


@idiom("ordinal", lambda: (numbers(6), torch.tensor([0, 1, 2, 1, 0, 2])))
def ordinal(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    base = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


@idiom("robust, Student and Laplace", lambda: (numbers(6), numbers(6, 1)))
def robust(x, y):
    a = pyro.sample("a", dist.Laplace(0.0, 1.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(nu, a * x, 1.0), obs=y)


@idiom("beta regression", lambda: (numbers(5), torch.sigmoid(numbers(5, 1))))
def beta_regression(x, y):
    b, phi = pyro.sample("b", dist.Normal(0.0, 1.0)), pyro.sample("phi", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(y)):
        mean = torch.sigmoid(b * x)
        pyro.sample("y", dist.Beta(mean * phi, (1 - mean) * phi), obs=y)


@idiom("heteroskedastic", lambda: (numbers(6), numbers(6, 1)))
def heteroskedastic(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b[..., :1] * x, (b[..., 1:] * x).exp()), obs=y)


@idiom("horseshoe", lambda: table(7, 4))
def horseshoe(x, y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("coefficients", 4):
        lam = pyro.sample("lam", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    beta = pyro.deterministic("beta", tau * lam * z)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.T, 1.0), obs=y)


@idiom("censored by a factor", lambda: (torch.tensor([0.5, 1.2, 2.0]), torch.tensor([2.5, 3.0])))
def censored_factor(seen, beyond):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("seen", 3):
        pyro.sample("y", dist.Exponential(rate), obs=seen)
    pyro.factor("beyond", -rate * beyond.sum())


@idiom("censored by cdf", lambda: (torch.tensor([0.5, 1.2, 2.0, 2.0]), torch.tensor([False, False, True, True])))
def censored_cdf(y, censored):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("data", 4):
        law = dist.Normal(mu, 1.0)
        pyro.factor("y", torch.where(censored, torch.log1p(-law.cdf(y)), law.log_prob(y)))


@idiom("censored by a latent", lambda: (torch.tensor([0.5, 1.2]), 2))
def censored_latent(y, num):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("seen", 2):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    with pyro.plate("beyond", num):
        more = pyro.sample("more", dist.Exponential(1.0).mask(False))
        pyro.factor("tail", dist.Normal(mu, 1.0).log_prob(2.0 + more))


@idiom("truncated normal", lambda: (torch.tensor([0.3, 0.9, 1.7]),))
def truncated(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        law = dist.Normal(mu, 1.0)
        pyro.factor("y", law.log_prob(y) - torch.log1p(-law.cdf(torch.tensor(0.0))))


@idiom("folded normal", lambda: (torch.tensor([0.3, 0.9, 1.7]),))
def folded(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.FoldedDistribution(dist.Normal(mu, 1.0)), obs=y)


@idiom("taxi: few valid starts", lambda: (torch.tensor([3.0, 7.0, 5.5]),))
def taxi(y):
    top = pyro.sample("top", dist.LogNormal(2.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Uniform(torch.zeros_like(top), top), obs=y)


@idiom("survival, Weibull", lambda: (torch.tensor([0.5, 1.2, 2.0, 0.7]), torch.tensor([1.0, 1.0, 0.0, 1.0])))
def weibull_survival(t, died):
    shape, scale = pyro.sample("shape", dist.LogNormal(0.0, 0.5)), pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("people", 4):
        hazard = (t / scale) ** shape
        pyro.factor("t", died * (shape.log() - scale.log() + (shape - 1) * (t / scale).log()) - hazard)


@idiom("survival, Cox", lambda: (numbers(5), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])))
def cox(x, died):  # rows sorted by time, the last first
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    risk = b[..., None] * x
    pyro.factor("partial", (died * (risk - risk.logcumsumexp(-1))).sum(-1))


@idiom("item response, 2PL", lambda: ((numbers(4, 0, 3) > 0).to(torch.get_default_dtype()),))
def item_response(answers):
    with pyro.plate("items", 3, dim=-1):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    with pyro.plate("people", 4, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("people ", 4, dim=-2), pyro.plate("items ", 3, dim=-1):
        pyro.sample("answers", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)


@idiom("gaussian process, by hand", lambda: (torch.linspace(-1, 1, 5), numbers(5)))
def process_by_hand(x, y):
    length, height = pyro.sample("length", dist.LogNormal(0.0, 0.5)), pyro.sample("height", dist.LogNormal(0.0, 0.5))
    gap = (x[:, None] - x) ** 2
    cov = height[..., None, None] * torch.exp(-gap / length[..., None, None] ** 2) + 0.1 * torch.eye(5)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), cov), obs=y)


@idiom("gaussian process, pyro.contrib.gp", made=True, route=None)
def process_by_contrib():
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 0.5))
    kernel.variance = PyroSample(dist.LogNormal(0.0, 0.5))
    process = gp.models.GPRegression(torch.linspace(-1, 1, 5), numbers(5), kernel, noise=torch.tensor(0.3))
    return process.model


@idiom("latent process, whitened", lambda: (torch.linspace(-1, 1, 5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])))
def latent_process(x, y):
    chol = torch.linalg.cholesky(torch.exp(-((x[:, None] - x) ** 2)) + 1e-4 * torch.eye(5))
    white = pyro.sample("white", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    f = pyro.deterministic("f", white @ chol.T)
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Bernoulli(logits=f), obs=y)


@idiom("matrix factorisation", lambda: (numbers(3, 0, 4),), route=None)
def factorisation(y):
    with pyro.plate("rows", 3):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("columns", 4):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(u @ v.mT, 1.0).to_event(2), obs=y)


@idiom("probabilistic PCA", lambda: (numbers(4, 0, 3),))
def pca(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
    with pyro.plate("data", 4):
        cov = dist.LowRankMultivariateNormal(torch.zeros(3), w.unsqueeze(-3), torch.ones(3))
        pyro.sample("y", cov, obs=y)


@idiom("Rasch by to_event", lambda: (torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),))
def rasch(answers):
    skill = pyro.sample("skill", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
    pyro.sample("answers", dist.Bernoulli(logits=skill - torch.tensor([0.0, 1.0])).to_event(2), obs=answers)
