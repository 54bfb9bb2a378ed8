"""Laws of a learned likelihood that hold whatever was learnt: it is normalised, differentiable, and rows do not mix."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch.func import vmap

from pyro_sb.infer import AmortizedLikelihood
from pyro_sb.infer.model.log_joint import log_joint

F64 = {"dtype": torch.float64}


def normal(theta):
    return theta[:, :1] + 0.5 * torch.randn(len(theta), 1, dtype=theta.dtype)


def plane(theta):
    noise = torch.randn(len(theta), 2, dtype=theta.dtype)
    return torch.stack([theta[:, 0] + noise[:, 0], theta[:, 0] * noise[:, 1]], 1)


def timed_choice(theta):
    choice = (torch.rand(len(theta), dtype=theta.dtype) < torch.sigmoid(theta[:, 0])).to(theta.dtype)
    time = torch.exp(theta[:, 1] + choice + 0.3 * torch.randn(len(theta), dtype=theta.dtype))
    return torch.stack([choice, time], 1)


def choices(theta):
    return torch.bernoulli(torch.sigmoid(theta[:, :2]))


KINDS = {
    "normal": (normal, ()),
    "plane": (plane, ()),
    "timed choice": (timed_choice, (0,)),
    "choices": (choices, (0, 1)),
}


@functools.cache
def rough(name):
    """A crude fit whose networks are then made to depend on the parameters: exact laws hold of any weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    simulate, discrete = KINDS[name]
    law = dist.Uniform(-2.0, 2.0).expand([2]).to_event(1)
    likelihood = AmortizedLikelihood(simulate, proposal=law, discrete=discrete)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        likelihood.fit(num_simulations=400, num_updates=20, progress=False)
    nets = [likelihood.bridge.parameters_of.net] if likelihood.bridge is not None else []
    nets += [likelihood.parts.classifier] if likelihood.parts.classifier is not None else []
    for net in nets:
        torch.nn.init.normal_(net.head.weight, std=0.03)
    torch.set_default_dtype(before)
    return likelihood


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def mass(likelihood, theta):
    """Integral of the density over y, by the trapezoidal rule on a line, summed over classes."""
    t = torch.linspace(-14.0, 14.0, 20_001)
    if likelihood is rough("timed choice"):  # the time by its logarithm
        parts = [torch.stack([torch.full_like(t, c), t.exp()], 1) for c in (0.0, 1.0)]
        return sum(torch.trapezoid((likelihood(theta).log_prob(y) + t).exp(), t) for y in parts)
    if likelihood is rough("choices"):
        return likelihood(theta).log_prob(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])).exp().sum()
    return torch.trapezoid(likelihood(theta).log_prob(t[:, None]).exp(), t)


@pytest.mark.parametrize("name", ["normal", "timed choice", "choices"])
def test_it_is_normalised_at_every_parameter(name):
    for theta in torch.tensor([[0.0, 0.0], [-1.9, 1.0], [1.5, -1.5]]):
        assert float(mass(rough(name), theta)) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_its_gradients_in_the_parameters_are_exact(name):
    likelihood = rough(name)
    theta = torch.tensor([[0.3, -0.4], [-1.1, 0.9], [1.2, 0.2]], requires_grad=True)
    y = likelihood(theta).sample()
    assert torch.autograd.gradcheck(lambda x: likelihood(x).log_prob(y), (theta,))
    value = likelihood(theta).log_prob(y)
    value.sum().backward()
    assert bool((theta.grad != 0).any(1).all())
    assert all(p.grad is None for p in (likelihood.bridge or likelihood.parts.classifier).parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_plate_is_its_rows(name):
    # one theta for many rows asks the networks once; a theta a row asks them for each: the same numbers
    likelihood, theta = rough(name), 2 * torch.rand(3, 2) - 1
    y = likelihood(theta[:, None]).expand([3, 40]).sample()
    shared = likelihood(theta[:, None]).expand([3, 40]).log_prob(y)
    rows = torch.stack([likelihood(theta[i]).log_prob(y[i, j]) for i in range(3) for j in range(40)]).reshape(3, 40)
    each = likelihood(theta[:, None].expand(3, 40, 2)).log_prob(y)
    assert shared.shape == (3, 40)
    torch.testing.assert_close(shared, rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(each, rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vmap(lambda x: likelihood(x).log_prob(y[0]))(theta)[0], shared[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_shapes(name):
    law = rough(name)(torch.zeros(4, 1, 2))
    event = (1,) if name == "normal" else (2,)
    assert law.batch_shape == (4, 1) and law.event_shape == event
    assert law.sample((5,)).shape == (5, 4, 1, *event)
    assert law.expand([4, 6]).sample((5,)).shape == (5, 4, 6, *event)
    assert law.log_prob(law.expand([4, 6]).sample()).shape == (4, 6)
    assert not law.sample().requires_grad and not law.has_rsample
    assert law.to_event(1).batch_shape == (4,)


@pytest.mark.parametrize("name", ["normal", "plane", "timed choice"])
def test_draws_follow_the_density(name):
    # E_q[r / (q + r)] = E_r[q / (q + r)] for densities q and r, here at two parameters: the integral of qr / (q + r)
    likelihood, n = rough(name), 40_000
    q, r = likelihood(torch.tensor([0.3, 0.2])), likelihood(torch.tensor([1.2, -0.5]))
    one, other = q.sample((n,)), r.sample((n,))
    left = torch.sigmoid(r.log_prob(one) - q.log_prob(one))
    right = torch.sigmoid(q.log_prob(other) - r.log_prob(other))
    assert abs(float((left.mean() - right.mean()) / ((left.var() + right.var()) / n).sqrt())) < 4


def test_outside_its_support_the_density_is_zero():
    likelihood, theta = rough("timed choice"), torch.zeros(2)
    with pyro.validation_enabled(False):
        assert float(likelihood(theta).log_prob(torch.tensor([1.0, -0.1]))) == -math.inf
        assert float(likelihood(theta).log_prob(torch.tensor([2.0, 0.1]))) == -math.inf
        free = theta.clone().requires_grad_()
        (grad,) = torch.autograd.grad(likelihood(free).log_prob(torch.tensor([[1.0, -0.1], [1.0, 0.4]]))[1], free)
        assert bool(torch.isfinite(grad).all())


def test_beyond_the_region_the_mean_goes_on_and_the_shape_stays():
    likelihood = rough("normal")
    columns = likelihood.parts.columns
    near, far = columns.high - 1e-6, columns.high + torch.tensor([3.0, 0.0])
    with pytest.warns(RuntimeWarning, match="outside the region"):
        beyond = likelihood(far)
    slope = likelihood.parts.residuals.weights[1, 0] / columns.scale[0]
    t = torch.linspace(-1, 1, 9)[:, None]
    torch.testing.assert_close(
        beyond.log_prob(t + near[0] + 3 * slope), likelihood(near).log_prob(t + near[0]), rtol=0, atol=1e-4
    )
    assert likelihood.outside(torch.stack([near, far, 0 * near, far])) == 0.5


def line(likelihood, y):
    """The exact posterior of one number under the learned likelihood and a normal prior, by quadrature."""
    t = torch.linspace(-2.0, 2.0, 4001)
    theta = torch.stack([t, torch.zeros_like(t)], 1)
    log_post = likelihood(theta[:, None]).log_prob(y).sum(1) - 0.5 * t.square()
    p = (log_post - log_post.max()).exp()
    p = p / p.sum()
    mean = (p * t).sum()
    return float(mean), float((p * (t - mean) ** 2).sum().sqrt())


def one_number(likelihood):
    def model(y):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", likelihood(torch.stack([t, torch.zeros_like(t)], -1)), obs=y)

    return model


@pytest.mark.parametrize("name", ["normal", "timed choice"])
def test_its_log_joint_is_the_sum_in_batches_too(name):
    likelihood = rough(name)
    y = likelihood(torch.tensor([0.5, 0.0])).sample((6,))
    joint = log_joint(one_number(likelihood), args=(y,))
    t = torch.linspace(-1, 1, 7)[:, None]
    theta = torch.cat([t, torch.zeros_like(t)], 1)
    wanted = likelihood(theta[:, None]).log_prob(y).sum(1) + dist.Normal(0.0, 1.0).log_prob(t[:, 0])
    value, grad = joint.value_and_grad(t)
    assert joint.route == "plate" or joint.route == "vmap"
    torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-8)
    ahead, behind = (joint.value_and_grad(t + h)[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close(grad[:, 0], (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*outside the region")
@pytest.mark.parametrize("name", ["normal", "timed choice"])
def test_nuts_draws_from_the_posterior_under_it(name):
    likelihood = rough(name)
    y = likelihood(torch.tensor([0.5, 0.0])).sample((6,))
    mean, sd = line(likelihood, y)
    mcmc = MCMC(NUTS(one_number(likelihood)), 800, 200, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples()["t"]
    n = float(mcmc.diagnostics()["t"]["n_eff"])
    assert abs(float(draws.mean()) - mean) / (sd / math.sqrt(n)) < 4
    assert float(draws.std()) == pytest.approx(sd, rel=0.2)
