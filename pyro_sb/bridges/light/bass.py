"""The light Schrödinger-Bass bridge: drift and volatility from one Gaussian mixture, by ascent on one dual."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.ends import Batch, Ends
from pyro_sb.bridges.light.light import HELD_OUT, LightSB, all_points, paired, weighted_mean
from pyro_sb.bridges.light.solvers import DualProblem, LearnedMap, Pairs, Pool, alternate
from pyro_sb.bridges.options import Options
from pyro_sb.distributions import Draws
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import equal_weights
from pyro_sb.threads import Pace
from pyro_sb.training import Best, FitHistory, interruptible

POOL, PASSES = 8192, 4  # pairs inverted at once, and how often each is then used with one more Newton step
POOL_TOLERANCE = 1e-3  # of their inverses: the step before each use squares it
PRODUCTS = 8  # Hessian products of that step where d is large
START_POINTS, START_STEPS = 2048, 30  # of the ascent that the fit starts with
CANDIDATES = (2.0, 5.0, 20.0, 100.0, math.inf)  # of beta="auto"


class LightSBBM(LightSB):
    r"""Schrödinger-Bass bridge: the process that pays for drift and for volatility off :math:`\sqrt\epsilon`.

    .. math:: \inf E \int_0^1 \tfrac12 |\alpha|^2 + \tfrac{\beta}{2} |\sigma - \sqrt\epsilon I|_F^2\, dt, \qquad
        dX = \alpha\, dt + \sigma\, dW,\; X_0 \sim \mu_0,\; X_1 \sim \mu_1 .

    X is the image of a Schrödinger bridge Y under the Bass map :math:`X_t = Y_t + s(t, Y_t) / \beta`, with the drift s
    of a Gaussian-mixture potential. ``beta = inf`` is `LightSB`; small beta bends the noise instead of the drift.

    Solved by ascent on one dual, with no alternation and no network:

    .. math:: G = E_{\mu_1} \min_y \big[\epsilon \log h_1(y) + \tfrac\beta2 |x - y|^2\big]
                - E_{\mu_0} \min_y \big[\epsilon \log h_0(y) + \tfrac\beta2 |x - y|^2\big] .

    By the envelope theorem its gradient is that of `LightSB`'s loss at the inverse points
    :math:`y = Y_t(x)`, which Newton's method finds to rounding: eigenvalues of :math:`S_j` are kept above
    :math:`1 / (1 + \beta)`, where the map is strictly monotone. Densities are exact, by change of variables.

    Args:
        dim: Event size.
        num_components: J.
        epsilon: Variance of the reference over [0, 1], positive, in squared units of the data.
        beta: Price of volatility, above 1 and without unit; ``inf`` allows the reference's alone. ``"auto"``: chosen in
            ``fit`` by the likelihood of held-out draws, the largest that is not worse than the best by more than a
            standard error.
        context_dim: Size of the context, 0 for none.
        covariance: ``"diagonal"`` or ``"full"``.
        hidden: Widths of the context network's hidden layers.

    Attributes:
        beta: Price of volatility in use.
        scores: Held-out log likelihood of each candidate, in nats a draw, after ``beta="auto"``.

    References:
        LightSBB-M: Bridging Schrödinger and Bass for Generative Diffusion Modeling (2026),
        https://arxiv.org/abs/2601.19312. Its algorithm 1 is ``fit(solver="alternating")``; the dual with exact
        inverses is ours, and converges where the alternation diverges (concentrated targets at small beta). The drift's
        singularity at t = 1 in the paper is one of its formula alone.

    Example:
        >>> bridge = LightSBBM(1, num_components=3, beta=5.0)
        >>> history = bridge.fit(torch.randn(500, 1), num_updates=50, progress=False)
        >>> bridge.volatility(0.5, torch.zeros(4, 1)).shape
        torch.Size([4, 1, 1])
    """

    solvers = ("dual", "batch", "alternating")

    def __init__(
        self,
        dim: int,
        *,
        num_components: int = 50,
        epsilon: float = 1.0,
        beta: float | str = 10.0,
        context_dim: int = 0,
        covariance: str = "diagonal",
        hidden: tuple[int, ...] = (64, 64),
        dropout: float = 0.0,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_components=num_components,
            epsilon=epsilon,
            context_dim=context_dim,
            covariance=covariance,
            hidden=hidden,
            dropout=dropout,
            embedding=embedding,
        )
        self._asked_beta = beta if isinstance(beta, str) else float(beta)
        if isinstance(beta, str):
            if beta != "auto":
                raise ValueError(f'beta must be a number above 1 or "auto", got {beta!r}.')
            beta = math.inf
        if not beta > 1:
            raise ValueError(
                f"beta must be above 1, got {beta}: below, the dual is infinite. Write 10, math.inf for LightSB, or "
                '"auto".'
            )
        self.beta = float(beta)
        self.learned_map: LearnedMap | None = None
        self.scores: dict[float, float] = {}
        self._pool: Pool | None = None

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """As `LightSB`'s; None after the alternating solver, whose inverse is learnt and so not exact."""
        return None if self.learned_map is not None else super().density

    def _solve(self, ends: Ends, options: Options) -> FitHistory:
        """Choose beta if that was asked, start, and learn by the solver asked for."""
        if self._asked_beta == "auto":
            chosen = self._choose_beta(ends, options)
            if chosen.interrupted:
                return chosen
        self._pool, self.learned_map = None, None
        if options.solver == "alternating":
            self.learned_map = LearnedMap(self.dim).to(self.location)
        self._begin(ends)
        if options.solver == "batch":
            return self._batch_fit(ends, options)
        if options.solver == "alternating":
            return alternate(self, ends, options)
        history = self._adam_fit(ends, options)
        self._pool = None
        return history

    def loss(self, ends: Ends, batch_size: int) -> Tensor:
        r"""The dual :math:`-G / \epsilon` of a minibatch at its inverse points, which are held fixed."""
        if math.isinf(self.beta):
            return super().loss(ends, batch_size)
        if self._pool is None or self._pool.used >= PASSES * len(self._pool.pairs.x1):
            self._pool = Pool(self._inverted(ends, max(POOL, batch_size)))
        index = self._pool.next(batch_size)
        pairs = self._pool.pairs.rows(index)
        potential = self.parameters_of(pairs.context, self._epsilon)
        start, end = self._bass(potential, 0.0), self._bass(potential, 1.0)
        with torch.no_grad():
            y0 = start.newton_step(pairs.y0, pairs.x0, num_products=PRODUCTS)
            y1 = end.newton_step(pairs.y1, pairs.x1, num_products=PRODUCTS)
        self._pool.put(index, y0, y1)
        return (start.objective(y0, pairs.x0).mean() - end.objective(y1, pairs.x1).mean()) / self._epsilon

    def held_out_loss(self, ends: Ends, num: int = HELD_OUT) -> float:
        r""":math:`-G / \epsilon` on held-out points."""
        if math.isinf(self.beta):
            return super().held_out_loss(ends, num)
        target = ends.target.held_out(num)
        with torch.no_grad():
            return -self._dual(ends.source.held_out(len(target.points)).points, target) / self._epsilon

    @torch.no_grad()
    def dual(self, x0: Tensor, x1: Tensor) -> float:
        """G at points of both sides, in squared units of the data; without context. Shapes ``(*, dim)``."""
        if self.context_dim:
            raise NotImplementedError(f"dual has no context, got context_dim = {self.context_dim}.")
        self._refuse_learned()
        z0, z1 = self._rows(x0, None, 0.0)[0], self._rows(x1, None, 1.0)[0]
        shift = (self.location - self.source_location) / self.scale
        moved = float(shift @ (z1.mean(0) - z0.mean(0) + 0.5 * shift))  # of the centres, whose drift is their distance
        return float(self.scale) ** 2 * (self._dual(z0, Batch(z1)) + moved)

    def _dual(self, source: Tensor, target: Batch) -> float:
        source, target = paired(source, target)
        potential, points1 = self._lift(target.points, target.context)
        points0 = self._lift(source, target.context)[1]
        start, end = self._bass(potential, 0.0), self._bass(potential, 1.0)
        y0, y1 = start.inverse(points0), end.inverse(points1)
        if max(y0.residual, y1.residual) > 1e-2:
            return -math.inf  # the minimum was not found, and a value above it would flatter
        own = None if target.context is None else target.weights
        value = weighted_mean(end.objective(y1.points, points1), target.weights)
        return float(value - weighted_mean(start.objective(y0.points, points0), own))

    @torch.no_grad()
    def _inverted(self, ends: Ends, num: int) -> Pairs:
        """Points of both sides with their exact inverses."""
        source, target = paired(ends.source.batch(num).points, ends.target.batch(num))
        potential, points1 = self._lift(target.points, target.context)
        points0 = self._lift(source, target.context)[1]
        y0 = self._bass(potential, 0.0).inverse(points0, tolerance=POOL_TOLERANCE).points
        y1 = self._bass(potential, 1.0).inverse(points1, tolerance=POOL_TOLERANCE).points
        return Pairs(points0, y0, points1, y1, target.context)

    @torch.no_grad()
    def _batch_fit(self, ends: Ends, options: Options) -> FitHistory:
        """Moment steps at inverse points, each as long as G of all draws allows; the best by held-out G is kept."""
        source, target = (all_points(end, options.num_draws) for end in ends)
        problem, num_updates = DualProblem(source, target, self.beta), options.steps(200)
        history, best, pace = FitHistory(), Best(list(self.parameters_of.parameters())), Pace()
        state = problem.at(self.parameters_of(None, self._epsilon))
        best.offer(self.held_out_loss(ends))
        size, quiet = 1.0, 0
        with interruptible(history, num_updates, "LightSBBM"):
            for step in pace.each(range(1, num_updates + 1), source.points.device):
                new, size = problem.ascend(state, size, self._floor)
                rise = (new.dual - state.dual) / self._epsilon
                state, quiet = new, quiet + 1 if rise < 1e-9 else 0
                if quiet:
                    size *= 0.5  # a long step may have crossed the top to a point as high
                self.parameters_of.set(state.potential, self._floor)
                history.residuals.append(rise)
                history.losses.append(-state.dual / self._epsilon)
                history.validation_losses.append(self.held_out_loss(ends))
                history.iterations = step
                best.offer(history.validation_losses[-1])
                if quiet == 2:
                    history.converged = True
                    break
        best.restore()
        history.threads = pace.describe()
        if not history.converged and not history.interrupted:
            warnings.warn(
                f"LightSBBM's batch solver has not converged: G still rose by {history.residual:.2g} > 1e-9 nats in "
                f"step {num_updates}. Raise num_updates.",
                RuntimeWarning,
                stacklevel=3,
            )
        return history

    def _choose_beta(self, ends: Ends, options: Options) -> FitHistory:
        """Take the largest candidate whose held-out likelihood is within a standard error of the best one's."""
        short = options._replace(num_updates=max(1, options.steps(5000) // 5), checkpoint=None, progress=False)
        scores, history = {}, FitHistory()
        judge = ends.target.held_out(HELD_OUT)
        base = ends.source.held_out(HELD_OUT).points
        for beta in CANDIDATES:
            self.beta, self._pool, self.learned_map = beta, None, None
            self._begin(ends)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*has not converged", RuntimeWarning)  # a short run need not
                warnings.filterwarnings("ignore", ".*kept its start", RuntimeWarning)
                history = self._adam_fit(ends, short)
            if history.interrupted:
                return history
            with torch.no_grad():
                scores[beta] = self._mean_log_prob(judge.points, base, judge.context)
        weights = judge.weights if judge.weights is not None else judge.points.new_full((len(judge.points),), 1.0)
        weights = weights / weights.sum()
        best = max(scores.values(), key=lambda score: float(weights @ score))
        gaps = {beta: best - score for beta, score in scores.items()}
        errors = {beta: float(weights.square() @ (gap - weights @ gap).square()) ** 0.5 for beta, gap in gaps.items()}
        self.beta = max(beta for beta, gap in gaps.items() if float(weights @ gap) <= errors[beta])
        unit = self.dim * self.scale.log()
        self.scores = {beta: float(weights @ score - unit) for beta, score in scores.items()}
        return history

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """As `LightSB`'s; refused after the alternating solver."""
        self._refuse_learned()
        return super().draws_rows(num, context)

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """As `LightSB`'s; refused after the alternating solver."""
        self._refuse_learned()
        return super().log_prob_rows(x, context)

    def marginal_log_prob(self, x: Tensor, context: Any = None, *, num_source: int = 4096) -> Tensor:
        """As `LightSB`'s; refused after the alternating solver."""
        self._refuse_learned()
        return super().marginal_log_prob(x, context, num_source=num_source)

    def plan_log_prob_rows(self, x: Tensor, x0: Tensor, context: Tensor | None) -> Tensor:
        """As `LightSB`'s; refused after the alternating solver."""
        self._refuse_learned()
        return super().plan_log_prob_rows(x, x0, context)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().config() | {"beta": self._asked_beta}

    def get_extra_state(self) -> dict[str, Any]:
        """What the source was, the beta in use, and whether the inverse is learnt."""
        learned = self.learned_map is not None
        return super().get_extra_state() | {"beta": self.beta, "learned": learned, "scores": self.scores}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().set_extra_state(state)
        self.beta, self.scores = state["beta"], state["scores"]
        self.learned_map = LearnedMap(self.dim).to(self.location) if state["learned"] else None

    @torch.no_grad()
    def _begin(self, ends: Ends) -> None:
        """As `LightSB`'s, followed by ascent on the dual of some points: at small beta the inverse moves them far."""
        super()._begin(ends)
        if math.isinf(self.beta) or self.learned_map is not None:
            return
        self._warn_of_narrow_axes()
        source, target = (equal_weights(end.batch(START_POINTS).points) for end in ends)
        problem, size = DualProblem(source, target, self.beta), 1.0
        state = problem.at(self.parameters_of(None, self._epsilon))
        for _ in range(START_STEPS):
            new, size = problem.ascend(state, size, self._floor)
            gain, state = new.dual - state.dual, new
            if gain < 1e-3 * self._epsilon:
                break
        self.parameters_of.set(state.potential, self._floor)

    def _warn_of_narrow_axes(self) -> None:
        """Say so where an axis is narrower than the narrowest end that the floor of S allows a component."""
        end = math.sqrt(self._epsilon * self._floor) * (1 + (1 - 1 / self._floor) / self.beta)
        narrowest = float(self.parameters_of.axes.min()) / 10
        if narrowest < end and narrowest < 0.1:
            warnings.warn(
                f"the target's narrowest axis has a standard deviation of {narrowest * float(self.scale):.2g}, but at "
                f"beta = {self.beta:g} no component is narrower than {end * float(self.scale):.2g}. Raise beta, lower "
                "epsilon, or rescale the axis.",
                RuntimeWarning,
                stacklevel=5,
            )

    @property
    def _floor(self) -> float:
        if self.learned_map is not None:  # the paper has no floor
            return 1e-6 / self._epsilon
        return super()._floor

    def _invert(self, potential: MixturePotential, t: float | Tensor, points: Tensor) -> Tensor:
        if self.learned_map is not None:
            return self.learned_map(torch.as_tensor(t), points)
        return super()._invert(potential, t, points)

    def _refuse_learned(self) -> None:
        if self.learned_map is not None:
            raise NotImplementedError(
                'LightSBBM has no density of its draws, nor a log_prob or draws(), after solver="alternating": its '
                'inverse is a network. Fit with solver="dual".'
            )

    def _read_solver(self, solver: str | None) -> str:
        solver = super()._read_solver(solver)
        if self._asked_beta == "auto" and solver != "dual":
            raise ValueError(f'beta="auto" needs solver="dual", got {solver!r}. Give beta a number.')
        if solver == "alternating" and math.isinf(self.beta):
            raise ValueError('solver="alternating" needs a finite beta, got inf. Use LightSBM.')
        return solver
