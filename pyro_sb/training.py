"""What a fit leaves behind."""

from dataclasses import dataclass, field


@dataclass
class FitHistory:
    """Record of one fit, returned by `Bridge.fit`.

    Attributes:
        residuals: How far the constraint was from holding, an entry an iteration; empty where the method has none.
        losses: Training loss, an entry an evaluation; empty where the method has none.
        validation_losses: The same on held-out draws.
        iterations: Updates made.
        seconds: Wall time of the fit.
        converged: Whether the method's own stopping rule was met.

    Example:
        >>> FitHistory(residuals=[0.3, 1e-7], iterations=1, seconds=0.01, converged=True).residual
        1e-07
    """

    residuals: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    iterations: int = 0
    seconds: float = 0.0
    converged: bool = False

    @property
    def residual(self) -> float:
        """The last residual; NaN where the method has none."""
        return self.residuals[-1] if self.residuals else float("nan")
