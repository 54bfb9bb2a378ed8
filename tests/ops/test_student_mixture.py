"""Student-t mixtures: density against other libraries, score, draws, guard, and what EM must never do."""

import math

import pytest
import torch
from scipy import stats

from pyro_sb.ops.student_mixture import (
    StudentMixture,
    em_fit,
    em_step,
    kernel_start,
    products,
    student_log_density,
    tail_weight,
    weighted_covariance,
)

F64 = {"dtype": torch.float64}
INF = math.inf


def mixture(dim, df, seed=0):
    generator = torch.Generator().manual_seed(seed)
    df = torch.tensor(df, **F64)
    num = len(df)
    weights = torch.rand(num, generator=generator, **F64) + 0.2
    trils = torch.randn(num, dim, dim, generator=generator, **F64).tril(-1) + torch.diag_embed(
        torch.rand(num, dim, generator=generator, **F64) + 0.3
    )
    locs = 2 * torch.randn(num, dim, generator=generator, **F64)
    return StudentMixture((weights / weights.sum()).log(), locs, trils, df)


def moved(law, matrix, shift):
    """The law of ``matrix @ x + shift``."""
    scales = matrix @ law.scale_trils @ law.scale_trils.mT @ matrix.T
    return law._replace(locs=law.locs @ matrix.T + shift, scale_trils=torch.linalg.cholesky(scales))


def sample_and_weights(num, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num, generator=generator, **F64) ** 2
    points = torch.randn(num, dim, generator=generator, **F64)
    points[num // 3 :] = 0.3 * points[num // 3 :] + 3
    return points, weights / weights.sum()


# ---- density ----


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("df", [[5.0], [1.0, INF], [INF, 3.0, 0.7]])
def test_the_density_is_scipys(dim, df):
    law, x = mixture(dim, df), 3 * torch.randn(50, dim, **F64)
    expected = 0
    for weight, loc, tril, nu in zip(law.log_weights.exp(), law.locs, law.scale_trils, df, strict=True):
        part = stats.multivariate_t(loc.numpy(), (tril @ tril.T).numpy(), df=nu)  # df = inf is scipy's Gaussian
        expected = expected + float(weight) * torch.from_numpy(part.pdf(x.numpy()).reshape(-1))
    torch.testing.assert_close(law.log_prob(x), expected.log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("df", [[1.0], [4.0, INF]])
@pytest.mark.parametrize("guarded", [False, True])
def test_it_integrates_to_one_on_the_line(df, guarded):
    law = mixture(1, df)
    law = law.with_guard(0.2, 3.0, 9.0) if guarded else law
    angle = (torch.arange(20_000, **F64) + 0.5) / 20_000 * math.pi - math.pi / 2
    x = torch.tan(angle)  # dx = (1 + x^2) d(angle): the whole line, tails and all
    total = (law.log_prob(x[:, None]).exp() * (1 + x**2)).mean() * math.pi
    assert abs(float(total) - 1) < 1e-9


@pytest.mark.parametrize("guarded", [False, True])
def test_it_integrates_to_one_on_the_plane(guarded):
    law = mixture(2, [3.0, INF])
    law = law.with_guard(0.1, 4.0, 4.0) if guarded else law
    angle = (torch.arange(600, **F64) + 0.5) / 600 * math.pi - math.pi / 2
    x = torch.cartesian_prod(torch.tan(angle), torch.tan(angle))
    total = (law.log_prob(x).exp() * (1 + x**2).prod(1)).mean() * math.pi**2
    assert abs(float(total) - 1) < 1e-5


def test_a_guarded_density_is_its_parts_and_bounds_a_gaussians_weights():
    core = mixture(3, [INF, INF])
    law, x = core.with_guard(0.1, 3.0, 9.0), 5 * torch.randn(200, 3, **F64)
    guard = core._replace(scale_trils=3 * core.scale_trils, df=torch.full_like(core.df, 3.0))
    torch.testing.assert_close(law.log_prob(x).exp(), 0.9 * core.log_prob(x).exp() + 0.1 * guard.log_prob(x).exp())
    assert abs(float(law.log_weights.exp().sum()) - 1) < 1e-14
    wide = core._replace(scale_trils=1.5 * core.scale_trils)  # a Gaussian target that is wider than the core
    log_ratio = wide.log_prob(100 * x) - law.log_prob(100 * x)
    assert log_ratio.max() < 0 < (wide.log_prob(100 * x) - core.log_prob(100 * x)).min()


def test_the_density_follows_an_affine_map():
    law, x = mixture(3, [4.0, INF, 1.5]), torch.randn(40, 3, **F64)
    matrix, shift = torch.randn(3, 3, **F64), torch.randn(3, **F64)
    expected = law.log_prob(x) - torch.linalg.slogdet(matrix)[1]
    torch.testing.assert_close(moved(law, matrix, shift).log_prob(x @ matrix.T + shift), expected)
    torch.testing.assert_close(moved(law, matrix, shift).covariance, matrix @ law.covariance @ matrix.T)


def test_the_pooled_covariance_is_the_mixtures_about_the_component_means():
    law = mixture(2, [INF, INF, INF])
    centred = law._replace(locs=torch.zeros_like(law.locs))  # law of total variance without the part between the means
    parts = torch.distributions.MultivariateNormal(centred.locs, scale_tril=centred.scale_trils).covariance_matrix
    torch.testing.assert_close(law.covariance, (law.log_weights.exp()[:, None, None] * parts).sum(0))


@pytest.mark.parametrize("dim", [1, 4])
def test_many_degrees_of_freedom_are_a_gaussian(dim):
    squared = torch.linspace(0, 20, 30, **F64)
    near, limit = (student_log_density(squared, torch.tensor(df, **F64), dim) for df in (1e7, INF))
    torch.testing.assert_close(near, limit, rtol=0, atol=1e-4)
    torch.testing.assert_close(tail_weight(squared, torch.tensor(INF, **F64), dim), torch.ones_like(squared))


@pytest.mark.parametrize("df", [0.5, 3.0, 50.0, INF])
def test_the_tail_weight_is_the_densitys_slope(df):
    # d log t / dq = -u / 2 at squared radius q
    squared, df = torch.linspace(0, 50, 40, **F64).requires_grad_(), torch.tensor(df, **F64)
    (slope,) = torch.autograd.grad(student_log_density(squared, df, 3).sum(), squared)
    torch.testing.assert_close(tail_weight(squared.detach(), df, 3), -2 * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("df", [[2.0], [INF], [1.0, INF, 6.0]])
def test_the_score_is_the_densitys_gradient(df):
    law, x = mixture(4, df), (3 * torch.randn(30, 4, **F64)).requires_grad_()
    (expected,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    torch.testing.assert_close(law.score(x.detach()), expected, rtol=1e-10, atol=1e-10)
    for k in range(len(df)):
        (expected,) = torch.autograd.grad(law.component_log_prob(x)[:, k].sum(), x)
        torch.testing.assert_close(law.component_scores(x.detach())[:, k], expected, rtol=1e-10, atol=1e-10)


def test_responsibilities_are_shares_of_the_density_and_sharpen_far_apart():
    law, x = mixture(2, [3.0, INF]), torch.randn(20, 2, **F64)
    share = law.log_responsibilities(x).exp()
    torch.testing.assert_close(share.sum(1), torch.ones(20, **F64))
    torch.testing.assert_close(
        share * law.log_prob(x).exp()[:, None], (law.log_weights + law.component_log_prob(x)).exp()
    )
    apart = law._replace(locs=torch.tensor([[-1e4, 0.0], [1e4, 0.0]], **F64), df=torch.full((2,), INF, **F64))
    torch.testing.assert_close(apart.log_responsibilities(apart.locs).exp(), torch.eye(2, **F64))


# ---- draws ----


@pytest.mark.parametrize("df", [3.0, 8.0, INF])
def test_draws_have_the_radial_law(df):
    dim, law = 3, mixture(3, [df])
    squared = law.whiten(law.sample(20_000))[:, 0].square().sum(1).numpy()
    radial = stats.chi2(dim) if df == INF else stats.f(dim, df, scale=dim)
    assert stats.kstest(squared, radial.cdf).pvalue > 1e-3


def test_draws_have_the_mixtures_moments_and_shares():
    law, num = mixture(2, [9.0, INF, 9.0]), 40_000
    x, weights = law.sample(num), law.log_weights.exp()
    mean = weights @ law.locs
    assert ((x.mean(0) - mean) / x.std(0) * num**0.5).abs().max() < 4
    stretch = torch.tensor([9 / 7, 1.0, 9 / 7], **F64)[:, None, None]
    second = stretch * law.scale_trils @ law.scale_trils.mT + law.locs[:, :, None] * law.locs[:, None, :]
    products = x[:, :, None] * x[:, None, :]
    gap = products.mean(0) - (weights[:, None, None] * second).sum(0)
    assert (gap / products.std(0) * num**0.5).abs().max() < 4
    far = law._replace(locs=torch.tensor([[-1e3, 0.0], [0.0, 0.0], [1e3, 0.0]], **F64))
    counts = far.log_responsibilities(far.sample(num)).exp().sum(0)
    assert ((counts - num * weights) / (num * weights * (1 - weights)).sqrt()).abs().max() < 4


def test_draws_of_named_components_come_from_them():
    law = mixture(2, [INF, 5.0])._replace(locs=torch.tensor([[-1e3, 0.0], [1e3, 0.0]], **F64))
    index = torch.arange(100) % 2
    assert torch.equal(law.log_responsibilities(law.sample_components(index)).argmax(1), index)


# ---- fit ----


def penalised(law, points, weights, prior_scales, prior_count):
    r"""What EM climbs: n sum_i w_i log rho(x_i) - kappa / 2 sum_k (log |S_k| + tr(Lambda_k S_k^-1))."""
    scales = law.scale_trils @ law.scale_trils.mT
    shrinkage = torch.linalg.slogdet(scales)[1] + torch.linalg.solve(scales, prior_scales).diagonal(0, 1, 2).sum(1)
    return weights @ law.log_prob(points) / weights.square().sum() - prior_count / 2 * shrinkage.sum()


def start_of(points, num, df, seed=0):
    generator = torch.Generator().manual_seed(seed)
    locs = points[torch.randperm(len(points), generator=generator)[:num]]
    return kernel_start(locs, torch.eye(points.shape[1], **F64).repeat(num, 1, 1))._replace(
        df=torch.full((num,), df, **F64)
    )


def climb(law, points, weights, prior_scales, prior_count, num_steps):
    path = [law]
    for _ in range(num_steps):
        path.append(em_step(path[-1], points, weights, prior_scales, prior_count)[0])
    return path


@pytest.mark.parametrize("df", [1.0, 5.0, INF])
@pytest.mark.parametrize("num_components, prior_count", [(1, 0.1), (2, 0.1), (4, 20.0)])
def test_em_never_lowers_its_objective_and_ends_where_it_is_stationary(df, num_components, prior_count):
    points, weights = sample_and_weights(120, 2)
    start = start_of(points, num_components, df)
    prior_scales = start.scale_trils @ start.scale_trils.mT
    path = climb(start, points, weights, prior_scales, prior_count, 40)
    values = torch.stack([penalised(law, points, weights, prior_scales, prior_count) for law in path])
    assert values.diff().min() > -1e-9 * values.abs().max()

    law = climb(path[-1], points, weights, prior_scales, prior_count, 400)[-1]
    leaves = [law.log_weights.clone(), law.locs.clone(), law.scale_trils.clone()]
    free = StudentMixture(*(leaf.requires_grad_() for leaf in leaves), law.df)
    free_value = penalised(
        free._replace(log_weights=free.log_weights.log_softmax(0)), points, weights, prior_scales, prior_count
    )
    for slope in torch.autograd.grad(free_value, leaves):
        assert slope.tril().abs().max() < 1e-4 if slope.ndim == 3 else slope.abs().max() < 1e-4


@pytest.mark.parametrize("num, dim", [(1, 3), (7, 3), (5, 20)])
def test_an_em_step_is_the_same_with_stored_products_and_a_few_components_at_a_time(num, dim, monkeypatch):
    points, weights = sample_and_weights(90, dim)
    step = start_of(points, num, 4.0), points, weights, 2 * torch.eye(dim, **F64).repeat(num, 1, 1), 3.0
    fits = [em_step(*step, products(points))]
    for numbers in (1, 2 * points.numel(), 2**20):
        monkeypatch.setattr("pyro_sb.ops.student_mixture.NUMBERS", numbers)
        fits.append(em_step(*step))
    for fit, value in fits[1:]:
        assert value == pytest.approx(fits[0][1], abs=1e-11)
        for part, other in zip(fit, fits[0][0]):
            torch.testing.assert_close(part, other, rtol=1e-10, atol=1e-10)


def test_em_in_many_dimensions_stores_no_outer_products():
    points, weights = sample_and_weights(2000, 60)
    largest = 0

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel()) if isinstance(result, torch.Tensor) else largest
            return result

    with Largest():
        em_fit(points, weights, start_of(points, 40, 4.0), 4.0, 5.0, max_iter=2)
    assert largest <= 2**20 < points.numel() * 40 < points.numel() * 60


def test_em_reports_the_old_mixtures_mean_log_density():
    points, weights = sample_and_weights(60, 3)
    start = start_of(points, 3, 4.0)
    _, value = em_step(
        start,
        points,
        weights,
        torch.eye(3, **F64).repeat(3, 1, 1),
        1.0,
    )
    assert value == pytest.approx(float(weights @ start.log_prob(points)), abs=1e-12)


@pytest.mark.parametrize("df", [5.0, INF])
def test_the_fit_follows_an_affine_map(df):
    points, weights = sample_and_weights(200, 3)
    matrix, shift = torch.randn(3, 3, **F64), 1e5 * torch.ones(3, **F64)  # far from the origin: the fit centres
    start = start_of(points, 3, INF)
    fit = em_fit(points, weights, start, df, 5.0, max_iter=15, tol=-1.0)
    twin = em_fit(points @ matrix.T + shift, weights, moved(start, matrix, shift), df, 5.0, max_iter=15, tol=-1.0)
    expected = fit.log_prob(points) - torch.linalg.slogdet(matrix)[1]
    torch.testing.assert_close(twin.log_prob(points @ matrix.T + shift), expected, rtol=1e-7, atol=1e-7)


def test_one_gaussian_is_fitted_by_the_weighted_moments():
    points, weights = sample_and_weights(50, 4)
    fit = em_fit(points, weights, start_of(points, 1, INF), INF, 1e-12)
    torch.testing.assert_close(fit.locs[0], weights @ points)
    torch.testing.assert_close(
        fit.covariance, torch.cov(points.T, correction=0, aweights=weights), rtol=1e-8, atol=1e-8
    )


def test_strong_shrinkage_keeps_the_starts_shapes():
    points, weights = sample_and_weights(50, 2)
    start = start_of(points, 3, INF)
    torch.testing.assert_close(em_fit(points, weights, start, 5.0, 1e12).scale_trils, start.scale_trils)


def test_a_component_thinner_than_rounding_keeps_its_shape():
    # unit width across 1e10 along: the scatter has no correct digit left across
    along = torch.linspace(-1e10, 1e10, 200, **F64)[:, None] * torch.ones(1, 2, **F64)
    points, weights = along + torch.randn(200, 2, **F64), torch.full((200,), 1 / 200, **F64)
    start = kernel_start(torch.zeros(1, 2, **F64), 1e20 * torch.eye(2, **F64)[None])
    for df in (3.0, INF):
        fit = em_fit(points, weights, start, df, 1e-30, tol=-1.0)
        assert bool(torch.isfinite(fit.log_prob(points)).all())


@pytest.mark.parametrize("dim", [1, 3])
def test_the_weighted_covariance_is_torchs(dim):
    points, weights = sample_and_weights(40, dim)
    expected = torch.cov(points.T, correction=0, aweights=weights).reshape(dim, dim)
    torch.testing.assert_close(weighted_covariance(points + 7, weights), expected, rtol=1e-8, atol=1e-8)


def test_the_weighted_covariance_of_points_on_a_line_can_be_factored():
    points = torch.linspace(-1, 1, 20, **F64)[:, None] * torch.tensor([1.0, 2.0, 1e-3], **F64)
    torch.linalg.cholesky(weighted_covariance(points, torch.full((20,), 0.05, **F64)))
