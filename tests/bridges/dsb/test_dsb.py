"""DSB: exact between Gaussians; IPF starts at the score model; known plans are found; bad input is refused."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sb.bridges import DSB, SGM, Bridge
from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.data import read_pairs, read_target
from pyro_sb.bridges.dsb.data import ReferenceChain, read_source_law, reversed_paths, sinkhorn_pairs
from pyro_sb.bridges.dsb.fit import DSBFit, Iterations, measured_steps
from pyro_sb.bridges.dsb.half import Guide
from pyro_sb.ops.brownian import SCHEDULES
from pyro_sb.ops.closed_form import gaussian_bridge, gaussian_ipf
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.regression import Affine

F64 = {"dtype": torch.float64}
QUICK = {"num_iterations": 1, "num_updates": 10, "learning_rate": 5e-4, "num_pairs": 200, "progress": False}


def covariance(dim, floor=0.2):
    a = torch.randn(dim, dim, **F64)
    return a @ a.T + floor * torch.eye(dim, **F64)


def between_gaussians(dim=3, epsilon=0.7, source_cov=None, **options):
    """A bridge that has seen moments alone, and the closed form between them."""
    cov0 = covariance(dim) if source_cov is None else source_cov
    mean0, mean1, cov1 = torch.randn(dim, **F64), torch.randn(dim, **F64), covariance(dim)
    bridge = DSB(dim, epsilon=epsilon, hidden=(8,), **options)
    ends = [Guide(Affine(mean, torch.empty(dim, 0, **F64)), cov) for mean, cov in ((mean0, cov0), (mean1, cov1))]
    bridge.ahead.adopt(*ends, epsilon)
    bridge.back.adopt(*ends[::-1], epsilon)
    bridge.double()
    bridge.source, bridge._source_kind = MultivariateNormal(mean0, cov0), "law"
    return bridge, gaussian_bridge(mean0, cov0, mean1, cov1, epsilon)


def affine_of(function, dim):
    """Matrix and offset of an affine map of rows."""
    offset = function(torch.zeros(1, dim, **F64))[0]
    return (function(torch.eye(dim, **F64)) - offset).T, offset


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_before_it_has_learnt_both_chains_are_the_gaussian_bridge_for_any_number_of_steps(num_steps, schedule):
    bridge, exact = between_gaussians(num_steps=num_steps, schedule=schedule)
    for forward, mean, cov, end_mean, end_cov, cross in [
        (True, exact.mean0, exact.cov0, exact.mean1, exact.cov1, exact.cross_covariance),
        (False, exact.mean1, exact.cov1, exact.mean0, exact.cov0, exact.cross_covariance.mT),
    ]:
        chain = bridge.chain(forward)
        given, start = bridge.given(chain.half, None), mean
        joint = cov  # Cov(start, state)
        for k in range(num_steps):
            matrix, offset = affine_of(lambda x: chain.mean(k, x, given), 3)  # noqa: B023
            scale = chain.half.step(chain.times[k], chain.times[k + 1], mean[None], given, 0.7).scale[0]
            noise = chain.half.basis * scale.square() @ chain.half.basis.T
            mean, cov, joint = matrix @ mean + offset, matrix @ cov @ matrix.T + noise, joint @ matrix.T
        torch.testing.assert_close(mean, end_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cov, end_cov, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(joint, cross, rtol=1e-9, atol=1e-9)
        assert start is not None


@pytest.mark.parametrize("num_steps", [1, 5])
def test_between_gaussians_the_path_s_density_is_the_draw_s_own(num_steps):
    bridge, exact = between_gaussians(num_steps=num_steps)
    target = MultivariateNormal(exact.mean1, exact.cov1)
    draws = bridge().draws((40,))
    torch.testing.assert_close(draws.log_q, target.log_prob(draws.value), rtol=1e-8, atol=1e-8)
    x = 3 * torch.randn(6, 3, **F64)  # and backwards, from anywhere
    torch.testing.assert_close(bridge.path_log_prob(x, num_paths=1), target.log_prob(x), rtol=1e-8, atol=1e-8)


def test_the_default_source_has_the_target_s_moments_and_its_density():
    target = torch.randn(500, 2, **F64) * torch.tensor([0.3, 4.0], **F64) + 7
    bridge = DSB(2, hidden=(8,), num_steps=3)
    bridge.fit(target, **QUICK, held_out=0.0)
    given = bridge.given(bridge.ahead, None)
    law = dist.Normal(target.mean(0), target.std(0, correction=0)).to_event(1)
    x = bridge.start(1000, given)
    torch.testing.assert_close(bridge._start_log_prob(x, given), law.log_prob(x), rtol=1e-6, atol=1e-6)
    scores = (x - target.mean(0)) / target.std(0)
    assert bool((scores.mean(0).abs() < 4 / 1000**0.5).all()) and bool(((scores.var(0) - 1).abs() < 0.2).all())


def test_drifts_are_the_gaussian_bridge_s_both_ways():
    bridge, exact = between_gaussians()
    back = gaussian_bridge(exact.mean1, exact.cov1, exact.mean0, exact.cov0, exact.epsilon)
    x = torch.randn(5, 3, **F64)
    for t in (0.0, 0.3, 0.9):
        torch.testing.assert_close(bridge.drift(t, x), exact.drift(t, x), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(bridge.drift(1 - t, x, backward=True), back.drift(t, x), rtol=1e-8, atol=1e-8)


def test_given_a_context_it_starts_at_the_gaussian_bridge_between_the_regressions():
    context = torch.randn(400, 2, **F64)
    slope, rest = torch.tensor([[1.0, -2.0], [0.5, 0.0]], **F64), torch.tensor([[0.5, 0.0], [0.4, 0.3]], **F64)
    noise = torch.randn(400, 2, **F64)
    noise = noise - noise.mean(0)
    target = context @ slope.T + noise @ rest.T
    bridge = DSB(2, context_dim=2, epsilon=0.5, hidden=(8,), num_steps=3)
    bridge.fit(target, context=context, held_out=0.0, **QUICK)
    bridge.ahead.net.reset(), bridge.back.net.reset()
    for half in (bridge.ahead, bridge.back):
        half.log_spread = torch.zeros_like(half.log_spread)
    place = torch.tensor([1.0, -1.0], **F64)
    draws = bridge(place).draws((30,))
    left = (
        target
        - target.mean(0)
        - (context - context.mean(0)) @ torch.linalg.lstsq(context - context.mean(0), target - target.mean(0)).solution
    )
    mean = (
        target.mean(0)
        + (place - context.mean(0)) @ torch.linalg.lstsq(context - context.mean(0), target - target.mean(0)).solution
    )
    law = MultivariateNormal(mean, left.T @ left / 400)
    torch.testing.assert_close(draws.log_q, law.log_prob(draws.value), rtol=0, atol=2e-2)  # the ridge's doing


def test_the_published_reversal_of_a_gaussian_bridge_is_its_other_half_to_second_order():
    # E[x + B(x') - B(x) | x] against F(x), exactly, from the joint Gaussian law of a step: errors fall as h^2
    errors = []
    for num_steps in (20, 40, 80):
        torch.manual_seed(1)
        bridge, exact = between_gaussians(dim=1, num_steps=num_steps, schedule="constant")
        bridge.ahead.take_steps(bridge._times()), bridge.back.take_steps(bridge._times())
        ahead, back, k = bridge.chain(True), bridge.chain(False), num_steps // 2
        given, behind = bridge.given(ahead.half, None), bridge.given(back.half, None)
        mean, cov = exact.marginal(float(ahead.times[k + 1]))  # of x', where B's step begins
        matrix, offset = affine_of(lambda x: back.mean(num_steps - 1 - k, x, behind), 1)  # noqa: B023
        size = ahead.times[k + 1] - ahead.times[k]
        slope = cov @ matrix.T / (matrix @ cov @ matrix.T + exact.epsilon * size)  # E[x' | x]
        goal = 1 + matrix * slope - matrix
        learnt, _ = affine_of(lambda x: ahead.mean(k, x, given), 1)  # noqa: B023
        errors.append((goal - learnt).abs().item())
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:])]
    assert all(1.8 < order < 2.2 for order in orders)


def test_mean_matching_goals_are_the_earlier_state_where_the_other_chain_is_brownian():
    bridge, _ = between_gaussians(dim=2, num_steps=5)
    x = torch.randn(7, 2, **F64)
    times = bridge._times()
    paths = reversed_paths(ReferenceChain(times, 0.7, None), x, bridge.given(bridge.back, None), None)
    torch.testing.assert_close(paths.states[-1], x)  # the learner's end is where the noising began
    torch.testing.assert_close(paths.goals, paths.states[1:], rtol=1e-12, atol=1e-12)


def test_the_ornstein_uhlenbeck_reference_leaves_the_source_alone():
    times, epsilon = torch.linspace(0, 1, 2001, **F64), 3.0
    bridge, exact = between_gaussians(dim=1, num_steps=5)
    given = bridge.given(bridge.back, None)
    chain = ReferenceChain(times, epsilon, exact.cov0.diagonal())
    mean, variance = exact.mean0.clone(), exact.cov0.diagonal().clone()
    for k, size in enumerate(times.diff()):
        slope, offset = affine_of(lambda x: chain.mean(k, x, given), 1)  # noqa: B023
        mean, variance = slope[0] * mean + offset, slope[0].square() * variance + epsilon * size
    torch.testing.assert_close(mean, exact.mean0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance, exact.cov0.diagonal(), rtol=1e-2, atol=0)  # to first order in the step


@pytest.mark.slow
@pytest.mark.parametrize(("variance", "most"), [("reference", (0.15, 0.2, 0.3)), ("measured", (0.2, 0.25, 0.35))])
def test_the_first_iteration_of_ipf_is_the_score_model(variance, most):
    # the same noising on both sides: rate b, to unit variance; SGM learns by denoising, DSB by reversing paths
    rate, target = 4.0, torch.cat([torch.randn(4000, 1) * 0.3 - 1, torch.randn(4000, 1) * 0.3 + 1])
    score = SGM(1, b_min=rate, b_max=rate, power=1.0, hidden=(64, 64))
    score.fit(target, num_updates=1500, progress=False)
    bridge = DSB(1, epsilon=rate, method="ipf", num_steps=50, variance=variance, hidden=(64, 64))
    source = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    bridge.fit(target, source, reference="ou", num_iterations=1, num_updates=1500, progress=False)
    x = torch.linspace(-1.5, 1.5, 41)[:, None]
    for t, share in zip((0.2, 0.5, 0.8), most):
        ours, theirs = bridge.drift(t, x), score.drift(t, x)
        assert (ours - theirs).square().mean().sqrt() < share * theirs.square().mean().sqrt()


@pytest.mark.slow
def test_a_known_schroedinger_plan_is_found():
    # the target of a mixture potential's plan from N(0, 1): its bridge is that plan, and no other has its means
    epsilon = 0.5
    potential = MixturePotential(
        torch.log(torch.tensor([0.5, 0.5])), torch.tensor([[-1.2], [1.2]]), torch.tensor([[0.25], [0.25]]), epsilon
    )
    x0 = torch.randn(20_000, 1)
    target = potential.plan_sample(x0)
    source = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    bridge = DSB(1, epsilon=epsilon, hidden=(64, 64))
    bridge.fit(target, source, num_iterations=4, num_updates=400, progress=False)
    place = torch.linspace(-1.5, 1.5, 7)[:, None]
    ours = bridge.transport(place.expand(4000, 7, 1)).mean(0)
    exact = potential.plan_sample(place.expand(4000, 7, 1).reshape(-1, 1)).reshape(4000, 7, 1).mean(0)
    assert (ours - exact).square().mean().sqrt() < 0.15
    assert (exact[-1] - exact[0]) > 1.5  # the coupling is far from independent


@pytest.mark.slow
def test_what_a_regression_cannot_see_is_learnt_from_the_context():
    # the mean is |c|, whose regression on c is flat; a context that left its row would leave the flat law
    context = 4 * torch.rand(4000, 1) - 2
    target = context.abs() + 0.2 * torch.randn(4000, 1)
    for method in ("imf", "ipf"):
        bridge = DSB(1, context_dim=1, epsilon=1.0, method=method, hidden=(64, 64), num_steps=20)
        bridge.fit(target, context=context, num_iterations=2, num_updates=300, num_pairs=4000, progress=False)
        place = torch.tensor([[-1.5], [-0.75], [0.75], [1.5]])
        means = bridge(place).sample((1000,)).mean(0)
        assert (means - place.abs()).abs().max() < (0.15 if method == "imf" else 0.3)


def test_sinkhorn_pairs_have_the_bridge_s_correlation():
    x, y = torch.randn(8192, 1, **F64), torch.randn(8192, 1, **F64)
    index = sinkhorn_pairs(x, y, epsilon=1.0)
    correlation = torch.corrcoef(torch.cat([x[index], y], 1).T)[0, 1]
    assert abs(correlation - (math.sqrt(5) - 1) / 2) < 4 * (1 - 0.618**2) / 8192**0.5 + 0.01


@pytest.mark.parametrize("method", ["imf", "ipf"])
def test_steps_have_the_reference_s_variance_where_it_is_asked_for(method):
    bridge = DSB(2, epsilon=0.3, method=method, hidden=(8,), num_steps=4, variance="reference")
    bridge.fit(torch.randn(100, 2, **F64), **QUICK)
    for forward in (True, False):
        chain = bridge.chain(forward)
        for now, then in zip(chain.times[:-1], chain.times[1:]):
            law = chain.half.step(now, then, torch.randn(3, 2, **F64), bridge.given(chain.half, None), 0.3)
            torch.testing.assert_close(law.scale.square(), (0.3 * (then - now)).expand_as(law.scale), rtol=1e-9, atol=0)


def as_ipf_learns_it(bridge):
    """The same chains, in steps whose variances are numbers of a table."""
    for forward in (True, False):
        chain = bridge.chain(forward)
        x, given = torch.zeros(1, bridge.dim, **F64), bridge.given(chain.half, None)
        steps = list(zip(chain.times[:-1], chain.times[1:]))
        scales = [chain.half.step(now, then, x, given, bridge.epsilon).scale[0] for now, then in steps]
        chain.half.take_steps(chain.times)
        units = bridge.epsilon * chain.times.diff()[:, None]
        chain.half.step_logs = (torch.stack(scales).square() / units).log()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_out_of_a_table_are_the_gaussian_bridge_s(schedule):
    bridge, exact = between_gaussians(num_steps=5, schedule=schedule)
    as_ipf_learns_it(bridge)
    draws = bridge().draws((40,))
    law = MultivariateNormal(exact.mean1, exact.cov1)
    torch.testing.assert_close(draws.log_q, law.log_prob(draws.value), rtol=1e-8, atol=1e-8)
    bridge.num_steps = 500  # shorter steps have the reference's variance
    chain = bridge.chain(True)
    logs = torch.stack([chain.half._step_log(now, then) for now, then in zip(chain.times[:-1], chain.times[1:])])
    share = 5 / 500 if schedule == "constant" else 0.1
    assert float(logs.abs().max()) <= share * float(chain.half.step_logs.abs().max()) + 1e-12


@pytest.mark.parametrize("matched", [False, True])
def test_ipf_leaves_the_gaussian_bridge_as_it_is_in_three_steps(matched):
    # what F would learn from B's paths is F: means and variances. The published goals would move both
    bridge, exact = between_gaussians(num_steps=3, schedule="constant")
    as_ipf_learns_it(bridge)
    num, half = 40_000, bridge.ahead
    x, given = MultivariateNormal(exact.mean1, exact.cov1).sample((num,)), bridge.given(half, None)
    paths = reversed_paths(bridge.chain(False), x, bridge.given(bridge.back, None), None, matched)
    known = half.step_logs.clone()
    gap = (measured_steps(half, paths, bridge.given, exact.epsilon) - known).abs().max() / (2 / num) ** 0.5
    assert gap < 4.5  # the paths are the same in both cases
    scores = []
    for k, (now, then) in enumerate(zip(paths.times[:-1], paths.times[1:])):
        law = half.step(now, then, paths.states[k], given, exact.epsilon)
        miss = (paths.goals[k] @ half.basis - law.mean) / law.scale
        state = (paths.states[k] - paths.states[k].mean(0)) / paths.states[k].std(0)
        scores += [miss.mean(0) * num**0.5, (miss.T @ state / num**0.5).flatten()]
    worst = float(torch.cat(scores).detach().abs().max())
    assert worst > 20 if matched else worst < 4.5


@pytest.mark.slow
def test_ipf_in_four_steps_goes_through_the_exact_iterates():
    # from N(0, 1) to N(0, 9): the published steps, fitted without error, would leave a variance of the end far off
    source, target = (MultivariateNormal(torch.zeros(1), torch.eye(1) * v) for v in (1.0, 9.0))
    one = torch.eye(1, **F64)
    exact = gaussian_ipf(gaussian_bridge(0 * one[0], one, 0 * one[0], 9 * one, epsilon=1.0), 3)[::2]
    bridge, found = DSB(1, epsilon=1.0, method="ipf", num_steps=4, hidden=(32, 32)), []

    def keep(_):
        x0, x1 = bridge.coupling(20_000)
        found.append(torch.cat([x0, x1], 1).T.cov())

    bridge.fit(target, source, num_iterations=3, num_updates=500, on_iteration=keep, progress=False)
    for covariance, plan in zip(found, exact):
        assert abs(float(covariance[1, 1] / plan.cov1) - 1) < 0.06
        assert abs(float(covariance[0, 1] / plan.cross) - 1) < 0.06


@pytest.mark.parametrize("method", ["imf", "ipf"])
@pytest.mark.parametrize("kind", ["draws", "law"])
def test_an_unfinished_fit_goes_on_bit_for_bit(tmp_path, method, kind):
    target = torch.randn(300, 2) if kind == "draws" else MultivariateNormal(torch.ones(2), torch.eye(2))
    source = torch.rand(90, 2) if kind == "draws" else None
    options = QUICK | {"num_iterations": 2, "num_updates": 40, "refresh": 15, "num_law_draws": 500}
    path, runs = tmp_path / "a.pt", []

    def fresh():
        return DSB(2, hidden=(8, 8), num_steps=3, method=method)

    def count(*_):
        runs.append(1)
        if len(runs) == 110:
            raise RuntimeError("the power is gone")

    torch.manual_seed(5)
    whole = fresh()
    whole.fit(target, source, **options)
    torch.manual_seed(5)
    broken = fresh()
    handle = broken.ahead.net.register_forward_pre_hook(count)
    with pytest.raises(RuntimeError, match="power"):
        broken.fit(target, source, **options, checkpoint=path)
    handle.remove()
    torch.manual_seed(99)
    again = fresh()
    history = again.fit(target, source, **options, checkpoint=path)
    assert len(history.residuals) == 2
    for a, b in zip(whole.state_dict().values(), again.state_dict().values()):
        assert not torch.is_tensor(a) or torch.equal(a, b)
    assert torch.equal(Bridge.load(path).drift(0.5, torch.ones(2)), whole.drift(0.5, torch.ones(2)))


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    target, source, path = torch.randn(100, 2), torch.rand(50, 2), tmp_path / "a.pt"
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 40:
            raise RuntimeError("the power is gone")

    bridge = DSB(2, hidden=(8,))
    bridge.back.net.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="power"):
        bridge.fit(target, source, **(QUICK | {"num_updates": 100}), checkpoint=path)
    law = MultivariateNormal(source.mean(0), torch.eye(2))
    for other in [(target + 1, source), (target, source + 1), (target, None), (target, law)]:
        with pytest.raises(ValueError, match="another"):
            DSB(2, hidden=(8,)).fit(*other, **(QUICK | {"num_updates": 100}), checkpoint=path)


def test_ctrl_c_keeps_what_was_learnt():
    bridge, calls = DSB(2, hidden=(8,), num_steps=3), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    bridge.back.net.register_forward_pre_hook(interrupt)
    with pytest.warns(RuntimeWarning, match="interrupted"):
        history = bridge.fit(torch.randn(100, 2, **F64), **(QUICK | {"num_updates": 100}))
    assert history.interrupted and bridge().sample((3,)).shape == (3, 2)


def test_iterations_are_told_and_measured():
    heard = []
    bridge = DSB(2, hidden=(8,), num_steps=3)
    history = bridge.fit(torch.randn(100, 2), **(QUICK | {"num_iterations": 3}), on_iteration=heard.append)
    assert heard == [1, 2, 3] and len(history.residuals) == 3


def test_draws_to_draws_has_no_density_and_says_so():
    bridge = DSB(2, hidden=(8,), num_steps=3)
    bridge.fit(torch.randn(100, 2), torch.rand(80, 2), **QUICK)
    assert bridge.density is None
    for ask in (lambda: bridge().draws((3,)), lambda: bridge.path_log_prob(torch.zeros(2))):
        with pytest.raises(NotImplementedError, match="source is draws"):
            ask()
    x0, x1 = bridge.coupling(50)
    assert bool(((x0 >= 0) & (x0 <= 1)).all()) and x1.shape == (50, 2)
    assert bridge.transport_back(x1).shape == (50, 2)


USES = {
    "draws": lambda bridge: bridge().draws((3,)),
    "sample": lambda bridge: bridge().sample((3,)),
    "coupling": lambda bridge: bridge.coupling(3),
    "transport_back": lambda bridge: bridge.transport_back(torch.zeros(1, 2)),
    "path_log_prob": lambda bridge: bridge.path_log_prob(torch.zeros(2)),
    "redraw_rows": lambda bridge: bridge.redraw_rows(torch.zeros(1, 2), None),
}


@pytest.mark.parametrize("change", [("num_steps", 5), ("schedule", "triangular")])
def test_ipf_s_steps_are_its_own_and_imf_s_are_free(change, tmp_path):
    for method in ("imf", "ipf"):
        bridge = DSB(2, hidden=(8,), num_steps=4, schedule="constant", method=method)
        bridge.fit(torch.randn(100, 2), **QUICK)
        setattr(bridge, *change)
        bridge.save(tmp_path / "a.pt")
        for each, use in itertools.product((bridge, DSB.load(tmp_path / "a.pt")), USES.values()):
            if method == "imf":
                use(each)
            else:
                with pytest.raises(ValueError, match=r"IPF learns its own.*as in fit, \(4, 'constant'\).*\"imf\""):
                    use(each)
    bridge.fit(torch.randn(100, 2), **QUICK)  # the new steps are learnt
    assert bridge().draws((3,)).log_q.shape == (3,)


def test_a_file_without_the_variances_of_steps_is_refused():
    bridge = DSB(2, hidden=(8,), num_steps=3)
    bridge.fit(torch.randn(100, 2), **QUICK)
    state = {key: value for key, value in bridge.state_dict().items() if "step_" not in key}
    with pytest.raises(ValueError, match="of an earlier version. Fit the bridge again"):
        DSB(2, hidden=(8,), num_steps=3).load_state_dict(state)


def test_a_loaded_bridge_asks_for_a_source_that_was_a_distribution(tmp_path):
    bridge, law = DSB(2, hidden=(8,), num_steps=3), MultivariateNormal(torch.zeros(2), torch.eye(2))
    bridge.fit(torch.randn(100, 2), law, **QUICK)
    bridge.save(tmp_path / "a.pt")
    loaded = DSB.load(tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=r"bridge\.source"):
        loaded().sample()
    loaded.source = law
    assert loaded().draws((3,)).log_q.shape == (3,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DSB(2, epsilon=0.0), "epsilon must be positive and finite, got 0"),
        (lambda: DSB(2, epsilon=-1.0), "epsilon must be positive and finite, got -1"),
        (lambda: DSB(2, method="sinkhorn"), "method must be one of"),
        (lambda: DSB(2, schedule="cosine"), "schedule must be one of"),
        (lambda: DSB(2, variance="learnt"), "variance must be one of"),
        (lambda: DSB(2, num_steps=0), "num_steps must be at least 1, got 0"),
        (lambda: DSB(2, num_steps=2.5), "num_steps must be at least 1, a whole number"),
        (lambda: DSB(2, num_steps=math.nan), "num_steps must be at least 1, a whole number"),
        (lambda: DSB(2, epsilon=None), "epsilon must be positive and finite, a number, got None"),
        (lambda: DSB(2, embedding=torch.nn.Identity()), "context_dim > 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"num_pairs": 1}, "num_pairs must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"pairs": "random"}, "pairs must be one of"),
        ({"loss": "score"}, "loss must be one of"),
        ({"reference": "ou"}, 'reference "ou" needs method="ipf"'),
        ({"source": torch.zeros(10, 3)}, "source must have shape"),
        ({"source": torch.ones(10, 2)}, "source must vary, got 10 equal draws"),
        ({"source": torch.zeros(2)}, "source must have shape"),
        ({"source": torch.full((10, 2), math.nan)}, "source must be finite"),
        ({"source": dist.Normal(0.0, 1.0)}, "source must have batch and event shapes"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DSB(2, hidden=(8,)).fit(torch.randn(50, 2), **(QUICK | options))


def test_sinkhorn_pairs_are_refused_where_there_is_a_context():
    with pytest.raises(ValueError, match="mixes contexts"):
        DSB(2, context_dim=1).fit(torch.randn(50, 2), context=torch.randn(50, 1), pairs="sinkhorn", **QUICK)


def test_held_out_source_draws_teach_nothing():
    # far away as they are, no pair that is learnt from may hold one; the judge holds no others
    source = torch.randn(200, 2)
    read = read_pairs(read_target(2, 0, torch.randn(50, 2), num_law_draws=100))
    begin = read_source_law(read, source, 2, 100, 0.25)
    assert len(begin.test) == 50 and set(begin.test.tolist()) | set(begin.train.tolist()) == set(range(200))
    bridge = DSB(2, hidden=(8,))
    bridge.adopt(read, begin)
    options = FitOptions(1, 8, 1e-3, None, 100, False, None)
    plan = Iterations(1, 8, "independent", "mean", "brownian", True, 1)
    fit = DSBFit(bridge, options, plan, read, begin, [], "", None)
    for held_out, rows in ((False, begin.train), (True, begin.test)):
        drawn = fit._start(500, None, held_out)
        allowed = {tuple(row) for row in source[rows].tolist()}
        assert {tuple(row) for row in drawn.tolist()} <= allowed


def test_an_epsilon_far_below_the_target_is_warned_of():
    with pytest.warns(RuntimeWarning, match="epsilon is 0.000.* of the target's variance"):
        DSB(2, epsilon=1.0, hidden=(8,), num_steps=2).fit(100 * torch.randn(100, 2), **QUICK)


def test_many_draws_come_in_chunks_of_the_same_law(monkeypatch):
    bridge, exact = between_gaussians(num_steps=4)
    monkeypatch.setattr("pyro_sb.bridges.dsb.bridge.CHUNK", 100)
    draws = bridge().draws((37,))
    target = MultivariateNormal(exact.mean1, exact.cov1)
    torch.testing.assert_close(draws.log_q, target.log_prob(draws.value), rtol=1e-8, atol=1e-8)
    assert len(draws.value.unique(dim=0)) == 37 and bridge().draws((0,)).log_q.shape == (0,)
