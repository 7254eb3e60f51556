"""Composite likelihoods against their definition, sums over the table of all states."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_ebm import (
    RBM,
    BoltzmannMachine,
    Potts,
    UnnormalizedEnergy,
    estimate_log_normalizer,
    product,
    pseudolikelihood,
)
from pyro_ebm.distributions import lattice_edges, mixture, spin
from pyro_ebm.distributions.composite.conditionals import blocks_of, variables_of
from pyro_ebm.distributions.core.wrappers import composite_part
from pyro_ebm.ops.integration.enumerate import states

F64 = torch.float64
PATH = torch.tensor([[0, 1], [1, 2], [2, 3]])


def numbers(*shape):
    return torch.randn(shape, dtype=F64)


def symmetric(*shape):
    upper = numbers(*shape).triu(1)
    return upper + upper.mT


def three_body(x):
    return -0.7 * x[..., 0] * x[..., 1] * x[..., 2] + 0.3 * x[..., 1] - 0.2 * x[..., 0] * x[..., 3]


def one_hot(x):
    weight = torch.linspace(-1, 1, 3, dtype=x.dtype)
    return (x[..., 0, :] * x[..., 1, :] * weight).sum(-1) - (x[..., 2, :] * weight).sum(-1)


MEMBERS = {
    "bits": lambda: UnnormalizedEnergy(three_body, (4,), constraints.boolean),
    "spins": lambda: UnnormalizedEnergy(three_body, (4,), spin),
    "base": lambda: UnnormalizedEnergy(
        three_body, (4,), base=dist.Bernoulli(torch.rand(4, dtype=F64)).to_event(1)
    ),
    "integers": lambda: UnnormalizedEnergy(
        lambda x: three_body(x.double()), (4,), constraints.integer_interval(-1, 2)
    ),
    "one_hot": lambda: UnnormalizedEnergy(one_hot, (3, 3), constraints.one_hot),
    "matrix": lambda: UnnormalizedEnergy(
        lambda x: three_body(x.flatten(-2)), (2, 2), constraints.boolean
    ),
    "ising": lambda: BoltzmannMachine(symmetric(4, 4), numbers(4)),
    "machine": lambda: BoltzmannMachine(numbers(3), numbers(4), PATH.flip(1), states="binary"),
    "one coupling": lambda: BoltzmannMachine(
        torch.tensor(0.4, dtype=F64), edges=lattice_edges(2, 2)
    ),
    "sparse": lambda: BoltzmannMachine(symmetric(4, 4).to_sparse(), numbers(4)),
    "machines": lambda: BoltzmannMachine(numbers(2, 1, 3), numbers(3, 4), PATH),
    "dense machines": lambda: BoltzmannMachine(symmetric(2, 4, 4), numbers(2, 4)),
    "potts": lambda: Potts(numbers(3), numbers(4, 3), PATH),
    "dense potts": lambda: Potts(symmetric(4, 4), numbers(3)),
    "rbm": lambda: RBM(numbers(4, 3), numbers(4), numbers(3)),
    "rbms": lambda: RBM(numbers(2, 4, 3), numbers(3, 1, 4), numbers(3)),
    "joint rbm": lambda: RBM(numbers(3, 2), numbers(3), numbers(2)).joint(),
    "product": lambda: product(
        RBM(numbers(4, 3), numbers(4), numbers(3)),
        UnnormalizedEnergy(three_body, (4,), constraints.boolean),
    ),
    "expanded": lambda: BoltzmannMachine(numbers(3), numbers(4), PATH).expand((2, 3)),
}
BLOCKS = {
    "singles": None,
    "pairs": [[0, 1], [2]],
    "overlapping": [[0, 1, 2], [2, 1], [0]],
    "no edge": [[0, 2], [1]],
}


@pytest.fixture(params=MEMBERS)
def p(request):
    return MEMBERS[request.param]()


def by_definition(p, x, blocks):
    """log p(x_B | rest) = log p~(x) - log of the sum over all states that agree with x off B."""
    n, values = variables_of(p)
    s = states(values.to(x), n)
    s = s.reshape((len(s),) + (1,) * len(p.batch_shape) + p.event_shape)
    table = p.unnormalized_log_prob(s.expand((len(s),) + p.batch_shape + p.event_shape))
    s = s.reshape(len(s), n, -1)
    rows = []
    for row in x:  # (*batch, *event)
        points = row.reshape(p.batch_shape + (n, -1))
        total = 0.0
        for block in [[i] for i in range(n)] if blocks is None else blocks:
            rest = [i for i in range(n) if i not in block]
            alike = (s[:, rest] == points[..., None, rest, :]).flatten(-2).all(-1)  # (*batch, S)
            sums = torch.where(alike, table.movedim(0, -1), -torch.inf).logsumexp(-1)
            total = total + p.unnormalized_log_prob(row) - sums
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_it_is_the_product_of_conditionals(p, blocks):
    x = p.starting_points((3,))
    x = x if x.dtype == torch.long else x.to(F64)
    got = pseudolikelihood(p, blocks).log_prob(x)
    assert got.shape == (3,) + p.batch_shape
    torch.testing.assert_close(got, by_definition(p, x, blocks))


def test_one_block_of_all_is_the_likelihood(p):
    n, _ = variables_of(p)
    x = p.starting_points((3,))
    x = x if x.dtype == torch.long else x.to(F64)
    known = p.normalized(estimate_log_normalizer(p, "exact").value)
    torch.testing.assert_close(pseudolikelihood(p, [range(n)]).log_prob(x), known.log_prob(x))


@pytest.mark.parametrize("name", ["ising", "potts", "machines", "rbm", "rbms", "joint rbm"])
@pytest.mark.parametrize("blocks", [None, [[0, 1], [2, 1]]], ids=["singles", "blocks"])
def test_closed_forms_have_the_gradients_of_sums_over_values(name, blocks):
    p = MEMBERS[name]()
    q = UnnormalizedEnergy(p.energy, p.event_shape, p.support, p.batch_shape)
    x = p.starting_points((3,)).to(F64)
    parameters = [
        value.requires_grad_()
        for name in ("couplings", "_bias", "weights", "visible_bias", "hidden_bias")
        if (value := getattr(p, name, None)) is not None
    ]
    got, want = (
        torch.autograd.grad(pseudolikelihood(each, blocks).log_prob(x).sum(), parameters)
        for each in (p, q)
    )
    torch.testing.assert_close(got, want)


def test_colour_classes_at_once_are_single_sites():
    p = BoltzmannMachine(0.3, 0.1, edges=lattice_edges(10, 12))
    x = p.sample((2,))
    colours = [block.tolist() for block in p.pairs.blocks]
    assert [len(block) for block in colours] == [60, 60]
    at_once = pseudolikelihood(p, colours)
    assert [tuple(group.shape) for group in blocks_of(p, at_once.blocks)] == [(120, 1)]
    torch.testing.assert_close(at_once.log_prob(x), pseudolikelihood(p).log_prob(x))
    # the class itself, with all its states: p(x_C | rest) of a class of 8 spins
    small = BoltzmannMachine(0.3, 0.1, edges=lattice_edges(4, 4))
    q = UnnormalizedEnergy(small.energy, (16,), spin)
    blocks, x = [block.tolist() for block in small.pairs.blocks], small.starting_points((2,))
    want, got = (pseudolikelihood(each, blocks).log_prob(x) for each in (q, small))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["bits", "spins", "one_hot", "ising", "potts", "rbm"])
def test_expanded_wrapped_copied_and_mapped(name):
    p = MEMBERS[name]()
    fn, x = pseudolikelihood(p), p.starting_points((5,)).to(F64)
    want = fn.log_prob(x)
    torch.testing.assert_close(fn.expand((5,)).to_event(1).log_prob(x), want.sum())
    assert composite_part(fn.expand((5,)).to_event(1)).blocks is None
    torch.testing.assert_close(pickle.loads(pickle.dumps(fn)).log_prob(x), want)
    with pyro.validation_enabled(False):  # over many chains
        scaled = torch.vmap(lambda beta: pseudolikelihood(p.tempered(beta)).log_prob(x))
        if name != "rbm":
            two = scaled(torch.tensor([1.0, 2.0], dtype=F64))
            torch.testing.assert_close(two[0], want)
            torch.testing.assert_close(two[1], pseudolikelihood(p.tempered(2.0)).log_prob(x))
    assert repr(fn).startswith("pseudolikelihood(")


def test_what_is_no_composite_likelihood_is_named():
    p = MEMBERS["ising"]()
    with pytest.raises(ValueError, match="ScoreMatching"):
        pseudolikelihood(UnnormalizedEnergy(torch.square))
    with pytest.raises(ValueError, match="finite set"):
        pseudolikelihood(UnnormalizedEnergy(lambda x: x, support=constraints.nonnegative_integer))
    with pytest.raises(ValueError, match="must be an UnnormalizedEnergy, got"):
        pseudolikelihood(dist.Bernoulli(0.5))
    with pytest.raises(ValueError, match="wrap the energy itself"):
        pseudolikelihood(p.to_event(0).mask(True))
    with pytest.raises(ValueError, match=r"variable 4, and those of .* are 0 to 3"):
        pseudolikelihood(p, [[0, 4]])
    for bad in ([[]], [[0, 0]], [0, 1], 3, "01", [[0.5]]):
        with pytest.raises(ValueError, match="block"):
            pseudolikelihood(p, bad)
    wide = BoltzmannMachine(torch.zeros(20, 20))
    with pytest.raises(ValueError, match=r"2\^20 states"):
        pseudolikelihood(wide, [range(20)]).log_prob(torch.ones(20))
    with pytest.raises(ValueError, match="units of"):
        pseudolikelihood(p).log_prob(torch.zeros(4))


def latent():
    pyro.sample("x", pseudolikelihood(BoltzmannMachine(0.2, edges=PATH)))


X = torch.ones(4)
ROWS = X.expand(2, 4)


def guided():
    pyro.sample("x", dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))


@pytest.mark.parametrize(
    "use",
    [
        lambda: poutine.trace(latent).get_trace(),
        lambda: (
            poutine.trace(poutine.replay(latent, poutine.trace(guided).get_trace()))
            .get_trace()
            .log_prob_sum()
        ),
        lambda: poutine.trace(
            poutine.enum(pyro.infer.config_enumerate(latent), first_available_dim=-1)
        ).get_trace(),
    ],
    ids=["drawn", "from a guide", "enumerated"],
)
def test_it_is_no_latent(use):
    with pytest.raises(ValueError, match=r"site 'x'.* at observed sites only"):
        use()


def test_masks_are_refused():
    fn = pseudolikelihood(BoltzmannMachine(0.2, edges=PATH))
    half = torch.tensor([True, False])

    def model(handler, fn=fn, rows=ROWS):
        with pyro.plate("data", 2), handler:
            pyro.sample("x", fn, obs=rows)

    whole = poutine.trace(model).get_trace(poutine.mask(mask=torch.tensor(True)))
    torch.testing.assert_close(whole.log_prob_sum(), 2 * fn.log_prob(X))
    for trace in (
        poutine.trace(model).get_trace(poutine.mask(mask=half)),
        poutine.trace(model).get_trace(poutine.mask(mask=False)),
        poutine.trace(model).get_trace(
            poutine.scale(scale=1.0), fn.expand((2, 2)).to_event(1).mask(half), ROWS.expand(2, 2, 4)
        ),
    ):
        with pytest.raises(ValueError, match="site 'x'"):
            trace.log_prob_sum()
    with pytest.raises(ValueError, match="cannot be masked"):
        fn.mask(half)
    # a missing value is a latent
    with pytest.raises(ValueError, match="site 'x'"):
        poutine.trace(model).get_trace(poutine.scale(scale=1.0), rows=None)


def test_it_is_no_part_of_a_density():
    p = BoltzmannMachine(0.2, edges=PATH)
    fn = pseudolikelihood(p)
    with pytest.raises(ValueError, match="composite likelihood"):
        estimate_log_normalizer(fn)
    with pytest.raises(ValueError, match="composite likelihood"):
        estimate_log_normalizer(fn.to_event(0))
    for combine in (
        lambda: product(p, fn),
        lambda: mixture(torch.tensor([0.5, 0.5]), [fn, fn]),
        lambda: UnnormalizedEnergy(lambda x: x.sum(-1), base=fn),
    ):
        with pytest.raises(ValueError, match="no density"):
            combine()
