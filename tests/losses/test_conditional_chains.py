"""Persistent chains of conditional energies: a pool for each class, or for each row."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_ebm import fit
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import ContrastiveDivergence
from pyro_ebm.mcmc import LangevinKernel
from tests.statistics import assert_mean_of_rows

STILL = LangevinKernel(adjusted=False, step_size=1e-12)
PRECISION = 1.5


def no_guide(*args):
    pass


def model(x, group, c=0.0, size=None, mask=True, **kwargs):
    """E(x | c) = lam (x - w c)^2 / 2 in each row, and the groups of the rows."""
    w = pyro.param("w", torch.tensor(1.7, dtype=x.dtype))
    lam = pyro.param("lam", torch.tensor(PRECISION, dtype=x.dtype))
    pyro.deterministic("group", group)
    with pyro.plate("data", size or len(x), subsample_size=len(x)):
        p = UnnormalizedEnergy(lambda x: lam * (x - w * c) ** 2 / 2, **kwargs)
        pyro.sample("x", p.mask(mask), obs=x)


def by_group(kernel=STILL, **settings):
    return ContrastiveDivergence(kernel, persistent=True, chains_by="group", **settings)


def step(loss, *args, model=model):
    loss.loss_and_grads(model, no_guide, *args)


# -- where the chains are ------------------------------------------------------------------------


def test_a_row_goes_on_with_its_own_chain():
    loss, x = by_group(), torch.zeros(3)
    step(loss, x, torch.tensor([0, 4, 2]))
    first = loss.chains["x"].clone()
    assert first.shape == (5, 1)
    assert loss.negatives.started["x"].flatten().tolist() == [True, False, True, False, True]
    loss.negatives.run, run = None, loss.negatives.run
    starts = []
    loss.negatives.run = lambda *args: starts.append(args[2]) or run(*args)
    step(loss, x, torch.tensor([4, 1, 0]))
    assert torch.equal(starts[0][0::2], first[[4, 0], 0])
    torch.testing.assert_close(loss.chains["x"][[0, 2, 4]], first[[0, 2, 4]])  # they stand still
    assert loss.diagnostics["restarted"] == pytest.approx(1 / 3)
    step(loss, x[:2], torch.tensor([7, 0]))
    assert loss.chains["x"].shape == (8, 1)  # as many as the largest index needs


def test_rows_of_a_class_take_different_chains():
    loss = by_group()
    step(loss, torch.zeros(5), torch.tensor([0, 1, 0, 0, 1]))
    assert loss.chains["x"].shape == (2, 3)  # three rows of the most frequent class
    assert loss.negatives.started["x"].sum(1).tolist() == [3, 2]
    assert len(loss.chains["x"].unique()) == 6  # five that started, and the one at 0
    step(loss, torch.zeros(4), torch.ones(4, dtype=torch.long))
    assert loss.negatives.started["x"].sum(1).tolist() == [3, 4]


def test_all_chains_of_a_pool_have_their_turn():
    loss = by_group(num_chains=20)
    for _ in range(300):
        step(loss, torch.zeros(3), torch.tensor([0, 0, 2]))
    assert loss.chains["x"].shape == (3, 20)
    assert loss.negatives.started["x"].sum(1).tolist() == [20, 0, 20]


def test_classes_keep_apart():
    group = torch.tensor([0, 1] * 30)
    loss = by_group(LangevinKernel(step_size=0.3, adapt_step_size=False), num_steps=5)
    for _ in range(30):
        step(loss, torch.zeros(60), group, 20.0 * group)
    centres = loss.chains["x"].mean(1)
    torch.testing.assert_close(centres, torch.tensor([0.0, 34.0]), rtol=0, atol=4.5 / 45**0.5)


def test_restarts_and_augmentation():
    far = dist.Normal(50.0, 0.1)
    loss = by_group(restart_prob=0.25, augmentation=lambda x: x + 1)
    group = torch.arange(2000)
    step(loss, torch.zeros(2000), group)  # chains near 0
    loss.negatives.chains["x"] = torch.zeros(2000, 1)
    loss.loss_and_grads(
        lambda *args: model(*args, base=far), no_guide, torch.full((2000,), 50.0), group
    )
    again = (loss.chains["x"] - 50).abs() < 1
    assert loss.diagnostics["restarted"] == pytest.approx(again.double().mean().item())
    assert (again.double().mean() - 0.25).abs() < 4.5 * (0.25 * 0.75 / 2000) ** 0.5
    torch.testing.assert_close(loss.chains["x"][~again], torch.ones(int((~again).sum())))


def test_rows_masked_out_leave_the_chains():
    def masked(x, group, mask):
        model(x, group, mask=mask)

    loss = by_group()
    step(loss, torch.zeros(4), torch.tensor([0, 1, 2, 3]))
    first, mask = loss.chains["x"].clone(), torch.tensor([True, False, True, False])
    loss.negatives.kernel = LangevinKernel(adjusted=False, step_size=0.1)
    step(loss, torch.zeros(4), torch.tensor([0, -1, 2, 99]), mask, model=masked)
    assert ((loss.chains["x"] != first).flatten() == mask).all()
    step(loss, torch.zeros(4), torch.tensor([0, 1, 2, 3]), ~mask & mask, model=masked)


# -- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_of_a_group", [1, 50])
def test_chains_at_equilibrium_give_the_likelihood_s_gradient(rows_of_a_group):
    # from draws of p(x | c), which an exact kernel keeps as such:
    # d log p / d w = lam c (x - w c) and d log p / d lam = 1 / 2 lam - (x - w c)^2 / 2
    n, found = 2000, []
    c = torch.randn(n // rows_of_a_group).double().repeat_interleave(rows_of_a_group)
    group = torch.arange(n) // rows_of_a_group
    x = 1.2 * c + 0.5 * torch.randn(n).double()
    apart = x - 1.7 * c
    want = torch.stack(
        [PRECISION * (c * apart).mean(), (1 / PRECISION - apart.square().mean()) / 2]
    )
    kernel = LangevinKernel(step_size=0.4, adapt_step_size=False)
    for _ in range(40):
        pyro.clear_param_store()
        loss = by_group(kernel)
        noise = torch.randn(n).double() / math.sqrt(PRECISION)
        loss.chains["x"] = (1.7 * c + noise).reshape(-1, rows_of_a_group)
        loss.negatives.started["x"] = torch.ones_like(loss.chains["x"], dtype=torch.bool)
        step(loss, x, group, c)
        found.append(-torch.stack([pyro.param(name).grad / n for name in ("w", "lam")]))
    assert_mean_of_rows(torch.stack(found), want)


def test_a_conditional_fit_by_persistent_chains_of_each_row():
    n = 500
    c = torch.randn(n)
    x = 1.2 * c + 0.5 * torch.randn(n)
    loss = by_group(LangevinKernel(), num_steps=3, restart_prob=0.02)
    fit(
        lambda *args: model(*args, size=n),
        no_guide,
        loss,
        (x, torch.arange(n), c),
        num_steps=300,
        batch_size=100,
        lr=0.1,
        disable_progbar=True,
    )
    w = (c * x).sum() / c.square().sum()
    precision = 1 / (x - w * c).square().mean()
    assert (pyro.param("w") - w).abs() < 0.15  # the noise of a hundred negatives, at the end
    assert (pyro.param("lam") / precision - 1).abs() < 0.3
    assert loss.chains["x"].shape == (n, 1)


def test_it_goes_on_exactly_after_loading():
    group, x = torch.tensor([0, 2, 2, 1]), torch.randn(4)

    def fresh():
        pyro.clear_param_store()
        loss = by_group(LangevinKernel(), restart_prob=0.1)
        return loss, SVI(model, no_guide, Adam({"lr": 1e-8}), loss)

    loss, svi = fresh()
    svi.step(x, group)
    saved = copy.deepcopy(loss.state_dict())
    evaluated = copy.deepcopy(loss.state_dict())
    svi.evaluate_loss(x, group)
    assert str(loss.state_dict()) == str(evaluated)
    torch.manual_seed(5)
    svi.step(x, group.flip(0))
    again, svi = fresh()
    again.load_state_dict(saved)
    torch.manual_seed(5)
    svi.step(x, group.flip(0))
    torch.testing.assert_close(again.chains["x"], loss.chains["x"])
    assert torch.equal(again.negatives.started["x"], loss.negatives.started["x"])


# -- refusals ------------------------------------------------------------------------------------


def test_without_groups_the_way_out_is_named():
    loss = ContrastiveDivergence(persistent=True)
    with pytest.raises(ValueError, match=r"'x' is conditional.*Name by chains_by= a site"):
        step(loss, torch.randn(4), torch.arange(4), torch.randn(4))


def test_rows_of_one_group_with_different_densities():
    group, c = torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="its rows of one group of chains_by have different"):
        step(by_group(), torch.randn(4), group, c)
    step(by_group(), torch.randn(4), group, c.clamp(max=1.0))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (torch.tensor([0, 1, -1]), "site 'group' of chains_by must hold an integer >= 0"),
        (torch.tensor([0, 1, 1.5]), "site 'group' of chains_by must hold an integer >= 0"),
        (torch.tensor([0, 1]), r"shape \(2,\), the rows of site 'x' have \(3,\)"),
        (torch.tensor([0, 0, 0]), "3 rows, or chains, of one group .* num_chains is 2: give more"),
    ],
)
def test_groups_that_are_none(group, message):
    with pytest.raises(ValueError, match=message):
        step(by_group(num_chains=2), torch.randn(3), group)


def test_the_site_must_be_there():
    loss = ContrastiveDivergence(persistent=True, chains_by="label")
    with pytest.raises(ValueError, match=r"chains_by='label', and the model has no site"):
        step(loss, torch.randn(3), torch.arange(3))


def test_settings():
    with pytest.raises(ValueError, match=r"chains_by are settings of the buffer.*persistent=True"):
        ContrastiveDivergence(chains_by="group")
    with pytest.raises(ValueError, match="chains_by must be the name of a site, got 3"):
        ContrastiveDivergence(persistent=True, chains_by=3)
    assert "persistent=True, chains_by='group'" in repr(by_group())


def test_masked_rows_belong_to_no_group():
    group, mask = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, True, True, True, False])
    loss = by_group()
    step(loss, torch.zeros(5), group, 3.0 * group, 5, mask)
    step(by_group(), torch.zeros(5), group, 3.0 * group, 5, torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="of one group of chains_by have different densities"):
        step(by_group(), torch.zeros(5), group, torch.arange(5.0), 5, mask)


def test_no_chain_is_augmented_before_it_starts():
    sizes = []
    loss = by_group(augmentation=lambda x: sizes.append(len(x)) or x.double())
    for _ in range(4):
        step(loss, torch.zeros(3), torch.tensor([0, 1, 1]))
    assert sizes
    assert min(sizes) > 0


def test_chains_of_groups_and_of_one_density_are_not_mistaken():
    loss = by_group()
    step(loss, torch.zeros(3), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="are of groups, and this loss has chains_by=None"):
        ContrastiveDivergence(persistent=True).load_state_dict(loss.state_dict())
