"""Laws in the plane, in the scaling that the published tables use, each as a Pyro distribution."""

import copy
import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sb.checks import points, sample_size, whole


class PlanarLaw(TorchDistribution):
    r"""A law in the plane. A member gives its draws by `points`, and `log_prob` where its density has a closed form.

    Args:
        dtype: That of the draws. Omitted: torch's default dtype when the law is made.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}. Omit it for the default.")
        super().__init__(Size(), Size((2,)), validate_args=False)

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        raise NotImplementedError

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent draws. Shape ``(*sample_shape, *batch_shape, 2)``."""
        with torch.no_grad():
            return self.points(sample_size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, where it has a closed form. Shape of ``value`` less its last axis."""
        raise NotImplementedError(
            f"{type(self).__name__} has no density in closed form. "
            "Compare draws instead, for example with pyro_sb.metrics.sliced_wasserstein2."
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PlanarLaw":
        """The same law, independent over a batch."""
        law = copy.copy(self)
        law._batch_shape = sample_size(batch_shape, "batch_shape")
        return law

    def _uniform(self, shape: Size | tuple[int, ...]) -> Tensor:
        return torch.rand(shape, dtype=self.dtype)

    def _normal(self, shape: Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=self.dtype)


class EightGaussians(PlanarLaw):
    r"""Eight round Gaussians of equal mass, evenly spaced on a circle of radius 5.

    .. math:: p(x) = \tfrac18 \sum_{k=0}^{7} N(x;\ 5\, (\cos \tfrac{k \pi}{4}, \sin \tfrac{k \pi}{4}),\ \sqrt{0.1}\, I)

    The benchmark's code hands the root of its variance 0.1 over as a covariance, so a mode's standard deviation is
    :math:`0.1^{1/4} = 0.562`; every published table rests on that.

    Args:
        dtype: That of the draws. Omitted: torch's default dtype.

    References:
        Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al., 2024),
        https://arxiv.org/abs/2302.00482

    Example:
        >>> law = EightGaussians()
        >>> law.sample((1000,)).shape, law.log_prob(law.centres).shape
        (torch.Size([1000, 2]), torch.Size([8]))
    """

    radius = 5.0
    sd = 0.1**0.25

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype=dtype)
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        self.centres = self.radius * torch.stack([angle.cos(), angle.sin()], -1).to(self.dtype)
        """Means of the modes, counterclockwise from (5, 0). Shape ``(8, 2)``."""

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        return self.centres[torch.randint(8, shape)] + self.sd * self._normal((*shape, 2))

    def equal_counts(self, n: int) -> Tensor:
        r"""Draws with n/8 points in each mode, in random order.

        Between independent draws the Wasserstein distance is mostly noise of the modes' counts: with equal counts on
        both sides it resolves the modes' shapes about two to three times better.

        Args:
            n: Number of draws, a positive multiple of 8.

        Returns:
            Shape ``(n, 2)``.
        """
        if whole("n", n, cure="Write 1000.") % 8:
            raise ValueError(f"n must be a positive multiple of 8, got {n}. Write equal_counts({max(8, n - n % 8)}).")
        mode = torch.arange(8).repeat(n // 8)[torch.randperm(n)]
        return self.centres[mode] + self.sd * self._normal((n, 2))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density. Shape of ``value`` less its last axis, broadcast with ``batch_shape``."""
        value = points("value", value, 2, self.centres)
        squared = (value[..., None, :] - self.centres).square().sum(-1) / self.sd**2
        density = torch.logsumexp(-squared / 2, -1) - math.log(8 * 2 * math.pi * self.sd**2)
        return density.expand(torch.broadcast_shapes(density.shape, self.batch_shape))


class Moons(PlanarLaw):
    r"""Two interleaved half circles of equal mass, smeared along the diagonal.

    With an angle :math:`a \sim U[0, \pi]` and a shift :math:`u \sim U[0, 0.2)` that is the same on both axes,

    .. math:: x = 3\, (m + u) - 1, \qquad m = (\cos a, \sin a) \ \text{or} \ (1 - \cos a, \tfrac12 - \sin a) .

    The benchmark's own sampler is `stratified`: its angles are equispaced and each moon has half of the points. A
    learned sampler draws independently, as `sample` does; between the two even a perfect one pays for the difference.

    Args:
        dtype: That of the draws. Omitted: torch's default dtype.

    References:
        Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al., 2024),
        https://arxiv.org/abs/2302.00482

    Example:
        >>> law = Moons()
        >>> law.sample((1000,)).shape, law.stratified(1000).shape
        (torch.Size([1000, 2]), torch.Size([1000, 2]))
    """

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        return self._smeared(math.pi * self._uniform(shape), torch.rand(shape) < 0.5)

    def stratified(self, n: int) -> Tensor:
        r"""Draws with angles equispaced over the closed half circle, n/2 on each moon, in random order.

        Args:
            n: Number of draws, positive and even.

        Returns:
            Shape ``(n, 2)``. Only the smear is random.
        """
        if whole("n", n, cure="Write 1000.") % 2:
            raise ValueError(f"n must be positive and even, got {n}. Write stratified({max(2, n - n % 2)}).")
        angle = torch.linspace(0, math.pi, n // 2, dtype=self.dtype).repeat(2)
        order = torch.randperm(n)
        return self._smeared(angle[order], (torch.arange(n) < n // 2)[order])

    def _smeared(self, angle: Tensor, outer: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        moon = torch.stack([torch.where(outer, cos, 1 - cos), torch.where(outer, sin, 0.5 - sin)], -1)
        return 3 * (moon + 0.2 * self._uniform((*angle.shape, 1))) - 1


class SwissRoll(PlanarLaw):
    r"""A noisy spiral of one and a half turns, in the scaling of LightSB.

    .. math:: x = (t\, (\cos t, \sin t) + 0.8\, z) / 7.5, \qquad t \sim U[1.5 \pi, 4.5 \pi], \quad z \sim N(0, I) .

    This is scikit-learn's ``make_swiss_roll(noise=0.8)``, its first and third columns, divided by 7.5.

    Args:
        dtype: That of the draws. Omitted: torch's default dtype.

    References:
        Light Schrödinger Bridge (Korotin et al., 2024), https://arxiv.org/abs/2310.01174

    Example:
        >>> SwissRoll(dtype=torch.float64).sample((1000,)).dtype
        torch.float64
    """

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        t = math.pi * (1.5 + 3 * self._uniform(shape))
        spiral = t[..., None] * torch.stack([t.cos(), t.sin()], -1)
        return (spiral + 0.8 * self._normal((*shape, 2))) / 7.5


class SCurve(PlanarLaw):
    r"""An S without noise, in the scaling of the diffusion Schrödinger bridge: mean 0, 7 units of pooled deviation.

    .. math:: x = \frac{7}{s} \left(\sin t,\ \mathrm{sign}(t) (\cos t - 1)\right), \qquad
        t \sim U[-1.5 \pi, 1.5 \pi], \quad s^2 = 1 + \tfrac{2}{3 \pi}

    This is scikit-learn's ``make_s_curve``, its first and third columns, times 7 over s, the standard deviation of both
    columns pooled. That paper's code takes the mean and s from each sample; here they are the law's, so that draws are
    independent. The two differ by a factor :math:`1 + O(n^{-1/2})`.

    Args:
        dtype: That of the draws. Omitted: torch's default dtype.

    References:
        Diffusion Schrödinger Bridge with Applications to Score-Based Generative Modeling (De Bortoli et al., 2021),
        https://arxiv.org/abs/2106.01357

    Example:
        >>> SCurve().sample((4, 1000)).shape
        torch.Size([4, 1000, 2])
    """

    scale = 7 / math.sqrt(1 + 2 / (3 * math.pi))

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        t = 3 * math.pi * (self._uniform(shape) - 0.5)
        return self.scale * torch.stack([t.sin(), t.sign() * (t.cos() - 1)], -1)


class Checkerboard(PlanarLaw):
    r"""Uniform on the eight dark squares, of side 2, of a four by four board on :math:`[-4, 4]^2`.

    .. math:: p(x) = \tfrac{1}{32} \ \text{where} \ \lfloor x_1 / 2 \rfloor + \lfloor x_2 / 2 \rfloor \ \text{is even} .

    Args:
        dtype: That of the draws. Omitted: torch's default dtype.

    References:
        FFJORD: Free-Form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019),
        https://arxiv.org/abs/1810.01367

    Example:
        >>> Checkerboard().log_prob(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        tensor([-3.4657,    -inf])
    """

    support = constraints.independent(constraints.interval(-4.0, 4.0), 1)

    def points(self, shape: Size) -> Tensor:
        """Independent draws. Shape ``(*shape, 2)``."""
        column = torch.randint(4, shape)
        square = torch.stack([column, 2 * torch.randint(2, shape) + column % 2], -1)
        # Clamped: square + within must not round up to the next square.
        within = self._uniform((*shape, 2)).clamp(max=1 - 4 * torch.finfo(self.dtype).eps)
        return 2 * (square + within) - 4

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, ``-inf`` off the dark squares. Shape of ``value`` less its last axis, with ``batch_shape``."""
        value = points("value", value, 2, torch.zeros((), dtype=self.dtype))
        inside = ((value >= -4) & (value < 4)).all(-1)
        dark = (value / 2).floor().sum(-1) % 2 == 0
        density = torch.where(inside & dark, value.new_tensor(-math.log(32)), -math.inf)
        return density.expand(torch.broadcast_shapes(density.shape, self.batch_shape))
