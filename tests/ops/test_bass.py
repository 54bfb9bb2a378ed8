"""The Bass map: monotone above the floor and not below it, inverted to rounding, with the determinant of autograd."""

import math

import pytest
import torch
from torch.func import jacrev, vmap

from pyro_sb.ops.bass import DENSE_DIM, BassMap, conjugate_gradients, solve_small
from pyro_sb.ops.closed_form import commuting_bass_bridge
from pyro_sb.ops.mixture import MixturePotential
from tests.ops.potentials import F64, one_of, random_potential

FORMS = [(1, False), (2, False), (5, False), (2, True), (5, True)]
forms = pytest.mark.parametrize("dim, full", FORMS, ids=[f"{d}-{'full' if f else 'diagonal'}" for d, f in FORMS])
times = pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
betas = pytest.mark.parametrize("beta", [1.05, 2.0, 10.0, 1000.0])


def clamp(beta):
    return 1.05 / (1 + beta)


def at_the_clamp(dim, full, beta, t, **options):
    """Map of a random potential, some eigenvalues of whose S lie at the bridges' floor."""
    potential = random_potential(dim, full=full, low=clamp(beta), high=max(1.0, 3 * clamp(beta)), **options)
    return BassMap(potential.at(t), potential.epsilon, beta)


@forms
@times
@betas
def test_the_inverse_undoes_the_map(dim, full, t, beta):
    bass, y = at_the_clamp(dim, full, beta, t), 2 * torch.randn(40, dim, **F64)
    x = bass.forward(y)
    inverse = bass.inverse(x)
    assert inverse.converged and inverse.residual <= 1e-12
    torch.testing.assert_close(bass.forward(inverse.points), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(inverse.points, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("beta", [1.05, 10.0])
def test_the_inverse_without_matrices_undoes_the_map(full, t, beta):
    dim = 40
    assert dim > DENSE_DIM
    bass, y = at_the_clamp(dim, full, beta, t), torch.randn(20, dim, **F64)
    inverse = bass.inverse(bass.forward(y))
    assert inverse.converged
    torch.testing.assert_close(inverse.points, y, rtol=1e-10, atol=1e-10)


@times
@pytest.mark.parametrize("beta", [1.05, 10.0])
def test_the_inverse_is_found_from_afar(t, beta):
    bass, y = at_the_clamp(2, True, beta, t), 2 * torch.randn(40, 2, **F64)
    x = bass.forward(y)
    for start in (y + 50 * torch.randn_like(y), 1e3 * torch.ones_like(y)):
        inverse = bass.inverse(x, start)
        assert inverse.converged
        torch.testing.assert_close(inverse.points, y, rtol=1e-10, atol=1e-10)
    far = 1e4 * torch.randn(40, 2, **F64)
    inverse = bass.inverse(far)
    assert inverse.converged
    torch.testing.assert_close(bass.forward(inverse.points), far, rtol=1e-11, atol=1e-7)


def test_the_inverse_of_narrow_far_components_is_found():
    # Gates that jump: 30 components, epsilon .01, start as it is
    potential = random_potential(2, 30, epsilon=0.01, low=clamp(5.0), high=0.5)
    for t in (0.0, 0.5, 1.0):
        bass, x = BassMap(potential.at(t), potential.epsilon, 5.0), 3 * torch.randn(200, 2, **F64)
        inverse = bass.inverse(x)
        assert inverse.converged
        torch.testing.assert_close(bass.forward(inverse.points), x, rtol=0, atol=1e-10)


def test_single_precision_converges_to_its_own_rounding():
    potential = random_potential(2, low=clamp(10.0))
    potential = MixturePotential(*(part.float() for part in potential[:3]), potential.epsilon)
    bass, y = BassMap(potential.at(1.0), potential.epsilon, 10.0), torch.randn(40, 2)
    inverse = bass.inverse(bass.forward(y))
    assert inverse.converged and inverse.points.dtype == torch.float32
    torch.testing.assert_close(inverse.points, y, rtol=1e-3, atol=1e-3)


def test_an_inverse_that_was_not_reached_says_so():
    bass = at_the_clamp(2, False, 1.05, 1.0)
    x = bass.forward(3 * torch.randn(40, 2, **F64))
    short = bass.inverse(x, 30 * torch.ones_like(x), max_iter=1)
    assert not short.converged and short.iterations == 1
    gap = (bass.forward(short.points) - x).abs().amax(-1) / (1 + x.abs().amax(-1))
    assert short.residual == pytest.approx(float(gap.max()), rel=1e-9)


def test_of_no_points_there_is_nothing_to_invert():
    assert at_the_clamp(2, False, 10.0, 1.0).inverse(torch.empty(0, 2, **F64)).converged


@forms
def test_at_infinite_beta_the_map_is_the_identity(dim, full):
    bass, y = at_the_clamp(dim, full, 10.0, 0.5)._replace(beta=math.inf), torch.randn(6, dim, **F64)
    assert torch.equal(bass.forward(y), y) and torch.equal(bass.inverse(y).points, y)
    assert torch.equal(bass.jacobian(y), torch.eye(dim, **F64).expand(6, dim, dim)) and bass.log_det(y).abs().max() == 0


@forms
@times
@betas
def test_jacobian_and_log_det_are_those_of_autograd(dim, full, t, beta):
    bass, y = at_the_clamp(dim, full, beta, t), torch.randn(8, dim, **F64)
    jacobian = vmap(jacrev(lambda point: bass.forward(point[None])[0]))(y)
    torch.testing.assert_close(bass.jacobian(y), jacobian, rtol=1e-10, atol=1e-10)
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert bool((sign > 0).all())
    torch.testing.assert_close(bass.log_det(y), log_det, rtol=1e-9, atol=1e-9)


@forms
@times
@betas
def test_above_the_floor_the_map_is_monotone(dim, full, t, beta):
    potential = random_potential(dim, 6, full=full, low=1.001 / (1 + beta), high=2.0)
    bass = BassMap(potential.at(t), potential.epsilon, beta)
    y, other = 3 * torch.randn(2, 300, dim, **F64)
    assert torch.linalg.eigvalsh(bass.jacobian(y)).min() > 0
    assert (((bass.forward(y) - bass.forward(other)) * (y - other)).sum(-1) > 0).all()


@betas
def test_the_floor_is_sharp(beta):
    # A hair above 1 / (1 + beta) one component's map climbs at t = 1, a hair below it falls; at t = 0 it climbs anyway
    y = torch.randn(5, 1, **F64)
    for factor, climbs in ((1 + 1e-6, True), (1 - 1e-6, False)):
        scale = torch.full((1, 1), factor / (1 + beta), **F64)
        potential = MixturePotential(torch.zeros(1, **F64), torch.zeros(1, 1, **F64), scale, 0.7)
        start, end = (BassMap(potential.at(t), 0.7, beta) for t in (0.0, 1.0))
        assert bool((start.jacobian(y) > 0).all())
        assert bool((end.jacobian(y) > 0).all()) is climbs
        assert bool(torch.isfinite(end.log_det(y)).all()) is climbs
        assert bool(torch.isnan(end.log_det(y)).all()) is not climbs


@forms
@times
def test_the_least_objective_has_the_gradient_that_the_envelope_theorem_gives(dim, full, t):
    # d/dx min_y [eps log h(y) + beta/2 |x - y|^2] = beta (x - Y(x)), which is the optimal drift s(t, Y(x))
    beta, potential = 5.0, random_potential(dim, full=full, low=clamp(5.0))
    bass, x, width = BassMap(potential.at(t), potential.epsilon, beta), torch.randn(5, dim, **F64), 1e-3
    points = bass.inverse(x).points

    def least(x):
        return bass.objective(bass.inverse(x).points, x)

    steps = torch.eye(dim, **F64) * width
    slope = torch.stack(
        [(8 * (least(x + e) - least(x - e)) - least(x + 2 * e) + least(x - 2 * e)) / (12 * width) for e in steps], -1
    )
    torch.testing.assert_close(slope, beta * (x - points), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(potential.drift(t, points), beta * (x - points), rtol=1e-9, atol=1e-9)
    for _ in range(5):  # and it is the least
        assert (bass.objective(points + 0.1 * torch.randn_like(points), x) > least(x)).all()


@pytest.mark.parametrize("dim", [2, 40])
def test_a_newton_step_never_climbs_and_converges_quadratically(dim):
    bass, y = at_the_clamp(dim, False, 2.0, 1.0), torch.randn(30, dim, **F64)
    x = bass.forward(y)
    for start in (x, 20 * torch.randn_like(x)):
        for products in (1, 3, None):
            moved = bass.newton_step(start, x, num_products=products)
            assert (bass.objective(moved, x) <= bass.objective(start, x) + 1e-9).all()
    gaps = [float((bass.newton_step(y + size, x) - y).abs().max()) for size in (1e-3, 1e-4)]
    assert gaps[1] < 0.02 * gaps[0]  # a tenth of the gap leaves a hundredth


@pytest.mark.parametrize("beta", [1.5, 10.0])
def test_of_a_gaussian_bridge_the_map_is_the_oracles(beta):
    oracle = commuting_bass_bridge(
        torch.diag(torch.tensor([1.0, 0.3], **F64)), torch.diag(torch.tensor([0.2, 4.0], **F64)), 0.7, beta
    )
    gain = (oracle.basis @ torch.diag(oracle.gain) @ oracle.basis.T).diagonal()[None]
    potential = MixturePotential(torch.zeros(1, **F64), torch.zeros(1, 2, **F64), gain, 0.7)
    y = torch.randn(5, 2, **F64)
    for t in (0.0, 0.5, 1.0):
        expected = y @ oracle.matrix(oracle.map_scale(t))
        torch.testing.assert_close(BassMap(potential.at(t), 0.7, beta).forward(y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_a_batch_of_maps_is_its_members_one_by_one(full):
    potential, x = random_potential(2, full=full, low=clamp(5.0), batch=(3,)), torch.randn(3, 7, 2, **F64)
    batch = BassMap(potential.at(1.0), potential.epsilon, 5.0)
    points = batch.inverse(x).points
    for i in range(3):
        one = BassMap(one_of(potential, i).at(1.0), potential.epsilon, 5.0)
        torch.testing.assert_close(points[i], one.inverse(x[i]).points, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(batch.log_det(x)[i], one.log_det(x[i]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            batch.objective(points, x)[i], one.objective(points[i], x[i]), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dim", [1, 2, 3, 40])
def test_both_solvers_of_symmetric_systems_agree_with_torchs(dim):
    factor, vector = torch.randn(6, dim, dim, **F64), torch.randn(6, dim, **F64)
    matrix = factor @ factor.mT / dim + 0.5 * torch.eye(dim, **F64)
    expected = torch.linalg.solve(matrix, vector[..., None])[..., 0]
    torch.testing.assert_close(solve_small(matrix, vector), expected, rtol=1e-11, atol=1e-11)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    found = conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], vector, diagonal, 2 * dim)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_conjugate_gradients_end_after_one_product_by_their_own_diagonal():
    diagonal, vector = torch.rand(4, 30, **F64) + 0.1, torch.randn(4, 30, **F64)
    found = conjugate_gradients(lambda v: diagonal * v, vector, diagonal, 1)
    torch.testing.assert_close(found, vector / diagonal, rtol=1e-13, atol=1e-13)
