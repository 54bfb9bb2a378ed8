"""The posterior tasks: log joints against scipy, references against other routes, and posteriordb's files."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from scipy import special, stats

import pyro_sb
from pyro_sb.datasets import POSTERIORS, exact_task, posterior_task

VARIABLE = "PYRO_SB_POSTERIORDB"
SOURCES = {"exact": exact_task} | ({"posteriordb": posterior_task} if os.environ.get(VARIABLE) else {})
DIM = {"eight": 10, "low": 5, "arK": 7, "log": 5, "kid": 5}


@pytest.fixture(params=[(source, name) for source in SOURCES for name in POSTERIORS], ids="-".join)
def task(request):
    source, name = request.param
    return SOURCES[source](name)


@pytest.fixture(params=SOURCES)
def source(request):
    return request.param


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


def test_log_joint_is_the_described_posterior_up_to_a_constant(task):
    name = task.name
    sites = latents(task, task.reference_draws[:6])
    points = [{k: v[i] for k, v in sites.items()} for i in range(6)]
    ours = np.array([float(log_joint(task, point)) for point in points])
    theirs = np.array([scipy_log_joint(name, point, task.args) for point in points])
    np.testing.assert_allclose(np.diff(ours), np.diff(theirs), rtol=0, atol=1e-8)


def test_a_model_takes_its_dtype_from_its_data(task):
    point = {k: v[0] for k, v in latents(task, task.reference_draws[:1]).items()}
    assert torch.get_default_dtype() == torch.float32
    assert log_joint(task, point).dtype == torch.float64


def test_one_run_with_leading_chain_dimensions_is_a_run_a_chain(task):
    name = task.name
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


def test_reference_draws_agree_with_the_references_moments(task):
    draws, n = task.reference_draws, len(task.reference_draws)
    assert draws.shape == (4000 if task.name.endswith("unordered") else 2000, len(task.parameters))
    assert len(task.parameters) == DIM[next(k for k in DIM if task.name.startswith(k))]
    if task.name.endswith("unordered"):
        torch.testing.assert_close(draws.mean(0), task.reference_mean, rtol=0, atol=4e-3)  # each mode has one half
    else:
        z = (draws.mean(0) - task.reference_mean) / (task.reference_sd / n**0.5)
        assert z.abs().max() < 4
    kurtosis = ((draws - draws.mean(0)) / draws.std(0)).pow(4).mean(0)
    error = ((kurtosis - 1) / (4 * n)).sqrt()  # relative error of a sample's standard deviation
    assert ((draws.std(0) / task.reference_sd - 1) / error).abs().max() < 4


def test_columns_inverts_the_split_into_sites_and_keeps_the_batch(task):
    draws = task.reference_draws[:6]
    sites = latents(task, draws)
    if "z" in sites:
        sites["theta"] = sites["mu"][:, None] + sites["tau"][:, None] * sites["z"]
    torch.testing.assert_close(task.columns(sites), draws, rtol=1e-12, atol=1e-12)
    grouped = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in sites.items()}
    torch.testing.assert_close(task.columns(grouped), draws.reshape(2, 3, -1), rtol=1e-12, atol=1e-12)


def test_columns_names_a_missing_site():
    with pytest.raises(KeyError, match=r"must hold the site 'beta'"):
        exact_task("arK").columns({"alpha": torch.zeros(3)})


def test_mirrored_reference_is_symmetric_exactly(source):
    task, ordered = SOURCES[source]("low_dim_gauss_mix_unordered"), SOURCES[source]("low_dim_gauss_mix")
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


def test_the_unordered_log_joint_is_mirror_symmetric(source):
    task = SOURCES[source]("low_dim_gauss_mix_unordered")
    n = len(task.reference_draws) // 2
    pair = latents(task, task.reference_draws[[0, n]])
    left, right = ({k: v[i] for k, v in pair.items()} for i in (0, 1))
    torch.testing.assert_close(log_joint(task, left), log_joint(task, right), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "gap"), [("arK", 1e-3), ("logearn_interaction", 1e-7), ("kidscore_interaction", 1e-7)]
)
def test_under_a_flat_prior_the_posterior_mean_is_least_squares(source, name, gap):
    task = SOURCES[source](name)
    x, y = task.args
    if name == "arK":  # its prior is flat for all purposes: sd 10 against .1
        x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], -1)
    estimate = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
    error = 4 * task.reference_mcse + gap * task.reference_sd
    assert ((estimate - task.reference_mean[:-1]) / error[:-1]).abs().max() < 1


def test_the_lags_are_the_series_before_each_observation(source):
    lags, y = SOURCES[source]("arK").args
    assert lags.shape == (195, 5)
    for k in range(1, 5):
        torch.testing.assert_close(lags[k:, k - 1], y[:-k], rtol=0, atol=0)


# --- references by quadrature, by another route ----------------------------------------------------------------------


def test_a_flat_regressions_moments_are_closed_forms():
    # sigma^2 is inverse gamma of nu / 2 = (n - 5) / 2 and rss / 2, so beta is Student of nu degrees of freedom
    task = exact_task("logearn_interaction")
    x, y = task.args
    rss = (y - x @ task.reference_mean[:4]).square().sum()
    nu = len(y) - 5
    mean = (rss / 2).sqrt() * np.exp(special.gammaln((nu - 1) / 2) - special.gammaln(nu / 2))
    second = rss / (nu - 2)
    covariance = second * torch.linalg.inv(x.T @ x)
    ours = torch.cat([task.reference_mean[4:], task.reference_sd])
    exact = torch.cat([mean[None], covariance.diagonal().sqrt(), (second - mean**2).sqrt()[None]])
    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=0)


def test_eight_schools_on_a_grid_of_mu_and_tau_is_its_reference():
    task = exact_task("eight_schools_noncentered")
    sigma, y = (value.numpy() for value in task.args)
    log_tau = np.linspace(-20, 8, 1401)
    mu, tau = np.meshgrid(np.linspace(-35, 45, 401), np.exp(log_tau), indexing="ij")
    log_p = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, 0, 5) + np.log(tau)
    for s, effect in zip(sigma, y):
        log_p += stats.norm.logpdf(effect, mu, np.hypot(s, tau))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    share = tau**2 / (tau**2 + sigma[0] ** 2)  # of school 1's own effect in its mean
    theta = mu + share * (y[0] - mu)
    means = np.array([(p * value).sum() for value in (theta, mu, tau)])
    squares = np.array([(p * value).sum() for value in (theta**2 + share * sigma[0] ** 2, mu**2, tau**2)])
    keep = [0, 8, 9]
    np.testing.assert_allclose(task.reference_mean[keep], means, rtol=1e-8)
    np.testing.assert_allclose(task.reference_sd[keep], np.sqrt(squares - means**2), rtol=1e-6)  # tau's tail


def test_the_mixtures_reference_is_a_finer_rule_in_other_coordinates():
    # 7^5 nodes in (mu, sigma, theta) itself, where the reference has 6^5 in logarithms and a logit
    task = exact_task("low_dim_gauss_mix")
    (y,), draws = task.args, task.reference_draws
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(7))
    grid, log_weight = torch.cartesian_prod(*[nodes] * 5), torch.cartesian_prod(*[weights.log()] * 5).sum(-1)
    x = draws.mean(0) + grid @ torch.linalg.cholesky(draws.T.cov()).T
    log_joint = []
    for mu1, mu2, sigma1, sigma2, theta in (part[..., None].unbind(-2) for part in x.split(500)):
        each = [torch.distributions.Normal(m, s).log_prob(y) for m, s in ((mu1, sigma1), (mu2, sigma2))]
        log_joint.append(torch.logaddexp(theta.log() + each[0], (1 - theta).log() + each[1]).sum(-1))
    prior = -x[:, :4].square().sum(-1) / 8 + 4 * (x[:, 4].log() + (1 - x[:, 4]).log())
    weight = (torch.cat(log_joint) + prior + log_weight + grid.square().sum(-1) / 2).softmax(0)
    mean = weight @ x
    sd = (weight @ (x - mean).square()).sqrt()
    assert ((mean - task.reference_mean) / sd).abs().max() < 1e-4
    assert (task.reference_sd / sd - 1).abs().max() < 1e-4


# --- posteriordb's files ---------------------------------------------------------------------------------------------


def test_posteriordbs_draws_of_eight_schools_agree_with_the_quadrature():
    if "posteriordb" not in SOURCES:
        pytest.skip(f"{VARIABLE} is not set: posteriordb's own data and reference draws are not tested here")
    ours, theirs = exact_task("eight_schools_centered"), posterior_task("eight_schools_centered")
    for a, b in zip(ours.args, theirs.args):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert ours.parameters == theirs.parameters
    assert ((ours.reference_mean - theirs.reference_mean) / theirs.reference_mcse).abs().max() < 4
    torch.testing.assert_close(theirs.reference_mcse, theirs.reference_sd / 100)
    assert (theirs.reference_sd / ours.reference_sd - 1).abs().max() < 0.03


def data_of(task):
    """What posteriordb's JSON holds for an autoregression or eight schools."""
    first, second = task.args
    if task.name == "arK":
        return {"K": 5, "T": 200, "y": torch.cat([first[0].flip(0), second]).tolist()}
    return {"J": 8, "y": second.tolist(), "sigma": first.tolist()}


def write_zipped(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, json.dumps(value))


def check_out(root, task, stored):
    """A task's files as a checkout of posteriordb has them: ten chains."""
    base, (data, _) = root / "posterior_database", stored.split("-")
    (base / "posteriors").mkdir(parents=True)
    described = {"name": stored, "data_name": data, "reference_posterior_name": stored}
    (base / "posteriors" / f"{stored}.json").write_text(json.dumps(described))
    write_zipped(base / "data" / "data" / f"{data}.json.zip", data_of(task))
    chains = [dict(zip(task.parameters, chain.T.tolist())) for chain in task.reference_draws.chunk(10)]
    write_zipped(base / "reference_posteriors" / "draws" / "draws" / f"{stored}.json.zip", chains)


def write_flat(root, task, stored):
    """The same as a pair of files."""
    draws = task.reference_draws.numpy()
    (root / f"{stored}.data.json").write_text(json.dumps(data_of(task)))
    moments = {"reference_mean": draws.mean(0), "reference_sd": draws.std(0, ddof=1), "n_reference": len(draws)}
    np.savez(root / f"{stored}.npz", draws=draws[::5], params=np.array(task.parameters), **moments)


@pytest.mark.parametrize("write", [check_out, write_flat])
@pytest.mark.parametrize(
    ("name", "stored"),
    [("arK", "arK-arK"), ("eight_schools_centered", "eight_schools-eight_schools_noncentered")],
)
def test_a_folder_gives_back_what_was_written(tmp_path, write, name, stored):
    task = exact_task(name)
    write(tmp_path, task, stored)
    read = posterior_task(name, root=tmp_path)
    assert (read.name, read.model, read.parameters) == (task.name, task.model, task.parameters)
    for a, b in zip(read.args, task.args):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    draws = task.reference_draws
    torch.testing.assert_close(read.reference_draws, draws[::5], rtol=0, atol=0)
    torch.testing.assert_close(read.reference_mean, draws.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read.reference_sd, draws.std(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(read.reference_mcse, draws.std(0) / 2000**0.5, rtol=1e-12, atol=0)


def test_the_variable_names_the_folder_and_root_comes_before_it(tmp_path, monkeypatch):
    write_flat(tmp_path, exact_task("arK"), "arK-arK")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert posterior_task("arK").args[1].shape == (195,)
    with pytest.raises(FileNotFoundError, match=r"posteriors/arK-arK.json, or a folder with arK-arK.data.json and"):
        posterior_task("arK", root=tmp_path / "nothing")


def test_without_a_folder_the_error_says_what_to_do(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"git clone .*posteriordb`.* root=.*{VARIABLE}.* exact_task"):
        posterior_task("arK")


@pytest.mark.parametrize("door", [exact_task, posterior_task])
def test_an_unknown_name_is_refused(door):
    with pytest.raises(ValueError, match="name must be one of .'eight_schools_noncentered'"):
        door("eight_schools")


def test_the_package_holds_no_data():
    files = [path for path in Path(pyro_sb.__file__).parent.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files if "__pycache__" not in path.parts}
    assert kinds == {".py", ".typed"}
