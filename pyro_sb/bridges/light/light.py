r"""Light Schrödinger bridges, :math:`\pi(x_1 | x_0) \propto v(x_1) e^{\langle x_0, x_1 \rangle / \epsilon}`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_sb.bridges.light.fit import find_solver, learning, options_for
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.bridges.light.solvers import LIGHT
from pyro_sb.training import FitHistory


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
        >>> import torch
        >>> bridge = LightSB(2, num_components=5, epsilon=0.5)
        >>> history = bridge.fit(torch.randn(500, 2), num_updates=100, progress=False)
        >>> bridge().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
        >>> bridge.transport(torch.zeros(4, 2)).shape
        torch.Size([4, 2])
    """

    solvers, default_solver = LIGHT, "likelihood"

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
            num_updates: Updates. Omitted: 5000 of Adam, 200 moment steps.
            batch_size: Points of each side an update.
            learning_rate: Of Adam's first update, in units of the target's standard deviation. Omitted: 5e-3, or 2e-3
                for a network.
            solver: ``"likelihood"``, Adam on the loss above; ``"moments"``, moment steps on all draws at once, fast on
                small data, without context; or ``"matching"``, Adam on `LightSBM`'s loss. Omitted: the class's own.
            held_out: Share of the draws that the fit is judged by, in [0, 1), or a boolean mask of shape ``(N,)``: for
                draws in groups. 0 judges by all of them.
            num_law_draws: How many draws of a distribution the units and the moment steps are read from.
            patience: Checks without a lower held-out loss, of 20 on the way, after which Adam stops; for draws.

        Returns:
            Training and held-out losses in nats, lowest is best; whether they had settled. Held-out ones are the
            likelihood's for every solver.

        Warns:
            RuntimeWarning: Not converged; or, with a context, that the start, which does not use it, was the best by
                the held-out loss. There are early checks before the first twentieth of the way.
        """
        chosen = find_solver(self, solver)
        options = options_for(
            self, chosen, num_updates, batch_size, learning_rate, num_law_draws, progress, checkpoint, patience
        )
        with learning(self, chosen, options, target, source, context, weights, held_out) as fit:
            fit.history = chosen.solve(self, fit.ends, options)
        return fit.history


class LightSBM(LightSB):
    r"""`LightSB` fitted by matching: its drift regresses on the slopes of Brownian bridges.

    .. math:: \frac{1}{2 \epsilon} \int_0^{.99} E \Big| s(t, x_t) - \frac{x_1 - x_t}{1 - t} \Big|^2 dt, \qquad
        x_t = (1 - t) x_0 + t x_1 + \sqrt{\epsilon t (1 - t)}\, z

    with :math:`x_0, x_1` independent. Up to a constant that is `LightSB`'s loss for times to 1: the same minimiser and
    landscape, with the noise of t and z added and a little bias from the cut. It is here to compare; prefer `LightSB`.

    Its arguments are `LightSB`'s; it differs in its default solver alone.

    References:
        Light and Optimal Schrödinger Bridge Matching (Gushchin, Kholkin, Burnaev and Korotin, 2024),
        https://arxiv.org/abs/2402.03207, algorithm 1. A minibatch shares 32 stratified times here, so that a step costs
        what a likelihood step costs.

    Example:
        >>> import torch
        >>> bridge = LightSBM(1, num_components=3)
        >>> history = bridge.fit(torch.randn(500, 1), torch.randn(500, 1), num_updates=100, progress=False)
        >>> bridge.drift(0.5, torch.zeros(4, 1)).shape
        torch.Size([4, 1])
    """

    default_solver = "matching"
