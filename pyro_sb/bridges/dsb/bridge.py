"""Diffusion Schrödinger bridge: two learnt chains between any two laws, by iterative fitting."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge, FitOptions, chunked
from pyro_sb.bridges.data import PairsReading, summarise
from pyro_sb.bridges.dsb.data import SourceReading
from pyro_sb.bridges.dsb.fit import Iterations, default_pairs, fit_dsb
from pyro_sb.bridges.dsb.half import LATEST, Chain, Given, Guide, HalfBridge, chunked_rows, log_ratio
from pyro_sb.checks import answered, check_choice, flag, number, one_time, whole, widths
from pyro_sb.distributions import Draws
from pyro_sb.nn import embedding_config
from pyro_sb.ops.brownian import SCHEDULES, step_times
from pyro_sb.threads import chosen_threads
from pyro_sb.training import FitHistory

METHODS = ("imf", "ipf")
DEFAULT_STEPS = {"imf": (50, "triangular"), "ipf": (20, "constant")}
VARIANCES = ("measured", "reference")

CHUNK = 2**23  # numbers of a batch of paths at once


class DSB(Bridge):
    r"""Diffusion Schrödinger bridge: the law of paths between source and target that is closest to Brownian motion.

    .. math:: \min_\pi KL(\pi \,|\, \mathrm{Wiener}_\epsilon), \quad \pi_0 = \text{source}, \; \pi_1 = \text{target},

    with two learnt chains of K steps, F from the source and B from the target:

    .. math:: F(x_{k+1} | x_k) = N\Big(x_k + \tfrac{h}{1 - t} (\hat x_1 - x_k),\; \epsilon h \tfrac{1 - t - h}{1 - t} +
              \tfrac{h^2}{(1 - t)^2} \rho\Big), \qquad \hat x_1 \approx E[x_1 | x_k],

    and B the same in reversed time. Any source, any target: draws to draws, distribution to draws, noise to draws.

    **Method.** ``"imf"`` (default), iterative Markovian fitting: regress both ends on Brownian bridges between pairs,
    redraw the pairs with the chains, repeat. Both marginals are kept, and the coupling converges. ``"ipf"``, iterative
    proportional fitting: each chain learns to reverse the other, whose first is the noising reference: its first
    forward chain is the score model. Means and variances of its steps are learnt: where the ends are Gaussian with
    covariances that commute, each step is then reversed exactly, and the iterates are those of IPF for any K; where
    they do not, the bridge still is a fixed point. The published steps, whose variance stays the reference's
    (``variance="reference"``), are biased where the ends differ in scale: from N(0, I) to eight Gaussians at epsilon
    .4, twelve of them are off by 1.47 (W2, one seed, its floor .29) after twenty iterations, learnt ones by .35
    (`benchmarks/results/dsb_short.txt`). Small epsilon needs many iterations, which IMF does not, and each adds the
    networks' errors: large batches pay.

    Networks start at the Gaussian Schrödinger bridge between the ends' moments (`pyro_sb.bridges.dsb.half`); this
    does not change what is fitted, as the reference stays Brownian in the user's coordinates.

    **Densities.** ``draws()`` carry the path's log density, log source + sum log F - sum log B, which corrects them
    exactly for any number of steps and any quality of fit, where the source has a density. ``log_prob`` raises. A
    step's variance is one for all states: where the end is much surer at some than at others, more steps, short ones at
    both ends, give better draws and weights (50 triangular ones for 20 equal ones: .58 to .71 for .11 to .35 of the
    draws' number on the oxygen posterior, `benchmarks/results/dsb_oxygen.txt`).

    Args:
        dim: Event size.
        context_dim: Size of the context, 0 for none. The context is carried along both chains.
        epsilon: The reference's variance over [0, 1], in squared units of the data.
        method: ``"imf"`` or ``"ipf"``.
        num_steps: K. Free to change after an IMF fit; IPF learns its K steps, and refuses others until it is fitted
            again. Omitted: 50, for IPF the published 20.
        schedule: ``"constant"`` or ``"triangular"`` steps (`pyro_sb.ops.brownian.step_times`). Omitted: triangular, for
            IPF constant.
        variance: Of the steps: ``"measured"``, of what the networks leave, per direction and time: :math:`\rho` above,
            for IPF each step's own; or ``"reference"``, :math:`\epsilon h`, Euler-Maruyama's and the published IPF's.
        hidden: Widths of both networks.
        embedding: A module from standardised contexts ``(n, context_dim)`` to ``(n, out_dim)``, trained jointly; the
            backward chain learns a copy of it.

    Attributes:
        source: The distribution that the bridge leaves from, if it is one.

    References:
        Diffusion Schrödinger Bridge with Applications to Score-Based Generative Modeling (De Bortoli et al., 2021),
        https://arxiv.org/abs/2106.01357, algorithm 1 and equations (12) to (14): IPF. Diffusion Schrödinger Bridge
        Matching (Shi et al., 2023), https://arxiv.org/abs/2303.16852, algorithm 1: IMF. The papers' time runs from the
        data to the noise; ours from source to target.

    Example:
        >>> bridge = DSB(2)
        >>> history = bridge.fit(torch.randn(500, 2), num_iterations=1, num_updates=20, progress=False)
        >>> x0, x1 = bridge.coupling(100)
        >>> x1.shape, bridge().draws((4,)).log_q.shape
        (torch.Size([100, 2]), torch.Size([4]))
    """

    context_location: Tensor
    context_scale: Tensor
    source_deviations: Tensor
    source_points: Tensor
    shapes = {"context_location": "c", "context_scale": "c", "source_deviations": "d", "source_points": "M d"}
    earlier_names = {"chain_steps": "num_steps"}

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        epsilon: float = 1.0,
        method: str = "imf",
        num_steps: int | None = None,
        schedule: str | None = None,
        variance: str = "measured",
        hidden: tuple[int, ...] = (128, 128, 128),
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim=context_dim)
        epsilon = number("epsilon", epsilon, "(0, inf)", "Write the variance of the reference over [0, 1].")
        if embedding is not None and not context_dim:
            raise ValueError("embedding needs context_dim > 0, got 0: it maps contexts to features.")
        check_choice("method", method, METHODS)
        steps, grid = DEFAULT_STEPS[method]
        num_steps, schedule = steps if num_steps is None else num_steps, schedule or grid
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("variance", variance, VARIANCES)
        self.epsilon, self.method, self.num_steps = epsilon, method, whole("num_steps", num_steps)
        self.schedule, self.variance, self.hidden = schedule, variance, widths("hidden", hidden)
        self.ahead = HalfBridge(self.dim, self.context_dim, self.hidden, embedding)
        self.back = HalfBridge(self.dim, self.context_dim, self.hidden, copy.deepcopy(embedding))
        for name in DSB.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self.source: Distribution | None = None
        self._source_kind = "moments"
        self._learnt_steps: tuple[int, str] | None = None  # of IPF, whose networks know no other times
        self.eval()

    @property
    def density(self) -> str | None:  # type: ignore[override]
        """Path, where the source has a density; None where it is draws."""
        return None if self._source_kind == "draws" else "path"

    @property
    def density_hint(self) -> str:  # type: ignore[override]
        """Settings that would have one, for messages."""
        return "Its source is draws; fit with source omitted, or a distribution."

    def like(self) -> Tensor:
        """A fitted tensor; an error before ``fit``."""
        if not len(self.ahead.gain):
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.ahead.gain

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("epsilon", "method", "num_steps", "schedule", "variance", "hidden")
        embedding = {"embedding": embedding_config(self.ahead.embedding)}
        return super().config() | {name: getattr(self, name) for name in names} | embedding

    def describe_lines(self) -> list[str]:
        """Method, epsilon and the chain's steps; then the data."""
        steps = f"{self.num_steps} {self.schedule} steps of {self.variance} variance"
        return [f"method {self.method}, epsilon {self.epsilon:g}, {steps}", *super().describe_lines()]

    def get_extra_state(self) -> dict[str, Any]:
        """Kind of the source, and the steps that IPF learnt."""
        return {"source_kind": self._source_kind, "learnt_steps": self._learnt_steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a saved kind of source and steps; a distribution must be given again."""
        self._source_kind, self._learnt_steps = state["source_kind"], state.get("learnt_steps")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "ahead.gain")
        if isinstance(saved, Tensor) and len(saved):
            self.to(saved)
            if prefix + "ahead.step_starts" not in state_dict:
                raise ValueError(
                    "a saved DSB must hold the variances of its steps, got a file without them, of an earlier version. "
                    "Fit the bridge again."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        num_iterations: int = 6,
        num_updates: int = 1000,
        batch_size: int = 512,
        learning_rate: float = 2e-3,
        ema: float | None = 0.995,
        held_out: Any = 0.1,
        num_law_draws: int = 20_000,
        num_pairs: int | None = None,
        pairs: str = "independent",
        loss: str = "mean",
        reference: str = "brownian",
        warm_start: bool = True,
        refresh: int = 100,
        on_iteration: Callable[[int], None] | None = None,
    ) -> FitHistory:
        r"""Fit both chains in turn, iteration by iteration.

        Args:
            target: Draws ``(N, dim)``, or a distribution.
            source: Draws ``(M, dim)``, a distribution with this event, or None for independent normals with the
                target's moments (given a context: those of its affine regression). Draws and distributions do not
                depend on the context.
            context: Contexts of the target's draws. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the target's draws. Shape ``(N,)``.
            progress: Show a bar.
            checkpoint: Path of the bridge, loadable after every check. An unfinished fit that is called again with the
                same arguments goes on from it, with the same number of threads bit for bit; at the end it holds what
                `save` writes.
            num_iterations: Full iterations: both chains once.
            num_updates: Updates of each chain in each iteration.
            batch_size: States an update.
            learning_rate: Of Adam's first update in each phase.
            ema: Decay of the parameters' moving average, in [0, 1); None for none.
            held_out: Share of the draws that the fit is judged by, in [0, 1), or a boolean mask ``(N,)`` of the
                target's. The source's draws are parted by the same share, a tenth where there is a mask.
            num_law_draws: How many draws of a distribution the moments are read from.
            num_pairs: Pairs (IMF) or paths (IPF) to simulate and learn from at a time. Omitted: 10,000, or
                1,250 a dimension up to 25,000, or 500 a dimension, whichever is most: few pairs say little of many
                covariances, and errors of the iterations add up. IPF: 10,000, as published.
            pairs: First pairs of IMF: ``"independent"``; ``"sinkhorn"``, entropic optimal transport between
                minibatches (without context alone), near the bridge's coupling from the start.
            loss: Of IPF: ``"mean"``, of a step's mean, or ``"drift"``, the same divided by the step's size. With the
                reference's variance these are the published mean and drift matching; else the goal of a step is the
                state itself that it should reach.
            reference: Of IPF: ``"brownian"``, or ``"ou"``, the Ornstein-Uhlenbeck process that leaves normals with the
                source's means and variances alone. They are different problems with different bridges.
            warm_start: Go on from a chain's last networks (IPF).
            refresh: Updates between new paths (IPF).
            on_iteration: Called with the iteration's number, from 1, after each.

        Returns:
            Losses of all phases (half the mean square of a goal, of about unit variance once the pairs are the
            bridge's; independent pairs at small epsilon have larger ones); as residuals, the largest gap between means
            (in standard deviations) or deviations (relative) of draws and target after each iteration.
        """
        begun = time.perf_counter()
        options = FitOptions(num_updates, batch_size, learning_rate, ema, num_law_draws, progress, checkpoint)
        num_pairs = default_pairs(self.method, self.dim) if num_pairs is None else num_pairs
        plan = Iterations(num_iterations, num_pairs, pairs, loss, reference, warm_start, refresh)
        with chosen_threads(target, source):
            history = fit_dsb(self, options, plan, target, source, context, weights, held_out, on_iteration)
        history.seconds = max(history.seconds, time.perf_counter() - begun)
        return history

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws of the target, each by a path of the forward chain. ``(*, dim)`` to ``(*, dim)``."""
        return self._transport(x0, context, forward=True)

    def transport_back(self, x1: Tensor, context: Any = None) -> Tensor:
        """Target points to draws of the source, by the backward chain. ``(*, dim)`` to ``(*, dim)``."""
        return self._transport(x1, context, forward=False)

    def coupling(self, num: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Pairs of a start and its end, by the forward chain. Shape ``(num, *batch_shape, dim)`` each."""
        states = self.paths(whole("num", num, cure="Write 1000."), self.num_steps, context)[1]
        return states[0], states[-1]

    @torch.no_grad()
    def paths(self, num_paths: int, num_steps: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Times ``(num_steps + 1,)`` and states ``(num_steps + 1, num_paths, *batch_shape, dim)`` of the forward chain.

        Args:
            num_paths: How many, for each context.
            num_steps: Steps of each; only K of them are IPF's chain. Others take the network's means, and shorter steps
                variances nearer to the reference's.
            context: Shape ``(*batch_shape, context_dim)``.
        """
        self.like()
        num_paths, num_steps = whole("num_paths", num_paths), whole("num_steps", num_steps)
        context = self.check_context(context)
        batch = () if context is None else context.shape[:-1]
        rows = None if context is None else context.expand(num_paths, *context.shape).reshape(-1, self.context_dim)
        given = self.given(self.ahead, self._context_rows(rows))
        chain = self.chain(True, num_steps)
        states = chain.run(self.start(num_paths * math.prod(batch), given), given)
        return chain.times, answered("paths", torch.stack(states).reshape(num_steps + 1, num_paths, *batch, self.dim))

    def drift(self, t: Any, x: Tensor, context: Any = None, *, backward: bool = False) -> Tensor:
        r"""Drift of the forward process, :math:`(\hat x_1 - x) / (1 - t)`, or in its own time of the backward one.

        Args:
            t: One time in [0, 1], from the source on in both cases; within .001 of the end ahead, the drift there.
            x: Shape ``(*, dim)``.
            context: Shape ``(*, context_dim)``.
            backward: That of the chain from the target: :math:`(\hat x_0 - x) / t`.
        """
        x, rows, shape = self._rows(x, context)
        t = x.new_tensor(one_time(t))
        half, u = (self.back, 1 - t) if flag("backward", backward) else (self.ahead, t)
        u = u.clamp(0, LATEST)
        end = half.end(u, x, self.given(half, rows), self.epsilon)
        return answered("drift", ((end - x) / (1 - u)).reshape(shape))

    @torch.no_grad()
    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws by the forward chain. Shape ``(num, dim)``."""
        given = self.given(self.ahead, self._context_rows(context))
        x, chain = self.start(num, given), self.chain(True)
        return chunked_rows(lambda x, given: chain.run(x, given)[-1], x, given)

    @torch.no_grad()
    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws by the forward chain, with the log density of their paths."""
        if self.density is None:
            return super().draws_rows(num, context)
        rows, size = self._context_rows(context), max(1, CHUNK // (self.dim * (self.num_steps + 1)))
        parts = [
            self._draws(min(size, num - i), None if rows is None else rows[i : i + size]) for i in range(0, num, size)
        ]
        if not parts:
            return Draws(self.like().new_empty(0, self.dim), self.like().new_empty(0))
        return Draws(*(torch.cat(each) for each in zip(*parts)))

    @torch.no_grad()
    def path_log_prob(self, x: Any, context: Any = None, num_paths: int = 16) -> Tensor:
        r"""Lower bound in expectation on the log density of `draws`, from paths of the backward chain that begin at x.

        .. math:: \log \frac1M \sum_j \exp\Big(\log p_0 + \sum_k \log F - \sum_k \log B\Big)(x^{(j)}_{0:K}), \quad
                  x^{(j)}_K = x ,

        whose exponential has the density itself as its mean.

        Args:
            x: Points. Shape ``(*, dim)``.
            context: Shape ``(*, context_dim)``.
            num_paths: M.

        Returns:
            Shape ``(*)``.
        """
        num_paths = whole("num_paths", num_paths)
        if self.density is None:
            raise NotImplementedError(f"{self.describe()} has no density of its draws. {self.density_hint}")
        x, rows, shape = self._rows(x, context)
        width = self.dim * (self.num_steps + 1)
        total = torch.stack([chunked(self._redrawn, x, rows, width=width) for _ in range(num_paths)])
        return answered("path_log_prob", (total.logsumexp(0) - math.log(num_paths)).reshape(shape[:-1]))

    # Both halves, what they know, and the source

    def adopt(self, read: PairsReading, source: SourceReading) -> None:
        """Take units, the source and the Gaussian bridge between the ends; the networks start at zero."""
        target = Guide(read.affine, read.covariance)
        self.to(read.affine.location)
        self.source_deviations, self.source_points = source.deviations, source.points
        self.source, self._source_kind = source.law, source.kind
        self._learnt_steps = (self.num_steps, self.schedule) if self.method == "ipf" else None
        self.context_location, self.context_scale = read.contexts
        self.ahead.adopt(source.guide, target, self.epsilon)
        self.back.adopt(target, source.guide, self.epsilon)
        if self.method == "ipf" or self.variance == "reference":
            self.ahead.take_steps(self._times())
            self.back.take_steps(self._times())

    def chain(self, forward: bool, num_steps: int | None = None) -> Chain:
        """One of the chains; the grid is symmetric, so that both have the same own times."""
        return Chain(self.ahead if forward else self.back, self._times(num_steps), self.epsilon)

    def _times(self, num_steps: int | None = None) -> Tensor:
        """Times of the chain, from 0 to 1; refused where IPF has learnt others."""
        steps = self.num_steps, self.schedule
        if self._learnt_steps is not None and steps != self._learnt_steps:
            raise ValueError(
                "IPF learns its own steps: num_steps and schedule must stay as in fit, "
                f"{self._learnt_steps}, got {steps}. Set them back, fit again, or "
                'take method="imf", whose steps are free after the fit.'
            )
        return step_times(num_steps or self.num_steps, self.schedule).to(self.like())

    def given(self, half: HalfBridge, rows: Tensor | None) -> Given:
        """Means and features that a half has of standardised contexts."""
        return half.given(rows, None if rows is None else summarise(half.embedding, rows))

    def _context_rows(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context - self.context_location) / self.context_scale

    def start(self, num: int, given: Given) -> Tensor:
        """Source points, those of given contexts where the source depends on them."""
        like = self.like()
        if self._source_kind == "moments":
            noise = torch.randn(num, self.dim, dtype=like.dtype, device=like.device)
            return given.begin + self.source_deviations * noise
        if self._source_kind == "draws":
            return self.source_points[torch.randint(len(self.source_points), (num,), device=like.device)]
        return self._law().sample((num,)).to(like)

    def _start_log_prob(self, x: Tensor, given: Given) -> Tensor:
        """Log density of the source. Shape ``(n,)``."""
        if self._source_kind == "law":
            return self._law().log_prob(x).to(x)
        noise = (x - given.begin) / self.source_deviations
        return -0.5 * noise.square().sum(-1) - (self.source_deviations * math.sqrt(2 * math.pi)).log().sum()

    def _law(self) -> Distribution:
        if self.source is None:
            raise RuntimeError(
                "a loaded bridge has no source yet: it was a distribution, which is not saved. "
                "Write bridge.source = ..., or use transport(x0)."
            )
        return self.source

    def _rows(self, x: Any, context: Any) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Points and standardised contexts, broadcast, as flat rows; the points' shape before."""
        x, context, shape = self.flat_rows(x, context)
        return x, self._context_rows(context), shape

    def _draws(self, num: int, rows: Tensor | None) -> Draws:
        given, behind = self.given(self.ahead, rows), self.given(self.back, rows)
        x = self.start(num, given)
        chains = self.chain(True), self.chain(False)
        states = chains[0].run(x, given)
        log_q = self._start_log_prob(x, given) + log_ratio(states, (chains[0], given), (chains[1], behind))
        return Draws(states[-1], log_q)

    def _redrawn(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Log density of one path each, drawn backwards from its end. Shape ``(n,)``."""
        given, behind = self.given(self.ahead, rows), self.given(self.back, rows)
        chains = self.chain(True), self.chain(False)
        states = chains[1].run(x, behind)[::-1]
        return self._start_log_prob(states[0], given) + log_ratio(states, (chains[0], given), (chains[1], behind))

    @torch.no_grad()
    def _transport(self, x: Tensor, context: Any, forward: bool) -> Tensor:
        x, rows, shape = self._rows(x, context)
        chain = self.chain(forward)
        given = self.given(chain.half, rows)
        return answered("transport", chunked_rows(lambda x, given: chain.run(x, given)[-1], x, given).reshape(shape))
