"""ArviZ's containers of draws, made of arrays and read as arrays, with R-hat and effective sizes; ArviZ 0.x and 1.x.

Needs numpy and ArviZ alone, so that it can be tried on a Python that has no torch.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ChainFigures", "chain_figures", "container_arrays", "is_container", "to_container"]


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


def is_container(x: Any) -> bool:
    """Whether it is one of ArviZ's: ``InferenceData`` (0.x) or ``DataTree`` (1.x)."""
    return type(x).__name__ in ("InferenceData", "DataTree")


def container_arrays(container: Any) -> dict[str, np.ndarray]:
    """Draws of the posterior by variable. Shape ``(chain, draw, *site)``."""
    if "posterior" not in _groups(container):
        raise ValueError(
            f"the container must have a group posterior, got {_groups(container)}. Write to_arviz(run); a model "
            "without latents has none."
        )
    group = container["posterior"]
    dims = {name: group[name].dims for name in group.data_vars}
    return {
        str(name): group[name].transpose("chain", "draw", *[d for d in dims[name] if d not in ("chain", "draw")]).values
        for name in group.data_vars
    }


class ChainFigures(NamedTuple):
    r"""Figures of a run, one entry for every number of every site.

    Attributes:
        names: ``"mu"``, ``"theta[3]"``.
        r_hat: Rank-normalised split R-hat; of a single chain, between its halves of at least four draws, else NaN. NaN
            of a constant and of a number with a draw that is not finite, as are both effective sizes.
        ess_bulk: Bulk effective sample size.
        ess_tail: Tail effective sample size: the smaller of those of the 5 % and the 95 % quantile.
        num_chains: Chains.
        num_draws: Draws a chain.
        diverging: Divergent draws; None where the container has no such statistic.
        not_finite: Draws of each number that are NaN or infinite.
        constant: Whether a number has one finite value in all chains.
    """

    names: list[str]
    r_hat: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    num_chains: int
    num_draws: int
    diverging: int | None
    not_finite: np.ndarray | None = None
    constant: np.ndarray | None = None


def chain_figures(container: Any) -> ChainFigures:
    r"""R-hat and effective sizes of a run, by ArviZ.

    Args:
        container: ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x) with a group ``posterior``.

    Raises:
        ValueError: No posterior, or fewer than four draws a chain.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(4, 500, 2))
        >>> figures = chain_figures(to_container({"posterior": {"mu": draws}}))
        >>> figures.names, bool((figures.r_hat < 1.01).all())
        (['mu[0]', 'mu[1]'], True)
    """
    az = _arviz()
    arrays = container_arrays(container)
    num_chains, num_draws = next(iter(arrays.values())).shape[:2]
    if num_draws < 4:
        raise ValueError(
            f"R-hat and ESS need at least 4 draws a chain, got {num_draws}. Write num_samples=100 or more."
        )
    group = container["posterior"]
    names: list[str] = []
    columns: list[list[np.ndarray]] = [[], [], []]
    with np.errstate(invalid="ignore", divide="ignore"):  # of constants and of what is not finite
        bulk, tail = az.ess(container, method="bulk"), az.ess(container, method="tail", prob=(0.05, 0.95))
        r_hat = None if num_chains == 1 else az.rhat(container, method="rank")
    for name in group.data_vars:
        array = arrays[str(name)]
        names += _names(str(name), array.shape[2:])
        between = _halves(az, array) if r_hat is None else r_hat[name].values
        for column, figure in zip(columns, (between, bulk[name].values, tail[name].values)):
            column.append(np.array(figure, dtype=float).reshape(-1))
    draws = np.concatenate([array.reshape(num_chains * num_draws, -1) for array in arrays.values()], 1)
    not_finite = (~np.isfinite(draws)).sum(0)
    constant = (draws == draws[0]).all(0) & (not_finite == 0)
    judged = (not_finite == 0) & ~constant
    r_hats, bulks, tails = (np.where(judged, np.concatenate(column), np.nan) for column in columns)
    return ChainFigures(names, r_hats, bulks, tails, num_chains, num_draws, _diverging(container), not_finite, constant)


def _groups(container: Any) -> list[str]:
    groups = container.groups() if callable(getattr(container, "groups", None)) else container.groups
    return [str(group).strip("/") for group in groups]


def _halves(az: Any, array: np.ndarray) -> np.ndarray:
    """R-hat of every number of one chain ``(1, draw, *site)``, its halves taken for two."""
    half = array.shape[1] // 2
    both = np.concatenate([array[:, :half], array[:, -half:]]).astype(float)
    flat = both.reshape(2, half, -1)
    if half < 4:
        return np.full(flat.shape[-1], np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array(
            [float(az.rhat(np.ascontiguousarray(flat[..., i]), method="rank")) for i in range(flat.shape[-1])]
        )


def _names(name: str, shape: tuple[int, ...]) -> list[str]:
    return [f"{name}[{', '.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)]


def _diverging(container: Any) -> int | None:
    if "sample_stats" not in _groups(container):
        return None
    statistics = container["sample_stats"]
    return int(statistics["diverging"].values.sum()) if "diverging" in statistics.data_vars else None
