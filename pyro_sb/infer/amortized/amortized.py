"""Amortised posterior p(theta | y) of a Pyro model: simulated, fitted once, conditioned on any y, and corrected."""

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sb.bridges.base import Bridge
from pyro_sb.bridges.diffusion.vsdm import VSDM
from pyro_sb.bridges.light.light import LightSB
from pyro_sb.checks import flag, number, whole
from pyro_sb.files import read_file, write_file
from pyro_sb.infer.amortized.choice import (
    build,
    candidates,
    check_bridge_options,
    fit_bridge,
    held_out_score,
    nearest,
)
from pyro_sb.infer.amortized.features import Features, Observation, read_observation
from pyro_sb.infer.amortized.paired import PairedJoint, paired_joint
from pyro_sb.infer.amortized.posterior import Posterior
from pyro_sb.infer.amortized.rounds import sharpened
from pyro_sb.infer.amortized.saved import packed_posterior, unpacked_posterior, words_for
from pyro_sb.infer.amortized.simulator import Simulations, Simulator, simulator
from pyro_sb.infer.amortized.surprise import Surprise, surprise
from pyro_sb.infer.amortized.training_set import Store, TrainingSet, exchangeable_sites, training_set
from pyro_sb.threads import chosen_threads
from pyro_sb.training import FitHistory
from pyro_sb.warn import warn

__all__ = ["AmortizedPosterior"]

logger = logging.getLogger(__name__)


class AmortizedPosterior:
    r"""Posterior :math:`p(\theta | y)` of a Pyro model for every y at once, learnt from simulations.

    ``fit`` simulates the model, takes its latents to :math:`\mathbb{R}^d` (draws never leave the prior's support),
    regresses them on the observation, and fits a conditional bridge to the whitened residuals. ``condition(y)`` gives a
    `Posterior` that samples in one shot, and that the model itself corrects: by importance weights, or by chains.

    **The model's density serves the fit too.** Where the observed sites have a ``log_prob``, every simulated pair is
    rejuvenated: Hamiltonian Monte Carlo moves :math:`\theta` within :math:`p(\theta | y)`, where it already is an exact
    draw, so that one simulation gives many latents. The simulator is not called for them; ``num_copies=0`` does
    without.

    **Exchangeable observations** are found by the log joint itself, which a permutation must leave as it is; the bridge
    then sees permutation-invariant summaries, or the ``embedding``.

    Args:
        model: Pyro model whose observed sites are left open; or a black-box simulator, a function with ``pyro.sample``
            prior sites that returns its observation (a tensor, or a dict by name): it has no corrections.
        observed: Names of the observed sites.
        bridge: ``"light"``, a conditional mixture with an exact density and one-shot draws; ``"vsdm"``, a diffusion; a
            bridge or its class; or a function ``(dim, context_dim)``. None: light or VSDM, by held-out score.
        embedding: Module from the flat, standardised observation ``(N, data_dim)`` to features, learnt with the
            bridge; `pyro_sb.nn.SetEmbedding` for exchangeable items.

    Attributes:
        bridge: The fitted bridge.
        scores: Held-out log density of each bridge that was tried, in nats.
        simulations: What was simulated: ``fit(simulations=...)`` learns from it again.
        exchangeable: Number of items of each observed site that was found exchangeable.

    References:
        Neural posterior estimation: Papamakarios and Murray (2016), https://arxiv.org/abs/1605.06376. Bridges as the
        conditional density, rejuvenation, and the corrections are ours.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 5):
        ...         pyro.sample("y", dist.Normal(mu, 0.5))
        >>> amortized = AmortizedPosterior(model, bridge="light")
        >>> history = amortized.fit(num_simulations=500, num_updates=200, progress=False)
        >>> posterior = amortized.condition(torch.tensor([1.0, 0.5, 1.4, 0.2, 1.1]))
        >>> posterior.sample(1000)["mu"].shape
        torch.Size([1000])
        >>> posterior.importance(1000).ess_share > 0.5
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        observed: tuple[str, ...] = ("y",),
        *,
        bridge: Any = None,
        embedding: nn.Module | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a Pyro model, a function, got {type(model).__name__}.")
        if embedding is not None and not isinstance(embedding, nn.Module):
            raise TypeError(f"embedding must be a module, got {type(embedding).__name__}. Write SetEmbedding(2, 16).")
        self.model = model
        names = (observed,) if isinstance(observed, str) else observed
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f'observed must name sites, got {observed!r}. Write observed=("y",).')
        self.observed = tuple(names)
        self.embedding = embedding
        self._candidates = candidates(bridge)
        self.bridge: Bridge | None = None
        self.scores: dict[str, float] = {}
        self.simulations: Simulations | None = None
        self.exchangeable: dict[str, int] = {}

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        head = f"AmortizedPosterior of {name} given {', '.join(self.observed)}"
        if self.bridge is None:
            return f"{head}: not fitted, to learn with {' or '.join(self._candidates)}"
        assert self.simulations is not None
        data = self._source.data
        sites = ", ".join(
            f"{site} {tuple(self._source.runs.shapes[site])}" for site in self._source.prototype.transforms
        )
        lines = [
            head,
            f"  latents: {sites}; {self._source.dim} unconstrained numbers",
            f"  observation: {', '.join(f'{site} {tuple(shape)}' for site, shape in data.shapes.items())}",
            f"  fitted: {self.bridge.describe()}, on {len(self.simulations.latents)} simulations",
        ]
        scores = {site: f"{score:.2f}" for site, score in self.scores.items() if score == score}
        if scores:
            shown = ", ".join(f"{site} {score}" for site, score in scores.items())
            lines.append(f"  held-out log density: {shown} nats")
        if self.exchangeable:
            lines.append(f"  exchangeable items: {', '.join(f'{n} of {k}' for k, n in self.exchangeable.items())}")
        return "\n".join(lines)

    def fit(
        self,
        *model_args: Any,
        num_simulations: int = 10_000,
        simulations: Simulations | None = None,
        keep_finite: bool = False,
        num_copies: int | None = None,
        missing: float = 0.0,
        held_out: float = 0.1,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        num_updates: int | None = None,
        bridge_options: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> FitHistory:
        r"""Simulate, and learn.

        Args:
            *model_args: The model's positional arguments, the same for every observation: covariates, sizes.
            num_simulations: Runs of the model, at least 1; a useful fit needs some hundreds.
            simulations: Earlier `simulations`, instead of new ones.
            keep_finite: Learn from the finite simulations where others are not, instead of an error.
            num_copies: Rejuvenated copies of each simulation. None: up to 100,000 rows in all where the model has a
                batched density; 0: none, simulations alone.
            missing: Largest share of an observation's entries that may be missing (NaN) in ``condition``, in [0, 1).
                Rows are then trained with random entries hidden.
            held_out: Share of the simulations that the fit is judged by, in (0, 1).
            progress: Show bars.
            checkpoint: Path of the bridge's checkpoints; with two bridges to try, their names are added to it. The
                simulations lie beside it until the fit ends: called again with the same arguments, a fit that was cut
                off goes on with them, and VSDM with its training.
            num_updates: Updates of the bridge's fit. None: its default.
            bridge_options: Further options of the bridge's ``fit``.
            **model_kwargs: The model's keyword arguments. A name that is neither an option nor an argument of the
                model is refused.

        Returns:
            History of the chosen bridge's fit. Its seconds are those of all of it, simulation included.

        Raises:
            TypeError: An option that neither ``fit``, nor the model, nor a bridge's ``fit`` has.
            ValueError: A missing observed site; no continuous latent; simulations that are not finite; bad numbers.
        """
        begun = time.perf_counter()
        missing = number("missing", missing, "[0, 1)", "Omit it for whole observations.")
        held_out = number("held_out", held_out, "(0, 1)", "Write 0.1.")
        num_copies = None if num_copies is None else whole("num_copies", num_copies, 0)
        num_simulations = whole("num_simulations", num_simulations, cure="Write 10_000.")
        num_updates = None if num_updates is None else whole("num_updates", num_updates)
        keep_finite, progress = flag("keep_finite", keep_finite), flag("progress", progress)
        _check_options(self.model, type(self).fit, len(model_args), model_kwargs, _fit_names(self._candidates))
        check_bridge_options(self._candidates, bridge_options or {})
        source = simulator(self.model, self.observed, model_args, model_kwargs)
        words = words_for(self.model, self.observed, model_args, model_kwargs)
        words |= {"embedding": "none" if self.embedding is None else "one"}
        numbers: dict[str, Any] = {"num_simulations": num_simulations, "missing": missing, "held_out": held_out}
        numbers |= {"num_copies": num_copies, "keep_finite": keep_finite, "dtype": torch.get_default_dtype()}
        store = Store(checkpoint, words | {name: str(value) for name, value in numbers.items()})
        kept = store.read() if simulations is None else None
        if kept is not None:
            simulations = kept.simulations
        elif simulations is None:
            simulations = self._simulated(source, num_simulations, keep_finite, progress)
        else:
            _check_sizes(simulations, source)
            simulations = source.finite(simulations, keep_finite)
        _check_number(len(simulations.latents), source.dim, held_out)
        self.simulations = simulations
        joint = self._joint(source, simulations, num_copies)
        if kept is not None:
            self.exchangeable = kept.exchangeable
        else:
            self.exchangeable = exchangeable_sites(source, simulations, joint) if joint is not None else {}
        raw = self.embedding is not None
        features = Features(source.data, self.exchangeable, masked=missing > 0, raw=raw).fit(
            simulations.observations.to(simulations.latents)
        )
        if kept is not None:
            rows = kept.rows
        else:
            with chosen_threads(simulations.latents):
                rows = training_set(
                    source, simulations, features, joint, num_copies=num_copies, missing=missing, held_out=held_out
                )
            store.write(simulations, rows, self.exchangeable)
        options = (
            (bridge_options or {})
            | {"progress": progress}
            | ({} if num_updates is None else {"num_updates": num_updates})
        )
        history = self._fit_candidates(rows, len(simulations.latents), checkpoint, options)
        self._source, self._features, self._rows = source, features, rows.residuals
        self._fitted_on = Simulations(*(x[:256] for x in simulations))
        if not history.interrupted:
            store.clear()
        history.seconds = time.perf_counter() - begun
        return history

    def _simulated(self, source: Simulator, num: int, keep_finite: bool, progress: bool) -> Simulations:
        """Fresh simulations; those made before Ctrl-C are kept."""
        try:
            with chosen_threads(*source.args, *source.kwargs.values()):
                return source.simulate(num, keep_finite=keep_finite, progress=progress)
        except KeyboardInterrupt:
            if source.interrupted is not None:
                self.simulations = source.interrupted
                warn(
                    f"interrupted: {len(self.simulations.latents)} of {num} simulations were made and are kept. Write "
                    "fit(simulations=amortized.simulations) to learn from them.",
                )
            raise

    def condition(self, y: Any) -> Posterior:
        r"""The posterior given an observation, or given each of a batch.

        Args:
            y: A tensor in the observed site's shape, or with a batch of observations before it; a dict for several
                sites. NaN marks missing entries, where ``fit`` had ``missing > 0``.

        Raises:
            RuntimeError: ``fit`` was not called.
            ValueError: Another shape than was trained on; NaN without ``missing``.
        """
        if self.bridge is None:
            raise RuntimeError("condition needs a fitted posterior: call fit(*model_args, num_simulations=...) first.")
        observation: Observation = read_observation(y, self._source, self._features)
        return Posterior(
            self.bridge,
            residuals=self._rows,
            simulator=self._source,
            features=self._features,
            observation=observation,
            fitted_on=self._fitted_on,
        )

    def sharpen(
        self,
        y: Any,
        *,
        num_rounds: int = 5,
        num_simulations: int = 2000,
        mass: float = 0.9999,
        tolerance: float = 0.1,
        keep_finite: bool = False,
        progress: bool = True,
        num_updates: int | None = None,
    ) -> Posterior:
        r"""The posterior of one observation, or of some, learnt again from simulations where it has its mass.

        In each round parameters are drawn from the prior within the highest-density region of the posterior so far,
        :math:`p(	heta)\, 1_R(	heta)`, and simulated; a new bridge learns from these and from earlier ones within.
        Truncation leaves the posterior as it is where R holds it, so nothing is to be corrected. Simulations go where
        they count: for black boxes, for narrow posteriors, and for few observations. This amortised posterior stays as
        it is. Where the model has a density, ``condition(y).mcmc()`` is exact and cheaper.

        Args:
            y: As for `condition`, whole; for a batch the union of the regions is simulated.
            num_rounds: Most rounds; fewer where the posterior no longer moves.
            num_simulations: New runs of the simulator a round.
            mass: Share of the posterior that its region holds, in (0, 1).
            tolerance: Rounds end where no posterior mean moves as much, in posterior deviations, nor any log deviation.
            keep_finite: As in `fit`.
            progress: Show bars.
            num_updates: As in `fit`.

        Returns:
            Posterior, whose ``rounds`` say what was done; outside the regions it knows nothing.

        Raises:
            NotImplementedError: The bridge has the density of paths alone; missing entries.
            RuntimeError: ``fit`` was not called.

        Warns:
            RuntimeWarning: The first region is nearly all of the prior; the posterior still moves in the last round.

        References:
            Truncated proposals for scalable and hassle-free simulation-based inference (Deistler, Gonçalves and Macke,
            2022), https://arxiv.org/abs/2210.04815, algorithm 1. We resample from the posterior made wider, keep
            earlier simulations, and learn from the half whose data are nearest to y: the others feel R's edge.

        Example:
            >>> import torch, pyro, pyro.distributions as dist
            >>> def simulator():
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            ...     return {"y": mu + 0.1 * torch.randn(2)}
            >>> amortized = AmortizedPosterior(simulator, bridge="light")
            >>> history = amortized.fit(num_simulations=1000, progress=False)
            >>> y = torch.tensor([1.0, 1.1])
            >>> posterior = amortized.sharpen(y, num_rounds=1, num_simulations=1000, progress=False)
            >>> 0.0 < posterior.rounds[0].prior_share < 0.5
            True
        """
        num_rounds, num_simulations = whole("num_rounds", num_rounds), whole("num_simulations", num_simulations, 20)
        mass = number("mass", mass, "(0, 1)", "Write 0.9999.")
        tolerance = number("tolerance", tolerance, "[0, inf)", "Write 0.1.")
        num_updates = None if num_updates is None else whole("num_updates", num_updates)
        keep_finite, progress = flag("keep_finite", keep_finite), flag("progress", progress)
        if self.bridge is None or self.simulations is None:
            raise RuntimeError("sharpen needs a fitted posterior: call fit(*model_args, num_simulations=...) first.")
        posterior = self.condition(y)
        if posterior.observation.missing:
            raise NotImplementedError("sharpen needs whole observations, got missing entries. Write condition(y).")
        source, spec = self._source, self.bridge if "light" not in self._candidates else "light"

        def learn(pairs: Simulations) -> tuple[Posterior, bool]:
            local = AmortizedPosterior(self.model, self.observed, bridge=spec, embedding=self.embedding)
            options: dict[str, Any] = {"num_copies": 0, "progress": progress, "num_updates": num_updates}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*has not converged", RuntimeWarning)  # `Round` says so
                history = local.fit(*source.args, simulations=pairs, **options, **source.kwargs)
            return local.condition(y), history.converged

        return sharpened(
            posterior,
            self.simulations,
            learn,
            num_rounds=num_rounds,
            num_simulations=num_simulations,
            mass=mass,
            tolerance=tolerance,
            keep_finite=keep_finite,
            progress=progress,
        )

    def surprise(self, y: Any) -> Surprise:
        r"""Is this observation of the model's world? Its place among the simulations of the fit, with a p-value.

        A posterior of data that the model cannot make means nothing, and says nothing of it. The p-value is exact: on
        data of the model it is below .05 in 5 % of cases, whatever the number of simulations.

        Args:
            y: As for `condition`, whole; of a batch each observation is judged, and all of them together.

        Returns:
            p-values, and the numbers or summaries that stand out alone.

        References:
            Misspecification by the maximum mean discrepancy of summaries: Schmitt, Bürkner, Köthe and Radev (2021),
            https://arxiv.org/abs/2112.08866. Ranking among held-out simulations, which makes p exact, is conformal
            prediction: Vovk, Gammerman and Shafer (2005).

        Example:
            >>> import torch, pyro, pyro.distributions as dist
            >>> def model():
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1))
            >>> amortized = AmortizedPosterior(model, bridge="light")
            >>> history = amortized.fit(num_simulations=500, num_updates=100, progress=False)
            >>> amortized.surprise(torch.tensor([9.0, -9.0, 9.0])).p_value < 0.01
            True
        """
        if self.bridge is None or self.simulations is None:
            raise RuntimeError("surprise needs a fitted posterior: call fit(*model_args, num_simulations=...) first.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "y lies", RuntimeWarning)  # that is what is asked
            observation = read_observation(y, self._source, self._features)
        return surprise(observation, self.simulations.observations, self._features)

    def save(self, path: str | Path) -> None:
        """Write one file of tensors and plain values, whole or not at all, read back by `load` with the model.

        It holds the bridge, the simulations, the model's arguments, and a fingerprint of the model.
        """
        if self.bridge is None or self.simulations is None:
            raise RuntimeError("save needs a fitted posterior: call fit(*model_args, num_simulations=...) first.")
        figures = {
            "scores": dict(self.scores),
            "exchangeable": dict(self.exchangeable),
            "first": len(self._fitted_on[0]),
        }
        contents = packed_posterior(
            self.model, self._source, self._features, self._rows, self.simulations, bridge=self.bridge, figures=figures
        )
        write_file(contents, path)

    @classmethod
    def load(cls, path: str | Path, model: Callable[..., Any], map_location: Any = None) -> "AmortizedPosterior":
        """The posterior that `save` wrote, for the same model.

        Args:
            path: What `save` wrote. No code in the file is run.
            model: The model that it was fitted to: a file holds none.
            map_location: As in `torch.load`.

        Raises:
            ValueError: Another model, a file of other contents, or one that is torn or altered.
        """
        read = unpacked_posterior(read_file(path, map_location), model, str(path))
        amortized = cls(model, read.observed, bridge=type(read.bridge))
        source = simulator(model, read.observed, read.args, read.kwargs)
        read.check(source, str(path))
        amortized._source, amortized._features, amortized._rows = source, read.features(source), read.residuals
        amortized.bridge, amortized.simulations = read.bridge, read.simulations
        amortized.scores, amortized.exchangeable = read.figures["scores"], read.figures["exchangeable"]
        amortized._fitted_on = Simulations(*(x[: read.figures["first"]] for x in read.simulations))
        return amortized

    @property
    def simulator(self) -> Simulator:
        """The model as a giver of pairs, with the arguments of the last fit."""
        if self.bridge is None:
            raise RuntimeError("simulator needs a fitted posterior: call fit(*model_args, num_simulations=...) first.")
        return self._source

    def _joint(self, source: Simulator, pairs: Simulations, num_copies: int | None) -> PairedJoint | None:
        """The log joint of pairs where the model has one that runs in batches."""
        if not source.has_density:
            if num_copies:
                paired_joint(source, pairs)  # says why there are none
            return None
        joint = paired_joint(source, pairs)
        if joint.route == "loop" and num_copies is None:
            logger.info("the model's density runs row by row: simulations are not rejuvenated.")
            return None
        return joint

    def _fit_candidates(
        self, rows: TrainingSet, num: int, checkpoint: str | Path | None, options: dict[str, Any]
    ) -> FitHistory:
        """Fit each candidate and keep the one with the highest held-out score."""
        best: tuple[float, Bridge, FitHistory] | None = None
        self.scores = {}
        for name, spec in self._candidates.items():
            bridge = build(spec, rows.latents.shape[1], rows.context.shape[1], num, self.embedding)
            many = checkpoint is not None and len(self._candidates) > 1
            path = f"{checkpoint}.{name}" if many else checkpoint
            history = fit_bridge(bridge, rows, checkpoint=path, **options)
            score = held_out_score(bridge, rows) if len(self._candidates) > 1 or bridge.density else float("nan")
            self.scores[name] = score
            if best is None or score > best[0] or best[0] != best[0]:
                best = score, bridge, history
            if history.interrupted:
                break
        assert best is not None
        logger.info("held-out log density by bridge: %s", self.scores)
        self.bridge = best[1]
        return best[2]


def _fit_names(tried: dict[str, Any]) -> set[str]:
    """Keywords of the ``fit`` of the bridges to be tried; what a function will build is not known."""
    kinds: list[Any] = [{"light": LightSB, "vsdm": VSDM}.get(x, x) if isinstance(x, str) else x for x in tried.values()]
    known = [x for x in kinds if isinstance(x, Bridge) or (isinstance(x, type) and issubclass(x, Bridge))]
    parameters = [p for kind in known for p in inspect.signature(kind.fit).parameters.values()]
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _check_options(
    model: Any, fit: Callable[..., Any], num_args: int, given: dict[str, Any], of_bridge: set[str]
) -> None:
    """Keywords of nobody or of the bridge, and those of the model that ``fit`` has too, which would never reach it."""
    own = [n for n, p in inspect.signature(fit).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    bound = model.keywords if isinstance(model, partial) else {}
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in given:
        if name not in parameters and name in of_bridge:
            raise TypeError(
                f"fit takes options of the bridge's fit apart, got {name!r}. Write bridge_options={{{name!r}: ...}}."
            )
        near = nearest(name, own)
        if name not in parameters and (near or not free):
            raise TypeError(
                f"fit has no option {name!r}, and neither has the model an argument of that name."
                + (f" Write {near}=..." if near else f" Options: {', '.join(own)}; the model's: {list(parameters)}.")
            )
    both = sorted(set(own) & set([name for name in parameters if name not in bound][num_args:]))
    if both:
        raise ValueError(
            f"the model's arguments must not have the names of fit's own, got {both}. Pass the model with them bound: "
            f"functools.partial(model, {both[0]}=...)."
        )


def _check_sizes(simulations: Simulations, source: Simulator) -> None:
    """Refuse simulations of another model."""
    (num, dim), (rows, width) = simulations.latents.shape, simulations.observations.shape
    if (dim, width, rows) != (source.dim, source.data.dim, num):
        raise ValueError(
            f"simulations must have {source.dim} latents and {source.data.dim} numbers an observation, got "
            f"{tuple(simulations.latents.shape)} and {tuple(simulations.observations.shape)}: another model's?"
        )


def _check_number(num: int, dim: int, held_out: float) -> None:
    least = max(20, 2 * dim)
    if num < least:
        raise ValueError(
            f"num_simulations must be at least {least} finite ones for {dim} latents, got {num}. Write 10_000."
        )
    if num - round(held_out * num) < least // 2:
        raise ValueError(
            f"held_out must leave at least {least // 2} simulations to learn from, got {held_out} of {num}. Write 0.1."
        )
