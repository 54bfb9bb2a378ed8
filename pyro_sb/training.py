"""The training loop: Adam, gradients clipped, a cosine of learning rates; and the record of a fit."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_sb.checks import number, whole
from pyro_sb.threads import Pace, chosen_threads
from pyro_sb.warn import warn

__all__ = [
    "Average",
    "Best",
    "EarlyChecks",
    "FitHistory",
    "cosine",
    "interruptible",
    "random_state",
    "set_random_state",
    "train",
]


def __dir__() -> list[str]:
    return sorted(__all__)


SHARES = (2, 4, 8, 16)  # of the way to the loop's first check that `EarlyChecks` looks at
TOLERANCE = 0.05  # nats


@dataclass(repr=False)
class FitHistory:
    """Record of one fit, returned by `Bridge.fit`.

    Printed, it is a line of the numbers that matter.

    Attributes:
        residuals: How far the constraint was from holding, an entry an iteration; empty where the method has none.
        losses: Training loss, an entry an evaluation; empty where the method has none.
        validation_losses: The same on held-out draws.
        iterations: Updates made.
        seconds: Wall time of the fit.
        converged: Whether the method's own stopping rule was met.
        interrupted: Whether Ctrl-C ended it; what was learnt until then is kept.
        threads: Threads of an update, chosen by its wall time (`pyro_sb.threads`).

    Example:
        >>> FitHistory(residuals=[0.3, 1e-7], iterations=2, seconds=0.01, converged=True)
        FitHistory: 2 updates in 0.01 s, last residual 1e-07, converged
    """

    residuals: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    iterations: int = 0
    seconds: float = 0.0
    converged: bool = False
    interrupted: bool = False
    threads: str = field(default="", compare=False)

    @property
    def residual(self) -> float:
        """The last residual; NaN where the method has none."""
        return self.residuals[-1] if self.residuals else float("nan")

    def __repr__(self) -> str:
        named = {"loss": self.losses, "held-out loss": self.validation_losses, "residual": self.residuals}
        last = [f"last {name} {values[-1]:.4g}" for name, values in named.items() if values]
        end = "interrupted" if self.interrupted else "converged" if self.converged else "not converged"
        parts = [f"{self.iterations} updates in {self.seconds:.3g} s", *last, end, self.threads]
        return f"FitHistory: {', '.join(filter(None, parts))}"


class Best:
    """The best values that parameters have had, by a loss; what a crash or Ctrl-C goes back to."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.loss = parameters, math.inf
        self.values = [p.detach().clone() for p in parameters]

    def offer(self, loss: float) -> bool:
        """Keep the present values if their loss is the lowest so far; whether it is."""
        if not loss < self.loss:
            return False
        self.loss = loss
        self.keep()
        return True

    def keep(self) -> None:
        """Keep the present values."""
        for kept, value in zip(self.values, self.parameters):
            kept.copy_(value.detach())

    def restore(self) -> None:
        """Put the kept values back."""
        with torch.no_grad():
            for kept, value in zip(self.values, self.parameters):
                value.copy_(kept)


class Average:
    r"""Exponential moving average of parameters: :math:`a \leftarrow \lambda a + (1 - \lambda) p`.

    The first updates weigh more: the factor is the smaller of ``decay`` and ``(1 + n) / (10 + n)`` at update n.

    Args:
        parameters: What is averaged.
        decay: In [0, 1); None for no average, the parameters themselves.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float | None) -> None:
        self.parameters, self.updates = parameters, 0
        self.decay = None if decay is None else number("ema", decay, "[0, 1)", "Write None for no average.")
        self.values = [] if decay is None else [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present values in."""
        self.updates += 1
        if self.decay is not None:
            factor = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - factor)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the parameters' own values."""
        for value, parameter in zip(self.values, self.parameters):
            own = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(own)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The parameters hold the average within."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    num_updates: int,
    learning_rate: float,
    final_rate: float = 0.02,
    clip: float = 1.0,
    validate: Callable[[], float] | None = None,
    keep_best: bool = False,
    num_checks: int = 20,
    patience: int | None = None,
    least: float = 0.0,
    tolerance: float = 0.05,
    progress: bool = True,
    description: str = "",
    on_check: Callable[[], None] | None = None,
    ema: float | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> FitHistory:
    r"""Adam with the norm of the gradient clipped and the learning rate lowered along a cosine.

    Ctrl-C stops the loop with a warning and keeps what was learnt. A loss that is not finite raises, with the last
    checked parameters put back.

    Args:
        parameters: What is learnt.
        loss: Draws a minibatch and returns its loss, a scalar in nats.
        num_updates: Updates, at least 1.
        learning_rate: Of the first update, positive.
        final_rate: Share of the learning rate that is left at the end, in [0, 1].
        clip: Largest norm of the gradient.
        validate: Loss on held-out draws, at ``num_checks`` points of the way. Omitted: the training loss stands in.
        keep_best: Go back to the parameters with the lowest validation loss: for finite data.
        num_checks: How often to validate.
        patience: Stop after this many checks without a lower validation loss. Omitted: never.
        least: Share of the updates that are made whatever the checks say, in [0, 1].
        tolerance: Fall of the validation loss over the last quarter of the checks, in nats, above which the fit counts
            as not converged and warns.
        progress: Show a bar.
        description: What the bar and the warnings call it.
        on_check: Called after every check: a place to save.
        ema: Decay of an exponential moving average of the parameters, which is then what is validated, kept and left
            behind. Omitted: no average.
        on_state: Called after every check with the whole state of the loop, torch's random state included, as tensors
            and plain values.
        resume: Such a state: the loop goes on from it, and ends bit for bit where it would have ended uninterrupted,
            with the same number of threads.

    Returns:
        Losses at every check, updates made, seconds, whether the validation loss had stopped falling.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor(1.0))
        >>> history = train([x], lambda: x**2, num_updates=200, learning_rate=0.1, progress=False)
        >>> abs(x.item()) < 0.01
        True
    """
    num_updates, num_checks = whole("num_updates", num_updates), whole("num_checks", num_checks)
    learning_rate = number("learning_rate", learning_rate, "(0, inf)", "Write 2e-3.")
    begun, history, pace = time.perf_counter(), FitHistory(), Pace()
    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, learning_rate, foreach=True)
    best, average, every = Best(parameters), Average(parameters, ema), max(1, num_updates // num_checks)
    recent, stale, spent = 0.0, 0, 0.0
    if resume is not None:
        history, stale, spent = _restore(resume, parameters, optimiser, average, best)
    elif keep_best and validate is not None:
        best.offer(validate())
    first = history.iterations + 1
    bar = tqdm(range(first, num_updates + 1), desc=description, disable=not progress, leave=False)
    with chosen_threads(*parameters), interruptible(history, num_updates, description):
        ended = patience is not None and stale >= patience and history.iterations >= least * num_updates
        for step in pace.each(bar if resume is None or not ended else (), parameters[0].device):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * cosine(step / num_updates, final_rate)
            value = loss()
            if not bool(torch.isfinite(value)):
                best.restore()
                raise RuntimeError(
                    f"the training loss must stay finite, got {value.item()} at step {step}. "
                    f"Lower learning_rate (now {learning_rate:g}) or raise epsilon."
                )
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
            optimiser.step()
            average.update()
            history.iterations = step
            recent += float(value.detach())
            if step % every and step < num_updates:
                continue
            history.losses.append(recent / ((step - 1) % every + 1))
            recent = 0.0
            with average.inside():
                held_out = history.losses[-1] if validate is None else validate()
                if validate is not None:
                    history.validation_losses.append(held_out)
                    bar.set_postfix(held_out=f"{held_out:.4f}", refresh=False)
                stale = 0 if best.offer(held_out) else stale + 1
                if not keep_best:
                    best.keep()
                if on_check is not None:
                    on_check()
            if on_state is not None:
                history.seconds = spent + time.perf_counter() - begun
                on_state(_state(history, stale, parameters, optimiser, average, best))
            if patience is not None and stale >= patience and step >= least * num_updates:
                break
    optimiser.zero_grad(set_to_none=True)
    average.swap()
    if keep_best and math.isfinite(best.loss):
        best.restore()
    history.seconds, history.threads = spent + time.perf_counter() - begun, pace.describe()
    history.converged = not history.interrupted and _settled(history, tolerance, num_updates, description)
    return history


class EarlyChecks:
    """Held-out losses of the start, of Adam's loop, and between: a network may overfit few draws in a dozen updates.

    The loop checks at its start and every ``every`` updates. Here are checks after a sixteenth, an eighth, a quarter
    and a half of the first ``every`` updates, and the best of those parameters.

    Args:
        parameters: What the loop learns.
        validate: Held-out loss of their present values, in nats.
        every: Updates between checks of the loop.
    """

    def __init__(self, parameters: list[nn.Parameter], validate: Callable[[], float], every: int) -> None:
        self.best, self._validate = Best(parameters), validate
        self._steps = {every // share for share in SHARES} - {0}
        self._updates, self._losses = 0, list[float]()

    def validate(self) -> float:
        """The held-out loss, noted: the first one is the start's."""
        self._losses.append(self._validate())
        return self._losses[-1]

    def look(self) -> None:
        """To be called before every update: a check where one is due."""
        if self._updates in self._steps:
            self.best.offer(self.validate())
        self._updates += 1

    def settle(self, history: FitHistory) -> None:
        """Go back to an early look where none of the loop's checks is as low."""
        if self.best.loss < min(self._losses[:1] + history.validation_losses):
            self.best.restore()

    def warn_if_start(self, history: FitHistory, name: str, rows: int, knobs: str) -> None:
        """Say so where the start, which ignores the context, was the best of all, and by far that of the loop.

        A loop that stays as good as its start has met a context that tells nothing: there is nothing to say.
        """
        start, *later = self._losses
        if not later or min(later) < start or min(history.validation_losses, default=start) <= start + TOLERANCE:
            return
        warn(
            f"{name} kept its start, which does not use the context: its held-out loss of {start:.4g} nats was never "
            f"reached again at {len(later)} checks, at best {min(later):.4g}. Unless the context tells nothing about "
            f"the target, {rows} draws are too few for the network ({knobs}): give more draws, raise dropout, or lower "
            "learning_rate or num_updates.",
        )


def random_state() -> list[Tensor]:
    """Torch's random states: of the CPU, then of each CUDA device that is in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: list[Tensor]) -> None:
    """Put states back that `random_state` gave."""
    torch.set_rng_state(states[0].cpu())
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])


def _state(
    history: FitHistory,
    stale: int,
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
    best: Best,
) -> dict[str, Any]:
    """All that the loop needs to go on, copied: tensors and plain values."""
    return {
        "history": asdict(history),
        "stale": stale,
        "parameters": [p.detach().clone() for p in parameters],
        "optimiser": copy.deepcopy(optimiser.state_dict()),
        "average": [v.clone() for v in average.values],
        "updates": average.updates,
        "best": [v.clone() for v in best.values],
        "best_loss": best.loss,
        "random": random_state(),
    }


@torch.no_grad()
def _restore(
    state: dict[str, Any],
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
    best: Best,
) -> tuple[FitHistory, int, float]:
    """Put a saved state back; its history, how long nothing has got better, and the seconds spent."""
    for values, saved in ((parameters, "parameters"), (average.values, "average"), (best.values, "best")):
        for value, kept in zip(values, state[saved]):
            value.copy_(kept)
    optimiser.load_state_dict(state["optimiser"])
    average.updates, best.loss = state["updates"], state["best_loss"]
    set_random_state(state["random"])
    history = FitHistory(**state["history"])
    return history, state["stale"], history.seconds


@contextmanager
def interruptible(history: FitHistory, num_updates: int, description: str) -> Iterator[None]:
    """A loop that Ctrl-C ends with a warning: ``history.interrupted`` then says so, and nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        history.interrupted = True
        warn(
            f"interrupted: {history.iterations} of {num_updates} updates of {description or 'the fit'} were made and "
            "their result is kept. Fit again for the rest.",
        )


def cosine(progress: float, final: float) -> float:
    """Factor on the learning rate: 1 at the start, ``final`` at the end, half a cosine between.

    Example:
        >>> cosine(1.0, 0.25)
        0.25
    """
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _settled(history: FitHistory, tolerance: float, num_updates: int, description: str) -> bool:
    """Whether the loss had stopped falling; a warning where it had not."""
    losses = history.validation_losses or history.losses
    tail = losses[-(len(losses) // 4 + 1) :]
    fall = tail[0] - min(tail[1:], default=tail[0])
    if fall <= tolerance:
        return True
    warn(
        f"{description or 'the fit'} has not converged: its loss fell by {fall:.2g} > {tolerance:g} nats over the last "
        f"quarter of {history.iterations} updates. Raise num_updates (now {num_updates}).",
    )
    return False
