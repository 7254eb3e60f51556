r"""Sampling in several processes: chains shared out, warmup learned from all of them.

    torchrun --nproc_per_node=2 examples/distributed_sampling.py

starts two processes, *ranks*. Each moves half of the chains of a logistic regression on 2,000 data,
with random numbers of its own. During warmup all ranks learn one step size, one mass matrix and one
trajectory length from all chains; afterwards none waits for another. The draws come to rank 0,
which prints them, and the time that they took. The same script runs without torchrun, with all
chains in one process: the numbers are then the same up to Monte Carlo error.

With --checkpoint every rank saves its chains as they run, and goes on from there when torchrun
starts it again (--max-restarts=3), as if it had never been killed.

On machines with several GPUs, tensors of the model on ``cuda:LOCAL_RANK`` put the chains there.
"""

import argparse
import os
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm import MCMC, ChEESKernel
from pyro_ebm.ops.distributed import join_group, naming_ranks, rank, rank_path, world_size

TIMEOUT = 60  # seconds until a rank that hangs is noticed


def data(num_data, dim):
    """Covariates and outcomes of a logistic regression, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_data, dim, generator=generator)
    truth = torch.linspace(-1.0, 1.0, dim)
    y = torch.rand(num_data, generator=generator) < (x @ truth).sigmoid()
    return x, y.float()


def model(x, y):
    """Coefficients with a standard normal prior."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def main():
    parser = argparse.ArgumentParser(description="A logistic regression, in several processes.")
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--num-chains", type=int, default=64, help="of all ranks")
    parser.add_argument("--num-data", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(1)
    join_group(timeout=TIMEOUT)
    x, y = data(args.num_data, args.dim)
    pyro.set_rng_seed(0)
    mcmc = MCMC(
        ChEESKernel(model),
        args.num_samples,
        args.warmup_steps,
        num_chains=args.num_chains,
        distributed=True,
        disable_progbar=True,
        checkpoint=args.checkpoint,
        checkpoint_every=20,
    )
    begun = args.checkpoint is not None and rank_path(args.checkpoint).exists()
    who = f"rank {rank()} of {world_size()}, process {os.getpid()}"
    print(f"{who}: {'goes on' if begun else 'starts'}")
    start = time.perf_counter()
    with naming_ranks(TIMEOUT):
        if begun:
            mcmc.resume(x, y)
        else:
            mcmc.run(x, y)
    seconds = time.perf_counter() - start

    learned = mcmc.kernel.adaptation.step_size, mcmc.kernel.trajectory_length
    step_size, length = (float(number) for number in learned)
    print(f"rank {rank()} of {world_size()}: step size {step_size!r}, trajectories {length!r}\n")
    if rank() == 0:
        mcmc.summary()
        processes = "one process" if world_size() == 1 else f"{world_size()} processes"
        print(f"{args.num_chains} chains in {processes}: {seconds:.1f} seconds")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
