"""BridgeRefresh: the target stays exactly invariant however wrong the law, of points or of paths, one or a batch."""

import math
import re
import warnings

import pyro.infer
import pytest
import torch

from pyro_sb.bridges.diffusion.sampler import Sampler
from pyro_sb.bridges.diffusion.vsdm import VSDM
from pyro_sb.diagnostics import report
from pyro_sb.infer.amortized.latent_law import LatentLaw, Residuals
from pyro_sb.infer.amortized.paired import BatchJoint, paired_joint
from pyro_sb.infer.amortized.refresh import BridgeRefresh
from pyro_sb.infer.amortized.simulator import simulator
from pyro_sb.infer.mcmc.mcmc import MCMC
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.tempering import NormalLaw
from tests.infer import open_models as m


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


class WrongNormal(NormalLaw):
    """A proposal with the density of points, off in place and width."""

    def path_log_prob(self, u, num_paths=1):
        return self.value_and_grad(u)[0]


def conjugate(batch):
    """Observations of `iid`, and their exact posteriors N(20 / 21 mean, 1 / 21)."""
    source = simulator(m.iid)
    y = torch.linspace(-1.5, 1.5, batch)[:, None] + 0.3 * torch.randn(batch, 5)
    mean = 20 / 21 * y.mean(1)
    return source, y, mean, (1 / 21) ** 0.5


def kernel_of(batch, chains, law=None):
    source, y, mean, deviation = conjugate(batch)
    joint = BatchJoint(paired_joint(source, source.simulate(50)), y, source, torch.Size([batch]))
    starts = (mean + deviation * torch.randn(chains, batch))[..., None]
    if law is None:
        law = WrongNormal((mean + 0.15)[:, None], torch.full((batch, 1, 1), 1.7 * deviation))
    kernel = BridgeRefresh(law, joint, starts, torch.full((batch, 1, 1), 0.4), model=None, facts={"start": "exact"})
    kernel.num_chains = chains
    return kernel, mean, deviation


def z_of_moments(x, mean, deviation):
    """z-scores of mean and variance over the first dimension."""
    white = (x - mean) / deviation
    both = torch.stack([white, white.square() - 1])
    return both.mean(1) / both.std(1) * math.sqrt(len(x))


def test_exact_starts_stay_exact_under_a_wrong_law():
    kernel, mean, deviation = kernel_of(3, 6000)
    kernel.setup(0)
    block = kernel.sample_block(kernel.initial_params, 5)
    assert block.draws["mu"].shape == (5, 6000, 3)
    assert 0.3 < float(block.stats["acceptance_bridge"].mean()) < 0.9  # the accept step matters
    for step in (0, 4):
        assert z_of_moments(block.draws["mu"][step], mean, deviation).abs().max() < 4
    moved = torch.corrcoef(torch.stack([kernel.starts[:, 0, 0], block.draws["mu"][4, :, 0]]))[0, 1]
    assert abs(float(moved)) < 0.3


def test_one_observation_by_its_own_log_joint():
    source, y, mean, deviation = conjugate(1)
    joint = log_joint(source.conditioned({"y": y[0]}))
    law = WrongNormal((mean - 0.2)[:, None], torch.full((1, 1, 1), 1.5 * deviation))
    starts = mean + deviation * torch.randn(6000, 1, 1)
    kernel = BridgeRefresh(law, joint, starts, torch.full((1, 1, 1), 0.1), model=None, facts={})
    kernel.num_chains = 6000
    kernel.setup(0)
    draws = kernel.sample_block(kernel.initial_params, 4).draws["mu"]
    assert draws.shape == (4, 6000)
    assert z_of_moments(draws[-1], mean, deviation).abs().max() < 4


@pytest.mark.slow
def test_exact_starts_stay_exact_under_a_wrong_law_of_paths():
    # three steps of a diffusion that learnt next to nothing: its paths are corrected exactly all the same
    source, y, mean, deviation = conjugate(2)
    context = torch.randn(500, 1)
    bridge = VSDM(1, context_dim=1, hidden=(16,), covariance_hidden=(16,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        bridge.fit(context + 0.5 * torch.randn(500, 1), context=context, num_updates=60, progress=False)
    bridge.sampler = Sampler(path_steps=3)
    weights = torch.zeros(2, 1)
    residuals = Residuals(torch.tensor([False]), weights, torch.full((1, 1), 0.6))
    law = LatentLaw(bridge, residuals, (mean / 0.6)[:, None], torch.zeros(2, 1))
    kernel, _, _ = kernel_of(2, 6000, law)
    joint = BatchJoint(paired_joint(source, source.simulate(50)), y, source, torch.Size([2]))
    kernel.joint, kernel.starts = joint, (mean + deviation * torch.randn(6000, 2))[..., None]
    kernel.setup(0)
    block = kernel.sample_block(kernel.initial_params, 5)
    assert 0.05 < float(block.stats["acceptance_bridge"].mean()) < 0.95
    for step in (0, 4):
        assert z_of_moments(block.draws["mu"][step], mean, deviation).abs().max() < 4


def test_refreshes_alone_leave_two_modes_their_weights():
    # no trajectory crosses between the modes: the refresh does, and with the right weights
    def density(z):
        mode = torch.stack([-((z[:, 0] - 4) ** 2) / 2 + math.log(0.8), -((z[:, 0] + 4) ** 2) / 2 + math.log(0.2)])
        return torch.logsumexp(mode, 0)

    joint = LogJoint.from_batched(density, 1)
    law = WrongNormal(torch.zeros(1, 1), torch.full((1, 1, 1), 5.0))
    starts = 4 + torch.randn(3000, 1, 1)  # all in one mode
    kernel = BridgeRefresh(law, joint, starts, torch.ones(1, 1, 1), model=None, facts={})
    kernel.num_chains = 3000
    kernel.setup(0)
    last = kernel.sample_block(kernel.initial_params, 60).draws["z"][-1, :, 0]
    share = (last > 0).double()
    assert abs(float((share.mean() - 0.8) / share.std() * 3000**0.5)) < 4


def test_steps_are_tuned_before_the_first_step_for_each_observation_and_frozen():
    kernel, _, _ = kernel_of(2, 200)
    kernel.factor = kernel.factor * torch.tensor([1.0, 3.0])[:, None, None]  # one metric is too wide
    kernel.setup(20)
    tuned = kernel.step_size.clone()
    assert 2 < float(tuned[0] / tuned[1]) < 4.5
    params = {name: x[-1] for name, x in kernel.sample_block(kernel.initial_params, 20).draws.items()}
    block = kernel.sample_block(params, 30)
    assert torch.equal(kernel.step_size, tuned)
    assert 0.6 < float(block.stats["acceptance_local"].mean()) < 0.9
    facts = kernel.diagnostics()
    assert facts["start"] == "exact" and 0 < facts["refresh acceptance"] < 1 and 0.6 < facts["local acceptance"] < 0.9
    assert facts["gradient evaluations"] > 0 and "start exact" in kernel.describe()
    kernel.cleanup()
    assert kernel.diagnostics() == facts and repr(kernel).startswith("BridgeRefresh(2 observations, 1 latent number")


def test_blocks_join_where_the_last_one_ended():
    kernel, _, _ = kernel_of(2, 200)
    kernel.setup(0)
    first = kernel.sample_block(kernel.initial_params, 3)
    walk, evaluations = kernel.walk, kernel.log_joint.evaluations
    before = evaluations.gradient, evaluations.density
    kernel.sample_block({name: x[-1] for name, x in first.draws.items()}, 1)
    # a state's gradient and two trajectories of five steps; a proposal: the state's own density is known
    assert kernel.walk is walk
    assert (evaluations.gradient - before[0], evaluations.density - before[1]) == (200 * 2 * (1 + 2 * 5), 200 * 2)
    torch.testing.assert_close(walk.log_density, kernel.log_joint.log_prob(walk.x))


def test_statistics_of_a_batch_are_those_of_its_chains():
    kernel, _, _ = kernel_of(3, 10)
    kernel.setup(0)
    block = kernel.sample_block(kernel.initial_params, 4)
    lp = kernel.log_joint.log_prob(block.draws["mu"][-1].reshape(-1, 1)).reshape(10, 3).sum(1)
    torch.testing.assert_close(block.stats["lp"][-1], lp)
    assert all(value.shape == (4, 10) for value in block.stats.values())
    assert len(kernel.diagnostics()["acceptance bridge"]) == 10


def test_figures_of_as_many_observations_as_chains_are_not_dealt_out():
    kernel, _, _ = kernel_of(4, 4)
    kernel.facts["log evidence"] = [1.0, 2.0, 3.0, 4.0]
    mcmc = MCMC(kernel, num_samples=2, num_chains=4, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    found = mcmc.diagnostics()
    assert found["log evidence"] == dict.fromkeys([f"chain {i}" for i in range(4)], [1.0, 2.0, 3.0, 4.0])
    assert all(isinstance(rate, float) for rate in found["acceptance bridge"].values())


@pytest.mark.parametrize("shape", [(5,), (3,), (3, 5), (5, 3, 1)])
def test_starts_without_chains_or_observations_are_refused_by_shape(shape):
    kernel, _, _ = kernel_of(3, 5)
    kernel.initial_params = {"mu": torch.zeros(shape)}
    message = rf"shape \(5, 3\) at site 'mu', chains x observations x the site, got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        kernel.setup(0)


def test_a_start_outside_the_support_is_named_by_chain_and_observation():
    kernel, mean, _ = kernel_of(3, 5)
    kernel.setup(0)
    start = mean.repeat(5, 1)
    start[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"is not at chain 1 \(observation 2\)\. "):
        kernel.sample_block({"mu": start}, 1)


def test_divergences_of_a_batch_are_counted_by_chain_and_their_share_by_observation():
    kernel, _, _ = kernel_of(4, 10)
    calls = []

    def two_observations(kernel, *_):
        kernel.step_size = torch.tensor([1e4, 1e4, 0.3, 0.3])
        calls.append(kernel.logging()["divergences"])

    mcmc = MCMC(kernel, num_samples=6, num_chains=10, warmup_steps=1, disable_progbar=True, hook_fn=two_observations)
    mcmc.run()
    assert calls[1:] == [str(10 * n) for n in range(1, 7)]  # a chain's draw counts once
    torch.testing.assert_close(mcmc.sample_stats["diverging_share"], torch.full((10, 6), 0.5))
    (line,) = (line for line in report(mcmc, audit=None).lines if line.name == "divergences")
    assert line.value == "60 (50.0% an observation)" and line.verdict == "bad"


def test_it_runs_in_our_mcmc():
    kernel, mean, deviation = kernel_of(3, 40)
    mcmc = MCMC(kernel, num_samples=50, num_chains=40, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["mu"]
    assert draws.shape == (2000, 3) and mcmc.get_samples(group_by_chain=True)["mu"].shape == (40, 50, 3)
    facts = mcmc.diagnostics()["mu"]
    assert facts["r_hat"].shape == (3,) and bool((facts["r_hat"] < 1.05).all()) and bool((facts["n_eff"] > 500).all())
    assert ((draws.mean(0) - mean) / deviation).abs().max() < 0.15
    assert (draws.std(0) / deviation - 1).abs().max() < 0.1


def test_it_runs_in_pyros_mcmc_as_one_chain():
    kernel, mean, deviation = kernel_of(2, 1)
    kernel.num_chains = None
    mcmc = pyro.infer.MCMC(kernel, num_samples=100, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["mu"]
    assert draws.shape == (100, 2)
    assert ((draws.mean(0) - mean) / deviation).abs().max() < 0.5
    source, y, mean, _ = conjugate(1)
    single = log_joint(source.conditioned({"y": y[0]}))
    law = WrongNormal(mean[:, None], torch.full((1, 1, 1), 0.3))
    kernel = BridgeRefresh(law, single, mean[None, :, None], torch.full((1, 1, 1), 0.2), model=None, facts={})
    mcmc = pyro.infer.MCMC(kernel, num_samples=20, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["mu"].shape == (20,)
