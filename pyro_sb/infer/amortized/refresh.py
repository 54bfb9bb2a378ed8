"""BridgeRefresh: the kernel that corrects an amortised posterior, independence moves from the bridge and local HMC."""

import logging
import math
from collections import OrderedDict
from typing import Any, Protocol

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_sb.distributions import Draws
from pyro_sb.infer.mcmc.record import Block
from pyro_sb.infer.moves.hamiltonian import TARGET_ACCEPTANCE, Rows, hmc_step

__all__ = ["BridgeRefresh", "CorrectedJoint", "ProposalLaw"]

logger = logging.getLogger(__name__)
Sites = dict[str, Tensor]
LOCAL_MOVES, NUM_STEPS, SPREAD = 2, 5, 2.0


class ProposalLaw(Protocol):
    """What the kernel asks of an amortised law."""

    def draws(self, num: int) -> Draws:
        """Draws ``(num, B, d)`` with the log density that corrects them."""
        ...

    def path_log_prob(self, u: Tensor, num_paths: int = 1) -> Tensor:
        """Log density of points, or of paths drawn backwards from them. ``(num, B, d)`` to ``(num, B)``."""
        ...


class CorrectedJoint(Protocol):
    """What it asks of a target: rows ``(C * B, d)``, and sites of states ``(*, B, d)``."""

    transforms: dict[str, Any]
    evaluations: Any

    def log_prob(self, z: Tensor) -> Tensor:
        """Log joint of rows."""
        ...

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and gradient of rows."""
        ...


class BridgeRefresh(MCMCKernel):
    r"""Exact MCMC for one observation or many: refreshes from an amortised law between Hamiltonian trajectories.

    A refresh proposes a draw of the law and accepts it with the ratio of
    :math:`\log p(\theta, y) - \log q`; where q is the density of a path, the path that belongs to the present state is
    first drawn backwards anew, which leaves the target invariant on paths. Each refresh is followed by two trajectories
    of five leapfrog steps in the metric of the start. Steps are tuned in warm-up, for every observation, and frozen.

    :meth:`AmortizedPosterior.condition(y).mcmc <pyro_sb.infer.amortized.posterior.Posterior.mcmc>` makes and runs it.

    Args:
        law: The amortised law.
        joint: The model's log joint at the observations.
        starts: Starting points, more than there are chains. Shape ``(N, B, d)``.
        factor: Cholesky factors of the metric. Shape ``(B, d, d)``.
        model: The conditioned model, for ``to_arviz``; None for a batch.
        facts: What is known of the start, for :meth:`diagnostics`.
    """

    default_warmup_steps = 50

    def __init__(
        self, law: ProposalLaw, joint: Any, starts: Tensor, factor: Tensor, *, model: Any, facts: dict[str, Any]
    ) -> None:
        self.law, self.log_joint, self.starts, self.factor = law, joint, starts, factor
        self.model, self.facts = model, facts
        self.num_chains: int | None = None
        self._initial: Sites | None = None
        self._rows: Rows | None = None
        self._steps_left = 0

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Begin anew at the starts."""
        self._steps_left, self._count = warmup_steps, 0
        self.step_size = torch.full_like(self.starts[0, :, 0], 0.3)
        self._refreshed = torch.zeros_like(self.step_size)
        self._accepted = torch.zeros_like(self.step_size)
        self._rows = None

    @property
    def transforms(self) -> dict[str, Any]:
        """Transforms from each site's support to the reals."""
        return self.log_joint.transforms

    @property
    def initial_params(self) -> Sites:
        """Unconstrained starts of the chains."""
        if self._initial is None:
            num = 1 if self.num_chains is None else self.num_chains
            state = self.starts[torch.arange(num) % len(self.starts)]
            self._initial = self._sites(state if self.num_chains is not None else state[0])
        return self._initial

    @initial_params.setter
    def initial_params(self, params: Sites) -> None:
        self._initial = params

    def sample(self, params: Sites) -> Sites:
        """One transition, for ``pyro.infer.MCMC``."""
        draws = self.sample_block(params, 1).draws
        return {name: value[0] if self.num_chains is not None else value[0, 0] for name, value in draws.items()}

    def sample_block(self, params: Sites, num_steps: int) -> Block:
        """``num_steps`` refreshes of every chain, each with its local moves."""
        state = self._state(params)
        chains, batch, dim = state.shape
        rows = self._rows
        if rows is None or not torch.equal(rows.x, state.reshape(-1, dim)):
            rows = Rows(state.reshape(-1, dim), *self.log_joint.value_and_grad(state.reshape(-1, dim)))
        proposals, log_q = self.law.draws(num_steps * chains)
        ahead = Rows(
            proposals.to(state).reshape(-1, dim), *self.log_joint.value_and_grad(proposals.to(state).reshape(-1, dim))
        )
        blocks = [Rows(*parts) for parts in zip(*(x.chunk(num_steps) for x in ahead), strict=True)]
        log_q = log_q.to(state).unflatten(0, (num_steps, chains))
        draws, refreshed, accepted, density = [], [], [], []
        for i in range(num_steps):
            rows, took = self._refresh(rows, blocks[i], log_q[i])
            rows, probability = self._local(rows, chains)
            draws.append(rows.x.reshape(chains, batch, dim))
            refreshed.append(took)
            accepted.append(probability)
            density.append(rows.log_density.reshape(chains, batch))
        self._rows = rows
        if self._steps_left <= 0:
            self._refreshed += torch.stack(refreshed).mean((0, 1)) * num_steps
            self._accepted += torch.stack(accepted).mean((0, 1)) * num_steps
            self._count += num_steps
        self._steps_left -= num_steps
        lp = torch.stack(density).sum(-1)
        stats = {
            "acceptance_rate": torch.stack(accepted).mean(-1),
            "refresh_rate": torch.stack(refreshed).mean(-1),
            "lp": lp,
            "energy": -lp,
            "diverging": torch.zeros_like(lp, dtype=torch.bool),
            "step_size": self.step_size.mean().expand_as(lp),
        }
        return Block(self._sites(torch.stack(draws)), stats)

    def _refresh(self, rows: Rows, proposal: Rows, log_q: Tensor) -> tuple[Rows, Tensor]:
        """Independence Metropolis-Hastings of points or paths; the acceptance probabilities ``(C, B)``."""
        state = rows.x.reshape(*log_q.shape, -1)
        here = self.law.path_log_prob(state.to(self.starts)).to(log_q)  # of a path drawn backwards anew
        log_ratio = (proposal.log_density - log_q.reshape(-1)) - (rows.log_density - here.reshape(-1))
        probability = torch.exp(log_ratio.clamp_max(0.0)).nan_to_num(0.0)
        accept = torch.rand_like(probability) < probability
        moved = Rows(
            torch.where(accept[:, None], proposal.x, rows.x),
            torch.where(accept, proposal.log_density, rows.log_density),
            torch.where(accept[:, None], proposal.grad, rows.grad),
        )
        return moved, probability.reshape(log_q.shape)

    def _local(self, rows: Rows, chains: int) -> tuple[Rows, Tensor]:
        """Hamiltonian trajectories; the mean acceptance probabilities ``(C, B)``."""
        batch, dim = self.factor.shape[:2]
        scale = self.factor.to(rows.x).expand(chains, batch, dim, dim).reshape(-1, dim, dim)
        mean = rows.x.new_zeros(chains, batch)
        for _ in range(LOCAL_MOVES):
            step = self.step_size.to(rows.x).expand(chains, batch).reshape(-1, 1)
            rows, probability = hmc_step(
                self.log_joint.value_and_grad, rows, scale, step, num_steps=NUM_STEPS, spread=SPREAD
            )
            mean += probability.reshape(chains, batch) / LOCAL_MOVES
        if self._steps_left > 0:
            error = mean.mean(0).to(self.step_size) - TARGET_ACCEPTANCE
            self.step_size = self.step_size * torch.exp(1.0 * error)
        return rows, mean

    def _state(self, params: Sites) -> Tensor:
        """Unconstrained sites, of one chain without a dimension for it, to states ``(C, B, d)``."""
        batched = hasattr(self.log_joint, "pack_rows")
        state = self.log_joint.pack_rows(params) if batched else self.log_joint.pack(params)[..., None, :]
        return state if state.dim() == 3 else state[None]

    def _sites(self, state: Tensor) -> Sites:
        """States ``(*lead, B, d)`` to unconstrained sites."""
        if hasattr(self.log_joint, "unpack_rows"):
            return self.log_joint.unpack_rows(state)
        return self.log_joint.unpack(state[..., 0, :])

    def logging(self) -> OrderedDict[str, str]:
        """Acceptance of refreshes and local moves, for the progress bar."""
        if not self._count:
            return OrderedDict()
        return OrderedDict(
            [
                ("refresh", f"{float(self._refreshed.mean()) / self._count:.3f}"),
                ("local", f"{float(self._accepted.mean()) / self._count:.3f}"),
            ]
        )

    def diagnostics(self) -> dict[str, Any]:
        """What the start was worth, and the acceptance rates since: of a batch, its smallest or largest figure."""
        count = max(1, self._count)
        return self.facts | {
            "refresh acceptance": float(self._refreshed.min()) / count,
            "local acceptance": float(self._accepted.min()) / count,
            "gradient evaluations": self.log_joint.evaluations.gradient,
            "density evaluations": self.log_joint.evaluations.density,
        }

    def describe(self) -> str:
        """The diagnostics and the threads in a line."""
        figures = [
            f"{name} {value:.3g}" if isinstance(value, float) and math.isfinite(value) else f"{name} {value}"
            for name, value in self.diagnostics().items()
        ]
        return "; ".join([*figures, self.log_joint.threads])

    def cleanup(self) -> None:
        """Drop the chains' state."""
        self._initial, self._rows = None, None
