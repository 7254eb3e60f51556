"""``loss(model, guide)`` inside DistributedDataParallel: what it holds, refuses and warns of."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.losses import NCE, ContrastiveDivergence, FlowNCE, ScoreMatching
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.ops.distributed import gathered, pooled_mean, rank, rank_seed
from tests.losses.test_distributed import MORE, Shard, points
from tests.losses.test_loss_contract import LOSSES, World
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


def test_ranks_that_draw_alike_are_warned_of(ranks):
    (alike, _), (same, _) = ranks(warnings_of, 0, "cd")
    assert alike == same
    assert "ranks [0, 1] draw the same random numbers" in alike[0]
    assert "pyro.set_rng_seed(rank_seed(0))" in alike[0]
    # not where each has a seed of its own, nor where nothing is drawn
    assert ranks(warnings_of, None, "cd") == [([], 2)] * 2
    assert ranks(warnings_of, 0, "sm") == [([], 2)] * 2


def warnings_of(seed, name):
    loss = LOSSES[name]()
    world = Shard(loss)
    x = points()[6 * rank() : 6 * rank() + 6]
    module = loss(world.model, world.guide).initialize(x)
    trained = DistributedDataParallel(module, find_unused_parameters=True)
    pyro.set_rng_seed(rank_seed(0) if seed is None else seed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            trained(x).backward()
    return [str(w.message) for w in told if "random numbers" in str(w.message)], loss.steps_taken


def test_a_parameter_that_nobody_averages_is_an_error(ranks):
    for form in ("function", "hidden", "later"):
        for told in ranks(error_of, form):
            assert "each rank would train its own" in told
            assert "initialize(*args)" in told
    assert "('log_z')" in ranks(error_of, "later")[0]


def error_of(form):
    """What is said of a model with a network or a parameter that the module does not hold."""
    net, inner = MLPEnergy(2, (4,)), MLPEnergy(2, (4,))
    made = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            def energy(x):
                total = self.net(x)
                if form == "hidden":
                    total = total + HIDDEN[0](x)
                if made:
                    total = total + pyro.param("log_z", torch.tensor(0.0)) * x.sum(-1)
                return total

            with pyro.plate("data", len(x)):
                pyro.sample("x", UnnormalizedEnergy(energy, (2,)), obs=x)

    model = Model()
    if form == "function":
        module = ContrastiveDivergence()(model.forward, lambda x: None)
        module.another = inner  # so that there is something to wrap
    else:
        module = ContrastiveDivergence()(model, lambda x: None).initialize(points().float())
    HIDDEN[:] = [MLPEnergy(2, (4,))]
    trained = DistributedDataParallel(module, find_unused_parameters=True)
    try:
        if form == "later":
            trained(points().float()).backward()
            made.append(True)
        trained(points().float())
    except ValueError as error:
        return str(error)
    return "nothing"


HIDDEN = []


def test_what_gets_no_gradient_is_an_error_without_the_flag(ranks):
    for told in ranks(without_the_flag, "sm"):
        assert told.startswith("ScoreMatching gives no gradient to ['networks.net_x.layers.2.bias'")
        assert "find_unused_parameters=True" in told
    assert all("params.noise_x" in told for told in ranks(without_the_flag, "flow-nce-every"))
    assert ranks(without_the_flag, "flow-nce-both") == ["nothing"] * 2


def without_the_flag(name):
    loss = MORE[name]()
    world = Shard(loss)
    module = loss(world.model, world.guide).initialize(points())
    trained = DistributedDataParallel(module)
    try:
        for _ in range(2):
            trained(points()).backward()
    except ValueError as error:
        return str(error)
    return "nothing"


def test_who_rests_keeps_still_whatever_the_optimiser_remembers(ranks):
    for moved in ranks(who_moves):
        assert [moved[k] for k in range(4)] == [{"energy"}, {"flow"}, {"energy"}, {"flow"}]


def who_moves():
    loss = FlowNCE(alternate=1)
    world = Shard(loss)
    module = loss(world.model, world.guide).initialize(points())
    trained = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    moved = []
    for _ in range(4):
        before = {k: v.clone() for k, v in module.state_dict().items()}
        optimizer.zero_grad()
        trained(points()).backward()
        optimizer.step()
        names = [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]
        moved.append({"flow" if "noise" in name else "energy" for name in names})
    return moved


def test_evaluation_asks_nothing_of_the_others(ranks):
    (first, rate), (second, other_rate) = ranks(evaluate_alone)
    assert first == pytest.approx(second)
    assert rate == other_rate  # else a question of the one was answered by another's question
    assert 0.3 < rate <= 1


def evaluate_alone():
    """Rank 0 evaluates and the other does not; then both train."""
    loss = ContrastiveDivergence(num_steps=10)
    world = Shard(loss)
    module = loss(world.model, world.guide).initialize(points())
    trained = DistributedDataParallel(module, find_unused_parameters=True)
    with torch.no_grad():
        if rank() == 0:
            assert module(points()).isfinite()
            trained(points())
    trained(points()).backward()
    grads = [float(p.grad.sum()) for p in module.parameters() if p.grad is not None]
    return grads, loss.diagnostics["acceptance_rate"]


def test_the_module_outside_a_group_is_as_it_was():
    loss = ContrastiveDivergence()
    world = World(loss, register=False)
    module = loss(world.model, world.guide)
    module(x=points().float()).backward()
    assert list(module.parameters()) == []
    assert all(p.grad is not None for p in world.nets["x"].parameters())


def test_initialize_takes_in_networks_and_parameters_once():
    loss = NCE()
    world = World(loss)
    module = loss(world.model, world.guide).initialize(x=points().float())
    names = [name for name, _ in module.named_parameters()]
    assert set(names[-2:]) == {"params.log_z_x", "params.noise_x"}
    assert names[0] == "networks.net_x.layers.0.weight"
    assert len(names) == 6
    assert [name for name, _ in module.initialize(x=points().float()).named_parameters()] == names
    assert pyro.param("log_z_x").unconstrained() is module.params["log_z_x"]


def test_initialize_keeps_constraints():
    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: (x / scale) ** 2 / 2), obs=x)

    module = ScoreMatching()(model, lambda x: None).initialize(torch.randn(5))
    assert pyro.param("scale").item() == pytest.approx(2.0)
    module(torch.randn(5)).backward()
    (parameter,) = module.parameters()
    assert parameter.item() == pytest.approx(0.6931, abs=1e-4)
    assert parameter.grad is not None


def test_means_are_pooled_by_weight(ranks):
    for value in ranks(pool):
        assert value.tolist() == [pytest.approx(1.75), 0.0]
    assert ranks(pool, True)[0].isnan().tolist() == [False, True]


def pool(empty=False):
    if empty:
        return pooled_mean(torch.tensor([1.0, float("nan")]), torch.tensor([1, 0]))
    weight = torch.tensor([1, 1 - rank()]) + torch.tensor([2 * rank(), 0])
    value = torch.tensor([1.0 + rank(), 0.0 if rank() == 0 else float("nan")])
    return pooled_mean(value, weight)


def test_values_are_gathered_in_order(ranks):
    for value in ranks(gather_ranks):
        assert value.tolist() == [[0, 7], [1, 7]]


def gather_ranks():
    return gathered(torch.tensor([rank(), 7]))
