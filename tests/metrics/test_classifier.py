"""C2ST: laws of one distribution, of far ones, and of known total variation."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_sb.datasets import EightGaussians, exact_task
from pyro_sb.metrics import c2st


def test_draws_of_one_law_score_a_half():
    law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    score = c2st(law.sample((500,)), law)
    # 1,000 guesses right by a fair coin, were the folds independent: sd .016
    assert abs(score - 0.5) < 4 * 0.5 / 1000**0.5
    assert score.floor == 0.5


def test_far_laws_score_one_whatever_the_unit():
    y = torch.randn(200, 2) * torch.tensor([1.0, 1e4])
    assert c2st(y + torch.tensor([8.0, 0.0]), y[torch.randperm(200)]) > 0.99


def test_half_the_target_scores_three_quarters():
    # one of two far halves: TV = 1/2, so the best classifier scores 1/2 + TV/2
    y = torch.randn(500, 1).abs() + 2
    score = c2st(torch.randn(500, 1).abs() + 2, y * torch.tensor([1.0, -1.0]).repeat(250)[:, None])
    assert abs(score - 0.75) < 4 * 0.5 / 1000**0.5


@pytest.mark.slow
def test_a_shift_scores_its_total_variation():
    shift, n = 1.0, 3000
    best = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))  # 1/2 + TV/2 of two unit normals
    score = c2st(torch.randn(n, 1) + shift, torch.randn(n, 1))
    assert abs(score - best) < 4 * (best * (1 - best) / (2 * n)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda: EightGaussians().sample((2000,)),
        lambda: exact_task("eight_schools_centered").reference_draws[:, -2:],
    ],
    ids=["eight Gaussians", "a funnel"],
)
def test_halves_of_the_draws_of_one_law_are_one_law(draw):
    draws = draw()
    assert 0.47 < c2st(draws[::2], draws[1::2]) < 0.53


def test_the_generator_makes_the_score():
    x, y = torch.randn(400, 1), torch.randn(400, 1)
    one, again, other = (c2st(x, y, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one == again != other
    torch.manual_seed(5)
    first = c2st(x, y)
    torch.manual_seed(5)
    assert c2st(x, y) == first


def test_unfit_draws_are_refused():
    x = torch.randn(20, 2)
    with pytest.raises(
        ValueError, match=r"as many draws.* got 20 and 12. Write x\[torch.randperm\(len\(x\)\)\[:12\]\]"
    ):
        c2st(x, x[:12])
    with pytest.raises(ValueError, match=r"got 12 and 20. Write y\[torch.randperm\(len\(y\)\)\[:12\]\]"):
        c2st(x[:12], x)
    with pytest.raises(ValueError, match="num_folds must be at least 2, got 1"):
        c2st(x, x, num_folds=1)
    with pytest.raises(ValueError, match="got axis 1 constant"):
        c2st(x, x * torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="x and y must have one dimension, got 2 and 1"):
        c2st(x, x[:, :1])
