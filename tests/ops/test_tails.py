"""The power-tail map: inverse, derivatives, limits, the tails it makes, and Wallace's density."""

import math

import pytest
import torch

from pyro_sb.ops.tails import curvature, gaussian_tail, log_derivative, power_tail

INF = math.inf
INDICES = [0.5, 2.0, 3.0, 5.0, 10.0, 1e6, INF]
every_index = pytest.mark.parametrize("nu", INDICES)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


def both(nu):
    return torch.tensor([nu]), torch.tensor([nu])


def points(nu, largest=30.0):
    """Points of both signs from the tiny to the largest whose image is a number."""
    largest = min(largest, math.sqrt(1400 * nu))
    z = torch.cat([torch.logspace(-300, -3.1, 100), torch.linspace(1e-3, largest, 500)])
    return torch.cat([-z.flip(0), torch.zeros(1), z])[:, None]


@every_index
def test_the_inverse_takes_it_back(nu):
    z = points(nu)
    x = power_tail(z, *both(nu))
    assert bool(torch.isfinite(x).all())
    back = gaussian_tail(x, *both(nu))
    torch.testing.assert_close(back, z, rtol=1e-12, atol=0)
    body = z.abs() < math.sqrt(nu)
    torch.testing.assert_close(back[body], z[body], rtol=3e-15, atol=0)


@every_index
def test_it_takes_the_inverse_back(nu):
    x = torch.cat([torch.logspace(-300, 0, 100), torch.logspace(0, 5, 50)])[:, None]
    torch.testing.assert_close(power_tail(gaussian_tail(x, *both(nu)), *both(nu)), x, rtol=1e-12, atol=0)


@every_index
def test_it_is_odd_and_increasing(nu):
    z = points(nu)
    x = power_tail(z, *both(nu))
    assert torch.equal(x, -x.flip(0))
    assert bool((x.diff(dim=0) > 0).all())


@every_index
def test_its_derivatives_are_those_of_autograd(nu):
    z = points(nu, 25.0).requires_grad_()
    (slope,) = torch.autograd.grad(power_tail(z, *both(nu)).sum(), z)
    torch.testing.assert_close(log_derivative(z, *both(nu)).exp(), slope, rtol=1e-11, atol=0)
    (second,) = torch.autograd.grad(log_derivative(z, *both(nu)).sum(), z)
    torch.testing.assert_close(curvature(z, *both(nu)), second, rtol=1e-12, atol=1e-300)
    x = power_tail(z, *both(nu)).detach().requires_grad_()
    (back,) = torch.autograd.grad(gaussian_tail(x, *both(nu)).sum(), x)
    torch.testing.assert_close(back * slope, torch.ones_like(z), rtol=1e-11, atol=0)


def test_two_indices_join_with_two_derivatives():
    lower, upper = torch.tensor([2.0]), torch.tensor([INF])
    z = torch.tensor([[-1e-200], [0.0], [1e-200]], requires_grad=True)
    (slope,) = torch.autograd.grad(power_tail(z, lower, upper).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), z)
    torch.testing.assert_close(slope, torch.ones_like(z), rtol=1e-15, atol=0)
    torch.testing.assert_close(second, torch.zeros_like(z), rtol=0, atol=1e-15)
    z = torch.tensor([[-2.0], [2.0]])
    mapped = power_tail(z, lower, upper)
    assert mapped[1] == 2.0 and mapped[0] == power_tail(z, lower, lower)[0] < -2.0
    torch.testing.assert_close(gaussian_tail(mapped, lower, upper), z, rtol=1e-14, atol=0)


def test_each_coordinate_has_its_own_index():
    z, nu = torch.randn(5, 3, 4), torch.tensor([0.5, 2.0, 10.0, INF])
    columns = [power_tail(z[..., i : i + 1], *both(float(nu[i]))) for i in range(4)]
    assert torch.equal(power_tail(z, nu, nu), torch.cat(columns, -1))


def test_infinity_is_the_identity():
    z = torch.tensor([[-1e300, -1.7, 0.0, 1e-308, 0.3, 1e200]])
    nu = torch.full((6,), INF)
    for mapped in (power_tail(z, nu, nu), gaussian_tail(z, nu, nu)):
        assert torch.equal(mapped, z)
    assert not log_derivative(z, nu, nu).any() and not curvature(z, nu, nu).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_index
def test_it_is_finite_with_its_gradients_wherever_the_value_is(nu, dtype):
    lower, upper = (side.to(dtype) for side in both(nu))
    top = torch.finfo(dtype).max
    x = torch.tensor([[0.0], [1e-30], [1e-3], [1.0], [1e6], [top / 4], [-top / 4]], dtype=dtype, requires_grad=True)
    z = gaussian_tail(x, lower, upper)
    z.sum().backward()
    assert z.dtype == dtype and bool(torch.isfinite(z).all()) and bool(torch.isfinite(x.grad).all())
    z = (0.9 * z.detach()).requires_grad_()
    for function in (power_tail, log_derivative, curvature):
        (gradient,) = torch.autograd.grad(function(z, lower, upper).sum(), z)
        value = function(z, lower, upper)
        assert value.dtype == dtype and bool(torch.isfinite(value).all()) and bool(torch.isfinite(gradient).all())
    beyond = z.new_tensor([[top / 2], [-top / 2]])
    assert nu == INF or torch.equal(power_tail(beyond, lower, upper), z.new_tensor([[INF], [-INF]]))
    assert bool(torch.isfinite(log_derivative(beyond, lower, upper)).all())
    single = power_tail(z[:5].detach(), lower, upper)
    truth = power_tail(z[:5].detach().double(), lower.double(), upper.double())
    torch.testing.assert_close(single.double(), truth, rtol=2e2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("nu", [0.5, 2.0, 3.0, 10.0])
def test_a_normal_law_gets_tails_of_that_index(nu):
    # d log P(psi(Z) > x) / d log x = -nu - 1 / (2 log x) + smaller terms: the index, and the square root of a logarithm
    log_x = torch.tensor([[300.0], [500.0], [700.0]], requires_grad=True)
    z = gaussian_tail(log_x.exp(), *both(nu))
    (slope,) = torch.autograd.grad(torch.special.log_ndtr(-z).sum(), log_x)
    torch.testing.assert_close(slope + nu, -1 / (2 * log_x), rtol=0.01, atol=0)


@pytest.mark.parametrize("nu", [0.5, 2.0, 3.0, 5.0, 10.0])
def test_student_t_becomes_wallaces_density(nu):
    z = torch.linspace(0.01, min(20, math.sqrt(600 * nu)), 200)[:, None]  # torch's own density squares x
    x = power_tail(z, *both(nu))
    log_q = torch.distributions.StudentT(nu).log_prob(x) + log_derivative(z, *both(nu))
    wallace = -(z**2) / 2 + z.log() - 0.5 * (-torch.expm1(-(z**2) / nu)).log()
    difference = log_q - wallace
    torch.testing.assert_close(difference, difference[:1].expand_as(z), rtol=0, atol=1e-12)
    assert abs(torch.trapezoid(log_q.exp().ravel(), z.ravel()) + 0.01 * log_q[0].exp() - 0.5) < 1e-3
