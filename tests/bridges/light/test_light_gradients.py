"""A light bridge inside a Pyro model is a prior: its density has the gradients that HMC asks for."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyro_sb.bridges import LightSB, LightSBBM, TailMatched

F64 = {"dtype": torch.float64}


def fitted(name, context_dim=0):
    options = {"num_components": 3, "epsilon": 0.7, "context_dim": context_dim}
    bridge = {
        "light": lambda: LightSB(2, **options),
        "bass": lambda: LightSBBM(2, beta=4.0, **options),
        "tails": lambda: TailMatched(LightSBBM(2, beta=4.0, **options), df=3.0),
    }[name]()
    draws, context = torch.randn(200, 2, **F64), torch.randn(200, 1, **F64)
    bridge.fit(draws, context=context if context_dim else None, num_updates=10, progress=False)
    return bridge


@pytest.mark.parametrize("context_dim", [0, 1])
@pytest.mark.parametrize("name", ["light", "bass", "tails"])
def test_log_prob_has_its_first_and_second_derivatives(name, context_dim):
    bridge = fitted(name, context_dim)
    law = bridge(torch.zeros(1, **F64)) if context_dim else bridge()
    x = (0.7 * torch.randn(3, 2, **F64)).requires_grad_()
    assert torch.autograd.gradcheck(law.log_prob, (x,))
    assert torch.autograd.gradgradcheck(law.log_prob, (x,))


@pytest.mark.parametrize("name", ["light", "bass"])
def test_the_plan_has_them_too(name):
    bridge = fitted(name)
    x = torch.randn(3, 2, **F64, requires_grad=True)
    assert torch.autograd.gradcheck(bridge.plan(torch.randn(3, 2, **F64)).log_prob, (x,))


def test_a_fitted_bridge_asks_for_no_gradient_of_its_own():
    bridge = fitted("bass")
    assert not bridge().log_prob(torch.zeros(2, **F64)).requires_grad
    x = torch.zeros(2, **F64, requires_grad=True)
    bridge().log_prob(x).backward()
    assert x.grad is not None and all(p.grad is None for p in bridge.parameters())


@pytest.mark.slow
def test_nuts_draws_from_the_prior_that_a_bridge_is():
    bridge = LightSBBM(1, num_components=2, beta=4.0)
    bridge.fit(torch.cat([torch.randn(300, 1, **F64), 2 + torch.randn(300, 1, **F64)]), num_updates=50, progress=False)
    exact = bridge().sample((20_000,))
    mcmc = MCMC(NUTS(lambda: pyro.sample("x", bridge()), step_size=1.0), 400, 100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"]
    assert abs(draws.mean() - exact.mean()) < 5 * exact.std() / 100**0.5  # at least 100 effective draws
    assert dist.Normal(0.0, 1.0).log_prob(draws).isfinite().all()


def test_the_state_at_time_one_half_lies_between():
    bridge = fitted("bass")
    x0 = bridge.location.expand(20_000, 2)
    ends = bridge.transport(x0, t=0.0), bridge.transport(x0)
    assert torch.allclose(ends[0], x0, atol=1e-9)
    middle = bridge.transport(x0, t=0.5)
    times, states = bridge.paths(20_000, 2)
    error = (middle.var(0) + states[1].var(0)).sqrt() / 20_000**0.5
    assert bool(((middle.mean(0) - states[1].mean(0)).abs() < 4 * error).all())
    spread = middle.var(0) * (2 / 20_000) ** 0.5
    assert bool(((middle.var(0) - states[1].var(0)).abs() < 6 * spread).all())
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        bridge.transport(x0, t=1.5)


@pytest.mark.parametrize("beta", [4.0, float("inf")])
def test_a_point_may_be_named_as_the_source(beta):
    draws, point = torch.randn(400, 2, **F64), torch.tensor([1.5, -0.5], **F64)
    bridge = LightSBBM(2, num_components=3, beta=beta)
    bridge.fit(draws, point, num_updates=50, progress=False)
    assert bridge.density == "marginal"
    times, states = bridge.paths(5, 3)
    assert torch.allclose(states[0], point.expand(5, 2), atol=1e-9)
    x = torch.randn(4, 2, **F64)
    torch.testing.assert_close(bridge().log_prob(x), bridge.plan(point).log_prob(x))
    nodes = torch.linspace(-8, 8, 161, **F64)
    mass = bridge().log_prob(torch.cartesian_prod(nodes, nodes)).exp().sum() * 0.1**2
    assert abs(mass - 1) < 1e-6
    with pytest.raises(ValueError, match="finite"):
        bridge.fit(draws, torch.tensor([float("nan"), 0.0]), progress=False)
