"""Flow-contrastive estimation: two players, one objective, turns."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn
from torch.nn.functional import logsigmoid

from pyro_ebm.distributions import UnnormalizedEnergy
from pyro_ebm.distributions.flow import FlowDistribution, neural_spline_flow
from pyro_ebm.losses import NCE, FlowNCE, RankingNCE
from pyro_ebm.losses.noise.flow_nce import reverse
from pyro_ebm.nn import MLPEnergy

SIGMAS = 4.5


class Game:
    """An energy, its log Z, and a flow, in double precision."""

    def __init__(self, register=True):
        torch.manual_seed(1)
        self.net = MLPEnergy(2, hidden=(8,)).double()
        self.log_z = nn.Parameter(torch.tensor(1.0).double())
        self.flow = neural_spline_flow(2, transforms=1, hidden_features=(8,)).double()
        self.register = register
        self.x = torch.randn(30, 2).double()

    def model(self, x):
        log_z = self.log_z
        if self.register:
            pyro.module("net", self.net)
            log_z = pyro.param("log_z", self.log_z)
            self.log_z = log_z.unconstrained()
        with pyro.plate("data", len(x)):
            pyro.sample("x", UnnormalizedEnergy(self.net, (2,), log_normalizer=log_z), obs=x)

    def guide(self, x):
        if self.register:
            pyro.module("flow", self.flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", FlowDistribution(self.flow()))

    def energys(self):
        return [*self.net.parameters(), self.log_z]

    def flows(self):
        return list(self.flow.parameters())


def value_of(game, noise, log_q_noise, log_q_data):
    """V, as the energy's player has it, from its formula."""
    ratio = len(noise)

    def logit(u, log_q):
        return -game.net(u) - game.log_z - log_q - math.log(ratio)

    return (
        logsigmoid(logit(game.x, log_q_data)).sum() + logsigmoid(-logit(noise, log_q_noise)).sum()
    )


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def moved(before, parameters):
    return any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("form", ["svi", "module"])
@pytest.mark.parametrize("alternate", [None, 1], ids=["both", "turns"])
def test_each_player_has_its_own_gradient_of_one_objective(ratio, form, alternate):
    game = Game(register=form == "svi")
    loss = FlowNCE(noise_ratio=ratio, alternate=alternate)

    def grads():
        for p in [*game.energys(), *game.flows()]:
            p.grad = None
        torch.manual_seed(5)
        if form == "svi":
            loss.loss_and_grads(game.model, game.guide, game.x)
        else:
            loss(game.model, game.guide)(game.x).backward()
        return [p.grad for p in game.energys()], [p.grad for p in game.flows()]

    if alternate is None:
        for_energy, for_flow = grads()
    else:  # the energy's turn, then the flow's
        for_energy, resting_flow = grads()
        resting_energy, for_flow = grads()
        assert all(g is None for g in resting_flow + resting_energy)

    torch.manual_seed(5)
    q = game.flow().expand((30,))
    draws = [q.rsample()[None]] + ([q.rsample((ratio - 1,))] if ratio > 1 else [])
    noise = torch.cat(draws)
    objective = value_of(game, noise, q.log_prob(noise), q.log_prob(game.x))
    up = torch.autograd.grad(-objective, game.energys(), retain_graph=True, allow_unused=True)
    down = torch.autograd.grad(objective, game.flows(), allow_unused=True)
    for got, want in ((for_energy, up), (for_flow, down)):
        for g, w in zip(got, want, strict=True):
            if w is None or g is None:
                assert not any(grad is not None and grad.any() for grad in (g, w))
            else:
                torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-8)
    assert max(g.abs().max() for g in for_flow if g is not None) > 1e-3


def counted(make, passes):
    """A flow that notes its passes: draws with their density, and densities."""

    def noted(name, method):
        return lambda *args: passes.append(name) or method(*args)

    def made():
        flow = make()
        expanded = flow.expand((30,))
        flow.expand = lambda batch: expanded
        for name in ("rsample_and_log_prob", "log_prob"):
            setattr(expanded, name, noted(name, getattr(expanded, name)))
        return flow

    return made


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize(
    ("make", "calls_at"),
    [
        (NCE, {"": 1}),
        (RankingNCE, {"": 1}),
        (lambda ratio: FlowNCE(ratio, alternate=None), {"both": 1}),
        # for the flow's gradient, that of the energy at the noise alone
        (lambda ratio: FlowNCE(ratio, alternate=4), {"energy": 1, "flow": 2}),
    ],
    ids=["nce", "ranking", "both", "turns"],
)
def test_no_pass_but_those_of_the_mathematics(make, calls_at, ratio):
    game, loss, calls, passes = Game(register=False), make(ratio), [], []
    game.flow = counted(game.flow, passes)
    game.net.register_forward_hook(lambda *_: calls.append(1))
    module = loss(game.model, game.guide)
    for step in range(8):
        turn = getattr(loss, "turn", "")
        calls.clear()
        passes.clear()
        module(game.x).backward()
        if step > 1:  # at the first two the energy is checked
            assert len(calls) == calls_at[turn]
            if turn:  # each draw brings its density along
                assert sorted(passes) == ["log_prob"] + ["rsample_and_log_prob"] * min(ratio, 2)


def test_who_rests_does_not_move_with_momentum_in_svi():
    game = Game()
    loss = FlowNCE(alternate=2)
    svi = SVI(game.model, game.guide, Adam({"lr": 0.01}), loss)
    for step in range(8):
        turn = "energy" if (step // 2) % 2 == 0 else "flow"
        assert loss.turn == turn
        energy, flow = copies(game.energys()), copies(game.flows())
        svi.step(game.x)
        assert moved(energy, game.energys()) == (turn == "energy")
        assert moved(flow, game.flows()) == (turn == "flow")


def test_who_rests_does_not_move_with_a_torch_optimiser():
    game = Game(register=False)
    loss = FlowNCE(alternate=2)
    module = loss(game.model, game.guide)
    optimiser = torch.optim.Adam([*game.energys(), *game.flows()], lr=0.01)
    for _ in range(8):
        turn = loss.turn
        energy, flow = copies(game.energys()), copies(game.flows())
        optimiser.zero_grad()
        module(game.x).backward()
        optimiser.step()
        assert moved(energy, game.energys()) == (turn == "energy")
        assert moved(flow, game.flows()) == (turn == "flow")


def test_on_the_flows_turn_everything_else_rests():
    # a latent's guide and another likelihood belong to the energy's player: half of an ELBO would
    # pull them to the prior
    game = Game()

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.param("w", torch.tensor(0.5))
        pyro.sample("y", dist.Normal(w * z, 1.0), obs=torch.tensor(2.0))
        game.model(x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
        game.guide(x)

    loss = FlowNCE(alternate=1)
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    svi.step(game.x)
    others = copies([pyro.param("w"), pyro.param("m")])
    svi.step(game.x)  # the flow's
    assert not moved(others, [pyro.param("w"), pyro.param("m")])
    svi.step(game.x)
    assert moved(others, [pyro.param("w"), pyro.param("m")])


def test_turns_follow_the_smoothed_accuracy():
    game = Game()
    loss = FlowNCE(threshold=0.6, smoothing=0.5)
    assert loss.turn == "energy"
    svi = SVI(game.model, game.guide, Adam({"lr": 0.01}), loss)
    smoothed = None
    for _ in range(10):
        svi.step(game.x)
        now = loss.diagnostics["accuracy"]
        smoothed = now if smoothed is None else 0.5 * smoothed + 0.5 * now
        assert loss.accuracy == pytest.approx(smoothed)
        assert loss.turn == ("energy" if smoothed < 0.6 else "flow")
    loss.accuracy = 0.9
    assert loss.turn == "flow"
    saved = loss.state_dict()
    other = FlowNCE()
    other.load_state_dict(saved)
    assert other.turn == "flow"
    assert other.num_steps == 10


def test_parameters_that_both_share_are_refused():
    game = Game()
    shared = nn.Parameter(torch.zeros(2).double())

    def model(x):
        pyro.module("net", game.net)
        m = pyro.param("shared", shared)
        p = UnnormalizedEnergy(lambda x: game.net(x - m), (2,), log_normalizer=torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def guide(x):
        m = pyro.param("shared", shared)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"'x'.*share a parameter of shape \(2,\)"):
        FlowNCE().loss_and_grads(model, guide, game.x)


# -- broad noise ---------------------------------------------------------------------------------


def test_broad_noise_is_a_normalized_mixture():
    flow, broad = dist.Normal(torch.tensor(1.0).double(), 0.5), dist.Normal(0.0, 4.0)
    n = 20_000

    def model(x):
        lam = pyro.param("lam", torch.tensor(1.0).double())
        p = UnnormalizedEnergy(lambda x: lam * x**2, log_normalizer=torch.tensor(0.5).double())
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow)

    loss = FlowNCE(noise_ratio=2, broad_noise=broad, broad_weight=0.3)
    seen, classify = [], loss.classify
    loss.classify = lambda *args: seen.append(args[1]) or classify(*args)
    grid = torch.linspace(-40, 40, n).double()
    loss.loss(model, guide, grid)
    noise, log_q_noise, log_q_data = seen[0]

    def mixture(u):
        return (0.7 * flow.log_prob(u).exp() + 0.3 * broad.log_prob(u).exp()).log()

    torch.testing.assert_close(log_q_data, mixture(grid))
    torch.testing.assert_close(log_q_noise, mixture(noise))
    assert torch.trapezoid(log_q_data.exp(), grid) == pytest.approx(1.0, abs=1e-6)
    # and the points are draws of it
    assert noise.shape == (2, n)
    assert (noise.mean() - 0.7).abs() < SIGMAS * noise.std() / (2 * n) ** 0.5
    second = 0.7 * (1 + 0.25) + 0.3 * 16
    error = noise.square().std() / (2 * n) ** 0.5
    assert (noise.square().mean() - second).abs() < SIGMAS * error


def test_broad_noise_leaves_the_flow_its_gradient():
    # the gradient of the objective with the picked points held: by finite differences in the flow
    x = torch.randn(2000).double()
    broad = dist.Normal(torch.tensor(0.0).double(), 4.0)

    def model(x):
        p = UnnormalizedEnergy(lambda x: x**2 / 2, log_normalizer=torch.tensor(0.919).double())
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def run(value, grad):
        pyro.clear_param_store()

        def guide(x):
            m = pyro.param("m", torch.tensor(value, dtype=torch.float64))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(m, 1.5))

        torch.manual_seed(3)
        loss = FlowNCE(noise_ratio=2, alternate=None, broad_noise=broad, broad_weight=0.3)
        if not grad:
            return loss.loss(model, guide, x)
        loss.loss_and_grads(model, guide, x)
        return pyro.param("m").grad.item()

    h = 1e-5
    slope = (run(0.5 + h, False) - run(0.5 - h, False)) / (2 * h)
    assert run(0.5, True) == pytest.approx(-slope, rel=1e-5)  # it climbs the loss


def test_broad_noise_of_another_shape():
    game = Game()
    for broad in (dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)):
        with pytest.raises(ValueError, match="broad_noise must be a distribution of one event"):
            FlowNCE(broad_noise=broad).loss_and_grads(game.model, game.guide, game.x)


# -- both at work --------------------------------------------------------------------------------


def test_reversal():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse(x)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    torch.testing.assert_close(x.grad, -2 * x.detach())


@pytest.mark.parametrize("alternate", [None, "accuracy"])
def test_noise_and_energy_both_find_the_data(alternate):
    # the data N(2, .5^2) lie in both families: the game ends where p = q = data
    x = 2.0 + 0.5 * torch.randn(1000)

    def model(x):
        m, s = pyro.param("m", torch.tensor(1.0)), pyro.param("s", torch.tensor(0.0))
        log_z = pyro.param("log_z", torch.tensor(0.0))
        p = UnnormalizedEnergy(lambda x: (x - m) ** 2 * (-2 * s).exp() / 2, log_normalizer=log_z)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    def guide(x):
        loc, log_scale = pyro.param("loc", torch.tensor(1.0)), pyro.param("ls", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, log_scale.exp()))

    loss = FlowNCE(noise_ratio=2, alternate=alternate, threshold=0.55)
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss)
    for _ in range(400):
        svi.step(x)
    store = {name: p.item() for name, p in pyro.get_param_store().items()}
    assert store["m"] == pytest.approx(2.0, abs=0.1)
    assert math.exp(store["s"]) == pytest.approx(0.5, abs=0.1)
    exact = 0.5 * math.log(2 * math.pi) + store["s"]
    assert store["log_z"] == pytest.approx(exact, abs=0.15)
    assert store["loc"] == pytest.approx(2.0, abs=0.25)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alternate": "turns"}, "alternate must be"),
        ({"alternate": 0}, "alternate must be"),
        ({"alternate": True}, "alternate must be"),
        ({"threshold": 1.0}, r"threshold must lie in \(0, 1\)"),
        ({"broad_weight": 0.0}, r"broad_weight must lie in \(0, 1\)"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\)"),
        ({"noise_ratio": 0}, "noise_ratio"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FlowNCE(**kwargs)


def test_noise_that_cannot_be_trained():
    game = Game()

    def guide(x):
        logits = torch.zeros(2)
        parts = dist.Normal(torch.randn(2, 2), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts))

    with pytest.raises(ValueError, match=r"'x', MixtureSameFamily, has no reparametrized"):
        FlowNCE().loss_and_grads(game.model, guide, game.x)
    with pytest.raises(ValueError, match="FlowNCE needs noise"):
        FlowNCE().loss_and_grads(game.model, lambda x: None, game.x)
