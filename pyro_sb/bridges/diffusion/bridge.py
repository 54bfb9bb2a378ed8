r"""A bridge by denoising: a linear noising, the learnt mean :math:`E[x_{\tau = 0} | x_\tau]`, steps backwards."""

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.data import PairsReading, summarise
from pyro_sb.bridges.diffusion.adapt import axes_of, check_drift_matrix
from pyro_sb.bridges.diffusion.network import DiffusionNet, factor_covariance
from pyro_sb.bridges.diffusion.sampler import FLOW_SOLVERS, SOLVERS, Sampler, solved
from pyro_sb.checks import answered, check_choice, floats, number, one_time, whole, widths
from pyro_sb.distributions import Draws
from pyro_sb.nn import embedding_config, with_constant_parameters
from pyro_sb.ops.linear_sde import LinearSDE, Schedule, start_covariance
from pyro_sb.ops.regression import Affine
from pyro_sb.ops.solvers import Conditional, Flow, ancestral, flow_change, noising, score

CLEANEST = 0.01  # noise of the last evaluated time, in standard deviations of the narrowest direction
NUM_KNOTS, NUM_PROBES = 33, 8  # of the analytic covariance, and of the divergence above 20 dimensions
SOURCE_LAWS, STEP_COVARIANCES = ("moment", "conditional"), ("learnt", "analytic")
PRECONDITIONINGS = ("direction", "scalar")
WIDEST = 32.0  # deviation, or one over it, up to which noise rates are in the user's units
CHUNK = 2**22  # numbers of a batch of covariances at once


class DiffusionBridge(Bridge):
    r"""A diffusion run backwards by a learnt denoiser, :math:`\hat x(x_\tau) \approx E[x_{\tau = 0} | x_\tau]`.

    A noising process that is linear, and in its eigenbasis in closed form, leads from the target to a source; steps
    backwards lead back. A subclass gives ``fit``, and may choose other axes (`_axes`) or another source
    (`_start`, `_start_log_prob`). Arguments as of `VSDM`.
    """

    density = "path"
    approximate_log_prob = True
    shapes = {
        "location": "d", "slope": "d F", "context_location": "c", "context_scale": "c", "basis": "d d", "rates": "d",
        "covariance": "d d", "spread": "d", "first_time": "", "log_errors": "k", "probes": "p d",
        "rates_history": "s d", "unit": "",
    }  # fmt: skip
    earlier_names = {"drift": "drift_matrix", "start": "source_law", "covariance": "step_covariance"}

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
    unit: Tensor

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        b_max: float = 10.0,
        b_min: float = 0.1,
        power: float = 1.7,
        drift_matrix: str | Tensor = "closed-form",
        source_law: str = "moment",
        preconditioning: str = "direction",
        step_covariance: str = "learnt",
        hidden: tuple[int, ...] = (128, 128, 128),
        covariance_hidden: tuple[int, ...] = (96, 96),
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim=context_dim)
        b_min = number("b_min", b_min, "(0, inf)", "Omit it for the default.")
        b_max = number("b_max", b_max, "(0, inf)", "Omit it for the default.")
        if b_min > b_max:
            raise ValueError(f"b_min must be at most b_max, got {b_min:g} and {b_max:g}. The source is the noisy end.")
        power = number("power", power, "[0, inf)", "Omit it for the default.")
        if embedding is not None and not context_dim:
            raise ValueError("an embedding needs a context, got context_dim = 0. Write context_dim=...")
        check_choice("source_law", source_law, SOURCE_LAWS)
        check_choice("step_covariance", step_covariance, STEP_COVARIANCES)
        check_choice("preconditioning", preconditioning, PRECONDITIONINGS)
        self.schedule = Schedule(b_min, b_max, power)
        self.drift_rule = check_drift_matrix(drift_matrix, self.dim)
        self.source_law, self.step_covariance, self.preconditioning = source_law, step_covariance, preconditioning
        self.hidden, self.covariance_hidden = widths("hidden", hidden), widths("covariance_hidden", covariance_hidden)
        self.net = DiffusionNet(self.dim, self.context_dim, self.hidden, self.covariance_hidden, embedding)
        for name in DiffusionBridge.__annotations__:
            self.register_buffer(name, torch.empty(0))
        self.unit = torch.ones(())
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
            "drift_matrix": self.drift_rule,
            "source_law": self.source_law,
            "preconditioning": self.preconditioning,
            "step_covariance": self.step_covariance,
            "hidden": self.hidden,
            "covariance_hidden": self.covariance_hidden,
            "embedding": embedding_config(self.net.embedding),
        }

    def describe_lines(self) -> list[str]:
        """D's rule, the source and the steps; then the data."""
        rule = self.drift_rule if isinstance(self.drift_rule, str) else "given"
        numbers = f"drift_matrix {rule}, source_law {self.source_law}, step_covariance {self.step_covariance}"
        return [numbers, str(self.sampler), *super().describe_lines()]

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
            state_dict.setdefault(prefix + "unit", torch.ones_like(saved).mean())  # earlier files have none
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws of the target by the sampler's solver: a deterministic map for the flow's solvers."""
        return self._carry(x0, context, self.sampler.num_steps, self.sampler.solver)

    def push(self, noise: Tensor, context: Any = None) -> Tensor:
        r"""Standard normals to draws, by the probability flow: deterministic and differentiable in ``noise``.

        Noise :math:`\xi` becomes a point of the Gaussian source, and that a draw by the sampler's solver and steps, so
        that ``push`` of independent normals has the law of ``sample``. It makes the bridge a prior that needs no
        density, in non-centred form: the site is the noise, and a chain's gradients pass through the map. The
        posterior is exact for that prior, however few the steps.

        Args:
            noise: Shape ``(*, dim)``.
            context: Shape ``(*, context_dim)``.

        Returns:
            Shape ``(*, dim)``, in the dtype of ``noise``, with gradients in ``noise`` and ``context`` alone.

        Raises:
            RuntimeError: The bridge is not fitted.
            ValueError: A shape is wrong, or the sampler's solver is not one of the flow's: ``"multistep"``, ``"heun"``,
                ``"euler"``.

        Example:
            >>> import pyro
            >>> import pyro.distributions as dist
            >>> from pyro_sb.bridges.diffusion.vsdm import VSDM
            >>> bridge = VSDM(2)
            >>> history = bridge.fit(torch.randn(200, 2), num_updates=10, progress=False)
            >>> def model(y):
            ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...     place = pyro.deterministic("place", bridge.push(z))
            ...     pyro.sample("y", dist.Normal(place[..., 0], 0.1), obs=y)
            >>> bridge.push(torch.zeros(3, 2)).shape
            torch.Size([3, 2])
        """
        if self.sampler.solver not in FLOW_SOLVERS:
            raise ValueError(
                f"push follows the flow, whose solvers are {list(FLOW_SOLVERS)}, got {self.sampler.solver!r}, which "
                'draws noise of its own. Write bridge.sampler = replace(bridge.sampler, solver="multistep").'
            )
        noise = floats("noise", noise)
        flat, rows, shape = self.flat_rows(noise, context)
        return with_constant_parameters(self, self._push, flat, rows).reshape(shape).to(noise.dtype)

    def paths(
        self, num_paths: int, num_steps: int, context: Any = None, *, solver: str = "ancestral"
    ) -> tuple[Tensor, Tensor]:
        """Times ``(num_steps + 1,)``, uniform in log-SNR, and states ``(num_steps + 1, num_paths, *batch_shape, dim)``.

        Args:
            num_paths: How many, for each context.
            num_steps: Steps of each.
            context: Shape ``(*batch_shape, context_dim)``.
            solver: As in `Sampler`: paths of the SDE by default, of the probability flow with its solvers.
        """
        self.like()
        num_paths, num_steps = whole("num_paths", num_paths), whole("num_steps", num_steps)
        check_choice("solver", solver, SOLVERS)
        context = self.check_context(context)
        batch = () if context is None else context.shape[:-1]
        rows = None if context is None else context.expand(num_paths, *context.shape).reshape(-1, self.context_dim)
        with torch.no_grad():
            mean, features = self._features(rows)
            times = self.times(num_steps)
            z = self._start(num_paths * math.prod(batch), mean)
            states = self._solve(z, features, times, solver)
            out = torch.stack([self._outward(z, mean, tau) for z, tau in zip(states, times)])
        return 1 - times, answered("paths", out.reshape(num_steps + 1, num_paths, *batch, self.dim))

    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        r"""Drift :math:`\beta (\tfrac12 D x + \nabla \log p_t)` of the generating SDE, whose noise has rate beta.

        Within the first noise level of the target the score is that of its noisy edge.
        """
        x, rows, shape = self.flat_rows(x, context)
        tau = x.new_tensor(1 - one_time(t)).maximum(self.first_time)
        mean, features = self._features(rows)
        z = self._inward(x, mean, tau)
        slope = score(self.sde, tau, z, self._denoise(tau, z, features)) @ self.basis.T
        move = 0.5 * x @ self.drift_matrix + self.unit * slope
        return answered("drift", (self.schedule.rate(tau) * move).reshape(shape))

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws by the sampler's solver. Shape ``(num, dim)``."""
        mean, features = self._features(context)
        times = self.times(self.sampler.num_steps)
        z = self._solve(self._start(num, mean), features, times, self.sampler.solver)[-1]
        return self._outward(z, mean, times[-1])

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws by ancestral steps, with the log density of their paths."""
        return self._in_chunks(self._draws, num, context)

    def path_log_prob(self, x: Any, context: Any = None, num_paths: int = 16) -> Tensor:
        r"""Lower bound in expectation on the log density of `draws`, from noising paths drawn backwards from x.

        .. math:: \log \frac1M \sum_j \exp\Big(\log p_0 + \sum_k \log F - \sum_k \log B\Big)(x^{(j)}_{0:K}), \quad
                  x^{(j)}_K = x ,

        whose exponential has the density itself as its mean.

        Args:
            x: Points. Shape ``(*, dim)``.
            context: Shape ``(*, context_dim)``.
            num_paths: M.

        Returns:
            Shape ``(*)``.
        """
        num_paths = whole("num_paths", num_paths)
        x, rows, shape = self.flat_rows(x, context)
        with torch.no_grad():
            mean, features = self._features(rows)
            z, times = self._inward(x, mean, torch.zeros_like(self.first_time)), self.times(self.sampler.path_steps)
            total = torch.stack([self._path_bound(z, mean, features, times) for _ in range(num_paths)])
        return answered("path_log_prob", (total.logsumexp(0) - math.log(num_paths)).reshape(shape[:-1]))

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        r"""Approximate log density by the probability flow: Heun's method in angles, divergence exact to dimension 20.

        Above it the divergence is a mean over fixed random signs. Nothing that corrects draws uses it.

        Raises:
            NotImplementedError: Gradients are asked for: it has none.
        """
        asked = x.requires_grad or (context is not None and context.requires_grad)
        if torch.is_grad_enabled() and asked:
            raise NotImplementedError(
                f"log_prob of {type(self).__name__} has no gradient, in its value or its context, and one was asked "
                "for (HMC, NUTS, SVI through a site of it). As a prior take the non-centred form, bridge.push(z) of "
                "standard normals z, or a LightSB; for values alone write log_prob(x.detach())."
            )
        with torch.no_grad():
            mean, features = self._features(context)
            times = self.times(max(20, 2 * self.sampler.num_steps))[:-1].flip(0)
            z = self._inward(x.to(mean), mean, torch.zeros_like(times[0]))
            goal = partial(self.goal, features=features)
            end, change = flow_change(goal, Flow(self.sde, self.spread), times, z, self.probes)
            return self._start_log_prob(end, mean) + change - self._log_unit

    # The process, taken from what was read

    def adopt(self, read: PairsReading) -> None:
        """Take the units, the process and new networks."""
        self.to(read.affine.location)
        self.unit = unit_of(read.covariance)
        self.location, self.slope = (part / self.unit for part in read.affine)
        self.context_location, self.context_scale = read.contexts
        self.net.reset()
        values, vectors = torch.linalg.eigh(self.in_units(read.covariance))
        values = values.clamp_min(1e-10 * float(values[-1]))
        basis, rates = self._axes(values, vectors)
        self.log_errors = self.location.new_zeros(NUM_KNOTS)
        self.probes = torch.randint(0, 2, (NUM_PROBES, self.dim), device=self.location.device).to(self.location) * 2 - 1
        self.rates_history = self.location.new_empty(0)
        self.turn(basis, rates, vectors @ values.diag() @ vectors.T)

    def in_units(self, covariance: Tensor) -> Tensor:
        """A covariance in the bridge's units, in float64."""
        return covariance.double() / self.unit.double().square()

    @property
    def _log_unit(self) -> Tensor:
        """Log determinant of the way back to the user's units."""
        return self.dim * self.unit.log()

    def _axes(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues of D, of those of the target's covariance."""
        return axes_of(self.drift_rule, values, vectors, self.schedule.total)

    def turn(self, basis: Tensor, rates: Tensor, covariance: Tensor) -> None:
        """Take a new D; the target's covariance is in the user's axes and the bridge's units."""
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

    def times(self, num_steps: int) -> Tensor:
        """Noising times of a path, uniform in mean log-SNR to the first, then 0. Shape ``(num_steps + 1,)``."""
        return self.sde.grid(num_steps, self.first_time)

    def place(self, tau: Tensor) -> Tensor:
        """Place of a time on the mean log-SNR scale: 0 at the source, 1 at the first time."""
        first = self.first_time
        ends = self.sde.log_snr(torch.stack([torch.ones_like(first), first])).mean(-1)
        return (self.sde.log_snr(tau).mean(-1) - ends[0]) / (ends[1] - ends[0])

    def goal(self, tau: Tensor, w: Tensor, features: Tensor | None) -> Tensor:
        """The denoiser's answer at normalised states. Shape ``(n, dim)``."""
        return self.net.goal(self.place(tau), w, self.basis, features)

    def _denoise(self, tau: Tensor, z: Tensor, features: Tensor | None) -> Tensor:
        """Mean of the target given a state. Shape ``(n, dim)``."""
        flow = Flow(self.sde, self.spread)
        angle, w = flow.angle(tau), z * flow.inner(tau)
        return self.spread.sqrt() * (angle.cos() * w + angle.sin() * self.goal(tau, w, features))

    def _model(self, tau: Tensor, z: Tensor, features: Tensor | None) -> Conditional:
        """Mean and covariance of the target given a state; tau is one time."""
        if self.step_covariance == "analytic":
            return self.analytic(tau, z, features)
        flow, place = Flow(self.sde, self.spread), self.place(tau)
        factor = self.net.precision_factor(place, z * flow.inner(tau), self.basis, features)
        return Conditional(self._denoise(tau, z, features), factor_covariance(factor, self._variances(tau).sqrt()))

    def analytic(self, tau: Tensor, z: Tensor, features: Tensor | None) -> Conditional:
        """The same with one number a noise level for the covariance."""
        return Conditional(self._denoise(tau, z, features), self._variances(tau).expand_as(z))

    def _variances(self, tau: Tensor) -> Tensor:
        """Analytic variances of the target given a state. Shape ``(dim,)``."""
        angle = Flow(self.sde, self.spread).angle(tau)
        return self.spread * angle.sin().square() * self.log_error(self.place(tau)).exp()

    def log_error(self, place: Tensor) -> Tensor:
        """Log of the analytic variance in units of the Gaussian one, between the knots it was measured at."""
        position = (place.clamp(0, 1) * (NUM_KNOTS - 1)).to(self.log_errors)
        low = position.floor().clamp_max(NUM_KNOTS - 2)
        index = low.long()
        return torch.lerp(self.log_errors[index], self.log_errors[index + 1], position - low)

    # Rows of the user's to the eigenbasis and back

    def _features(self, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean of the target in units ``(dim,)`` or ``(n, dim)``, and the nets' features, of raw contexts in rows."""
        affine = Affine(self.location, self.slope)
        if context is None:
            return affine(None), None
        rows = (context - self.context_location) / self.context_scale
        return affine(summarise(self.net.embedding, rows)), self.net.features(rows)

    def _inward(self, x: Tensor, mean: Tensor, tau: Tensor) -> Tensor:
        """States of the user's at a noising time to the eigenbasis, less their mean."""
        return (x / self.unit) @ self.basis - self.sde.at(tau).factor * (mean @ self.basis)

    def _outward(self, z: Tensor, mean: Tensor, tau: Tensor) -> Tensor:
        """The way back."""
        return self.unit * ((z + self.sde.at(tau).factor * (mean @ self.basis)) @ self.basis.T)

    def _start_law(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the source in the eigenbasis, less the noised mean."""
        last = self.sde.at(torch.ones_like(self.first_time))
        if self.source_law == "moment":
            return torch.zeros_like(mean), torch.linalg.cholesky(start_covariance(self.sde, self.covariance))
        return -last.factor * (mean @ self.basis), last.variance.sqrt().diag()

    # Paths

    def _push(self, noise: Tensor, rows: Tensor | None) -> Tensor:
        """Standard normals to draws. Shape ``(num, dim)``."""
        mean, features = self._features(rows)
        location, factor = self._start_law(mean)
        times = self.times(self.sampler.num_steps)
        z = self._solve(location + noise @ factor.T, features, times, self.sampler.solver)[-1]
        return self._outward(z, mean, times[-1])

    def _carry(self, x0: Tensor, context: Any, num_steps: int, solver: str) -> Tensor:
        """Source points to draws of the target."""
        x0, rows, shape = self.flat_rows(x0, context)
        with torch.no_grad():
            mean, features = self._features(rows)
            one = torch.ones_like(self.first_time)
            z = self._inward(x0, mean, one)
            z = self._solve(z, features, self.times(num_steps), solver)[-1]
            return answered("transport", self._outward(z, mean, 0 * one).reshape(shape))

    def _solve(self, z: Tensor, features: Tensor | None, times: Tensor, solver: str) -> list[Tensor]:
        """States at all times from those at the first."""
        denoise, model = partial(self._denoise, features=features), partial(self._model, features=features)
        return solved(solver, denoise, model, self.sde, times, z, self.spread)

    def _start(self, num: int, mean: Tensor) -> Tensor:
        """Draws of the source in the eigenbasis, less the noised mean. Shape ``(num, dim)``."""
        location, factor = self._start_law(mean)
        noise = torch.randn(num, self.dim, dtype=mean.dtype, device=mean.device)
        return location + noise @ factor.T

    def _start_log_prob(self, z: Tensor, mean: Tensor) -> Tensor:
        location, factor = self._start_law(mean)
        noise = torch.linalg.solve_triangular(factor, (z - location).T, upper=False).T
        constant = factor.diagonal().log().sum() + 0.5 * self.dim * math.log(2 * math.pi)
        return -0.5 * noise.square().sum(-1) - constant

    def _draws(self, num: int, context: Tensor | None) -> Draws:
        mean, features = self._features(context)
        times, z = self.times(self.sampler.path_steps), self._start(num, mean)
        path = ancestral(partial(self._model, features=features), self.sde, times, z)
        value = self._outward(path.states[-1], mean, times[-1])
        return Draws(value, self._start_log_prob(z, mean) + path.log_ratio - self._log_unit)

    def _path_bound(self, z: Tensor, mean: Tensor, features: Tensor | None, times: Tensor) -> Tensor:
        path = noising(partial(self._model, features=features), self.sde, times, z)
        return self._start_log_prob(path.states[0], mean) + path.log_ratio - self._log_unit

    def _in_chunks(self, make: Any, num: int, context: Tensor | None) -> Draws:
        """Rows a chunk at a time: a covariance a row is large."""
        size = max(1, CHUNK // self.dim**2) if self.net.full else max(1, CHUNK // self.dim)
        parts = []
        for begin in range(0, num, size):
            end = min(num, begin + size)
            parts.append(make(end - begin, None if context is None else context[begin:end]))
        if not parts:
            like = self.like()
            return Draws(like.new_empty(0, self.dim), like.new_empty(0))
        return Draws(*(torch.cat(each) for each in zip(*parts)))


def unit_of(covariance: Tensor) -> Tensor:
    """The unit of a diffusion's states, in the user's. Shape ``()``.

    Noise rates are in the user's units where the root of the data's mean variance is within 1/32 and 32; elsewhere they
    are in units of that root, so that data of any scale are learnt.
    """
    scale = covariance.diagonal().double().mean().sqrt()
    return torch.where((scale * WIDEST >= 1) & (scale <= WIDEST), 1.0, scale).to(covariance)
