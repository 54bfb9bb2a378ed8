r"""Bass map :math:`X_t(y) = y + (\epsilon / \beta) \nabla \log h_t(y)`, its exact inverse, the dual on fixed draws."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sb.ops.log_quadratic import LogSumQuadratic
from pyro_sb.ops.mixture import MixturePotential
from pyro_sb.ops.moment_matching import Side, moment_step

DENSE_DIM = 32  # Newton's system is solved by factoring up to here, by conjugate gradients above


class BassMap(NamedTuple):
    r"""The map :math:`X_t(y) = y + \tfrac{\epsilon}{\beta} \nabla \log h_t(y)` at one time, and its inverse.

    It is the gradient of :math:`\tfrac12 |y|^2 + \tfrac{\epsilon}{\beta} \log h_t`. For a Gaussian-mixture potential
    (see `MixturePotential`) whose :math:`S_j` have all eigenvalues above :math:`1 / (1 + \beta)`, that is strictly
    convex for every t in [0, 1]: the map is a strictly monotone bijection, and its inverse

    .. math:: Y_t(x) = \operatorname{argmin}_y\; \epsilon \log h_t(y) + \tfrac{\beta}{2} |x - y|^2 .

    Args:
        log_h: The function :math:`\log h_t`.
        epsilon: Variance of the reference over [0, 1], positive.
        beta: Price of volatility, above 1; ``inf`` makes the map the identity.

    References:
        LightSBB-M (2026), https://arxiv.org/abs/2601.19312, section 3.2. The paper learns the inverse by a network; the
        convex problem above is solved here to rounding.

    Example:
        >>> from pyro_sb.ops.mixture import MixturePotential
        >>> potential = MixturePotential(torch.zeros(1), torch.zeros(1, 1), torch.full((1, 1), 2.0), 1.0)
        >>> bass = BassMap(potential.at(1.0), 1.0, 10.0)
        >>> bass.forward(torch.ones(1, 1))
        tensor([[1.0500]])
        >>> bass.inverse(torch.full((1, 1), 1.05)).points
        tensor([[1.0000]])
    """

    log_h: LogSumQuadratic
    epsilon: float
    beta: float

    def forward(self, y: Tensor) -> Tensor:
        """X(y). Shape of ``y``, ``(*B, m, d)``."""
        if math.isinf(self.beta):
            return y
        return y + self.epsilon / self.beta * self.log_h.gradient(y)

    def jacobian(self, y: Tensor) -> Tensor:
        """Derivative of the map, symmetric. ``(*B, m, d)`` to ``(*B, m, d, d)``."""
        eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        if math.isinf(self.beta):
            return eye.expand(*y.shape, y.shape[-1])
        return eye + self.epsilon / self.beta * self.log_h.gradient_and_hessian(y)[1]

    def log_det(self, y: Tensor) -> Tensor:
        """Log determinant of the derivative. ``(*B, m, d)`` to ``(*B, m)``; NaN where the map is not monotone."""
        if math.isinf(self.beta):
            return torch.zeros_like(y[..., 0])
        factor, failed = torch.linalg.cholesky_ex(self.jacobian(y))
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(failed > 0, math.nan, log_det)

    def objective(self, y: Tensor, x: Tensor) -> Tensor:
        r"""The function :math:`\epsilon \log h(y) + \tfrac{\beta}{2} |x - y|^2`, minimal over y at Y(x).

        Shapes ``(*B, m, d)`` to ``(*B, m)``.
        """
        value = self.epsilon * self.log_h.value(y)
        return value if math.isinf(self.beta) else value + self.beta / 2 * (x - y).square().sum(-1)

    def newton_step(self, y: Tensor, x: Tensor, *, num_products: int | None = None) -> Tensor:
        """One Newton step towards the inverse at x, halved where the objective would not fall. Shape of ``y``.

        Args:
            y: Where to start. Shape ``(*B, m, d)``.
            x: Points to invert. Shape ``(*B, m, d)``.
            num_products: Largest number of Hessian products where the system is not factored (d above 32).
        """
        return self._guarded(y, x, self._model(y, x, num_products))

    def inverse(
        self, x: Tensor, start: Tensor | None = None, *, tolerance: float | None = None, max_iter: int = 60
    ) -> "Inverse":
        """Y(x) by Newton's method with backtracking, all points at once.

        Args:
            x: Points to invert. Shape ``(*B, m, d)``.
            start: A guess of the inverse. Omitted: ``x`` itself.
            tolerance: Largest ``|X(y) - x|`` asked for, relative to ``1 + |x|``. Omitted: 1e-12 in float64, 1e-5 in
                float32.
            max_iter: Largest number of Newton steps; some ten suffice.

        Returns:
            Points, how far ``X(y) - x`` is from zero, steps made, whether the tolerance was met.
        """
        if math.isinf(self.beta) or not x.numel():
            return Inverse(x, 0.0, 0, True)
        tolerance = tolerance or (1e-12 if x.dtype == torch.float64 else 1e-5)
        y, units, steps = (x if start is None else start), 1 + x.abs().amax(-1), 0
        model = self._model(y, x, None)
        while True:
            error = torch.nan_to_num(model.offset.abs().amax(-1) / units, nan=math.inf)
            residual, open_rows = float(error.max()), error > tolerance
            if residual <= tolerance or steps == max_iter:
                return Inverse(y, residual, steps, residual <= tolerance)
            if len(x) > 64 and int(open_rows.sum()) < 0.5 * open_rows.numel():
                break
            y, steps = self._guarded(y, x, model), steps + 1
            model = self._model(y, x, None)
        rows = open_rows.flatten(1).any(1) if open_rows.dim() > 1 else open_rows  # the few that are left, alone
        rest = self._rows(rows).inverse(x[rows], y[rows], tolerance=tolerance, max_iter=max_iter - steps)
        y = torch.index_put(y, (rows,), rest.points)
        return Inverse(y, max(rest.residual, float(error[~open_rows].max())), steps + rest.iterations, rest.converged)

    def _rows(self, rows: Tensor) -> "BassMap":
        """The same map at some of the points, which are some of the functions too if there is a batch of them."""
        if self.log_h.constant.dim() == 1:
            return self
        return self._replace(log_h=LogSumQuadratic(*(value[rows] for value in self.log_h)))

    def _model(self, y: Tensor, x: Tensor, num_products: int | None) -> "NewtonModel":
        """The objective over beta, its gradient ``X(y) - x``, and Newton's direction."""
        ratio, gap = self.epsilon / self.beta, x - y
        if y.shape[-1] > DENSE_DIM:
            h = self.log_h.hessian_product(y)
            offset = ratio * h.gradient - gap
            count = y.shape[-1] if num_products is None else num_products
            direction = conjugate_gradients(lambda v: v + ratio * h(v), offset, 1 + ratio * h.diagonal(), count)
            return NewtonModel(ratio * h.value + 0.5 * gap.square().sum(-1), offset, direction)
        value, gradient, hessian = self.log_h.second_order(y)
        offset = ratio * gradient - gap
        jacobian = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) + ratio * hessian
        return NewtonModel(ratio * value + 0.5 * gap.square().sum(-1), offset, solve_small(jacobian, offset))

    def _guarded(self, y: Tensor, x: Tensor, model: "NewtonModel") -> Tensor:
        """Newton's step, halved wherever the objective does not fall as its slope promises."""
        descent = (model.offset * model.direction).sum(-1)
        slack = 32 * torch.finfo(y.dtype).eps * (1 + model.value.abs())
        size = torch.ones_like(descent)
        for _ in range(30):
            moved = y - size[..., None] * model.direction
            worse = self.objective(moved, x) / self.beta > model.value - 1e-4 * size * descent + slack
            if not bool(worse.any()):
                return moved
            size = torch.where(worse, 0.5 * size, size)
        return y - size[..., None] * model.direction


class NewtonModel(NamedTuple):
    """Parts of a Newton step: the objective over beta, ``X(y) - x``, and the direction to subtract."""

    value: Tensor
    offset: Tensor
    direction: Tensor


class Inverse(NamedTuple):
    """Inverse points of a `BassMap`.

    Attributes:
        points: Y(x). Shape of x.
        residual: Largest ``|X(y) - x|`` relative to ``1 + |x|``.
        iterations: Newton steps made.
        converged: Whether the tolerance was met.
    """

    points: Tensor
    residual: float
    iterations: int
    converged: bool


def solve_small(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solution of symmetric systems ``(*, d, d)``, written out at d = 1 and 2, where factoring costs most of the time.

    Example:
        >>> solve_small(2 * torch.eye(2), torch.ones(2))
        tensor([0.5000, 0.5000])
    """
    if matrix.shape[-1] == 1:
        return vector / matrix[..., 0]
    if matrix.shape[-1] == 2:
        a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
        u, v = vector[..., 0], vector[..., 1]
        return torch.stack([c * u - b * v, a * v - b * u], -1) / (a * c - b * b)[..., None]
    return torch.linalg.solve(matrix, vector[..., None])[..., 0]


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], vector: Tensor, preconditioner: Tensor, num_iter: int
) -> Tensor:
    r"""Solution of :math:`A z = b` for many symmetric positive definite A at once, preconditioned by a diagonal.

    Args:
        product: The map :math:`v \mapsto A v`, shape kept.
        vector: b. Shape ``(*, d)``.
        preconditioner: Diagonal of A or near it, positive. Shape ``(*, d)``.
        num_iter: Largest number of products.

    Example:
        >>> diagonal = torch.tensor([1.0, 2.0])
        >>> conjugate_gradients(lambda v: diagonal * v, torch.ones(2), torch.ones(2), 2)
        tensor([1.0000, 0.5000])
    """
    tiny = torch.finfo(vector.dtype).tiny
    z, residual = torch.zeros_like(vector), vector
    scaled = residual / preconditioner
    direction, power = scaled, (residual * scaled).sum(-1, keepdim=True)
    stop = torch.finfo(vector.dtype).eps ** 2 * power
    for _ in range(num_iter):
        if not bool((power > stop).any()):
            break
        image = product(direction)
        size = power / (direction * image).sum(-1, keepdim=True).clamp_min(tiny)
        z, residual = z + size * direction, residual - size * image
        scaled = residual / preconditioner
        new = (residual * scaled).sum(-1, keepdim=True)
        direction, power = scaled + new / power.clamp_min(tiny) * direction, new
    return z


class DualState(NamedTuple):
    """Potential with the inverse points of all draws under it, and G."""

    potential: MixturePotential
    y0: Tensor
    y1: Tensor
    dual: float


class DualProblem(NamedTuple):
    r"""Dual of the Schrödinger-Bass problem on fixed draws of both sides, and monotone steps up it.

    .. math:: G = E_{\mu_1} \min_y \big[\epsilon \log h_1(y) + \tfrac\beta2 |x - y|^2\big]
                - E_{\mu_0} \min_y \big[\epsilon \log h_0(y) + \tfrac\beta2 |x - y|^2\big] .

    Args:
        source: Points at time 0.
        target: Points at time 1.
        beta: Price of volatility.
    """

    source: Side
    target: Side
    beta: float

    def at(self, potential: MixturePotential, near: DualState | None = None) -> DualState:
        """G and the inverse points, by Newton from those of a state nearby."""
        ends = [BassMap(potential.at(t), potential.epsilon, self.beta) for t in (0.0, 1.0)]
        starts = (None, None) if near is None else (near.y0, near.y1)
        sides = (self.source, self.target)
        inverses = [e.inverse(s.points, y) for e, s, y in zip(ends, sides, starts, strict=True)]
        if not all(i.residual < 1e-4 for i in inverses):
            return DualState(potential, inverses[0].points, inverses[1].points, -math.inf)
        values = [
            float(s.weights @ e.objective(i.points, s.points)) for e, s, i in zip(ends, sides, inverses, strict=True)
        ]
        return DualState(potential, inverses[0].points, inverses[1].points, values[1] - values[0])

    def ascend(self, state: DualState, size: float, floor: float) -> tuple[DualState, float]:
        """A moment step at the inverse points, lengthened while G rises and halved until it does."""
        aim = moment_step(
            state.potential, Side(state.y0, self.source.weights), Side(state.y1, self.target.weights), floor=floor
        )
        for _ in range(30):
            new = self.at(_between(state.potential, aim, size, floor), state)
            if new.dual > state.dual:
                return new, min(1.5 * size, 6.0 if state.potential.diagonal else 1.0)
            size *= 0.5
        return state, size


def _between(here: MixturePotential, aim: MixturePotential, size: float, floor: float) -> MixturePotential:
    """Parameters on the way, or beyond: geometric in diagonal scales, linear in all else."""
    log_weights = here.log_weights + size * (aim.log_weights - here.log_weights)
    locs = here.locs + size * (aim.locs - here.locs)
    if here.diagonal:
        scales = (here.scales.log() + size * (aim.scales / here.scales).log()).exp().clamp_min(floor)
    else:
        scales = here.scales + min(size, 1.0) * (aim.scales - here.scales)
    return MixturePotential(log_weights, locs, scales, here.epsilon)


class Pairs(NamedTuple):
    """Points x of both sides with their inverse points y, in the shapes that a potential takes."""

    x0: Tensor
    y0: Tensor
    x1: Tensor
    y1: Tensor
    context: Tensor | None

    def rows(self, index: Tensor) -> "Pairs":
        """Some of the pairs; a single source point serves all."""
        x0, y0 = (v if len(v) == 1 else v[index] for v in (self.x0, self.y0))
        context = None if self.context is None else self.context[index]
        return Pairs(x0, y0, self.x1[index], self.y1[index], context)


class Pool:
    """Pairs to take minibatches from, whose inverses follow the parameters by a Newton step a use."""

    def __init__(self, pairs: Pairs) -> None:
        own = {name: getattr(pairs, name).clone(memory_format=torch.contiguous_format) for name in ("y0", "y1")}
        self.pairs, self.used = pairs._replace(**own), 0  # an inverse may be the very tensor that was inverted
        self._queue = torch.empty(0, dtype=torch.long, device=pairs.x1.device)

    def next(self, num: int) -> Tensor:
        """Indices of a minibatch, each once a round."""
        if len(self._queue) < num:
            self._queue = torch.randperm(len(self.pairs.x1), device=self._queue.device)
        index, self._queue = self._queue[:num], self._queue[num:]
        self.used += num
        return index

    def put(self, index: Tensor, y0: Tensor, y1: Tensor) -> None:
        """Take better inverses."""
        if len(self.pairs.y0) == 1:
            self.pairs.y0.copy_(y0)
        else:
            self.pairs.y0[index] = y0
        self.pairs.y1[index] = y1
