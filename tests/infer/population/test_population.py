"""The population unattended: evidence and moments against exact values, repairs, fallbacks and what it says."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.rounds import temper_weights
from pyro_sb.infer.population.search import find_optima
from pyro_sb.infer.population.sources import laplace_mixture
from pyro_sb.weights import effective_sample_size

F64 = {"dtype": torch.float64}


def two_modes(dim, gap=10.0, weights=(0.3, 0.7), log_factor=0.0):
    centre = torch.zeros(2, dim, **F64)
    centre[:, 0] = torch.tensor([-gap / 2, gap / 2])
    log_weights = torch.tensor(weights, **F64).log()

    def log_prob(z):
        squared = (z[:, None] - centre).square().sum(-1)
        return torch.logsumexp(log_weights - squared / 2, 1) - dim / 2 * math.log(2 * math.pi) + log_factor

    return LogJoint.from_batched(log_prob, dim)


def stiff_gaussian(dtype=torch.float64):
    scales = torch.tensor([0.01, 1.0, 15.0], **F64)
    correlation = torch.full((3, 3), 0.99, **F64).fill_diagonal_(1.0)
    law = torch.distributions.MultivariateNormal(
        torch.tensor([0.3, -2.0, 20.0], **F64), correlation * scales * scales[:, None]
    )
    return law, LogJoint.from_batched(lambda z: law.log_prob(z.double()).to(dtype) - 50.0, 3, dtype)


def expectation(result, values):
    """Self-normalised estimate and its standard error."""
    weights = result.weights
    mean = weights @ values
    return mean, (weights.square() @ (values - mean).square()).sqrt()


def assert_evidence(result, exact, error=0.05):
    assert abs(result.log_evidence - exact) < 4 * result.log_evidence_error
    assert result.log_evidence_error < error


def improper(z):
    return -z[:, 0].square() / 2


# ---- truths ----


def test_a_stiff_gaussian():
    law, target = stiff_gaussian()
    result = populate(target)
    assert_evidence(result, -50.0, 0.02)
    assert result.ess_share > 0.8
    assert result.num_modes == 1
    white = torch.linalg.solve_triangular(law.scale_tril, (result.points - law.loc).T, upper=False).T
    mean, error = expectation(result, torch.cat([white, white.square(), white[:, :1] * white[:, 1:]], 1))
    truth = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0], **F64)
    assert ((mean - truth) / error).abs().max() < 4


def test_a_float32_target_gives_a_float64_population():
    _, target = stiff_gaussian(torch.float32)
    result = populate(target, start=20 * torch.randn(200, 3))
    assert result.points.dtype == result.log_weights.dtype == torch.float64
    assert abs(result.log_evidence + 50.0) < 4 * result.log_evidence_error + 1e-3


@pytest.mark.parametrize("dim", [2, 10])
def test_two_separated_modes(dim):
    result = populate(two_modes(dim, log_factor=7.0))
    assert_evidence(result, 7.0)
    assert result.num_modes == 2
    share, error = expectation(result, (result.points[:, 0] > 0).double())
    assert abs(float(share) - 0.7) < 4 * float(error) < 0.1


def test_a_banana_by_quadrature():
    def log_prob(z):
        return -((z[:, 0] ** 2 - 2) ** 2) / 8 - (z[:, 1] - z[:, 0] ** 2) ** 2 / 0.5

    x, y = torch.linspace(-5, 5, 1001, **F64), torch.linspace(-4, 20, 2401, **F64)
    density = log_prob(torch.cartesian_prod(x, y)).exp().view(1001, 2401)
    mass = density.sum() * 1e-4
    second = (density.sum(1) @ x**2) * 1e-4 / mass
    result = populate(LogJoint.from_batched(log_prob, 2))
    assert_evidence(result, float(mass.log()))
    mean, error = expectation(result, result.points.square())
    assert abs(float((mean[0] - second) / error[0])) < 4
    side, error = expectation(result, result.points[:, 0].sign())
    assert abs(float(side / error)) < 4


def test_a_flat_prior():
    # least squares, correlated covariates, no prior: the evidence is a Gaussian integral
    design = torch.randn(40, 1, **F64) + 0.1 * torch.randn(40, 3, **F64)
    data = design.sum(1) + torch.randn(40, **F64)
    target = LogJoint.from_batched(lambda z: -(z @ design.T - data).square().sum(1) / 2, 3)
    residual = data - design @ torch.linalg.lstsq(design, data[:, None]).solution[:, 0]
    exact = 1.5 * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(design.T @ design)[1] - residual.square().sum() / 2
    assert_evidence(populate(target), float(exact), 0.02)


def counts_model(counts):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0, **F64), 2.0))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Poisson(rate[..., None]), obs=counts)


@pytest.mark.parametrize("start", ["search", "prior"])
def test_a_constrained_model_has_its_conjugate_evidence(start):
    counts = torch.tensor([4.0, 7.0, 3.0, 5.0, 6.0], **F64)
    total, num = float(counts.sum()), len(counts)
    exact = 3 * math.log(2) + math.lgamma(3 + total) - math.lgamma(3) - (3 + total) * math.log(2 + num)
    exact -= float(torch.lgamma(counts + 1).sum())
    target = log_joint(counts_model, args=(counts,))
    result = populate(target, start=start)
    assert_evidence(result, exact, 0.02)
    mean, error = expectation(result, target.constrain(result.points)["rate"])
    assert abs(float((mean - (3 + total) / (2 + num)) / error)) < 4


def test_a_hard_edge():
    # Exp(1) on an orthant: no maximum in the interior, minus infinity outside
    result = populate(LogJoint.from_batched(lambda z: torch.where((z > 0).all(1), -z.sum(1), -torch.inf), 2))
    assert_evidence(result, 0.0)
    assert result.num_modes == 0


# ---- starts ----


def test_points_that_are_mostly_in_the_wrong_mode_are_repaired_by_weights():
    side = torch.where(torch.arange(1000) < 950, -5.0, 5.0)
    points = torch.randn(1000, 2, **F64)
    points[:, 0] += side
    result = populate(two_modes(2, weights=(0.1, 0.9)), start=points)
    assert_evidence(result, 0.0)
    share, error = expectation(result, (result.points[:, 0] > 0).double())
    assert abs(float(share) - 0.9) < 4 * float(error) < 0.1


def test_points_far_from_the_target_are_carried_to_it():
    covariance = torch.tensor([[1.0, 1.8], [1.8, 4.0]], **F64)
    law = torch.distributions.MultivariateNormal(torch.zeros(2, **F64), covariance)
    result = populate(LogJoint.from_batched(law.log_prob, 2), start=torch.randn(100, 2, **F64) - 30)
    assert_evidence(result, 0.0)
    assert any(stage.startswith("tempered") for stage in result.stages)


def test_a_good_start_needs_no_tempering():
    law, target = stiff_gaussian()
    result = populate(target, start=law.sample((2000,)))
    assert_evidence(result, -50.0, 0.02)
    assert not any(stage.startswith("tempered") for stage in result.stages)


# ---- what it hands over ----


def test_weights_are_target_over_proposal_at_the_points():
    target = two_modes(2)
    result = populate(target, 500)
    torch.testing.assert_close(result.log_density, target.log_prob(result.points))
    torch.testing.assert_close(result.log_weights, result.log_density - result.proposal.log_prob(result.points))
    assert float(result.weights.sum()) == pytest.approx(1)
    assert abs(effective_sample_size(result.log_weights) / len(result.points) - result.ess_share) < 0.1
    assert abs(float(result.proposal.log_weights.exp().sum()) - 1) < 1e-12
    counts = torch.bincount(result.resample(200_000), minlength=len(result.points))
    chi2 = ((counts - 200_000 * result.weights).square() / (200_000 * result.weights)).sum()
    freedom = len(result.points) - 1
    assert abs(float(chi2) - freedom) < 5 * (2 * freedom) ** 0.5


def test_one_seed_gives_one_population():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(populate(two_modes(2), 200))
    assert torch.equal(results[0].points, results[1].points)
    assert results[0].log_evidence == results[1].log_evidence


def test_the_laplace_mixture_covers_every_maximum():
    optima = find_optima(two_modes(2, weights=(1e-6, 1 - 1e-6)))
    mixture = laplace_mixture(optima)
    assert mixture.num_components == 2
    assert float(mixture.log_weights.exp().sum()) == pytest.approx(1)
    assert float(mixture.log_weights.exp().min()) == pytest.approx(0.025, rel=0.05)
    law, target = stiff_gaussian()
    scales = laplace_mixture(find_optima(target)).scale_trils
    whitened = torch.linalg.solve_triangular(
        law.scale_tril, scales, upper=False
    )  # covers the curvature 1.5 times in width
    torch.testing.assert_close(whitened @ whitened.mT, 2.25 * torch.eye(3, **F64)[None], rtol=0, atol=1e-3)


@pytest.mark.parametrize("enough", [1.5, 20.0, 90.0])
def test_tempered_weights_have_the_effective_size_asked_for(enough):
    log_weights = 5 * torch.randn(100, **F64)
    tempered = temper_weights(log_weights, enough)
    assert effective_sample_size(tempered) == pytest.approx(max(enough, effective_sample_size(log_weights)), rel=1e-6)
    assert torch.equal(tempered.argsort(), log_weights.argsort())


def test_weights_of_zero_stay_zero_when_tempered():
    log_weights = torch.tensor([-math.inf, 0.0, 3.0, -math.inf], **F64)
    assert torch.softmax(temper_weights(log_weights, 3.0), 0)[[0, 3]].tolist() == [0.0, 0.0]
    assert effective_sample_size(temper_weights(log_weights, 3.0)) == pytest.approx(2.0, rel=1e-6)


# ---- what it says ----


def funnel(z):
    """Five centred effects with data at 0, their scale seen through its logarithm: unbounded down the neck."""
    v, x = z[:, 0], z[:, 1:]
    prior = v - v.exp().square() / 50 - (x.square() * torch.exp(-2 * v)[:, None]).sum(1) / 2 - x.shape[1] * v
    return prior - x.square().sum(1) / 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The population is poor")
def test_a_funnel_is_said_and_particles_give_its_evidence():
    v = torch.linspace(-60, 6, 60_001, **F64)  # the effects integrate out: Gaussians of variance 4 and exp(2 v)
    log_marginal = v - v.exp().square() / 50 - 2.5 * torch.log1p((2 * v).exp() / 4) + 2.5 * math.log(2 * math.pi)
    exact = float(torch.logsumexp(log_marginal, 0)) + math.log(66 / 60_000)
    with pytest.warns(RuntimeWarning, match="Tails may be cut"):
        result = populate(LogJoint.from_batched(funnel, 6))
    assert result.num_modes == 0
    assert result.stages[0] == "search: no maximum from 64 starts"
    assert result.sources[1].name == "wide law"
    assert abs(result.log_evidence - exact) < 0.1  # some percent of the mass lies deeper in the neck than any draw
    mean, error = expectation(result, result.points[:, 0])
    assert abs(float(mean) - float(log_marginal.softmax(0) @ v)) < 4 * float(error) + 0.1


@pytest.mark.parametrize("oblique", [False, True])
def test_a_target_without_a_normaliser_is_called_poor_with_the_figure(oblique):
    def log_prob(z):
        return improper(z.sum(1, keepdim=True) - 3 if oblique else z)

    with pytest.warns(RuntimeWarning, match="The population is poor") as caught:
        result = populate(LogJoint.from_batched(log_prob, 2), 256, max_rounds=2)
    assert f"{result.ess_share:.3f} < 0.1 of 256 draws" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("start", ["search", "points", "prior"])
def test_a_target_that_is_nan_everywhere_raises(start):
    target = LogJoint.from_batched(lambda z: z.sum(1) * math.nan, 2)
    if start == "prior":
        target.prior = lambda num: torch.randn(num, 2)
    with pytest.raises(ValueError, match="log joint .*must be finite"):
        populate(target, start=torch.randn(50, 2) if start == "points" else start)


@pytest.mark.parametrize(
    "start, message",
    [
        (torch.zeros(10), r"shape \(M, 2\), got \(10,\)"),
        (torch.zeros(10, 3), r"shape \(M, 2\), got \(10, 3\)"),
        (torch.randn(3, 2), r"at least 4 rows of shape \(M, 2\), got \(3, 2\)"),
        (torch.full((10, 2), math.nan), "finite, got NaN or infinite"),
        (torch.tensor([[0.0, 1.0]] * 9 + [[0.0, math.inf]]), "finite, got NaN or infinite"),
        (torch.ones(10, 2), "differ in every coordinate"),
        (torch.cat([torch.ones(10, 1), torch.randn(10, 1)], 1), "differ in every coordinate"),
        ("newton", '"search", "prior" or a tensor of points .M, 2., got \'newton\''),
    ],
    ids=["vector", "width", "few", "nan", "infinite", "equal", "constant", "name"],
)
def test_bad_starts_are_refused_by_name(start, message):
    with pytest.raises(ValueError, match=message):
        populate(two_modes(2), start=start)


def test_too_few_particles_are_refused():
    with pytest.raises(ValueError, match="at least 50 to fit a proposal, got 49. Write num_particles=1024"):
        populate(two_modes(2), 49)


def test_the_prior_of_a_tensor_target_is_refused():
    with pytest.raises(ValueError, match="prior"):
        populate(two_modes(2), start="prior")


def test_a_population_prints_what_it_is_in_at_most_ten_lines():
    result = populate(two_modes(2, log_factor=2.0), 256)
    html = result._repr_html_()
    assert html.count("<tr>") == 5 + len(result.stages) and f"<td>{result.ess_share:.3f}</td>" in html
    lines = repr(result).splitlines()
    assert len(lines) <= 10 and lines[0].startswith("Population of ") and "2 dimensions: effective share" in lines[0]
    assert f"log evidence {result.log_evidence:.3f} +- " in lines[1] and "2 maxima found" in lines[2]
    assert f"{result.evaluations.gradient} with gradient" in lines[3] and "search: 2 maxima" in lines[4]


def test_distinct_points_keep_the_weights_in_sum():
    result = populate(two_modes(2), 256)
    points, weights = result.distinct(500)
    assert len(points.unique(dim=0)) == len(points) <= 256
    assert float(weights.sum()) == pytest.approx(1)
    share = weights @ (points[:, 0] > 0).double()
    exact = result.weights @ (result.points[:, 0] > 0).double()
    assert abs(float(share - exact)) < 0.03
