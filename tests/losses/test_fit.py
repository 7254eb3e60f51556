"""The training loop: what it computes, what it keeps, and what it refuses."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_ebm import NCE, ScoreMatching, UnnormalizedEnergy, fit
from pyro_ebm.files import CheckpointError
from pyro_ebm.losses.fitting.batches import Batches
from pyro_ebm.nn import MLPEnergy
from pyro_ebm.ops.distributed import rank
from tests.losses.test_checkpoint import MORE, Seen
from tests.losses.test_distributed import CHAINS, N, Shard, noise_of, points
from tests.losses.test_distributed import MORE as SHARDED
from tests.losses.test_distributed import ranks as ranks
from tests.losses.test_loss_contract import LOSSES, World, data

quiet = functools.partial(fit, disable_progbar=True)


class OfBatches(World):
    """A model and a guide of batches of ``size`` rows."""

    def __init__(self, loss, size=12, **kwargs):
        super().__init__(loss, **kwargs)
        self.size = size

    def model(self, x):
        with pyro.plate("data", self.size, subsample_size=len(x)):
            pyro.sample("x", self.energy(), obs=x)

    def guide(self, x):
        if self.needs_noise:
            with pyro.plate("data", self.size, subsample_size=len(x)):
                pyro.sample("x", self.noise_of())


def start(make_loss=ScoreMatching, kind=OfBatches):
    """A loss with a fresh model and guide of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = make_loss()
    return kind(loss), loss


def trained(make_loss=ScoreMatching, x=None, kind=OfBatches, **kwargs):
    """What a fit returns, and the weights that it leaves."""
    world, loss = start(make_loss, kind)
    result = quiet(world.model, world.guide, loss, data() if x is None else x, **kwargs)
    return result, {k: v.detach().clone() for k, v in result.module.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def same_history(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    world, loss = start(LOSSES[name])
    before = [p.detach().clone() for p in world.nets["x"].parameters()]
    result = quiet(world.model, world.guide, loss, data(), 6, 4, average=0.9, clip_norm=100.0)
    moved = [not torch.equal(a, b) for a, b in zip(before, world.nets["x"].parameters())]
    assert sum(moved) >= len(moved) - 1
    assert result.stopped_by == "num_steps"
    assert loss.steps_taken == result.num_steps == 6
    assert {"loss", "gradient_norm", "lr"} <= result.history.keys()
    assert set(loss.diagnostics) <= result.history.keys()
    assert all(column.shape == (6,) for column in result.history.values())
    assert all(p.grad is None for p in result.module.parameters())  # to which SVI would add


def test_no_guide_is_one_that_samples_nothing():
    results = []
    for guide in (None, lambda x: None):
        world, loss = start()
        results.append(quiet(world.model, guide, loss, data(), 3, 4).history)
    same_history(*results)


def test_it_is_the_loop_of_svi():
    """The same numbers, the gradient norm among them, and the same weights in the end."""
    x = data()
    rates = {"lr": 0.02, "betas": (0.8, 0.9)}
    kwargs = {"shuffle": False, "schedule": None, "average": None, "batch_size": 5}
    kwargs["num_epochs"] = 2
    result, weights = trained(optim=pyro.optim.Adam(rates), **kwargs)
    world, loss = start()
    svi = SVI(world.model, world.guide, pyro.optim.Adam(rates), loss)
    values, norms = [], []
    for batch in x.split(5) + x.split(5):  # the last has 2 rows
        values.append(svi.step(batch))
        norms.append(loss.diagnostics["gradient_norm"])
    np.testing.assert_allclose(result.history["loss"], values, rtol=1e-6)
    np.testing.assert_allclose(result.history["gradient_norm"], norms, rtol=1e-5)
    for name, value in world.nets["x"].state_dict().items():
        torch.testing.assert_close(weights[f"networks.net_x.{name}"], value)


def test_shuffles_leave_out_the_last_batch_and_follow_the_seed():
    def rows(seed):
        pyro.set_rng_seed(seed)
        batches = Batches(torch.arange(10), batch_size=3)
        return torch.stack([next(batches)[0] for _ in range(6)])

    first = rows(0)
    assert len(first[:3].unique()) == len(first[3:].unique()) == 9
    assert not torch.equal(first[:3], first[3:])
    assert torch.equal(first, rows(0))
    assert not torch.equal(first, rows(1))


@pytest.mark.parametrize("name", ["sm", "pcd", "nce"])
def test_a_loader_gives_what_tensors_in_its_order_give(name):
    # with a generator of its own, the loader leaves the others alone
    loader = DataLoader(TensorDataset(data()), 5, generator=torch.Generator())
    one, weights = trained(LOSSES[name], loader, num_steps=7)
    other, same_weights = trained(LOSSES[name], data(), num_steps=7, batch_size=5, shuffle=False)
    assert same(weights, same_weights)
    same_history(one.history, other.history)


def test_batches_are_the_arguments_of_the_model():
    seen = []

    def model(x, y):
        scale = pyro.param("scale", torch.tensor(1.0))
        seen.append((x, y))
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(scale * x, 1.0), obs=y)

    x = torch.randn(12)
    quiet(model, lambda x, y: None, Trace_ELBO(), (x, 3 * x), 300, 4, lr=0.1)
    assert all(torch.equal(3 * a, b) and len(a) == 4 for a, b in seen)
    assert pyro.param("scale").item() == pytest.approx(3.0, abs=1e-2)
    before = len(seen)
    loader = DataLoader(TensorDataset(x, 3 * x), batch_size=6)
    quiet(model, lambda x, y: None, Trace_ELBO(), loader, num_epochs=2)
    assert [len(a) for a, _ in seen[before:]] == [6] * (2 + 4)  # two runs come before the steps


def test_a_model_without_arguments():
    x = data()

    def model():
        precision = pyro.param("precision", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            p = UnnormalizedEnergy(lambda x: precision * x.square().sum(-1) / 2, (2,))
            pyro.sample("x", p, obs=x)

    quiet(model, lambda: None, ScoreMatching(), (), 500, lr=0.1)
    expected = 1 / x.square().mean()  # the minimum of the objective
    assert pyro.param("precision").item() == pytest.approx(expected.item(), rel=1e-3)


def test_networks_need_no_name():
    net = MLPEnergy(2, hidden=(8,))
    weight = next(net.parameters())
    before = weight.detach().clone()

    def model(x):
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("x", UnnormalizedEnergy(net, event_shape=(2,)), obs=x)

    quiet(model, lambda x: None, ScoreMatching(), data(), 3)
    assert not torch.equal(before, weight)


# -- optimisers and rates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (None, [1.0, 1.0, 1.0, 1.0]),
        (lambda fraction: 1 - fraction, [1.0, 0.75, 0.5, 0.25]),
        ("default", [0.05**0.0, 0.05**0.25, 0.05**0.5, 0.05**0.75]),
    ],
)
def test_rates_follow_the_schedule(schedule, factors):
    kwargs = {} if schedule == "default" else {"schedule": schedule}
    result, _ = trained(num_steps=4, lr=0.01, **kwargs)
    np.testing.assert_allclose(result.history["lr"], 0.01 * np.array(factors))
    result, _ = trained(num_steps=4, optim=pyro.optim.SGD({"lr": 0.02}), **kwargs)
    np.testing.assert_allclose(result.history["lr"], 0.02 * np.array(factors))


def test_optimisers_with_a_schedule_keep_it():
    lrd = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.5})
    # this optimiser lowers the rate before it steps: what is seen is that of the step before
    np.testing.assert_allclose(
        trained(num_steps=3, optim=lrd)[0].history["lr"], [0.01, 0.005, 0.0025]
    )
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.1}
    own = pyro.optim.ExponentialLR(settings)
    np.testing.assert_allclose(trained(num_steps=3, optim=own)[0].history["lr"], [1, 0.1, 0.01])
    world, loss = start()
    optimizer = torch.optim.SGD(world.nets["x"].parameters(), lr=0.1)
    schedule = StepLR(optimizer, 2)
    result = quiet(world.model, world.guide, loss, data(), 5, optim=optimizer, schedule=schedule)
    np.testing.assert_allclose(result.history["lr"], [0.1, 0.1, 0.01, 0.01, 0.001])


def test_rates_for_each_parameter():
    def rates(name):
        return {"lr": 0.0 if name.startswith("net_x") else 0.01}

    world, loss = start(LOSSES["nce"])
    before = [p.detach().clone() for p in world.nets["x"].parameters()]
    quiet(world.model, world.guide, loss, data(), 3, optim=pyro.optim.Adam(rates))
    assert all(torch.equal(a, b) for a, b in zip(before, world.nets["x"].parameters()))
    assert pyro.param("log_z_x") != 0


def test_optimisers_of_torch():
    _, by_class = trained(num_steps=3, optim=torch.optim.AdamW, lr=0.01)
    make = functools.partial(torch.optim.AdamW, lr=0.01)
    _, by_function = trained(num_steps=3, optim=make)
    assert same(by_class, by_function)
    world, loss = start()
    *frozen, last = world.nets["x"].parameters()
    weight = frozen[-1]
    others = [p.detach().clone() for p in frozen[:-1]]
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    quiet(world.model, world.guide, loss, data(), 3, optim=optimizer)
    assert not torch.equal(before, weight)  # what the optimiser holds is what is trained
    assert all(torch.equal(a, b) for a, b in zip(others, frozen[:-1]))
    assert last.grad is None


def test_gradients_are_clipped():
    world, loss = start()
    parameters = list(world.nets["x"].parameters())
    before = [p.detach().clone() for p in parameters]
    make = functools.partial(torch.optim.SGD, lr=1.0)
    result = quiet(
        world.model, world.guide, loss, data(), 1, optim=make, clip_norm=0.25, average=None
    )
    step = torch.cat([(a - b).flatten() for a, b in zip(before, parameters)])
    assert result.history["gradient_norm"][0] > 1.0  # that of the gradient itself
    assert step.norm().item() == pytest.approx(0.25, rel=1e-4)
    loose, _ = trained(num_steps=5, clip_norm=1e6)
    free, _ = trained(num_steps=5)
    same_history(loose.history, free.history)


# -- averages, the best, the end -------------------------------------------------------------------


def test_weights_end_as_their_average():
    decay, path = 0.6, []
    world, loss = start()
    parameters = list(world.nets["x"].parameters())

    def copy(*_):
        path.append([p.detach().clone() for p in parameters])

    copy()
    quiet(world.model, world.guide, loss, data(), 20, average=decay, callbacks=[copy])
    means = path[0]
    betas = []
    for t, weights in enumerate(path[1:], 1):
        betas.append(min(decay, (1 + t) / (10 + t)))
        means = [betas[-1] * m + (1 - betas[-1]) * w for m, w in zip(means, weights)]
    assert betas[0] < betas[-1] == decay
    for mean, last, p in zip(means[:-1], path[-1], parameters):
        torch.testing.assert_close(p.detach(), mean)
        assert not torch.allclose(p, last)


def test_early_stopping_keeps_the_best():
    world, loss = start()
    weight, seen = next(world.nets["x"].parameters()), []
    script = iter([3.0, 1.0, 2.0, 1.0, 5.0, 0.0])

    def metric():
        torch.rand(3)  # random numbers of its own
        seen.append(weight.detach().clone())
        return next(script)

    result = quiet(
        world.model, world.guide, loss, data(), 100, 5, metric=metric, metric_every=4, patience=3
    )
    assert result.stopped_by == "patience"
    assert (result.num_steps, result.best_step) == (20, 8)
    assert result.history["metric"].tolist() == [3.0, 1.0, 2.0, 1.0, 5.0]
    assert result.history["metric_step"].tolist() == [4, 8, 12, 16, 20]
    assert torch.equal(weight, seen[1])
    assert "patience" in repr(result)
    assert "best_step=8" in repr(result)
    unwatched, _ = trained(num_steps=100, batch_size=5)
    np.testing.assert_array_equal(unwatched.history["loss"][:20], result.history["loss"])


def test_a_metric_sees_averages_and_the_last_step():
    world, loss = start()
    weight, seen, raw = next(world.nets["x"].parameters()), [], []

    def metric():
        seen.append(weight.detach().clone())
        return -len(seen)  # always better

    result = quiet(
        world.model,
        world.guide,
        loss,
        data(),
        7,
        metric=metric,
        metric_every=5,
        average=0.9,
        callbacks=[lambda *_: raw.append(weight.detach().clone())],
    )
    assert result.history["metric_step"].tolist() == [5, 7]
    assert torch.equal(weight, seen[-1])
    assert not torch.equal(seen[-1], raw[-1])


def test_callbacks_see_the_numbers_and_may_end_it():
    seen = []
    callbacks = [lambda step, now: seen.append((step, now["loss"])), lambda step, now: step == 3]
    result, _ = trained(num_steps=10, callbacks=callbacks)
    assert result.stopped_by == "callback"
    assert seen == list(enumerate(result.history["loss"], 1))
    assert len(seen) == 3


def test_an_interrupt_keeps_what_there_is():
    def interrupt(step, now):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted: 4 of 10 steps are made"):
        result, _ = trained(num_steps=10, callbacks=[interrupt])
    assert result.stopped_by == "interrupt"
    assert len(result.history["loss"]) == 4


# -- going on --------------------------------------------------------------------------------------


class Stop(Exception):
    """An interruption."""


def interrupted(step, now):
    if step == 7:
        raise Stop


class SeenBatches(OfBatches, Seen):
    """With the buffers of spectral norms, and dropout."""


def settings(form):
    """Data, and how they are handed out."""
    x = data()
    if form == "tensor":
        return {"x": x, "batch_size": 5}
    generator = torch.Generator().manual_seed(1) if form == "own generator" else None
    loader = DataLoader(TensorDataset(x), 5, shuffle=True, generator=generator)
    return {"x": loader}


@pytest.mark.parametrize("form", ["tensor", "loader", "own generator"])
@pytest.mark.parametrize("name", ["sm", "pcd", "nce-init", "flow-nce-every", "cd-watched"])
def test_a_resumed_fit_ends_as_one_without_interruption(name, form, tmp_path):
    values = iter([5.0, 1.0, 2.0, 3.0])  # after steps 3, 6, 9 and 11
    again = iter([5.0, 1.0])
    kwargs = {"kind": SeenBatches, "num_steps": 11, "average": 0.9, "checkpoint_every": 5}
    kwargs |= {"clip_norm": 5.0, "metric_every": 3}
    whole, weights = trained(
        MORE[name],
        **settings(form),
        **kwargs,
        metric=lambda: next(values),
        checkpoint=tmp_path / "whole.ckpt",
    )
    assert (whole.num_steps, whole.best_step) == (11, 6)
    kwargs |= {"metric": lambda: next(again), "checkpoint": tmp_path / "parts.ckpt"}
    with pytest.raises(Stop):
        trained(MORE[name], **settings(form), **kwargs, callbacks=[interrupted])
    again = iter([1.0, 2.0, 3.0])  # it was saved after step 5, within a pass
    for _ in range(2):  # and once it is at its end, it stays there
        result, ends = trained(MORE[name], **settings(form), **kwargs, resume=True)
        same_history(whole.history, result.history)
        assert same(weights, ends)
        assert result.best_step == 6


def test_checkpoints_are_not_replaced_nor_mistaken(tmp_path):
    path = tmp_path / "fit.ckpt"
    trained(num_steps=3, batch_size=4, checkpoint=path, resume=True)  # with no file it begins
    with pytest.raises(CheckpointError, match="is there already: go on from it with resume=True"):
        trained(num_steps=3, checkpoint=path)
    with pytest.raises(CheckpointError, match="12 rows in batches of 4, now 12 in batches of 6"):
        trained(num_steps=3, batch_size=6, checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="WeightAverage"):
        trained(num_steps=3, batch_size=4, checkpoint=path, resume=True, average=None)


def test_a_patience_that_is_at_its_end_is_at_its_end(tmp_path):
    kwargs = {"num_steps": 50, "metric_every": 2, "patience": 2, "checkpoint": tmp_path / "a"}
    first, weights = trained(**kwargs, metric=iter(range(9)).__next__)
    again, same_weights = trained(**kwargs, metric=lambda: 1 / 0, resume=True)
    assert first.stopped_by == again.stopped_by == "patience"
    assert first.num_steps == again.num_steps == 6
    assert same(weights, same_weights)


# -- what it refuses -------------------------------------------------------------------------------


class Endless(IterableDataset):
    """Rows without a number."""

    def __iter__(self):
        return iter(data())


def empty_loader():
    return DataLoader(TensorDataset(data()), batch_size=50, drop_last=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": ScoreMatching}, "loss must be a loss, such as .* got the class ScoreMatching"),
        ({"model": None}, "model must be a function, got None"),
        ({"guide": 3}, "guide must be a function, got 3"),
        (
            {"guide": None, "loss": NCE(self_normalized=True)},
            "NCE needs noise: the guide must sample a normalized distribution",
        ),
        ({"data": (data(), data())}, r"has 2 tensors, and model\(x\) cannot take them: too many"),
        (
            {"data": (data(), data()), "model": lambda x, y: None},
            r"has 2 tensors, and guide\(x\) cannot take them: too many",
        ),
        ({"model": MLPEnergy(2, (3,))}, "the model, MLPEnergy, has no pyro.sample statement"),
        ({"data": [1.0, 2.0]}, "data must be a tensor, a tuple of tensors, or a DataLoader, got 1"),
        ({"data": torch.zeros(0, 2)}, r"data must have rows, .* got shapes \(0, 2\)"),
        ({"data": (torch.zeros(3), torch.zeros(4))}, r"as many in each tensor, got shapes \(3,\)"),
        ({"data": empty_loader()}, "data: the DataLoader gives no batches"),
        ({"batch_size": 13}, "batch_size must be at most 12, the rows of data, got 13"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"data": empty_loader(), "batch_size": 3}, "batch_size: a DataLoader has its own"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
        ({"num_epochs": 2}, "num_steps or num_epochs, not both"),
        ({"num_steps": None, "num_epochs": 0}, "num_epochs must be an integer"),
        (
            {"num_steps": None, "num_epochs": 2, "data": DataLoader(Endless())},
            "num_epochs: the DataLoader has no length",
        ),
        ({"lr": -1.0}, "lr must be positive and finite, got -1.0"),
        ({"lr": 0.1, "optim": pyro.optim.Adam({"lr": 0.1})}, "lr: the optimiser .* has its own"),
        ({"optim": "adam"}, "optim must be an optimiser, such as pyro.optim.Adam"),
        ({"optim": pyro.optim.Adam}, "optim must be an optimiser, such as pyro.optim.Adam"),
        ({"optim": lambda parameters: None}, "optim must make an optimiser"),
        (
            {"optim": torch.optim.SGD([nn.Parameter(torch.zeros(2))])},
            "optim holds parameters that neither the model nor the guide uses",
        ),
        (
            {"optim": pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})},
            "optim has clip_args, .* give clip_norm",
        ),
        ({"schedule": 3}, "schedule must be a function of a fraction"),
        ({"schedule": lambda fraction: -1.0}, "schedule must give factors .* got -1.0 at 0"),
        ({"schedule": lambda fraction: math.nan}, "schedule must give factors"),
        (
            {"schedule": StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), 3)},
            "schedule must be that of optim",
        ),
        (
            {
                "schedule": lambda fraction: 1.0,
                "optim": pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9}),
            },
            "schedule: the optimiser has its own",
        ),
        (
            {
                "optim": pyro.optim.ReduceLROnPlateau(
                    {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}}
                )
            },
            "schedule: ReduceLROnPlateau waits for a metric",
        ),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"clip_norm": "short"}, "clip_norm must be a number"),
        ({"average": 1.0}, r"average must lie in \[0, 1\), got 1.0"),
        ({"patience": 3}, "patience waits for a metric"),
        ({"metric": 3.0}, "metric must be a function without arguments"),
        ({"metric": lambda: 1.0, "metric_every": 0}, "metric_every must be an integer"),
        ({"metric": lambda: 1.0, "patience": 0}, "patience must be an integer"),
        ({"metric": lambda: None, "metric_every": 1}, "the number that metric returns must be a"),
        ({"callbacks": print}, "callbacks must be a list of functions"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer"),
        ({"checkpoint": 3}, "checkpoint must be the path of a file, got 3"),
        ({"checkpoint": "no/such/folder.ckpt"}, "checkpoint: there is no folder no/such; make"),
        ({"resume": True}, "resume goes on from a checkpoint: give checkpoint="),
    ],
)
def test_bad_arguments_are_named(change, message):
    world, loss = start()
    arguments = {"loss": loss, "model": world.model, "guide": world.guide, "data": data()}
    with pytest.raises(ValueError, match=message):
        quiet(**{**arguments, "num_steps": 2, **change})


@pytest.mark.parametrize("size", [11, 120])
def test_a_plate_that_does_not_count_the_data_is_named(size):
    world, loss = start()
    world.size = size
    with pytest.raises(ValueError, match=f"plate 'data' is one of {size} rows, a batch has 4 and"):
        quiet(world.model, world.guide, loss, data(), 2, 4)


def test_a_plate_of_all_data_is_named():
    world, loss = start()

    def model(x):
        with pyro.plate("data", 12):
            pyro.sample("x", world.energy(), obs=x)

    with pytest.raises(ValueError, match="'x': the plate 'data' is one of 12 rows, a batch has 4"):
        quiet(model, world.guide, loss, data(), 2, 4)
    quiet(model, world.guide, loss, data(), 2, 12)


def test_a_parameter_out_of_sight_is_named():
    world, loss = start()
    scale = torch.ones((), requires_grad=True)  # no parameter of Pyro's, nor of a network

    def model(x):
        pyro.module("net", world.nets["x"])
        with pyro.plate("data", 12, subsample_size=len(x)):
            p = UnnormalizedEnergy(lambda x: scale * world.nets["x"](x), event_shape=(2,))
            pyro.sample("x", p, obs=x)

    with pytest.raises(ValueError, match="fit does not see it and would never train it"):
        quiet(model, world.guide, loss, data(), 2)


def test_a_model_without_parameters_is_refused():
    def model(x):
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("x", UnnormalizedEnergy(lambda x: x.square().sum(-1), (2,)), obs=x)

    with pytest.raises(ValueError, match="have no parameters to train"):
        quiet(model, lambda x: None, ScoreMatching(), data(), 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it(bad):
    world, loss = start(LOSSES["likelihood"])
    weight, seen = next(world.nets["x"].parameters()), []

    def spoil(step, now):
        seen.append(weight.detach().clone())

    term = loss.energy_term
    loss.energy_term = lambda site: term(site) * (bad if len(seen) == 3 else 1.0)
    with (
        pytest.warns(UserWarning, match="NaN"),
        pytest.raises(FloatingPointError, match=r"step 4: the loss is nan at site 'x'"),
    ):
        quiet(world.model, world.guide, loss, data(), 9, callbacks=[spoil])
    assert torch.equal(weight, seen[-1])


def test_a_gradient_that_is_not_finite_ends_it():
    def model(x):
        a = pyro.param("a", torch.tensor(0.0))
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(a.abs().sqrt(), 1.0).expand([2]).to_event(1), obs=x)

    with pytest.raises(FloatingPointError, match=r"step 1: the gradient of \['params.a'\] is not"):
        quiet(model, lambda x: None, Trace_ELBO(), data(), 2)


def test_a_metric_that_is_no_number_ends_it():
    with pytest.raises(FloatingPointError, match="step 2: metric returned nan"):
        trained(num_steps=5, metric=lambda: math.nan, metric_every=2)


# -- with others -----------------------------------------------------------------------------------


def by_fit(name, edges=(0, N)):
    """The weights, their average, and the history after a few steps."""
    pyro.clear_param_store()
    x = points()[edges[rank()] : edges[rank() + 1]]
    loss = SHARDED[name](CHAINS * len(x) // N) if name == "pcd" else SHARDED[name]()
    world = Shard(loss)
    make = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.5, weight_decay=0.1)
    values = []

    def metric():
        values.append(float(rank()))
        return 10 * rank() - len(values)  # the mean is what counts

    with noise_of(edges):
        result = quiet(
            world.model,
            world.guide,
            loss,
            x,
            5,
            len(x),
            shuffle=False,
            optim=make,
            clip_norm=1.0,
            average=0.5,
            metric=metric,
            metric_every=2,
            distributed=True,
        )
    state = {k: v.detach().clone() for k, v in result.module.state_dict().items()}
    return state, result.history, result.best_step


@pytest.mark.parametrize("name", ["sm", "pcd", "nce", "flow-nce-turns"])
def test_two_ranks_train_as_one_process_does(ranks, name):
    edges = (0, 4, 12)
    (first, history, best), (second, *_) = ranks(by_fit, name, edges)
    one, alone, _ = by_fit(name)
    assert first.keys() == one.keys()
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(history["gradient_norm"], alone["gradient_norm"], rtol=1e-9)
    assert history["gradient_norm"].max() > 1.0  # so that it is cut
    assert history["metric"].tolist() == [4.0, 3.0, 2.0]
    assert best == 5


def different_steps():
    world, loss = start()
    x = data()[: 4 + 8 * rank()]
    quiet(world.model, world.guide, loss, x, batch_size=4, num_epochs=2, distributed=True)


def test_ranks_take_as_many_steps(ranks):
    with pytest.raises(ValueError, match="the ranks have different numbers of steps"):
        ranks(different_steps)
