r"""Non-centred coordinates :math:`\theta = \mu + \tau u` of a model, and the choice between them and its own."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer.reparam.loc_scale import LocScaleReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.infer.reparam.strategies import Strategy
from torch import Tensor
from torch.distributions import constraints

from pyro_sb.infer.model.imputation import MISSING
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.population import Population, populate
from pyro_sb.infer.population.rounds import FAIR_SHARE

logger = logging.getLogger(__name__)

SUFFIX = "_decentered"


class NonCentre(Strategy):
    """Pyro's reparametrisation strategy that decentres every latent location-scale site on the reals."""

    def configure(self, msg: dict[str, Any]) -> Reparam | None:
        """``LocScaleReparam(0)`` for a latent site such as Normal, StudentT or Laplace; None for any other."""
        if msg["is_observed"] or msg["name"].endswith((SUFFIX, MISSING)):  # missing entries keep their places
            return None
        fn = msg["fn"]
        while isinstance(fn, Independent | ExpandedDistribution):
            fn = fn.base_dist
        located = {"loc", "scale"} <= set(getattr(fn, "arg_constraints", {}))
        if not located or fn.support is not constraints.real:
            return None
        return LocScaleReparam(centered=0.0)


class NonCentred:
    r"""Map between a model's unconstrained vector z and the vector u of its non-centred form.

    A site :math:`\theta \sim \mathrm{Normal}(\mu, \tau)` becomes :math:`\theta = \mu + \tau u` with standard u:
    Neal's funnel turns into independent coordinates. Densities in u are those of the reparametrised model, so chains
    in u, mapped to z, target the model itself.

    Args:
        centred: Log joint of the model.
        log_joint: Log joint of the reparametrised model.

    References:
        Automatic reparameterisation of probabilistic programs (Gorinova, Moore and Hoffman, 2019),
        https://arxiv.org/abs/1906.03028
    """

    def __init__(self, centred: LogJoint, log_joint: LogJoint) -> None:
        self.centred, self.log_joint = centred, log_joint
        self.sites = [name for name in centred.site_shapes if name + SUFFIX in log_joint.site_shapes]
        log_joint.evaluations = centred.evaluations

    @property
    def curved(self) -> bool:
        """Whether the map is more than a rescaling: whether some location or scale depends on another latent."""
        u = self.log_joint.start(8).to(torch.float64)
        ends, middle = self.forward(u), self.forward(0.5 * (u[:4] + u[4:]))
        return not torch.allclose(middle, 0.5 * (ends[:4] + ends[4:]), rtol=1e-4, atol=1e-5)

    @property
    def exact(self) -> bool:
        """Whether the inverse inverts the map: not where a location depends on a discrete site, drawn at each call."""
        u = self.log_joint.start(16).to(torch.float64)
        return torch.allclose(self.inverse(self.forward(u)), u, rtol=1e-3, atol=1e-3)

    def forward(self, u: Tensor) -> Tensor:
        """``(*batch, dim)`` to ``(*batch, dim)``: the model's vector z at u."""
        known = self.log_joint.constrain(u) | self.log_joint.deterministic(u)
        sites = {name: self._unconstrain(name, known[name]) for name in self.centred.site_shapes}
        return self.centred.pack(sites).to(u.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """``(*batch, dim)`` to ``(*batch, dim)``: the vector u at z.

        Each site is affine in its own noise, so two evaluations give its location and scale. Where a location is
        itself decentred, another pass is needed: hence one pass a site.
        """
        given = self.centred.unpack(z)
        noise = {name + SUFFIX: torch.zeros_like(given[name]) for name in self.sites}
        shared = {name: given[name] for name in self.log_joint.site_shapes if name not in noise}
        for _ in self.sites:
            low = self._values(shared | noise)
            high = {name: self._values(shared | noise | _raised(noise, name + SUFFIX))[name] for name in self.sites}
            noise = {
                name + SUFFIX: noise[name + SUFFIX] + (given[name] - low[name]) / (high[name] - low[name])
                for name in self.sites
            }
        return self.log_joint.pack(shared | noise).to(z.dtype)

    def _values(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.log_joint.deterministic(self.log_joint.pack(params))

    def _unconstrain(self, name: str, value: Tensor) -> Tensor:
        transform = self.centred.transforms.get(name)
        return value if transform is None else transform(value)


def _raised(noise: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {name: noise[name] + 1.0}


def non_centred(centred: LogJoint, build: Callable[[Callable[..., Any]], LogJoint]) -> NonCentred | None:
    """Non-centred coordinates of a log joint's model, or None if there is no model or nothing to decentre.

    Args:
        centred: Log joint of the model.
        build: Makes the log joint of another model with the same arguments.
    """
    if centred.model is None:
        return None
    try:
        coordinates = NonCentred(centred, build(NonCentre()(centred.model)))
        return coordinates if coordinates.sites and coordinates.curved and coordinates.exact else None
    except Exception as error:  # an optional rebuild of a user's model: without it the model's own coordinates serve
        logger.info("no non-centred coordinates: %s", error)
        return None


def choose_coordinates(
    log_joint: LogJoint,
    build: Callable[[Callable[..., Any]], LogJoint],
    num_particles: int,
    start: str | Tensor,
    reparam: str | None,
    hints: Tensor | None = None,
) -> tuple[NonCentred | None, Population]:
    """The population of a target, in the coordinates where its mixture fits better.

    The model's own coordinates come first. If the search met no maximum there (a funnel) or the effective share is
    under .6, the non-centred form is tried, where there is one.

    Args:
        log_joint: Log joint of the model.
        build: Makes the log joint of another model with the same arguments.
        num_particles: Size of the population.
        start: As in :func:`~pyro_sb.infer.population.population.populate`; points are in the model's coordinates.
        reparam: ``"auto"``, or None for the model's own coordinates only.
        hints: Points for the search, in the model's coordinates.

    Returns:
        The non-centred coordinates, or None for the model's own, and the population in them.
    """
    coordinates = non_centred(log_joint, build) if reparam else None
    if coordinates is None:
        return None, populate(log_joint, num_particles, start=start, hints=hints)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The population is poor")  # its rival may be better
        population = populate(log_joint, num_particles, start=start, hints=hints, exploring=False)
    if not _suspect(population):
        return None, population
    moved = coordinates.inverse(start) if isinstance(start, Tensor) else start
    rival = populate(
        coordinates.log_joint,
        num_particles,
        start=moved,
        hints=None if hints is None else coordinates.inverse(hints),
    )
    logger.info("effective share %.3f, non-centred %.3f", population.ess_share, rival.ess_share)
    if (not _suspect(rival), rival.ess_share) > (False, population.ess_share):
        return coordinates, rival
    return None, populate(log_joint, num_particles, start=start, hints=hints)


def _suspect(population: Population) -> bool:
    """Whether a region may be missing: a share cannot see what no draw has met; a search without maximum can."""
    return population.ess_share < FAIR_SHARE or population.funnel
