"""Every test starts alike: empty param store, seed 0, validation on, float32, one thread.

``--reseed N`` shifts every seed that a test gives to torch or Pyro, its own and this one, so that
each N is another sample: a statistical test must pass at all of them. Doctests print numbers of
seed 0 and keep it.
"""

import os

# Before torch and matplotlib read them; processes that tests start read them too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch

from tests.seeds import reseeded

# `make bench` runs the benchmarks; tests/test_benchmarks.py is their smoke test.
collect_ignore = ["benchmarks"]


def pytest_addoption(parser):
    parser.addoption("--reseed", type=int, default=0, metavar="N", help="shift the tests' seeds")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: tests of several ranks wait much of their time."""
    from xdist.plugin import pytest_xdist_auto_num_workers as cores

    return cores(config) + 1


@pytest.fixture(autouse=True)
def _fresh_pyro(request):
    """Set what Pyro and torch keep globally, and put it back whatever the test did to it."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    pyro.enable_validation(True)  # torch's Distribution validation included
    pyro.clear_param_store()
    with reseeded(request.config.getoption("reseed")):
        pyro.set_rng_seed(0)
        yield

    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
