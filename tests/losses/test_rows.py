"""An energy whose rows influence each other is refused by every loss, and wherever it is drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm import estimate_log_normalizer, fisher_divergence, mean_log_likelihood
from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    FlowNCE,
    RankingNCE,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_ebm.mcmc import MCMC, MHKernel

BASE = dist.Normal(torch.zeros(2), 2.0).to_event(1)
LOSSES = {
    "cd": lambda: ContrastiveDivergence(num_steps=2),
    "persistent cd": lambda: ContrastiveDivergence(persistent=True),
    "score matching": ScoreMatching,
    "hutchinson": lambda: ScoreMatching("hutchinson"),
    "sliced": SlicedScoreMatching,
    "denoising": lambda: DenoisingScoreMatching(0.1),
    "discrepancy": EnergyDiscrepancy,
    "nce": NCE,
    "ranking": RankingNCE,
    "flow": FlowNCE,
}


class Rows(nn.Module):
    """A network with a layer in the middle, which sees points as rows of one batch."""

    def __init__(self, *middle):
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 1)
        self.middle = nn.Sequential(*middle)

    def forward(self, x):
        h = self.middle(self.first(x.reshape(-1, 2)))
        return self.last(nn.functional.silu(h)).reshape(x.shape[:-1])


class Centered(nn.Module):
    def forward(self, h):
        return h - h.mean(0)


class Attention(nn.Module):
    def forward(self, h):
        return h + (h @ h.mT).softmax(-1) @ h


def trained(net, loss, steps=2, data=None):
    data = torch.randn(16, 2) * torch.tensor([1.0, 0.5]) if data is None else data

    def model(x):
        pyro.module("net", net)
        log_z = pyro.param("log_z", torch.tensor(0.0)) if loss.needs_noise else None
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, base=BASE, log_normalizer=log_z), obs=x)

    def guide(x):
        if loss.needs_noise:
            mean = pyro.param("mean", torch.zeros(2))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mean, 2.0).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), loss)
    for _ in range(steps):
        svi.step(data)
    return svi, data


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layer", [Centered, Attention])
def test_every_loss_refuses_rows_that_interact(name, layer):
    with pytest.raises(ValueError, match=r"'x' \(Rows\) depends on the other rows of its batch"):
        trained(Rows(layer()), LOSSES[name]())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_names_batch_norm_and_the_way_out(name):
    net = Rows(nn.BatchNorm1d(8))
    message = r"'middle.0' \(BatchNorm1d\) of Rows normalises over the batch.*net.eval\(\).*Layer"
    with pytest.raises(ValueError, match=message):
        trained(net, LOSSES[name]())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "net",
    [
        lambda: Rows(nn.BatchNorm1d(8)).eval(),
        lambda: Rows(nn.LayerNorm(8)),
        lambda: Rows(nn.GroupNorm(2, 8)),
        lambda: Rows(nn.Dropout(0.5)),
    ],
)
def test_every_way_out_trains(name, net):
    trained(net(), LOSSES[name]())


def test_batch_norm_in_evaluation_mode_fits():
    pyro.set_rng_seed(1)
    net = Rows(nn.BatchNorm1d(8)).eval()
    svi, data = trained(net, ContrastiveDivergence(num_steps=10), steps=0)
    data = torch.randn(512, 2) * torch.tensor([1.0, 0.5])
    for _ in range(250):
        svi.step(data[torch.randint(512, (128,))])
    grid = torch.cartesian_prod(*[torch.linspace(-6.0, 6.0, 121)] * 2)
    p = UnnormalizedEnergy(net, base=BASE).log_prob(grid).detach().softmax(0)
    sd = (p[:, None] * grid.square()).sum(0).sqrt()
    # with batches that normalise themselves: 3.2 and 2.8
    assert (sd - torch.tensor([1.0, 0.5])).abs().max() < 0.35


def test_batch_norm_without_averages_has_no_evaluation_mode():
    net = Rows(nn.BatchNorm1d(8, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="Instead use LayerNorm or GroupNorm"):
        trained(net, ContrastiveDivergence())


def test_a_mode_that_changes_is_noticed_at_once():
    net, loss = Rows(nn.BatchNorm1d(8)).eval(), ScoreMatching()
    svi, data = trained(net, loss, steps=3)
    net.train()
    with pytest.raises(ValueError, match="normalises over the batch"):
        svi.step(data)
    with pytest.raises(ValueError, match="normalises over the batch"):
        ScoreMatching().loss(svi.model, svi.guide, data)


def test_an_influence_that_training_brings_is_noticed():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, h):
            return h + self.gate * h.mean(0)

    with pytest.raises(ValueError, match="depends on the other rows"):
        trained(Rows(Gated()), ScoreMatching(), steps=10)


def test_the_look_leaves_training_as_it_was(monkeypatch):
    values = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr("pyro_ebm.losses.base.check_rows", lambda *args, **kwargs: None)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = Rows(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Dropout(0.2))
        trained(net, ContrastiveDivergence(num_steps=2), steps=12)
        values.append({name: value.clone() for name, value in net.state_dict().items()})
    assert values[0].keys() == values[1].keys()
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name]), name


def test_rows_with_data_of_their_own():
    y = torch.randn(16)

    def model(x):
        w = pyro.param("w", torch.tensor(1.0))
        p = UnnormalizedEnergy(lambda x: w * (x - y).square(), batch_shape=(16,))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    ContrastiveDivergence().loss_and_grads(model, lambda x: None, torch.randn(16))


def test_with_a_torch_optimiser():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, base=BASE), obs=x)

    net = Rows(nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match="normalises over the batch"):
        ContrastiveDivergence()(model, lambda x: None)(torch.randn(16, 2))


def coupled(x):
    return (x - x.mean(0)).square().sum(-1)


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.sample((10,)),
        lambda p: p.sample_with_diagnostics((10,)),
        lambda p: estimate_log_normalizer(p, "ais", num_chains=10, disable_progbar=True),
        lambda p: estimate_log_normalizer(p, "importance", num_samples=10),
        lambda p: estimate_log_normalizer(p, "bridge", num_samples=10),
        lambda p: estimate_log_normalizer(p, "quadrature"),
        lambda p: mean_log_likelihood(p, torch.randn(10, 2), 1.0),
        lambda p: fisher_divergence(BASE, p, torch.randn(10, 2)),
        lambda p: fisher_divergence(lambda x: -coupled(x), BASE, torch.randn(10, 2)),
    ],
)
def test_wherever_a_batch_is_evaluated(use):
    with pytest.raises(ValueError, match="depends on the other rows"):
        use(UnnormalizedEnergy(coupled, base=BASE))


def test_chains_of_bits():
    def energy(x):
        return (x - x.mean(0)).square().sum(-1)

    p = UnnormalizedEnergy(energy, (4,), support=dist.constraints.boolean)
    with pytest.raises(ValueError, match="depends on the other rows"):
        p.sample((10,))
    with pytest.raises(ValueError, match="depends on the other rows"):
        estimate_log_normalizer(p, "exact")


def test_dropout_and_batch_norm_are_held_in_evaluation_mode_where_chains_run():
    net = Rows(nn.BatchNorm1d(8), nn.Dropout(0.5))
    p = UnnormalizedEnergy(net, base=BASE)
    assert p.sample((10,)).shape == (10, 2)
    estimate_log_normalizer(p, "importance", num_samples=1000)
    assert net.training


def test_chains_of_a_model_are_each_their_own():
    p = UnnormalizedEnergy(lambda x: x.square().sum(-1) + x.mean().square(), (2,))
    mcmc = MCMC(MHKernel(lambda: pyro.sample("x", p)), 10, 10, num_chains=4, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (40, 2)
