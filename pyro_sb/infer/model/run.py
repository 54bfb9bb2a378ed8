"""A finished run: draws of a model's sites, with the model and the arguments that they belong to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any

from torch import Tensor

__all__ = ["Run", "html_table"]

Sites = dict[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    r"""Draws of a model's sites by chain, as reports, exports and audits read them, whatever made them.

    Whoever has an ``as_run()`` that gives one can be read.

    Args:
        sites: Draws in the sites' own space, ``(chain, draw, *site)``; or a function that gives them when they are
            asked for.
        model: The Pyro model; None if it has no log joint that can be evaluated.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        potential_fn: Minus the log joint of one chain, where there was no model.
        transforms: Site to the transform from its support to the reals, of ``potential_fn``.
        log_joint: The batched log joint, where the sampler has it.
        sample_stats: One value a draw, ``(chain, draw)``.
        kernel: What made the draws.
        figures: Gives the kernel's figures.
        discrete: Gives draws of enumerated sites that belong to the draws; None if there are none to be had.
        seconds: Wall time of ``"warmup"`` and of ``"sampling"``, where the sampler has it.

    Example:
        >>> import torch
        >>> Run({"mu": torch.zeros(4, 100)})
        Run: 4 chains of 100 draws of mu (), without a model
    """

    sites: Sites | Callable[[], Sites]
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    potential_fn: Callable[[Sites], Tensor] | None = None
    transforms: Mapping[str, Any] = field(default_factory=dict)
    log_joint: Any = None
    sample_stats: Mapping[str, Tensor] = field(default_factory=dict)
    kernel: Any = None
    figures: Callable[[], Mapping[str, Any]] = dict
    discrete: Callable[[], Sites] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def draws(self) -> Sites:
        """Draws by site. Each of shape ``(chain, draw, *site)``."""
        return dict(self.sites() if callable(self.sites) else self.sites)

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.draws.items()}
        num_chains, num_draws = next(iter(shapes.values()), (0, 0))[:2]
        found = ", ".join(f"{name} {shape[2:]}" for name, shape in list(shapes.items())[:8])
        more = f" and {len(shapes) - 8} more sites" if len(shapes) > 8 else ""
        owner = "without a model" if self.model is None else f"of {getattr(self.model, '__name__', 'a model')}"
        return f"Run: {num_chains} chains of {num_draws} draws of {found}{more}, {owner}"


def html_table(title: str, figures: list[tuple[str, str]]) -> str:
    """A title and a table of named figures, for notebooks."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in figures)
    return f"<p>{escape(title)}</p><table>{rows}</table>"
