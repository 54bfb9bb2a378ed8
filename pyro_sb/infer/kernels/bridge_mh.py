r"""BridgeMH, exact MCMC :math:`\min(1, w' / w)` with any bridge that has a density as its proposal."""

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import Bridge, check_fit_options
from pyro_sb.bridges.light.light import LightSB
from pyro_sb.fingerprint import fingerprint
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.amortized.refresh import PosteriorProposals
from pyro_sb.infer.kernels.checks import (
    check_bridge,
    check_bridge_probability,
    check_context,
    check_density,
    check_dim,
    check_model,
    check_paths,
    check_posterior,
    check_unused,
    made_bridge,
)
from pyro_sb.infer.kernels.warmup import ChainStart, Pilot, freeze_bridge, judge, start_of_pilot, start_of_population
from pyro_sb.infer.mcmc.kernel import ModelKernel, check_count
from pyro_sb.infer.moves.proposals import BridgeProposals, Proposals
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.population import POOR_SHARE
from pyro_sb.stages import announce
from pyro_sb.warn import warn

__all__ = ["BridgeMH"]

logger = logging.getLogger(__name__)
GIVEN = ("context", "weights")  # arguments of a bridge's fit that the kernel gives
SOURCE = {"source"}  # the one of its two ends that a user may give
LEAST_ACCEPTANCE = 0.05


class BridgeMH(ModelKernel):
    r"""Exact MCMC that proposes from a bridge and corrects it, on points or in the space of paths.

    A proposal :math:`x'` is a draw of the bridge, independent of the state, and is accepted with

    .. math:: \min(1, w' / w), \qquad \log w = \log \pi(x) - \log q ,

    where :math:`\log q` is the density of the point if the bridge knows it (a light bridge with its source omitted),
    else that of the path that led to it, forwards less backwards (VSDM, SGM, DSB, the plain scheme of
    `KernelLangevinBridge`, a light bridge with a distribution as source). In the second case the chain's state is x
    with a path, its law :math:`\pi(x) B(\text{path} | x)` with the bridge's backward law B, and x has law
    :math:`\pi` exactly. At the start, and after any other move, the path is drawn again, from :math:`B(\cdot | x)`.
    So **the target is exactly invariant however bad the bridge is**; a bad bridge costs acceptance.

    The bridge may be

    - fitted: used as it is, in the model's unconstrained coordinates (sites sorted by name);
    - not fitted yet: warm-up builds the weighted population of `KernelLangevin`, fits a copy of the bridge to it (of a
      `LatentBridge` its codec too, if that is not fitted; it must keep all dimensions), and freezes it;
    - a function from the dimension to a bridge that is not fitted, such as ``LightSB``; None is a `LightSB` with full
      covariances, one a component of the population's mixture;
    - a conditional bridge, with ``context``;
    - a conditioned posterior of `AmortizedPosterior`.

    Its move is mixed with a local one, HMC in the metrics of a mixture fitted to the bridge's weighted draws, at a
    probability that does not depend on the state. Proposals are drawn and scored for many steps in one batch. The
    statistic ``move`` of a draw is 0 for the bridge and 2 for the local move, as in `KernelLangevin`.

    What it cannot do: a mode that neither the bridge nor a start knows stays missing, and R-hat does not notice; where
    the bridge's tails are lighter than the target's, a chain may stay in a tail for long, and the local move is what
    brings it back.

    Args:
        model: Pyro model. It may be omitted with a posterior, which knows its own.
        bridge: As above.
        potential_fn: Minus the log joint of one chain's dict of unconstrained tensors, instead of a model; needs
            initial parameters.
        local: ``"hmc"``, ``"mala"``, or None for the bridge alone.
        context: What a conditional bridge is called on. Shape ``(context_dim,)``.
        num_proposals: Tries a step, at least 1. With more than one the step is multiple-try Metropolis, a form of
            iterated sampling importance resampling that rejects less: for models whose evaluations are cheap.
        num_paths: Paths a proposal, at least 1: averaging the path weights over more raises the acceptance of a bridge
            of paths, without evaluations of the model.
        bridge_probability: Probability of the bridge's move, in (0, 1). None: tuned. With ``local=None`` it is 1.
        num_particles: Draws that the bridge is judged by, and size of the population where there is one. At least 50.
        start: Where a population starts: ``"search"``, ``"prior"`` or points ``(M, dim)``. A fitted bridge whose
            weights have an effective share of a tenth needs none.
        fit_options: What ``fit`` of a bridge that is not fitted gets besides draws and weights.
        reparam: ``"auto"``: where a population fits poorly (a funnel), a bridge that is not fitted is fitted, and
            chains walk, in the model's non-centred coordinates if those fit better. None: never.
        init_strategy: Pyro's per-site strategy for the starts of the search.
        max_plate_nesting: As in Pyro's HMC; found by tracing if omitted.
        transforms: As in Pyro's HMC: site to the transform from its support to the reals.
        jit_compile: Refused by name if True: the log joint runs eagerly.
        warmup_budget: As in `KernelLangevin`, for the population that a bridge is fitted to.

    Attributes:
        proposals: After warm-up, what is proposed from; ``proposals.bridge`` is the bridge that was used.
        pilot: After warm-up, proposals with their weights: ``share``, ``k_hat``, ``log_evidence``.

    References:
        Independence samplers: Markov chains for exploring posterior distributions (Tierney, 1994), section 2.3.3.
        Densities of paths: the class docstrings of the bridges.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_sb.infer.mcmc.mcmc import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> bridge = LightSB(1, num_components=1)
        >>> history = bridge.fit(3.0 + torch.randn(500, 1), solver="moments", progress=False)
        >>> mcmc = MCMC(BridgeMH(model, bridge), num_samples=50, num_chains=16, disable_progbar=True)
        >>> mcmc.run(torch.tensor(3.0))
        >>> mcmc.get_samples()["mu"].shape
        torch.Size([800])
        >>> mcmc.kernel.frozen.acceptance["bridge"] > 0.8
        True
    """

    learns: tuple[str, ...] = ("population", "pilot", "_begin", "frozen")

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        bridge: Bridge | Posterior | Callable[[int], Bridge] | None = None,
        *,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        local: str | None = "hmc",
        context: Any = None,
        num_proposals: int = 1,
        num_paths: int = 1,
        bridge_probability: float | None = None,
        num_particles: int = 1024,
        start: str | Tensor = "search",
        fit_options: Mapping[str, Any] | None = None,
        reparam: str | None = "auto",
        init_strategy: Callable[..., Any] | None = None,
        max_plate_nesting: int | None = None,
        transforms: dict[str, Any] | None = None,
        jit_compile: bool = False,
        warmup_budget: float | None = None,
    ) -> None:
        check_model(model, bridge, potential_fn)
        check_bridge(bridge, context)
        if model is None and potential_fn is None and isinstance(bridge, Posterior):
            model = bridge.model
        super().__init__(
            model,
            potential_fn,
            local=local,
            num_particles=num_particles,
            start=start,
            reparam=reparam,
            init_strategy=init_strategy,
            max_plate_nesting=max_plate_nesting,
            transforms=transforms,
            jit_compile=jit_compile,
            warmup_budget=warmup_budget,
        )
        check_bridge_probability(bridge_probability, local)
        self.num_proposals = check_count("num_proposals", num_proposals, least=1)
        self.num_paths = check_count("num_paths", num_paths, least=1)
        check_unused(bridge, fit_options, num_paths)
        if bridge is None or isinstance(bridge, Bridge) or isinstance(bridge, type):
            check_fit_options(
                "fit_options", LightSB if bridge is None else bridge, (fit_options or {}).keys() - SOURCE, GIVEN
            )
        self.bridge, self.context = bridge, context
        self.bridge_probability, self.fit_options = bridge_probability, dict(fit_options or {})
        self.proposals: Proposals | None = None
        self.pilot: Pilot | None = None
        self._begin: ChainStart | None = None
        self._made: Bridge | None = None  # by the function, in setup; a copy of it is fitted

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Bind the model's arguments; what was learnt before is dropped, but where it serves, as in `KernelLangevin`.

        A bridge that was fitted in warm-up is a part of what was learnt.
        """
        super().setup(warmup_steps, *args, **kwargs)
        if isinstance(self.bridge, Posterior):
            check_posterior(self.bridge, self.log_joint)
        elif isinstance(self.bridge, Bridge):
            check_dim(self.bridge, self.log_joint)
        elif self.bridge is not None:
            self._made = made_bridge(self.bridge, self.log_joint)
            check_fit_options("fit_options", self._made, self.fit_options.keys() - SOURCE, GIVEN)

    def _forget(self) -> None:
        super()._forget()
        self.proposals = None

    def _options(self) -> dict[str, Any]:
        return super()._options() | {
            "bridge": self.bridge,
            "context": self.context,
            "num_proposals": self.num_proposals,
            "num_paths": self.num_paths,
            "bridge_probability": self.bridge_probability,
            "fit_options": self.fit_options,
        }

    def _words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
        """As of every kernel; an amortised posterior is known by its law at its observation."""
        options = self._options()
        if isinstance(self.bridge, Posterior):
            options["bridge"] = self.bridge.law.word()
        return super()._words(args, kwargs) | {"the options": fingerprint(options)}

    @property
    def _own(self) -> bool:
        """Whether it proposes from the bridge that it was given, as it is."""
        return isinstance(self.bridge, Posterior) or (isinstance(self.bridge, Bridge) and self.bridge.fitted)

    def _known(self) -> dict[str, Any]:
        return {} if self.proposals is None else {"proposals": self.proposals}

    def learnt(self) -> dict[str, Any]:
        """What warm-up has learnt so far, as tensors and plain values, a bridge that it fitted among it."""
        fitted = self.proposals if isinstance(self.proposals, BridgeProposals) and not self._own else None
        bridge = None if fitted is None else fitted.bridge.contents()
        return super().learnt() | {"bridge": bridge, "proposes": self.proposals is not None}

    def check_saved(self) -> None:
        """Refuse a bridge, to be fitted in warm-up, that no file keeps."""
        if not isinstance(self.bridge, Bridge) or self._own:
            return
        try:
            self.bridge.config()
        except NotImplementedError as error:
            raise ValueError(
                f"a run is written to a file with the bridge that warm-up fits, but {type(self.bridge).__name__} has "
                f"no config ({error}). Fit it before, or leave the file out."
            ) from error

    def learn_from(self, learnt: dict[str, Any], rest: dict[str, Any] | None = None) -> None:
        """Take what a kernel of the same target has learnt, as `learnt` gave it; after `setup`."""
        if learnt["bridge"] is not None:
            bridge = Bridge.rebuilt(learnt["bridge"], "the file").to(self.log_joint.device)
            self.proposals = BridgeProposals(bridge, None, self.num_paths)
        elif learnt["proposes"]:
            self.proposals = self._own_proposals()
        super().learn_from(learnt, rest)

    def __repr__(self) -> str:
        if self.bridge is None or isinstance(self.bridge, type) or not isinstance(self.bridge, (Bridge, Posterior)):
            name = getattr(self.bridge, "__name__", "LightSB")
            bridge = f"a {name}, to be fitted in warm-up"
        elif isinstance(self.bridge, Posterior):
            bridge = "an amortised posterior"
        else:
            bridge = f"{self.bridge.describe()}, {'fitted' if self.bridge.fitted else 'to be fitted in warm-up'}"
        lines = [f"BridgeMH({self._subject()})", f"  proposes from: {bridge}"]
        if self.pilot is None or self.frozen is None:
            return "\n".join([*lines, "  before its warm-up"])
        return "\n".join([*lines, *(f"  {line}" for line in self.describe().splitlines()[-3:])])

    def describe(self) -> str:
        """Lines on the population if there is one, the bridge's weights, the coordinates, moves and threads."""
        if self.pilot is None or self.frozen is None:
            return "BridgeMH before its warm-up"
        stages = [] if self.population is None else list(self.population.stages)
        weights = f"effective share {self.pilot.share:.3f}, k-hat {self.pilot.k_hat:.2f}"
        lines = [*stages, f"bridge: {weights}", f"coordinates: {self._where()}", f"moves: {self.frozen.describe()}"]
        return "\n".join([*lines, self._target.threads])

    def _facts(self) -> dict[str, Any]:
        """Figures of the bridge's proposals as an importance sample."""
        assert self.pilot is not None
        evidence, error = self.pilot.log_evidence
        return {
            "log evidence": evidence,
            "log evidence error": error,
            "k_hat": self.pilot.k_hat,
            "effective share": self.pilot.share,
        }

    def _prepare(self) -> None:
        """Fit a bridge that is not fitted, judge it, tune and freeze the moves, once."""
        if self.frozen is not None:
            return
        if self.proposals is None:
            self.proposals = self._own_proposals() if self._own else self._fitted_proposals()
        if self.pilot is None:
            self.pilot = judge(self._target, self.proposals, self.num_particles)
        if self._begin is None:
            self._begin = self._found_start()
        self.frozen = freeze_bridge(
            self._target,
            self.proposals,
            self._begin,
            local=self.local,
            bridge_probability=self.bridge_probability,
            num_proposals=self.num_proposals,
        )
        logger.info("%s", self.describe())
        acceptance = self.frozen.acceptance["bridge"]
        if not acceptance >= LEAST_ACCEPTANCE:
            warn(
                f"The bridge's own move accepts {acceptance:.3f} < {LEAST_ACCEPTANCE}: chains hardly cross between "
                "modes, so that shares of modes may be off, as the start decides them. Fit the bridge to more draws of "
                f"this target, or raise num_proposals (now {self.num_proposals}).",
            )

    def _own_proposals(self) -> Proposals:
        """Proposals of the bridge as it is."""
        if isinstance(self.bridge, Posterior):
            return PosteriorProposals(self.bridge.law, self.bridge.law.context, self.num_paths)
        assert isinstance(self.bridge, Bridge)
        return BridgeProposals(self.bridge, check_context(self.bridge, self.context), self.num_paths)

    def _fitted_proposals(self) -> Proposals:
        """Proposals of a copy of the bridge that is fitted to the population."""
        population = self._populate()
        announce("bridge")
        begin, bridge = start_of_population(population), self._template()
        with warnings.catch_warnings():
            if self.bridge is None:  # its weights are measured next
                warnings.filterwarnings("ignore", message=".*have not converged")
            options = {"progress": False} | ({"solver": "moments"} if self.bridge is None else {}) | self.fit_options
            bridge.fit(begin.points, weights=begin.weights, **options)
        check_density(bridge)
        check_paths(bridge.density == "marginal", self.num_paths)
        return BridgeProposals(bridge, None, self.num_paths)

    def _template(self) -> Bridge:
        """A bridge that is not fitted, of the model's dimension."""
        if isinstance(self.bridge, Bridge):
            return copy.deepcopy(self.bridge)
        if self.bridge is None:
            assert self.population is not None
            return LightSB(self.log_joint.dim, num_components=self.population.core.num_components, covariance="full")
        assert self._made is not None
        return copy.deepcopy(self._made)

    def _found_start(self) -> ChainStart:
        """The population's, or the bridge's weighted draws, or a population where those are poor."""
        assert self.pilot is not None
        if self.population is None:
            alone = self.local is None and self._initial_params is not None
            if alone or self.pilot.share >= POOR_SHARE:
                return start_of_pilot(self.pilot, metric=self.local is not None)
            logger.info("the bridge's effective share is %.3f: chains start from a population", self.pilot.share)
            self.population = populate(self.log_joint, self.num_particles, start=self.start, hints=self._hints())
        return start_of_population(self.population)

    def _starts(self, num: int) -> Tensor:
        """Draws of the start by weight."""
        assert self._begin is not None
        return self._begin.points[torch.multinomial(self._begin.weights, num, replacement=True)]
