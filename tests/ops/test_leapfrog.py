"""Leapfrog trajectories: reversible, symplectic, second order, and the metric as a change of coordinates."""

import pytest
import torch

from pyro_sb.ops.leapfrog import PhasePoint, SharedFactors, leapfrog, matvec

F64 = {"dtype": torch.float64}


def quartic(x):
    """A coupled anharmonic log density and its gradient, differentiable."""
    ahead = x.roll(1, -1)
    value = -(x**4 / 4 + x**2 / 2 + (x - ahead) ** 2 / 2).sum(-1)
    return value, -(x**3 + x + (x - ahead) - (x.roll(-1, -1) - x))


def gaussian(precision):
    return lambda x: (-0.5 * torch.einsum("ci,ij,cj->c", x, precision, x), -x @ precision)


def phase_point(x, momentum, target):
    return PhasePoint(x, momentum, *target(x))


def factor(num, dim):
    return torch.randn(num, dim, dim, **F64).tril(-1) * 0.3 + torch.diag_embed(torch.rand(num, dim, **F64) + 0.5)


@pytest.mark.parametrize("per_chain", [False, True])
def test_a_flipped_momentum_leads_back(per_chain):
    scale = factor(6, 3) if per_chain else factor(1, 3)[0]
    step = 0.02 + 0.1 * torch.rand(6, 1, **F64) if per_chain else torch.tensor(0.1, **F64)
    start = phase_point(torch.randn(6, 3, **F64), torch.randn(6, 3, **F64), quartic)
    end = leapfrog(start, quartic, scale, step, 20)
    assert (end.x - start.x).abs().max() > 0.1
    back = leapfrog(end._replace(momentum=-end.momentum), quartic, scale, step, 20)
    torch.testing.assert_close(back.x, start.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.momentum, -start.momentum, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.energy, start.energy, rtol=0, atol=1e-11)


def test_the_map_is_symplectic_and_keeps_volume():
    dim, scale = 3, factor(1, 3)[0]

    def flow(state):  # in positions and momenta p = L^-T r
        x, momentum = state[None, :dim], state[None, dim:] @ scale
        end = leapfrog(phase_point(x, momentum, quartic), quartic, scale, torch.tensor(0.3, **F64), 5)
        return torch.cat([end.x[0], torch.linalg.solve(scale.T, end.momentum[0])])

    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(2 * dim, **F64))
    form = torch.zeros(2 * dim, 2 * dim, **F64)
    form[:dim, dim:], form[dim:, :dim] = torch.eye(dim), -torch.eye(dim)
    torch.testing.assert_close(jacobian.T @ form @ jacobian, form, rtol=0, atol=1e-11)
    assert abs(float(torch.linalg.det(jacobian)) - 1) < 1e-11
    assert (jacobian - torch.eye(2 * dim)).abs().max() > 0.1


def test_the_energy_error_is_of_second_order():
    scale = factor(1, 4)[0]
    start = phase_point(torch.randn(8, 4, **F64), torch.randn(8, 4, **F64), quartic)
    coarse, fine = (
        leapfrog(start, quartic, scale, torch.tensor(0.5 / n, **F64), n).energy - start.energy for n in (100, 200)
    )
    torch.testing.assert_close(coarse / fine, torch.full((8,), 4.0, **F64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("step", [0.1, 1.0, 1.9])
def test_the_oscillator_keeps_its_shadow_energy(step):
    # velocity Verlet on x'' = -x conserves r^2 + (1 - h^2 / 4) x^2 exactly
    def shadow(point):
        return point.momentum.square() + (1 - step**2 / 4) * point.x.square()

    target = gaussian(torch.eye(1, **F64))
    start = phase_point(torch.randn(5, 1, **F64), torch.randn(5, 1, **F64), target)
    end = leapfrog(start, target, torch.eye(1, **F64), torch.tensor(step, **F64), 101)
    torch.testing.assert_close(shadow(end), shadow(start), rtol=1e-11, atol=0)


def test_the_metric_is_a_change_of_coordinates():
    scale = factor(1, 3)[0]
    white = phase_point(torch.randn(4, 3, **F64), torch.randn(4, 3, **F64), gaussian(torch.eye(3, **F64)))
    target = gaussian(torch.cholesky_inverse(scale))
    bent = phase_point(white.x @ scale.T, white.momentum, target)
    step = torch.tensor(0.7, **F64)
    plain = leapfrog(white, gaussian(torch.eye(3, **F64)), torch.eye(3, **F64), step, 9)
    preconditioned = leapfrog(bent, target, scale, step, 9)
    torch.testing.assert_close(preconditioned.x, plain.x @ scale.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(preconditioned.momentum, plain.momentum, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(preconditioned.energy, plain.energy, rtol=1e-11, atol=1e-11)


def test_chains_do_not_see_each_other():
    scale, step = factor(5, 3), 0.3 * torch.rand(5, 1, **F64)
    start = phase_point(torch.randn(5, 3, **F64), torch.randn(5, 3, **F64), quartic)
    together = leapfrog(start, quartic, scale, step, 4)
    for c in range(5):
        alone = PhasePoint(*(value[c : c + 1] for value in start))
        alone = leapfrog(alone, quartic, scale[c], step[c], 4)
        torch.testing.assert_close(together.x[c], alone.x[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(together.momentum[c], alone.momentum[0], rtol=1e-13, atol=1e-13)


def test_the_end_carries_its_own_density_and_gradient_at_one_gradient_a_step():
    calls = []

    def counted(x):
        calls.append(len(x))
        return quartic(x)

    start = phase_point(torch.randn(5, 3, **F64), torch.randn(5, 3, **F64), quartic)
    end = leapfrog(start, counted, torch.eye(3, **F64), torch.tensor(0.1, **F64), 7)
    assert calls == [5] * 7
    value, grad = quartic(end.x)
    assert torch.equal(end.log_density, value)
    assert torch.equal(end.grad, grad)
    torch.testing.assert_close(end.energy, end.momentum.square().sum(1) / 2 - value)


def test_one_matrix_for_all_rows_is_that_matrix_for_each():
    matrix, vector = torch.randn(3, 3, **F64), torch.randn(5, 3, **F64)
    torch.testing.assert_close(matvec(matrix, vector), matvec(matrix.expand(5, 3, 3), vector))
    torch.testing.assert_close(matvec(matrix, vector), torch.stack([matrix @ row for row in vector]))


def test_factors_that_rows_share_are_those_factors_for_each():
    factors, which = factor(3, 4), torch.tensor([2, 0, 2, 1, 1, 0, 2])
    shared, vector = SharedFactors(factors, which), torch.randn(7, 4, **F64)
    torch.testing.assert_close(matvec(shared, vector), matvec(factors[which], vector), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(matvec(shared.mT, vector), matvec(factors[which].mT, vector), rtol=1e-13, atol=1e-13)
    start = phase_point(torch.randn(7, 4, **F64), torch.randn(7, 4, **F64), quartic)
    ends = [leapfrog(start, quartic, scale, torch.tensor(0.1, **F64), 5) for scale in (shared, factors[which])]
    torch.testing.assert_close(ends[0].x, ends[1].x, rtol=1e-12, atol=1e-12)
