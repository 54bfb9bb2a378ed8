"""Warp jumps leave the target invariant for any mixture: by quadrature, pointwise, and by moments of chains."""

import math

import pytest
import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.warp import WarpMove, jump_ceiling, jump_matrix
from pyro_sb.ops.student_mixture import StudentMixture

F64 = {"dtype": torch.float64}


def mixture(num: int, dim: int, df: float = math.inf) -> StudentMixture:
    """Overlapping components of random shapes: no fit of any target here."""
    trils = torch.tril(torch.randn(num, dim, dim, **F64)) * 0.3
    trils.diagonal(dim1=-2, dim2=-1).copy_(torch.rand(num, dim, **F64) + 0.5)
    log_weights = torch.log_softmax(torch.randn(num, **F64), 0)
    return StudentMixture(log_weights, 1.5 * torch.randn(num, dim, **F64), trils, torch.full((num,), df, **F64))


def rugged(x: Tensor) -> Tensor:
    """A smooth law on the line with two unequal humps."""
    x = x[:, 0]
    return torch.logaddexp(-0.5 * (x + 1.2) ** 2, 0.4 - 1.5 * (x - 1.4) ** 2) - 0.01 * x**4


def bananas(x: Tensor) -> Tensor:
    """Two overlapping bananas of opposite curvature in five dimensions, shares .3 and .7."""
    hump = lambda y, b: -0.5 * (y[:, 0] ** 2 + (y[:, 1] - b * (y[:, 0] ** 2 - 1)) ** 2 + (y[:, 2:] ** 2).sum(1))  # noqa: E731
    shift = torch.tensor([1.0, 1.5, -0.5, 0.0, 0.5], **F64)
    return torch.logaddexp(math.log(0.3) + hump(x + shift, 0.5), math.log(0.7) + hump(x - shift, -0.5))


def draws_of_bananas(num: int) -> Tensor:
    x, first = torch.randn(num, 5, **F64), torch.rand(num, 1, **F64) < 0.3
    b, shift = torch.where(first, 0.5, -0.5)[:, 0], torch.tensor([1.0, 1.5, -0.5, 0.0, 0.5], **F64)
    x[:, 1] += b * (x[:, 0] ** 2 - 1)
    return torch.where(first, x - shift, x + shift)


TESTED = [torch.sin, torch.square, lambda x: torch.sigmoid(4 * x), lambda x: torch.exp(-((x - 1) ** 2))]


def invariance_error(move: WarpMove, dropped: str | None = None, momenta: int = 1) -> float:
    """Largest change of an expectation in one step from the target, by quadrature, momenta included."""
    log_joint = LogJoint.from_batched(rugged, 1)
    grid = torch.linspace(-7, 7, 2801 if momenta == 1 else 561, **F64)[:, None]
    log_pi = rugged(grid)
    weights = torch.softmax(log_pi, 0)
    log_share = move.components.whiten(grid)[1]
    steps = torch.linspace(-5, 5, momenta, **F64) if momenta > 1 else torch.zeros(1, **F64)
    normal = torch.softmax(-0.5 * steps**2, 0)
    change = torch.zeros(len(TESTED), **F64)
    num = move.mixture.num_components
    for i in range(num):
        for j in range(num):
            if move.transition[i, j] == 0:
                continue
            here, there = torch.full((len(grid),), i), torch.full((len(grid),), j)
            for p, mass in zip(steps, normal, strict=True):
                warped = move.warped(log_joint, grid, log_pi, here, there, p.expand(len(grid), 1))
                log_ratio = warped.log_ratio + move.log_jump(here, there)
                if dropped == "determinant":
                    trils = move.mixture.scale_trils[:, 0, 0].log()
                    log_ratio = log_ratio - trils[j] + trils[i]
                elif dropped == "responsibility":
                    log_ratio = log_ratio - move.components.whiten(warped.x)[1][:, j] + log_share[:, i]
                elif dropped == "momentum":
                    assert warped.momentum is not None
                    log_ratio = log_ratio - 0.5 * (p**2 - warped.momentum[:, 0] ** 2)
                flow = mass * weights * log_share[:, i].exp() * move.transition[i, j] * log_ratio.clamp_max(0).exp()
                change += torch.stack([(flow * (f(warped.x[:, 0]) - f(grid[:, 0]))).sum() for f in TESTED])
    return float(change.abs().max())


@pytest.mark.parametrize("df", [math.inf, 4.0])
@pytest.mark.parametrize("num", [2, 3])
def test_a_step_from_the_target_leads_to_the_target(num: int, df: float) -> None:
    rho = mixture(num, 1, df)
    assert invariance_error(WarpMove(rho)) < 2e-6
    transition = torch.softmax(torch.randn(num, num, **F64), -1)  # any P, staying in the component too
    assert invariance_error(WarpMove(rho, transition)) < 2e-6
    for dropped in ("determinant", "responsibility"):
        assert invariance_error(WarpMove(rho), dropped) > 1e-3


def test_an_annealed_step_from_the_target_leads_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    move = WarpMove(mixture(2, 1), num_steps=4, leap=0.4)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.5, **F64))  # one leap
    assert invariance_error(move, momenta=161) < 2e-5
    for dropped in ("determinant", "responsibility", "momentum"):
        assert invariance_error(move, dropped, momenta=161) > 1e-3


@pytest.mark.parametrize("num_steps", [0, 5])
def test_the_way_back_has_the_opposite_ratio(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    move, log_joint = WarpMove(mixture(3, 5, 6.0), num_steps=num_steps, leap=0.2), LogJoint.from_batched(bananas, 5)
    x, momentum = draws_of_bananas(200), torch.randn(200, 5, **F64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.3, **F64))
    here = torch.randint(3, (200,))
    there = (here + torch.randint(1, 3, (200,))) % 3
    out = move.warped(log_joint, x, bananas(x), here, there, momentum)
    assert (out.x - x).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(out.log_density, bananas(out.x), rtol=1e-12, atol=1e-12)
    end = None if out.momentum is None else -out.momentum
    back = move.warped(log_joint, out.x, out.log_density, there, here, end)
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(back.log_ratio, -out.log_ratio, rtol=1e-9, atol=1e-9)
    if num_steps:
        torch.testing.assert_close(back.momentum, -momentum, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_the_map_stretches_volume_by_its_factors(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the Jacobian of (x, p) to (y, p'), by differences, is |L_j| / |L_i|
    move, log_joint = WarpMove(mixture(2, 5), num_steps=num_steps, leap=0.2), LogJoint.from_batched(bananas, 5)
    x, momentum = draws_of_bananas(20), torch.randn(20, 5, **F64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.3, **F64))
    here, there = torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.long)

    def end(state: Tensor) -> Tensor:
        out = move.warped(log_joint, state[:, :5], bananas(state[:, :5]), here, there, state[:, 5:])
        return torch.cat([out.x, state[:, 5:] if out.momentum is None else out.momentum], 1)

    start, step = torch.cat([x, momentum], 1), 1e-5
    columns = [(end(start + step * e) - end(start - step * e)) / (2 * step) for e in torch.eye(10, **F64)]
    log_det = torch.linalg.slogdet(torch.stack(columns, -1)).logabsdet
    trils = move.mixture.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    torch.testing.assert_close(log_det, (trils[1] - trils[0]).expand(20), rtol=0, atol=1e-6)


def test_jumps_between_gaussians_of_any_shape_have_one_ratio() -> None:
    # modes far apart, the mixture is the target but for its weights: every jump accepts by the shares alone
    target = mixture(3, 20)._replace(locs=60 * torch.randn(3, 20, **F64))
    move, log_joint = WarpMove(target._replace(log_weights=torch.full((3,), -math.log(3), **F64))), None
    log_joint = LogJoint.from_batched(target.log_prob, 20)
    x = target.sample_components(torch.arange(3).repeat(20))
    here = torch.arange(3).repeat(20)
    there = (here + 1) % 3
    out = move.warped(log_joint, x, target.log_prob(x), here, there)
    torch.testing.assert_close(out.log_ratio, target.log_weights[there] - target.log_weights[here], rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_steps", [0, 2])
def test_steps_carry_the_log_density_of_their_state_and_rows_stand_alone(num_steps: int) -> None:
    move, log_joint = WarpMove(mixture(3, 5), num_steps=num_steps), LogJoint.from_batched(bananas, 5)
    x = draws_of_bananas(300)
    for _ in range(4):
        moved = move.step(log_joint, x, bananas(x))
        assert 0 < float((moved.x != x).any(1).double().mean()) < 1
        x = moved.x
        torch.testing.assert_close(moved.log_density, bananas(x), rtol=1e-10, atol=1e-10)
    here, there = torch.arange(300) % 3, (torch.arange(300) + 1) % 3
    if num_steps == 0:
        together = move.warped(log_joint, x, bananas(x), here, there)
        alone = move.warped(log_joint, x[7:8], bananas(x[7:8]), here[7:8], there[7:8])
        torch.testing.assert_close(together.x[7:8], alone.x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.log_ratio[7:8], alone.log_ratio, rtol=1e-10, atol=1e-10)


def test_a_wall_is_a_rejection() -> None:
    walled = lambda x: torch.where(x[:, 0] < 0, -0.5 * (x[:, 0] + 2) ** 2, -math.inf)  # noqa: E731
    rho = StudentMixture(
        torch.full((2,), math.log(0.5), **F64),
        torch.tensor([[-2.0], [2.0]], **F64),
        torch.ones(2, 1, 1, **F64),
        torch.full((2,), math.inf, **F64),
    )
    x = torch.full((10, 1), -2.0, **F64)
    for num_steps in (0, 4):
        moved = WarpMove(rho, num_steps=num_steps).step(LogJoint.from_batched(walled, 1), x, walled(x))
        assert (moved.x < 0).all() and torch.isfinite(moved.log_density).all()


def test_jumps_lead_to_other_modes_only() -> None:
    log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4], **F64).log()
    groups = torch.tensor([0, 0, 1, 2])
    transition = jump_matrix(log_weights, groups)
    torch.testing.assert_close(transition.sum(1), torch.ones(4, **F64))
    assert transition[:2, :2].abs().max() == 0 and transition[2, 2] == transition[3, 3] == 0
    torch.testing.assert_close(transition[0, 2:], torch.tensor([3 / 7, 4 / 7], **F64))
    assert jump_ceiling(log_weights[:2].softmax(0).log(), jump_matrix(log_weights[:2].log_softmax(0))) == pytest.approx(
        2 / 3
    )
    with pytest.raises(ValueError, match="two modes"):
        jump_matrix(log_weights, torch.zeros(4))
    with pytest.raises(ValueError, match="two components"):
        WarpMove(mixture(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 6])
def test_chains_of_jumps_keep_the_moments_of_bananas(num_steps: int) -> None:
    # from exact draws, five jumps under a distorted mixture: z-scores over independent chains
    num = 100_000 if num_steps == 0 else 40_000
    x = draws_of_bananas(num)
    rho = mixture(2, 5)._replace(locs=torch.tensor([[-1.3, -1.0, 0.5, 0.3, -0.5], [0.8, 1.2, 0.0, 0.0, 0.5]], **F64))
    move, log_joint = WarpMove(rho, num_steps=num_steps, leap=0.3), LogJoint.from_batched(bananas, 5)
    y, log_density, rate = x, bananas(x), 0.0
    for _ in range(5):
        moved = move.step(log_joint, y, log_density)
        y, log_density, rate = moved.x, moved.log_density, rate + float(moved.accept_prob.mean()) / 5
    assert rate > 0.1
    for f in (
        lambda v: v[:, 0],
        lambda v: v[:, 1],
        lambda v: v[:, 1] ** 2,
        lambda v: v[:, 0] * v[:, 1],
        lambda v: v[:, 4] ** 2,
    ):
        change = f(y) - f(x)
        assert abs(float(change.mean())) < 4 * float(change.std()) / math.sqrt(num)
