"""Finished cells of a benchmark, kept so that a second call goes on from them; and the arguments that say so."""

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.lib.report import RESULTS


class Store:
    """Rows by name in results/<name>.json, written at every change; of a trial in memory alone.

    Args:
        name: Of the file, without its ending.
        keep: False for a trial, which begins with nothing.
    """

    def __init__(self, name: str, keep: bool = True) -> None:
        self.path, self.keep = RESULTS / f"{name}.json", keep
        self.rows: dict[str, Any] = json.loads(self.path.read_text()) if keep and self.path.exists() else {}

    def put(self, key: str, row: Any) -> None:
        self.rows[key] = row
        if self.keep:
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in self.rows.items())
            RESULTS.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(".draft")
            draft.write_text("{\n" + lines + "\n}\n")
            draft.replace(self.path)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.rows:
            self.put(key, make())
        return self.rows[key]

    def found(self, keys: Iterable[str]) -> list[Any]:
        """The rows that are there."""
        return [self.rows[key] for key in keys if key in self.rows]

    def seeded(self, prefix: str, seeds: int) -> list[Any]:
        """The rows ``<prefix> 0``, ``<prefix> 1``, ... that are there."""
        return self.found(f"{prefix} {seed}" for seed in range(seeds))

    def scores(self, prefix: str, score: str, seeds: int) -> list[float]:
        """A score's values over the seeds; empty where the law or the method has none."""
        values = [row.get(score) for row in self.seeded(prefix, seeds)]
        return [value for value in values if value is not None]


def command(
    about: str | None,
    *,
    seeds: int | None = None,
    cached: bool = False,
    short: bool = False,
    **options: dict[str, Any],
) -> argparse.Namespace:
    """A script's arguments; one thread from here on.

    Args:
        about: The module's docstring.
        seeds: How many there are, which gives ``--seeds``.
        cached: Whether its cells are kept, which gives ``--report``.
        short: Whether there is ``--short``.
        options: Further arguments, by name; what takes any number of values (``nargs="*"``) is positional.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if cached:
        parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
    if short:
        parser.add_argument("--short", action="store_true", help="try the script in small sizes, keep nothing")
    for name, option in options.items():
        parser.add_argument(name if option.get("nargs") == "*" else f"--{name.replace('_', '-')}", **option)
    torch.set_num_threads(1)
    return parser.parse_args()
