"""Flows of zuko as Pyro distributions."""

import copy
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive
from torch.distributions import Distribution

from pyro_ebm import MCMC
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.distributions.flow import FlowDistribution, fit_flow, neural_spline_flow
from pyro_ebm.mcmc import MHKernel

SIGMAS = 4.5
FLOWS = {
    "nsf": lambda **k: neural_spline_flow(2, transforms=2, hidden_features=(16,), **k),
    "maf": lambda **k: zuko.flows.MAF(2, transforms=2, hidden_features=(16,), **k),
    "nice": lambda **k: zuko.flows.NICE(2, transforms=2, hidden_features=(16,), **k),
}


@pytest.fixture(params=FLOWS, autouse=False)
def net(request):
    torch.manual_seed(1)
    Distribution.set_default_validate_args(True)  # importing zuko here has switched it off
    return FLOWS[request.param]()


@pytest.mark.parametrize("sample", [(), (5,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (4,), (3, 1)])
def test_shapes(net, sample, batch):
    q = FlowDistribution(net()).expand(batch)
    assert (q.batch_shape, q.event_shape) == (batch, (2,))
    x = q.rsample(sample)
    assert x.shape == sample + batch + (2,)
    assert x.requires_grad
    assert not q.sample(sample).requires_grad
    assert q.log_prob(x).shape == sample + batch
    assert q.log_prob(torch.zeros(2)).shape == batch
    both, log_q = q.rsample_and_log_prob(sample)
    assert (both.shape, log_q.shape) == (x.shape, sample + batch)


def test_the_density_is_that_of_the_draws(net):
    q = FlowDistribution(net())
    x, log_q = q.rsample_and_log_prob((500,))
    torch.testing.assert_close(q.log_prob(x.detach()), log_q, rtol=1e-3, atol=1e-3)
    reach = 3 + float(q.sample((4000,)).abs().max())
    line = torch.linspace(-reach, reach, int(40 * reach))
    grid = torch.cartesian_prod(line, line)
    mass = q.log_prob(grid).exp().detach() * (line[1] - line[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1.0, abs=0.01)
    mean, draws = (mass[:, None] * grid).sum(0), q.sample((4000,))
    assert ((draws.mean(0) - mean).abs() < SIGMAS * draws.std(0) / 4000**0.5 + 0.01).all()


def test_what_was_drawn_is_scored_in_the_same_pass_and_nothing_grows(net):
    q = FlowDistribution(net())
    x = q.rsample((3,))
    _, log_q = q._last
    assert q.log_prob(x) is log_q
    assert q.log_prob(x.clone()) is not log_q
    y = q.rsample((3,))
    assert q._last[0] is y
    with torch.no_grad():
        q.rsample((3,))
    assert q._last is None


def test_elements_of_an_expanded_flow_are_independent(net):
    x = FlowDistribution(net()).expand((4,)).sample((2000,))
    x = x[..., 0]
    assert torch.corrcoef(x.T).fill_diagonal_(0).abs().max() < SIGMAS / 2000**0.5


def test_a_conditional_flow_has_the_batch_of_its_context():
    net = neural_spline_flow(2, context=3, transforms=1)
    q = FlowDistribution(net(torch.randn(5, 3)))
    assert q.batch_shape == (5,)
    assert q.expand((4, 5)).sample().shape == (4, 5, 2)
    with pyro.plate("data", 5):
        assert pyro.sample("x", q).shape == (5, 2)


def test_it_is_a_pyro_site(net):
    def model():
        pyro.module("net", net)
        with pyro.plate("data", 7):
            return pyro.sample("x", FlowDistribution(net()))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (7,)
    assert Predictive(model, num_samples=3)()["x"].shape == (3, 7, 2)
    q = FlowDistribution(net()).expand((7,))
    assert q.mask(torch.arange(7) > 3).log_prob(q.sample())[0] == 0
    assert q.to_event(1).log_prob(q.sample()).shape == ()
    assert "event_shape=(2,)" in repr(q)


def test_the_support_is_checked():
    net = neural_spline_flow(2)
    q = FlowDistribution(net())
    assert q.support is constraints.real_vector
    with pytest.raises(ValueError, match="value"):
        q.log_prob(torch.tensor([0.0, float("nan")]))
    positive = constraints.independent(constraints.positive, 1)
    assert FlowDistribution(net(), support=positive).expand((3,)).support is positive
    with pytest.raises(ValueError, match=r"write FlowDistribution\(flow\(\)\)"):
        FlowDistribution(net)


def test_gradients_reach_the_flow(net):
    q = FlowDistribution(net())
    x = q.rsample((10,))
    (q.log_prob(x) - x.square().sum(-1)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_copies_and_pickles(net):
    q = FlowDistribution(net())
    x = q.sample((3,))
    want = q.log_prob(x)
    torch.testing.assert_close(copy.deepcopy(net)().log_prob(x), want)
    net = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(FlowDistribution(net()).log_prob(x), want)


def test_a_flow_as_the_base_of_an_energy():
    net = neural_spline_flow(2, transforms=1, hidden_features=(8,)).double()
    p = UnnormalizedEnergy(lambda x: x.square().sum(-1), base=FlowDistribution(net()), num_steps=20)
    x = p.sample((50,))
    assert x.shape == (50, 2)
    assert x.dtype == torch.float64
    want = net().log_prob(x) - x.square().sum(-1)
    torch.testing.assert_close(p.unnormalized_log_prob(x), want)
    assert p.expand((4,)).sample().shape == (4, 2)


def test_a_flow_as_an_independence_proposal():
    net = neural_spline_flow(2, transforms=1, hidden_features=(8,))

    def model():
        return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    mcmc = MCMC(
        MHKernel(model, proposal=FlowDistribution(net())),
        100,
        warmup_steps=5,
        num_chains=100,
        disable_progbar=True,
    )
    mcmc.run()
    x = mcmc.get_samples()["x"]
    assert (x.mean(0).abs() < 0.15).all()
    assert ((x.var(0) - 1).abs() < 0.2).all()


def test_fitting_is_maximum_likelihood():
    x = torch.randn(2000, 2) * torch.tensor([0.5, 2.0]) + torch.tensor([1.0, -1.0])
    net = zuko.flows.MAF(2, transforms=1, hidden_features=(8,))
    losses = fit_flow(net, x, num_steps=400, lr=0.02, disable_progbar=True)
    entropy = float(-dist.Normal(0.0, torch.tensor([0.5, 2.0])).log_prob(torch.zeros(2)).sum()) + 1
    assert sum(losses[-50:]) / 50 == pytest.approx(entropy, abs=0.1)
    assert losses[0] > entropy + 0.5
    assert all(p.grad is None for p in net.parameters())  # nothing is left over for SVI
    assert all(isinstance(loss, float) for loss in losses)


def test_fitting_bad_input(capfd):
    net = neural_spline_flow(1)
    with pytest.raises(ValueError, match="NaN"):
        fit_flow(net, torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="module with parameters"):
        fit_flow(lambda: dist.Normal(0.0, 1.0), torch.zeros(3, 1))
    fit_flow(net, torch.randn(20, 1), num_steps=2)
    assert "fit flow" in capfd.readouterr().err


def test_making_a_flow_leaves_validation_as_it_is():
    code = (
        "import torch, pyro_ebm.distributions.flow as f, sys\n"
        "assert 'zuko' not in sys.modules\n"
        "from torch.distributions import Distribution\n"
        "before = Distribution._validate_args\n"
        "f.neural_spline_flow(1)\n"
        "assert 'zuko' in sys.modules and Distribution._validate_args == before == True\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
