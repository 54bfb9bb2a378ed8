"""The sbibm tasks: identities of a density and its simulator, and the benchmark's own reference draws."""

import math

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp
from torch.distributions import biject_to

from pyro_sb.datasets import SBI_TASKS, sbi_task
from pyro_sb.datasets.simulator_laws import Crescent, Gaussian, SpikeSums, runge_kutta4
from pyro_sb.infer.model.runs import PlainSampling

DIM = dict(zip(SBI_TASKS, [2, 10, 10, 2, 5, 10, 4, 2]))
F64 = {"dtype": torch.float64}


@pytest.fixture(params=SBI_TASKS)
def task(request):
    torch.set_default_dtype(torch.float64)
    return sbi_task(request.param)


def in_double(name):
    torch.set_default_dtype(torch.float64)
    return sbi_task(name)


def run(task, num, theta=None, y=None):
    """A trace of `num` runs in a plate at -2, with given values, and its log densities by site, (num,) each."""
    given = {} if theta is None else {"theta": theta[:, None]}
    if y is not None:
        given["y"] = y if task.name == "slcp" else y[:, None]
    with pyro.plate("runs", num, dim=-2):
        trace = poutine.trace(poutine.condition(task.model, given)).get_trace()
    trace.compute_log_prob()
    logs = {name: trace.nodes[name]["log_prob"].expand(num, -1).sum(-1) for name in ("theta", "y")}
    values = trace.nodes["theta"]["value"][:, 0], trace.nodes["y"]["value"]
    return *values, logs


def z_scores(x):
    return x.mean(0) / (x.std(0) / len(x) ** 0.5)


# --- the stored data -----------------------------------------------------------------------------------------------


def test_shapes_and_dtype(task):
    d = DIM[task.name]
    assert task.reference.shape == (5, 2000, d)
    assert task.true_parameters.shape == task.reference_mean.shape == task.reference_sd.shape == (5, d)
    theta, y, _ = run(task, 3)
    assert theta.shape == (3, d)
    assert task.observations.shape[1:] == (y.shape[1:] if task.name == "slcp" else y.shape[2:])
    assert theta.dtype == y.dtype == task.observations.dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    single = sbi_task(task.name)
    assert single.reference.dtype == run(single, 3)[1].dtype == torch.float32


def test_reference_draws_agree_with_the_stored_moments(task):
    draws, n = task.reference, 2000
    share = (1 / n - 1 / 10_000) ** 0.5  # 2,000 of the 10,000
    scaled = (draws - task.reference_mean[:, None]) / task.reference_sd[:, None]
    assert scaled.mean(1).abs().max() < 4.5 * share
    kurtosis = scaled.pow(4).mean(1)
    assert ((scaled.std(1) - 1).abs() < 4.5 * share * ((kurtosis - 1) / 4).sqrt()).all()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of 'two_moons', .*'sir', got 'moons'"):
        sbi_task("moons")


# --- simulator against its own density -----------------------------------------------------------------------------


def test_the_score_has_mean_zero(task):
    for theta in task.true_parameters[:3]:
        theta = theta.expand(2000, -1).clone().requires_grad_()
        with torch.no_grad():
            y = run(task, 2000, theta)[1]
        y = y if task.name == "slcp" else y[:, 0]
        (score,) = torch.autograd.grad(run(task, 2000, theta, y)[2]["y"].sum(), theta)
        if task.name == "two_moons":  # its support moves with theta1 + theta2, so only the other direction has mean 0
            score = score[:, 1:] - score[:, :1]
        assert z_scores(score).abs().max() < 4.5


@pytest.mark.parametrize("theta", [(0.3, 0.4), (-0.9, 0.2), (0.0, 0.0)])
def test_the_crescents_density_integrates_to_one(theta):
    law = Crescent(torch.tensor(theta, **F64))
    middle = law.sample((4000,)).mean(0)
    axis = torch.linspace(-0.3, 0.3, 1201, **F64)
    grid = middle + torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    assert float(law.log_prob(grid).exp().sum()) * 0.0005**2 == pytest.approx(1, abs=5e-3)  # the edge u = 0 is sharp


def test_the_crescent_is_a_half_ring_of_uniform_angle():
    law = Crescent(torch.tensor([[0.2, 0.5], [-0.7, 0.1]], **F64))
    place = torch.tensor([[0.25 - 0.7 / 2**0.5, 0.3 / 2**0.5], [0.25 - 0.6 / 2**0.5, 0.8 / 2**0.5]], **F64)
    u, v = (law.sample((3000,)) - place).flatten(0, 1).unbind(-1)
    assert stats.kstest(torch.hypot(u, v).numpy(), stats.norm(0.1, 0.01).cdf).pvalue > 0.01
    angle = torch.atan2(v, u).numpy()
    assert stats.kstest(angle, stats.uniform(-math.pi / 2, math.pi).cdf).pvalue > 0.01


def test_spike_sums_weigh_theta_as_the_spikes_do():
    task = in_double("bernoulli_glm")
    law = poutine.trace(task.model).get_trace().nodes["y"]["fn"]
    design, spikes = law.design, (torch.rand(6, 100, **F64) < 0.3).double()
    theta = task.reference[0, :6]
    ours = SpikeSums(theta[:, None], design).log_prob(spikes @ design)  # (theta, spikes)
    theirs = torch.distributions.Bernoulli(logits=theta @ design.T).log_prob(spikes[:, None]).sum(-1).T
    torch.testing.assert_close(ours - ours[:1], theirs - theirs[:1], rtol=0, atol=1e-9)


def test_gaussian_samples_by_its_root():
    root = torch.tensor([[2.0, 0.0], [1.0, 0.5]], **F64)
    law = Gaussian(torch.tensor([[1.0, -1.0]], **F64), scale_tril=root).expand((3,))
    draws = law.sample((20_000,))
    assert draws.shape == (20_000, 3, 2)
    white = torch.linalg.solve_triangular(root, (draws.flatten(0, 1) - law.loc[0])[..., None], upper=False)[..., 0]
    assert z_scores(torch.cat([white, white.square() - 1, white.prod(-1, keepdim=True)], -1)).abs().max() < 4.5


# --- priors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("two_moons", stats.uniform(-1, 2)),
        ("gaussian_linear", stats.norm(0, 0.1**0.5)),
        ("gaussian_linear_uniform", stats.uniform(-1, 2)),
        ("gaussian_mixture", stats.uniform(-10, 20)),
        ("slcp", stats.uniform(-3, 6)),
    ],
)
def test_parameters_that_are_alike_have_their_prior(name, law):
    theta = run(in_double(name), 3000)[0]
    assert stats.kstest(theta.flatten().numpy(), law.cdf).pvalue > 0.01
    assert abs(float(torch.corrcoef(theta.T)[0, 1])) < 4 / 3000**0.5


@pytest.mark.parametrize(
    ("name", "centre", "sd"),
    [
        ("lotka_volterra", [-0.125, -3, -0.125, -3], [0.5] * 4),
        ("sir", [math.log(0.4), math.log(0.125)], [0.5, 0.2]),
    ],
)
def test_rates_are_log_normal(name, centre, sd):
    theta = run(in_double(name), 3000)[0]
    standard = (theta.log() - torch.tensor(centre)) / torch.tensor(sd)
    assert z_scores(torch.cat([standard, standard.square() - 1], -1)).abs().max() < 4


def test_the_filters_prior_penalises_its_second_differences():
    task = in_double("bernoulli_glm")
    theta, _, logs = run(task, 5)
    f = torch.nn.functional.pad(theta[:, 1:], (2, 0))
    rough = f[:, 2:] - 2 * f[:, 1:-1] + f[:, :-2] + (torch.arange(9.0) / 9).sqrt() * theta[:, 1:]
    energy = -rough.square().sum(-1) / 2 - theta[:, 0].square() / 4
    torch.testing.assert_close(logs["theta"].diff(), energy.diff(), rtol=0, atol=1e-9)


# --- the model's joint density against the benchmark's reference posteriors ------------------------------------------


def log_joint(task, theta, y):
    logs = run(task, len(theta), theta, y.expand(len(theta), *y.shape))[2]
    return logs["theta"] + logs["y"]


@pytest.mark.parametrize("name", [name for name in SBI_TASKS if name != "two_moons"])
def test_reference_draws_meet_steins_identities(name):
    # for a density p on R^d: E[d_i log p] = 0, E[tanh(phi_i) d_i log p + 1 - tanh(phi_i)^2] = 0
    task = in_double(name)
    to = biject_to(poutine.trace(task.model).get_trace().nodes["theta"]["fn"].support)
    for y, draws in zip(task.observations, task.reference):
        phi = to.inv(draws).detach().requires_grad_()
        theta = to(phi)
        log_det = to.log_abs_det_jacobian(phi, theta)
        (score,) = torch.autograd.grad((log_joint(task, theta, y) + log_det).sum(), phi)
        spread = phi.detach().std(0)
        h = ((phi.detach() - phi.detach().mean(0)) / spread).tanh()
        identities = torch.cat([score, h * score + (1 - h.square()) / spread], -1)
        assert z_scores(identities).abs().max() < 4.5


def test_two_moons_on_a_grid_is_its_reference():
    task = in_double("two_moons")
    axis = (torch.arange(1600, **F64) + 0.5) / 800 - 1
    grid = torch.cartesian_prod(axis, axis)

    def statistics(theta, y):
        place = Crescent(theta)._place()
        radius = (y - place).norm(dim=-1, keepdim=True)  # it sees the Jacobian, which moves it by a tenth of its sd
        return torch.cat([theta, theta.square(), theta.prod(-1, keepdim=True), radius], -1)

    pooled = []
    for y, draws in zip(task.observations, task.reference):
        weights = log_joint(task, grid, y).softmax(0)
        near = weights > 0
        exact = weights[near] @ statistics(grid[near], y)
        errors = statistics(draws, y) - exact
        assert z_scores(errors).abs().max() < 4.5
        pooled.append(errors[:, -1])
    assert abs(float(z_scores(torch.cat(pooled)))) < 4


def test_gaussian_mixture_on_a_grid_is_its_reference():
    task = in_double("gaussian_mixture")
    for y, draws in zip(task.observations, task.reference):
        axes = [torch.linspace(max(-10.0, float(c) - 6), min(10.0, float(c) + 6), 801)[:-1] for c in y]
        steps = [a[1] - a[0] for a in axes]
        grid = torch.cartesian_prod(*(a + s / 2 for a, s in zip(axes, steps)))
        weights = log_joint(task, grid, y).softmax(0)

        def statistics(theta, y=y):
            distance = (theta - y).square().sum(-1, keepdim=True)
            return torch.cat([theta - y, distance, (-distance / 0.04).exp()], -1)

        assert z_scores(statistics(draws) - weights @ statistics(grid)).abs().max() < 4.5


def test_gaussian_linear_is_conjugate():
    task = in_double("gaussian_linear")
    for y, draws in zip(task.observations, task.reference):
        exact = torch.distributions.Normal(y / 2, 0.05**0.5)
        ours, theirs = log_joint(task, draws[:9], y), exact.log_prob(draws[:9]).sum(-1)
        torch.testing.assert_close(ours.diff(), theirs.diff(), rtol=0, atol=1e-9)
        assert stats.kstest(exact.cdf(draws).flatten().numpy(), "uniform").pvalue > 0.005


def test_gaussian_linear_uniform_is_a_truncated_normal():
    task = in_double("gaussian_linear_uniform")
    sd = 0.1**0.5
    for y, draws in zip(task.observations.numpy(), task.reference.numpy()):
        exact = stats.truncnorm((-1 - y) / sd, (1 - y) / sd, y, sd)
        ours = log_joint(task, torch.tensor(draws[:9]), torch.tensor(y)).numpy()
        np.testing.assert_allclose(np.diff(ours), np.diff(exact.logpdf(draws[:9]).sum(-1)), rtol=0, atol=1e-8)
        assert stats.kstest(exact.cdf(draws).ravel(), "uniform").pvalue > 0.005


# --- the dynamic simulators ----------------------------------------------------------------------------------------


def test_runge_kutta_has_order_four():
    def error(steps):
        x, v = runge_kutta4(
            lambda s: (s[1], -s[0]),
            (torch.ones((), **F64), torch.zeros((), **F64)),
            step_size=2 / steps,
            steps_between=steps,
            num_times=2,
        )
        return math.hypot(float(x[1]) - math.cos(2), float(v[1]) + math.sin(2))

    assert error(20) / error(40) == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("name", ["lotka_volterra", "sir"])
def test_the_equations_solution_is_scipys(name):
    task = in_double(name)
    for theta in task.true_parameters:
        trace = poutine.trace(poutine.condition(task.model, {"theta": theta})).get_trace()
        law, p = trace.nodes["y"]["fn"].base_dist, theta.tolist()
        if name == "sir":
            solved = solve_ivp(
                lambda t, s, p=p: [-p[0] * s[0] * s[1] / 1e6, p[0] * s[0] * s[1] / 1e6 - p[1] * s[1]],
                (0, 160),
                [1e6 - 1, 1],
                t_eval=17.0 * np.arange(10),
                rtol=1e-9,
                atol=1e-6,
            )
            np.testing.assert_allclose(law.probs, solved.y[1] / 1e6, rtol=0, atol=1e-4)
        else:
            solved = solve_ivp(
                lambda t, s, p=p: [p[0] * s[0] - p[1] * s[0] * s[1], -p[2] * s[1] + p[3] * s[0] * s[1]],
                (0, 20),
                [30, 1],
                t_eval=2.1 * np.arange(10),
                rtol=1e-10,
                atol=1e-12,
            )
            np.testing.assert_allclose(law.loc, np.log(solved.y).ravel(), rtol=0, atol=1e-4)


# --- batching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SBI_TASKS)
def test_a_mapped_run_is_a_run_each(name, dtype):
    torch.set_default_dtype(dtype)
    model = sbi_task(name).model

    def one(_):
        with PlainSampling():
            trace = poutine.trace(model).get_trace()
        return trace.nodes["theta"]["value"], trace.nodes["y"]["value"], trace.log_prob_sum()

    with pyro.validation_enabled(False):  # it looks at values, which vmap forbids
        theta, y, log_prob = torch.func.vmap(one, randomness="different")(torch.zeros(4))
    assert theta.dtype == y.dtype == dtype
    assert len(theta.unique(dim=0)) == len(y.flatten(1).unique(dim=0)) == 4
    for row in range(4):
        given = {"theta": theta[row], "y": y[row]}
        alone = poutine.trace(poutine.condition(model, given)).get_trace().log_prob_sum()
        torch.testing.assert_close(log_prob[row], alone, rtol=1e-4, atol=1e-4)
