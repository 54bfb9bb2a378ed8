"""What came of a call: right, an error of ours, or one of the failures that a fuzz looks for."""

import dis
import math
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import torch

LONGEST = 20  # seconds of a case
OURS = (
    TypeError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    FileNotFoundError,
    ImportError,
    KeyError,
    AttributeError,
)
GOOD = ("right", "ours")


class Outcome(NamedTuple):
    """Kind of what came, and words on it: "right", "ours", "raw", "nan", "let in", "hang", "state"."""

    kind: str
    words: str = ""


class Hang(BaseException):
    """A case took longer than it may."""


def outcome(call: Callable[[], Any], bad: bool) -> Outcome:
    """Run a call whose argument must be refused if ``bad``."""
    before = _global_state()
    try:
        with _limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = call()
    except Hang:
        return Outcome("hang", f"longer than {LONGEST} s")
    except OURS as error:
        kind = "ours" if raised_by_us(error) else "raw"
        return Outcome(kind, _words(error))
    except Exception as error:
        return Outcome("raw", _words(error))
    finally:
        changed = _global_state() != before
        _restore(before)
    if changed:
        return Outcome("state", "a global setting is not as it was found")
    if has_nan(value):
        return Outcome("nan", "NaN came out")
    return Outcome("let in") if bad else Outcome("right")


def tried(call: Any, changes: dict[str, Any], seed: int) -> Outcome:
    """What comes of a call of the registry with some of its arguments changed."""
    torch.manual_seed(seed)

    def run() -> Any:
        return call.function(**(call.right() | {argument: value.make() for argument, value in changes.items()}))

    return outcome(run, any(value.bad for value in changes.values()))


def raised_by_us(error: BaseException) -> bool:
    """Whether a line ``raise ...`` of the package made the error: not one of torch's that passed through a line."""
    step: TracebackType | None = error.__traceback__
    last = None
    while step is not None:
        last, step = step, step.tb_next
    if last is None or f"{os.sep}pyro_sb{os.sep}" not in last.tb_frame.f_code.co_filename:
        return False
    here = next((i for i in dis.get_instructions(last.tb_frame.f_code) if i.offset == last.tb_lasti), None)
    return here is not None and here.opname in ("RAISE_VARARGS", "RERAISE") and len(str(error)) > 20


def has_nan(value: Any, depth: int = 0) -> bool:
    """Whether a result holds NaN."""
    if isinstance(value, torch.Tensor):
        return bool((value.is_floating_point() or value.is_complex()) and torch.isnan(value.detach()).any())
    if isinstance(value, np.ndarray):
        return bool(value.dtype.kind == "f" and np.isnan(value).any())
    if isinstance(value, float):
        return math.isnan(value)
    if depth > 3 or value is None or isinstance(value, str | int | pd.DataFrame):
        return False
    if isinstance(value, dict):
        return any(has_nan(each, depth + 1) for each in value.values())
    if isinstance(value, list | tuple):
        return any(has_nan(each, depth + 1) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return any(has_nan(getattr(value, field.name, None), depth + 1) for field in fields(value))
    return False


def _words(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.split('site-packages/')[-1].split('pyro_sb/')[-1]}:{last.lineno}"
    return f"{type(error).__name__} at {where}: {str(error).splitlines()[0][:140] if str(error) else ''}"


@contextmanager
def _limit() -> Any:
    def stop(*_: Any) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _global_state() -> tuple[Any, ...]:
    return torch.get_default_dtype(), pyro.distributions.is_validation_enabled(), torch.is_grad_enabled()


def _restore(state: tuple[Any, ...]) -> None:
    torch.set_default_dtype(state[0])
    pyro.enable_validation(state[1])
    torch.set_grad_enabled(state[2])
