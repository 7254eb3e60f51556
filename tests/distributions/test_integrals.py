"""log Z of any energy of one or two dimensions, and positive definite matrices."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_ebm import UnnormalizedEnergy
from pyro_ebm.distributions.core.positive_definite import (
    FromLowerTriangle,
    positive_definite,
)
from pyro_ebm.distributions.exponential.quadrature import log_normalizer_by_quadrature

HALF_LOG_2PI = math.log(2 * math.pi) / 2


def d(*values):
    """A double tensor."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("energy", "support", "event_shape", "truth"),
    [
        (lambda x: x**2 / 2, constraints.real, (), HALF_LOG_2PI),
        (lambda x: 3 * x, constraints.positive, (), -math.log(3.0)),
        (lambda x: 0 * x, constraints.interval(-1.0, 3.0), (), math.log(4.0)),
        (lambda x: x, constraints.greater_than(2.0), (), -2.0),
        (lambda x: -x, constraints.less_than(-2.0), (), -2.0),
        (
            lambda x: -3 * x.log() - (1 - x).log(),
            constraints.unit_interval,
            (),
            math.lgamma(4) + math.lgamma(2) - math.lgamma(6),
        ),
        (lambda x: x.sum(-1), constraints.positive, (2,), 0.0),
        (lambda x: 0 * x.sum(-1), constraints.simplex, (3,), -math.log(2.0)),  # its area in two
        (lambda x: 0 * x.sum(-1), constraints.simplex, (2,), 0.0),
        (lambda x: x.square().sum((-1, -2)) / 2, constraints.real, (2, 1), 2 * HALF_LOG_2PI),
    ],
)
def test_quadrature_on_any_support(energy, support, event_shape, truth):
    p = UnnormalizedEnergy(energy, event_shape, support)
    assert log_normalizer_by_quadrature(p).item() == pytest.approx(truth, abs=1e-6)


def test_quadrature_of_tilts_batches_and_expansions():
    shift = d(-1.0, 0.0, 2.0)
    p = UnnormalizedEnergy(lambda x: -shift * x, base=dist.Normal(d(0.0), d(1.0)), batch_shape=(3,))
    assert_close(log_normalizer_by_quadrature(p), shift**2 / 2)  # E[e^{s x}]
    wide = p.expand((4, 3))
    assert_close(log_normalizer_by_quadrature(wide), (shift**2 / 2).expand(4, 3))
    bounds = UnnormalizedEnergy(lambda x: x, (), constraints.greater_than(shift), batch_shape=(3,))
    assert_close(log_normalizer_by_quadrature(bounds), -shift)
    q = p.normalized(log_normalizer_by_quadrature(p))
    assert_close(q.log_prob(d(0.3)), dist.Normal(shift, d(1.0)).log_prob(d(0.3)))


def test_quadrature_is_differentiable_in_a_network():
    net = nn.Linear(1, 1)
    p = UnnormalizedEnergy(lambda x: net(x[..., None])[..., 0], base=dist.Normal(0.0, 1.0))
    log_z = log_normalizer_by_quadrature(p)  # w^2 / 2 - b
    gradient = torch.autograd.grad(log_z, list(net.parameters()))
    assert_close(log_z, (net.weight**2 / 2 - net.bias).squeeze(), atol=1e-4, rtol=1e-4)
    assert_close(gradient[0], net.weight.detach(), atol=1e-4, rtol=1e-4)
    assert_close(gradient[1], torch.tensor([-1.0]))


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (
            UnnormalizedEnergy(torch.zeros_like),
            "the density has not decayed far out.* give it a base=",
        ),
        (UnnormalizedEnergy(lambda x: -x, support=constraints.positive), "not decayed"),
        (UnnormalizedEnergy(lambda x: x.log(), support=constraints.positive), "not decayed"),
        (  # Beta(1, .02): half of its mass is nearer to 1 than numbers are
            UnnormalizedEnergy(lambda x: 0.98 * (1 - x).log(), support=constraints.unit_interval),
            "beyond the numbers",
        ),
        (UnnormalizedEnergy(lambda x: x.sum(-1), (3,)), r"event_shape=\(3,\).* has 3"),
        (UnnormalizedEnergy(torch.square, support=constraints.boolean), "is discrete"),
    ],
)
def test_quadrature_refuses(p, message):
    with pytest.raises(ValueError, match=rf"(?s)log Z of Unnorm.*{message}"):
        log_normalizer_by_quadrature(p)


def test_a_base_is_no_advice_where_there_is_one():
    p = UnnormalizedEnergy(lambda x: -x.square(), base=dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="not decayed far out") as refused:
        log_normalizer_by_quadrature(p)
    assert "base=" not in str(refused.value).partition("the density")[2]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_bijection_onto_positive_definite_matrices(n):
    transform = torch.distributions.biject_to(positive_definite)
    assert transform == FromLowerTriangle()
    z = torch.randn(3, n * (n + 1) // 2, dtype=torch.float64)
    x = transform(z)
    assert positive_definite.check(x).all()
    assert_close(transform.inv(x), z)
    assert transform.forward_shape(z.shape) == x.shape
    assert transform.inverse_shape(x.shape) == z.shape
    rows, columns = torch.tril_indices(n, n)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: transform(z)[rows, columns]))(z)
    assert_close(transform.log_abs_det_jacobian(z, x), jacobian.det().abs().log())
    with pytest.raises(ValueError, match=r"are square, got shape \(2, 3\)"):
        transform.inverse_shape((2, 3))
