"""The second half of ``to_arviz``: nested dict of arrays to ArviZ's container, in ArviZ 0.x and 1.x.

Needs numpy and ArviZ alone, so that it can be tried on a Python that has no torch.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["to_container"]


def to_container(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[Hashable]] | None = None,
) -> Any:
    r"""ArviZ's container of groups of arrays.

    Args:
        groups: ``{group: {variable: array}}``. Arrays ``(chain, draw, *shape)``, in ``observed_data`` ``shape``.
        coords: Labels of the named dimensions.
        dims: Names of each variable's dimensions, chain and draw left out.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x).

    Raises:
        ImportError: ArviZ is not installed.

    Example:
        >>> import numpy as np
        >>> idata = to_container({"posterior": {"mu": np.zeros((4, 100))}})
        >>> idata.posterior["mu"].dims
        ('chain', 'draw')
    """
    az = _arviz()
    coords = {name: list(labels) for name, labels in (coords or {}).items()}
    dims = {name: list(names) for name, names in (dims or {}).items()}
    filled = {group: dict(variables) for group, variables in groups.items() if variables}
    with warnings.catch_warnings():
        # many short chains are what vectorised sampling makes; the shapes here are known to be (chain, draw, ...)
        warnings.filterwarnings("ignore", message="More chains", category=UserWarning)
        if int(az.__version__.split(".")[0]) >= 1:
            return az.from_dict(filled, coords=coords, dims=dims)
        return az.from_dict(**filled, coords=coords, dims=dims)


def _arviz() -> Any:
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ. Write pip install 'pyro-sb[arviz]'.") from error
    return arviz
