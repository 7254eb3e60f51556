"""Annealing with chains on two ranks is annealing with all of them in one process."""

import pytest
import torch

from pyro_ebm import UnnormalizedEnergy, estimate_log_normalizer
from pyro_ebm.ops.distributed import rank
from tests.ranks import Ranks
from tests.statistics import SIGMAS

TRUTH = 2 * torch.tensor(2 * torch.pi).log()  # of a normal in 4 dimensions


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as two:
        yield two


def normal(x):
    return (x - 1.0).square().sum(-1) / 2


def batched(x):
    return (x * torch.tensor([[1.0], [2.0]])).square().sum(-1) / 2


def estimated(method="ais", batch=False, **kwargs):
    p = UnnormalizedEnergy(normal, event_shape=(4,))
    if batch:
        p = UnnormalizedEnergy(batched, event_shape=(4,), batch_shape=(2,))
    elif method == "reverse_ais" or kwargs.pop("both", False):
        kwargs["samples"] = 1 + torch.randn(101, 4, generator=torch.Generator().manual_seed(0))
    return estimate_log_normalizer(p, method, disable_progbar=True, distributed=True, **kwargs)


def told(*args, **kwargs):
    found = vars(estimated(*args, **kwargs))
    return {**found, "next": torch.rand(3)}


def both(num_chains):
    return told(both=True, num_chains=num_chains)


def reverse():
    return told("reverse_ais", betas=[0.0, 0.2, 0.5, 1.0])


def batch(num_chains):
    return told(batch=True, num_chains=num_chains)


def assert_same(first, second):
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and name != "next":
            assert torch.equal(value, second[name]), name
    assert not torch.equal(first["next"], second["next"])


def test_both_directions(ranks):
    first, second = ranks(both, 301)
    assert_same(first, second)
    assert first["log_weights"].shape == (301,)
    assert first["log_weights"].unique().numel() == 301  # each rank's chains are its own
    assert (first["value"] - TRUTH).abs() < SIGMAS * first["std_error"]
    assert first["std_error"] > 0
    log_w = first["log_weights"].double()
    assert torch.isclose(first["value"].double(), log_w.exp().mean().log(), rtol=1e-5)
    assert abs(first["upper"] - TRUTH) < 0.5


def test_in_reverse_from_samples_shared_out(ranks):
    first, second = ranks(reverse)
    assert_same(first, second)
    assert first["log_weights"].shape == (101,)
    assert first["betas"].tolist() == [0.0, 0.2, 0.5, 1.0]
    assert (first["value"] - TRUTH).abs() < SIGMAS * first["std_error"]


def test_a_batch_keeps_its_order(ranks):
    first, second = ranks(batch, 400)
    assert_same(first, second)
    truth = TRUTH - 4 * torch.tensor([1.0, 2.0]).log()
    assert first["log_weights"].shape == (400, 2)
    assert ((first["value"] - truth).abs() < SIGMAS * first["std_error"]).all()


def test_the_error_is_that_of_one_process(ranks):
    alone = estimated(num_chains=300)
    shared = ranks(both, 300)[0]
    assert 0.5 < shared["std_error"] / alone.std_error < 2
    assert 0.3 < len(shared["betas"]) / len(alone.betas) < 3  # two pilots, of few temperatures


def unlike():
    shift = float(rank())
    p = UnnormalizedEnergy(lambda x: (x - shift).square().sum(-1) / 2, event_shape=(4,))
    try:
        estimate_log_normalizer(p, "ais", betas=[0.0, 1.0], distributed=True, disable_progbar=True)
    except ValueError as error:
        return str(error)


def test_ranks_with_other_energies_are_refused(ranks):
    assert all("the ranks differ in the log density" in error for error in ranks(unlike))


def test_alone_it_changes_nothing():
    torch.manual_seed(1)
    distributed = estimated(num_chains=50)
    torch.manual_seed(1)
    p = UnnormalizedEnergy(normal, event_shape=(4,))
    usual = estimate_log_normalizer(p, "ais", num_chains=50, disable_progbar=True)
    assert torch.equal(distributed.log_weights, usual.log_weights)


@pytest.mark.parametrize("method", ["exact", "quadrature", "importance", "bridge"])
def test_only_annealing_has_chains(method):
    p = UnnormalizedEnergy(normal, event_shape=(1,))
    with pytest.raises(ValueError, match="does not take"):
        estimate_log_normalizer(p, method, distributed=True)
