"""The posterior tasks: each model's log joint against scipy, the references against themselves."""

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats

from pyro_sb.datasets import POSTERIORS, posterior_task

DIM = {"eight": 10, "low": 5, "arK": 7, "log": 5, "kid": 5}


def latents(task, draws):
    """Sites of the model out of reference draws (n, p): what `columns` undoes."""
    sites = {}
    for name, column in zip(task.parameters, draws.T, strict=True):
        sites.setdefault(name.split("[")[0], []).append(column)
    sites = {name: torch.stack(c, -1) if len(c) > 1 else c[0] for name, c in sites.items()}
    if task.name == "eight_schools_noncentered":
        theta = sites.pop("theta")
        sites["z"] = (theta - sites["mu"][:, None]) / sites["tau"][:, None]
    return sites


def log_joint(task, sites):
    """Pyro's log joint of one point."""
    trace = poutine.trace(poutine.condition(task.model, sites)).get_trace(*task.args)
    return trace.log_prob_sum()


def scipy_log_joint(name, sites, args):
    """The same posterior written once more with scipy, from the description beside the data."""
    s = {k: np.asarray(v) for k, v in sites.items()}
    args = [np.asarray(a) for a in args]
    if name.startswith("eight"):
        sigma, y = args
        value = stats.norm.logpdf(s["mu"], 0, 5) + stats.halfcauchy.logpdf(s["tau"], 0, 5)
        theta = s["theta"] if "theta" in s else s["mu"] + s["tau"] * s["z"]
        value += stats.norm.logpdf(s["z"]).sum() if "z" in s else stats.norm.logpdf(theta, s["mu"], s["tau"]).sum()
        return value + stats.norm.logpdf(y, theta, sigma).sum()
    if name.startswith("low"):
        first, second = (stats.norm.pdf(args[0], s["mu"][k], s["sigma"][k]) for k in (0, 1))
        value = stats.norm.logpdf(s["mu"], 0, 2).sum() + stats.halfnorm.logpdf(s["sigma"], 0, 2).sum()
        value += stats.beta.logpdf(s["theta"], 5, 5)
        return value + np.log(s["theta"] * first + (1 - s["theta"]) * second).sum()
    x, y = args
    value = 0.0 if name.startswith("log") else stats.halfcauchy.logpdf(s["sigma"], 0, 2.5)
    if name == "arK":
        value += stats.norm.logpdf(s["alpha"], 0, 10) + stats.norm.logpdf(s["beta"], 0, 10).sum()
    mean = s.get("alpha", 0.0) + sum(b * column for b, column in zip(s["beta"], x.T, strict=True))
    return value + stats.norm.logpdf(y, mean, s["sigma"]).sum()


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_joint_is_the_described_posterior_up_to_a_constant(name):
    task = posterior_task(name)
    sites = latents(task, task.reference_draws[:6])
    points = [{k: v[i] for k, v in sites.items()} for i in range(6)]
    ours = np.array([float(log_joint(task, point)) for point in points])
    theirs = np.array([scipy_log_joint(name, point, task.args) for point in points])
    np.testing.assert_allclose(np.diff(ours), np.diff(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_model_takes_its_dtype_from_its_data(name):
    task = posterior_task(name)
    point = {k: v[0] for k, v in latents(task, task.reference_draws[:1]).items()}
    assert torch.get_default_dtype() == torch.float32
    assert log_joint(task, point).dtype == torch.float64


@pytest.mark.parametrize("name", POSTERIORS)
def test_one_run_with_leading_chain_dimensions_is_a_run_a_chain(name):
    task = posterior_task(name)
    sites = latents(task, task.reference_draws[:4])
    # A plate of the model takes the last dimension; a latent outside it then has a 1 there.
    plated = name.startswith(("eight", "low"))
    event = {"mu": 1 if name.startswith("low") else 0, "sigma": 1 if name.startswith("low") else 0, "beta": 1}
    inside = ("theta", "z") if name.startswith("eight") else ()
    shaped = {k: v.unsqueeze(v.dim() - event.get(k, 0)) if plated and k not in inside else v for k, v in sites.items()}
    trace = poutine.trace(poutine.condition(task.model, shaped)).get_trace(*task.args)
    trace.compute_log_prob()
    together = 0.0
    for site in trace.nodes.values():
        # pyro.deterministic is a masked site: it adds nothing
        if site["type"] == "sample" and site["log_prob"].dim() > 0:
            together = together + site["log_prob"].reshape(4, -1).sum(-1)
        elif site["type"] == "sample":
            together = together + site["log_prob"]
    alone = [log_joint(task, {k: v[i] for k, v in sites.items()}) for i in range(4)]
    torch.testing.assert_close(together - together[0], torch.stack(alone) - alone[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", POSTERIORS)
def test_reference_draws_agree_with_the_stored_moments(name):
    task = posterior_task(name)
    draws, n = task.reference_draws, len(task.reference_draws)
    assert draws.shape[1] == len(task.parameters) == DIM[next(k for k in DIM if name.startswith(k))]
    # 2,000 of the 10,000: their mean differs from the full one by less than the error of 2,000
    if name.endswith("unordered"):
        torch.testing.assert_close(draws.mean(0), task.reference_mean, rtol=0, atol=4e-3)  # float32 on disk, thinned
    else:
        z = (draws.mean(0) - task.reference_mean) / (task.reference_sd / n**0.5)
        assert z.abs().max() < 4
        torch.testing.assert_close(task.reference_mcse, task.reference_sd / 100)
    kurtosis = ((draws - draws.mean(0)) / draws.std(0)).pow(4).mean(0)
    error = ((kurtosis - 1) / (4 * n)).sqrt()  # relative error of a sample's standard deviation
    assert ((draws.std(0) / task.reference_sd - 1) / error).abs().max() < 4


@pytest.mark.parametrize("name", POSTERIORS)
def test_columns_inverts_the_split_into_sites_and_keeps_the_batch(name):
    task = posterior_task(name)
    draws = task.reference_draws[:6]
    sites = latents(task, draws)
    if "z" in sites:
        sites["theta"] = sites["mu"][:, None] + sites["tau"][:, None] * sites["z"]
    torch.testing.assert_close(task.columns(sites), draws, rtol=1e-12, atol=1e-12)
    grouped = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in sites.items()}
    torch.testing.assert_close(task.columns(grouped), draws.reshape(2, 3, -1), rtol=1e-12, atol=1e-12)


def test_columns_names_a_missing_site():
    with pytest.raises(KeyError, match=r"must hold the site 'beta'"):
        posterior_task("arK").columns({"alpha": torch.zeros(3)})


def test_mirrored_reference_is_symmetric_exactly():
    task, ordered = posterior_task("low_dim_gauss_mix_unordered"), posterior_task("low_dim_gauss_mix")
    mean, sd = task.reference_mean, task.reference_sd
    assert mean[0] == mean[1]
    assert mean[2] == mean[3]
    assert mean[4] == 0.5
    assert sd[0] == sd[1]
    assert sd[2] == sd[3]
    draws = task.reference_draws
    n = len(ordered.reference_draws)
    assert len(draws) == 2 * n
    assert ((draws[:, 0] < draws[:, 1]).double().mean() == 0.5).item()
    torch.testing.assert_close(draws[n:, [1, 0, 3, 2]], draws[:n, :4], rtol=0, atol=0)
    torch.testing.assert_close(draws[n:, 4] + draws[:n, 4], torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-15)
    # the law of total variance: within a mode, and between two equal ones
    m, s = ordered.reference_mean, ordered.reference_sd
    torch.testing.assert_close(sd[4] ** 2, s[4] ** 2 + (m[4] - 0.5) ** 2, rtol=1e-12, atol=0)
    # the mean of theta is 1/2 by symmetry, without error
    assert task.reference_mcse[4] < 1e-12


def test_the_unordered_log_joint_is_mirror_symmetric():
    task = posterior_task("low_dim_gauss_mix_unordered")
    n = len(task.reference_draws) // 2
    pair = latents(task, task.reference_draws[[0, n]])
    left, right = ({k: v[i] for k, v in pair.items()} for i in (0, 1))
    torch.testing.assert_close(log_joint(task, left), log_joint(task, right), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["arK", "logearn_interaction", "kidscore_interaction"])
def test_under_a_flat_prior_the_posterior_mean_is_least_squares(name):
    task = posterior_task(name)
    x, y = task.args
    if name == "arK":  # its prior is flat for all purposes: sd 10 against .1
        x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], -1)
    estimate = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
    assert ((estimate - task.reference_mean[:-1]) / task.reference_mcse[:-1]).abs().max() < 4


def test_the_lags_are_the_series_before_each_observation():
    lags, y = posterior_task("arK").args
    assert lags.shape == (195, 5)
    for k in range(1, 5):
        torch.testing.assert_close(lags[k:, k - 1], y[:-k], rtol=0, atol=0)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of 'eight_schools_noncentered'"):
        posterior_task("eight_schools")
