"""Tempered SMC: exact where the base is the target, unbiased evidence and moments elsewhere."""

import math

import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.tempering import temper, within_covariance
from pyro_sb.ops.student_mixture import StudentMixture, weighted_covariance

F64 = {"dtype": torch.float64}


def student(locs, scale, df=5.0):
    locs = torch.tensor(locs, **F64)
    num, dim = locs.shape
    return StudentMixture(
        torch.full((num,), -math.log(num), **F64),
        locs,
        scale * torch.eye(dim, **F64).repeat(num, 1, 1),
        torch.full((num,), df, **F64),
    )


def test_the_target_as_base_takes_one_level_and_gives_the_exact_evidence():
    base = student([[0.0, 0.0], [3.0, 1.0]], 0.7)
    constant = 12.3
    run = temper(LogJoint.from_batched(lambda z: base.log_prob(z) + constant, 2), base, 256)
    assert run.num_levels == 1
    assert run.log_evidence == pytest.approx(constant, abs=1e-11)


def test_particles_carry_their_log_density():
    target = LogJoint.from_batched(lambda z: -(z**2).sum(1) * 50 - z[:, 0], 3)
    run = temper(target, student([[2.0, 2.0, 2.0]], 3.0), 256)
    assert run.num_levels > 1
    torch.testing.assert_close(run.log_density, target.log_prob(run.points), rtol=1e-9, atol=1e-9)
    assert run.points.shape == (256, 3)


def repeated(target, base, statistic, num_runs=10, num_particles=256):
    runs = [temper(target, base, num_particles) for _ in range(num_runs)]
    evidence = torch.tensor([run.log_evidence for run in runs], **F64)
    return evidence, torch.stack([statistic(run.points) for run in runs])


def z_scores(values, truth):
    return (values.mean(0) - truth) / (values.std(0) / len(values) ** 0.5)


def test_evidence_and_moments_of_a_stiff_gaussian_far_from_the_base():
    scales = torch.tensor([0.02, 1.0, 6.0], **F64)
    correlation = torch.full((3, 3), 0.99, **F64).fill_diagonal_(1.0)
    law = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, -4.0, 9.0], **F64), correlation * scales * scales[:, None]
    )
    target = LogJoint.from_batched(lambda z: law.log_prob(z) + 5.0, 3)

    def moments(x):
        white = torch.linalg.solve_triangular(law.scale_tril, (x - law.loc).T, upper=False).T
        return torch.cat([white.mean(0), (white.T @ white / len(x)).flatten()])

    evidence, values = repeated(target, student([[0.0, 0.0, 0.0]], 2.0), moments)
    assert abs(float(z_scores(evidence, 5.0))) < 4
    assert z_scores(values, torch.cat([torch.zeros(3, **F64), torch.eye(3, **F64).flatten()])).abs().max() < 4.5
    assert values.std(0).max() < 0.2
    assert evidence.std() < 0.3


def test_evidence_and_shares_of_two_separated_modes():
    locs, weights = torch.tensor([[-5.0, 0.0], [5.0, 0.0]], **F64), torch.tensor([0.3, 0.7], **F64)

    def log_prob(z):
        return torch.logsumexp(weights.log() - (z[:, None] - locs).square().sum(-1) / 2 - math.log(2 * math.pi), 1)

    evidence, shares = repeated(
        LogJoint.from_batched(log_prob, 2), student([[0.0, 0.0]], 5.0), lambda x: (x[:, 0] > 0).double().mean()
    )
    assert abs(float(z_scores(evidence, 0.0))) < 4
    assert abs(float(z_scores(shares, 0.7))) < 4
    assert shares.std() < 0.1


def test_particles_stay_in_the_support():
    target = LogJoint.from_batched(lambda z: torch.where((z > 0).all(1), -z.sum(1), -torch.inf), 2)
    evidence, inside = repeated(
        target, student([[0.0, 0.0]], 2.0), lambda x: (x > 0).all(1).double().mean(), num_runs=6
    )
    assert bool((inside == 1).all())
    assert abs(float(z_scores(evidence, 0.0))) < 4  # Exp(1) twice


def test_the_metric_does_not_see_how_far_apart_the_modes_are():
    near, far = student([[-50.0, 0.0], [50.0, 0.0]], 1.0), student([[-500.0, 0.0], [500.0, 0.0]], 1.0)
    noise, side = torch.randn(100, 2, **F64), torch.where(torch.arange(100) % 3 == 0, 1.0, -1.0)[:, None]
    weights = torch.softmax(torch.randn(100, **F64), 0)
    along = torch.tensor([1.0, 0.0], **F64)
    torch.testing.assert_close(
        within_covariance(near, noise + 50 * side * along, weights),
        within_covariance(far, noise + 500 * side * along, weights),
    )
    one = student([[3.0, 0.0]], 1.0)
    torch.testing.assert_close(within_covariance(one, noise, weights), weighted_covariance(noise, weights))


def test_a_run_that_does_not_arrive_is_an_error_that_says_how_far_it_came():
    target = LogJoint.from_batched(lambda z: -5000 * (z - 9).square().sum(1), 2)
    with pytest.raises(RuntimeError, match="after 1 levels"):
        temper(target, student([[0.0, 0.0]], 1.0), 128, max_levels=1)


@pytest.mark.parametrize("fn", [lambda z: z.sum(1) * math.nan, lambda z: torch.where(z[:, 0] > 1e9, 0.0, -torch.inf)])
def test_a_target_that_is_nowhere_finite_is_said(fn):
    with pytest.raises(ValueError, match="must be finite at 4 draws.*all but 0 of 128"):
        temper(LogJoint.from_batched(fn, 2), student([[0.0, 0.0]], 1.0), 128)
