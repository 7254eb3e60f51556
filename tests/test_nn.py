import math

import pytest
import torch
from torch import nn

from pyro_ebm.nn import ConvEnergy, MLPEnergy, NoiseConditionalMLP
from pyro_ebm.ops.score import value_and_grad


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_an_mlp_maps_points_of_any_shape_to_energies(shape, batch):
    assert MLPEnergy(shape, hidden=(4,))(torch.randn((*batch, *shape))).shape == batch


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_a_noise_conditional_mlp_maps_points_and_levels_to_energies(shape, batch):
    net = NoiseConditionalMLP(shape, hidden=(4,), num_frequencies=3)
    assert net(torch.randn((*batch, *shape)), torch.rand(batch)).shape == batch


def test_without_its_network_it_is_a_gaussian_and_noise():
    net = NoiseConditionalMLP(3, hidden=(4,), spread=2.0)
    with torch.no_grad():
        net.net.layers[-1].weight.zero_()
        net.net.layers[-1].bias.zero_()
    x, sigma = torch.randn(5, 3), torch.rand(5)
    p = torch.distributions.Normal(0.0, (4 + sigma.square()).sqrt()[:, None])
    gap = net(x, sigma) + p.log_prob(x).sum(-1)
    torch.testing.assert_close(gap, torch.full((5,), -1.5 * math.log(2 * math.pi)))


def test_noise_hides_the_frequencies_that_it_blurs():
    # E cos(w (x + sigma xi)) = e^(-sigma^2 w^2 / 2) cos(w x): far above the waves nothing is left
    net = NoiseConditionalMLP(1, hidden=(4,), frequency=10.0)
    seen = []
    net.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 1).expand(2, 1)
    net(x, torch.tensor([1e-6, 10.0]))
    sharp, blurred = seen[0][:, 2:]
    angles = (x[0] * net.frequencies).flatten()
    torch.testing.assert_close(sharp, torch.cat([angles.cos(), angles.sin()]))
    assert blurred.abs().median() < 1e-6


@pytest.mark.parametrize("name", ["spread", "frequency"])
def test_a_noise_conditional_mlp_has_positive_scales(name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        NoiseConditionalMLP(2, **{name: 0.0})


@pytest.mark.parametrize("shape", [(5, 9), (1, 8, 8), (3, 4, 4), (1, 1, 2)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_a_convolution_maps_images_of_any_size_to_energies(shape, batch):
    assert ConvEnergy(shape, channels=4)(torch.randn((*batch, *shape))).shape == batch


@pytest.mark.parametrize(
    "make", [lambda **k: MLPEnergy((4, 4), (8,), **k), lambda **k: ConvEnergy((4, 4), 4, **k)]
)
def test_rows_do_not_see_each_other(make):
    net, x = make(), torch.randn(6, 4, 4)
    torch.testing.assert_close(net(x)[2], net(x[2]))
    assert net(x).std() > 0


@pytest.mark.parametrize(
    "make", [lambda **k: MLPEnergy((4, 4), (8,), **k), lambda **k: ConvEnergy((4, 4), 4, **k)]
)
def test_the_second_derivative_is_not_zero(make):
    x = torch.randn(3, 4, 4, requires_grad=True)
    _, slope = value_and_grad(make(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), x)
    assert curvature.abs().min() > 0


def test_the_activation_may_be_chosen():
    assert any(isinstance(m, nn.Tanh) for m in MLPEnergy(2, activation=nn.Tanh).modules())
    assert any(isinstance(m, nn.Tanh) for m in ConvEnergy((4, 4), activation=nn.Tanh).modules())


def test_spectral_norm_bounds_the_slope():
    torch.manual_seed(0)
    x = torch.randn(500, 2)
    free = MLPEnergy(2, hidden=(16, 16), activation=nn.Tanh)
    bounded = MLPEnergy(2, hidden=(16, 16), activation=nn.Tanh, spectral_norm=True)
    for net in (free, bounded):
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "weight" in name or name.endswith("original"):
                    p.mul_(20.0)
    for _ in range(50):  # the power iteration goes on at each call in training mode
        bounded(x)
    bounded.eval()
    assert value_and_grad(bounded, x)[1].norm(dim=-1).max() < 1.01
    assert value_and_grad(free, x)[1].norm(dim=-1).max() > 10


def test_points_of_another_shape():
    with pytest.raises(ValueError, match=r"points must end in \(3,\), got shape \(5, 2\)"):
        MLPEnergy(3)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"points must end in \(4, 4\)"):
        ConvEnergy((4, 4))(torch.zeros(5, 16))
    with pytest.raises(ValueError, match="image_shape must be"):
        ConvEnergy((4,))
