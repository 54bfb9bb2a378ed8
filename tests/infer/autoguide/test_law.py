"""The law of AutoLightBridge: density, quantiles, gradient, bridge."""

import math

import pytest
import torch

from pyro_sb.infer.autoguide.law import BlockMixture, MixtureBlock
from pyro_sb.ops.student_mixture import StudentMixture

F = torch.float64


def mixture(num, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    locs = 2 * torch.randn(num, dim, generator=generator, dtype=F)
    trils = 0.3 * torch.randn(num, dim, dim, generator=generator, dtype=F).tril(-1) + torch.eye(dim, dtype=F)
    logits = torch.randn(num, generator=generator, dtype=F)
    return StudentMixture(torch.log_softmax(logits, 0), locs, trils, torch.full((num,), math.inf, dtype=F))


@pytest.fixture
def law():
    """Coordinates 0 and 2 by three components, coordinate 1 by two."""
    return BlockMixture(
        [MixtureBlock(torch.tensor([0, 2]), mixture(3, 2)), MixtureBlock(torch.tensor([1]), mixture(2, 1, 1))]
    )


def test_density_is_that_of_torchs_mixtures(law):
    x = torch.randn(50, 3, dtype=F)
    total = 0.0
    for block in law.blocks:
        m = block.mixture
        parts = torch.distributions.MultivariateNormal(m.locs, scale_tril=m.scale_trils)
        both = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=m.log_weights), parts)
        total = total + both.log_prob(x[:, block.places])
    assert torch.allclose(law.log_prob(x), total)


def test_draws_have_the_laws_moments(law):
    torch.manual_seed(0)
    x = law.sample((40_000,))
    for block in law.blocks:
        m = block.mixture
        weights = m.log_weights.exp()
        mean = weights @ m.locs
        apart = m.locs - mean
        covariance = torch.einsum("k,kij,klj->il", weights, m.scale_trils, m.scale_trils)
        covariance = covariance + (weights[:, None] * apart).T @ apart
        z = (x[:, block.places].mean(0) - mean) / (covariance.diagonal() / len(x)).sqrt()
        assert z.abs().max() < 4
        assert torch.allclose(
            torch.cov(x[:, block.places].T).reshape(covariance.shape), covariance, rtol=0.05, atol=0.05
        )


def test_blocks_are_independent(law):
    torch.manual_seed(0)
    x = law.sample((40_000,))
    correlation = torch.corrcoef(x.T)
    assert correlation[1, [0, 2]].abs().max() < 4 / math.sqrt(len(x))


@pytest.mark.parametrize("shape", [(), (4,), (3, 1)])
def test_shapes(law, shape):
    wide = law.expand(shape)
    x = wide.rsample((5,))
    assert x.shape == (5, *shape, 3)
    assert wide.log_prob(x).shape == (5, *shape)


def test_marginal_quantiles_have_their_probability(law):
    probs = torch.tensor([0.01, 0.5, 0.9], dtype=F)
    found = law.marginal_quantiles(probs)
    for block in law.blocks:
        m = block.mixture
        for i, place in enumerate(block.places):
            sds = m.scale_trils[:, i].norm(dim=-1)
            below = torch.special.ndtr((found[:, place, None] - m.locs[:, i]) / sds) @ m.log_weights.exp()
            assert torch.allclose(below, probs, atol=1e-10)


# ---- the gradient ----


def elbo_by_quadrature(logits, locs, log_sds, log_p):
    """Of a mixture of normals on the line."""
    x = torch.linspace(-15, 15, 6001, dtype=F)
    log_q = torch.logsumexp(
        torch.log_softmax(logits, 0) + torch.distributions.Normal(locs, log_sds.exp()).log_prob(x[:, None]), -1
    )
    return torch.trapezoid(log_q.exp() * (log_p(x) - log_q), x)


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_estimator_has_the_elbos_gradient(baseline):
    def log_p(x):
        return torch.logaddexp(-0.5 * (x + 1) ** 2, 0.7 - (x - 2) ** 2)

    start = [torch.tensor(v, dtype=F) for v in ([0.3, -0.4], [-1.5, 1.0], [0.1, -0.3])]
    exact_at = [v.clone().requires_grad_() for v in start]
    exact = torch.autograd.grad(elbo_by_quadrature(*exact_at, log_p), exact_at)
    torch.manual_seed(0)
    rounds = []
    for _ in range(400):
        logits, locs, log_sds = (v.clone().requires_grad_() for v in start)
        df = torch.full((2,), math.inf, dtype=F)
        m = StudentMixture(torch.log_softmax(logits, 0), locs[:, None], log_sds.exp()[:, None, None], df)
        law = BlockMixture([MixtureBlock(torch.arange(1), m)], baseline)
        x = law.rsample((50,))
        parts = law.score_parts(x)
        value = log_p(x[:, 0])  # what Trace_ELBO does with an auxiliary site
        surrogate = (value - parts.entropy_term + value.detach() * parts.score_function).mean()
        rounds.append(torch.cat(torch.autograd.grad(surrogate, [logits, locs, log_sds])))
    rounds = torch.stack(rounds)
    z = (rounds.mean(0) - torch.cat(exact)) / (rounds.std(0) / math.sqrt(len(rounds)))
    assert z.abs().max() < 4


def test_one_component_has_no_score(law):
    single = BlockMixture([MixtureBlock(torch.arange(2), mixture(1, 2))])
    assert single.score_parts(single.sample()).score_function == 0


# ---- the bridge ----


def test_drift_carries_the_point_to_the_law():
    torch.manual_seed(0)
    law = BlockMixture(
        [MixtureBlock(torch.tensor([1]), mixture(3, 1)), MixtureBlock(torch.tensor([0, 2]), mixture(2, 2, 4))]
    )
    _, exact = law.paths(20_000, 1)
    x, steps = exact[:, 0].clone(), 200
    covariance = torch.cov(exact[:, -1].T)
    factor = torch.zeros(3, 3, dtype=F)  # the reference's: block by block
    for block in law.blocks:
        i = block.places
        factor[i[:, None], i] = torch.linalg.cholesky(covariance[i[:, None], i])
    for k in range(steps):
        noise = torch.randn_like(x) @ factor.T / math.sqrt(steps)
        x = x + law.drift(k / steps, x) / steps + noise
    sample = law.sample((20_000,))
    for i in range(3):
        probs = torch.linspace(0.05, 0.95, 7, dtype=F)
        below = (x[:, i, None] < torch.quantile(sample[:, i], probs)).double().mean(0)
        assert (below - probs).abs().max() < 0.02


def test_drift_takes_one_time_a_point(law):
    x, t = torch.randn(4, 3, dtype=F), torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=F)
    each = torch.cat([law.drift(float(t[i]), x[i : i + 1]) for i in range(4)])
    assert torch.allclose(law.drift(t, x), each)


def test_paths_have_the_references_covariance_between_ends():
    torch.manual_seed(0)
    law = BlockMixture([MixtureBlock(torch.arange(1), mixture(2, 1))])
    times, states = law.paths(40_000, 4)
    middle = states[:, 2, 0] - 0.5 * (states[:, 0, 0] + states[:, -1, 0])
    variance = float(law.sample((200_000,)).var())
    assert times.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert float(middle.var()) == pytest.approx(0.25 * variance, rel=0.05)
    assert states[:, 0].unique().numel() == 1
