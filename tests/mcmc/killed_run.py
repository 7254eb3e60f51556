"""Kills a run at random moments, resumes it in another process, and kills that, as often as told.

Each process is a fork of this one, which has imported everything and done nothing. Whenever a run
comes to its end it must be the run that was never killed; then the next one begins. The last one is
left in its middle, for the test to go on from.
"""

import os
import random
import signal
import time
import traceback

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import MCMC, LangevinKernel, files
from pyro_ebm.mcmc import ChEESKernel, CompositeKernel, GibbsKernel, TemperingKernel

DATA = torch.tensor([0.5, -1.0, 2.0])
KIND = "what a run gave"


def model(y):
    k = pyro.sample("k", dist.Bernoulli(0.4))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.sum() + k, 1.0), obs=y)


def summed(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


KERNELS = {
    "langevin": lambda: LangevinKernel(summed),
    "chees": lambda: ChEESKernel(summed),
    "composite": lambda: CompositeKernel(model, [GibbsKernel(), ChEESKernel()]),
    "tempering": lambda: TemperingKernel(LangevinKernel(summed), [1.0, 0.4]),
}


def sampler(kernel, path, store=None, **settings):
    return MCMC(
        KERNELS[kernel](),
        150,
        100,
        num_chains=5,
        disable_progbar=True,
        thinning=2,
        checkpoint=path,
        checkpoint_every=7,
        store=store,
        **settings,
    )


def result(mcmc):
    """What a run gave, and the random numbers that follow it."""
    return {
        "samples": mcmc.get_samples(group_by_chain=True),
        "fields": mcmc.get_extra_fields(group_by_chain=True),
        "next": torch.rand(5),
    }


def work(kernel, path, out, seed):
    """Goes on, or starts, to the end."""
    mcmc = sampler(kernel, path)
    if path.exists():
        pyro.set_rng_seed(seed)  # must not matter
        mcmc.resume(DATA)
    else:
        pyro.set_rng_seed(0)
        mcmc.run(DATA)
    files.save(out, result(mcmc), KIND)


def in_a_process(function, *args, patience=None):
    """Runs a function in a process of its own, which is killed after some seconds."""
    child = os.fork()
    if child == 0:
        failed = True
        try:
            function(*args)
            failed = False
        finally:
            if failed:
                traceback.print_exc()
            os._exit(failed)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def same(a, b):
    """Whether two nested dicts of tensors are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


def killed(folder, kernel, kills):
    """When the runs were killed, how many came to their end, and where the last one is."""
    torch.set_num_threads(1)
    random.seed(kernel)
    reference = folder / "reference"
    start = time.perf_counter()
    assert in_a_process(work, kernel, folder / "whole.ckpt", reference, 0)
    seconds = time.perf_counter() - start
    wanted = files.load(reference, KIND)
    count, finished = {"start": 0, "warmup": 0, "sampling": 0}, 0
    path, out = folder / "0.ckpt", folder / "out"
    while sum(count.values()) < kills:
        done = in_a_process(
            work,
            kernel,
            path,
            out,
            random.randrange(1000),
            patience=seconds * 0.6 * random.random(),
        )
        if done:
            assert same(files.load(out, KIND), wanted), f"another result after {count}"
            finished += 1
            path = folder / f"{finished}.ckpt"
            continue
        run = files.load(path, "an MCMC run")["run"] if path.exists() else {"t": -1}
        count["start" if run["t"] < 0 else "warmup" if run["t"] < 100 else "sampling"] += 1
    return {**count, "finished": finished, "path": path}
