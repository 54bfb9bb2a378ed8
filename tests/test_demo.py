"""`make demo` in its short mode: it runs, prints the reference beside the draws, and writes what it says."""

import os
import subprocess
import sys
from pathlib import Path

import arviz as az

ROOT = Path(__file__).parents[1]


def test_the_demo_writes_draws_and_pictures(tmp_path):
    short = {"PYRO_SB_SHORT": "1", "OMP_NUM_THREADS": "1", "CI": "1"}
    command = [sys.executable, "-m", "demo", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | short, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "reference" in run.stdout and "truth 0.500" in run.stdout
    ours, theirs = run.stdout.split("The report of ")[1:]
    for name, printed in (("KernelLangevin", ours), ("Pyro's NUTS", theirs)):
        assert printed.startswith(name) and "\nverdict  what" in printed and "R-hat" in printed and "modes: " in printed
    assert ": bad" in theirs.splitlines()[1]  # one chain, and one of the two modes
    for name in ("eight_schools.png", "modes.png", "report.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    idata = az.from_netcdf(str(tmp_path / "eight_schools.nc"))
    assert idata.posterior["theta"].dims == ("chain", "draw", "schools")
    assert {"log_likelihood", "sample_stats", "observed_data"} <= set(idata.groups())
