"""A run of chains as one file of tensors and plain values, finished or not; the file that a run goes on from."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_sb.bridges.base import check_format
from pyro_sb.files import checkpoint_path, read_file, write_file
from pyro_sb.fingerprint import differences

__all__ = ["Checkpoint", "kernel_of", "read_run"]

FORMAT = 1
KIND = "MCMC"
NEEDED = {"format", "kind", "words", "options", "arguments", "kernel", "rest", "going", "results"}
SHARE = 0.05  # of the time that writing may take


class Checkpoint:
    """The file of a run: written after each block, as long as that takes a small share of the time.

    Args:
        path: The file.
        words: What tells the run from others.
    """

    def __init__(self, path: Path, words: dict[str, str]) -> None:
        self.path, self.words = path, words
        self._cost, self._written = 0.0, -1.0

    @classmethod
    def at(cls, path: Any, words: dict[str, str] | None) -> "Checkpoint":
        """The file at a path, which must be a run's that can be told from others."""
        if words is None:
            raise ValueError(
                "checkpoint needs a model and arguments that can be told from others by their contents, got some that "
                "cannot. Pass tensors and plain values, and a model that is a function."
            )
        checked = checkpoint_path(path)
        assert checked is not None
        return cls(checked, words)

    def found(self) -> dict[str, Any] | None:
        """The run that lies there, None if there is no file; refused if it is of another."""
        if not self.path.exists():
            return None
        saved = read_run(self.path)
        differ = differences(saved["words"], self.words)
        if differ:
            raise ValueError(
                f"checkpoint must be of this run to go on from, got that of another in {self.path}: {differ}. Delete "
                "it, or write another path."
            )
        return saved

    @property
    def due(self) -> bool:
        """Whether writing again would take a small share of the time since the last."""
        return time.perf_counter() - self._written >= self._cost / SHARE

    def write(self, contents: Callable[[], dict[str, Any]]) -> None:
        """Write what a run has now, which ``contents`` gives; the file before it stays whole until then."""
        begun = time.perf_counter()
        write_file(contents() | {"format": FORMAT, "kind": KIND, "words": self.words}, self.path)
        self._written = time.perf_counter()
        self._cost = self._written - begun


def read_run(path: Any, map_location: Any = None) -> dict[str, Any]:
    """Contents of a run's file."""
    saved = read_file(path, map_location)
    if not isinstance(saved, dict) or not saved.keys() >= NEEDED or saved["kind"] != KIND:
        raise ValueError(f"{path} must hold a run that MCMC.save or checkpoint= wrote, got other contents.")
    check_format(str(path), saved["format"], FORMAT)
    return saved


def kernel_of(given: Any, saved: dict[str, Any], kinds: list[type], path: Any) -> Any:
    """The kernel that a run is loaded into: the one that is given, or one of the file's kind for a given model.

    Args:
        given: A kernel, a Pyro model, or what makes a kernel from a saved one, such as a conditioned posterior.
        saved: Contents of the file.
        kinds: Classes of kernels.
        path: Of the file.
    """
    if callable(getattr(given, "sample_block", None)):
        return given
    maker: Callable[[dict[str, Any]], Any] | None = getattr(given, "saved_kernel", None)
    if maker is not None:
        return maker(saved["kernel"])
    name, config = saved["options"]["kernel"], saved["options"]["config"]
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if config is None or kind is None or not callable(given):
        raise ValueError(
            f"{path} holds a run of a {name} with options that no file keeps, such as functions and bridges: give it "
            f"such a kernel, got {type(given).__name__}. Write MCMC.load(path, {name}(...)) with the options that it "
            "had; for a posterior's chains MCMC.load(path, amortized.condition(y))."
        )
    return kind(given, **config)
