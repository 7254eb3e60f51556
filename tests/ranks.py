"""Processes that compute together, for tests: started once, asked often."""

import datetime
import os
import socket
from concurrent.futures import ProcessPoolExecutor

import pyro
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import seeds

TIMEOUT = 60  # seconds

# New processes are forks of one that has imported what takes long.
processes = mp.get_context("forkserver")
processes.set_forkserver_preload(["pyro_ebm", "matplotlib.pyplot"])


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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
