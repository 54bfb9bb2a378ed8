"""Transitions as attention: the fused forms against distances and a softmax."""

import math

import pytest
import torch

from pyro_sb.ops import attention as module
from pyro_sb.ops.attention import Transitions
from pyro_sb.ops.sinkhorn import log_affinity, symmetric_sinkhorn

F64 = {"dtype": torch.float64}


def setting(num=300, dim=3, offset=0.0):
    points, query = torch.randn(num, dim, **F64) + offset, 2 * torch.randn(17, dim, **F64) + offset
    return points, query, symmetric_sinkhorn(points, torch.rand(num, **F64) + 0.1, tolerance=1e-13).log_v


def by_distances(points, query, log_v, scale=None, key_scale=None):
    """Mean and covariance by exact differences, a loop over the queries."""
    means, covariances = [], []
    for i, x in enumerate(query):
        width = 2.0 if scale is None else scale[i] + key_scale
        p = torch.softmax(-(points - x).square().sum(1) / width + log_v, 0)
        mean = (p[:, None] * points).sum(0)
        means.append(mean)
        covariances.append((p[:, None] * (points - mean)).T @ (points - mean))
    return torch.stack(means), torch.stack(covariances)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dim", [1, 3, 20])
def test_attention_is_distances_and_a_softmax(dim, offset):
    points, query, log_v = setting(dim=dim, offset=offset)
    law = Transitions(points, points, log_v)
    mean, covariance = by_distances(points, query, log_v)
    rounding = 1e-12 * max(1.0, offset)  # the inputs themselves carry that much
    torch.testing.assert_close(law.mean(query), mean, rtol=1e-12, atol=rounding)
    torch.testing.assert_close(law.moments(query)[0], mean, rtol=1e-12, atol=rounding)
    torch.testing.assert_close(law.moments(query)[1], covariance, rtol=1e-9, atol=10 * rounding)
    torch.testing.assert_close(law.probabilities(query) @ points, mean, rtol=1e-12, atol=rounding)


def test_a_variable_bandwidth_is_distances_and_a_softmax():
    points, query, log_v = setting()
    scale, key_scale = torch.rand(17, **F64) + 0.5, torch.rand(300, **F64) + 0.5
    law = Transitions(points, points, log_v, key_scale)
    mean, covariance = by_distances(points, query, log_v, scale, key_scale)
    torch.testing.assert_close(law.mean(query, scale), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.moments(query, scale)[1], covariance, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        Transitions(points, points, log_v, torch.ones(300, **F64)).mean(query, torch.ones(17, **F64)),
        Transitions(points, points, log_v).mean(query),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 2), (2, 5)])
def test_keys_and_values_may_differ_in_size(key_dim, value_dim):
    keys, values, log_v = torch.randn(50, key_dim, **F64), torch.randn(50, value_dim, **F64), torch.randn(50, **F64)
    query = torch.randn(7, key_dim, **F64)
    p = torch.softmax(log_affinity(query, keys) + log_v, 1)
    torch.testing.assert_close(Transitions(keys, values, log_v).mean(query), p @ values, rtol=1e-12, atol=1e-12)


def test_the_form_for_cuda_is_the_form_for_cpu():
    points, query, log_v = setting(dim=5)
    law = Transitions(points, points, log_v)
    q, k, v = law.column_form(query)
    out = torch.softmax(q @ k.T, 1) @ v
    assert q.shape[1] == k.shape[1] == v.shape[1] == 8
    torch.testing.assert_close(out[:, :5] + law.value_centre, law.mean(query), rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    points, query, log_v = setting()
    law, whole = Transitions(points, points, log_v), Transitions(points, points, log_v).moments(query)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 700)
    torch.testing.assert_close(law.moments(query), whole, rtol=1e-12, atol=1e-12)


def test_points_of_weight_zero_are_never_reached():
    points, query, log_v = setting()
    log_v[:200] = -math.inf  # more than one block of a fused kernel's keys
    law, rest = Transitions(points, points, log_v), Transitions(points[200:], points[200:], log_v[200:])
    assert torch.equal(law.probabilities(query)[:, :200], torch.zeros(17, 200, **F64))
    torch.testing.assert_close(law.mean(query), rest.mean(query), rtol=1e-12, atol=1e-12)


def test_far_away_the_nearest_point_is_the_mean():
    points, _, log_v = setting()
    far = 1e6 * torch.eye(3, **F64)
    nearest = points[(points @ far.T).argmax(0)]
    law = Transitions(points, points, log_v)
    torch.testing.assert_close(law.mean(far), nearest, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(law.moments(far)[1], torch.zeros(3, 3, 3, **F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_float32_keeps_six_digits_far_from_the_origin(offset):
    points, query = torch.randn(10_000, 16, **F64), torch.randn(32, 16, **F64)
    points, query = (points + offset).float(), (query + offset).float()  # the rounding of the input is not ours
    log_v = torch.zeros(10_000)
    exact = Transitions(points.double(), points.double(), log_v.double()).mean(query.double()) - offset
    error = (Transitions(points, points, log_v).mean(query).double() - offset - exact).norm() / exact.norm()
    assert error < (1e-6 if offset == 0 else 2e-5)  # 300 itself has a spacing of 3e-5 in float32


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_float32_keeps_six_digits_over_many_points_in_few_dimensions(dim):
    points, query, log_v = torch.randn(100_000, dim), torch.randn(16, dim), torch.zeros(100_000)
    exact = Transitions(points.double(), points.double(), log_v.double()).mean(query.double())
    assert (Transitions(points, points, log_v).mean(query).double() - exact).norm() / exact.norm() < 1e-6


def test_gradients_pass_through_the_mean():
    points, query, log_v = setting(num=40)
    law = Transitions(points, points, log_v)
    assert torch.autograd.gradcheck(law.mean, query[:3].requires_grad_())


def test_the_jacobian_of_the_mean_is_the_covariance():
    # d m / d x = Cov_{p(x)}, in units of the bandwidth: the second-order Tweedie identity
    points, query, log_v = setting(num=80)
    law = Transitions(points, points, log_v)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda x: law.mean(x[None])[0], q) for q in query[:4]])
    torch.testing.assert_close(jacobian, law.moments(query[:4])[1], rtol=1e-9, atol=1e-11)
