"""CPU seconds and memory of `import pyro_sb` against `import pyro`, in fresh processes that take turns.

Run as `python -m benchmarks.speed.imports [--repeats 7]`. The claim: at most 1.25 times the CPU.
"""

import argparse
import subprocess
import sys
from statistics import median

from benchmarks.lib.report import header, table, write

MODULES = ("pyro", "pyro_sb")
CLAIM = 1.25
PROGRAM = """
import resource, sys, time
import {module}
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def cost(module: str) -> tuple[float, float]:
    """CPU seconds of a process that imports a module and ends, and its largest memory in MB."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)], capture_output=True, text=True, check=True
    )
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    for module in MODULES:  # byte code and file caches
        cost(module)
    found: dict[str, list[tuple[float, float]]] = {module: [] for module in MODULES}
    for _ in range(repeats):
        for module in MODULES:
            found[module].append(cost(module))
    middle = {m: [median(column) for column in zip(*runs, strict=True)] for m, runs in found.items()}
    ratio = middle["pyro_sb"][0] / middle["pyro"][0]
    lines = [
        header("Cost of an import", 0),
        f"Medians of {repeats} fresh processes each, which take turns.",
        table(["import", "CPU s", "MB"], [[name, *figures] for name, figures in middle.items()]),
        f"\nRatio {ratio:.2f}: the claim of {CLAIM} {'holds' if ratio <= CLAIM else 'does not hold'}.",
    ]
    write("imports", "\n".join(lines))


if __name__ == "__main__":
    main()
