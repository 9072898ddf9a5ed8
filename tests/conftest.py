"""Options `--device` and `--dtype`, and one thread per worker: small matrix products gain nothing from more."""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device of the tests of the mathematics")
    parser.addoption("--dtype", default="float64", choices=["float32", "float64"])


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def generator(device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def returns():
    """The last 1,500 days of the bundled panel, as simple returns."""
    from finediff.panel import load_prices, to_returns

    return to_returns(load_prices()).iloc[-1500:]


@pytest.fixture(autouse=True)
def no_global_randomness():
    """No test, and so no code under test, may read or set the global random states."""
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    yield
    assert (np.random.get_state()[1] == numpy_before).all(), "numpy's global random state was used"
    assert torch.equal(torch.random.get_rng_state(), torch_before), "torch's global random state was used"
