"""A diffusion's fit on disk: its options, the text that tells it from others, and the file that it goes on from."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sb.bridges.base import FORMAT, Bridge
from pyro_sb.bridges.vsdm_data import Reading, Rows


class FitOptions(NamedTuple):
    """How a fit is to learn; as in `VSDM.fit`."""

    num_steps: int
    batch_size: int
    learning_rate: float
    ema: float | None
    num_draws: int
    num_stages: int
    zeta: float
    progress: bool
    checkpoint: str | Path | None

    def check(self) -> None:
        """Refuse what no fit can use."""
        if self.num_steps < 1 or self.batch_size < 1 or self.num_draws < 2 or self.num_stages < 1:
            raise ValueError(
                f"num_steps, batch_size and num_stages must be at least 1 and num_draws at least 2, got "
                f"{self.num_steps}, {self.batch_size}, {self.num_stages} and {self.num_draws}."
            )
        if not 0 < self.learning_rate < math.inf or not 0 < self.zeta < math.inf:
            raise ValueError(f"learning_rate and zeta must be positive, got {self.learning_rate} and {self.zeta}.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}. Write None for no average.")


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
