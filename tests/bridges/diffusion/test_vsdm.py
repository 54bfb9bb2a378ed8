"""VSDM and SGM: their drift, their moments, their densities, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from pyro_sb.bridges import SGM, VSDM, Bridge, Sampler
from pyro_sb.bridges.diffusion.adapt import best_matrix, project, step_size
from pyro_sb.bridges.diffusion.network import factor_covariance, factor_loss
from pyro_sb.nn import SetEmbedding
from pyro_sb.ops.closed_form import gaussian_bridge
from pyro_sb.ops.linear_sde import LinearSDE, Schedule, fixed_point_rates, preconditioning, start_covariance
from pyro_sb.ops.solvers import Conditional, Flow, flow_change

F64 = {"dtype": torch.float64}
SMALL = {"hidden": (16, 16), "covariance_hidden": (16, 16)}


def whitened(num, dim):
    x = torch.randn(num, dim, **F64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / num)
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


def quick(bridge, draws, **options):
    bridge.fit(draws, **({"num_updates": 20, "progress": False, "held_out": 0.0} | options))
    return bridge


def stretched(num=400):
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], **F64)
    return (torch.randn(num, 2, **F64) * torch.tensor([0.5, 8.0], **F64)) @ turn.T + 3.0


def test_on_whitened_data_it_is_the_score_model():
    draws, laws = whitened(300, 3), []
    for kind in (VSDM, SGM):
        torch.manual_seed(3)
        bridge = quick(kind(3, **SMALL), draws)
        torch.testing.assert_close(bridge.drift_matrix, torch.eye(3, **F64), rtol=0, atol=1e-9)
        laws.append(bridge().draws((50,)))
    torch.testing.assert_close(laws[0].value, laws[1].value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(laws[0].log_q, laws[1].log_q, rtol=1e-6, atol=1e-6)


def test_on_stretched_data_the_drift_is_no_multiple_of_the_identity_and_has_the_target_s_axes():
    draws = stretched()
    bridge = quick(VSDM(2, **SMALL), draws)
    matrix, covariance = bridge.drift_matrix, draws.T.cov(correction=0)
    torch.testing.assert_close(matrix @ covariance, covariance @ matrix, rtol=1e-8, atol=1e-8)
    values = torch.linalg.eigvalsh(matrix)
    assert values[1] / values[0] > 1.3
    last = bridge.sde.at(torch.ones((), **F64))
    noised = last.factor[:, None] * bridge.covariance * last.factor + last.variance.diag()
    torch.testing.assert_close(noised, torch.eye(2, **F64), rtol=0, atol=1e-8)  # the source is standard normal
    assert torch.equal(quick(SGM(2, **SMALL), draws).rates, torch.ones(2, **F64))


@pytest.mark.parametrize("drift", ["tolerance", "matrix"])
def test_other_drifts(drift):
    draws, given = stretched(), torch.tensor([[2.0, 0.5], [0.5, 1.0]], **F64)
    bridge = quick(VSDM(2, drift_matrix=given if drift == "matrix" else drift, **SMALL), draws)
    if drift == "matrix":
        torch.testing.assert_close(bridge.drift_matrix, given, rtol=1e-9, atol=1e-9)
    else:
        left = bridge.sde.at(torch.ones((), **F64)).factor * bridge.covariance.diagonal().sqrt()
        torch.testing.assert_close(left, torch.full_like(left, 0.05), rtol=1e-6, atol=0)
    # whatever D: the untrained net is the exact denoiser of a Gaussian with these moments, if D shares its axes
    mean = bridge.paths(4000, 4)[1][-1].mean(0)
    assert (mean - draws.mean(0)).abs().max() < 5 * 8 / math.sqrt(4000)


def test_untrained_it_is_the_gaussian_with_the_target_s_moments():
    # the net starts at zero, where denoiser, covariance and flow are those of a Gaussian target: all densities agree
    draws = stretched()
    bridge = quick(VSDM(2, **SMALL), draws, num_updates=1, learning_rate=1e-12)
    bridge.log_errors.zero_()
    law = torch.distributions.MultivariateNormal(draws.mean(0), draws.T.cov(correction=0))
    for num_steps in (1, 3, 20):
        bridge.sampler = Sampler(path_steps=num_steps)
        path = bridge().draws((100,))
        torch.testing.assert_close(path.log_q, law.log_prob(path.value), rtol=1e-5, atol=1e-5)
        bound = bridge.path_log_prob(path.value, num_paths=2)
        torch.testing.assert_close(bound, law.log_prob(path.value), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bridge().log_prob(path.value), law.log_prob(path.value), rtol=1e-5, atol=1e-5)


def test_the_noised_gaussian_is_near_the_schroedinger_bridge():
    # Gaussian check of the paper: N((-8, 2), [[1, 1], [1, 5]]) to N(0, I), b_max 4, r 0. A Brownian motion in the
    # clock e^W - 1 scaled by e^(-W/2) is the VP reference: the closed-form bridge follows. Both ends are met exactly;
    # between them a static A is the best constant, not the exact one.
    schedule = Schedule(4.0, 4.0, 0.0)
    mean, covariance = torch.tensor([-8.0, 2.0], **F64), torch.tensor([[1.0, 1.0], [1.0, 5.0]], **F64)
    values, basis = torch.linalg.eigh(covariance)
    sde = LinearSDE(fixed_point_rates(values, schedule.total), schedule)
    total = math.exp(schedule.total)
    eye = torch.eye(2, **F64)
    exact = gaussian_bridge(mean, covariance, torch.zeros(2, **F64), total * eye, total - 1)
    for tau in (0.05, 0.2, 0.5, 0.8, 1.0):
        law = sde.at(torch.tensor(tau, **F64))
        ours = basis * (law.factor**2 * values + law.variance) @ basis.T
        clock = math.exp(schedule.total * tau)
        theirs = exact.marginal((clock - 1) / (total - 1))[1] / clock
        assert (ours - theirs).norm() / theirs.norm() < (1e-9 if tau == 1.0 else 0.06)


@pytest.mark.slow
def test_the_stochastic_approximation_finds_the_closed_form():
    # Gaussian target, exact score, zeta 1, source N(0, I): sheet 1.6
    variances = torch.tensor([0.05, 4.37, 50.0], **F64)
    sde = LinearSDE(torch.ones(3, **F64), Schedule())
    basis = torch.eye(3, **F64)
    covariance = variances.diag()
    for stage in range(60):
        rotated = (basis.T @ covariance @ basis).diagonal()

        def exact(tau, x, sde=sde, v=rotated):
            scale = preconditioning(sde.at(tau), v)
            return Conditional(scale.skip * x, (scale.out**2).expand_as(x))

        best = best_matrix(exact, sde, sde.grid(60, 1e-3), torch.randn(2000, 3, **F64))
        present = 0.5 * (torch.eye(3, **F64) - basis * sde.rates @ basis.T)
        best = basis @ best @ basis.T
        off = best - best.diagonal().diag()
        assert off.abs().max() < 0.3
        basis, rates = project(torch.lerp(present, best.diagonal().diag(), step_size(stage)))
        sde = LinearSDE(rates, sde.schedule)
    found = (basis * sde.rates @ basis.T).diagonal()
    wanted = fixed_point_rates(variances, Schedule().total)
    assert bool(((found - wanted).abs() < 0.03 + 0.2 * (1 - wanted).abs()).all()), (found, wanted)  # wide ones are slow


def test_robbins_and_monro():
    steps = torch.tensor([step_size(k) for k in range(100_000)], **F64)
    assert bool((steps > 0).all()) and bool((steps.diff() <= 0).all())
    late = steps[50_000:]
    assert late.sum() > 5 and late.square().sum() < 0.02  # the one series diverges, the other does not


def test_the_stochastic_drift_keeps_its_history():
    bridge = VSDM(2, drift_matrix="stochastic", **SMALL)
    history = bridge.fit(stretched(), num_updates=40, num_stages=10, progress=False)
    assert bridge.rates_history.shape == (11, 2) and len(history.residuals) == 10
    torch.testing.assert_close(bridge.rates_history[-1], bridge.rates)
    assert not torch.equal(bridge.rates_history[0], bridge.rates_history[-1])


def test_weights_move_the_law_and_a_mask_says_who_judges():
    draws = torch.cat([torch.randn(300, 1, **F64) - 5, torch.randn(300, 1, **F64) + 5])
    weights = torch.cat([torch.full((300,), 3.0), torch.ones(300)])
    bridge = quick(VSDM(1, **SMALL), draws, weights=weights)
    assert float(bridge.location) == pytest.approx(-2.5, abs=0.3)
    mask = torch.zeros(600, dtype=torch.bool)
    mask[300:] = True
    bridge = quick(VSDM(1, **SMALL), draws, held_out=mask)
    assert float(bridge.location) == pytest.approx(float(draws[:300].mean()), abs=1e-9)


def test_the_affine_part_of_the_context_is_folded_in():
    context = torch.randn(500, 3, **F64)
    slope = torch.randn(2, 3, **F64)
    draws = context @ slope.T + 4 + 0.1 * torch.randn(500, 2, **F64)
    bridge = quick(VSDM(2, context_dim=3, **SMALL), draws, context=context)
    ends = bridge(5 * torch.eye(3, **F64)).sample((200,)).mean(0)
    assert (ends - 5 * slope.T - 4).abs().max() < 0.2
    assert float(bridge.covariance.diagonal().max()) < 0.02  # D sees what the regression leaves


def test_exchangeable_observations_may_come_in_any_order():
    context = torch.randn(300, 8, **F64)
    draws = context.unflatten(1, (4, 2)).mean(1) + 0.1 * torch.randn(300, 2, **F64)
    bridge = quick(VSDM(2, context_dim=8, embedding=SetEmbedding(2, 5, hidden=(8,)), **SMALL), draws, context=context)
    x, one = torch.randn(6, 2, **F64), context[0]
    other = one.unflatten(0, (4, 2))[[2, 0, 3, 1]].flatten()
    torch.testing.assert_close(bridge.drift(0.5, x, one), bridge.drift(0.5, x, other), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="multiple of the embedding's item_dim"):
        quick(VSDM(2, context_dim=7, embedding=SetEmbedding(2, 5), **SMALL), draws, context=context[:, :7])


def test_an_embedding_is_trained_and_saved(tmp_path):
    context = torch.randn(300, 4, **F64)
    draws = context[:, :2] ** 2 + 0.1 * torch.randn(300, 2, **F64)
    embedding = SetEmbedding(2, 3, hidden=(8,))
    before = [p.detach().clone().double() for p in embedding.parameters()]
    bridge = quick(VSDM(2, context_dim=4, embedding=embedding, **SMALL), draws, context=context, ema=None)
    assert any(not torch.equal(a, b) for a, b in zip(before, embedding.parameters()))
    bridge.save(tmp_path / "set.pt")
    loaded, x = Bridge.load(tmp_path / "set.pt"), torch.randn(5, 2, **F64)
    assert torch.equal(loaded.drift(0.4, x, context[0]), bridge.drift(0.4, x, context[0]))


def test_a_user_s_embedding_says_how_to_load(tmp_path):
    context = torch.randn(200, 4, **F64)
    draws = context[:, :2] + 0.1 * torch.randn(200, 2, **F64)
    bridge = quick(
        VSDM(2, context_dim=4, embedding=nn.Sequential(nn.Linear(4, 3), nn.Tanh()), **SMALL), draws, context=context
    )
    bridge.save(tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r'Sequential.*embedding=\.\.\..*weights_only=True\)\["state"\]'):
        Bridge.load(tmp_path / "own.pt")
    fresh = VSDM(2, context_dim=4, embedding=nn.Sequential(nn.Linear(4, 3), nn.Tanh()), **SMALL)
    fresh.load_state_dict(torch.load(tmp_path / "own.pt", weights_only=True)["state"])
    x = torch.randn(5, 2, **F64)
    assert torch.equal(fresh.drift(0.4, x, context[0]), bridge.drift(0.4, x, context[0]))


def test_transport_is_the_flow_and_the_sampler_is_saved(tmp_path):
    bridge = quick(VSDM(2, **SMALL), stretched())
    x0 = torch.randn(7, 2, **F64)
    assert torch.equal(bridge.transport(x0), bridge.transport(x0))
    bridge.sampler = Sampler(num_steps=3, solver="heun", path_steps=5)
    bridge.save(tmp_path / "vsdm.pt")
    assert Bridge.load(tmp_path / "vsdm.pt").sampler == Sampler(num_steps=3, solver="heun", path_steps=5)
    ends = []
    for solver, num_steps in (("multistep", 200), ("heun", 60), ("euler", 2000)):
        bridge.sampler = Sampler(num_steps=num_steps, solver=solver)
        ends.append(bridge.transport(x0))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ends[2], ends[1], rtol=5e-2, atol=5e-2)


def test_the_drift_is_that_of_the_paths():
    # mean increment of the SDE's first short step, from one place, against the drift there
    bridge, x = quick(VSDM(2, **SMALL), stretched()), torch.tensor([[1.0, -2.0]], **F64)
    tau = torch.tensor([0.5, 0.499, 0.0], **F64)
    z = bridge._inward(x, bridge.location, tau[0]).expand(200_000, 2)
    states = bridge._solve(z, None, tau, "euler-maruyama")[:2]
    moved = bridge._outward(states[1], bridge.location, tau[1]) - x
    growth = bridge.schedule.integral(tau[0]) - bridge.schedule.integral(tau[1])
    rate = growth / 0.001
    drift = bridge.drift(0.5, x)[0] * rate / bridge.schedule.rate(tau[0])
    error = moved.std(0) / math.sqrt(len(moved))
    assert ((moved.mean(0) - 0.001 * drift).abs() / error).max() < 5
    torch.testing.assert_close(moved.var(0), growth.expand(2), rtol=0.02, atol=0)


@pytest.mark.parametrize("covariance", ["learnt", "analytic"])
@pytest.mark.parametrize("dim", [2, 22])
def test_any_size_has_its_densities(dim, covariance):
    draws = torch.randn(200, dim) * torch.linspace(1, 3, dim)
    bridge = quick(VSDM(dim, step_covariance=covariance, **SMALL), draws)
    law = bridge()
    value, log_q = law.draws((20,))
    exact = torch.distributions.Normal(torch.zeros(dim), torch.linspace(1, 3, dim)).log_prob(value).sum(-1)
    assert log_q.shape == (20,) and (log_q - exact).abs().mean() < 0.2 * dim
    assert torch.equal(law.log_prob(value), law.log_prob(value))  # the probes are fixed
    assert (law.log_prob(value) - exact).abs().mean() < 0.2 * dim


REFUSED = {
    "b": (lambda: VSDM(2, b_min=0.0), "b_min must be positive and finite"),
    "order": (lambda: VSDM(2, b_min=3.0, b_max=2.0), "b_min must be at most b_max, got 3 and 2"),
    "drift": (lambda: VSDM(2, drift_matrix="best"), "drift_matrix must be one of"),
    "shape": (lambda: VSDM(2, drift_matrix=torch.eye(3)), r"shape \(2, 2\), got \(3, 3\)"),
    "symmetric": (lambda: VSDM(2, drift_matrix=torch.tensor([[1.0, 1.0], [0.0, 1.0]])), "symmetric"),
    "definite": (lambda: VSDM(2, drift_matrix=-torch.eye(2)), "positive definite, got an eigenvalue of -1"),
    "start": (lambda: VSDM(2, source_law="noise"), "source_law must be one of"),
    "covariance": (lambda: VSDM(2, step_covariance="small"), "step_covariance must be one of"),
    "hidden": (lambda: VSDM(2, hidden=()), "at least one layer"),
    "embedding": (lambda: VSDM(2, embedding=nn.Linear(1, 1)), "needs a context"),
    "solver": (lambda: Sampler(solver="rk4"), "solver must be one of"),
    "steps": (lambda: Sampler(num_steps=0), "at least 1"),
    "source": (lambda: VSDM(2).fit(torch.randn(50, 2), torch.randn(50, 2)), "source must be None, got Tensor"),
    "num_updates": (lambda: VSDM(2).fit(torch.randn(50, 2), num_updates=0), "num_updates"),
    "ema": (lambda: VSDM(2).fit(torch.randn(50, 2), ema=1.0), "ema must lie"),
    "held_out": (lambda: VSDM(2).fit(torch.randn(50, 2), held_out=1.0), "held_out must lie"),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_what_makes_no_sense_is_refused(bad):
    call, message = REFUSED[bad]
    with pytest.raises(ValueError, match=message):
        call()


def test_sgm_has_no_option_of_the_drift_and_loads_files_that_name_it():
    for call in (lambda: SGM(2, drift_matrix="tolerance"), lambda: SGM(2, hiden=(8,))):
        with pytest.raises(TypeError, match="drift_matrix|hiden"):
            call()
    for name in ("num_stages", "zeta"):
        with pytest.raises(TypeError, match=name):
            SGM(2).fit(torch.randn(50, 2), **{name: 1})
    config = SGM(2, hidden=(8,)).config()
    assert "drift_matrix" not in config
    assert SGM.from_config(config | {"drift_matrix": "identity"}).config() == config


def test_paths_and_path_bounds_refuse_none():
    bridge = quick(VSDM(2, **SMALL), stretched())
    for call in (lambda: bridge.paths(0, 1), lambda: bridge.path_log_prob(torch.zeros(2), num_paths=0)):
        with pytest.raises(ValueError, match="at least 1"):
            call()
    with pytest.raises(ValueError, match="one time"):
        bridge.drift(torch.rand(3), torch.zeros(3, 2))


@pytest.mark.slow
def test_on_a_linear_gaussian_problem_the_densities_are_near_the_posterior():
    slope = torch.randn(4, 4)
    theta = torch.randn(20_000, 4)
    y = theta @ slope.T + 0.3 * torch.randn(20_000, 4)
    bridge = VSDM(4, context_dim=4)
    history = bridge.fit(theta, context=y, num_updates=1000, progress=False)
    assert history.converged
    precision = torch.eye(4) + slope.T @ slope / 0.09
    covariance = torch.linalg.inv(precision)
    observed = y[0]
    posterior = torch.distributions.MultivariateNormal(covariance @ slope.T @ observed / 0.09, covariance)
    x = posterior.sample((500,))
    assert (bridge(observed).log_prob(x) - posterior.log_prob(x)).abs().median() < 0.1
    for path_steps in (4, 10, 50):
        bridge.sampler = Sampler(path_steps=path_steps)
        value, log_q = bridge(observed).draws((4000,))
        weights = (posterior.log_prob(value) - log_q).exp()
        assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / math.sqrt(4000)
        assert float(weights.mean() ** 2 / weights.square().mean()) > 0.9
        gap = posterior.log_prob(x) - bridge.path_log_prob(x, observed)
        assert abs(float(gap.mean())) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", [VSDM, SGM])
def test_two_modes_are_both_found_with_path_weights_that_see_them(kind):
    centres = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    draws = centres[(torch.rand(10_000) < 0.3).long()] + 0.3 * torch.randn(10_000, 2)
    bridge = kind(2)
    bridge.fit(draws, num_updates=1500, progress=False)
    value, log_q = bridge().draws((4000,))
    share = float((value[:, 0] > 0).float().mean())
    assert abs(share - 0.3) < 0.05
    log_p = torch.stack(
        [torch.distributions.Normal(c, 0.3).log_prob(value).sum(-1) + math.log(p) for c, p in zip(centres, (0.7, 0.3))]
    ).logsumexp(0)
    weights = (log_p - log_q).exp()
    assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / math.sqrt(4000)
    assert float(weights.mean() ** 2 / weights.square().mean()) > 0.5


@pytest.mark.parametrize("dim", [2, 21])
def test_the_flow_carries_a_density_that_it_does_not_know(dim):
    # a correlated Gaussian in the angles of another one: N is linear and its divergence is not zero
    sde = LinearSDE(torch.linspace(0.8, 2.0, dim, **F64), Schedule())
    root = torch.eye(dim, **F64) + 0.3 * torch.randn(dim, dim, **F64) / math.sqrt(dim)
    covariance, spread = root @ root.T, torch.linspace(2.0, 3.0, dim, **F64)
    flow, eye = Flow(sde, spread), torch.eye(dim, **F64)

    def goal(tau, w):
        law = sde.at(tau)
        noised = law.factor[:, None] * covariance * law.factor + law.variance.diag()
        mean = (w / flow.inner(tau)) @ torch.linalg.inv(noised) @ (law.factor[:, None] * covariance)
        return -flow.slope(lambda tau, x: mean, tau, w)

    z = torch.randn(5, dim, **F64) @ root.T
    probes = 1 - 2 * torch.randint(0, 2, (64, dim), **F64)
    end, change = flow_change(goal, flow, sde.grid(400, 1e-4)[:-1].flip(0), z, probes)
    noised = start_covariance(sde, covariance)
    found = torch.distributions.MultivariateNormal(0 * z[0], noised).log_prob(end) + change
    exact = torch.distributions.MultivariateNormal(0 * z[0], covariance).log_prob(z)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-3 if dim <= 20 else 0.3)
    assert not torch.allclose(covariance, eye, atol=0.1)


@pytest.mark.parametrize("full", [False, True])
def test_the_head_s_loss_is_least_at_the_precision_of_what_is_missed(full):
    axes = torch.tensor([[2.0, 0.0], [1.0, 0.5]], **F64)
    missed = torch.cat([axes.T, -axes.T])  # second moments axes axes^T / 2
    covariance = missed.T @ missed / 4
    factor = torch.linalg.cholesky(torch.linalg.inv(covariance)) if full else covariance.diagonal().rsqrt()
    factor = factor.clone().requires_grad_()
    loss = factor_loss(factor.expand(4, *factor.shape), missed).mean()
    (slope,) = torch.autograd.grad(loss, factor)
    assert (slope.tril() if full else slope).abs().max() < 1e-12
    found = factor_covariance(factor.detach()[None], torch.ones(2, **F64))[0]
    torch.testing.assert_close(found, covariance if full else covariance.diagonal(), rtol=1e-10, atol=1e-12)
