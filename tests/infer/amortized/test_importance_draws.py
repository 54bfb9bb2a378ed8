"""Weighted draws: exact algebra of their figures, expectations and resampling, alone and in batches."""

import math

import pytest
import torch

from pyro_sb.infer.amortized.importance import weigh
from pyro_sb.weights import effective_sample_size, log_evidence, pareto_k


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


def test_a_batch_is_its_columns():
    sites, log_weights = {"x": torch.randn(200, 3, 2), "s": torch.randn(200, 3)}, torch.randn(200, 3)
    batch = weigh(sites, log_weights, batched=True)
    assert batch.k_hat.shape == batch.ess_share.shape == batch.log_evidence.shape == (3,)
    for b in range(3):
        one = weigh({name: x[:, b] for name, x in sites.items()}, log_weights[:, b : b + 1], batched=False)
        assert isinstance(one.k_hat, float) and one.log_weights.shape == (200,)
        for name in ("k_hat", "ess_share", "log_evidence", "log_evidence_error"):
            assert float(getattr(batch, name)[b]) == pytest.approx(getattr(one, name))
        torch.testing.assert_close(batch.weights[:, b], one.weights)
        for name in sites:
            torch.testing.assert_close(batch.expectation(batch.sites[name])[b], one.expectation(one.sites[name]))


def test_the_figures_are_those_of_the_weights():
    log_weights = torch.randn(300, 1)
    one = weigh({}, log_weights, batched=False)
    assert one.k_hat == pareto_k(log_weights[:, 0])
    assert one.ess_share == effective_sample_size(log_weights[:, 0]) / 300
    assert (one.log_evidence, one.log_evidence_error) == log_evidence(log_weights[:, 0])


def test_a_notebook_shows_a_table_of_the_figures():
    one = weigh({"x": torch.zeros(300)}, torch.randn(300, 1), batched=False)
    html = one._repr_html_()
    assert html.count("<tr>") == 4 and f"<td>{one.ess_share:.3f}</td>" in html
    many = weigh({"x": torch.zeros(300, 2)}, torch.randn(300, 2), batched=True)
    assert "each of 2 observations" in many._repr_html_() and " to " in many._repr_html_()


def test_expectations_are_weighted_means():
    one = weigh({"x": torch.tensor([1.0, 2.0] * 50)}, torch.tensor([math.log(3.0), 0.0] * 50)[:, None], batched=False)
    assert float(one.weights.sum()) == pytest.approx(1)
    assert float(one.expectation(one.sites["x"])) == pytest.approx(1.25)
    rows = one.expectation(torch.stack([one.sites["x"], torch.ones(100)], 1))
    torch.testing.assert_close(rows, torch.tensor([1.25, 1.0]))


def test_resampled_draws_have_the_weights():
    x = torch.arange(30.0)
    log_weights = torch.stack([(x + 1).log(), torch.where(x < 2, 0.0, -torch.inf)], 1)
    draws = weigh({"x": x[:, None].expand(30, 2)}, log_weights, batched=True).resample(6000)["x"]
    weights = torch.softmax(log_weights, 0)
    mean, variance = weights.T @ x, weights.T @ x**2 - (weights.T @ x) ** 2
    assert draws.shape == (6000, 2)
    assert ((draws.mean(0) - mean) / variance.sqrt() * 6000**0.5).abs().max() < 4
    assert set(draws[:, 1].tolist()) == {0.0, 1.0}


def test_the_columns_of_a_resampled_batch_do_not_mix():
    sites = {"x": torch.stack([torch.zeros(50), torch.ones(50), 2 * torch.ones(50)], 1)[..., None]}
    draws = weigh(sites, torch.randn(50, 3), batched=True).resample(20)["x"]
    assert torch.equal(draws, torch.tensor([0.0, 1.0, 2.0])[:, None].expand(20, 3, 1))


def test_sites_are_resampled_together():
    sites = {"a": torch.arange(40.0), "b": 2 * torch.arange(40.0)}
    draws = weigh(sites, torch.randn(40, 1), batched=False).resample(100)
    assert torch.equal(draws["b"], 2 * draws["a"])


def test_no_weight_at_all_is_said():
    nothing = weigh({"x": torch.zeros(30)}, torch.full((30, 1), -torch.inf), batched=False)
    assert nothing.k_hat == math.inf and nothing.ess_share == 0 and nothing.log_evidence == -math.inf
    with pytest.raises(ValueError, match="every weight is zero.*mcmc"):
        nothing.resample(5)
    with pytest.raises(ValueError, match="every weight is zero"):
        nothing.expectation(nothing.sites["x"])
