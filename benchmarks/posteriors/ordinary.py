"""The claim: on the models that people write first, KernelLangevin gives more effective draws a second than any NUTS.

Rows: series, regressions, hierarchies, item response, a process, volatility, a network, two modes, posteriordb's.
Every cell (row, sampler, seed) is a process of its own with a limit of CPU seconds, and is not run again:

    python -m benchmarks.posteriors.ordinary --peers reference,numpyro,chees,nutpie,pyro    # needs `make bench-env`
    python -m benchmarks.posteriors.ordinary --peers ours [--again] [--label KernelLangevin] [--seeds 3]
    python -m benchmarks.posteriors.ordinary --report

`--only` takes parts of rows' names, separated by ";". `--threads` repeats with the threads that a user finds.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np

from benchmarks.lib.ordinary.rows import Moments, Row, all_rows
from benchmarks.lib.peers import BENCH_PYTHON, ROOT
from benchmarks.lib.report import header, reading, table, write
from benchmarks.lib.store import Store, command

OURS, BEFORE = "KernelLangevin", "before"
PEERS = {"numpyro": "NumPyro NUTS", "chees": "BlackJAX ChEES", "nutpie": "nutpie", "pyro": "Pyro NUTS"}
MAX_Z, MAX_RHAT, PEER_RHAT = 4.0, 1.01, 1.05
GOAL, LEAST = 5.0, 1.5
LONG_LIMIT = 1200.0  # CPU seconds of a long run


class Cells(Store):
    """Rows that another call may add to meanwhile."""

    def put(self, key: str, row: Any) -> None:
        if self.keep and self.path.exists():
            self.rows = json.loads(self.path.read_text())
        super().put(key, row)


@dataclass(frozen=True)
class Outcome:
    """A child process: names and draws ``(chain, draw, p)`` of the quantities and its facts, or why there are none."""

    names: list[str]
    draws: np.ndarray
    facts: dict[str, Any]
    note: str = ""


def child(row: Row, sampler: str, seed: int, limit: float, threads: bool) -> Outcome:
    """Run one sampler on one row."""
    own = sampler in ("ours", "pyro")
    if not own and not BENCH_PYTHON.exists():
        raise SystemExit("The peers' environment .venv-bench must be there. Run `make bench-env`.")
    environment = dict(os.environ)
    if threads:
        environment = {key: value for key, value in environment.items() if not key.endswith("_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(inputs, **row.data())  # type: ignore[arg-type]
        words = ["-m", f"benchmarks.lib.ordinary.{'own' if own else 'peer'}", sampler, row.model, inputs, outputs]
        words += ["--sites", *row.sites, "--seed", seed, "--limit", limit, "--draws", row.long]
        words += ["--float64"] * row.float64 + ["--threads"] * threads
        line = [sys.executable if own else str(BENCH_PYTHON), *map(str, words)]
        nothing = np.empty((0, 0, 0))
        try:
            done = subprocess.run(
                line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=4 * limit + 120
            )
        except subprocess.TimeoutExpired:
            return Outcome([], nothing, {}, f"no end in {4 * limit + 120:.0f} s")
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            told = f"not finished in {limit:.0f} CPU s" if done.returncode == -signal.SIGXCPU else "killed (memory)"
            return Outcome([], nothing, {}, told)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            lines = [text for text in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", text)]
            return Outcome([], nothing, {}, (lines or ["error"])[-1][:120])
        with np.load(outputs) as file:
            return Outcome(file["names"].tolist(), file["draws"], json.loads(str(file["facts"])))


def moments(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sd and Monte Carlo error of the mean of each quantity."""
    errors = np.array([float(az.mcse(draws[:, :, j], method="mean")) for j in range(draws.shape[-1])])
    return draws.mean((0, 1)), draws.std((0, 1), ddof=1), errors


def mixing(draws: np.ndarray) -> dict[str, float]:
    """Smallest bulk and tail ESS and largest R-hat; of what does not move zero and infinity."""
    draws = draws[:, draws.shape[1] % 2 :]
    quantities = [draws[:, :, j] for j in range(draws.shape[-1])]
    if not all(np.isfinite(x).all() and np.ptp(x) > 0 for x in quantities):
        return {"bulk": 0.0, "tail": 0.0, "rhat": math.inf}
    halves = [x if len(x) > 1 else x.reshape(2, -1) for x in quantities]  # ArviZ has no R-hat of a single chain
    return {
        "bulk": min(float(az.ess(x, method="bulk")) for x in quantities),
        "tail": min(float(az.ess(x, method="tail")) for x in quantities),
        "rhat": max(float(az.rhat(x)) for x in halves),
    }


def agreement(names: list[str], found: Iterable[Iterable[float]], reference: Moments) -> dict[str, Any]:
    """Worst z of a mean and its quantity, worst relative error of an sd."""
    scores = []
    for name, mean, sd, error in zip(names, *found, strict=True):
        if name in reference:
            exact, spread, known = reference[name]
            z = (mean - exact) / max(math.hypot(error, known), 1e-12)
            scores.append((z if math.isfinite(z) else math.inf, name, sd / spread - 1))
    worst = max(scores, key=lambda score: abs(score[0]))
    return {"z": worst[0], "where": worst[1], "sd": max((score[2] for score in scores), key=abs)}


def rounded(values: np.ndarray) -> list[float]:
    """To six figures."""
    return [float(f"{value:.6g}") for value in values]


def cell(row: Row, sampler: str, seed: int, limit: float, threads: bool) -> dict[str, Any]:
    """One run as plain values; of a row with a long run its moments are kept, for z is worked out when it is shown."""
    made = child(row, sampler, seed, limit, threads)
    if made.note:
        return {"note": made.note}
    draws = made.draws.astype(float)
    kept = moments(draws)
    scores: dict[str, Any] = made.facts | mixing(draws) | {"draws": draws.shape[0] * draws.shape[1], "note": ""}
    if row.exact is not None:
        return scores | agreement(made.names, kept, row.exact())
    return scores | {"names": made.names, "moments": [rounded(part) for part in kept]}


def long_run(row: Row) -> dict[str, Any]:
    """Moments by NumPyro's NUTS: four chains, 1,000 + `row.long`, double precision, acceptance .9."""
    made = child(row, "reference", 1000, LONG_LIMIT, False)
    if made.note:
        return {"note": made.note}
    kept = dict(zip(("mean", "sd", "error"), map(rounded, moments(made.draws)), strict=True))
    facts = {key: made.facts[key] for key in ("cpu", "divergences")}
    return {"note": "", "names": made.names} | kept | mixing(made.draws) | facts


class Board:
    """Cells of all rows, and what they are held against."""

    def __init__(self, rows: list[Row], seeds: int, threads: bool) -> None:
        self.cells, self.long = Cells("ordinary"), Cells("ordinary_reference")
        self.rows, self.seeds, self.threads = rows, seeds, threads

    def key(self, row: Row, sampler: str, seed: int) -> str:
        return f"{row.name} | {sampler} | seed {seed}" + " | threads" * self.threads

    @cached_property
    def exact(self) -> dict[str, Moments]:
        """Moments of the rows, where they are known."""
        found = {row.name: row.exact() for row in self.rows if row.exact is not None}
        for row in self.rows:
            kept = self.long.rows.get(row.reference or row.name, {"names": ()})
            if kept.get("names"):
                figures = zip(kept["mean"], kept["sd"], kept["error"], strict=True)
                found[row.name] = dict(zip(kept["names"], figures, strict=True))
        return found

    def of(self, row: Row, sampler: str) -> list[dict[str, Any]]:
        """A sampler's cells, with z."""
        found = self.cells.found(self.key(row, sampler, seed) for seed in range(self.seeds))
        known = self.exact.get(row.name)
        return [
            kept | agreement(kept["names"], kept["moments"], known) if known and "moments" in kept else kept
            for kept in found
        ]


@dataclass(frozen=True)
class Line:
    """A sampler on a row over the seeds: means of costs, worst of scores."""

    cells: list[dict[str, Any]]
    max_rhat: float

    @property
    def finished(self) -> bool:
        return bool(self.cells) and all("bulk" in kept for kept in self.cells)

    @property
    def state(self) -> str:
        """``right``, ``wrong``, ``unfinished``, ``left out``."""
        if not self.finished:
            return "unfinished" if self.cells else "left out"
        return "right" if abs(self.z) <= MAX_Z and self.worst("rhat") <= self.max_rhat else "wrong"

    def mean(self, key: str) -> float:
        values = [kept.get(key, math.nan) for kept in self.cells]
        return sum(values) / len(values)

    def worst(self, key: str) -> float:
        return max((kept.get(key, math.nan) for kept in self.cells), key=abs)

    @property
    def z(self) -> float:
        """Zero where nothing is known."""
        worst = self.worst("z")
        return 0.0 if math.isnan(worst) else worst

    def rate(self, clock: str) -> float:
        """Bulk ESS a second, geometric mean."""
        return math.exp(sum(math.log(max(kept["bulk"], 1e-3) / kept[clock]) for kept in self.cells) / len(self.cells))

    @property
    def share(self) -> float:
        """Of the seconds, before the first kept draw."""
        return self.mean("share") if "share" in self.cells[0] else self.mean("warm") / self.mean("cpu")

    def figures(self, clock: str) -> list[object]:
        if not self.finished:
            return ["-"] * 9 + [next(kept["note"] for kept in self.cells if "bulk" not in kept)]
        seconds, share = self.mean(clock), self.share
        known = [self.z, self.worst("sd"), self.rate(clock)] if "z" in self.cells[0] else ["-", "-", self.rate(clock)]
        parts = ["-", seconds] if math.isnan(share) else [seconds * share, seconds * (1 - share)]
        note = "" if self.state == "right" else "WRONG"
        if self.mean("divergences") > 0:
            note = f"{note} {self.mean('divergences'):.0f} divergences".strip()
        rhat = f"{self.worst('rhat'):.4f}"
        first = [*parts, f"{share:.0%}" if not math.isnan(share) else "-"]
        return [*first, self.mean("bulk"), self.mean("tail"), rhat, *known, note]


COLUMNS = ["row", "d", "sampler", "warm-up s", "sampling s", "warm-up", "bulk", "tail", "R-hat", "z", "sd", "ESS/s", ""]


def lines_of(board: Board, row: Row) -> dict[str, Line]:
    """Every sampler's line, ours first."""
    limits = {OURS: MAX_RHAT, BEFORE: MAX_RHAT} | dict.fromkeys(PEERS, PEER_RHAT)
    return {sampler: Line(board.of(row, sampler), limit) for sampler, limit in limits.items()}


def ratio(ours: Line, peer: Line, clock: str) -> float:
    return ours.rate(clock) / peer.rate(clock)


def shown(ours: Line, peer: Line, clock: str) -> str:
    """The ratio; in brackets to a peer that is wrong."""
    if not peer.finished or not ours.finished:
        return {"unfinished": "unfinished"}.get(peer.state, "-")
    value = f"{ratio(ours, peer, clock):,.2f}"
    return value if peer.state == "right" else f"({value})"


def best(lines: dict[str, Line], clock: str) -> str:
    """The right peer with the most effective draws a second; nothing where none is."""
    right = [name for name in PEERS if lines[name].state == "right"]
    return max(right, key=lambda name: lines[name].rate(clock), default="")


def summary(board: Board, label: str, clock: str) -> list[str]:
    """Ratios of one label's runs to every peer's, and the goals."""
    rows, ratios, wrong, slow, late = [], {}, [], [], []
    for row in board.rows:
        lines = lines_of(board, row)
        ours = lines[label]
        if not ours.cells:
            continue
        first = best(lines, clock)
        rate, share = (ours.rate(clock), ours.share) if ours.finished else (math.nan, math.nan)
        peers = [shown(ours, lines[name], clock) for name in PEERS]
        if first and ours.finished:
            ratios[row.name] = ratio(ours, lines[first], clock)
        told = f"{ratios[row.name]:.2f} {PEERS[first]}" if row.name in ratios else "no right peer" if not first else "-"
        rows.append([row.name, row.dim, rate, f"{share:.0%}" if ours.finished else "-", ours.state, *peers, told])
        if ours.state != "right":
            wrong.append(row.name)
        if ratios.get(row.name, math.inf) < LEAST or not ours.finished:
            slow.append(row.name)
        if ours.finished and row.dim <= 100 and share > 0.5:
            late.append(row.name)
    if not rows:
        return []
    logs = [math.log(value) for value in ratios.values()]
    middle = math.exp(sum(logs) / len(logs)) if logs else math.nan
    head = ["row", "d", "ESS/s", "warm-up", "state", *PEERS.values(), "best right peer"]
    return [
        f"## {label}: its ESS a {clock} second over each peer's (in brackets: the peer is wrong)\n",
        table(head, rows),
        f"\nGeometric mean of the {len(ratios)} ratios to the best right peer: {middle:.2f} (goal {GOAL:g}).",
        f"Below {LEAST:g} or unfinished ({len(slow)}): {'; '.join(slow) or 'none'}.",
        f"Wrong or unfinished ({len(wrong)} of {len(rows)}): {'; '.join(wrong) or 'none'}.",
        f"d <= 100 and warm-up over half ({len(late)}): {'; '.join(late) or 'none'}.\n",
    ]


def written(board: Board) -> str:
    """All that is there: on one core, then with the threads that a user finds."""
    lines = [header("Ordinary models against the best NUTS", 0), NOTES]
    for threads in (False, True):
        part = Board(board.rows, board.seeds, threads)
        clock = "wall" if threads else "cpu"
        rows = [
            [row.name, row.dim, PEERS.get(sampler, sampler), *line.figures(clock)]
            for row in part.rows
            for sampler, line in lines_of(part, row).items()
            if line.cells
        ]
        if rows:
            lines += ["# As many threads as a user finds, wall seconds\n"] * threads
            lines += [text for label in (OURS, BEFORE) for text in summary(part, label, clock)]
            lines += ["## Every cell\n", table(COLUMNS, rows), ""]
    known = [
        [name, kept["bulk"], f"{kept['rhat']:.4f}", kept["divergences"], kept["cpu"]]
        for name, kept in board.long.rows.items()
        if kept.get("names")
    ]
    lines += ["## Long runs that means are held against\n"]
    lines += [table(["row", "bulk", "R-hat", "divergences", "CPU s"], known), reading("ordinary")]
    return "\n".join(lines)


NOTES = """KernelLangevin: 64 chains of 500, defaults; "before": the same where this benchmark began. NumPyro
NUTS: 4 vectorised chains, 500 + 1,000. BlackJAX ChEES: 64 chains, 500 + 500, no metric, Adam at rate .5. nutpie: 4
chains, its own warm-up + 1,000, on JAX's gradient, in double precision. Pyro NUTS: one chain, 300 + 500, small rows.
Single precision, but for the process and posteriordb's rows. One core a process; seconds are its CPU seconds,
compilation counted, imports not. ESS, R-hat: ArviZ, worst of the quantities (at most 250 of a site; of the network 20
values, as weights have symmetries). z: worst mean in combined Monte Carlo errors, against closed forms, posteriordb's
draws, or a long NUTS; "-": not known yet. sd: worst relative error of an sd. Right: |z| <= 4 and R-hat <= 1.01 (peers:
1.05). NumPyro's and nutpie's warm-up cannot be told from their sampling.
"""


def chosen(rows: list[Row], only: str) -> list[Row]:
    """Rows by parts of names; a whole name means that row alone."""
    words = [word.strip() for word in only.split(";")]
    names = {row.name for row in rows}
    return [row for row in rows if any(row.name == word if word in names else word in row.name for word in words)]


def fill(board: Board, args: argparse.Namespace, asked: list[Row]) -> None:
    """Run the cells that are missing, row after row."""
    until = time.monotonic() + 60 * args.minutes
    named = {row.name: row for row in board.rows}
    for seed in range(args.seeds):
        for sampler in args.peers.split(","):
            for row in asked:
                if time.monotonic() > until:
                    print("out of --minutes")
                    return
                if sampler == "reference":
                    source = named[row.reference or row.name]
                    if row.exact is None and (args.again or source.name not in board.long.rows):
                        board.long.put(source.name, long_run(source))
                    continue
                key = board.key(row, args.label if sampler == "ours" else sampler, seed)
                if (sampler == "pyro" and not row.small) or (key in board.cells.rows and not args.again):
                    continue
                kept = cell(row, sampler, seed, args.limit, args.threads)
                board.cells.put(key, kept)
                if kept["note"]:
                    told = kept["note"]
                else:
                    told = f"{kept['cpu']:.1f} CPU s, bulk {kept['bulk']:,.0f}, R-hat {kept['rhat']:.4f}"
                    told += f", z {kept['z']:.1f}" if "z" in kept else ""
                print(f"{key}: {told}", flush=True)


def main() -> None:
    samplers = ",".join(["reference", *PEERS, "ours"])
    args = command(
        __doc__,
        seeds=1,
        cached=True,
        only={"default": "", "help": "parts of rows' names, separated by ;"},
        peers={"default": samplers, "help": f"of {samplers}"},
        label={"default": OURS, "choices": (OURS, BEFORE), "help": "what ours is kept as"},
        limit={"type": float, "default": 300.0, "help": "CPU seconds of a cell"},
        minutes={"type": float, "default": math.inf, "help": "after so many no cell is begun"},
        again={"action": "store_true", "help": "run cells that are there"},
        threads={"action": "store_true", "help": "as many as a user finds; rates a wall second"},
    )
    board = Board(all_rows(), args.seeds, args.threads)
    if not args.report:
        fill(board, args, chosen(board.rows, args.only))
    write("ordinary", written(board))


if __name__ == "__main__":
    main()
