"""Warnings point at the user's line, however deep the call that meets the fault, and name what follows."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer import MCMC, AmortizedPosterior, KernelLangevin
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population import populate

F64 = torch.float64
PACKAGE = Path(__file__).parents[1] / "pyro_sb"


def proper():
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))


def test_populate_and_a_run_point_at_the_users_line(monkeypatch):
    monkeypatch.setattr("pyro_sb.infer.population.build.POOR_SHARE", 2.0)
    with pytest.warns(
        RuntimeWarning, match=r"is poor.*may be off. Raise num_particles \(now 100\).*flat prior"
    ) as caught:
        populate(LogJoint.from_batched(lambda z: -z.square().sum(1), 2), 100)  # nothing is known of a prior
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(RuntimeWarning, match="is poor") as caught:
        MCMC(KernelLangevin(proper, num_particles=100), 5, 0, num_chains=4, disable_progbar=True).run()
    said = next(w for w in caught if "is poor" in str(w.message))
    assert said.filename == __file__ and "flat prior" not in str(said.message)


def test_a_posterior_and_its_chains_point_at_the_users_line():
    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0))

    amortized = AmortizedPosterior(model, bridge="light")
    amortized.fit(num_simulations=300, num_updates=60, progress=False)
    with pytest.warns(RuntimeWarning, match="y lies") as caught:
        posterior = amortized.condition(torch.tensor(30.0, dtype=F64))
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="weights are poor") as caught:
        posterior.mcmc(10, num_chains=8)
    assert {w.filename for w in caught} == {__file__}


def test_every_warning_of_the_package_takes_this_way():
    found = [p for p in PACKAGE.rglob("*.py") if re.search(r"warnings\.warn\(|stacklevel", p.read_text())]
    assert found == [PACKAGE / "warn.py"]


# ---- R-hat ----


def two_far(params):
    return -torch.logsumexp(torch.stack([-((params["x"] - 40) ** 2), -((params["x"] + 40) ** 2)]).sum(-1) / 2, 0)


def stuck(num_samples=100, num_chains=8):
    """Chains by local moves alone, half of them in either mode."""
    start = torch.full((num_chains, 2), 40.0, dtype=F64)
    start[: num_chains // 2] *= -1
    kernel = KernelLangevin(potential_fn=two_far, probabilities={"local": 1.0})
    return MCMC(kernel, num_samples, num_chains=num_chains, initial_params={"x": start}, disable_progbar=True)


@pytest.mark.filterwarnings("always:R-hat is:RuntimeWarning")
def test_chains_that_disagree_are_said_once_with_the_worst_site():
    mcmc = stuck()
    with pytest.warns(
        RuntimeWarning, match=r"R-hat is .* \(worst: x\[[01]\]\).*Raise num_samples \(now 100\)"
    ) as caught:
        mcmc.run()
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.filterwarnings("error:R-hat is:RuntimeWarning")
@pytest.mark.parametrize(("num_samples", "num_chains"), [(3, 8), (100, 1)])
def test_nothing_is_said_of_what_is_not_known(num_samples, num_chains):
    stuck(num_samples, num_chains).run()


@pytest.mark.filterwarnings("error:R-hat is:RuntimeWarning")
def test_nothing_is_said_of_chains_that_agree_in_a_heavy_tail():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.deterministic("y", pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 6.0)).exp())

    MCMC(KernelLangevin(model), 400, num_chains=16, disable_progbar=True).run()
