"""The main job on a GPU: the same law, and everything stays on the device."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sb.infer.amortized.amortized import AmortizedPosterior
from pyro_sb.infer.kernels.langevin import KernelLangevin
from pyro_sb.infer.mcmc.mcmc import MCMC


def conjugate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu[..., None], 1.0), obs=y)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_of_a_model_whose_data_lie_on_the_gpu(dtype: torch.dtype) -> None:
    y = torch.tensor([1.2, 0.3, 2.1, 0.8], dtype=dtype, device="cuda")
    mcmc = MCMC(KernelLangevin(conjugate), num_samples=100, num_chains=256, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples()["mu"]
    assert draws.is_cuda and draws.dtype == dtype
    n_eff = float(mcmc.diagnostics()["mu"]["n_eff"])
    assert abs(float(draws.mean()) - float(y.sum()) / 4.25) < 4 / math.sqrt(4.25 * n_eff)


@pytest.mark.cuda
@pytest.mark.parametrize("bridge", ["light", "vsdm"])
def test_an_amortised_posterior_stays_on_the_gpu(bridge: str) -> None:
    def model(rows: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(rows.new_zeros(()), 2.0))
        with pyro.plate("n", len(rows)):
            pyro.sample("y", dist.Normal(mu[..., None] + rows, 1.0))

    rows = torch.zeros(4, device="cuda")
    amortized = AmortizedPosterior(model, bridge=bridge)
    amortized.fit(rows, num_simulations=1000, num_updates=300, progress=False)
    y = torch.tensor([1.2, 0.3, 2.1, 0.8], device="cuda")
    posterior = amortized.condition(torch.stack([y, y + 1]))
    assert posterior.sample(10)["mu"].is_cuda
    draws = posterior.mcmc(100)
    assert draws.get_samples()["mu"].is_cuda
    n_eff = draws.diagnostics()["mu"]["n_eff"]
    exact = torch.stack([y.sum(), y.sum() + 4]) / 4.25
    gap = (draws.get_samples()["mu"].mean(0) - exact).cpu().abs()
    assert bool((gap < 4 / (4.25 * n_eff.cpu()).sqrt()).all())
