"""Mixtures of multivariate Student-t laws: density, score, draws and a weighted EM fit."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FEW_DIMENSIONS = 16  # up to which an EM step reads stored products of coordinates
NUMBERS = 2**20  # that an EM step holds for the components that it does at a time


class StudentMixture(NamedTuple):
    r"""Mixture of multivariate Student-t laws with full scale matrices.

    .. math:: \rho(x) = \sum_k w_k\, t_{\nu_k}(x;\, b_k,\, L_k L_k^\top)

    The tails are polynomial, so :math:`p / \rho` stays bounded for every target with lighter tails: what an
    independence move needs to be uniformly ergodic. ``df = inf`` makes a component Gaussian.

    Args:
        log_weights: Logarithms of weights that sum to one. Shape ``(K,)``.
        locs: Centres. Shape ``(K, d)``.
        scale_trils: Cholesky factors of the scale matrices. Shape ``(K, d, d)``.
        df: Degrees of freedom, positive, ``inf`` allowed. Shape ``(K,)``.

    Example:
        >>> mixture = StudentMixture(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None], torch.tensor([5.0]))
        >>> mixture.log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    log_weights: Tensor
    locs: Tensor
    scale_trils: Tensor
    df: Tensor

    @property
    def num_components(self) -> int:
        """Number of components K."""
        return self.locs.shape[0]

    @property
    def covariance(self) -> Tensor:
        r"""Pooled scale matrix :math:`\sum_k w_k L_k L_k^\top`, the within-component metric. Shape ``(d, d)``."""
        return torch.einsum("k,kij,klj->il", self.log_weights.exp(), self.scale_trils, self.scale_trils)

    def whiten(self, x: Tensor) -> Tensor:
        """Coordinates :math:`L_k^{-1}(x - b_k)` in every component. ``(C, d)`` to ``(C, K, d)``."""
        inverse = self._inverse_trils
        offset = torch.einsum("kij,kj->ki", inverse, self.locs)
        return torch.addmm(-offset.flatten(), x, inverse.flatten(0, 1).T).view(len(x), *offset.shape)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Log density of every component, without its weight. ``(C, d)`` to ``(C, K)``."""
        squared = self.whiten(x).square().sum(-1)
        return student_log_density(squared, self.df, x.shape[-1]) - self._half_log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of the mixture. ``(C, d)`` to ``(C,)``."""
        return torch.logsumexp(self.log_weights + self.component_log_prob(x), -1)

    def log_responsibilities(self, x: Tensor) -> Tensor:
        r"""Log of :math:`r_k(x) = w_k t_k(x) / \rho(x)`. ``(C, d)`` to ``(C, K)``."""
        return torch.log_softmax(self.log_weights + self.component_log_prob(x), -1)

    def component_scores(self, x: Tensor) -> Tensor:
        r"""Gradients :math:`\nabla \log t_k(x) = -\frac{\nu_k + d}{\nu_k + q_k} (L_k L_k^\top)^{-1} (x - b_k)`.

        ``(C, d)`` to ``(C, K, d)``.
        """
        whitened = self.whiten(x)
        pull = tail_weight(whitened.square().sum(-1), self.df, x.shape[-1])
        return -torch.einsum("ck,cki,kij->ckj", pull, whitened, self._inverse_trils)

    def score(self, x: Tensor) -> Tensor:
        r"""Gradient :math:`\nabla \log \rho(x) = \sum_k r_k(x) \nabla \log t_k(x)`. ``(C, d)`` to ``(C, d)``."""
        return torch.einsum("ck,ckd->cd", self.log_responsibilities(x).exp(), self.component_scores(x))

    def sample(self, num: int) -> Tensor:
        """Independent draws. Shape ``(num, d)``."""
        index = torch.multinomial(self.log_weights.exp(), num, replacement=True)
        return self.sample_components(index)

    def sample_components(self, index: Tensor) -> Tensor:
        """One draw of component ``index[c]`` for every c. ``(C,)`` to ``(C, d)``."""
        noise = torch.randn(*index.shape, self.locs.shape[-1], dtype=self.locs.dtype, device=self.locs.device)
        df = self.df[index]
        finite = torch.where(torch.isinf(df), torch.ones_like(df), df)
        chi2 = 2.0 * torch._standard_gamma(finite / 2.0)
        stretch = torch.where(torch.isinf(df), torch.ones_like(df), (finite / chi2).sqrt())
        return self.locs[index] + stretch[..., None] * torch.einsum("...ij,...j->...i", self.scale_trils[index], noise)

    def with_guard(self, fraction: float, df: float, inflation: float) -> "StudentMixture":
        r"""The mixture :math:`(1 - \delta)\rho + \delta \tilde\rho` and a wide guard :math:`\tilde\rho`.

        Args:
            fraction: Share :math:`\delta` of the guard, in (0, 1).
            df: Degrees of freedom of the guard.
            inflation: Factor on the guard's scale matrices, at least 1.
        """
        return StudentMixture(
            torch.cat([self.log_weights + math.log1p(-fraction), self.log_weights + math.log(fraction)]),
            self.locs.repeat(2, 1),
            torch.cat([self.scale_trils, math.sqrt(inflation) * self.scale_trils]),
            torch.cat([self.df, torch.full_like(self.df, df)]),
        )

    @property
    def _inverse_trils(self) -> Tensor:
        eye = torch.eye(self.locs.shape[-1], dtype=self.locs.dtype, device=self.locs.device)
        return torch.linalg.solve_triangular(self.scale_trils, eye.expand(self.scale_trils.shape), upper=False)

    @property
    def _half_log_det(self) -> Tensor:
        return self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def student_log_density(squared: Tensor, df: Tensor, dim: int) -> Tensor:
    r"""Log density of a standard Student-t law at a squared radius; Gaussian where ``df`` is infinite."""
    gaussian = -0.5 * (squared + dim * math.log(2 * math.pi))
    if bool(torch.isinf(df).all()):
        return gaussian
    nu = torch.where(torch.isinf(df), torch.ones_like(df), df)
    normaliser = torch.lgamma((nu + dim) / 2) - torch.lgamma(nu / 2) - dim / 2 * torch.log(nu * math.pi)
    return torch.where(torch.isinf(df), gaussian, normaliser - (nu + dim) / 2 * torch.log1p(squared / nu))


def tail_weight(squared: Tensor, df: Tensor, dim: int) -> Tensor:
    r"""Pull :math:`(\nu + d) / (\nu + q)` of a point at squared radius q: 1 for a Gaussian, small in a heavy tail."""
    if bool(torch.isinf(df).all()):
        return torch.ones_like(squared)
    nu = torch.where(torch.isinf(df), torch.ones_like(df), df)
    return torch.where(torch.isinf(df), torch.ones_like(squared), (nu + dim) / (nu + squared))


def em_step(
    mixture: StudentMixture,
    points: Tensor,
    weights: Tensor,
    prior_scales: Tensor,
    prior_count: float,
    squares: Tensor | None = None,
) -> tuple[StudentMixture, float]:
    r"""One EM step for a weighted sample at fixed degrees of freedom, scale matrices shrunk.

    .. math:: b_k = \frac{\sum_i w_i r_{ik} u_{ik} x_i}{\sum_i w_i r_{ik} u_{ik}}, \qquad
              \Sigma_k = \frac{n \sum_i w_i r_{ik} u_{ik} (x_i - b_k)(x_i - b_k)^\top + \kappa \Lambda_k}{n \sum_i w_i
              r_{ik} + \kappa}

    with :math:`u_{ik} = (\nu_k + d)/(\nu_k + q_{ik})`, n the effective sample size and :math:`\Lambda_k` =
    ``prior_scales``. In few dimensions squared radii and scatters are matrix products with the ``squares``; in many
    each component's own, a few components at a time, so that neither ``(K, M, d)`` nor ``(M, d, d)`` numbers are held.

    Args:
        mixture: Current mixture of K components.
        points: Sample, centred. Shape ``(M, d)``.
        weights: Non-negative weights that sum to one. Shape ``(M,)``.
        prior_scales: Scale matrices towards which small components shrink. Shape ``(K, d, d)``.
        prior_count: Strength :math:`\kappa > 0` of the shrinkage, in draws.
        squares: The points' `products`, ``(M, d * d)``, or None.

    Returns:
        The new mixture, and the weighted mean log density of the old one.

    References:
        Robust mixture modelling using the t distribution (Peel and McLachlan, 2000), section 3.
    """
    dim, effective = points.shape[-1], 1.0 / weights.square().sum()
    few = max(1, NUMBERS // points.numel())
    if squares is None:
        parts = zip(mixture.locs.split(few), mixture.scale_trils.split(few))
        squared = torch.cat([squared_radii(points, *part) for part in parts], 1)
    else:
        precision = torch.cholesky_inverse(mixture.scale_trils)
        pulled_locs = torch.einsum("kij,kj->ki", precision, mixture.locs)
        squared = squares @ precision.flatten(1).T - 2 * points @ pulled_locs.T + (mixture.locs * pulled_locs).sum(-1)
        squared = squared.clamp_min(0.0)
    joint = mixture.log_weights + student_log_density(squared, mixture.df, dim) - mixture._half_log_det
    total = torch.logsumexp(joint, -1)
    mass = weights[:, None] * torch.exp(joint - total[:, None])
    pulled = mass * tail_weight(squared, mixture.df, dim)
    tiny = torch.finfo(points.dtype).tiny
    share, pull = mass.sum(0).clamp_min(tiny), pulled.sum(0).clamp_min(tiny)
    locs = (pulled.T @ points) / pull[:, None]
    if squares is None:
        second = torch.cat([second_moments(points, part) for part in pulled.T.split(few)])
    else:
        second = (pulled.T @ squares).view(-1, dim, dim)
    scatter = second - pull[:, None, None] * locs[:, :, None] * locs[:, None, :]
    scales = (effective * scatter + prior_count * prior_scales) / (effective * share + prior_count)[:, None, None]
    trils, failed = torch.linalg.cholesky_ex(scales)
    trils = torch.where(
        (failed > 0)[:, None, None], mixture.scale_trils, trils
    )  # thinner than rounding: keep the old shape
    updated = StudentMixture((share / share.sum()).log(), locs, trils, mixture.df)
    return updated, float(weights @ total)


def squared_radii(points: Tensor, locs: Tensor, trils: Tensor) -> Tensor:
    r"""Squared radii :math:`|L_k^{-1}(x_i - b_k)|^2` of points ``(M, d)`` about each of K components. ``(M, K)``."""
    eye = torch.eye(points.shape[-1], dtype=points.dtype, device=points.device)
    inverse = torch.linalg.solve_triangular(trils, eye.expand(trils.shape), upper=False)
    offset = torch.einsum("kij,kj->ki", inverse, locs)
    white = torch.addmm(-offset.flatten(), points, inverse.flatten(0, 1).T)
    return white.square_().view(len(points), *locs.shape).sum(-1)


def second_moments(points: Tensor, pulls: Tensor) -> Tensor:
    r"""Sums :math:`\sum_i p_{ki} x_i x_i^\top`, with pulls ``(K, M)``. ``(K, d, d)``."""
    return ((pulls[:, None, :] * points.T).flatten(0, 1) @ points).view(len(pulls), *2 * points.shape[-1:])


def products(points: Tensor) -> Tensor:
    """Products of the coordinates of points ``(M, d)``, ``(M, d * d)``: they serve all components at once."""
    return (points[:, :, None] * points[:, None, :]).flatten(1)


def kernel_start(locs: Tensor, covariances: Tensor) -> StudentMixture:
    """Gaussian mixture of equal weights at ``(K, d)`` with covariances ``(K, d, d)``: a start for EM."""
    num = len(locs)
    log_weights = torch.full((num,), -math.log(num), dtype=locs.dtype, device=locs.device)
    return StudentMixture(log_weights, locs, torch.linalg.cholesky(covariances), torch.full_like(log_weights, math.inf))


def em_fit(
    points: Tensor,
    weights: Tensor,
    start: StudentMixture,
    df: float,
    prior_count: float,
    *,
    max_iter: int = 30,
    tol: float = 1e-3,
) -> StudentMixture:
    r"""Weighted maximum a posteriori fit of a Student-t mixture by EM.

    Args:
        points: Sample. Shape ``(M, d)``, M at least 2.
        weights: Non-negative weights that sum to one. Shape ``(M,)``.
        start: Mixture to start from; scale matrices shrink towards its own.
        df: Degrees of freedom of all components; ``math.inf`` for a Gaussian mixture.
        prior_count: Strength of the shrinkage in draws, positive.
        max_iter: Largest number of EM steps.
        tol: Stop when the weighted mean log density rises by less than this, in nats.

    Example:
        >>> points = torch.tensor([[-1.0], [-0.9], [0.9], [1.0]])
        >>> start = kernel_start(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1))
        >>> em_fit(points, torch.full((4,), 0.25), start, math.inf, 0.1).log_weights.exp()
        tensor([0.5000, 0.5000])
    """
    prior_scales, previous = start.scale_trils @ start.scale_trils.mT, -math.inf
    centre = weights @ points
    points = points - centre
    squares = products(points) if points.shape[-1] <= FEW_DIMENSIONS else None
    mixture = start._replace(locs=start.locs - centre, df=torch.full_like(start.df, df))
    for _ in range(max_iter):
        mixture, value = em_step(mixture, points, weights, prior_scales, prior_count, squares)
        if value - previous < tol:
            break
        previous = value
    return mixture._replace(locs=mixture.locs + centre)


def weighted_covariance(points: Tensor, weights: Tensor) -> Tensor:
    """Covariance of a weighted sample about its own mean, with a relative ridge of 1e-9 on the diagonal. ``(d, d)``."""
    centred = points - weights @ points
    covariance = (weights[:, None] * centred).T @ centred
    diagonal = covariance.diagonal()
    return covariance + torch.diag(1e-9 * diagonal + torch.finfo(points.dtype).tiny)


def within_covariance(base: StudentMixture, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted covariance about the mean of each point's likeliest component of ``base``. Shape ``(d, d)``."""
    label = base.log_responsibilities(points).argmax(-1)
    onehot = torch.nn.functional.one_hot(label, base.num_components).to(points.dtype) * weights[:, None]
    means = (onehot.T @ points) / onehot.sum(0).clamp_min(torch.finfo(points.dtype).tiny)[:, None]
    return weighted_covariance(points - means[label], weights)
