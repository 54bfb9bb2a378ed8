r"""`AutoBridge`: a bridge of Metropolis-corrected steps from a base guide to the target, as a Pyro guide."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoLaplaceApproximation, AutoNormal
from torch import Size, Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves

from pyro_sb.checks import whole
from pyro_sb.distributions import Draws
from pyro_sb.infer.autoguide.guide import BridgeGuide, GuideFit, init_somewhere
from pyro_sb.infer.autoguide.law import BlockMixture
from pyro_sb.infer.autoguide.light import AutoLightBridge
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.model.sites import without_handlers
from pyro_sb.infer.moves.moves import Rows, adapted, hmc_step, jittered
from pyro_sb.threads import chosen_threads
from pyro_sb.weights import effective_sample_size, log_evidence, pareto_k

__all__ = ["AutoBridge"]

NUM_LEAPFROG, SPREAD, TARGET_ACCEPT = 3, 2.0, 0.7
NUM_PILOT, PILOT_SWEEPS = 512, 8
CHUNK = 4096
NONE = Size()


class BaseLaw(Protocol):
    """A base guide's law: draws ``(n, dim)`` and the log density of points, differentiable."""

    def sample(self, sample_shape: Any = ...) -> Tensor:
        """Draws."""
        ...

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        ...


class Anneal(NamedTuple):
    """A frozen annealed bridge, in the log joint's order of coordinates.

    Attributes:
        target: p.
        base: q.
        order: Places in p's vector of the base's coordinates.
        factor: Factor of the metric ``(d, d)``.
        step_sizes: One for each level between the two, ``(K - 1,)``.
        dtype: Of q.
    """

    target: LogJoint
    base: BaseLaw
    order: Tensor
    factor: Tensor
    step_sizes: Tensor
    dtype: torch.dtype

    def log_base(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of the base and its gradient. ``(n, d)`` to ``(n,)`` and ``(n, d)``."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self.base.log_prob(z[:, self.order].to(self.dtype)).to(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    def draws(self, num: int) -> tuple[Tensor, Tensor]:
        r"""Ends of paths ``(num, d)`` and the log of target over path ``(num,)``: the mean weight is unbiased for Z."""
        parts = [self._draws(min(CHUNK, num - start)) for start in range(0, num, CHUNK)]
        return torch.cat([z for z, _ in parts]), torch.cat([w for _, w in parts])

    def _draws(self, num: int) -> tuple[Tensor, Tensor]:
        z = self.first(num)
        both = Both.at(self, z)
        levels = len(self.step_sizes) + 1
        log_weights = both.ratio / levels
        for k, step_size in enumerate(self.step_sizes, 1):
            both, _ = self.move(both, k / levels, step_size)
            log_weights = log_weights + both.ratio / levels
        return both.z, log_weights

    def first(self, num: int) -> Tensor:
        """Draws of the base, in the log joint's order."""
        with torch.no_grad():
            x = self.base.sample((num,)).detach()
        return torch.empty_like(x, dtype=torch.float64).index_copy(1, self.order, x.to(torch.float64))

    def move(self, both: "Both", beta: float, step_size: Any) -> tuple["Both", Tensor]:
        r"""One HMC transition that leaves :math:`q^{1 - \beta} p^\beta` invariant, and its acceptance probabilities."""

        def density(z: Tensor) -> tuple[Tensor, Tensor]:
            return Both.at(self, z).tempered(beta)

        rows = Rows(both.z, *both.tempered(beta))
        step = jittered(step_size, SPREAD, both.z)
        moved = hmc_step(density, rows.with_momentum(), self.factor, step, NUM_LEAPFROG)
        return Both.at(self, moved.rows.x), moved.accept_prob


class Both(NamedTuple):
    """Points with target and base there, and their gradients."""

    z: Tensor
    log_p: Tensor
    grad_p: Tensor
    log_q: Tensor
    grad_q: Tensor

    @classmethod
    def at(cls, bridge: Anneal, z: Tensor) -> "Both":
        """Both densities at points."""
        return cls(z, *bridge.target.value_and_grad(z), *bridge.log_base(z))

    @property
    def ratio(self) -> Tensor:
        """Log of target over base."""
        return torch.where(torch.isfinite(self.log_p) & torch.isfinite(self.log_q), self.log_p - self.log_q, -torch.inf)

    def tempered(self, beta: float) -> tuple[Tensor, Tensor]:
        """Value and gradient between the two."""
        return (1 - beta) * self.log_q + beta * self.log_p, (1 - beta) * self.grad_q + beta * self.grad_p


class PathEndLaw(TorchDistribution):
    r"""Law of the ends of weighted paths: :math:`\log q := \log p(x) - \log w` of its own last draw.

    That is what the ELBO and importance sampling ask of a guide, and exact for them; another point has no known
    density, and raises.

    Args:
        draw: Gives ends ``(n, dim)`` and their ``log_q``.
        dim: Length of an end.
        like: A tensor with the dtype and device of the draws.
        batch_shape: Independent copies, for vectorised particles.
        refusal: Why there is no density; empty where there is one.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self, draw: Callable[[int], Draws], dim: int, like: Tensor, batch_shape: Size = NONE, refusal: str = ""
    ) -> None:
        self.draw, self.like, self.refusal = draw, like, refusal
        self._last: Draws | None = None
        super().__init__(Size(batch_shape), Size((dim,)), validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> "PathEndLaw":
        """The same law over a larger batch."""
        return PathEndLaw(self.draw, self.event_shape[0], self.like, Size(batch_shape), self.refusal)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Ends of paths. Shape ``(*sample_shape, *batch_shape, dim)``."""
        shape = Size(sample_shape) + self.batch_shape
        value, log_q = self.draw(shape.numel())
        self._last = Draws(value.to(self.like).reshape(*shape, -1), log_q.to(self.like).reshape(shape))
        return self._last.value

    def draws(self, sample_shape: Any = ()) -> Draws:
        """Ends of paths with the ``log_q`` that corrects them."""
        value = self.sample(sample_shape)
        assert self._last is not None
        return Draws(value, self._last.log_q)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log_q`` of the last draw; any other point raises."""
        if self.refusal:
            raise ValueError(self.refusal)
        if self._last is None or value.shape != self._last.value.shape or not torch.equal(value, self._last.value):
            raise NotImplementedError(
                "an annealed bridge knows the density of its own last draw alone, got another point. Use its draws(), "
                "or a guide with a density: AutoLightBridge(model)."
            )
        return self._last.log_q


class AutoBridge(BridgeGuide):
    r"""Guide that carries draws of a base guide to the target in K short steps, with exact weights of the paths.

    Steps at :math:`\beta_k = k / K` are Hamiltonian transitions that leave :math:`q^{1 - \beta_k} p^{\beta_k}`
    invariant, Metropolis-corrected, in the base's metric, of sizes that a pilot run fixes. The weight of a path,

    .. math:: \log w = \sum_{k=1}^{K} (\beta_k - \beta_{k-1}) \log \frac{p}{q}(x_{k-1}),

    is unbiased for the evidence at any K, and :math:`E \log w` is a lower bound of its logarithm that rises with K.
    Nothing is learnt: stochastic variational inference reads the bound and has nothing to train. What the base misses,
    the bridge does not find.

    Args:
        model: Pyro model; its latents continuous.
        base: A guide of the same model with a density: `AutoLightBridge` (the default, fitted by :meth:`fit` if it is
            not), or one of Pyro's, trained: ``AutoNormal`` or an ``AutoContinuous``.
        num_steps: K, at least 2.
        init_loc_fn: Pyro's initialisation.
        name: Of the guide in Pyro's store.

    Raises:
        ValueError: A base without a density, or fewer than two steps.

    References:
        Annealed importance sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008

    Example:
        >>> import pyro
        >>> def model(y):
        ...     v = pyro.sample("v", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, v.exp()), obs=y)
        >>> guide = AutoBridge(model)
        >>> fit = guide.fit(torch.tensor(2.0))
        >>> bool(fit.ess_share > 0.9)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        base: AutoGuide | None = None,
        num_steps: int = 8,
        init_loc_fn: Callable[..., Any] = init_somewhere,
        name: str | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, name=name)
        num_steps = whole("num_steps", num_steps, 2, cure="One step is the base itself.")
        base = AutoLightBridge(model, init_loc_fn=init_loc_fn) if base is None else base
        if isinstance(base, AutoBridge) or not isinstance(base, AutoContinuous | AutoNormal):
            raise ValueError(
                f"base must be a guide with a density (AutoLightBridge, AutoNormal, or an AutoContinuous), got "
                f"{type(base).__name__}. Write AutoBridge(model, base=AutoMultivariateNormal(model))."
            )
        self._modules["base"] = base  # moved and saved with the bridge; it keeps its own name in Pyro's store
        self.num_steps = num_steps
        self.register_buffer("factor", torch.zeros(0, 0))
        self.register_buffer("step_sizes", torch.zeros(0))

    def fit(self, *args: Any, **kwargs: Any) -> GuideFit:
        """Fit the base if it is an `AutoLightBridge` that is not; then fix metric and step sizes on a pilot run.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Figures of the bridge; a RuntimeWarning where its weights cannot be trusted.

        Raises:
            RuntimeError: A base of Pyro's that was never called: train it first.
        """
        joint = self._target(args, kwargs)
        base = self.base
        if isinstance(base, AutoLightBridge) and not base.num_blocks:  # neither fitted, nor trained, nor loaded
            base.fit(*args, **kwargs)
        law = _density_of(base, args, kwargs)
        order = self._order(joint)
        with chosen_threads(joint), torch.no_grad():
            bridge = self._piloted(Anneal(joint, law, order, *_no_steps(joint), self._dtype(law)))
            self.factor, self.step_sizes = bridge.factor, bridge.step_sizes
            z, log_weights = bridge.draws(4000)
        value, error = log_evidence(log_weights)
        inner = getattr(base, "fitted", None)
        stages = () if inner is None else inner.stages
        stages += (f"bridge of {self.num_steps} steps, sizes {_range(bridge.step_sizes)}",)
        figures = pareto_k(log_weights), effective_sample_size(log_weights) / len(log_weights)
        populations = () if inner is None else inner.populations
        fit = GuideFit(joint, args, kwargs, float(log_weights.mean()), value, error, *figures, stages, populations)
        return self._finish(fit, f"Raise num_steps (now {self.num_steps}), or use a better base.")

    def get_posterior(self, *args: Any, **kwargs: Any) -> PathEndLaw:
        """Law of the packed latent: draws of the posterior that was fitted, and ``log_prob`` of its own last draw.

        Other arguments than the fit's, as of ``Predictive`` on new rows, get draws, and no density.
        """
        if self.fitted is None and len(self.step_sizes):  # a state that was loaded
            with without_handlers():
                self.attach(*args, **kwargs)
        known = self._known("get_posterior")
        refusal = ""
        if (args or kwargs) and not _same((args, kwargs), (known.args, known.kwargs)):
            refusal = (
                "the guide must be called with the arguments that it was fitted to for a density, got others. Call "
                "fit(*args) with them; a guide for many data sets is AmortizedPosterior."
            )
        bridge = self._bridge()

        def draw(num: int) -> Draws:
            with torch.no_grad(), without_handlers():
                z, log_weights = bridge.draws(num)
                return Draws(z[:, bridge.order], known.target.log_prob(z) - log_weights)

        return PathEndLaw(draw, self.latent_dim, self._init_loc(), refusal=refusal)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("factor", "step_sizes"):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, torch.empty_like(state_dict[f"{prefix}{name}"]))
        self.fitted = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def weighted(self, num: int) -> tuple[Tensor, Tensor]:
        """Ends of paths in the log joint's order ``(num, dim)``, and the log weights of the paths ``(num,)``."""
        with torch.no_grad():
            return self._bridge().draws(num)

    def marginal_quantiles(self, probs: Tensor) -> Tensor:
        """Quantiles of each unconstrained coordinate, of 4,000 draws. ``(Q,)`` to ``(Q, latent_dim)``."""
        bridge = self._bridge()
        with torch.no_grad():
            z = bridge.draws(4000)[0]
        return torch.quantile(z[:, bridge.order], probs.to(z), dim=0).to(self._init_loc())

    def _bridge(self) -> Anneal:
        known = self._known("a draw")
        law = _density_of(self.base, known.args, known.kwargs)
        return Anneal(known.target, law, self._order(known.target), self.factor, self.step_sizes, self._dtype(law))

    def _dtype(self, law: BaseLaw) -> torch.dtype:
        return torch.float64 if isinstance(law, BlockMixture) else law.sample((1,)).dtype

    def _piloted(self, bridge: Anneal) -> Anneal:
        """Metric of the base, and a step size for each level by some transitions of a pilot."""
        z = bridge.first(NUM_PILOT)
        bridge = bridge._replace(factor=_metric(bridge, bridge.first(max(NUM_PILOT, 20 * z.shape[1]))))
        both, step, sizes = Both.at(bridge, z), torch.ones((), dtype=z.dtype, device=z.device), []
        step = step * z.shape[1] ** -0.25
        for k in range(1, self.num_steps):
            for sweep in range(PILOT_SWEEPS):
                both, accept = bridge.move(both, k / self.num_steps, step)
                step = adapted(step[None], accept, TARGET_ACCEPT, 2.0 * (sweep + 1) ** -0.6)[0]
            sizes.append(step)
        return bridge._replace(step_sizes=torch.stack(sizes))


def _density_of(base: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BaseLaw:
    """The law of a base's packed latent."""
    if base.prototype_trace is None and not isinstance(base, AutoLightBridge):
        raise RuntimeError(
            f"the base must be trained before the bridge, got a {type(base).__name__} that was never called. Train it "
            "by SVI(model, base, optim, Trace_ELBO()), then call fit(*args)."
        )
    if isinstance(base, AutoNormal):
        names = [name for name, _ in base.prototype_trace.iter_stochastic_nodes()]
        loc, scale = (
            torch.cat([attrgetter(name)(part).detach().reshape(-1) for name in names])
            for part in (base.locs, base.scales)
        )
        return _unvalidated(dist.Normal(loc, scale).to_event(1))
    law = base.get_posterior(*args, **kwargs)
    if isinstance(base, AutoLaplaceApproximation) or isinstance(law, dist.Delta):
        raise ValueError(
            f"base must have a density, got the point mass of {type(base).__name__}. For a Laplace approximation "
            "pass base.laplace_approximation(*args)."
        )
    return law.double() if isinstance(law, BlockMixture) else _unvalidated(law)


def _unvalidated(law: Any) -> Any:
    """A law whose density may be asked anywhere: where it is not a number, a move there is rejected."""
    part = law
    while part is not None:
        part.__dict__["_validate_args"] = False
        part = part.__dict__.get("base_dist")
    return law


def _metric(bridge: Anneal, z: Tensor) -> Tensor:
    """Factor of the covariance within components, where the base is a mixture; of its draws else."""
    if isinstance(bridge.base, BlockMixture):
        covariance = z.new_zeros(z.shape[1], z.shape[1])
        for block in bridge.base.detached():
            places = bridge.order[block.places]
            covariance[places[:, None], places] = block.mixture.covariance.to(z)
    else:
        covariance = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
    return torch.linalg.cholesky(covariance + 1e-9 * torch.diag(covariance.diagonal()))


def _no_steps(joint: LogJoint) -> tuple[Tensor, Tensor]:
    eye = torch.eye(joint.dim, dtype=torch.float64, device=joint.device)
    return eye, eye.new_zeros(0)


def _range(values: Tensor) -> str:
    return f"{float(values.min()):.2g} to {float(values.max()):.2g}"


def _same(a: Any, b: Any) -> bool:
    """Whether two trees of arguments are equal, tensors by value."""
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(map(_equal, first, second))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    try:
        return a is b or bool(a == b)
    except Exception:  # objects that cannot be compared
        return False
