"""Nothing falls back to the CPU: every tensor is made on the device of the model, and a GPU holds all of it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_sb.infer.autoguide import AutoBridge, AutoLightBridge
from tests.devices import OneDevice

pytestmark = pytest.mark.filterwarnings("ignore:The guide does not cover")


def model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu.square().sum(-1, keepdim=True), 1.0), obs=y)


def test_the_mode_sees_a_factory_without_a_device():
    from pyro_sb.ops.sinkhorn import default_tolerance

    assert callable(default_tolerance)
    with OneDevice() as mode:
        exec(compile("import torch; torch.zeros(3); torch.zeros(3, device='cpu')", mode_file(), "exec"))
    assert len(mode.found) == 1


def mode_file():
    from tests.devices import PACKAGE

    return f"{PACKAGE}/made_up.py"


@pytest.mark.parametrize("kind", [AutoLightBridge, AutoBridge])
def test_fit_draws_and_training_make_every_tensor_on_the_models_device(kind):
    pyro.set_rng_seed(0)
    y = torch.tensor([3.0, 4.5, 4.0])
    with OneDevice() as mode:
        guide = kind(model)
        guide.fit(y)
        guide.importance(100)
        guide.median(y)
        Predictive(model, guide=guide, num_samples=3)(y)
        if kind is AutoLightBridge:
            guide.paths(3, 4)
            guide.drift(0.5, torch.zeros(3, 2))
            SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y)
    assert not mode.found, "\n".join(sorted(mode.found))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [AutoLightBridge, AutoBridge])
def test_guides_on_a_gpu(kind, tmp_path):
    pyro.set_rng_seed(0)
    y = torch.tensor([3.0, 4.5, 4.0], device="cuda")
    guide = kind(model)
    fit = guide.fit(y)
    assert guide(y)["mu"].is_cuda
    assert all(value.is_cuda for value in guide.state_dict().values())
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.set_rng_seed(0)
    there = AutoLightBridge(model)
    there.fit(y.cpu())
    assert abs(fit.log_evidence - there.log_evidence) < 0.05
    other = kind(model).to("cuda")
    if kind is AutoLightBridge:
        other.load_state_dict(torch.load(tmp_path / "guide.pt"))
        x = torch.randn(5, 2, device="cuda")
        assert torch.allclose(other.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))
