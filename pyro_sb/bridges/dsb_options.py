"""How a diffusion Schrödinger bridge is to be fitted."""

import math
from pathlib import Path
from typing import NamedTuple

from pyro_sb.bridges.vsdm_state import check_choice

PAIRS, LOSSES, REFERENCES = ("independent", "sinkhorn"), ("mean", "drift"), ("brownian", "ou")


class DSBOptions(NamedTuple):
    """How a fit is to learn; as in `DSB.fit`."""

    num_iterations: int
    num_steps: int
    batch_size: int
    learning_rate: float
    ema: float | None
    num_draws: int
    num_pairs: int
    pairs: str
    loss: str
    reference: str
    warm_start: bool
    refresh: int
    progress: bool
    checkpoint: str | Path | None

    def check(self, context_dim: int, method: str) -> None:
        """Refuse what no fit can use."""
        counts = {name: getattr(self, name) for name in ("num_iterations", "num_steps", "batch_size", "refresh")}
        counts |= {"num_draws": self.num_draws - 1, "num_pairs": self.num_pairs - 1}
        bad = [name for name, value in counts.items() if value < 1]
        if bad:
            raise ValueError(
                f"{bad[0]} must be at least {1 + bad[0].endswith(('draws', 'pairs'))}, got {getattr(self, bad[0])}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}. Write None for no average.")
        check_choice("pairs", self.pairs, PAIRS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("reference", self.reference, REFERENCES)
        if self.pairs == "sinkhorn" and context_dim:
            raise ValueError('pairs must be "independent" where there is a context, got "sinkhorn": it mixes contexts.')
        if self.reference == "ou" and method != "ipf":
            raise ValueError('reference "ou" needs method="ipf", got "imf", whose bridges are Brownian.')
