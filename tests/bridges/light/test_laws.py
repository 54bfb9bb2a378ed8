"""Laws of a mixture bridge: densities of points, plans and paths, their gradients, conditioning, the SDE."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_sb.bridges import LightSB, LightSBBM, TailMatched
from pyro_sb.bridges.light.laws import condition_mixture
from pyro_sb.datasets import EightGaussians, Moons
from tests.bridges.light.fits import (
    CENTRES,
    clusters,
    either,
    full_or_not,
    pairs,
    plane,
    quick,
    quiet_fit,
    shared,
    sources,
    standard_normal,
    z_of_means,
    z_of_two,
)
from tests.ops.potentials import F64


def joint_draws(num=800):
    """Three correlated coordinates with two modes."""
    z = torch.randn(num, 3, **F64) @ torch.tensor([[1.0, 0.6, -0.3], [0.0, 0.8, 0.4], [0.0, 0.0, 0.5]], **F64)
    return z + 2 * torch.randint(2, (num, 1)) * torch.tensor([1.0, -1.0, 0.5], **F64)


@shared
def on_joint_draws(covariance="full", from_draws=False):
    source = torch.randn(500, 3, **F64) if from_draws else None
    bridge = LightSB(3, num_components=3, covariance=covariance)
    bridge.fit(joint_draws(), source, solver="moments", num_updates=30, progress=False)
    return bridge


@shared
def named(name, context_dim=0):
    options = {"num_components": 3, "epsilon": 0.7, "context_dim": context_dim}
    bridge = {
        "light": lambda: LightSB(2, **options),
        "bass": lambda: LightSBBM(2, beta=4.0, **options),
        "tails": lambda: TailMatched(LightSBBM(2, beta=4.0, **options), df=3.0),
    }[name]()
    draws, context = torch.randn(200, 2, **F64), torch.randn(200, 1, **F64)
    bridge.fit(draws, context=context if context_dim else None, num_updates=10, progress=False)
    return bridge


@shared
def on_contexts(dim=2, **options):
    target, context = pairs(dim=dim)
    bridge = LightSB(dim, num_components=3, epsilon=0.5, context_dim=3, covariance="full", hidden=(16, 16), **options)
    quiet_fit(bridge, target, context=context)
    torch.nn.init.normal_(bridge.parameters_of.net.head.weight, std=0.2)  # what is exact is exact of any parameters
    return bridge, target, context


# Densities


@full_or_not
def test_from_a_point_it_is_torchs_mixture(covariance):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5, covariance=covariance))
    assert bridge.density == "marginal"
    potential = bridge.parameters_of(None, 1.0)
    scales = potential.scales if covariance == "full" else torch.diag_embed(potential.scales)
    law = MixtureSameFamily(
        Categorical(logits=potential.log_weights),
        MultivariateNormal(bridge.location + bridge.scale * potential.locs, bridge.epsilon * scales),
    )
    x = 3 * torch.randn(50, 2, **F64)
    torch.testing.assert_close(bridge().log_prob(x), law.log_prob(x).detach(), rtol=1e-10, atol=1e-10)
    points, cell = plane()
    assert float(bridge().log_prob(points).exp().sum() * cell) == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(bridge.marginal_log_prob(x), bridge().log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bridge.plan(bridge.location).log_prob(x), bridge().log_prob(x), rtol=1e-12, atol=1e-12)


@full_or_not
@pytest.mark.parametrize("kind", ["point", "draws", "law"])
def test_the_plan_is_normalised_whatever_the_source(covariance, kind):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5, covariance=covariance), source=sources()[kind])
    x0, (points, cell) = torch.randn(3, 2, **F64), plane()
    mass = cell * bridge.plan(x0).log_prob(points[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(3, **F64), rtol=1e-9, atol=1e-9)
    mean, cov = bridge.plan_moments(x0)
    torch.testing.assert_close(mass.T @ points, mean, rtol=1e-8, atol=1e-8)
    second = torch.einsum("mn,mi,mj->nij", mass, points, points)
    torch.testing.assert_close(second - mean[:, :, None] * mean[:, None, :], cov, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["draws", "law"])
def test_the_averaged_plan_is_normalised(kind):
    bridge, (points, cell) = quick(LightSB(2, num_components=3, epsilon=0.5), source=sources()[kind]), plane(num=121)
    assert float(bridge.marginal_log_prob(points, num_source=50).exp().sum() * cell) == pytest.approx(1, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["normal", "eight gaussians", "moons"])
def test_path_weights_correct_exactly_whatever_law_is_the_source(source):
    # E_q exp(log p - log q) = 1, and self-normalised means are p's; Moons has draws alone
    law = {"normal": standard_normal(), "eight gaussians": EightGaussians(), "moons": Moons()}[source]
    bridge, num = quick(LightSB(2, num_components=3, epsilon=1.0), source=law), 4000
    p = MultivariateNormal(CENTRES[0], 0.12 * torch.eye(2, **F64))  # within one cluster
    value, log_q = bridge().draws((num,))
    weights = (p.log_prob(value) - log_q).exp()
    assert 0.05 < weights.std() < 10
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(num)
    assert z_of_means(weights[:, None] * (value - p.loc), 0.0).abs().max() < 4
    few = torch.stack([(p.log_prob(v) - q).exp().mean() for v, q in (bridge().draws((3,)) for _ in range(150))])
    assert abs(z_of_means(few, 1.0)) < 4  # any number of draws: the source points are as many as are asked for


def test_path_weights_correct_given_a_context():
    context = torch.randn(300, 1, **F64)
    bridge = quick(
        LightSB(2, num_components=3, epsilon=2.0, context_dim=1), clusters(300), standard_normal(), context=context
    )
    p, given = MultivariateNormal(CENTRES[0], 0.12 * torch.eye(2, **F64)), torch.tensor([[-1.0], [0.5]], **F64)
    value, log_q = bridge(given).draws((1500,))
    weights = (p.log_prob(value) - log_q).exp()
    assert value.shape == (1500, 2, 2) and weights.std() < 10
    assert z_of_means(weights, 1.0).abs().max() < 4


# Given a context


@either
def test_every_context_has_its_own_law(make):
    context = torch.randn(200, 1, **F64)
    bridge = quick(
        make(1, num_components=3, epsilon=0.5, context_dim=1),
        2 * context,
        context=context,
        num_updates=60,
        learning_rate=1e-2,
    )
    given, x = torch.tensor([[-1.0], [1.0]], **F64), torch.linspace(-25, 25, 4001, **F64)[:, None]
    together = bridge(given).log_prob(x[:, None])
    for i in range(2):
        torch.testing.assert_close(together[:, i], bridge(given[i]).log_prob(x), rtol=1e-10, atol=1e-10)
    mass = together.exp() * (x[1] - x[0])
    torch.testing.assert_close(mass.sum(0), torch.ones(2, **F64), rtol=1e-9, atol=1e-9)
    assert bridge(given[1]).sample((500,)).mean() > bridge(given[0]).sample((500,)).mean() + 1
    start = bridge.location.expand(2, 1)
    torch.testing.assert_close(bridge.plan(start, given).log_prob(x[:, None]), together, rtol=1e-9, atol=1e-9)


def test_contexts_broadcast_with_points():
    context = torch.randn(200, 1, **F64)
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5, context_dim=1), clusters(200), context=context)
    x0, given = torch.randn(2, **F64), torch.tensor([[-1.0], [1.0]], **F64)
    expected = torch.stack([bridge.drift(0.5, x0, c) for c in given])
    torch.testing.assert_close(bridge.drift(0.5, x0, given), expected, rtol=1e-12, atol=1e-12)
    assert bridge.plan(x0, given).sample((3,)).shape == (3, 2, 2)
    assert bridge.transport(x0, given).shape == (2, 2) and bridge.marginal_log_prob(x0, given).shape == (2,)


def test_the_density_is_that_of_the_plan_from_the_source_point():
    bridge, target, context = on_contexts()
    x, rows = target[:20], context[:20]
    expected = bridge.plan(bridge.source_points.expand(20, -1), rows).log_prob(x)
    torch.testing.assert_close(bridge(rows).log_prob(x), expected, rtol=1e-8, atol=1e-8)


def test_draws_have_the_density():
    bridge, _, context = on_contexts()
    one = context[:1]
    draws = bridge(one[0]).sample((20_000,))
    axis = torch.linspace(-30, 30, 601, **F64)
    grid = torch.cartesian_prod(axis, axis)
    mass = bridge(one[0]).log_prob(grid).exp() * float(axis[1] - axis[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    for value, truth in ((draws, grid), (draws**2, grid**2), (draws[:, :1] * draws[:, 1:], grid[:, :1] * grid[:, 1:])):
        z = (value.mean(0) - mass @ truth) / value.std(0) * math.sqrt(20_000)
        assert z.abs().max() < 4


def test_a_context_matters_and_a_batch_is_its_rows():
    bridge, target, context = on_contexts()
    law = bridge(context[:4])
    assert law.sample((3,)).shape == (3, 4, 2)
    rows = torch.stack([bridge(context[i]).log_prob(target[0]) for i in range(4)])
    torch.testing.assert_close(law.log_prob(target[0]), rows, rtol=1e-10, atol=1e-10)
    assert rows.std() > 0.1


def test_the_gradient_of_the_density_is_the_points():
    bridge, target, context = on_contexts()
    x = target[:6].clone().requires_grad_()
    (slope,) = torch.autograd.grad(bridge(context[:6]).log_prob(x).sum(), x)
    for axis in range(2):
        step = torch.zeros(2, **F64)
        step[axis] = 1e-6
        ahead, behind = (bridge(context[:6]).log_prob(target[:6] + sign * step) for sign in (1, -1))
        torch.testing.assert_close(slope[:, axis], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_outside_the_fit():
    bridge, target, context = on_contexts(dropout=0.5)
    x, rows = target[:10], context[:10]
    once = bridge(rows).log_prob(x)
    for mode in (True, False):
        bridge.train(mode)
        assert torch.equal(bridge(rows).log_prob(x), once)
    assert not bridge.parameters_of.net.noisy


# Conditioning in closed form


@full_or_not
def test_conditioning_in_closed_form_is_the_joint_density_renormalised(covariance):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5, covariance=covariance))
    axis = torch.linspace(-15, 15, 3001, **F64)
    for axes, rest in (([0], 1), ([-1], 0)):
        observed = torch.tensor([[-1.0], [2.5]], **F64)
        law = bridge.condition(axes, observed)
        assert law.batch_shape == (2,) and law.event_shape == (1,)
        joint = torch.empty(len(axis), 2, 2, **F64)
        joint[..., 1 - rest], joint[..., rest] = observed[:, 0], axis[:, None]
        expected = bridge().log_prob(joint)
        expected = expected - torch.logsumexp(expected, 0) - math.log(float(axis[1] - axis[0]))
        torch.testing.assert_close(law.log_prob(axis[:, None, None]), expected, rtol=1e-8, atol=1e-8)
    from_law = quick(LightSB(2, num_components=3, epsilon=0.5, covariance=covariance), source=standard_normal())
    x0, value = torch.randn(2, **F64), torch.tensor([0.3], **F64)
    joint = torch.stack([value.expand(len(axis)), axis], -1)
    expected = from_law.plan(x0).log_prob(joint)
    expected = expected - torch.logsumexp(expected, 0) - math.log(float(axis[1] - axis[0]))
    found = from_law.condition([0], value, x0).log_prob(axis[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="x0 must be given"):
        from_law.condition([0], value)
    for axes in ([], [0, 1], [0, 0], [2]):
        with pytest.raises(ValueError, match="axes must be distinct axes of 2"):
            bridge.condition(axes, value)


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("axes", [[1], [-1], [2, 0]], ids=str)
def test_the_conditional_is_the_joint_over_its_integral(covariance, axes):
    bridge = on_joint_draws(covariance)
    observed = 0.7 * torch.randn(5, len(axes), **F64)
    law = bridge.condition(axes, observed)
    rest = [i for i in range(3) if i not in [a % 3 for a in axes]]
    assert (tuple(law.batch_shape), tuple(law.event_shape)) == ((5,), (len(rest),))
    nodes = torch.linspace(-9, 9, 241, **F64)
    grid = torch.cartesian_prod(*[nodes] * len(rest)).reshape(-1, len(rest))
    points = torch.zeros(len(grid), 5, 3, **F64)
    points[..., [a % 3 for a in axes]] = observed
    points[..., rest] = grid[:, None, :]
    joint = bridge().log_prob(points)
    cell = (18 / 240) ** len(rest)
    expected = joint - (torch.logsumexp(joint, 0) + math.log(cell))
    likely = expected > -25
    torch.testing.assert_close(law.log_prob(grid[:, None, :])[likely], expected[likely], rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_it_conditions_the_plan_from_a_given_point():
    bridge = on_joint_draws(from_draws=True)
    x0, observed = torch.tensor([0.5, -1.0, 0.2], **F64), torch.tensor([0.3, 0.1], **F64)
    law = bridge.condition([0, 1], observed, x0)
    nodes = torch.linspace(-9, 9, 2001, **F64)
    points = torch.cat([observed.expand(2001, 2), nodes[:, None]], 1)
    joint = bridge.plan(x0).log_prob(points)
    expected = joint - torch.logsumexp(joint, 0) - math.log(18 / 2000)
    torch.testing.assert_close(law.log_prob(nodes[:, None]), expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="x0 must be given"):
        bridge.condition([0], [0.0])


@pytest.mark.filterwarnings("ignore:.*not converged")
@pytest.mark.parametrize("axes", [[], [0, 1, 2], [3], [1, 1], [-4]], ids=str)
def test_bad_axes_are_refused(axes):
    with pytest.raises(ValueError, match="axes must be distinct"):
        on_joint_draws().condition(axes, torch.zeros(len(axes)))


@pytest.mark.filterwarnings("ignore:.*not converged")
def test_what_has_no_closed_form_is_refused():
    with pytest.raises(ValueError, match=r"shape \(\*batch, 2\), got \(3,\)"):
        on_joint_draws().condition([0, 1], torch.zeros(3))
    bass = LightSBBM(3, num_components=2, beta=5.0)
    bass.fit(joint_draws(), num_updates=5, progress=False)
    with pytest.raises(NotImplementedError, match="beta = 5"):
        bass.condition([0], [0.0])


def test_independent_coordinates_learn_nothing():
    law = condition_mixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2), [0], torch.tensor([[3.0]]))
    assert law.mean.item() == 0 and law.variance.item() == 1


# Gradients


@pytest.mark.parametrize("context_dim", [0, 1])
@pytest.mark.parametrize("name", ["light", "bass", "tails"])
def test_log_prob_has_its_first_and_second_derivatives(name, context_dim):
    bridge = named(name, context_dim)
    law = bridge(torch.zeros(1, **F64)) if context_dim else bridge()
    x = (0.7 * torch.randn(3, 2, **F64)).requires_grad_()
    assert torch.autograd.gradcheck(law.log_prob, (x,))
    assert torch.autograd.gradgradcheck(law.log_prob, (x,))


@pytest.mark.parametrize("name", ["light", "bass", "full"])
def test_log_prob_has_its_derivatives_in_the_context(name):
    # p(x given theta) as a likelihood: chains on theta move by this gradient
    bridge = copy.deepcopy(on_contexts()[0] if name == "full" else named(name, 1))
    torch.nn.init.normal_(bridge.parameters_of.net.head.weight, std=0.1)
    x, context = 0.7 * torch.randn(3, 2, **F64), torch.randn(3, bridge.context_dim, **F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: bridge(c).log_prob(x), (context,))
    bridge(context).log_prob(x).sum().backward()
    assert bool((context.grad != 0).all()) and all(p.grad is None for p in bridge.parameters())


@pytest.mark.parametrize("name", ["light", "bass"])
def test_the_plan_has_them_too(name):
    bridge = named(name)
    x = torch.randn(3, 2, **F64, requires_grad=True)
    assert torch.autograd.gradcheck(bridge.plan(torch.randn(3, 2, **F64)).log_prob, (x,))


def test_a_fitted_bridge_asks_for_no_gradient_of_its_own():
    bridge = named("bass")
    assert not bridge().log_prob(torch.zeros(2, **F64)).requires_grad
    x = torch.zeros(2, **F64, requires_grad=True)
    bridge().log_prob(x).backward()
    assert x.grad is not None and all(p.grad is None for p in bridge.parameters())


@pytest.mark.slow
def test_nuts_draws_from_the_prior_that_a_bridge_is():
    bridge = LightSBBM(1, num_components=2, beta=4.0)
    bridge.fit(torch.cat([torch.randn(300, 1, **F64), 2 + torch.randn(300, 1, **F64)]), num_updates=50, progress=False)
    exact = bridge().sample((20_000,))
    mcmc = MCMC(NUTS(lambda: pyro.sample("x", bridge()), step_size=1.0), 200, 50, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"]
    assert abs(draws.mean() - exact.mean()) < 5 * exact.std() / 50**0.5  # at least 50 effective draws
    assert dist.Normal(0.0, 1.0).log_prob(draws).isfinite().all()


# The process


@full_or_not
def test_paths_lead_from_the_source_to_the_law_of_transport(covariance):
    source, num = torch.randn(200, 2, **F64), 4000
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5, covariance=covariance), source=source)
    times, states = bridge.paths(num, 5)
    assert (states[0][:, None] - source).abs().amax(-1).min(1).values.max() < 1e-12
    assert z_of_two(states[-1], bridge.transport(states[0])).abs().max() < 4
    joint = torch.cat([states[0], states[-1]], -1)
    again = bridge.paths(num, 1)[1]
    assert z_of_two(joint, torch.cat([again[0], again[1]], -1)).abs().max() < 4  # the coupling, for any grid
    mean, _ = bridge.plan_moments(states[0])
    assert z_of_means(states[-1] - mean, 0.0).abs().max() < 4


def test_paths_solve_the_sde_of_drift_and_volatility():
    num, steps = 8000, 60
    bridge = quick(LightSB(2, num_components=3, epsilon=1.5, covariance="full"), source=standard_normal())
    _, states = bridge.paths(num, 4)
    x, t = standard_normal().sample((num,)), 0.0
    sigma = bridge.volatility(0.3, x[:1])[0]
    torch.testing.assert_close(sigma, math.sqrt(1.5) * torch.eye(2, **F64), rtol=1e-12, atol=1e-12)
    for k in range(steps):
        if k == steps // 2:
            assert z_of_two(states[2], x).abs().max() < 4
        x = x + bridge.drift(t, x) / steps + torch.randn_like(x) @ sigma / math.sqrt(steps)
        t = min(1.0, t + 1 / steps)
    assert z_of_two(states[-1], x).abs().max() < 4.5


def test_increments_along_a_path_have_the_brownian_variance():
    # Whatever the drift: quadratic variation is epsilon a unit of time, along every axis
    bridge = quick(LightSB(2, num_components=3, epsilon=1.5), source=standard_normal())
    _, states = bridge.paths(200, 500)
    variation = states.diff(dim=0).square().sum(0)
    assert z_of_means(variation, 1.5).abs().max() < 4


def test_the_state_at_time_one_half_lies_between():
    bridge = named("bass")
    x0 = bridge.location.expand(20_000, 2)
    ends = bridge.transport(x0, t=0.0), bridge.transport(x0)
    assert torch.allclose(ends[0], x0, atol=1e-9)
    middle = bridge.transport(x0, t=0.5)
    times, states = bridge.paths(20_000, 2)
    error = (middle.var(0) + states[1].var(0)).sqrt() / 20_000**0.5
    assert bool(((middle.mean(0) - states[1].mean(0)).abs() < 4 * error).all())
    spread = middle.var(0) * (2 / 20_000) ** 0.5
    assert bool(((middle.var(0) - states[1].var(0)).abs() < 6 * spread).all())
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        bridge.transport(x0, t=1.5)
