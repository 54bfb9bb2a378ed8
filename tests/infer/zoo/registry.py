"""A zoo of model idioms, one line a member: a short name, the model, its data, and what is known of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.infer.models import CASES

MEMBERS: dict[str, "Idiom"] = {}


class Idiom(NamedTuple):
    """A model as its users write it.

    Attributes:
        model: Pyro model, or a function that makes one (``made``).
        data: Makes its positional arguments, under the test's default dtype.
        kwargs: Makes its keyword arguments.
        route: ``"plate"`` where the model's tensors broadcast from the left; None: any.
        made: Whether ``model`` must be called for the model.
        ours: Whether Pyro knows no bijection for some support, and takes ours.
        pyro: Whether Pyro has a potential of it at all.
    """

    model: Callable[..., Any]
    data: Callable[[], tuple[Any, ...]] = tuple
    kwargs: Callable[[], dict[str, Any]] = dict
    route: str | None = "plate"
    made: bool = False
    ours: bool = False
    pyro: bool = True

    def build(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The model and its arguments."""
        return self.model() if self.made else self.model, self.data(), self.kwargs()


def idiom(name: str, data: Callable[[], tuple[Any, ...]] = tuple, **known: Any) -> Callable[[Any], Any]:
    """Enter a model into the zoo."""

    def enter(model: Any) -> Any:
        assert name not in MEMBERS, name
        MEMBERS[name] = Idiom(model, data, **known)
        return model

    return enter


def numbers(n: int, seed: int = 0, *shape: int) -> torch.Tensor:
    """Normal numbers that never change. Shape ``(n, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


def zoo() -> dict[str, Idiom]:
    """Every member, those of `tests.infer.models` among them."""
    import tests.infer.zoo.hierarchies
    import tests.infer.zoo.mixtures
    import tests.infer.zoo.priors
    import tests.infer.zoo.regressions
    import tests.infer.zoo.series
    import tests.infer.zoo.spellings  # noqa: F401

    old = {name: Idiom(c.model, lambda c=c: c.args, lambda c=c: c.kwargs, c.route) for name, c in CASES.items()}
    assert not old.keys() & MEMBERS.keys()
    return old | MEMBERS
