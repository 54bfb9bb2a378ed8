"""Every move is reversible with respect to the target: pointwise, without a chain."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.moves import BridgeMove, HamiltonianMove, HamiltonianStep, IndexMove, Rows, metropolis
from pyro_sb.ops.leapfrog import PhasePoint, leapfrog
from pyro_sb.ops.student_mixture import StudentMixture

DIM = 3


def bent(z: Tensor) -> Tensor:
    """A banana with a quartic tail: no move is calibrated to it."""
    return -0.5 * (z[:, 0] / 2) ** 2 - 0.5 * (z[:, 1] - 0.3 * z[:, 0] ** 2) ** 2 - 0.1 * z[:, 2] ** 4


def target() -> LogJoint:
    return LogJoint.from_batched(bent, DIM)


def mixture(num: int = 3) -> StudentMixture:
    trils = torch.tril(torch.randn(num, DIM, DIM, dtype=torch.float64)) * 0.3
    trils.diagonal(dim1=-2, dim2=-1).copy_(torch.rand(num, DIM, dtype=torch.float64) + 0.5)
    df = torch.tensor([4.0, math.inf, 9.0], dtype=torch.float64)[:num]
    log_weights = torch.log_softmax(torch.randn(num, dtype=torch.float64), 0)
    return StudentMixture(log_weights, torch.randn(num, DIM, dtype=torch.float64), trils, df)


def pairs(num: int = 1000) -> tuple[Tensor, Tensor]:
    return 1.5 * torch.randn(num, DIM, dtype=torch.float64), 1.5 * torch.randn(num, DIM, dtype=torch.float64)


def assert_detailed_balance(
    log_pi_x: Tensor, log_q_xy: Tensor, ratio_xy: Tensor, log_pi_y: Tensor, log_q_yx: Tensor, ratio_yx: Tensor
) -> None:
    """pi(x) q(x, y) alpha(x, y) is symmetric in x and y."""
    flow_xy = log_pi_x + log_q_xy + ratio_xy.clamp_max(0.0)
    flow_yx = log_pi_y + log_q_yx + ratio_yx.clamp_max(0.0)
    torch.testing.assert_close(flow_xy, flow_yx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 4.0, 1e6])
@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_bridge_move_is_in_detailed_balance(epsilon: float, fraction: float) -> None:
    points = torch.randn(40, DIM, dtype=torch.float64)
    metric = torch.tensor([[1.0, 0.4, 0.0], [0.4, 2.0, 0.1], [0.0, 0.1, 0.5]], dtype=torch.float64)
    bridge = KernelLangevinBridge(DIM, epsilon=epsilon, metric=metric, scheme="plain")
    bridge.fit(points, weights=torch.rand(40, dtype=torch.float64) + 0.1, progress=False)
    tau = fraction * min(epsilon / 2, 3.0)
    move = BridgeMove(bridge, tau)
    x, y = pairs()
    covariance = (1 - math.exp(-2 * math.asinh(tau))) * metric
    log_q_xy = MultivariateNormal(move.mean(x), covariance).log_prob(y)
    log_q_yx = MultivariateNormal(move.mean(y), covariance).log_prob(x)
    ratio_xy = move.log_ratio(x, bent(x), y, bent(y), move.log_proposal(x, y))
    ratio_yx = move.log_ratio(y, bent(y), x, bent(x), move.log_proposal(y, x))
    assert_detailed_balance(bent(x), log_q_xy, ratio_xy, bent(y), log_q_yx, ratio_yx)


@pytest.mark.parametrize("epsilon", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
def test_bridge_move_accepts_every_proposal_on_a_gaussian(epsilon: float, fraction: float) -> None:
    # for N(0, S) the bridge's mean is A x, and the calibrated noise makes the proposal reversible at every step
    variance = 1.7
    nodes = torch.linspace(-14, 14, 1201, dtype=torch.float64)
    weights = torch.softmax(-0.5 * nodes**2 / variance, 0)
    bridge = KernelLangevinBridge(
        1, epsilon=epsilon, metric=torch.tensor([[variance]], dtype=torch.float64), scheme="plain"
    )
    bridge.fit(nodes[:, None], weights=weights, progress=False)
    move = BridgeMove(bridge, fraction * epsilon / 2)
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    y = x.flip(0) + 0.37
    log_pi = lambda z: -0.5 * z[:, 0] ** 2 / variance  # noqa: E731
    ratio = move.log_ratio(x, log_pi(x), y, log_pi(y), move.log_proposal(x, y))
    torch.testing.assert_close(ratio, torch.zeros_like(ratio), rtol=0, atol=1e-4)


def test_bridge_move_contracts_to_the_bridge_mean_at_its_own_bandwidth() -> None:
    points = torch.randn(30, DIM, dtype=torch.float64)
    bridge = KernelLangevinBridge(DIM, epsilon=2.0, metric="identity", scheme="plain")
    bridge.fit(points, progress=False)
    x = torch.randn(7, DIM, dtype=torch.float64)
    torch.testing.assert_close(BridgeMove(bridge, 1.0).mean(x), bridge.conditional_mean(x))
    assert BridgeMove(bridge, 50.0).step_size == 1.0  # a step cannot exceed the bandwidth


@pytest.mark.parametrize("steps", [None, 1, 5])
def test_index_move_is_in_detailed_balance(steps: int | None) -> None:
    rho = mixture()
    transition = None
    if steps is not None:
        coupling = torch.rand(3, 3, dtype=torch.float64)
        coupling = torch.diag(rho.log_weights.exp()) + 0.02 * (coupling + coupling.T)
        weights = coupling.sum(1)
        rho = rho._replace(log_weights=(weights / weights.sum()).log())
        transition = torch.linalg.matrix_power(coupling / weights[:, None], steps)
    move = IndexMove(rho, transition)
    x, y = pairs()
    ratio_xy = move.log_ratio(bent(x), rho.log_prob(x), bent(y), rho.log_prob(y))
    ratio_yx = move.log_ratio(bent(y), rho.log_prob(y), bent(x), rho.log_prob(x))
    assert_detailed_balance(bent(x), move.log_proposal(x, y), ratio_xy, bent(y), move.log_proposal(y, x), ratio_yx)


@pytest.mark.parametrize("steps", [None, 2])
def test_index_move_proposes_what_its_density_says(steps: int | None) -> None:
    rho = mixture()
    coupling = torch.diag(rho.log_weights.exp()) + 0.05
    weights = coupling.sum(1)
    rho = rho._replace(log_weights=(weights / weights.sum()).log(), df=torch.full((3,), math.inf, dtype=torch.float64))
    transition = None if steps is None else torch.linalg.matrix_power(coupling / weights[:, None], steps)
    move = IndexMove(rho, transition)
    x = torch.randn(1, DIM, dtype=torch.float64).expand(100_000, DIM)
    y = move.propose(x)
    # E_q[f(y)] = E_r[f(y) q(x, y) / r(y)] for a wide normal r
    wide = MultivariateNormal(torch.zeros(DIM, dtype=torch.float64), 9.0 * torch.eye(DIM, dtype=torch.float64))
    z = wide.sample((100_000,))
    weight = torch.exp(move.log_proposal(x, z) - wide.log_prob(z))
    for f in (lambda v: v[:, 0], lambda v: v[:, 1] * v[:, 2], lambda v: (v[:, 0] > 0.5).double()):
        direct, weighted = f(y), f(z) * weight
        error = math.sqrt(float(direct.var() + weighted.var()) / len(y))
        assert abs(float(direct.mean() - weighted.mean())) < 4 * error


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_hamiltonian_trajectory_is_an_involution_of_unit_jacobian(num: int, num_steps: int) -> None:
    # with the momentum flip: reversible and volume preserving, so exp(H - H') is the Metropolis ratio
    move = HamiltonianMove(mixture(num), num_steps)
    log_joint = target()
    x, momentum = (part[:50] for part in pairs())
    component = torch.randint(num, (50,))
    step = torch.full((50, 1), 0.2, dtype=torch.float64)

    def advance(x: Tensor, momentum: Tensor) -> PhasePoint:
        return leapfrog(
            PhasePoint(x, momentum, *move.local_target(log_joint, x, component)),
            lambda z: move.local_target(log_joint, z, component),
            move.mixture.scale_trils[component],
            step,
            num_steps,
        )

    end = advance(x, momentum)
    back = advance(end.x, -end.momentum)
    torch.testing.assert_close(back.x, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(-back.momentum, momentum, rtol=1e-12, atol=1e-12)
    start_energy = 0.5 * momentum.square().sum(-1) - move.local_target(log_joint, x, component)[0]
    torch.testing.assert_close(back.energy, start_energy, rtol=1e-12, atol=1e-12)
    h = 1e-6
    columns = []
    for i in range(2 * DIM):
        shift = torch.zeros(1, 2 * DIM, dtype=torch.float64)
        shift[0, i] = h
        up, down = (advance(x + sign * shift[:, :DIM], momentum + sign * shift[:, DIM:]) for sign in (1, -1))
        columns.append((torch.cat([up.x, up.momentum], 1) - torch.cat([down.x, down.momentum], 1)) / (2 * h))
    determinant = torch.linalg.det(torch.stack(columns, -1))
    torch.testing.assert_close(determinant, torch.ones_like(determinant), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num", [1, 3])
def test_hamiltonian_step_accepts_by_the_energy_of_its_own_trajectory(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pi(x) r_k(x) N(r) alpha is the same forwards and backwards, with the alpha that step() uses
    move, log_joint = HamiltonianMove(mixture(num), 4, 0.5, spread=1.0), target()
    seen: list[tuple[PhasePoint, Tensor, HamiltonianStep]] = []
    walk = move.trajectory

    def spy(joint: LogJoint, start: PhasePoint, component: Tensor) -> HamiltonianStep:
        seen.append((start, component, walk(joint, start, component)))
        return seen[-1][2]

    monkeypatch.setattr(move, "trajectory", spy)
    x = torch.randn(200, DIM, dtype=torch.float64)
    moved = move.step(log_joint, x, bent(x))
    start, component, there = seen[0]
    local = lambda z: move.local_target(log_joint, z, component)  # noqa: E731
    scale, step = move.mixture.scale_trils[component], torch.tensor(0.5, dtype=torch.float64)
    end = leapfrog(start, local, scale, step, 4)
    back = walk(log_joint, end._replace(momentum=-end.momentum), component)
    assert torch.equal(moved.accept_prob, there.accept_prob)
    flow = -start.energy + moved.accept_prob.log()
    torch.testing.assert_close(flow, -end.energy + back.accept_prob.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        start.energy, 0.5 * start.momentum.square().sum(-1) - local(x)[0], rtol=1e-12, atol=1e-12
    )


def test_local_targets_sum_to_the_target_and_their_gradients_match() -> None:
    # sum over k of pi(x) r_k(x) = pi(x): drawing k and moving on pi r_k leaves pi invariant
    rho = mixture()
    move, log_joint = HamiltonianMove(rho, 2), target()
    x = torch.randn(20, DIM, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(20, dtype=torch.float64)
    for k in range(3):
        component = torch.full((20,), k)
        value, grad = move.local_target(log_joint, x.detach(), component)
        total = total + value.exp()
        by_autograd = torch.autograd.grad((bent(x) + rho.log_responsibilities(x)[:, k]).sum(), x)[0]
        torch.testing.assert_close(grad, by_autograd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total, bent(x).exp().detach())


@pytest.mark.parametrize("make", [lambda: IndexMove(mixture()), lambda: HamiltonianMove(mixture(), 3, 0.4)])
def test_moves_carry_the_log_density_of_their_state(make) -> None:
    x = torch.randn(200, DIM, dtype=torch.float64)
    for _ in range(5):
        moved = make().step(target(), x, bent(x))
        x = moved.x
        torch.testing.assert_close(moved.log_density, bent(x), rtol=1e-10, atol=1e-10)


def test_metropolis_rejects_nan_and_accepts_certain_gains() -> None:
    x, y = (Rows(value, value[:, 0], value) for value in (torch.zeros(3, 1), torch.ones(3, 1)))
    log_ratio = torch.tensor([float("nan"), 5.0, -math.inf])
    moved, probability, accepted = metropolis(x, y, log_ratio)
    assert moved.x[:, 0].tolist() == moved.log_density.tolist() == [0.0, 1.0, 0.0]
    assert probability.tolist() == [0.0, 1.0, 0.0] and accepted.tolist() == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["bridge", "index", "hmc"])
def test_moves_leave_the_target_invariant(role: str) -> None:
    # chains started from exact draws keep the target's moments: z-scores over independent chains
    torch.manual_seed(1)
    num = 40_000
    first = 2 * torch.randn(num, dtype=torch.float64)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    cumulative = torch.exp(-0.1 * grid**4).cumsum(0)
    third = grid[torch.searchsorted(cumulative / cumulative[-1], torch.rand(num, dtype=torch.float64)).clamp_max(4000)]
    x = torch.stack([first, torch.randn(num, dtype=torch.float64) + 0.3 * first**2, third], 1)
    bridge = KernelLangevinBridge(DIM, epsilon=2.0, metric="covariance", scheme="plain")
    bridge.fit(x[:200], progress=False)
    move = {
        "bridge": BridgeMove(bridge, 0.3),
        "index": IndexMove(mixture()),
        "hmc": HamiltonianMove(mixture(), 3, 0.3),
    }[role]
    y, log_density = x, bent(x)
    for _ in range(5):
        moved = move.step(target(), y, log_density)
        y, log_density = moved.x, moved.log_density
    for f in (
        lambda v: v[:, 0],
        lambda v: v[:, 0] ** 2,
        lambda v: v[:, 1],
        lambda v: v[:, 2] ** 2,
        lambda v: (v[:, 1] > 3).double(),
    ):
        change = f(y) - f(x)
        assert abs(float(change.mean())) < 4 * float(change.std()) / math.sqrt(num)
