"""Plots show what they are given: the numbers that matplotlib draws, not its pixels."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import UnnormalizedEnergy, datasets, plots


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def drawn(ax):
    """The picture on axes, as an array."""
    return np.ma.getdata(ax.images[-1].get_array())


def test_a_grid_has_the_midpoints_of_its_cells():
    x, cell = plots.grid((-1, 3, 0, 1), 4)
    assert x.shape == (4, 4, 2)
    assert cell == 0.25
    assert x[0, :, 0].tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert x[:, 0, 1].tolist() == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(ValueError, match="extent must be"):
        plots.grid((1, -1, 0, 1))


@pytest.mark.parametrize(
    "p",
    [
        dist.Normal(torch.tensor([1.0, -0.5]), 0.5).to_event(1),
        lambda x: 2 * (x - torch.tensor([1.0, -0.5])).square().sum(-1) + 7,
        UnnormalizedEnergy(
            lambda x: 2 * (x - torch.tensor([1.0, -0.5])).square().sum(-1), event_shape=(2,)
        ),
        UnnormalizedEnergy(
            lambda x: 2 * (x - torch.tensor([1.0, -0.5])).square().sum(-1),
            event_shape=(2,),
            log_normalizer=torch.tensor(3.0),  # wrong, as a learned one may be
        ),
    ],
    ids=["distribution", "function", "energy", "energy with log Z"],
)
def test_a_density_is_drawn_normalized(p):
    extent = (-3.0, 4.0, -4.0, 3.0)
    ax = plots.plot_density(p, extent=extent, num_points=50)
    x, _ = plots.grid(extent, 50)
    exact = dist.Normal(torch.tensor([1.0, -0.5]), 0.5).to_event(1).log_prob(x).exp()
    np.testing.assert_allclose(drawn(ax), exact, rtol=1e-3, atol=1e-6)
    assert ax.images[0].get_extent() == list(extent)
    assert ax.images[0].origin == "lower"


def test_a_density_is_drawn_on_given_axes_and_leaves_the_network_alone():
    net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5), nn.Flatten(0))
    _, axes = plt.subplots(1, 2)
    for ax in axes:
        assert plots.plot_density(net, ax, vmax=0.1) is ax
        assert ax.images[0].get_clim() == (0.0, 0.1)
    np.testing.assert_array_equal(*map(drawn, axes))  # without dropout
    assert net[1].training
    assert all(p.grad is None for p in net.parameters())


def test_densities_that_cannot_be_drawn():
    for wrong, match in [
        (dist.Normal(0.0, 1.0), "p must be one distribution of points"),
        (datasets.TwoMoons().expand((3,)), "p must be one distribution of points"),
        (lambda x: x, "p must give one number for each point"),
        (lambda x: x[:, 0].log(), "NaN at some points"),
        (3, "p must be a distribution or an energy"),
    ]:
        with pytest.raises(ValueError, match=match):
            plots.plot_density(wrong)


def test_samples_are_drawn_where_they_are():
    x = torch.randn(4, 5, 2, requires_grad=True)
    ax = plots.plot_samples(x, color="green")
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_xydata(), x.detach().reshape(20, 2))
    assert not ax.images
    assert line.get_color() == "green"
    ax = plots.plot_samples(x.detach().numpy(), datasets.TwoMoons(), extent=(-1, 1, -2, 2))
    assert ax.images[0].get_extent() == [-1, 1, -2, 2]
    assert ax.get_xlim() + ax.get_ylim() == (-1, 1, -2, 2)
    with pytest.raises(ValueError, match="x must be points"):
        plots.plot_samples(torch.randn(5, 3))


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 1, 3, 4), (5, 3, 3, 4)])
def test_images_are_in_rows(shape):
    x = torch.rand(shape)
    sheet = drawn(plots.plot_images(x, num_columns=2))
    assert sheet.shape[:2] == (13, 11)  # 3 rows of height 3 and 2 columns of width 4, with gaps
    opaque = sheet[..., 3] == 1 if len(shape) == 4 and shape[1] == 3 else np.isfinite(sheet)
    assert opaque.sum() == 5 * 12
    third = sheet[5:8, 1:5]  # the first of the second row
    x = x.reshape(5, -1, 3, 4).movedim(1, -1)[2].squeeze(-1)
    np.testing.assert_array_equal(third[..., :3] if x.dim() == 3 else third, x)


def test_images_of_other_shapes():
    for wrong in (torch.rand(3, 4), torch.rand(2, 2, 3, 4), torch.rand(0, 3, 4)):
        with pytest.raises(ValueError, match="images must have the shape"):
            plots.plot_images(wrong)
    assert len(drawn(plots.plot_images(torch.ones(2, 3, 3, dtype=torch.bool)))) == 5


def test_a_history_has_a_panel_for_each_number():
    loss = np.r_[np.linspace(3, 1, 200), np.nan]
    history = {
        "loss": loss,
        "accuracy": np.linspace(0, 1, 201),
        "metric": np.array([2.0, 1.0]),
        "metric_step": np.array([100.0, 200.0]),
    }
    axes = plots.plot_history(history)
    assert [ax.get_title() for ax in axes] == ["loss", "accuracy", "metric"]
    each, mean = (line.get_xydata() for line in axes[0].lines)
    np.testing.assert_array_equal(each, np.c_[np.arange(1, 201), loss[:200]])
    assert len(mean) == 197  # of four steps
    np.testing.assert_allclose(mean[0], [2, loss[:4].mean()])
    np.testing.assert_array_equal(axes[2].lines[0].get_xydata(), [[100, 2], [200, 1]])
    _, own = plt.subplots(1, 2)
    assert plots.plot_history(history, ["accuracy", "loss"], own)[1] is own[1]
    assert plots.plot_history(history, ["accuracy"], own[0])[0] is own[0]
    assert len(plots.plot_history({"loss": np.array([np.nan])})) == 1


def test_histories_that_cannot_be_drawn():
    history = {"loss": np.ones(3), "lr": np.ones(3)}
    with pytest.raises(ValueError, match=r"names must be of \['loss', 'lr'\], got \['los'\]"):
        plots.plot_history(history, ["los"])
    with pytest.raises(ValueError, match="names must be of"):
        plots.plot_history({})
    with pytest.raises(ValueError, match="2 names for 1 axes"):
        plots.plot_history(history, ax=plt.subplots()[1])


def test_plots_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-ebm\[plots\]'"):
        plots.plot_samples(torch.zeros(3, 2))
