r"""A tape of torch's operations: what a function of one tensor did, to be done again without running its code.

`record` runs a function once and writes down every operation that torch carried out for it, gradients included. What
does not depend on the argument is computed once. A function whose operations could be others at another argument is
refused: one that looks at values (``if x > 0``, ``.item()``, ``.numpy()``), whose shapes follow values (``x[x > 0]``),
that draws random numbers, or writes into tensors of its own. So a tape is right wherever the numbers of the argument
are all that changes; whatever else the function looks at must be watched (`pyro_sb.infer.model.sight`).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TOO_MANY", "RefusalError", "Tape", "UndecoratedMode", "record"]

PART = 1_000  # steps that torch's interpreter is given at once: its passes take long for many more
MOST_NUMBERS = 2**25  # that are kept while a tape is recorded, 256 MB in float64
TOO_MANY = "its operations hold too many numbers"
SAME = {"detach", "alias"}  # operations that give their argument back
LIFT = torch.ops.aten.lift_fresh.default  # of a tensor that was just made of numbers
CHECKS = torch.ops.aten._linalg_check_errors.default  # raises where a matrix could not be factored
READERS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}  # of values, unseen by the dispatcher


class RefusalError(Exception):
    """Why a function cannot be recorded."""


class Slot(NamedTuple):
    """The place of a tensor on a tape."""

    place: int


class Operation(NamedTuple):
    """One operation: its arguments, with slots for tensors, and the slots of what it gives."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int | None, ...]
    single: bool
    writes: tuple[int, ...]


class UndecoratedMode(TorchDispatchMode):
    """A dispatch mode without torch's guard against its compiler, which would import it: 1.5 s a process."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recorder(UndecoratedMode):
    """Writes down the operations that depend on a tensor z, or may.

    Attributes:
        steps: The operations, in order.
        tensors: The tensors that were met, by slot; kept, so that no identity is given twice.
        given: Slots of those that no recorded operation made.
        reason: Why what runs cannot be recorded.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.steps: list[Operation] = []
        self.tensors: list[Tensor] = []
        self.given: list[int] = []
        self.checked: list[Tensor] = []  # 0 where a matrix was factored
        self.reason = ""
        self._numbers = 0
        self._slots: dict[int, int] = {}
        self._homes: list[int] = []  # storages of the tensors
        self.slot(z)
        self.moving = {storage(z)}  # storages whose numbers depend on z
        self.written = set[int]()  # storages that an operation wrote into, after they were made
        self._own = {storage(z)}  # storages that are not the function's to write into

    def slot(self, x: Tensor, made: bool = False) -> int:
        """The slot of a tensor; a new one that nothing made here is given."""
        if id(x) not in self._slots:
            if x.layout != torch.strided:
                self.refuse(f"it has tensors of layout {x.layout}")
            self._slots[id(x)] = len(self.tensors)
            home = storage(x)
            if not made and self.tensors:
                self.given.append(len(self.tensors))
                self._own.add(home)
            self.tensors.append(x)
            self._homes.append(home)
        return self._slots[id(x)]

    def refuse(self, reason: str) -> None:
        """End the recording."""
        self.reason = self.reason or reason
        raise RefusalError(self.reason)

    def moves(self, x: Tensor) -> bool:
        """Whether a tensor depends on z."""
        return storage(x) in self.moving

    def read(self, x: Tensor) -> None:
        """Numbers of a tensor are looked at by other code than torch's."""
        if self.moves(x):
            self.refuse("it looks at values")
        self.slot(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._noted(func, args, kwargs or {})

    def _noted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation carried out, and written down."""
        if func is LIFT and id(args[0]) not in self._slots:
            numbers, result = args[0].clone(), func(*args, **kwargs)
            place, made = Slot(self.slot(numbers)), self.slot(result, made=True)
            self.steps.append(Operation(torch.ops.aten.clone.default, (place,), {}, (made,), True, ()))
            return result
        inputs = list[int]()

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            inputs.append(self.slot(value))
            return Slot(inputs[-1])

        places = mapped(placed, args), mapped(placed, kwargs)
        moving = any(self._homes[i] in self.moving for i in inputs)
        self._check(func, args, moving)
        written = [self.slot(x) for x in written_by(func, args, kwargs)]
        for i in written:
            if self._homes[i] in self._own:
                self.refuse("it writes into a tensor that it did not make")
            self.written.add(self._homes[i])
        if func is CHECKS and moving:  # not here: the tape says where a matrix could not be factored
            self.checked.append(args[0])
            return None
        result = func(*args, **kwargs)
        single = not isinstance(result, list | tuple)
        results = [result] if single else list(result)
        if not any(isinstance(x, Tensor) for x in results) and moving:
            self.refuse("it looks at values")
        if any(not isinstance(x, Tensor) and x is not None for x in results):
            if moving:
                self.refuse("it looks at values")
            return result
        outputs = list[int | None]()
        for x in results:
            if x is None:
                outputs.append(None)
                continue
            self._numbers += 0 if id(x) in self._slots else x.numel()
            outputs.append(self.slot(x, made=True))
        if self._numbers > MOST_NUMBERS:
            self.refuse(TOO_MANY)
        if moving:
            self.moving.update(self._homes[i] for i in (*outputs, *written) if i is not None)
        self.steps.append(Operation(func, *places, tuple(outputs), single, tuple(written)))
        return result

    def _check(self, func: Any, args: Any, moving: bool) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse("it draws random numbers")
        if moving and torch.Tag.dynamic_output_shape in func.tags:
            index = args[1] if func is torch.ops.aten.index.Tensor else [args[0]]
            if func is not torch.ops.aten.index.Tensor or any(
                x is not None and x.dtype in (torch.bool, torch.uint8) and self.moves(x) for x in index
            ):
                self.refuse(f"its shapes follow values, by {func}")

    def tape(self, z: Tensor, results: tuple[Tensor, ...]) -> "Tape":
        """The recorded operations that the results need, without those that give the same at any z."""
        if any(id(x) not in self._slots for x in results):
            self.refuse("a result comes from elsewhere")
        slots = [self._slots[id(x)] for x in (*results, *self.checked)]
        fresh = self.moving | self.written
        live = [step for step in self.steps if not fresh.isdisjoint(self._homes_of(step))]
        steps, slots = self._merged(self._needed(live, slots), slots)
        given = [self.tensors[i] for i in self.given]
        return Tape(steps, slots, len(results), self.tensors, given)

    def _homes_of(self, step: Operation) -> list[int]:
        """Storages of a step's tensors."""
        return [self._homes[i] for i in (*slots_of(step), *step.outputs) if i is not None]

    def _needed(self, steps: list[Operation], results: list[int]) -> list[Operation]:
        """Steps without those that no result needs."""
        needed, storages = set[int | None](results), {self._homes[i] for i in results}
        kept = []
        for step in reversed(steps):
            if not needed.isdisjoint(step.outputs) or any(self._homes[i] in storages for i in step.writes):
                kept.append(step)
                needed.update(slots_of(step))
                storages.update(self._homes_of(step))
        return kept[::-1]

    def _merged(self, steps: list[Operation], results: list[Any]) -> tuple[list[Operation], list[Any]]:
        """Steps without those that give their argument back, or what another step has given."""
        same, known, kept = dict[int, int](), dict[Any, Operation](), list[Operation]()

        def moved(place: Any) -> Any:
            return Slot(same.get(place.place, place.place)) if isinstance(place, Slot) else place

        for step in steps:
            args, kwargs = mapped(moved, step.args), mapped(moved, step.kwargs)
            step = step._replace(args=args, kwargs=kwargs)
            plain = self.written.isdisjoint(self._homes_of(step))
            if plain and gives_back(step, self.tensors):
                same[step.outputs[0]] = args[0].place  # type: ignore[index]
                continue
            key = (step.op, hashable(args), hashable(kwargs)) if plain else None
            twin = known.get(key) if key is not None else None
            if twin is not None:
                same.update({i: j for i, j in zip(step.outputs, twin.outputs) if i is not None and j is not None})
                continue
            if key is not None:
                known[key] = step
            kept.append(step)
        return kept, [same.get(i, i) for i in results]


class Watcher(TorchFunctionMode):
    """Notes whose numbers are looked at by numpy or as lists, which the dispatcher does not see."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READERS:
            self.recorder.read(args[0])
        return func(*args, **(kwargs or {}))


class Tape:
    """Recorded operations, as a function of their argument: ``tape(z)`` gives what the function gave.

    Attributes:
        num_steps: Operations that are carried out at every call.
        given: Tensors that the function took from elsewhere: data, parameters, constants.
        interpreted: Whether torch's own interpreter carries them out, which is faster than Python.
    """

    def __init__(
        self, steps: list[Operation], results: list[int], num: int, tensors: list[Tensor], given: list[Tensor]
    ) -> None:
        self.num_steps, self.given = len(steps), given
        self._num = num  # of results; the others are 0 where matrices were factored
        self._versions = [x._version for x in given]
        made = {0, *(i for step in steps for i in step.outputs if i is not None)}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                steps, self.interpreted = by_torch(steps, results, tensors), True
        except Exception:  # whatever torch's interpreter does not take: Python carries the operations out
            self.interpreted = False
        self._run = written_out(steps, results, tensors, made)

    def __call__(self, z: Tensor) -> tuple[Tensor, ...]:
        """What the function gives at z, a contiguous tensor of the recorded shape and dtype.

        Raises:
            LinAlgError: A matrix could not be factored.
        """
        results, failed = self.attempt(z)
        if any(bool(where.any()) for where in failed):
            raise torch.linalg.LinAlgError("a matrix could not be factored")
        return results

    def attempt(self, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What the function gives at z, and where matrices could not be factored: not 0 there, one tensor a check."""
        with torch.no_grad(), torch.jit.optimized_execution(False):  # one for one; no time goes to passes
            found = self._run(z)
        return found[: self._num], found[self._num :]

    @property
    def fresh(self) -> bool:
        """Whether nobody wrote into the tensors that the function took from elsewhere."""
        return all(x._version == version for x, version in zip(self.given, self._versions))


def record(function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor) -> Tape:
    r"""The tape of ``function`` at z.

    Args:
        function: Gives tensors.
        z: Where it is run; a contiguous tensor.

    Raises:
        RefusalError: Its operations may be others at another argument.

    Example:
        >>> tape = record(lambda z: (z.exp() + torch.ones(2).exp(),), torch.zeros(2))
        >>> tape.num_steps, tape(torch.ones(2))
        (2, (tensor([5.4366, 5.4366]),))
    """
    recorder = Recorder(z)
    try:
        with Watcher(recorder), recorder:
            results = function(z)
    except Exception:
        if recorder.reason:
            raise RefusalError(recorder.reason) from None
        raise
    if recorder.reason:  # and its own code has gone over it
        raise RefusalError(recorder.reason)
    return recorder.tape(z, results)


def storage(x: Tensor) -> int:
    """Identity of the memory behind a tensor."""
    return int(x.untyped_storage()._cdata)


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that an operation writes into."""
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor))


def mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    """``fn`` of every leaf of nested arguments; a slot is a leaf."""
    if isinstance(value, Slot):
        return fn(value)
    if isinstance(value, dict):
        return {name: mapped(fn, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(fn, part) for part in value)
    return fn(value)


def slots_of(step: Operation) -> list[int]:
    """The slots of a step's arguments."""
    found: list[int] = []
    mapped(lambda place: found.append(place.place) if isinstance(place, Slot) else None, [step.args, step.kwargs])
    return found


def hashable(value: Any) -> Any:
    """Nested arguments as a key: 1, 1.0 and True are three."""
    if isinstance(value, Slot):
        return value
    if isinstance(value, dict):
        return tuple((name, hashable(part)) for name, part in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    return type(value), str(value) if isinstance(value, float) else value


def gives_back(step: Operation, tensors: list[Tensor]) -> bool:
    """Whether a step gives its argument as it is: the same numbers in the same places."""
    name = step.op._schema.name.split("::")[-1]
    if name in SAME:
        return True
    if name not in ("expand", "view", "_unsafe_view", "_reshape_alias"):
        return False
    (before,), after = [tensors[i] for i in slots_of(step)], tensors[step.outputs[0] or 0]
    return before.shape == after.shape and before.stride() == after.stride() and before.dtype == after.dtype


def by_torch(steps: list[Operation], results: list[int], tensors: list[Tensor]) -> list[Operation]:
    """Steps in parts, each as one step that torch's interpreter carries out; its passes bear no more at once."""
    parts = [steps[i : i + PART] for i in range(0, len(steps), PART)]
    known, borders = {0}, list[tuple[list[int], set[int]]]()  # what a part takes from those before it, and makes
    for part in parts:
        makes = {i for step in part for i in step.outputs if i is not None} - known  # to write in place makes nothing
        borders.append((sorted({i for step in part for i in slots_of(step)} & known) or [0], makes))
        known |= makes
    later, found = set(results), list[Operation]()
    for part, (takes, makes) in zip(parts[::-1], borders[::-1]):
        gives = sorted(makes & later) or takes[:1]
        run = written_out(part, gives, tensors, {*takes, *makes}, takes)
        traced = torch.jit.trace(run, tuple(tensors[i].detach() for i in takes), check_trace=False)
        found.append(Operation(traced, tuple(map(Slot, takes)), {}, tuple(gives), False, ()))
        later.update(takes)
    return found[::-1]


def written_out(
    steps: list[Operation], results: list[int], tensors: list[Tensor], made: set[int], takes: Sequence[int] = (0,)
) -> Callable[..., Any]:
    """Steps as Python code, a line a step, which lets go of what is not needed any more."""
    scope: dict[str, Any] = {"__name__": __name__}
    last = {j: i for i, step in enumerate(steps) for j in slots_of(step)}

    def text(value: Any) -> str:
        if isinstance(value, Slot):
            if value.place in made:
                return f"t{value.place}"
            scope.setdefault(f"c{value.place}", tensors[value.place].detach())
            return f"c{value.place}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        if value is None or isinstance(value, bool | int):
            return repr(value)
        name = f"k{len(scope)}"
        scope[name] = value
        return name

    lines = [f"def replay({', '.join(f't{i}' for i in takes)}):"]
    for i, step in enumerate(steps):
        scope[f"f{i}"] = step.op
        call = [*map(text, step.args), *(f"{name}={text(value)}" for name, value in step.kwargs.items())]
        names = ["_" if j is None else f"t{j}" for j in step.outputs]
        target = names[0] if step.single else f"[{', '.join(names)}]"
        lines.append(f"    {target} = f{i}({', '.join(call)})")
        gone = set(slots_of(step)) | {j for j in step.outputs if j is not None}
        gone = {j for j in gone if j in made and j not in results and last.get(j, i) == i}
        if gone:
            lines.append(f"    {' = '.join(f't{j}' for j in sorted(gone))} = None")
    lines.append(f"    return ({', '.join(text(Slot(j)) for j in results)},)")
    exec("\n".join(lines), scope)
    run: Callable[..., Any] = scope["replay"]
    return run
