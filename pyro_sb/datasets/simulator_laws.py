r"""The laws of the simulators' observations that Pyro lacks, and the solver under the two dynamic ones.

Each can be drawn by ``sample`` under ``torch.func.vmap(randomness="different")``, which refuses noise written into an
empty tensor.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.nn.functional import softplus

__all__ = ["Crescent", "Gaussian", "SpikeSums", "runge_kutta4"]


class Gaussian(dist.MultivariateNormal):
    r"""Pyro's multivariate normal, with a ``sample`` that vmap knows.

    Example:
        >>> laws = lambda mean: Gaussian(mean, scale_tril=torch.eye(2), validate_args=False).sample()
        >>> torch.func.vmap(laws, randomness="different")(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent draws. Shape ``(*sample_shape, *batch_shape, d)``."""
        with torch.no_grad():
            mean = self.loc.expand(self._extended_shape(Size(sample_shape)))
            noise = torch.normal(torch.zeros_like(mean), 1.0)
            return mean + (self._unbroadcasted_scale_tril @ noise[..., None])[..., 0]


class Crescent(TorchDistribution):
    r"""A half circle in the plane, whose place the parameters set: the likelihood of two moons.

    .. math:: y = (r \cos a + \tfrac14 - |\theta_1 + \theta_2| / \sqrt 2,\ r \sin a + (\theta_2 - \theta_1) / \sqrt 2),
        \qquad a \sim U(-\tfrac{\pi}{2}, \tfrac{\pi}{2}),\ r \sim N(0.1, 0.01)

    With u, v what is left of y when the place is taken off, and :math:`\rho = \sqrt{u^2 + v^2}`, the density is
    :math:`N(\rho; 0.1, 0.01) / (\pi \rho)` where u > 0 and zero elsewhere. The factor :math:`1 / \rho` is the Jacobian
    of polar coordinates; the benchmark's published likelihood leaves it out, its reference draws follow it. (A negative
    r, ten standard deviations off, is not counted.)

    Args:
        theta: Parameters. Shape ``(*batch, 2)``.

    Example:
        >>> law = Crescent(torch.zeros(2))
        >>> bool(law.log_prob(torch.tensor([0.35, 0.0])) > 0), law.log_prob(torch.tensor([0.15, 0.0]))
        (True, tensor(-inf))
    """

    arg_constraints = {"theta": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = False
    radius, width = 0.1, 0.01

    def __init__(self, theta: Tensor, validate_args: bool | None = None) -> None:
        self.theta = theta
        super().__init__(theta.shape[:-1], Size((2,)), validate_args=validate_args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent draws. Shape ``(*sample_shape, *batch_shape, 2)``."""
        with torch.no_grad():
            place = self._place().expand(Size(sample_shape) + self.theta.shape)
            angle = math.pi * (torch.rand_like(place[..., 0]) - 0.5)
            radius = self.radius + self.width * torch.randn_like(angle)
            return place + torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, minus infinity off the half plane u > 0. Shape of ``value`` less its last axis."""
        u, v = (value - self._place()).unbind(-1)
        inside = u > 0
        rho = (torch.where(inside, u, 1.0).square() + v.square()).sqrt()  # no root at zero, so no NaN in its gradient
        square = ((rho - self.radius) / self.width).square()
        constant = 0.5 * math.log(2 * math.pi) + math.log(self.width) + math.log(math.pi)
        return torch.where(inside, -square / 2 - rho.log() - constant, -torch.inf)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Crescent":
        """The same law, independent over a batch."""
        return Crescent(self.theta.expand(Size(batch_shape) + (2,)), validate_args=False)

    def _place(self) -> Tensor:
        first, second = self.theta.unbind(-1)
        return torch.stack([0.25 - (first + second).abs() / math.sqrt(2), (second - first) / math.sqrt(2)], -1)


class SpikeSums(TorchDistribution):
    r"""Sufficient statistic :math:`y = V^\top z` of Bernoulli spikes z with logits :math:`V \theta`.

    .. math:: p(y \mid \theta) = h(y) \exp\Big(\theta^\top y - \sum_{t=1}^{T} \log(1 + e^{(V \theta)_t})\Big)

    ``log_prob`` leaves out h, the number of spike trains with that statistic: it does not depend on theta, so the
    posterior is that of the spikes themselves. It is no normalised density of y.

    Args:
        theta: Coefficients. Shape ``(*batch, d)``.
        design: V. Shape ``(T, d)``.

    Example:
        >>> law = SpikeSums(torch.zeros(2), torch.ones(100, 2))
        >>> bool((law.sample() <= 100).all()), round(float(law.log_prob(torch.zeros(2))) / math.log(2))
        (True, -100)
    """

    arg_constraints = {"theta": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, theta: Tensor, design: Tensor, validate_args: bool | None = None) -> None:
        self.theta, self.design = theta, design
        super().__init__(theta.shape[:-1], theta.shape[-1:], validate_args=validate_args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent draws. Shape ``(*sample_shape, *batch_shape, d)``."""
        with torch.no_grad():
            rate = (self.theta @ self.design.mT).sigmoid()
            return torch.bernoulli(rate.expand(Size(sample_shape) + rate.shape)) @ self.design

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density up to what does not depend on theta. Shape of ``value`` less its last axis."""
        return (self.theta * value).sum(-1) - softplus(self.theta @ self.design.mT).sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SpikeSums":
        """The same law, independent over a batch."""
        return SpikeSums(self.theta.expand(Size(batch_shape) + self.event_shape), self.design, validate_args=False)


def runge_kutta4(
    field: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    *,
    step_size: float,
    steps_between: int,
    num_times: int,
) -> tuple[Tensor, ...]:
    r"""Solution of the autonomous equation :math:`\dot x = f(x)` by the classical Runge-Kutta scheme of order 4.

    Args:
        field: f, of a tuple of components to the tuple of their rates of change.
        state: x at time 0. One tensor a component, shape ``(*batch,)``.
        step_size: h, in units of time.
        steps_between: Steps from one kept time to the next, at least 1.
        num_times: Times kept, 0 among them: at least 1.

    Returns:
        Each component at the times 0, s h, 2 s h, ... with s steps between them. Shape ``(*batch, num_times)``.

    Example:
        >>> decay = runge_kutta4(lambda x: (-x[0],), (torch.ones(()),), step_size=0.1, steps_between=10, num_times=2)
        >>> decay[0]
        tensor([1.0000, 0.3679])
    """

    def moved(x: tuple[Tensor, ...], rate: tuple[Tensor, ...], by: float) -> tuple[Tensor, ...]:
        return tuple(a + by * b for a, b in zip(x, rate))

    kept = [state]
    for _ in range(num_times - 1):
        for _ in range(steps_between):
            k1 = field(state)
            k2 = field(moved(state, k1, step_size / 2))
            k3 = field(moved(state, k2, step_size / 2))
            k4 = field(moved(state, k3, step_size))
            state = tuple(x + step_size / 6 * (a + 2 * (b + c) + d) for x, a, b, c, d in zip(state, k1, k2, k3, k4))
        kept.append(state)
    return tuple(torch.stack(component, -1) for component in zip(*kept))
