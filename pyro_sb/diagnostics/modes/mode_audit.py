"""Mode audit: shares of a target's modes among populations of different kinds, and among draws held against them."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_sb.diagnostics.calibration.simulated import number_names
from pyro_sb.diagnostics.export.container import is_container
from pyro_sb.diagnostics.export.draws_of import target_of, unconstrained_draws
from pyro_sb.diagnostics.modes.audited import MORE, ModeAudit, effective_size
from pyro_sb.diagnostics.modes.clusters import Modes, find_modes
from pyro_sb.diagnostics.reports.lines import Line
from pyro_sb.infer.mcmc.figures import site_diagnostics
from pyro_sb.infer.model.log_joint import LogJoint
from pyro_sb.infer.population.build import populate
from pyro_sb.infer.population.population import Population
from pyro_sb.ops.student_mixture import StudentMixture
from pyro_sb.threads import chosen_threads

__all__ = ["ModeAudit", "audit_or_why", "audit_with", "lines_of_audit", "mode_audit"]

logger = logging.getLogger(__name__)
POOLED = 1024  # draws of each population, and of the run, that modes are looked for in


def mode_audit(
    x: Any = None,
    target: Any = None,
    *,
    potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    initial_params: dict[str, Tensor] | None = None,
    num_particles: int = 1024,
    start: Tensor | None = None,
    max_modes: int = 20,
    progress: bool = True,
) -> ModeAudit:
    r"""Two weighted populations of a target that differ in kind, and whether a run's draws have the same modes.

    R-hat and ESS compare chains with each other: chains that all miss a mode agree perfectly. So do two seeds of one
    search. The populations here come to their modes in two ways: by a multi-start search and what follows it, and by
    particles tempered from the prior alone; from a law wider than the first population where the prior cannot be
    drawn, or from given points. Their shares have standard errors that the draws can be held against.

    **Modes** are Gaussian-mixture clusters (scikit-learn, number by BIC) of both populations and the draws, joined
    wherever the log joint falls less than two nats below the lower of two clusters' middles on the way between them:
    straight, or by where the clusters come closest.

    **Shares** of a population are self-normalised importance estimates. What both populations and the draws miss stays
    unseen: "ok" is not a proof.

    Args:
        x: Draws: a finished `MCMC`, ours or Pyro's, a conditioned `Posterior`, `ImportanceDraws`, an ArviZ container, a
            dict of sites in their own space ``(chain, draw, *site)``, or unconstrained draws ``(chain, draw, dim)`` or
            ``(draw, dim)``. Without draws: the target alone.
        target: The Pyro model that they are held against, or a `LogJoint`. Omitted: that of a run or posterior.
        potential_fn: Minus the log joint of one chain, instead of a target; with ``initial_params``.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        initial_params: Unconstrained values of the sites: shapes for ``potential_fn``, hints for a model.
        num_particles: Draws of each population, at least 50.
        start: Points near a mode that may be missed, unconstrained: the search starts from them too, and the second
            population is tempered from them. At least four rows, of shape ``(M, dim)``.
        max_modes: Clusters looked for, at least 1.
        progress: Show a bar.

    Raises:
        TypeError: No target.
        ValueError: Draws that lack a site of the model, or are not finite.

    References:
        Self-normalised importance sampling and its standard error: Monte Carlo theory, methods and examples (Owen,
        2013), chapter 9, equation (9.9). The audit is ours.

    Example:
        >>> def two_modes(z):
        ...     return torch.logsumexp(torch.stack([-(z + 5) ** 2, -(z - 5) ** 2]).sum(-1) / 2, 0)
        >>> joint = LogJoint.from_batched(lambda z: two_modes(z), dim=1)
        >>> stuck = 5 + torch.randn(4, 500, 1, dtype=torch.float64)  # R-hat is 1.00
        >>> audit = mode_audit(stuck, joint, progress=False)
        >>> audit.num_modes, audit.verdict, len(audit.missing)
        (2, 'bad', 1)
    """
    if max_modes < 1:
        raise ValueError(f"max_modes must be at least 1, got {max_modes}. Omit it for 20.")
    joint, beside = target_of(x, target, potential_fn, args, dict(kwargs or {}), initial_params)
    with chosen_threads(joint):
        draws = None if beside is None else unconstrained_draws(beside, joint)
        before = joint.evaluations.density + joint.evaluations.gradient
        near = _near(joint, None if potential_fn is not None else initial_params, start)
        populations, kinds = _two_kinds(joint, num_particles, near, start, progress)
        found = audit_with(joint, populations, draws, max_modes=max_modes, kinds=kinds)
        return replace(found, evaluations=joint.evaluations.density + joint.evaluations.gradient - before)


def _near(joint: LogJoint, initial_params: dict[str, Tensor] | None, start: Tensor | None) -> Tensor | None:
    """Points that the search starts from besides its own."""
    given = [] if initial_params is None else [joint.pack(initial_params).reshape(-1, joint.dim).to(torch.float64)]
    given += [] if start is None else [start.to(joint.device, torch.float64)]
    return torch.cat(given) if given else None


def _two_kinds(
    joint: LogJoint, num: int, near: Tensor | None, start: Tensor | None, progress: bool
) -> tuple[tuple[Population, Population], tuple[str, str]]:
    """A population by search and one tempered from the prior, from given points, or from a wide law; what they are."""
    with warnings.catch_warnings(), tqdm(total=2, desc="Populations", disable=not progress, leave=False) as bar:
        warnings.filterwarnings("ignore", "The population is poor", RuntimeWarning)  # the audit says so
        warnings.filterwarnings("ignore", "Tails may be cut", RuntimeWarning)
        first = populate(joint, num, hints=near)
        bar.update()
        second, kind = _second(joint, num, first, start)
        bar.update()
        return (first, second), ("search", kind)


def _second(joint: LogJoint, num: int, first: Population, start: Tensor | None) -> tuple[Population, str]:
    if start is not None:
        return populate(joint, num, start=start), "given points"
    try:
        joint.prior(1)
        return populate(joint, num, start="prior"), "prior"
    except (NotImplementedError, ValueError, RuntimeError) as error:
        logger.info("the second population does not start from the prior: %s", error)
    return populate(joint, num, start=_overdispersed(joint, first, num)), "wide law"


def _overdispersed(joint: LogJoint, first: Population, num: int) -> Tensor:
    """Points where the target is positive, of a law far wider than a population and than the starts of a search."""
    centre = first.weights @ first.points
    factor = torch.linalg.cholesky(
        (first.points - centre).T @ (first.weights[:, None] * (first.points - centre))
        + 1e-12 * torch.eye(joint.dim, dtype=centre.dtype, device=centre.device)
    )
    half = torch.full((2,), 0.5, dtype=centre.dtype, device=centre.device)
    usual = 5.0 * torch.eye(joint.dim, dtype=centre.dtype, device=centre.device)
    law = StudentMixture(
        half.log(), torch.stack([centre, 0 * centre]), torch.stack([4.0 * factor, usual]), torch.full_like(half, 3.0)
    )
    points = law.sample(4 * num)
    return points[torch.isfinite(joint.log_prob(points))][:num]


def audit_with(
    joint: LogJoint,
    populations: tuple[Population, ...],
    draws: Tensor | None,
    *,
    max_modes: int = 20,
    kinds: tuple[str, ...] = (),
) -> ModeAudit:
    """Modes of one or two populations and draws, with their shares.

    Args:
        joint: The target.
        populations: One, a run's own, or two that differ in kind; in the target's coordinates.
        draws: Unconstrained draws ``(chain, draw, dim)``, or None.
        max_modes: Clusters looked for.
        kinds: What the populations are.
    """
    clouds = [population.points[population.resample(POOLED)] for population in populations]
    if draws is not None:
        flat = draws.flatten(0, 1)
        clouds.append(flat[torch.linspace(0, len(flat) - 1, min(POOLED, len(flat))).round().long()])
    cores = [population.core for population in populations]
    hints = [core.locs[core.log_weights.argsort(descending=True)] for core in cores if len(core.locs) > 1]
    modes = find_modes(joint, torch.cat([cloud.double().cpu() for cloud in clouds]), max_modes, hints)
    return _made(joint, populations, modes, draws, kinds)


def _made(
    joint: LogJoint, populations: tuple[Population, ...], modes: Modes, draws: Tensor | None, kinds: tuple[str, ...]
) -> ModeAudit:
    inside = [modes.labels(population.points)[:, None] == torch.arange(modes.num) for population in populations]
    weights = [population.weights.double().cpu() for population in populations]
    shares = torch.stack([w @ member.double() for w, member in zip(weights, inside)]).clamp(0, 1)  # they round
    sizes = torch.tensor([effective_size(population) for population in populations], dtype=torch.float64)
    pooled = ((sizes[:, None] * shares).sum(0) / sizes.sum()).clamp(0, 1)
    spread = torch.stack([w.square() @ (member.double() - pooled).square() for w, member in zip(weights, inside)])
    binomial = pooled * (1 - pooled) / sizes[:, None]  # the first is blind to a mode that the population missed
    errors = torch.maximum(spread, binomial).sqrt()
    by_chain = chain_shares = chain_errors = chain_sizes = None
    if draws is not None:
        labels = modes.labels(draws.flatten(0, 1)).reshape(draws.shape[:2])
        by_chain = torch.stack([(labels == k).double().mean(1) for k in range(modes.num)], 1)
        chain_shares = by_chain.mean(0)
        chain_errors = _chain_errors(draws, by_chain, labels, pooled)
        chain_sizes = _chain_sizes(draws) if modes.num > 1 else torch.ones(len(draws), dtype=torch.float64)
    order = pooled.argsort(descending=True)
    centres = modes.centres[order]
    places, place_names = _places(joint, centres)
    given = [None if value is None else value[..., order] for value in (chain_shares, chain_errors, by_chain)]
    return ModeAudit(
        shares=shares[:, order],
        errors=errors[:, order],
        centres=centres,
        names=number_names(joint.site_shapes),
        chain_shares=given[0],
        chain_errors=given[1],
        by_chain=given[2],
        populations=populations,
        evaluations=0,
        places=places,
        place_names=place_names,
        chain_sizes=chain_sizes,
        kinds=kinds,
    )


def _places(joint: LogJoint, centres: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Centres in the sites' own space, where each site has as many numbers there; and what they are called."""
    own, columns, names = joint.constrain(centres), [], list[str]()
    for name, free in joint.unpack(centres).items():
        same = own[name].shape == free.shape
        columns.append((own[name] if same else free).double().cpu().reshape(len(centres), -1))
        names += number_names({name if same else f"unconstrained {name}": free.shape[1:]})
    return torch.cat(columns, 1), tuple(names)


def _chain_sizes(draws: Tensor) -> Tensor:
    """Effective draws of each chain by itself, of its slowest coordinate. Shape ``(C,)``."""
    num_chains, num_draws, dim = draws.shape
    if num_draws < 4:
        return draws.new_full((num_chains,), num_draws).double().cpu()
    alone = draws.double().transpose(0, 1).reshape(1, num_draws, num_chains * dim)
    sizes = site_diagnostics(alone)["n_eff"].reshape(num_chains, dim)
    return sizes.nan_to_num(1.0).amin(1).clamp(1, num_draws).cpu()


def _chain_errors(draws: Tensor, by_chain: Tensor, labels: Tensor, pooled: Tensor) -> Tensor:
    """Standard errors of the chains' shares, no smaller than the run itself would claim."""
    num_chains, num_draws = labels.shape
    if len(pooled) == 1:  # there is nothing to be off by
        return torch.zeros_like(pooled)
    if num_draws >= 4:
        n_eff = float(site_diagnostics(draws.double())["n_eff"].nan_to_num(0.0).min())
    else:
        n_eff = float(num_chains * num_draws)
    size = min(max(n_eff, 1.0), num_chains * num_draws)
    claimed = pooled * (1 - pooled) / size
    if num_chains < 2 or num_draws == 1:
        return claimed.sqrt()
    return torch.maximum(claimed, by_chain.var(0) / num_chains).sqrt()


def audit_or_why(
    x: Any,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    audit: str | bool | ModeAudit | None,
    progress: bool = True,
) -> tuple[ModeAudit | None, str]:
    """The audit of a run or posterior by two populations; or None, and why."""
    if isinstance(audit, ModeAudit):
        return audit, ""
    if not audit:
        return None, "audit=None"
    if model is None and is_container(x):
        return None, "pass model and args for the audit"
    try:
        if model is not None:
            return mode_audit(x, model, args=args, kwargs=kwargs, progress=progress), ""
        return mode_audit(x, progress=progress), ""
    except (ValueError, NotImplementedError) as error:
        return None, f"no audit: {error}"


def lines_of_audit(audit: ModeAudit) -> list[Line]:
    """Its lines under the report's names; a larger audit is asked for by the words that `report` understands."""
    larger = f"pass audit=mode_audit(..., num_particles={4 * len(audit.populations[0].points)})"
    larger = 'pass audit="full"' if len(audit.populations) == 1 else larger
    return [replace(line, name=f"modes: {line.name}", note=line.note.replace(MORE, larger)) for line in audit.lines]
