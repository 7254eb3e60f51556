"""Deep belief networks: by enumeration of all layers."""

import itertools
import pickle

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ebm.distributions import DeepBeliefNetwork, GaussianRBMModule, RBMModule
from tests.statistics import assert_mean_of_rows

WIDTHS = (4, 3, 2)


def bits(n, dtype=torch.float64):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=dtype)


def network(widths=WIDTHS, scale=0.8):
    machines = []
    for n, m in itertools.pairwise(widths):
        net = RBMModule(n, m, weight_scale=scale).double()
        with torch.no_grad():
            net.visible_bias.normal_(std=scale)
            net.hidden_bias.normal_(std=scale)
        machines.append(net)
    return DeepBeliefNetwork(machines).requires_grad_(False)


def exact_log_prob(net, x):
    """log p(x) = log sum_h p(x | h) p_top(h), by enumeration of the layer h, for two machines."""
    top = net.machine(1)
    h = bits(net.machine(0).num_hidden)
    log_h = top.normalized(top.exact_log_normalizer()).log_prob(h)
    return (net.machine(0).visible_given(h).log_prob(x[:, None]) + log_h).logsumexp(-1)


def test_one_machine_has_no_gap():
    net, x = network((4, 3)), bits(4)
    machine = net.machine(0)
    want = machine.normalized(machine.exact_log_normalizer()).log_prob(x)
    torch.testing.assert_close(net.lower_bound(x), want)
    assert (want.exp().sum() - 1).abs() < 1e-10


def test_the_bound_is_the_evidence_minus_the_divergence_of_q():
    net, x = network(), bits(4)
    exact = exact_log_prob(net, x)
    assert (exact.exp().sum() - 1).abs() < 1e-10
    # E_q[log p(x|h) + log p(h) - log q(h|x)], over all states of h
    h = bits(3)
    q = net.machine(0).hidden_given(x[:, None]).log_prob(h)
    top = net.machine(1)
    p = net.machine(0).visible_given(h).log_prob(x[:, None])
    p = p + top.normalized(top.exact_log_normalizer()).log_prob(h)
    want, variance = (q.exp() * (p - q)).sum(-1), None
    variance = (q.exp() * (p - q).square()).sum(-1) - want.square()
    n = 20_000
    got = net.lower_bound(x, num_samples=n)
    assert ((got - want).abs() < 4.5 * (variance / n).sqrt()).all()
    assert (want < exact).all()  # and q is no posterior of this top
    # told another log Z, it moves by the difference
    shifted = net.lower_bound(x[:1], log_normalizer=top.exact_log_normalizer() + 1, num_samples=n)
    assert (shifted - want[:1] + 1).abs() < 4.5 * (variance[:1] / n).sqrt()


def test_a_top_that_is_the_machine_below_upside_down_closes_the_gap():
    # p_top(h) = p_1(h) if the top machine is the first one upside down: the network is the first
    first = network((4, 3)).machines[0]
    top = RBMModule(3, 4).double()
    with torch.no_grad():
        top.weights.copy_(first.weights.T)
        top.visible_bias.copy_(first.hidden_bias)
        top.hidden_bias.copy_(first.visible_bias)
    net, x = DeepBeliefNetwork([first, top]).requires_grad_(False), bits(4)
    single = first()
    want = single.normalized(single.exact_log_normalizer()).log_prob(x)
    torch.testing.assert_close(exact_log_prob(net, x), want)
    # and the integrand of the bound has no variance: q is the posterior
    torch.testing.assert_close(net.lower_bound(x, num_samples=1), want)


def test_draws_follow_the_network():
    net, x = network(), bits(4)
    n = 20_000
    draws = net.sample((n,), num_steps=100)
    index = (draws.double() @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long()
    got = torch.bincount(index, minlength=16) / n
    want = exact_log_prob(net, x).exp()
    assert ((got - want).abs() < 4.5 * (want * (1 - want) / n).sqrt()).all()


def test_the_model_and_guide_are_the_bound():
    net, x = network(), bits(4)[:5]
    top = net.machine(1)
    log_z = top.exact_log_normalizer()
    plain = Trace_ELBO()
    many = x.repeat(40, 1)
    elbo = [-plain.loss(net.model, net.guide, many, 1, log_z) / 40 for _ in range(50)]
    want = net.lower_bound(x, num_samples=50_000).sum()
    assert_mean_of_rows(torch.tensor(elbo), want.detach())
    trace = pyro.poutine.trace(net.model).get_trace(num=3)
    assert trace.nodes["x"]["value"].shape == (3, 4)
    assert trace.nodes["h1"]["value"].shape == (3, 3)


def test_transform_and_propagate():
    net, x = network((4, 3, 2)), bits(4)
    first = net.machine(0).hidden_given(x).mean
    torch.testing.assert_close(net.transform(x, 1), first)
    torch.testing.assert_close(net.transform(x), net.machine(1).hidden_given(first).mean)
    assert net.transform(x, 0) is x
    drawn = net.propagate(x.expand(5000, 16, 4), 1)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    error = (first * (1 - first) / 5000).sqrt()
    assert ((drawn.mean(0) - first).abs() < 4.5 * error).all()


def test_saved_and_restored():
    net = network()
    other = network()
    other.load_state_dict(net.state_dict())
    x = bits(4)
    torch.testing.assert_close(exact_log_prob(other, x), exact_log_prob(net, x))
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(exact_log_prob(again, x), exact_log_prob(net, x))
    assert repr(net) == "DeepBeliefNetwork(4, 3, 2)"
    assert len(net) == 2


def test_bad_input():
    with pytest.raises(ValueError, match="at least one"):
        DeepBeliefNetwork([])
    with pytest.raises(ValueError, match=r"must be modules, such as RBMModule"):
        DeepBeliefNetwork([RBMModule(3, 2)()])
    with pytest.raises(ValueError, match=r"machine 0 has 2 hidden .* has 3 visible"):
        DeepBeliefNetwork([RBMModule(4, 2), RBMModule(3, 2)])
    with pytest.raises(ValueError, match=r"num_layers must lie in 0\.\.2, got 3"):
        network().transform(bits(4), 3)
    with pytest.raises(ValueError, match=r"hidden_given|visible"):
        network().lower_bound(bits(3))
    for widths in (WIDTHS, WIDTHS[:2]):  # one machine alone draws nothing that would complain
        with pytest.raises(ValueError, match=r"are 0 or 1, .* binarize"):
            network(widths).lower_bound(bits(4) / 2)
    with pytest.raises(ValueError, match=r"machine 1 has real visible .* machine 0 .* bits"):
        DeepBeliefNetwork([RBMModule(4, 3), GaussianRBMModule(3, 2)])
    DeepBeliefNetwork([GaussianRBMModule(4, 3), RBMModule(3, 2)])  # the first may
