"""Solvers: exact where they must be, of the order they claim, and path densities that are exact."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sb.ops.linear_sde import LinearSDE, Schedule, preconditioning, start_covariance
from pyro_sb.ops.solvers import (
    Conditional,
    Flow,
    ancestral,
    euler,
    euler_maruyama,
    heun,
    multistep,
    noising,
    score,
    step_law,
)

F64 = {"dtype": torch.float64}
V = torch.tensor([0.2, 30.0], **F64)


def process(rates=(0.9, 1.6)):
    return LinearSDE(torch.tensor(rates, **F64), Schedule())


def gaussian(sde, variances=V):
    """The exact denoiser of N(0, variances)."""
    return lambda tau, x: preconditioning(sde.at(tau), variances).skip * x


def exact_model(sde, mean, covariance):
    """The exact Gaussian law of the target given the state, for a target N(mean, covariance)."""

    def model(tau, x):
        law = sde.at(tau)
        gain = (
            covariance
            * law.factor
            @ torch.linalg.inv(law.factor[:, None] * covariance * law.factor + law.variance.diag())
        )
        posterior = covariance - gain @ (law.factor[:, None] * covariance)
        posterior = (posterior + posterior.T) / 2
        return Conditional(mean + (x - law.factor * mean) @ gain.T, posterior.expand(*x.shape[:-1], *posterior.shape))

    return model


def test_the_exponential_integrator_is_exact_for_a_point():
    sde, point, x = process(), torch.tensor([2.0, -5.0], **F64), torch.randn(6, 2, **F64)
    times = sde.grid(7, 1e-3)
    states = multistep(lambda tau, x: point.expand_as(x), sde, times, x)
    for tau, state in zip(times, states):
        law = sde.at(tau)
        noise = (x - sde.at(times[0]).factor * point) / sde.at(times[0]).variance.sqrt()
        torch.testing.assert_close(state, law.factor * point + law.variance.sqrt() * noise, rtol=1e-9, atol=1e-9)


def flow_errors(solve, steps):
    """Errors at the last noisy time against the exact flow, which keeps x / sqrt(V)."""
    sde, x = process(), torch.randn(5, 2, **F64)
    exact = Flow(sde, V)
    errors = []
    for num in steps:
        times = sde.grid(num, 1e-2)
        end = solve(sde, times, x)[-2]
        errors.append(float((end * exact.inner(times[-2]) - x * exact.inner(times[0])).abs().max()))
    return errors


@pytest.mark.parametrize(
    ("name", "solve", "order"),
    [
        ("multistep", lambda sde, times, x: multistep(gaussian(sde), sde, times, x), 2),
        ("heun", lambda sde, times, x: heun(gaussian(sde), sde, times, x, 3 * V), 2),
        ("euler", lambda sde, times, x: euler(gaussian(sde), sde, times, x), 1),
    ],
)
def test_solvers_of_the_flow_have_their_order(name, solve, order):
    coarse, fine = flow_errors(solve, (81, 161))
    assert fine < 0.1 and order - 0.25 < math.log2(coarse / fine) < order + 0.6


def test_heun_is_exact_for_the_gaussian_it_knows():
    assert max(flow_errors(lambda sde, times, x: heun(gaussian(sde), sde, times, x, V), (2, 5))) < 1e-10


def test_a_gaussian_stands_still_in_the_flow_s_coordinates():
    sde, x = process(), torch.randn(5, 2, **F64)
    for tau in sde.grid(5, 1e-3)[:-1]:
        assert Flow(sde, V).slope(gaussian(sde), tau, x).abs().max() < 1e-7


def test_the_score_is_the_slope_of_the_noised_log_density():
    sde, x = process(), torch.randn(5, 2, **F64).requires_grad_()
    tau = torch.tensor(0.4, **F64)
    law = sde.at(tau)
    density = torch.distributions.Normal(torch.zeros(2, **F64), (law.factor**2 * V + law.variance).sqrt())
    (slope,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(score(sde, tau, x, gaussian(sde)(tau, x)), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_with_the_exact_model_the_path_s_density_is_the_end_s(num_steps):
    # F is then the true reverse kernel: p_0 F / B telescopes to the density of the end, path by path
    sde, mean = process(), torch.tensor([1.0, -3.0], **F64)
    covariance = torch.tensor([[2.0, 1.5], [1.5, 4.0]], **F64)
    start = MultivariateNormal(sde.at(torch.ones((), **F64)).factor * mean, start_covariance(sde, covariance))
    target, times = MultivariateNormal(mean, covariance), sde.grid(num_steps, 1e-3)
    model = exact_model(sde, mean, covariance)
    x = start.sample((50,))
    path = ancestral(model, sde, times, x)
    assert len(path.states) == num_steps + 1 and torch.equal(path.states[0], x)
    end = path.states[-1]
    torch.testing.assert_close(start.log_prob(x) + path.log_ratio, target.log_prob(end), rtol=1e-6, atol=1e-6)
    back = noising(model, sde, times, end)
    assert torch.equal(back.states[-1], end)
    total = start.log_prob(back.states[0]) + back.log_ratio
    torch.testing.assert_close(total, target.log_prob(end), rtol=1e-6, atol=1e-6)


def test_variances_and_covariances_are_one_law():
    sde, x = process(), torch.randn(4, 2, **F64)
    now, then = torch.tensor(0.5, **F64), torch.tensor(0.2, **F64)
    variances = torch.rand(4, 2, **F64) + 0.1
    diagonal = step_law(sde, now, then, x, Conditional(x, variances))
    full = step_law(sde, now, then, x, Conditional(x, torch.diag_embed(variances)))
    point = torch.randn(4, 2, **F64)
    torch.testing.assert_close(diagonal.log_prob(point), full.log_prob(point), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.diag_embed(diagonal.scale), full.scale, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_weights_of_a_wrong_model_are_unbiased(full):
    # 1-d target N(.5, 1), three steps of a model with a wrong mean and too wide a variance: E[w] = 1
    sde = process((1.0,))
    target = torch.distributions.Normal(torch.tensor(0.5, **F64), 1.0)

    def wrong(tau, x):
        scale = preconditioning(sde.at(tau), torch.ones_like(x[0]))
        shape = (*x.shape, 1) if full else x.shape
        return Conditional(scale.skip * x - 0.3 * scale.out, (1.5 * scale.out**2).expand(shape))

    x = 1.2 * torch.randn(40_000, 1, **F64)
    start = torch.distributions.Normal(torch.zeros((), **F64), 1.2)
    path = ancestral(wrong, sde, sde.grid(3, 0.05), x)
    weights = (target.log_prob(path.states[-1]).sum(-1) - start.log_prob(x).sum(-1) - path.log_ratio).exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - 1) < 4 * error < 0.1
    assert float(weights.std()) > 0.2  # the model is wrong
    # and backwards: E_B[p_0 F / B] is the density of the end, so its mean over the target is no more than one
    back = noising(wrong, sde, sde.grid(3, 0.05), torch.full((40_000, 1), 0.3, **F64))
    density = (start.log_prob(back.states[0]).sum(-1) + back.log_ratio).exp()
    ends = path.states[-1][:, 0]
    near = ((ends - 0.3).abs() < 0.05).double()
    gap = float(density.mean() - near.mean() / 0.1)
    assert abs(gap) < 4 * (float(density.std()) + float(near.std()) / 0.1) / math.sqrt(40_000)


@pytest.mark.parametrize("solve", [euler_maruyama, multistep, euler])
def test_a_gaussian_target_s_moments_come_back(solve):
    sde = process()
    law = sde.at(torch.ones((), **F64))
    x = (law.factor**2 * V + law.variance).sqrt() * torch.randn(20_000, 2, **F64)
    times = sde.grid(300, 1e-3)
    end = solve(gaussian(sde), sde, times, x)[-2] / sde.at(times[-2]).factor
    scores = ((end.square().mean(0) / V).log()) * math.sqrt(20_000 / 2)
    assert scores.abs().max() < 6  # the schemes' own bias is below one per cent


def test_one_step_is_a_draw_from_the_model():
    sde, x = process(), torch.randn(3, 2, **F64)
    assert torch.equal(multistep(gaussian(sde), sde, sde.grid(1, 1e-3), x)[-1], gaussian(sde)(torch.ones((), **F64), x))
