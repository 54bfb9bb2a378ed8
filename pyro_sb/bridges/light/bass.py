r"""Light Schrödinger-Bass bridge, least :math:`E \int |\alpha|^2 + \beta |\sigma - \sqrt\epsilon I|^2 dt`."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.data import Batch, Ends
from pyro_sb.bridges.light.fit import HELD_OUT, Dual, LightOptions, find_solver, learning, options_for
from pyro_sb.bridges.light.laws import MixtureLaws
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.light.solvers import BASS
from pyro_sb.checks import number
from pyro_sb.training import FitHistory

CANDIDATES = (2.0, 5.0, 20.0, 100.0, math.inf)  # of beta="auto"


class LightSBBM(MixtureBridge):
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
        dropout: As of `LightSB`.
        embedding: As of `LightSB`.

    Attributes:
        beta: Price of volatility in use.
        scores: Held-out log likelihood of each candidate, in nats a draw, after ``beta="auto"``.
        learned_map: Network in place of the inverse, after ``solver="alternating"``; else None.

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

    solvers, default_solver = BASS, "dual"

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
        if isinstance(beta, str) and beta != "auto":
            raise ValueError(f'beta must be a number above 1 or "auto", got {beta!r}.')
        cure = 'Below, the dual is infinite: write 10, math.inf for LightSB, or "auto".'
        self.asked_beta: float | str | None = beta if isinstance(beta, str) else number("beta", beta, "(1, inf]", cure)
        self.beta = math.inf if isinstance(self.asked_beta, str) else self.asked_beta

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
        num_law_draws: int = 20_000,
        patience: int = 10,
    ) -> FitHistory:
        r"""Fit the potential, from k-means clusters of the target and a few moment steps up the dual.

        Of finite data the parameters with the highest held-out dual are kept.

        Args:
            target: As in `LightSB.fit`; so are ``source``, ``context``, ``weights``, ``progress``, ``checkpoint``,
                ``batch_size``, ``learning_rate``, ``held_out``, ``num_law_draws`` and ``patience``.
            source: Draws, a distribution, or a point. Omitted: the point at the target's mean.
            context: Contexts of the target's draws. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the target's draws. Shape ``(N,)``.
            progress: Show a bar.
            checkpoint: Path that the bridge is saved to.
            num_updates: Updates. Omitted: 5000 of Adam, 200 moment steps, 10,000 of the two nets that alternate.
            batch_size: Points of each side an update.
            learning_rate: Of Adam's first update.
            solver: ``"dual"`` (default), Adam at inverse-mapped minibatches, one warm Newton step each; ``"moments"``,
                moment steps with a line search on the dual of all draws, for small exact problems; or
                ``"alternating"``, the paper's algorithm with a learnt inverse, which loses the density.
            held_out: Share of the draws that the fit is judged by, or a mask.
            num_law_draws: How many draws of a distribution the units and the moment steps are read from.
            patience: Checks without a lower held-out loss after which Adam stops; for draws.

        Returns:
            Losses :math:`-G / \epsilon` in nats, comparable within one beta; as residuals the moment solver gives the
            ascent a step.

        Warns:
            RuntimeWarning: As `LightSB.fit`; or an axis is narrower than beta allows.
        """
        chosen = find_solver(self, solver)
        chosen = ChosenBeta() if self.asked_beta == "auto" else chosen
        options = options_for(
            self, chosen, num_updates, batch_size, learning_rate, num_law_draws, progress, checkpoint, patience
        )
        with learning(self, chosen, options, target, source, context, weights, held_out) as fit:
            fit.history = chosen.solve(self, fit.ends, options)
        return fit.history

    @torch.no_grad()
    def dual(self, x0: Tensor, x1: Tensor) -> float:
        """G at points of both sides, in squared units of the data; without context. Shapes ``(*, dim)``."""
        if self.context_dim:
            raise NotImplementedError(f"dual has no context, got context_dim = {self.context_dim}.")
        self.check_exact()
        z0, z1 = self.unit_rows(x0, None, 0.0)[0], self.unit_rows(x1, None, 1.0)[0]
        if not len(z0) or not len(z1):
            raise ValueError(f"x0 and x1 must hold points, got {len(z0)} and {len(z1)}. Pass draws of both sides.")
        shift = (self.location - self.source_location) / self.scale
        moved = float(shift @ (z1.mean(0) - z0.mean(0) + 0.5 * shift))  # of the centres, whose drift is their distance
        return float(self.scale) ** 2 * (self.process.dual(z0, Batch(z1)) + moved)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().config() | {"beta": self.asked_beta}

    def describe_lines(self) -> list[str]:
        """As `MixtureBridge`'s, with beta."""
        first, *rest = super().describe_lines()
        beta = "auto" if self.asked_beta == "auto" and not self.scores else f"{self.beta:g}"
        chosen = ' (chosen by beta="auto")' if self.scores else ""
        return [f"{first}, beta {beta}{chosen}", *rest]


class ChosenBeta:
    """The dual for the largest beta whose held-out likelihood is within a standard error of the best candidate's."""

    name, num_updates = "dual", 5000

    def check(self, bridge: MixtureBridge) -> None:
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
                scores[beta] = MixtureLaws(bridge.process).mean_log_prob(judge.points, base, judge.context)
        weights = judge.weights if judge.weights is not None else judge.points.new_full((len(judge.points),), 1.0)
        weights = weights / weights.sum()
        best = max(scores.values(), key=lambda score: float(weights @ score))
        gaps = {beta: best - score for beta, score in scores.items()}
        errors = {beta: float(weights.square() @ (gap - weights @ gap).square()) ** 0.5 for beta, gap in gaps.items()}
        bridge.beta = max(beta for beta, gap in gaps.items() if float(weights @ gap) <= errors[beta])
        unit = bridge.dim * bridge.scale.log()
        bridge.scores = {beta: float(weights @ score - unit) for beta, score in scores.items()}
        return history
