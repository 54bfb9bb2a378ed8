"""The steps of a run: what a kernel learns before its first one, warm-up, draws; shown by a bar, and kept in a file."""

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from pyro_sb.infer.mcmc.progress import Progress
from pyro_sb.infer.mcmc.record import Block, Record, blocks
from pyro_sb.infer.mcmc.saved import Checkpoint
from pyro_sb.stages import listening
from pyro_sb.training import random_state

__all__ = ["Drawing", "Hook", "RunPlan"]

Hook = Callable[[Any, dict[str, Tensor], str, int], None]
STAGES = (("Warmup", "warm-up"), ("Sample", "sampling"))  # Pyro's name for hooks, and that of the bar


class RunPlan(NamedTuple):
    """What a run is to do.

    Attributes:
        num_steps: Steps of warm-up, and draws.
        hook_fn: Called after every step, which is then made alone.
        silent: Whether there is no bar.
    """

    num_steps: tuple[int, int]
    hook_fn: Hook | None
    silent: bool


class Drawing:
    """A run under way, from its first step or from any other.

    Args:
        kernel: Set up.
        plan: What is to be done.
        record: Takes the draws.
        checkpoint: The file to keep it in, if there is one.
        contents: Gives what the file holds beside the run's place.

    Attributes:
        stage: 0 in warm-up, 1 while drawing.
        done: Steps of this stage so far.
        params: Where the chains stand; None before the kernel knows.
    """

    def __init__(
        self,
        kernel: Any,
        plan: RunPlan,
        record: Record,
        checkpoint: Checkpoint | None = None,
        contents: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.kernel, self.plan, self.record = kernel, plan, record
        self.checkpoint, self.contents = checkpoint, contents
        self.stage, self.done = 0, 0
        self.params: dict[str, Tensor] | None = None
        self._num_learnt = 0
        self._begun = 0.0

    def run(self) -> None:
        """The rest of the run."""
        plan, kernel = self.plan, self.kernel
        self._begun = time.perf_counter() - self.record.seconds
        before = self.done + (plan.num_steps[0] if self.stage else 0)
        progress = Progress(
            sum(plan.num_steps), before, lambda: getattr(kernel.log_joint, "evaluations", None), disable=plan.silent
        )
        try:
            with progress.watching(), self._keeping():
                if self.params is None:
                    self.params = kernel.initial_params  # it learns
                    self._keep()
                if self.stage == 0:
                    self._steps(progress)
                    self.stage, self.done = 1, 0
                    self.record.warmup_seconds = time.perf_counter() - self._begun
                self._steps(progress)
        finally:
            progress.close()
            self.record.seconds = time.perf_counter() - self._begun

    def _steps(self, progress: Progress) -> None:
        """The steps of the present stage that are left."""
        stage, name = STAGES[self.stage]
        hook = self.plan.hook_fn
        progress.begin(name)
        for start, size in blocks(self.plan.num_steps[self.stage], single=hook is not None, done=self.done):
            assert self.params is not None
            block = self.kernel.sample_block(self.params, size)
            self.params = {name: draws[-1] for name, draws in block.draws.items()}
            if stage == "Sample":
                self.record.add(block, getattr(self.kernel, "rest", None) or {"sites": self.params})
            self.done = start + size
            progress.steps(size, _words(self.kernel, block, self.record))
            if self.checkpoint is not None and self.checkpoint.due:
                self._keep()
            if hook is not None:
                hook(self.kernel, self.params, stage, start)

    def _keeping(self) -> AbstractContextManager[None]:
        return nullcontext() if self.checkpoint is None else listening(self._stage)

    def _stage(self, name: str) -> None:
        """Before the first step: keep what was learnt where there is more of it, at the stage that begins after."""
        num = sum(getattr(self.kernel, learnt) is not None for learnt in self.kernel.learns)
        if self.params is None and num != self._num_learnt:
            self._num_learnt = num
            self._keep()

    def _keep(self) -> None:
        if self.checkpoint is not None:
            self.record.seconds = time.perf_counter() - self._begun
            self.checkpoint.write(self._all)

    def _all(self) -> dict[str, Any]:
        """What the file holds now."""
        counts = self.kernel.log_joint.evaluations
        going = {
            "stage": self.stage,
            "done": self.done,
            "params": self.params,
            "record": self.record.state(),
            "evaluations": [counts.density, counts.gradient],
            "random": random_state(),
        }
        return self.contents() | {"going": going, "results": None}

    def resume(self, going: dict[str, Any], rest: dict[str, Any] | None) -> None:
        """Stand where a run stood that `_keep` wrote: the kernel has what it had learnt then."""
        self.stage, self.done, self.params = going["stage"], going["done"], going["params"]
        counts = self.kernel.log_joint.evaluations
        counts.density, counts.gradient = going["evaluations"]
        self.record.resume(going["record"], rest)
        if rest is not None:
            self.kernel.go_on(rest, counting_on=True)


def _words(kernel: Any, block: Block, record: Record) -> OrderedDict[str, str]:
    """Words of the progress bar: the kernel's, and always acceptance and divergences."""
    words = OrderedDict(kernel.logging() or {})
    if "acceptance_rate" in block.stats and not any(word.startswith("acc") for word in words):
        words["acc. prob"] = f"{block.stats['acceptance_rate'].double().mean().item():.3f}"
    words["divergences"] = str(record.num_diverging)
    return words
