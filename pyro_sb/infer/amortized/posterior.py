"""Posterior p(theta | y) at one observation, or at a batch: draws, weighted draws, chains, and a guide."""

import logging
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from pyro_sb.bridges.base import Bridge
from pyro_sb.checks import finite, flag, floats, whole
from pyro_sb.infer.amortized.features import Features, Observation
from pyro_sb.infer.amortized.importance import ImportanceDraws, weigh
from pyro_sb.infer.amortized.latent_law import GuideLaw, LatentLaw, Residuals
from pyro_sb.infer.amortized.paired import BatchJoint, paired_joint, refuse_split_events
from pyro_sb.infer.amortized.prior import log_prior_ratio
from pyro_sb.infer.amortized.refresh import BridgeRefresh
from pyro_sb.infer.amortized.rows_guide import RowsGuide
from pyro_sb.infer.amortized.simulator import Simulations, Simulator
from pyro_sb.infer.amortized.surprise import Surprise, surprise
from pyro_sb.infer.mcmc.mcmc import MCMC
from pyro_sb.infer.model.log_joint import log_joint
from pyro_sb.infer.model.run import Run
from pyro_sb.infer.population.tempering import NormalLaw, temper, weighted_factor
from pyro_sb.threads import chosen_threads
from pyro_sb.warn import warn

__all__ = ["Posterior"]

logger = logging.getLogger(__name__)
Sites = dict[str, Tensor]
WORST_K, LEAST_SHARE = 0.7, 0.02
FAIR_SHARE = 0.5  # effective share above which a large k comes from a few tail draws, which a start does not feel
MOST_NUMBERS = 2**26  # in the metrics of tempered particles


class Posterior:
    r"""Posterior of one observation, or of B of them side by side; made by `AmortizedPosterior.condition`.

    Draws are of the model's latent sites in their own space. For a batch every site has the batch after the draws,
    ``(n, B, *site)``. ``sample`` is the bridge alone; ``importance`` and ``mcmc`` are corrected by the model.

    It is a guide: ``Predictive(model, guide=posterior, num_samples=100)`` and
    ``pyro.infer.Importance(conditioned_model, guide=posterior)`` work, for one observation.

    Attributes:
        rounds: What each round of `AmortizedPosterior.sharpen` did; empty where there were none.
    """

    def __init__(
        self,
        bridge: Bridge,
        *,
        residuals: Residuals,
        simulator: Simulator,
        features: Features,
        observation: Observation,
        fitted_on: Simulations,
    ) -> None:
        self.bridge, self.simulator, self.observation = bridge, simulator, observation
        values = observation.values
        self.law = LatentLaw(bridge, residuals, features.context(values), features.design(values))
        self.features = features
        self._fitted_on = fitted_on
        self.rounds: tuple[Any, ...] = ()
        self._target: Any = None
        self._cached: Sites | None = None

    def __repr__(self) -> str:
        values, data = self.observation.values, self.simulator.data
        shapes = {name: tuple(shape) for name, shape in self.simulator.runs.shapes.items() if name not in data.shapes}
        sites = ", ".join(f"{name} {shapes[name]}" for name in self.simulator.prototype.transforms)
        of = f"{len(values)} observations" if self.observation.batched else "one observation"
        gone = int(torch.isnan(values).sum())
        return (
            f"Posterior of {sites} by a fitted {self.bridge.describe()}\n"
            f"given {of} of {', '.join(data.shapes)} ({data.dim} numbers{f', {gone} missing' * bool(gone)})\n"
            f"sample() is the bridge alone; {self._corrections()}"
        )

    def _corrections(self) -> str:
        """Corrections that there are, in words."""
        if not self.simulator.has_density and (self.simulator.returned or self.simulator.hidden):
            return "there are no corrections: the model has no density"
        return "importance() and mcmc() are corrected by the model"

    def sample(self, num_samples: int = 1000) -> Sites:
        """Uncorrected draws, in one shot. Shape ``(num_samples, *site)``, with a batch ``(num_samples, B, *site)``."""
        return self._constrained(self.law.sample(whole("num_samples", num_samples)))

    def log_prob(self, sites: Sites) -> Tensor:
        r"""Log density of the bridge at latent sites in their own space, without the model.

        Args:
            sites: As `sample` gives them: ``(*, *site)``, for a batch ``(*, B, *site)``.

        Returns:
            Shape ``(*,)``, for a batch ``(*, B)``.

        Raises:
            NotImplementedError: The bridge knows the density of its paths alone (VSDM): use `importance`.
        """
        if not self.law.marginal:
            raise NotImplementedError(
                f"{type(self.bridge).__name__} has no exact density of a point, its draws carry that of their path. "
                'Use importance() or mcmc(), or fit with bridge="light".'
            )
        transforms = self.simulator.prototype.transforms
        sites = self._read_sites(sites)
        free = {name: transform(sites[name]) for name, transform in transforms.items()}
        u = self.simulator.prototype.packing.pack(free)
        u = u if self.observation.batched else u[..., None, :]
        with torch.no_grad():
            value = self.law.log_prob(u)
        for name, transform in transforms.items():
            term = transform.log_abs_det_jacobian(sites[name], free[name])
            lead = u.shape[:-1] if self.observation.batched else u.shape[:-2]
            term = term.reshape(*lead, -1).sum(-1)
            value = value + (term if self.observation.batched else term[..., None])
        return value if self.observation.batched else value[..., 0]

    def _read_sites(self, sites: Any) -> Sites:
        """Latent sites in their own space, of one lead."""
        packing = self.simulator.prototype.packing
        if not isinstance(sites, dict) or not set(packing.shapes) <= set(sites):
            came = sorted(map(str, sites)) if isinstance(sites, dict) else type(sites).__name__
            raise ValueError(f"sites must be a dict of the latents {list(packing.shapes)}, got {came}.")
        like = torch.empty(0, dtype=packing.dtype, device=self.observation.values.device)
        read = {name: finite(name, floats(name, sites[name], like)) for name in packing.shapes}
        leads = set()
        for name, value in read.items():
            inner = self.simulator.runs.shapes[name]
            lead = value.shape[: value.dim() - len(inner)]
            if value.dim() < len(inner) or value.shape[len(lead) :] != inner:
                raise ValueError(f"{name} must have shape (*, {', '.join(map(str, inner))}), got {tuple(value.shape)}.")
            leads.add(lead)
        batch = len(self.observation.values)
        if len(leads) > 1 or (self.observation.batched and (not leads or next(iter(leads))[-1:] != (batch,))):
            raise ValueError(
                f"sites must share their leading shape, for a batch one that ends in {batch}, got "
                f"{sorted(map(tuple, leads))}. Pass them as sample() gives them."
            )
        return read

    def importance(self, num_samples: int = 2000) -> ImportanceDraws:
        r"""Weighted draws, exact in the limit; a warning where Pareto's k says that the weights cannot be trusted.

        Args:
            num_samples: Draws an observation, at least 25.
        """
        u, log_weights, _ = self._weighted(whole("num_samples", num_samples, 25))
        result = weigh(self._constrained(u), log_weights, self.observation.batched)
        k_hat, share = torch.as_tensor(result.k_hat).reshape(-1), torch.as_tensor(result.ess_share).reshape(-1)
        flagged = ~(k_hat <= WORST_K)
        if bool(flagged.any()):
            warn(
                f"Pareto k of the importance weights is above {WORST_K} at {int(flagged.sum())} of {len(k_hat)} "
                f"observations (largest {float(k_hat.max()):.2f}, effective share there at least "
                f"{float(share[flagged].min()):.3f}): means under those weights may rest on a few draws. Use mcmc(), "
                "or fit on more simulations.",
            )
        return result

    def with_prior(self, prior: Any, num_samples: int = 4000) -> ImportanceDraws:
        r"""The posterior under another prior :math:`p'`, by weights :math:`p'(\theta) / p(\theta)`: nothing is fitted.

        .. math:: p'(\theta | y) \propto p(\theta | y)\, \frac{p'(\theta)}{p(\theta)}

        It is as right as the bridge is: for a model with a density, condition the model with the new prior instead.
        The other prior can be narrower, or elsewhere within the first, not wider than it.

        Args:
            prior: Pyro model of the same latents, with its ``pyro.sample`` sites alone; called with the model's
                arguments.
            num_samples: Draws an observation, at least 25.

        Returns:
            Weighted draws; ``log_evidence`` is that of the data under the new prior less that under the old one.

        Raises:
            ValueError: Other latents, or latents of other shapes.

        Warns:
            RuntimeWarning: The new prior lies too far from where the posterior is: Pareto's k above 0.7, or under 2 %
                of the draws left.

        Example:
            >>> import torch, pyro, pyro.distributions as dist
            >>> from pyro_sb.infer import AmortizedPosterior
            >>> def model():
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0))
            >>> def sceptic():
            ...     pyro.sample("mu", dist.Normal(0.0, 0.5))
            >>> amortized = AmortizedPosterior(model, bridge="light")
            >>> history = amortized.fit(num_simulations=500, num_updates=200, progress=False)
            >>> weighted = amortized.condition(torch.tensor(1.0)).with_prior(sceptic)
            >>> bool((weighted.expectation(weighted.sites["mu"]) - 0.2).abs() < 0.1)
            True
        """
        if not callable(prior) or isinstance(prior, Distribution):
            raise TypeError(
                f"prior must be a Pyro model of the latents, got {type(prior).__name__}. Write a function with a "
                "pyro.sample site for each."
            )
        u = self.law.sample(whole("num_samples", num_samples, 25))
        free = self.simulator.prototype.packing.unpack(u.flatten(0, 1))
        rows = {name: t.inv(free[name]) for name, t in self.simulator.prototype.transforms.items()}
        log_weights = log_prior_ratio(self.simulator, prior, rows).reshape(u.shape[:2])
        result = weigh(self._constrained(u), log_weights, self.observation.batched)
        k_hat, share = torch.as_tensor(result.k_hat).reshape(-1), torch.as_tensor(result.ess_share).reshape(-1)
        poor = ~(k_hat <= WORST_K) & ~(share >= FAIR_SHARE) | ~(share >= LEAST_SHARE)
        if bool(poor.any()):
            warn(
                f"the new prior lies far from the posterior under the old one, at {int(poor.sum())} of {len(share)} "
                f"observations (Pareto k up to {float(k_hat.max()):.2f}, {float(share.min()):.1%} of the draws left): "
                "means under those weights may rest on a few draws. Fit with the new prior, or an AmortizedLikelihood, "
                "which knows no prior.",
            )
        return result

    def mcmc(
        self,
        num_samples: int = 200,
        num_chains: int = 64,
        warmup_steps: int | None = None,
        num_proposals: int = 4096,
        progress: bool = False,
    ) -> MCMC:
        r"""Chains that are exact whatever the bridge: refreshes from it, and Hamiltonian Monte Carlo on the log joint.

        They start from draws resampled by weight. Where the weights' Pareto k is above 0.7 and their effective size
        under a half, or under 2 %, they start from tempered sequential Monte Carlo between the bridge's density and the
        joint, and a warning says so; ``mcmc.kernel.describe()`` says which it was.

        Args:
            num_samples: Draws a chain.
            num_chains: Chains an observation.
            warmup_steps: Steps before the first draw that is kept, of moves that are tuned before. None: 32.
            num_proposals: Draws that the start is made of, at least ``num_chains``.
            progress: Show a bar.

        Returns:
            `MCMC` that has run: ``get_samples``, ``diagnostics``, ``summary``, `to_arviz`. Sites of a batch have the
            shape ``(draws, B, *site)``.
        """
        num_samples, num_chains = whole("num_samples", num_samples), whole("num_chains", num_chains)
        warmup_steps = None if warmup_steps is None else whole("warmup_steps", warmup_steps, 0)
        progress = flag("progress", progress)
        num_proposals = max(whole("num_proposals", num_proposals), num_chains, 25)
        u, log_weights, target = self._weighted(num_proposals)
        figures = weigh({}, log_weights, batched=True)
        k_hat, share = torch.as_tensor(figures.k_hat), torch.as_tensor(figures.ess_share)
        poor = (~(k_hat <= WORST_K) & ~(share >= FAIR_SHARE)) | ~(share >= LEAST_SHARE)
        facts: dict[str, Any] = {"k_hat": float(k_hat.max()), "effective share": float(share.min())}
        if bool(poor.any()):
            starts, evidence = self._tempered(u, target, num_proposals, facts, int(poor.sum()))
            factor = weighted_factor(starts, torch.full_like(starts[..., 0], 1 / len(starts)))
        else:
            weights = torch.softmax(log_weights, 0)
            factor = weighted_factor(u, weights.to(u))
            index = torch.multinomial(weights.T, num_proposals, replacement=True).T
            starts = torch.gather(u, 0, index[..., None].expand(*index.shape, u.shape[-1]))
            evidence, facts["start"] = torch.as_tensor(figures.log_evidence), "weighted draws"
        facts["log evidence"] = evidence.tolist() if self.observation.batched else float(evidence[0])
        logger.info("mcmc starts from %s: %s", facts["start"], facts)
        kernel = self._kernel(target, starts, factor, facts)
        chains = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=not progress)
        chains.run(*self.simulator.args, **self.simulator.kwargs)
        return chains

    def _kernel(self, target: Any, starts: Tensor, factor: Tensor, facts: dict[str, Any]) -> BridgeRefresh:
        model = None if self.observation.batched or self.observation.missing else self._model()
        return BridgeRefresh(self.law, target, starts, factor, model=model, facts=facts)

    def saved_kernel(self, learnt: dict[str, Any]) -> BridgeRefresh:
        """The kernel of `mcmc` from what it had learnt, for `MCMC.load`."""
        return self._kernel(self._joint(), learnt["starts"], learnt["factor"], dict(learnt["facts"]))

    def _tempered(
        self, u: Tensor, target: Any, num: int, facts: dict[str, Any], num_poor: int
    ) -> tuple[Tensor, Tensor]:
        """Starts by tempering, and the log evidence; a warning says so."""
        law: Any = self.law
        if not self.law.marginal:
            law = NormalLaw(u.mean(0), 1.5 * weighted_factor(u, torch.full_like(u[..., 0], 1 / len(u))))
        most = MOST_NUMBERS // (u.shape[1] * u.shape[2] * u.shape[2])  # a metric a row
        num = max(128, min(num, most))
        with chosen_threads(u):  # many short levels: modes of many widths, from a start that is poor
            particles = temper(
                law,
                target,
                num,
                sweeps=8,
                final_sweeps=20,
                num_steps=6,
                spread=10.0,
                max_levels=60,
                cure="a larger num_proposals, or fit on more simulations",
            )
        facts |= {"start": "tempered", "levels": particles.num_levels}
        warn(
            f"the bridge's weights are poor (Pareto k {facts['k_hat']:.2f}, effective share "
            f"{facts['effective share']:.3f}, at {num_poor} of {u.shape[1]} observations): the chains start from "
            f"tempered sequential Monte Carlo ({particles.num_levels} levels). Their moves are exact; shares of modes "
            f"may be off, as that start decides them: raise num_proposals (now {num}).",
        )
        return particles.points[torch.randperm(num, device=u.device)], particles.log_evidence

    def _weighted(self, num: int) -> tuple[Tensor, Tensor, Any]:
        """Draws ``(n, B, d)``, their log weights ``(n, B)``, and the log joint."""
        with chosen_threads(self.observation.values):
            target = self._joint()
            u, log_q = self.law.draws(num)
            log_p = target.log_prob(u.reshape(-1, u.shape[-1])).reshape(log_q.shape)
        log_weights = torch.where(torch.isfinite(log_p) & torch.isfinite(log_q), log_p - log_q, -torch.inf)
        return u, log_weights, target

    def _joint(self) -> Any:
        """The log joint at the observation: of the conditioned model, or of pairs for a batch or missing entries."""
        if self._target is None:
            source, observation = self.simulator, self.observation
            if source.returned or observation.batched or observation.missing:
                pairs = paired_joint(source, self._fitted_on, masked=observation.missing)
                values, batch = observation.values, torch.Size([len(observation.values)] if observation.batched else [])
                if observation.missing:
                    present = ~torch.isnan(values)
                    refuse_split_events(source, present)
                    fill = self._fitted_on.observations[:1].to(values)
                    values = torch.cat([torch.where(present, values, fill), present.to(values)], -1)
                self._target = BatchJoint(pairs, values, source, batch)
            else:
                self._target = log_joint(self._model(), args=source.args, kwargs=source.kwargs)
        return self._target

    def _model(self) -> Any:
        sites = self.simulator.data.unpack(self.observation.values[0])
        return self.simulator.conditioned(sites)

    def __call__(self, *args: Any, **kwargs: Any) -> Sites:
        """The guide: a joint draw of all latents at an auxiliary site, and a point mass at every latent site."""
        if self.observation.batched:
            raise ValueError(
                f"a guide has one observation, got {len(self.observation.values)}. Write condition(y[i]) for one, or "
                'condition(y).in_plate("rows") for a plate of them.'
            )
        fn = GuideLaw(self.law)
        u = pyro.sample("_posterior_latent", fn, infer={"is_auxiliary": True})
        packing, transforms = self.simulator.prototype.packing, self.simulator.prototype.transforms
        free, result = packing.unpack(u), {}
        plates = self.simulator.runs.batch_shapes
        for name, transform in transforms.items():
            value = transform.inv(free[name])
            event_dim = value.dim() - len(plates[name])
            density = transform.log_abs_det_jacobian(value, free[name])
            while density.dim() > len(plates[name]):
                density = density.sum(-1)
            with poutine.block(hide_fn=lambda site: site["type"] != "sample"):
                result[name] = pyro.sample(name, dist.Delta(value, log_density=density, event_dim=event_dim))
        return result

    @property
    def guide(self) -> "Posterior":
        """The posterior as a guide of the model: ``Predictive(model, guide=posterior.guide, num_samples=100)``."""
        return self

    def in_plate(self, name: str, dim: int = -1) -> RowsGuide:
        r"""A guide of the local latents of a plate, a row for each observation of the batch.

        Amortised variational inference: the rows' latents come from the amortised posterior, which stays as it is, and
        the larger model's global latents from another guide, which is trained.

        Args:
            name: Of the plate in the larger model; its rows are those of the batch, in their order.
            dim: Of the plate, negative.

        Returns:
            A guide for ``AutoGuideList.append``, or to be called inside one of yours.

        Raises:
            ValueError: One observation; or a simulator with plates of its own.

        Example:
            >>> def row(mu=torch.tensor(0.0)):
            ...     z = pyro.sample("z", dist.Normal(mu, 1.0))
            ...     pyro.sample("y", dist.Normal(z, 0.5))
            >>> amortized = AmortizedPosterior(row)  # doctest: +SKIP
            >>> guide = AutoGuideList(model)  # doctest: +SKIP
            >>> guide.append(AutoNormal(poutine.block(model, hide=["z"])))  # doctest: +SKIP
            >>> guide.append(amortized.condition(y).in_plate("rows"))  # doctest: +SKIP
        """
        plated = [site for site, shape in self.simulator.runs.batch_shapes.items() if len(shape)]
        if not self.observation.batched or plated:
            got = f"plates over {plated}" if plated else "one observation"
            raise ValueError(
                f"in_plate needs a batch of observations of a simulator of one row, without plates, got {got}. Write "
                "AmortizedPosterior(row_model) and condition(y) with a row an observation."
            )
        prototype = self.simulator.prototype
        return RowsGuide(
            self.law, prototype.packing, dict(prototype.transforms), name, len(self.observation.values), dim
        )

    @property
    def num_fitted(self) -> int:
        """How many simulations of the fit it keeps: at most 256."""
        return len(self._fitted_on.latents)

    def surprise(self) -> Surprise:
        """Place of the observation among some simulations of the fit; among all of them: `AmortizedPosterior`'s."""
        return surprise(self.observation, self._fitted_on.observations, self.features)

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> Sites:
        """Uncorrected draws, made once: four chains of 1000, for `to_arviz` and ``Predictive``; more are fresh."""
        if num_samples is not None and num_samples > 4000:
            return self.sample(num_samples)
        if self._cached is None:
            self._cached = self.sample(4000)
        draws = {name: value.unflatten(0, (4, 1000)) for name, value in self._cached.items()}
        if group_by_chain:
            return draws
        flat = {name: value.flatten(0, 1) for name, value in draws.items()}
        return flat if num_samples is None else {name: value[:num_samples] for name, value in flat.items()}

    def as_run(self) -> Run:
        """Uncorrected draws, four chains of 1000, with the conditioned model: as reports and exports read them."""
        draws = partial(self.get_samples, group_by_chain=True)
        return Run(draws, self.model, self.simulator.args, self.simulator.kwargs)

    @property
    def model(self) -> Any:
        """The conditioned model; None for a batch, for missing entries, and for a black-box simulator."""
        if self.observation.batched or self.observation.missing or self.simulator.returned:
            return None
        return self._model()

    def _constrained(self, u: Tensor) -> Sites:
        """``(n, B, d)`` to sites in their own space, without the batch where there is one observation."""
        u = u if self.observation.batched else u[:, 0]
        free = self.simulator.prototype.packing.unpack(u)
        return {name: t.inv(free[name]) for name, t in self.simulator.prototype.transforms.items()}
