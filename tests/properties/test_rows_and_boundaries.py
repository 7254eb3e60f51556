"""Random energies with and without influence between rows, random points on and off boundaries."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import strategies as st
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from pyro_ebm import UnnormalizedEnergy, losses
from pyro_ebm.distributions.checks.boundary import check_inside
from pyro_ebm.ops.rows import rows_interact
from tests.properties.inputs import SIZES, holds

EACH_ROW = {
    "none": nn.Identity,
    "layer norm": lambda: nn.LayerNorm(4),
    "dropout": lambda: nn.Dropout(0.5),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "batch norm in evaluation mode": lambda: nn.BatchNorm1d(4).eval(),
}


class OverRows(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


COUPLED = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "centered": lambda: OverRows(lambda h: h - h.mean(0)),
    "attention": lambda: OverRows(lambda h: h + (h @ h.mT).softmax(-1) @ h),
    "softmax": lambda: OverRows(lambda h: h.softmax(0)),
    "deviation": lambda: OverRows(lambda h: torch.cat([h[:, 1:], h.std(0).expand(len(h), 4)], 1)),
}
LOSSES = {
    "cd": losses.ContrastiveDivergence,
    "score": losses.ScoreMatching,
    "sliced": losses.SlicedScoreMatching,
    "denoising": losses.DenoisingScoreMatching,
    "discrepancy": losses.EnergyDiscrepancy,
    "nce": losses.NCE,
    "ranking": losses.RankingNCE,
    "flow": losses.FlowNCE,
}


def network(layer, event, seed):
    torch.manual_seed(seed)
    size = torch.Size(event).numel()

    def energy(x):
        h = layer(first(x.reshape(-1, size)))
        return last(nn.functional.silu(h)[:, :4]).reshape(x.shape[: x.dim() - len(event)])

    layer, first, last = layer(), nn.Linear(size, 4), nn.Linear(4, 1)
    return energy


def rows_are_told_apart(layer, loss, event, rows, double, seed):
    dtype = torch.float64 if double else torch.float32
    layers = EACH_ROW | COUPLED
    torch.set_default_dtype(dtype)
    energy, loss = network(layers[layer], event, seed), LOSSES[loss]()
    x, dims = torch.randn(rows, *event), len(event)
    assert rows_interact(energy, x, dims, seed=seed) == (layer in COUPLED)

    def model():
        log_z = nn.Parameter(torch.zeros(()))
        with pyro.plate("data", rows):
            pyro.sample("x", UnnormalizedEnergy(energy, event, log_normalizer=log_z), obs=x)

    def guide():
        if loss.needs_noise:
            with pyro.plate("data", rows):
                pyro.sample("x", dist.Normal(torch.zeros(event), 2.0).to_event(dims))

    if layer in COUPLED:
        with pytest.raises(ValueError, match="other rows of its batch"):
            loss(model, guide)()
    else:
        assert loss(model, guide)().isfinite()


SUPPORTS = {
    "unit": (constraints.unit_interval, (), 0.0),
    "upper end": (constraints.unit_interval, (), 1.0),
    "interval": (constraints.interval(-2.0, 5.0), (), 5.0),
    "far interval": (constraints.interval(100.0, 101.0), (), 100.0),
    "half-line": (constraints.nonnegative, (), 0.0),
    "below": (constraints.less_than(3.0), (), 3.0),
    "simplex": (constraints.simplex, (3,), torch.tensor([0.5, 0.5, 0.0])),
    "factor": (constraints.corr_cholesky, (2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])),
    "ordered": (constraints.ordered_vector, (2,), torch.tensor([1.0, 1.0])),
}


def points_are_told_apart(name, event, rows, share, double, seed):
    support, own, end = SUPPORTS[name]
    dtype = torch.float64 if double else torch.float32
    bijection = biject_to(support)
    shape = bijection.inverse_shape(torch.Size((rows, *event, *own)))
    x = bijection(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))
    whole = constraints.independent(support, len(event)) if event else support
    check_inside(whole, x, "the points")
    x[: max(int(share * rows), 1)] = torch.as_tensor(end, dtype=dtype)
    with pytest.raises(ValueError, match="of the points lie on the boundary of the support"):
        check_inside(whole, x, "the points")


INPUTS = {
    "rows_are_told_apart": {
        "layer": st.sampled_from([*EACH_ROW, *COUPLED]),
        "loss": st.sampled_from([*LOSSES]),
        "event": st.sampled_from([(1,), (2,), (2, 3)]),
        "rows": st.integers(4, 20),
        "double": st.booleans(),
        "seed": st.integers(0, 1000),
    },
    "points_are_told_apart": {
        "name": st.sampled_from([*SUPPORTS]),
        "event": st.sampled_from([(), (2,), (2, 3)]),
        "rows": st.integers(1, 50),
        "share": st.sampled_from([0.02, 0.5, 1.0]),
        "double": st.booleans(),
        "seed": st.integers(0, 1000),
    },
}


@SIZES
def test_rows_that_influence_each_other_are_told_from_others(many):
    holds(rows_are_told_apart, many, few=60, thousands=3000, **INPUTS["rows_are_told_apart"])


@SIZES
def test_points_on_a_boundary_are_told_from_others(many):
    holds(points_are_told_apart, many, few=100, thousands=5000, **INPUTS["points_are_told_apart"])
