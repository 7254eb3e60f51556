"""The potential of a random model, against its log joint and Jacobians, one chain at a time."""

import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_ebm.mcmc import ModelPotential
from pyro_ebm.mcmc.engine.engine import Engine
from tests.properties.inputs import SIZES, holds
from tests.properties.models import ModelSpec, models


def slow_potential(model: ModelSpec, potential: ModelPotential, row: Tensor) -> Tensor:
    """U of one chain: minus the log joint of the conditioned model, minus log |det J|."""
    found = poutine.trace(model).get_trace()
    x, log_det = {}, row.new_zeros(())
    for site, z in zip(potential.sites, row.split(potential.sizes), strict=True):
        forward = biject_to(found.nodes[site.name]["fn"].support)
        z = z.reshape(site.shape).to(site.dtype)
        x[site.name] = forward(z)
        if site.name in potential.idle:  # standard normal, and no matter to the model
            idle = potential.idle[site.name]
            log_det = log_det - torch.where(idle, z, 0.0).square().sum() / 2
            z = torch.where(idle, 0.0, z)
        log_det = log_det + forward.log_abs_det_jacobian(z, forward(z)).sum()
    trace = poutine.trace(poutine.condition(model, x)).get_trace()
    return -trace.log_prob_sum() - log_det


def potential_is_right(model: ModelSpec, chains: int, captured: bool) -> None:
    potential = ModelPotential(model)
    z = torch.empty(chains, potential.dim, dtype=potential.dtype).uniform_(-2, 2)
    function = potential.value_and_grad
    if captured:
        function = Engine(function, jit_compile="capture")
        function(z.flip(0))
    value, grad = function(z)
    assert value.shape == (chains,)
    assert grad.shape == z.shape
    assert value.dtype == grad.dtype == potential.dtype == model.dtype
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if model.double else {"rtol": 2e-4, "atol": 2e-4}
    for row, u, g in zip(z, value, grad, strict=True):
        row = row.clone().requires_grad_()
        want = slow_potential(model, potential, row)
        slope = torch.autograd.grad(want, row, allow_unused=True)[0] if want.requires_grad else None
        slope = torch.zeros_like(row) if slope is None else slope
        assert want.isfinite()
        torch.testing.assert_close(u, want.detach().to(u), **tolerance)
        torch.testing.assert_close(g, slope, **tolerance)


INPUTS = {
    "potential_is_right": {
        "model": models(),
        "chains": st.integers(1, 3),
        "captured": st.integers(0, 3).map(lambda n: n == 3),
    }
}


@SIZES
def test_the_potential_is_the_log_joint_and_the_jacobians(many):
    holds(potential_is_right, many, few=20, thousands=2000, **INPUTS["potential_is_right"])
