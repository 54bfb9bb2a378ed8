r"""BridgeRefresh, exact chains of B posteriors :math:`p(\theta | y_b)` at once: refreshes from a law, and local HMC."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_sb.distributions import Draws
from pyro_sb.fingerprint import fingerprint
from pyro_sb.infer.amortized.latent_law import LatentLaw
from pyro_sb.infer.mcmc.walk import TUNING_CHAINS, Frozen
from pyro_sb.infer.mcmc.walking import Sites, WalkingKernel
from pyro_sb.infer.moves.moves import Transition, hmc_step, jittered, start_rows
from pyro_sb.infer.moves.proposals import ProposalMove
from pyro_sb.infer.moves.tuning import ChainStates, fit_step
from pyro_sb.plain import to_plain
from pyro_sb.stages import announce

__all__ = ["BridgeRefresh", "PosteriorProposals", "ProposalLaw"]

SUMMED = {"lp", "energy", "move", "diverging"}
LAST_FIGURES = {"refresh acceptance", "local acceptance", "gradient evaluations", "density evaluations"}


class ProposalLaw(Protocol):
    """An amortised law, an observation a column."""

    def draws(self, num: int) -> Draws:
        """Draws ``(num, B, d)`` with the log density that corrects them."""
        ...

    def path_log_prob(self, u: Tensor, num_paths: int = 1) -> Tensor:
        """Log density of points, or of paths drawn backwards from them. ``(num, B, d)`` to ``(num, B)``."""
        ...


class PosteriorProposals:
    """Proposals of an amortised law in rows that run over its observations fastest.

    Args:
        law: The law of B observations, in the model's unconstrained coordinates.
        like: A row an observation, of the law's dtype and device. Shape ``(B, *)``.
        num_paths: As in `BridgeProposals`; for one observation.
    """

    def __init__(self, law: Any, like: Tensor, num_paths: int = 1) -> None:
        self.law, self.like = law, like
        self.num_paths = num_paths if num_paths > 1 and not law.marginal else 1

    def renew(self) -> None:
        """Nothing is shared."""

    def shared(self) -> list[Tensor]:
        """Nothing."""
        return []

    def share(self, points: list[Tensor]) -> None:
        """Nothing is shared."""

    @torch.no_grad()
    def draws(self, num: int) -> Draws:
        """Draws ``(num, d)`` with their log density; ``num`` is a multiple of B."""
        value, log_q = self.law.draws(num // len(self.like))
        if self.num_paths > 1:
            further = self.law.path_log_prob(value, self.num_paths - 1) + math.log(self.num_paths - 1)
            log_q = torch.logaddexp(log_q, further) - math.log(self.num_paths)
        return Draws(value.flatten(0, 1).double(), log_q.flatten().double())

    @torch.no_grad()
    def redraw(self, x: Tensor) -> Tensor:
        """Log density of points, or of paths drawn backwards from them."""
        u = x.unflatten(0, (-1, len(self.like))).to(self.like)
        return self.law.path_log_prob(u, self.num_paths).flatten().double()


class SideBySideMove:
    """Hamiltonian trajectories of B targets, each in a metric of its own by a step of its own.

    Args:
        factor: Factors of the metrics. Shape ``(B, d, d)``.
        step_size: Leapfrog step of each target, in units of its metric; rows draw factors down to half of it.
    """

    name = "hmc"
    independent = False
    target_accept = 0.75
    num_steps, spread, num_trajectories = 5, 2.0, 2
    cost = 2.5 * (num_trajectories * num_steps + 1)

    def __init__(self, factor: Tensor, step_size: float = 0.3) -> None:
        self.factor = factor
        self.step_size: Tensor = torch.full_like(factor[:, 0, 0], step_size)

    def step(self, log_joint: Any, x: Tensor, log_density: Tensor) -> Transition:
        """Two trajectories of five steps of every row: eleven gradients."""
        repeats = len(x) // len(self.factor)
        scale = self.factor[0] if len(self.factor) == 1 else self.factor.repeat(repeats, 1, 1)
        rows = start_rows(log_joint.value_and_grad, x)
        accept_prob, diverging = torch.zeros_like(log_density), torch.zeros_like(log_density, dtype=torch.bool)
        for _ in range(self.num_trajectories):
            step_size = jittered(self.step_size.repeat(repeats)[:, None], self.spread, x)
            moved = hmc_step(log_joint.value_and_grad, rows.with_momentum(), scale, step_size, self.num_steps)
            rows = moved.rows
            accept_prob, diverging = (
                accept_prob + moved.accept_prob / self.num_trajectories,
                diverging | moved.diverging,
            )
        return Transition(rows.x, rows.log_density, accept_prob, diverging)


class BridgeRefresh(WalkingKernel):
    r"""Exact MCMC for one observation or many: refreshes from an amortised law between Hamiltonian trajectories.

    A refresh proposes a draw of the law and accepts it with the ratio of
    :math:`\log p(\theta, y) - \log q`; where q is the density of a path, the path that belongs to the present state is
    first drawn backwards, which leaves the target invariant on paths. Each refresh is followed by two trajectories
    of five leapfrog steps in the metric of the start. Steps are tuned in warm-up, for every observation, and frozen.

    Statistics of a batch are those of its chains: acceptance rates are means over observations, ``lp`` is their sum,
    and a draw is marked as diverging if a trajectory of any observation diverged; ``diverging_share`` is the share of
    the observations whose trajectory did.

    :meth:`AmortizedPosterior.condition(y).mcmc <pyro_sb.infer.amortized.posterior.Posterior.mcmc>` makes and runs it.

    Args:
        law: The amortised law.
        joint: The model's log joint at the observations.
        starts: Starting points, more than there are chains. Shape ``(N, B, d)``.
        factor: Cholesky factors of the metric. Shape ``(B, d, d)``.
        model: The conditioned model, for ``to_arviz``; None for a batch.
        facts: What is known of the start, for :meth:`diagnostics`.
    """

    divergence_cure = "a larger num_proposals, a fit on more simulations, or another parametrisation (non-centred)"

    def __init__(
        self, law: ProposalLaw, joint: Any, starts: Tensor, factor: Tensor, *, model: Any, facts: dict[str, Any]
    ) -> None:
        super().__init__()
        self.law, self.joint, self.starts, self.factor = law, joint, starts, factor
        self.model, self.facts = model, facts
        self._like = starts[0]

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.joint

    def _words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
        """The posterior that it is of; what a run is given does not matter."""
        law = self.law.word() if isinstance(self.law, LatentLaw) else fingerprint(self.law)
        return {"the posterior": law, "its start": fingerprint(self.starts, self.factor)}

    def _known(self) -> dict[str, Any]:
        return {"law": self.law, "like": self._like}

    def learnt(self) -> dict[str, Any]:
        """What it was made of and has learnt so far, as tensors and plain values."""
        start = {"starts": self.starts, "factor": self.factor, "facts": to_plain(self.facts)}
        return super().learnt() | start

    def _prepare(self) -> None:
        """Tune the trajectories' steps on rows from the start, and freeze the moves, once."""
        if self.frozen is not None:
            return
        announce("moves")
        local = SideBySideMove(self.factor.double())
        x = self._starts(TUNING_CHAINS)
        log_density = self.log_joint.log_prob(x)
        fit_step(local, self.log_joint, ChainStates(x, log_density))
        refresh = ProposalMove(PosteriorProposals(self.law, self._like))
        self.frozen = Frozen({"bridge": refresh, "local": local}, {"bridge": 1.0}, {}, then=("local",))

    def _starts(self, num: int) -> Tensor:
        return self.starts[torch.arange(num) % len(self.starts)].flatten(0, 1).double()

    @property
    def _batched(self) -> bool:
        """Whether sites carry the observations; a log joint of one observation knows none."""
        return hasattr(self.log_joint, "pack_rows")

    def _rows(self, sites: Sites) -> Tensor:
        self._check_lead(sites)
        state = self.log_joint.pack_rows(sites) if self._batched else self.log_joint.pack(sites)[..., None, :]
        return state.detach().reshape(-1, state.shape[-1])

    def _check_lead(self, sites: Sites) -> None:
        """Refuse sites without the chains, or without the observations, that rows are made of."""
        lead = () if self.num_chains is None else (self.num_chains,)
        of = ["chains"] * len(lead) + ["observations"] * (self._batched and bool(self.log_joint.batch))
        for name, shape in self.log_joint.site_shapes.items():
            value, whole = sites.get(name), (*lead, *shape)
            if value is not None and tuple(value.shape) != whole:
                raise ValueError(
                    f"initial_params must have the shape {whole} at site {name!r}, {' x '.join([*of, 'the site'])}, "
                    f"got {tuple(value.shape)}. Omit them, or write value.expand{whole} for one common start."
                )

    def _row_name(self, row: int) -> str:
        chain, observation = divmod(row, self.starts.shape[1])
        return f"chain {chain}" + f" (observation {observation})" * (self.starts.shape[1] > 1)

    def _sites(self, states: Tensor) -> Sites:
        state = states.unflatten(-2, (-1, self.starts.shape[1])).to(self.log_joint.dtype)
        return self.log_joint.unpack_rows(state) if self._batched else self.log_joint.unpack(state[..., 0, :])

    def _by_chain(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = {name: value.unflatten(-1, (-1, self.starts.shape[1])) for name, value in stats.items()}
        chains = {name: value.double().mean(-1) for name, value in rows.items() if name not in SUMMED}
        if "move" in rows:
            chains |= {"move": rows["move"][..., 0], "diverging": rows["diverging"].any(-1)}
            chains |= {name: rows[name].sum(-1) for name in ("lp", "energy")}
            if self.starts.shape[1] > 1:
                chains["diverging_share"] = rows["diverging"].double().mean(-1)
        return chains

    def _facts(self) -> dict[str, Any]:
        """Figures of the start, and the smallest acceptance rates of an observation."""
        found = dict(self.facts)
        if self.walk is not None:
            rates = self.walk.acceptance_by_role()
            least = {
                role: float(rate.unflatten(0, (-1, self.starts.shape[1])).mean(0).min()) for role, rate in rates.items()
            }
            found |= {"refresh acceptance": least["bridge"], "local acceptance": least["local"]}
        return found

    def describe(self) -> str:
        """The figures of the start and of the moves, in a line."""
        figures = self.facts | {name: value for name, value in self.diagnostics().items() if name in LAST_FIGURES}
        moves = [] if self.frozen is None else [f"moves: {self.frozen.describe()}"]
        shown = [
            f"{name} {value:.3g}" if isinstance(value, float) and math.isfinite(value) else f"{name} {value}"
            for name, value in figures.items()
        ]
        return "; ".join([*shown, *moves, self.log_joint.threads])

    def __repr__(self) -> str:
        num, dim = self.starts.shape[1:]
        ready = "moves frozen" if self.frozen is not None else "before its warm-up"
        plurals = "s" * (num > 1), "s" * (dim > 1)
        return f"BridgeRefresh({num} observation{plurals[0]}, {dim} latent number{plurals[1]}, {ready})"
