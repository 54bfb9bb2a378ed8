"""How a fitted diffusion is drawn from: its solvers, paths, drift and densities."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.diffusion.state import SOLVERS, DiffusionState
from pyro_sb.bridges.options import check_choice
from pyro_sb.distributions import Draws
from pyro_sb.nn import with_constant_parameters
from pyro_sb.ops.solvers import Flow, ancestral, euler, euler_maruyama, heun, multistep, noising, score

FLOW_SOLVERS = ("multistep", "heun", "euler")
CHUNK = 2**22  # numbers of a batch of covariances at once


class DiffusionDraws(DiffusionState):
    """The half of a diffusion that draws, whatever its noising process and source; the other half is its ``fit``."""

    density = "path"
    approximate_log_prob = True

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
        if num_paths < 1 or num_steps < 1:
            raise ValueError(f"num_paths and num_steps must be at least 1, got {num_paths} and {num_steps}.")
        check_choice("solver", solver, SOLVERS)
        context = self.check_context(context)
        batch = () if context is None else context.shape[:-1]
        rows = None if context is None else context.expand(num_paths, *context.shape).reshape(-1, self.context_dim)
        with torch.no_grad():
            mean, features = self._features(rows)
            times = self._times(num_steps)
            z = self._start(num_paths * math.prod(batch), mean)
            states = self._solve(z, features, times, solver)
            out = torch.stack([self._outward(z, mean, tau) for z, tau in zip(states, times)])
        return 1 - times, out.reshape(num_steps + 1, num_paths, *batch, self.dim)

    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        r"""Drift :math:`\beta (\tfrac12 D x + \nabla \log p_t)` of the generating SDE, whose noise has rate beta.

        Within the first noise level of the target the score is that of its noisy edge.
        """
        x, rows, shape = self.flat_rows(x, context)
        tau = (1 - torch.as_tensor(t, dtype=x.dtype, device=x.device)).clamp(max=1.0).maximum(self.first_time)
        if tau.dim():
            raise ValueError(f"t must be one time in [0, 1], got shape {tuple(tau.shape)}.")
        mean, features = self._features(rows)
        z = self._inward(x, mean, tau)
        slope = score(self.sde, tau, z, self._denoise(tau, z, features)) @ self.basis.T
        return (self.schedule.rate(tau) * (0.5 * x @ self.drift_matrix + slope)).reshape(shape)

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws by the sampler's solver. Shape ``(num, dim)``."""
        mean, features = self._features(context)
        times = self._times(self.sampler.num_steps)
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
        if num_paths < 1:
            raise ValueError(f"num_paths must be at least 1, got {num_paths}. Omit it for 16.")
        x, rows, shape = self.flat_rows(x, context)
        with torch.no_grad():
            mean, features = self._features(rows)
            z, times = self._inward(x, mean, torch.zeros_like(self.first_time)), self._times(self.sampler.path_steps)
            total = torch.stack([self._path_bound(z, mean, features, times) for _ in range(num_paths)])
        return (total.logsumexp(0) - math.log(num_paths)).reshape(shape[:-1])

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
            times = self._times(max(20, 2 * self.sampler.num_steps))[:-1].flip(0)
            z = self._inward(x.to(mean), mean, torch.zeros_like(times[0]))
            goal = partial(self._goal, features=features)
            end, change = flow_change(goal, Flow(self.sde, self.spread), times, z, self.probes)
            return self._start_log_prob(end, mean) + change

    # Parts

    def _push(self, noise: Tensor, rows: Tensor | None) -> Tensor:
        """Standard normals to draws. Shape ``(num, dim)``."""
        mean, features = self._features(rows)
        location, factor = self._start_law(mean)
        times = self._times(self.sampler.num_steps)
        z = self._solve(location + noise @ factor.T, features, times, self.sampler.solver)[-1]
        return self._outward(z, mean, times[-1])

    def _carry(self, x0: Tensor, context: Any, num_steps: int, solver: str) -> Tensor:
        """Source points to draws of the target."""
        x0, rows, shape = self.flat_rows(x0, context)
        with torch.no_grad():
            mean, features = self._features(rows)
            one = torch.ones_like(self.first_time)
            z = self._inward(x0, mean, one)
            z = self._solve(z, features, self._times(num_steps), solver)[-1]
            return self._outward(z, mean, 0 * one).reshape(shape)

    def _solve(self, z: Tensor, features: Tensor | None, times: Tensor, solver: str) -> list[Tensor]:
        """States at all times from those at the first."""
        denoise = partial(self._denoise, features=features)
        if solver == "multistep":
            return multistep(denoise, self.sde, times, z)
        if solver == "heun":
            return heun(denoise, self.sde, times, z, self.spread)
        if solver == "euler":
            return euler(denoise, self.sde, times, z)
        if solver == "euler-maruyama":
            return euler_maruyama(denoise, self.sde, times, z)
        return ancestral(partial(self._model, features=features), self.sde, times, z).states

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
        times, z = self._times(self.sampler.path_steps), self._start(num, mean)
        path = ancestral(partial(self._model, features=features), self.sde, times, z)
        value = self._outward(path.states[-1], mean, times[-1])
        return Draws(value, self._start_log_prob(z, mean) + path.log_ratio)

    def _path_bound(self, z: Tensor, mean: Tensor, features: Tensor | None, times: Tensor) -> Tensor:
        path = noising(partial(self._model, features=features), self.sde, times, z)
        return self._start_log_prob(path.states[0], mean) + path.log_ratio

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


# Density along the probability flow of a diffusion: an approximation that no correction uses


EXACT_UP_TO = 20  # dimensions with an exact divergence


def flow_change(
    goal: Callable[[Tensor, Tensor], Tensor], flow: Flow, times: Tensor, z: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""End of the flow from clean states, and what to add to its log density there to have theirs.

    Heun's method in the flow's angles, :math:`dw_i / d\phi_i = -N_i`, with
    :math:`d \log p(w) = \sum_i \partial_i N_i\, d\phi_i` along it: exact for a Gaussian target, whose N is zero.

    Args:
        goal: N, a function of the time and of normalised states.
        flow: The angles.
        times: Rising from the first noisy time to 1. Shape ``(K,)``.
        z: Clean states in the eigenbasis. Shape ``(n, d)``.
        probes: Random signs for the divergence above 20 dimensions. Shape ``(num, d)``.

    Returns:
        Noisy states ``(n, d)`` at the last time, and the change ``(n,)``.
    """
    step = flow.angle(times[0])  # from the target itself to the first noisy time: Euler
    w = z / flow.spread.sqrt()
    slope, rates = slope_and_rates(goal, times[0], w, probes)
    w, change = w + step * slope, rates @ step - 0.5 * flow.spread.log().sum()
    slope, rates = slope_and_rates(goal, times[0], w, probes)
    for now, then in zip(times[:-1], times[1:]):
        step = flow.angle(then) - flow.angle(now)
        ahead = -goal(then, w + step * slope)
        w = w + 0.5 * step * (slope + ahead)
        slope, next_rates = slope_and_rates(goal, then, w, probes)
        change = change + 0.5 * (rates + next_rates) @ step
        rates = next_rates
    last = flow.inner(times[-1])
    return w / last, change - last.log().sum()


def slope_and_rates(
    goal: Callable[[Tensor, Tensor], Tensor], tau: Tensor, w: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope -N of the flow and its diagonal derivatives, estimated above 20 dimensions. Shape ``(n, d)`` each."""
    exact = w.shape[-1] <= EXACT_UP_TO
    signs = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) if exact else probes
    diagonal = torch.zeros_like(w)
    with torch.enable_grad():
        point = w.detach().requires_grad_()
        slope = -goal(tau, point)
        for sign in signs:
            (across,) = torch.autograd.grad(slope, point, sign.expand_as(w), retain_graph=True)
            diagonal = diagonal + across * sign
    return slope.detach(), diagonal if exact else diagonal / len(signs)
