"""Tempered SMC of one target and of many: exact evidence and moments, from laws that are right, wrong or beside."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.tempering import (
    MixtureLaw,
    NormalLaw,
    next_increment,
    temper,
    weighted_factor,
    within_factor,
)
from pyro_sb.ops.student_mixture import StudentMixture, weighted_covariance, within_covariance

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


# One target, from a mixture


def student(locs, scale, df=5.0):
    locs = torch.tensor(locs, **F64)
    num, dim = locs.shape
    return StudentMixture(
        torch.full((num,), -math.log(num), **F64),
        locs,
        scale * torch.eye(dim, **F64).repeat(num, 1, 1),
        torch.full((num,), df, **F64),
    )


def from_mixture(target, base, num=256, **options):
    """One target from a mixture, in its own metric: as a population asks."""
    return temper(MixtureLaw(base), target, num, metric=lambda x, w: within_factor(base, x, w), **options)


def test_the_target_as_base_takes_one_level_and_gives_the_exact_evidence():
    base = student([[0.0, 0.0], [3.0, 1.0]], 0.7)
    constant = 12.3
    run = from_mixture(LogJoint.from_batched(lambda z: base.log_prob(z) + constant, 2), base)
    assert run.num_levels == 1
    assert float(run.log_evidence) == pytest.approx(constant, abs=1e-11)


def test_particles_carry_their_log_density():
    target = LogJoint.from_batched(lambda z: -(z**2).sum(1) * 50 - z[:, 0], 3)
    run = from_mixture(target, student([[2.0, 2.0, 2.0]], 3.0))
    assert run.num_levels > 1
    torch.testing.assert_close(run.log_density[:, 0], target.log_prob(run.points[:, 0]), rtol=1e-9, atol=1e-9)
    assert run.points.shape == (256, 1, 3)


def repeated(target, base, statistic, num_runs=10, num_particles=256):
    runs = [from_mixture(target, base, num_particles) for _ in range(num_runs)]
    evidence = torch.tensor([run.log_evidence for run in runs], **F64)
    return evidence, torch.stack([statistic(run.points[:, 0]) for run in runs])


def z_scores(values, truth):
    return (values.mean(0) - truth) / (values.std(0) / len(values) ** 0.5)


def test_evidence_and_moments_of_a_stiff_gaussian_far_from_the_base():
    scales = torch.tensor([0.02, 1.0, 6.0], **F64)
    correlation = torch.full((3, 3), 0.99, **F64).fill_diagonal_(1.0)
    law = MultivariateNormal(torch.tensor([1.0, -4.0, 9.0], **F64), correlation * scales * scales[:, None])
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
    with pytest.raises(RuntimeError, match="after 1 levels. Use a good cure."):
        from_mixture(target, student([[0.0, 0.0]], 1.0), 128, max_levels=1, cure="a good cure")


@pytest.mark.parametrize("fn", [lambda z: z.sum(1) * math.nan, lambda z: torch.where(z[:, 0] > 1e9, 0.0, -torch.inf)])
def test_a_target_that_is_nowhere_finite_is_said(fn):
    with pytest.raises(ValueError, match=r"must be finite at 4 draws.*got 0 of 128 \(at 1 of 1 observations\)"):
        from_mixture(LogJoint.from_batched(fn, 2), student([[0.0, 0.0]], 1.0), 128)


# Many targets at once

FROM_A_BRIDGE = {"sweeps": 8, "final_sweeps": 20, "num_steps": 6, "spread": 10.0, "max_levels": 60}


class Modes:
    """Two normal modes a column, ``share`` of the mass in the first; the evidence is ``exp(log_z)``."""

    def __init__(self, centres, shares, spread, log_z):
        self.centres, self.shares, self.spread, self.log_z = centres, shares, spread, log_z

    def log_prob(self, x):
        batch, dim = self.centres.shape
        points = x.reshape(-1, batch, dim)
        first, second = (-0.5 * ((points - sign * self.centres) / self.spread).square().sum(-1) for sign in (1, -1))
        constant = -dim * math.log(self.spread * math.sqrt(2 * math.pi))
        value = torch.logaddexp(self.shares.log() + first, (1 - self.shares).log() + second)
        return (value + constant + self.log_z).reshape(-1)

    def value_and_grad(self, x):
        x = x.detach().requires_grad_()
        value = self.log_prob(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad


def test_a_normal_law_is_torchs():
    factor = torch.tensor([[[1.0, 0.0], [0.5, 2.0]], [[0.3, 0.0], [0.0, 0.1]]])
    law = NormalLaw(torch.randn(2, 2), factor)
    exact = MultivariateNormal(law.mean, scale_tril=factor)
    u, log_q = law.draws(20_000)
    torch.testing.assert_close(log_q, exact.log_prob(u), rtol=1e-10, atol=1e-10)
    z = (u.mean(0) - law.mean) / exact.stddev * 20_000**0.5
    assert z.abs().max() < 4
    point = u[:5].clone().requires_grad_()
    (slope,) = torch.autograd.grad(exact.log_prob(point).sum(), point)
    torch.testing.assert_close(law.value_and_grad(u[:5])[1], slope, rtol=1e-9, atol=1e-9)


def test_the_right_law_is_done_in_one_level():
    law = NormalLaw(torch.zeros(1, 2), torch.eye(2)[None])

    class Same:
        def value_and_grad(self, x):
            value, grad = law.value_and_grad(x[:, None])
            return value[:, 0] + 2.5, grad[:, 0]

    particles = temper(law, Same(), 200)
    assert particles.num_levels == 1
    assert float(particles.log_evidence[0]) == pytest.approx(2.5, abs=1e-9)


@pytest.mark.slow
def test_modes_and_evidence_from_a_law_that_is_wrong():
    # the law is off, too wide for one column and too narrow for the other
    centres, shares = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([0.3, 0.8])
    target = Modes(centres, shares, 0.4, torch.tensor([1.5, -4.0]))
    law = NormalLaw(torch.full((2, 2), 0.5), torch.stack([3.0 * torch.eye(2), 0.9 * torch.eye(2)]))
    runs = [temper(law, target, 1000, **FROM_A_BRIDGE) for _ in range(12)]
    first = torch.stack([((run.points * centres).sum(-1) > 0).double().mean(0) for run in runs])
    evidence = torch.stack([run.log_evidence for run in runs])
    assert max(run.num_levels for run in runs) < 12
    for found, expected, most in ((first, shares, 0.06), (evidence, target.log_z, 0.2)):
        assert (found.std(0) < most).all()
        assert ((found.mean(0) - expected) / found.std(0) * 12**0.5).abs().max() < 4
    inside = torch.cat([run.points for run in runs])
    distance = (inside - torch.where((inside * centres).sum(-1, keepdim=True) > 0, centres, -centres)) / 0.4
    assert distance.square().mean() == pytest.approx(1, abs=0.1)


def test_the_columns_are_independent():
    # each observation has its own exponents: an easy column is done at once, and is right beside a hard one
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0]])
    target = Modes(centres, torch.tensor([0.5, 0.5]), 1.0, torch.tensor([0.7, -0.2]))
    particles = temper(NormalLaw(torch.zeros(2, 2), torch.eye(2).repeat(2, 1, 1)), target, 2000)
    assert particles.num_levels > 1
    assert float(particles.log_evidence[0]) == pytest.approx(0.7, abs=1e-9)
    assert particles.points[:, 0].square().mean() == pytest.approx(1, abs=0.15)
    assert particles.acceptance.shape == (2,)


def test_half_of_the_effective_particles_stay():
    ratio = 8 * torch.randn(500, 3)
    ratio[:, 2] = 0.1 * torch.randn(500)
    step = next_increment(ratio, torch.ones(3))
    ess = 1 / torch.softmax(step * ratio, 0).square().sum(0) / 500
    torch.testing.assert_close(ess[:2], torch.full((2,), 0.5), atol=1e-3, rtol=0)
    assert step[2] == 1 and ess[2] > 0.9
    assert next_increment(ratio, torch.tensor([1e-4, 0.0, 0.0])).tolist() == [1e-4, 0, 0]


def test_the_weighted_factor_is_that_of_the_weighted_covariance():
    u, weights = torch.randn(400, 2, 3) @ torch.randn(3, 3), torch.softmax(torch.randn(400, 2), 0)
    factor = weighted_factor(u, weights)
    for b in range(2):
        expected = u[:, b].T.cov(aweights=weights[:, b], correction=0)
        torch.testing.assert_close(factor[b] @ factor[b].T, expected, rtol=1e-3, atol=1e-3)


def test_a_law_beside_the_support_says_so():
    class Nowhere:
        def value_and_grad(self, x):
            return torch.full_like(x[:, 0], -torch.inf), torch.zeros_like(x)

    message = r"must be finite at 3 draws.*got 0 of 50 \(at 2 of 2 observations\).* use a good cure."
    with pytest.raises(ValueError, match=message):
        temper(NormalLaw(torch.zeros(2, 1), torch.ones(2, 1, 1)), Nowhere(), 50, cure="a good cure")


def test_particles_outside_the_support_are_dropped():
    class Half:  # exponential on the positive half: evidence 1
        def value_and_grad(self, x):
            inside = x[:, 0] > 0
            return torch.where(inside, -x[:, 0], -torch.inf), torch.where(inside, -1.0, 0.0)[:, None]

    runs = [temper(NormalLaw(torch.zeros(1, 1), torch.ones(1, 1, 1)), Half(), 2000) for _ in range(6)]
    assert all(bool((run.points > 0).all()) for run in runs)
    evidence = torch.stack([run.log_evidence[0] for run in runs])
    assert abs(float(evidence.mean())) < 0.1
    assert torch.cat([run.points for run in runs]).mean() == pytest.approx(1, abs=0.1)


# One target is the case B = 1


class Gaussians:
    """Normal targets of exact evidence ``log_z``, one a column; rows run over the columns fastest."""

    def __init__(self, means, factors, log_z):
        self.laws = MultivariateNormal(means, scale_tril=factors)
        self.log_z = log_z

    def value_and_grad(self, x):
        u = x.reshape(-1, *self.laws.mean.shape)
        grad = torch.cholesky_solve((self.laws.mean - u)[..., None], self.laws.scale_tril)[..., 0]
        return (self.laws.log_prob(u) + self.log_z).reshape(-1), grad.reshape(x.shape)

    def columns(self, index):
        """Some of them, or copies."""
        return Gaussians(self.laws.mean[index], self.laws.scale_tril[index], self.log_z[index])


def gaussians():
    """Near and far, wide and narrow."""
    factors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.1, 0.0], [0.3, 0.2]], [[1.2, 0.0], [-0.8, 0.6]]])
    return Gaussians(torch.tensor([[0.5, 0.0], [2.0, -1.0], [-4.0, 3.0]]), factors, torch.tensor([0.0, 7.0, -30.0]))


def laws(kind, num):
    """The same start in each column, as a normal law or as a mixture."""
    if kind == "normal":
        return NormalLaw(torch.zeros(num, 2), 1.5 * torch.eye(2).repeat(num, 1, 1))
    return MixtureLaw(student([[0.0, 0.0]], 1.5))


def figures(run, target):
    """What has mean zero: the evidence less one, and with its weight mean and variance of the whitened points."""
    white = torch.linalg.solve_triangular(
        target.laws.scale_tril, (run.points - target.laws.mean)[..., None], upper=False
    )[..., 0]
    evidence = (run.log_evidence - target.log_z).exp()[:, None]
    return torch.cat([evidence - 1, evidence * white.mean(0), evidence * (white.square().mean(0) - 1)], 1)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"sweeps": 8, "final_sweeps": 20, "num_steps": 6, "spread": 10.0}, marks=pytest.mark.slow)],
)
def test_many_targets_at_once_are_each_alone_in_law(options):
    copies, index = 60, torch.arange(3).repeat(60)
    target = gaussians().columns(index)
    run = temper(laws("normal", 3 * copies), target, 300, **options)
    together = figures(run, target).unflatten(0, (copies, 3))
    assert z_scores(together, torch.zeros(3, 5)).abs().max() < 4.5  # exact, column by column
    assert together[..., 0].std(0).max() < 0.3
    for b in range(3):
        one = target.columns(torch.tensor([b]))
        alone = torch.cat([figures(temper(laws("normal", 1), one, 300, **options), one) for _ in range(16)])
        z = (alone.mean(0) - together[:, b].mean(0)) / (alone.var(0) / 16 + together[:, b].var(0) / copies).sqrt()
        assert z.abs().max() < 5
        assert 0.4 < float(alone[:, 0].std() / together[:, b, 0].std()) < 2.5  # neither is noisier than the other


def test_each_column_moves_in_its_own_metric():
    widths = torch.tensor([1e-3, 1e3])[:, None, None] * torch.eye(2)
    target = Gaussians(torch.zeros(2, 2), widths, torch.zeros(2))
    run = temper(NormalLaw(torch.zeros(2, 2), 1.2 * widths), target, 200, final_sweeps=20)
    assert run.acceptance.min() > 0.6  # in the other's metric a particle stands still, or is thrown out
    assert all(len(run.points[:, b].unique(dim=0)) == 200 for b in range(2))


@pytest.mark.parametrize("kind", ["normal", "mixture"])
@pytest.mark.parametrize("column", [1, 2])
def test_one_target_starts_from_either_kind_of_law(kind, column):
    target = gaussians().columns(torch.tensor([column]))
    runs = [temper(laws(kind, 1), target, 300) for _ in range(24)]
    assert runs[0].points.shape == (300, 1, 2) and runs[0].acceptance.shape == (1,)
    values = torch.stack([figures(run, target)[0] for run in runs])
    assert z_scores(values, torch.zeros(5)).abs().max() < 5
    assert values[:, 0].std() < 0.3
