"""Which points have a position in unconstrained coordinates, for every support with a boundary."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import biject_to

from pyro_ebm.distributions.checks.boundary import check_inside, inside, margins, too_many
from pyro_ebm.distributions.core.positive_definite import positive_definite

EPS = torch.finfo(torch.float32).eps


def tensor(*values):
    return torch.tensor(values)


# support, points on the boundary or within rounding of it, points inside
ELEMENTWISE = [
    (constraints.unit_interval, [0.0, 1e-40, 1.0, 1 - EPS / 2], [1e-30, 0.5, 1 - 4 * EPS]),
    (constraints.half_open_interval(0.0, 1.0), [0.0, 1 - EPS / 2], [1e-30, 0.5, 1 - 4 * EPS]),
    (constraints.interval(1.0, 2.0), [1.0, 2.0], [1 + 2 * EPS, 1.5, 2 - 8 * EPS]),
    (constraints.interval(-1.0, 1.0), [-1.0, 1.0], [-1 + 4 * EPS, 0.0, 1 - 4 * EPS]),
    (constraints.interval(100.0, 200.0), [100.0, 200.0], [100.01, 199.99]),
    (constraints.positive, [0.0, 1e-40], [1e-30, 1.0, 1e30]),
    (constraints.nonnegative, [0.0], [1e-30, 1.0, 1e30]),
    (constraints.softplus_positive, [0.0], [1e-30, 1.0, 1e30]),
    (constraints.greater_than(5.0), [5.0], [5 + 1e-5, 6.0]),
    (constraints.greater_than_eq(-5.0), [-5.0], [-5 + 1e-5, 6.0]),
    (constraints.less_than(1.0), [1.0], [1 - 1e-5, -1e6]),
]


@pytest.mark.parametrize(("support", "out", "within"), ELEMENTWISE)
def test_elementwise_supports(support, out, within):
    assert not inside(support, tensor(*out)).any()
    assert inside(support, tensor(*within)).all()
    assert inside(constraints.independent(support, 1), tensor(within[:2])).tolist() == [[True] * 2]
    assert not inside(support, tensor(torch.nan)).any()


def test_double_precision_comes_nearer():
    x = 1 - torch.tensor([1e-12], dtype=torch.float64)
    assert inside(constraints.unit_interval, x)
    assert not inside(constraints.unit_interval, x.float())


def correlation(rho):
    return torch.tensor([[1.0, rho], [rho, 1.0]])


def factor(rho):
    return torch.tensor([[1.0, 0.0], [rho, (1 - rho**2) ** 0.5]])


JOINT = [
    (constraints.simplex, tensor(0.5, 0.5, 0.0), tensor(0.4, 0.5, 0.1)),
    (constraints.simplex, tensor(0.0, 0.5, 0.5), tensor(1e-6, 0.5, 0.5 - 1e-6)),
    (constraints.simplex, tensor(1.0, 0.0), tensor(0.999, 0.001)),
    (constraints.simplex, tensor(0.5, 0.5, 1e-12), tensor(0.5, 1e-12, 0.5)),
    (constraints.ordered_vector, tensor(1.0, 1.0, 2.0), tensor(-1e6, 0.0, 1e-6)),
    (constraints.positive_ordered_vector, tensor(0.0, 1.0), tensor(1e-20, 1.0)),
    (constraints.corr_cholesky, factor(1.0), factor(0.99)),
    (constraints.corr_matrix, correlation(1.0), correlation(0.99)),
    (positive_definite, torch.ones(2, 2), correlation(0.99)),
    (positive_definite, torch.zeros(2, 2), 1e-6 * torch.eye(2)),
]


@pytest.mark.parametrize(("support", "out", "within"), JOINT)
def test_joint_supports(support, out, within):
    assert inside(support, torch.stack([out, within])).tolist() == [False, True]


def test_parts_of_several_supports():
    support = constraints.cat([constraints.unit_interval, constraints.real], 0, [2, 1])
    assert inside(support, tensor(0.0, 0.5, 7.0)).tolist() == [False, True, True]
    support = constraints.stack([constraints.unit_interval, constraints.positive], -1)
    assert inside(support, tensor([0.5, 0.0])).tolist() == [[True, False]]


DRAWS = {
    "uniform": (constraints.unit_interval, lambda: torch.rand(100_000)),
    "U-shaped": (constraints.unit_interval, lambda: dist.Beta(0.5, 0.5).sample((100_000,))),
    "small": (constraints.positive, lambda: dist.Gamma(0.1, 1.0).sample((100_000,))),
    "heavy": (constraints.positive, lambda: dist.HalfCauchy(1.0).sample((100_000,))),
    "simplex": (constraints.simplex, lambda: dist.Dirichlet(torch.ones(500)).sample((200,))),
    "softmax": (constraints.simplex, lambda: torch.randn(200, 1000).softmax(-1)),
    "sparse": (
        constraints.simplex,
        lambda: dist.Dirichlet(torch.full((3,), 0.3)).sample((10_000,)),
    ),
    "factors": (constraints.corr_cholesky, lambda: dist.LKJCholesky(20).sample((200,))),
    "ordered": (constraints.ordered_vector, lambda: torch.randn(200, 30).sort(-1).values),
    "pixels": (  # dequantized, of which rounding puts a few in 100,000 at 1
        constraints.unit_interval,
        lambda: (255.0 * torch.randint(2, (1000, 784)) + torch.rand(1000, 784)) / 256,
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_ordinary_densities_pass(name):
    support, draw = DRAWS[name]
    x = draw()
    event = constraints.independent(support, x.dim() - 1 - max(support.event_dim, 0))
    check_inside(event, x, "the draws")


def test_how_many_may_be_rounded():
    bad = torch.zeros(1000, 50, dtype=torch.bool)
    bad[:5, :] = True  # 0.5 % of all
    assert not too_many(bad, 1)
    bad[:11, :] = True
    assert too_many(bad, 1)
    bad[:] = False
    bad[:101, 0] = True  # a tenth of one element, 0.2 % of all
    assert too_many(bad, 1)
    assert not too_many(torch.tensor([[True] + 200 * [False]]), 1)


def test_what_the_error_says():
    half = constraints.independent(constraints.interval(0.0, 2.0), 1)
    message = (
        r"^2 of 4 values of the samples lie on the boundary of the support Interval\(lower_bound="
        r"0.0, upper_bound=2.0\) \(such as 2\), or within rounding of it, where they have no"
        r" unconstrained coordinates: shrink them towards the middle, x = 1 \+ 0.98 \* \(x - 1\)"
    )
    with pytest.raises(ValueError, match=message):
        check_inside(half, tensor([1.0, 2.0], [0.5, 0.0]), "the samples")
    with pytest.raises(ValueError, match=r"1 of 2 events of .* uniform point.*, or go elsewhere"):
        check_inside(constraints.simplex, tensor([0.0, 1.0], [0.4, 0.6]), "them", "go elsewhere")
    check_inside(constraints.boolean, tensor(0.0, 1.0), "bits")
    check_inside(constraints.real, tensor(0.0, 1.0), "numbers")


@pytest.mark.parametrize(
    ("support", "x", "moved"),
    [
        (constraints.unit_interval, tensor(0.0, 1.0), lambda x: 0.5 + 0.98 * (x - 0.5)),
        (constraints.interval(-3.0, 5.0), tensor(-3.0, 5.0), lambda x: 1 + 0.98 * (x - 1)),
        (constraints.simplex, tensor([1.0, 0.0, 0.0]), lambda x: 0.99 * x + 0.01 / x.shape[-1]),
        (positive_definite, torch.ones(1, 2, 2), lambda x: x + 0.01 * torch.eye(2)),
        (constraints.corr_matrix, correlation(1.0), lambda x: 0.99 * x + 0.01 * torch.eye(2)),
    ],
)
def test_the_ways_inside(support, x, moved):
    assert not inside(support, x).any()
    assert inside(support, moved(x)).all()
    assert support.check(moved(x)).all()


@pytest.mark.parametrize("support", [row[0] for row in ELEMENTWISE + JOINT])
def test_positions_come_back(support):
    bijection = biject_to(support)
    z = torch.randn(50, 3)
    x = bijection(z)
    if support is not constraints.positive_ordered_vector:
        assert support.check(x).all()
    assert inside(support, x).all()
    assert all((margin > 0).all() for margin in margins(support, x))
