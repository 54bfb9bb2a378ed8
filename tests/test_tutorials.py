"""Every tutorial runs from top to bottom in its short mode, and is committed with the outputs of a full run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PATHS = ("/root", "/home", "/tmp", "/work", "/Users", "site-packages", "C:\\")


def named(path):
    return path.stem


def outputs(path):
    notebook = nbformat.read(path, as_version=4)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_tutorials():
    names = {"00_quickstart", "10_mcmc_kernel", "20_bridge", "20_conditional_generation", "30_amortised_posterior"}
    names |= {"35_simulator_in_a_model"}
    names |= {"40_lightsbb", "50_data_to_data", "60_latent_bridge", "70_can_i_trust_it", "75_guides"}
    names |= {"80_bridge_as_prior"}
    assert names <= {path.stem for path in TUTORIALS}


@pytest.mark.parametrize("path", TUTORIALS, ids=named)
def test_it_runs_in_short_mode(path, monkeypatch):
    monkeypatch.setenv("PYRO_SB_SHORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()


@pytest.mark.parametrize("path", TUTORIALS, ids=named)
def test_it_is_committed_with_what_a_full_run_showed(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert any("image/png" in output.get("data", {}) for output in outputs(path))
    assert not [output for output in outputs(path) if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("path", TUTORIALS, ids=named)
def test_its_outputs_name_no_machine(path):
    text = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs(path)
    )
    assert not [part for part in PATHS if part in text]
    assert path.stat().st_size < 500_000
