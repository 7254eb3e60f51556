import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.ops import score, value_and_grad


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_score_of_a_gaussian(batch):
    x, sd = torch.randn(*batch, 2), torch.tensor([0.5, 2.0])
    p = dist.Normal(1.0, sd).to_event(1)
    torch.testing.assert_close(score(p.log_prob, x), -(x - 1) / sd**2)


def test_score_has_mean_zero_under_its_density():
    # E[s] = 0 and E[s s'] = -E[grad s]: Fisher's identities
    p = dist.Gamma(5.0, 2.0)
    x = p.sample((200_000,))
    s = score(p.log_prob, x)
    assert s.mean().abs() < 4.5 * s.std() / len(x) ** 0.5
    curvature = 4 / x**2  # -d2/dx2 of 4 log x - 2 x
    difference = s.square() - curvature
    assert difference.mean().abs() < 4.5 * difference.std() / len(x) ** 0.5


def test_results_are_detached_and_x_is_untouched():
    x = torch.ones(3, requires_grad=True)
    weight = torch.ones((), requires_grad=True)
    value, grad = value_and_grad(lambda x: weight * x**2, x)
    assert not value.requires_grad
    assert not grad.requires_grad
    assert x.grad is None
    assert weight.grad is None


def test_works_under_no_grad():
    with torch.no_grad():
        _, grad = value_and_grad(lambda x: x**2, torch.tensor([3.0]))
    assert grad.tolist() == [6.0]


@pytest.mark.parametrize("leaf", [True, False])
def test_create_graph_differentiates_again_in_x_and_parameters(leaf):
    x = torch.tensor([2.0], requires_grad=leaf)
    weight = torch.tensor(3.0, requires_grad=True)
    _, grad = value_and_grad(lambda x: weight * x**3, x, create_graph=True)  # 3 w x^2
    (grad_weight,) = torch.autograd.grad(grad.sum(), weight, retain_graph=True)
    assert grad_weight.item() == pytest.approx(12.0)
    if leaf:
        (grad_x,) = torch.autograd.grad(grad.sum(), x)  # 6 w x
        assert grad_x.item() == pytest.approx(36.0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradient_of_a_constant_is_zero(create_graph):
    weight = torch.ones(2, requires_grad=True)
    for function in (lambda x: torch.ones(2), lambda x: weight * 2):
        value, grad = value_and_grad(function, torch.randn(2), create_graph=create_graph)
        assert value.shape == (2,)
        assert grad.tolist() == [0.0, 0.0]


def test_integers_have_no_gradient():
    with pytest.raises(TypeError, match="floating"):
        value_and_grad(lambda x: x, torch.arange(3))
