r"""Fit of a light bridge: the ends read, clusters to start from, and Adam down the loss L or -G / epsilon."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.data import (
    DrawsEnd,
    Ends,
    LawEnd,
    PointEnd,
    Units,
    check_conditioning,
    read_source,
    read_target,
    read_units,
)
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.light.process import MixtureProcess, cluster_start, paired
from pyro_sb.checks import whole
from pyro_sb.ops.bass import DualProblem, Pairs, Pool
from pyro_sb.ops.mixture import MixturePotential, matching_loss
from pyro_sb.ops.moment_matching import Side, equal_weights
from pyro_sb.threads import chosen_threads
from pyro_sb.training import EarlyChecks, FitHistory, train
from pyro_sb.warn import warn

HELD_OUT, HELD_OUT_BATCHES = 2048, 8  # points that the held-out loss is read from, and at most so many minibatches
NUM_CHECKS = 20  # of Adam's way
START_DRAWS = 4096  # that clusters are sought in
SMALL_EPSILON = 1e-3  # in units of the target's variance
POOL, PASSES = 8192, 4  # pairs inverted at once, and how often each is then used with one more Newton step
POOL_TOLERANCE = 1e-3  # of their inverses: the step before each use squares it
PRODUCTS = 8  # Hessian products of that step where d is large
ASCENT_DRAWS, ASCENT_STEPS = 2048, 30  # of the moment steps up the dual that a fit for finite beta starts with
OLD_NAMES = {"em": "moments", "batch": "moments"}  # of solvers; and "adam", each class's first


class LightOptions(NamedTuple):
    """Options of a light bridge's fit: those of every fit by gradients, and the checks that Adam waits for a gain."""

    fit: FitOptions
    patience: int

    def read(self) -> "LightOptions":
        """The same, as numbers that a solver can use; an error where one is none."""
        return LightOptions(self.fit.read(), whole("patience", self.patience))


class Solver(Protocol):
    """Way to the parameters of a light bridge.

    Attributes:
        name: Its name in ``fit(solver=...)``.
        num_updates: Updates where none are asked for.
    """

    name: str
    num_updates: int

    def check(self, bridge: MixtureBridge) -> None:
        """Refuse settings of such a bridge that it cannot learn."""
        ...

    def solve(self, bridge: MixtureBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Put the start into the bridge's parameters, and make the updates."""
        ...


def find_solver(bridge: MixtureBridge, name: str | None) -> Solver:
    """The solver of this name, the class's own where there is none; refused where it does not serve the bridge."""
    name = bridge.default_solver if name is None else name
    if not isinstance(name, str) or name not in bridge.solvers:
        raise ValueError(
            f"{type(bridge).__name__}'s solver must be one of {list(bridge.solvers)}, got {name!r}. "
            f'Write solver="{OLD_NAMES.get(str(name), bridge.default_solver)}".'
        )
    bridge.solvers[name].check(bridge)
    return bridge.solvers[name]


def refuse_context(solver: Solver, bridge: MixtureBridge) -> None:
    """Refuse a bridge with a context, for solvers that learn no network of it."""
    if bridge.context_dim:
        raise ValueError(
            f'solver="{solver.name}" has no network, got context_dim > 0. Write solver="{bridge.default_solver}".'
        )


def refuse_open_beta(solver: Solver, bridge: MixtureBridge) -> None:
    """Refuse a bridge whose beta the fit is to choose, for solvers that cannot."""
    if bridge.asked_beta == "auto":
        raise ValueError(f'beta="auto" needs solver="dual", got {solver.name!r}. Give beta a number.')


def options_for(
    bridge: MixtureBridge,
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
    return LightOptions(FitOptions(steps, batch_size, rate, None, num_law_draws, progress, checkpoint), patience).read()


class Fitting:
    """A fit under way.

    Attributes:
        ends: Both sides in the bridge's units.
        history: What the solver returns.
    """

    def __init__(self, ends: Ends) -> None:
        self.ends, self.history = ends, FitHistory()


@contextmanager
def learning(
    bridge: MixtureBridge,
    solver: Solver,
    options: LightOptions,
    target: Any,
    source: Any,
    context: Any,
    weights: Any,
    held_out: Any,
) -> Iterator[Fitting]:
    """The way of every fit: read the data, let a solver change the parameters within, and note what was done.

    What fails before the solver has begun leaves the bridge as it was.
    """
    begun, before = time.perf_counter(), (copy.deepcopy(bridge.state_dict()), bridge.source)
    bridge.parameters_of.changed = False
    try:
        bridge.learned_map = None
        with chosen_threads(target, source):
            fit = Fitting(read_ends(bridge, target, source, context, weights, options.fit.num_law_draws, held_out))
            yield fit
    except BaseException:
        if not bridge.parameters_of.changed:
            bridge.load_state_dict(before[0])
            bridge.source = before[1]
        raise
    end, history = fit.ends.target, fit.history
    data = f"{end.num_draws} draws" if isinstance(end, DrawsEnd) else "a distribution"
    start = {PointEnd: "a point", DrawsEnd: "draws", LawEnd: "a distribution"}[type(fit.ends.source)]
    bridge.fitted_to = f'{data} from {start}, by {history.iterations} updates of solver "{solver.name}"'
    if options.fit.checkpoint is not None:
        bridge.save(options.fit.checkpoint)
    history.seconds = time.perf_counter() - begun


def read_ends(
    bridge: MixtureBridge, target: Any, source: Any, context: Any, weights: Any, num_law_draws: int, held_out: Any
) -> Ends:
    """Both ends checked and in the bridge's units, which the bridge takes when all has gone well."""
    read = read_target(
        bridge.dim,
        bridge.context_dim,
        target,
        context=context,
        weights=weights,
        num_law_draws=num_law_draws,
        held_out=held_out,
    )
    points = read.points
    source = read_source(source, bridge.dim, points)
    units, deviations = read_units(points, read.weights)
    if bridge.covariance == "full":
        check_conditioning(points, read.weights)
    raw = bridge.parameters_of.embedding is not None  # it sees contexts as they are
    rows, *contexts = read.raw_contexts() if raw else read.contexts()
    end = (
        LawEnd(read.law, units)
        if read.law is not None
        else DrawsEnd(units.to(points), read.weights, rows, read.held_out)
    )
    if isinstance(end, DrawsEnd):
        check_components(bridge.num_components, points, end.num_train)
    share = read.held_out if isinstance(read.held_out, float) else 0.1
    start, location, variance = source_end(source, units, num_law_draws, share)
    bridge.adopt(source, units, location, variance, deviations, contexts)
    return Ends(start, end)


def check_components(num: int, points: Tensor, num_train: int) -> None:
    """Refuse more components than draws, or than distinct ones."""
    if num_train < num:
        raise ValueError(
            f"num_components must be at most the number of draws to learn from, got {num} for "
            f"{num_train} (of {len(points)}; {1 - num_train / len(points):.0%} are held out). "
            f"Write num_components={max(1, num_train // 10)}."
        )
    if len(points[:4096].unique(dim=0)) < num > len(points.unique(dim=0)):
        raise ValueError(
            f"num_components must be at most the number of distinct draws, got {num} for "
            f"{len(points.unique(dim=0))}. Write fewer."
        )


def source_end(
    source: Any, units: Units, num_law_draws: int, held_out: float
) -> tuple[LawEnd | DrawsEnd | PointEnd, Tensor, float]:
    """The source's end, centred on its own mean; the mean, and its variance in the bridge's units."""
    if source is None or (isinstance(source, Tensor) and len(source) == 1):
        location = units.location if source is None else source[0]
        return PointEnd(torch.zeros_like(location)[None]), location, 0.0
    draws = source.sample((num_law_draws,)).to(units.location) if isinstance(source, Distribution) else source
    own = Units(draws.mean(0), units.scale)
    variance = float(own.to(draws).square().mean())
    if isinstance(source, Distribution):
        return LawEnd(source, own), own.location, variance
    return DrawsEnd(own.to(draws), None, None, held_out), own.location, variance


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
def begin(bridge: MixtureBridge, ends: Ends) -> MixtureProcess:
    """Put the start into the parameters: clusters of the target, for finite beta followed by steps up the dual."""
    process, parameters = bridge.process, bridge.parameters_of
    if process.epsilon < SMALL_EPSILON and process.source_variance > 0:
        warn(
            f"epsilon is {process.epsilon:.2g} of the target's variance, below {SMALL_EPSILON:g}: gates saturate, "
            "and the fit may be far off. Raise epsilon, or compare draws with held-out ones.",
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
        warn(
            f"the target's narrowest axis has a standard deviation of {narrowest * float(bridge.scale):.2g}, but at "
            f"beta = {process.beta:g} no component is narrower than {end * float(bridge.scale):.2g}. Raise beta, lower "
            "epsilon, or rescale the axis.",
        )
    draws = (equal_weights(end.batch(ASCENT_DRAWS).points) for end in ends)
    process.take(ascended(process, *draws))  # at small beta the inverse moves points far from their clusters
    return process


def ascended(process: MixtureProcess, source: Side, target: Side) -> MixturePotential:
    """The potential after a few of these on some points."""
    problem, size = DualProblem(source, target, process.beta), 1.0
    state = problem.at(process.potential())
    for _ in range(ASCENT_STEPS):
        new, size = problem.ascend(state, size, process.floor)
        gain, state = new.dual - state.dual, new
        if not gain >= 1e-3 * process.epsilon:  # NaN too: no inverse was found at either
            break
    return state.potential


def descend(bridge: MixtureBridge, ends: Ends, options: LightOptions, loss: Callable[[], Tensor]) -> FitHistory:
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
            checks.warn_if_start(history, name, ends.target.num_train, knobs)
    return history


class Descent:
    """Adam down the loss of minibatches, whichever it is."""

    num_updates = 5000

    def check(self, bridge: MixtureBridge) -> None:
        """Refuse nothing."""

    def solve(self, bridge: MixtureBridge, ends: Ends, options: LightOptions) -> FitHistory:
        """Start, and make the updates."""
        process = begin(bridge, ends)
        return descend(bridge, ends, options, lambda: self.loss(process, ends, options.fit.batch_size))

    def loss(self, process: MixtureProcess, ends: Ends, batch_size: int) -> Tensor:
        """Loss of a minibatch, in nats up to a constant."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")


class Likelihood(Descent):
    r"""Adam down the likelihood loss :math:`E \log c(y_0) - E \log v(y_1)`: KL to the bridge, up to a constant."""

    name = "likelihood"

    def loss(self, process: MixtureProcess, ends: Ends, batch_size: int) -> Tensor:
        """Loss of a minibatch, in nats up to a constant."""
        target = ends.target.batch(batch_size)
        return process.likelihood(ends.source.batch(batch_size).points, target)


class Matching(Descent):
    r"""Adam down the matching loss, whose minimiser is the likelihood's: see `LightSBM`."""

    name = "matching"

    def loss(self, process: MixtureProcess, ends: Ends, batch_size: int) -> Tensor:
        """Loss of a minibatch, in nats up to a constant."""
        target = ends.target.batch(batch_size)
        return matching_loss(process.potential(target.context), ends.source.batch(batch_size).points, target.points)


class Dual:
    r"""Adam up the dual G at inverse-mapped minibatches: the likelihood's way for infinite beta."""

    name, num_updates = "dual", 5000

    def check(self, bridge: MixtureBridge) -> None:
        """Refuse nothing."""

    def solve(self, bridge: MixtureBridge, ends: Ends, options: LightOptions) -> FitHistory:
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
