"""`python -m tests.fuzz --cases 10000`: single arguments (0: these alone), then random pairs; what came of them."""

import argparse
import random
import sys
import time
from collections import Counter

from tests.fuzz.beyond import CALLS
from tests.fuzz.outcome import GOOD, tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--pairs", action="store_true", help="pairs of arguments alone")
    given = parser.parse_args()
    chosen, counts, seen, begun = random.Random(given.seed), Counter(), set(), time.perf_counter()
    for name, changes in plan(chosen, given.cases, given.only, given.pairs):
        came = tried(CALLS[name], dict(changes), given.seed)
        counts[came.kind] += 1
        if sum(counts.values()) % 1000 == 0:
            print(f"{sum(counts.values())} cases, {time.perf_counter() - begun:.0f} s: {dict(counts)}", flush=True)
        if came.kind not in GOOD:
            what = ", ".join(f"{argument}={value.name}" for argument, value in changes)
            key = (name.split()[-1], came.kind, came.words.split(":")[0], came.words[:80])
            if key not in seen:
                seen.add(key)
                print(f"{came.kind:7s} {name}({what}): {came.words}", flush=True)
    print(
        f"{sum(counts.values())} cases in {time.perf_counter() - begun:.0f} s, seed {given.seed}: "
        + ", ".join(f"{kind} {counts[kind]}" for kind in ("right", "ours", "raw", "nan", "let in", "hang", "state"))
    )
    return int(any(counts[kind] for kind in counts if kind not in GOOD))


def plan(chosen, number, only, pairs):
    """Each value of each argument once, then pairs of arguments at random."""
    singles = [(n, [(a, v)]) for n, c in CALLS.items() if only in n for a, values in c.tried.items() for v in values]
    chosen.shuffle(singles)
    singles = [] if pairs else singles
    yield from singles[: number or None]
    names = [name for name in CALLS if only in name and len(CALLS[name].tried) > 1]
    for _ in range(max(0, number - len(singles)) if names else 0):
        name = chosen.choice(names)
        yield name, [(a, chosen.choice(CALLS[name].tried[a])) for a in chosen.sample(sorted(CALLS[name].tried), 2)]


if __name__ == "__main__":
    sys.exit(main())
