r"""Learned likelihood p(y | theta) of a simulator: a Pyro distribution for a site of any model."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_sb.bridges.base import Bridge, check_format
from pyro_sb.bridges.light.mixture import MixtureBridge
from pyro_sb.checks import broadcast, finite, flag, floats, number, shown, whole
from pyro_sb.files import read_file, write_file
from pyro_sb.infer.amortized.choice import check_bridge_options, nearest
from pyro_sb.infer.amortized.latent_law import Residuals
from pyro_sb.infer.amortized.likelihood.fit import classes_of, held_out_scores, learn, new_classifier
from pyro_sb.infer.amortized.likelihood.law import (
    DataColumns,
    LikelihoodDistribution,
    LikelihoodParts,
    ParameterColumns,
)
from pyro_sb.infer.amortized.simulator import simulator as read_model
from pyro_sb.threads import chosen_threads
from pyro_sb.training import FitHistory
from pyro_sb.warn import warn

__all__ = ["AmortizedLikelihood", "LikelihoodPairs"]

Sites = dict[str, Tensor]
FORMAT = 1
LEAST = 100  # pairs that a likelihood is learnt from
BLOCK = 1000  # parameters that a simulator is given at once
COLUMNS = ("location", "scale", "low", "high", "logged", "log_location", "log_scale")


class LikelihoodPairs(NamedTuple):
    """Simulated pairs: parameters in columns ``(N, k)``, and one run's data each, ``(N, *event_shape)``."""

    theta: Tensor
    y: Tensor

    def __repr__(self) -> str:
        return (
            f"LikelihoodPairs: {len(self.theta)} pairs of {self.theta.shape[1]} parameters and {self.y[0].numel()} data"
        )


class AmortizedLikelihood:
    r"""Likelihood :math:`p(y | \theta)` of a simulator, learnt from its runs, as a site of any Pyro model.

    .. math:: p(y | \theta) = p(c | \theta)\; p(x | \theta, c)

    with c the discrete numbers of one run's data and x the others: c by a classifier, x by a conditional light bridge,
    an exact normalised mixture density, on the residuals of an affine regression. ``likelihood(theta)`` is a Pyro
    distribution with that ``log_prob``, with gradients in :math:`\theta`, and with draws. Write
    ``pyro.sample("y", likelihood(theta), obs=y)`` in a model of any hierarchy and number of observations; kernels,
    NUTS and SVI work as with any other site.

    **The law that parameters are simulated from is no prior**: it is a proposal that says where the likelihood is
    learnt, and the model's own prior may be another. Beyond the simulations' region (a box) the mean goes on affinely
    and the shape stays as it is at the edge; a warning says so once, and `outside` gives the share.

    **One run is one row.** Independent trials are rows of a plate of the model, not of the simulator. **Errors of the
    log density then add up over them**, and nothing corrects them. With 20,000 simulations of a drift-diffusion the
    group's parameters were within .2 posterior deviations of the exact ones at 720 rows, and one of six 1.9 off at
    2,000 rows.
    Fit twice, on simulations of two seeds, and compare the posteriors.

    Args:
        simulator: A function of parameters ``(n, *shape)``, a row a run, to data ``(n, *event_shape)``, with
            ``proposal``; or a Pyro model of one run, with ``pyro.sample`` sites for the parameters and one observed
            site, or data that it returns: its priors are the proposal. None: `fit` is given pairs.
        observed: Name of the model's observed site.
        proposal: Law of the parameters of a function: a distribution, or a dict of them by name, and the function then
            takes these names as keyword arguments.
        discrete: Columns of one run's data, flat, that are discrete: choices, counts of few values. None: those that
            hold at most 64 whole numbers and nothing else, with a warning that names them.
        bridge: ``"light"``, a `LightSB` of 4 components for one continuous number of data, 8 for more: for laws with
            more modes give a `LightSB`, its class, or a function ``(dim, context_dim)`` that makes one.

    Attributes:
        simulations: What was simulated, `LikelihoodPairs`: ``fit(simulations=...)`` learns from it again.
        scores: Held-out log density of a run in nats: ``"learnt"``, and of ``"affine Gaussian"``, a regression with the
            classes' shares: what the networks gain.
        bridge: The fitted bridge; None where all data are discrete.

    References:
        Sequential Neural Likelihood (Papamakarios, Sterratt and Murray, 2019), https://arxiv.org/abs/1805.07226; mixed
        data: Boelts, Lueckmann, Gao and Macke (2022), https://arxiv.org/abs/2202.05018. The conditional bridge, the
        residuals and the region are ours.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def simulate(theta):
        ...     return theta + 0.5 * torch.randn(len(theta), 1)
        >>> likelihood = AmortizedLikelihood(simulate, proposal=dist.Uniform(-4.0, 4.0).expand([1]).to_event(1))
        >>> history = likelihood.fit(num_simulations=1000, num_updates=300, progress=False)
        >>> def hierarchy(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("subjects", len(y), dim=-2):
        ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0).expand([1]).to_event(1))
        ...         with pyro.plate("trials", y.shape[1], dim=-1):
        ...             pyro.sample("y", likelihood(theta), obs=y)
        >>> trace = pyro.poutine.trace(hierarchy).get_trace(torch.zeros(3, 5, 1))
        >>> trace.nodes["y"]["fn"].batch_shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        simulator: Callable[..., Any] | None = None,
        observed: str = "y",
        *,
        proposal: Distribution | dict[str, Distribution] | None = None,
        discrete: tuple[int, ...] | None = None,
        bridge: Any = "light",
    ) -> None:
        if simulator is not None and not callable(simulator):
            raise TypeError(f"simulator must be a function or a Pyro model, got {shown(simulator)}.")
        if not isinstance(observed, str):
            raise TypeError(f'observed must name one site, got {shown(observed)}. Stack several data in one: "y".')
        if simulator is None and proposal is not None:
            raise ValueError("a proposal is for a simulator, got it alone. Pass the simulator, or pairs to fit.")
        self.simulator, self.observed, self.discrete = simulator, observed, _read_discrete(discrete)
        self._alone, self.proposal = isinstance(proposal, Distribution), _read_proposal(proposal)
        if isinstance(bridge, str) and bridge != "light":
            raise ValueError(
                f'bridge must be "light" or a LightSB, got {bridge!r}: a likelihood needs the density of a point, with '
                "gradients in the parameters. Paths of diffusions have none."
            )
        self._spec: Any = bridge
        self.simulations: LikelihoodPairs | None = None
        self.scores: dict[str, float] = {}
        self._parts: LikelihoodParts | None = None
        self._judged = torch.zeros(0, dtype=torch.bool)
        self._warned = False

    @property
    def bridge(self) -> MixtureBridge | None:
        """The fitted bridge."""
        return None if self._parts is None else self._parts.bridge

    @property
    def parts(self) -> LikelihoodParts:
        """What was fitted; an error before ``fit``."""
        if self._parts is None:
            raise RuntimeError(
                "an AmortizedLikelihood must be fitted before it is a distribution: call "
                "likelihood.fit(num_simulations=...) first."
            )
        return self._parts

    @property
    def held_out(self) -> LikelihoodPairs:
        """Simulations that the fit was judged by and did not learn from."""
        parts, pairs = self.parts, self.simulations
        assert pairs is not None and parts is not None
        return LikelihoodPairs(pairs.theta[self._judged], pairs.y[self._judged])

    def __repr__(self) -> str:
        name = "pairs" if self.simulator is None else getattr(self.simulator, "__name__", type(self.simulator).__name__)
        if self._parts is None:
            return f"AmortizedLikelihood of {name}: not fitted"
        assert self.simulations is not None
        columns, data = self._parts.columns, self._parts.data
        shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in columns.shapes.items())
        parts = [f"{tuple(data.event_shape)}"]
        if data.discrete:
            parts.append(f"columns {list(data.discrete)} discrete, in {data.num_classes} classes")
        if data.logged:
            parts.append(f"columns {[data.continuous[i] for i in data.logged]} by their logarithm")
        by = "a classifier" if self.bridge is None else self.bridge.describe()
        scores = ", ".join(f"{key} {score:.3f}" for key, score in self.scores.items())
        return "\n".join(
            [
                f"AmortizedLikelihood of {name}: p({self.observed} | {', '.join(columns.shapes)})",
                f"  parameters: {shapes}",
                f"  data of one run: {'; '.join(parts)}",
                f"  fitted: {by}, on {len(self.simulations.theta)} simulations",
                f"  held-out log density: {scores} nats",
            ]
        )

    def fit(
        self,
        *model_args: Any,
        num_simulations: int = 10_000,
        simulations: Any = None,
        keep_finite: bool = False,
        held_out: float = 0.1,
        progress: bool = True,
        num_updates: int | None = None,
        bridge_options: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> FitHistory:
        r"""Simulate, and learn.

        Args:
            *model_args: The simulator's further positional arguments: of a function after the parameters.
            num_simulations: Runs of the simulator, at least 100.
            simulations: Pairs ``(theta, y)`` instead of new runs: theta a tensor ``(N, *shape)`` or a dict by name, y
                ``(N, *event_shape)``; or earlier `simulations`. From any law of theta.
            keep_finite: Learn from finite simulations where others are not, instead of an error.
            held_out: Share of the simulations that the fit is judged by, in (0, 1).
            progress: Show bars.
            num_updates: Updates of the bridge's fit, and of the classifier's. None: 2500, or 5000 from 20,000
                simulations on, fewer for few.
            bridge_options: Further options of the bridge's ``fit``.
            **model_kwargs: The simulator's keyword arguments.

        Returns:
            History of the bridge's fit; of the classifier's where all data are discrete.

        Raises:
            TypeError: An option that neither ``fit`` nor the simulator has.
            ValueError: Simulations that are not finite, or of several shapes; a constant column; too many classes.

        Warns:
            RuntimeWarning: Columns that were found to be discrete; a fit that has not converged.
        """
        num_simulations = whole("num_simulations", num_simulations, LEAST, cure="Write 10_000.")
        held_out = number("held_out", held_out, "(0, 1)", "Write 0.1.")
        num_updates = None if num_updates is None else whole("num_updates", num_updates)
        keep_finite, progress = flag("keep_finite", keep_finite), flag("progress", progress)
        check_bridge_options({"light": self._spec}, bridge_options or {})
        _check_keywords(self.simulator, type(self).fit, model_kwargs)
        if simulations is not None:
            theta, y, shapes = self._given(simulations)
        else:
            with chosen_threads(*model_args, *model_kwargs.values()):
                theta, y, shapes = self._simulated(num_simulations, model_args, model_kwargs, keep_finite, progress)
        theta, y = _finite_pairs(theta, y, keep_finite)
        if len(theta) < LEAST:
            raise ValueError(f"at least {LEAST} simulations must be there, got {len(theta)}. Write 10_000.")
        flat = y.reshape(len(y), -1)
        data = DataColumns(y.shape[1:], *classes_of(flat, self.discrete))
        columns = ParameterColumns.fit(theta, shapes)
        judged = torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
        judged[torch.randperm(len(theta), device=theta.device)[: max(10, round(held_out * len(theta)))]] = True
        options = {"progress": progress} | ({} if num_updates is None else {"num_updates": num_updates})
        with chosen_threads(theta):
            parts, history = learn(columns, data, theta, flat, judged, self._spec, options, bridge_options or {})
        self._parts, self._judged, self._warned = parts, judged, False
        self.simulations = LikelihoodPairs(theta, y)
        self.scores = held_out_scores(parts, theta, flat, judged)
        return history

    def __call__(self, theta: Any = None, /, **by_name: Any) -> LikelihoodDistribution:
        r"""The law of one run's data at parameters: :math:`p(y | \theta)`.

        Args:
            theta: Where there is one parameter its values ``(*batch, *shape)``; or a dict by name.
            **by_name: Several parameters by name, ``(*batch, *shape)`` each, their batches broadcast.

        Returns:
            A Pyro distribution with that batch shape, and the event shape of one run's data.

        Raises:
            RuntimeError: ``fit`` was not called.
            TypeError: Unknown or missing names.
            ValueError: A shape that does not end in the parameter's.

        Warns:
            RuntimeWarning: Once: parameters outside the region that was simulated.
        """
        columns = self.parts.columns
        read = self._read(theta, by_name)
        if not self._warned:
            self._look(read, columns)
        return LikelihoodDistribution(self.parts, read)

    def outside(self, theta: Any = None, /, **by_name: Any) -> float:
        """Share of parameters that lie outside the region that was simulated: of a posterior's draws, to be near 0.

        Args:
            theta: As in a call.
            **by_name: As in a call.
        """
        read = self._read(theta, by_name)
        return float(self.parts.columns.outside(read).any(-1).double().mean())

    def save(self, path: str | Path) -> None:
        """Write one file of tensors and plain values, read back by `load`: the fit, and the simulations."""
        parts, pairs = self.parts, self.simulations
        assert pairs is not None
        columns, data, residuals = parts.columns, parts.data, parts.residuals
        contents = {
            "format": FORMAT,
            "kind": "AmortizedLikelihood",
            "observed": self.observed,
            "shapes": {name: list(shape) for name, shape in columns.shapes.items()},
            "columns": {name: getattr(columns, name) for name in COLUMNS},
            "event_shape": list(data.event_shape),
            "discrete": list(data.discrete),
            "categories": data.categories,
            "logged": list(data.logged),
            "log_shares": parts.log_shares,
            "classifier": None if parts.classifier is None else dict(parts.classifier.state_dict()),
            "bridge": None if parts.bridge is None else parts.bridge.contents(),
            "residuals": None if residuals is None else [residuals.bounded, residuals.weights, residuals.factor],
            "pairs": list(pairs),
            "judged": self._judged,
            "scores": dict(self.scores),
        }
        write_file(contents, path)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None) -> "AmortizedLikelihood":
        """The likelihood that `save` wrote. It needs no simulator, and has none: fit it on pairs to learn more.

        Args:
            path: What `save` wrote. No code in the file is run.
            map_location: As in `torch.load`.

        Raises:
            ValueError: A file of other contents, or one that is torn or altered.
        """
        saved = read_file(path, map_location)
        if not isinstance(saved, dict) or saved.get("kind") != "AmortizedLikelihood":
            raise ValueError(f"{path} must hold what AmortizedLikelihood.save wrote, got other contents.")
        check_format(str(path), saved.get("format"), FORMAT)
        try:
            likelihood = cls(observed=saved["observed"], discrete=tuple(saved["discrete"]))
            shapes = {name: Size(shape) for name, shape in saved["shapes"].items()}
            about = saved["columns"]
            columns = ParameterColumns(shapes, **(about | {"logged": tuple(about["logged"])}))
            data = DataColumns(
                Size(saved["event_shape"]), tuple(saved["discrete"]), saved["categories"], tuple(saved["logged"])
            )
            classifier = None
            if saved["classifier"] is not None:
                classifier = new_classifier(columns, data).to(columns.location)
                classifier.load_state_dict(saved["classifier"])
            bridge = None if saved["bridge"] is None else Bridge.rebuilt(saved["bridge"], str(path))
            residuals = None if saved["residuals"] is None else Residuals(*saved["residuals"])
            likelihood._parts = LikelihoodParts(columns, data, classifier, saved["log_shares"], bridge, residuals)
            likelihood.simulations, likelihood._judged = LikelihoodPairs(*saved["pairs"]), saved["judged"]
            likelihood.scores = dict(saved["scores"])
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:
            raise ValueError(
                f"{path} must hold a likelihood as this version writes it, got one that differs ({error}). Fit and "
                "save it again."
            ) from error
        return likelihood

    def _read(self, theta: Any, by_name: dict[str, Any]) -> Tensor:
        """Parameters in columns ``(*batch, k)``, with their gradients."""
        shapes, like = self.parts.columns.shapes, self.parts.columns.location
        given = dict(theta) if isinstance(theta, dict) else {}
        if theta is not None and not isinstance(theta, dict):
            if len(shapes) > 1:
                raise TypeError(f"several parameters must be given by name, got a tensor. Write {_call(shapes)}.")
            given = {next(iter(shapes)): theta}
        given |= by_name
        if given.keys() != shapes.keys():
            raise TypeError(
                f"the likelihood has the parameters {list(shapes)}, got {list(given)}. Write {_call(shapes)}."
            )
        parts, leads = {}, []
        for name, shape in shapes.items():
            value = floats(name, given[name], like)
            lead = value.shape[: max(0, value.dim() - len(shape))]
            if value.shape[len(lead) :] != shape:
                wanted = ", ".join(["*batch", *map(str, shape)])
                raise ValueError(
                    f"{name} must have the shape ({wanted}), got {tuple(value.shape)}. Put a plate's rows before it."
                )
            parts[name] = value.reshape(*lead, -1)
            leads.append(lead)
        batch = broadcast("the parameters", *leads)
        return torch.cat([parts[name].expand(*batch, -1) for name in shapes], -1)

    def _look(self, theta: Tensor, columns: ParameterColumns) -> None:
        """Warn once of parameters that no simulation is near."""
        with torch.no_grad():
            beyond = columns.outside(theta.detach())
            try:
                share = float(beyond.any(-1).double().mean()) if beyond.numel() else 0.0
            except RuntimeError:  # inside torch.func.vmap no branch may look at values
                return
            if not share > 0:
                return
            self._warned = True
            worst = int(beyond.reshape(-1, columns.dim).double().mean(0).argmax())
        low, high = float(columns.low[worst]), float(columns.high[worst])
        warn(
            f"{share:.2g} of the parameters lie outside the region that was simulated, most in column {worst} of "
            f"{', '.join(columns.shapes)}, where it is [{low:.3g}, {high:.3g}]: there the likelihood goes on from the "
            "edge. It is said once, warm-up included. Check the posterior's draws by likelihood.outside(...), and "
            "where their share is not near 0, widen the proposal.",
        )

    def _simulated(
        self, num: int, args: tuple[Any, ...], kwargs: dict[str, Any], keep_finite: bool, progress: bool
    ) -> tuple[Tensor, Tensor, dict[str, Size]]:
        """New runs: parameters in columns, data, and the parameters' shapes."""
        if self.simulator is None:
            raise ValueError("a likelihood without a simulator must be given pairs. Write fit(simulations=(theta, y)).")
        if self.proposal is None:
            source = read_model(self.simulator, (self.observed,), args, kwargs)
            pairs = source.simulate(num, keep_finite=keep_finite, progress=progress)
            sites = source.prototype.packing.unpack(pairs.latents)
            sites = {name: transform.inv(sites[name]) for name, transform in source.prototype.transforms.items()}
            y = source.data.unpack(pairs.observations)[self.observed]
            return *_as_columns(sites, y), {name: value.shape[1:] for name, value in sites.items()}
        sites = {name: floats(name, law.sample((num,))) for name, law in self.proposal.items()}
        parts = list[Tensor]()
        for i in tqdm(range(0, num, BLOCK), desc="Simulate", disable=not progress):
            rows = {name: value[i : i + BLOCK] for name, value in sites.items()}
            found = self.simulator(
                *(rows.values() if self._alone else ()), *args, **({} if self._alone else rows), **kwargs
            )
            parts.append(_one_block(found, len(next(iter(rows.values()))), parts))
        return *_as_columns(sites, torch.cat(parts)), {name: value.shape[1:] for name, value in sites.items()}

    def _given(self, simulations: Any) -> tuple[Tensor, Tensor, dict[str, Size]]:
        """Pairs of the user's, or of an earlier fit."""
        if not isinstance(simulations, tuple) or len(simulations) != 2:
            raise TypeError(f"simulations must be a pair (theta, y), got {shown(simulations)}.")
        theta, y = simulations
        if isinstance(simulations, LikelihoodPairs) and self._parts is not None:
            shapes = self._parts.columns.shapes
            if theta.shape[1:] == (self._parts.columns.dim,):
                return theta, y, shapes
        sites = {k: floats(k, v) for k, v in (theta if isinstance(theta, dict) else {"theta": theta}).items()}
        y = floats("y", y)
        if y.dim() == 0 or any(value.dim() == 0 or len(value) != len(y) for value in sites.values()):
            sizes = {name: tuple(value.shape) for name, value in sites.items()}
            raise ValueError(f"theta and y must have a row a run, got {sizes} and {tuple(y.shape)}.")
        return *_as_columns(sites, y), {name: value.shape[1:] for name, value in sites.items()}


def _read_discrete(discrete: Any) -> tuple[int, ...] | None:
    """Columns as whole numbers that are not negative; None to look for them."""
    if discrete is None:
        return None
    if isinstance(discrete, str) or not hasattr(discrete, "__iter__"):
        raise TypeError(f"discrete must name columns, got {shown(discrete)}. Write discrete=(0,), or () for none.")
    read = tuple(whole("each column in discrete", column, 0, cure="Write discrete=(0,).") for column in discrete)
    if len(set(read)) < len(read):
        raise ValueError(f"discrete must name each column once, got {read}.")
    return read


def _read_proposal(proposal: Any) -> dict[str, Distribution] | None:
    """Laws by name, each of a single row."""
    if proposal is None:
        return None
    laws = {"theta": proposal} if isinstance(proposal, Distribution) else proposal
    if not isinstance(laws, dict) or not laws or not all(isinstance(law, Distribution) for law in laws.values()):
        raise TypeError(
            f"proposal must be a distribution, or a dict of them by name, got {shown(proposal)}. Write "
            "dist.Uniform(low, high).to_event(1)."
        )
    for name, law in laws.items():
        if len(law.batch_shape):
            raise ValueError(
                f"proposal must be the law of one row, got batch shape {tuple(law.batch_shape)} for {name!r}. Write "
                f".to_event({len(law.batch_shape)})."
            )
    return dict(laws)


def _check_keywords(simulator: Any, fit: Callable[..., Any], given: dict[str, Any]) -> None:
    """Refuse keywords that neither ``fit`` nor the simulator has."""
    own = [n for n, p in inspect.signature(fit).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    parameters: dict[str, inspect.Parameter] = {}
    if simulator is not None:
        try:
            target = simulator.forward if isinstance(simulator, nn.Module) else simulator
            parameters = dict(inspect.signature(target).parameters)
        except (TypeError, ValueError):  # a callable without a signature
            return
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in given:
        near = nearest(name, own)
        if name not in parameters and (near or not free):
            raise TypeError(
                f"fit has no option {name!r}, and neither has the simulator an argument of that name."
                + (f" Write {near}=..." if near else f" Options: {', '.join(own)}.")
            )


def _one_block(found: Any, num: int, parts: list[Tensor]) -> Tensor:
    """What a simulator returned for some parameters: a row each, of one shape."""
    y = floats("the simulator's data", found)
    if y.dim() == 0 or len(y) != num:
        raise ValueError(
            f"the simulator must return a row for each of {num} parameters, got {tuple(y.shape)}. A simulator of one "
            "run at a time is a Pyro model: write pyro.sample sites for its parameters, and no proposal."
        )
    if parts and y.shape[1:] != parts[0].shape[1:]:
        raise ValueError(
            f"the simulator's data must have one shape at every run, got {tuple(parts[0].shape[1:])} and "
            f"{tuple(y.shape[1:])}. Return as many numbers each time."
        )
    return y.detach()


def _as_columns(sites: Sites, y: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters ``(N, k)`` and data in torch's default dtype."""
    dtype = torch.get_default_dtype()
    return torch.cat([value.reshape(len(y), -1) for value in sites.values()], 1).to(dtype).detach(), y.to(
        dtype
    ).detach()


def _finite_pairs(theta: Tensor, y: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Pairs that are finite; an error where others are and are not to be left out."""
    finite("theta", theta)
    good = torch.isfinite(y.reshape(len(y), -1)).all(1)
    bad = int((~good).sum())
    if bad and not keep:
        raise ValueError(
            f"simulations must be finite, got NaN or infinity in {bad} of {len(y)} ({bad / len(y):.1%}). Correct the "
            "simulator, or write keep_finite=True to learn from the others: the likelihood is then that of finite data."
        )
    return theta[good], y[good]


def _call(shapes: dict[str, Size]) -> str:
    """How parameters are given by name, for messages."""
    return f"likelihood({', '.join(f'{name}=...' for name in shapes)})"
