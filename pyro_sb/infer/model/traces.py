r"""Tapes of a batched log joint, one a batch size: the model's operations without the model's code.

A model's Python, Pyro's handlers and autograd take most of the time of a batch of a hundred chains. So once a batch
size has come a number of times, what torch does in it is recorded (`tape`), compared with the model itself at points
that it was not recorded at, and carried out in its place from then on: the same operations, one for one. Evaluations
are compared again now and then, where the chains stand. A tape is dropped when anything that the model looks at has
changed (`sight`), and for good where it differs, where nothing is gained, and where the model's operations follow its
values.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_sb.infer.model.agreement import NATS, SLOPE, STILL, described, precision, same
from pyro_sb.infer.model.routes import evaluate, evaluate_all
from pyro_sb.infer.model.sight import Sight
from pyro_sb.infer.model.tape import TOO_MANY, RefusalError, Tape, record
from pyro_sb.warn import warn

__all__ = ["PATIENCE", "Traces"]

logger = logging.getLogger(__name__)
PATIENCE = 12  # batches of a size before one is recorded, which costs about as much
SELDOM = 256  # batches between two comparisons, at most
NEVER = 2**40
NO_FASTER = "it is no faster traced"
FAR = 30.0  # unconstrained units: where densities overflow, and supports end
Figures = tuple[Tensor, Tensor]


@dataclass
class Batches:
    """Those of one size.

    Attributes:
        count: Batches so far, since the tape or since the beginning.
        tape: Their tape, once there is one.
        patience: Batches before one is recorded.
        due: Batch of the tape that is compared next.
    """

    count: int = 0
    tape: Tape | None = None
    patience: int = PATIENCE
    due: int = 1


@dataclass
class Recorded:
    """What is recorded of one route.

    Attributes:
        batches: By kind and size.
        sight: What the model looked at when it was recorded.
        refused: Why nothing is recorded any more.
    """

    batches: dict[Any, Batches] = field(default_factory=dict)
    sight: Sight | None = None
    refused: str = ""


class AskedBatch(NamedTuple):
    """One batch, as it is evaluated: by a tape where there is one, else by the model."""

    route: Any
    z: Tensor
    gradient: bool
    tape: Tape | None

    def figures(self, name: str = "") -> Figures:
        """Values and gradients; by the model too where an operation fails."""
        if self.tape is not None:
            try:
                return by_rows(self.tape, self.z)
            except Exception as error:  # the model's own code says what it is
                logger.debug("a tape failed: %s", error)
        return evaluate(self.route, self.z, self.gradient)


class Traces:
    """Tapes of the routes of one log joint. A route says by ``looks_at`` what it depends on besides its rows.

    Attributes:
        patience: Batches of a size before one is recorded.
    """

    def __init__(self) -> None:
        self.patience = PATIENCE
        self._routes: dict[str, Recorded] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy, or another process, records its own."""
        return {"patience": self.patience, "_routes": {}}

    def describe(self, route: str) -> str:
        """What of a route is recorded, or why nothing is."""
        recorded = self._routes.get(route, Recorded())
        num = sum(batches.tape is not None for batches in recorded.batches.values())
        if recorded.refused:
            return f"eager ({recorded.refused})"
        return f"traced for {num} batch size{'s' * (num > 1)}" if num else "eager (no batch size came often)"

    def refuses(self, route: str) -> bool:
        """Whether a route is run eagerly for good."""
        return bool(self._routes.get(route, Recorded()).refused)

    def batch(self, route: Any, z: Tensor, gradient: bool) -> AskedBatch:
        """A batch, with its tape if there is one."""
        return AskedBatch(route, z, gradient, self._tape(route, z, gradient))

    def _tape(self, route: Any, z: Tensor, gradient: bool) -> Tape | None:
        """The tape of a batch, if there is one and all that the model looks at is what it was."""
        recorded = self._routes.get(route.name)
        if recorded is None or recorded.refused or is_handled():
            return None
        batches = recorded.batches.get(key(z, gradient))
        if batches is None or batches.tape is None:
            return None
        if batches.tape.fresh and recorded.sight is not None and recorded.sight.same:
            return batches.tape
        self._forget(recorded, route)
        return None

    def _forget(self, recorded: Recorded, route: Any) -> None:
        """Drop the tapes of a model that is not what it was; each comes again later than before."""
        logger.info("what the model looks at has changed: its batches by %s are recorded again", route.name)
        for batches in recorded.batches.values():
            if batches.tape is not None:
                batches.count, batches.tape, batches.patience = 0, None, min(4 * batches.patience, NEVER)
        recorded.sight = None

    def follow(self, batch: AskedBatch, found: Figures) -> Figures:
        """Count a batch, record one where it is time, or compare it; its figures, or better ones."""
        route, z, gradient = batch.route, batch.z, batch.gradient
        if not hasattr(route, "looks_at") or is_handled():
            return found
        recorded = self._routes.setdefault(route.name, Recorded())
        if recorded.refused:
            return found
        batches = recorded.batches.setdefault(key(z, gradient), Batches(patience=self.patience))
        batches.count += 1
        if batch.tape is None:
            if batches.count >= batches.patience:
                self._record(recorded, batches, route, z, gradient)
        elif batches.count >= batches.due:
            batches.due += min(batches.due, SELDOM)
            known = evaluate(route, z, gradient)
            if differs(found, known, gradient):
                self._refuse(recorded, route, "it gave other figures, though nothing that it looks at had changed")
                warn(
                    f"A traced model gave other figures than its own code, at batch {batches.count} of {len(z)} rows: "
                    "its operations changed in a way that cannot be seen. It is run eagerly from here on; what was "
                    "computed since the comparison before may be wrong. Make the density of tensors alone, without "
                    "numpy arrays or counters that change.",
                )
                return known
        return found

    def compare(self, route: Any, z: Tensor) -> str | None:
        """What speaks against the tapes of a route at states ``(C, dim)``; they are dropped then."""
        recorded = self._routes.get(route.name, Recorded())
        for gradient, shape, *_ in list(recorded.batches):
            if shape[0] > len(z):
                continue
            batch = self.batch(route, z[: shape[0]].contiguous(), gradient)
            if batch.tape is not None and differs(batch.figures(), evaluate(route, batch.z, gradient), gradient):
                reason = "wrong figures of its tape"
                self._refuse(recorded, route, reason)
                return reason
        return None

    def _record(self, recorded: Recorded, batches: Batches, route: Any, z: Tensor, gradient: bool) -> None:
        """Record a batch, and keep the tape if it gives what the model gives, in less time."""
        batches.count = 0
        if torch.is_autocast_enabled() or torch._C._functorch.maybe_current_level() is not None:
            return
        if recorded.sight is not None and not recorded.sight.same:
            self._forget(recorded, route)
        try:
            sight = recorded.sight or Sight(*route.looks_at)
            if not sight.complete:
                raise RefusalError("it looks at too many things to watch")
            tape = record(lambda x: evaluate_all(route, x, gradient), z)
            reason = objection(tape, route, z, gradient)
            if not sight.same:
                reason = "it changes what it looks at"
        except RefusalError as refusal:
            reason = str(refusal)
        except Exception as error:  # whatever a model, or a version of torch, does not take
            reason = described(error)
        if reason in (TOO_MANY, NO_FASTER):  # with so many rows
            logger.info("%d rows by %s are evaluated eagerly: %s.", len(z), route.name, reason)
            batches.patience = NEVER
            return
        if reason is not None:
            self._refuse(recorded, route, reason)
            return
        recorded.sight = sight
        batches.tape, batches.count, batches.due = tape, 0, 1
        logger.info("%d rows by %s are traced: %d operations", len(z), route.name, tape.num_steps)

    def _refuse(self, recorded: Recorded, route: Any, reason: str) -> None:
        logger.info("The model is run eagerly by %s: %s.", route.name, reason)
        recorded.refused, recorded.sight = reason, None
        recorded.batches.clear()


def is_handled() -> bool:
    """Whether a handler outside may see or change what the model does; blocks have nothing to hide it from."""
    return any(type(handler) is not BlockMessenger for handler in _PYRO_STACK)


def key(z: Tensor, gradient: bool) -> Any:
    """Kind and size of a batch."""
    return gradient, z.shape, z.dtype, z.device, torch.get_default_dtype()


def objection(tape: Tape, route: Any, z: Tensor, gradient: bool) -> str | None:
    """What speaks against a tape: other figures at other points, or no time gained."""
    eager, traced = list[float](), list[float]()
    tape.attempt(z)  # the first run is slow
    for points in elsewhere(z):
        begun = perf_counter()
        known = evaluate(route, points, gradient)
        between = perf_counter()
        try:
            found = by_rows(tape, points)
        except torch.linalg.LinAlgError:  # there the model's own code serves
            continue
        eager.append(between - begun)
        traced.append(perf_counter() - between)
        if differs(found, known, gradient):
            return "its operations are others at other points"
    return NO_FASTER if eager and min(traced) > min(eager) else None


def by_rows(tape: Tape, z: Tensor) -> Figures:
    """Figures by a tape; those of a row with a matrix that cannot be factored are as `evaluate` has them."""
    (value, grad), failed = tape.attempt(z)
    for where in failed:
        if bool(where.any()):
            if where.dim() == 0 or len(where) != len(z):
                raise torch.linalg.LinAlgError("a matrix that all rows share could not be factored")
            bad = where.reshape(len(z), -1).any(1)
            value, grad = torch.where(bad, torch.nan, value), torch.where(bad[:, None], 0.0, grad)
    return value, grad


def elsewhere(z: Tensor) -> Iterator[Tensor]:
    """Batches at other points than z: beside its rows, beyond them, and far out. No global random number is drawn."""
    generator = torch.Generator(z.device).manual_seed(len(z))
    spread = 0.1 + (z - z.mean(0)).square().mean(0).sqrt()
    for scale in (0.5 * spread, 3.0 * spread, FAR * torch.ones_like(spread)):
        yield z + scale * torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


def differs(found: Figures, known: Figures, gradient: bool) -> bool:
    """Whether figures of the same operations in the same order are not the same, but for threads that share a sum."""
    (value, grad), (own_value, own_grad) = found, known
    eps = precision(value.dtype, grad.dtype)
    size = own_value.nan_to_num(0.0, 0.0, 0.0).abs()
    if value.shape != own_value.shape or not same(value, own_value, NATS + STILL * eps * size):
        return True
    if not gradient:
        return False
    steep = own_grad.nan_to_num(0.0, 0.0, 0.0).abs() + size[:, None]
    return not same(grad, own_grad, SLOPE + STILL * eps * steep)
