"""Numbers of sites as columns: numpy alone, for both environments."""

from collections.abc import Sequence

import numpy as np

MOST = 250  # numbers of one site that are looked at


def places(size: int) -> np.ndarray:
    """Which of a site's numbers are looked at: all, or `MOST` evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, MOST)).round().astype(int))


def names_of(site: str, size: int) -> list[str]:
    """Names of those numbers, as Stan counts: ``"x[1]"``."""
    return [f"{site}[{i + 1}]" for i in places(size)]


def columns(samples: dict[str, np.ndarray], sites: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names and draws ``(chain, draw, p)`` of sites ``(chain, draw, *shape)``; a site without shape has no index."""
    names: list[str] = []
    parts: list[np.ndarray] = []
    for site in sites:
        value = np.asarray(samples[site])
        if value.ndim == 2:
            names.append(site)
            parts.append(value[..., None])
        else:
            flat = value.reshape(*value.shape[:2], -1)
            names += names_of(site, flat.shape[-1])
            parts.append(flat[..., places(flat.shape[-1])])
    return names, np.concatenate(parts, -1).astype(np.float32 if parts[0].dtype == np.float32 else np.float64)
