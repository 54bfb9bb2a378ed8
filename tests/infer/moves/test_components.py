"""Components of a frozen mixture say what the mixture says."""

import math

import pytest
import torch

from pyro_sb.infer.moves.components import COPIED, Components
from pyro_sb.ops.leapfrog import SharedFactors, matvec
from pyro_sb.ops.student_mixture import StudentMixture

F64 = {"dtype": torch.float64}


def mixture(df, dim=4, num=3):
    trils = 0.3 * torch.randn(num, dim, dim, **F64).tril(-1) + torch.diag_embed(0.5 + torch.rand(num, dim, **F64))
    log_weights = torch.log_softmax(torch.randn(num, **F64), 0)
    return StudentMixture(log_weights, torch.randn(num, dim, **F64), trils, torch.tensor(df, **F64)[:num])


@pytest.mark.parametrize("df", [[math.inf] * 3, [3.0, math.inf, 8.0]])
def test_they_are_those_of_the_mixture(df):
    rho, x = mixture(df), 2 * torch.randn(50, 4, **F64)
    white, log_share = Components(rho).whiten(x)
    torch.testing.assert_close(white, rho.whiten(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_share, rho.log_responsibilities(x), rtol=1e-12, atol=1e-12)
    component = torch.randint(3, (50,))
    value, score = Components(rho).share_and_score(x, component)
    torch.testing.assert_close(value, log_share[torch.arange(50), component])
    x.requires_grad_()
    expected = torch.autograd.grad(rho.log_responsibilities(x)[torch.arange(50), component].sum(), x)[0]
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)


def test_they_are_drawn_by_responsibility():
    rho = mixture([math.inf] * 3)
    x = torch.randn(1, 4, **F64)
    drawn = Components(rho).draw(x.expand(40_000, -1)).bincount(minlength=3) / 40_000
    share = rho.log_responsibilities(x)[0].exp()
    assert ((drawn - share).abs() < 4 * (share * (1 - share) / 40_000).sqrt() + 1e-12).all()


def test_large_factors_are_not_copied():
    component = torch.tensor([1, 0, 1])
    few = Components(mixture([math.inf] * 3)).factors(component)
    assert isinstance(few, torch.Tensor) and few.shape == (3, 4, 4)
    dim = math.isqrt(COPIED // 3) + 1
    rho = mixture([math.inf] * 2, dim, 2)
    many, vector = Components(rho).factors(component), torch.randn(3, dim, **F64)
    assert isinstance(many, SharedFactors)
    torch.testing.assert_close(matvec(many, vector), matvec(rho.scale_trils[component], vector))
    assert Components(mixture([math.inf], num=1)).factors(component * 0).shape == (4, 4)
