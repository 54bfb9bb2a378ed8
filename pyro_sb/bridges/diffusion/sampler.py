"""Sampler of a diffusion: which solver makes its draws, and in how many steps."""

from dataclasses import dataclass

from torch import Tensor

from pyro_sb.checks import check_choice, whole
from pyro_sb.ops.linear_sde import LinearSDE
from pyro_sb.ops.solvers import Denoiser, Model, ancestral, euler, euler_maruyama, heun, multistep

FLOW_SOLVERS = ("multistep", "heun", "euler")
SOLVERS = (*FLOW_SOLVERS, "euler-maruyama", "ancestral")


@dataclass(kw_only=True)
class Sampler:
    """Solver and numbers of steps of a diffusion's draws; assign a new one to ``bridge.sampler`` at any time.

    Args:
        num_steps: Steps of `sample` and `transport`, at least 1. An evaluation each; two with ``"heun"``.
        solver: ``"multistep"`` (exponential integrator of the probability flow), ``"heun"``, ``"euler"``; with noise
            ``"euler-maruyama"`` or ``"ancestral"``.
        path_steps: Steps of `draws`, whose log weights are exact for any number; more steps, more effective draws.

    Example:
        >>> Sampler(num_steps=6, solver="heun").path_steps
        20
    """

    num_steps: int = 10
    solver: str = "multistep"
    path_steps: int = 20

    def __post_init__(self) -> None:
        self.num_steps = whole("num_steps", self.num_steps)
        self.path_steps = whole("path_steps", self.path_steps)
        check_choice("solver", self.solver, SOLVERS)


def solved(
    solver: str,
    denoise: Denoiser,
    model: Model,
    sde: LinearSDE,
    times: Tensor,
    z: Tensor,
    spread: Tensor,
) -> list[Tensor]:
    """States at all times from those at the first.

    Args:
        solver: As in `Sampler`.
        denoise: Mean of the target given a time and states.
        model: Its mean and covariance, for ancestral steps.
        sde: The noising process.
        times: Noising times, falling. Shape ``(K + 1,)``.
        z: States at the first. Shape ``(n, dim)``.
        spread: Variances of the target. Shape ``(dim,)``.
    """
    if solver == "multistep":
        return multistep(denoise, sde, times, z)
    if solver == "heun":
        return heun(denoise, sde, times, z, spread)
    if solver == "euler":
        return euler(denoise, sde, times, z)
    if solver == "euler-maruyama":
        return euler_maruyama(denoise, sde, times, z)
    return ancestral(model, sde, times, z).states
