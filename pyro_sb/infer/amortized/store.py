"""Simulations and training rows on disk beside a checkpoint, until the fit that they belong to has ended."""

from pathlib import Path
from typing import Any, NamedTuple

from pyro_sb.files import read_file, write_file
from pyro_sb.infer.amortized.latent_law import Residuals
from pyro_sb.infer.amortized.simulator import Simulations
from pyro_sb.infer.amortized.training_set import TrainingSet

__all__ = ["Kept", "Store"]


class Kept(NamedTuple):
    """What an unfinished fit had made."""

    simulations: Simulations
    rows: TrainingSet
    exchangeable: dict[str, int]


class Store:
    """One file of tensors and plain values beside a checkpoint; nothing where there is no checkpoint.

    Args:
        checkpoint: Path of the bridge's checkpoint.
        arguments: What a fit must share to go on with the file.
    """

    def __init__(self, checkpoint: str | Path | None, arguments: dict[str, Any]) -> None:
        self.path = None if checkpoint is None else Path(f"{checkpoint}.simulations")
        self.arguments = arguments

    def read(self) -> Kept | None:
        """What is there; None if nothing is; an error if it belongs to another fit."""
        if self.path is None or not self.path.exists():
            return None
        saved = read_file(self.path)
        if saved["arguments"] != self.arguments:
            raise ValueError(
                f"{self.path} must be of this fit, {self.arguments}, got {saved['arguments']}. Fit with those, or "
                "remove the file."
            )
        residuals = Residuals(*saved["residuals"])
        return Kept(
            Simulations(*saved["simulations"]),
            TrainingSet(residuals, *saved["rows"]),
            saved["exchangeable"],
        )

    def write(self, simulations: Simulations, rows: TrainingSet, exchangeable: dict[str, int]) -> None:
        """Put it there, as a whole or not at all."""
        if self.path is None:
            return
        residuals = rows.residuals
        state = {
            "arguments": self.arguments,
            "simulations": list(simulations),
            "residuals": [residuals.bounded, residuals.weights, residuals.factor],
            "rows": [rows.latents, rows.context, rows.features, rows.held_out, rows.num_simulations],
            "exchangeable": exchangeable,
        }
        write_file(state, self.path)

    def clear(self) -> None:
        """Remove it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
