"""A diffusion's fit on disk: its options, the text that tells it from others, and the file that it goes on from."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_sb.bridges.base import FORMAT, Bridge
from pyro_sb.bridges.pairs import Reading, Rows


def unfinished(checkpoint: str | Path | None) -> dict[str, Any] | None:
    """The state of a fit that did not end, if there is one at this path."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
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


def fingerprint(bridge: Bridge, options: Any, read: Reading) -> str:
    """A text that differs between fits that could not go on from each other."""
    config = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in bridge.config().items()}
    plain = options._replace(progress=False, checkpoint=None)
    split: list[float] = [] if not isinstance(read.end, Rows) else [read.end.num_train]
    split.append(float(read.affine.location.double().sum()))
    return repr((type(bridge).__name__, config, plain, split, read.sums, str(read.covariance.dtype)))


def write(bridge: Bridge, training: dict[str, Any], path: Path) -> None:
    """The bridge as `Bridge.save` writes it, with the training beside it; a crash in between leaves the file before."""
    part = path.with_name(path.name + ".part")
    weights = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in bridge.state_dict().items()}
    saved = {"format": FORMAT, "class": type(bridge).__name__, "config": bridge.config(), "state": weights}
    torch.save(saved | {"training": training}, part)
    os.replace(part, path)
