"""First half of to_arviz: exact arrays from runs whose draws are given."""

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive

from pyro_sb.diagnostics import Run
from pyro_sb.diagnostics.export.groups import to_groups

F64 = torch.float64
C, N = 3, 4
ZERO, ONE = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
Y = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)
X = torch.arange(12, dtype=F64).reshape(4, 3) / 10
GROUP = torch.tensor([0, 0, 2, 1])


def finished(model, draws, args=(Y,), **more):
    """A finished run with the given draws of shape (chain, draw, *site)."""
    return Run(draws, model, args, **more)


def normal_log_density(y, loc, scale):
    return -0.5 * ((y - loc) / scale) ** 2 - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)


def plated(y):
    loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 2.0), obs=y)


def regression(y):  # X @ beta knows no dimension on the left
    beta = pyro.sample("beta", dist.Normal(ZERO, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(X @ beta, 2.0), obs=y)


def indexed(y):  # under a plate on the left loc[GROUP] picks draws, not groups
    with pyro.plate("groups", 3):
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc[GROUP], 2.0), obs=y)


def hierarchical(y):
    with pyro.plate("rows", len(y)):
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
        pyro.sample("y", dist.Normal(loc, 2.0), obs=y)


def summed(y):  # under a plate on the left the sum runs over the draws too, without an error
    with pyro.plate("groups", 3):
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc.sum(), 2.0), obs=y)


def branching(y):  # asks for a number
    loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
    scale = 2.0 if loc.item() < 100 else 3.0
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


@pytest.mark.parametrize(
    ("model", "site", "shape", "mean", "route"),
    [
        (plated, "loc", (), lambda loc: loc[..., None], "plate"),
        (hierarchical, "loc", (4,), lambda loc: loc, "plate"),
        (regression, "beta", (3,), lambda beta: beta @ X.T, "vmap"),
        (summed, "loc", (3,), lambda loc: loc.sum(-1, keepdim=True), "vmap"),
        (indexed, "loc", (3,), lambda loc: loc[..., GROUP], "vmap"),
        (branching, "loc", (), lambda loc: loc[..., None], "loop"),
    ],
)
@pytest.mark.parametrize("num_draws", [1, 4])
def test_log_likelihood_is_each_datums_log_density(caplog, model, site, shape, mean, route, num_draws):
    draws = torch.randn(C, num_draws, *shape, dtype=F64)
    with caplog.at_level(logging.INFO, logger="pyro_sb.infer.model.agreement"):
        made = to_groups(finished(model, {site: draws}), log_likelihood=True).arrays
    assert set(made["log_likelihood"]) == {"y"} and made["log_likelihood"]["y"].shape == (C, num_draws, 4)
    expected = normal_log_density(Y, mean(draws), torch.tensor(2.0, dtype=F64))
    np.testing.assert_allclose(made["log_likelihood"]["y"], expected.numpy(), rtol=1e-12)
    assert [record.args[0] for record in caplog.records] == {
        "plate": [],
        "vmap": ["plate"],
        "loop": ["plate", "vmap"],
    }[route]


def test_log_likelihood_knows_masks_and_leaves_scales_factors_and_deterministic_sites_out():
    mask = torch.tensor([True, False, True, True])

    def model(y):
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
        pyro.deterministic("twice", 2 * loc)
        pyro.factor("penalty", -loc)
        with pyro.plate("rows", 4), poutine.scale(scale=7.0), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.sample("one", dist.Normal(loc, 1.0), obs=Y[0])
        pyro.sample("pair", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=Y[:2])

    loc = torch.randn(C, N, dtype=F64)
    made = to_groups(finished(model, {"loc": loc}), log_likelihood=True).arrays
    assert set(made["observed_data"]) == set(made["log_likelihood"]) == {"y", "one", "pair"}
    expected = torch.where(mask, normal_log_density(Y, loc[..., None], 1.0), 0.0)
    np.testing.assert_allclose(made["log_likelihood"]["y"], expected.numpy(), rtol=1e-12)
    np.testing.assert_allclose(made["log_likelihood"]["one"], normal_log_density(Y[0], loc, 1.0).numpy(), rtol=1e-12)
    both = normal_log_density(Y[:2], loc[..., None], 1.0).sum(-1)
    np.testing.assert_allclose(made["log_likelihood"]["pair"], both.numpy(), rtol=1e-12)


def test_partly_observed_sites_keep_their_observed_part():
    mask = torch.tensor([True, False, True, True])

    def model(y):
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y, obs_mask=mask)

    loc, unobserved = torch.randn(C, N, dtype=F64), torch.randn(C, N, 4, dtype=F64)
    made = to_groups(finished(model, {"loc": loc, "y_unobserved": unobserved}), log_likelihood=True).arrays
    expected = torch.where(mask, normal_log_density(Y, loc[..., None], 1.0), 0.0)
    assert set(made["log_likelihood"]) == {"y_observed"}
    np.testing.assert_allclose(made["log_likelihood"]["y_observed"], expected.numpy(), rtol=1e-12)


def test_batches_do_not_change_the_answer(monkeypatch):
    draws = {"beta": torch.randn(C, N, 3, dtype=F64)}
    whole = to_groups(finished(regression, draws), log_likelihood=True).arrays["log_likelihood"]["y"]
    monkeypatch.setattr("pyro_sb.infer.model.runs.MAX_NUMBERS", 50)
    parts = to_groups(finished(regression, draws), log_likelihood=True).arrays["log_likelihood"]["y"]
    np.testing.assert_allclose(parts, whole, rtol=1e-13)


def shapes(y):
    scalar = pyro.sample("scalar", dist.Normal(ZERO, 1.0))
    single = pyro.sample("single", dist.Normal(ZERO, 1.0).expand([1]).to_event(1))
    with pyro.plate("one", 1):
        alone = pyro.sample("alone", dist.Normal(ZERO, 1.0))
    with pyro.plate("columns", 2), pyro.plate("lines", 4):
        pyro.sample("y", dist.Normal(scalar + single.sum(-1) + alone, 1e-9), obs=y)


SHAPES = {"scalar": (), "single": (1,), "alone": (1,), "y": (4, 2)}


@pytest.mark.parametrize("parallel", [True, False])
def test_every_array_has_the_shape_of_one_run(parallel):
    # the plates make Predictive answer (num, 1, 1) for a scalar; a true length of 1 must survive
    y = Y[:, None].expand(4, 2)
    draws = {name: torch.randn(C, N, *SHAPES[name], dtype=F64) for name in ("scalar", "single", "alone")}
    run = finished(shapes, draws, args=(y,))
    prior = Predictive(shapes, num_samples=5, parallel=parallel, return_sites=tuple(SHAPES))(None)
    flat = {name: value.flatten(0, 1) for name, value in draws.items()}
    predicted = Predictive(shapes, flat)(None)  # its parallel form misplaces single
    for options in ({"prior": prior, "posterior_predictive": predicted}, {"prior": 5, "posterior_predictive": True}):
        made = to_groups(run, **options).arrays
        for name in draws:
            assert made["posterior"][name].shape == (C, N, *SHAPES[name])
            assert made["prior"][name].shape == (1, 5, *SHAPES[name])
        assert made["prior_predictive"]["y"].shape == (1, 5, 4, 2)
        assert made["observed_data"]["y"].shape == (4, 2)
        # the noise is 1e-9: a replicate tells the draw that it belongs to
        expected = (draws["scalar"] + draws["single"][..., 0] + draws["alone"][..., 0])[..., None, None].expand(
            C, N, 4, 2
        )
        np.testing.assert_allclose(made["posterior_predictive"]["y"], expected.numpy(), atol=1e-7)
        assert set(made["posterior_predictive"]) == {"y"}
        total = made["prior"]["scalar"] + made["prior"]["single"][..., 0] + made["prior"]["alone"][..., 0]
        np.testing.assert_allclose(made["prior_predictive"]["y"][..., 0, 1], total, atol=1e-7)


def precise(y):
    loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(loc, 1e-9), obs=y)


def test_a_number_of_replicates_are_evenly_spaced_draws_of_each_chain():
    loc = torch.randn(C, 7, dtype=F64)
    made = to_groups(finished(precise, {"loc": loc}), posterior_predictive=3).arrays["posterior_predictive"]["y"]
    np.testing.assert_allclose(made, loc[:, [0, 3, 6], None].expand(C, 3, 4).numpy(), atol=1e-7)


@pytest.mark.parametrize(
    ("model", "site", "shape", "mean", "num_draws"),
    [
        (plated, "loc", (), lambda loc: loc[..., None], 3000),
        (regression, "beta", (3,), lambda beta: beta @ X.T, 3000),
        (branching, "loc", (), lambda loc: loc[..., None], 100),
    ],
)
def test_replicates_are_new_data(caplog, model, site, shape, mean, num_draws):
    # (y* - mean) / 2 is standard normal and independent, whatever the draw
    draws = torch.randn(C, num_draws, *shape, dtype=F64)
    with caplog.at_level(logging.INFO, logger="pyro_sb.infer.model.agreement"):
        made = replicates(model, {site: draws})
    assert ("vmap" in [record.args[0] for record in caplog.records]) == (model is branching)
    residual = (made - mean(draws)) / 2
    assert abs(residual.mean()) * residual.numel() ** 0.5 < 4
    assert abs(residual.square().mean() - 1) * (residual.numel() / 2) ** 0.5 < 4
    rows = torch.corrcoef(residual.reshape(-1, 4).T)
    assert (rows - torch.eye(4, dtype=F64)).abs().max() * (residual.numel() / 4) ** 0.5 < 4.5


def replicates(model, draws):
    return torch.as_tensor(
        to_groups(finished(model, draws), posterior_predictive=True).arrays["posterior_predictive"]["y"]
    )


def test_prior_draws_are_draws_of_the_prior():
    made = to_groups(finished(plated, {"loc": torch.zeros(C, N, dtype=F64)}), prior=5000).arrays
    loc, y = (torch.as_tensor(made[group][name][0]) for group, name in (("prior", "loc"), ("prior_predictive", "y")))
    assert abs(loc.mean()) * 5000**0.5 < 4 and abs(loc.var() - 1) * 2500**0.5 < 4
    assert abs((y - loc[:, None]).var() / 4 - 1) * 10_000**0.5 < 4


def test_deterministic_sites_in_a_plate_have_one_shape_in_every_group():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
        with pyro.plate("rows", 4):
            centre = pyro.deterministic("centre", loc + torch.arange(4.0, dtype=F64))
            pyro.sample("y", dist.Normal(centre, 1e-9), obs=y)

    run = finished(model, {"loc": torch.randn(C, N, dtype=F64)})
    made = to_groups(run, prior=6, posterior_predictive=True).arrays
    assert made["prior"]["centre"].shape == (1, 6, 4)
    np.testing.assert_allclose(made["prior"]["centre"], made["prior_predictive"]["y"], atol=1e-7)
    expected = run.draws["loc"][..., None] + torch.arange(4.0, dtype=F64)
    np.testing.assert_allclose(made["posterior_predictive"]["y"], expected, atol=1e-7)


def test_an_improper_prior_cannot_be_drawn_but_everything_else_can():
    def model(y):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([4]).to_event(1), obs=y)

    run = finished(model, {"loc": torch.zeros(C, N, dtype=F64)})
    made = to_groups(run, log_likelihood=True, posterior_predictive=2).arrays
    assert made["posterior_predictive"]["y"].shape == (C, 2, 4)
    with pytest.raises(ValueError, match=r"sites \['loc'\] cannot be sampled \(ImproperUniform\). Leave prior out"):
        to_groups(run, prior=3)


def test_divergences_of_pyros_run_stay_with_their_chain():
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(plated), num_samples=N, num_chains=1, disable_progbar=True)
    mcmc._samples = {"loc": torch.zeros(12, N, dtype=F64)}  # of twelve processes that this machine need not start
    mcmc._args, mcmc._kwargs = (Y,), {}
    mcmc._diagnostics = [{"divergences": [i % N] if i in (2, 10) else []} for i in range(12)]
    assert np.argwhere(to_groups(mcmc).arrays["sample_stats"]["diverging"]).tolist() == [[2, 2], [10, 2]]
    mcmc._diagnostics = [{}] * 12
    assert "sample_stats" not in to_groups(mcmc).arrays


def test_our_runs_statistics_pass_as_they_are():
    statistics = {"energy": torch.randn(C, N, dtype=F64), "move": torch.ones(C, N, dtype=torch.long)}
    run = finished(plated, {"loc": torch.zeros(C, N, dtype=F64)}, sample_stats=statistics)
    made = to_groups(run).arrays["sample_stats"]
    np.testing.assert_array_equal(made["energy"], statistics["energy"].numpy())
    assert made["move"].dtype == np.int64


def switch(y):
    loc = pyro.sample("loc", dist.Normal(ZERO, 1.0))
    with pyro.plate("rows", 4):
        side = pyro.sample("side", dist.Bernoulli(0.5 * ONE), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc + 3 * side, 1.0), obs=y)


def test_enumerated_sites_are_put_at_their_draws():
    loc, side = torch.randn(C, N, dtype=F64), torch.randint(2, (C, N, 4)).to(F64)
    run = finished(switch, {"loc": loc}, discrete=lambda: {"side": side})
    made = to_groups(run, log_likelihood=True).arrays["log_likelihood"]["y"]
    np.testing.assert_allclose(made, normal_log_density(Y, loc[..., None] + 3 * side, 1.0).numpy(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"\['side'\] are missing.*use pyro_sb.infer.MCMC"):
        to_groups(finished(switch, {"loc": loc}), log_likelihood=True)


def test_dropped_latents_stop_what_needs_them_alone():
    run = finished(shapes, {"scalar": torch.zeros(C, N, dtype=F64)}, args=(Y[:, None].expand(4, 2),))
    assert set(to_groups(run).arrays) == {"posterior", "observed_data"}
    with pytest.raises(ValueError, match=r"\['alone', 'single'\] are missing"):
        to_groups(run, posterior_predictive=True)


def test_dimensions_are_named_after_plates_unless_arviz_keeps_the_name():
    def model(y):
        with pyro.plate("school", 4):
            effect = pyro.sample("effect", dist.Normal(ZERO, 1.0).expand([2]).to_event(1))
            pyro.deterministic("total", effect.sum(-1))
            with pyro.plate("draw", 3, dim=-2):
                pyro.sample("loc", dist.Normal(ZERO, 1.0))
            pyro.sample("y", dist.Normal(effect.sum(-1), 1.0), obs=y)

    draws = {"effect": torch.zeros(C, N, 4, 2, dtype=F64), "loc": torch.zeros(C, N, 3, 4, dtype=F64)}
    made = to_groups(finished(model, draws))
    assert made.dims == {
        "effect": ["school", "effect_dim_1"],
        "total": ["school"],
        "loc": ["loc_dim_0", "school"],
        "y": ["school"],
    }


def test_a_run_without_a_model_has_draws_and_statistics():
    run = finished(None, {"z": torch.zeros(C, N, 2, dtype=F64)})
    assert set(to_groups(run).arrays) == {"posterior"}
    for option in ({"log_likelihood": True}, {"prior": 3}, {"posterior_predictive": True}):
        with pytest.raises(ValueError, match="need a model, got a kernel with potential_fn"):
            to_groups(run, **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": 0}, "prior must be a whole number, at least 1, or a dict of draws, got 0"),
        ({"prior": True}, "prior must be a whole number, at least 1, or a dict of draws, got True"),
        ({"posterior_predictive": 5}, "posterior_predictive must be a whole number, 1 to 4, or a dict of draws, got 5"),
        ({"posterior_predictive": {"y": torch.zeros(5, 4)}}, r"'y'\] must have shape \(12, \*site\) or .*got \(5, 4\)"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_groups(finished(plated, {"loc": torch.zeros(C, N, dtype=F64)}), **options)


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match="must be a finished MCMC .*, got dict"):
        to_groups({"loc": torch.zeros(C, N)})
