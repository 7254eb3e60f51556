"""An energy that cannot be called at its points: the error says which, where and what would do."""

import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm import (
    MCMC,
    NCE,
    ContrastiveDivergence,
    LangevinKernel,
    UnnormalizedEnergy,
    estimate_log_normalizer,
    product,
)
from pyro_ebm.nn import ConvEnergy, MLPEnergy


def images():
    """A plain network of images: it takes one batch dimension, and no other number of them."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 1))
    return nn.Sequential(net, nn.Flatten(0))


def energy(net):
    return UnnormalizedEnergy(net, event_shape=(1, 8, 8))


def denoise(p):
    def model(y):
        x = pyro.sample("x", p)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(3), obs=y)

    MCMC(LangevinKernel(model), 10, disable_progbar=True).run(torch.rand(1, 8, 8))


SINGLE = {
    "energy": lambda p: p.energy(torch.zeros(1, 8, 8)),
    "score": lambda p: p.score(torch.zeros(1, 8, 8)),
    "sample": lambda p: p.sample(),
    "product": lambda p: product(p, energy(lambda x: x.sum((-1, -2, -3)))).sample(),
    "MCMC": denoise,
}
CALLS = {
    "log_prob": lambda p: p.log_prob(torch.zeros(2, 3, 1, 8, 8)),
    "sample of a batch": lambda p: p.expand([2]).sample((3,)),
    "AIS": lambda p: estimate_log_normalizer(
        UnnormalizedEnergy(
            p._energy, base=dist.Normal(torch.zeros(1, 8, 8), 1.0).to_event(3).expand([2])
        )
    ),
}


@pytest.mark.parametrize("call", SINGLE)
@pytest.mark.filterwarnings("ignore:these draws may be wrong")  # of ten draws
def test_a_network_that_takes_one_batch_dimension_takes_single_points(call):
    SINGLE[call](energy(images()))


def test_a_single_point_has_the_energy_of_a_batch_of_one():
    net, x = images(), torch.randn(1, 8, 8, requires_grad=True)
    value = energy(net).energy(x)
    assert value.shape == ()
    assert torch.equal(value, net(x[None])[0])
    assert torch.autograd.grad(value, x)[0].abs().max() > 0
    mlp = MLPEnergy(2)
    flat = UnnormalizedEnergy(lambda x: mlp(x).view(-1), event_shape=(2,))  # () becomes (1,)
    assert flat.energy(torch.zeros(2)).shape == ()
    with pytest.raises(ValueError, match=r"must map points of shape \(2,\).*got \(2,\)"):
        UnnormalizedEnergy(torch.square, event_shape=(2,)).energy(torch.zeros(2))  # no sum


def test_a_missing_event_shape_is_named():
    """The points at hand say which shape it may be; where there is no event in them, an example."""
    net = nn.Linear(36, 1)
    failing = UnnormalizedEnergy(lambda x: net(x.flatten(-2)).squeeze(-1))
    summing = UnnormalizedEnergy(lambda x: x.flatten(-2).sum(-1))
    for p in (failing, summing):
        with pytest.raises(ValueError, match=r"for points of another .* event_shape=\(4, 9\)"):
            p.energy(torch.randn(5, 4, 9))
    with pytest.raises(ValueError, match=r"failed at .* \(3,\), .* such as event_shape=\(8, 8\)"):
        failing.sample((3,))


@pytest.mark.parametrize("call", CALLS)
def test_a_network_that_takes_one_batch_dimension_takes_no_two(call):
    p = energy(images())
    with pytest.raises(ValueError, match="energy Sequential failed at points of shape") as raised:
        CALLS[call](p)
    said = str(raised.value)
    assert "though not at shape" in said
    assert "net(x.reshape(-1, 1, 8, 8)).reshape(x.shape[:-3])" in said
    causes = [raised.value]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    assert any(type(cause) is RuntimeError for cause in causes)


def test_the_way_out_works():
    net = images()
    p = energy(lambda x: net(x.reshape(-1, 1, 8, 8)).reshape(x.shape[:-3]) + x.square().sum((1, 2)))
    q = energy(
        lambda x: net(x.reshape(-1, 1, 8, 8)).reshape(x.shape[:-3]) + (x**2).sum((-1, -2, -3))
    )
    del p
    denoise(q)
    assert q.sample((2, 3)).shape == (2, 3, 1, 8, 8)


def test_an_energy_of_single_points():
    precision = torch.eye(2)
    p = UnnormalizedEnergy(lambda x: x @ precision @ x, event_shape=(2,))
    with pytest.raises(ValueError, match=r"lambda failed at points of shape \(5, 2\).*\(2,\)"):
        p.log_prob(torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_points_of_another_dtype(dtype):
    p = UnnormalizedEnergy(MLPEnergy(2), event_shape=(2,))
    with pytest.raises(ValueError, match=rf"MLPEnergy.*{dtype}.*x\.float\(\)"):
        p.log_prob(torch.zeros(5, 2, dtype=dtype))


def test_a_network_of_another_dtype():
    p = UnnormalizedEnergy(MLPEnergy(2).double(), event_shape=(2,))
    with pytest.raises(ValueError, match=r"MLPEnergy.*float32.*x\.to\(torch\.float64\)"):
        p.log_prob(torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool])
def test_pixels_overflow(dtype):
    """``x**2`` of a byte wraps around at 256."""
    p = UnnormalizedEnergy(lambda x: x**2)
    with pytest.raises(ValueError, match=r"x\.float\(\)"):
        p.log_prob(torch.tensor([20, 0], dtype=dtype))


def test_whole_numbers_are_points():
    p = UnnormalizedEnergy(lambda x: x**2)
    assert p.log_prob(torch.tensor([20])).tolist() == [-400]


def test_the_network_has_another_event_shape():
    p = UnnormalizedEnergy(nn.Sequential(nn.Linear(3, 1), nn.Flatten(-2)), event_shape=(2,))
    with pytest.raises(ValueError, match=r"Sequential.*event_shape=\(2,\).*one point"):
        p.sample()


def test_other_errors_stay_what_they_are():
    p = UnnormalizedEnergy(lambda x: x.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method") as raised:
        p.log_prob(torch.zeros(5))
    (note,) = raised.value.__notes__
    assert "energy lambda" in note
    singular = UnnormalizedEnergy(lambda x: torch.linalg.cholesky(x)[..., 0, 0], (2, 2))
    with pytest.raises(torch.linalg.LinAlgError):
        singular.log_prob(torch.zeros(3, 2, 2))

    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        UnnormalizedEnergy(interrupted).log_prob(torch.zeros(3))


def test_losses_name_the_site():
    channel = nn.Unflatten(1, (1, 2))
    net = nn.Sequential(channel, nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0))

    def model(x):
        pyro.module("net", net)
        log_z = pyro.param("log_z", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(net, event_shape=(2,), log_normalizer=log_z)
            pyro.sample("point", p, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("point", dist.Normal(torch.zeros(2), 2.0).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({}), NCE(noise_ratio=2))
    with pytest.raises(ValueError, match=r"site 'point': the energy Sequential.*\(3, 30, 2\)"):
        svi.step(torch.randn(30, 2))
    svi = SVI(model, lambda x: None, pyro.optim.Adam({}), ContrastiveDivergence())
    with pytest.raises(ValueError, match=r"site 'point': the energy Sequential.*float64"):
        svi.step(torch.randn(30, 2).double())


def test_what_is_no_energy():
    with pytest.raises(ValueError, match="the class MLPEnergy"):
        UnnormalizedEnergy(MLPEnergy, event_shape=(2,))
    with pytest.raises(ValueError, match=r"distribution Normal.*-p\.log_prob\(x\)"):
        UnnormalizedEnergy(dist.Normal(0.0, 1.0))


def test_an_estimate_is_no_log_normalizer():
    p = UnnormalizedEnergy(torch.square)
    estimate = estimate_log_normalizer(p, method="quadrature")
    with pytest.raises(ValueError, match=r"p\.normalized\(estimate\)"):
        UnnormalizedEnergy(torch.square, log_normalizer=estimate)
    assert p.normalized(estimate).is_normalized


@pytest.mark.parametrize("value", [np.zeros(1000), [0.0] * 1000])
def test_arrays_are_not_printed_whole(value):
    p = UnnormalizedEnergy(torch.square)
    for call in (p.log_prob, p.energy, p.normalized):
        with pytest.raises(ValueError, match=r"torch\.as_tensor") as raised:
            call(value)
        assert len(str(raised.value)) < 200


def test_no_warning_and_no_second_call_where_all_is_well():
    calls = []
    p = UnnormalizedEnergy(lambda x: calls.append(x.shape) or x.square())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.log_prob(torch.zeros(3))
    assert calls == [(3,)]


def test_a_network_of_images_whose_points_lack_the_channel():
    """One point too few dimensions is no batch of points."""
    p = UnnormalizedEnergy(ConvEnergy((1, 8, 8)), event_shape=(8, 8))
    with pytest.raises(ValueError, match=r"ConvEnergy.*event_shape=\(8, 8\).*one point"):
        p.sample()


@pytest.mark.parametrize("energy", [lambda x: x > 0, lambda x: x + 0j], ids=["bool", "complex"])
def test_an_energy_is_a_real_number(energy):
    with pytest.raises(ValueError, match=r"energy .* must be a real number at each point"):
        UnnormalizedEnergy(energy).log_prob(torch.zeros(3))


# -- a batch of one, and of several ----------------------------------------------------------------


def squeezed(*shape):
    """A network that ends in ``squeeze()``."""
    net = nn.Sequential(nn.Flatten(1), nn.Linear(math.prod(shape), 4), nn.Linear(4, 1))
    return lambda x: net(x).squeeze()


class OneAtATime(nn.Linear):
    """A network that takes one image, and of several the sum."""

    def forward(self, x):
        return super().forward(x.flatten(1)).sum().reshape(1)


def fitted(energy):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(energy, event_shape=(2, 2)), obs=x)

    loss = ContrastiveDivergence(num_steps=1)
    SVI(model, lambda x: None, pyro.optim.Adam({}), loss).step(torch.randn(5, 2, 2))


FIRST_USES = {
    "log_prob": lambda f: UnnormalizedEnergy(f, event_shape=(2, 2)).log_prob(torch.ones(5, 2, 2)),
    "sample": lambda f: UnnormalizedEnergy(f, event_shape=(2, 2)).sample((5,)),
    "a loss": fitted,
}


@pytest.mark.parametrize("use", FIRST_USES)
def test_a_batch_of_one_is_looked_at_when_batches_are_large(use):
    energy = squeezed(2, 2)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) to \(\) in evaluation mode.*squeeze\(-1\)"):
        FIRST_USES[use](energy)


def test_two_points_are_looked_at_where_there_is_one():
    p = UnnormalizedEnergy(OneAtATime(4, 1), event_shape=(2, 2))
    with pytest.raises(ValueError, match=r"one point at a time.*to \(1,\), not to \(2,\)"):
        p.log_prob(torch.ones(1, 2, 2))


def test_the_mode_that_a_module_is_not_in_is_looked_at_too():
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze(*(() if self.training else (-1,)))

    p = UnnormalizedEnergy(Net(2, 1).eval(), event_shape=(2,))
    with pytest.raises(ValueError, match="in training mode"):
        p.log_prob(torch.zeros(3, 2))


def test_the_look_at_batches_changes_nothing_and_comes_once():
    calls = []
    layers = [nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0)]
    net = nn.Sequential(*layers)
    net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    plain = copy.deepcopy(net)
    x = torch.randn(6, 2)
    pyro.set_rng_seed(3)
    want, after = plain(x), torch.rand(2)
    calls.clear()
    pyro.set_rng_seed(3)
    found = UnnormalizedEnergy(net, event_shape=(2,)).energy(x)
    assert torch.equal(found, want)
    assert torch.equal(torch.rand(2), after)
    assert calls == [6, 1, 2]
    for name, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert all(module.training for module in net.modules())
    UnnormalizedEnergy(net, event_shape=(2,)).energy(x)  # as the next step of a training does
    assert calls == [6, 1, 2, 6]


def test_a_network_beside_data_of_each_row_is_left_alone():
    net, y = MLPEnergy(3), torch.randn(7, 1)
    for rows in (7, 1):
        cond = y[:rows]
        p = UnnormalizedEnergy(lambda x, cond=cond: net(torch.cat([x, cond], -1)), event_shape=(2,))
        assert p.log_prob(torch.randn(rows, 2)).shape == (rows,)
