"""Time series and trees: state spaces, hidden Markov models, epidemics, coalescents, phylogenies."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex

from tests.infer.zoo.registry import idiom, numbers


@idiom("random walk by a loop", lambda: (numbers(4),))
def random_walk(y):
    x, step = torch.tensor(0.0), pyro.sample("step", dist.HalfNormal(1.0))
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


@idiom("random walk by cumsum", lambda: (numbers(5),))
def cumulated(y):
    step = pyro.sample("step", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    level = pyro.deterministic("level", (step[..., None] * noise).cumsum(-1))
    pyro.sample("y", dist.Normal(level, 0.5).to_event(1), obs=y)


@idiom("autoregression", lambda: (numbers(6),))
def autoregression(y):
    phi, sigma = pyro.sample("phi", dist.Uniform(-1.0, 1.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("time", 5):
        pyro.sample("y", dist.Normal(phi * y[:-1], sigma), obs=y[1:])


@idiom("stochastic volatility", lambda: (numbers(4),))
def volatility(y):
    phi = pyro.sample("phi", dist.Beta(5.0, 1.5))
    h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
    for t in range(1, 4):
        h = pyro.sample(f"h_{t}", dist.Normal(phi * h, 0.3))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=y[t])


@idiom("GaussianHMM", lambda: (numbers(5, 0, 1),), route=None)
def gaussian_hmm(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    eye = torch.eye(1)
    noise = dist.Normal(torch.zeros(1), scale[..., None]).to_event(1)
    hmm = dist.GaussianHMM(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        0.9 * eye,
        noise,
        eye,
        dist.Normal(torch.zeros(1), 0.5).to_event(1),
    )
    pyro.sample("y", hmm, obs=y)


@idiom("linear state space, Kalman by hand", lambda: (numbers(5),))
def kalman(y):
    q, r = pyro.sample("q", dist.LogNormal(0.0, 0.5)), pyro.sample("r", dist.LogNormal(0.0, 0.5))
    mean, var, total = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0)
    for value in y:
        var = var + q
        total = total + dist.Normal(mean, (var + r).sqrt()).log_prob(value)
        gain = var / (var + r)
        mean, var = mean + gain * (value - mean), (1 - gain) * var
    pyro.factor("y", total)


@idiom("hmm by markov in a plate", lambda: (numbers(3, 0, 4),), route=None)
def hmm_in_plate(y):
    stay = pyro.sample("stay", dist.Beta(5.0, 1.0))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("series", 3):
        z = torch.tensor(0)
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.where(z == 1, stay, 1 - stay)))
            pyro.sample(f"y_{t}", dist.Normal(loc[..., 0] + z * (loc[..., 1] - loc[..., 0]), 1.0), obs=y[:, t])
            z = z.long()


@idiom("hmm, ragged series", lambda: (numbers(3, 0, 4), torch.tensor([4, 2, 3])), route=None)
def ragged_hmm(y, lengths):  # model 1 of Pyro's hmm.py
    with poutine.mask(mask=True):
        rows = pyro.sample("rows", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("series", 3, dim=-1):
        x = 0
        for t in pyro.markov(range(4)):
            with poutine.mask(mask=t < lengths):
                x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Normal(loc[x], 1.0), obs=y[:, t])


@idiom("hmm, tones", lambda: ((numbers(2, 0, 3, 2) > 0).to(torch.get_default_dtype()),), route=None)
def tones_hmm(notes):  # model 1 of Pyro's hmm.py, with a plate of tones
    rows = pyro.sample("rows", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
    emit = pyro.sample("emit", dist.Beta(0.5, 0.9).expand([2, 2]).to_event(2))
    tones = pyro.plate("tones", 2, dim=-1)
    with pyro.plate("series", 2, dim=-2):
        x = 0
        for t in pyro.markov(range(3)):
            x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(rows)[..., x, :]))
            with tones as tone:
                pyro.sample(
                    f"y_{t}",
                    dist.Bernoulli(
                        Vindex(emit)[..., x.squeeze(-1), tone] if x.dim() < 2 else Vindex(emit)[..., x, tone]
                    ),
                    obs=notes[:, t],
                )


@idiom("hmm, DiscreteHMM", lambda: (numbers(5),))
def discrete_hmm(y):
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    rows = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log()
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), rows, dist.Normal(loc[..., None, :], 1.0), duration=5), obs=y)


@idiom("second-order markov", lambda: (numbers(4),), route=None)
def second_order(y):
    m = pyro.sample("m", dist.Normal(1.0, 1.0))
    table = torch.tensor([[[0.8, 0.2], [0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9]]])
    a, b = torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(range(4), history=2):
        a, b = b, pyro.sample(f"z_{t}", dist.Categorical(Vindex(table)[a, b]))
        pyro.sample(f"y_{t}", dist.Normal(m * b, 1.0), obs=y[t])


@idiom("growth curve by an ODE", lambda: (torch.tensor([1.1, 1.9, 3.2, 4.0]),))
def logistic_growth(y):
    r, k = pyro.sample("r", dist.LogNormal(-1.0, 0.5)), pyro.sample("k", dist.LogNormal(2.0, 0.5))
    x, states = torch.tensor(1.0), []
    for _ in range(4):
        x = x + r * x * (1 - x / k)
        states.append(torch.as_tensor(x).expand(r.shape))
    with pyro.plate("time", 4):
        pyro.sample(
            "y", dist.Normal(torch.stack(states, -1).squeeze(-2) if r.dim() else torch.stack(states), 0.3), obs=y
        )


@idiom("SIR, deterministic", lambda: (torch.tensor([2.0, 4.0, 6.0]),))
def epidemic(cases):
    beta = pyro.sample("beta", dist.LogNormal(0.0, 0.5))
    s, i = torch.tensor(0.99), torch.tensor(0.01)
    for t in range(3):
        new = beta * s * i
        s, i = s - new, i + 0.6 * new
        pyro.sample(f"cases_{t}", dist.Poisson(500 * new), obs=cases[t])


@idiom("changepoint by markov", lambda: (torch.tensor([4.0, 5.0, 1.0, 0.0]),), route=None)
def changepoint(y):
    rates = pyro.sample("rates", dist.Exponential(torch.tensor([0.3, 0.3])).to_event(1))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3 + 0.7 * z))
        rate = rates[..., 0] * (1 - z) + rates[..., 1] * z
        pyro.sample(f"y_{t}", dist.Poisson(rate), obs=y[t])


@idiom("coalescent by waiting times", lambda: (torch.tensor([0.2, 0.5, 1.5]),))
def coalescent(waits):
    size = pyro.sample("size", dist.LogNormal(0.0, 1.0))
    lineages = torch.tensor([4.0, 3.0, 2.0])
    pairs = lineages * (lineages - 1) / 2
    with pyro.plate("events", 3):
        pyro.sample("waits", dist.Exponential(pairs / size), obs=waits)


@idiom("coalescent by its times", lambda: (torch.zeros(4),), route=None)
def coalescent_times(leaves):
    size = pyro.sample("size", dist.LogNormal(0.0, 1.0))
    gaps = pyro.sample("gaps", dist.Exponential(torch.ones(3)).to_event(1))
    times = gaps.cumsum(-1)
    pyro.factor("times", dist.CoalescentTimes(leaves, size).log_prob(times.flip(-1) * 0 + -times.flip(-1)))


@idiom("phylogeny, three leaves", lambda: (torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]]),))
def phylogeny(letters):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    low = pyro.sample("low", dist.Exponential(1.0))
    high = pyro.sample("high", dist.Exponential(1.0))

    def moved(t):
        same = 0.5 + 0.5 * torch.exp(-2 * rate * t)
        return torch.stack([torch.stack([same, 1 - same], -1), torch.stack([1 - same, same], -1)], -2)

    near, far, up = moved(low), moved(low + high), moved(high)
    total = 0.0
    for a, b, c in letters.T.tolist():
        inner = near[..., :, a] * near[..., :, b]
        root = (up @ inner[..., None]).squeeze(-1) * far[..., :, c]
        total = total + (0.5 * root).sum(-1).log()
    pyro.factor("letters", total)


@idiom("Hawkes process", lambda: (torch.tensor([0.3, 0.5, 0.6, 2.0, 2.1]),))
def hawkes(t):
    mu, alpha = pyro.sample("mu", dist.Gamma(2.0, 2.0)), pyro.sample("alpha", dist.Beta(2.0, 2.0))
    gaps = t[:, None] - t
    excite = torch.where(gaps > 0, torch.exp(-gaps.clamp(min=0.0)), 0.0).sum(-1)
    rate = mu[..., None] + alpha[..., None] * excite
    pyro.factor("t", rate.log().sum(-1) - 3 * mu - alpha * (1 - torch.exp(-(3 - t))).sum())


@idiom("seasonal effects", lambda: (numbers(8),))
def seasonal(y):
    trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
    with pyro.plate("season", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("time", 8):
        pyro.sample("y", dist.Normal(trend * torch.arange(8.0).to(y) / 8 + torch.cat([effect, effect], -1), 1.0), obs=y)


@idiom("state space, ragged series", lambda: (numbers(3, 0, 4), torch.tensor([4, 2, 3])))
def ragged_states(y, lengths):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("series", 3):
        z = torch.zeros(3)
        for t in range(4):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(z, scale), obs=y[:, t])
