r"""The eight simulators of the benchmark sbibm as Pyro models, and its observations with their reference posteriors.

A model takes no arguments and observes nothing: ``theta`` is its latent site (one vector), ``y`` its data, so that it
is simulator and joint density in one; ``pyro.condition(model, {"y": y})`` is the posterior's model. All run under an
outer ``pyro.plate`` to the left of their own, and under ``torch.func.vmap``, in torch's default dtype. They need no
files; `sbi_task` reads the benchmark's.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sb.checks import check_choice
from pyro_sb.datasets.originals import read_simulator
from pyro_sb.datasets.simulator_laws import Crescent, Gaussian, SpikeSums, runge_kutta4


@dataclass(frozen=True, eq=False)
class SBITask:
    r"""A simulator as a Pyro model with the benchmark's observations 1 to 5 and what their posteriors are known to be.

    Attributes:
        name: One of `SBI_TASKS`.
        model: The Pyro model, called without arguments: latent site ``"theta"``, data site ``"y"``.
        observations: Values of ``"y"`` in the model's shape. Shape ``(5, *y_shape)``.
        true_parameters: The theta that each was simulated at. Shape ``(5, d)``.
        reference_draws: Every fifth of the 10,000 reference draws of each posterior. Shape ``(5, 2000, d)``.
        reference_mean: Posterior means from all 10,000 draws. Shape ``(5, d)``.
        reference_sd: Posterior standard deviations from all 10,000 draws. Shape ``(5, d)``.
    """

    name: str
    model: Callable[[], None]
    observations: Tensor
    true_parameters: Tensor
    reference_draws: Tensor
    reference_mean: Tensor
    reference_sd: Tensor


def sbi_task(name: str, *, root: str | Path | None = None) -> SBITask:
    r"""A task of sbibm: its simulator as a Pyro model, with sbibm's observations and reference posteriors.

    The files are not part of this package: ``pip install --no-deps sbibm`` brings them. The simulators are functions of
    their own (`two_moons`, `slcp`, ...), which need no files.

    Args:
        name: One of `SBI_TASKS`.
        root: The folder of the package ``sbibm``, or a folder of ``NAME.npz`` (keys: the tensors of `SBITask`, the
            draws as ``reference``, and of bernoulli_glm ``design_matrix``). Omitted: the environment variable
            ``PYRO_SB_SBIBM`` names it, or else it is the installed package's, which is not imported.

    Returns:
        The task, in torch's default dtype.

    Raises:
        ValueError: If the name is none of these.
        FileNotFoundError: If sbibm is not installed and no folder is named, or it does not hold the task.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), https://arxiv.org/abs/2101.04653

    Example:
        >>> sbi_task("slcp", root="nowhere")
        Traceback (most recent call last):
        FileNotFoundError: root (or PYRO_SB_SBIBM) must be the folder of the package sbibm ...
    """
    check_choice("name", name, _MODELS)
    read = {key: torch.as_tensor(value) for key, value in read_simulator(name, root).items()}
    design, model = read.pop("design_matrix", None), _MODELS[name]
    if design is not None:
        model = functools.partial(bernoulli_glm, design=design.double())
    stored = {key: value.to(torch.get_default_dtype()) for key, value in read.items()}
    y, draws = stored.pop("observations"), stored.pop("reference")
    return SBITask(name, model, y.unflatten(-1, (4, 2)) if name == "slcp" else y, reference_draws=draws, **stored)


def two_moons() -> None:
    r"""Two moons: :math:`\theta \sim U(-1, 1)^2`, y a crescent whose place depends on :math:`|\theta_1 + \theta_2|`.

    The posterior is two crescents, mirror images of each other. The density of y is `Crescent`'s, Jacobian included.
    """
    pyro.sample("y", Crescent(_box(1.0, 2)))


def gaussian_linear() -> None:
    r"""Gaussian, linear: :math:`\theta \sim N(0, 0.1\, I_{10})`, :math:`y \sim N(\theta, 0.1\, I_{10})`.

    The posterior is :math:`N(y / 2, 0.05\, I)`. y is one event of ten independent normals, in no plate.
    """
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1))
    pyro.sample("y", dist.Normal(theta, math.sqrt(0.1)).to_event(1))


def gaussian_linear_uniform() -> None:
    r"""Gaussian, linear, with a uniform prior: :math:`\theta \sim U(-1, 1)^{10}`, :math:`y \sim N(\theta, 0.1\, I)`.

    The posterior is :math:`N(y, 0.1\, I)` cut off at the box. y is one event of ten independent normals, in no plate.
    """
    pyro.sample("y", dist.Normal(_box(1.0, 10), math.sqrt(0.1)).to_event(1))


def gaussian_mixture() -> None:
    r"""A wide and a narrow normal around one mean: :math:`\theta \sim U(-10, 10)^2`.

    .. math:: y \sim \tfrac12 N(\theta, I) + \tfrac12 N(\theta, 0.01\, I)
    """
    theta = _box(10.0, 2)
    components = dist.Normal(theta[..., None, :], theta.new_tensor([[1.0], [0.1]])).to_event(1)
    pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(probs=theta.new_ones(2) / 2), components))


def slcp() -> None:
    r"""Simple likelihood, complex posterior: :math:`\theta \sim U(-3, 3)^5`, four points of one normal in the plane.

    Its mean is :math:`(\theta_1, \theta_2)`, its standard deviations :math:`\theta_3^2, \theta_4^2`, its correlation
    :math:`\tanh \theta_5`, and :math:`10^{-6} I` is added to the covariance. The posterior has four modes (the signs of
    theta_3 and theta_4) that the box cuts off. The points are a plate, so y has the shape (4, 2).

    Example:
        >>> with pyro.plate("simulations", 1000, dim=-2):  # the points have a plate of their own at -1
        ...     trace = pyro.poutine.trace(slcp).get_trace()
        >>> trace.nodes["theta"]["value"].shape, trace.nodes["y"]["value"].shape
        (torch.Size([1000, 1, 5]), torch.Size([1000, 4, 2]))
    """
    theta = _box(3.0, 5)
    jitter, sd1, sd2, z = 1e-6, theta[..., 2].square(), theta[..., 3].square(), theta[..., 4]
    # The Cholesky root by hand: its last entry without the difference of nearly equal numbers, 1 - rho^2 = sech^2 z.
    diagonal1 = (sd1.square() + jitter).sqrt()
    below = z.tanh() * sd1 * sd2 / diagonal1
    left = (sd1.square() * z.cosh().square().reciprocal() + jitter) / (sd1.square() + jitter)
    diagonal2 = (sd2.square() * left + jitter).sqrt()
    above = torch.zeros_like(below)
    root = torch.stack([torch.stack([diagonal1, above], -1), torch.stack([below, diagonal2], -1)], -2)
    with pyro.plate("points", 4):
        pyro.sample("y", Gaussian(theta[..., :2], scale_tril=root))


def bernoulli_glm(design: Tensor | None = None) -> None:
    r"""A logistic regression of spikes on a stimulus: :math:`z_t \sim \text{Bernoulli}(\text{logit} = (V \theta)_t)`.

    The first coefficient is an offset, N(0, 2), the nine others a filter with a smoothness prior
    :math:`N(0, (F^\top F)^{-1})`. The data are :math:`y = V^\top z`, a sufficient statistic; the density of y is
    `SpikeSums`', up to a factor that does not depend on theta.

    Args:
        design: V: a column of ones, then the stimulus delayed by 0 to 8 steps. Shape ``(T, 10)``. Omitted: that of
            white noise (seed 0), 100 steps long; `sbi_task` gives the benchmark's.
    """
    zero = torch.zeros(10)
    design = _white_noise_design() if design is None else design
    theta = pyro.sample("theta", Gaussian(zero, scale_tril=_smooth_root().to(zero)))
    pyro.sample("y", SpikeSums(theta, design.to(theta)))


def lotka_volterra() -> None:
    r"""Predator and prey, observed ten times each.

    .. math:: \dot X = \alpha X - \beta X Y, \qquad \dot Y = -\gamma Y + \delta X Y

    :math:`\theta = (\alpha, \beta, \gamma, \delta)` with :math:`\log \theta \sim N((-0.125, -3, -0.125, -3), 0.5)`,
    X(0) = 30, Y(0) = 1; y holds X at the times 0, 2.1, ..., 18.9, then Y at them, each times a log-normal error of 0.1.
    The equation is solved for log X and log Y by steps of 0.02, and states are clamped to [1e-10, 1e4].
    """
    centre = torch.tensor([-0.125, -3.0, -0.125, -3.0])
    theta = pyro.sample("theta", dist.LogNormal(centre, 0.5).to_event(1))
    alpha, beta, gamma, delta = theta.unbind(-1)
    start = (torch.full_like(alpha, math.log(30.0)), torch.zeros_like(alpha))
    log_states = runge_kutta4(
        lambda s: (alpha - beta * s[1].exp(), delta * s[0].exp() - gamma),
        start,
        step_size=0.02,
        steps_between=105,
        num_times=10,
    )
    location = torch.cat(log_states, -1).clamp(math.log(1e-10), math.log(1e4))
    pyro.sample("y", dist.LogNormal(location, 0.1).to_event(1))


def sir() -> None:
    r"""An epidemic, tested ten times: :math:`\dot S = -\beta S I / N, \dot I = \beta S I / N - \gamma I`.

    :math:`\theta = (\beta, \gamma)` with :math:`\log \theta \sim N((\log 0.4, \log 0.125), (0.5, 0.2))`, N a million,
    I(0) = 1; y counts the infected among 1,000 people tested at each of the times 0, 17, ..., 153. The equation is
    solved for the shares S/N and I/N by steps of 0.25.
    """
    centre, spread = torch.tensor([math.log(0.4), math.log(0.125)]), torch.tensor([0.5, 0.2])
    theta = pyro.sample("theta", dist.LogNormal(centre, spread).to_event(1))
    beta, gamma = theta.unbind(-1)
    start = (torch.full_like(beta, 1 - 1e-6), torch.full_like(beta, 1e-6))

    def field(shares: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        infected = beta * shares[0] * shares[1]
        return -infected, infected - gamma * shares[1]

    share = runge_kutta4(field, start, step_size=0.25, steps_between=68, num_times=10)[1].clamp(0, 1)
    # As many counts as shares: under vmap torch.binomial warns of a count without the mapped axis.
    pyro.sample("y", dist.Binomial(torch.full_like(share, 1000.0), share).to_event(1))


def _box(bound: float, dim: int) -> Tensor:
    high = torch.full((dim,), bound)
    return pyro.sample("theta", dist.Uniform(-high, high).to_event(1))


@functools.cache
def _smooth_root() -> Tensor:
    """Cholesky root of the covariance of bernoulli_glm's prior, (10, 10), in float64."""
    one = torch.eye(9, dtype=torch.float64)
    difference = one - torch.diag(one.new_ones(8), -1)
    smooth = difference @ difference + torch.diag((torch.arange(9, dtype=torch.float64) / 9).sqrt())
    return torch.linalg.cholesky(torch.block_diag(one.new_tensor([[2.0]]), torch.linalg.inv(smooth.T @ smooth)))


@functools.cache
def _white_noise_design() -> Tensor:
    """A column of ones and white noise delayed by 0 to 8 steps, nothing before it. Shape (100, 10), in float64."""
    stimulus = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delayed = [torch.nn.functional.pad(stimulus, (delay, 0))[:100] for delay in range(9)]
    return torch.stack([torch.ones_like(stimulus), *delayed], -1)


_MODELS: dict[str, Callable[..., None]] = {
    "two_moons": two_moons,
    "gaussian_linear": gaussian_linear,
    "gaussian_linear_uniform": gaussian_linear_uniform,
    "gaussian_mixture": gaussian_mixture,
    "slcp": slcp,
    "bernoulli_glm": bernoulli_glm,
    "lotka_volterra": lotka_volterra,
    "sir": sir,
}

SBI_TASKS: tuple[str, ...] = tuple(_MODELS)
"""Names that :func:`sbi_task` knows."""
