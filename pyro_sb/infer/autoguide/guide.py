r"""Base of the guides: the vector of unconstrained latents, the model's log joint on it, weights :math:`w = p / q`."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_sb.infer.amortized.importance import ImportanceDraws, weigh
from pyro_sb.infer.autoguide.fit import BAD_K, EVEN
from pyro_sb.infer.model.log_joint import LogJoint, log_joint
from pyro_sb.infer.model.run import Run
from pyro_sb.infer.model.sites import is_deterministic
from pyro_sb.infer.population.population import Population
from pyro_sb.warn import warn
from pyro_sb.weights import smoothed

__all__ = ["BridgeGuide", "GuideFit", "init_somewhere"]

Sites = dict[str, Tensor]
CPU = torch.device("cpu")
_numbers: dict[type, Any] = {}
SHARED = {"_model", "_given", "prototype_trace", "_prototype_frames", "_cond_indep_stacks", "plates", "fitted"}


def init_somewhere(site: dict[str, Any]) -> Tensor:
    """Median of prior draws; uniform on (-2, 2) in unconstrained space where the prior cannot be drawn."""
    try:
        return init_to_median(site)
    except NotImplementedError:
        transform = biject_to(site["fn"].support)
        return transform(4 * torch.rand(transform.inverse_shape(site["fn"].shape())) - 2)


def _fresh_name(kind: type) -> str:
    """A name of its own for each guide of a class: parameters are known to Pyro's store by it."""
    number = next(_numbers.setdefault(kind, itertools.count()))
    return kind.__name__ if number == 0 else f"{kind.__name__}_{number}"


@dataclass(frozen=True, repr=False)
class GuideFit:
    r"""What a fit did, and how good the guide is.

    Attributes:
        target: The model's log joint that it was fitted to.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        elbo: Mean of :math:`\log p - \log q` of the guide's draws, in nats.
        log_evidence: Estimate of :math:`\log \int p`, in nats.
        log_evidence_error: Its standard error.
        k_hat: Pareto k of the guide's weights: above .7 they cannot be trusted.
        ess_share: Effective sample size of the guide's draws over their number, in [0, 1].
        stages: What was done, in order: readable claims with their figures.
        populations: The weighted populations that it began with.
    """

    target: LogJoint
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    elbo: float
    log_evidence: float
    log_evidence_error: float
    k_hat: float
    ess_share: float
    stages: tuple[str, ...]
    populations: tuple[Population, ...] = ()

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"GuideFit: ELBO {self.elbo:.3f}, log evidence {self.log_evidence:.3f} "
                f"+- {self.log_evidence_error:.3f}",
                f"  Pareto k {self.k_hat:.2f}, effective share {self.ess_share:.3f}",
                *(f"    {stage}" for stage in self.stages[-6:]),
            ]
        )


class BridgeGuide(AutoContinuous):
    """Base of the guides: an ``AutoContinuous`` that knows the batched log joint of its model.

    Args:
        model: Pyro model without discrete latents.
        init_loc_fn: Pyro's initialisation, one of `pyro.infer.autoguide.initialization`.
        name: Under which Pyro's store and optimisers know its parameters. Omitted: one of its own, ``AutoLightBridge``,
            ``AutoLightBridge_1``, ... in the order in which guides are made; write one where training is resumed.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_somewhere,
        name: str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a Pyro model, a function, got {type(model).__name__}.")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._pyro_name = _fresh_name(type(self)) if name is None else name
        self._given = (model,)
        self.fitted: GuideFit | None = None
        self.evidence: Tensor
        self.register_buffer("evidence", torch.full((2,), torch.nan, dtype=torch.float64))

    def __repr__(self) -> str:
        name = getattr(self._given[0], "__name__", type(self._given[0]).__name__)
        if self.fitted is None:
            return f"{type(self).__name__} of {name}: not fitted. Call fit(*args) with the model's arguments."
        return f"{type(self).__name__} of {name}, {repr(self.fitted)[len('GuideFit: ') :]}"

    @property
    def log_evidence(self) -> float:
        """Log of the model's evidence, in nats, with :attr:`log_evidence_error`. Known after ``fit``."""
        return self._evidence()[0]

    @property
    def log_evidence_error(self) -> float:
        """Standard error of :attr:`log_evidence`, in nats."""
        return self._evidence()[1]

    def _evidence(self) -> list[float]:
        if bool(torch.isnan(self.evidence[0])):
            raise RuntimeError("log_evidence needs a fitted guide, got one that is not. Call fit(*args) first.")
        return self.evidence.tolist()

    def attach(self, *args: Any, **kwargs: Any) -> None:
        """Give a guide whose state was loaded its model's arguments: `importance`, exports and reports need them.

        Args:
            *args: The model's arguments, those of the fit.
            **kwargs: The model's keyword arguments.
        """
        joint = self._target(args, kwargs)
        unknown = float("nan")
        value, error = self.evidence.tolist()
        self.fitted = GuideFit(joint, args, kwargs, unknown, value, error, unknown, unknown, ("loaded",))

    def _finish(self, fit: GuideFit, knob: str) -> GuideFit:
        """Keep a fit's figures, and warn where its weights cannot be trusted."""
        self.fitted = fit
        self.evidence.copy_(torch.tensor([fit.log_evidence, fit.log_evidence_error], dtype=torch.float64, device=CPU))
        self._warn(fit, knob)
        return fit

    @property
    def population(self) -> Population | None:
        """The weighted population that the fit began with; None where blocks have their own."""
        found = () if self.fitted is None else self.fitted.populations
        return found[0] if len(found) == 1 else None

    def fit(self, *args: Any, **kwargs: Any) -> GuideFit:
        """Fit to the model at its arguments."""
        raise NotImplementedError

    def weighted(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws in the log joint's order ``(num, dim)``, and the log of target over guide ``(num,)``."""
        raise NotImplementedError

    def marginal_quantiles(self, probs: Tensor) -> Tensor:
        """Quantiles of each unconstrained coordinate. ``(Q,)`` to ``(Q, latent_dim)``."""
        raise NotImplementedError

    def importance(self, num: int = 4000) -> ImportanceDraws:
        r"""Draws with their weights under the model: what corrects the guide.

        Args:
            num: Draws, at least 25.

        Returns:
            Sites in their own space, log weights, Pareto k, effective share and evidence.

        Raises:
            RuntimeError: The guide was not fitted.
        """
        z, log_weights = self.weighted(num)
        return weigh(self._known("importance").target.constrain(z), log_weights[:, None], batched=False)

    def as_run(self, num: int = 4000) -> Run:
        """Four chains of draws by Pareto-smoothed weight, as reports and exports read them."""
        known, drawn = self._known("as_run"), self.importance(num)
        weights = torch.softmax(smoothed(drawn.log_weights), 0)
        index = torch.multinomial(weights, num - num % 4, replacement=True)
        sites = {name: value[index].reshape(4, -1, *value.shape[1:]) for name, value in drawn.sites.items()}
        statistics = {
            "log_weight": weights.log()[index].reshape(4, -1),
            "pareto_k": torch.full((4, len(index) // 4), float(drawn.k_hat)),
        }
        return Run(
            sites,
            self._given[0],
            known.args,
            known.kwargs,
            log_joint=known.target,
            sample_stats=statistics,
            kernel=self,
            figures=lambda: {"Pareto k": drawn.k_hat, "effective share": drawn.ess_share},
        )

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> Sites:
        """Median of every unconstrained coordinate, in the sites' own spaces."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> Sites:
        """Quantiles of every unconstrained coordinate, in the sites' own spaces. Each ``(Q, *site)``."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        probs = torch.as_tensor(quantiles, dtype=torch.float64)
        rows = self.marginal_quantiles(probs)
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            for site, value in self._unpack_latent(row):
                found.setdefault(site["name"], []).append(biject_to(site["fn"].support)(value))
        rank = probs.argsort().argsort()  # a transform may fall: the smallest value has the smallest probability
        return {name: torch.stack(values).sort(0).values[rank.to(values[0].device)] for name, values in found.items()}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = pyro.poutine.block(pyro.poutine.trace(self.model).get_trace)(*args, **kwargs)
        sites = [site for _, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]
        names = [site["name"] for site in sites if site["fn"].support.is_discrete]
        if names:
            raise ValueError(
                f"{type(self).__name__} needs continuous latents, got discrete sites {names}. Sum them out: "
                "MCMC(KernelLangevin(model)) does; under SVI write poutine.block(model, hide=[...]) and "
                "TraceEnum_ELBO."
            )
        parts = [frame for site in sites for frame in site["cond_indep_stack"] if _subsampled(frame)]
        if parts:
            raise NotImplementedError(
                f"{type(self).__name__} needs latents of whole plates, got some inside {parts[0].name!r}, of which "
                f"a run has {parts[0].size} rows of {parts[0].full_size}: the guide would share them between rows. Use "
                "AmortizedPosterior(row_model) and condition(y).in_plate(...), or the whole plate."
            )
        super()._setup_prototype(*args, **kwargs)

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogJoint:
        """The model's log joint, in the guide's order of coordinates."""
        joint = log_joint(self._given[0], args=args, kwargs=kwargs)
        if self.prototype_trace is None:
            with pyro.poutine.block(), pyro.validation_enabled(False):
                self._setup_prototype(*args, **kwargs)
        self._check_data(args, kwargs)
        return joint

    def _check_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a part of the data; warn where there are none."""
        with pyro.poutine.block(), pyro.validation_enabled(False):
            trace = pyro.poutine.trace(self.model).get_trace(*args, **kwargs)
        seen = [site for site in trace.nodes.values() if site["type"] == "sample" and site["is_observed"]]
        data = [site for site in seen if not is_deterministic(site)]
        parts = [frame for site in data for frame in site["cond_indep_stack"] if _subsampled(frame)]
        if parts:
            raise NotImplementedError(
                f"a fit needs all data of plate {parts[0].name!r}, got {parts[0].size} rows of {parts[0].full_size}: "
                "its evidence would be that of a scaled part. Give the whole plate, or train by SVI."
            )
        if not data:
            warn(
                "The guide is fitted to the prior alone: the model shows no observed site and no factor. If a handler "
                "hides them, as poutine.block(model, expose=[...]) does, write hide=[...] or pass the model itself."
            )

    def _order(self, joint: LogJoint) -> Tensor:
        """Places in the log joint's vector of the guide's coordinates, in the guide's order."""
        mine = {name: torch.Size(shape) for name, shape in self._unconstrained_shapes.items()}
        if {k: v.numel() for k, v in mine.items()} != {k: v.numel() for k, v in joint.site_shapes.items()}:
            raise NotImplementedError(
                f"guide and log joint must have the same latents, got {mine} and {dict(joint.site_shapes)}. Sites with "
                "obs_mask are not supported by guides: write MCMC(KernelLangevin(model))."
            )
        sizes = [shape.numel() for shape in joint.site_shapes.values()]
        parts = dict(zip(joint.site_shapes, torch.arange(joint.dim, device=joint.device).split(sizes)))
        return torch.cat([parts[name] for name in mine])

    def _known(self, what: str) -> GuideFit:
        if self.fitted is None:
            raise RuntimeError(f"{what} needs a fitted guide, got one that is not. Call fit(*args) first.")
        return self.fitted

    def _warn(self, fit: GuideFit, knob: str) -> None:
        if not fit.k_hat <= BAD_K and fit.ess_share < EVEN:
            warn(
                f"The guide does not cover its target: Pareto k of its weights is {fit.k_hat:.2f} (at most {BAD_K} can "
                f"be trusted), effective share {fit.ess_share:.3f}. Weighted means may be off, and draws of the guide "
                f"are not draws of the posterior. {knob}"
            )

    def __getstate__(self) -> dict[str, Any]:  # Pyro's empties the original
        return self.__dict__ | {"_model": None, "_given": (None,), "master": None, "fitted": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "BridgeGuide":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in SHARED else copy.deepcopy(value, memo)
        new.__dict__["master"] = None
        new.__dict__["_pyro_name"] = _fresh_name(type(self))
        return new


def _subsampled(frame: Any) -> bool:
    """Whether a run has fewer rows of a plate than there are."""
    return frame.full_size is not None and frame.full_size != frame.size
