"""Names of options: those that a method takes, and the refusal of others."""

import difflib
import inspect
from collections.abc import Iterable


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
