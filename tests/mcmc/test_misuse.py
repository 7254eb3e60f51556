"""What beginners hand to a kernel or a run: the error is about that."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS

from pyro_ebm import MCMC, CompositeKernel, ContrastiveDivergence, LangevinKernel
from pyro_ebm.nn import MLPEnergy


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def run(model, *args):
    mcmc = MCMC(LangevinKernel(model), 5, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("data", [np.zeros(1000), [1.0] * 1000], ids=["array", "list"])
def test_data_that_are_no_tensor(data, validate):
    with (
        pyro.validation_enabled(validate),
        pytest.raises(ValueError, match=r"data at site 'y'.*torch\.as_tensor") as raised,
    ):
        run(model, data)
    assert len(str(raised.value)) < 200


def test_whole_numbers_are_data():
    assert run(model, torch.tensor([1, 2, 3])).get_samples()["mu"].isfinite().all()


def test_a_number_is_data_where_nothing_checks_it():
    def alone():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=np.float64(0.5))

    with pyro.validation_enabled(False):
        assert run(alone).get_samples()["mu"].isfinite().all()


def test_a_density_that_fails_is_named():
    def flags():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("flag", dist.Bernoulli(p).expand([2]).to_event(1), obs=torch.ones(2) > 0)

    with pytest.raises(RuntimeError, match=r"site 'flag'.*torch\.bool"):
        run(flags)


def test_an_invalid_argument_is_told_as_it_is():
    with pytest.raises(ValueError, match="parameter scale"):
        run(lambda: pyro.sample("x", dist.Normal(0.0, -1.0)))


@pytest.mark.parametrize("kernel", [LangevinKernel, NUTS])
def test_a_class_is_no_kernel(kernel):
    with pytest.raises(ValueError, match=f"the class {kernel.__name__}"):
        MCMC(kernel, 10)


def test_what_is_no_kernel():
    with pytest.raises(ValueError, match=r"as in MCMC\(LangevinKernel\(model\)"):
        MCMC(model, 10)
    with pytest.raises(TypeError, match="the class LangevinKernel"):
        ContrastiveDivergence(kernel=LangevinKernel)
    with pytest.raises(ValueError, match="the class LangevinKernel"):
        CompositeKernel(model, [LangevinKernel])


def test_what_is_no_model():
    with pytest.raises(ValueError, match="the class MLPEnergy"):
        LangevinKernel(MLPEnergy)
    with pytest.raises(ValueError, match="a kernel"):
        LangevinKernel(LangevinKernel(model))
