"""Finished cells of a benchmark, kept so that a second call goes on from them; and the arguments that say so."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report import RESULTS


class Store:
    """Rows by name in results/<name>.json, written at every change."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.rows: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, key: str, row: Any) -> None:
        self.rows[key] = row
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in self.rows.items())
        RESULTS.mkdir(exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text("{\n" + lines + "\n}\n")
        draft.replace(self.path)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.rows:
            self.put(key, make())
        return self.rows[key]

    def scores(self, kind: str, score: str, seeds: Sequence[int]) -> list[float]:
        """A score's values over the seeds; empty where the law or the method has none."""
        values = [self.rows[f"{kind} {seed}"].get(score) for seed in seeds]
        return [value for value in values if value is not None]


def arguments_of(about: str | None, cache: str, seeds: int | None = None) -> argparse.ArgumentParser:
    """``--cache`` and ``--report``; ``--seeds``, or without them ``--minutes``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--cache", default=cache, help="JSON file without its ending")
    if seeds is None:
        parser.add_argument("--minutes", type=float, default=60.0, help="CPU minutes after which no cell is begun")
    else:
        parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--report", action="store_true", help="print what is there")
    return parser
