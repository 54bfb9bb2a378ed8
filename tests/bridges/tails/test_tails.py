"""A bridge between transformed marginals: the estimator's z-scores, exact densities, Itô's formula, save and load."""

import math

import numpy as np
import pyro
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, StudentT

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.bridges.tails.bridge import TailMatched, TailTransform
from pyro_sb.bridges.tails.fit import generalised_pareto_shape, quantile, tail_index
from pyro_sb.checks import as_draws, as_weights
from pyro_sb.training import FitHistory

INF = math.inf


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


class GaussianEnd(Bridge):
    """Brownian motion with drift that ends in the normal law of the target's moments: marginal, with a volatility.

    A context moves the mean linearly. It starts at a point, or at the source's mean.
    """

    density = "marginal"
    has_rsample = True
    mean: Tensor
    slope: Tensor
    factor: Tensor
    start: Tensor

    def __init__(self, dim, *, context_dim=0):
        super().__init__(dim, context_dim=context_dim)
        for name in ("mean", "slope", "factor", "start"):
            self.register_buffer(name, torch.empty(0))
        self.targets = []

    def fit(
        self, target, source=None, *, context=None, weights=None, progress=True, checkpoint=None, num_law_draws=4000
    ):
        self.targets.append(target)
        points = as_draws("target", target, self.dim, num_draws=num_law_draws)
        weights = as_weights(weights, points)
        self.mean, slope = weights @ points, points.new_zeros(self.context_dim, self.dim)
        residual = points - self.mean
        if self.context_dim:
            context = as_draws("context", context, self.context_dim, like=points)
            root = weights.sqrt()[:, None]
            slope = torch.linalg.lstsq(root * context, root * residual).solution
            residual = residual - context @ slope
        self.slope, self.factor = slope, torch.linalg.cholesky((weights[:, None] * residual).mT @ residual)
        self.start = points.new_zeros(self.dim)
        if source is not None:
            self.start = as_draws("source", source, self.dim, num_draws=num_law_draws, like=points).mean(0)
        return FitHistory(iterations=1, seconds=1e-3, converged=True)

    def like(self):
        return self.mean

    def drift(self, t, x, context=None):
        return (self._mean(context) - self.start).expand(x.shape)

    def volatility(self, t, x, context=None):
        return self.factor.expand(*x.shape, self.dim)

    def transport(self, x0, context=None):
        return x0 + self._mean(context) - self.start + torch.randn_like(x0) @ self.factor.mT

    def paths(self, num_paths, num_steps, context=None):
        context = self.check_context(context)
        batch = () if context is None else context.shape[:-1]
        noise = torch.randn(num_steps, num_paths, *batch, self.dim).to(self.mean) @ self.factor.mT
        steps = (self._mean(context) - self.start + noise * num_steps**0.5) / num_steps
        states = self.start + torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0)])
        return torch.linspace(0, 1, num_steps + 1).to(states), states

    def sample_rows(self, num, context):
        return self._mean(context) + torch.randn(num, self.dim).to(self.mean) @ self.factor.mT

    def log_prob_rows(self, x, context):
        return MultivariateNormal(self._mean(context), scale_tril=self.factor).log_prob(x)

    def _mean(self, context):
        return self.mean if context is None else self.mean + context @ self.slope


class Unfinished(Bridge):
    """A bridge whose fit fails."""

    def fit(self, target, source=None, **options):
        raise RuntimeError("no")


def student(df, num, dim=2):
    return StudentT(torch.as_tensor(df)).expand((dim,)).sample((num,))


def matched(df=3.0, dim=2, num=2000, inner=GaussianEnd, **options):
    bridge = TailMatched(inner(dim), df=df, **options)
    bridge.fit(student(3.0, num, dim), progress=False)
    return bridge


# the estimator


@pytest.mark.parametrize("df", [1.0, 2.0, 3.0, 5.0])
def test_one_over_the_index_of_student_t(df):
    sides = torch.stack(tail_index(student(df, 20_000, dim=40)))
    xi = (2 / sides).ravel()  # the shape of squared deviations, 500 exceedances each
    z = (xi - 2 / df) / ((1 + 2 / df) / math.sqrt(500))
    assert bool(torch.isfinite(sides).all())
    assert abs(z.mean()) < 0.5  # the threshold's bias, less than half a standard error
    assert 0.7 < z.std() < 1.3


def test_light_tails_count_as_light():
    normal, bounded = torch.randn(20_000, 40), torch.rand(20_000, 2)
    sides = torch.stack(tail_index(normal))
    assert (sides < INF).double().mean() < 0.12  # two standard errors, and a normal's square is not quite exponential
    assert bool((sides > 10).all())  # and where it errs, it says little
    assert bool(torch.stack(tail_index(bounded)).isinf().all())


def test_each_side_and_coordinate_has_its_own_index():
    x = torch.stack([student(2.0, 20_000, 1)[:, 0].clamp(min=-2), -torch.randn(20_000).exp(), torch.rand(20_000)], 1)
    lower, upper = tail_index(x)
    assert lower[0] == INF and 1.5 < upper[0] < 2.7
    assert lower[1] < 5 and upper[1] == INF
    assert lower[2] == upper[2] == INF


@pytest.mark.parametrize("xi", [-0.3, 0.0, 0.5, 1.0])
def test_the_pareto_shape_is_that_of_pyro_and_near_scipys(xi):
    y = torch.as_tensor(stats.genpareto.rvs(xi, size=500, random_state=1)).sort().values
    shape = generalised_pareto_shape(y, torch.ones(500))
    theirs = pyro.ops.stats.fit_generalized_pareto(y)[0]
    assert abs((shape * 500 + 5) / 510 - theirs) < 1e-9  # theirs is pulled towards 1/2 as by ten draws
    assert abs(shape - stats.genpareto.fit(y.numpy(), floc=0)[0]) < 0.03


def test_whole_weights_are_repeats():
    x, times = student(2.0, 4000), torch.randint(0, 3, (4000,))
    repeated, weighted = x.repeat_interleave(times, 0), (x, times.double())
    for level in (0.1, 0.5, 0.95):
        w = torch.ones(len(repeated))
        torch.testing.assert_close(quantile(repeated, w, level), quantile(*weighted, level), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.stack(tail_index(repeated, 0.2)), torch.stack(tail_index(x, 0.2, times)), rtol=0.02, atol=0
    )


def test_few_or_equal_draws_are_light():
    for x in (student(1.0, 20), torch.zeros(100, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0]]).repeat(500, 1)):
        assert bool(torch.stack(tail_index(x)).isinf().all())
    assert bool((torch.stack(tail_index(student(0.3, 20_000))) == 0.5).all())  # bounded below
    with pytest.raises(ValueError, match="fraction must lie in"):
        tail_index(torch.randn(10, 1), 0.6)


# the transform


def test_the_transform_is_a_bijection_with_its_determinant():
    transform = TailTransform(
        torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.1]), torch.tensor([2.0, INF]), torch.tensor([0.5, 3.0])
    )
    z = torch.tensor([[0.3, -1.2], [-2.0, 2.0]])
    x = transform(z)
    torch.testing.assert_close(transform.inv(x), z, rtol=1e-13, atol=0)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in z])
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(z, x), torch.linalg.slogdet(jacobian)[1], rtol=1e-13, atol=0
    )
    with pytest.raises(ValueError, match="scale must be positive"):
        TailTransform(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1))


def test_medians_and_quartiles_of_the_inner_target_are_normal():
    bridge, x = TailMatched(GaussianEnd(3)), 5 + 3 * student(2.0, 20_000, 3)
    bridge.fit(x)
    (z,) = bridge.bridge.targets
    q1, median, q3 = torch.quantile(z, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    torch.testing.assert_close(median, torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(q3 - q1, torch.full((3,), 2 * stats.norm.ppf(0.75)), rtol=0.02, atol=0)
    torch.testing.assert_close(bridge.transform(z), x)
    assert x.abs().max() > 200 and z.abs().max() < 6


@pytest.mark.parametrize("df", ["auto", 3.0, (2.0, INF), torch.tensor([2.0, INF]), ("auto", torch.tensor([1.0, 2.0]))])
def test_indices_asked_for_are_those_used(df):
    bridge = matched(df, num=20_000)
    sides = df if isinstance(df, tuple) else (df, df)
    for asked, used in zip(sides, (bridge.lower, bridge.upper)):
        truth = torch.full((2,), 3.0) if isinstance(asked, str) else torch.as_tensor(asked).expand(2)
        torch.testing.assert_close(used, truth.to(used), rtol=0.25 if isinstance(asked, str) else 0, atol=0)


def test_a_constant_coordinate_does_no_harm():
    x = torch.cat([torch.zeros(100, 1), torch.zeros(100, 1)], 1)
    x[:10, 1] = torch.randn(10)
    bridge = TailMatched(KernelLangevinBridge(2, metric="identity", epsilon=0.1))
    bridge.fit(x, progress=False)
    assert bridge.scale[0] == 1 and 0 < bridge.scale[1] < 1


# the law


@pytest.mark.parametrize("df", [2.0, 5.0, INF])
def test_the_density_integrates_to_one(df):
    bridge = matched((df, 3.0), dim=1)

    def density(s):  # x = sinh(s) reaches the tails
        point = torch.tensor([math.sinh(s)])
        return float(bridge().log_prob(point).exp()) * math.cosh(s)

    assert abs(integrate.quad(density, -30, 30, limit=400, points=[0], epsabs=1e-10)[0] - 1) < 1e-8


def test_draws_have_that_density():
    bridge = matched(2.0)
    draws = bridge().draws((4000,))
    torch.testing.assert_close(bridge().log_prob(draws.value), draws.log_q, rtol=1e-10, atol=1e-10)
    target = Independent(StudentT(torch.full((2,), 3.0)), 1)
    weights = (target.log_prob(draws.value) - draws.log_q).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(4000) and weights.std() < 2


def test_path_densities_too():
    bridge = TailMatched(KernelLangevinBridge(2, scheme="plain", num_steps=3), df=3.0)
    bridge.fit(student(3.0, 300), progress=False)
    assert bridge.density == "path"
    draws = bridge().draws((4000,))
    target = Independent(StudentT(torch.full((2,), 5.0), scale=0.7), 1)
    weights = (target.log_prob(draws.value) - draws.log_q).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(4000) and weights.std() < 4
    with pytest.raises(NotImplementedError, match=r"draws\(\)"):
        bridge().log_prob(torch.zeros(2))
    with pytest.raises(NotImplementedError, match='pass scheme="plain"'):
        matched(inner=lambda dim: KernelLangevinBridge(dim, num_steps=3), num=100)().draws((3,))


@pytest.mark.parametrize("df", [2.0, 5.0])
def test_weights_are_bounded_with_the_right_index_and_not_without(df):
    # out to 1e50, log target - log proposal of the matched one falls like a logarithm; the plain one's grows like x^2
    x = torch.logspace(1, 50, 50)[:, None]
    target = StudentT(df).log_prob(x[:, 0])
    training = student(df, 20_000, 1)
    right, light = TailMatched(GaussianEnd(1), df=df), TailMatched(GaussianEnd(1), df=INF)
    for bridge in (right, light):
        bridge.fit(training)
        bridge.bridge.factor *= 1.1
    assert bool(((target - right().log_prob(x)) < 1).all())
    assert (target - light().log_prob(x))[-1] > 1e50


def test_without_tails_it_is_an_affine_map_of_the_inner_bridge():
    x = 3 + 2 * torch.randn(500, 2)
    plain, bridge = GaussianEnd(2), TailMatched(GaussianEnd(2), df=INF)
    plain.fit(x), bridge.fit(x)
    torch.testing.assert_close(bridge().log_prob(x), plain().log_prob(x), rtol=1e-11, atol=0)
    torch.testing.assert_close(bridge.drift(0.5, x), (plain.mean - bridge.loc).expand(500, 2), rtol=1e-11, atol=0)


def test_it_is_equivariant_under_change_of_units():
    x, units, shift = student(2.0, 20_000), torch.tensor([1e-3, 50.0]), torch.tensor([4.0, -1e3])
    first, second = TailMatched(GaussianEnd(2)), TailMatched(GaussianEnd(2))
    first.fit(x), second.fit(x * units + shift)
    torch.testing.assert_close(second.lower, first.lower, rtol=1e-6, atol=0)
    points = student(2.0, 50)
    torch.testing.assert_close(
        second().log_prob(points * units + shift) + units.log().sum(), first().log_prob(points), rtol=1e-6, atol=1e-6
    )


def test_whole_weights_are_repeated_draws():
    x, times = student(3.0, 4001), torch.randint(0, 3, (4001,))
    weighted, repeated = TailMatched(GaussianEnd(2), df=3.0), TailMatched(GaussianEnd(2), df=3.0)
    weighted.fit(x, weights=times), repeated.fit(x.repeat_interleave(times, 0))
    points = student(3.0, 50)
    torch.testing.assert_close(weighted().log_prob(points), repeated().log_prob(points), rtol=1e-10, atol=1e-10)


def test_reparametrised_draws_carry_gradients():
    bridge = matched()
    bridge.loc.requires_grad_()
    value = bridge().rsample((3,))
    (gradient,) = torch.autograd.grad(value.sum(), bridge.loc)
    torch.testing.assert_close(gradient, torch.full((2,), 3.0))


def test_given_a_context():
    context = torch.randn(4000, 3)
    x = (context[:, :2] + 0.5 * torch.randn(4000, 2)).sinh()
    bridge = TailMatched(GaussianEnd(2, context_dim=3), df=2.0)
    bridge.fit(x, context=context)
    law = bridge(context[:5])
    assert law.batch_shape == (5,) and law.sample((7,)).shape == (7, 5, 2)
    draws = law.draws((7,))
    torch.testing.assert_close(law.log_prob(draws.value), draws.log_q, rtol=1e-9, atol=1e-9)
    assert (bridge(context).log_prob(x) - bridge(context.flip(0)).log_prob(x)).mean() > 1
    assert bridge.drift(0.5, x[:5], context[:5]).shape == bridge.transport(x[:5], context[:5]).shape == (5, 2)
    assert bridge.paths(6, 4, context[:5])[1].shape == (5, 6, 5, 2)


# source, distributions, paths, drift


def test_a_target_distribution_reaches_the_inner_bridge_as_one():
    bridge, law = TailMatched(GaussianEnd(2)), Independent(StudentT(torch.full((2,), 3.0)), 1)
    bridge.fit(law, num_law_draws=500)
    (inner,) = bridge.bridge.targets
    assert isinstance(inner, torch.distributions.Distribution)
    z = inner.sample((7,))
    x = bridge.transform(z)
    torch.testing.assert_close(inner.log_prob(z), law.log_prob(x) + bridge.transform.log_abs_det_jacobian(z, x))
    torch.testing.assert_close(bridge.lower, torch.full((2,), 3.0), rtol=0.25, atol=0)
    with pytest.raises(ValueError, match="got a distribution"):
        bridge.fit(law, weights=torch.ones(3))


def test_the_source_is_in_the_coordinates_of_x(tmp_path):
    law = MultivariateNormal(torch.tensor([50.0, 0.0]), torch.eye(2))
    bridge = TailMatched(KernelLangevinBridge(2, scheme="plain", num_steps=3), df=3.0)
    x = student(3.0, 300)
    bridge.fit(x, law.sample((100,)), progress=False)
    start = bridge.paths(50, 3)[1][0]
    assert bool(((start[:, 0] - 50).abs() < 6).all()) and bridge.density is None
    bridge.fit(x, law, progress=False)
    start = bridge.paths(50, 3)[1][0]
    assert bool(((start[:, 0] - 50).abs() < 6).all()) and bridge.density == "path"
    with pytest.raises(ValueError, match="source distribution"):
        bridge.save(tmp_path / "bridge.pt")
    with pytest.raises(ValueError, match=r"to_event\(1\)"):
        bridge.fit(x, Normal(torch.zeros(2), 1.0), progress=False)


def test_points_go_there_as_the_inner_bridge_takes_them():
    bridge, x0 = matched(), student(3.0, 10)
    pyro.set_rng_seed(3)
    x1 = bridge.transport(x0)
    pyro.set_rng_seed(3)
    torch.testing.assert_close(x1, bridge.transform(bridge.bridge.transport(bridge.transform.inv(x0))))
    times, states = bridge.paths(2000, 4)
    assert states.shape == (5, 2000, 2) and times[-1] == 1
    z = bridge.transform.inv(states[-1])
    torch.testing.assert_close(z.mean(0), bridge.bridge.mean, rtol=0, atol=4 * z.std() / math.sqrt(2000))
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 2\)"):
        bridge.transport(torch.zeros(3))


def test_the_drift_is_the_mean_velocity_and_the_volatility_the_spread():
    # E[x_{t+h} - x] / h and Var / h by 40-point Gauss-Hermite, twice, extrapolated to h = 0
    bridge = TailMatched(GaussianEnd(2), df=(2.0, 4.0))
    bridge.fit(torch.randn(2000, 2).cumsum(1).sinh() + 1)
    bridge.bridge.mean += torch.tensor([0.3, -0.2])
    x = torch.tensor([[-30.0, 2.5], [4.0, -1.0], [0.2, 60.0]])
    nodes, gauss = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(40))
    gauss = gauss / gauss.sum()
    z = bridge.transform.inv(x)
    b, sigma = bridge.bridge.drift(0.5, z), bridge.bridge.volatility(0.5, z)
    deviation = sigma.square().sum(-1).sqrt()

    def moments(h):
        ends = z + b * h + deviation * math.sqrt(h) * nodes[:, None, None]
        moved = bridge.transform(ends) - x
        return torch.stack([torch.einsum("k,kni->ni", gauss, moved**power) / h for power in (1, 2)])

    h = 1e-4
    velocity, spread = (moments(h) - 6 * moments(h / 2) + 8 * moments(h / 4)) / 3
    torch.testing.assert_close(bridge.drift(0.5, x), velocity, rtol=1e-5, atol=1e-6)
    sigma = bridge.volatility(0.5, x)
    torch.testing.assert_close(sigma.square().sum(-1), spread, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.linalg.matrix_rank(sigma), torch.full((3,), 2))


def test_the_drift_needs_a_volatility():
    bridge = matched(inner=lambda dim: KernelLangevinBridge(dim, num_steps=3), num=100)
    with pytest.raises(NotImplementedError, match=r"no volatility\(t, x\)"):
        bridge.drift(0.5, torch.zeros(2))


# the contract


@pytest.mark.parametrize("df", ["auto", 3.0, ("auto", INF), torch.tensor([2.0, INF])])
@pytest.mark.parametrize("nested", [False, True], ids=["one", "nested"])
def test_saved_and_loaded_is_the_same_law(df, nested, tmp_path):
    inner = KernelLangevinBridge(2, scheme="plain", num_steps=3)
    bridge = TailMatched(TailMatched(inner) if nested else inner, df=df, fraction=0.1)
    bridge.fit(student(3.0, 200), progress=False, checkpoint=tmp_path / "bridge.pt")
    torch.load(tmp_path / "bridge.pt", weights_only=True)
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert type(loaded) is TailMatched and loaded.bridge.describe() == bridge.bridge.describe()
    assert loaded.fraction == 0.1 and str(loaded.df) == str(df)
    draws = []
    for each in (bridge, loaded):
        pyro.set_rng_seed(1)
        draws.append(each().draws((5,)))
    assert torch.equal(draws[0].value, draws[1].value) and torch.equal(draws[0].log_q, draws[1].log_q)


def test_moved_to_another_dtype_it_follows():
    bridge = matched()
    x = student(3.0, 5)
    before = bridge.drift(0.5, x), bridge().log_prob(x)
    bridge.float()
    after = bridge.drift(0.5, x.float()), bridge().log_prob(x.float())
    assert after[0].dtype == after[1].dtype == bridge().sample().dtype == torch.float32
    for first, second in zip(before, after):
        torch.testing.assert_close(second.double(), first, rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused_and_nothing_is_lost():
    bridge = matched()
    before = {key: value.clone() for key, value in bridge.state_dict().items() if torch.is_tensor(value)}
    x = student(3.0, 10)
    for options, message in [
        ({"target": x[:, :1]}, "shape"),
        ({"target": x * math.nan}, "finite"),
        ({"target": x, "weights": -torch.ones(10)}, "non-negative"),
        ({"target": x, "source": torch.zeros(3, 5)}, "source must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            bridge.fit(**options)
    bridge.bridge = Unfinished(2)
    with pytest.raises(RuntimeError, match="no"):
        bridge.fit(x)
    assert all(torch.equal(getattr(bridge, name), before[name]) for name in ("loc", "scale", "lower", "upper"))


def test_bad_options_are_refused():
    for df in (0.0, -1.0, math.nan, "heavy", torch.ones(3), (1.0, 2.0, 3.0), (1.0, "heavy")):
        with pytest.raises(ValueError, match="df must be"):
            TailMatched(GaussianEnd(2), df=df)
    with pytest.raises(ValueError, match="fraction must lie in"):
        TailMatched(GaussianEnd(2), fraction=0.0)
    with pytest.raises(ValueError, match="bridge must be a Bridge"):
        TailMatched(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="fit"):
        TailMatched(GaussianEnd(2))()


def test_a_transform_prints_its_tails():
    few, many = (TailTransform(*(torch.full((d,), v) for v in (0.0, 1.0, 3.0, math.inf))) for d in (2, 30))
    assert repr(few) == "TailTransform(dim=2): tails of index 3 3 below, inf inf above"
    assert len(repr(many)) < 120 and "..." in repr(many)
