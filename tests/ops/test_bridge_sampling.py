"""Bennett's ratio and shares: exact on Gaussians, calibrated errors on laws of known normalisers."""

import math

import pytest
import torch
from torch.distributions import Gamma, Normal, StudentT

from pyro_sb.ops.sampling.bridge_sampling import bridge_shares, log_ratio_of

F64 = {"dtype": torch.float64}


def spd(dim):
    root = torch.randn(dim, dim, **F64)
    return root @ root.T / dim + 0.1 * torch.eye(dim, **F64)


@pytest.mark.parametrize("dim", [2, 50, 200])
def test_it_is_exact_on_gaussians_under_their_own_map(dim):
    # the map L_j L_i^-1 makes one law the other: every ratio is log w_j / w_i, whatever the draws
    shares = torch.tensor([0.2, 0.3, 0.5], **F64)
    means = [torch.randn(dim, **F64) for _ in range(3)]
    roots = [torch.linalg.cholesky(spd(dim)) for _ in range(3)]

    def log_law(k, x):
        white = torch.linalg.solve_triangular(roots[k], (x - means[k]).T, upper=False)
        return shares[k].log() - 0.5 * white.square().sum(0) - roots[k].diagonal().log().sum()

    def ratio(i, j, x):
        y = means[j] + torch.linalg.solve_triangular(roots[i], (x - means[i]).T, upper=False).T @ roots[j].T
        stretch = roots[j].diagonal().log().sum() - roots[i].diagonal().log().sum()
        return log_law(j, y) - log_law(i, x) + stretch

    x = [means[k] + 3 * torch.randn(10 * (k + 1), dim, **F64).exp() for k in range(3)]  # not their draws
    found = bridge_shares(torch.stack([ratio(0, k, x[0]) for k in (1, 2)], 1), [ratio(k, 0, x[k]) for k in (1, 2)])
    torch.testing.assert_close(found.log_shares.exp(), shares, rtol=0, atol=1e-9)
    assert float(found.error.max()) < 1e-9


def test_the_two_sides_accept_as_much():
    forward, backward = 2 * torch.randn(40, **F64) + 1, 2 * torch.randn(70, **F64) - 3
    value, offset = log_ratio_of(forward, backward), math.log(40 / 70)
    there = torch.sigmoid(forward - value - offset).sum()
    torch.testing.assert_close(there, torch.sigmoid(backward + value + offset).sum(), rtol=1e-10, atol=0)
    assert log_ratio_of(backward, forward) == pytest.approx(-value, abs=1e-10)
    assert log_ratio_of(forward + 500.0, backward - 500.0) == pytest.approx(value + 500.0, abs=1e-9)  # normalisers


@pytest.mark.parametrize("counts", [(400, 400, 400), (100, 800, 300)])
def test_its_standard_errors_are_those_of_repetition(counts):
    # three shapes of one normaliser each: normal, Student's t, the logarithm of a gamma; shares .2, .5, .3
    laws = [Normal(0.0, 1.0), StudentT(6.0), Gamma(5.0, 1.0)]
    shares = torch.tensor([0.2, 0.5, 0.3], **F64)

    def log_law(k, z):
        if k < 2:
            return shares[k].log() + laws[k].log_prob(z)
        u = 1.5 + 0.47 * z  # standardised logarithm of the gamma
        return shares[2].log() + laws[2].log_prob(u.exp()) + u + math.log(0.47)

    def draws(k, num):
        z = laws[k].sample((num, 300)).double()
        return (z.log() - 1.5) / 0.47 if k == 2 else z

    x = [draws(k, count) for k, count in enumerate(counts)]
    scores = []
    for r in range(300):
        column = [part[:, r] for part in x]
        forward = torch.stack([log_law(k, column[0]) - log_law(0, column[0]) for k in (1, 2)], 1)
        found = bridge_shares(forward, [log_law(0, column[k]) - log_law(k, column[k]) for k in (1, 2)])
        scores.append((found.log_shares.exp() - shares) / found.error)
    z = torch.stack(scores)
    assert (z.mean(0).abs() < 4 / math.sqrt(300)).all()
    assert (z.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 300)


def test_where_nothing_crosses_the_counts_stay_and_the_error_says_so():
    none = torch.full((30,), -math.inf, **F64)
    found = bridge_shares(none[:, None], [none[:10]])
    torch.testing.assert_close(found.log_shares.exp(), torch.tensor([0.75, 0.25], **F64))
    assert torch.isinf(found.error).all()
    assert log_ratio_of(torch.tensor([math.nan, 0.0]), torch.tensor([0.0, math.nan])) == pytest.approx(0.0, abs=1e-9)
