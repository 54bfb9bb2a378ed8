"""A batch of chains is what single chains are: at any size of the log joint, in any units, at their own states."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.indexing import Vindex

from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.model.joint import CheckedDensity
from pyro_sb.infer.model.log_joint import log_joint

K = 6
GROUP = torch.arange(1200) % K
NOISE = torch.randn(1200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COLUMNS = torch.randn(1200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def default_dtype_back():
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mean(a, mixing):
    """Of a chain's groups, or of all chains' groups: the same for a single chain."""
    return a.mean() if mixing else a.mean(-1, keepdim=True)


def groups(y, mixing, unit=1.0, constant=0.0):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("groups", K):
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
    pyro.sample("centre", dist.Normal(mean(a, mixing), 0.5), obs=torch.tensor(0.0))
    pyro.factor("constant", torch.tensor(constant))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(unit * (m + a[..., GROUP[: len(y)]]), unit), obs=y)


def offset_in_float32(y, mixing, unit=1.0, constant=0.0):
    """Its own tensors are float32: the product refuses float64."""
    columns = COLUMNS.float()
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float32), 3.0))
    pyro.sample("centre", dist.Normal(mean(a, mixing), 0.5), obs=torch.zeros((), dtype=torch.float32))
    pyro.factor("constant", torch.tensor(constant, dtype=torch.float32))
    with pyro.plate("rows", len(columns)):
        pyro.sample("y", dist.Normal(a @ columns.T, 1.0), obs=NOISE.float())


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize(
    ("model", "setting"),
    [
        (groups, {}),
        (groups, {"unit": 1e-6}),
        (groups, {"unit": 1e-9}),
        (groups, {"constant": -19_000.0}),
        (groups, {"constant": 1e6}),
        (offset_in_float32, {}),
        (offset_in_float32, {"constant": -2_000.0}),
    ],
    ids=["plain", "1e-6", "1e-9", "-19,000", "1e6", "float32 throughout", "float32 throughout, -2,000"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_over_chains_is_found_whatever_the_size_of_the_log_joint(model, setting, mixing, dtype):
    torch.set_default_dtype(dtype)
    y = (setting.get("unit", 1.0) * (4 + NOISE)).to(dtype)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert log_joint(model, args=(y, mixing), kwargs=setting).route == ("vmap" if mixing else "plate")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_between_rows_are_those_of_the_model_without_its_constant(dtype):
    torch.set_default_dtype(torch.float64)
    z = torch.randn(5, K + 1)
    y = (1e-3 * (4 + NOISE)).to(dtype)
    plain, large = (log_joint(groups, args=(y, False, 1e-3, c)) for c in (0.0, 1e6))
    torch.testing.assert_close(large.log_prob(z).diff(), plain.log_prob(z).diff(), rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_rounding_is_no_reason_to_leave_the_plate(offset):
    def regression(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(offset + beta @ x.T, 0.1), obs=y)

    joint = log_joint(regression, args=(COLUMNS.float(), (offset + COLUMNS.sum(1)).float() + 0.1 * NOISE.float()))
    assert (joint.route, joint.dtype) == ("plate", torch.float32)
    joint.log_prob(torch.randn(500, 3))
    assert joint.recheck(1 + 1e-3 * torch.randn(64, 3)) is None and joint.route == "plate"


def mixture(x, mixing):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    pyro.factor("centre", -(loc.mean() if mixing else loc.mean(-1)).square())
    with pyro.plate("rows", len(x)):
        which = pyro.sample("which", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(Vindex(loc)[..., which], 1.0), obs=x)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_over_chains_is_found_where_discrete_sites_are_summed_out(mixing, dtype):
    torch.set_default_dtype(dtype)
    assert log_joint(mixture, args=(NOISE.to(dtype), mixing)).route == ("vmap" if mixing else "plate")


# ---- special points ----


def crossed():  # the chains' mean is multiplied by what is 0 at 0
    x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("crossed", x.square().sum(-1) * x.mean().square())


def test_starts_at_zero_hide_nothing():
    torch.set_default_dtype(torch.float64)
    zeros = {"x": torch.zeros(2)}
    assert log_joint(crossed, init_strategy=init_to_value(values=zeros)).route == "vmap"
    assert log_joint(crossed, initial_params=zeros).route == "vmap"


def symmetric():
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Uniform(-top, top))


def test_a_symmetric_support_that_moves_is_refused_by_name():
    for strategy in (None, init_to_value(values={"top": torch.tensor(2.0), "x": torch.tensor(0.0)})):
        with pytest.raises(NotImplementedError, match="Site 'x' must have a fixed support"):
            log_joint(symmetric, init_strategy=strategy)


# ---- where the chains stand ----


def mixing_far_off(y):
    """Right below 20, where no search starts; above, all chains share their mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    shared = torch.where(mu > 20, mu.mean(), mu)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(shared, 1.0), obs=y)


FAR = torch.tensor([29.0, 30.0, 31.0], dtype=torch.float64)


def test_the_log_joint_is_compared_again_where_the_chains_stand():
    torch.set_default_dtype(torch.float64)
    joint = log_joint(mixing_far_off, args=(FAR,))
    z = torch.randn(8, 1)
    assert joint.route == "plate" and joint.recheck(z) is None
    assert "plate: wrong values for 8 chains" in joint.recheck(30 + z) and joint.route == "vmap"
    expected = (dist.Normal(0.0, 100.0).log_prob(30 + z) + dist.Normal(30 + z, 1.0).log_prob(FAR).sum(-1, True))[:, 0]
    torch.testing.assert_close(joint.log_prob(30 + z), expected)


def far_off_a_site_more():
    if pyro.sample("mu", dist.Normal(0.0, 100.0)) > 20:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def far_off_random():
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    pyro.factor("noise", torch.randn(()) if mu > 20 else torch.zeros(()))


@pytest.mark.parametrize(
    ("model", "message"),
    [(far_off_a_site_more, "same latent sites at every run, got .*'extra'"), (far_off_random, "same at every run")],
)
def test_what_no_route_can_serve_there_is_refused(model, message):
    torch.set_default_dtype(torch.float64)
    with pytest.warns(RuntimeWarning, match="one by one"):
        joint = log_joint(model)
    assert joint.recheck(torch.randn(8, 1)) is None
    with pytest.raises(ValueError, match=message):
        joint.recheck(30 + torch.randn(8, 1))


def test_a_kernel_compares_after_its_warm_up_and_draws_from_the_right_law(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(CheckedDensity, "_objection", lambda *_: None)  # no other check sees these states
    mcmc = MCMC(KernelLangevin(mixing_far_off), num_samples=200, warmup_steps=20, num_chains=16, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(FAR)
    said = [str(w.message) for w in caught if "A batch of chains is not what single chains are" in str(w.message)]
    assert len(said) == 1 and "plate: " in said[0] and "by vmap" in said[0]
    draws, sd = mcmc.get_samples()["mu"], 3**-0.5  # the posterior is Normal(30, 1 / sqrt(3)), but for the wide prior
    assert abs(draws.mean() - 30) < 0.1 and abs(draws.std() / sd - 1) < 0.1


# ---- torch's own remarks ----


def slowly_batched():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    low, _ = torch.histc(x.detach(), bins=2, min=-3.0, max=3.0)
    pyro.factor("low", -0.1 * low + 0 * x.sum(-1))


def test_torchs_remarks_on_batching_do_not_reach_the_user():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        joint = log_joint(slowly_batched)
        joint.log_prob(torch.randn(4, 2))
    assert joint.route == "vmap" and not [w for w in caught if "performance drop" in str(w.message)]


def test_a_network_in_float32_inside_a_model_is_compared_in_its_precision():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh())
    net.append(torch.nn.Linear(64, 2))

    def model(distance):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        place = z + net(z.float()).to(z)  # what a bridge does with points of any dtype
        pyro.sample("distance", dist.Normal(place.norm(dim=-1), 0.01), obs=distance)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert log_joint(model, args=(torch.tensor(2.9),)).route == "plate"
