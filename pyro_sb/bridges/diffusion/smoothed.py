r"""The Schrödinger bridge from smoothed data to data, :math:`dX = \epsilon \nabla \log q\, dt + \sqrt\epsilon\, dB`."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.data import DrawsEnd, PairsReading
from pyro_sb.bridges.diffusion.bridge import DiffusionBridge, unit_of
from pyro_sb.bridges.diffusion.fit import fit_diffusion
from pyro_sb.bridges.diffusion.sampler import Sampler
from pyro_sb.checks import check_choice, number, whole
from pyro_sb.ops.linear_sde import Schedule
from pyro_sb.threads import chosen_threads
from pyro_sb.training import FitHistory

RATIO = 100.0  # epsilon over the mean variance of the target, where none is given
NUM_ROWS = 4096  # most rows that the source is a mixture over
BLOCK = 2**22  # distances held at a time


class SmoothedBridge(DiffusionBridge):
    r"""The Schrödinger bridge from the data smoothed by noise, :math:`\nu = \mu * N(0, \epsilon I)`, to the data.

    With a Brownian reference of variance :math:`\epsilon` over [0, 1], the Schrödinger system

    .. math:: f_0(x) \int N(y; x, \epsilon I)\, g_1(y)\, dy = \nu(x), \qquad
              g_1(y) \int N(x; y, \epsilon I)\, f_0(x)\, dx = \mu(y)

    is solved by :math:`f_0 = 1,\ g_1 = \mu`: the first line is the definition of :math:`\nu`, and in the second the
    integral is 1. With :math:`q_s = \mu * N(0, s^2 I)` and :math:`s^2 = (1 - t) \epsilon` the bridge is therefore

    .. math:: dX_t = \epsilon \nabla \log q_{s(t)}(X_t)\, dt + \sqrt{\epsilon}\, dB_t , \qquad
              X_t \sim q_{s(t)}, \qquad \nabla \log q_s(x) = \frac{E[X_1 | X_t = x] - x}{s^2} .

    Nothing is iterated: a denoiser gives the drift. It is learnt at all noise levels in normalised states, per
    eigen-direction of the data's covariance, with a goal of unit variance (the weighting :math:`s^2` of the score's
    error where noise prevails).

    **Draws** start at a draw of :math:`\nu` and go down a grid that is geometric in s, truncated at a hundredth of
    the narrowest direction's standard deviation, then take one denoising step. `paths`, `transport` and ``draws()``
    are the SDE, with noise in every step, the last too, so that `transport` follows the Schrödinger plan. `sample`
    goes by the probability flow, which has the same marginals and needs fewer steps (on digits 10 of its steps did
    better than 80 of the SDE's); ``bridge.sampler.solver = "ancestral"`` makes it the chain of
    ``draws()``.

    **Densities.** ``log_q`` of ``draws()`` is that of the path: the start's density, forward steps
    :math:`N(g x + h \hat x, q + h C h)`, less the exact Brownian noising steps backwards; it corrects draws exactly
    for any number of steps and any denoiser. ``log_prob`` integrates the probability flow: an approximation.

    **The start** is the mixture :math:`p_0 = \frac1n \sum_i w_i N(x; x_i, \epsilon I)` over the rows learnt from (at
    most 4,096 of them, taken at random), which are kept and saved with the bridge. With ``source_law="moment"`` it is
    the Gaussian with the moments of :math:`\nu`, and no row is kept: nearly the same law for the default epsilon. Given
    a context the start is :math:`N(a(c), S + \epsilon I)` with an affine regression a and the covariance S of what it
    leaves, as the rows that share a context are few.

    Args:
        dim: Event size.
        context_dim: Size of the context, 0 for none.
        epsilon: Variance of the reference over [0, 1], positive. Omitted: 100 times the mean variance of the data's
            axes (of what the regression leaves), set in ``fit``.
        source_law: ``"rows"`` or ``"moment"``. Omitted: rows without a context, moment with one.
        step_covariance: C of the steps: ``"analytic"``, one number a noise level, or ``"learnt"``, by a second network.
        hidden: Widths of the denoiser's net.
        covariance_hidden: Widths of the covariance head.
        embedding: As in `VSDM`.
        num_steps: Steps of `sample`, to be changed in ``bridge.sampler``.
        path_steps: Steps of ``draws()`` and `transport`.

    Attributes:
        epsilon: As given, or as chosen in ``fit``; None before.
        rows: The start's rows in the eigenbasis, less their mean. Shape ``(n, dim)``.
        sampler: A `Sampler`.

    References:
        Latent Schrödinger Bridge Diffusion Model for Generative Learning (Jiao, Kang, Lin, Liu and Zuo, 2024),
        https://arxiv.org/abs/2404.13309, whose latent diffusion this is; Deep Generative Learning via Schrödinger
        Bridge (Wang, Jiao, Xu, Wang and Yang, 2021), https://arxiv.org/abs/2106.10410, its second stage. The
        denoiser's form, the geometric grid, the last denoising step and the path weights are not theirs.

    Example:
        >>> bridge = SmoothedBridge(2)
        >>> history = bridge.fit(torch.randn(500, 2), num_updates=60, progress=False)
        >>> value, log_q = bridge().draws((4,))
        >>> value.shape, log_q.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """

    rows: Tensor
    log_weights: Tensor
    shapes = DiffusionBridge.shapes | {"rows": "n d", "log_weights": "n"}

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        epsilon: float | None = None,
        source_law: str | None = None,
        step_covariance: str = "analytic",
        hidden: tuple[int, ...] = (256, 256, 256),
        covariance_hidden: tuple[int, ...] = (96, 96),
        embedding: nn.Module | None = None,
        num_steps: int = 10,
        path_steps: int = 40,
    ) -> None:
        cure = "Omit it for 100 times the mean variance of the data."
        epsilon = None if epsilon is None else number("epsilon", epsilon, "(0, inf)", cure)
        context_dim = whole("context_dim", context_dim, 0, cure="Omit it for a bridge without context.")
        source_law = ("moment" if context_dim else "rows") if source_law is None else source_law
        check_choice("source_law", source_law, ("rows", "moment"))
        if source_law == "rows" and context_dim:
            raise ValueError('source_law must be "moment" where there is a context, got "rows". Omit it.')
        super().__init__(
            dim,
            context_dim=context_dim,
            b_min=1.0,
            b_max=1.0,
            power=0.0,
            drift_matrix="identity",
            step_covariance=step_covariance,
            hidden=hidden,
            covariance_hidden=covariance_hidden,
            embedding=embedding,
        )
        self.given_epsilon, self.source_law = epsilon, source_law
        self.epsilon = epsilon
        self._rate = 1.0 if epsilon is None else epsilon
        self.sampler = Sampler(num_steps=num_steps, path_steps=path_steps)
        self.register_buffer("rows", torch.empty(0))
        self.register_buffer("log_weights", torch.empty(0))

    @property
    def schedule(self) -> Schedule:
        """The reference's constant rate epsilon, in the bridge's units."""
        return Schedule(self._rate, self._rate, 0.0)

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        """Epsilon decides; nothing is kept."""

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        num_updates: int = 3000,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        ema: float | None = 0.999,
        held_out: Any = 0.1,
        num_law_draws: int = 20_000,
    ) -> FitHistory:
        r"""Learn the denoiser, then what it misses at each noise level (and a covariance head, if asked for).

        Of finite data the network with the lowest held-out loss is kept: a denoiser that learns its rows by heart
        draws them again.

        Args:
            target: Draws ``(N, dim)``, or a distribution, which gives fresh draws at every step.
            source: None: the start is made of the target.
            context: Contexts of the draws. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the draws. Shape ``(N,)``.
            progress: Show a bar.
            checkpoint: Path of the bridge, loadable after every check. An unfinished fit that is called again with the
                same arguments goes on from it, with the same number of threads bit for bit; at the end it holds what
                `save` writes.
            num_updates: Updates of the denoiser; a covariance head gets half as many.
            batch_size: Draws an update.
            learning_rate: Of Adam's first update.
            ema: Decay of the parameters' moving average, in [0, 1); None for none.
            held_out: Share of the draws that the fit is judged by, in [0, 1), or a boolean mask ``(N,)``.
            num_law_draws: How many draws of a distribution the moments and the start are read from.

        Returns:
            Losses of the denoiser: half the mean square of a unit-variance goal.
        """
        if source is not None:
            raise ValueError(
                f"{type(self).__name__}'s source must be None, got {type(source).__name__}: it is the target smoothed "
                "by noise. Omit it, or take a bridge with two free ends, as LightSB."
            )
        begun = time.perf_counter()
        options = FitOptions(num_updates, batch_size, learning_rate, ema, num_law_draws, progress, checkpoint)
        with chosen_threads(target):
            history = fit_diffusion(self, options, target, context, weights, held_out)
        history.seconds = max(history.seconds, time.perf_counter() - begun)
        return history

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws of the target by the SDE: pairs of the Schrödinger plan. Shapes ``(*, dim)`` each."""
        return self._carry(x0, context, self.sampler.path_steps, "ancestral")

    def push(self, noise: Tensor, context: Any = None) -> Tensor:
        """Standard normals to draws by the probability flow, as VSDM's, where the source is Gaussian."""
        if self.keeps_rows:
            raise NotImplementedError(
                "push needs a Gaussian source, got one that is the smoothed rows of the target. Write "
                f'SmoothedBridge({self.dim}, source_law="moment").'
            )
        return super().push(noise, context)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        theirs = super().config()
        kept = ("dim", "context_dim", "source_law", "step_covariance", "hidden", "covariance_hidden", "embedding")
        return {key: theirs[key] for key in kept} | {"epsilon": self.given_epsilon}

    @property
    def keeps_rows(self) -> bool:
        """Whether the source is the smoothed rows, which the bridge keeps."""
        return self.source_law == "rows"

    def describe_lines(self) -> list[str]:
        """Epsilon, the source and the steps; then the data."""
        epsilon = "of the data" if self.epsilon is None else f"{self.epsilon:.4g}"
        theirs = f"source_law {self.source_law}, step_covariance {self.step_covariance}"
        return [f"epsilon {epsilon}, {theirs}", *super().describe_lines()[1:]]

    def get_extra_state(self) -> dict[str, Any]:
        """The sampler, and epsilon."""
        return {"sampler": asdict(self.sampler), "epsilon": self.epsilon, "rate": self._rate}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a saved sampler and epsilon."""
        self.sampler, self.epsilon = Sampler(**state["sampler"]), state["epsilon"]
        self._rate = state.get("rate", 1.0 if self.epsilon is None else self.epsilon)

    def adopt(self, read: PairsReading) -> None:
        """As `DiffusionBridge`'s, with epsilon by its rule."""
        variance = float(read.covariance.diagonal().double().mean())
        self.epsilon = RATIO * variance if self.given_epsilon is None else float(self.given_epsilon)
        self._rate = self.epsilon / float(unit_of(read.covariance)) ** 2
        super().adopt(read)
        self.rows, self.log_weights = read.covariance.new_empty(0), read.covariance.new_empty(0)
        if self.keeps_rows:
            points, weights = start_rows(read)
            self.rows = (points / self.unit - self.location) @ self.basis
            self.log_weights = (weights / weights.sum()).log()

    def _axes(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return vectors, torch.zeros_like(values)  # Brownian motion: D = 0

    def _start(self, num: int, mean: Tensor) -> Tensor:
        if not self.keeps_rows:
            return super()._start(num, mean)
        if num == 0:
            return self.rows[:0]
        index = torch.multinomial(self.log_weights.exp(), num, replacement=True)
        return self.rows[index] + math.sqrt(self.schedule.total) * torch.randn_like(self.rows[index])

    def _start_log_prob(self, z: Tensor, mean: Tensor) -> Tensor:
        if not self.keeps_rows:
            return super()._start_log_prob(z, mean)
        size = max(1, BLOCK // len(self.rows))
        total = self.schedule.total
        parts = [log_mixture(part, self.rows, self.log_weights, total) for part in z.split(size)]
        return torch.cat(parts) if parts else z.new_empty(0)


def start_rows(read: PairsReading) -> tuple[Tensor, Tensor]:
    """At most `NUM_ROWS` of the rows to learn from, with their weights."""
    if isinstance(read.end, DrawsEnd):
        batch, weights = read.end.all()
        points = batch.points
    else:
        points = read.end.batch(NUM_ROWS).points
        weights = points.new_ones(len(points))
    if len(points) > NUM_ROWS:
        some = torch.randperm(len(points), device=points.device)[:NUM_ROWS]
        points, weights = points[some], weights[some]
    return points, weights


def log_mixture(x: Tensor, centres: Tensor, log_weights: Tensor, variance: float) -> Tensor:
    r"""Log density of :math:`\sum_i w_i N(x; c_i, v I)`. Shapes ``(n, d)``, ``(m, d)`` and ``(m,)`` to ``(n,)``.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> log_mixture(x, x, torch.zeros(1), 1.0)
        tensor([-1.8379])
    """
    squares = torch.cdist(x, centres).square()
    constant = 0.5 * x.shape[-1] * math.log(2 * math.pi * variance)
    return (log_weights - 0.5 * squares / variance).logsumexp(-1) - constant
