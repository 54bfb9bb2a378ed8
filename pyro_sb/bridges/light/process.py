r"""Process :math:`X_t = Y_t + s(t, Y_t) / \beta` of a Gaussian-mixture potential, and the parameters that it learns."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_sb.bridges.data import Batch
from pyro_sb.checks import check_memory
from pyro_sb.nn import ContextNet, SetEmbedding, TimeNet, embedding_size, with_constant_parameters
from pyro_sb.ops.bass import BassMap
from pyro_sb.ops.factor_mixture import FactorMixture
from pyro_sb.ops.mixture import MixturePotential, likelihood_loss, weighted_mean
from pyro_sb.ops.moment_matching import Side, equal_weights, matching_scale, moment_step
from pyro_sb.threads import chosen_threads

COVARIANCES = ("diagonal", "full")


class MixtureParameters(nn.Module):
    r"""Unconstrained parameters of :math:`\log a_j, r_j, S_j`, with every eigenvalue of S above a floor.

    Diagonal: :math:`S = s_{\min} + e^q`. Full: :math:`S = s_{\min} I + A L L^\top A` with :math:`L` lower triangular
    and :math:`\log \operatorname{diag} L` free; :math:`r = A \rho`. The diagonal A is 1 but for axes that are more
    than ten times narrower than the rest, so that Adam's steps suit them too.

    With a context a network adds to all parameters. Full covariances are then given by the lower triangular factor of
    their precision, :math:`S = (P^\top P)^{-1}` with :math:`P = D (I + N)`, :math:`\log D` and the strictly lower
    :math:`N` free but for :math:`D \le s_{\min}^{-1/2}`: a density then needs no factorisation (`law`).

    Args:
        dim: Event size d.
        num_components: J.
        context_dim: Size of the context; 0 for none.
        covariance: ``"diagonal"`` or ``"full"``.
        hidden: Widths of the network's hidden layers.
        dropout: Share of features that the network drops while it learns.
        embedding: Module from contexts ``(n, context_dim)`` to features, learnt with the rest.
    """

    floor: Tensor
    axes: Tensor
    net: ContextNet | None

    def __init__(
        self,
        dim: int,
        num_components: int,
        context_dim: int,
        covariance: str,
        hidden: tuple[int, ...],
        dropout: float = 0.0,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if embedding is not None and not context_dim:
            raise ValueError("embedding needs context_dim > 0, got 0: it maps contexts to features.")
        width = dim if covariance == "diagonal" else dim * dim
        last = hidden[-1] if context_dim else 1
        learnt = num_components * (1 + dim + width) * last  # with gradients, their two moments, and the best so far
        check_memory("num_components", num_components, 5 * learnt, "Write 50.")
        shape = (num_components, dim) if covariance == "diagonal" else (num_components, dim, dim)
        self.diagonal = covariance == "diagonal"
        self.log_weights = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.zeros(num_components, dim))
        self.raw = nn.Parameter(torch.zeros(shape))
        self.register_buffer("floor", torch.tensor(1e-6))
        self.register_buffer("axes", torch.ones(dim))
        self.factored = context_dim > 0 and not self.diagonal
        entries = dim * (dim + 1) // 2 if self.factored else self.raw[0].numel()
        self.sizes = [num_components, num_components * dim, num_components * entries]
        self.embedding = embedding
        features = context_dim if embedding is None else embedding_size(embedding, context_dim)
        self.net = ContextNet(features, sum(self.sizes), hidden=hidden, dropout=dropout) if context_dim else None
        self.changed = False  # whether `set` has been called: what a fit looks at to know that it has begun to learn

    def forward(self, context: Tensor | None, epsilon: float) -> MixturePotential:
        """The potential, with a leading batch of contexts ``(n, context_dim)`` if there are any."""
        log_weights, locs, raw = self._raw(context)
        return MixturePotential(log_weights, locs, self._scales(raw), epsilon)

    def law(self, context: Tensor, epsilon: float) -> FactorMixture:
        r"""The plan from the origin, :math:`\sum_j a_j N(r_j, \epsilon S_j)`: contexts with full covariances alone."""
        log_weights, locs, raw = self._raw(context)
        return FactorMixture(log_weights, locs, self._log_diagonal(raw) - 0.5 * math.log(epsilon), strictly_lower(raw))

    def _raw(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, locs and raw scales, given the context."""
        own = (self.log_weights, self.locs, self.raw)
        if self.net is not None and context is not None:
            features = context if self.embedding is None else self.embedding.train(self.net.noisy)(context)
            log_weights, locs, raw = (
                x.unflatten(-1, (len(own[0]), -1)) for x in self.net(features).split(self.sizes, -1)
            )
            raw = lower_triangular(raw, own[2].shape[-1]) if self.factored else raw.unflatten(-1, own[2].shape[1:])
            log_weights, locs, raw = own[0] + log_weights[..., 0], own[1] + locs, own[2] + raw
            return log_weights, self.axes * locs, raw
        return own[0], self.axes * own[1], own[2]

    def _log_diagonal(self, raw: Tensor) -> Tensor:
        """Log D from the raw diagonal, which bends into its bound."""
        most = -0.5 * self.floor.log()
        return most - nn.functional.softplus(most - raw.diagonal(dim1=-2, dim2=-1))

    @contextmanager
    def noise(self) -> Iterator[None]:
        """The network's dropout is on within."""
        if self.net is not None:
            self.net.noisy = True
        try:
            yield
        finally:
            if self.net is not None:
                self.net.noisy = False

    def measure(self, deviations: Tensor) -> None:
        """Take A from the standard deviations of the axes, in the bridge's units. Shape ``(dim,)``."""
        self.axes.copy_((10 * deviations).clamp_max(1.0))

    def reset(self) -> None:
        """Forget what the network has learnt."""
        if self.net is not None:
            self.net.reset()
        if isinstance(self.embedding, SetEmbedding):  # a user's own module stays as he made it: it may be pretrained
            self.embedding.reset()

    @torch.no_grad()
    def set(self, potential: MixturePotential, floor: float) -> None:
        """Take the values of a potential without a batch; eigenvalues of S near or below the floor are raised."""
        self.changed = True
        self.floor.fill_(floor)
        self.log_weights.copy_(potential.log_weights)
        self.locs.copy_(potential.locs / self.axes)
        if self.diagonal:
            self.raw.copy_((potential.scales - self.floor).clamp_min(1e-3 * floor).log())
            return
        if self.factored:
            self.raw.copy_(self._raw_factor(potential.scales))
            return
        values, vectors = torch.linalg.eigh(potential.scales)
        above = (vectors * (values - self.floor).clamp_min(1e-3 * floor)[..., None, :]) @ vectors.mT
        factor = torch.linalg.cholesky(above / (self.axes[:, None] * self.axes))
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        self.raw.copy_(factor.tril(-1) + torch.diag_embed(diagonal.log()))

    def _raw_factor(self, scales: Tensor) -> Tensor:
        """The raw form of P for given S, with eigenvalues raised to twice the floor."""
        values, vectors = torch.linalg.eigh(scales)
        above = (vectors * values.clamp_min(2 * self.floor)[..., None, :]) @ vectors.mT
        eye = torch.eye(scales.shape[-1], dtype=scales.dtype, device=scales.device)
        factor = torch.linalg.solve_triangular(torch.linalg.cholesky(above), eye.expand_as(above), upper=False)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        most = -0.5 * self.floor.log()
        below = most - diagonal.log().clamp_max(most - 1e-3)
        return (factor / diagonal[..., None]).tril(-1) + torch.diag_embed(most - below.expm1().log())

    def _scales(self, raw: Tensor) -> Tensor:
        if self.factored:
            return FactorMixture(
                self.log_weights, self.locs, self._log_diagonal(raw), strictly_lower(raw)
            ).covariances()
        if self.diagonal:
            return self.floor + raw.exp()
        factor = self.axes[:, None] * (raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp()))
        return factor @ factor.mT + self.floor * torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)


def lower_triangular(entries: Tensor, dim: int) -> Tensor:
    """Matrices from their entries on and below the diagonal, row by row. ``(*, d (d + 1) / 2)`` to ``(*, d, d)``.

    Example:
        >>> lower_triangular(torch.tensor([1.0, 2.0, 3.0]), 2)
        tensor([[1., 0.],
                [2., 3.]])
    """
    zero, parts = entries.new_zeros(()), []
    for row, part in enumerate(entries.split(list(range(1, dim + 1)), -1)):  # joined: three times faster than indices
        parts += [part, zero.expand(*entries.shape[:-1], dim - 1 - row)]
    return torch.cat(parts, -1).unflatten(-1, (dim, dim))


def strictly_lower(raw: Tensor) -> Tensor:
    """Matrices without their diagonal and what is above it."""
    keep = torch.ones(raw.shape[-2:], dtype=raw.dtype, device=raw.device).tril(-1)
    return raw * keep


class LearnedMap(TimeNet):
    """Network in place of the inverse :math:`Y_t(x)`."""


class MixtureProcess(NamedTuple):
    r"""Process :math:`X_t = Y_t + s(t, Y_t) / \beta` in the bridge's units, with Y of one Gaussian-mixture potential.

    Y is a Schrödinger bridge with drift s, and X is Y for infinite beta. Both ends are centred: the origin is the
    source's mean at t = 0 and the target's at t = 1. Points are rows ``(n, dim)``, contexts standardised rows
    ``(n, context_dim)`` or None; long arrays are taken some rows at a time.

    Args:
        parameters: Give the potential, a batch of them where there are contexts.
        epsilon: Variance of the reference over [0, 1].
        beta: Price of volatility, above 1 or infinite.
        source_variance: Variance of the source, averaged over the axes; 0 where it is a point.
        learned_map: Network in place of the inverse of the Bass map; None for the exact one.
    """

    parameters: MixtureParameters
    epsilon: float
    beta: float
    source_variance: float
    learned_map: LearnedMap | None = None

    @property
    def floor(self) -> float:
        """Smallest eigenvalue of S: components keep 1e-6 of the target's variance, or the Bass map its inverse."""
        if self.learned_map is not None:  # the paper has no floor
            return 1e-6 / self.epsilon
        bass = 0.0 if math.isinf(self.beta) else 1.05 / (1 + self.beta)
        variance = 1e-6 * float(self.parameters.axes.min()) ** 2  # the axes are 1 where none is narrow
        root = math.sqrt(self.epsilon**2 + 4 * self.source_variance * variance)
        return max(2 * variance / (self.epsilon + root), bass)  # S that carries the source to that variance

    @property
    def factored(self) -> bool:
        """Whether, given contexts, the ends are a mixture that is known by the factors of its precisions."""
        return self.parameters.factored and self.source_variance == 0 and math.isinf(self.beta)

    @property
    def width(self) -> int:
        """Numbers that a row of points takes at once."""
        return self.parameters.locs.numel()

    @property
    def row_width(self) -> int:
        """Numbers that a row of contexts takes where it has full covariances."""
        return self.width * self.parameters.locs.shape[-1]

    def potential(self, context: Tensor | None = None) -> MixturePotential:
        """The potential, a batch of them for contexts."""
        return self.parameters(context, self.epsilon)

    def law(self, context: Tensor) -> FactorMixture:
        """The mixture of the ends at each context, where `factored`."""
        return self.parameters.law(context, self.epsilon)

    def take(self, potential: MixturePotential) -> None:
        """Make a potential without a batch the process's own; eigenvalues of S are raised to the floor."""
        self.parameters.set(potential, self.floor)

    def lift(self, z: Tensor, context: Tensor | None) -> tuple[MixturePotential, Tensor]:
        """The potential of each row's context, and the rows in the shape that it takes."""
        potential = self.potential(context)
        return potential, z if context is None else z[:, None, :]

    def frozen(self, z: Tensor, context: Tensor | None) -> tuple[MixturePotential, Tensor]:
        """The same with constant parameters: a fitted bridge's densities pass gradients to points and contexts."""
        if context is not None and torch.is_grad_enabled():
            potential = with_constant_parameters(self.parameters, self.parameters.forward, context, self.epsilon)
            return potential, z[:, None, :]
        with torch.no_grad():
            potential = self.lift(z, context)[0]
        log_weights, locs, scales, epsilon = potential
        potential = MixturePotential(log_weights.detach(), locs.detach(), scales.detach(), epsilon)
        return potential, z if context is None else z[:, None, :]

    def frozen_law(self, context: Tensor) -> FactorMixture:
        """The mixture of the ends with constant parameters: gradients go to contexts alone."""
        if not torch.is_grad_enabled():
            return self.law(context)
        return with_constant_parameters(self.parameters, self.parameters.law, context, self.epsilon)

    def bass(self, potential: MixturePotential, t: float | Tensor) -> BassMap:
        """The map from Y to X at time t."""
        return BassMap(potential.at(t), self.epsilon, self.beta)

    def invert(self, potential: MixturePotential, t: float | Tensor, points: Tensor) -> Tensor:
        """Y_t at points, exact, with three derivatives where points or contexts carry gradients; or the learnt one."""
        if self.learned_map is not None:
            return self.learned_map(torch.as_tensor(t), points)
        bass = self.bass(potential, t)
        with torch.no_grad():
            inverse = bass.inverse(points)
        if not inverse.residual <= (1e-3 if points.dtype == torch.float32 else 1e-9):  # NaN is refused too
            raise RuntimeError(
                f"the inverse of the Bass map must be found, got a residual of {inverse.residual:.2g} after "
                f"{inverse.iterations} Newton steps. Fit in float64, or raise beta (now {self.beta:g})."
            )
        if not (torch.is_grad_enabled() and (points.requires_grad or potential.locs.requires_grad)):
            return inverse.points
        once = bass.newton_step(inverse.points, points)  # from a constant k steps have 2^k - 1 derivatives right
        return bass.newton_step(once, points)

    def likelihood(self, source: Tensor, target: Batch) -> Tensor:
        r"""Likelihood loss :math:`E \log c(y_0) - E \log v(y_1)` of points of both sides, each at its context."""
        if self.factored and target.context is not None:  # -log of the plan's density from the source
            return -weighted_mean(self.law(target.context).log_prob(target.points), target.weights)
        source, target = paired(source, target)
        potential, y1 = self.lift(target.points, target.context)
        y0 = self.lift(source, target.context)[1]
        own = None if target.context is None else target.weights  # source rows belong to contexts, or weigh the same
        return likelihood_loss(potential, y0, y1, own, target.weights)

    def dual(self, source: Tensor, target: Batch) -> float:
        """The dual G (`DualProblem`) of points of both sides, each at its context."""
        source, target = paired(source, target)
        potential, points1 = self.lift(target.points, target.context)
        points0 = self.lift(source, target.context)[1]
        start, end = self.bass(potential, 0.0), self.bass(potential, 1.0)
        y0, y1 = start.inverse(points0), end.inverse(points1)
        if max(y0.residual, y1.residual) > 1e-2:
            return -math.inf  # the minimum was not found, and a value above it would flatter
        own = None if target.context is None else target.weights
        value = weighted_mean(end.objective(y1.points, points1), target.weights)
        return float(value - weighted_mean(start.objective(y0.points, points0), own))


def paired(source: Tensor, target: Batch) -> tuple[Tensor, Batch]:
    """Ends as they are without context; with one, a source row for each of its rows."""
    if target.context is None:
        return source, target
    if len(source) == 1:
        return source.expand_as(target.points), target
    return source[torch.arange(len(target.points), device=source.device) % len(source)], target


WIDE = 1.0  # epsilon, in units of the target's variance, at which gates are soft
STEPS_A_STAGE = 2


@torch.no_grad()
def cluster_start(
    source: Tensor, target: Side, num_components: int, epsilon: float, *, floor: float, diagonal: bool
) -> MixturePotential:
    r"""Potential from k-means clusters of the target, by moment steps along a ladder of falling epsilons.

    At small epsilon the gates saturate and a component that begins without source mass stays without; so the ladder
    starts where they are soft, at about the target's variance, and falls by 4 a stage.

    Args:
        source: Points at time 0. Shape ``(n, d)``; a single row is a point source.
        target: Weighted points at time 1, of about unit variance.
        num_components: J, at most the number of target points.
        epsilon: Reference variance in the same units.
        floor: Smallest eigenvalue of S.
        diagonal: Form of the covariances.
    """
    points = target.points
    labels = _clusters(target, num_components)
    gates = torch.nn.functional.one_hot(labels, num_components).to(points) * target.weights[:, None]
    mass = gates.sum(0).clamp_min(1e-8)  # a cluster may be empty
    mean = (gates.T @ points) / mass[:, None]
    centred = points - mean[labels]
    variance = (gates.T @ centred.square()) / mass[:, None] + 1e-3 * _within(centred, target.weights)
    cov1 = variance if diagonal else torch.diag_embed(variance)
    ladder = [epsilon] if len(source) == 1 else _ladder(epsilon)
    potential = _matched(source, ladder[0], mass, mean, cov1, floor, diagonal)
    ends = equal_weights(source), target
    for stage in ladder:
        potential = _carried(potential, ends[0], stage)
        for _ in range(STEPS_A_STAGE):
            potential = moment_step(potential, *ends, floor=floor)
    return potential


def _clusters(target: Side, num: int) -> Tensor:
    if num == 1:
        return torch.zeros(len(target.points), dtype=torch.long, device=target.points.device)
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31, ()))
    kmeans = KMeans(num, n_init=4, max_iter=30, random_state=seed)  # one start may merge two modes
    with chosen_threads():  # scikit-learn's libraries may have come just now
        labels = kmeans.fit_predict(target.points.cpu().double().numpy(), sample_weight=target.weights.cpu().numpy())
    return torch.as_tensor(labels, dtype=torch.long, device=target.points.device)


def _within(centred: Tensor, weights: Tensor) -> Tensor:
    """Pooled variance within clusters, never zero."""
    return (weights @ centred.square()).clamp_min(1e-6)


def _ladder(epsilon: float) -> list[float]:
    stages = max(0, math.ceil(math.log(WIDE / epsilon, 4))) if epsilon < WIDE else 0
    return [epsilon * 4.0**k for k in range(stages, -1, -1)]


def _matched(
    source: Tensor, epsilon: float, mass: Tensor, mean: Tensor, cov1: Tensor, floor: float, diagonal: bool
) -> MixturePotential:
    """Components that carry the whole source to each cluster."""
    mean0 = source.mean(0)
    variance0 = (source - mean0).square().mean(0)
    cov0 = variance0 if diagonal else torch.diag(variance0)
    scales = matching_scale(cov0, cov1, epsilon, diagonal=diagonal)
    scales = scales.clamp_min(floor) if diagonal else scales + floor * torch.eye(len(mean0)).to(scales)
    locs = mean - (scales * mean0 if diagonal else scales @ mean0)
    return _with_masses(MixturePotential(mass.log(), locs, scales, epsilon), source, mass)


def _with_masses(potential: MixturePotential, source: Tensor, mass: Tensor) -> MixturePotential:
    """Log weights such that the plan puts ``mass`` on each component: iterative scaling."""
    for _ in range(10):
        gates = potential.normaliser().gates(source).mean(0).clamp_min(1e-8)
        potential = potential._replace(log_weights=potential.log_weights + (mass / gates).log().clamp(-5.0, 5.0))
    return potential


def _carried(potential: MixturePotential, source: Side, epsilon: float) -> MixturePotential:
    """The same plan's component moments under another epsilon."""
    if epsilon == potential.epsilon:
        return potential
    gates = potential.normaliser().gates(source.points) * source.weights[:, None]
    mass = gates.sum(0).clamp_min(1e-8)
    mean0 = (gates.T @ source.points) / mass[:, None]
    centred = source.points[:, None, :] - mean0
    if potential.diagonal:
        cov0 = (gates[..., None] * centred.square()).sum(0) / mass[:, None]
        cov1 = potential.epsilon * potential.scales + potential.scales.square() * cov0
        scales = matching_scale(cov0, cov1, epsilon, diagonal=True)
        locs = potential.locs + (potential.scales - scales) * mean0
    else:
        cov0 = torch.einsum("nj,nja,njb->jab", gates, centred, centred) / mass[:, None, None]
        cov1 = potential.epsilon * potential.scales + potential.scales @ cov0 @ potential.scales
        scales = matching_scale(cov0, cov1, epsilon)
        locs = potential.locs + ((potential.scales - scales) @ mean0[..., None])[..., 0]
    return _with_masses(MixturePotential(potential.log_weights, locs, scales, epsilon), source.points, mass)
