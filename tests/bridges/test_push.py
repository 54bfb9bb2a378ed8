"""push: noise to draws, deterministic and differentiable: the law of sample, gradients, a prior without a density."""

import warnings
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.bridges import (
    DSB,
    SGM,
    VSDM,
    AutoencoderCodec,
    KernelLangevinBridge,
    LatentBridge,
    LightSB,
    PCACodec,
    SmoothedBridge,
)
from pyro_sb.infer import MCMC, KernelLangevin

F64 = torch.float64


def ring(num):
    angle = 6.3 * torch.rand(num, dtype=F64)
    return (3 + 0.3 * torch.randn(num, 1, dtype=F64)) * torch.stack([angle.cos(), angle.sin()], -1)


def rows(num, dim=4):
    return torch.cat([ring(num), 0.1 * torch.randn(num, dim - 2, dtype=F64)], 1)


MAKES = {
    "VSDM": partial(VSDM, hidden=(16,)),
    "SGM": partial(SGM, hidden=(16,)),
    "SmoothedBridge": partial(SmoothedBridge, hidden=(16,), source_law="moment"),
}


@cache
def learnt(name):
    bridge = MAKES[name](2).double()
    bridge.fit(ring(300), num_updates=60, progress=False)
    return bridge.requires_grad_(False)


def fitted(name):
    return deepcopy(learnt(name))


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("solver", ["multistep", "heun", "euler"])
def test_push_of_the_sources_noise_is_the_draw(name, solver):
    """The same normals, through ``sample`` and through ``push``."""
    bridge = fitted(name)
    bridge.sampler = replace(bridge.sampler, solver=solver)
    torch.manual_seed(3)
    draws = bridge().sample((50,))
    torch.manual_seed(3)
    torch.testing.assert_close(bridge.push(torch.randn(50, 2, dtype=F64)), draws)


@pytest.mark.parametrize("name", MAKES)
def test_push_has_the_gradient_of_its_differences(name):
    bridge = fitted(name)
    noise = torch.randn(3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(bridge.push, (noise,))


def test_push_takes_any_batch_and_a_context():
    y = torch.randn(300, 1, dtype=F64)
    bridge = VSDM(2, context_dim=1, hidden=(16,)).double()
    bridge.fit(torch.cat([y, -y], 1) + 0.1 * torch.randn(300, 2, dtype=F64), context=y, num_updates=200, progress=False)
    noise, seen = torch.randn(4, 3, 2, dtype=F64), torch.tensor([[-2.0], [0.0], [2.0]], dtype=F64)
    made = bridge.push(noise, seen)
    assert made.shape == (4, 3, 2)
    torch.testing.assert_close(made[1, 2], bridge.push(noise[1, 2], seen[2]))
    assert bool((made[:, 2, 0] > made[:, 0, 0]).all())


@pytest.mark.parametrize("codec", [PCACodec(3), AutoencoderCodec(3, hidden=(16,))], ids=["pca", "autoencoder"])
def test_a_latent_bridge_decodes_what_its_inner_bridge_makes(codec):
    bridge = LatentBridge(VSDM(3, hidden=(16,)).double(), codec.double())
    options = {} if isinstance(codec, PCACodec) else {"num_updates": 50}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 50 updates are few for an autoencoder
        bridge.fit(rows(300), num_updates=60, progress=False, codec_options=options)
    bridge.requires_grad_(False)
    noise = torch.randn(5, 3, dtype=F64, requires_grad=True)
    made = bridge.push(noise)
    assert made.shape == (5, 4)
    torch.testing.assert_close(made, bridge.codec.decode(bridge.bridge.push(noise)))
    (slope,) = torch.autograd.grad(made[0, 0], noise)
    ahead = noise.detach().clone()
    ahead[0, 0] += 1e-6
    assert float((bridge.push(ahead) - made)[0, 0].detach() / 1e-6) == pytest.approx(
        float(slope[0, 0]), rel=1e-3, abs=1e-6
    )
    assert bool((slope[1:] == 0).all())


@pytest.mark.slow
def test_the_posterior_of_a_pushed_prior_is_that_of_its_weighted_draws():
    """Many prior draws, weighted by the likelihood, are the oracle: no density of the prior enters either."""
    bridge = fitted("VSDM")

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        place = pyro.deterministic("place", bridge.push(z))
        pyro.sample("y", dist.Normal(place[..., 0], 0.5), obs=y)

    seen = torch.tensor(2.0, dtype=F64)
    mcmc = MCMC(KernelLangevin(model, num_particles=128), num_samples=50, num_chains=64, disable_progbar=True)
    mcmc.run(seen)
    place = mcmc.get_samples(group_by_chain=True)["place"]
    prior = bridge.push(torch.randn(100_000, 2, dtype=F64))
    weights = dist.Normal(prior[:, 0], 0.5).log_prob(seen).softmax(0)
    for power in (1, 2):
        oracle = weights @ prior**power
        means = (place**power).mean(1)  # a chain each
        z = (means.mean(0) - oracle) / (means.std(0) / 8)
        assert float(z.abs().max()) < 4, (power, z)


@pytest.mark.parametrize(
    "bridge", [LightSB(2), DSB(2), KernelLangevinBridge(2)], ids=["LightSB", "DSB", "KernelLangevinBridge"]
)
def test_bridges_without_such_a_map_name_those_that_have_one(bridge):
    with pytest.raises(NotImplementedError, match="VSDM, SGM, SmoothedBridge"):
        bridge.push(torch.zeros(1, 2))


def test_a_noisy_solver_and_a_source_of_rows_are_refused():
    bridge = fitted("VSDM")
    bridge.sampler = replace(bridge.sampler, solver="ancestral")
    with pytest.raises(ValueError, match="multistep"):
        bridge.push(torch.zeros(1, 2, dtype=F64))
    with pytest.raises(NotImplementedError, match='source_law="moment"'):
        SmoothedBridge(2, source_law="rows").push(torch.zeros(1, 2))


def test_the_bridges_weights_are_constants_of_push():
    """A likelihood through ``push`` trains nothing, and what no gradient was asked for has none; any dtype of noise."""
    bridge = fitted("VSDM").requires_grad_(True)
    made = bridge.push(torch.zeros(2))
    assert not made.requires_grad and made.dtype == torch.float32
    noise = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    bridge.push(noise).sum().backward()
    assert noise.grad is not None and all(p.grad is None and p.requires_grad for p in bridge.parameters())
    many = torch.randn(4, 2, dtype=F64)
    torch.testing.assert_close(torch.func.vmap(bridge.push)(many), bridge.push(many))
    slopes = torch.func.vmap(torch.func.jacrev(bridge.push))(many)
    torch.testing.assert_close(slopes[0], torch.autograd.functional.jacobian(bridge.push, many[0]))


def test_a_codec_with_a_residual_is_refused():
    bridge = LatentBridge(VSDM(2, hidden=(16,)).double(), PCACodec(2, residual=True).double())
    bridge.fit(rows(300), num_updates=10, progress=False)
    with pytest.raises(NotImplementedError, match="residual=False"):
        bridge.push(torch.zeros(1, 2, dtype=F64))


def test_a_gradient_of_the_flows_log_density_is_refused_not_dropped():
    """HMC through ``pyro.sample("x", bridge())`` would silently move by the likelihood alone."""
    bridge = fitted("VSDM")
    x = torch.zeros(1, 2, dtype=F64)
    assert torch.isfinite(bridge().log_prob(x)).all()
    with pytest.raises(NotImplementedError, match=r"push"):
        bridge().log_prob(x.requires_grad_())
    given = VSDM(1, context_dim=1, hidden=(16,)).double()
    given.fit(torch.randn(200, 1, dtype=F64), context=torch.randn(200, 1, dtype=F64), num_updates=5, progress=False)
    with pytest.raises(NotImplementedError, match="its context"):
        given(torch.zeros(1, dtype=F64, requires_grad=True)).log_prob(torch.zeros(1, dtype=F64))
