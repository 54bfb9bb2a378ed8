"""Texts of benchmarks: a header that says where the figures come from, tables, and a copy under results/."""

import datetime
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import pyro
import torch

KEPT = Path(__file__).parents[1] / "results"
RESULTS = Path(os.environ.get("PYRO_SB_RESULTS", KEPT)).resolve()  # a trial writes elsewhere
READING = re.compile(r"^(?:Reading|Which to choose)\b.*?(?=^$|^[\d,]+ CPU s in all|\Z)", re.DOTALL | re.MULTILINE)


def header(title: str, seed: int) -> str:
    """Title, date, seed, versions, processor and threads. No host name."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__}"
    date = datetime.date.today().isoformat()
    return "\n".join([title, "=" * len(title), f"{date}, seed {seed}, {versions}", f"{processor()}, {threads()}", ""])


def processor() -> str:
    """The CPU's model name, and the accelerator's if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()} ({len(names) or '?'} cores)"
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Right-aligned columns, the first left-aligned; floats to four figures."""
    cells = [list(columns)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean +- sd, to so many significant digits of the mean (or four decimals, if that is more)."""
    if not values:
        return "-"
    places = max(0, digits - 1 - math.floor(math.log10(abs(mean(values)) or 1)))
    return f"{mean(values):.{places}f}" + (f" +- {stdev(values):.{places}f}" if len(values) > 1 else "")


def reading(name: str) -> str:
    """The paragraph of ``results/<name>.txt`` that says what its figures mean: written there by hand, kept as it is."""
    path = KEPT / f"{name}.txt"
    found = READING.search(path.read_text()) if path.exists() else None
    return f"\n{found.group()}" if found else ""


def write(name: str, text: str, *, keep: bool = True) -> None:
    """Print ``text`` and, unless it is a trial's, keep it as ``results/<name>.txt``."""
    print(text)
    if keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.txt").write_text(text.rstrip() + "\n")


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
