"""Variational Schrödinger diffusion: a score model whose noising drift is fitted to the target."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from pyro_sb.bridges.base import Bridge, FitOptions
from pyro_sb.bridges.diffusion.adapt import Adaptation
from pyro_sb.bridges.diffusion.bridge import DiffusionBridge
from pyro_sb.bridges.diffusion.fit import fit_diffusion
from pyro_sb.threads import chosen_threads
from pyro_sb.training import FitHistory


class VSDM(DiffusionBridge):
    r"""Diffusion whose noising process is the best linear one: a Schrödinger bridge with a variational linear score.

    In noising time :math:`\tau = 1 - t`, with a symmetric matrix :math:`D = I - 2A`,

    .. math:: dx = -\tfrac12 \beta_\tau D x\, d\tau + \sqrt{\beta_\tau}\, dw , \qquad
              \beta_\tau = b_{\min} + \tau^r (b_{\max} - b_{\min}) .

    :math:`A x` stands for the score of the Schrödinger potential. In D's eigenbasis every law is Gaussian and in closed
    form, so training is simulation-free. A denoiser :math:`E[x_{\tau=0} | x_\tau]` is learnt per eigen-direction in
    normalised states; draws run the process backwards from the Gaussian source.

    D is that of the target in the user's axes (given a context: of what an affine regression leaves). **The default**
    is the fixed point of the paper's rule, one scalar equation a direction: the noised target has unit variance. On
    whitened data it is the identity, and VSDM is `SGM`. Noise rates and D are in the user's units; where the root of
    the data's mean variance is above 32 or below 1/32, in units of that root.

    **Densities.** ``draws()`` are ancestral steps :math:`N(g x + h \hat x, q + h C h)` with a learnt covariance C of
    the target given the state; their ``log_q`` is that of the path, forwards less backwards, and corrects them exactly.
    ``log_prob`` integrates the probability flow: an approximation (of the network's and the solver's making) that no
    correction uses. `path_log_prob` is a lower bound in expectation.

    Args:
        dim: Event size.
        context_dim: Size of the context, 0 for none.
        b_max: Noise rate at the source.
        b_min: Noise rate at the target.
        power: r.
        drift_matrix: How D is found: ``"closed-form"``; ``"tolerance"``, that shrinks every standard deviation to .05;
            ``"stochastic"``, the paper's stochastic approximation, from the closed form on; or D itself, a symmetric
            positive definite tensor ``(dim, dim)``.
        source_law: ``"moment"``, Gaussian with the moments of the noised target, or the paper's ``"conditional"``,
            :math:`N(0, \Sigma_T)`.
        preconditioning: ``"direction"``, each eigen-direction by its own variance, or ``"scalar"``, all by their mean.
        step_covariance: C of the path steps: ``"learnt"`` (full to dimension 20, diagonal above) or ``"analytic"``, one
            number a noise level.
        hidden: Widths of the mean net.
        covariance_hidden: Widths of the covariance head.
        embedding: A module from standardised contexts ``(n, context_dim)`` to ``(n, out_dim)``, trained jointly:
            `SetEmbedding` for exchangeable observations, or the user's own.

    Attributes:
        sampler: A `Sampler`: number of steps and solver.
        rates_history: Eigenvalues of D after each stage of the stochastic approximation. Shape ``(stages, dim)``.

    References:
        Variational Schrödinger Diffusion Models (Deng, Luo, Tan, Bilos, Chen, Nevmyvaka and Chen, 2024),
        https://arxiv.org/abs/2405.04795. We differ in the closed-form fixed point, the moment-matched source, the
        denoiser's normalisation, the exponential integrator and the path weights.

    Example:
        >>> import torch
        >>> bridge = VSDM(2)
        >>> history = bridge.fit(torch.randn(500, 2) * torch.tensor([1.0, 8.0]), num_updates=60, progress=False)
        >>> bridge().sample((4,)).shape
        torch.Size([4, 2])
        >>> bridge().draws((4,)).log_q.shape
        torch.Size([4])
    """

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        num_updates: int = 4000,
        batch_size: int = 512,
        learning_rate: float = 2e-3,
        ema: float | None = 0.999,
        held_out: Any = 0.1,
        num_law_draws: int = 20_000,
        num_stages: int = 60,
        zeta: float = 1.0,
    ) -> FitHistory:
        r"""Fit the regression and D in closed form, then the denoiser, then its covariance head.

        Of finite data the networks with the lowest held-out loss are kept.

        Args:
            target: Draws ``(N, dim)``, or a distribution, which gives fresh draws at every step.
            source: None: the source is the Gaussian that the noising ends in.
            context: Contexts of the draws. Shape ``(N, context_dim)``.
            weights: Non-negative weights of the draws. Shape ``(N,)``.
            progress: Show a bar.
            checkpoint: Path of the bridge, loadable after every check. An unfinished fit that is called again with the
                same arguments goes on from it, with the same number of threads bit for bit; at the end it holds what
                `save` writes.
            num_updates: Updates of the denoiser; the covariance head gets half as many, and so does the stochastic
                approximation.
            batch_size: Draws an update.
            learning_rate: Of Adam's first update.
            ema: Decay of the parameters' moving average, in [0, 1); None for none.
            held_out: Share of the draws that the fit is judged by, in [0, 1), or a boolean mask ``(N,)``.
            num_law_draws: How many draws of a distribution the moments are read from.
            num_stages: Of the stochastic approximation: how often A moves.
            zeta: Its interaction coefficient. 1 has the closed form as its fixed point; less under-contracts.

        Returns:
            Losses of the denoiser (half the mean square of a unit-variance goal); as residuals, how far A moved in each
            stage.
        """
        options = FitOptions(num_updates, batch_size, learning_rate, ema, num_law_draws, progress, checkpoint)
        return learn(self, options, target, source, context, weights, held_out, Adaptation(num_stages, zeta))


class SGM(DiffusionBridge):
    """Score-based generative model: `VSDM` with A = 0, so that D = I whatever the data.

    Its arguments are `VSDM`'s, but for those of D. On data of unit scale or whitened it is the same; on
    stretched data it needs a larger ``b_max``, or VSDM's D.

    Example:
        >>> import torch
        >>> bridge = SGM(1)
        >>> history = bridge.fit(torch.randn(500, 1), num_updates=60, progress=False)
        >>> bridge.drift_matrix
        tensor([[1.]])
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        b_max: float = 10.0,
        b_min: float = 0.1,
        power: float = 1.7,
        source_law: str = "moment",
        preconditioning: str = "direction",
        step_covariance: str = "learnt",
        hidden: tuple[int, ...] = (128, 128, 128),
        covariance_hidden: tuple[int, ...] = (96, 96),
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(
            dim,
            context_dim=context_dim,
            b_max=b_max,
            b_min=b_min,
            power=power,
            drift_matrix="identity",
            source_law=source_law,
            preconditioning=preconditioning,
            step_covariance=step_covariance,
            hidden=hidden,
            covariance_hidden=covariance_hidden,
            embedding=embedding,
        )

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        num_updates: int = 4000,
        batch_size: int = 512,
        learning_rate: float = 2e-3,
        ema: float | None = 0.999,
        held_out: Any = 0.1,
        num_law_draws: int = 20_000,
    ) -> FitHistory:
        """Fit the regression, then the denoiser, then its covariance head; arguments as of `VSDM.fit`."""
        options = FitOptions(num_updates, batch_size, learning_rate, ema, num_law_draws, progress, checkpoint)
        return learn(self, options, target, source, context, weights, held_out)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: value for name, value in super().config().items() if name != "drift_matrix"}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Bridge:
        """Build the bridge that `config` describes; an earlier file names D too."""
        return super().from_config({n: v for n, v in config.items() if n not in ("drift", "drift_matrix")})


def learn(
    bridge: DiffusionBridge,
    options: FitOptions,
    target: Any,
    source: Any,
    context: Any,
    weights: Any,
    held_out: Any,
    adaptation: Adaptation | None = None,
) -> FitHistory:
    """The way of both fits: refuse a source, and learn in phases."""
    if source is not None:
        raise ValueError(
            f"{type(bridge).__name__}'s source must be None, got {type(source).__name__}: it is the Gaussian that "
            "the noising ends in. Omit it, or take a bridge with two free ends, as LightSB."
        )
    begun = time.perf_counter()
    with chosen_threads(target):
        history = fit_diffusion(bridge, options, target, context, weights, held_out, adaptation)
    history.seconds = max(history.seconds, time.perf_counter() - begun)
    return history
