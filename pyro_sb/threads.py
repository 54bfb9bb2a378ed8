r"""Threads of a run: one, or as many as were found where the run's own calls are faster with them.

Threads of one operation wait for each other. On a core that another process uses, the last of them is late by a time
slice of the scheduler: a product of 1,024 x 7 by 7 x 7 that takes 46 microseconds with one thread was seen to take 9
milliseconds with two. Large operations do gain. So a run, opened by `chosen_threads`, holds torch and the BLAS and
OpenMP libraries to one thread, and the calls that carry its work, such as an update of a fit or an evaluation of a log
joint, are timed where they happen: with one thread and with as many as were found by turns, three of each. A `Pace`
keeps the better, and asks again later. Nothing is computed for the timing's sake, and no random number is drawn for it.

Sums of long tensors may round otherwise with another number of threads. After ``torch.set_num_threads(1)`` nothing is
timed, and a seed fixes every bit.
"""

import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import chain, islice
from statistics import fmean, median_low
from time import perf_counter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn
from torch.distributions import Distribution

__all__ = ["Pace", "chosen_threads", "run_by_arguments"]


def __dir__() -> list[str]:
    return sorted(__all__)


TRIES = 3  # calls timed with either number, or two that took so many seconds together
LONG = 0.2
LEAST = 1e-4  # seconds of a call below which there is nothing to share
GAIN = 1.1  # factor by which many threads must be faster than one
HOPELESS = 2.0  # factor by which one call may be slower before the trial of many ends
SOON, AGAIN = 1.0, 10.0  # seconds until the choice is made again, at first and at last: processes come and go
SHARE = 0.02  # of the time that trials of the worse number may cost: where they cost more, the next comes later
CPU = torch.device("cpu")
Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class TimedCall(NamedTuple):
    """A call that is being timed: what times it, its number of threads, size and start, and the run it lies in."""

    pace: "Pace"
    trial: "Trial"
    num: int
    size: int
    begun: float
    depth: int


class Own(threading.local):
    """State of each Python thread.

    Attributes:
        depth: Runs that are open in it.
        now: Its number of threads at present.
        most: What torch was set to in it before its first run: an upper bound.
        found: What the OpenMP libraries were set to, by file.
        call: The call that is being timed.
        even: Time at which the losses of trials so far are a small share of all time: none begins before.
    """

    def __init__(self) -> None:
        self.depth, self.now, self.most, self.even = 0, 1, 1, 0.0
        self.found: dict[str, int] = {}
        self.call: TimedCall | None = None


class Counts:
    """Thread counts of torch and of the loaded BLAS and OpenMP libraries, lowered while a run lasts.

    torch and OpenMP keep a number for each Python thread, BLAS one for the process. So each thread notes and puts back
    its own numbers, and the last one torch's for threads to come. BLAS's is put back by each, as the first one found
    it: OpenBLAS was seen to take a number from the main thread alone, which may not be the last.

    An interrupt may come at any line. So a thread is noted as open before anything is lowered in it, and until all is
    put back.

    Attributes:
        own: State of the present Python thread.
    """

    def __init__(self) -> None:
        self.own = Own()
        self._lock, self._open = threading.RLock(), set[int]()  # threads in which numbers are lowered
        self._libraries: list[Any] = []
        self._most, self._found = 1, dict[str, int]()
        self._num_modules = 0

    def open(self) -> None:
        """One thread from here on; libraries that were loaded since the run began are held to its number too."""
        own, thread = self.own, threading.get_ident()
        with self._lock:
            if thread not in self._open:
                own.most, own.found, own.call = torch.get_num_threads(), {}, None
                own.now = own.most
                if not self._open:
                    self._most, self._found = own.most, {}
                self._open.add(thread)
            own.depth += 1
            self._find()
            if own.depth == 1:
                self.set(1)

    def close(self, depth: int) -> None:
        """Back to so many open runs; where that is none, put back what was found. A call timed inside is dropped."""
        own, thread = self.own, threading.get_ident()
        with self._lock:
            own.depth = min(depth, own.depth)
            if own.call is not None and own.call.depth > own.depth:
                own.call = None
                self.set(1)
            if own.depth == 0 and thread in self._open:
                torch.set_num_threads(own.most)
                if len(self._open) == 1 and own.most != self._most:  # new threads start with what was set last
                    setter = threading.Thread(target=torch.set_num_threads, args=(self._most,))
                    setter.start()
                    setter.join()
                for library in self._libraries:
                    library.set_num_threads(self._noted(library).get(library.filepath, own.most))
                self._open.discard(thread)

    def set(self, num: int) -> None:
        """So many threads, in each library at most as many as it was found with."""
        if num != self.own.now:
            for library in self._libraries:
                library.set_num_threads(min(num, self._noted(library).get(library.filepath, num)))
            torch.set_num_threads(num)
            self.own.now = num

    def _noted(self, library: Any) -> dict[str, int]:
        """Numbers that libraries of this kind were found with."""
        return self.own.found if library.user_api == "openmp" else self._found

    def _find(self) -> None:
        """Note the libraries that are new, and hold them to the present number."""
        if len(sys.modules) != self._num_modules:  # a library comes with a module, and looking for it takes 4 ms
            from threadpoolctl import ThreadpoolController

            num_modules = len(sys.modules)
            self._libraries = ThreadpoolController().lib_controllers
            self._num_modules = num_modules
        for library in self._libraries:
            noted = self._noted(library)
            if library.filepath not in noted:
                noted[library.filepath] = library.num_threads
                library.set_num_threads(min(library.num_threads, self.own.now))


COUNTS = Counts()


@contextmanager
def chosen_threads(*values: Any) -> Iterator[None]:
    r"""A run: one thread, but for calls that a `Pace` finds faster with more. Runs inside it are part of it.

    What torch is set to before, in the same Python thread, is an upper bound. At the end, also after an error or an
    interrupt, torch and the libraries have the numbers that they had. Where the arguments show that the work lies on
    another device than the CPU, all is left as found. A model that keeps its tensors to itself does not show it.

    Args:
        *values: The run's arguments: tensors, devices, distributions, modules, whatever has a ``device``, and lists or
            dicts of them. One on another device, or such a default device, leaves all as found.

    Example:
        >>> before = torch.get_num_threads()
        >>> with chosen_threads():
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    if any(device.type != "cpu" for device in (torch.get_default_device(), *_devices(values))):
        yield
        return
    depth = COUNTS.own.depth
    try:
        COUNTS.open()
        yield
    finally:
        COUNTS.close(depth)


def run_by_arguments(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function as a run of its own: `chosen_threads` of the arguments that it is called with."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with chosen_threads(args, kwargs):
            return function(*args, **kwargs)

    return run


def _devices(value: Any, levels: int = 6) -> Iterator[torch.device]:
    """Devices of what a value is made of; of a long list, those of its first entries."""
    device = value if isinstance(value, torch.device) else getattr(value, "device", None)
    if isinstance(device, torch.device):
        yield device
        return
    parts: Iterable[Any] = ()
    if isinstance(value, nn.Module):
        parts = chain(value.parameters(), value.buffers())
    elif isinstance(value, Distribution):
        parts = vars(value).values()
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    if levels:
        for part in islice(parts, 64):
            yield from _devices(part, levels - 1)


class Trial:
    """Times of the calls of one kind, and the number of threads that is better for them.

    Attributes:
        num_calls: Calls so far.
        verdict: The number chosen, with the seconds that a call takes with it and with the other; empty before.
    """

    def __init__(self) -> None:
        self.num_calls, self.verdict = 0, ""
        self._one, self._many = list[float](), list[float]()  # seconds over size
        self._choice, self._until, self._pause = 0, 0.0, SOON

    @property
    def due(self) -> bool:
        """Whether it is time to choose: trials of all kinds of calls have lost little."""
        return perf_counter() >= max(self._until, COUNTS.own.even)

    def next(self, most: int) -> int:
        """The number for the next call: the choice, or while it is open one and as many as there are by turns."""
        if not self.due:
            return min(self._choice, most) or 1
        if self._choice:
            self._one, self._many, self._choice = [], [], 0
        return 1 if len(self._one) <= len(self._many) else most

    def note(self, num: int, most: int, seconds: float, size: int) -> None:
        """Take the time of a call in, and choose when there are enough.

        The wall time counts, and not that of the processors: threads that wait for each other spin, which costs
        nothing on cores that are idle, and is seen in the wall time on cores that are not. Against the median of one
        thread stands the mean of many: a single stall speaks against them. The first call of all is cold, and does not
        count.
        """
        self.num_calls += 1
        if self.num_calls == 1:
            return
        if self._choice:
            if self._choice > 1 and seconds / size > HOPELESS * median_low(self._one):
                self._until = COUNTS.own.even = 0.0  # another process has come: compare from the next call on
            return
        if not self.due:
            return
        (self._one if num == 1 else self._many).append(seconds / size)
        one = median_low(self._one) * size
        if one < LEAST:
            self._choose(1, 0.0, f"1 of {most} ({_time(one)} a call)")
        elif self._many and (self._many[-1] * size > HOPELESS * one or self._enough(size)):
            many = fmean(self._many) * size
            better, own, other = (most, many, one) if GAIN * many < one else (1, one, many)
            lost = (other - own) * len(self._one if better > 1 else self._many)
            self._choose(better, lost, f"{better} of {most} ({_time(own)} for {_time(other)} a call)")

    def _enough(self, size: int) -> bool:
        few = min(len(self._one), len(self._many))
        return few >= TRIES or (few == 2 and sum(self._one) * size > LONG)

    def _choose(self, num: int, lost: float, verdict: str) -> None:
        """Keep a number for a while, which doubles: first choices rest on calls of a process that has just begun."""
        self._choice, self.verdict = num, verdict
        now = perf_counter()
        self._until = now + self._pause
        COUNTS.own.even = max(now, COUNTS.own.even) + lost / SHARE
        self._pause = min(2 * self._pause, AGAIN)


class Pace:
    r"""The faster number of threads for one kind of work: 1, or as many as were found.

    Calls are timed as they come, within `chosen_threads` alone. Calls of one kind whose sizes lie within a factor of
    two are compared by their time over their size.

    Example:
        >>> pace = Pace()
        >>> with chosen_threads():
        ...     for _ in pace.each(range(10)):
        ...         product = torch.ones(8, 8) @ torch.ones(8, 8)
        >>> pace.describe()[:9]
        'threads: '
    """

    def __init__(self) -> None:
        self._trials: dict[Hashable, Trial] = {}

    def start(self, size: int = 1, kind: Hashable = None, device: torch.device = CPU) -> bool:
        """A call begins, of so many rows; whether it is timed, which it is not outside a run or within a timed call."""
        own = COUNTS.own
        if not own.depth or own.most == 1 or own.call is not None or device.type != "cpu":
            return False
        trial = self._trials.setdefault((kind, size.bit_length()), Trial())
        num = trial.next(own.most)
        COUNTS.set(num)
        own.call = TimedCall(self, trial, num, size, perf_counter(), own.depth)
        return True

    def stop(self) -> None:
        """The call ends, if one has begun here."""
        own = COUNTS.own
        if own.call is not None and own.call.pace is self:
            own.call.trial.note(own.call.num, own.most, perf_counter() - own.call.begun, own.call.size)
            own.call = None
            COUNTS.set(1)

    def lap(self, device: torch.device = CPU) -> None:
        """A call ends, if one has begun here, and the next begins."""
        self.stop()
        self.start(device=device)

    @contextmanager
    def call(self, size: int = 1, kind: Hashable = None, device: torch.device = CPU) -> Iterator[None]:
        """One call, of so many rows."""
        begun = COUNTS.own.call if self.start(size, kind, device) else None
        try:
            yield
        finally:
            if begun is not None and COUNTS.own.call is begun:  # not dropped meanwhile, with the run that it lay in
                self.stop()

    def each(self, items: Iterable[Item], device: torch.device = CPU) -> Iterator[Item]:
        """The same items; what is done with one of them is a call."""
        for item in items:
            with self.call(device=device):
                yield item

    def describe(self) -> str:
        """The number of threads, and the time of a call with it and with the other, for the most frequent kind."""
        trials = sorted(self._trials.values(), key=lambda trial: (trial.verdict != "", trial.num_calls))
        if not trials:
            return f"threads: {torch.get_num_threads()}"
        return f"threads: {trials[-1].verdict or '1 (too few calls to compare)'}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
