"""A fit of a network on disk: the file that it goes on from, and the words that tell it from others."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import FitOptions
from pyro_sb.bridges.data import DrawsEnd, PairsReading
from pyro_sb.files import read_file, write_file
from pyro_sb.fingerprint import differences, fingerprint
from pyro_sb.training import random_state, set_random_state


def unfinished(checkpoint: str | Path | None) -> dict[str, Any] | None:
    """The state of a fit that did not end, if there is one at this path."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    saved = read_file(checkpoint, map_location="cpu")
    if not isinstance(saved, dict) or "training" not in saved:
        return None
    return saved["training"] | {"state": saved["state"]}


def on_device(saved: Any, device: torch.device) -> Any:
    """A saved state with its tensors on a device; random states are asked for on the CPU, and go back there."""
    if isinstance(saved, Tensor):
        return saved.to(device)
    if isinstance(saved, dict):
        return {key: on_device(value, device) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(on_device(value, device) for value in saved)
    return saved


def go_on(options: FitOptions) -> tuple[dict[str, Any] | None, list[Tensor]]:
    """An unfinished fit at the checkpoint's path, and torch's random state as of its start; else None and the present.

    Where there is one the random state is put back, so that the data are read as they were.
    """
    saved, random = unfinished(options.checkpoint), random_state()
    if saved is not None:
        random = saved["start"]
        set_random_state(random)
    return saved, random


def check_same(saved: dict[str, Any] | None, name: dict[str, str], options: FitOptions) -> None:
    """Refuse to go on from another fit."""
    differ = "" if saved is None else differences(saved["fit"], name)
    if differ:
        raise ValueError(
            f"checkpoint must be of this fit to go on from, got that of another in {options.checkpoint}: {differ}. "
            "Delete it, or write another path."
        )


def words_of(
    kind: str, config: dict[str, Any], options: FitOptions, read: PairsReading, *others: Any
) -> dict[str, str]:
    """What tells a fit from those that could not go on from it, by name.

    Args:
        kind: The bridge's class.
        config: Its constructor's arguments.
        options: Of the fit.
        read: Its data.
        others: Options and data of this kind of fit alone.
    """
    plain = options._replace(progress=False, checkpoint=None)._asdict()
    words = {name: _word(value) for name, value in (config | plain).items()}
    kept = read.end.num_train if isinstance(read.end, DrawsEnd) else "a law's"
    data = f"{read.data} ({fingerprint(read.digest, read.covariance, read.affine.location)}), {kept} to learn from"
    return words | {"bridge": kind, "data": data, "other options": fingerprint(*others)}


def _word(value: Any) -> str:
    return fingerprint(value) if isinstance(value, Tensor) or len(repr(value)) > 60 else repr(value)


def write(contents: dict[str, Any], training: dict[str, Any], checkpoint: str | Path | None) -> None:
    """A bridge's `Bridge.contents` with the training beside them, loadable as a bridge."""
    assert checkpoint is not None
    write_file(contents | {"training": training}, checkpoint)
