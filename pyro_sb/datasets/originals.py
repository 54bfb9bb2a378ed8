"""The files of posteriordb and of sbibm, read from a folder that the user names: none of them is in this package."""

import importlib.util
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_sb.files import read_file

__all__ = ["Reference", "read_posterior", "read_simulator"]

_THIN, _OBSERVATIONS = 5, 5  # every fifth of the 10,000 draws is kept; of sbibm's ten observations the first five
_ROWS = ("observations", "true_parameters", "reference", "reference_mean", "reference_sd")


@dataclass(frozen=True, eq=False)
class Reference:
    """Reference of a posterior in posteriordb: names of its p quantities, some draws, mean and sd of all of them.

    Attributes:
        parameters: The names, as Stan counts: ``"theta[1]"``.
        draws: Every fifth of the draws. Shape ``(num_draws / 5, p)``.
        mean: Of all draws. Shape ``(p,)``.
        sd: Of all draws. Shape ``(p,)``.
        num_draws: How many there are.
    """

    parameters: tuple[str, ...]
    draws: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    num_draws: int


def read_posterior(name: str, root: str | Path | None) -> tuple[dict[str, Any], Reference]:
    """Data and reference of a posterior of posteriordb, by the name it has there.

    Args:
        name: ``DATA-MODEL``, such as ``"arK-arK"``.
        root: A checkout of posteriordb or its ``posterior_database``, or a folder of ``NAME.data.json`` and
            ``NAME.npz``. None: the folder that ``PYRO_SB_POSTERIORDB`` names.
    """
    folder = _named(root, "PYRO_SB_POSTERIORDB")
    if folder is None:
        raise FileNotFoundError(
            f"posteriordb's {name} must lie in a folder, and none is named. Write `git clone --depth 1 "
            "https://github.com/stan-dev/posteriordb`, then root='posteriordb' or the environment variable "
            "PYRO_SB_POSTERIORDB. exact_task has the same models on data that need no files."
        )
    base = folder / "posterior_database" if (folder / "posterior_database").is_dir() else folder
    if (base / "posteriors" / f"{name}.json").is_file():
        return _checked_out(base, name)
    if (folder / f"{name}.data.json").is_file() and (folder / f"{name}.npz").is_file():
        return _flat(folder, name)
    raise FileNotFoundError(
        f"root (or PYRO_SB_POSTERIORDB) must be a checkout of posteriordb that holds posterior_database/posteriors/"
        f"{name}.json, or a folder with {name}.data.json and {name}.npz; got {str(folder)!r}. "
        "Write `git clone --depth 1 https://github.com/stan-dev/posteriordb`."
    )


def read_simulator(name: str, root: str | Path | None) -> dict[str, np.ndarray]:
    """Observations 1 to 5 of a task of sbibm, the parameters that made them, and their reference posteriors.

    Args:
        name: The task's name in sbibm.
        root: The package ``sbibm``'s folder (or the one around it), or a folder of ``NAME.npz``. None: the folder that
            ``PYRO_SB_SBIBM`` names, or else the installed package, which is found without being imported.

    Returns:
        ``observations``, ``true_parameters``, ``reference`` (every fifth draw), ``reference_mean`` and
        ``reference_sd`` (of all draws), each with one row an observation; of bernoulli_glm also ``design_matrix``.
    """
    folder = _named(root, "PYRO_SB_SBIBM") or _installed("sbibm")
    if folder is None:
        raise FileNotFoundError(
            f"sbibm's files for {name!r} must lie in a folder, and none is named. Write `pip install --no-deps sbibm` "
            "(it need not be importable), or name a folder by root= or the environment variable PYRO_SB_SBIBM. "
            f"The simulator needs no files: pyro_sb.datasets.{name}."
        )
    for base in (folder / "tasks", folder / "sbibm" / "tasks"):
        if (base / name / "files").is_dir():
            return _packaged(base / name / "files")
    if (folder / f"{name}.npz").is_file():
        with np.load(folder / f"{name}.npz") as file:
            return {key: file[key] for key in (*_ROWS, "design_matrix") if key in file}
    raise FileNotFoundError(
        f"root (or PYRO_SB_SBIBM) must be the folder of the package sbibm with tasks/{name}/files, or a folder with "
        f"{name}.npz; got {str(folder)!r}. Write `pip install --no-deps sbibm`."
    )


def _named(root: str | Path | None, variable: str) -> Path | None:
    named = os.environ.get(variable) if root is None else root
    return Path(named).expanduser() if named else None


def _installed(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # a top-level name: nothing is imported
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _checked_out(base: Path, name: str) -> tuple[dict[str, Any], Reference]:
    """The layout of posteriordb: a description, and zipped JSON of the data and of one dict a chain."""
    described = json.loads((base / "posteriors" / f"{name}.json").read_text())
    data = _zipped(base / "data" / "data" / f"{described['data_name']}.json.zip")
    folder = base / "reference_posteriors" / "draws" / "draws"
    chains = _zipped(folder / f"{described['reference_posterior_name']}.json.zip")
    parameters = tuple(chains[0])
    draws = np.concatenate([np.stack([chain[key] for key in parameters], -1) for chain in chains]).astype(np.float64)
    return data, Reference(parameters, draws[::_THIN], draws.mean(0), draws.std(0, ddof=1), len(draws))


def _zipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return json.loads(archive.read(path.stem if path.stem in names else names[0]))


def _flat(folder: Path, name: str) -> tuple[dict[str, Any], Reference]:
    data = json.loads((folder / f"{name}.data.json").read_text())
    with np.load(folder / f"{name}.npz") as file:
        moments, num_draws = (file["reference_mean"], file["reference_sd"]), int(file["n_reference"])
        return data, Reference(tuple(map(str, file["params"])), file["draws"].astype(np.float64), *moments, num_draws)


def _packaged(files: Path) -> dict[str, np.ndarray]:
    """The layout of sbibm: a folder an observation, with tables that have one line of names."""
    folders = [files / f"num_observation_{number}" for number in range(1, _OBSERVATIONS + 1)]
    draws = np.stack([_table(folder / "reference_posterior_samples.csv.bz2") for folder in folders])
    design = files / "design_matrix.pt"
    return {
        "observations": np.concatenate([_table(folder / "observation.csv") for folder in folders]),
        "true_parameters": np.concatenate([_table(folder / "true_parameters.csv") for folder in folders]),
        "reference": draws[:, ::_THIN],
        "reference_mean": draws.mean(1),
        "reference_sd": draws.std(1, ddof=1),
    } | ({"design_matrix": read_file(design).numpy()} if design.is_file() else {})


def _table(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
