"""Two ranks with a shard of the data each train as one process with all of them does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import (
    ContrastiveDivergence,
    EnergyLoss,
    FlowNCE,
    ScoreMatching,
)
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.ops.distributed import rank, rank_seed, world_size
from tests.losses.test_loss_contract import LOSSES, MaximumLikelihood, World, data
from tests.ranks import Ranks

N = 12  # data in all
CHAINS = 18  # persistent chains in all, shared out as the data are
SHARDS = {"equal": (0, 6, 12), "unequal": (0, 4, 12)}
MORE = {
    **LOSSES,
    "pcd": lambda num_chains: ContrastiveDivergence(
        persistent=True, num_chains=num_chains, restart_prob=0.2, num_steps=2
    ),
    "flow-nce-turns": lambda: FlowNCE(threshold=0.5, smoothing=0.0),  # turns change all the time
    "flow-nce-every": lambda: FlowNCE(alternate=1),
}
del MORE["pcd-kl"]  # the neighbours of a chain are those on its rank


def every_loss():
    """One of the table for each loss that the package exports, or the test below fails."""
    return {name: make(CHAINS) if name == "pcd" else make() for name, make in MORE.items()}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


class Noise(TorchFunctionMode):
    """Random numbers that depend on the row: a shard's are a part of those of all the data.

    A draw is taken for all rows, from a seed that counts the draws, and cut along the dimension
    whose size is that of the rows (or chains) here.
    """

    def __init__(self, cuts):
        super().__init__()
        self.cuts, self.count = cuts, 0  # {rows here: (rows in all, the first of them)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in DRAWS:
            return out
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        shape = [self.cuts[n][0] if n in self.cuts else n for n in out.shape]
        full = torch.zeros(shape, dtype=torch.float64)
        if func in UNIFORM:
            full.uniform_(*(args[1:] if func is torch.Tensor.uniform_ else ()), generator=generator)
        elif func is torch.randint:
            full.random_(0, args[0], generator=generator)
        else:
            full.normal_(generator=generator)
        for dim, n in enumerate(out.shape):
            if n in self.cuts:
                full = full.narrow(dim, self.cuts[n][1], n)
        if func is torch.bernoulli:
            full = (full < args[0]).to(full)
        if func is torch.normal:
            full = args[0] + args[1] * full
        with torch.no_grad():
            return out.copy_(full)


UNIFORM = {torch.rand, torch.rand_like, torch.Tensor.uniform_, torch.bernoulli}
DRAWS = UNIFORM | {
    torch.randn,
    torch.randn_like,
    torch.normal,
    torch.randint,
    torch.Tensor.normal_,
}


def noise_of(edges):
    """For this rank, or for one process."""
    if world_size() == 1:
        return Noise({N: (N, 0), CHAINS: (CHAINS, 0)})
    first, end = edges[rank()], edges[rank() + 1]
    chains = CHAINS * first // N, CHAINS * end // N
    return Noise({end - first: (N, first), chains[1] - chains[0]: (CHAINS, chains[0])})


class Shard(World):
    """A model of the rows of a shard, in a plate that stands for all the data."""

    def __init__(self, loss, spectral=False):
        super().__init__(loss, dtype=torch.float64)
        if spectral:
            self.nets["x"] = MLPEnergy(2, hidden=(8,), spectral_norm=True).double()

    def plate(self, x):
        return pyro.plate("data", world_size() * len(x), subsample=torch.arange(len(x)))

    def model(self, x):
        with self.plate(x):
            pyro.sample("x", self.energy(), obs=x)

    def guide(self, x):
        if self.needs_noise:
            with self.plate(x):
                pyro.sample("x", self.noise_of())


def points():
    return data(N, torch.float64)


def train(name, edges=(0, N), num_steps=5, spectral=False):
    """Parameters after a few steps with momentum, and the diagnostics at each."""
    pyro.clear_param_store()
    x = points()[edges[rank()] : edges[rank() + 1]]
    loss = MORE[name](CHAINS * len(x) // N) if name == "pcd" else MORE[name]()
    world = Shard(loss, spectral)
    module = loss(world.model, world.guide).initialize(x)
    trained = module
    if world_size() > 1:
        trained = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.5, weight_decay=0.1)
    told = []
    with noise_of(edges):
        for _ in range(num_steps):
            optimizer.zero_grad()
            turn = getattr(loss, "turn", None)
            trained(x).backward()
            optimizer.step()
            told.append((turn, loss.diagnostics))
    return {k: v.detach().clone() for k, v in module.state_dict().items()}, told, loss.state_dict()


def test_every_exported_loss_is_here():
    import pyro_ebm.losses

    exported = {getattr(pyro_ebm.losses, name) for name in pyro_ebm.losses.__all__}
    family = {c for c in exported if isinstance(c, type) and issubclass(c, EnergyLoss)}
    assert family - {EnergyLoss} == {type(loss) for loss in every_loss().values()} - {
        MaximumLikelihood
    }


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", MORE)
def test_two_ranks_train_as_one_process_does(ranks, name, shards):
    (first, told, _), (second, *_) = ranks(train, name, SHARDS[shards])
    one, alone, _ = train(name)
    start, *_ = train(name, num_steps=0)
    assert first.keys() == one.keys()
    moved = 0
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-12)
        moved += not torch.equal(start[key], value)
    assert moved >= len(one) - 2
    assert [turn for turn, _ in told] == [turn for turn, _ in alone]
    for key in ("step_size", "acceptance_rate", "log_normalizer"):
        if key in alone[-1][1]:
            assert told[-1][1][key] == pytest.approx(alone[-1][1][key], rel=1e-6)


def test_turns_are_taken_in_these_tests():
    assert {turn for turn, _ in train("flow-nce-turns")[1]} == {"energy", "flow"}


def test_persistent_chains_are_each_ranks_own(ranks):
    first, second = ranks(chains)
    assert first.shape == second.shape == (7, 2)
    assert (first != second).all()


def chains():
    loss = LOSSES["pcd"]()
    world = Shard(loss)
    pyro.set_rng_seed(rank_seed(0))
    module = loss(world.model, world.guide).initialize(points())
    trained = DistributedDataParallel(module, find_unused_parameters=True)
    trained(points()).backward()
    return loss.chains["x"]


@pytest.mark.parametrize("name", ["pcd", "nce-init", "flow-nce-turns"])
def test_spectral_norms_agree_on_all_ranks(ranks, name):
    first, second = (state for state, *_ in ranks(train, name, (0, 6, 12), 5, True))
    buffers = [key for key in first if key.endswith("._u")]
    assert len(buffers) == 2
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = train(name, num_steps=0, spectral=True)[0]
    assert all(not torch.equal(first[key], start[key]) for key in buffers[:1])


def test_a_global_latent_counts_once(ranks):
    first, second = ranks(with_a_latent, SHARDS["unequal"])
    assert first == second
    # with the KL of q(z) and p(z), whose gradient is 1 in each element of its mean
    assert first == pytest.approx(with_a_latent((0, N)), rel=1e-9)


def with_a_latent(edges):
    """The gradient in the guide's parameters and the network's."""
    x = points()[edges[rank()] : edges[rank() + 1]]
    pyro.clear_param_store()
    torch.manual_seed(1)
    net = MLPEnergy(2, hidden=(8,)).double()

    def model(x):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", world_size() * len(x), subsample=torch.arange(len(x))):
            pyro.sample("x", UnnormalizedEnergy(lambda x: net(x - z), (2,)), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.ones(2, dtype=x.dtype))
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    module = ContrastiveDivergence()(model, guide).initialize(x)
    trained = DistributedDataParallel(module) if world_size() > 1 else module
    with noise_of(edges):
        trained(x).backward()
    grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    assert len(grads) == 5, len(grads)
    return torch.cat(grads).tolist()


def test_minibatches_are_unbiased(ranks):
    """Over all pairs of minibatches of two shards of other sizes, the mean is the gradient."""
    (mean, _), _ = ranks(over_minibatches)
    one, _ = over_minibatches()
    torch.testing.assert_close(mean, one, rtol=1e-9, atol=1e-12)


def over_minibatches():
    pyro.clear_param_store()
    edges = (0, 4, 12) if world_size() > 1 else (0, N)
    x = points()[edges[rank()] : edges[rank() + 1]]
    torch.manual_seed(1)
    net = MLPEnergy(2, hidden=(8,)).double()

    def model(batch):
        with pyro.plate("data", world_size() * len(x), subsample_size=len(batch)):
            pyro.sample("x", UnnormalizedEnergy(net, (2,)), obs=batch)

    module = ScoreMatching()(model, lambda batch: None).initialize(x)
    trained = module
    if world_size() > 1:
        trained = DistributedDataParallel(module, find_unused_parameters=True)
    grads = []
    for first in range(0, 8, 2):  # 2 of 8, or 2 of 4 twice: each row as often as any of its shard
        rows = x if world_size() == 1 else x[torch.arange(first, first + 2) % len(x)]
        module.zero_grad()
        trained(rows).backward()
        flat = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        grads.append(torch.cat(flat))
    return torch.stack(grads).mean(0), len(grads)
