"""Processes that compute together, for tests: started once, asked often."""

import datetime
import os
import runpy
import socket
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor

import pyro
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import seeds

TIMEOUT = 60  # seconds

# New processes are forks of one that has imported what takes long.
processes = mp.get_context("forkserver")
processes.set_forkserver_preload(
    ["pyro_ebm", "matplotlib.pyplot", "sklearn.datasets", "torch._dynamo", "pytest"]
)


class Ranks:
    """A gloo process group whose ranks call functions that test modules define at module level.

    `ranks(function, *args)` is the list of what `function(*args)` returns on each rank, each with
    an empty param store and seeds of its own; an error on a rank is raised here.
    """

    def __init__(self, size):
        port = free_port()
        self.pools = [
            ProcessPoolExecutor(1, processes, join, (rank, size, port)) for rank in range(size)
        ]

    def __call__(self, function, *args):
        futures = [pool.submit(run, function, args, seeds.number) for pool in self.pools]
        return [future.result(2 * TIMEOUT) for future in futures]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pool in self.pools:
            pool.shutdown()


def join(rank, size, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    wait = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=wait)


def run(function, args, reseed):
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    with seeds.reseeded(reseed):
        pyro.set_rng_seed(dist.get_rank())
        return function(*args)


def as_script(path, flags, folder, out, no_warning=None, **environment):
    """Run a script in this process as ``python path flags`` would, its output to a file."""
    os.chdir(folder)
    os.environ.update(environment)
    with open(out, "w", buffering=1) as stream:
        sys.stdout = sys.stderr = stream
        sys.argv = [str(path), *flags.split()]
        if no_warning:
            warnings.filterwarnings("error", no_warning)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise


def as_two_ranks(path, flags, folder):
    """What a script prints, run by two processes that find in their environment who they are."""
    folder.mkdir()
    outs = [folder.with_suffix(f".rank{rank}") for rank in (0, 1)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pair = [
        processes.Process(
            target=as_script, args=(path, flags, folder, out), kwargs={**group, "RANK": str(rank)}
        )
        for rank, out in enumerate(outs)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(2 * TIMEOUT)
    text = "".join(out.read_text() for out in outs)
    assert [process.exitcode for process in pair] == [0, 0], text
    return text


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
