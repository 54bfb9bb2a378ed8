"""The one accept and the one HMC transition: exact balance, energies, divergences, and laws that stay."""

import math

import pytest
import torch

from pyro_sb.infer.moves.moves import Rows, adapted, hmc_step, jittered, metropolis, start_rows
from pyro_sb.ops.leapfrog import leapfrog


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)


PRECISION = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def normal(x):
    return -0.5 * torch.einsum("ni,ij,nj->n", x, PRECISION, x), -x @ PRECISION


def z_scores(values, expected):
    return (values.mean(0) - expected) / values.std(0) * math.sqrt(len(values))


@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_rows_that_start_exact_stay_exact(spread, per_row):
    num, covariance = 20_000, torch.linalg.inv(PRECISION)
    x = torch.randn(num, 2) @ torch.linalg.cholesky(covariance).T
    scale = torch.tensor([[0.5, 0.0], [0.3, 2.0]])  # not the target's
    step = torch.full((num, 1), 0.9) if per_row else 0.9
    rows = start_rows(normal, x)
    for _ in range(4):
        metric = scale.expand(num, 2, 2) if per_row else scale
        rows, accept_prob, *_ = hmc_step(normal, rows.with_momentum(), metric, jittered(step, spread, rows.x), 3)
    assert 0.2 < float(accept_prob.mean()) < 0.99  # the accept step matters
    products = (rows.x[:, :, None] * rows.x[:, None, :]).flatten(1)
    assert z_scores(rows.x, torch.zeros(2)).abs().max() < 4
    assert z_scores(products, covariance.flatten()).abs().max() < 4
    value, grad = normal(rows.x)
    torch.testing.assert_close(rows.log_density, value)
    torch.testing.assert_close(rows.grad, grad)


def test_a_row_outside_the_support_never_moves_there():
    def half(x):
        inside = x[:, 0] > 0
        return torch.where(inside, -x[:, 0], -torch.inf), torch.where(inside, -1.0, 0.0)[:, None]

    rows = start_rows(half, torch.rand(500, 1))
    for _ in range(20):
        rows = hmc_step(half, rows.with_momentum(), torch.eye(1), jittered(1.5, 1.5, rows.x), 5).rows
    assert bool((rows.x > 0).all()) and bool(torch.isfinite(rows.log_density).all())


def banana(x):
    """A bent density with a quartic tail, and its gradient."""
    bend = x[:, 1] - 0.3 * x[:, 0].square()
    value = -x[:, 0].square() / 8 - bend.square() / 2 - 0.1 * x[:, 1] ** 4
    return value, torch.stack([-x[:, 0] / 4 + 0.6 * x[:, 0] * bend, -bend - 0.4 * x[:, 1] ** 3], 1)


@pytest.mark.parametrize("per_row", [False, True])
def test_a_transition_and_its_way_back_have_the_same_flow(per_row):
    # pi(x) N(r) alpha(x, r -> x', r') is what the flipped end sends back: exact, row by row, without a chain
    num = 2000
    scale = torch.tensor([[0.5, 0.0], [0.3, 2.0]])
    scale = scale * (0.5 + torch.rand(num, 1, 1)) if per_row else scale
    step = jittered(0.5, 3.0, torch.zeros(num, 2))
    start = start_rows(banana, torch.randn(num, 2)).with_momentum()
    there = hmc_step(banana, start, scale, step, 4)
    row = there.accepted
    assert 0.1 < float(row.double().mean()) < 0.95  # the accept step matters
    end = leapfrog(start, banana, scale, step, 4)
    assert torch.equal(there.rows.x[row], end.x[row]) and torch.equal(there.rows.x[~row], start.x[~row])
    back = hmc_step(banana, end._replace(momentum=-end.momentum), scale, step, 4)
    calm = torch.maximum(start.energy, end.energy) < 50  # rounding grows where a trajectory is thrown far off
    for made in (there, back):
        torch.testing.assert_close(made.accept_prob[calm], torch.exp(-made.energy_error.clamp_min(0.0))[calm])
    assert int(calm.sum()) > 1500
    flow, reverse = (-p.energy - t.energy_error.clamp_min(0.0) for p, t in ((start, there), (end, back)))
    torch.testing.assert_close(flow[calm], reverse[calm], rtol=1e-10, atol=1e-10)


def test_the_accept_step_is_symmetric_between_any_two_points():
    # pi(x) q(x, y) alpha(x, y) = pi(y) q(y, x) alpha(y, x) whatever the densities
    log_pi, log_q = 5 * torch.randn(2, 10_000), 5 * torch.randn(2, 10_000)
    log_ratio = (log_pi[1] + log_q[1]) - (log_pi[0] + log_q[0])
    state = Rows(torch.zeros(10_000, 1), log_pi[0], torch.zeros(10_000, 1))
    other = Rows(torch.ones(10_000, 1), log_pi[1], torch.ones(10_000, 1))
    moved, there, accepted = metropolis(state, other, log_ratio)
    _, back, _ = metropolis(other, state, -log_ratio)
    torch.testing.assert_close(
        log_pi[0] + log_q[0] + there.log(), log_pi[1] + log_q[1] + back.log(), rtol=1e-12, atol=1e-12
    )
    for part, old, new in zip(moved, state, other):  # one test decides on all that belongs to a row
        at = accepted.reshape(-1, *[1] * (part.dim() - 1))
        assert torch.equal(part, torch.where(at, new, old))


def test_energy_errors_beyond_a_thousand_nats_and_nan_are_divergences():
    rows = start_rows(normal, torch.randn(300, 2))
    wild = hmc_step(normal, rows.with_momentum(), torch.eye(2), torch.tensor(1e4), 5)
    assert bool(wild.diverging.all()) and not bool(wild.accepted.any()) and torch.equal(wild.rows.x, rows.x)
    tame = hmc_step(normal, rows.with_momentum(), torch.eye(2), torch.tensor(0.1), 5)
    assert not bool(tame.diverging.any())
    value, error = normal(tame.rows.x)[0], tame.energy_error
    torch.testing.assert_close(tame.accept_prob, torch.exp((-error).clamp_max(0)))
    torch.testing.assert_close(tame.rows.log_density, value)
    nowhere = hmc_step(lambda x: (x[:, 0] * torch.nan, x), rows.with_momentum(), torch.eye(2), torch.tensor(0.1), 2)
    assert bool(nowhere.diverging.all()) and nowhere.accept_prob.abs().max() == 0


def test_a_step_size_goes_where_its_own_column_asks():
    rates = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).flatten()  # two columns, fastest
    steps = adapted(torch.tensor([1.0, 1.0]), rates, 0.8, 2.0)
    torch.testing.assert_close(steps, torch.tensor([1.0, math.exp(2 * (0.2 - 0.8))]))
    assert adapted(0.5, rates, 0.5, 3.0) == pytest.approx(0.5)
    factors = jittered(torch.tensor([[2.0], [4.0]]).repeat(500, 1), 5.0, torch.zeros(1000, 1))
    own = factors[:, 0] / torch.tensor([2.0, 4.0]).repeat(500)
    assert own.min() >= 0.2 and own.max() <= 1 and own.min() < 0.22 and own.max() > 0.97
