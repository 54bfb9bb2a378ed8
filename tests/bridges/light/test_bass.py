"""LightSBBM: the Gaussian oracle, ascent of the dual, exact densities through the map, and its SDE."""

import functools
import math
import warnings

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sb.bridges import Bridge, LightSB, LightSBBM
from pyro_sb.bridges.light import fit
from pyro_sb.bridges.light.bass import CANDIDATES
from pyro_sb.bridges.light.fit import DualLoss, begin, read_ends
from pyro_sb.bridges.light.laws import MixtureLaws
from pyro_sb.ops.closed_form import alternating_bass_scalar, bass_gain, commuting_bass_bridge
from tests.bridges.light.fits import CENTRES, bumps, clusters, full_or_not, quick, scaled, standard_normal, z_of_two
from tests.ops.potentials import F64


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """Fewer pairs than a real fit inverts at once: its inverses are as exact."""
    monkeypatch.setattr(fit, "POOL", 512)


def gain_of(bridge):
    """S of a bridge with one component, along its axes."""
    scales = bridge.parameters_of(None, 1.0).scales.detach()[0]
    return scales if scales.dim() == 1 else torch.linalg.eigvalsh(scales)


PAIRS = [(0.1, 2.0), (0.1, 10.0), (0.5, 1.5), (0.5, 10.0), (2.0, 2.0), (10.0, 1.5), (10.0, 100.0)]


@full_or_not
@pytest.mark.parametrize("s2, beta", PAIRS)
def test_the_moment_solver_finds_the_gaussian_bridge(s2, beta, covariance):
    source, target = scaled(200, 1.0), scaled(200, s2)
    bridge = LightSBBM(1, num_components=1, epsilon=1.0, beta=beta, covariance=covariance)
    history = bridge.fit(target, source, solver="moments", held_out=0.0, progress=False)
    one, variance = torch.ones(1, 1, **F64), torch.tensor([[s2]], **F64)
    oracle = commuting_bass_bridge(one, variance, 1.0, beta)
    assert history.converged
    torch.testing.assert_close(gain_of(bridge), oracle.gain, rtol=1e-4, atol=0)
    x = torch.tensor([[-1.0], [2.0]], **F64)
    for t in (0.0, 0.5, 1.0):
        drift = bridge.drift(t, x)
        torch.testing.assert_close(drift, oracle.drift_coefficient(t) * x, rtol=1e-3, atol=1e-3 * math.sqrt(s2))
        sigma = bridge.volatility(t, x)[..., 0]
        torch.testing.assert_close(sigma, oracle.diffusion_coefficient(t).expand(2, 1), rtol=1e-3, atol=0)


def test_pairs_where_the_plain_alternation_is_lost_are_among_them():
    one = torch.ones((), **F64)
    lost = []
    for s2, beta in PAIRS:
        last = alternating_bass_scalar(one, s2 * one, 1.0, beta, 200)[-1]
        lost.append(abs(float(last / bass_gain(one, s2 * one, 1.0, beta)) - 1) > 0.01)
    assert sum(lost) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("s2, beta", [(0.1, 2.0), (10.0, 10.0)])
def test_the_dual_solver_finds_the_gaussian_bridge(s2, beta):
    bridge, one = LightSBBM(1, num_components=1, epsilon=1.0, beta=beta), torch.ones(1, **F64)
    source = MultivariateNormal(torch.zeros(1, **F64), torch.eye(1, **F64))
    target = MultivariateNormal(torch.zeros(1, **F64), s2 * torch.eye(1, **F64))
    bridge.fit(target, source, num_updates=200, learning_rate=0.03, progress=False)
    torch.testing.assert_close(gain_of(bridge), bass_gain(one, s2 * one, 1.0, beta), rtol=0.05, atol=0)
    x0 = source.sample((20_000,))
    x1 = bridge.transport(x0)
    cov = torch.cat([x0, x1], 1).T.cov()
    oracle = commuting_bass_bridge(one[None], s2 * one[None], 1.0, beta)
    assert float(cov[1, 1]) == pytest.approx(s2, rel=0.05)
    assert abs(float(cov[0, 1] - oracle.cross_covariance)) < 0.05 * math.sqrt(s2)


@full_or_not
def test_in_the_plane_axes_are_bridges_of_their_own(covariance):
    variances = torch.tensor([0.3, 4.0], **F64)
    source, target = scaled(400, 1.0, 2), scaled(400, variances, 2)
    bridge = LightSBBM(2, num_components=1, epsilon=1.0, beta=3.0, covariance=covariance)
    for x in (source, target):  # whitened: the draws' covariances are diagonal, so they commute
        root = torch.linalg.cholesky(x.T @ x / len(x))
        x.copy_(torch.linalg.solve_triangular(root, x.T, upper=False).T * x.std(0, correction=0))
    bridge.fit(target, source, solver="moments", held_out=0.0, progress=False)
    expected = bass_gain(torch.ones(2, **F64), variances, 1.0, 3.0)
    torch.testing.assert_close(gain_of(bridge), expected, rtol=1e-3, atol=0)


def test_from_a_point_to_the_normal_law_there_is_nothing_to_pay():
    # delta_0 -> N(0, 1): drift 0 and volatility 1, the reference itself
    bridge, x = LightSBBM(1, num_components=1, epsilon=1.0, beta=2.0), torch.tensor([[-2.0], [0.5]], **F64)
    bridge.fit(scaled(500, 1.0), solver="moments", held_out=0.0, progress=False)
    for t in (0.0, 0.3, 1.0):
        assert bridge.drift(t, x).abs().max() < 1e-3
        torch.testing.assert_close(bridge.volatility(t, x)[..., 0], torch.ones(2, 1, **F64), rtol=1e-3, atol=0)
    target = MultivariateNormal(torch.zeros(1, **F64), torch.eye(1, **F64))
    torch.testing.assert_close(bridge().log_prob(x), target.log_prob(x), rtol=0, atol=2e-3)


@full_or_not
@pytest.mark.parametrize("beta", [1.5, 10.0])
def test_the_moment_solver_never_descends_and_keeps_the_floor(beta, covariance):
    target, source = (x - x.mean(0) for x in (clusters(100), torch.randn(100, 2, **F64)))
    bridge = LightSBBM(2, num_components=3, epsilon=0.5, beta=beta, covariance=covariance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        history = bridge.fit(target, source, solver="moments", held_out=0.0, num_updates=6, progress=False)
    assert min(history.residuals) >= 0 and len(history.losses) == history.iterations
    assert all(later <= earlier for earlier, later in zip(history.losses, history.losses[1:]))
    assert -bridge.dual(source, target) / bridge.epsilon == pytest.approx(history.losses[-1], abs=1e-6)
    scales = bridge.parameters_of(None, 1.0).scales.detach()
    scales = scales if covariance == "full" else torch.diag_embed(scales)
    assert torch.linalg.eigvalsh(scales).min() >= 1.05 / (1 + beta)


@pytest.mark.parametrize("solver", ["dual", "moments"])
@full_or_not
def test_the_floor_holds_after_a_fit_of_what_is_concentrated(solver, covariance):
    target = torch.cat([0.01 * torch.randn(100, 2, **F64), 1 + 0.01 * torch.randn(100, 2, **F64)])
    bridge = LightSBBM(2, num_components=2, epsilon=1.0, beta=2.0, covariance=covariance)
    quick(bridge, target, standard_normal(), solver=solver, num_updates=5, num_law_draws=200)
    scales = bridge.parameters_of(None, 1.0).scales.detach()
    scales = scales if covariance == "full" else torch.diag_embed(scales)
    assert torch.linalg.eigvalsh(scales).min() >= 1.05 / 3 - 1e-12
    x = torch.randn(50, 2, **F64)
    assert torch.isfinite(bridge.plan(x).log_prob(x)).all()


def test_the_dual_is_in_squared_units_of_the_data():
    # x by 3 with epsilon by 9: G by 9; the place of the origin is free where both sides move
    target, source, duals = clusters(200), torch.randn(200, 2, **F64), []
    shift = torch.tensor([4.0, -1.0], **F64)
    for factor, origin in ((1.0, 0 * shift), (3.0, shift)):
        torch.manual_seed(3)
        bridge = quick(
            LightSBBM(2, num_components=3, epsilon=0.5 * factor**2, beta=5.0),
            origin + factor * target,
            origin + factor * source,
        )
        duals.append(bridge.dual(origin + factor * source, origin + factor * target))
    assert duals[1] == pytest.approx(9 * duals[0], rel=1e-7)


def test_no_other_potential_has_a_higher_dual():
    target, source = clusters(100), torch.randn(100, 2, **F64)
    best = quick(
        LightSBBM(2, num_components=3, epsilon=0.5, beta=5.0),
        target,
        source,
        solver="moments",
        held_out=0.0,
        num_updates=15,
    )
    top = best.dual(source, target)
    for seed in range(3):
        torch.manual_seed(seed)
        other = quick(LightSBBM(2, num_components=3, epsilon=0.5, beta=5.0), clusters(150), source, num_updates=3)
        assert other.dual(source, target) <= top


@pytest.mark.parametrize("solvers", [("likelihood", "dual"), ("moments", "moments")], ids="-".join)
def test_infinite_beta_is_lightsb(solvers):
    target, source = clusters(300), torch.randn(300, 2, **F64)
    bridges = []
    for make, solver in zip((LightSB, functools.partial(LightSBBM, beta=math.inf)), solvers):
        torch.manual_seed(1)
        bridges.append(quick(make(2, num_components=3, epsilon=0.5), target, source, solver=solver))
    x = torch.randn(20, 2, **F64)
    for ask in (lambda b: b.drift(0.3, x), lambda b: b.plan(x).log_prob(x.flip(0)), lambda b: b.plan_moments(x)[1]):
        torch.testing.assert_close(ask(bridges[0]), ask(bridges[1]), rtol=1e-12, atol=1e-12)


def test_large_beta_tends_to_lightsb():
    target, source, x = clusters(300), torch.randn(300, 2, **F64), torch.randn(20, 2, **F64)
    gaps = []
    for beta in (1e3, 1e5):
        bridges = []
        for b in (beta, math.inf):
            torch.manual_seed(1)
            bridges.append(
                quick(
                    LightSBBM(2, num_components=3, epsilon=0.5, beta=b),
                    target,
                    source,
                    solver="moments",
                    num_updates=1,
                    held_out=0.0,
                )
            )
        bridges[1].parameters_of.load_state_dict(bridges[0].parameters_of.state_dict())
        gaps.append(float((bridges[0].drift(0.5, x) - bridges[1].drift(0.5, x)).abs().max()))
    assert gaps[1] < 0.02 * gaps[0]


@pytest.mark.parametrize("beta", [1.5, 10.0])
@full_or_not
def test_from_a_point_the_density_is_normalised(beta, covariance):
    bridge = quick(LightSBBM(1, num_components=3, epsilon=0.5, beta=beta, covariance=covariance), bumps(300))
    x = torch.linspace(-12, 12, 6001, **F64)[:, None]
    density = bridge().log_prob(x).exp()
    assert bridge.density == "marginal"
    assert float(density.sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(bridge.marginal_log_prob(x), bridge().log_prob(x), rtol=1e-10, atol=1e-10)
    draws = bridge().sample((20_000,))  # and they are its draws
    cdf = (density * (x[1] - x[0])).cumsum(0)
    at = cdf[torch.searchsorted(x[:, 0], draws[:, 0].sort().values).clamp_max(6000)]
    ranks = (torch.arange(20_000, **F64) + 0.5) / 20_000
    assert (at - ranks).abs().max() * math.sqrt(20_000) < 2.2


@full_or_not
def test_in_the_plane_the_plan_is_normalised_from_every_point(covariance):
    bridge = quick(
        LightSBBM(2, num_components=3, epsilon=0.5, beta=3.0, covariance=covariance), source=standard_normal()
    )
    axis = torch.linspace(-8, 8, 101, **F64)
    points, x0 = torch.cartesian_prod(axis, axis), torch.randn(2, 2, **F64)
    mass = float(axis[1] - axis[0]) ** 2 * bridge.plan(x0).log_prob(points[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(2, **F64), rtol=1e-6, atol=1e-6)
    draws = bridge.plan(x0).sample((5000,))
    for i in range(2):
        z = (draws[:, i].mean(0) - mass[:, i] @ points) / draws[:, i].std(0) * math.sqrt(5000)
        assert z.abs().max() < 4


@pytest.mark.parametrize("source", [None, "law"])
def test_weights_correct_exactly(source):
    bridge, num = (
        quick(LightSBBM(2, num_components=3, epsilon=1.0, beta=3.0), source=source and standard_normal()),
        2000,
    )
    p = MultivariateNormal(CENTRES[0], 0.12 * torch.eye(2, **F64))
    value, log_q = bridge().draws((num,))
    weights = (p.log_prob(value) - log_q).exp()
    assert 0.05 < weights.std() < 10
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(num)


def test_given_a_context_the_density_is_normalised():
    context = torch.randn(300, 1, **F64)
    bridge = quick(
        LightSBBM(1, num_components=3, epsilon=0.5, beta=3.0, context_dim=1),
        context + 0.3 * bumps(300),
        context=context,
    )
    x, given = torch.linspace(-15, 15, 3001, **F64)[:, None], torch.tensor([[-1.0], [0.5]], **F64)
    mass = bridge(given).log_prob(x[:, None]).exp() * (x[1] - x[0])
    torch.testing.assert_close(mass.sum(0), torch.ones(2, **F64), rtol=1e-8, atol=1e-8)
    with pytest.raises(NotImplementedError, match="dual has no context"):
        bridge.dual(x, x)


@full_or_not
def test_volatility_is_symmetric_and_positive_and_drift_is_a_gradient(covariance):
    bridge, x = (
        quick(LightSBBM(2, num_components=3, epsilon=0.5, beta=1.5, covariance=covariance)),
        3 * torch.randn(100, 2, **F64),
    )
    for t in (0.0, 0.5, 1.0):
        sigma = bridge.volatility(t, x)
        torch.testing.assert_close(sigma, sigma.mT, rtol=1e-12, atol=1e-12)
        assert torch.linalg.eigvalsh(sigma).min() > 0
        # D^2 V = grad alpha and sigma = sqrt(eps) (I - D^2 V / beta)^-1
        steps = 1e-4 * torch.eye(2, **F64)
        slope = torch.stack([(bridge.drift(t, x + e) - bridge.drift(t, x - e)) / 2e-4 for e in steps], -1)
        torch.testing.assert_close(slope, slope.mT, rtol=1e-5, atol=1e-5)
        inverse = math.sqrt(0.5) * torch.linalg.inv(sigma)
        torch.testing.assert_close(torch.eye(2, **F64) - slope / 1.5, inverse, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_paths_solve_the_sde_of_drift_and_volatility():
    num, steps = 3000, 40
    bridge = quick(LightSBBM(2, num_components=3, epsilon=1.5, beta=2.0), source=standard_normal())
    _, states = bridge.paths(num, 4)
    x = standard_normal().sample((num,))
    assert z_of_two(states[0], x).abs().max() < 4
    for k in range(steps):
        if k == steps // 2:
            assert z_of_two(states[2], x).abs().max() < 4
        sigma = bridge.volatility(k / steps, x)
        noise = (sigma @ torch.randn_like(x)[..., None])[..., 0]
        x = x + bridge.drift(k / steps, x) / steps + noise / math.sqrt(steps)
    assert z_of_two(states[-1], x).abs().max() < 4.5
    assert z_of_two(states[-1], bridge.transport(states[0])).abs().max() < 4
    pairs = [torch.cat([a, b], -1) for a, b in ((states[0], states[-1]), (states[0], bridge.transport(states[0])))]
    assert z_of_two(*pairs).abs().max() < 4


def test_paths_begin_at_the_sources_draws():
    source = torch.randn(100, 2, **F64)
    bridge = quick(LightSBBM(2, num_components=3, epsilon=0.5, beta=3.0), source=source)
    _, states = bridge.paths(300, 3)
    assert (states[0][:, None] - source).abs().amax(-1).min(1).values.max() < 1e-12
    assert bridge.density is None


@pytest.mark.parametrize("kind", ["point", "draws"])
def test_the_fit_is_free_of_units_and_of_the_origin(kind):
    shift, target = torch.tensor([5.0, -2.0], **F64), clusters(300)
    source, draws, sigmas = None if kind == "point" else torch.randn(200, 2, **F64), [], []
    for factor, origin in ((1.0, 0.0 * shift), (3.0, shift)):
        torch.manual_seed(3)
        start = None if source is None else origin + factor * source
        bridge = quick(
            LightSBBM(2, num_components=3, epsilon=factor**2 * 0.5, beta=3.0), origin + factor * target, start
        )
        draws.append((bridge().sample((100,)) - origin) / factor)
        sigmas.append(bridge.volatility(0.4, origin + factor * target[:20]) / factor)
    torch.testing.assert_close(*draws, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [3.0, 1e5])
def test_a_pool_never_moves_the_points_it_inverts(beta):
    bridge = quick(LightSBBM(2, num_components=3, epsilon=0.5, beta=beta), num_updates=1)
    ends = read_ends(bridge, clusters(300), standard_normal(), None, None, 1000, 0.1)
    loss = DualLoss(begin(bridge, ends), ends, 64)
    loss()
    before = [loss.pool.pairs.x0.clone(), loss.pool.pairs.x1.clone()]
    loss.pool._queue = torch.arange(64)  # every later minibatch is this one
    loss()
    assert torch.equal(loss.pool.pairs.x0, before[0]) and torch.equal(loss.pool.pairs.x1, before[1])


@pytest.mark.slow
def test_auto_takes_a_candidate_by_its_score():
    bridge = LightSBBM(1, num_components=2, epsilon=1.0, beta="auto")
    quick(bridge, scaled(400, 0.2), scaled(400, 1.0), num_updates=50)
    assert bridge.beta in CANDIDATES and set(bridge.scores) == set(CANDIDATES)
    assert all(math.isfinite(score) for score in bridge.scores.values())
    with pytest.raises(ValueError, match='beta="auto" needs solver="dual"'):
        LightSBBM(1, num_components=2, epsilon=1.0, beta="auto").fit(scaled(100, 1.0), solver="moments", progress=False)


@pytest.mark.parametrize(
    ("means", "choice"),
    [
        ((-9.0, 0.0, -0.01, -0.02, -9.0), 100.0),
        ((-9.0, 0.0, -9.0, -9.0, -9.0), 5.0),
        ((-9.0, -0.02, -9.0, -9.0, 0.0), math.inf),
    ],
)
def test_auto_takes_the_largest_within_a_standard_error_of_the_best(monkeypatch, means, choice):
    noise = torch.randn(60, **F64)  # gaps to the best have a standard error of about .1 but for their means
    scores = iter([mean + torch.randn(60, **F64) * 0.8 + noise - noise.mean() for mean in means])
    centred = (score - score.mean() + mean for score, mean in zip(scores, means))
    monkeypatch.setattr(MixtureLaws, "mean_log_prob", lambda *args: next(centred))
    bridge = LightSBBM(1, num_components=2, epsilon=1.0, beta="auto")
    quick(bridge, scaled(600, 0.5), num_updates=5)
    assert bridge.beta == choice


def test_auto_survives_saving(tmp_path):
    bridge = quick(LightSBBM(1, num_components=2, epsilon=1.0, beta="auto"), scaled(100, 0.2), num_updates=10)
    bridge.save(tmp_path / "bridge.pt")
    loaded, x = Bridge.load(tmp_path / "bridge.pt"), torch.randn(5, 1, **F64)
    assert loaded.beta == bridge.beta
    assert torch.equal(loaded().log_prob(x), bridge().log_prob(x))


def test_the_alternating_solver_has_no_density(tmp_path):
    bridge = quick(
        LightSBBM(2, num_components=3, epsilon=0.5, beta=5.0),
        source=standard_normal(),
        solver="alternating",
        num_updates=50,
    )
    assert bridge.density is None
    x = torch.randn(4, 2, **F64)
    for ask in (lambda: bridge().log_prob(x), lambda: bridge().draws((3,)), lambda: bridge.plan(x).log_prob(x)):
        with pytest.raises(NotImplementedError, match='solver="alternating"'):
            ask()
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert loaded.density is None
    draws = []
    for each in (bridge, loaded):
        torch.manual_seed(0)
        draws.append(each.transport(x))
    assert torch.equal(*draws) and torch.isfinite(draws[0]).all()
    assert torch.equal(loaded.drift(0.5, x), bridge.drift(0.5, x))
    quick(bridge, source=standard_normal())  # and fitted again it has one
    assert bridge.density == "path" and torch.isfinite(bridge().draws((3,)).log_q).all()


def test_after_the_alternating_solver_nothing_pretends_to_be_exact():
    bridge = quick(
        LightSBBM(2, num_components=3, epsilon=0.5, beta=5.0),
        source=standard_normal(),
        solver="alternating",
        num_updates=50,
    )
    x = torch.randn(4, 2, **F64)
    for ask in (bridge.marginal_log_prob, lambda x: bridge.log_prob_from(x, x), lambda x: bridge.dual(x, x)):
        with pytest.raises(NotImplementedError, match="alternating"):
            ask(x)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0, -2.0, math.nan])
def test_beta_must_be_above_one(beta):
    with pytest.raises(ValueError, match=rf"beta must be above 1, got {beta}"):
        LightSBBM(2, beta=beta)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="beta must be a number above 1 or \"auto\", got 'best'"):
        LightSBBM(2, beta="best")
    target, context = clusters(100), torch.randn(100, 1, **F64)
    with pytest.raises(ValueError, match="solver must be one of .*'moments', 'dual', 'alternating'.*'matching'"):
        LightSBBM(2, num_components=3).fit(target, solver="matching", progress=False)
    for solver in ("moments", "alternating"):
        with pytest.raises(ValueError, match=f'solver="{solver}" has no network'):
            LightSBBM(2, num_components=3, context_dim=1).fit(target, context=context, solver=solver, progress=False)
    with pytest.raises(ValueError, match="needs a finite beta, got inf. Use LightSBM"):
        LightSBBM(2, num_components=3, beta=math.inf).fit(target, solver="alternating", progress=False)
    bridge = quick(LightSBBM(2, num_components=3, beta=3.0))
    with pytest.raises(NotImplementedError, match=r"beta = inf, got beta = 3.*plan\(x0\)\.sample"):
        bridge.plan_moments(torch.zeros(2, **F64))
    with pytest.raises(NotImplementedError, match="beta = inf, got beta = 3"):
        bridge.condition([0], [1.0])


def test_a_moment_fit_that_has_not_converged_says_so():
    with pytest.warns(RuntimeWarning, match=r"moment steps have not converged: G still rose by .* Raise num_updates"):
        LightSBBM(2, num_components=3, epsilon=0.5, beta=3.0).fit(
            clusters(150), torch.randn(150, 2, **F64), solver="moments", num_updates=2, progress=False
        )


def test_an_axis_too_narrow_for_beta_is_named():
    draws = torch.randn(400, 2, **F64) * torch.tensor([1.0, 1e-4], **F64)
    with pytest.warns(RuntimeWarning, match=r"narrowest axis .* beta = 10 no component is narrower.* Raise beta"):
        LightSBBM(2, num_components=2).fit(draws, num_updates=5, progress=False)
