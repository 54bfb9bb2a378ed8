r"""Jumps between modes by affine maps, :math:`y = m_j + L_j L_i^{-1} (x - m_i)`, plain and annealed."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.moves.components import Components
from pyro_sb.infer.moves.moves import Point, Transition, metropolis
from pyro_sb.ops.leapfrog import SharedFactors, matvec
from pyro_sb.ops.student_mixture import StudentMixture

__all__ = ["Warped", "WarpMove", "jump_ceiling", "jump_matrix"]


class Warped(NamedTuple):
    """Where warps lead: points ``(C, d)``, the target's log density there and the log ratio without P, ``(C,)`` each.

    ``momentum`` is the one at the end, ``(C, d)``; None without annealing.
    """

    x: Tensor
    log_density: Tensor
    log_ratio: Tensor
    momentum: Tensor | None = None


class WarpMove:
    r"""Warp jump: an affine map from the component that a chain is in to another one.

    With a mixture :math:`\rho = \sum_k w_k \rho_k` of centres :math:`m_k` and factors :math:`L_k`, and its
    responsibilities :math:`r_k(x) = w_k \rho_k(x) / \rho(x)`: draw i from r(x), j from row i of P,

    .. math:: z = L_i^{-1} (x - m_i), \qquad y = m_j + L_j z,
    .. math:: \log\alpha = \log\frac{\pi(y)}{\pi(x)} + \log\frac{r_j(y)}{r_i(x)} + \log\frac{|L_j|}{|L_i|} +
              \log\frac{P_{ji}}{P_{ij}} .

    It is exact for any mixture, overlapping too: the flow of :math:`\pi(x) r_i(x) P_{ij}` to :math:`\pi(y) r_j(y)
    P_{ji}`. Errors that the modes share cancel, which those of independence proposals do not: it lives in hundreds of
    dimensions. It never leaves a point's place within its mode, and so needs a local move beside it.

    **Annealed**, for modes of unlike shape (``num_steps`` T > 0): a standard normal momentum p, and T leapfrog steps
    of z under the force

    .. math:: (1 - b) L_i^\top \nabla\log\pi(m_i + L_i z) + b L_j^\top \nabla\log\pi(m_j + L_j z), \qquad
              b = (n + \tfrac12) / T ,

    before :math:`y = m_j + L_j z`, with :math:`(|p_0|^2 - |p_T|^2) / 2` added to the log ratio. The schedule is its own
    mirror image, so the path from y to i with the momentum turned round is the same path backwards.

    Args:
        mixture: Frozen mixture of at least two components.
        transition: P, row-stochastic, with :math:`P_{ij} > 0` wherever :math:`P_{ji} > 0`. Shape ``(K, K)``. None is
            :func:`jump_matrix` of the mixture's weights: never to the same component.
        num_steps: T, leapfrog steps; 0 is the plain jump.
        leap: Leapfrog step in units of the components, each time multiplied by a factor from [.8, 1.2] a chain; None is
            :math:`\tfrac12 (50 / d)^{1/4}`.

    References:
        Warp bridge sampling (Meng and Schilling, 2002) for the map. The annealed form is a tempered transition of
        Hamiltonian steps: Annealed importance sampling (Neal, 2001), Nonequilibrium candidate Monte Carlo (Nilmeier et
        al., 2011).

    Example:
        >>> log_weights, df = torch.tensor([0.3, 0.7]).log(), torch.full((2,), torch.inf)
        >>> mixture = StudentMixture(log_weights, torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1, 1), df)
        >>> joint = LogJoint.from_batched(mixture.log_prob, 1, dtype=torch.float32)
        >>> x = torch.tensor([[-9.5]])
        >>> WarpMove(mixture).step(joint, x, joint.log_prob(x)).x  # up the share: always accepted
        tensor([[8.5000]])
    """

    step_size = 0.0
    target_accept = 0.0
    independent = False

    def __init__(
        self,
        mixture: StudentMixture,
        transition: Tensor | None = None,
        *,
        num_steps: int = 0,
        leap: float | None = None,
    ) -> None:
        if mixture.num_components < 2:
            raise ValueError("A warp jump needs a mixture of two components or more, got 1. Leave the move out.")
        self.mixture = mixture
        self.transition = jump_matrix(mixture.log_weights) if transition is None else transition
        self.num_steps = num_steps
        dim = mixture.locs.shape[-1]
        self.leap = 0.5 * (50.0 / dim) ** 0.25 if leap is None else leap
        self.name = "annealed warp" if num_steps else "warp"
        self.cost = 5.0 * (num_steps + 1) if num_steps else 1.0
        self.components = Components(mixture)

    @property
    def ceiling(self) -> float:
        """Acceptance between modes of one shape, where the weights are the shares: :func:`jump_ceiling`."""
        return jump_ceiling(self.mixture.log_weights, self.transition)

    def draw_pair(self, log_share: Tensor) -> tuple[Tensor, Tensor]:
        """Components i by responsibility and j by P, ``(C,)`` each, from log responsibilities ``(C, K)``."""
        here = torch.multinomial(log_share.exp(), 1).squeeze(-1)
        return here, torch.multinomial(self.transition[here], 1).squeeze(-1)

    def log_jump(self, here: Tensor, there: Tensor) -> Tensor:
        r""":math:`\log P_{ji} - \log P_{ij}`, of components ``(C,)``."""
        return self.transition[there, here].log() - self.transition[here, there].log()

    def warped(
        self,
        log_joint: LogJoint,
        x: Tensor,
        log_density: Tensor,
        here: Tensor,
        there: Tensor,
        momentum: Tensor | None = None,
    ) -> Warped:
        r"""Ends of the jumps from components i = ``here`` to j = ``there``, and their log ratios without P.

        These are also the ratios that bridge sampling asks for: their expectation under :math:`\pi r_i / w_i` is
        :math:`w_j / w_i` once exponentiated, :math:`w_k = \int \pi r_k`.

        Args:
            log_joint: Target.
            x: States. Shape ``(C, d)``.
            log_density: The target's log density there. Shape ``(C,)``.
            here: Components i. Shape ``(C,)``.
            there: Components j. Shape ``(C,)``.
            momentum: Initial momenta of annealed jumps ``(C, d)``; drawn if omitted.
        """
        white, log_share = self.components.whiten(x)
        rows = torch.arange(len(x), device=x.device)
        z, end, energy = white[rows, here], None, torch.zeros_like(log_density)
        if self.num_steps:
            momentum = torch.randn_like(z) if momentum is None else momentum
            leap = self.leap * (0.8 + 0.4 * torch.rand(len(z), 1, dtype=z.dtype, device=z.device))
            y, value, end = self.annealed(log_joint, z, momentum, here, there, leap)
            energy = 0.5 * (momentum.square().sum(-1) - end.square().sum(-1))
        else:
            y = self._place(z, there)
            value = log_joint.log_prob(y)
        log_ratio = value - log_density + energy + self.components.log_det[there] - self.components.log_det[here]
        log_ratio = log_ratio + self.components.whiten(y)[1][rows, there] - log_share[rows, here]
        return Warped(y, value, log_ratio, end)

    def annealed(
        self, log_joint: LogJoint, z: Tensor, momentum: Tensor, here: Tensor, there: Tensor, leap: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The annealed path from whitened points ``(C, d)``: its end y, the log density there, the last momentum."""

        def pulls(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            ends = torch.cat([self._place(z, here), self._place(z, there)])
            value, grad = log_joint.value_and_grad(ends)
            near, far = grad.split(len(z))
            return self._pull(near, here), self._pull(far, there), ends[len(z) :], value[len(z) :]

        near, far, y, value = pulls(z)
        for n in range(self.num_steps):
            b = (n + 0.5) / self.num_steps
            momentum = momentum + 0.5 * leap * torch.lerp(near, far, b)
            z = z + leap * momentum
            near, far, y, value = pulls(z)
            momentum = momentum + 0.5 * leap * torch.lerp(near, far, b)
        return y, value, momentum

    def step(self, log_joint: LogJoint, x: Tensor, log_density: Tensor) -> Transition:
        """One transition of every chain: one density evaluation, or 2 (T + 1) gradients."""
        here, there = self.draw_pair(self.components.whiten(x)[1])
        warped = self.warped(log_joint, x, log_density, here, there)
        log_ratio = warped.log_ratio + self.log_jump(here, there)
        (x, log_density), probability, _ = metropolis(
            Point(x, log_density), Point(warped.x, warped.log_density), log_ratio
        )
        return Transition(x, log_density, probability, torch.zeros_like(probability, dtype=torch.bool))

    def _place(self, z: Tensor, component: Tensor) -> Tensor:
        """m_k + L_k z."""
        return self.mixture.locs[component] + matvec(SharedFactors(self.mixture.scale_trils, component), z)

    def _pull(self, grad: Tensor, component: Tensor) -> Tensor:
        """L_k' g."""
        return matvec(SharedFactors(self.mixture.scale_trils.mT, component), grad)


def jump_matrix(log_weights: Tensor, groups: Tensor | None = None) -> Tensor:
    r"""Probabilities of the next component by weight, :math:`P_{ij} = w_j / (1 - w_i)` for :math:`j \ne i`.

    Args:
        log_weights: Logarithms of weights that sum to one. Shape ``(K,)``, K at least 2.
        groups: The mode that each component belongs to, ``(K,)``: jumps then lead to components of other modes. None: a
            mode each.

    Example:
        >>> jump_matrix(torch.tensor([0.5, 0.25, 0.25]).log())
        tensor([[0.0000, 0.5000, 0.5000],
                [0.6667, 0.0000, 0.3333],
                [0.6667, 0.3333, 0.0000]])
    """
    groups = torch.arange(len(log_weights), device=log_weights.device) if groups is None else groups
    same = groups[:, None] == groups
    if bool(same.all()):
        raise ValueError("Jumps need components of at least two modes, got one mode. Leave the move out.")
    return torch.softmax(torch.where(same, -torch.inf, log_weights.expand(len(groups), -1)), -1)


def jump_ceiling(log_weights: Tensor, transition: Tensor) -> float:
    r"""Acceptance of jumps between modes of one shape, :math:`\sum_{ij} \min(w_i P_{ij}, w_j P_{ji})`.

    Example:
        >>> weights = torch.tensor([0.3, 0.7]).log()
        >>> round(jump_ceiling(weights, jump_matrix(weights)), 3)
        0.6
    """
    flow = log_weights.exp()[:, None] * transition
    return float(torch.minimum(flow, flow.T).sum())
