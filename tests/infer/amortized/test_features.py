"""What a bridge sees: standard columns, normal scores, summaries that know no order, missing entries."""

import pytest
import torch

from pyro_sb.infer.amortized.features import Features, nan_moments, summary
from pyro_sb.infer.model.prototype import Packing


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def layout(**shapes):
    return Packing.like({name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(("count", "size"), [(2, 1), (5, 2), (9, 3)])
def test_summaries_know_no_order(count, size):
    items = torch.randn(20, count, size)
    moved = items[:, torch.randperm(count)]
    torch.testing.assert_close(summary(moved), summary(items), rtol=1e-10, atol=1e-10)


def test_summaries_are_means_deviations_and_correlations():
    items = torch.randn(4, 7, 2)
    found = summary(items)
    torch.testing.assert_close(found[:, :2], items.mean(1))
    torch.testing.assert_close(found[:, 2:4].exp(), items.std(1, correction=0), rtol=1e-4, atol=1e-4)
    correlation = torch.stack([torch.corrcoef(row.T)[0, 1] for row in items])
    torch.testing.assert_close(torch.tanh(found[:, 4]), correlation, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [5, 9])
def test_a_missing_item_is_one_item_less(count):
    # one missing coordinate takes the whole item away
    items = torch.randn(6, count, 2)
    items[:, 2, 1] = torch.nan
    rest = torch.cat([items[:, :2], items[:, 3:]], 1)
    torch.testing.assert_close(summary(items)[:, :5], summary(rest)[:, :5], rtol=1e-10, atol=1e-10)
    assert bool(torch.isfinite(summary(torch.full((1, count, 2), torch.nan))).all())


def test_missing_entries_are_left_out_of_the_moments():
    columns = torch.randn(50, 3)
    columns[::3, 1] = torch.nan
    columns[:, 2] = 4.0
    mean, deviation = nan_moments(columns)
    kept = columns[~torch.isnan(columns[:, 1]), 1]
    torch.testing.assert_close(mean[1], kept.mean())
    torch.testing.assert_close(deviation[1], kept.std(correction=0))
    assert mean[2] == 4 and deviation[2] == 1


def test_the_design_is_standard_and_its_scores_are_normal():
    y = torch.cat([torch.randn(2000, 1).exp() * 50, 3 + torch.rand(2000, 1)], 1)
    design = Features(layout(y=(2,))).fit(y).design(y)
    assert design.shape == (2000, 4)
    torch.testing.assert_close(design[:, :2].mean(0), torch.zeros(2), atol=2e-2, rtol=0)  # clipped at ten deviations
    scores = design[:, 2:]
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), atol=2e-2, rtol=0)
    torch.testing.assert_close(scores.std(0), torch.ones(2), atol=3e-2, rtol=0)
    order = y[:, 0].argsort()
    assert bool((scores[order, 0].diff() >= 0).all())
    assert design.abs().max() <= 10 and scores.abs().max() <= 3.5


def test_what_lies_beyond_the_simulations_stays_finite():
    features = Features(layout(y=(2,))).fit(torch.randn(100, 2))
    far = features.design(torch.tensor([[1e12, -1e12], [0.0, 0.0]]))
    assert bool(torch.isfinite(far).all()) and far.abs().max() <= 10


def test_missing_entries_are_zeros_with_a_mark():
    features = Features(layout(y=(3,)), masked=True).fit(torch.randn(100, 3))
    design = features.design(torch.tensor([[0.5, torch.nan, 1.0]]))[0]
    assert design.shape == (9,) and design[1] == 0 and design[4] == 0
    assert design[6:].tolist() == [0, 1, 0]


def test_a_set_beside_a_plain_site():
    data = layout(a=(), y=(6, 2))
    features = Features(data, {"y": 6}).fit(torch.randn(200, 13))
    y = torch.randn(5, 13)
    moved = y.clone()
    moved[:, 1:] = y[:, 1:].unflatten(1, (6, 2)).flip(1).flatten(1)
    torch.testing.assert_close(features.design(moved), features.design(y), rtol=1e-9, atol=1e-9)
    other = y.clone()
    other[:, 0] += 1
    assert (features.design(other) != features.design(y)).any()


def test_an_embedding_sees_the_entries_in_order_and_sets_alike():
    data = layout(y=(4, 1))
    y = 10 + 3 * torch.randn(300, 4)
    raw = Features(data, {"y": 4}, raw=True).fit(y)
    context = raw.context(y)
    assert context.shape == (300, 4)
    torch.testing.assert_close(raw.context(y.flip(1)), context.flip(1))
    torch.testing.assert_close(context.flatten().std(correction=0), torch.tensor(1.0))
    masked = Features(data, masked=True, raw=True).fit(y)
    y[0, 1] = torch.nan
    assert masked.context(y)[0, [1, 5]].tolist() == [0, 1]


def test_the_distance_is_in_deviations_beside_the_farthest_simulations():
    y = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 2.0], [1.0, -2.0]])
    features = Features(layout(y=(2,))).fit(y)
    assert features.distance(torch.tensor([[9.0, 0.0]])) == pytest.approx((9.0, 1.0))
    distance, farthest = features.distance(torch.tensor([[0.0, 0.0], [0.0, -20.0]]))
    assert distance == pytest.approx(20 / 2**0.5) and farthest == pytest.approx(2**0.5)


def test_a_column_that_never_varies_and_one_that_is_never_there():
    y = torch.randn(50, 3)
    y[:, 1], y[:, 2] = 7.0, torch.nan
    design = Features(layout(y=(3,)), masked=True).fit(y).design(y)
    assert bool(torch.isfinite(design).all())
