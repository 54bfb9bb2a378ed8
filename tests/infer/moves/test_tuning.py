"""Tuning of moves on moves whose answers are known, and the mixture's floors."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import Transition
from pyro_sb.infer.moves.tuning import ChainStates, Tuned, local_floor, share_moves, tune

F64 = {"dtype": torch.float64}
JOINT = LogJoint.from_batched(lambda z: -z.square().sum(1) / 2, 2)


@dataclass
class Stride:
    """Every chain goes ``step_size`` along ``direction``, and says that it accepts with probability exp(-step_size)."""

    direction: torch.Tensor
    step_size: float
    cost: float = 1.0
    target_accept: float = 0.6
    name: str = "stride"

    def step(self, log_joint, x, log_density):
        size = self.step_size or 1.0
        accept = torch.full_like(log_density, math.exp(-size))
        return Transition(
            x + size * self.direction, log_density - size, accept, torch.zeros_like(accept, dtype=torch.bool)
        )


def batch():
    return ChainStates(torch.zeros(5, 2, **F64), torch.zeros(5, **F64))


@pytest.mark.parametrize("start", [0.05, 0.3, 4.0])
@pytest.mark.parametrize("target_accept", [0.3, 0.8])
def test_the_step_goes_to_the_target_acceptance(start, target_accept):
    move = Stride(torch.ones(2, **F64), start, target_accept=target_accept)
    tuned, _ = tune(move, JOINT, batch(), torch.eye(2, **F64))
    assert tuned.move is move
    assert tuned.acceptance == pytest.approx(math.exp(-move.step_size))
    assert tuned.acceptance == pytest.approx(target_accept, abs=0.1)


def test_nothing_to_tune_is_left_alone_and_the_batch_walks_on():
    tuned, after = tune(Stride(torch.ones(2, **F64), 0.0), JOINT, batch(), torch.eye(2, **F64))
    assert tuned.move.step_size == 0.0
    assert tuned.acceptance == pytest.approx(math.exp(-1))
    steps = float(after.x[0, 0])
    assert steps >= 1
    torch.testing.assert_close(after.log_density, torch.full((5,), -steps, **F64))


def test_efficiency_is_the_slowest_squared_jump_in_the_metric_per_cost():
    # x moves by (3, 4); in the metric with factor L the jump is L^-1 (3, 4) = (1.5, 1): slowest squared 1, cost 4
    metric = torch.tensor([[2.0, 0.0], [1.0, 2.5]], **F64)
    move = Stride(torch.tensor([3.0, 4.0], **F64), 0.0, cost=4.0)
    tuned, _ = tune(move, JOINT, batch(), metric)
    assert tuned.efficiency == pytest.approx(0.25, rel=1e-12)


def test_efficiency_does_not_depend_on_coordinates():
    metric, matrix = torch.tensor([[2.0, 0.0], [1.0, 2.5]], **F64), torch.tensor([[0.01, 0.0], [3.0, 40.0]], **F64)
    direction = torch.tensor([3.0, -1.0], **F64)
    plain, _ = tune(Stride(direction, 0.0), JOINT, batch(), metric)
    mapped, _ = tune(Stride(matrix @ direction, 0.0), JOINT, batch(), matrix @ metric)
    assert mapped.efficiency == pytest.approx(plain.efficiency, rel=1e-12)


efficiencies = st.floats(0, 1e6)


@given(
    st.tuples(efficiencies, efficiencies, efficiencies),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
@settings(deadline=None)
def test_probabilities_sum_to_one_and_keep_their_floors(efficiency, acceptance, floor, with_local):
    roles = ("bridge", "index", "local") if with_local else ("bridge", "index")
    tuned = {role: Tuned(None, acceptance, value) for role, value in zip(roles, efficiency)}
    shares = share_moves(tuned, floor)
    assert set(shares) == set(roles)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert all(-1e-12 <= share <= 1 + 1e-12 for share in shares.values())
    assert shares["bridge"] >= floor - 1e-12
    floors = {"bridge": floor, "index": 0.1, "local": local_floor(acceptance)}
    total = sum(floors[role] for role in roles)
    winner = max(roles, key=lambda role: tuned[role].efficiency)
    if total <= 1:
        assert all(shares[role] >= floors[role] - 1e-12 for role in roles)
        assert shares[winner] == pytest.approx(floors[winner] + 1 - total, abs=1e-12)
    else:  # the others shrink in proportion
        rest = [role for role in roles if role != "bridge"]
        assert all(
            shares[role] == pytest.approx(floors[role] * (1 - floor) / (total - floor), abs=1e-12) for role in rest
        )


def test_the_local_floor_falls_without_jumps_from_half_to_a_twentieth():
    values = torch.tensor([local_floor(i / 1000) for i in range(1001)], **F64)
    torch.testing.assert_close(values[[0, -1]], torch.tensor([0.5, 0.05], **F64))
    assert values.diff().max() <= 1e-12
    assert values.diff().abs().max() < 3e-3
