"""How a light bridge is to learn."""

import math
from pathlib import Path
from typing import NamedTuple


class FitOptions(NamedTuple):
    """How a fit is to learn; as in `VSDM.fit`."""

    num_updates: int
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
        if self.num_updates < 1 or self.batch_size < 1 or self.num_draws < 2 or self.num_stages < 1:
            raise ValueError(
                f"num_updates, batch_size and num_stages must be at least 1 and num_draws at least 2, got "
                f"{self.num_updates}, {self.batch_size}, {self.num_stages} and {self.num_draws}."
            )
        if not 0 < self.learning_rate < math.inf or not 0 < self.zeta < math.inf:
            raise ValueError(f"learning_rate and zeta must be positive, got {self.learning_rate} and {self.zeta}.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}. Write None for no average.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")
