"""Every docstring example starts alike: seed 0, no parameters, one thread, the usual names."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import UnnormalizedEnergy


@pytest.fixture(autouse=True)
def _fresh_doctest(doctest_namespace):
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_num_threads(1)
    doctest_namespace.update(
        torch=torch, pyro=pyro, dist=dist, UnnormalizedEnergy=UnnormalizedEnergy
    )
