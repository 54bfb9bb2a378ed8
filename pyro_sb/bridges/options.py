"""Options of fits and constructors: those that fits share, and checks that name what is wrong."""

import difflib
import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


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

    def check(self) -> None:
        """Refuse what no fit can use."""
        check_counts(num_updates=self.num_updates, batch_size=self.batch_size)
        check_counts(2, num_law_draws=self.num_law_draws)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}. Write 2e-3.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}. Write None for no average.")


def check_counts(least: int = 1, **counts: int) -> None:
    """Refuse numbers below the least.

    Example:
        >>> check_counts(2, num_law_draws=1)
        Traceback (most recent call last):
        ValueError: num_law_draws must be at least 2, got 1. Omit it for the default.
    """
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}. Omit it for the default.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def keyword_names(kind: type, method: str) -> frozenset[str]:
    """Options of a method, by name; where it passes ``**options`` on, those of the classes above too.

    These are its keyword-only arguments, and others that have a default, but for ``source``.

    Example:
        >>> class A:
        ...     def fit(self, x, *, rate=1): ...
        >>> class B(A):
        ...     def fit(self, x, *, more=2, **options): ...
        >>> sorted(keyword_names(B, "fit"))
        ['more', 'rate']
    """
    names: set[str] = set()
    for base in kind.__mro__:
        if method not in vars(base):
            continue
        parameters = inspect.signature(vars(base)[method]).parameters.values()
        optional = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty}
        names |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} | optional - {"source"}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names)


def check_names(call: str, options: Iterable[str], known: Iterable[str], given: Iterable[str] = ()) -> None:
    """Refuse options that are not known, by name, with the nearest that is; or that the caller gives itself.

    Example:
        >>> check_names("VSDM.fit", ["num_update"], ["num_updates", "ema"])
        Traceback (most recent call last):
        TypeError: VSDM.fit has no option 'num_update'. Did you mean 'num_updates'? It takes ema, num_updates.
    """
    given = set(given)
    known = sorted(set(known) - given)
    for name in options:
        if name in given:
            raise TypeError(f"{call} is given {name!r} by its caller, got it as an option. Leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{call} has no option {name!r}.{hint} It takes {', '.join(known) or 'none'}.")
