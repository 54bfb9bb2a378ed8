"""An unfinished latent fit on disk: the fitted codec and the inner bridge's own checkpoint, beside the final file."""

import os
from pathlib import Path

import torch
from torch import Tensor

from pyro_sb.bridges.codecs import Codec
from pyro_sb.training import random_state, set_random_state


class Parts:
    """The files of one fit.

    Args:
        checkpoint: Where the whole bridge will be; None: nothing is kept.
        draws: The target's draws, by whose figures the fit is known again.
    """

    def __init__(self, checkpoint: str | Path | None, draws: Tensor) -> None:
        path = None if checkpoint is None else Path(checkpoint)
        self.codec = None if path is None else path.with_name(path.name + ".codec")
        self.inner = None if path is None else path.with_name(path.name + ".inner")
        self.name = [float(draws.double().sum()), float(draws.double().square().sum()), *map(float, draws.shape)]

    def restore(self, codec: Codec) -> bool:
        """Whether a fit of these draws was cut short; the codec and torch's random state are then as it had them."""
        if self.codec is None or not self.codec.exists():
            return False
        saved = torch.load(self.codec, map_location="cpu", weights_only=True)
        if saved["draws"] != self.name:
            raise ValueError(
                f"checkpoint must be of this fit to go on from, got that of other data in {self.codec}. Delete it, or "
                "write another path."
            )
        codec.load_state_dict(saved["state"])
        set_random_state(saved["random"])
        return True

    def keep(self, codec: Codec) -> None:
        """Write the fitted codec."""
        if self.codec is None:
            return
        part = self.codec.with_name(self.codec.name + ".part")
        torch.save({"draws": self.name, "state": codec.state_dict(), "random": random_state()}, part)
        os.replace(part, self.codec)

    def clear(self) -> None:
        """Remove both files."""
        for path in (self.codec, self.inner):
            if path is not None:
                path.unlink(missing_ok=True)
