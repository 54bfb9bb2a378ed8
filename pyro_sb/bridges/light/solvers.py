r"""Solvers of the light bridges: ways to the potential's parameters, each down or up one function of them.

==============  ==================  =======  =======================================================================
solver          bridges             updates  way
==============  ==================  =======  =======================================================================
likelihood      LightSB, LightSBM     5,000  Adam down :math:`L = E \log c(y_0) - E \log v(y_1)`
matching        LightSB, LightSBM     5,000  Adam down the regression of the drift on slopes of Brownian bridges
moments         all                     200  moment steps on all draws; for finite beta each as long as G allows
dual            LightSBBM             5,000  Adam up the dual G at inverse points that Newton's method finds
alternating     LightSBBM            10,000  matching and a learnt inverse in turn: the published algorithm
==============  ==================  =======  =======================================================================

L and :math:`-G / \epsilon` of held-out points judge all but the last.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pyro_sb.bridges.ends import DrawsEnd, Ends, PointEnd
from pyro_sb.bridges.light.laws import LearnedMap, MixtureProcess, paired
from pyro_sb.bridges.light.parameters import MixtureParameters, cluster_start
from pyro_sb.bridges.options import FitOptions, check_counts
from pyro_sb.ops.bass import DualProblem, Pairs, Pool
from pyro_sb.ops.mixture import MixturePotential, likelihood_loss, matching_loss
from pyro_sb.ops.moment_matching import Side, equal_weights, moment_step
from pyro_sb.threads import Pace
from pyro_sb.training import Best, EarlyChecks, FitHistory, interruptible, train

HELD_OUT, HELD_OUT_BATCHES = 2048, 8  # points that the held-out loss is read from, and at most so many minibatches
NUM_CHECKS = 20  # of Adam's way
START_DRAWS = 4096  # that clusters are sought in
SMALL_EPSILON = 1e-3  # in units of the target's variance
POOL, PASSES = 8192, 4  # pairs inverted at once, and how often each is then used with one more Newton step
POOL_TOLERANCE = 1e-3  # of their inverses: the step before each use squares it
PRODUCTS = 8  # Hessian products of that step where d is large
ASCENT_DRAWS, ASCENT_STEPS = 2048, 30  # of the moment steps up the dual that a fit for finite beta starts with
CANDIDATES = (2.0, 5.0, 20.0, 100.0, math.inf)  # of beta="auto"
NUM_STAGES, MAP_LEARNING_RATE = 5, 2e-3  # of the alternation


class LightOptions(NamedTuple):
    """Options of a light bridge's fit: those of every fit by gradients, and the checks that Adam waits for a gain."""

    fit: FitOptions
    patience: int

    def check(self) -> None:
        """Refuse what no solver can use."""
        self.fit.check()
        check_counts(patience=self.patience)


class LearningBridge(Protocol):
    """Bridge as a solver knows it: see `MixtureBridge`."""

    default_solver: str
    asked_beta: float | str | None
    dim: int
    context_dim: int
    num_components: int
    covariance: str
    dropout: float
    beta: float
    location: Tensor
    scale: Tensor
    parameters_of: MixtureParameters
    learned_map: LearnedMap | None

    @property
    def process(self) -> MixtureProcess:
        """The bridge in its own units."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the bridge."""
        ...


class Solver(Protocol):
    """Way to the parameters of a light bridge.

    Attributes:
        name: Its name in ``fit(solver=...)``.
        num_updates: Updates where none are asked for.
    """

    name: str
    num_updates: int

    def serves(self, bridge: LearningBridge) -> bool:
        """Whether it is for bridges of this class."""
        ...

    def check(self, bridge: LearningBridge) -> None:
        """Refuse settings of such a bridge that it cannot learn."""
        ...

    def solve(self, bridge: LearningBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Put the start into the bridge's parameters, and make the updates."""
        ...


class Likelihood:
    r"""Adam down the likelihood loss :math:`E \log c(y_0) - E \log v(y_1)`: KL to the bridge, up to a constant."""

    name, num_updates = "likelihood", 5000

    def serves(self, bridge: LearningBridge) -> bool:
        """Whether the bridge has no price of volatility."""
        return bridge.asked_beta is None

    def check(self, bridge: LearningBridge) -> None:
        """Refuse nothing."""

    def solve(self, bridge: LearningBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Start, and make the updates."""
        process = begin(bridge, ends)
        return descend(bridge, ends, options, lambda: self.loss(process, ends, options.fit.batch_size))

    def loss(self, process: MixtureProcess, ends: Ends, batch_size: int) -> Tensor:
        """Loss of a minibatch, in nats up to a constant."""
        target = ends.target.batch(batch_size)
        return process.likelihood(ends.source.batch(batch_size).points, target)


class Matching:
    r"""Adam down the matching loss, whose minimiser is the likelihood's: see `LightSBM`."""

    name, num_updates = "matching", 5000

    def serves(self, bridge: LearningBridge) -> bool:
        """Whether the bridge has no price of volatility."""
        return bridge.asked_beta is None

    def check(self, bridge: LearningBridge) -> None:
        """Refuse nothing."""

    def solve(self, bridge: LearningBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Start, and make the updates."""
        process = begin(bridge, ends)
        return descend(bridge, ends, options, lambda: self.loss(process, ends, options.fit.batch_size))

    def loss(self, process: MixtureProcess, ends: Ends, batch_size: int) -> Tensor:
        """Loss of a minibatch, in nats up to a constant."""
        target = ends.target.batch(batch_size)
        return matching_loss(process.potential(target.context), ends.source.batch(batch_size).points, target.points)


class MomentSteps:
    r"""Moment steps on all draws at once: down the likelihood loss, or for finite beta up the dual by line search."""

    name, num_updates = "moments", 200

    def serves(self, bridge: LearningBridge) -> bool:
        """True: it is for every bridge."""
        return True

    def check(self, bridge: LearningBridge) -> None:
        """Refuse a context, and a beta that is still to be chosen."""
        refuse_context(self, bridge)
        refuse_open_beta(self, bridge)

    @torch.no_grad()
    def solve(self, bridge: LearningBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Start, and step until nothing is gained; the best by the held-out loss is kept."""
        process, name, num_updates = begin(bridge, ends), type(bridge).__name__, options.fit.num_updates
        sides, plain = [all_points(end, options.fit.num_law_draws) for end in ends], math.isinf(process.beta)
        history, best, pace = FitHistory(), Best(list(process.parameters.parameters())), Pace()
        best.offer(held_out_loss(process, ends))
        steps = (likelihood_steps if plain else dual_steps)(process, *sides)
        with interruptible(history, num_updates, name):
            while history.iterations < num_updates and not history.converged:
                with pace.call(device=sides[0].points.device):
                    step = next(steps)
                    process.take(step.potential)
                    history.validation_losses.append(held_out_loss(process, ends))
                history.residuals += [] if step.rise is None else [step.rise]
                history.losses.append(step.loss)
                history.iterations += 1
                best.offer(history.validation_losses[-1])
                history.converged = step.settled
        best.restore()
        history.threads = pace.describe()
        if not history.converged and not history.interrupted:
            reason = "the loss still falls" if plain else f"G still rose by {history.residual:.2g} > 1e-9 nats"
            warnings.warn(
                f"{name}'s moment steps have not converged: {reason} after {num_updates}. Raise num_updates.",
                RuntimeWarning,
                stacklevel=5,
            )
        return history


class Step(NamedTuple):
    """Potential after a moment step, its loss in nats, the rise of G if that was measured, and whether to stop."""

    potential: MixturePotential
    loss: float
    rise: float | None
    settled: bool


def likelihood_steps(process: MixtureProcess, source: Side, target: Side) -> Iterator[Step]:
    """Plain moment steps; settled where ten of them change the loss by less than 1e-4."""
    potential, losses = process.potential(), list[float]()
    while True:
        potential = moment_step(potential, source, target, floor=process.floor)
        losses.append(float(likelihood_loss(potential, source.points, target.points, source.weights, target.weights)))
        settled = len(losses) >= 10 and abs(losses[-10] - losses[-1]) < 1e-4  # a rise is no rest
        yield Step(potential, losses[-1], None, settled)


def dual_steps(process: MixtureProcess, source: Side, target: Side) -> Iterator[Step]:
    """Moment steps at inverse points, each as long as G allows; settled where two in a row raise it by nothing."""
    problem, size, quiet = DualProblem(source, target, process.beta), 1.0, 0
    state = problem.at(process.potential())
    while True:
        new, size = problem.ascend(state, size, process.floor)
        rise = (new.dual - state.dual) / process.epsilon
        state, quiet = new, quiet + 1 if rise < 1e-9 else 0
        if quiet:
            size *= 0.5  # a long step may have crossed the top to a point as high
        yield Step(state.potential, -state.dual / process.epsilon, rise, quiet == 2)


def ascended(process: MixtureProcess, source: Side, target: Side) -> MixturePotential:
    """The potential after a few of these on some points."""
    problem, size = DualProblem(source, target, process.beta), 1.0
    state = problem.at(process.potential())
    for _ in range(ASCENT_STEPS):
        new, size = problem.ascend(state, size, process.floor)
        gain, state = new.dual - state.dual, new
        if gain < 1e-3 * process.epsilon:
            break
    return state.potential


class Dual:
    r"""Adam up the dual G at inverse-mapped minibatches: the likelihood's way for infinite beta."""

    name, num_updates = "dual", 5000

    def serves(self, bridge: LearningBridge) -> bool:
        """Whether the bridge has a price of volatility."""
        return bridge.asked_beta is not None

    def check(self, bridge: LearningBridge) -> None:
        """Refuse nothing."""

    def solve(self, bridge: LearningBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Start, and make the updates."""
        if math.isinf(bridge.beta):
            return Likelihood().solve(bridge, ends, options)
        loss = DualLoss(begin(bridge, ends), ends, options.fit.batch_size)
        return descend(bridge, ends, options, loss)


class DualLoss:
    r"""The dual :math:`-G / \epsilon` of minibatches, at inverse points that follow the parameters.

    By the envelope theorem its gradient is the likelihood loss's at the inverse points, held fixed. A pool of pairs
    is inverted by Newton's method and used ``PASSES`` times, with one more Newton step before each use.

    Args:
        process: What is learnt.
        ends: Where pairs come from.
        batch_size: Pairs of a minibatch.
    """

    def __init__(self, process: MixtureProcess, ends: Ends, batch_size: int) -> None:
        self.process, self.ends, self.batch_size = process, ends, batch_size
        self.pool: Pool | None = None

    def __call__(self) -> Tensor:
        """Loss of the next minibatch."""
        if self.pool is None or self.pool.used >= PASSES * len(self.pool.pairs.x1):
            self.pool = Pool(self.inverted(max(POOL, self.batch_size)))
        index = self.pool.next(self.batch_size)
        pairs, process = self.pool.pairs.rows(index), self.process
        potential = process.potential(pairs.context)
        start, end = process.bass(potential, 0.0), process.bass(potential, 1.0)
        with torch.no_grad():
            y0 = start.newton_step(pairs.y0, pairs.x0, num_products=PRODUCTS)
            y1 = end.newton_step(pairs.y1, pairs.x1, num_products=PRODUCTS)
        self.pool.put(index, y0, y1)
        return (start.objective(y0, pairs.x0).mean() - end.objective(y1, pairs.x1).mean()) / process.epsilon

    @torch.no_grad()
    def inverted(self, num: int) -> "Pairs":
        """Points of both sides with their exact inverses."""
        source, target = paired(self.ends.source.batch(num).points, self.ends.target.batch(num))
        potential, points1 = self.process.lift(target.points, target.context)
        points0 = self.process.lift(source, target.context)[1]
        y0 = self.process.bass(potential, 0.0).inverse(points0, tolerance=POOL_TOLERANCE).points
        y1 = self.process.bass(potential, 1.0).inverse(points1, tolerance=POOL_TOLERANCE).points
        return Pairs(points0, y0, points1, y1, target.context)


class ChosenBeta:
    """The dual for the largest beta whose held-out likelihood is within a standard error of the best candidate's."""

    name, num_updates = "dual", 5000

    def serves(self, bridge: LearningBridge) -> bool:
        """Whether the bridge leaves beta open."""
        return bridge.asked_beta == "auto"

    def check(self, bridge: LearningBridge) -> None:
        """Refuse nothing."""

    def solve(self, bridge: Any, ends: Ends, options: LightOptions) -> FitHistory:
        """A short fit at each candidate, and a long one at the chosen."""
        chosen = self.choose(bridge, ends, options)
        return chosen if chosen.interrupted else Dual().solve(bridge, ends, options)

    def choose(self, bridge: Any, ends: Ends, options: LightOptions) -> FitHistory:
        """Set the bridge's beta and scores."""
        steps = max(1, options.fit.num_updates // 5)
        short = options._replace(fit=options.fit._replace(num_updates=steps, checkpoint=None, progress=False))
        scores, history = {}, FitHistory()
        judge = ends.target.held_out(HELD_OUT)
        base = ends.source.held_out(HELD_OUT).points
        for beta in CANDIDATES:
            bridge.beta = beta
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*has not converged", RuntimeWarning)  # a short run need not
                warnings.filterwarnings("ignore", ".*kept its start", RuntimeWarning)
                history = Dual().solve(bridge, ends, short)
            if history.interrupted:
                return history
            with torch.no_grad():
                scores[beta] = bridge.process.mean_log_prob(judge.points, base, judge.context)
        weights = judge.weights if judge.weights is not None else judge.points.new_full((len(judge.points),), 1.0)
        weights = weights / weights.sum()
        best = max(scores.values(), key=lambda score: float(weights @ score))
        gaps = {beta: best - score for beta, score in scores.items()}
        errors = {beta: float(weights.square() @ (gap - weights @ gap).square()) ** 0.5 for beta, gap in gaps.items()}
        bridge.beta = max(beta for beta, gap in gaps.items() if float(weights @ gap) <= errors[beta])
        unit = bridge.dim * bridge.scale.log()
        bridge.scores = {beta: float(weights @ score - unit) for beta, score in scores.items()}
        return history


class Alternating:
    r"""Stages of bridge matching and of a learnt inverse: algorithm 1 of arXiv 2601.19312, for comparison.

    From :math:`Z = \mathrm{id}`, ``NUM_STAGES`` times

    1. fit the potential by bridge matching between :math:`Z(0, x_0)` and :math:`Z(1, x_1)`;
    2. fit the network by :math:`|Z(t, X_t(x)) - x|^2` at t = 0 and 1, with x from the two sides.

    With the drift's regular form, and a learning rate that falls within each stage. Half of the steps go to each. It
    has no rule to stop by and no held-out loss, so it never says that it has converged.
    """

    name, num_updates = "alternating", 10_000

    def serves(self, bridge: LearningBridge) -> bool:
        """Whether the bridge has a price of volatility."""
        return bridge.asked_beta is not None

    def check(self, bridge: LearningBridge) -> None:
        """Refuse a context, and a beta that is still to be chosen or infinite."""
        refuse_context(self, bridge)
        refuse_open_beta(self, bridge)
        if math.isinf(bridge.beta):
            raise ValueError('solver="alternating" needs a finite beta, got inf. Use LightSBM.')

    def solve(self, bridge: LearningBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Give the bridge a network as inverse, start, and make the stages."""
        learned = bridge.learned_map = LearnedMap(bridge.dim).to(bridge.location)
        process, history, batch_size, mapped = begin(bridge, ends), FitHistory(), options.fit.batch_size, False
        steps = max(1, options.fit.num_updates // (2 * NUM_STAGES))

        def matching() -> Tensor:
            x0 = ends.source.batch(batch_size).points.expand(batch_size, -1)
            x1 = ends.target.batch(batch_size).points
            if mapped:
                with torch.no_grad():
                    x0, x1 = learned(torch.tensor(0.0), x0), learned(torch.tensor(1.0), x1)
            return matching_loss(process.potential(), x0, x1)

        def inverting() -> Tensor:
            with torch.no_grad():
                potential = process.potential()
                sides = [ends.source.batch(batch_size).points, ends.target.batch(batch_size).points]
                images = [process.bass(potential, t).forward(x) for t, x in zip((0.0, 1.0), sides, strict=True)]
            errors = [
                (learned(torch.tensor(t), image) - x).square().sum(-1).mean()
                for t, image, x in zip((0.0, 1.0), images, sides, strict=True)
            ]
            return errors[0] + errors[1]

        halves: tuple[tuple[str, nn.Module, Callable[[], Tensor], float, list[float]], ...] = (
            ("matching", process.parameters, matching, options.fit.learning_rate, history.losses),
            ("inverse", learned, inverting, MAP_LEARNING_RATE, history.residuals),
        )
        for stage in range(NUM_STAGES):
            for name, module, loss, rate, record in halves:
                part = train(
                    module.parameters(),
                    loss,
                    num_updates=steps,
                    learning_rate=rate,
                    num_checks=4,
                    tolerance=math.inf,
                    progress=options.fit.progress,
                    description=f"{name}, stage {stage + 1}",
                )
                record += part.losses
                history.iterations += part.iterations
                history.threads = part.threads
                if part.interrupted:
                    history.interrupted = True
                    return history
            mapped = True
        return history


SOLVERS: dict[str, Solver] = {s.name: s for s in (Likelihood(), Matching(), MomentSteps(), Dual(), Alternating())}
OLD_NAMES = {"em": "moments", "batch": "moments"}  # and "adam", each class's first


def find_solver(bridge: LearningBridge, name: str | None) -> Solver:
    """The solver of this name, the class's own where there is none; refused where it does not serve the bridge."""
    name = bridge.default_solver if name is None else name
    serving = [each for each, solver in SOLVERS.items() if solver.serves(bridge)]
    if name not in serving:
        raise ValueError(
            f"{type(bridge).__name__}'s solver must be one of {serving}, got {name!r}. "
            f'Write solver="{OLD_NAMES.get(name, bridge.default_solver)}".'
        )
    SOLVERS[name].check(bridge)
    return SOLVERS[name]


def refuse_context(solver: Solver, bridge: LearningBridge) -> None:
    """Refuse a bridge with a context, for solvers that learn no network of it."""
    if bridge.context_dim:
        raise ValueError(
            f'solver="{solver.name}" has no network, got context_dim > 0. Write solver="{bridge.default_solver}".'
        )


def refuse_open_beta(solver: Solver, bridge: LearningBridge) -> None:
    """Refuse a bridge whose beta the fit is to choose, for solvers that cannot."""
    if bridge.asked_beta == "auto":
        raise ValueError(f'beta="auto" needs solver="dual", got {solver.name!r}. Give beta a number.')


def options_for(
    bridge: LearningBridge,
    solver: Solver,
    num_updates: int | None,
    batch_size: int,
    learning_rate: float | None,
    num_law_draws: int,
    progress: bool,
    checkpoint: str | Path | None,
    patience: int,
) -> LightOptions:
    """Options of a fit by this solver, its defaults where None."""
    steps = solver.num_updates if num_updates is None else num_updates
    rate = (2e-3 if bridge.context_dim else 5e-3) if learning_rate is None else learning_rate
    return LightOptions(FitOptions(steps, batch_size, rate, None, num_law_draws, progress, checkpoint), patience)


@torch.no_grad()
def held_out_loss(process: MixtureProcess, ends: Ends, num: int = HELD_OUT) -> float:
    r"""Loss of held-out points whatever is trained on: the likelihood's, or :math:`-G / \epsilon` for finite beta."""
    target = ends.target.held_out(num)
    source = ends.source.held_out(len(target.points)).points
    if math.isinf(process.beta):
        return float(process.likelihood(source, target))
    return -process.dual(source, target) / process.epsilon


def all_points(end: Any, num: int) -> Side:
    """All draws of an end with their weights; ``num`` fresh ones of a distribution."""
    if isinstance(end, PointEnd):
        return equal_weights(end.point)
    if end.fresh:
        return equal_weights(end.batch(num).points)
    rows, weights = end.all()
    return Side(rows.points, weights)


@torch.no_grad()
def begin(bridge: LearningBridge, ends: Ends) -> MixtureProcess:
    """Put the start into the parameters: clusters of the target, for finite beta followed by steps up the dual."""
    process, parameters = bridge.process, bridge.parameters_of
    if process.epsilon < SMALL_EPSILON and process.source_variance > 0:
        warnings.warn(
            f"epsilon is {process.epsilon:.2g} of the target's variance, below {SMALL_EPSILON:g}: gates saturate, "
            "and the fit may be far off. Raise epsilon, or compare draws with held-out ones.",
            RuntimeWarning,
            stacklevel=6,
        )
    source, target = ends.source.batch(START_DRAWS // 2).points, ends.target.batch(START_DRAWS).points
    repeated = isinstance(ends.target, DrawsEnd) and len(target) > ends.target.num_train
    clustered = all_points(ends.target, 0) if repeated else equal_weights(target)
    num, diagonal = bridge.num_components, bridge.covariance == "diagonal"
    potential = cluster_start(source, clustered, num, process.epsilon, floor=process.floor, diagonal=diagonal)
    parameters.reset()
    process.take(potential)
    if math.isinf(process.beta) or process.learned_map is not None:
        return process
    end = math.sqrt(process.epsilon * process.floor) * (1 + (1 - 1 / process.floor) / process.beta)
    narrowest = float(parameters.axes.min()) / 10
    if narrowest < end and narrowest < 0.1:
        warnings.warn(
            f"the target's narrowest axis has a standard deviation of {narrowest * float(bridge.scale):.2g}, but at "
            f"beta = {process.beta:g} no component is narrower than {end * float(bridge.scale):.2g}. Raise beta, lower "
            "epsilon, or rescale the axis.",
            RuntimeWarning,
            stacklevel=6,
        )
    draws = (equal_weights(end.batch(ASCENT_DRAWS).points) for end in ends)
    process.take(ascended(process, *draws))  # at small beta the inverse moves points far from their clusters
    return process


def descend(bridge: LearningBridge, ends: Ends, options: LightOptions, loss: Callable[[], Tensor]) -> FitHistory:
    """Adam down the loss of minibatches. Of finite data the parameters with the lowest held-out loss are kept."""
    process, finite = bridge.process, not ends.target.fresh
    parameters = list(process.parameters.parameters())
    num_updates, rate = options.fit.num_updates, options.fit.learning_rate
    judges = min(HELD_OUT, HELD_OUT_BATCHES * options.fit.batch_size)  # a check costs no more than three updates
    every = max(1, num_updates // NUM_CHECKS)
    checks = EarlyChecks(parameters, lambda: held_out_loss(process, ends, judges), every)

    def noisy_loss() -> Tensor:
        if bridge.context_dim:
            checks.look()
        with process.parameters.noise():
            return loss()

    name, checkpoint = type(bridge).__name__, options.fit.checkpoint
    history = train(
        parameters,
        noisy_loss,
        num_updates=num_updates,
        learning_rate=rate,
        validate=checks.validate,
        keep_best=finite,
        num_checks=NUM_CHECKS,
        patience=options.patience if finite else None,
        progress=options.fit.progress,
        description=name,
        on_check=None if checkpoint is None else lambda: bridge.save(checkpoint),
    )
    if isinstance(ends.target, DrawsEnd) and bridge.context_dim:
        checks.settle(history)
        knobs = f"dropout {bridge.dropout:g}, learning_rate {rate:g}, num_updates {num_updates}"
        if not history.interrupted:
            checks.warn_if_start(history, name, ends.target.num_train, knobs, stacklevel=5)
    return history
