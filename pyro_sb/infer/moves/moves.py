r"""Metropolis moves of a batch of chains, :math:`\alpha = \min\{1, e^{\text{log ratio}}\}`: one accept, one HMC step.

A move draws proposals for all chains at once and accepts each by :func:`metropolis`; Hamiltonian moves do so through
:func:`hmc_step`. What a move learnt is frozen, and its proposal density depends on the present point alone, so each
leaves the target exactly invariant.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.components import Components
from pyro_sb.ops.leapfrog import PhasePoint, SharedFactors, leapfrog
from pyro_sb.ops.student_mixture import StudentMixture

__all__ = [
    "BridgeMove",
    "HamiltonianMove",
    "HamiltonianStep",
    "IndexMove",
    "Move",
    "Proposed",
    "Rows",
    "Transition",
    "adapted",
    "hmc_step",
    "jittered",
    "metropolis",
    "start_rows",
]

MAX_ENERGY_ERROR = 1000.0
"""Energy error of a trajectory, in nats, above which it diverged."""

ROWS_A_CALL = 2048
"""Rows of one call of the log joint, where proposals are scored ahead."""

Target = Callable[[Tensor], tuple[Tensor, Tensor]]


class Point(NamedTuple):
    """States ``(C, d)`` and the target's log density there ``(C,)``."""

    x: Tensor
    log_density: Tensor


class Rows(NamedTuple):
    """States ``(C, d)`` with their log density ``(C,)`` and its gradient ``(C, d)``."""

    x: Tensor
    log_density: Tensor
    grad: Tensor

    def with_momentum(self) -> PhasePoint:
        """The same with fresh standard normal momenta."""
        return PhasePoint(self.x, torch.randn_like(self.x), self.log_density, self.grad)


State = TypeVar("State", bound=tuple)


def metropolis(state: State, proposal: State, log_ratio: Tensor) -> tuple[State, Tensor, Tensor]:
    r"""Each row's proposal with probability :math:`\min\{1, e^{\text{log ratio}}\}`; a NaN ratio is a rejection.

    Args:
        state: Named tuple of tensors with the rows first, such as `Rows`.
        proposal: The same at the proposed points.
        log_ratio: Log of :math:`\pi(y) q(y, x) / \pi(x) q(x, y)`. Shape ``(C,)``.

    Returns:
        The new states, the acceptance probabilities ``(C,)``, and which proposals were accepted ``(C,)``.

    References:
        Equation of state calculations by fast computing machines (Metropolis et al., 1953); Monte Carlo sampling
        methods using Markov chains (Hastings, 1970).
    """
    probability = torch.exp(log_ratio.clamp_max(0.0)).nan_to_num(0.0)
    accepted = torch.rand_like(probability) < probability
    parts = [
        torch.where(accepted.reshape(accepted.shape + (1,) * (old.dim() - 1)), new, old)
        for old, new in zip(state, proposal, strict=True)
    ]
    return type(state)(*parts), probability, accepted


class HamiltonianStep(NamedTuple):
    """One HMC transition of every row.

    Attributes:
        rows: Where the rows stand.
        accept_prob: Acceptance probabilities. Shape ``(C,)``.
        accepted: Which trajectories' ends were accepted. Shape ``(C,)``.
        energy_error: Hamiltonian at the trajectory's end less that at its start, in nats. Shape ``(C,)``.
    """

    rows: Rows
    accept_prob: Tensor
    accepted: Tensor
    energy_error: Tensor

    @property
    def diverging(self) -> Tensor:
        """Whether the energy error is above 1,000 nats, or not a number. Shape ``(C,)``."""
        return ~(self.energy_error < MAX_ENERGY_ERROR)


def hmc_step(
    target: Target, start: PhasePoint, scale: Tensor | SharedFactors, step_size: Tensor, num_steps: int
) -> HamiltonianStep:
    r"""One Hamiltonian Monte Carlo transition of every row, :math:`\alpha = \min\{1, e^{H(x, r) - H(x', r')}\}`.

    Exact for any target, metric and step, each a row's own if need be, as long as momenta are fresh and neither metric
    nor step depends on the state.

    Args:
        target: Log density and gradient, ``(C, d)`` to ``(C,)`` and ``(C, d)``.
        start: Rows with fresh momenta: `Rows.with_momentum`.
        scale: Factor of the metric, ``(d, d)`` or ``(C, d, d)``, or one a row of few.
        step_size: Leapfrog step in units of the metric, ``()`` or ``(C, 1)``; see `jittered`.
        num_steps: Leapfrog steps, at least 1; each costs one gradient.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), section 5.3.2, https://arxiv.org/abs/1206.1901
    """
    end = leapfrog(start, target, scale, step_size, num_steps)
    energy_error = end.energy - start.energy
    here, there = (Rows(point.x, point.log_density, point.grad) for point in (start, end))
    return HamiltonianStep(*metropolis(here, there, -energy_error), energy_error)


def start_rows(target: Target, x: Tensor) -> Rows:
    """Rows at given points: one gradient."""
    return Rows(x, *target(x))


def jittered(step_size: float | Tensor, spread: float, x: Tensor) -> Tensor:
    """A step for each row of x: ``step_size`` times a factor log-uniform in ``[1 / spread, 1]``. Shape ``(C, 1)``.

    The factor does not depend on the state. Large spreads serve rows of many widths under one metric.
    """
    return step_size * spread ** -torch.rand(len(x), 1, dtype=x.dtype, device=x.device)


def adapted(step_size: Any, accept_prob: Tensor, target_accept: float, gain: float) -> Any:
    r"""A step size after a transition, :math:`h\, e^{g (\bar\alpha - \alpha^*)}`.

    Args:
        step_size: h, one for all rows, or ``(B,)`` for rows that run over B columns fastest.
        accept_prob: Acceptance probabilities of the rows. Shape ``(C,)``, or ``(C * B,)``.
        target_accept: The rate that it aims at.
        gain: g; constant in a short warm-up, or falling as Robbins and Monro ask.
    """
    if isinstance(step_size, Tensor):
        rate = accept_prob.reshape(-1, len(step_size)).mean(0)
        return step_size * torch.exp(gain * (rate.to(step_size) - target_accept))
    return step_size * math.exp(gain * (float(accept_prob.mean()) - target_accept))


class Transition(NamedTuple):
    """New states ``(C, d)``, log densities, acceptance probabilities, and which proposals diverged, ``(C,)`` each.

    ``log_q`` is the log density of the states' own paths under the proposal that made them, ``(C,)``; None where it is
    to be drawn when it is needed.
    """

    x: Tensor
    log_density: Tensor
    accept_prob: Tensor
    diverging: Tensor
    log_q: Tensor | None = None


class Move(Protocol):
    """A transition that leaves the target invariant, as kernels and tuning ask for it.

    Attributes:
        name: Shown in reports.
        cost: Evaluations a step and chain, in density evaluations.
        step_size: Tuned length, ``(B,)`` for B targets side by side; 0 if there is nothing to tune.
        target_accept: Acceptance rate that the tuning aims at.
    """

    name: str
    cost: float
    step_size: Any
    target_accept: float

    @property
    def independent(self) -> bool:
        """Whether proposals do not depend on the state, and may be made ahead: `IndependentMove`."""

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain."""


class Proposed(NamedTuple):
    """Proposals drawn and scored ahead: points, the target's log density there, and the proposal's.

    Shapes ``(C, d)``, ``(C,)``, ``(C,)``, or with the tries N of a step before them.
    """

    x: Tensor
    log_density: Tensor
    log_q: Tensor


class IndependentMove(Move, Protocol):
    """A move whose proposals do not depend on the state, so that those of many steps are made in few calls.

    Attributes:
        num_proposals: Tries a step.
    """

    num_proposals: int

    def renew(self) -> None:
        """Draw what proposals share; log densities of paths must then be drawn again."""

    def ahead(self, log_joint: LogJoint, num_steps: int, num_chains: int) -> list[Proposed]:
        """Proposals for that many steps of every chain."""

    def accept(self, x: Tensor, log_density: Tensor, log_q: Tensor | None, ahead: Proposed) -> Transition:
        """One transition of every chain on proposals made ahead."""


class TransitionMean(Protocol):
    """What `BridgeMove` asks of a bridge, such as a `KernelLangevinBridge` of fixed bandwidth.

    Attributes:
        epsilon: Bandwidth.
        metric_cholesky: Factor of the metric. Shape ``(d, d)``.
    """

    epsilon: Any
    metric_cholesky: Tensor

    def conditional_mean(self, x: Tensor) -> Tensor:
        """m(x). Shapes ``(C, d)`` to ``(C, d)``."""


class BridgeMove:
    r"""Calibrated SB-pCN: the bridge's drift and the noise that makes it reversible for a Gaussian.

    .. math:: q(x, \cdot) = N\big(x + c\,(m(x) - x),\, (1 - A_\tau^2) K\big), \quad
              c = \frac{1 - A_\tau}{1 - A_\eta}, \quad A_s = e^{-\operatorname{asinh} s}

    for a step :math:`\tau \le \eta` of a bridge of bandwidth :math:`\eta = \epsilon / 2`, in units of its metric K.
    At the bridge's own bandwidth the mean is m(x) itself. It needs no gradient. As :math:`\eta \to \infty` it is
    preconditioned Crank-Nicolson.

    Args:
        bridge: The bridge, fitted.
        step_size: Step :math:`\tau` in (0, eta].

    References:
        arXiv 2401.04372 for m; the calibration is Gaussian algebra, tested as such.
    """

    name = "bridge"
    cost = 2.0
    independent = False
    target_accept = 0.6

    def __init__(self, bridge: TransitionMean, step_size: float = 0.3) -> None:
        self.bridge = bridge
        self.bandwidth = 0.5 * float(bridge.epsilon)
        self.step_size: float = min(step_size, self.bandwidth)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of the proposal. ``(C, d)`` to ``(C, d)``."""
        fraction = (1.0 - _contraction(self._tau)) / (1.0 - _contraction(self.bandwidth))
        return x + fraction * (self.bridge.conditional_mean(x) - x)

    def log_proposal(self, x: Tensor, y: Tensor) -> Tensor:
        """Log density of proposing y from x, up to a constant that both directions share. ``(C,)``."""
        return self._log_noise(y - self.mean(x))

    def log_ratio(self, x: Tensor, log_density: Tensor, y: Tensor, value: Tensor, forward: Tensor) -> Tensor:
        """Log Metropolis ratio of y from x, given the target's log densities and ``forward`` = log q(x, y)."""
        return value - log_density + self.log_proposal(y, x) - forward

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain: one density evaluation."""
        noise = torch.randn_like(x) @ self._noise_scale.T
        proposal = self.mean(x) + noise
        value = log_joint.log_prob(proposal)
        log_ratio = self.log_ratio(x, log_density, proposal, value, self._log_noise(noise))
        return _moved(Point(x, log_density), Point(proposal, value), log_ratio)

    @property
    def _tau(self) -> float:
        self.step_size = min(self.step_size, self.bandwidth)
        return self.step_size

    @property
    def _noise_scale(self) -> Tensor:
        return math.sqrt(1.0 - _contraction(self._tau) ** 2) * self.bridge.metric_cholesky

    def _log_noise(self, noise: Tensor) -> Tensor:
        return -0.5 * torch.linalg.solve_triangular(self._noise_scale, noise.T, upper=False).square().sum(0)


class IndexMove:
    r"""Jump between the components of a normalised mixture :math:`\rho = \sum_k w_k \rho_k` by a w-reversible matrix.

    Draw k from :math:`r_k(x) = w_k \rho_k(x) / \rho(x)`, k' from row k of P, and y from :math:`\rho_{k'}`. As
    :math:`w_k P_{kk'} = w_{k'} P_{k'k}`, the proposal is :math:`\rho`-reversible, so

    .. math:: \log\alpha = \log\pi(y) - \log\pi(x) + \log\rho(x) - \log\rho(y).

    Args:
        mixture: The mixture, with tails heavier than the target's.
        transition: Row-stochastic matrix with :math:`w_k P_{kk'}` symmetric, shape ``(K, K)``; the bridge's coupling
            of the components. None is its limit for a long time, rows all equal to w: then the proposals are
            independent of x and can be drawn ahead.
    """

    name = "index"
    cost = 1.0
    step_size = 0.0
    target_accept = 0.0
    num_proposals = 1

    def __init__(self, mixture: StudentMixture, transition: Tensor | None = None) -> None:
        self.mixture = mixture
        self.transition = transition

    def log_ratio(self, log_density: Tensor, log_mixture: Tensor, value: Tensor, value_mixture: Tensor) -> Tensor:
        """Log Metropolis ratio from the target's and the mixture's log densities at x and y. ``(C,)``."""
        return value - log_density + log_mixture - value_mixture

    def log_proposal(self, x: Tensor, y: Tensor) -> Tensor:
        """Log density of proposing y from x, in full. ``(C,)``."""
        if self.transition is None:
            return self.mixture.log_prob(y)
        log_jump = torch.logsumexp(self.mixture.log_responsibilities(x)[:, :, None] + self.transition.log(), 1)
        return torch.logsumexp(log_jump + self.mixture.component_log_prob(y), 1)

    def propose(self, x: Tensor) -> Tensor:
        """One proposal from every row of x. ``(C, d)`` to ``(C, d)``."""
        if self.transition is None:
            return self.mixture.sample(len(x))
        index = torch.multinomial(self.mixture.log_responsibilities(x).exp(), 1).squeeze(-1)
        jump = torch.multinomial(self.transition[index], 1).squeeze(-1)
        return self.mixture.sample_components(jump)

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain: one density evaluation."""
        proposal = self.propose(x)
        ahead = Proposed(proposal, log_joint.log_prob(proposal), self.mixture.log_prob(proposal))
        return self.accept(x, log_density, None, ahead)

    @property
    def independent(self) -> bool:
        """Whether its coupling has the limit of a long time."""
        return self.transition is None

    def renew(self) -> None:
        """Nothing is shared."""

    def ahead(self, log_joint: LogJoint, num_steps: int, num_chains: int) -> list[Proposed]:
        """Proposals for many steps, drawn and scored in few calls."""
        x = self.mixture.sample(num_steps * num_chains)
        log_density = torch.cat([log_joint.log_prob(part) for part in x.split(ROWS_A_CALL)])
        log_q = torch.cat([self.mixture.log_prob(part) for part in x.split(ROWS_A_CALL)])
        parts = (part.split(num_chains) for part in (x, log_density, log_q))
        return [Proposed(*step) for step in zip(*parts, strict=True)]

    def accept(self, x: Tensor, log_density: Tensor, log_q: Tensor | None, ahead: Proposed) -> Transition:
        """Metropolis step on proposals that were drawn and evaluated ahead; a mixture has no paths."""
        log_ratio = self.log_ratio(log_density, self.mixture.log_prob(x), ahead.log_density, ahead.log_q)
        return _moved(Point(x, log_density), Point(ahead.x, ahead.log_density), log_ratio)


class HamiltonianMove:
    r"""Hamiltonian Monte Carlo in the metric of the mixture component that a chain belongs to.

    A component k is drawn from :math:`r_k(x)`, and the leapfrog trajectory targets :math:`\pi(x)\, r_k(x)` in the
    metric of k: a Gibbs step and a Metropolis step on the joint law :math:`\pi(x) r_k(x)`, whose x-marginal is
    :math:`\pi`. So curved or separated targets get a local metric without losing exactness. With one component it is
    plain preconditioned HMC; with one step it is MALA.

    Args:
        mixture: Mixture whose components give the metrics and responsibilities.
        num_steps: Leapfrog steps, at least 1.
        step_size: Leapfrog step in units of the metric, multiplied for every chain and trajectory by a factor that is
            independent of the state and log-uniform between ``1 / spread`` and 1.
        spread: Ratio of the largest to the smallest step, at least 1. Large values let chains leave regions that are
            much narrower than the mixture's components, such as a funnel's neck.
    """

    independent = False

    def __init__(self, mixture: StudentMixture, num_steps: int, step_size: float = 0.5, spread: float = 1.5) -> None:
        self.mixture = mixture
        self.components = Components(mixture)
        self.num_steps = num_steps
        self.spread = spread
        self.step_size: float = step_size
        self.name = "mala" if num_steps == 1 else "hmc"
        self.cost = 2.5 * (num_steps + 1)
        self.target_accept = 0.6 if num_steps == 1 else 0.8

    def local_target(self, log_joint: LogJoint, x: Tensor, component: Tensor) -> tuple[Tensor, Tensor]:
        r"""Value and gradient of :math:`\log\pi(x) + \log r_k(x)`, k = ``component`` ``(C,)``."""
        value, grad = log_joint.value_and_grad(x)
        if self.mixture.num_components == 1:
            return value, grad
        log_share, pull = self.components.share_and_score(x, component)
        return value + log_share, grad + pull

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain: ``num_steps + 1`` gradients."""
        if self.mixture.num_components == 1:
            component = torch.zeros(len(x), dtype=torch.long, device=x.device)
        else:
            component = self.components.draw(x)
        rows = start_rows(lambda z: self.local_target(log_joint, z, component), x)
        moved = self.trajectory(log_joint, rows.with_momentum(), component)
        value = moved.rows.log_density
        if self.mixture.num_components > 1:
            value = value - self.components.whiten(moved.rows.x)[1].gather(1, component[:, None])[:, 0]
        value = torch.where(moved.accepted, value, log_density)
        return Transition(moved.rows.x, value, moved.accept_prob, moved.diverging)

    def trajectory(self, log_joint: LogJoint, start: PhasePoint, component: Tensor) -> HamiltonianStep:
        r"""The transition of :math:`\pi(x) r_k(x)` from fresh momenta, by steps that are drawn here."""
        scale = self.components.factors(component)
        step_size = jittered(self.step_size, self.spread, start.x)
        return hmc_step(lambda z: self.local_target(log_joint, z, component), start, scale, step_size, self.num_steps)


def _moved(state: Point, proposal: Point, log_ratio: Tensor) -> Transition:
    """The transition of a move without trajectories, which cannot diverge."""
    (x, log_density), probability, _ = metropolis(state, proposal, log_ratio)
    return Transition(x, log_density, probability, torch.zeros_like(probability, dtype=torch.bool))


def _contraction(step: float) -> float:
    return math.exp(-math.asinh(step))
