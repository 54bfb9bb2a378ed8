"""Stages of long work: who works says what begins and that it goes on, and whoever listens may show or keep it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["announce", "listening", "working"]

Listener = tuple[Callable[[str], None], Callable[[], None]]
LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("LISTENERS", default=())


def __dir__() -> list[str]:
    return sorted(__all__)


def announce(stage: str) -> None:
    """A stage begins, such as ``"search"``; the one before it ends."""
    for begin, _ in LISTENERS.get():
        begin(stage)


def working() -> None:
    """The present stage goes on: called often, so listeners must be quick."""
    for _, go_on in LISTENERS.get():
        go_on()


@contextmanager
def listening(begin: Callable[[str], None], go_on: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Listen to the work that is done inside, in this thread.

    Args:
        begin: Called with the name of each stage as it begins; what it raises ends the work.
        go_on: Called now and then while a stage lasts.

    Example:
        >>> with listening(print):
        ...     announce("search")
        search
    """
    token = LISTENERS.set((*LISTENERS.get(), (begin, go_on)))
    try:
        yield
    finally:
        LISTENERS.reset(token)
