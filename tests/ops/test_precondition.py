import pytest
import torch

from pyro_ebm.ops import precondition, precondition_transposed
from pyro_ebm.ops.steps.precondition import LowRank, whiten


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_products_are_those_of_each_chains_matrix(groups, dense):
    v = torch.randn(6, 3)
    factor = torch.randn(groups, 3, 3).tril() if dense else torch.randn(groups, 3)
    for c in range(6):
        matrix = factor[c % groups] if dense else factor[c % groups].diag()
        torch.testing.assert_close(precondition(factor, v)[c], matrix @ v[c])
        torch.testing.assert_close(precondition_transposed(factor, v)[c], matrix.mT @ v[c])


def test_no_factor_is_the_identity():
    v = torch.randn(4, 2)
    assert torch.equal(precondition(None, v), v)
    assert torch.equal(precondition_transposed(None, v), v)


def test_transposed_is_the_adjoint():
    factor, v, w = torch.randn(2, 3, 3), torch.randn(4, 3), torch.randn(4, 3)
    left = (precondition(factor, v) * w).sum(-1)
    torch.testing.assert_close(left, (v * precondition_transposed(factor, w)).sum(-1))


@pytest.mark.parametrize("targets", [1, 3])
def test_a_trimmed_factor_is_the_same(targets):
    directions = torch.linalg.qr(torch.randn(targets, 8, 5))[0]
    stretch = torch.ones(targets, 5)
    stretch[0, 1], stretch[-1, 3] = 3.0, 0.2
    factor, v = LowRank(torch.rand(targets, 8) + 0.5, directions, stretch), torch.randn(6, 8)
    trimmed = factor.trimmed()
    assert isinstance(trimmed, LowRank)
    assert trimmed.directions.shape == (targets, 8, 2)
    for product in (precondition, precondition_transposed, whiten):
        torch.testing.assert_close(product(trimmed, v), product(factor, v))
    unused = factor._replace(stretch=torch.ones(targets, 5))
    assert torch.equal(unused.trimmed(), factor.diagonal)
