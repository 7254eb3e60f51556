"""Graphs that are run many times, and how they solve triangular systems."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ebm import LangevinKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import ChEESKernel
from pyro_ebm.mcmc.engine.engine import Engine
from pyro_ebm.mcmc.engine.graph import FxGraph, SolvesTogether
from pyro_ebm.mcmc.potentials.energy import EnergyPotential

WAYS = pytest.mark.parametrize("jit_compile", [False, "capture", True])


# -- many times ----------------------------------------------------------------------------------


def rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rotation, and something beside what is carried on."""
    return x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos(), x.square().sum()


@WAYS
def test_iterating_is_calling_again_and_again(jit_compile):
    engine = Engine(rotate, jit_compile)
    x, y = torch.randn(3, 2, dtype=torch.float64).unbind(-1)
    for n in (1, 2, 7, 7, 3):  # the first without, the second with a graph that was compared
        angle = torch.rand((), dtype=torch.float64)
        new_x, new_y, before = engine.iterate(n, (x, y), angle)
        want_x, want_y, _ = rotate(x, y, n * angle)
        torch.testing.assert_close((new_x, new_y), (want_x, want_y))
        torch.testing.assert_close(before, rotate(x, y, (n - 1) * angle)[0].square().sum())
        x, y = new_x, new_y


@WAYS
def test_iterating_sees_what_changes_in_place(jit_compile):
    shift = torch.ones(())
    engine = Engine(lambda x: (x + shift,), jit_compile)
    for start in (0.0, 1.0, 2.0, 3.0):
        shift.fill_(1 + start)
        (x,) = engine.iterate(4, (torch.full((2,), start),))
        assert x.tolist() == [start + 4 * (1 + start)] * 2


@WAYS
def test_values_laid_out_otherwise_are_not_taken_for_the_inputs(jit_compile):
    # what it returns has the shape of what it takes, and other strides
    engine = Engine(lambda x: ((2 * x).T,), jit_compile)
    for seed in range(4):
        x = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
        (found,) = engine.iterate(4, (x,))
        assert torch.equal(found, 16 * x)


@WAYS
def test_iterating_survives_a_singular_matrix_on_the_way(jit_compile):
    # in a graph inv raises; the function says NaN, as potentials do
    def halve(x: Tensor) -> tuple[Tensor]:
        try:
            return (torch.linalg.inv(x) @ x @ x - 1 * torch.eye(2),)
        except torch.linalg.LinAlgError:
            return (torch.full_like(x, torch.nan),)

    engine = Engine(halve, jit_compile)
    for top in (9.0, 7.0, 5.0):  # less by 1 each time
        x = torch.diag(torch.tensor([top, top + 1]))
        torch.testing.assert_close(engine.iterate(3, (x,))[0], x - 3 * torch.eye(2))
    x = torch.diag(torch.tensor([2.0, 3.0]))
    assert engine.iterate(3, (x,))[0].isnan().all()  # at 0 it is singular
    assert engine.jit_compile == jit_compile


@pytest.mark.parametrize("jit_compile", ["capture", True])
def test_iterating_looks_for_another_graph_when_the_state_is_another(jit_compile):
    sign = [torch.ones(()), -torch.ones(())]
    which = [0]
    engine = Engine(lambda x: (x + sign[which[0]],), jit_compile, state=lambda: which[0])
    for now in (0, 0, 0, 1, 1, 1, 0, 1):
        which[0] = now
        (x,) = engine.iterate(3, (torch.rand(2).round() + now,))
        start = x - 3 * sign[now]
        assert ((start == now) | (start == now + 1)).all()


@pytest.mark.parametrize("jit_compile", ["capture", True])
def test_groups_with_other_numbers_of_steps_have_the_graphs_of_one(jit_compile):
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    energies = UnnormalizedEnergy(lambda x: (x / scale).square() / 2, batch_shape=(2,))
    draws = {}  # in double precision, where rounding turns no acceptance
    for way in (False, jit_compile):
        pyro.set_rng_seed(0)
        kernel = ChEESKernel(step_size=0.5, jit_compile=way)
        kernel.bind(EnergyPotential(energies), 40)
        state = kernel.init(torch.randn(20, 1, dtype=torch.float64))
        counts = set()
        for _ in range(60):
            state, _ = kernel.step(state)
            counts.add(tuple(kernel.extra_fields["n_steps"][:2].tolist()))
        assert any(a != b for a, b in counts)
        draws[way] = state.z
    torch.testing.assert_close(draws[jit_compile], draws[False], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("jit_compile", ["capture", True, "auto"])
def test_a_function_with_branches_of_its_own_runs_before_and_after(jit_compile):
    def absolute(x: Tensor) -> tuple[Tensor]:
        return (torch.cond(x.sum() > 0, lambda x: x.clone(), lambda x: -x, (x,)),)

    engine = Engine(absolute, jit_compile, planned=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it can be captured depends on torch
        for sign in (1, -1, 1, -1):
            x = sign * torch.rand(4, 3)
            assert torch.equal(engine(x)[0], x.abs())
            assert torch.equal(absolute(x)[0], x.abs())


# -- triangular systems --------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("unitriangular", [True, False])
@pytest.mark.parametrize(
    ("matrix", "sides"),
    [
        ((3, 3), (5, 3, 3)),
        ((1, 3, 3), (5, 3, 3)),
        ((1, 1, 3, 3), (5, 3, 3)),
        ((1, 3, 3), (2, 5, 3, 3)),
        ((1, 1, 3, 3), (3, 3)),
        ((5, 3, 3), (3, 3)),
        ((5, 3, 3), (5, 3, 3)),
        ((3, 3), (0, 3, 3)),
    ],
)
def test_systems_of_one_matrix_have_the_solutions_of_each(
    matrix, sides, left, upper, unitriangular
):
    A = torch.randn(matrix, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
    B = torch.randn(sides, dtype=torch.float64)
    kinds = {"upper": upper, "left": left, "unitriangular": unitriangular}
    want = torch.linalg.solve_triangular(A, B, **kinds)
    with SolvesTogether():
        found = torch.linalg.solve_triangular(A, B, **kinds)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_sides_of_other_shapes(shape):
    A = torch.randn(3, 3, dtype=torch.float64).tril() + 3 * torch.eye(3, dtype=torch.float64)
    B, left = torch.randn(4, *shape, dtype=torch.float64), shape[0] == 3
    with SolvesTogether():
        X = torch.linalg.solve_triangular(A, B, upper=False, left=left)
    torch.testing.assert_close(A @ X if left else X @ A, B)


def normal() -> None:
    scale = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.5, 0.0], [-0.3, 0.2, 2.0]])
    pyro.sample("x", dist.MultivariateNormal(torch.ones(3), scale_tril=scale))


def test_a_captured_normal_has_no_copy_of_its_matrix_for_each_chain():
    kernel = LangevinKernel(normal)
    potential = kernel.make_potential()
    z = torch.randn(50, 3)
    want_value, want_grad = potential.value_and_grad(z)
    graph = FxGraph(potential.value_and_grad, (z,), [z])
    solves = [n for n in graph.graph.graph.nodes if "solve_triangular" in str(n.target)]
    assert len(solves) == 2  # one for the value, one for the gradient
    assert [n.args[0].meta["val"].shape for n in solves] == [(3, 3), (3, 3)]
    value, grad = graph([z])
    torch.testing.assert_close(value, want_value)
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("jit_compile", ["capture", True])
def test_an_ill_conditioned_matrix_stays_in_a_graph(jit_compile):
    # the last digits of its solutions depend on the order of the operations, which must not be
    # taken for a function that reads what changes; the warning of that would be an error here
    grid = torch.linspace(0, 1, 300)
    cov = torch.exp(-((grid[:, None] - grid).square()) / 0.05) + 1e-5 * torch.eye(300)
    scale = torch.linalg.cholesky(cov)

    def solve(sides: Tensor) -> tuple[Tensor]:
        half = torch.linalg.solve_triangular(scale, sides, upper=False)
        return (torch.linalg.solve_triangular(scale.T, half, upper=True),)

    engine = Engine(solve, jit_compile)
    for _ in range(3):
        sides = torch.randn(10, 300, 1)
        (found,) = engine(sides)
        residual = (cov @ found - sides).abs().max()
        assert residual < 1e-2 * found.abs().max()
    assert engine.jit_compile == jit_compile
