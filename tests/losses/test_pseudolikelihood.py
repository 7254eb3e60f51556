"""Maximum pseudolikelihood: where it is, and what a step takes."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import SGD
from torch import nn

from pyro_ebm import (
    RBM,
    BoltzmannMachine,
    Potts,
    PseudoLikelihood,
    UnnormalizedEnergy,
    curvature_adjustment,
    pseudolikelihood,
)
from pyro_ebm.distributions import lattice_edges, spin
from pyro_ebm.ops.integration.enumerate import states
from tests.statistics import assert_mean_of_rows

EDGES = lattice_edges(3, 3, periodic=False)
DOUBLE = torch.float64


def machine(J, b):
    return BoltzmannMachine(J, b, edges=EDGES)


def by_hand(J, b):
    """The same energy, as one that nothing is known of."""
    p = machine(J, b)
    return UnnormalizedEnergy(p.energy, p.event_shape, spin)


def gradient(loss, make, x, weights=None):
    pyro.clear_param_store()

    def model():
        J = pyro.param("J", torch.tensor(0.2, dtype=DOUBLE))
        b = pyro.param("b", torch.linspace(-0.2, 0.3, 9, dtype=DOUBLE))
        scale = torch.ones(len(x)) if weights is None else weights
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("x", make(J, b), obs=x)

    value = loss.loss_and_grads(model, lambda: None)
    return value, torch.cat([pyro.param(name).grad.flatten() for name in ("J", "b")])


def test_its_gradient_is_0_at_the_truth():
    """Of all states, each as often as the model says: no Monte Carlo error."""
    x = states(torch.tensor([[-1.0], [1.0]], dtype=DOUBLE), 9)
    p = machine(torch.tensor(0.2, dtype=DOUBLE), torch.linspace(-0.2, 0.3, 9, dtype=DOUBLE))
    weights = p.unnormalized_log_prob(x).softmax(0)
    for loss in (PseudoLikelihood(), PseudoLikelihood(blocks=[range(6), range(4, 9)])):
        value, slope = gradient(loss, machine, x, weights)
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
        assert value > 0
    uniform = torch.full_like(weights, 1 / 512)
    assert gradient(PseudoLikelihood(), machine, x, uniform)[1].abs().max() > 0.1


@pytest.mark.parametrize("make", [machine, by_hand], ids=["closed form", "by changes"])
@pytest.mark.parametrize("blocks", [None, [[0, 1], [1, 2, 4], [8]]], ids=["singles", "blocks"])
def test_a_subsample_is_unbiased(make, blocks, monkeypatch):
    """The mean over all subsamples is the loss of all, and so are the gradients."""
    torch.manual_seed(0)
    x = machine(torch.tensor(0.3, dtype=DOUBLE), 0.1).exact_sample((5,)).to(DOUBLE)
    want = gradient(PseudoLikelihood(blocks), make, x)
    # three blocks, of which the second has the edges 1-2 and 1-4, are three parts by hand too
    total = 9 if blocks is None else 3
    subsamples = list(itertools.combinations(range(total), 2))
    found = []
    for chosen in subsamples:
        rest = [i for i in range(total) if i not in chosen]
        order = torch.tensor([*chosen, *rest])
        drawn = torch.randperm

        def randperm(n, generator=None, order=order, drawn=drawn, **kwargs):
            return order if generator is None else drawn(n, generator=generator, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", randperm)
            found.append(gradient(PseudoLikelihood(blocks, subsample_size=2), make, x))
    values, slopes = zip(*found, strict=True)
    torch.testing.assert_close(torch.tensor(values).mean().double(), torch.tensor(want[0]).double())
    torch.testing.assert_close(torch.stack(slopes).mean(0), want[1])


def test_subsamples_differ_from_step_to_step():
    torch.manual_seed(0)
    x = machine(torch.tensor(0.3, dtype=DOUBLE), 0.1).exact_sample((5,)).to(DOUBLE)
    loss = PseudoLikelihood(subsample_size=3)
    values = torch.tensor([gradient(loss, by_hand, x)[0] for _ in range(60)])
    assert len(values.unique()) > 10
    assert_mean_of_rows(values, gradient(PseudoLikelihood(), by_hand, x)[0])


def test_its_maximum_is_that_of_the_likelihood_of_the_same_name():
    torch.manual_seed(0)
    edges = lattice_edges(2, 3, periodic=False)
    x = Potts(torch.tensor(0.5), torch.tensor([0.3, 0.0, 0.0]), edges).exact_sample((500,))

    def potts(J, h):
        return Potts(J, torch.stack([h, torch.zeros(()), torch.zeros(())]), edges)

    def bayes():
        J = pyro.sample("J", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", pseudolikelihood(potts(J, h)), obs=x)

    found = curvature_adjustment(bayes, plate="data")

    def model(x):
        J, h = (pyro.param(name, found.mode[name]) for name in "Jh")
        with pyro.plate("data", len(x)):
            pyro.sample("x", potts(J, h), obs=x)

    PseudoLikelihood().loss_and_grads(model, lambda x: None, x)
    for name, truth in (("J", 0.5), ("h", 0.3)):
        error = found.naive_std_error[name]
        assert (pyro.param(name).grad * error).abs() < 1e-2  # of standard errors
        assert (found.mode[name] - truth).abs() < 4.5 * found.std_error[name]


def test_it_trains_machines_with_hidden_units():
    """The free energy that it finds is the data's, up to the errors of 3,000 draws."""
    torch.manual_seed(1)
    true = RBM(torch.randn(5, 2), torch.zeros(5), torch.zeros(2))
    x = true.exact_sample((3000,))
    W, b, c = (nn.Parameter(t) for t in (0.1 * torch.randn(5, 2), torch.zeros(5), torch.zeros(2)))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", RBM(W, b, c), obs=x)

    module = PseudoLikelihood()(model, lambda x: None)
    optimiser = torch.optim.Adam([W, b, c], lr=0.1)
    for _ in range(120):
        optimiser.zero_grad()
        module(x).backward()
        optimiser.step()
    found = RBM(W.detach(), b.detach(), c.detach())
    every = states(torch.tensor([[0.0], [1.0]]), 5)
    p, q = (m.unnormalized_log_prob(every).log_softmax(0) for m in (true, found))
    # 2 KL is about chi squared of at most 31 degrees over 3,000; of pseudolikelihood a little more
    assert 2 * 3000 * (p.exp() * (p - q)).sum() < 90


def test_what_it_is_not_for():
    def step(p, x, **kwargs):
        def model():
            J = pyro.param("J", torch.tensor(0.3))
            pyro.sample("x", p(J), obs=x)

        SVI(model, lambda: None, SGD({"lr": 0.1}), PseudoLikelihood(**kwargs)).step()

    ising = lambda J: BoltzmannMachine(J, edges=EDGES)  # noqa: E731
    with pytest.raises(ValueError, match="ScoreMatching"):
        step(lambda J: UnnormalizedEnergy(lambda x: J * x**2), torch.tensor(0.5))
    with pytest.raises(ValueError, match="9 variables or blocks, fewer than"):
        step(ising, torch.ones(9), subsample_size=10)
    with pytest.raises(ValueError, match="variable 9"):
        step(ising, torch.ones(9), blocks=[[9]])
    with pytest.raises(ValueError, match="subsample_size"):
        PseudoLikelihood(subsample_size=0)
    with pytest.raises(ValueError, match="blocks"):
        PseudoLikelihood(blocks=3)
    assert (
        repr(PseudoLikelihood([[0, 1]], 3))
        == "PseudoLikelihood(blocks=((0, 1),), subsample_size=3)"
    )


def test_a_latent_in_front_of_the_energy_has_the_gradient_of_the_elbo():
    """Of a guide of J: the loss, and Pyro's ELBO of the pseudolikelihood, have one objective."""
    torch.manual_seed(0)
    x = machine(torch.tensor(0.3), 0.1).exact_sample((5,))
    values = []
    for make, loss in (
        (lambda J: machine(J, 0.1), PseudoLikelihood()),
        (lambda J: pseudolikelihood(machine(J, 0.1)), pyro.infer.Trace_ELBO()),
    ):
        pyro.clear_param_store()

        def model(make=make):
            J = pyro.sample("J", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 5):
                pyro.sample("x", make(J), obs=x)

        def guide():
            loc = pyro.param("loc", torch.tensor(0.2))
            pyro.sample("J", dist.Normal(loc, 0.1))

        torch.manual_seed(1)
        value = loss.loss_and_grads(model, guide)
        values.append((value, float(pyro.param("loc").grad)))
    torch.testing.assert_close(*map(torch.tensor, values))
