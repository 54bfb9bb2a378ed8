"""The simulators against their own densities and exact posteriors; sbibm's reference draws where its files are."""

import importlib.util
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp
from torch.distributions import biject_to

import pyro_sb.datasets as datasets
from pyro_sb.datasets import SBI_TASKS, sbi_task
from pyro_sb.datasets.simulator_laws import Crescent, Gaussian, SpikeSums, runge_kutta4
from pyro_sb.infer.model.runs import PlainSampling

VARIABLE = "PYRO_SB_SBIBM"
DIM = dict(zip(SBI_TASKS, [2, 10, 10, 2, 5, 10, 4, 2]))
F64 = {"dtype": torch.float64}


def simulated(name):
    """Five observations of ours, and exact draws of their posteriors where the law is simple."""
    task = SimpleNamespace(name=name, model=getattr(datasets, name))
    task.true_parameters, y, _ = run(task, 5)
    task.observations = y if name == "slcp" else y[:, 0]
    if name in POSTERIOR:
        task.reference_draws = torch.stack([POSTERIOR[name](y) for y in task.observations])
    return task


def crescents(y):
    """Draws of two moons' posterior: the crescent's angle and radius, then a sign; kept inside the box."""
    angle, radius = math.pi * (torch.rand(6000) - 0.5), 0.1 + 0.01 * torch.randn(6000)
    total, difference = radius * angle.cos() + 0.25 - y[0], y[1] - radius * angle.sin()
    sign = torch.where(torch.rand(6000) < 0.5, -1.0, 1.0)
    theta = torch.stack([sign * total - difference, sign * total + difference], -1) / 2**0.5
    return theta[(total > 0) & (theta.abs() < 1).all(-1)][:2000]


def two_widths(y):
    """Draws of the mixture's posterior: one width for both coordinates; kept inside the box."""
    theta = y + torch.randn(6000, 2) * torch.where(torch.rand(6000, 1) < 0.5, 1.0, 0.1)
    return theta[(theta.abs() < 10).all(-1)][:2000]


POSTERIOR = {
    "two_moons": crescents,
    "gaussian_mixture": two_widths,
    "gaussian_linear": lambda y: y / 2 + 0.05**0.5 * torch.randn(2000, 10),
    "gaussian_linear_uniform": lambda y: torch.stack([truncated(c) for c in y], -1),
}


def truncated(centre):
    """Draws of N(centre, 0.1) cut off at -1 and 1, by its distribution function."""
    law = torch.distributions.Normal(centre, 0.1**0.5)
    low, high = law.cdf(torch.tensor([-1.0, 1.0]))
    return law.icdf(low + (high - low) * torch.rand(2000))


HAS_SBIBM = bool(os.environ.get(VARIABLE)) or importlib.util.find_spec("sbibm") is not None
SOURCES = {"simulated": simulated} | ({"sbibm": sbi_task} if HAS_SBIBM else {})
NO_FILES = pytest.mark.skip(reason=f"{VARIABLE} is not set and sbibm not installed: its reference draws are not tested")
ORIGINALS = SBI_TASKS if HAS_SBIBM else [pytest.param("", marks=NO_FILES, id="no sbibm")]


def in_double(name, source="simulated"):
    torch.set_default_dtype(torch.float64)
    return SOURCES[source](name)


@pytest.fixture(params=[(source, name) for source in SOURCES for name in SBI_TASKS], ids="-".join)
def task(request):
    source, name = request.param
    return in_double(name, source)


@pytest.fixture(params=SOURCES)
def source(request):
    return request.param


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


# --- shapes, and sbibm's files -------------------------------------------------------------------------------------


def test_shapes_and_dtype(task):
    d = DIM[task.name]
    theta, y, _ = run(task, 3)
    assert theta.shape == (3, d)
    assert task.true_parameters.shape == (5, d)
    assert task.observations.shape == (5, *(y.shape[1:] if task.name == "slcp" else y.shape[2:]))
    assert theta.dtype == y.dtype == task.observations.dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert run(task, 3)[1].dtype == torch.float32


@pytest.mark.parametrize("name", ORIGINALS)
def test_sbibms_reference_draws_agree_with_their_moments(name):
    task, n = in_double(name, "sbibm"), 2000
    draws = task.reference_draws
    assert draws.shape == (5, n, DIM[name])
    assert task.reference_mean.shape == task.reference_sd.shape == (5, DIM[name])
    share = (1 / n - 1 / 10_000) ** 0.5  # 2,000 of the 10,000
    scaled = (draws - task.reference_mean[:, None]) / task.reference_sd[:, None]
    assert scaled.mean(1).abs().max() < 4.5 * share
    kurtosis = scaled.pow(4).mean(1)
    assert ((scaled.std(1) - 1).abs() < 4.5 * share * ((kurtosis - 1) / 4).sqrt()).all()


def write_table(path, rows):
    names = ",".join(f"column_{i}" for i in range(rows.shape[-1]))
    np.savetxt(path, np.atleast_2d(rows), delimiter=",", header=names, comments="", fmt="%.17g")


def write_package(root, arrays):
    """bernoulli_glm's files as the package sbibm has them; importing it fails, as it does without its dependencies."""
    files = root / "sbibm" / "tasks" / "bernoulli_glm" / "files"
    for k in range(5):
        folder = files / f"num_observation_{k + 1}"
        folder.mkdir(parents=True)
        write_table(folder / "observation.csv", arrays["observations"][k])
        write_table(folder / "true_parameters.csv", arrays["true_parameters"][k])
        write_table(folder / "reference_posterior_samples.csv.bz2", arrays["draws"][k])
    torch.save(torch.from_numpy(arrays["design_matrix"]), files / "design_matrix.pt")
    (root / "sbibm" / "__init__.py").write_text("raise ImportError('it must not be imported')")


def write_flat(root, arrays):
    draws = arrays["draws"]
    moments = {"reference": draws[:, ::5], "reference_mean": draws.mean(1), "reference_sd": draws.std(1, ddof=1)}
    np.savez(root / "bernoulli_glm.npz", **{k: v for k, v in arrays.items() if k != "draws"}, **moments)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    shapes = {"observations": (5, 10), "true_parameters": (5, 10), "draws": (5, 50, 10), "design_matrix": (30, 10)}
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("write", [write_package, write_flat])
def test_a_folder_gives_back_what_was_written(tmp_path, arrays, write, monkeypatch):
    torch.set_default_dtype(torch.float64)
    write(tmp_path, arrays)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    task = sbi_task("bernoulli_glm", root=tmp_path)  # root comes before the variable
    np.testing.assert_array_equal(task.observations, arrays["observations"])
    np.testing.assert_array_equal(task.true_parameters, arrays["true_parameters"])
    np.testing.assert_array_equal(task.reference_draws, arrays["draws"][:, ::5])
    np.testing.assert_allclose(task.reference_mean, arrays["draws"].mean(1), rtol=0, atol=1e-15)
    np.testing.assert_allclose(task.reference_sd, arrays["draws"].std(1, ddof=1), rtol=1e-14)
    law = poutine.trace(task.model).get_trace().nodes["y"]["fn"]
    np.testing.assert_array_equal(law.design, arrays["design_matrix"])
    with pytest.raises(FileNotFoundError, match=r"tasks/slcp/files, or a folder with slcp.npz; got .*--no-deps sbibm"):
        sbi_task("slcp", root=tmp_path)


def test_an_installed_sbibm_is_read_and_never_imported(tmp_path, arrays, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, arrays)
    assert sbi_task("bernoulli_glm").reference_draws.shape == (5, 10, 10)
    assert "sbibm" not in sys.modules


def test_without_files_the_error_says_what_to_do(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=rf"pip install --no-deps sbibm`.*{VARIABLE}.*pyro_sb.datasets.slcp"):
        sbi_task("slcp")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of .'two_moons', .*'sir'.*, got 'moons'"):
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
    theta = run(task, 6)[0]
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


# --- the model's joint density against its simulator and against posteriors -----------------------------------------


def log_joint(task, theta, y):
    logs = run(task, len(theta), theta, y)[2]
    return logs["theta"] + logs["y"]


def stein(task, theta, y, centre):
    """Terms of mean zero: d_i log p(phi, y), and t d_i log p + d_i t with t = tanh(phi_i + centre). Shape (n, 2 d)."""
    to = biject_to(poutine.trace(task.model).get_trace().nodes["theta"]["fn"].support)
    phi = to.inv(theta).detach().requires_grad_()
    inside = to(phi)
    log_p = log_joint(task, inside, y) + to.log_abs_det_jacobian(phi, inside)
    (score,) = torch.autograd.grad(log_p.sum(), phi)
    spread = phi.detach().std(0)
    t = ((phi.detach() - phi.detach().mean(0)) / spread + centre).tanh()
    return torch.cat([score, t * score + (1 - t.square()) / spread], -1)


@pytest.mark.parametrize("name", [name for name in SBI_TASKS if name != "two_moons"])
def test_simulated_pairs_meet_steins_identities(name):
    # theta given y follows the joint density if both hold for every function of y too: here a summary shifts the tanh
    task = in_double(name)
    theta, y, _ = run(task, 4000)
    y = y if name == "slcp" else y[:, 0]
    summary = y.flatten(1).clamp_min(1e-3).log() if name in ("sir", "lotka_volterra") else y.flatten(1)
    standard = (summary - summary.mean(0)) / summary.std(0).clamp_min(1e-6)
    for column in (0, -1):
        assert z_scores(stein(task, theta, y, standard[:, column, None])).abs().max() < 4.5


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name != "two_moons"])  # its support moves with theta
def test_sbibms_reference_draws_meet_steins_identities(name):
    task = in_double(name, "sbibm")
    for y, draws in zip(task.observations, task.reference_draws):
        assert z_scores(stein(task, draws, y.expand(len(draws), *y.shape), 0.0)).abs().max() < 4.5


def test_two_moons_on_a_grid_is_its_reference(source):
    task = in_double("two_moons", source)
    axis = (torch.arange(1600, **F64) + 0.5) / 800 - 1
    grid = torch.cartesian_prod(axis, axis)

    def statistics(theta, y):
        place = Crescent(theta)._place()
        radius = (y - place).norm(dim=-1, keepdim=True)  # it sees the Jacobian, which moves it by a tenth of its sd
        return torch.cat([theta, theta.square(), theta.prod(-1, keepdim=True), radius], -1)

    pooled = []
    for y, draws in zip(task.observations, task.reference_draws):
        weights = log_joint(task, grid, y.expand(len(grid), 2)).softmax(0)
        near = weights > 0
        exact = weights[near] @ statistics(grid[near], y)
        errors = statistics(draws, y) - exact
        assert z_scores(errors).abs().max() < 4.5
        pooled.append(errors[:, -1])
    assert abs(float(z_scores(torch.cat(pooled)))) < 4


def test_gaussian_mixture_on_a_grid_is_its_reference(source):
    task = in_double("gaussian_mixture", source)
    for y, draws in zip(task.observations, task.reference_draws):
        axes = [torch.linspace(max(-10.0, float(c) - 6), min(10.0, float(c) + 6), 801)[:-1] for c in y]
        steps = [a[1] - a[0] for a in axes]
        grid = torch.cartesian_prod(*(a + s / 2 for a, s in zip(axes, steps)))
        weights = log_joint(task, grid, y.expand(len(grid), 2)).softmax(0)

        def statistics(theta, y=y):
            distance = (theta - y).square().sum(-1, keepdim=True)
            return torch.cat([theta - y, distance, (-distance / 0.04).exp()], -1)

        assert z_scores(statistics(draws) - weights @ statistics(grid)).abs().max() < 4.5


def test_gaussian_linear_is_conjugate(source):
    task = in_double("gaussian_linear", source)
    for y, draws in zip(task.observations, task.reference_draws):
        exact = torch.distributions.Normal(y / 2, 0.05**0.5)
        ours, theirs = log_joint(task, draws[:9], y.expand(9, 10)), exact.log_prob(draws[:9]).sum(-1)
        torch.testing.assert_close(ours.diff(), theirs.diff(), rtol=0, atol=1e-9)
        assert stats.kstest(exact.cdf(draws).flatten().numpy(), "uniform").pvalue > 0.005


def test_gaussian_linear_uniform_is_a_truncated_normal(source):
    task = in_double("gaussian_linear_uniform", source)
    sd = 0.1**0.5
    for y, draws in zip(task.observations.numpy(), task.reference_draws.numpy()):
        exact = stats.truncnorm((-1 - y) / sd, (1 - y) / sd, y, sd)
        ours = log_joint(task, torch.tensor(draws[:9]), torch.tensor(y).expand(9, 10)).numpy()
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
    model = getattr(datasets, name)

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
