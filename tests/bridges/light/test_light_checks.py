"""How a conditional light bridge is judged: early, and aloud where it has learnt nothing from its context."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from pyro_sb.bridges import LightSB
from pyro_sb.bridges.light import solvers
from pyro_sb.bridges.light.parameters import lower_triangular
from pyro_sb.training import EarlyChecks, FitHistory

KEPT = "kept its start, which does not use the context"


def fitted(**options):
    """A bridge with a network, on draws whose mean is the context's."""
    context = torch.randn(60, 3, dtype=torch.float64)
    target = context[:, :2] + 0.5 * torch.randn(60, 2, dtype=torch.float64)
    bridge = LightSB(2, num_components=2, context_dim=3, covariance="full")
    history = bridge.fit(target, context=context, progress=False, **options)
    return bridge, history


def judged(monkeypatch, losses):
    """Held-out losses as told, from the start's on."""
    losses = itertools.chain(losses, itertools.repeat(9.0))
    monkeypatch.setattr(solvers, "held_out_loss", lambda process, ends, num=0: next(losses))


def test_a_bridge_that_kept_its_start_says_so_with_figures_and_knobs(monkeypatch):
    judged(monkeypatch, [1.5, 2.5])
    with pytest.warns(RuntimeWarning, match=KEPT) as caught:
        bridge, _ = fitted(num_updates=40, learning_rate=0.02)
    told = next(str(w.message) for w in caught if KEPT in str(w.message))
    for part in ("1.5 nats", "11 checks, at best 2.5", "54 draws", "dropout 0", "learning_rate 0.02", "num_updates 40"):
        assert part in told
    assert caught[0].filename == __file__
    one, other = torch.randn(2, 3, dtype=torch.float64)
    points = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(bridge(one).log_prob(points), bridge(other).log_prob(points))  # what the text claims


@pytest.mark.parametrize("losses", [[1.5, 1.0], [1.5, 2.0, 2.0, 1.0]])
def test_a_bridge_that_learnt_something_keeps_silent(losses, monkeypatch):
    judged(monkeypatch, losses)
    bridge, _ = fitted(num_updates=100)
    one, other = torch.randn(2, 3, dtype=torch.float64)
    points = torch.randn(5, 2, dtype=torch.float64)
    assert not torch.equal(bridge(one).log_prob(points), bridge(other).log_prob(points))


def test_a_context_that_tells_nothing_is_no_cause_to_warn(monkeypatch):
    judged(monkeypatch, [1.5, *[1.54] * 50])
    fitted(num_updates=40)


def test_a_bridge_without_context_keeps_its_start_in_silence(monkeypatch):
    judged(monkeypatch, [1.5, 2.5])
    LightSB(2, num_components=1).fit(torch.randn(60, 2), num_updates=40, progress=False)


@pytest.mark.parametrize(("best", "updates"), [(1, 2), (2, 4), (3, 8), (4, 16)])
def test_the_best_early_look_is_gone_back_to(best, updates):
    x = nn.Parameter(torch.zeros(()))
    losses = iter([5.0] + [4.0 if k != best else 1.0 for k in range(1, 5)])
    checks = EarlyChecks([x], lambda: next(losses), every=32)
    checks.validate()  # the start
    for _ in range(32):  # a loop that counts its updates
        checks.look()
        x.data += 1
    checks.settle(FitHistory(validation_losses=[2.0]))
    assert x.item() == updates


@pytest.mark.parametrize(("start", "later"), [(0.5, 2.0), (5.0, 0.5)])
def test_early_looks_give_way_to_the_start_and_to_the_loop(start, later):
    x = nn.Parameter(torch.zeros(()))
    losses = iter([start, 1.0, 1.0, 1.0, 1.0])
    checks = EarlyChecks([x], lambda: next(losses), every=32)
    checks.validate()
    for _ in range(32):
        checks.look()
        x.data += 1
    checks.settle(FitHistory(validation_losses=[later]))
    assert x.item() == 32


def test_early_looks_leave_the_loop_as_it_is(monkeypatch):
    runs = []
    for shares in ((2, 4, 8, 16), ()):
        monkeypatch.setattr("pyro_sb.training.SHARES", shares)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            runs.append(fitted(num_updates=160)[1])
    assert runs[0].losses == runs[1].losses and runs[0].validation_losses == runs[1].validation_losses


def test_patience_ends_a_fit_that_gets_no_better(monkeypatch):
    judged(monkeypatch, [1.5, 1.0])  # checks of the loop, one in five updates, are all worse than its start
    assert fitted(num_updates=100, patience=3)[1].iterations == 15
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        fitted(num_updates=10, patience=0)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_entries_fill_the_lower_triangle_row_by_row(dim):
    entries = torch.arange(1.0, 1 + 3 * dim * (dim + 1) // 2).reshape(3, -1)
    matrices = lower_triangular(entries, dim)
    rows, columns = torch.tril_indices(dim, dim)
    assert torch.equal(matrices[:, rows, columns], entries)
    assert torch.equal(matrices.triu(1), torch.zeros_like(matrices))
