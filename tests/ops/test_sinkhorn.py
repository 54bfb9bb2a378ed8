"""Scalings of Gaussian affinities: marginals, symmetry, weights, dense against streaming."""

import math

import ot
import pytest
import torch

from pyro_sb.ops import sinkhorn as module
from pyro_sb.ops.sinkhorn import log_affinity, sinkhorn, symmetric_sinkhorn

F64 = {"dtype": torch.float64}


def cloud(num, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num, generator=generator, **F64) + 0.01
    return torch.randn(num, dim, generator=generator, **F64), weights / weights.sum()


def coupling(points, log_v, scale=None):
    return (log_v[:, None] + log_affinity(points, points, scale, scale) + log_v).exp()


@pytest.mark.parametrize("epsilon", [0.02, 0.2, 2.0, 200.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_coupling_is_symmetric_with_the_given_marginals(epsilon, weighted):
    points, weights = cloud(200, 3)
    weights = weights if weighted else None
    points = points / epsilon**0.5
    result = symmetric_sinkhorn(points, weights, tolerance=1e-13)
    plan = coupling(points, result.log_v)
    expected = torch.full((200,), 1 / 200, **F64) if weights is None else weights
    assert result.converged and result.residual <= 1e-13
    torch.testing.assert_close(plan, plan.T, rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(1), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(plan.sum(0), expected, rtol=1e-10, atol=1e-14)


def test_the_markov_matrix_is_reversible_and_its_spectrum_lies_in_the_unit_interval():
    # T is positive definite, so P = D(w)^-1 D(v) T D(v) is a positive contraction, as a semigroup is
    points, weights = cloud(100, 2)
    plan = coupling(points * 2, symmetric_sinkhorn(points * 2, weights, tolerance=1e-13).log_v)
    root = weights.sqrt()
    values = torch.linalg.eigvalsh(plan / root[:, None] / root)
    assert values.min() > -1e-12
    assert abs(values.max() - 1) < 1e-12


def test_integer_weights_are_repeated_points():
    points, _ = cloud(30, 2)
    counts = torch.arange(30) % 4 + 1
    weighted = symmetric_sinkhorn(points, counts.double(), tolerance=1e-13).log_v
    repeated = symmetric_sinkhorn(points.repeat_interleave(counts, 0), tolerance=1e-13).log_v
    torch.testing.assert_close(
        (weighted - counts.double().log()).repeat_interleave(counts), repeated, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("variable", [False, True])
def test_dense_is_streaming(variable, monkeypatch):
    monkeypatch.setattr(module, "STRIP_ELEMENTS", 1000)
    points, weights = cloud(150, 4)
    scale = 0.5 + torch.rand(150, **F64) if variable else None
    options = {"scale": scale, "tolerance": 1e-13}
    dense = symmetric_sinkhorn(points, weights, dense=True, **options)
    streaming = symmetric_sinkhorn(points, weights, dense=False, **options)
    torch.testing.assert_close(dense.log_v, streaming.log_v, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(coupling(points, dense.log_v, scale).sum(1), weights, rtol=1e-9, atol=1e-13)


def test_the_affinity_is_symmetric_and_knows_the_distance():
    points, scale = cloud(20, 3)[0], 0.5 + torch.rand(20, **F64)
    for s in (None, scale):
        log_t = log_affinity(points, points, s, s)
        torch.testing.assert_close(log_t, log_t.T)
        assert log_t.diagonal().abs().max() < 1e-14
    expected = -torch.cdist(points, points).square() / (scale[:, None] + scale)
    torch.testing.assert_close(log_affinity(points, points, scale, scale), expected, rtol=1e-9, atol=1e-12)


def test_the_streaming_form_makes_no_large_matrix(monkeypatch):
    monkeypatch.setattr(module, "STRIP_ELEMENTS", 2000)
    largest, true = 0, torch.logsumexp

    def watched(value, *args, **kwargs):
        nonlocal largest
        largest = max(largest, value.numel())
        return true(value, *args, **kwargs)

    monkeypatch.setattr(torch, "logsumexp", watched)
    symmetric_sinkhorn(cloud(500, 2)[0], dense=False)
    assert 0 < largest <= 2000


def test_the_scaling_does_not_see_where_the_origin_is():
    points, weights = cloud(100, 3)
    near = symmetric_sinkhorn(points, weights, tolerance=1e-13).log_v
    far = symmetric_sinkhorn(points + 1e4, weights, tolerance=1e-13).log_v
    torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-9)


def test_zero_weights_leave_points_out():
    points, weights = cloud(60, 2)
    weights[::3] = 0
    kept = weights > 0
    result = symmetric_sinkhorn(points, weights, tolerance=1e-13)
    alone = symmetric_sinkhorn(points[kept], weights[kept], tolerance=1e-13)
    assert torch.equal(result.log_v[~kept], torch.full((20,), -math.inf, **F64))
    torch.testing.assert_close(result.log_v[kept], alone.log_v)


def test_weights_over_the_whole_exponent_range_are_met_in_the_log_domain():
    points, _ = cloud(40, 2)
    weights = torch.logspace(-280, 0, 40, **F64)
    result = symmetric_sinkhorn(points, weights, tolerance=1e-12)
    log_rows = torch.logsumexp(result.log_v[:, None] + log_affinity(points, points) + result.log_v, 1)
    assert result.converged
    assert torch.isfinite(log_rows).all()
    heavy = weights > 1e-10
    torch.testing.assert_close(log_rows[heavy], (weights / weights.sum()).log()[heavy], rtol=1e-2, atol=1e-2)


def test_too_few_iterations_are_said():
    points, weights = cloud(50, 2)
    result = symmetric_sinkhorn(points, weights, max_iter=2)
    assert not result.converged and result.iterations == 2 and result.residual > 1e-9
    assert len(result.residuals) == 3 and result.residuals == sorted(result.residuals, reverse=True)


def test_some_twenty_iterations_suffice_at_every_bandwidth():
    points, _ = cloud(300, 2)
    counts = [symmetric_sinkhorn(points / e**0.5, tolerance=1e-8).iterations for e in (0.02, 0.2, 2.0, 20.0)]
    assert max(counts) <= 25


def test_float32_converges_to_its_own_tolerance():
    points, weights = cloud(200, 3)
    exact = symmetric_sinkhorn(points, weights).log_v
    result = symmetric_sinkhorn(points.float(), weights.float())
    assert result.converged and result.log_v.dtype == torch.float32
    torch.testing.assert_close(result.log_v.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_rectangular_scaling_is_pots(epsilon):
    (x, a), (y, b) = cloud(40, 2), cloud(55, 2, seed=1)
    result = sinkhorn(x / epsilon**0.5, y / epsilon**0.5, a, b, tolerance=1e-12)
    plan = (result.log_u[:, None] + log_affinity(x / epsilon**0.5, y / epsilon**0.5) + result.log_v).exp()
    cost = ot.dist(x.numpy(), y.numpy())
    oracle = ot.sinkhorn(
        a.numpy(), b.numpy(), cost, 2 * epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=20000
    )
    assert result.converged
    torch.testing.assert_close(plan, torch.as_tensor(oracle), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(plan.sum(1), a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plan.sum(0), b, rtol=1e-9, atol=1e-12)


def test_on_one_cloud_the_rectangular_scaling_is_the_symmetric_one():
    points, weights = cloud(80, 2)
    both = sinkhorn(points, points, weights, weights, tolerance=1e-13)
    log_v = symmetric_sinkhorn(points, weights, tolerance=1e-13).log_v
    torch.testing.assert_close((both.log_u + both.log_v) / 2, log_v, rtol=1e-9, atol=1e-9)
