r"""Metropolis moves of a batch of chains: each leaves the target exactly invariant.

A move draws proposals for all chains at once and accepts them one by one with :func:`metropolis`. What a move learnt is
frozen: its
proposal density depends on the current point alone.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sb.bridges.langevin.bridge import KernelLangevinBridge
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.ops.leapfrog import PhasePoint, leapfrog
from pyro_sb.ops.student_mixture import StudentMixture

MAX_ENERGY_ERROR = 1000.0


class Transition(NamedTuple):
    """New states ``(C, d)``, log densities, acceptance probabilities, and which proposals diverged, ``(C,)`` each."""

    x: Tensor
    log_density: Tensor
    accept_prob: Tensor
    diverging: Tensor


class Move(Protocol):
    """What a kernel asks of a move.

    Attributes:
        name: Shown in reports.
        cost: Evaluations a step and chain, in density evaluations.
        step_size: Tuned length, or 0 if there is nothing to tune.
        target_accept: Acceptance rate that the tuning aims at.
    """

    name: str
    cost: float
    step_size: float
    target_accept: float

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain."""


def metropolis(
    x: Tensor, log_density: Tensor, proposal: Tensor, proposal_log_density: Tensor, log_ratio: Tensor
) -> Transition:
    r"""Accept each proposal with probability :math:`\min\{1, e^{\text{log ratio}}\}`; a NaN ratio is a rejection.

    Args:
        x: Current states. Shape ``(C, d)``.
        log_density: Target's log density there. Shape ``(C,)``.
        proposal: Proposed states. Shape ``(C, d)``.
        proposal_log_density: Target's log density there. Shape ``(C,)``.
        log_ratio: Log of :math:`\pi(y) q(y, x) / \pi(x) q(x, y)`. Shape ``(C,)``.
    """
    probability = torch.exp(log_ratio.clamp_max(0.0)).nan_to_num(0.0)
    accept = torch.rand_like(probability) < probability
    return Transition(
        torch.where(accept[:, None], proposal, x),
        torch.where(accept, proposal_log_density, log_density),
        probability,
        torch.zeros_like(accept),
    )


class BridgeMove:
    r"""Calibrated SB-pCN: the bridge's drift and the noise that makes it reversible for a Gaussian.

    .. math:: q(x, \cdot) = N\big(x + c\,(m(x) - x),\, (1 - A_\tau^2) K\big), \quad
              c = \frac{1 - A_\tau}{1 - A_\eta}, \quad A_s = e^{-\operatorname{asinh} s}

    for a step :math:`\tau \le \eta` of a bridge of bandwidth :math:`\eta = \epsilon / 2`, in units of its metric K.
    At the bridge's own bandwidth the mean is m(x) itself. It needs no gradient. As :math:`\eta \to \infty` it is
    preconditioned Crank-Nicolson.

    Args:
        bridge: A fitted bridge with a fixed bandwidth.
        step_size: Step :math:`\tau` in (0, eta].

    References:
        arXiv 2401.04372 for m; the calibration is Gaussian algebra, tested as such.
    """

    name = "bridge"
    cost = 2.0
    target_accept = 0.6

    def __init__(self, bridge: KernelLangevinBridge, step_size: float = 0.3) -> None:
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
        return metropolis(
            x, log_density, proposal, value, self.log_ratio(x, log_density, proposal, value, self._log_noise(noise))
        )

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
        return self.accept(x, log_density, proposal, log_joint.log_prob(proposal), self.mixture.log_prob(proposal))

    def accept(
        self, x: Tensor, log_density: Tensor, proposal: Tensor, value: Tensor, value_mixture: Tensor
    ) -> Transition:
        """Metropolis step on proposals that were drawn and evaluated ahead."""
        log_ratio = self.log_ratio(log_density, self.mixture.log_prob(x), value, value_mixture)
        return metropolis(x, log_density, proposal, value, log_ratio)


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

    def __init__(self, mixture: StudentMixture, num_steps: int, step_size: float = 0.5, spread: float = 1.5) -> None:
        self.mixture = mixture
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
        log_share = self.mixture.log_responsibilities(x)
        scores = self.mixture.component_scores(x)
        rows = torch.arange(len(x), device=x.device)
        pull = scores[rows, component] - torch.einsum("ck,ckd->cd", log_share.exp(), scores)
        return value + log_share[rows, component], grad + pull

    def trajectory(self, log_joint: LogJoint, start: PhasePoint, component: Tensor, step_size: Tensor) -> PhasePoint:
        """The deterministic map of phase space between the momentum refresh and the Metropolis test."""
        scale = self.mixture.scale_trils[component] if self.mixture.num_components > 1 else self.mixture.scale_trils[0]
        return leapfrog(start, lambda x: self.local_target(log_joint, x, component), scale, step_size, self.num_steps)

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain: ``num_steps + 1`` gradients."""
        if self.mixture.num_components == 1:
            component = torch.zeros(len(x), dtype=torch.long, device=x.device)
        else:
            component = torch.multinomial(self.mixture.log_responsibilities(x).exp(), 1).squeeze(-1)
        start = PhasePoint(x, torch.randn_like(x), *self.local_target(log_joint, x, component))
        jitter = self.step_size * self.spread ** -torch.rand(len(x), 1, dtype=x.dtype, device=x.device)
        end = self.trajectory(log_joint, start, component, jitter)
        log_ratio = start.energy - end.energy
        value = end.log_density
        if self.mixture.num_components > 1:
            rows = torch.arange(len(x), device=x.device)
            value = value - self.mixture.log_responsibilities(end.x)[rows, component]
        moved = metropolis(x, log_density, end.x, value, log_ratio)
        return moved._replace(diverging=~(log_ratio > -MAX_ENERGY_ERROR))


def _contraction(step: float) -> float:
    return math.exp(-math.asinh(step))
