"""A bridge: fitted on draws, called on a context, it is a Pyro distribution. With it the options that fits share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyro_sb.bridges.options import check_names, keyword_names
from pyro_sb.checks import broadcast, finite, flag, floats, number, points, whole
from pyro_sb.distributions import BridgeDistribution, Draws, PathLaw
from pyro_sb.files import checkpoint_path, read_file, write_file
from pyro_sb.nn import embedding_from_config
from pyro_sb.training import FitHistory

FORMAT = 1
MOST = 2**22  # numbers in an array of rows, components and axes


class Fitted(nn.Module):
    """A module whose buffers hold what a fit found: they take the shape, dtype and device that were saved.

    Attributes:
        shapes: Of buffers, an axis a letter: those in `sizes` are known, the others only have to agree.
    """

    shapes: ClassVar[dict[str, str]] = {}

    def sizes(self) -> dict[str, int]:
        """Sizes that `shapes` names."""
        return {}

    def _check_buffers(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse buffers of other shapes, before any is made."""
        sizes = self.sizes() if self.shapes else {}
        for name, letters in self.shapes.items():
            saved = state_dict.get(prefix + name)
            if not isinstance(saved, Tensor) or not saved.numel():
                continue
            axes = letters.split()
            agree = [sizes.setdefault(letter, size) == size for letter, size in zip(axes, saved.shape)]
            if len(axes) != saved.dim() or not all(agree):
                wanted = ", ".join(str(sizes.get(letter, letter)) for letter in axes)
                raise ValueError(
                    f"{type(self).__name__}'s {name} must have shape ({wanted}), got {tuple(saved.shape)} in the file. "
                    "It was altered, or is of another bridge: save it again."
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._check_buffers(state_dict, prefix)
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and isinstance(saved, Tensor):
                self._buffers[name] = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Bridge(Fitted):
    r"""A stochastic map from a source law at time 0 to a target law at time 1, possibly given a context.

    Fit it on draws, call it, and hold a Pyro distribution: ``bridge.fit(draws)``, then ``bridge()`` or
    ``bridge(context)``.

    **A new bridge** supplies ``fit``, ``sample_rows``, ``transport``, ``paths``, ``drift`` and ``config`` (the
    constructor's arguments as plain values or tensors, for `save`). According to ``density``, what ``log_q`` of its
    draws means:

    - ``"marginal"``: the density of the draw itself: supply ``log_prob_rows``; draws follow.
    - ``"path"``: of the whole path, forwards less backwards: supply ``draws_rows``, and ``redraw_rows`` for MCMC.
    - ``None``: draws alone. `density_hint` says what has one.

    All that was fitted lives in parameters and buffers; buffers may change their shape in ``fit`` and in loading.
    Plain numbers go through ``get_extra_state`` and ``set_extra_state``. ``fit`` says in ``fitted_to`` what it was
    given, and `describe_lines` names the main numbers, for ``repr``.

    Args:
        dim: Event size, at least 1.
        context_dim: Size of what is conditioned on; 0 for an unconditional bridge.

    Attributes:
        fitted_to: The data of the last ``fit`` in words; empty before it.
    """

    density: str | None = None
    density_hint = "No choice of options gives it one."
    has_rsample = False
    earlier_names: ClassVar[dict[str, str]] = {}  # constructor's arguments in earlier files: present names
    approximate_log_prob = False  # whether log_prob is there though density is not "marginal", as an approximation

    def __init__(self, dim: int, *, context_dim: int = 0) -> None:
        super().__init__()
        self.dim = whole("dim", dim, cure="Write the number of columns of the draws.")
        self.context_dim = whole("context_dim", context_dim, 0, cure="Omit it for a bridge without context.")
        self.fitted_to = ""

    def fit(
        self,
        target: Any,
        source: Any = None,
        *,
        context: Any = None,
        weights: Any = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> FitHistory:
        """Learn from draws of the target: arrays, tensors or a distribution. Changes the bridge."""
        raise NotImplementedError(f"{type(self).__name__} has no fit.")

    def forward(self, context: Any = None) -> BridgeDistribution:
        """The law of the draws given a context of shape ``(*batch_shape, context_dim)``."""
        like = self.like()
        return BridgeDistribution(self, self.check_context(context), like=like)

    def transport(self, x0: Tensor, context: Any = None) -> Tensor:
        """Source points to draws of the target. Shapes ``(*, dim)`` to ``(*, dim)``."""
        raise NotImplementedError(f"{type(self).__name__} has no transport.")

    def push(self, noise: Tensor, context: Any = None) -> Tensor:
        """Standard normals to draws, by a map that is deterministic and differentiable: a prior without a density.

        Args:
            noise: Shape ``(*, dim)``; of a `LatentBridge` ``(*, latent_dim)``.
            context: Shape ``(*, context_dim)``.

        Returns:
            Shape ``(*, dim)``, in the dtype of ``noise``, with gradients in ``noise`` and ``context`` alone: the
            bridge's weights are constants.

        Raises:
            NotImplementedError: The bridge has no such map.
        """
        raise NotImplementedError(
            f"{self.describe()} has no differentiable map from noise to draws. Those that have one: VSDM, SGM, "
            'SmoothedBridge with source_law="moment", LatentBridge around one: fit one to draws of this bridge. '
            'A marginal density needs none: pyro.sample("x", bridge()).'
        )

    def paths(self, num_paths: int, num_steps: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Times ``(num_steps + 1,)`` from 0 to 1, and states ``(num_steps + 1, num_paths, *batch_shape, dim)``."""
        raise NotImplementedError(f"{type(self).__name__} has no paths.")

    def drift(self, t: Any, x: Tensor, context: Any = None) -> Tensor:
        """Drift of the bridge at time t in [0, 1]. Shape of ``x``: ``(*, dim)``."""
        raise NotImplementedError(f"{type(self).__name__} has no drift.")

    def sample_rows(self, num: int, context: Tensor | None) -> Tensor:
        """Draws, a row of context each. Shape ``(num, dim)``."""
        return self.draws_rows(num, context).value

    def draws_rows(self, num: int, context: Tensor | None) -> Draws:
        """Draws with the log density that corrects them."""
        if self.density != "marginal":
            raise NotImplementedError(f"{self.describe()} has no density of its draws. {self.density_hint}")
        value = self.sample_rows(num, context)
        return Draws(value, self.log_prob_rows(value, context))

    def log_prob_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log density of points, where ``density`` is "marginal"."""
        if self.density == "path":
            raise NotImplementedError(
                f'{self.describe()} has no marginal log_prob, its density is "path". '
                "Use draws(), which returns value and log_q."
            )
        raise NotImplementedError(
            f"{self.describe()} has no log_prob, and draws() has no log_q for it either. {self.density_hint}"
        )

    def redraw_rows(self, x: Tensor, context: Tensor | None) -> Tensor:
        r"""The ``log_q`` of paths drawn backwards from given ends: the other way to meet what ``draws_rows`` gives.

        With B the law of all that a draw leaves behind (its path) given its end, the pair (x, log_q) is that of a
        draw of :math:`p(x) B(\cdot | x)` for :math:`x \sim p`, and

        .. math:: E_{x \sim p}\, E_B[\exp(\text{log\_q} - \log p(x))] = 1

        where p covers the draws. Where ``density`` is "marginal" there is nothing to draw: it is the log density.

        Args:
            x: Ends. Shape ``(num, dim)``.
            context: A row each, or None. Shape ``(num, context_dim)``.

        Returns:
            Shape ``(num,)``.
        """
        if self.density == "marginal":
            return self.log_prob_rows(x, context)
        bound = getattr(self, "path_log_prob", None)
        if self.density == "path" and bound is not None:
            return bound(x, context, num_paths=1)
        if self.density == "path":
            raise NotImplementedError(f"{self.describe()} has paths with a density, and must supply redraw_rows.")
        raise NotImplementedError(f"{self.describe()} has no density of its draws. {self.density_hint}")

    def proposal_law(self) -> PathLaw:
        """The law that chains propose from for a while: the bridge, unless draws of one call share random numbers.

        Those are then drawn here and held, so that successive proposals are independent.
        """
        return self

    def sizes(self) -> dict[str, int]:
        """Size of an event, d, and of a context, c."""
        return {"d": self.dim, "c": self.context_dim}

    @property
    def fitted(self) -> bool:
        """Whether `fit` was called, or a fitted bridge loaded."""
        try:
            self.like()
        except RuntimeError:
            return False
        return True

    def describe(self) -> str:
        """Name for messages."""
        return type(self).__name__

    def describe_lines(self) -> list[str]:
        """Lines of ``repr`` after its first: a family puts its main numbers before this one."""
        return [(f"fitted to {self.fitted_to}" if self.fitted_to else "fitted") if self.fitted else "not fitted"]

    def title(self) -> str:
        """First line of ``repr``: the class and its sizes."""
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{type(self).__name__}(dim={self.dim}{context})"

    def __repr__(self) -> str:
        return "\n  ".join([self.title(), *self.describe_lines()])

    def fit_options(self) -> frozenset[str]:
        """Names of the options that ``fit`` takes."""
        return keyword_names(type(self), "fit")

    def like(self) -> Tensor:
        """A fitted tensor, for dtype and device; an error before ``fit``."""
        raise NotImplementedError(f"{type(self).__name__} does not say its dtype.")

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values or tensors."""
        return {"dim": self.dim, "context_dim": self.context_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Bridge":
        """Build the bridge that `config` describes, in an earlier file by `earlier_names`; override it for others."""
        config = {cls.earlier_names.get(name, name): value for name, value in config.items()}
        if "embedding" in config:
            config["embedding"] = embedding_from_config(config["embedding"])
        return cls(**config)

    def contents(self) -> dict[str, Any]:
        """Contents of a file: tensors and plain values; an error where something fitted is neither."""
        state = {key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in self.state_dict().items()}
        about = {"format": FORMAT, "class": type(self).__name__, "fitted_to": self.fitted_to}
        return about | {"config": self.config(), "state": state}

    def save(self, path: str | Path) -> None:
        """Write one file of tensors and plain values, whole or not at all, read back by `Bridge.load`."""
        write_file(self.contents(), path)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None) -> Any:
        """Rebuild a saved bridge, of this class or one derived from it.

        Args:
            path: What `save` wrote. Read with ``weights_only=True``: no code in the file is run.
            map_location: As in `torch.load`.
        """
        return cls.rebuilt(read_file(path, map_location), str(path))

    @classmethod
    def rebuilt(cls, saved: Any, path: str) -> Any:
        """The bridge of a file's contents; ``path`` names the file in messages."""
        if not isinstance(saved, dict) or not {"format", "class", "config", "state"} <= saved.keys():
            raise ValueError(f"{path} must hold a bridge written by Bridge.save, got other contents.")
        check_format(path, saved["format"], FORMAT)
        kind = class_named(saved["class"], cls, path)
        try:
            check_parameters(lambda: kind.from_config(saved["config"]), saved["state"])
            bridge = kind.from_config(saved["config"])
            bridge.load_state_dict(saved["state"])
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:
            raise ValueError(
                f"{path} must hold a {kind.__name__} as this version writes it, got one that differs "
                f"({str(error).splitlines()[0]}). Fit the bridge again."
            ) from error
        bridge.fitted_to = str(saved.get("fitted_to", ""))
        return bridge

    def flat_rows(self, x: Any, context: Any) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Points and contexts, checked and broadcast, as flat rows; the points' shape before."""
        x, context = points("x", x, self.dim, self.like()), self.check_context(context)
        if context is None:
            return x.reshape(-1, self.dim), None, x.shape
        shape = broadcast("x and context", x.shape[:-1], context.shape[:-1])
        x, context = x.expand(*shape, self.dim), context.expand(*shape, self.context_dim)
        return x.reshape(-1, self.dim), context.reshape(-1, self.context_dim), x.shape

    def check_context(self, context: Any) -> Tensor | None:
        """The context as a tensor ``(*batch, context_dim)``; an error where it is missing, superfluous or misshapen."""
        if self.context_dim == 0:
            if context is not None:
                raise ValueError(
                    f"{type(self).__name__} has context_dim 0, got a context. Build it with context_dim=..."
                )
            return None
        if context is None:
            raise ValueError(
                f"{type(self).__name__} has context_dim {self.context_dim}: call it on a context, bridge(context)."
            )
        context = floats("context", context, self.like())
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"context must have shape (*batch, {self.context_dim}), got {tuple(context.shape)}. "
                "Put observations in the last axis."
            )
        return finite("context", context, "Drop or impute those entries.", in_chains=True)


class FitOptions(NamedTuple):
    """Options that every fit by gradients has.

    Args:
        num_updates: Updates, at least 1.
        batch_size: Draws an update, at least 1.
        learning_rate: Of the first update, positive.
        ema: Decay of the parameters' moving average, in [0, 1); None for none.
        num_law_draws: How many draws a distribution gives, at least 2.
        progress: Whether to show a bar.
        checkpoint: Path of the fit's file, or None.
    """

    num_updates: int
    batch_size: int
    learning_rate: float
    ema: float | None
    num_law_draws: int
    progress: bool
    checkpoint: str | Path | None

    def read(self) -> "FitOptions":
        """The same, as numbers that a fit can use; an error where one is none."""
        return FitOptions(
            whole("num_updates", self.num_updates),
            whole("batch_size", self.batch_size),
            number("learning_rate", self.learning_rate, "(0, inf)", "Write 2e-3."),
            None if self.ema is None else number("ema", self.ema, "[0, 1)", "Write None for no average."),
            whole("num_law_draws", self.num_law_draws, 2),
            flag("progress", self.progress),
            checkpoint_path(self.checkpoint),
        )


def check_format(path: str, came: Any, known: int) -> None:
    """Refuse a file of another version of what it holds."""
    if came != known:
        newer = isinstance(came, int) and came > known
        cure = "A later version wrote it: update pyro_sb." if newer else "Fit and save it again."
        raise ValueError(f"{path} must have format {known}, got {came!r}. {cure}")


def check_parameters(make: Callable[[], nn.Module], state: Any, prefix: str = "") -> None:
    """Refuse a state without the parameters of a module, or with others, before the module takes any memory.

    Args:
        make: Makes the module.
        state: Saved values by name.
        prefix: Of the names.
    """
    try:
        with torch.device("meta"):
            shell = make()
    except (NotImplementedError, RuntimeError):  # a class of the user's own that looks at its numbers
        return
    for name, parameter in shell.named_parameters():
        saved = state.get(prefix + name)
        if not isinstance(saved, Tensor) or saved.shape != parameter.shape:
            came = f"shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else "none"
            raise ValueError(
                f"{prefix}{name} of a {type(shell).__name__} must have shape {tuple(parameter.shape)}, got {came} in "
                "the file. It was altered, or is of another version: fit and save it again."
            )


def class_named(name: str, cls: type[Bridge], path: str) -> type[Bridge]:
    """The class of this name among ``cls`` and those derived from it; ``path`` is the file that asks for it."""
    known = {c.__name__: c for c in _family(cls)}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path} must hold one of {sorted(known)}, got {name}. Import it, then Bridge.load(path).")
    return known[name]


def _family(cls: type["Bridge"]) -> list[type["Bridge"]]:
    return [cls] + [c for child in cls.__subclasses__() for c in _family(child)]


def check_fit_options(call: str, bridge: Bridge | type[Bridge], options: Iterable[str], given: Iterable[str]) -> None:
    """Refuse options of a bridge's ``fit`` that it does not have, or that the caller gives itself.

    Args:
        call: Name of the argument that brings the options, for messages.
        bridge: A bridge, or its class.
        options: Their names.
        given: Names that the caller gives itself.
    """
    kind = bridge if isinstance(bridge, type) else type(bridge)
    known = keyword_names(kind, "fit") if isinstance(bridge, type) else bridge.fit_options()
    if isinstance(bridge, type) and kind.fit_options is not Bridge.fit_options:
        known |= set(options)  # of an inner bridge not known yet: its own fit refuses them
    check_names(f"{kind.__name__}.fit ({call})", options, known, given)


def chunked(function: Callable[..., Any], *rows: Tensor | None, width: int) -> Any:
    """A function of rows, evaluated some at a time, such that ``width`` numbers a row stay within memory."""
    num, size = next(len(r) for r in rows if r is not None), max(1, MOST // width)
    if num <= size:
        return function(*rows)
    parts = [function(*(None if r is None else r[i : i + size] for r in rows)) for i in range(0, num, size)]
    return torch.cat(parts)
