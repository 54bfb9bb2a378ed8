"""Fit of a diffusion Schrödinger bridge: phases in which one chain learns from the other."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.checkpoint import check_same, go_on, on_device, words_of, write
from pyro_sb.bridges.data import Batch, DrawsEnd, PairsReading, read_pairs, read_target
from pyro_sb.bridges.dsb.data import (
    EndPairs,
    Lesson,
    Paths,
    ReferenceChain,
    SourceReading,
    packed,
    read_source_law,
    reversed_paths,
    sinkhorn_pairs,
    unpacked,
)
from pyro_sb.bridges.dsb.half import Chain, Given, HalfBridge, knot_times
from pyro_sb.checks import check_choice, flag, whole
from pyro_sb.training import FitHistory, train
from pyro_sb.warn import warn

PAIRS, LOSSES, REFERENCES = ("independent", "sinkhorn"), ("mean", "drift"), ("brownian", "ou")


class Iterations(NamedTuple):
    """Options of a fit's iterations; as in `DSB.fit`."""

    num_iterations: int
    num_pairs: int
    pairs: str
    loss: str
    reference: str
    warm_start: bool
    refresh: int

    def read(self, context_dim: int, method: str) -> "Iterations":
        """The same, as numbers that a fit can use; an error where one is none."""
        check_choice("pairs", self.pairs, PAIRS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("reference", self.reference, REFERENCES)
        if self.pairs == "sinkhorn" and context_dim:
            raise ValueError('pairs must be "independent" where there is a context, got "sinkhorn": it mixes contexts.')
        if self.reference == "ou" and method != "ipf":
            raise ValueError('reference "ou" needs method="ipf", got "imf", whose bridges are Brownian.')
        return self._replace(
            num_iterations=whole("num_iterations", self.num_iterations),
            num_pairs=whole("num_pairs", self.num_pairs, 2),
            warm_start=flag("warm_start", self.warm_start),
            refresh=whole("refresh", self.refresh),
        )


def default_pairs(method: str, dim: int) -> int:
    """Pairs (IMF) or paths (IPF) to learn from at a time: few say little of many covariances."""
    return 10_000 if method == "ipf" else max(10_000, min(25_000, 1250 * dim), 500 * dim)


class Chains(Protocol):
    """The two halves that a fit teaches, and what it asks of the bridge that holds them: `DSB`."""

    dim: int
    context_dim: int
    epsilon: float
    method: str
    variance: str
    num_steps: int
    ahead: HalfBridge
    back: HalfBridge
    fitted_to: str

    def adopt(self, read: PairsReading, source: SourceReading) -> None:
        """Take the data's units, the source, and the Gaussian bridge between the ends."""
        ...

    def chain(self, forward: bool) -> Chain:
        """One of the chains."""
        ...

    def given(self, half: HalfBridge, rows: Tensor | None) -> Given:
        """Means and features that a half has of standardised contexts."""
        ...

    def start(self, num: int, given: Given) -> Tensor:
        """Source points. Shape ``(num, dim)``."""
        ...

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        ...

    def contents(self) -> dict[str, Any]:
        """Contents of the bridge's file."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the bridge's file."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a saved state."""
        ...


LEAST = 1e-6  # of a variance, in its units


def measured_spread(
    half: HalfBridge, pairs: EndPairs, given: Callable[[HalfBridge, Tensor | None], Given], epsilon: float
) -> Tensor:
    """Log variances of the end given the state, in units of the Gaussian bridge's. Shape ``(NUM_KNOTS, dim)``."""
    logs = []
    for u in knot_times(half.gain):
        rows = pairs.at(u.expand(len(pairs.begin)), slice(None), epsilon)
        known = given(half, rows.context)
        miss = half.goal(rows.u, rows.states, rows.ends, known, epsilon) - half.answer(rows.u, rows.states, known)
        logs.append(miss.square().mean(0).clamp_min(LEAST).log())
    return torch.stack(logs)


def measured_steps(
    half: HalfBridge, paths: Paths, given: Callable[[HalfBridge, Tensor | None], Given], epsilon: float
) -> Tensor:
    r"""Log variances of each step given the state before it, in units of the reference's. Shape ``(K, dim)``.

    With these and the regressed means the moments of each step are those of the paths, in the directions of the
    half's basis. Between Gaussians whose covariances commute that is their reversal, for any number of steps; with the
    reference's own variance it is that only in the limit of many.
    """
    known, logs = given(half, paths.context), []
    for u, then, x, ahead in zip(paths.times[:-1], paths.times[1:], paths.states[:-1], paths.states[1:]):
        miss = ahead @ half.basis - half.step(u, then, x, known, epsilon).mean
        logs.append((miss.square().mean(0) / (epsilon * (then - u))).clamp_min(LEAST).log())
    return torch.stack(logs)


NUM_JUDGES = 2048  # pairs or paths that a phase is judged by
NUM_CHECKS, PATIENCE = 20, 8
SMALL_EPSILON, LARGE_EPSILON = 1e-3, 1e3  # in units of the target's variance


def fit_dsb(
    bridge: Chains,
    options: FitOptions,
    iterations: Iterations,
    target: Any,
    source: Any,
    context: Any,
    weights: Any,
    held_out: Any,
    on_iteration: Callable[[int], None] | None,
) -> FitHistory:
    """Read the data, then learn phase by phase; from a checkpoint of the same fit, the rest of them."""
    options = options.read()
    iterations = iterations.read(bridge.context_dim, bridge.method)
    saved, random = go_on(options)
    data = read_target(
        bridge.dim,
        bridge.context_dim,
        target,
        context=context,
        weights=weights,
        num_law_draws=options.num_law_draws,
        held_out=held_out,
    )
    read = read_pairs(data, bridge.ahead.embedding, source)
    begin = read_source_law(read, source, bridge.dim, options.num_law_draws, data.held_out)
    name = words_of(type(bridge).__name__, bridge.config(), options, read, iterations._asdict(), begin.digest())
    check_same(saved, name, options)
    variance = float(read.covariance.diagonal().mean())
    if bridge.epsilon < SMALL_EPSILON * variance:
        warn(
            f"epsilon is {bridge.epsilon / variance:.2g} of the target's variance, below {SMALL_EPSILON:g}: ends are "
            "hard to tell from states, and the fit may be far off. Raise epsilon, or rescale the data.",
        )
    if bridge.epsilon > LARGE_EPSILON * variance:
        warn(
            f"epsilon is {bridge.epsilon / variance:.2g} of the target's variance, above {LARGE_EPSILON:g}: noise "
            "hides the ends until the last step, and draws may be far off. Lower epsilon, or rescale the data.",
        )
    bridge.adopt(read, begin)
    bridge.fitted_to = read.data
    fit = DSBFit(bridge, options, iterations, read, begin, random, name, on_iteration)
    if saved is not None:
        fit.restore(on_device(saved, read.affine.location.device))
    history = fit.run()
    if options.checkpoint is not None and not history.interrupted:
        bridge.save(options.checkpoint)
    return history


class DSBFit:
    """One fit of both chains: its data, its place, and its phases."""

    def __init__(
        self,
        bridge: Chains,
        options: FitOptions,
        iterations: Iterations,
        read: PairsReading,
        source: SourceReading,
        random: list[Tensor],
        name: dict[str, str],
        on_iteration: Callable[[int], None] | None,
    ) -> None:
        self.bridge, self.options, self.iterations, self.end = bridge, options, iterations, read.end
        self.random, self.name, self.on_iteration = random, name, on_iteration
        self.source = source
        order = (True, False) if bridge.method == "ipf" else (False, True)
        self.phases = [(i, forward) for i in range(1, iterations.num_iterations + 1) for forward in order]
        self.done: list[FitHistory] = []
        self.residuals: list[float] = []
        self.resume: dict[str, Any] | None = None
        self.cache: EndPairs | Paths | None = None
        self.judge: EndPairs | Paths | None = None
        self.exam: Lesson | None = None

    def run(self) -> FitHistory:
        """The phases that are left."""
        for iteration, forward in self.phases[len(self.done) :]:
            history = self._phase(iteration, forward)
            self.done.append(history)
            if history.interrupted:
                break
            if len(self.done) % 2 == 0:
                self.residuals.append(self._residual())
                if self.on_iteration is not None:
                    self.on_iteration(iteration)
        return replace(
            self.done[-1],
            residuals=list(self.residuals),
            losses=[loss for h in self.done for loss in h.losses],
            validation_losses=[loss for h in self.done for loss in h.validation_losses],
            iterations=sum(h.iterations for h in self.done),
            seconds=sum(h.seconds for h in self.done),
            converged=all(h.converged for h in self.done[-2:]),
            interrupted=any(h.interrupted for h in self.done),
        )

    def _phase(self, iteration: int, forward: bool) -> FitHistory:
        """Learn one half from what the other has drawn."""
        bridge, options, plan = self.bridge, self.options, self.iterations
        half = bridge.ahead if forward else bridge.back
        if self.resume is None:
            if bridge.method == "ipf" and not plan.warm_start:
                half.net.reset()
            self.judge = self._draw(forward, NUM_JUDGES, held_out=True)
            self.exam = self.judge.lesson(NUM_JUDGES, bridge.epsilon)
            self.cache = self._draw(forward, plan.num_pairs)
        resume, self.resume = self.resume, None
        calls = 0 if resume is None else resume["history"]["iterations"]

        def loss() -> Tensor:
            nonlocal calls
            if bridge.method == "ipf" and calls and calls % plan.refresh == 0:
                self.cache = self._draw(forward, plan.num_pairs)
            calls += 1
            assert self.cache is not None
            half.train()
            return self._loss(half, self.cache.lesson(options.batch_size, bridge.epsilon))

        def validate() -> float:
            assert self.exam is not None
            half.eval()
            with torch.no_grad():
                return float(self._loss(half, self.exam))

        finite, final = isinstance(self.end, DrawsEnd), len(self.done) >= len(self.phases) - 2
        history = train(
            half.parameters(),
            loss,
            num_updates=options.num_updates,
            learning_rate=options.learning_rate,
            validate=validate,
            keep_best=finite,
            patience=PATIENCE if finite else None,
            num_checks=NUM_CHECKS,
            tolerance=0.05 if final else math.inf,
            progress=options.progress,
            description=f"{type(bridge).__name__} {iteration}/{plan.num_iterations} ({'F' if forward else 'B'})",
            ema=options.ema,
            on_state=None if options.checkpoint is None else self._save,
            resume=resume,
        )
        half.eval()
        self._measure(half, forward)
        return history

    # Losses

    def _loss(self, half: HalfBridge, rows: Lesson) -> Tensor:
        """Half the mean square of what a half misses: of its normalised goal, or of the other chain's reversed step."""
        bridge, given = self.bridge, self._given(half, rows.context)
        miss = half.goal(rows.u, rows.states, rows.ends, given, bridge.epsilon)
        miss = miss - half.answer(rows.u, rows.states, given)
        if rows.sizes is None:
            return 0.5 * miss.square().mean()
        typical = 1 / bridge.num_steps
        weight = typical if self.iterations.loss == "drift" else rows.sizes.square()[:, None] / typical
        drift = half.drift_scale(rows.u, bridge.epsilon) * miss
        return 0.5 * (weight * drift.square()).mean() / bridge.epsilon

    @torch.no_grad()
    def _measure(self, half: HalfBridge, forward: bool) -> None:
        """Take the variances that a half leaves, unless it keeps the reference's."""
        bridge = self.bridge
        if bridge.variance == "reference":
            return
        if bridge.method == "ipf":
            paths = self._draw(forward, max(NUM_JUDGES, self.iterations.num_pairs), held_out=True)
            assert isinstance(paths, Paths)
            half.step_logs = measured_steps(half, paths, self._given, bridge.epsilon)
        else:
            assert isinstance(self.judge, EndPairs)
            half.log_spread = measured_spread(half, self.judge, self._given, bridge.epsilon)

    @torch.no_grad()
    def _residual(self) -> float:
        """The larger gap, over all axes, between means or deviations of draws and of the target."""
        target = self._rows(self.iterations.num_pairs)
        chain = self.bridge.chain(True)
        given = self._given(chain.half, target.context)
        draws = chain.run(self.bridge.start(len(target.points), given), given)[-1]
        deviation = target.points.std(0)
        means = (draws.mean(0) - target.points.mean(0)).abs() / deviation
        return float(torch.maximum(means, (draws.std(0) / deviation - 1).abs()).max())

    # Data

    @torch.no_grad()
    def _draw(self, forward: bool, num: int, held_out: bool = False) -> EndPairs | Paths:
        """Pairs or paths that the forward or the backward half is to learn from."""
        bridge, other = self.bridge, self.bridge.chain(not forward)
        rows = self._rows(num, held_out)
        given = self._given(other.half, rows.context)
        start = rows.points if forward else self._start(num, rows.context, held_out)
        if bridge.method == "ipf":
            chain: Chain | ReferenceChain = other
            if not self.done:
                variance = self.source.guide.covariance.diagonal() if self.iterations.reference == "ou" else None
                chain = ReferenceChain(other.times, bridge.epsilon, variance)
            return reversed_paths(chain, start, given, rows.context, matched=bridge.variance == "reference")
        if self.done:
            return EndPairs(other.run(start, given)[-1], start, rows.context)
        if self.iterations.pairs == "sinkhorn":
            start = start[sinkhorn_pairs(start, rows.points, bridge.epsilon)]
        return EndPairs(rows.points, start, rows.context)  # the backward half learns first

    def _start(self, num: int, context: Tensor | None, held_out: bool) -> Tensor:
        """Source points to learn from, or those held out."""
        if self.source.kind != "draws":
            return self.bridge.start(num, self._given(self.bridge.ahead, context))
        rows = self.source.test if held_out and len(self.source.test) else self.source.train
        return self.source.points[rows[torch.randint(len(rows), (num,), device=rows.device)]]

    def _rows(self, num: int, held_out: bool = False) -> Batch:
        """Rows of the target to learn from, or by weight among those held out."""
        if not held_out:
            return self.end.batch(num)
        batch = self.end.held_out(num)
        weights = torch.ones_like(batch.points[:, 0]) if batch.weights is None else batch.weights
        index = torch.multinomial(weights, num, replacement=True)
        return Batch(batch.points[index], None if batch.context is None else batch.context[index])

    def _given(self, half: HalfBridge, context: Tensor | None) -> Given:
        return self.bridge.given(half, context)

    # Checkpoints

    def _save(self, state: dict[str, Any]) -> None:
        """The bridge as of this check, loadable, and beside it all that the fit needs to go on."""
        assert self.cache is not None and self.judge is not None and self.exam is not None
        training = {
            "fit": self.name,
            "start": self.random,
            "loop": state,
            "done": [vars(h) for h in self.done],
            "residuals": list(self.residuals),
            "place": self.end.position(),
            "cache": packed(self.cache),
            "judge": packed(self.judge),
            "exam": self.exam._asdict(),
        }
        write(self.bridge.contents(), training, self.options.checkpoint)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where the saved fit was."""
        self.bridge.load_state_dict(saved["state"])
        self.done = [FitHistory(**h) for h in saved["done"]]
        self.residuals, self.resume = list(saved["residuals"]), saved["loop"]
        self.cache, self.judge = unpacked(saved["cache"]), unpacked(saved["judge"])
        self.exam = Lesson(**saved["exam"])
        self.end.seek(saved["place"])
