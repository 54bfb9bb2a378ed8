"""Draws of models: summed-out sites drawn once, models without latents, data with gaps among the draws."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.diagnostics import to_arviz
from pyro_sb.infer import MCMC, BridgeMH, KernelLangevin


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


# ---- one draw of what was summed out ----


def halves(y):
    m = pyro.sample("m", dist.Normal(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5)))
        pyro.deterministic("copy", side)
        pyro.sample("y", dist.Normal((2 * side - 1) * m, 1.0), obs=y)


@pytest.mark.parametrize("kept", [None, ["copy"], ["m"], ["copy", "m"]])
def test_deterministic_sites_and_discrete_draws_are_of_one_draw(kept):
    y = torch.tensor([-2.0, 0.1, 0.0, 2.0])  # sides of the middle ones are coins
    mcmc = MCMC(KernelLangevin(halves), num_samples=20, num_chains=8, disable_progbar=True, save_params=kept)
    mcmc.run(y)
    if kept is not None and "copy" not in kept:
        assert mcmc.get_discrete_samples()["side"].shape == (160, 4) and "copy" not in mcmc.get_samples()
        return
    side, copy = mcmc.get_discrete_samples(group_by_chain=True)["side"], mcmc.get_samples(group_by_chain=True)["copy"]
    assert torch.equal(side, copy) and 0.1 < side[..., 1].mean() < 0.9
    assert torch.equal(torch.from_numpy(to_arviz(mcmc).posterior["copy"].values), copy)
    assert torch.equal(pickle.loads(pickle.dumps(mcmc)).get_discrete_samples(group_by_chain=True)["side"], side)


def labels(y):  # Pyro's smoothing knows no vector-valued discrete sites
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        place = pyro.deterministic("place", (z * torch.arange(3.0)).sum(-1))
        pyro.sample("y", dist.Normal(m + place, 0.5), obs=y)


def test_where_pyros_smoothing_fails_the_loop_draws():
    y = torch.tensor([2.0, 0.2, 1.0])
    mcmc = MCMC(KernelLangevin(labels), num_samples=50, num_chains=32, disable_progbar=True)
    mcmc.run(y)
    z, sites = mcmc.get_discrete_samples()["z"], mcmc.get_samples()
    assert z.shape == (1600, 3, 3) and torch.equal(z.sum(-1), torch.ones(1600, 3))
    assert torch.equal(z.argmax(-1).to(sites["place"]), sites["place"])
    levels = torch.tensor([0.2, 0.3, 0.5]).log() + dist.Normal(
        sites["m"][:, None, None] + torch.arange(3.0), 0.5
    ).log_prob(y[:, None])
    p = levels.softmax(-1)
    z_score = (z - p).sum(0) / (p * (1 - p)).sum(0).sqrt()
    assert z_score.abs().max() < 4.5


# ---- models without latents ----


def data_alone(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def coins_alone(y):
    with pyro.plate("rows", len(y)):
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("y", dist.Normal(2 * side, 1.0), obs=y)


@pytest.mark.parametrize("model", [data_alone, coins_alone])
@pytest.mark.parametrize("kernel", [KernelLangevin, BridgeMH])
def test_a_model_without_latents_runs_as_in_pyro(model, kernel):
    def ran(runner, kernel, **options):
        seen = []
        mcmc = runner(
            kernel,
            num_samples=3,
            warmup_steps=2,
            disable_progbar=True,
            hook_fn=lambda _, params, stage, i: seen.append((params, stage, i)),
            **options,
        )
        mcmc.run(torch.zeros(4))
        mcmc.summary()
        return mcmc, seen

    pyros, expected = ran(pyro.infer.MCMC, pyro.infer.NUTS(data_alone))
    ours, seen = ran(MCMC, kernel(model), num_chains=5)
    assert seen == expected and ours.get_samples() == pyros.get_samples() == {}
    assert ran(pyro.infer.MCMC, kernel(model))[0].get_samples() == {}
    assert set(to_arviz(ours)["observed_data"].data_vars) == {"y"}
    assert repr(ours).startswith("MCMC of 5 chains x 3 draws")


def test_discrete_sites_alone_are_drawn_from_their_posterior():
    y = torch.tensor([-1.0, 1.0, 3.0])
    mcmc = MCMC(KernelLangevin(coins_alone), num_samples=100, num_chains=32, disable_progbar=True)
    mcmc.run(y)
    p = torch.sigmoid(torch.tensor(0.3).logit() + 2 * y - 2)
    share = mcmc.get_discrete_samples()["side"].mean(0)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 3200).sqrt()).all()


# ---- data among the draws ----


def with_gaps(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=~torch.isnan(y))


def test_missing_entries_are_imputed_and_the_others_are_data(capsys):
    y = torch.tensor([1.2, 0.4, 2.0, torch.nan, torch.nan, 0.9])
    mcmc = MCMC(KernelLangevin(with_gaps), num_samples=100, num_chains=64, disable_progbar=True)
    mcmc.run(y)
    sites = mcmc.get_samples(group_by_chain=True)
    precision = 1 / 4 + 4  # four data of variance 1 under a prior of variance 4
    mean, sd = 4.5 / precision, precision**-0.5
    for draws, spread in ((sites["mu"], sd), (sites["y"][..., 3], (1 + sd**2) ** 0.5)):
        ess = pyro.ops.stats.effective_sample_size(draws)
        assert abs(draws.mean() - mean) < 4.5 * spread / ess**0.5
        assert abs(draws.std() / spread - 1) < 4.5 / (2 * ess) ** 0.5
    there = [0, 1, 2, 5]
    assert torch.equal(sites["y"][..., there], y[there].expand(64, 100, 4))
    assert torch.equal(sites["y_unobserved"], sites["y"])
    figures = mcmc.diagnostics()["y"]  # of what moves; a constant has none, and does not spoil its neighbours
    assert torch.isfinite(figures["n_eff"]).tolist() == torch.isnan(y).tolist()
    assert (figures["r_hat"][3:5] < 1.02).all()
    mcmc.summary()
    table = capsys.readouterr().out
    assert "y[3]" in table and "y[0]" not in table and "nan" not in table
    exported = to_arviz(mcmc, log_likelihood=True)
    assert set(exported["observed_data"].data_vars) == {"y_observed"}
    torch.testing.assert_close(torch.from_numpy(exported["observed_data"]["y_observed"].values), y, equal_nan=True)
