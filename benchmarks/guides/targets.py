"""Posteriors that guides are held against: modes, funnels, hierarchies, regressions, a series, a network."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

FLOAT = torch.float64


@dataclass(frozen=True, eq=False)
class GuideTarget:
    """A model, and what is known of its posterior.

    Attributes:
        name: Of it.
        model: Without arguments; right for vectorised particles.
        log_evidence: Exact, or None: then a long run of ours gives it.
        exact: Draws of the posterior, ``{site: (n, *shape)}``, where it can be drawn.
        labels: Mode of each draw, from the sites.
        nesting: Plates of the model.
    """

    name: str
    model: Callable[[], Any]
    log_evidence: float | None = None
    exact: Callable[[int], dict[str, Tensor]] | None = None
    labels: Callable[[dict[str, Tensor]], Tensor] | None = None
    nesting: int = 0


def modes(name: str, locs: Tensor, sd: float | Tensor, weights: Tensor, prior_sd: float) -> GuideTarget:
    """A normalised mixture under a normal prior that is divided out again."""
    num, dim = locs.shape
    sds = torch.as_tensor(sd, dtype=FLOAT).expand(num)
    constant = weights.log() - dim * sds.log() - 0.5 * dim * math.log(2 * math.pi)

    def parts(x: Tensor) -> Tensor:
        return constant - 0.5 * (x[..., None, :] - locs).square().sum(-1) / sds**2

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim, dtype=FLOAT), prior_sd).to_event(1)
        x = pyro.sample("x", prior)
        pyro.factor("target", torch.logsumexp(parts(x), -1) - prior.log_prob(x))

    def exact(n: int) -> dict[str, Tensor]:
        index = torch.multinomial(weights, n, replacement=True)
        return {"x": locs[index] + sds[index, None] * torch.randn(n, dim, dtype=FLOAT)}

    return GuideTarget(name, model, 0.0, exact, lambda sites: parts(sites["x"]).argmax(-1))


def forty() -> GuideTarget:
    """The benchmark's forty unit normals."""
    locs = 80 * (torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=FLOAT) - 0.5)
    return modes("GMM40, d 2", locs, 1.0, torch.full((40,), 1 / 40, dtype=FLOAT), 25.0)


def eight() -> GuideTarget:
    """Eight unit normals on a circle in the first two of ten coordinates."""
    angle = torch.arange(8, dtype=FLOAT) * math.pi / 4
    locs = torch.zeros(8, 10, dtype=FLOAT)
    locs[:, 0], locs[:, 1] = 13 * angle.cos(), 13 * angle.sin()
    return modes("eight modes, d 10", locs, 1.0, torch.full((8,), 1 / 8, dtype=FLOAT), 10.0)


def spike() -> GuideTarget:
    """A spike of sd .05 with .9 of the mass inside a slab of sd .1, under a uniform prior on (-1, 1)."""
    share, sds = torch.tensor([0.1, 0.9], dtype=FLOAT), torch.tensor([0.1, 0.05], dtype=FLOAT)
    places = torch.stack([torch.zeros(10, dtype=FLOAT), torch.full((10,), 0.2, dtype=FLOAT)])

    def parts(x: Tensor) -> Tensor:
        return share.log() + dist.Normal(places, sds[:, None]).log_prob(x[..., None, :]).sum(-1)

    def model() -> None:
        x = pyro.sample("x", dist.Uniform(-torch.ones(10, dtype=FLOAT), 1.0).to_event(1))
        pyro.factor("likelihood", torch.logsumexp(parts(x), -1))

    def exact(n: int) -> dict[str, Tensor]:
        index = torch.multinomial(share, n, replacement=True)
        return {"x": places[index] + sds[index, None] * torch.randn(n, 10, dtype=FLOAT)}

    return GuideTarget(
        "spike in slab, d 10", model, -10 * math.log(2), exact, lambda sites: parts(sites["x"]).argmax(-1)
    )


def funnel() -> GuideTarget:
    """Neal's."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=FLOAT), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9, dtype=FLOAT), (v / 2).exp()[..., None]).to_event(1))

    def exact(n: int) -> dict[str, Tensor]:
        v = 3 * torch.randn(n, dtype=FLOAT)
        return {"v": v, "x": torch.randn(n, 9, dtype=FLOAT) * (v / 2).exp()[:, None]}

    return GuideTarget("funnel, d 10", model, 0.0, exact)


def many_wells(dim: int) -> GuideTarget:
    """Pairs of a double well and a normal: 2^(d/2) modes."""
    grid = torch.linspace(-4, 4, 100_001, dtype=FLOAT)
    log_well = -(grid**4) + 6 * grid**2 + 0.5 * grid
    log_z = float(torch.logsumexp(log_well, 0)) + math.log(8e-5) + 0.5 * math.log(2 * math.pi)

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim, dtype=FLOAT), 3.0).to_event(1)
        x = pyro.sample("x", prior)
        a, b = x[..., 0::2], x[..., 1::2]
        pyro.factor("target", (-(a**4) + 6 * a**2 + 0.5 * a - 0.5 * b**2).sum(-1) - prior.log_prob(x))

    def exact(n: int) -> dict[str, Tensor]:
        a = grid[torch.multinomial(torch.softmax(log_well, 0).float(), n * dim // 2, replacement=True)]
        a = a.view(n, -1) + 8e-5 * (torch.rand(n, dim // 2, dtype=FLOAT) - 0.5)
        return {"x": torch.stack([a, torch.randn(n, dim // 2, dtype=FLOAT)], -1).flatten(1)}

    powers = 2 ** torch.arange(min(4, dim // 2))
    return GuideTarget(
        f"ManyWell, d {dim}",
        model,
        dim // 2 * log_z,
        exact,
        lambda sites: ((sites["x"][:, 0::2] > 0)[:, : len(powers)] * powers).sum(-1),
    )


def schools(centred: bool) -> GuideTarget:
    """Eight schools (Rubin, 1981): tau is HalfCauchy(5), mu N(0, 5)."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=FLOAT)
    s = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=FLOAT)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=FLOAT), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.full((), 5.0, dtype=FLOAT)))
        with pyro.plate("schools", 8):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("eta", dist.Normal(torch.zeros((), dtype=FLOAT), 1.0))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    return GuideTarget(f"eight schools, {'' if centred else 'non-'}centred", model, -31.3113, nesting=1)


def logistic(name: str, X: Tensor, y: Tensor) -> GuideTarget:
    """Logistic regression under N(0, I)."""

    def model() -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(X.shape[1], dtype=FLOAT), 1.0).to_event(1))
        pyro.factor("y", dist.Bernoulli(logits=b @ X.T).log_prob(y).sum(-1))

    return GuideTarget(name, model)


def cancer() -> GuideTarget:
    """Breast cancer, as scikit-learn ships it."""
    from sklearn.datasets import load_breast_cancer

    X, y = (torch.as_tensor(a, dtype=FLOAT) for a in load_breast_cancer(return_X_y=True))
    X = torch.cat([(X - X.mean(0)) / X.std(0), torch.ones(len(X), 1, dtype=FLOAT)], 1)
    return logistic("cancer, d 31", X, y)


def simulated() -> GuideTarget:
    """Sixty covariates and 208 rows, seed 0."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(208, 61, generator=generator, dtype=FLOAT)
    X[:, -1] = 1.0
    b = 0.5 * torch.randn(61, generator=generator, dtype=FLOAT)
    y = (torch.rand(208, generator=generator, dtype=FLOAT) < torch.sigmoid(X @ b)).to(FLOAT)
    return logistic("simulated logistic, d 61", X, y)


def seeds() -> GuideTarget:
    """Seeds (Crowder, 1978, table 3): germinated n of N, by seed and root extract, with a random effect a plate."""
    n = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
    of = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
    count, total = torch.tensor(n, dtype=FLOAT), torch.tensor(of, dtype=FLOAT)
    seed = (torch.arange(21) > 10).to(FLOAT)
    extract = torch.tensor([0] * 5 + [1] * 6 + [0] * 5 + [1] * 5, dtype=FLOAT)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(4, dtype=FLOAT), 10.0).to_event(1))
        precision = pyro.sample("precision", dist.Gamma(torch.full((), 0.01, dtype=FLOAT), 0.01))
        sd = precision[..., None].rsqrt() * torch.ones(21, dtype=FLOAT)
        b = pyro.sample("b", dist.Normal(torch.zeros(21, dtype=FLOAT), sd).to_event(1))
        x = torch.stack([torch.ones(21, dtype=FLOAT), seed, extract, seed * extract])
        pyro.factor("n", dist.Binomial(total, logits=a @ x + b).log_prob(count).sum(-1))

    return GuideTarget("seeds, d 26", model)


def network() -> GuideTarget:
    """A network of 4 tanh units, 49 weights, on 40 rows of a sine; seed 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 40, dtype=FLOAT)[:, None].expand(-1, 3) ** torch.tensor([1, 2, 3])
    y = torch.sin(3 * x[:, 0]) + 0.2 * torch.randn(40, generator=generator, dtype=FLOAT)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(49, dtype=FLOAT), 1.0).to_event(1))
        first, bias, second, last = w[..., :24], w[..., 24:32], w[..., 32:40], w[..., 40:]
        hidden = torch.tanh(x @ first.unflatten(-1, (3, 8)) + bias[..., None, :])
        gate = torch.sigmoid(last[..., :8])
        out = (hidden * (second * gate)[..., None, :]).sum(-1) + last[..., 8:]
        pyro.factor("y", dist.Normal(out, 0.2).log_prob(y).sum(-1))

    return GuideTarget("network, 49 weights", model)


def all_targets() -> list[GuideTarget]:
    return [
        forty(),
        eight(),
        spike(),
        funnel(),
        *(many_wells(dim) for dim in (8, 16, 32)),
        schools(True),
        schools(False),
        cancer(),
        simulated(),
        seeds(),
        network(),
    ]
