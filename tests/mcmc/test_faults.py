"""What goes wrong in one chain stays in one chain; what goes on for ever does not grow or drift."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import MCMC, LangevinKernel, MHKernel, UnnormalizedEnergy
from pyro_ebm.mcmc import BarkerKernel, ChEESKernel, CompositeKernel, GibbsKernel, TemperingKernel
from tests.statistics import assert_moments

CHAINS, SICK = 1000, 137


class Poisoned:
    """A normal energy that is NaN everywhere beyond a wall, but for one place."""

    def __call__(self, x):
        sick = (x[..., 0] > 500) & (x[..., 0] != 1000)
        return x.square().sum(-1) / 2 * torch.where(sick, torch.nan, 1.0)


class Singular:
    """The same, where the place beyond the wall is in the domain of no Cholesky factor."""

    def __call__(self, x):
        scale = torch.where((x[..., 0] > 500) & (x[..., 0] != 1000), -1.0, 1.0)
        factor = torch.linalg.cholesky(scale[..., None, None] * torch.eye(2))
        return x.square().sum(-1) / 2 + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def mixed(energy):
    def model():
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", UnnormalizedEnergy(energy, (2,)))

    return model


FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}
KERNELS = {
    "langevin": lambda p: LangevinKernel(p, step_size=0.3, **FIXED),
    "langevin-captured": lambda p: LangevinKernel(p, step_size=0.3, jit_compile="capture", **FIXED),
    "unadjusted": lambda p: LangevinKernel(p, step_size=0.1, adjusted=False),
    "barker": lambda p: BarkerKernel(p, step_size=0.3, **FIXED),
    "walk": lambda p: MHKernel(p, **FIXED),
    "chees": lambda p: ChEESKernel(p, step_size=0.5, adapt_trajectory_length=False, **FIXED),
    "tempering": lambda p: TemperingKernel(LangevinKernel(p, step_size=0.3, **FIXED), [1.0, 0.5]),
    "composite": lambda p: CompositeKernel(
        p, [GibbsKernel(), LangevinKernel(step_size=0.3, **FIXED)]
    ),
}


# (no graph can be captured where a matrix is singular, and the engine says so)
@pytest.mark.parametrize(
    ("name", "energy"),
    [(name, Poisoned()) for name in KERNELS]
    + [(name, Singular()) for name in KERNELS if name != "langevin-captured"],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_chain_that_turns_nan_touches_no_other(name, energy):
    """With settings that no chain adapts, the others are the same to the last bit."""
    if name == "composite":
        target = mixed(energy)
    else:
        target = UnnormalizedEnergy(energy, (2,))
    found = {}
    for place in (0.0, 1000.0):
        pyro.set_rng_seed(1)
        start = {"x": torch.randn(CHAINS, 2)}
        start["x"][SICK] = torch.tensor([place, 0.0])
        if name == "composite":
            start["k"] = torch.bernoulli(torch.full((CHAINS,), 0.3))
        mcmc = MCMC(KERNELS[name](target), 12, 3, start, CHAINS, disable_progbar=True)
        mcmc.run()
        draws = mcmc.get_samples(group_by_chain=True)
        assert all(value.isfinite().all() for value in draws.values())
        found[place] = {**draws, **mcmc.get_extra_fields(group_by_chain=True)}
    healthy, sick = found[0.0], found[1000.0]
    others = torch.arange(CHAINS) != SICK
    for key, value in healthy.items():
        assert torch.equal(sick[key][others], value[others]), key
    if name == "chees" and isinstance(energy, Singular):  # a trajectory goes straight through
        assert (sick["x"][SICK, -1] != torch.tensor([1000.0, 0.0])).all()
    else:
        assert sick["diverging"][SICK].all()
        assert (sick["x"][SICK] == torch.tensor([1000.0, 0.0])).all()  # it stands where it was
    assert not sick["diverging"][others].any()


def test_a_chain_that_turns_nan_hardly_moves_what_all_adapt():
    """Adaptation pools the chains: one of a thousand has the weight of one."""
    found = []
    for place in (0.0, 1000.0):
        pyro.set_rng_seed(1)
        start = {"x": torch.randn(CHAINS, 2)}
        start["x"][SICK] = torch.tensor([place, 0.0])
        p = UnnormalizedEnergy(Poisoned(), (2,))
        kernel = LangevinKernel(p, adapt_mass_matrix=False)
        mcmc = MCMC(kernel, 20, 100, start, CHAINS, disable_progbar=True)
        mcmc.run()
        found.append(float(kernel.step_size))
    assert abs(found[1] / found[0] - 1) < 0.05  # two samples of the others differ by .01


# -- soak ------------------------------------------------------------------------------------------


class Peak:
    """The most memory that Python and the tensors of a run hold, looked at from time to time."""

    def __init__(self, every):
        self.every, self.seen = every, []

    def __call__(self, kernel, params, stage, i):
        if stage == "Sample" and (i + 1) % self.every == 0:
            self.seen.append(resident())


def resident():
    """Megabytes of memory that the process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("store", [False, True], ids=["memory", "zarr"])
def test_a_million_transitions(tmp_path, store):
    """Memory does not grow beside the draws, the chain does not drift, statistics stay right."""
    torch.set_default_dtype(torch.float64)
    p = UnnormalizedEnergy(lambda x: x.square().sum(-1) / 2, (2,))
    settings = {"store": tmp_path / "a.zarr"} if store else {"thinning": 10}
    peak = Peak(50_000)
    mcmc = MCMC(
        LangevinKernel(p, jit_compile="capture"),
        1_000_000,
        1000,
        num_chains=4,
        disable_progbar=True,
        hook_fn=peak,
        checkpoint=tmp_path / "a",
        **settings,
    )
    mcmc.run()
    # the draws of the memory run, 32 bytes x 4 x 100,000, are there from the start on
    assert max(peak.seen[2:]) - peak.seen[1] < 32, peak.seen
    data = mcmc.to_arviz()
    x = torch.as_tensor(data.posterior["x"].values)[:, :: 10 if store else 1]
    assert x.shape == (4, 100_000, 2)
    for part in x.chunk(10, 1):  # early and late
        assert_moments(part[..., 0], 0.0, 1.0)
    statistics = data.sample_stats
    rates = [part.mean() for part in np.split(statistics["acceptance_rate"].values, 10, 1)]
    # four chains learn a step that is accepted .60 of the time, give or take .04; once it is
    # learned, a tenth of the run knows the rate to .002
    assert abs(np.mean(rates) - 0.6) < 0.16
    assert max(rates) - min(rates) < 0.02
    assert len(set(statistics["step_size"].values.ravel().tolist())) == 1
    lp = torch.as_tensor(statistics["lp"].values)[:, :: 10 if store else 1]
    torch.testing.assert_close(lp, -x.square().sum(-1) / 2)
