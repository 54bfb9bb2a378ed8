"""Files of tensors and plain values: written whole or not at all, and read without running code."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["checked_path", "checkpoint_path", "read_file", "write_file"]


def __dir__() -> list[str]:
    return sorted(__all__)


def checked_path(name: str, path: Any) -> Path | None:
    """A path that a file can be written to, or None; refused before any work is done.

    Args:
        name: Of the argument.
        path: Text, a path, or None.
    """
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f'{name} must be a path, got {type(path).__name__}. Write {name}="fit.pt".')
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name} must be the path of a file, got the folder {path}. Write {path / 'fit.pt'}.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"{name} must lie in a folder that exists, got {path}. Make {folder} first.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{name} must lie in a folder that can be written to, got {path}. Choose another.")
    return path


def checkpoint_path(path: Any) -> Path | None:
    """As `checked_path`, for a fit that writes again and again: what lies there already must be a file of ours."""
    path = checked_path("checkpoint", path)
    flaw = _flaw(path) if path is not None and path.exists() else None
    if flaw is not None:
        raise ValueError(
            f"checkpoint must not overwrite a file that this package did not write whole, got {path}: {flaw}. Write "
            "another path, or remove it."
        )
    return path


def write_file(value: Any, path: str | Path) -> None:
    """Write tensors and plain values to a file; whatever stops it, the file that was there before stays whole.

    They go to a file beside it first, ``path`` with ``.part`` at its end, which then takes its place.

    Args:
        value: Nest of dicts, lists and tuples with tensors and plain values.
        path: Its folder must exist.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "values.pt"
        >>> write_file({"x": torch.ones(2), "name": "a"}, path)
        >>> read_file(path)
        {'x': tensor([1., 1.]), 'name': 'a'}
    """
    checked_path("path", path)
    path = Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(_dense(value), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_file(path: str | Path, map_location: Any = None) -> Any:
    """Contents of a file that `write_file` wrote, with ``weights_only=True``: no code in the file is run.

    Args:
        path: The file.
        map_location: As in `torch.load`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is torn, altered, or of another program: nothing of it is used.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f'path must be a path, got {type(path).__name__}. Write path="fit.pt".')
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must name a file, got {path}, which is none. Check it with {path.parent}.")
    flaw = _flaw(path)
    if flaw is None:
        try:
            value = torch.load(path, map_location=map_location, weights_only=True)
            flaw = _hollow(value)
        except Exception as error:
            flaw = f"it cannot be read as tensors and plain values ({type(error).__name__})"
    if flaw is not None:
        raise ValueError(
            f"{path} must be a whole file that this package wrote, got one that is not: {flaw}. Nothing of it is used. "
            "Take a copy of it, or delete it and begin again."
        )
    return value


def _flaw(path: Path) -> str | None:
    """What is wrong with the archive: each part has a sum of its own, and is as long as it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "its parts are compressed, which no file of ours is"
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                return "its parts are longer than the file"
            torn = archive.testzip()
    except Exception as error:  # zipfile has many ways to say so
        return f"it is torn or altered ({error})"
    return None if torn is None else f"its part {torn} is altered"


def _dense(value: Any) -> Any:
    """The same nest, its tensors without entries that share one place in memory."""
    if isinstance(value, Tensor):
        return value.contiguous().clone() if _is_hollow(value) else value
    if isinstance(value, dict):
        return type(value)((key, _dense(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_dense(each) for each in value)
    return value


def _hollow(value: Any) -> str | None:
    """What a nest holds that would grow when it is copied: a tensor of more entries than the file has for it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} has fewer numbers" if _is_hollow(value) else None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for found in map(_hollow, inner) if found is not None), None)


def _is_hollow(value: Tensor) -> bool:
    return value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes()
