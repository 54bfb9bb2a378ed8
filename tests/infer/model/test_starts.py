"""A few valid starts are enough, and whatever the user points at serves: his strategy, his points, the prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_median, init_to_sample, init_to_value

from pyro_sb.infer import MCMC, KernelLangevin
from pyro_sb.infer.model.log_joint import log_joint
from tests.infer.models import narrow


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def taxi(y):  # finite for top > max(y) alone
    top = pyro.sample("top", dist.LogNormal(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Uniform(torch.zeros_like(top), top), obs=y)


FAR = 70.0  # log 70 is beyond 2, and the prior has 1.2 % there
STRATEGIES = {
    "none": None,
    "sample": init_to_sample,
    "feasible": init_to_feasible,
    "median": init_to_median,
    "value inside": init_to_value(values={"top": torch.tensor(80.0, dtype=torch.float64)}),
    "value outside": init_to_value(values={"top": torch.tensor(1.0, dtype=torch.float64)}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_chain_starts_where_few_starts_are_valid(name):
    joint = log_joint(taxi, args=(torch.tensor([30.0, FAR]),), init_strategy=STRATEGIES[name])
    z = joint.start(200)
    assert z.shape == (200, 1) and torch.isfinite(joint.log_prob(z)).all() and (z > torch.tensor(FAR).log()).all()
    if name != "value inside":
        assert len(z.unique()) > 20


def test_improper_priors_are_looked_for_far_and_wide():
    def model(y):
        top = pyro.sample("top", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("y", dist.Uniform(torch.zeros_like(top), top), obs=y)

    z = log_joint(model, args=(torch.tensor(1e4),)).start(50)
    assert (z > torch.tensor(1e4).log()).all()


def test_improper_sites_do_not_keep_the_others_from_their_prior():
    def model(y):
        loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
        taxi(y)
        with pyro.plate("more", 6):
            x = pyro.sample("x", dist.LogNormal(3.0, 0.1))
            pyro.sample("low", dist.Uniform(torch.zeros_like(x), x), obs=torch.full((6,), 15.0))
        pyro.sample("z", dist.Normal(loc, 1.0), obs=torch.tensor(3.0))

    joint = log_joint(model, args=(torch.tensor([FAR / 3]),))
    assert torch.isfinite(joint.log_prob(joint.start(50))).all()


def test_points_of_the_user_serve_where_nothing_else_does():
    far = torch.tensor(5000.0)  # 50 sds of the prior away
    with pytest.raises(ValueError, match=r"observed site 'x'.*initial_params \(start=\) inside the support"):
        log_joint(narrow, args=(far,))
    joint = log_joint(narrow, args=(far,), points=torch.tensor([[0.0], [5000.02]]))
    z = joint.start(64)
    assert ((z - far).abs() < 0.1).all() and len(z.unique()) > 8


def test_a_potential_that_is_finite_at_one_point_of_many():
    def potential(params):
        return torch.where((params["x"] - 20).abs() < 0.5, params["x"] ** 2, torch.inf)

    start = {"x": torch.tensor([0.0, 20.1, -5.0])}
    joint = log_joint(potential_fn=potential, initial_params=start, batched_initial=True)
    assert ((joint.start(40) - 20).abs() < 0.5).all()


def test_no_start_at_all_is_said():
    joint = log_joint(taxi, args=(torch.tensor([0.1]),))
    joint._known = None
    joint._density = lambda z, gradient: (z.new_full((len(z),), torch.nan), torch.zeros_like(z))
    with pytest.raises(ValueError, match="finite at some start, got none"):
        joint.start(3)


def test_none_is_none():
    assert log_joint(taxi, args=(torch.tensor([0.1]),)).start(0).shape == (0, 1)


@pytest.mark.parametrize("start", ["search", torch.linspace(4999.91, 5000.09, 30)[:, None]])
def test_kernels_start_where_the_prior_hardly_reaches(start):
    at = torch.tensor(50.0 if isinstance(start, str) else 5000.0)  # within .1 of 50 lie .0007 of the prior
    mcmc = MCMC(KernelLangevin(narrow, start=start), num_samples=50, num_chains=32, disable_progbar=True)
    mcmc.run(at)
    gap = mcmc.get_samples()["mu"] - at
    assert abs(gap.mean() / (0.2 / 12**0.5 / 800**0.5)) < 4.5 and abs(gap.std() / (0.2 / 12**0.5) - 1) < 0.1


@pytest.mark.parametrize("options", [{"start": "prior"}, {"init_strategy": init_to_sample}])
def test_kernels_start_from_the_prior(options):
    mcmc = MCMC(KernelLangevin(taxi, **options), num_samples=50, num_chains=32, disable_progbar=True)
    mcmc.run(torch.tensor([30.0, FAR]))
    logs = mcmc.get_samples()["top"].log()
    least = torch.tensor(FAR).log()  # N(2, 1) times exp(-2 z): a standard normal beyond log 70
    mean = (dist.Normal(0.0, 1.0).log_prob(least) - torch.special.log_ndtr(-least)).exp()
    assert (logs > least).all() and abs(logs.mean() - mean) < 4.5 * logs.std() / 400**0.5
