"""The light Schrödinger bridges: one Gaussian-mixture potential, fitted by likelihood or by bridge matching."""

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.ends import Batch, DrawsEnd, Ends, PointEnd
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.options import Options
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, equal_weights, moment_step
from pyro_sb.threads import Pace, chosen_threads
from pyro_sb.training import Best, FitHistory, interruptible, train

HELD_OUT, HELD_OUT_BATCHES = 2048, 8  # points that the held-out loss is read from, and at most so many minibatches
NUM_CHECKS = 20  # of Adam's way
LAST_TIME, NUM_TIMES = 0.99, 32  # of bridge matching: the papers' cut, and the times that a minibatch shares


class LightSB(MixtureBridge):
    r"""Schrödinger bridge whose potential is a Gaussian mixture, fitted by maximum likelihood without simulation.

    With :math:`v(y) = \sum_j a_j N(y; r_j, \epsilon S_j)` the plan is a mixture,
    :math:`\pi(x_1 | x_0) = v(x_1) e^{\langle x_0, x_1 \rangle / \epsilon} / c(x_0)`, and

    .. math:: L = E_{\mu_0} \log c(x_0) - E_{\mu_1} \log v(x_1) = \mathrm{KL}(\pi^* \| \pi) + \text{const} ,

    so no coupling, no time and no noise enter the fit. Draws are one-shot: no SDE is solved. From a point (the default,
    the target's mean) ``bridge()`` is a Gaussian mixture with an exact ``log_prob``; given a context it is a mixture
    density network. From a distribution, ``draws()`` carries the exact log weight of both ends.

    **Ends are sub-Gaussian**: use `TailMatched` for heavy tails. Components are diagonal by default; take
    ``covariance="full"`` for correlated targets up to some 50 dimensions.

    Args:
        dim: Event size.
        num_components: J.
        epsilon: Variance of the Brownian reference over [0, 1], positive, in squared units of the data.
        context_dim: Size of the context, 0 for none. With a context, a network gives weights, means and covariances.
        covariance: ``"diagonal"`` or ``"full"``.
        hidden: Widths of the context network's hidden layers.
        dropout: Share of features that the network drops while it learns, in [0, 1): for few draws.
        embedding: Module from contexts ``(n, context_dim)`` to features, learnt with the rest, such as
            `pyro_sb.nn.SetEmbedding` for exchangeable observations. It sees contexts as they are; without it they are
            standardised. A module of your own is not reset by a further fit: it may be pretrained.

    References:
        Light Schrödinger Bridge (Korotin, Gushchin and Burnaev, 2024), https://arxiv.org/abs/2310.01174, eq. 10. The
        parameters are those of the paper; the start, the moment steps and the path weights are ours.

    Example:
        >>> bridge = LightSB(2, num_components=5, epsilon=0.5)
        >>> history = bridge.fit(torch.randn(500, 2), num_updates=100, progress=False)
        >>> bridge().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
        >>> bridge.transport(torch.zeros(4, 2)).shape
        torch.Size([4, 2])
    """

    solvers: tuple[str, ...] = ("adam", "em")

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        num_updates: int | None = None,
        batch_size: int = 512,
        learning_rate: float | None = None,
        solver: str | None = None,
        held_out: float | Tensor = 0.1,
        num_draws: int = 20_000,
        patience: int = 10,
    ) -> FitHistory:
        r"""Fit the potential, from k-means clusters of the target carried down a ladder of falling epsilons.

        Of finite data the parameters with the lowest held-out loss are kept.

        Args:
            target: Draws ``(N, dim)``, or a distribution, which gives fresh draws at every step.
            source: Draws ``(N, dim)``, a distribution, or a point ``(dim,)``. Omitted: the point at the target's mean.
                Independent of the context.
            context: Contexts of the target's draws. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the target's draws. Shape ``(N,)``.
            progress: Show a bar.
            checkpoint: Path that the bridge is saved to at the end, and at every check of Adam's.
            num_updates: Updates. Omitted: 5000 of Adam, 200 moment steps, 10,000 of the two nets that alternate.
            batch_size: Points of each side an update.
            learning_rate: Of Adam's first update, in units of the target's standard deviation. Omitted: 5e-3, or 2e-3
                for a network.
            solver: Of `LightSB`, ``"adam"`` (default), or ``"em"``: moment steps on all draws at once, fast on small
                data. Of `LightSBM`, ``"adam"``. Of `LightSBBM`, ``"dual"`` (default): Adam at inverse-mapped
                minibatches, one warm Newton step each; ``"batch"``: moment steps with a line search on the dual of all
                draws, for small exact problems; or ``"alternating"``: the paper's algorithm with a learnt inverse,
                which loses the density.
            held_out: Share of the draws that the fit is judged by, in [0, 1), or a boolean mask of shape ``(N,)``: for
                draws in groups. 0 judges by all of them.
            num_draws: How many draws of a distribution the units and EM are read from.
            patience: Checks without a lower held-out loss, of 20 on the way, after which Adam stops; for draws.

        Returns:
            Training and held-out losses in nats, lowest is best; whether they had settled. `LightSBBM`'s are
            :math:`-G / \epsilon`, comparable within one beta; as residuals its batch solver gives the ascent a step.

        Warns:
            RuntimeWarning: Not converged; or, with a context, that the start, which does not use it, was the best by
                the held-out loss. There are early looks before the first twentieth of the way.
        """
        begun = time.perf_counter()
        options = Options(
            self._read_solver(solver), num_updates, batch_size, learning_rate, num_draws, progress, checkpoint, patience
        )
        options.check()
        before = copy.deepcopy(self.state_dict()), self.source
        self._learning = False
        try:
            with chosen_threads(target, source):
                ends = self._read(target, source, context, weights, num_draws, held_out)
                history = self._solve(ends, options)
        except BaseException:
            if not self._learning:  # nothing was learnt yet: the bridge is what it was
                self.load_state_dict(before[0])
                self.source = before[1]
            raise
        if checkpoint is not None:
            self.save(checkpoint)
        history.seconds = time.perf_counter() - begun
        return history

    def loss(self, ends: Ends, batch_size: int) -> Tensor:
        """Loss of a minibatch, in nats up to a constant."""
        target = ends.target.batch(batch_size)
        return self._likelihood(ends.source.batch(batch_size).points, target)

    def _noisy_loss(self, ends: Ends, batch_size: int) -> Tensor:
        """The loss with the network's dropout switched on."""
        net = self.parameters_of.net
        if net is None:
            return self.loss(ends, batch_size)
        net.noisy = True
        try:
            return self.loss(ends, batch_size)
        finally:
            net.noisy = False

    def held_out_loss(self, ends: Ends, num: int = HELD_OUT) -> float:
        """Likelihood loss on held-out points: the same landscape whichever loss is trained on."""
        target = ends.target.held_out(num)
        with torch.no_grad():
            return float(self._likelihood(ends.source.held_out(len(target.points)).points, target))

    def _likelihood(self, source: Tensor, target: Batch) -> Tensor:
        if self._factored and target.context is not None:  # -log of the plan's density from the source
            law = self.parameters_of.law(target.context, self._epsilon)
            return -weighted_mean(law.log_prob(target.points), target.weights)
        source, target = paired(source, target)
        potential, y1 = self._lift(target.points, target.context)
        y0 = self._lift(source, target.context)[1]
        own = None if target.context is None else target.weights  # source rows belong to contexts, or weigh the same
        return likelihood_loss(potential, y0, y1, own, target.weights)

    def _solve(self, ends: Ends, options: Options) -> FitHistory:
        """Start, and learn by the solver asked for."""
        self._begin(ends)
        return self._moment_fit(ends, options) if options.solver == "em" else self._adam_fit(ends, options)

    def _adam_fit(self, ends: Ends, options: Options) -> FitHistory:
        finite, parameters = not ends.target.fresh, list(self.parameters_of.parameters())
        num_updates, rate = options.steps(5000), options.rate(2e-3 if self.context_dim else 5e-3)
        judges = min(HELD_OUT, HELD_OUT_BATCHES * options.batch_size)  # a check costs no more than three updates
        checks = EarlyChecks(parameters, lambda: self.held_out_loss(ends, judges), max(1, num_updates // NUM_CHECKS))

        def loss() -> Tensor:
            if self.context_dim:
                checks.look()
            return self._noisy_loss(ends, options.batch_size)

        history = train(
            parameters,
            loss,
            num_updates=num_updates,
            learning_rate=rate,
            validate=checks.validate,
            keep_best=finite,
            num_checks=NUM_CHECKS,
            patience=options.patience if finite else None,
            progress=options.progress,
            description=type(self).__name__,
            on_check=self._save_checkpoint(options.checkpoint),
        )
        if isinstance(ends.target, DrawsEnd) and self.context_dim:
            checks.settle(history)
            knobs = f"dropout {self.dropout:g}, learning_rate {rate:g}, num_updates {num_updates}"
            if not history.interrupted:
                checks.warn_if_start(history, type(self).__name__, ends.target.num_train, knobs, stacklevel=4)
        return history

    @torch.no_grad()
    def _moment_fit(self, ends: Ends, options: Options) -> FitHistory:
        """Moment steps on all draws until the held-out loss stops falling."""
        source, target = (all_points(end, options.num_draws) for end in ends)
        num_updates = options.steps(200)
        history, best, pace = FitHistory(), Best(list(self.parameters_of.parameters())), Pace()
        potential = self.parameters_of(None, self._epsilon)
        points, weights = zip(source, target)
        best.offer(self.held_out_loss(ends))
        with interruptible(history, num_updates, type(self).__name__):
            for step in pace.each(range(1, num_updates + 1), source.points.device):
                potential = moment_step(potential, source, target, floor=self._floor)
                self.parameters_of.set(potential, self._floor)
                history.losses.append(float(likelihood_loss(potential, *points, *weights)))
                history.validation_losses.append(self.held_out_loss(ends))
                history.iterations = step
                best.offer(history.validation_losses[-1])
                if step >= 10 and abs(history.losses[-10] - history.losses[-1]) < 1e-4:  # a rise is no rest
                    history.converged = True
                    break
        best.restore()
        history.threads = pace.describe()
        if not history.converged and not history.interrupted:
            warnings.warn(
                f"{type(self).__name__}'s moment steps have not converged: the loss still falls after "
                f"{num_updates}. Raise num_updates.",
                RuntimeWarning,
                stacklevel=3,
            )
        return history

    def _read_solver(self, solver: str | None) -> str:
        """The solver's name; the class's default if there is none, an error if it is not one of the class's."""
        solver = self.solvers[0] if solver is None else solver
        if solver not in self.solvers:
            raise ValueError(f"{type(self).__name__}'s solver must be one of {list(self.solvers)}, got {solver!r}.")
        if solver != self.solvers[0] and self.context_dim:
            raise ValueError(
                f'solver="{solver}" has no network, got context_dim > 0. Write solver="{self.solvers[0]}".'
            )
        return solver


class LightSBM(LightSB):
    r"""The same bridge fitted by matching: its drift regresses on the slopes of Brownian bridges.

    .. math:: \frac{1}{2 \epsilon} \int_0^{.99} E \Big| s(t, x_t) - \frac{x_1 - x_t}{1 - t} \Big|^2 dt, \qquad
        x_t = (1 - t) x_0 + t x_1 + \sqrt{\epsilon t (1 - t)}\, z

    with :math:`x_0, x_1` independent. Up to a constant that is `LightSB`'s loss for times to 1: the same minimiser and
    landscape, with the noise of t and z added and a little bias from the cut. It is here to compare; prefer `LightSB`.

    Its arguments are `LightSB`'s, but for ``solver``: there is Adam alone.

    References:
        Light and Optimal Schrödinger Bridge Matching (Gushchin, Kholkin, Burnaev and Korotin, 2024),
        https://arxiv.org/abs/2402.03207, algorithm 1. A minibatch shares 32 stratified times here, so that a step costs
        what a likelihood step costs.

    Example:
        >>> bridge = LightSBM(1, num_components=3)
        >>> history = bridge.fit(torch.randn(500, 1), torch.randn(500, 1), num_updates=100, progress=False)
        >>> bridge.drift(0.5, torch.zeros(4, 1)).shape
        torch.Size([4, 1])
    """

    solvers = ("adam",)

    def loss(self, ends: Ends, batch_size: int) -> Tensor:
        """Matching loss of a minibatch, in nats up to a constant."""
        target = ends.target.batch(batch_size)
        potential = self.parameters_of(target.context, self._epsilon)
        return matching_loss(potential, ends.source.batch(batch_size).points, target.points)


def likelihood_loss(
    potential: MixturePotential, y0: Tensor, y1: Tensor, weights0: Tensor | None = None, weights1: Tensor | None = None
) -> Tensor:
    r"""The loss :math:`E \log c(y_0) - E \log v(y_1)` under equal or given weights of the rows."""
    log_c, log_v = potential.normaliser().value(y0), potential.adjusted().value(y1)
    return weighted_mean(log_c, weights0) - weighted_mean(log_v, weights1)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over all entries, or their sum by weights ``(n,)``."""
    return values.mean() if weights is None else weights / weights.sum() @ values.flatten()


def matching_loss(potential: MixturePotential, y0: Tensor, y1: Tensor) -> Tensor:
    """`LightSBM`'s loss at the independent coupling of rows ``(n, dim)``; a batched potential has one a row."""
    y0 = y0.expand_as(y1) if len(y0) == 1 else y0
    if potential.log_weights.dim() > 1:
        groups, y0, y1 = len(y0), y0[:, None], y1[:, None]
    else:
        many = potential.diagonal or y0.shape[-1] <= 32  # a time costs J factorisations where matrices are full
        groups = min(NUM_TIMES if many else NUM_TIMES // 4, len(y0))
        size = len(y0) // groups
        y0, y1 = (y[: groups * size].unflatten(0, (groups, size)) for y in (y0, y1))
    strata = torch.randperm(groups, device=y0.device) + torch.rand(groups, dtype=y0.dtype, device=y0.device)
    t = LAST_TIME * strata / groups
    times = t[:, None, None]
    yt = (1 - times) * y0 + times * y1 + (potential.epsilon * times * (1 - times)).sqrt() * torch.randn_like(y0)
    slope = (y1 - yt) / (1 - times)
    return LAST_TIME * (potential.drift(t, yt) - slope).square().sum(-1).mean() / (2 * potential.epsilon)


def paired(source: Tensor, target: Batch) -> tuple[Tensor, Batch]:
    """Ends as they are without context; with one, a source row for each of its rows."""
    if target.context is None:
        return source, target
    if len(source) == 1:
        return source.expand_as(target.points), target
    return source[torch.arange(len(target.points), device=source.device) % len(source)], target


def all_points(end: Any, num: int) -> Side:
    """All draws of an end with their weights; ``num`` fresh ones of a distribution."""
    if isinstance(end, PointEnd):
        return equal_weights(end.point)
    if end.fresh:
        return equal_weights(end.batch(num).points)
    rows, weights = end.all()
    return Side(rows.points, weights)


# How a conditional light bridge is judged on its way: early too, and aloud where nothing was learnt


SHARES = (2, 4, 8, 16)  # of the way to the loop's first check
TOLERANCE = 0.05  # nats


class EarlyChecks:
    """Held-out losses of the start, of the loop, and between them: a network may overfit few draws in a dozen updates.

    The loop looks at its start and then every ``every`` updates. Here are looks after a sixteenth, an eighth, a quarter
    and a half of the first ``every`` updates, and the best of those parameters.

    Args:
        parameters: What the loop learns.
        validate: Held-out loss of their present values, in nats.
        every: Updates between checks of the loop.
    """

    def __init__(self, parameters: list[nn.Parameter], validate: Callable[[], float], every: int) -> None:
        self.best, self._validate = Best(parameters), validate
        self._steps = {every // share for share in SHARES} - {0}
        self._updates, self._losses = 0, list[float]()

    def validate(self) -> float:
        """The held-out loss, noted: the first one is the start's."""
        self._losses.append(self._validate())
        return self._losses[-1]

    def look(self) -> None:
        """To be called before every update: a check where one is due."""
        if self._updates in self._steps:
            self.best.offer(self.validate())
        self._updates += 1

    def settle(self, history: FitHistory) -> None:
        """Go back to an early look where none of the loop's checks is as low."""
        if self.best.loss < min(self._losses[:1] + history.validation_losses):
            self.best.restore()

    def warn_if_start(self, history: FitHistory, name: str, rows: int, knobs: str, stacklevel: int) -> None:
        """Say so where the start, which ignores the context, was the best of all, and by far that of the loop.

        A loop that stays as good as its start has met a context that tells nothing: there is nothing to say.
        """
        start, *later = self._losses
        if not later or min(later) < start or min(history.validation_losses, default=start) <= start + TOLERANCE:
            return
        warnings.warn(
            f"{name} kept its start, which does not use the context: its held-out loss of {start:.4g} nats was never "
            f"reached again at {len(later)} checks, at best {min(later):.4g}. Unless the context tells nothing about "
            f"the target, {rows} draws are too few for the network ({knobs}): give more draws, raise dropout, or lower "
            "learning_rate or num_updates.",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
