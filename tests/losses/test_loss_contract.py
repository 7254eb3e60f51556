"""What every loss keeps: a new loss is a new line in LOSSES."""

import itertools
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import SGD, Adam
from torch import nn

from pyro_ebm.distributions import UnnormalizedEnergy, geometric_ladder, noise_conditional
from pyro_ebm.losses import (
    NCE,
    ContrastiveDivergence,
    CooperativeTraining,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    EnergyLoss,
    FlowNCE,
    PseudoLikelihood,
    RankingNCE,
    RecoveryLikelihood,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_ebm.mcmc import LangevinKernel, MHKernel
from pyro_ebm.nn import MLPEnergy


class MaximumLikelihood(EnergyLoss):
    """The least member of the family; right where log Z has no gradient."""

    def energy_term(self, site):
        return site.energy.unnormalized_log_prob(site.x)


ULA = LangevinKernel(adjusted=False, step_size=0.05)
LOSSES = {
    "likelihood": MaximumLikelihood,
    "cd": ContrastiveDivergence,
    "cd-10": lambda **kw: ContrastiveDivergence(num_steps=10, energy_penalty=0.1, **kw),
    "cd-ula": lambda **kw: ContrastiveDivergence(kernel=ULA, **kw),
    "cd-mh": lambda **kw: ContrastiveDivergence(kernel=MHKernel(), num_steps=2, **kw),
    "pcd": lambda **kw: ContrastiveDivergence(
        persistent=True, num_chains=7, restart_prob=0.2, **kw
    ),
    "pcd-kl": lambda **kw: ContrastiveDivergence(
        persistent=True, num_chains=7, augmentation=torch.neg, kl_weight=0.5, **kw
    ),
    "sm": ScoreMatching,
    "sm-hutchinson": lambda **kw: ScoreMatching(method="hutchinson", num_projections=2, **kw),
    "ssm": lambda **kw: SlicedScoreMatching(num_projections=2, **kw),
    "ssm-plain": lambda **kw: SlicedScoreMatching(
        variance_reduced=False, distribution="sphere", **kw
    ),
    "dsm": lambda **kw: DenoisingScoreMatching(sigma=[0.1, 0.5], **kw),
    "dsm-cv": lambda **kw: DenoisingScoreMatching(sigma=0.1, control_variate=True, **kw),
    "ed": EnergyDiscrepancy,
    "pl": PseudoLikelihood,
    "pl-some": lambda **kw: PseudoLikelihood(blocks=[[0], [1]], subsample_size=1, **kw),
    "dsm-dual": lambda **kw: DenoisingScoreMatching(dual=True, **kw),
    "recovery": lambda **kw: RecoveryLikelihood(num_steps=2, **kw),
    "cooperative": lambda **kw: CooperativeTraining(num_steps=2, **kw),
    "nce": lambda **kw: NCE(noise_ratio=3, **kw),
    "nce-init": lambda **kw: NCE(init_log_normalizer=True, **kw),
    "ranking": lambda **kw: RankingNCE(noise_ratio=3, **kw),
    "flow-nce": FlowNCE,
    "flow-nce-both": lambda **kw: FlowNCE(alternate=None, noise_ratio=2, **kw),
}
# Elementwise or eventwise the same: losses whose objective is a sum over independent elements.
ADDITIVE = ["likelihood", "cd-ula", "sm", "sm-hutchinson", "ssm", "dsm-cv"]


@pytest.fixture(params=LOSSES)
def make_loss(request):
    return LOSSES[request.param]


class World:
    """A model of one or more energy sites with networks of their own, and a guide for any loss."""

    def __init__(self, loss, names=("x",), register=True, dtype=torch.float32):
        torch.manual_seed(1)
        self.nets = {name: MLPEnergy(2, hidden=(8,)).to(dtype) for name in names}
        self.log_z = {name: nn.Parameter(torch.zeros((), dtype=dtype)) for name in names}
        self.noise = {name: nn.Parameter(torch.zeros(2, dtype=dtype)) for name in names}
        self.needs_noise, self.register = loss.needs_noise, register
        self.support = constraints.integer_interval(-4, 4) if is_discrete(loss) else None
        self.noise_conditional = isinstance(loss, RecoveryLikelihood) or getattr(loss, "dual", 0)

    def parameters(self, name="x"):
        return [*self.nets[name].parameters(), self.log_z[name]]

    def energy(self, name="x"):
        if self.register:
            pyro.module(f"net_{name}", self.nets[name])
        log_z = self.log_z[name]
        if self.register:
            log_z = pyro.param(f"log_z_{name}", log_z)
            self.log_z[name] = log_z.unconstrained()
        net = self.nets[name]
        if self.noise_conditional:

            def energy(x, sigma):
                return net(x / (1 + sigma[..., None] ** 2))

            return noise_conditional(energy, geometric_ladder(2.0, 0.1, 4), event_shape=(2,))
        return UnnormalizedEnergy(net, (2,), self.support, log_normalizer=log_z)

    def noise_of(self, name="x"):
        loc = self.noise[name]
        if self.register:
            loc = pyro.param(f"noise_{name}", loc)
            self.noise[name] = loc.unconstrained()
        return dist.Normal(loc, 2 * torch.ones_like(loc)).to_event(1)

    def model(self, **data):
        for name, x in data.items():
            with pyro.plate(f"plate_{name}", len(x)):
                pyro.sample(name, self.energy(name), obs=x)

    def guide(self, **data):
        for name in sorted(data) if self.needs_noise else ():
            with pyro.plate(f"plate_{name}", len(data[name])):
                pyro.sample(name, self.noise_of(name))


def is_discrete(loss):
    """Whether it is for discrete data alone."""
    return isinstance(loss, PseudoLikelihood)


def data(n=12, dtype=torch.float32, seed=2):
    """Whole numbers, which losses of either kind take."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (2 * x).round().clamp(-4, 4).to(dtype)


def seeded(loss):
    """The loss with the same random numbers for a site whatever was drawn before it."""
    term = loss.energy_term

    def energy_term(site):
        torch.manual_seed(sum(map(ord, site.name)))
        return term(site)

    loss.energy_term = energy_term
    return loss


def gradients(loss, world, model, guide, *args, **kwargs):
    """Gradients of the energies' parameters after one seeded step, by site name."""
    torch.manual_seed(3)
    for name in world.nets:
        for p in world.parameters(name):
            p.grad = None
    loss.loss_and_grads(model, guide, *args, **kwargs)
    return {
        name: torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in world.parameters(name)
            ]
        )
        for name in world.nets
    }


def test_a_step_of_svi_trains_the_energy(make_loss):
    loss = make_loss()
    world, x = World(loss), data()
    before = [p.detach().clone() for p in world.nets["x"].parameters()]
    svi = SVI(world.model, world.guide, SGD({"lr": 0.1}), loss)
    value = svi.step(x=x)
    assert isinstance(value, float)
    assert all(p.isfinite().all() for p in world.nets["x"].parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, world.nets["x"].parameters())]
    # score matching does not see the last bias; a loss that moves none has detached its term
    assert sum(moved) >= len(moved) - 1


def test_a_torch_optimiser_trains_what_nobody_registered(make_loss):
    loss = make_loss()
    world, x = World(loss, register=False), data()
    module = loss(world.model, world.guide)
    optimiser = torch.optim.SGD(world.nets["x"].parameters(), lr=0.1)
    before = [p.detach().clone() for p in world.nets["x"].parameters()]
    value = module(x=x)
    assert value.shape == ()
    value.backward()
    optimiser.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, world.nets["x"].parameters())]
    assert sum(moved) >= len(moved) - 1


def test_both_forms_have_one_gradient(make_loss):
    x = data()
    loss, other = seeded(make_loss()), seeded(make_loss())
    world = World(loss)
    by_svi = gradients(loss, world, world.model, world.guide, x=x)["x"]
    pyro.clear_param_store()
    world = World(other, register=False)
    torch.manual_seed(3)
    other(world.model, world.guide)(x=x).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in world.parameters()]
    torch.testing.assert_close(by_svi, torch.cat([g.flatten() for g in grads]))
    assert by_svi.abs().max() > 1e-3


def test_what_svi_would_not_train_is_an_error_that_names_it(make_loss):
    loss = make_loss()
    world = World(loss, register=False)
    svi = SVI(world.model, world.guide, SGD({"lr": 0.1}), loss)
    with pytest.raises(ValueError, match=r"pyro.module\("):
        svi.step(x=data())


def test_double_precision(make_loss):
    loss = make_loss()
    world, x = World(loss, dtype=torch.float64), data(dtype=torch.float64)
    value = loss(world.model, world.guide)(x=x)
    assert value.dtype == torch.float64
    value.backward()
    assert all(p.grad.dtype == torch.float64 for p in world.parameters() if p.grad is not None)


def test_an_evaluation_leaves_everything_as_it_is(make_loss):
    x = data()

    def run(evaluate):
        pyro.clear_param_store()
        loss = make_loss()
        world = World(loss)
        svi = SVI(world.model, world.guide, Adam({"lr": 0.01}), loss)
        values = []
        for step in range(3):
            if evaluate:
                assert isinstance(svi.evaluate_loss(x=data(5)), float)
                module = loss(world.model, world.guide)
                with torch.no_grad():
                    assert not module(x=data(5)).requires_grad
            torch.manual_seed(step)
            values.append(svi.step(x=x))
            before = loss.diagnostics
            if evaluate:
                svi.evaluate_loss(x=data(5))
                assert all(p.grad is None or not p.grad.any() for p in world.parameters())
            assert loss.diagnostics == before
        return values, loss.diagnostics, [p.detach().clone() for p in world.parameters()]

    (plain, numbers, weights), (watched, same_numbers, same_weights) = run(False), run(True)
    assert plain == watched
    assert numbers == same_numbers
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights))


def test_diagnostics_are_ready_for_a_logger(make_loss):
    loss = make_loss()
    world = World(loss)
    SVI(world.model, world.guide, SGD({"lr": 0.1}), loss).step(x=data())
    assert all(type(value) is float for value in loss.diagnostics.values())
    assert loss.diagnostics["gradient_norm"] > 0
    json.dumps(loss.diagnostics)


def test_saved_and_loaded_it_goes_on_exactly(make_loss, tmp_path):
    x = data()

    def go(svi):
        torch.manual_seed(4)
        return [svi.step(x=x) for _ in range(4)]

    loss = make_loss()
    world = World(loss)
    optimiser = Adam({"lr": 0.01})
    svi = SVI(world.model, world.guide, optimiser, loss)
    for _ in range(4):
        svi.step(x=x)
    parameters = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
    moments = optimiser.get_state()
    torch.save((loss.state_dict(), moments), tmp_path / "loss.pt")
    want = go(svi)

    pyro.clear_param_store()
    loss = make_loss()
    world = World(loss)
    state, moments = torch.load(tmp_path / "loss.pt")
    loss.load_state_dict(state)
    optimiser = Adam({"lr": 0.01})
    optimiser.set_state(moments)
    world.model(x=x)
    world.guide(x=x)
    with torch.no_grad():
        for name, value in parameters.items():
            pyro.get_param_store()[name].copy_(value)
    assert go(SVI(world.model, world.guide, optimiser, loss)) == want


def test_repr_shows_the_settings(make_loss):
    loss = make_loss()
    assert repr(loss).startswith(f"{type(loss).__name__}(")
    assert "num_particles" not in repr(loss)  # as by default
    assert loss.settings["num_particles"] == 1
    assert "num_particles=3)" in repr(make_loss(num_particles=3)).replace(", monitor", ")")
    module = loss(lambda: None, lambda: None)
    assert repr(module).startswith(f"EnergyLossModule(\n  {loss!r}, model=<lambda>")


def test_several_sites_in_any_order(make_loss):
    a, b = data(6), data(9, seed=5)
    loss = seeded(make_loss())
    world = World(loss, names=("a", "b"))
    one = gradients(loss, world, world.model, world.guide, a=a, b=b)
    if not isinstance(loss, MaximumLikelihood):  # which records nothing
        recorded = {key.split("/")[0] for key in loss.diagnostics}
        assert recorded == {"a", "b", "gradient_norm"}, "a loss records a number of each site"

    pyro.clear_param_store()
    loss = seeded(make_loss())
    world = World(loss, names=("a", "b"))
    other = gradients(loss, world, world.model, world.guide, b=b, a=a)
    for name in "ab":
        assert one[name].abs().max() > 1e-3
        torch.testing.assert_close(one[name], other[name])

    # and each as it is alone
    pyro.clear_param_store()
    loss = seeded(make_loss())
    world = World(loss, names=("a", "b"))
    alone = gradients(loss, world, world.model, world.guide, a=a)
    if not isinstance(
        loss, FlowNCE | CooperativeTraining
    ):  # the guide's draws come before the seed
        torch.testing.assert_close(one["a"], alone["a"])


def test_plate_dims_do_not_matter(make_loss):
    x = data(12)

    def grid(world, x, sample):
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            sample(x.reshape(3, 4, 2))

    grads = []
    for plates in (False, True):
        pyro.clear_param_store()
        loss = seeded(make_loss())
        world = World(loss)
        model, guide = world.model, world.guide
        if plates:

            def model(x, world=world):
                grid(world, x, lambda x: pyro.sample("x", world.energy(), obs=x))

            def guide(x, world=world):
                if world.needs_noise:
                    grid(world, x, lambda x: pyro.sample("x", world.noise_of()))

        grads.append(gradients(loss, world, model, guide, x=x)["x"])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ADDITIVE)
def test_event_dims_do_not_matter(name):
    x = data(10)
    grads = []
    for as_event in (False, True):
        pyro.clear_param_store()

        def model(x, as_event=as_event):
            lam = pyro.param("lam", torch.tensor(1.5))
            if as_event:
                p = UnnormalizedEnergy(lambda x: (lam * x**4 / 4).sum(-1), event_shape=(2,))
            else:
                p = UnnormalizedEnergy(lambda x: lam * x**4 / 4).expand([2]).to_event(1)
            with pyro.plate("data", len(x)):
                pyro.sample("x", p, obs=x)

        torch.manual_seed(3)
        seeded(LOSSES[name]()).loss_and_grads(model, lambda x: None, x)
        grads.append(pyro.param("lam").grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["nce", "ranking", "flow-nce-both"])
def test_noise_under_the_same_to_event_is_noise_for_the_elements(name):
    def model(x):
        log_z = pyro.param("log_z", torch.zeros(()))
        lam = pyro.param("lam", torch.tensor(1.5))
        p = UnnormalizedEnergy(lambda x: lam * x**2 / 2, log_normalizer=log_z)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p.expand([2]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(2)), 2.0).to_event(1))

    def flat_model(x):
        log_z = pyro.param("log_z", torch.zeros(()))
        lam = pyro.param("lam", torch.tensor(1.5))
        p = UnnormalizedEnergy(lambda x: lam * x**2 / 2, log_normalizer=log_z)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("elements", 2, dim=-1):
            pyro.sample("x", p, obs=x)

    def flat_guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("elements", 2, dim=-1):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(2)), 2.0))

    grads = []
    for pair in ((model, guide), (flat_model, flat_guide)):
        pyro.clear_param_store()
        torch.manual_seed(3)
        seeded(LOSSES[name]()).loss_and_grads(*pair, data(10))
        grads.append(pyro.param("lam").grad.clone())
    torch.testing.assert_close(*grads)


def test_scale_multiplies_the_gradient(make_loss):
    x = data()
    grads = []
    for scale in (1.0, 2.5):
        pyro.clear_param_store()
        loss = seeded(make_loss())
        world = World(loss)
        model = poutine.scale(world.model, scale=scale)
        grads.append(gradients(loss, world, model, world.guide, x=x)["x"])
    torch.testing.assert_close(2.5 * grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_subsample_is_scaled_up_to_the_whole(make_loss):
    x = data(12)
    rows = torch.tensor([7, 2, 5])
    grads = []
    for plate in (
        lambda: pyro.plate("data", 3),
        lambda: pyro.plate("data", 12, subsample=rows),
    ):
        pyro.clear_param_store()
        loss = seeded(make_loss())
        world = World(loss)

        def model(x, world=world, plate=plate):
            with plate():
                pyro.sample("x", world.energy(), obs=x)

        def guide(x, world=world, plate=plate):
            if world.needs_noise:
                with plate():
                    pyro.sample("x", world.noise_of())

        grads.append(gradients(loss, world, model, guide, x=x[rows])["x"])
    torch.testing.assert_close(4 * grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_subsampled_gradients_are_unbiased():
    x = data(5)
    loss = ScoreMatching()
    world = World(loss)
    full = gradients(loss, world, world.model, world.guide, x=x)["x"]

    def model(rows):
        with pyro.plate("data", 5, subsample=rows):
            pyro.sample("x", world.energy(), obs=x[rows])

    parts = [
        gradients(loss, world, model, lambda rows: None, torch.tensor(rows))["x"]
        for rows in itertools.combinations(range(5), 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["handler", "method"])
@pytest.mark.parametrize("rubbish", [float("nan"), 1e8])
def test_masked_rows_contribute_exactly_nothing(make_loss, how, rubbish):
    x, mask = data(12), torch.arange(12) % 3 > 0

    def run(x, mask):
        pyro.clear_param_store()
        loss = seeded(make_loss())
        world = World(loss)

        def model(x):
            with pyro.plate("data", len(x)):
                if how == "method":
                    pyro.sample("x", world.energy().mask(mask), obs=x)
                else:
                    with poutine.mask(mask=mask):
                        pyro.sample("x", world.energy(), obs=x)

        def guide(x):
            if world.needs_noise:
                with pyro.plate("data", len(x)):
                    pyro.sample("x", world.noise_of())

        grad = gradients(loss, world, model, guide, x=x)["x"]
        return grad, loss.diagnostics, loss.state_dict()

    spoiled = torch.where(mask[:, None], x, rubbish)
    grad, diagnostics, state = run(x, mask)
    same_grad, same_diagnostics, same_state = run(spoiled, mask)
    assert torch.equal(grad, same_grad)
    assert diagnostics == same_diagnostics
    assert str(state) == str(same_state)
    rest, _, _ = run(x, ~mask)
    everything, _, _ = run(x, torch.ones(12, dtype=torch.bool))
    torch.testing.assert_close(grad + rest, everything, rtol=1e-4, atol=1e-5)


def test_all_rows_masked_is_no_step(make_loss):
    loss = make_loss()
    world = World(loss)
    model = poutine.mask(world.model, mask=False)
    grads = gradients(loss, world, model, world.guide, x=data())["x"]
    assert not grads.any()
    loss.loss_and_grads(world.model, world.guide, x=data())
    assert all(p.isfinite().all() for p in world.parameters())
    assert all(value == value for value in loss.diagnostics.values())  # none is NaN


def test_particles_are_averaged():
    x = data()
    loss, three = ScoreMatching(), ScoreMatching(num_particles=3)
    world = World(loss)
    one = gradients(loss, world, world.model, world.guide, x=x)["x"]
    calls = []
    term = three.energy_term
    three.energy_term = lambda site: calls.append(site.name) or term(site)
    mean = gradients(three, world, world.model, world.guide, x=x)["x"]
    assert calls == ["x"] * 3
    torch.testing.assert_close(one, mean)


def test_vectorized_particles_are_refused(make_loss):
    with pytest.raises(ValueError, match="vectorize_particles"):
        make_loss(vectorize_particles=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_named(make_loss, bad):
    loss = make_loss()
    world, x = World(loss), data()
    x[3, 1] = bad
    with pytest.raises(ValueError, match=r"site 'x' hold NaN"):
        loss.loss_and_grads(world.model, world.guide, x=x)
