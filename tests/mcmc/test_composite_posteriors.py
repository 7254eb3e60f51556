"""Posteriors made with a pseudolikelihood: what is sampled, its error, and its correction."""

import pickle
import warnings

import networkx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ebm import (
    MCMC,
    BoltzmannMachine,
    ChEESKernel,
    NormalizerError,
    UnnormalizedEnergy,
    curvature_adjustment,
    pseudolikelihood,
)
from pyro_ebm.distributions import lattice_edges
from pyro_ebm.distributions.core.wrappers import composite_part
from pyro_ebm.mcmc import LangevinKernel
from pyro_ebm.models.checks.intractability import check_normalizers
from pyro_ebm.ops.integration.enumerate import states
from tests.statistics import assert_mean_of_rows, assert_moments

EDGES = lattice_edges(4, 4, periodic=False)
DOUBLE = torch.float64


def ising(J):
    return BoltzmannMachine(J, edges=EDGES)


def picture():
    torch.manual_seed(3)
    return ising(0.4).exact_sample()


def model(x, blocks=None):
    J = pyro.sample("J", dist.Uniform(0.0, 1.0))
    pyro.sample("x", pseudolikelihood(ising(J), blocks), obs=x)


def on_a_grid(model, *args, n=150):
    """The mean and the variance of J in (0, 1), by a sum."""
    grid = (torch.arange(n, dtype=DOUBLE) + 0.5) / n
    log_p = torch.stack(
        [
            torch.as_tensor(
                poutine.trace(poutine.condition(model, {"J": J})).get_trace(*args).log_prob_sum()
            )
            for J in grid
        ]
    )
    weights = log_p.double().softmax(0)
    mean = (weights * grid).sum()
    return mean, (weights * (grid - mean).square()).sum()


def test_many_chains_sample_the_corrected_posterior():
    x = picture()
    torch.manual_seed(0)
    run = curvature_adjustment(model, (x,), num_simulations=300).model
    mcmc = MCMC(ChEESKernel(run), 40, 40, num_chains=40, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples(group_by_chain=True)["J"]
    assert_moments(draws, *on_a_grid(run, x))


def test_pyros_sampler_and_guides_take_it():
    x = picture()
    torch.manual_seed(0)
    mcmc = MCMC(NUTS(model), 100, 60, disable_progbar=True)
    mcmc.run(x)
    mean, variance = on_a_grid(model, x)
    assert_moments(mcmc.get_samples(group_by_chain=True)["J"], mean, variance)
    with pytest.raises(ValueError, match="pseudolikelihood, and no log density"):
        mcmc.to_arviz(log_likelihood=True)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=3))
    for _ in range(60):
        svi.step(x)
    assert (guide.median()["J"] - mean).abs() < variance.sqrt()


def test_an_unknown_z_is_no_concern_of_it():
    x = picture()
    check_normalizers(model, (x,))

    def plain(x):
        J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        pyro.sample("x", ising(J), obs=x)

    with pytest.raises(NormalizerError, match="site 'x'"):
        check_normalizers(plain, (x,))

    def latent():
        J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        pyro.sample("x", pseudolikelihood(ising(J)))

    def masked(x):
        with poutine.mask(mask=x.sum() < 0):
            model(x)

    for kernel in (LangevinKernel, NUTS):
        with pytest.raises(ValueError, match=r"site 'x'.*observed sites only"):
            MCMC(kernel(latent), 5, disable_progbar=True).run()
        with pytest.raises(ValueError, match="site 'x' is masked"):
            MCMC(kernel(masked), 5, disable_progbar=True).run(abs(x))


# -- the correction --------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, [[0, 1, 3, 4], [1, 2, 4, 5]]], ids=["singles", "blocks"])
def test_h_and_j_are_those_of_all_data_that_there_are(blocks):
    """J simulated is the variance of the score over all 512 states, up to Monte Carlo error."""
    edges = lattice_edges(3, 3, periodic=False)
    x = torch.tensor([1.0, 1, -1, 1, 1, -1, -1, 1, 1], dtype=DOUBLE)

    def small(x):
        J = pyro.sample("J", dist.Uniform(torch.zeros((), dtype=DOUBLE), 2.0))
        p = BoltzmannMachine(J, edges=edges)
        pyro.sample("x", pseudolikelihood(p, blocks), obs=x)

    torch.manual_seed(0)
    found = curvature_adjustment(small, (x,), num_simulations=20_000)

    def score(J, x):
        def log_prob(J):
            return pseudolikelihood(BoltzmannMachine(J, edges=edges), blocks).log_prob(x)

        one = torch.ones_like(J)
        (_, slope) = torch.autograd.functional.jvp(log_prob, J, one, create_graph=True)
        return slope

    J = found.mode["J"].clone().requires_grad_()
    torch.testing.assert_close(score(J, x), torch.zeros_like(J), atol=1e-7, rtol=0)
    every = states(torch.tensor([[-1.0], [1.0]], dtype=DOUBLE), 9)
    weights = BoltzmannMachine(J, edges=edges).unnormalized_log_prob(every).softmax(0).detach()
    scores = score(J, every).detach()
    assert abs((weights * scores).sum()) < 1e-10  # the composite score is unbiased
    variability = (weights * scores.square()).sum()
    (sensitivity,) = torch.autograd.grad(-score(J, x), J)
    # in the unconstrained z, J = 2 sigmoid(z), at the mode
    slope = J.detach() * (1 - J.detach() / 2)
    torch.testing.assert_close(found.sensitivity[0, 0], sensitivity * slope**2, rtol=1e-5, atol=0.0)
    kurtosis = (weights * scores.pow(4)).sum() / variability**2
    error = ((kurtosis - 1) / 20_000).sqrt()
    assert (found.variability[0, 0] / (variability * slope**2) - 1).abs() < 4.5 * error
    torch.testing.assert_close(found.naive_std_error["J"], sensitivity.rsqrt())
    want = found.variability[0, 0].sqrt() / found.sensitivity[0, 0] * slope
    torch.testing.assert_close(found.std_error["J"], want)


def two_parameters(x):
    J = pyro.sample("J", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("sum", b.sum())
    field = b.repeat_interleave(8, -1)
    with pyro.plate("data", len(x)):
        pyro.sample("x", pseudolikelihood(BoltzmannMachine(J, field, EDGES)), obs=x)


def test_the_corrected_likelihood_has_the_curvature_of_its_error():
    torch.manual_seed(0)
    x = BoltzmannMachine(0.3, 0.1, EDGES).exact_sample((300,))
    found = curvature_adjustment(two_parameters, (x,), plate="data")
    H, J, C = found.sensitivity, found.variability, found.adjustment
    torch.testing.assert_close(C.T @ H @ C, H @ torch.linalg.solve(J, H), rtol=1e-3, atol=1e-2)

    def log_likelihood(run, z):
        values = {"J": z[0], "b": z[1:]}
        nodes = poutine.trace(poutine.condition(run, values)).get_trace(x)
        assert {"J", "b", "sum", "x"} <= set(nodes.nodes)
        torch.testing.assert_close(nodes.nodes["sum"]["value"], z[1:].sum())  # not the moved b
        nodes.compute_log_prob()
        torch.testing.assert_close(
            nodes.nodes["J"]["log_prob_sum"], dist.Normal(0.0, 1.0).log_prob(z[0])
        )
        assert composite_part(nodes.nodes["x"]["fn"]) is not None
        return nodes.nodes["x"]["log_prob_sum"]

    z = torch.cat([found.mode["J"][None], found.mode["b"]])
    curvature = torch.autograd.functional.hessian(lambda z: log_likelihood(found.model, z), z)
    torch.testing.assert_close(-curvature, C.T @ H @ C, rtol=2e-3, atol=0.1)
    torch.testing.assert_close(
        log_likelihood(found.model, z), log_likelihood(two_parameters, z)
    )  # the mode stays
    again = pickle.loads(pickle.dumps(found))
    torch.testing.assert_close(
        log_likelihood(again.model, z + 0.1), log_likelihood(found.model, z + 0.1)
    )


def test_independent_variables_need_no_correction():
    """A pseudolikelihood of variables without couplings is the likelihood: J = H, C = 1."""
    torch.manual_seed(0)
    x = (torch.rand(4000, 16) < 0.6).float()

    def bits(x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        p = UnnormalizedEnergy(lambda x: -b * x.sum(-1), (16,), dist.constraints.boolean)
        with pyro.plate("data", len(x)):
            pyro.sample("x", pseudolikelihood(p), obs=x)

    found = curvature_adjustment(bits, (x,), plate="data")
    # the variance of a variance of 4,000 nearly normal scores
    assert (found.variability / found.sensitivity - 1).abs() < 4.5 * (2 / 4000) ** 0.5
    torch.testing.assert_close(
        found.naive_std_error["b"], torch.tensor(64_000 * 0.24).rsqrt(), rtol=0.02, atol=0.0
    )


@pytest.mark.slow
def test_the_error_is_that_of_repeated_estimates():
    """The spread of estimates of overlapping blocks over 120 lattices, against what one says."""
    edges = lattice_edges(8, 8)
    truth = BoltzmannMachine(0.3, edges=edges, num_steps=100)
    blocks = [
        [8 * r + c, 8 * r + (c + 1) % 8, 8 * ((r + 1) % 8) + c, 8 * ((r + 1) % 8) + (c + 1) % 8]
        for r in range(8)
        for c in range(8)
    ]

    def lattice(x):
        J = pyro.sample("J", dist.Normal(0.0, 1.0))
        pyro.sample(
            "x", pseudolikelihood(BoltzmannMachine(J, edges=edges, num_steps=40), blocks), obs=x
        )

    pyro.set_rng_seed(0)
    modes, said, naive = [], [], []
    for x in truth.sample((120,)):
        found = curvature_adjustment(lattice, (x,), num_simulations=100)
        modes.append(found.mode["J"])
        said.append(found.std_error["J"])
        naive.append(found.naive_std_error["J"])
    modes, said, naive = map(torch.stack, (modes, said, naive))
    assert_mean_of_rows((modes - modes.mean()).square() - said.square())
    assert naive.mean() < 0.75 * said.mean()


def test_what_has_no_correction():
    x = picture()

    def plain(x):
        J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        pyro.sample("x", ising(J.detach()).normalized(1.0), obs=x)

    def known(x):
        pyro.sample("x", pseudolikelihood(ising(0.3)), obs=x)

    def unused(x):
        pyro.sample("other", dist.Normal(0.0, 1.0))
        model(x)

    for wrong, message in (
        (plain, "observes no pseudolikelihood"),
        (known, "no latents"),
        (unused, "no maximum"),
    ):
        with pytest.raises(ValueError, match=message):
            curvature_adjustment(wrong, (x,))
    with pytest.raises(ValueError, match="no maximum"):
        curvature_adjustment(model, (torch.ones(16),))  # all alike: J would be infinite
    with pytest.raises(ValueError, match="not in plate='data'"):
        curvature_adjustment(model, (x,), plate="data")
    with pytest.raises(ValueError, match="do not span"):
        curvature_adjustment(two_parameters, (torch.stack([x, -x]),), plate="data")


# -- networks --------------------------------------------------------------------------------------

FLORENTINE = networkx.florentine_families_graph()
FLORENTINE.add_node("Pucci")  # a family without marriages among these
FAMILIES = sorted(FLORENTINE)
START, END = torch.triu_indices(16, 16, 1)
WEALTH = torch.tensor([10, 36, 55, 44, 20, 32, 8, 42, 103, 48, 49, 3, 27, 10, 146, 48.0])


def adjacency(y):
    a = y.new_zeros(y.shape[:-1] + (16, 16))
    a[..., START, END] = y
    return a + a.mT


def triangles(y):
    a = adjacency(y)
    return ((a @ a) * a).sum((-1, -2)) / 6


STATISTICS = {
    "edges": lambda y: y.sum(-1)[..., None],
    "wealth": lambda y: torch.stack([y.sum(-1), y @ (WEALTH[START] + WEALTH[END]).to(y)], -1),
    "triangles": lambda y: torch.stack([y.sum(-1), triangles(y)], -1),
}
TRUTHS = {
    "edges": ([-1.6094], [0.2449]),
    "wealth": ([-2.594929, 0.010546], [0.536056, 0.004674]),
    "triangles": ([-1.7009, 0.2208], [0.3083, 0.4276]),  # errors by the same Hessian alone
}


@pytest.mark.parametrize("name", TRUTHS)
def test_florentine_marriages(name):
    """Maximum pseudolikelihood of exponential random graphs, as ergm and logistic regression."""
    y = torch.from_numpy(networkx.to_numpy_array(FLORENTINE, FAMILIES))[START, END]
    stars = adjacency(y).sum(-1)
    assert (y.sum(), (stars * (stars - 1) / 2).sum(), triangles(y)) == (20, 47, 3)
    statistics = STATISTICS[name]

    def graph(y):
        size = len(TRUTHS[name][0])
        theta = pyro.sample("theta", dist.Normal(torch.zeros(size, dtype=DOUBLE), 10.0).to_event(1))
        p = UnnormalizedEnergy(
            lambda y: -(statistics(y) * theta).sum(-1),
            (120,),
            dist.constraints.boolean,
            num_steps=1,  # here the errors of J do not matter
        )
        pyro.sample("y", pseudolikelihood(p), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = curvature_adjustment(graph, (y,), num_simulations=10)
    coefficients, errors = TRUTHS[name]
    digits = {"rtol": 0.0, "atol": 6e-5}
    torch.testing.assert_close(
        found.mode["theta"], torch.tensor(coefficients, dtype=DOUBLE), **digits
    )
    if errors is not None:
        torch.testing.assert_close(
            found.naive_std_error["theta"], torch.tensor(errors, dtype=DOUBLE), **digits
        )
