"""Files of tensors and plain values: written whole or not at all, and read without running code."""

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_file", "write_file"]


def __dir__() -> list[str]:
    return sorted(__all__)


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
    path = Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(value, file)
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
    """
    return torch.load(path, map_location=map_location, weights_only=True)
