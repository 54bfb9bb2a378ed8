"""Units do not matter: fitted to c x a bridge draws c times what it draws of x, for c from 1e-12 to 1e12."""

import functools
import warnings

import pytest
import torch

from pyro_sb.bridges import DSB, SGM, VSDM, KernelLangevinBridge, LightSB
from tests.laws import BRIDGES

SCALES = [1e-12, 1e-8, 500.0, 1e12]
UNITLESS = ("langevin", "vsdm", "sgm", "latent")  # epsilon in units of the data, or none


def scaled_bridge(name, scale):
    """A bridge of the registry whose epsilon is scaled where it has units."""
    bridge = BRIDGES[name]()
    if name.startswith(UNITLESS) or name in ("smoothed", "tails-light-bass"):
        return bridge
    config = bridge.config()
    return type(bridge).from_config(config | {"epsilon": config["epsilon"] * scale**2})


@functools.cache
def laws(name, scale):
    """A bridge fitted to scaled draws, and draws of it in units of the scale."""
    torch.manual_seed(3)
    x = torch.randn(400, 2) * torch.tensor([1.0, 0.5]) + torch.tensor([0.3, -2.0])
    torch.manual_seed(0)
    bridge = scaled_bridge(name, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 20 updates do not converge
        bridge.fit(x * scale, progress=False)
    torch.manual_seed(1)
    return bridge, bridge().sample((4000,)).double() / scale


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", BRIDGES)
def test_draws_scale_with_the_data(name, scale):
    (bridge, draws), (_, wanted) = laws(name, scale), laws(name, 1.0)
    assert bool(torch.isfinite(draws).all())
    near = 0.16 if name.startswith(("vsdm", "sgm")) else 0.06  # whose noise rates are in the data's units out here
    torch.testing.assert_close(draws.mean(0), wanted.mean(0), rtol=0, atol=near + 0.02)
    torch.testing.assert_close(draws.std(0) / wanted.std(0), torch.ones(2).double(), rtol=0, atol=near)
    point = torch.tensor([0.5, -1.5])
    drift = bridge.drift(0.5, point * scale).detach() / scale
    assert bool(torch.isfinite(drift).all()) and float(drift.abs().max()) < 100
    if bridge.density == "marginal" or bridge.approximate_log_prob:
        here = bridge().log_prob(torch.stack([point, point + 0.4]) * scale)
        assert bool(torch.isfinite(here).all())


@pytest.mark.parametrize("kind", [VSDM, SGM])
@pytest.mark.parametrize("scale", [1e-8, 300.0, 1e6])
def test_densities_change_by_the_log_of_the_unit(kind, scale):
    x, values = torch.randn(300, 2, dtype=torch.float64), []
    for c in (1.0, scale):
        torch.manual_seed(0)
        bridge = kind(2, hidden=(8,), covariance_hidden=(8,))
        bridge.fit(c * x, num_updates=1, learning_rate=1e-9, progress=False)
        bridge.log_errors.zero_()
        point = c * torch.tensor([[0.3, -0.4]], dtype=torch.float64)
        gap = 2 * torch.tensor(c, dtype=torch.float64).log()
        values.append([bridge().log_prob(point) + gap, bridge.path_log_prob(point, num_paths=64) + gap])
    for one, other in zip(*values):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


@pytest.mark.parametrize("ratio", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_axes_of_far_units_are_told_apart_by_the_kernel_bridge(ratio, dtype):
    torch.manual_seed(0)
    x = torch.randn(500, 2, dtype=dtype)
    draws = []
    for scale in (torch.ones(2, dtype=dtype), torch.tensor([1.0, ratio], dtype=dtype)):
        bridge = KernelLangevinBridge(2)
        bridge.fit(x * scale, progress=False)
        torch.manual_seed(1)
        draws.append(bridge().sample((1000,)) / scale)
    torch.testing.assert_close(draws[1], draws[0], rtol=0, atol=0.05)


def test_dsb_says_which_way_its_epsilon_is_off():
    x = torch.randn(200, 2)
    quick = {"num_iterations": 1, "num_updates": 2, "num_pairs": 50, "progress": False}
    for epsilon, message in ((1e-5, "Raise epsilon"), (1e5, "Lower epsilon")):
        with pytest.warns(RuntimeWarning, match=message), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has not converged")
            DSB(2, epsilon=epsilon, hidden=(8,), num_steps=3).fit(x, **quick)


def test_light_bridges_need_no_unit():
    torch.manual_seed(0)
    x = torch.randn(300, 2)
    for scale in (1e-12, 1e12):
        bridge = LightSB(2, num_components=2, epsilon=scale**2)
        bridge.fit(x * scale, solver="moments", progress=False)
        assert bool(torch.isfinite(bridge().log_prob(x[:5] * scale)).all())
