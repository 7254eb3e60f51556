"""Draws that are streamed to a Zarr store are the draws that memory would hold."""

import contextlib
import errno
import re
import shutil
import sys
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyro_ebm import MCMC, LangevinKernel
from pyro_ebm.files import CheckpointError
from pyro_ebm.mcmc import ChEESKernel, CompositeKernel
from pyro_ebm.mcmc.running.storage import draws as record
from pyro_ebm.mcmc.running.storage.zarr_store import ZarrStore

DATA = torch.tensor([0.5, -1.0, 2.0])


def model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.sum(), scale), obs=y)


def clusters(y):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    x = pyro.sample("x", dist.Normal(1.0 * k, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0).expand([len(y)]).to_event(1), obs=y)


KERNELS = {
    "langevin": lambda: LangevinKernel(model),
    "chees": lambda: ChEESKernel(model),
    "composite": lambda: CompositeKernel(clusters),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few draws each."""
    monkeypatch.setattr(record, "BLOCK_BYTES", 800)


class Stop(Exception):
    """Ends a run in its middle."""


class Died(BaseException):
    """As a killed process: nothing catches it."""


def died(*args):
    raise Died


def stop_at(t):
    def hook(kernel, params, stage, i):
        if stage == "Sample" and i + 1 == t:
            raise Stop

    return hook


def sampler(name="langevin", **settings):
    pyro.set_rng_seed(0)
    return MCMC(KERNELS[name](), 40, 20, num_chains=3, disable_progbar=True, **settings)


def in_memory(name="langevin", **settings):
    mcmc = sampler(name, **settings)
    mcmc.run(DATA)
    return mcmc


def assert_holds(data, mcmc):
    """The ArviZ data are those of a run in memory."""
    groups = {
        "posterior": mcmc.get_samples(group_by_chain=True),
        "sample_stats": mcmc.get_extra_fields(group_by_chain=True),
    }
    for group, wanted in groups.items():
        assert set(data[group].data_vars) == set(wanted)
        for name, value in wanted.items():
            found = data[group][name]
            assert found.dims[:2] == ("chain", "draw")
            assert found.dtype == value.numpy().dtype
            np.testing.assert_array_equal(found.values, value.numpy())


@pytest.mark.parametrize("name", KERNELS)
def test_a_store_holds_what_memory_would(tmp_path, name):
    mcmc = sampler(name, store=tmp_path / "a.zarr")
    mcmc.run(DATA)
    data = mcmc.to_arviz()
    assert_holds(data, in_memory(name))
    found = arviz.summary(data)
    assert found["mean"].notna().all()
    assert data.posterior.attrs["inference_library"] == "pyro"


@pytest.mark.parametrize("settings", [{"thinning": 3}, {"save_params": ["x"]}])
def test_every_setting(tmp_path, settings):
    mcmc = sampler(store=tmp_path / "a.zarr", **settings)
    mcmc.run(DATA)
    assert_holds(mcmc.to_arviz(), in_memory(**settings))


def test_xarray_opens_it_too(tmp_path):
    mcmc = sampler(store=tmp_path / "a.zarr")
    mcmc.run(DATA)
    with xarray.open_zarr(tmp_path / "a.zarr", group="posterior") as posterior:
        assert dict(posterior.sizes) == {"chain": 3, "draw": 40, "x_dim_0": 2}


def test_draws_are_not_in_memory_and_it_says_where_they_are(tmp_path):
    mcmc = sampler(store=tmp_path / "a.zarr")
    mcmc.run(DATA)
    for read in (mcmc.get_samples, mcmc.get_extra_fields, mcmc.summary, mcmc.diagnostics):
        with pytest.raises(RuntimeError, match=r"in the store .*a\.zarr: to_arviz\(\) opens it"):
            read()
    with pytest.raises(ValueError, match=r"opened as they are, without \['log_likelihood'\]"):
        mcmc.to_arviz(log_likelihood=True)


def test_the_warmup_stays_in_memory(tmp_path):
    mcmc = sampler(store=tmp_path / "a.zarr", save_warmup=True)
    mcmc.run(DATA)
    wanted = in_memory(save_warmup=True).get_warmup_samples()
    assert torch.equal(mcmc.get_warmup_samples()["x"], wanted["x"])


# -- stopped, and gone on with ---------------------------------------------------------------------


def files_of(tmp_path):
    return {"store": tmp_path / "a.zarr", "checkpoint": tmp_path / "a", "checkpoint_every": 7}


@pytest.mark.parametrize(
    ("name", "stops"),
    [("langevin", (1, 39)), ("chees", (8, 22, 23)), ("composite", (17,))],
)
def test_a_run_goes_on_exactly(tmp_path, name, stops):
    mcmc = sampler(name, hook_fn=stop_at(stops[0]), **files_of(tmp_path))
    with pytest.raises(Stop):
        mcmc.run(DATA)
    for stop in stops[1:]:
        mcmc = sampler(name, hook_fn=stop_at(stop), **files_of(tmp_path))
        with pytest.raises(Stop):
            mcmc.resume(DATA)
    mcmc = sampler(name, **files_of(tmp_path))
    mcmc.resume(DATA)
    assert_holds(mcmc.to_arviz(), in_memory(name))


@pytest.mark.parametrize("at", ["before", "within"])
def test_a_kill_before_the_store_is_made(tmp_path, monkeypatch, at):
    """The checkpoint is there first, so that resume can go on from it."""
    if at == "before":
        monkeypatch.setattr(ZarrStore, "open", died)
    else:
        monkeypatch.setattr(ZarrStore, "_commit", died)
    with pytest.raises(Died):
        sampler(**files_of(tmp_path)).run(DATA)
    monkeypatch.undo()
    mcmc = sampler(**files_of(tmp_path))
    mcmc.resume(DATA)
    assert_holds(mcmc.to_arviz(), in_memory())


def test_an_extended_run(tmp_path):
    mcmc = sampler(**files_of(tmp_path))
    mcmc.run(DATA)
    mcmc.extend(11)
    again = sampler(**files_of(tmp_path))
    again.resume(DATA)
    again.extend(12)
    longer = MCMC(KERNELS["langevin"](), 63, 20, num_chains=3, disable_progbar=True)
    pyro.set_rng_seed(0)
    longer.run(DATA)
    assert_holds(again.to_arviz(), longer)


def test_an_interrupt_keeps_the_draws(tmp_path):
    def hook(kernel, params, stage, i):
        if stage == "Sample" and i + 1 == 23:
            raise KeyboardInterrupt

    mcmc = sampler(hook_fn=hook, **files_of(tmp_path))
    with pytest.warns(UserWarning, match="interrupted: 23 of 40 draws"):
        mcmc.run(DATA)
    whole = in_memory()
    x = mcmc.to_arviz().posterior["x"].values
    np.testing.assert_array_equal(x, whole.get_samples(group_by_chain=True)["x"][:, :23])
    mcmc.hook_fn = None
    mcmc.resume(DATA)
    assert_holds(mcmc.to_arviz(), whole)


def test_a_reader_sees_a_block_whole_or_not_at_all(tmp_path, monkeypatch):
    """At each step of the writing of a block, whatever was written so far."""
    wanted = in_memory().get_samples(group_by_chain=True)["x"]
    steps, seen, append = [], set(), ZarrStore._append

    def look():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = xarray.open_datatree(tmp_path / "a.zarr", engine="zarr")
        if "x" in data["posterior"]:
            x = data["posterior"]["x"].values
            for statistic in data["sample_stats"].data_vars.values():
                assert statistic.shape[1] == x.shape[1]
            np.testing.assert_array_equal(x, wanted[:, : x.shape[1]])
            seen.add(x.shape[1])

    def watched(self, group, name, *args):
        look()
        written = append(self, group, name, *args)
        steps.append(name)
        look()
        return written

    monkeypatch.setattr(ZarrStore, "_append", watched)
    sampler(store=tmp_path / "a.zarr").run(DATA)
    assert len(steps) > 12
    assert len(seen) > 2


@pytest.mark.parametrize("at", [3, 12, 27])
def test_a_kill_in_the_middle_of_a_block(tmp_path, monkeypatch, at):
    calls, append = [], ZarrStore._append

    def killed(self, *args):
        calls.append(args)
        if len(calls) == at:
            raise Died
        return append(self, *args)

    monkeypatch.setattr(ZarrStore, "_append", killed)
    with contextlib.suppress(Died):
        sampler(**files_of(tmp_path)).run(DATA)
    monkeypatch.undo()
    assert len(calls) == at
    mcmc = sampler(**files_of(tmp_path))
    mcmc.resume(DATA)
    assert_holds(mcmc.to_arviz(), in_memory())


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    calls, append = [], ZarrStore._append

    def full(self, *args):
        calls.append(args)
        if len(calls) > 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, *args)

    monkeypatch.setattr(ZarrStore, "_append", full)
    with pytest.raises(OSError, match=r"a\.zarr \(No space left on device\): make room, and go on"):
        sampler(**files_of(tmp_path)).run(DATA)
    monkeypatch.undo()
    mcmc = sampler(**files_of(tmp_path))
    mcmc.resume(DATA)
    assert_holds(mcmc.to_arviz(), in_memory())


# -- what does not belong together -----------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(Stop):
        sampler(hook_fn=stop_at(30), **files_of(tmp_path)).run(DATA)
    return tmp_path


def test_never_over_another_store(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.zarr is there already"):
        sampler(store=tmp_path / "a.zarr").run(DATA)


def test_a_store_that_is_missing_or_another(stopped):
    shutil.move(stopped / "a.zarr", stopped / "b.zarr")
    with pytest.raises(CheckpointError, match=r"a\.zarr is missing"):
        sampler(**files_of(stopped)).resume(DATA)
    sampler(store=stopped / "a.zarr").run(DATA)
    with pytest.raises(CheckpointError, match=r"a\.zarr is that of another run"):
        sampler(**files_of(stopped)).resume(DATA)


def test_draws_that_are_missing(stopped):
    shutil.rmtree(stopped / "a.zarr/posterior/x/c/0/1")
    with pytest.raises(CheckpointError, match="draws of 'x' are missing"):
        sampler(**files_of(stopped)).resume(DATA)


@pytest.mark.parametrize("gone", ["posterior/x", "posterior", ""])
def test_arrays_that_are_gone_are_not_made_anew(stopped, gone):
    for path in (stopped / "a.zarr" / gone).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=r"lost the draws of \[.*'x'"):
        sampler(**files_of(stopped)).resume(DATA)


def test_draws_that_were_altered_are_found_when_they_are_read(tmp_path):
    mcmc = sampler(store=tmp_path / "a.zarr")
    mcmc.run(DATA)
    chunk = tmp_path / "a.zarr/posterior/x/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        mcmc.to_arviz().posterior["x"].load()


def test_with_or_without_a_store(stopped):
    settings = files_of(stopped)
    del settings["store"]
    with pytest.raises(CheckpointError, match="store is False, and was True"):
        sampler(**settings).resume(DATA)


def test_without_zarr(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pyro-ebm[zarr]'")):
        sampler(store=tmp_path / "a.zarr").run(DATA)
