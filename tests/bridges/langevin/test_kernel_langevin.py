"""The kernel-Langevin bridge against the closed forms of Gaussian data, on weighted grids and without sampling."""

import math

import pytest
import torch
from scipy.spatial import ConvexHull
from torch.distributions import MultivariateNormal, Normal

from pyro_sb.bridges import KernelLangevinBridge
from pyro_sb.bridges.langevin.schemes import NOISES, SCHEMES

F64 = {"dtype": torch.float64}
S = 1.7  # variance of the Gaussian data


def grid(variance=S, num=600, width=10.0):
    """Nodes ``(num, 1)`` and weights of N(0, variance): the trapezoid rule, exact to rounding for Gaussians."""
    nodes = torch.linspace(-width, width, num, **F64)[:, None] * variance**0.5
    weights = torch.exp(-0.5 * nodes[:, 0].square() / variance)
    return nodes, weights / weights.sum()


def product_grid(covariance, num=45, width=6.0):
    """Nodes ``(num^d, d)`` and weights of N(0, covariance)."""
    nodes, weights = grid(1.0, num, width)
    dim = len(covariance)
    z = torch.cartesian_prod(*[nodes[:, 0]] * dim)
    w = torch.stack(torch.meshgrid(*[weights] * dim, indexing="ij")).prod(0).reshape(-1)
    return z @ torch.linalg.cholesky(covariance).T, w


def gaussian_bridge(eta, **options):
    points, weights = grid()
    bridge = KernelLangevinBridge(1, epsilon=2 * eta, metric="identity", **options)
    assert bridge.fit(points, weights=weights, tolerance=1e-13, progress=False).converged
    return bridge


def contraction(eta, variance=S):
    return math.exp(-math.asinh(eta / variance))


def next_moments(bridge, mean, variance, y=None):
    """Mean and variance after one step from the given ones: steps are affine here, so two-point rules are exact."""
    noises = NOISES.get(bridge.scheme, 1)
    signs = torch.tensor([-1.0, 1.0], **F64)
    corners = torch.cartesian_prod(*[signs] * (noises + 1))
    z = (mean + variance**0.5 * corners[:, :1] - bridge.location) / bridge.metric_cholesky[0, 0]
    rows = None if y is None else bridge._context_rows(torch.tensor([[y]], **F64)).expand(len(z), -1)
    end = SCHEMES[bridge.scheme](bridge._dynamics(), z, rows, corners.T[1:, :, None])
    end = end * bridge.metric_cholesky[0, 0] + bridge.location
    return float(end.mean()), float(end.var(correction=0))


def stationary_moments(bridge, y=None, mean=0.0, variance=S):
    """Fixed point of `next_moments`."""
    for _ in range(10_000):
        before = (mean, variance)
        mean, variance = next_moments(bridge, mean, variance, y)
        if abs(mean - before[0]) + abs(variance - before[1]) < 1e-14:
            break
    return mean, variance


# ---- Gaussian data: the map, the covariance, the four stationary variances

ETAS = [0.05, 0.5, 2.0, 10.0]


@pytest.mark.parametrize("eta", ETAS)
def test_on_a_gaussian_the_mean_contracts_and_the_covariance_is_constant(eta):
    bridge, x = gaussian_bridge(eta), torch.linspace(-4, 4, 9, **F64)[:, None]  # off the grid
    a = contraction(eta)
    torch.testing.assert_close(bridge.conditional_mean(x), a * x, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        bridge.conditional_covariance(x), torch.full((9, 1, 1), 2 * eta * a, **F64), rtol=1e-9, atol=0
    )
    assert abs(2 * eta * a - S * (1 - a**2)) < 1e-12


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(
    ("scheme", "law"),
    [
        ("plain", lambda eta: S / contraction(eta)),
        ("split-step", lambda eta: S * contraction(eta)),
        ("strang", lambda eta: S * math.sqrt(1 + (eta / S) ** 2)),
        ("data-aware", lambda eta: S),
    ],
)
def test_stationary_variances(scheme, law, eta):
    bridge = gaussian_bridge(eta, scheme=scheme)
    mean, variance = next_moments(bridge, 0.0, law(eta))
    assert abs(mean) < 1e-12
    assert abs(variance - law(eta)) < 2e-8 * 2 * eta + 1e-9  # the data-aware ridge is a part in 10^8 of epsilon


@pytest.mark.parametrize("step_size", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("eta", [0.05, 2.0])
def test_a_step_that_is_not_the_bandwidth(eta, step_size):
    a, s = contraction(eta), step_size
    kept = 1 - s * (1 - a)
    plain = gaussian_bridge(eta, scheme="plain", step_size=s)
    assert abs(stationary_moments(plain)[1] / (2 * eta * s / (1 - kept**2)) - 1) < 1e-7
    aware = gaussian_bridge(eta, scheme="data-aware", step_size=s)
    assert abs(stationary_moments(aware)[1] / (S * (1 + a) / (2 - s * (1 - a))) - 1) < 1e-7


@pytest.mark.parametrize("kappa", [0.3, 1.4])
def test_a_diffusion_that_is_not_the_references(kappa):
    eta, a = 0.3, contraction(0.3)
    bridge = gaussian_bridge(eta, scheme="plain", diffusion=torch.tensor([[kappa]], **F64))
    kept = 1 - kappa * (1 - a)
    assert abs(stationary_moments(bridge)[1] / (2 * eta * kappa / (1 - kept**2)) - 1) < 1e-8
    # whatever the diffusion, the stationary law tends to the data's
    errors = [
        stationary_moments(gaussian_bridge(e, scheme="plain", diffusion=torch.tensor([[kappa]], **F64)))[1] / S - 1
        for e in (0.04, 0.02)
    ]
    assert 1.9 < errors[0] / errors[1] < 2.1


TILTED = torch.tensor([[2.0, 1.2], [1.2, 1.0]], **F64)


@pytest.mark.parametrize("metric", ["identity", "covariance"])
def test_the_plain_step_is_the_langevin_step_of_its_diffusion(metric):
    s, epsilon = 0.7, 0.3
    bridge = KernelLangevinBridge(2, epsilon=epsilon, scheme="plain", metric=metric, step_size=s, diffusion=TILTED)
    bridge.fit(torch.randn(50, 2, **F64) * torch.tensor([1.0, 3.0]) + 5, progress=False)
    x, L, dynamics = torch.randn(4, 2, **F64), bridge.metric_cholesky, bridge._dynamics()
    z = torch.linalg.solve_triangular(L, (x - bridge.location).T, upper=False).T
    mean, *ends = (
        SCHEMES["plain"](dynamics, z, None, e.expand(1, 4, 2)) @ L.T + bridge.location
        for e in torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], **F64)
    )
    root = torch.stack([end - mean for end in ends], -1)
    expected = x + s * (bridge.conditional_mean(x) - x) @ torch.linalg.inv(L @ L.T) @ TILTED
    torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(root @ root.mT, (s * epsilon * TILTED).expand(4, 2, 2), rtol=1e-11, atol=1e-11)
    log_density = MultivariateNormal(expected, s * epsilon * TILTED).log_prob(ends[0])
    log_step = dynamics.log_step(torch.linalg.solve_triangular(L, (ends[0] - bridge.location).T, upper=False).T, z)
    torch.testing.assert_close(log_step - L.diagonal().log().sum(), log_density, rtol=1e-10, atol=1e-10)


def matrix_contraction(covariance, metric, eta):
    """exp(-asinh(eta K S^-1)) through the whitened spectrum."""
    factor = torch.linalg.cholesky(metric)
    white = torch.linalg.solve_triangular(factor, covariance, upper=False)
    white = torch.linalg.solve_triangular(factor, white.mT, upper=False)
    values, vectors = torch.linalg.eigh(white)
    inner = vectors @ torch.diag(torch.exp(-torch.asinh(eta / values))) @ vectors.mT
    return factor @ inner @ torch.linalg.inv(factor)


@pytest.mark.parametrize("metric", ["identity", "covariance", "matrix"])
def test_in_two_dimensions_the_contraction_is_a_matrix_function(metric):
    covariance, eta = torch.tensor([[2.0, 0.9], [0.9, 1.0]], **F64), 0.4
    matrix = torch.tensor([[1.0, -0.3], [-0.3, 0.7]], **F64)
    points, weights = product_grid(covariance)
    bridge = KernelLangevinBridge(2, epsilon=2 * eta, metric=matrix if metric == "matrix" else metric)
    bridge.fit(points, weights=weights, tolerance=1e-13, progress=False)
    K = {"identity": torch.eye(2, **F64), "covariance": covariance, "matrix": matrix}[metric]
    A = matrix_contraction(covariance, K, eta)
    x = torch.randn(5, 2, **F64)
    torch.testing.assert_close(bridge.conditional_mean(x), x @ A.T, rtol=1e-6, atol=1e-7)
    noise = covariance - A @ covariance @ A.T
    torch.testing.assert_close(bridge.conditional_covariance(x), noise.expand(5, 2, 2), rtol=1e-6, atol=1e-6)


# ---- the transition law at large ----


@pytest.mark.parametrize("exponent", [0.0, -0.5])
def test_transitions_between_the_draws_are_reversible(exponent):
    points, weights = torch.randn(80, 2, **F64), torch.rand(80, **F64) + 0.1
    bridge = KernelLangevinBridge(2, bandwidth_exponent=exponent)
    bridge.fit(points, weights=weights, tolerance=1e-13, progress=False)
    flow = bridge.weights[:, None] * bridge.transition_probabilities(points)
    torch.testing.assert_close(flow, flow.T, rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(flow.sum(0), bridge.weights, rtol=1e-11, atol=1e-15)


def test_the_fit_follows_the_data_through_affine_maps():
    points, x = torch.randn(200, 2, **F64), torch.randn(6, 2, **F64)
    matrix, shift = torch.tensor([[30.0, 2.0], [0.0, 0.01]], **F64), torch.tensor([1e3, -7.0], **F64)
    here, there = KernelLangevinBridge(2), KernelLangevinBridge(2)
    here.fit(points, progress=False)
    there.fit(points @ matrix.T + shift, progress=False)
    assert abs(here.epsilon / there.epsilon - 1) < 1e-6
    moved = here.conditional_mean(x) @ matrix.T + shift
    torch.testing.assert_close(there.conditional_mean(x @ matrix.T + shift), moved, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("beta", [-0.25, -0.5])
def test_a_variable_bandwidth_has_the_generator_of_its_own_diffusion(beta):
    # The chain is reversible with local variance 2 eta rho, so its Dirichlet form tends to int rho |grad f|^2 pi, and
    # the drift to rho (log pi)' + rho': first order in eta, checked by halving it
    x = torch.linspace(-1.5, 1.5, 7, **F64)[:, None]
    points, weights = grid(1.0, 1200, 8.0)
    drift_errors, variance_errors = [], []
    for eta in (0.004, 0.002):
        bridge = KernelLangevinBridge(1, epsilon=2 * eta, metric="identity", bandwidth_exponent=beta)
        bridge.fit(points, weights=weights, tolerance=1e-12, progress=False)
        dynamics = bridge._dynamics()
        z = x.clone().requires_grad_()
        rho = dynamics.scale(dynamics.query(z, None))
        (slope,) = torch.autograd.grad(rho.sum(), z)
        rho = rho.detach()[:, None]
        assert rho.max() / rho.min() > 1.2  # it does vary here
        drift = (bridge.conditional_mean(x) - x) / eta
        drift_errors.append(float((drift - (-rho * x + slope)).abs().max()))
        variance_errors.append(float((bridge.conditional_covariance(x)[:, 0] / (2 * eta) - rho).abs().max()))
    assert drift_errors[1] < 0.05 and 1.7 < drift_errors[0] / drift_errors[1] < 2.4
    assert variance_errors[1] < 0.05 and 1.7 < variance_errors[0] / variance_errors[1] < 2.4


def test_the_variable_bandwidth_is_a_power_of_the_smoothed_density():
    # a Gaussian smoothed by the pilot bandwidth is a Gaussian of variance 1 + pilot
    points, weights = grid(1.0)
    bridge = KernelLangevinBridge(1, epsilon=0.1, metric="identity", bandwidth_exponent=-0.5)
    bridge.fit(points, weights=weights, progress=False)
    dynamics, x = bridge._dynamics(), torch.linspace(-3, 3, 7, **F64)[:, None]
    scale = dynamics.scale(dynamics.query(x, None))
    expected = 0.5 * x[:, 0].square() / (2 * (1 + bridge._bandwidths.pilot))
    torch.testing.assert_close((scale / scale[3]).log(), expected, rtol=2e-3, atol=1e-9)  # the rule at a narrow pilot
    assert abs((bridge.weights * dynamics.law.scale).sum() - 1) < 1e-9


@pytest.mark.parametrize("eta", [1e-2, 1.0, 1e2, 1e4, 1e6])
def test_the_split_step_never_leaves_the_convex_hull(eta):
    points = torch.randn(200, 2, **F64) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]], **F64)
    bridge = KernelLangevinBridge(2, epsilon=2 * eta, metric="identity", scheme="split-step", num_steps=30)
    bridge.fit(points, progress=False)
    states = [bridge.transport(10 * torch.randn(100, 2, **F64)), bridge.paths(50, 30)[1][1:].reshape(-1, 2)]
    faces = torch.as_tensor(ConvexHull(points.numpy()).equations)  # outward normal and offset: inside is n x + c <= 0
    outside = torch.cat(states) @ faces[:, :2].T + faces[:, 2]
    assert outside.max() < 1e-12


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("eta", [1e-4, 1.0, 1e4])
def test_every_scheme_is_stable_at_every_matched_step(scheme, eta):
    bridge = KernelLangevinBridge(2, epsilon=2 * eta, scheme=scheme, num_steps=50)
    bridge.fit(torch.randn(100, 2, **F64), progress=False)
    end = bridge.transport(1e3 * torch.randn(50, 2, **F64))
    assert end.abs().max() < 10 * (1 + math.sqrt(2 * eta) * 2)


# ---- context ----

JOINT = torch.tensor([[1.0, 0.8], [0.8, 1.0]], **F64)  # (context, event): event | context ~ N(.8 y, .36)


@pytest.mark.parametrize(("eta_y", "eta_x"), [(0.05, 0.05), (0.05, 0.3), (0.3, 0.3)])
def test_with_the_context_clamped_the_chain_has_the_moments_of_the_joint_bridge(eta_y, eta_x):
    joint, weights = product_grid(JOINT, 61, 6.0)
    bridge = KernelLangevinBridge(1, context_dim=1, epsilon=2 * eta_x, context_epsilon=2 * eta_y, metric="identity")
    bridge.fit(joint[:, 1:], context=joint[:, :1], weights=weights, tolerance=1e-13, progress=False)
    A = matrix_contraction(JOINT, torch.diag(torch.tensor([eta_y, eta_x], **F64)), 1.0)
    noise = (JOINT - A @ JOINT @ A.T)[1, 1]
    y, x = 1.5, torch.linspace(-1, 2, 4, **F64)[:, None]
    context = torch.tensor([y], **F64)
    torch.testing.assert_close(bridge.conditional_mean(x, context), A[1, 0] * y + A[1, 1] * x, rtol=1e-4, atol=1e-5)
    mean, variance = stationary_moments(bridge, y)
    assert abs(mean / (A[1, 0] * y / (1 - A[1, 1])) - 1) < 1e-4
    assert abs(variance / (noise / (1 - A[1, 1] ** 2)) - 1) < 1e-4


def test_as_the_bandwidths_shrink_the_clamped_chain_samples_the_conditional():
    errors = []
    for eta in (0.08, 0.04, 0.02):
        A = matrix_contraction(JOINT, torch.diag(torch.tensor([eta / 2, eta], **F64)), 1.0)
        variance = (JOINT - A @ JOINT @ A.T)[1, 1] / (1 - A[1, 1] ** 2)
        errors.append((abs(float(A[1, 0] / (1 - A[1, 1])) - 0.8), abs(float(variance) - 0.36)))
    assert errors[2][0] < 0.01 and errors[2][1] < 0.02
    assert all(1.6 < e[i] / f[i] < 2.4 for e, f in zip(errors, errors[1:]) for i in (0, 1))


def banana(num, seed=3):
    generator = torch.Generator().manual_seed(seed)
    y = 2 * torch.randn(num, 1, generator=generator, **F64)
    return y, y.square() / 2 - 2 + torch.randn(num, 1, generator=generator, **F64)


def correlated(num, seed=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(num, 1, generator=generator, **F64)
    return y, 0.8 * y + 0.6 * torch.randn(num, 1, generator=generator, **F64)


@pytest.mark.parametrize(
    ("make", "y", "mean", "sd"),
    [(correlated, 0.0, 0.0, 0.6), (correlated, 1.5, 1.2, 0.6), (banana, 0.0, -2.0, 1.0), (banana, 3.0, 2.5, 1.0)],
    ids=["gaussian at 0", "gaussian at 1.5", "banana at 0", "banana at 3"],
)
def test_conditional_draws_unattended(make, y, mean, sd):
    # The standard error is the training set's: as many independent draws as share in the weight of this context
    context, target = make(2000)
    bridge = KernelLangevinBridge(1, context_dim=1)
    bridge.fit(target, context=context, progress=False)
    draws = bridge(torch.tensor([y])).sample((1000,))
    near = torch.exp(-(context[:, 0] - y).square() / (2 * bridge.context_epsilon * context.var()))
    effective = float(near.sum().square() / near.square().sum())
    assert effective > 20
    assert abs(draws.mean() - mean) < 3 * sd / math.sqrt(effective)
    assert abs(draws.std() - sd) < 3 * sd / math.sqrt(2 * effective) + 0.02


def test_a_batch_of_contexts_is_its_members():
    context, target = banana(500)
    bridge = KernelLangevinBridge(1, context_dim=1, num_steps=5)
    bridge.fit(target, context=context, progress=False)
    law = bridge(torch.tensor([[-3.0], [0.0], [3.0]]))
    assert law.batch_shape == (3,)
    means = law.sample((1000,)).mean(0)[:, 0]
    assert (means - torch.tensor([2.5, -2.0, 2.5])).abs().max() < 0.5
    x = torch.randn(4, 3, 1, **F64)
    one = bridge.conditional_mean(x[:, 1], torch.tensor([0.0]))
    torch.testing.assert_close(bridge.conditional_mean(x, torch.tensor([[-3.0], [0.0], [3.0]]))[:, 1], one)


# ---- the density of paths ----


@pytest.mark.parametrize(
    "options", [{}, {"bandwidth_exponent": -0.7}, {"step_size": 0.5, "diffusion": torch.tensor([[2.0]])}]
)
def test_the_density_of_a_path_integrates_to_one(options):
    # one step: log_q + log B(x0 | x1) is the log density of (x0, x1), with B rebuilt here from the public mean
    bridge = KernelLangevinBridge(1, epsilon=0.5, scheme="plain", num_steps=1, **options)
    bridge.fit(torch.randn(20, 1, **F64) * 3 + 1, progress=False)
    axis = torch.linspace(-25, 27, 700, **F64)
    x0, x1 = (v.reshape(-1, 1) for v in torch.meshgrid(axis, axis, indexing="ij"))
    dynamics, factor = bridge._dynamics(), bridge.metric_cholesky[0, 0]
    step, diffusion = bridge.step_size, float(options.get("diffusion", factor.square()))
    scale = dynamics.scale(dynamics.query((x1 - bridge.location) / factor, None))
    rho = 1.0 if scale is None else scale[:, None]
    mean = x1 + step * diffusion / factor.square() * (bridge.conditional_mean(x1) - x1)
    log_back = Normal(mean, (step * bridge.epsilon * diffusion * rho) ** 0.5).log_prob(x0)[:, 0]
    log_q = bridge.log_q_paths(torch.stack([x0, x1]))
    mass = (log_q + log_back).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass - 1) < 1e-9


def test_on_a_gaussian_the_path_density_is_the_stationary_one():
    # the plain chain is then reversible, so log q of a path that starts from N(0, S / A) is the density of its end
    eta, a = 0.5, contraction(0.5)
    start = MultivariateNormal(torch.zeros(1, **F64), torch.tensor([[S / a]], **F64))
    points, weights = grid()
    bridge = KernelLangevinBridge(1, epsilon=2 * eta, metric="identity", scheme="plain", num_steps=6)
    bridge.fit(points, start, weights=weights, tolerance=1e-13, progress=False)
    value, log_q = bridge().draws((200,))
    torch.testing.assert_close(log_q, start.log_prob(value), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"bandwidth_exponent": -0.3}, {"step_size": 0.7, "diffusion": TILTED}])
@pytest.mark.parametrize("conditional", [False, True])
def test_path_weights_recover_the_normaliser(options, conditional):
    context = torch.randn(300, 1, **F64)
    target = torch.randn(300, 2, **F64) + context
    bridge = KernelLangevinBridge(2, context_dim=int(conditional), scheme="plain", num_steps=4, **options)
    bridge.fit(target, context=context if conditional else None, progress=False)
    value, log_q = bridge(*([torch.tensor([0.5])] if conditional else [])).draws((8000,))
    p = MultivariateNormal(torch.full((2,), 0.4, **F64), 0.6 * torch.eye(2, **F64))
    weights = (math.log(3.7) + p.log_prob(value) - log_q).exp()
    error = weights.std() / math.sqrt(8000)
    assert abs(weights.mean() - 3.7) < 3 * error and error < 0.1
    moments = (weights[:, None] * value).mean(0) / 3.7
    assert (moments - 0.4).abs().max() < 0.1


def test_only_the_plain_scheme_has_a_density_and_the_others_say_so():
    points = torch.randn(50, 2, **F64)
    for scheme in SCHEMES:
        bridge = KernelLangevinBridge(2, scheme=scheme)
        bridge.fit(points, progress=False)
        assert bridge.density == ("path" if scheme == "plain" else None)
        if scheme != "plain":
            with pytest.raises(NotImplementedError, match=f'{scheme}.*"plain"'):
                bridge().draws()
    bridge.fit(points, points[:10], progress=False)
    with pytest.raises(NotImplementedError, match="plain"):
        KernelLangevinBridge.draws_rows(bridge, 3, None)


def test_chains_start_where_the_source_says():
    points, source = torch.randn(50, 2, **F64), torch.full((5, 2), 9.0, **F64)
    bridge = KernelLangevinBridge(2, scheme="plain")
    bridge.fit(points, source, progress=False)
    assert bridge.density is None
    torch.testing.assert_close(bridge.paths(7, 2)[1][0], torch.full((7, 2), 9.0, **F64))
    law = MultivariateNormal(torch.full((2,), -40.0, **F64), torch.eye(2, **F64))
    bridge.fit(points, law, progress=False)
    assert bridge.density == "path" and bridge.paths(7, 2)[1][0].max() < -30


def test_with_a_context_chains_start_at_its_neighbours():
    context = torch.randn(400, 1, **F64)
    target = context.square() + 0.1 * torch.randn(400, 1, **F64)
    bridge = KernelLangevinBridge(1, context_dim=1, epsilon=0.1, context_epsilon=0.5)
    bridge.fit(target, context=context, progress=False)
    near = torch.softmax(-(context[:, 0] - 1.5).square() / (2 * 0.5 * context.var(correction=0)), 0)
    mean = near @ target[:, 0]
    variance = near @ (target[:, 0] - mean).square() + 0.05 * target.var(correction=0)
    start = bridge.paths(8000, 1, torch.tensor([1.5]))[1][0, :, 0]
    assert abs(start.mean() - mean) < 3 * math.sqrt(variance / 8000)
    assert abs(start.var() / variance - 1) < 0.15


# ---- from a prior to a posterior ----

Y, R = 1.1, 0.5  # an observation and its variance


def log_likelihood(x):
    return -0.5 * (x[:, 0] - Y).square() / R


@pytest.mark.parametrize("eta", [0.05, 0.5])
def test_by_weights_the_prior_becomes_the_posterior(eta):
    # the weighted grid is then one of N(m, V), V^-1 = S^-1 + R^-1: the data-aware chain leaves it invariant
    bridge = gaussian_bridge(eta).posterior(log_likelihood, tolerance=1e-13)
    V = 1 / (1 / S + 1 / R)
    mean, variance = stationary_moments(bridge)
    assert abs(mean - V * Y / R) < 1e-6
    assert abs(variance / V - 1) < 1e-6


@pytest.mark.parametrize("eta", [0.02, 0.1, 0.5])
def test_by_drift_the_bias_is_the_documented_one(eta):
    bridge = gaussian_bridge(eta).posterior(log_likelihood, method="drift")
    a, r = contraction(eta), eta / R
    mean, variance = stationary_moments(bridge)
    assert bridge.scheme == "split-step"
    assert abs(mean - a * r * Y / (1 - a * (1 - r))) < 1e-9
    assert abs(variance / (2 * eta * a**2 / (1 - a**2 * (1 - r) ** 2)) - 1) < 1e-9


def test_by_drift_the_bias_is_of_first_order():
    V, errors = 1 / (1 / S + 1 / R), []
    for eta in (0.04, 0.02):
        mean, variance = stationary_moments(gaussian_bridge(eta).posterior(log_likelihood, method="drift"))
        errors.append((abs(mean - V * Y / R), abs(variance - V)))
    assert all(1.8 < e / f < 2.3 for e, f in zip(*errors))


def test_by_drift_the_gradient_enters_with_the_metric():
    points, x = torch.randn(60, 2, **F64) @ TILTED, torch.randn(5, 2, **F64)
    bridge = KernelLangevinBridge(2, epsilon=0.2, num_steps=3)
    bridge.fit(points, progress=False)
    slope = torch.tensor([0.3, -2.0], **F64)
    added = bridge.posterior(lambda x: x @ slope, method="drift").drift(0.0, x) - bridge.drift(0.0, x)
    torch.testing.assert_close(added, (3 * 0.1 * slope @ points.T.cov(correction=0)).expand(5, 2), rtol=1e-9, atol=1e-9)


def test_by_drift_a_stiff_likelihood_stays_in_the_hull():
    points = torch.randn(100, 1, **F64)
    bridge = KernelLangevinBridge(1)
    bridge.fit(points, progress=False)
    draws = bridge.posterior(lambda x: -1e9 * (x[:, 0] - 0.3).square(), method="drift")().sample((50,))
    assert points.min() - 1e-12 <= draws.min() and draws.max() <= points.max() + 1e-12


def test_a_posterior_that_the_prior_misses_is_refused():
    bridge = KernelLangevinBridge(1)
    bridge.fit(torch.randn(1000, 1, **F64), progress=False)
    with pytest.raises(ValueError, match="overlap"):
        bridge.posterior(lambda x: -1e6 * (x[:, 0] - 9).square())
    with pytest.warns(RuntimeWarning, match="1 / sum w"):
        bridge.posterior(lambda x: -2e3 * (x[:, 0] - 0.3).square())
    with pytest.raises(ValueError, match=r"to \(1000,\), got \(1000, 1\)"):
        bridge.posterior(lambda x: x)
    with pytest.raises(ValueError, match="NaN"):
        bridge.posterior(lambda x: x[:, 0] * math.nan)
    with pytest.raises(ValueError, match="finite at one"):
        bridge.posterior(lambda x: x[:, 0] * 0 - math.inf)
    with pytest.raises(ValueError, match="weights.*drift"):
        bridge.posterior(log_likelihood, method="both")
    with pytest.raises(ValueError, match="no options"):
        bridge.posterior(log_likelihood, method="drift", max_iter=3)
    with pytest.raises(ValueError, match="a likelihood"):
        bridge.posterior(log_likelihood, method="drift").save("nowhere")


# ---- bandwidths and options ----


def test_the_bandwidth_is_that_of_a_density_estimate_where_there_is_one():
    for dim in (1, 2, 5):
        bridge = KernelLangevinBridge(dim)
        bridge.fit(torch.randn(1000, dim, **F64), progress=False)
        assert 0.1 < bridge.epsilon / 1000 ** (-2 / (dim + 4)) < 4


def test_the_bandwidth_sees_neither_copies_nor_unused_dimensions():
    points = torch.randn(300, 2, **F64)
    frame = torch.linalg.qr(torch.randn(20, 20, **F64))[0][:, :2]
    alone, copied, embedded = KernelLangevinBridge(2), KernelLangevinBridge(2), KernelLangevinBridge(20)
    alone.fit(points, progress=False)
    copied.fit(points.repeat(3, 1), progress=False)
    embedded.fit(points @ frame.T, progress=False)
    assert 0.4 < copied.epsilon / alone.epsilon < 2.5
    assert abs(embedded.epsilon / alone.epsilon - 1) < 1e-3
    x = torch.randn(5, 2, **F64)
    torch.testing.assert_close(
        embedded.conditional_mean(x @ frame.T), alone.conditional_mean(x) @ frame.T, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dim", [10, 50])
def test_in_many_dimensions_no_draw_is_left_alone(dim):
    points = torch.randn(500, dim, **F64)
    bridge = KernelLangevinBridge(dim)
    bridge.fit(points, progress=False)
    partners = 1 / bridge.transition_probabilities(points).square().sum(1)
    assert 5 < partners.median() < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"epsilon": math.nan}, "epsilon must be positive"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"context_epsilon": 1.0}, "context_dim = 0"),
        ({"scheme": "euler"}, "scheme must be one of"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"bandwidth_exponent": 0.5}, "bandwidth_exponent must lie in .-inf, 0."),
        ({"metric": "euclid"}, "metric must be"),
        ({"metric": torch.eye(3)}, r"shape \(2, 2\)"),
        ({"diffusion": -torch.eye(2)}, "positive definite"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KernelLangevinBridge(2, **options)


def test_draws_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="must vary"):
        KernelLangevinBridge(2).fit(torch.ones(10, 2), progress=False)
    bridge = KernelLangevinBridge(2, metric="identity")
    bridge.fit(torch.ones(10, 2), progress=False)  # a point mass is a law
    torch.testing.assert_close(bridge.conditional_mean(torch.zeros(1, 2)), torch.ones(1, 2))


def test_a_scaling_that_stops_short_warns_with_the_figure_and_the_knob():
    bridge = KernelLangevinBridge(2, epsilon=0.1)
    with pytest.warns(RuntimeWarning, match=r"residual .* > 1.0e-09 after 2 iterations. Raise epsilon \(now 0.1\)"):
        history = bridge.fit(torch.randn(50, 2, **F64), max_iter=2, progress=False)
    assert not history.converged and history.residual > 1e-9 and len(history.residuals) == 3


def test_a_distribution_may_be_the_target(tmp_path):
    bridge = KernelLangevinBridge(2)
    law = MultivariateNormal(torch.zeros(2), torch.eye(2))
    bridge.fit(law, num_law_draws=128, checkpoint=tmp_path / "b.pt", progress=False)
    assert bridge.points.shape == (128, 2)
    assert torch.equal(KernelLangevinBridge.load(tmp_path / "b.pt").points, bridge.points)


def test_files_of_another_kind_are_refused(tmp_path):
    torch.save({"anything": 1}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="Bridge.save"):
        KernelLangevinBridge.load(tmp_path / "x.pt")
    bridge = KernelLangevinBridge(1, scheme="plain")
    bridge.fit(torch.randn(9, 1), progress=False)
    bridge.save(tmp_path / "b.pt")
    saved = torch.load(tmp_path / "b.pt", weights_only=True)
    torch.save(saved | {"class": "Unheard"}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="Unheard"):
        KernelLangevinBridge.load(tmp_path / "y.pt")
