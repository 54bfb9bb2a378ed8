"""Adaptive multiple importance sampling: balance-heuristic weights and effective shares against other routes."""

import math

import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.rounds import Archive
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.weights import log_evidence, normalise

F64 = {"dtype": torch.float64}
GUARD = (0.1, 3.0, 9.0)


def law(loc, scale, df=math.inf, dim=1):
    return StudentMixture(
        torch.zeros(1, **F64),
        torch.full((1, dim), loc, **F64),
        scale * torch.eye(dim, **F64)[None],
        torch.tensor([df], **F64),
    )


def target(fn, dim=1):
    return LogJoint.from_batched(fn, dim)


def three_rounds(log_prob, dim=1):
    archive = Archive(target(log_prob, dim))
    for core, num in ((law(-1.0, 2.0, 5.0, dim), 60), (law(0.5, 1.0, dim=dim), 90), (law(2.0, 0.7, 4.0, dim), 30)):
        archive.add(core, num, GUARD)
    return archive


def test_the_proposals_own_mixture_as_target_has_weights_of_one():
    # sum_t (N_t / N) rho_t is what the pooled draws follow: weights of exactly one, whatever each draw's round
    first, second = law(-2.0, 1.0, 4.0).with_guard(*GUARD), law(3.0, 0.5).with_guard(*GUARD)

    def pooled(z):
        return torch.logaddexp(first.log_prob(z) + math.log(0.25), second.log_prob(z) + math.log(0.75)) + 6.0

    archive = Archive(target(pooled))
    archive.add(law(-2.0, 1.0, 4.0), 50, GUARD)
    archive.add(law(3.0, 0.5), 150, GUARD)
    torch.testing.assert_close(archive.log_weights, torch.full((200,), 6.0, **F64), rtol=0, atol=1e-12)
    assert log_evidence(archive.log_weights) == pytest.approx((6.0, 0.0), abs=1e-6)


def test_every_proposal_is_known_at_every_draw():
    archive = three_rounds(lambda z: -z.square().sum(1), dim=2)
    assert archive.points.shape == (180, 2)
    assert archive.log_proposals.shape == (3, 180)
    assert archive.counts == [60, 90, 30]
    torch.testing.assert_close(
        archive.log_proposals, torch.stack([item.log_prob(archive.points) for item in archive.proposals])
    )
    torch.testing.assert_close(archive.log_density, -archive.points.square().sum(1))
    rows = torch.cat([torch.arange(180)[archive.rows(t)] for t in range(3)])
    assert torch.equal(rows, torch.arange(180))


def test_rows_are_the_draws_of_their_round():
    archive = Archive(target(lambda z: -z.square().sum(1)))
    for centre in (-1e6, 0.0, 1e6):
        archive.add(law(centre, 1.0), 20)
    for index, centre in enumerate((-1e6, 0.0, 1e6)):
        assert (archive.points[archive.rows(index)] - centre).abs().max() < 10


def test_the_target_is_evaluated_once_a_draw():
    archive = three_rounds(lambda z: -z.square().sum(1))
    _ = archive.log_weights, archive.shares()
    assert archive.log_joint.evaluations.density == 180


def test_an_added_round_reports_the_share_of_its_own_draws():
    archive = Archive(target(lambda z: torch.where(z[:, 0] > 0, 0.0, -torch.inf) + law(0.0, 1.0).log_prob(z)))
    share = archive.add(law(0.0, 1.0), 1000)  # a half-normal from a normal: weights 0 and 1, an exact count
    assert share == pytest.approx(float((archive.points > 0).double().mean()), rel=1e-12)
    assert Archive(target(law(0.0, 1.0).log_prob)).add(law(0.0, 1.0), 50) == pytest.approx(1.0)


def test_shares_are_the_plain_sums():
    archive = three_rounds(lambda z: -z.square().sum(1) / 2)
    p, total = archive.log_density.exp(), len(archive.points)
    proposals = archive.log_proposals.exp()
    pooled = sum(count / total * row for count, row in zip(archive.counts, proposals, strict=True))
    for share, row in zip(archive.shares(), proposals, strict=True):
        norm = sum(float(a / b) for a, b in zip(p, pooled, strict=True)) / total
        second = sum(float(a * a / r / b) for a, b, r in zip(p, pooled, row, strict=True)) / total
        assert share == pytest.approx(norm**2 / second, rel=1e-10)


def test_shares_estimate_the_integral_and_ignore_the_targets_factor():
    x = torch.linspace(-30, 30, 60_001, **F64)[:, None]
    normal = torch.distributions.Normal(torch.tensor(0.3, **F64), 1.0)
    archive = Archive(target(lambda z: normal.log_prob(z[:, 0]) + 40.0))
    cores = law(0.0, 1.3), law(1.5, 1.0, 5.0)
    for core in cores:
        archive.add(core, 20_000)
    exact = [float(1 / (torch.exp(2 * normal.log_prob(x[:, 0]) - core.log_prob(x)).sum() * 1e-3)) for core in cores]
    assert archive.shares() == pytest.approx(exact, abs=0.02)


def test_the_matching_proposal_has_share_one():
    archive = Archive(target(lambda z: law(0.0, 1.0, 5.0).log_prob(z) - 3))
    archive.add(law(0.0, 1.0, 5.0), 100)
    assert archive.shares() == pytest.approx([1.0])


def test_rounds_that_each_see_half_of_the_target_give_all_of_it():
    # one proposal a mode: plain weights of either would see half of the mass
    def log_prob(z):
        return torch.logsumexp(
            torch.cat(
                [
                    law(-20.0, 1.0).log_prob(z)[:, None] + math.log(0.3),
                    law(20.0, 1.0).log_prob(z)[:, None] + math.log(0.7),
                ],
                1,
            ),
            1,
        )

    archive = Archive(target(log_prob))
    archive.add(law(-20.0, 1.2, 6.0), 3000)
    archive.add(law(20.0, 1.2, 6.0), 1000)
    value, error = log_evidence(archive.log_weights)
    assert abs(value) < 4 * error < 0.2
    weights = normalise(archive.log_weights)
    assert float(weights[archive.points[:, 0] > 0].sum()) == pytest.approx(0.7, abs=4 * error)


def test_weights_are_unbiased():
    normal = torch.distributions.Normal(torch.tensor(0.0, **F64), 1.0)
    means = []
    for _ in range(300):
        archive = Archive(target(lambda z: normal.log_prob(z[:, 0])))
        archive.add(law(-1.0, 1.0, 5.0), 40)
        archive.add(law(1.5, 0.8), 80, GUARD)
        means.append(archive.log_weights.exp().mean())
    means = torch.stack(means)
    assert abs(float((means.mean() - 1) / means.std() * 300**0.5)) < 4
