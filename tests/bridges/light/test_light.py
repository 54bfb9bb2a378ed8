"""LightSB and LightSBM: exact laws of the plan and its densities, oracles for the fit, what a user may get wrong."""

import math
import warnings

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from benchmarks.known_plan import make_pair
from pyro_sb.bridges import Bridge, LightSB, LightSBM
from pyro_sb.bridges.light.solvers import SOLVERS
from pyro_sb.datasets import EightGaussians, Moons
from pyro_sb.metrics import Moments, cbw2_uvp
from pyro_sb.ops import mixture as mixture_module
from pyro_sb.ops.mixture import MixturePotential, likelihood_loss, matching_loss
from tests.ops.potentials import F64, random_potential

full_or_not = pytest.mark.parametrize("covariance", ["diagonal", "full"])
either = pytest.mark.parametrize("make", [LightSB, LightSBM])
CENTRES = torch.tensor([[3.0, 0.0], [-2.0, 2.5], [-2.0, -3.0]], **F64)


def clusters(num):
    return CENTRES[torch.randint(3, (num,))] + 0.5 * torch.randn(num, 2, **F64)


def standard_normal(dim=2):
    return MultivariateNormal(torch.zeros(dim, **F64), torch.eye(dim, **F64))


def quick(bridge, target=None, source=None, **options):
    """A short fit: what is exact is exact of any parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        bridge.fit(
            clusters(300) if target is None else target, source, **({"progress": False, "num_updates": 20} | options)
        )
    return bridge


def sources():
    return {"point": None, "draws": torch.randn(200, 2, **F64), "law": standard_normal()}


def plane(half=12.0, num=241):
    axis = torch.linspace(-half, half, num, **F64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def z_of_means(values, expected):
    return (values.mean(0) - expected) / values.std(0) * math.sqrt(len(values))


def z_of_two(a, b):
    """z-scores of first and second moments of two samples."""

    def features(x):
        return torch.cat([x, (x[..., :, None] * x[..., None, :]).flatten(-2)], -1)

    a, b = features(a), features(b)
    return (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()


def same_bridge(a, b, x, tolerance):
    torch.testing.assert_close(a.marginal_log_prob(x), b.marginal_log_prob(x), rtol=0, atol=tolerance)


# The loss


def test_the_loss_is_the_likelihood_under_any_coupling():
    # -E log pi(x1 | x0) + E <x0, x1> / eps is the same for every pairing of the same points, and is L
    potential, x0, x1 = random_potential(2, full=True), torch.randn(64, 2, **F64), clusters(64)
    loss = likelihood_loss(potential, x0, x1)
    for _ in range(4):
        paired = x1[torch.randperm(64)]
        found = -potential.plan_log_prob(paired, x0).mean() + (x0 * paired).sum(-1).mean() / potential.epsilon
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)


@full_or_not
def test_matching_has_the_slope_of_the_likelihood(covariance, monkeypatch):
    # In expectation, at any parameters, once the cut of time is moved to where its bias is below the noise
    monkeypatch.setattr(mixture_module, "LAST_TIME", 1 - 1e-4)
    potential = random_potential(2, 3, full=covariance == "full")
    leaves = [part.clone().requires_grad_() for part in potential[:3]]
    potential = MixturePotential(*leaves, potential.epsilon)
    x0, x1 = torch.randn(512, 2, **F64), clusters(512)

    def slopes(loss):
        parts = list(torch.autograd.grad(loss, leaves))
        if covariance == "full":  # S is symmetric: only so much of its slope counts
            parts[2] = (parts[2] + parts[2].mT).tril()
        return torch.cat([part[part != 0] for part in parts])

    expected = slopes(likelihood_loss(potential, x0, x1))
    found = [slopes(matching_loss(potential, x0[torch.randperm(512)], x1[torch.randperm(512)])) for _ in range(300)]
    z = z_of_means(torch.stack(found), expected)
    assert z.abs().max() < 4
    assert (expected.abs() / torch.stack(found).std(0) * math.sqrt(300)).max() > 50  # and the slope is far from zero


def test_both_losses_have_one_slope_for_a_batch_of_contexts():
    # A row of contexts each: the mean over rows of each row's own potential
    batch, x0, x1 = random_potential(2, 3, batch=(5,)), torch.randn(5, 1, 2, **F64), torch.randn(5, 1, 2, **F64)
    rows = [
        likelihood_loss(MixturePotential(*(part[i] for part in batch[:3]), batch.epsilon), x0[i], x1[i])
        for i in range(5)
    ]
    torch.testing.assert_close(likelihood_loss(batch, x0, x1), torch.stack(rows).mean(), rtol=1e-12, atol=1e-12)


# The densities


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


@either
def test_the_source_decides_what_the_density_is(make):
    expected = {"point": "marginal", "draws": None, "law": "path"}
    for kind, source in sources().items():
        bridge = quick(make(2, num_components=3, epsilon=0.5), source=source)
        assert bridge.density == expected[kind]
        if kind != "point":
            with pytest.raises(NotImplementedError, match=r"draws\(\)"):
                bridge().log_prob(torch.zeros(2, **F64))
    with pytest.raises(NotImplementedError, match="Give a distribution as source"):
        quick(make(2, num_components=3, epsilon=0.5), source=sources()["draws"])().draws((5,))


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


# Oracles of the fit


@pytest.mark.slow
@pytest.mark.parametrize("make, steps", [(LightSB, 500), (LightSBM, 500)])
def test_a_known_plan_is_found(make, steps):
    pair = make_pair(2, 1.0, seed=0)
    bridge = make(2, num_components=8, covariance="full", epsilon=1.0)
    history = bridge.fit(
        pair.sample_target(20_000), pair.sample_source(20_000), num_updates=steps, learning_rate=0.02, progress=False
    )
    assert history.converged
    x0 = pair.sample_source(500)
    model, truth = (Moments(*m) for m in (bridge.plan_moments(x0), pair.conditional_moments(x0)))
    assert float(cbw2_uvp(model, truth, pair.target_variance)) < (0.2 if make is LightSB else 0.6)
    t = torch.tensor(0.5, **F64)
    gap = bridge.drift(t, x0) - pair.drift(t, x0)
    error = float((gap.square().sum() / pair.drift(t, x0).square().sum()).sqrt())
    assert error < (0.1 if make is LightSB else 0.2)  # matching is the noisier of the two


@full_or_not
def test_moment_steps_give_the_training_moments_exactly(covariance):
    # Where they stand still the plan carries the source's draws to the mean and the variances of the target's
    target, source = clusters(500), 0.5 + torch.randn(400, 2, **F64)
    bridge = LightSB(2, num_components=3, epsilon=0.5, covariance=covariance)
    history = bridge.fit(target, source, solver="moments", held_out=0.0, progress=False)
    assert history.converged and history.iterations == len(history.losses) == len(history.validation_losses)
    mean, cov = bridge.plan_moments(source)
    torch.testing.assert_close(mean.mean(0), target.mean(0), rtol=0, atol=5e-3)
    total = (cov + mean[:, :, None] * mean[:, None, :]).mean(0)
    second = target.T @ target / len(target)
    if covariance == "diagonal":
        total, second = total.diagonal(), second.diagonal()
    torch.testing.assert_close(total, second, rtol=0, atol=2e-2)


def test_draws_of_a_fitted_bridge_are_the_targets():
    target = clusters(10_000)
    bridge = LightSB(2, num_components=6, epsilon=1.0)
    bridge.fit(target, standard_normal(), num_updates=400, learning_rate=0.02, progress=False)
    draws, truth = bridge().sample((5000,)), clusters(5000)
    assert z_of_two(draws, truth).abs().max() < 4
    for k in range(3):
        shares = [(torch.cdist(x, CENTRES).argmin(1, keepdim=True) == k).double() for x in (draws, truth)]
        assert z_of_two(*shares).abs().max() < 4


def test_moment_steps_and_adam_agree():
    target, source, losses = clusters(3000), torch.randn(3000, 2, **F64), []
    for solver, steps in (("likelihood", 400), ("moments", None)):
        torch.manual_seed(1)  # the same draws are held out
        bridge = LightSB(2, num_components=3, epsilon=0.5)
        history = bridge.fit(target, source, solver=solver, num_updates=steps, learning_rate=0.02, progress=False)
        losses.append(min(history.validation_losses))
    assert abs(losses[0] - losses[1]) < 0.01


@pytest.mark.parametrize("solver", ["moments", "likelihood"])
def test_weights_are_duplicated_rows(solver):
    target, source = clusters(200), torch.randn(200, 2, **F64)
    counts = torch.randint(0, 4, (200,))
    counts[target[:, 0] > 0] *= 3  # far from equal between the clusters
    options = {"solver": solver, "held_out": 0.0, "num_updates": 100, "num_law_draws": 4000}
    torch.manual_seed(1)
    weighted = quick(LightSB(2, num_components=3, epsilon=0.5), target, source, weights=counts.double(), **options)
    torch.manual_seed(1)
    repeated = quick(LightSB(2, num_components=3, epsilon=0.5), target.repeat_interleave(counts, 0), source, **options)
    torch.testing.assert_close(weighted.location, repeated.location, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weighted.scale, repeated.scale, rtol=1e-12, atol=1e-12)
    x0 = torch.randn(50, 2, **F64)
    gap = weighted.plan_moments(x0)[0].mean(0) - repeated.plan_moments(x0)[0].mean(0)
    assert gap.abs().max() < (0.15 if solver == "moments" else 0.3)
    draws = [bridge().sample((4000,)) for bridge in (weighted, repeated)]
    shares = [(torch.cdist(d, CENTRES).argmin(1) == 0).double().mean() for d in draws]
    wanted = counts[target[:, 0] > 0].sum() / counts.sum()
    assert all(abs(share - wanted) < 0.06 for share in shares)


def test_with_nothing_held_out_the_judge_goes_by_the_weights():
    # held_out=0 judges by all draws, by their weights: the loss of duplicated rows, up to the judge's resampling
    target, source = clusters(3000), torch.randn(300, 2, **F64)
    counts = torch.ones(3000, dtype=torch.long)
    counts[target[:, 0] > 0] = 9
    losses = []
    for draws, weights in ((target, counts.double()), (target.repeat_interleave(counts, 0), None)):
        bridge = LightSB(2, num_components=1, epsilon=0.5)  # one component: the same potential for both
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            options = {"weights": weights, "solver": "moments", "held_out": 0.0, "num_updates": 2}
            history = bridge.fit(draws, source, progress=False, **options)
        assert history.losses[-1] == pytest.approx(losses[0][0] if losses else history.losses[-1], abs=1e-8)
        losses.append((history.losses[-1], history.validation_losses[-1]))
    assert losses[1][1] == pytest.approx(losses[1][0], abs=1e-8)  # all draws, however many
    assert losses[0][1] == pytest.approx(losses[0][0], abs=1e-8)


@pytest.mark.parametrize("kind", ["point", "draws", "law"])
@either
def test_the_fit_is_free_of_units_and_of_the_origin(make, kind):
    # 3 x data with 9 x epsilon gives 3 x draws
    shift = torch.tensor([5.0, -2.0], **F64)
    target, source = clusters(300), sources()[kind]
    moved = source
    if kind == "draws":
        moved = shift + 3 * source
    elif kind == "law":
        moved = MultivariateNormal(shift, 9 * torch.eye(2, **F64))
    draws, drifts, densities, x = [], [], [], torch.randn(20, 2, **F64)
    for factor, origin, data, start in ((1.0, 0.0 * shift, target, source), (3.0, shift, shift + 3 * target, moved)):
        torch.manual_seed(3)
        bridge = quick(make(2, num_components=3, epsilon=factor**2 * 0.5), data, start)
        draws.append((bridge().sample((100,)) - origin) / factor)
        drifts.append(bridge.drift(0.4, origin + factor * x) / factor)
        densities.append(bridge.plan(origin + factor * x).log_prob(origin + factor * x.flip(0)) + 2 * math.log(factor))
    for a, b in (draws, drifts, densities):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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


# Given a context


@pytest.mark.slow
@full_or_not
def test_a_linear_gaussian_posterior_is_recovered(covariance):
    # theta ~ N(0, I), y = theta_1 + theta_2 + noise: the posterior is N(y / (2 + s2), I - 11' / (2 + s2))
    noise, num = 0.5, 4000
    theta = torch.randn(num, 2, **F64)
    y = theta.sum(1, keepdim=True) + math.sqrt(noise) * torch.randn(num, 1, **F64)
    bridge = LightSB(
        2,
        num_components=2 if covariance == "full" else 5,
        epsilon=1.0,
        context_dim=1,
        covariance=covariance,
        hidden=(32,),
    )
    bridge.fit(theta, context=y, num_updates=500, learning_rate=5e-3, progress=False)
    given = torch.tensor([[-1.5], [0.0], [2.0]], **F64)
    draws = bridge(given).sample((20_000,))
    cov = torch.eye(2, **F64) - torch.ones(2, 2, **F64) / (2 + noise)
    for i in range(3):
        sample = draws[:, i]
        assert (sample.mean(0) - given[i] / (2 + noise)).abs().max() < 0.08
        assert (sample.T.cov() - cov).abs().max() < 0.08
    points, cell = plane(6.0, 81)
    mass = cell * bridge(given).log_prob(points[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(3, **F64), rtol=1e-6, atol=1e-6)
    exact = MultivariateNormal(given[1].expand(2) / (2 + noise), cov)
    x = exact.sample((4000,))
    assert (exact.log_prob(x) - bridge(given[1]).log_prob(x)).mean() < 0.03  # KL from the posterior


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


# Stopping, saving, warning


@either
def test_ctrl_c_keeps_what_was_learnt(make, tmp_path, monkeypatch):
    kind = type(SOLVERS[make.solvers[0]])
    bridge, original, calls = make(2, num_components=3, epsilon=0.5), kind.loss, iter(range(1, 1000))

    def loss(self, *args):
        if next(calls) == 60:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(kind, "loss", loss)
    with pytest.warns(RuntimeWarning, match=rf"interrupted: 59 of 200 updates of {make.__name__}"):
        history = bridge.fit(
            clusters(300), standard_normal(), num_updates=200, checkpoint=tmp_path / "stopped.pt", progress=False
        )
    assert history.iterations == 59 and not history.converged
    loaded = Bridge.load(tmp_path / "stopped.pt")
    x = torch.randn(5, 2, **F64)
    assert torch.equal(loaded.drift(0.5, x), bridge.drift(0.5, x))
    assert torch.isfinite(bridge().draws((10,)).log_q).all()


@either
def test_a_loss_that_is_not_finite_raises_and_leaves_a_bridge_that_works(make, monkeypatch):
    kind = type(SOLVERS[make.solvers[0]])
    bridge, original, calls = make(2, num_components=3, epsilon=0.5), kind.loss, iter(range(1, 1000))

    def loss(self, *args):
        return original(self, *args) * (math.nan if next(calls) == 30 else 1.0)

    monkeypatch.setattr(kind, "loss", loss)
    with pytest.raises(RuntimeError, match="finite, got nan at step 30.*learning_rate"):
        bridge.fit(clusters(300), num_updates=100, progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in bridge.parameters())
    assert torch.isfinite(bridge().draws((10,)).log_q).all()


def test_a_checkpoint_is_the_fitted_bridge(tmp_path):
    for solver in ("likelihood", "moments"):
        path = tmp_path / f"{solver}.pt"
        bridge = quick(LightSB(2, num_components=3, epsilon=0.5, covariance="full"), solver=solver, checkpoint=path)
        x = torch.randn(5, 2, **F64)
        assert torch.equal(Bridge.load(path)().log_prob(x), bridge().log_prob(x))


def test_a_loaded_bridge_asks_for_its_source(tmp_path):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5), source=standard_normal())
    bridge.save(tmp_path / "bridge.pt")
    loaded, x = Bridge.load(tmp_path / "bridge.pt"), torch.randn(5, 2, **F64)
    assert loaded.density == "path"
    for ask in (loaded().sample, loaded().draws, lambda: loaded.paths(3, 2)):
        with pytest.raises(RuntimeError, match=r"Write bridge\.source = "):
            ask()
    assert torch.equal(loaded.plan(x).log_prob(x), bridge.plan(x).log_prob(x))
    draws = []
    loaded.source = standard_normal()
    for each in (bridge, loaded):
        torch.manual_seed(5)
        draws.append(each().draws((7,)))
    assert torch.equal(draws[0].value, draws[1].value) and torch.equal(draws[0].log_q, draws[1].log_q)


def test_source_draws_are_saved(tmp_path):
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5), source=torch.randn(50, 2, **F64))
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert torch.equal(loaded.source_points, bridge.source_points) and loaded.density is None
    assert loaded().sample((4,)).shape == (4, 2)


def test_a_fit_that_has_not_converged_says_by_how_much_and_what_to_do():
    with pytest.warns(RuntimeWarning, match="moment steps have not converged.*after 3.*Raise num_updates"):
        LightSB(2, num_components=3, epsilon=0.5).fit(
            clusters(300), standard_normal(), solver="moments", num_updates=3, progress=False
        )
    context = torch.randn(300, 1, **F64)
    with pytest.warns(
        RuntimeWarning, match=r"LightSB has not converged: its loss fell by .* Raise num_updates \(now 40\)"
    ):
        LightSB(1, num_components=2, epsilon=0.1, context_dim=1).fit(
            3 * context + 0.1 * torch.randn(300, 1, **F64),
            context=context,
            num_updates=40,
            learning_rate=0.02,
            progress=False,
        )


def test_a_second_fit_forgets_the_first():
    target, bridge = clusters(300), LightSB(2, num_components=3, epsilon=0.5)
    quick(bridge, 100 + 7 * target, standard_normal())
    torch.manual_seed(2)
    quick(bridge, target)
    torch.manual_seed(2)
    fresh = quick(LightSB(2, num_components=3, epsilon=0.5), target)
    assert bridge.density == "marginal"
    same_bridge(bridge, fresh, torch.randn(5, 2, **F64), 1e-12)


def test_with_a_context_too_a_second_fit_forgets_the_first():
    target, context, bridge = (
        clusters(300),
        torch.randn(300, 1, **F64),
        LightSB(2, num_components=3, epsilon=0.5, context_dim=1),
    )
    quick(bridge, target, context=context, num_updates=100, learning_rate=0.05)
    before = [p.detach().clone() for p in bridge.parameters_of.net.layers.parameters() if p.dim() == 2]
    bridge.parameters_of.reset()
    after = [p for p in bridge.parameters_of.net.layers.parameters() if p.dim() == 2]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


# What a user may get wrong

BAD_ARGUMENTS = {
    "epsilon 0": ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0"),
    "epsilon negative": ({"epsilon": -1.0}, "epsilon must be positive"),
    "epsilon NaN": ({"epsilon": math.nan}, "epsilon must be positive"),
    "epsilon infinite": ({"epsilon": math.inf}, "epsilon must be positive and finite"),
    "no component": ({"num_components": 0}, "num_components must be at least 1, got 0"),
    "covariance": ({"covariance": "spherical"}, "covariance must be one of .*'diagonal', 'full'.*spherical"),
    "no axis": ({"dim": 0}, "dim must be at least 1"),
}
COLLINEAR = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), **F64)
COLLINEAR[:, 2] = 2 * COLLINEAR[:, 0]
FLAT = COLLINEAR * torch.tensor([1.0, 0.0, 1.0], **F64)
BAD_FITS = {
    "constant axis": (
        {"target": torch.randn(100, 3, **F64) * torch.tensor([1.0, 0.0, 1.0], **F64)},
        r"constant axes \[1\]",
    ),
    "constant far axis": (
        {"target": 1e3 + torch.randn(100, 3, **F64) * torch.tensor([1.0, 0.0, 1.0], **F64)},
        r"constant axes \[1\]",
    ),
    "narrow axis": (
        {"target": torch.randn(100, 3, **F64) * torch.tensor([1.0, 1.0, 1e-9], **F64)},
        r"well conditioned.*axis 2.*Rescale",
    ),
    "more components than draws": ({"target": torch.randn(4, 3, **F64)}, "num_components must be at most.*5 for 4"),
    "more components than learnt from": (
        {"target": torch.randn(40, 3, **F64), "held_out": 0.9},
        r"num_components must be at most.*5 for 4 \(of 40; 90% are held out\)",
    ),
    "source of another dimension": ({"source": torch.randn(100, 2, **F64)}, r"source must have shape \(draws, 3\)"),
    "source law of another dimension": ({"source": standard_normal(2)}, r"source .* shapes \(\) and \(3,\)"),
    "source law with a batch": (
        {"source": Normal(torch.zeros(3), torch.ones(3))},
        r"to_event\(1\)",
    ),
    "target law of another dimension": ({"target": standard_normal(2)}, r"target .* shapes \(\) and \(3,\)"),
    "source with NaN": ({"source": torch.full((10, 3), math.nan)}, "source must be finite"),
    "weights for a law": ({"target": standard_normal(3), "weights": torch.ones(5)}, "weights go with draws"),
    "solver": ({"solver": "sgd"}, "solver must be one of .*'likelihood', 'moments', 'matching'.*sgd"),
    "held out all": ({"held_out": 1.0}, r"held_out must lie in \[0, 1\), got 1"),
    "held out less than none": ({"held_out": -0.1}, "held_out must lie in"),
    "held out NaN": ({"held_out": math.nan}, "held_out must lie in"),
    "superfluous context": ({"context": torch.randn(100, 1)}, "context_dim = 0"),
    "no step": ({"num_updates": -1}, "num_updates must be at least 1"),
    "zero steps": ({"num_updates": 0}, "num_updates must be at least 1"),
    "learning rate": ({"learning_rate": -1.0}, "learning_rate must be positive, got -1"),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(bad):
    options, message = BAD_ARGUMENTS[bad]
    with pytest.raises(ValueError, match=message):
        LightSB(**({"dim": 3} | options))


@pytest.mark.parametrize("bad", BAD_FITS)
def test_bad_fits_are_refused(bad):
    options, message = BAD_FITS[bad]
    with pytest.raises(ValueError, match=message):
        LightSB(3, num_components=5).fit(**({"target": torch.randn(100, 3, **F64), "progress": False} | options))


def test_collinear_axes_are_named_where_components_are_full():
    with pytest.raises(ValueError, match=r"well conditioned.*axes \[(0, 2|2, 0).*covariance=\"diagonal\""):
        LightSB(3, num_components=5, covariance="full").fit(COLLINEAR, progress=False)
    quick(LightSB(3, num_components=5), COLLINEAR)  # diagonal components take it


def test_what_has_no_network_refuses_a_context():
    options = {"context": torch.randn(100, 1, **F64), "progress": False}
    with pytest.raises(ValueError, match='solver="moments" has no network'):
        LightSB(2, num_components=3, context_dim=1).fit(clusters(100), solver="moments", **options)
    with pytest.raises(ValueError, match="target must be draws where there is a context"):
        LightSB(2, num_components=3, context_dim=1).fit(standard_normal(), **options)


def test_bad_questions_are_refused():
    bridge = quick(LightSB(2, num_components=3, epsilon=0.5))
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            bridge.drift(t, torch.zeros(2, **F64))
    for ask in (bridge.transport, bridge.plan, bridge.marginal_log_prob, lambda x: bridge.volatility(0.5, x)):
        with pytest.raises(ValueError, match=r"shape \(\*, 2\), got \(5, 3\)"):
            ask(torch.zeros(5, 3, **F64))
