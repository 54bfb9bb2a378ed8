"""The smoothed bridge: the Schrödinger system it solves, its marginals and coupling, its densities, what it refuses."""

import math
import warnings

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from pyro_sb.bridges import Bridge, Sampler, SmoothedBridge
from pyro_sb.bridges.diffusion.fit import DiffusionFit
from pyro_sb.bridges.diffusion.smoothed import log_mixture

F64 = {"dtype": torch.float64}


def untrained(draws, bridge=None, **options):
    """The net at zero, where the denoiser is that of a Gaussian with the draws' moments."""
    bridge = bridge or SmoothedBridge(draws.shape[1], hidden=(8,), **options)
    bridge.fit(draws, num_updates=1, learning_rate=1e-12, held_out=0.0, ema=None, progress=False)
    bridge.log_errors = torch.zeros_like(bridge.log_errors)
    return bridge


def spoilt(bridge):
    """The net made wrong."""
    with torch.no_grad():
        bridge.net.mean.head.weight.normal_(0, 0.02)
        bridge.net.mean.head.bias.normal_(0, 0.2)
    return bridge


def knowing(bridge):
    """The exact denoiser of the law that has the rows as its atoms."""

    def denoise(tau, z, features):
        scale = bridge.sde.at(tau).variance.mean()
        gates = bridge.log_weights - 0.5 * torch.cdist(z, bridge.rows).square() / scale
        return gates.softmax(-1) @ bridge.rows

    bridge._denoise = denoise
    return bridge


@pytest.mark.parametrize("epsilon", [0.5, 40.0])
def test_it_solves_the_schrodinger_system_by_quadrature(epsilon):
    # f0 = 1 and g1 = mu: the start is the reference's image of mu, the drift epsilon times the gradient of log h,
    # h(x, t) = int N(y; x, (1 - t) epsilon) g1(y) dy
    bridge = untrained(3 + 1.5 * torch.randn(200, 1, **F64), epsilon=epsilon, source_law="moment")
    mean, variance = bridge.location, bridge.covariance[0]
    y = mean + variance.sqrt() * torch.linspace(-9, 9, 4001, **F64)
    mu = Normal(mean, variance.sqrt()).log_prob(y) + (y[1] - y[0]).log()

    def log_h(x, t):
        return (Normal(x, math.sqrt((1 - t) * epsilon)).log_prob(y) + mu).logsumexp(-1, keepdim=True)

    x = torch.linspace(-6, 12, 7, **F64)[:, None].requires_grad_()
    start = bridge._start_log_prob((x - bridge.location) @ bridge.basis, bridge.location)
    torch.testing.assert_close(start.detach(), log_h(x, 0.0)[:, 0].detach(), rtol=1e-8, atol=1e-8)
    for t in (0.0, 0.4, 0.9):
        (slope,) = torch.autograd.grad(log_h(x, t).sum(), x)
        torch.testing.assert_close(bridge.drift(t, x.detach()), epsilon * slope, rtol=1e-6, atol=1e-6)
    given = math.sqrt(epsilon) * torch.linspace(-12, 12, 2001, **F64)  # the second: int N(x; y, epsilon) f0(x) dx = 1
    assert float(Normal(0.0, math.sqrt(epsilon)).log_prob(given).exp().sum() * given.diff()[0]) == pytest.approx(1)


def test_its_drift_is_epsilon_times_the_score_of_the_smoothed_rows():
    bridge = knowing(untrained(torch.randn(30, 2, **F64) @ torch.tensor([[1.0, 2.0], [0.0, 0.5]], **F64)))
    atoms = bridge.rows @ bridge.basis.T + bridge.location
    for t in (0.0, 0.9, 0.999):
        x = (atoms[:7] + 0.3).requires_grad_()
        log_q = log_mixture(x, atoms, bridge.log_weights, (1 - t) * bridge.epsilon)
        (slope,) = torch.autograd.grad(log_q.sum(), x)
        torch.testing.assert_close(bridge.drift(t, x.detach()), bridge.epsilon * slope, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_its_marginals_are_the_smoothed_laws():
    # X_t ~ q_s(t): the mean of log q_s over paths is that over direct draws of q_s
    bridge = knowing(untrained(torch.randn(12, 1, **F64) + 4 * (torch.arange(12)[:, None] % 2)))
    times, states = bridge.paths(4000, 300, solver="euler-maruyama")
    for k in (0, 60, 120, 200, 270):
        variance = float((1 - times[k]) * bridge.epsilon)
        x = (states[k] - bridge.location) @ bridge.basis
        direct = bridge.rows[torch.randint(12, (4000,))] + math.sqrt(variance) * torch.randn(4000, 1, **F64)
        for statistic in (
            lambda z, v=variance: log_mixture(z, bridge.rows, bridge.log_weights, v),
            lambda z: z[:, 0],
            lambda z: z[:, 0].square(),
        ):
            a, b = statistic(x), statistic(direct)
            assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / 4000).sqrt(), k


def test_its_coupling_is_the_schrodinger_plan():
    # mu Gaussian: given x0 the end is Gaussian, N(x0; y, epsilon) mu(y) normalised, whatever the number of steps
    bridge = untrained(torch.randn(200, 2, **F64) * torch.tensor([0.5, 3.0], **F64), epsilon=2.0)
    x0 = torch.tensor([1.0, -4.0], **F64)
    covariance = bridge.basis @ bridge.covariance @ bridge.basis.T
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + torch.eye(2) / 2.0)
    mean = posterior @ (torch.linalg.inv(covariance) @ bridge.location + x0 / 2.0)
    for num_steps in (1, 7):
        bridge.sampler.path_steps = num_steps
        x1 = bridge.transport(x0.expand(20_000, 2))
        assert ((x1.mean(0) - mean).abs() < 4 * (posterior.diagonal() / 20_000).sqrt()).all()
        ratios = torch.linalg.solve(posterior, x1.T.cov())
        assert (ratios - torch.eye(2)).abs().max() < 0.15


def test_its_start_is_the_mixture_over_the_rows():
    draws, weights = torch.randn(40, 2, **F64) * torch.tensor([1.0, 5.0], **F64), torch.rand(40, **F64)
    weights[:10] = 0
    bridge = SmoothedBridge(2, epsilon=7.0, hidden=(8,))
    bridge.fit(draws, weights=weights, num_updates=1, held_out=0.0, progress=False)
    components = Independent(Normal(draws[10:], math.sqrt(7.0)), 1)
    law = MixtureSameFamily(Categorical(weights[10:]), components)
    x = torch.randn(9, 2, **F64) * 6
    z = (x - bridge.location) @ bridge.basis
    torch.testing.assert_close(bridge._start_log_prob(z, bridge.location), law.log_prob(x), rtol=1e-9, atol=1e-9)
    states = bridge.paths(20_000, 2)[1][0]
    assert ((states.mean(0) - law.mean).abs() < 4 * (law.variance / 20_000).sqrt()).all()
    assert ((states.var(0) / law.variance - 1).abs() < 0.06).all()


@pytest.mark.parametrize("start", ["rows", "moment"])
@pytest.mark.parametrize("num_steps", [1, 6])
def test_weights_are_exact_for_a_bad_fit_and_few_steps(start, num_steps):
    draws = torch.randn(60, 2, **F64) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]], **F64)
    bridge = spoilt(untrained(draws, epsilon=3.0, source_law=start))
    bridge.sampler.path_steps = num_steps
    value, log_q = bridge().draws((40_000,))
    target = MultivariateNormal(value.mean(0), 0.4 * value.T.cov())
    weights = (target.log_prob(value) - log_q).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights))
    assert 0.05 < weights.std() < 5


def test_the_weights_of_a_context_are_exact():
    context = torch.randn(80, 1, **F64)
    bridge = SmoothedBridge(1, context_dim=1, hidden=(8,))
    bridge.fit(2 * context + torch.randn(80, 1, **F64), context=context, num_updates=5, progress=False)
    bridge = spoilt(bridge)
    value, log_q = bridge(torch.tensor([1.5], **F64)).draws((20_000,))
    weights = (Normal(value.mean(), 0.7 * value.std()).log_prob(value[:, 0]) - log_q).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights))
    assert not len(bridge.rows)


def test_sample_is_the_chain_of_draws_if_asked():
    bridge = spoilt(untrained(torch.randn(50, 2, **F64)))
    bridge.sampler = Sampler(num_steps=9, solver="ancestral", path_steps=9)
    torch.manual_seed(3)
    value = bridge().draws((5,)).value
    torch.manual_seed(3)
    assert torch.equal(bridge().sample((5,)), value)


def test_in_other_units_it_is_the_same_bridge():
    draws, laws = torch.randn(60, 2, **F64) * torch.tensor([1.0, 3.0], **F64), []
    for scale in (1.0, 50.0):
        torch.manual_seed(2)
        bridge = SmoothedBridge(2, hidden=(8,))
        bridge.fit(scale * draws, num_updates=10, progress=False)
        laws.append(bridge.drift(0.97, scale * draws[:5]) / scale)
        assert bridge.epsilon == pytest.approx(
            100 * float(bridge.unit**2 * bridge.covariance.diagonal().mean()), rel=1e-9
        )
    torch.testing.assert_close(laws[1], laws[0], rtol=1e-5, atol=1e-5)


def test_it_keeps_at_most_so_many_rows(monkeypatch):
    monkeypatch.setattr("pyro_sb.bridges.diffusion.smoothed.NUM_ROWS", 10)
    bridge = untrained(torch.randn(60, 2, **F64))
    assert bridge.rows.shape == (10, 2)
    law = MultivariateNormal(torch.zeros(2, **F64), torch.eye(2, **F64))
    bridge.fit(law, num_updates=2, progress=False)
    assert bridge.rows.shape == (10, 2)
    assert not len(untrained(torch.randn(60, 2, **F64), source_law="moment").rows)


def test_saved_and_loaded_it_has_its_epsilon_and_steps(tmp_path):
    bridge = untrained(torch.randn(60, 2, **F64))
    bridge.sampler.num_steps = 7
    bridge.save(tmp_path / "bridge.pt")
    loaded = Bridge.load(tmp_path / "bridge.pt")
    assert loaded.epsilon == bridge.epsilon and loaded.sampler == bridge.sampler
    assert loaded.given_epsilon is None and loaded.keeps_rows and torch.equal(loaded.rows, bridge.rows)


def test_a_fit_that_was_cut_short_goes_on_bit_for_bit(tmp_path, monkeypatch):
    draws, path = torch.randn(60, 2, **F64), tmp_path / "bridge.pt"
    monkeypatch.setattr("pyro_sb.bridges.diffusion.fit.PATIENCE", 1000)

    def fit(checkpoint):
        torch.manual_seed(4)
        bridge = SmoothedBridge(2, hidden=(8,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            bridge.fit(draws, num_updates=80, progress=False, checkpoint=checkpoint)
        return bridge.state_dict()

    whole, original, calls = fit(None), DiffusionFit._mean_loss, iter(range(10_000))

    def broken(self, *args):
        if torch.is_grad_enabled() and next(calls) == 41:
            raise OSError("the disk is full")
        return original(self, *args)

    monkeypatch.setattr(DiffusionFit, "_mean_loss", broken)
    with pytest.raises(OSError, match="disk"):
        fit(path)
    monkeypatch.setattr(DiffusionFit, "_mean_loss", original)
    resumed = fit(path)
    assert all(torch.equal(v, resumed[k]) if torch.is_tensor(v) else v == resumed[k] for k, v in whole.items())


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_that_is_no_variance_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon must be positive"):
        SmoothedBridge(2, epsilon=epsilon)


def test_what_it_refuses():
    draws = torch.randn(30, 2, **F64)
    with pytest.raises(ValueError, match="smoothed by noise"):
        SmoothedBridge(2).fit(draws, draws, progress=False)
    with pytest.raises(ValueError, match='"moment" where there is a context'):
        SmoothedBridge(2, context_dim=1, source_law="rows")
    with pytest.raises(ValueError, match="source_law must be one of"):
        SmoothedBridge(2, source_law="gaussian")
    with pytest.raises(ValueError, match="num_steps"):
        SmoothedBridge(2, num_steps=0)
