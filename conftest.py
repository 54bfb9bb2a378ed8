"""One state for every test and doctest: a fixed seed, an empty parameter store, Pyro's and torch's own defaults."""

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Seed, empty the store, and put back what a test may have set globally."""
    dtype, validation = torch.get_default_dtype(), pyro.settings.get("validate_distributions_pyro")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)
    pyro.enable_validation(validation)
    pyro.clear_param_store()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what asks for a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
