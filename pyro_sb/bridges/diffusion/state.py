"""What a variational diffusion holds: its noising process, networks and units; how they are saved, loaded and read."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.diffusion.network import DiffusionNet, factor_covariance
from pyro_sb.bridges.options import check_choice
from pyro_sb.bridges.pairs import Reading, summarise
from pyro_sb.nn import embedding_config, embedding_from_config
from pyro_sb.ops.linear_sde import LinearSDE, Schedule, fixed_point_rates, start_covariance, tolerance_rates
from pyro_sb.ops.regression import Affine
from pyro_sb.ops.solvers import Conditional, Flow

CLEANEST = 0.01  # noise of the last evaluated time, in standard deviations of the narrowest direction
NUM_KNOTS, NUM_PROBES = 33, 8  # of the analytic covariance, and of the divergence above 20 dimensions
DRIFTS = ("closed-form", "tolerance", "stochastic")
STARTS, COVARIANCES, PRECONDITIONINGS = ("moment", "conditional"), ("learnt", "analytic"), ("direction", "scalar")
SOLVERS = ("multistep", "heun", "euler", "euler-maruyama", "ancestral")


@dataclass
class Sampler:
    """How a diffusion's draws are made; assign a new one to ``bridge.sampler`` at any time.

    Args:
        num_steps: Steps of `sample` and `transport`, at least 1. An evaluation each; two with ``"heun"``.
        solver: ``"multistep"`` (exponential integrator of the probability flow), ``"heun"``, ``"euler"``; with noise
            ``"euler-maruyama"`` or ``"ancestral"``.
        path_steps: Steps of `draws`, whose log weights are exact for any number; more steps, more effective draws.

    Example:
        >>> Sampler(num_steps=6, solver="heun").path_steps
        20
    """

    num_steps: int = 10
    solver: str = "multistep"
    path_steps: int = 20

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.path_steps < 1:
            raise ValueError(f"num_steps and path_steps must be at least 1, got {self.num_steps}, {self.path_steps}.")
        check_choice("solver", self.solver, SOLVERS)


class DiffusionState(Bridge):
    """The half of `VSDM` that is read, saved and loaded, with its denoiser; arguments as of `VSDM`."""

    location: Tensor
    slope: Tensor
    context_location: Tensor
    context_scale: Tensor
    basis: Tensor
    rates: Tensor
    covariance: Tensor
    spread: Tensor
    first_time: Tensor
    log_errors: Tensor
    probes: Tensor
    rates_history: Tensor

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        b_max: float = 10.0,
        b_min: float = 0.1,
        power: float = 1.7,
        drift: str | Tensor = "closed-form",
        start: str = "moment",
        preconditioning: str = "direction",
        covariance: str = "learnt",
        hidden: tuple[int, ...] = (128, 128, 128),
        covariance_hidden: tuple[int, ...] = (96, 96),
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim=context_dim)
        if not 0 < b_min <= b_max < math.inf or not 0 <= power < math.inf:
            raise ValueError(
                f"the noise rate needs 0 < b_min <= b_max and power >= 0, got {b_min}, {b_max} and {power}."
            )
        if not hidden or not covariance_hidden:
            raise ValueError("hidden and covariance_hidden must name at least one layer each. Omit them.")
        if embedding is not None and not context_dim:
            raise ValueError("an embedding needs a context, got context_dim = 0. Write context_dim=...")
        check_choice("start", start, STARTS)
        check_choice("covariance", covariance, COVARIANCES)
        check_choice("preconditioning", preconditioning, PRECONDITIONINGS)
        self.schedule = Schedule(float(b_min), float(b_max), float(power))
        self.drift_rule = check_drift(drift, dim)
        self.start, self.covariance_rule, self.preconditioning = start, covariance, preconditioning
        self.hidden, self.covariance_hidden = tuple(map(int, hidden)), tuple(map(int, covariance_hidden))
        self.net = DiffusionNet(dim, context_dim, self.hidden, self.covariance_hidden, embedding)
        for name in DiffusionState.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self.sampler = Sampler()
        self.net.eval()

    @property
    def sde(self) -> LinearSDE:
        """The noising process in the eigenbasis of D."""
        return LinearSDE(self.rates, self.schedule)

    @property
    def drift_matrix(self) -> Tensor:
        r"""D, in the user's axes; :math:`A = (I - D) / 2`. Shape ``(dim, dim)``."""
        self.like()
        return self.basis * self.rates @ self.basis.T

    def like(self) -> Tensor:
        """A fitted tensor; an error before ``fit``."""
        if not len(self.location):
            raise RuntimeError(f"{type(self).__name__} must be fitted first: call bridge.fit(draws).")
        return self.location

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().config() | {
            "b_max": self.schedule.b_max,
            "b_min": self.schedule.b_min,
            "power": self.schedule.power,
            "drift": self.drift_rule,
            "start": self.start,
            "preconditioning": self.preconditioning,
            "covariance": self.covariance_rule,
            "hidden": self.hidden,
            "covariance_hidden": self.covariance_hidden,
            "embedding": embedding_config(self.net.embedding),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Bridge":
        """Build the bridge that `config` describes."""
        return cls(**(config | {"embedding": embedding_from_config(config["embedding"])}))

    def get_extra_state(self) -> dict[str, Any]:
        """The sampler."""
        return asdict(self.sampler)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take a saved sampler."""
        self.sampler = Sampler(**state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "location")
        if isinstance(saved, Tensor):
            self.to(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _adopt(self, read: Reading) -> None:
        """Take the units, the process and new networks."""
        self.to(read.affine.location)
        self.location, self.slope = read.affine
        self.context_location, self.context_scale = read.contexts
        self.net.reset()
        values, vectors = torch.linalg.eigh(read.covariance.double())
        values = values.clamp_min(1e-10 * float(values[-1]))
        basis, rates = self._axes(values, vectors)
        self.log_errors = self.location.new_zeros(NUM_KNOTS)
        self.probes = torch.randint(0, 2, (NUM_PROBES, self.dim), device=self.location.device).to(self.location) * 2 - 1
        self.rates_history = self.location.new_empty(0)
        self._turn(basis, rates, vectors @ values.diag() @ vectors.T)

    def _axes(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues of D, of those of the target's covariance."""
        rule = self.drift_rule
        if isinstance(rule, Tensor):
            rates, vectors = torch.linalg.eigh(rule.to(values))
        elif rule == "tolerance":
            rates = tolerance_rates(values.sqrt(), self.schedule.total)
        elif rule == "identity":
            rates = torch.ones_like(values)
        else:
            rates = fixed_point_rates(values, self.schedule.total)
        return vectors, rates

    def _turn(self, basis: Tensor, rates: Tensor, covariance: Tensor) -> None:
        """Take a new D; the target's covariance is in the user's axes."""
        like, basis = self.location, basis.double()
        inner = basis.T @ covariance.double() @ basis
        self.basis, self.rates, self.covariance = basis.to(like), rates.to(like), inner.to(like)
        spread = inner.diagonal()
        if self.preconditioning == "scalar":
            spread = spread.mean().expand_as(spread)
        self.spread = spread.clone().to(like)
        narrow = spread.min().clamp_min(1e-6 * spread.max())
        self.first_time = self.schedule.time(CLEANEST**2 * narrow).to(like)

    # The denoiser, in the eigenbasis and less the mean

    def _times(self, num_steps: int) -> Tensor:
        return self.sde.grid(num_steps, self.first_time)

    def _place(self, tau: Tensor) -> Tensor:
        """Where a time lies on the mean log-SNR scale: 0 at the source, 1 at the first time."""
        first = self.first_time
        ends = self.sde.log_snr(torch.stack([torch.ones_like(first), first])).mean(-1)
        return (self.sde.log_snr(tau).mean(-1) - ends[0]) / (ends[1] - ends[0])

    def _goal(self, tau: Tensor, w: Tensor, features: Tensor | None) -> Tensor:
        return self.net.goal(self._place(tau), w, self.basis, features)

    def _denoise(self, tau: Tensor, z: Tensor, features: Tensor | None) -> Tensor:
        """Mean of the target given a state. Shape ``(n, dim)``."""
        flow = Flow(self.sde, self.spread)
        angle, w = flow.angle(tau), z * flow.inner(tau)
        return self.spread.sqrt() * (angle.cos() * w + angle.sin() * self._goal(tau, w, features))

    def _model(self, tau: Tensor, z: Tensor, features: Tensor | None) -> Conditional:
        """Mean and covariance of the target given a state; tau is one time."""
        if self.covariance_rule == "analytic":
            return self._analytic(tau, z, features)
        flow, place = Flow(self.sde, self.spread), self._place(tau)
        mean, variances = self._analytic(tau, z, features)
        factor = self.net.precision_factor(place, z * flow.inner(tau), self.basis, features)
        return Conditional(mean, factor_covariance(factor, variances[0].sqrt()))

    def _analytic(self, tau: Tensor, z: Tensor, features: Tensor | None) -> Conditional:
        """The same with one number a noise level for the covariance."""
        angle = Flow(self.sde, self.spread).angle(tau)
        variances = self.spread * angle.sin().square() * self._log_error(self._place(tau)).exp()
        return Conditional(self._denoise(tau, z, features), variances.expand_as(z))

    def _log_error(self, place: Tensor) -> Tensor:
        """Log of the analytic variance in units of the Gaussian one, between the knots it was measured at."""
        position = (place.clamp(0, 1) * (NUM_KNOTS - 1)).to(self.log_errors)
        low = position.floor().clamp_max(NUM_KNOTS - 2)
        index = low.long()
        return torch.lerp(self.log_errors[index], self.log_errors[index + 1], position - low)

    # Rows of the user's to the eigenbasis and back

    def _features(self, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean of the target ``(dim,)`` or ``(n, dim)``, and the networks' features, of raw contexts in rows."""
        affine = Affine(self.location, self.slope)
        if context is None:
            return affine(None), None
        rows = (context - self.context_location) / self.context_scale
        return affine(summarise(self.net.embedding, rows)), self.net.features(rows)

    def _inward(self, x: Tensor, mean: Tensor, tau: Tensor) -> Tensor:
        """States of the user's at a noising time to the eigenbasis, less their mean."""
        return x @ self.basis - self.sde.at(tau).factor * (mean @ self.basis)

    def _outward(self, z: Tensor, mean: Tensor, tau: Tensor) -> Tensor:
        """The way back."""
        return (z + self.sde.at(tau).factor * (mean @ self.basis)) @ self.basis.T

    def _start_law(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the source in the eigenbasis, less the noised mean."""
        last = self.sde.at(torch.ones_like(self.first_time))
        if self.start == "moment":
            return torch.zeros_like(mean), torch.linalg.cholesky(start_covariance(self.sde, self.covariance))
        return -last.factor * (mean @ self.basis), last.variance.sqrt().diag()


def check_drift(drift: str | Tensor, dim: int) -> str | Tensor:
    """A rule's name, or D as a symmetric positive definite matrix on the CPU."""
    if isinstance(drift, str):
        check_choice("drift", drift, (*DRIFTS, "identity"))
        return drift
    matrix = torch.as_tensor(drift).detach().cpu()
    matrix = matrix if matrix.is_floating_point() else matrix.to(torch.get_default_dtype())
    if matrix.shape != (dim, dim):
        raise ValueError(f"drift must name a rule or be D of shape ({dim}, {dim}), got {tuple(matrix.shape)}.")
    if not bool(torch.isfinite(matrix).all()) or not torch.allclose(matrix, matrix.T):
        raise ValueError("drift must be a finite symmetric matrix D. Write (D + D.T) / 2.")
    smallest = float(torch.linalg.eigvalsh(matrix.double())[0])
    if smallest <= 0:
        raise ValueError(f"D must be positive definite, got an eigenvalue of {smallest:.3g}. D is I - 2 A: lower A.")
    return matrix
