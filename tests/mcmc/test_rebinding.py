"""A number or a tensor that a model reads and that is rebound: graphs are compared again."""

import datetime
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ebm import MCMC, ChEESKernel, LangevinKernel, UnnormalizedEnergy
from pyro_ebm.files import load, previous
from pyro_ebm.mcmc import BarkerKernel, CompositeKernel, GraphError, TemperingKernel
from pyro_ebm.mcmc.engine.agreement import agree
from pyro_ebm.mcmc.engine.engine import Engine

MOVED = "gives other values than the graph"


def add_up(engine: Engine, n: int, ways: tuple[int, ...] = (1,)) -> None:
    """Makes ``n`` look-ups, of so many calls by turns."""
    for i in range(n):
        engine.iterate(ways[i % len(ways)], (torch.rand(2),))


# -- at which calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", ["capture", pytest.param(True, marks=pytest.mark.slow)])
def test_the_function_is_called_beside_its_graph_at_powers_of_ten(jit_compile):
    calls = []

    def double(x: Tensor) -> tuple[Tensor]:
        calls.append(made)
        return (2 * x,)

    engine = Engine(double, jit_compile)
    for made in range(1, 1500):  # noqa: B007 - read by the function
        engine(torch.rand(2))
    # twice at the first, as it is and to write it down
    assert calls == [1, 1, 2, 10, 100, 1000]
    engine.check()
    engine.check()  # nothing was called since
    assert len(calls) == 7


def test_calls_that_are_made_in_a_row_count_too():
    calls = []

    def rotate(x: Tensor) -> tuple[Tensor]:
        calls.append(made)
        return (x.flip(0),)

    engine = Engine(rotate, "capture")
    for made in range(1, 40):  # noqa: B007 - 7 calls each: 1-7, 8-14 with the 10th, 99-105
        engine.iterate(7, (torch.rand(2),))
    assert sorted(set(calls)) == [1, 2, 15]


@pytest.mark.parametrize("ways", [(1,), (7, 3)])
def test_what_is_rebound_is_named_at_the_next_check(ways):
    scale = 2.0
    engine = Engine(lambda x: (scale * x,), "capture")
    add_up(engine, 4, ways)
    scale = 3.0
    with pytest.raises(GraphError, match=f"{MOVED}.*: scale, .* was 2.0 and is 3.0.*in doubt"):
        add_up(engine, 100, ways)
    with pytest.raises(GraphError, match=MOVED):  # and again, until somebody does something
        add_up(engine, 1)
    scale = 2.0
    add_up(engine, 100, ways)


def test_a_tensor_that_another_takes_the_place_of_is_named_at_the_end():
    weight = torch.ones(2)
    engine = Engine(lambda x: (weight * x,), "capture")
    add_up(engine, 5)
    weight.mul_(2)
    engine.check()  # in place
    add_up(engine, 1)
    weight = weight + 1
    with pytest.raises(GraphError, match=r"weight, .* is another tensor.*1 calls ago, of 6"):
        engine.check()


class Net(torch.nn.Module):
    """With a number that is no buffer."""

    power = 2

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"shift": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() ** self.power + self.settings["shift"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda net: net.settings.update(shift=2.0), r"settings\['shift'\], .* was 1.0 and is 2.0"),
        (lambda net: setattr(net, "power", 3), "no graph can see"),  # of the class until now
    ],
)
def test_attributes_are_looked_into(change, named):
    net = Net()
    engine = Engine(lambda x: (net(x),), "capture")
    add_up(engine, 3)
    change(net)
    with pytest.raises(GraphError, match=named):
        engine.check()


# -- of rounding -----------------------------------------------------------------------------------


def logistic(x: Tensor) -> Tensor:
    """A chaotic map: after 40 times the last digit is the first."""
    for _ in range(40):
        x = 4 * x * (1 - x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chaos_is_rounding(dtype):
    x = torch.rand(50, dtype=dtype)
    same = logistic(x * (1 + torch.finfo(dtype).eps))
    if dtype is torch.float32:
        assert not torch.allclose(same, logistic(x), atol=0.1)
    assert agree([logistic(x)], [same], lambda x: [logistic(*x)], [x])
    sums = [logistic(x) + x.sum()], [same + 2 * x.sum()]
    assert not agree(*sums, lambda x: [logistic(*x) + x[0].sum()], [x])


def test_values_that_are_not_finite_agree_with_their_like():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0])

    def same(x: list[Tensor]) -> list[Tensor]:
        return x

    assert agree([x], [x.clone()], same, [x])
    for i, value in enumerate([0.0, -math.inf, math.nan, math.nan, math.inf]):
        other = x.clone()
        other[i] = value
        assert not agree([x], [other], same, [x])


def test_other_shapes_and_dtypes_do_not_agree():
    x = torch.ones(2)
    for other in ([x[:1]], [x.double()], [x, x], []):
        assert not agree([x], other, lambda x: x, [x])


def test_a_jump_is_seen_where_it_is_not_on_the_edge():
    x = torch.tensor([0.5, 1.0, 2.0])
    jump = [(x > 1).float()]

    def graph(x: list[Tensor]) -> list[Tensor]:
        return [(x[0] > 1).float()]

    assert agree(jump, [torch.tensor([0.0, 1.0, 1.0])], graph, [x])
    assert not agree(jump, [torch.tensor([1.0, 0.0, 1.0])], graph, [x])


def test_a_transition_far_out_and_on_edges_goes_on():
    """Potentials that are infinite or NaN here and there, and proposals on the edge."""

    def energy(x: Tensor) -> Tensor:
        return torch.where(x > 1, torch.inf, (1 - x).log() * 1e3 + 1e6 * (x * 1e4).sin())

    kernel = BarkerKernel(UnnormalizedEnergy(energy), jit_compile="capture")
    MCMC(kernel, 150, 50, num_chains=20, disable_progbar=True).run()
    assert kernel._engine._graphs


# -- in runs ---------------------------------------------------------------------------------------

SCALE = 1.0


def model() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(-0.1) * SCALE)


@pytest.fixture
def rebound(monkeypatch):
    """A hook that rebinds the number after so many transitions."""

    def after(t: int):
        seen = []

        def hook(*_):
            seen.append(1)
            if len(seen) == t:
                monkeypatch.setitem(globals(), "SCALE", 2.0)

        return hook

    return after


def mixed() -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(k, 1.0))
    pyro.factor("f", torch.tensor(-0.1) * SCALE)


KERNELS = {
    "Langevin": lambda: LangevinKernel(model, jit_compile="capture"),
    "ChEES": lambda: ChEESKernel(model, jit_compile="capture"),
    "composite": lambda: CompositeKernel(mixed, [*CompositeKernel(mixed).kernels[:1], CAPTURED]),
    "tempering": lambda: TemperingKernel(LangevinKernel(model, jit_compile="capture"), [1.0, 0.5]),
}
CAPTURED = LangevinKernel(jit_compile="capture")
NAMED = f"{MOVED}.*: SCALE, which (model|mixed) reads, was 1.0 and is 2.0"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_the_end_of_a_run_is_checked(name, method, rebound):
    def run(hook):
        mcmc = MCMC(
            KERNELS[name](),
            15,
            5,
            num_chains=2 if method == "vectorized" else 1,
            chain_method=method,
            hook_fn=hook,
            disable_progbar=True,
        )
        mcmc.run()

    run(None)
    with pytest.raises(GraphError, match=NAMED):
        run(rebound(19))


def test_the_end_of_a_run_of_pyro_is_checked(rebound):
    kernel = LangevinKernel(model, jit_compile="capture")
    mcmc = pyro.infer.MCMC(kernel, 15, 5, hook_fn=rebound(19), disable_progbar=True)
    with pytest.raises(GraphError, match=NAMED):
        mcmc.run()


@pytest.mark.parametrize("every", [25, datetime.timedelta(days=1)])
def test_draws_in_doubt_are_not_saved(every, rebound, tmp_path):
    path = tmp_path / "run.ckpt"
    kernel = LangevinKernel(model, jit_compile="capture")
    mcmc = MCMC(
        kernel, 60, 20, num_chains=2, checkpoint=path, checkpoint_every=every, disable_progbar=True
    )
    mcmc.hook_fn = rebound(60)
    with pytest.raises(GraphError, match=NAMED):
        mcmc.run()
    saved = load(path, "an MCMC run")["run"]["t"]
    assert saved == (50 if isinstance(every, int) else 0)
    assert not isinstance(every, int) or load(previous(path), "an MCMC run")["run"]["t"] == 25
