"""`python -m benchmarks list`, `run NAME ... [--to FOLDER] [-- arguments]` or `check`."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.claims import CLAIMS, QUOTES, Claim
from benchmarks.lib.quotes import RESULTS, ROOT

BENCH_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "tutorials/*.ipynb", "pyro_sb/**/*.py")


def documents() -> dict[str, str]:
    """Texts that may quote results, by name."""
    paths = [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def places(claim: Claim, texts: dict[str, str]) -> list[str]:
    """Documents that name the claim's results or its script."""
    names = [f"results/{stem}." for stem in claim.results.split()]
    if claim.script:
        names += [f"benchmarks.{claim.script}", f"benchmarks/{claim.script.replace('.', '/')}.py"]
    return [name for name, text in texts.items() if any(word in text for word in names)]


def listed() -> str:
    """The table of claims."""
    lines, texts = [], documents()
    for claim in CLAIMS:
        lines += [f"{claim.name}: {claim.says}. {claim.minutes} min, seeds: {claim.seeds}", f"    {claim.command}"]
        files = ", ".join(f"results/{stem}" for stem in claim.results.split())
        lines.append(f"    {files}, named by {', '.join(places(claim, texts)) or 'another claim'}")
    return "\n".join(lines)


def run(names: list[str], folder: Path | None, arguments: list[str]) -> int:
    """Run claims one after the other, all if none is named; the exit status of the first that fails."""
    known = {claim.name: claim for claim in CLAIMS if claim.script}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"Claims must be of {', '.join(known)}; got {', '.join(unknown)}.")
    environment = os.environ | ({"PYRO_SB_RESULTS": str(folder.resolve())} if folder else {})
    for name in names or known:
        claim = known[name]
        python = str(BENCH_PYTHON) if claim.peers else sys.executable
        if claim.peers and not BENCH_PYTHON.exists():
            raise SystemExit(f"{name}: the peers' environment .venv-bench must be there. Run `make bench-env`.")
        print(f"== {name}: {claim.says}", flush=True)
        done = subprocess.run([python, "-m", f"benchmarks.{claim.script}", *arguments], env=environment, cwd=ROOT)
        if done.returncode:
            return done.returncode
    return 0


def forgotten(folder: Path) -> Iterator[str]:
    """Scripts that no claim names; a module that others import, and that cannot be run, is a helper."""
    texts = {path: path.read_text() for path in sorted(folder.rglob("*.py"))}
    claimed = {claim.script for claim in CLAIMS}
    for path, text in texts.items():
        place = path.relative_to(folder).with_suffix("")
        name = ".".join(place.parts)
        if len(place.parts) < 2 or place.parts[0] == "lib" or path.stem == "__init__" or name in claimed:
            continue
        imported = any(f"from benchmarks.{name} import" in other for other in texts.values())
        if "__main__" in text or not imported:
            yield f"benchmarks/{place.as_posix()}.py must be the script of a claim, or be imported by one"


def problems() -> Iterator[str]:
    """Faults between claims, scripts, results and documents."""
    texts, stems = documents(), [stem for claim in CLAIMS for stem in claim.results.split()]
    for path in sorted(RESULTS.iterdir()):
        if stems.count(path.stem) != 1:
            yield f"results/{path.name} must belong to one claim, belongs to {stems.count(path.stem)}"
    for claim in CLAIMS:
        if claim.script and importlib.util.find_spec(f"benchmarks.{claim.script}") is None:
            yield f"{claim.name}: benchmarks.{claim.script} must be a module"
        if not all(any(RESULTS.glob(f"{stem}.*")) for stem in claim.results.split()):
            yield f"{claim.name}: results must be there, wanted {claim.results}"
        if not claim.peers and not places(claim, texts):
            yield f"{claim.name}: a document must name its results"
    scripts = {f"benchmarks.{claim.script}" for claim in CLAIMS}
    for name, text in texts.items():
        for script in sorted(set(re.findall(r"-m (benchmarks\.[\w.]+\w)", text)) - scripts):
            yield f"{name}: {script} must be the script of a claim"
        for named in sorted(set(re.findall(r"benchmarks/[\w/]+\.\w+", text))):
            if not (ROOT / named).exists():
                yield f"{name}: {named} must exist"
    yield from forgotten(ROOT / "benchmarks")
    for quote in QUOTES:
        yield from quote.missing()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the table of claims")
    commands.add_parser("check", help="whether quoted figures stand in the result files, and all is in its place")
    runs = commands.add_parser("run", help="run claims, all of them if none is named; after -- the script's arguments")
    runs.add_argument("names", nargs="*", metavar="NAME")
    runs.add_argument("--to", type=Path, help="folder for the results of a trial; default: results/")
    words, place = sys.argv[1:], sys.argv.index("--") - 1 if "--" in sys.argv else None
    asked = parser.parse_args(words[:place])
    if asked.command == "list":
        print(listed())
        return 0
    if asked.command == "run":
        return run(asked.names, asked.to, words[place + 1 :] if place is not None else [])
    found = list(problems())
    print("\n".join(found) or f"{len(QUOTES)} passages hold.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
