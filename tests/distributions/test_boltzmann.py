"""Boltzmann machines and Potts models against enumeration, transfer matrices and closed forms."""

import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2, norm
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_ebm.distributions.boltzmann import interaction_graph as lattice
from pyro_ebm.distributions.boltzmann.interaction_graph import lattice_edges
from pyro_ebm.distributions.boltzmann.machine import BoltzmannMachine
from pyro_ebm.distributions.boltzmann.potts import Potts
from pyro_ebm.distributions.core.discrete import BlockGibbs
from pyro_ebm.mcmc import MCMC, LangevinKernel
from tests.statistics import SIGMAS, assert_mean

CRITICAL = 0.4406868  # log(1 + sqrt(2)) / 2
SPINS = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
BITS = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def random_couplings(n, scale=1.0, batch=()):
    j = scale * torch.randn(*batch, n, n, dtype=torch.float64)
    j = torch.triu(j, 1)
    return j + j.mT


# -- truths computed here ------------------------------------------------------------------------


def all_states(support_values, n):
    """All K^n states, shape (K^n, n, b)."""
    digits = torch.tensor(list(itertools.product(range(len(support_values)), repeat=n)))
    return support_values[digits]


def naive_log_f(s, pairs, bias):
    """-E of states (..., n, b), pair by pair; ``pairs`` maps (i, j) to J."""
    total = (s * bias).sum((-1, -2))
    for (i, j), coupling in pairs.items():
        total = total + coupling * (s[..., i, :] * s[..., j, :]).sum(-1)
    return total


def naive_table(machine):
    """All states of a machine, and their log probabilities, from its parameters alone."""
    s = all_states(machine.support_values.double(), machine.num_sites)
    edges = machine.edges.tolist()
    if machine.pairs.coupling_dim == 2:
        pairs = {(i, j): machine.couplings[i, j] for i, j in edges}
    else:
        couplings = machine.couplings.expand(len(edges))
        pairs = dict(zip(map(tuple, edges), couplings, strict=True))
    log_f = naive_log_f(s, pairs, machine._bias)
    return (s if machine.event_dim == 2 else s[..., 0]), log_f.log_softmax(0), log_f.logsumexp(0)


def transfer_log_z(support_values, side, coupling, periodic=True):
    """Log Z of a side x side lattice: the trace of a power of the transfer matrix of its rows."""
    rows = all_states(support_values, side)
    wrapped = torch.cat([rows, rows[:, :1]], 1) if periodic else rows
    within = coupling * (wrapped[:, 1:] * wrapped[:, :-1]).sum((-1, -2))
    flat = rows.flatten(1)
    log_t = coupling * flat @ flat.T + (within[:, None] + within) / 2
    largest = log_t.max()
    eigenvalues, vectors = torch.linalg.eigh((log_t - largest).exp())
    if periodic:  # tr T^side
        return side * largest + (eigenvalues**side).sum().log()
    ends = (within / 2).exp() @ vectors  # v' T^(side - 1) v
    return (side - 1) * largest + (ends**2 * eigenvalues ** (side - 1)).sum().log()


def curie_weiss(beta, n):
    """Log Z and E|m| of exp(beta M^2 / 2N), by the binomial number of states with each M."""
    up = torch.arange(n + 1, dtype=torch.float64)
    m = 2 * up - n
    log_states = math.lgamma(n + 1) - (up + 1).lgamma() - (n - up + 1).lgamma()
    log_p = log_states + beta * m**2 / (2 * n)
    return float(log_p.logsumexp(0)), float(log_p.softmax(0) @ m.abs()) / n


@pytest.mark.parametrize(
    ("side", "coupling", "periodic", "truth"),
    [
        (4, 0.2, True, 11.771470),
        (4, CRITICAL, True, 15.521916),
        (10, 0.2, True, 73.453098),
        (10, CRITICAL, True, 93.610301),
        (10, 0.2, False, 73.023066),
        (10, CRITICAL, False, 89.692349),
    ],
)
def test_the_transfer_matrix_has_the_known_ising_normalizers(side, coupling, periodic, truth):
    assert abs(transfer_log_z(SPINS, side, coupling, periodic) - truth) < 1e-6


@pytest.mark.parametrize(("side", "truth"), [(4, 34.172593), (6, 75.571919)])
def test_the_transfer_matrix_has_the_known_potts_normalizers(side, truth):
    support_values = torch.eye(3, dtype=torch.float64)
    assert abs(transfer_log_z(support_values, side, 1.005052) - truth) < 1e-6


# -- normalizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("coupling", [0.2, CRITICAL, -0.3])
@pytest.mark.parametrize("side", [3, 4, 5, 6])
def test_exact_log_z_of_ising_is_that_of_the_transfer_matrix(side, coupling, periodic):
    edges = lattice_edges(side, side, periodic=periodic)
    p = BoltzmannMachine(number(coupling), edges=edges)
    assert_close(p.exact_log_normalizer(), transfer_log_z(SPINS, side, coupling, periodic))


@pytest.mark.parametrize(("side", "num_states"), [(3, 3), (4, 3), (3, 5)])
def test_exact_log_z_of_potts_is_that_of_the_transfer_matrix(side, num_states):
    p = Potts(number(1.005052), edges=lattice_edges(side, side), num_states=num_states)
    support_values = torch.eye(num_states, dtype=torch.float64)
    assert_close(p.exact_log_normalizer(), transfer_log_z(support_values, side, 1.005052))


def test_potts_of_two_states_is_ising_at_half_the_coupling():
    # J [s = s'] = J / 2 + J s s' / 2
    edges = lattice_edges(4, 4)
    potts = Potts(number(0.6), edges=edges, num_states=2).exact_log_normalizer()
    ising = BoltzmannMachine(number(0.3), edges=edges).exact_log_normalizer()
    assert_close(potts, ising + 0.3 * len(edges))


def test_bits_are_shifted_spins():
    # s = 2 x - 1: J s s' = 4 J x x' - 2 J (x + x') + J, and b s = 2 b x - b
    j, b = random_couplings(6), torch.randn(6, dtype=torch.float64)
    spins = BoltzmannMachine(j, b)
    bits = BoltzmannMachine(4 * j, 2 * b - 2 * j.sum(-1), states="binary")
    constant = j.sum() / 2 - b.sum()
    assert_close(spins.exact_log_normalizer(), bits.exact_log_normalizer() + constant)
    x = bits.exact_sample((50,))
    assert_close(spins.energy(2 * x - 1), bits.energy(x) - constant)


@pytest.mark.parametrize(
    ("n", "truth"), [(100, (73.080482, 0.592198)), (1000, (718.515946, 0.654019))]
)
def test_curie_weiss_truths(n, truth):
    assert_close(curie_weiss(1.2, n), truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [2, 7, 14])
def test_curie_weiss_log_z(n):
    off_diagonal = 1 - torch.eye(n, dtype=torch.float64)
    p = BoltzmannMachine(1.2 / n * off_diagonal)
    # M^2 / 2N has the diagonal N / 2N on top of the pairs
    assert abs(p.exact_log_normalizer() + 1.2 / 2 - curie_weiss(1.2, n)[0]) < 1e-10


def test_a_normalized_machine_sums_to_one():
    p = BoltzmannMachine(random_couplings(6), torch.randn(6, dtype=torch.float64))
    p = p.normalized(p.exact_log_normalizer())
    s, log_p, _ = naive_table(p)
    assert_close(p.log_prob(s), log_p)


def test_without_interactions_units_are_independent():
    nothing = torch.zeros(0, 2, dtype=torch.long)
    bias = torch.randn(4, dtype=torch.float64)
    p = BoltzmannMachine(number(1.0), bias, edges=nothing)
    assert_close(p.exact_log_normalizer(), (2 * bias.cosh()).log().sum())
    x = p.exact_sample((100, 200))
    assert_mean(x, bias.tanh())
    assert_mean(swept(p, x), bias.tanh())


def test_too_many_states():
    p = BoltzmannMachine(0.1, edges=lattice_edges(8, 8))
    with pytest.raises(ValueError, match=r"32 variables of 2 values have 2\^32 states"):
        p.exact_log_normalizer()
    with pytest.raises(ValueError, match=r"2\^8 states, more than the 16"):
        BoltzmannMachine(0.1, edges=lattice_edges(4, 4)).exact_log_normalizer(max_units=4)


# -- energies and fields -------------------------------------------------------------------------


def test_energy_counts_each_edge_once():
    x = torch.randint(2, (50, 4, 5)).double() * 2 - 1
    down = (x * x.roll(-1, 1)).sum((1, 2))
    right = (x * x.roll(-1, 2)).sum((1, 2))
    p = BoltzmannMachine(number(0.3), number(0.1), edges=lattice_edges(4, 5))
    assert_close(p.energy(x.flatten(1)), -0.3 * (down + right) - 0.1 * x.sum((1, 2)))
    # edges of one direction come together
    vertical = torch.cat([torch.full((20,), 1.0), torch.full((20,), 0.0)]).double()
    assert_close(BoltzmannMachine(vertical, edges=lattice_edges(4, 5)).energy(x.flatten(1)), -down)


def test_potts_energy_counts_equal_neighbours():
    labels = torch.randint(3, (50, 3, 4))
    x = torch.nn.functional.one_hot(labels.flatten(1), 3).double()
    h = torch.randn(12, 3, dtype=torch.float64)
    equal = (labels == labels.roll(-1, 1)).sum((1, 2)) + (labels == labels.roll(-1, 2)).sum((1, 2))
    p = Potts(number(0.7), h, edges=lattice_edges(3, 4))
    assert_close(p.energy(x), -0.7 * equal.double() - (h * x).sum((1, 2)))
    assert torch.equal(p.labels(x), labels.flatten(1))


def as_edges(j):
    edges = torch.triu(j.reshape((-1,) + j.shape[-2:])[0], 1).nonzero()
    return j[..., edges[:, 0], edges[:, 1]], edges


def forms(j, bias=None, states="spin"):
    """A machine from a matrix, from its edges, and from it as a sparse tensor."""
    couplings, edges = as_edges(j)
    return [
        BoltzmannMachine(j, bias, states=states),
        BoltzmannMachine(couplings, bias, edges=edges, states=states),
        BoltzmannMachine(j.to_sparse(), bias, states=states),
    ]


def sparse_matrix(n):
    j = random_couplings(n)
    keep = torch.triu(torch.rand(n, n) < 0.4, 1)
    return torch.where(keep | keep.mT, j, 0.0)


@pytest.mark.parametrize("states", ["spin", "binary"])
def test_dense_edges_and_sparse_are_one_machine(states):
    j, b = sparse_matrix(9), torch.randn(9, dtype=torch.float64)
    dense, edges, sparse = forms(j, b, states)
    x = dense.starting_points((20,))
    field = x @ j + b
    for p in dense, edges, sparse:
        assert p.event_shape == (9,)
        assert_close(p.energy(x), -(x @ j * x).sum(-1) / 2 - x @ b)
        assert_close(p.local_field(x), field)
        assert_close(p.exact_log_normalizer(), naive_table(dense)[2])
    noise = edges.gibbs_noise(x)
    assert torch.equal(edges.gibbs_sweep(x, noise), sparse.gibbs_sweep(x, noise))


def test_the_local_field_is_what_flipping_a_unit_costs():
    # E(s_i = 0) - E(s_i = 1) = f_i of bits
    p = BoltzmannMachine(random_couplings(5), torch.randn(5, dtype=torch.float64), states="binary")
    x = p.starting_points((10,))
    for i in range(5):
        off, on = x.clone(), x.clone()
        off[:, i], on[:, i] = 0, 1
        assert_close(p.local_field(x)[:, i], p.energy(off) - p.energy(on))


def test_potts_local_field():
    p = Potts(random_couplings(4), torch.randn(4, 3, dtype=torch.float64))
    x = p.starting_points((10,))
    gradient = torch.func.grad(lambda x: -p.energy(x).sum())(x)  # E is linear in each row
    assert_close(p.local_field(x), gradient)


# -- gradients -----------------------------------------------------------------------------------


def test_gradients_of_log_z_are_moments():
    couplings = torch.randn(18, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    p = BoltzmannMachine(couplings, bias, edges=lattice_edges(3, 3))
    s, log_p, _ = naive_table(p)
    start, end = p.edges.unbind(-1)
    got = torch.autograd.grad(p.exact_log_normalizer(), [couplings, bias])
    weight = log_p.exp().detach()
    assert_close(got[0], weight @ (s[:, start] * s[:, end]))
    assert_close(got[1], weight @ s)


def test_the_gradient_of_a_matrix_is_symmetric_without_a_diagonal():
    j = random_couplings(6).float().requires_grad_()
    p = BoltzmannMachine(j, states="binary")
    s, log_p, _ = naive_table(p)
    (gradient,) = torch.autograd.grad(p.exact_log_normalizer(), j)
    moments = torch.einsum("k,ki,kj->ij", log_p.exp().detach().float(), s.float(), s.float())
    assert torch.equal(gradient, gradient.mT)
    assert_close(gradient, (moments - moments.diag().diag()) / 2)
    # and so a step along it is again a machine
    (gradient,) = torch.autograd.grad(p.energy(s[37:50].float()).sum(), j)
    BoltzmannMachine((j + 0.1 * gradient).detach())


def test_gradients_reach_sparse_matrices():
    j = sparse_matrix(5)
    sparse = j.to_sparse().requires_grad_()
    x = torch.randint(2, (5,)).double() * 2 - 1
    BoltzmannMachine(sparse).energy(x).backward()
    assert_close(sparse.grad.to_dense(), torch.where(j != 0, -x[:, None] * x / 2, 0.0))


# -- sweeps --------------------------------------------------------------------------------------


def star_and_loner():
    return torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]])


def machines():
    """Machines small enough to enumerate, with the longest loops, widest padding and two blocks."""
    pyro.set_rng_seed(1)
    double = {"dtype": torch.float64}
    return {
        "torus": BoltzmannMachine(number(0.3), 0.2 * torch.randn(9, **double), lattice_edges(3, 3)),
        "free": BoltzmannMachine(
            0.4 * torch.randn(7, **double), edges=lattice_edges(2, 3, periodic=False)
        ),
        "dense": BoltzmannMachine(random_couplings(5, 0.5), 0.3 * torch.randn(5, **double)),
        "binary": BoltzmannMachine(random_couplings(5), torch.randn(5, **double), states="binary"),
        "star": BoltzmannMachine(
            0.5 * torch.randn(5, **double), number(0.2), star_and_loner(), num_sites=7
        ),
        "binary torus": BoltzmannMachine(
            0.7 * torch.randn(18, **double), number(-0.3), lattice_edges(3, 3), "binary"
        ),
        "potts": Potts(number(0.4), 0.3 * torch.randn(6, 3, **double), lattice_edges(2, 3)),
        "dense potts": Potts(random_couplings(4, 0.5), 0.3 * torch.randn(3, **double)),
    }


NAMES = list(machines())


def exact_draws(machine, beta, n):
    """Draws from the table made here, as indices and as points."""
    s, log_p, _ = naive_table(machine)
    index = torch.multinomial((beta * log_p).softmax(0), n, replacement=True)
    return index, s[index]


def assert_frequencies(machine, x, beta=1.0):
    """Points ``(draws, *event)`` have the frequencies of the machine, each and all at once."""
    s, log_p, _ = naive_table(machine)
    p = (beta * log_p).softmax(0)
    support_values = machine.support_values
    x = x if machine.event_dim == 2 else x[..., None]
    digits = (x[..., None, :] == support_values).all(-1).double().argmax(-1)
    assert torch.equal(support_values[digits], x)
    place = len(support_values) ** torch.arange(machine.num_sites - 1, -1, -1)
    counts = torch.bincount((digits * place).sum(-1), minlength=len(s))
    expected = len(x) * p
    # states too rare for a normal approximation count as one
    rare = expected < 20
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected, counts = (t[expected > 0] for t in (expected, counts))
    z = (counts - expected) / (expected * (1 - expected / len(x))).sqrt()
    level = 2 * norm.sf(SIGMAS)
    assert z.abs().max() < norm.isf(level / (2 * len(z))), z
    assert chi2.sf(((counts - expected) ** 2 / expected).sum(), len(z) - 1) > level


def swept(machine, x, beta=None, sweeps=1):
    for _ in range(sweeps):
        x = machine.gibbs_sweep(x, machine.gibbs_noise(x), beta)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_leaves_the_machine_invariant(name):
    p = machines()[name]
    _, x = exact_draws(p, 1.0, 100_000)
    assert_frequencies(p, swept(p, x))


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_reach_the_machine_from_one_state(name):
    p = machines()[name]
    x = exact_draws(p, 1.0, 1)[1].expand(50_000, *p.event_shape)
    # warm, since couplings may be such that sweeps at 1 take long to leave a state
    assert_frequencies(p, swept(p, x, number(0.3), sweeps=30), 0.3)


@pytest.mark.parametrize("name", NAMES)
def test_exact_draws(name):
    p = machines()[name]
    assert_frequencies(p, p.exact_sample((100_000,)))


@pytest.mark.parametrize("name", ["torus", "dense", "binary", "potts"])
def test_a_sweep_at_each_beta_leaves_the_tempered_machine_invariant(name):
    p = machines()[name]
    betas = [0.3, 1.0, 2.0]
    x = torch.stack([exact_draws(p, b, 50_000)[1] for b in betas])
    x = swept(p, x, torch.tensor(betas)[:, None])
    for beta, row in zip(betas, x, strict=True):
        assert_frequencies(p, row, beta)
        assert_frequencies(p.tempered(beta), row)


@pytest.mark.parametrize("name", ["torus", "dense", "binary", "potts"])
def test_a_sweep_at_beta_is_one_of_the_tempered_machine(name):
    p = machines()[name].expand([3])
    beta = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    x = p.starting_points((20,))
    noise = p.gibbs_noise(x)
    tempered = p.tempered(beta)
    assert torch.equal(p.gibbs_sweep(x, noise, beta), tempered.gibbs_sweep(x, noise))
    assert_close(tempered.energy(x), beta * p.energy(x))


def test_a_sweep_of_bits_by_log_odds_is_one_by_inverse_cdf():
    for states in "spin", "binary":
        p = BoltzmannMachine(random_couplings(8), torch.randn(8).double(), states=states)
        field, u = torch.randn(100, 8, 1).double(), torch.rand(100, 8).double()
        # the same rule with the other end of the uniform
        inverse = super(BoltzmannMachine, p)._draw_given(field, 1 - u)
        assert torch.equal(p._draw_given(field, u), inverse)


@pytest.mark.parametrize(
    ("coupling", "truth", "sweeps", "chains"),
    [
        (0.2, 42.824, 60, 100),
        (CRITICAL, 147.624, 1000, 400),
    ],
)
def test_sweeps_have_the_energy_of_the_ising_model(coupling, truth, sweeps, chains):
    # d log Z / dJ is the expected sum of edge products
    step = 1e-4
    up, down = (transfer_log_z(SPINS, 10, coupling + d) for d in (step, -step))
    derivative = (up - down) / (2 * step)
    assert abs(derivative - truth) < 1e-3
    p = BoltzmannMachine(coupling, edges=lattice_edges(10, 10))
    # half the chains start cold, half hot
    x = torch.cat([torch.ones(chains // 2, 100), p.starting_points((chains // 2,))])
    x = swept(p, x, sweeps=sweeps // 3)
    products = []
    for _ in range(sweeps):
        x = swept(p, x)
        products.append(-p.energy(x) / coupling)
    assert_mean(torch.stack(products, 1), derivative)


@pytest.mark.parametrize(
    ("n", "chains"), [(100, 500), pytest.param(1000, 100, marks=pytest.mark.slow)]
)
def test_sweeps_have_the_magnetization_of_curie_weiss(n, chains):
    p = BoltzmannMachine(1.2 / n * (1 - torch.eye(n)))
    x = swept(p, torch.ones(chains, n), sweeps=30)
    m = []
    for _ in range(50):
        x = swept(p, x)
        m.append(x.mean(-1).abs())
    assert_mean(torch.stack(m, 1), curie_weiss(1.2, n)[1])


def test_a_machine_samples_itself():
    p = machines()["binary"]
    assert isinstance(p, BlockGibbs)
    assert_frequencies(p, p.sample((20_000,)))


# -- shapes, dtypes, transforms ------------------------------------------------------------------


def batched(shape=(3,)):
    """Machines of a batch, with some parameters of it and some not, in all forms."""
    j = random_couplings(4, batch=shape)
    couplings, edges = as_edges(j)
    b = torch.randn(*shape, 4, dtype=torch.float64)
    return {
        "dense": (BoltzmannMachine, (j, b, None)),
        "edges": (BoltzmannMachine, (couplings, b, edges)),
        "only couplings": (BoltzmannMachine, (couplings, None, edges)),
        "only bias": (BoltzmannMachine, (couplings[(0,) * len(shape)], b, edges)),
        "one for all": (BoltzmannMachine, (couplings[..., :1], b[..., :1], edges)),
        "potts": (Potts, (couplings, b[..., None] * torch.arange(3), edges)),
        "dense potts": (Potts, (j, torch.randn(*shape, 1, 3, dtype=torch.float64), None)),
    }


@pytest.mark.parametrize("name", list(batched()))
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_batch_is_its_machines(name, shape):
    cls, (j, b, edges) = batched(shape)[name]
    p = cls(j, b, edges)
    assert p.batch_shape == shape
    x = p.starting_points((5,))
    assert x.shape == (5, *shape, *p.event_shape)
    (u,) = p.gibbs_noise(x)
    beta = torch.rand(shape, dtype=torch.float64)
    energy, field, log_z = p.energy(x), p.local_field(x), p.exact_log_normalizer()
    new = p.gibbs_sweep(x, (u,), beta)
    assert p.exact_sample((5,)).shape == x.shape
    own_dims = {id(j): p.pairs.coupling_dim, id(b): 2 if cls is Potts else 1}
    for k in itertools.product(*map(range, shape)):
        i = (slice(None), *k)
        parts = [t if t is None or t.dim() == own_dims[id(t)] else t[k] for t in (j, b)]
        one = cls(*parts, edges)
        assert one.batch_shape == ()
        assert_close(energy[i], one.energy(x[i]))
        assert_close(field[i], one.local_field(x[i]))
        assert_close(log_z[k], one.exact_log_normalizer())
        assert torch.equal(new[i], one.gibbs_sweep(x[i], (u[i],), beta[k]))


@pytest.mark.parametrize("name", list(batched()))
def test_vmap_over_parameters_is_a_batch(name):
    cls, (j, b, edges) = batched()[name]
    p = cls(j, b, edges)
    x = p.starting_points()
    (u,) = p.gibbs_noise(x)
    dims = [None if t is None or t.shape[0] != 3 else 0 for t in (j, b)]

    def of(f):
        return vmap(lambda j, b, x, u: f(cls(j, b, edges), x, u), (*dims, 0, 0))(j, b, x, u)

    assert_close(of(lambda p, x, u: p.energy(x)), p.energy(x))
    assert_close(of(lambda p, x, u: p.local_field(x)), p.local_field(x))
    assert_close(of(lambda p, x, u: p.exact_log_normalizer()), p.exact_log_normalizer())
    assert torch.equal(of(lambda p, x, u: p.gibbs_sweep(x, (u,))), p.gibbs_sweep(x, (u,)))
    # one start for all
    same = vmap(lambda j, b: cls(j, b, edges).gibbs_sweep(x[0], (u[0],)), tuple(dims))(j, b)
    assert torch.equal(same, p.gibbs_sweep(x[:1].expand_as(x), (u[:1].expand_as(u),)))


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_can_be_captured(name):
    p = machines()[name]
    x = p.starting_points((4,))
    (u,) = p.gibbs_noise(x)
    beta = torch.rand(4, dtype=torch.float64)
    graph = make_fx(lambda x, u, beta: p.gibbs_sweep(x, (u,), beta))(x, u, beta)
    x, u, beta = p.starting_points((4,)), torch.rand_like(u), torch.rand_like(beta)
    assert torch.equal(graph(x, u, beta), p.gibbs_sweep(x, (u,), beta))


def test_a_machine_can_be_made_while_a_graph_is_captured():
    lattice._graph.cache_clear()

    def sweep(j, x, u):
        return BoltzmannMachine(j, edges=lattice_edges(3, 3)).gibbs_sweep(x, (u,))

    x, u = torch.ones(9), torch.rand(9)
    graph = make_fx(sweep)(torch.tensor(0.3), x, u)
    u = torch.rand(9)
    assert torch.equal(graph(torch.tensor(-1.0), x, u), sweep(torch.tensor(-1.0), x, u))


@pytest.mark.parametrize("name", NAMES)
def test_expanded_rows_are_alike(name):
    p = machines()[name]
    wide = p.expand([2, 3])
    x = p.starting_points((2, 3))
    noise = p.gibbs_noise(x)
    assert wide.batch_shape == (2, 3)
    assert torch.equal(wide.energy(x), p.energy(x))
    assert torch.equal(wide.gibbs_sweep(x, noise), p.gibbs_sweep(x, noise))
    assert wide.exact_log_normalizer().shape == ()
    assert wide.exact_sample((5,)).shape == (5, 2, 3, *p.event_shape)
    assert wide.gibbs_noise(p.starting_points())[0].shape == (2, 3, p.num_sites)
    tempered = wide.tempered(torch.rand(3))
    assert (tempered.batch_shape, tempered.unexpanded.batch_shape) == ((2, 3), (3,))
    assert tempered.exact_log_normalizer().shape == (3,)


def test_tempered_machines():
    p = machines()["potts"]
    p = p.normalized(p.exact_log_normalizer())
    assert p.tempered(1.0) is p
    hot = p.tempered(0.0)
    assert isinstance(hot, Potts)
    assert hot.is_normalized
    assert_close(hot.log_prob(p.starting_points()), number(-6 * math.log(3)))
    cold = p.tempered(2.0)
    assert not cold.is_normalized  # its Z is another
    assert_close(
        cold.exact_log_normalizer(), (2 * naive_table(p)[1]).logsumexp(0) + 2 * p.log_normalizer
    )
    assert p.tempered(torch.rand(4)).batch_shape == (4,)
    with pytest.raises(ValueError, match="beta must be finite, got inf"):
        p.tempered(math.inf)
    with pytest.raises(ValueError, match="beta must be finite"):
        p.tempered(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"beta has shape \(2,\).*batch_shape=\(3,\)"):
        p.expand([3]).tempered(torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_pickles(name):
    p = machines()[name]
    copy = pickle.loads(pickle.dumps(p))
    x = p.starting_points((3,))
    noise = p.gibbs_noise(x)
    assert torch.equal(copy.energy(x), p.energy(x))
    assert torch.equal(copy.gibbs_sweep(x, noise), p.gibbs_sweep(x, noise))
    assert repr(copy) == repr(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_follow_the_parameters(dtype):
    edges = lattice_edges(3, 4)
    potts = Potts(torch.tensor(0.5, dtype=dtype), edges=edges, num_states=3)
    for p in BoltzmannMachine(torch.tensor(0.5, dtype=dtype), 0.1, edges), potts:
        x = p.starting_points((4,))
        assert x.dtype == p.energy(x).dtype == p.exact_log_normalizer().dtype == dtype
        assert p.gibbs_noise(x)[0].dtype == swept(p, x).dtype == p.exact_sample().dtype == dtype
        # points keep theirs
        for other in torch.int64, torch.float64, torch.float32:
            y = swept(p, x.to(other))
            assert y.dtype == other
            assert p.support.check(y).all()
            assert_close(p.energy(x.to(other)).double(), p.energy(x).double())
    mixed = BoltzmannMachine(torch.tensor(0.5), torch.zeros(12, dtype=dtype), edges)
    assert mixed.couplings.dtype == dtype
    assert BoltzmannMachine(0.5, torch.zeros(12, dtype=dtype), edges).couplings.dtype == dtype


def test_uniforms_are_no_coarser_than_float32():
    p = BoltzmannMachine(torch.tensor(0.5, dtype=torch.bfloat16), edges=lattice_edges(3, 3))
    x = p.starting_points()
    assert p.gibbs_noise(x)[0].dtype == torch.float32
    assert swept(p, x).dtype == torch.bfloat16


def test_parameters_in_other_words():
    edges = lattice_edges(3, 3)
    x = BoltzmannMachine(0.0, edges=edges).starting_points((10,))
    one = BoltzmannMachine(0.5, 0.1, edges)
    assert_close(one.bias, torch.full((9,), 0.1))
    for couplings in torch.tensor(0.5), torch.full((1,), 0.5), torch.full((18,), 0.5):
        assert_close(
            BoltzmannMachine(couplings, torch.full((9,), 0.1), edges).energy(x), one.energy(x)
        )
    adjacency = torch.zeros(9, 9, dtype=torch.long)
    adjacency[edges[:, 0], edges[:, 1]] = adjacency[edges[:, 1], edges[:, 0]] = 1
    assert_close(
        BoltzmannMachine(adjacency, 0.1).energy(x), BoltzmannMachine(1, 0.1, edges).energy(x)
    )
    assert BoltzmannMachine(1.0, edges=edges, num_sites=12).event_shape == (12,)
    assert Potts(1.0, torch.zeros(9, 4), edges).event_shape == (9, 4)
    assert Potts(1.0, torch.zeros(4), edges).field.shape == (9, 4)
    assert BoltzmannMachine(1.0, edges=edges, log_normalizer=3.0).is_normalized


def test_repr():
    p = BoltzmannMachine(torch.zeros(2, 5, 5), log_normalizer=1.0)
    assert (
        repr(p)
        == "BoltzmannMachine(event_shape=(5,), batch_shape=(2,), pairs=10, log_normalizer=known)"
    )


# -- in models -----------------------------------------------------------------------------------


def test_in_a_plate():
    p = BoltzmannMachine(0.3, edges=lattice_edges(3, 3))
    p = p.normalized(p.exact_log_normalizer())

    def model(data):
        with pyro.plate("data", len(data)):
            return pyro.sample("x", p, obs=data)

    data = p.exact_sample((7,))
    trace = pyro.poutine.trace(model).get_trace(data)
    assert_close(trace.log_prob_sum(), p.log_prob(data).sum())
    pyro.sample("x", p)  # and latent


def test_the_posterior_of_a_coupling_is_exact():
    edges = lattice_edges(3, 3)
    data = BoltzmannMachine(0.3, edges=edges).exact_sample((20,))

    def machine(j):
        log_z = BoltzmannMachine(j, edges=edges).exact_log_normalizer()
        return BoltzmannMachine(j, edges=edges, log_normalizer=log_z)

    def model():
        p = machine(pyro.sample("j", dist.Normal(0.0, 1.0)))
        with pyro.plate("data", 20):
            pyro.sample("x", p, obs=data)

    j = torch.linspace(-0.5, 1.5, 2001)
    grid = machine(j[:, None])
    weight = (dist.Normal(0.0, 1.0).log_prob(j) + grid.log_prob(data[:, None]).sum(0)).softmax(0)
    mcmc = MCMC(LangevinKernel(model), 50, 60, num_chains=100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["j"]
    assert_mean(draws, (weight * j).sum())
    assert_mean(draws**2, (weight * j**2).sum())


# -- bad input -----------------------------------------------------------------------------------

EDGES = lattice_edges(3, 3)


def at(i, j, value, batch=()):
    matrix = torch.zeros(*batch, 4, 4)
    matrix[..., i, j] = value
    return matrix


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BoltzmannMachine(at(1, 3, 0.5)), r"\[1, 3\] and \[3, 1\] differ by 0.5"),
        (lambda: BoltzmannMachine(at(1, 3, 0.5, (2,))), r"\[0, 1, 3\] and \[0, 3, 1\] differ"),
        (lambda: BoltzmannMachine(at(2, 2, 0.5)), r"diagonal .* must be 0, but the entry \[2, 2\]"),
        (lambda: BoltzmannMachine(at(1, 3, 0.5).to_sparse()), r"\[1, 3\] and \[3, 1\] differ"),
        (lambda: BoltzmannMachine(at(2, 2, 0.5).to_sparse()), r"diagonal .* entry \[2, 2\]"),
        (lambda: BoltzmannMachine(at(1, 3, math.nan)), "couplings must be finite"),
        (lambda: BoltzmannMachine(math.inf, edges=EDGES), "couplings must be finite"),
        (lambda: BoltzmannMachine(0.1, math.nan, EDGES), "bias must be finite"),
        (lambda: BoltzmannMachine(0.1), r"couplings of shape \(\) are not matrices.*edges="),
        (lambda: BoltzmannMachine(torch.zeros(3, 4)), r"\(3, 4\) are not matrices"),
        (lambda: BoltzmannMachine(torch.zeros(0, 0)), r"\(0, 0\) are not matrices"),
        (lambda: BoltzmannMachine("0.1", edges=EDGES), "couplings must be a real number or tensor"),
        (lambda: BoltzmannMachine(torch.tensor(1j), edges=EDGES), "got dtype torch.complex64"),
        (lambda: BoltzmannMachine(torch.zeros(5), edges=EDGES), r"\(5,\) do not fit 18 edges"),
        (
            lambda: BoltzmannMachine(torch.zeros(9, 9).to_sparse(), edges=EDGES),
            "brings its own edges",
        ),
        (lambda: BoltzmannMachine(torch.zeros(2, 4, 4).to_sparse()), "must be one matrix in COO"),
        (lambda: BoltzmannMachine(at(0, 0, 0.0), torch.zeros(5)), "between 4 sites .*=5"),
        (lambda: BoltzmannMachine(0.1, torch.zeros(5), EDGES), "not a pair of the 5 sites"),
        (lambda: BoltzmannMachine(0.1, torch.zeros(9), EDGES, num_sites=10), "each of 9 site"),
        (
            lambda: BoltzmannMachine(torch.zeros(2, 4, 4), torch.zeros(3, 4)),
            r"couplings and bias have batch shapes that do not broadcast: \[\(2,\), \(3,\)\]",
        ),
        (lambda: BoltzmannMachine(0.1, edges=EDGES, states="bits"), "states must be 'spin'"),
        (lambda: BoltzmannMachine(0.1, edges=torch.tensor([[1, 1]])), "joins a site to itself"),
        (lambda: Potts(0.1, edges=EDGES), "give num_states="),
        (lambda: Potts(0.1, edges=EDGES, num_states=1), "at least 2, got 1"),
        (lambda: Potts(0.1, torch.zeros(9, 3), EDGES, num_states=4), r"3 number\(s\) for each"),
        (lambda: Potts(0.1, 0.5, EDGES), r"field must have shape \(q,\)"),
        (lambda: Potts(at(1, 3, 0.5), num_states=3), r"\[1, 3\] and \[3, 1\] differ"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_matrices_symmetric_to_rounding_will_do():
    j = torch.linalg.inv(torch.randn(8, 8) / 8 + torch.eye(8) * 3)
    j = (j + j.mT) / 2
    j = j - j.diag().diag()
    BoltzmannMachine(j + 1e-7 * torch.triu(j, 1))


def test_values_are_not_looked_at_where_validation_is_off():
    p = BoltzmannMachine(at(1, 3, 0.5), validate_args=False)
    # the symmetric part is what counts
    assert_close(p.energy(torch.ones(4)), torch.tensor(-0.25))


def test_points_outside_the_support():
    p = BoltzmannMachine(0.1, edges=EDGES)
    with pytest.raises(ValueError, match=r"are -1 or 1, .* between 0 and 0: bits as spins are 2"):
        p.log_prob(torch.zeros(9))
    bits = BoltzmannMachine(0.1, edges=EDGES, states="binary")
    with pytest.raises(ValueError, match=r"are 0 or 1, .* between -1 and 1: spins as bits are"):
        bits.log_prob(torch.tensor([-1.0, 1.0, 1.0]).repeat(3))
    assert p.log_prob(torch.ones(9, dtype=torch.long)) == p.log_prob(torch.ones(9))
    with pytest.raises(ValueError, match=r"one-hot rows.*got \(9,\).*one_hot\(labels, 3\)"):
        Potts(0.1, edges=EDGES, num_states=3).log_prob(torch.zeros(9))
    with pytest.raises(ValueError, match=r"must end in event_shape=\(9,\)"):
        p.local_field(torch.zeros(8))
    with pytest.raises(ValueError, match=r"must end in event_shape=\(9,\)"):
        p.gibbs_noise(torch.zeros(8))
