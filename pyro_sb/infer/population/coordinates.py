r"""Partly centred coordinates :math:`\theta = \mu + \tau^{1 - \lambda} (x - \lambda\mu)` of a model, and the choice."""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.population import Population
from pyro_sb.infer.population.search import climb, dispersed_starts, empty_optima, relevant
from pyro_sb.infer.population.settle import settle
from pyro_sb.infer.population.sources import laplace_mixture, law_of_points
from pyro_sb.ops.sampling.fisher import fisher_fit
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.stages import announce

logger = logging.getLogger(__name__)

SUFFIX = "_decentered"
DEGREES = (0.0, 0.25, 0.5, 0.75, 1.0)
ASCENTS = 12
SIMPLER = 0.1  # of the misfit by which other coordinates must be better than the model's own


class NonCentre(Strategy):
    """Pyro's reparametrisation strategy that decentres every latent location-scale site on the reals.

    Args:
        degrees: Degrees of centring in [0, 1], by site; 0 where there is none.
    """

    def __init__(self, degrees: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.degrees = degrees or {}

    def configure(self, msg: dict[str, Any]) -> Reparam | None:
        """``LocScaleReparam`` for a latent site such as Normal, StudentT or Laplace; None for any other."""
        if msg["is_observed"] or msg["name"].endswith((SUFFIX, MISSING)):  # missing entries keep their places
            return None
        fn = msg["fn"]
        while isinstance(fn, Independent | ExpandedDistribution):
            fn = fn.base_dist
        located = {"loc", "scale"} <= set(getattr(fn, "arg_constraints", {}))
        if not located or fn.support is not constraints.real:
            return None
        return LocScaleReparam(centered=self.degrees.get(msg["name"], 0.0))


class NonCentred:
    r"""Map between a model's unconstrained vector z and the vector u of its non-centred form.

    A site :math:`\theta \sim \mathrm{Normal}(\mu, \tau)` becomes :math:`\theta = \mu + \tau u` with standard u:
    Neal's funnel turns into independent coordinates. Densities in u are those of the reparametrised model, so chains
    in u, mapped to z, target the model itself.

    With a degree of centring it is what `LocScaleReparam` makes of it.

    Args:
        centred: Log joint of the model.
        log_joint: Log joint of the reparametrised model.
        degrees: Degrees of centring in [0, 1] by site; 0 where there is none.

    References:
        Automatic reparameterisation of probabilistic programs (Gorinova, Moore and Hoffman, 2019),
        https://arxiv.org/abs/1906.03028
    """

    def __init__(self, centred: LogJoint, log_joint: LogJoint, degrees: dict[str, Tensor] | None = None) -> None:
        self.centred, self.log_joint, self.degrees = centred, log_joint, degrees or {}
        self.sites = [name for name in centred.site_shapes if name + SUFFIX in log_joint.site_shapes]
        log_joint.evaluations = centred.evaluations

    def describe(self) -> str:
        """Which sites are how far from centred, for reports."""
        degrees = {name: float(self.degrees[name].mean()) if name in self.degrees else 0.0 for name in self.sites}
        free = [name for name in self.sites if degrees[name] == 0.0]
        partly = [
            f"{name} (degree of centring {degrees[name]:.2f})" for name in self.sites if 0.0 < degrees[name] < 1.0
        ]
        parts = [f"non-centred in {free}"] if free else []
        return "; ".join(parts + ([f"partly centred in {', '.join(partly)}"] if partly else []))

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

    def frames(self, u: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of every decentred site at draws of its standard form, ``(M, *site)`` each."""
        params = self.log_joint.unpack(u)
        here = self._values(params)
        frames = {}
        for name in self.sites:
            noise = params[name + SUFFIX].to(torch.float64)
            value = here[name].to(torch.float64)
            scale = self._values(params | _raised(params, name + SUFFIX))[name].to(torch.float64) - value
            frames[name] = (value - scale * noise, scale)
        return frames

    def _values(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.log_joint.deterministic(self.log_joint.pack(params))

    def _unconstrain(self, name: str, value: Tensor) -> Tensor:
        transform = self.centred.transforms.get(name)
        return value if transform is None else transform(value)


def _raised(noise: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {name: noise[name] + 1.0}


def non_centred(
    centred: LogJoint, build: Callable[[Callable[..., Any]], LogJoint], degrees: dict[str, Tensor] | None = None
) -> NonCentred | None:
    """Non-centred coordinates of a log joint's model, or None if there is no model or nothing to decentre.

    Args:
        centred: Log joint of the model.
        build: Makes the log joint of another model with the same arguments.
        degrees: Degrees of centring in [0, 1], by site; 0, wholly non-centred, where there is none.
    """
    if centred.model is None:
        return None
    try:
        coordinates = NonCentred(centred, build(NonCentre(degrees)(centred.model)), degrees)
        return coordinates if coordinates.sites and coordinates.curved and coordinates.exact else None
    except Exception as error:  # an optional rebuild of a user's model: without it the model's own coordinates serve
        logger.info("no non-centred coordinates: %s", error)
        return None


def known_coordinates(
    centred: LogJoint, build: Callable[[Callable[..., Any]], LogJoint], degrees: dict[str, Tensor]
) -> NonCentred | None:
    """Coordinates of degrees that were learnt before; None where the model has other sites."""
    found = NonCentred(centred, build(NonCentre(degrees)(centred.model)), degrees) if centred.model else None
    return found if found is not None and found.sites and set(degrees) <= set(found.sites) else None


def choose_coordinates(
    log_joint: LogJoint,
    build: Callable[[Callable[..., Any]], LogJoint],
    num_particles: int,
    start: str | Tensor,
    reparam: str | None,
    hints: Tensor | None = None,
    budget: float | None = None,
) -> tuple[NonCentred | None, Population]:
    """The population of a target, in the coordinates in which it is most like a normal law.

    Short chains in the non-centred coordinates, where there are any, give draws and gradients. From them each entry of
    each site learns a degree of centring, and the model's own, the non-centred and the partly centred coordinates are
    compared.

    Args:
        log_joint: Log joint of the model.
        build: Makes the log joint of another model with the same arguments.
        num_particles: Size of the population.
        start: As in :func:`~pyro_sb.infer.population.build.populate`; points are in the model's coordinates.
        reparam: ``"auto"``, or None for the model's own coordinates only.
        hints: Points for the search, in the model's coordinates.
        budget: As in :func:`~pyro_sb.infer.population.build.populate`.

    Returns:
        The coordinates, or None for the model's own, and the population in them.
    """
    free = non_centred(log_joint, build) if reparam else None
    if free is None:
        return None, populate(log_joint, num_particles, start=start, hints=hints, budget=budget)
    coordinates, near = learnt_coordinates(free, build, start if isinstance(start, Tensor) else None)
    if coordinates is None:
        return None, populate(log_joint, num_particles, start=start, hints=hints, near=near, budget=budget)
    moved = coordinates.inverse(start) if isinstance(start, Tensor) else start
    hints = None if hints is None else coordinates.inverse(hints)
    return coordinates, populate(
        coordinates.log_joint, num_particles, start=moved, hints=hints, near=near, budget=budget
    )


class Candidate(NamedTuple):
    """Draws and gradients in some coordinates, None for the model's own, and how far from normal they are."""

    coordinates: NonCentred | None
    x: Tensor
    grad: Tensor
    misfit: float


def learnt_coordinates(
    free: NonCentred, build: Callable[[Callable[..., Any]], LogJoint], points: Tensor | None = None
) -> tuple[NonCentred | None, StudentMixture | None]:
    r"""The best of the non-centred coordinates, partly centred ones, and the model's own, which are None.

    Judged by :math:`\log\det \operatorname{cov} x + \log\det \operatorname{cov} \nabla \log p`, which is 0 for a normal
    law and positive for any other, whatever its scales and correlations, by the bound of Cramér and Rao.

    Args:
        free: The non-centred coordinates.
        build: Makes the log joint of another model with the same arguments.
        points: Where chains start, in the model's coordinates; else from a few ascents. Shape ``(M, d)``.

    Returns:
        The coordinates, and normal laws of the regions in them that short chains settled in.
    """
    announce("coordinates")
    u = None if points is None else free.inverse(points.to(torch.float64))
    settled = settle(free.log_joint, _regions(free.log_joint) if u is None else law_of_points(u), u)
    share = settled.core.log_responsibilities(settled.points)
    label, z = share.argmax(-1), free.forward(settled.points)
    grad = free.centred.value_and_grad(z)[1]
    candidates = [
        Candidate(None, z, grad, misfit(z, grad, label)),
        Candidate(free, settled.points, settled.grad, misfit(settled.points, settled.grad, label)),
    ]
    partly = non_centred(free.centred, build, learnt_degrees(free, settled.points, z, grad, label))
    if partly is not None:
        x = partly.inverse(z)
        slope = partly.log_joint.value_and_grad(x)[1]
        candidates.append(Candidate(partly, x, slope, misfit(x, slope, label)))
    logger.info("misfit of the model's, non-centred, partly centred coordinates: %s", [c.misfit for c in candidates])
    best = min(candidates, key=lambda candidate: candidate.misfit)
    best = candidates[0] if candidates[0].misfit < best.misfit + SIMPLER else best
    finite = torch.isfinite(best.x).all(-1)
    known = share.exp().sum(0) > best.x.shape[1] + 1  # regions of few draws are left out
    if not bool(finite.all()) or not bool(known.any()):
        return best.coordinates, None
    mean, scale = fisher_fit(best.x, best.grad, share.exp()[:, known])
    log_weights = torch.log_softmax(settled.core.log_weights[known], 0)
    return best.coordinates, StudentMixture(log_weights, mean, scale, settled.core.df[known])


def _regions(joint: LogJoint) -> StudentMixture:
    """Laplace's laws at the maxima that a few ascents meet; a normal law as wide as the starts, if they meet none."""
    starts = dispersed_starts(joint, ASCENTS)
    optima = relevant(climb(joint, empty_optima(joint), starts))
    if len(optima.points):
        return laplace_mixture(optima, df=math.inf, inflation=1.0)
    one = starts.new_ones(1)
    scale = torch.diag(starts.std(0).clamp_min(1e-6))
    return StudentMixture(one.log(), starts.mean(0, keepdim=True), scale[None], math.inf * one)


def learnt_degrees(free: NonCentred, u: Tensor, z: Tensor, grad: Tensor, label: Tensor) -> dict[str, Tensor]:
    r"""Degree :math:`\lambda \in [0, 1]` of centring for every entry of every site that is decentred.

    In the coordinates :math:`x = \lambda\mu + (\theta - \mu) \tau^{\lambda - 1}` the gradient is that of theta times
    :math:`\tau^{1 - \lambda}`; the degree has the smallest :math:`\operatorname{var} x \operatorname{var} \nabla_x`.

    Args:
        free: The non-centred coordinates.
        u: Draws in them. Shape ``(M, d)``.
        z: The same in the model's. Shape ``(M, d)``.
        grad: Gradients of the model's log joint there. Shape ``(M, d)``.
        label: Region of every draw. Shape ``(M,)``.

    References:
        Automatic reparameterisation of probabilistic programs (Gorinova, Moore and Hoffman, 2019), section 4.2: the
        coordinates. They choose degrees by a variational bound.
    """
    values, slopes = free.centred.unpack(z), free.centred.unpack(grad)
    degrees = {}
    for name, (loc, scale) in free.frames(u).items():
        theta, slope = values[name].to(torch.float64), slopes[name].to(torch.float64)
        products = [
            _within(degree * loc + (theta - loc) * scale ** (degree - 1.0), label).square().mean(0)
            * _within(slope * scale ** (1.0 - degree), label).square().mean(0)
            for degree in DEGREES
        ]
        best = torch.stack(products).nan_to_num(torch.inf).argmin(0)
        degrees[name] = theta.new_tensor(DEGREES)[best].to(free.centred.dtype)
    return degrees


def misfit(x: Tensor, grad: Tensor, label: Tensor) -> float:
    """How far a law is from normal within its regions, from draws and gradients ``(M, d)``; 0 at best."""
    finite = torch.isfinite(x).all(-1)
    if int(finite.sum()) < 0.9 * len(x):
        return math.inf
    x, grad = (_within(part[finite].to(torch.float64), label[finite]) for part in (x, grad))
    if len(x.unique(dim=0)) < 2 * x.shape[1]:
        score = float((x.square().mean(0) * grad.square().mean(0)).log().sum())
    else:
        score = float(sum(torch.linalg.slogdet(part.T @ part / len(part))[1] for part in (x, grad)))
    return score if math.isfinite(score) else math.inf


def _within(x: Tensor, label: Tensor) -> Tensor:
    """Less the mean of its region, row by row."""
    onehot = torch.nn.functional.one_hot(label).to(x.dtype)
    means = torch.tensordot(onehot / onehot.sum(0).clamp_min(1.0), x, dims=([0], [0]))
    return x - means[label]
