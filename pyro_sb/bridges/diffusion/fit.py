"""Fit of a diffusion in phases: adaptation of D, denoiser, covariance head."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.checkpoint import check_same, go_on, on_device, words_of, write
from pyro_sb.bridges.data import Batch, DrawsEnd, PairsReading, read_pairs, read_target, summarise
from pyro_sb.bridges.diffusion.adapt import NUM_GRID, NUM_PARTICLES, Adaptation, best_matrix, project, step_size
from pyro_sb.bridges.diffusion.bridge import NUM_KNOTS, DiffusionBridge
from pyro_sb.bridges.diffusion.network import factor_loss
from pyro_sb.ops.regression import Affine
from pyro_sb.ops.solvers import Flow
from pyro_sb.threads import Pace
from pyro_sb.training import FitHistory, train

NUM_JUDGES = 512  # of them, at each stage of the stochastic approximation
HELD_OUT = 4096  # noised points that the validation loss is read from
NUM_TIMES = 1024  # of the table of times uniform in log-SNR
NUM_CHECKS, PATIENCE, LEAST = 40, 8, 0.5  # a start in closed form is not beaten at once


class Noised(NamedTuple):
    """Targets in normalised units, their noise and times, features of contexts, and weights."""

    clean: Tensor
    noise: Tensor
    tau: Tensor
    context: Tensor | None
    weights: Tensor | None = None

    def first(self, num: int) -> "Noised":
        """The first rows."""
        context, weights = (None if v is None else v[:num] for v in (self.context, self.weights))
        return Noised(self.clean[:num], self.noise[:num], self.tau[:num], context, weights)


def fit_diffusion(
    bridge: DiffusionBridge,
    options: FitOptions,
    target: Any,
    context: Any,
    weights: Any,
    held_out: Any,
    adaptation: Adaptation | None = None,
) -> FitHistory:
    """Read the data, then learn in phases; from a checkpoint of the same fit, the rest of them."""
    options = options.read()
    adaptation = None if adaptation is None else adaptation.read()
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
    read = read_pairs(data, bridge.net.embedding)
    name = words_of(type(bridge).__name__, bridge.config(), options, read, adaptation and adaptation._asdict())
    check_same(saved, name, options)
    bridge.adopt(read)
    bridge.fitted_to = read.data
    fit = DiffusionFit(bridge, options, adaptation, read, random, name)
    if saved is not None:
        fit.restore(on_device(saved, read.affine.location.device))
    history = fit.run()
    if options.checkpoint is not None and not history.interrupted:
        bridge.save(options.checkpoint)
    return history


class DiffusionFit:
    """One fit of a diffusion: its data, its place, and its phases."""

    def __init__(
        self,
        bridge: DiffusionBridge,
        options: FitOptions,
        adaptation: Adaptation | None,
        read: PairsReading,
        random: list[Tensor],
        name: dict[str, str],
    ) -> None:
        self.bridge, self.options, self.adaptation, self.end = bridge, options, adaptation, read.end
        self.covariance = bridge.in_units(read.covariance)
        self.random, self.name = random, name
        self.pace = Pace()
        self.phases = ["adapt"] * (bridge.drift_rule == "stochastic") + ["mean"]
        self.phases += ["covariance"] * (bridge.step_covariance == "learnt")
        self.done: list[FitHistory] = []
        self.resume: dict[str, Any] | None = None
        self.table = self._time_table()
        self.judge = self._judge()

    def run(self) -> FitHistory:
        """The phases that are left."""
        for phase in self.phases[len(self.done) :]:
            run = {"adapt": self._adapt, "mean": self._mean, "covariance": self._covariance}[phase]
            history = run(self.resume)
            self.resume = None
            self.done.append(history)
            self.bridge.net.eval()
            if history.interrupted:
                break
        if len(self.done) <= self.phases.index("mean"):
            self._measure_errors()
        mean = self.done[min(self.phases.index("mean"), len(self.done) - 1)]
        return replace(
            mean,
            residuals=self.residuals(),
            iterations=sum(h.iterations for h in self.done),
            seconds=sum(h.seconds for h in self.done),
            converged=all(h.converged for h in self.done),
            interrupted=any(h.interrupted for h in self.done),
        )

    def residuals(self) -> list[float]:
        """Largest change of a rate in each stage of the adaptation."""
        rates = self.bridge.rates_history
        return [float(step.abs().max()) for step in rates.diff(dim=0)] if rates.dim() == 2 else []

    # Phases

    def _adapt(self, resume: dict[str, Any] | None) -> FitHistory:
        """Train the denoiser at a constant rate while A moves, stage by stage."""
        assert self.adaptation is not None
        num_updates, num_stages = max(1, self.options.num_updates // 2), self.adaptation.num_stages
        every = max(1, num_updates // num_stages)
        if not self.bridge.rates_history.numel():
            self.bridge.rates_history = self.bridge.rates[None].clone()
        calls = 0 if resume is None else resume["history"]["iterations"]

        def loss() -> Tensor:
            nonlocal calls
            calls += 1
            if calls % every == 0 and calls // every <= num_stages:
                self._move(calls // every - 1)
            return self._training_loss()

        return self._train(
            self._denoiser(), loss, num_updates, resume, final_rate=1.0, validate=None, tolerance=math.inf
        )

    def _mean(self, resume: dict[str, Any] | None) -> FitHistory:
        """Train the denoiser, and measure what it misses."""

        def validate() -> float:
            self.bridge.net.eval()
            with torch.no_grad():
                return float(self._mean_loss(self.judge))

        history = self._train(
            self._denoiser(), self._training_loss, self.options.num_updates, resume, validate=validate
        )
        self.bridge.net.eval()
        self._measure_errors()
        return history

    def _covariance(self, resume: dict[str, Any] | None) -> FitHistory:
        """Train the covariance head on what the finished denoiser misses."""

        def validate() -> float:
            with torch.no_grad():
                return float(self._covariance_loss(self.judge))

        return self._train(
            self.bridge.net.covariance.parameters(),
            lambda: self._covariance_loss(self._batch()),
            max(1, self.options.num_updates // 2),
            resume,
            validate=validate,
        )

    def _train(self, parameters: Any, loss: Any, num_updates: int, resume: Any, **options: Any) -> FitHistory:
        finite, judged = isinstance(self.end, DrawsEnd), options["validate"] is not None
        phase = self.phases[len(self.done)]
        return train(
            parameters,
            loss,
            num_updates=num_updates,
            learning_rate=self.options.learning_rate,
            keep_best=finite and judged,
            patience=PATIENCE if finite and judged else None,
            least=LEAST,
            num_checks=NUM_CHECKS,
            progress=self.options.progress,
            description=f"{type(self.bridge).__name__} ({phase})",
            ema=self.options.ema,
            on_state=None if self.options.checkpoint is None else self._save,
            resume=resume,
            **options,
        )

    # Losses

    def _denoiser(self) -> list[nn.Parameter]:
        """Parameters of the mean net and the embedding."""
        return [p for n, p in self.bridge.net.named_parameters() if not n.startswith("covariance.")]

    def _training_loss(self) -> Tensor:
        self.bridge.net.train()
        return self._mean_loss(self._batch())

    def _mean_loss(self, rows: Noised) -> Tensor:
        _, goal, answer = self._answers(rows)
        return weighted(0.5 * (goal - answer).square().mean(-1), rows.weights)

    def _covariance_loss(self, rows: Noised) -> Tensor:
        net, bridge = self.bridge.net, self.bridge
        with torch.no_grad():
            w, goal, answer = self._answers(rows)
            features, place = net.features(rows.context), bridge.place(rows.tau)
            missed = (goal - answer) * (-0.5 * bridge.log_error(place)).exp()[:, None]
        return weighted(factor_loss(net.precision_factor(place, w, bridge.basis, features), missed), rows.weights)

    def _answers(self, rows: Noised) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised states, the denoiser's goal and its answer. Shape ``(n, dim)`` each."""
        bridge = self.bridge
        angle = Flow(bridge.sde, bridge.spread).angle(rows.tau)
        cos, sin = angle.cos(), angle.sin()
        clean = rows.clean @ bridge.basis / bridge.spread.sqrt()
        w = cos * clean + sin * rows.noise
        goal = sin * clean - cos * rows.noise
        return w, goal, bridge.goal(rows.tau, w, bridge.net.features(rows.context))

    @torch.no_grad()
    def _measure_errors(self, num: int = HELD_OUT) -> None:
        """Analytic variances: what the denoiser misses on held-out draws, at each knot of the log-SNR scale."""
        bridge, ends = self.bridge, self.table[[0, -1]]
        levels = bridge.sde.log_snr(ends).mean(-1)
        times = bridge.sde.time_at(torch.lerp(levels[0], levels[1], torch.linspace(0, 1, NUM_KNOTS).to(levels)))
        errors, judge = [], self.judge.first(num)
        for tau in self.pace.each(times, times.device):
            rows = judge._replace(tau=tau.expand_as(judge.tau), noise=torch.randn_like(judge.noise))
            _, goal, answer = self._answers(rows)
            errors.append(weighted((goal - answer).square().mean(-1), rows.weights))
        bridge.log_errors = torch.stack(errors).clamp_min(1e-6).log()

    @torch.no_grad()
    def _move(self, stage: int) -> None:
        """One stage of the stochastic approximation: simulate, solve for A, go some of the way."""
        assert self.adaptation is not None
        bridge = self.bridge
        context = self._batch(NUM_PARTICLES).context
        features, like = bridge.net.features(context), bridge.location
        x = torch.randn(NUM_PARTICLES, bridge.dim, dtype=like.dtype, device=like.device)
        self._measure_errors(NUM_JUDGES)
        best = best_matrix(
            lambda tau, z: bridge.analytic(tau, z, features),
            bridge.sde,
            bridge.times(NUM_GRID),
            x,
            self.adaptation.zeta,
        )
        best = bridge.basis @ best @ bridge.basis.T
        present = 0.5 * (torch.eye(bridge.dim).to(like) - bridge.drift_matrix)
        basis, rates = project(torch.lerp(present, best, step_size(stage)))
        bridge.turn(basis, rates, self.covariance)
        bridge.rates_history = torch.cat([bridge.rates_history, bridge.rates[None]])
        self.table = self._time_table()

    # Data

    def _batch(self, num: int | None = None) -> Noised:
        """Draws with their noise and times, half uniform in time and half in log-SNR."""
        num = num or self.options.batch_size
        return self._noised(self.end.batch(num))

    def _noised(self, batch: Batch) -> Noised:
        clean = batch.points / self.bridge.unit - self._mean_of(batch.context)
        place = (torch.arange(len(clean)) // 2 + torch.rand(len(clean))) / ((len(clean) + 1) // 2)
        place = place[torch.randperm(len(clean))].clamp_max(1).to(clean)
        first = self.bridge.first_time
        position = place * (NUM_TIMES - 1)
        low = position.floor().clamp_max(NUM_TIMES - 2)
        even = torch.lerp(self.table[low.long()], self.table[low.long() + 1], position - low)
        by_time = torch.arange(len(clean), device=clean.device) % 2 == 0
        tau = torch.where(by_time, torch.lerp(first, torch.ones_like(first), place), even)
        return Noised(clean, torch.randn_like(clean), tau, batch.context, batch.weights)

    def _mean_of(self, context: Tensor | None) -> Tensor:
        affine = Affine(self.bridge.location, self.bridge.slope)
        return affine(None if context is None else summarise(self.bridge.net.embedding, context))

    def _judge(self) -> Noised:
        """Held-out draws noised once, each several times where they are few."""
        batch = self.end.held_out(HELD_OUT)
        times = -(-HELD_OUT // len(batch.points))
        index = torch.arange(len(batch.points), device=batch.points.device).repeat(times)
        context, weights = (None if v is None else v[index] for v in (batch.context, batch.weights))
        repeated = Batch(batch.points[index], context, weights)
        return self._noised(repeated)

    def _time_table(self) -> Tensor:
        """Times uniform in mean log-SNR, from the source to the first time."""
        return self.bridge.times(NUM_TIMES)[:-1]

    # Checkpoints

    def _save(self, state: dict[str, Any]) -> None:
        """The bridge as of this check, loadable, and beside it all that the fit needs to go on."""
        training = {
            "fit": self.name,
            "start": self.random,
            "loop": state,
            "done": [vars(h) for h in self.done],
            "place": self.end.position(),
        }
        write(self.bridge.contents(), training, self.options.checkpoint)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go to where the saved fit was."""
        self.bridge.load_state_dict(saved["state"])
        self.done = [FitHistory(**h) for h in saved["done"]]
        self.resume = saved["loop"]
        self.end.seek(saved["place"])
        self.table = self._time_table()


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of rows, or their mean by weights."""
    return values.mean() if weights is None else weights / weights.sum() @ values
