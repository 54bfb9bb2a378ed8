"""Scores of forecasts by hand and in closed form; the vector autoregression; folds that do not look ahead."""

import math

import pytest
import torch
from torch.distributions import Normal

from benchmarks.conditional.time_series import (
    Autoregression,
    Fold,
    Regression,
    Series,
    cover_sum,
    crps_sum,
    nd_sum,
    nrmse_sum,
)

F64 = {"dtype": torch.float64}
HALF = Normal(torch.zeros((), **F64), 1.0)


@pytest.mark.parametrize("y", [0.3, -1.0, 2.5])
def test_crps_of_a_gaussian_is_the_closed_form(y):
    # 19 levels of 20 cells: the trapezoid rule of CRPS = int 2 QL dq is 19 / 20 of their mean
    mean, sd = 0.5, 2.0
    draws = mean + sd * HALF.icdf((torch.arange(40_000, **F64) + 0.5) / 40_000)
    z = torch.tensor((y - mean) / sd, **F64)
    exact = sd * (z * (2 * HALF.cdf(z) - 1) + 2 * HALF.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    split = torch.stack([3 * draws, -2 * draws], -1)[:, None, None]  # two series whose sum has this law
    truth = torch.tensor([[[y + 1, -1.0]]], **F64)
    assert 0.95 * crps_sum(split, truth) * abs(y) == pytest.approx(float(exact), rel=0.015)


def test_a_sure_forecast_has_its_absolute_error_as_crps():
    truth, point = torch.randn(5, 3, 2, **F64), torch.randn(5, 3, 2, **F64)
    draws = point.expand(7, -1, -1, -1)
    assert crps_sum(draws, truth) == pytest.approx(nd_sum(draws, truth))


def test_nd_and_nrmse_by_hand():
    truth = torch.tensor([[[1.0, 1.0]], [[-3.0, -1.0]]], **F64)  # sums 2 and -4
    draws = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]], [[[3.0, 0.0]], [[0.0, 0.0]]], [[[2.0, 3.0]], [[0.0, 0.0]]]])
    draws = draws.double()  # sums 1, 3, 5 and 0, 0, 0: medians 3 and 0, means 3 and 0
    assert nd_sum(draws, truth) == pytest.approx((1 + 4) / 6)
    assert nrmse_sum(draws, truth) == pytest.approx(math.sqrt((1 + 16) / 2) / 3)
    assert cover_sum(draws, truth) == 50


def test_errors_of_series_that_cancel_do_not_count():
    truth = torch.randn(4, 2, 2, **F64)
    draws = (truth + torch.tensor([5.0, -5.0], **F64)).expand(3, -1, -1, -1)
    assert max(score(draws, truth) for score in (crps_sum, nd_sum, nrmse_sum)) < 1e-12


def simulated(slopes, count):
    values = [torch.zeros(2, **F64)] * len(slopes)
    for _ in range(count):
        values.append(sum(a @ values[-k] for k, a in enumerate(slopes, 1)) + 0.1 * torch.randn(2, **F64))
    return torch.stack(values[100:])


def test_the_autoregression_finds_its_order_and_its_futures():
    slopes = [torch.tensor([[0.5, 0.2], [0.0, 0.4]], **F64), torch.tensor([[-0.4, 0.0], [0.3, 0.2]], **F64)]
    values = simulated(slopes, 20_000)
    model = Autoregression(values, "BIC")
    assert model.order == 2
    torch.testing.assert_close(model.slope[1:], torch.cat([a.T for a in slopes]), atol=0.03, rtol=0)
    model.slope = torch.cat([torch.zeros(1, 2, **F64), *(a.T for a in slopes)])
    values[998:1000] = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], **F64)
    draws = model.draws(values, torch.tensor([1000]), 3, 20_000)[:, 0]
    past = [values[999], values[998]]
    for step in range(3):  # the mean goes on without noise
        past = [sum(a @ x for a, x in zip(slopes, past, strict=True)), past[0]]
        error = draws[:, step].std(0) / math.sqrt(20_000)
        assert ((draws[:, step].mean(0) - past[0]).abs() < 4 * error).all()


def test_futures_are_of_the_fitted_slopes():
    values = simulated([torch.tensor([[0.5, 0.2], [0.0, 0.4]], **F64)], 500)
    model = Autoregression(values, "AIC")
    model.factor = torch.zeros_like(model.factor)
    rows = torch.cat([torch.ones(1, **F64), *(values[300 - k] for k in range(1, model.order + 1))])
    assert torch.allclose(model.draws(values, torch.tensor([300]), 1, 1)[0, 0, 0], rows @ model.slope)


def test_the_regression_leaves_what_no_context_explains():
    contexts, targets = torch.randn(60, 3, **F64), torch.randn(60, 4, **F64)
    rest = Regression(contexts, targets).rest
    assert (contexts.T @ rest).abs().max() < 1e-10
    assert rest.sum(0).abs().max() < 1e-10


def test_no_fold_looks_ahead():
    values = torch.randn(200, 2, **F64)
    series = Series("noise", values, 2, (3, 7), (4, 8), (120,), 50)
    later = series._replace(values=torch.cat([values[:120], torch.full((80, 2), 9.0, **F64)]))
    fold, other = Fold(series, 120, 4), Fold(later, 120, 4)
    assert torch.equal(fold.train, other.train)
    assert torch.equal(fold.contexts, other.contexts)
    assert torch.equal(fold.asked[0], other.asked[0])  # the first forecast has seen the training part alone
    assert not torch.equal(fold.asked[1], other.asked[1])
    scaled = (values - values[:120].mean(0)) / values[:120].std(0)
    assert torch.allclose(fold.truth[-1], scaled[166:170])
    changed = values.clone()
    changed[150:] = 0
    assert torch.equal(series.contexts(changed, torch.tensor([150])), series.contexts(values, torch.tensor([150])))
