"""Laws to fit light bridges to, short fits, and z-scores."""

import functools
import math
import warnings

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sb.bridges import LightSB, LightSBM
from tests.ops.potentials import F64

full_or_not = pytest.mark.parametrize("covariance", ["diagonal", "full"])
either = pytest.mark.parametrize("make", [LightSB, LightSBM])
CENTRES = torch.tensor([[3.0, 0.0], [-2.0, 2.5], [-2.0, -3.0]], **F64)
QUICK = {"progress": False, "num_updates": 40}


def shared(make):
    """A fit that tests share: made once for its arguments, from a seed of its own, beside a test's random numbers."""

    @functools.cache
    @functools.wraps(make)
    def made(*args, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **options)

    return made


def clusters(num):
    return CENTRES[torch.randint(3, (num,))] + 0.5 * torch.randn(num, 2, **F64)


def standard_normal(dim=2):
    return MultivariateNormal(torch.zeros(dim, **F64), torch.eye(dim, **F64))


def quick(bridge, target=None, source=None, **options):
    """A short fit: what is exact is exact of any parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        bridge.fit(
            clusters(300) if target is None else target, source, **({"progress": False, "num_updates": 20} | options)
        )
    return bridge


def sources():
    return {"point": None, "draws": torch.randn(200, 2, **F64), "law": standard_normal()}


def plane(half=12.0, num=241):
    axis = torch.linspace(-half, half, num, **F64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def z_of_means(values, expected):
    return (values.mean(0) - expected) / values.std(0) * math.sqrt(len(values))


def z_of_two(a, b):
    """z-scores of first and second moments of two samples."""

    def features(x):
        return torch.cat([x, (x[..., :, None] * x[..., None, :]).flatten(-2)], -1)

    a, b = features(a), features(b)
    return (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()


def bumps(num):
    """A law on the line, of two clusters."""
    return torch.where(torch.rand(num, 1) < 0.4, -1.5, 1.0) + 0.3 * torch.randn(num, 1, **F64)


def scaled(num, variance, dim=1):
    """Draws of mean 0 and this variance, exactly."""
    x = torch.randn(num, dim, **F64)
    x = x - x.mean(0)
    return x / x.std(0, correction=0) * torch.as_tensor(variance, **F64).sqrt()


def quiet_fit(bridge, target, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has not converged", category=RuntimeWarning)
        return bridge.fit(target, **(QUICK | options))


def pairs(num=400, dim=2):
    context = torch.randn(num, 3, **F64)
    return context[:, :dim] ** 2 + 0.5 * torch.randn(num, dim, **F64), context
