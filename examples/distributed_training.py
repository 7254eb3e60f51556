r"""Training in several processes: an energy of handwritten digits, the data shared out.

    torchrun --nproc_per_node=2 --max-restarts=3 examples/distributed_training.py

starts two processes, *ranks*. Each holds a shard of the digits and the whole network, and
``DistributedDataParallel`` takes the mean of their gradients at every step. A loss is a sum over
the data, scaled by its plate; so that the mean over R ranks is the gradient of all data, every rank
writes the plate as if all held as many data as it does,

    pyro.plate("digits", R * len(shard), subsample_size=len(batch))

and nothing else in model, guide or loss knows of the others. Denoising score matching trains the
network; its loss on digits that were held out is printed beside that of one process, which rank 0
trains afterwards, from the same network, on as many digits a step. The same script runs without
torchrun.

Every few steps each rank saves its training: parameters, moments, random state. A run that was cut
short goes on from there, bit for bit: kill a rank (`kill -9`, its number is printed) and torchrun
starts both again. A rank that hangs is named by the other after a minute.
"""

import argparse
import glob
import os
import time
from pathlib import Path

import pyro
import torch
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm import UnnormalizedEnergy, files
from pyro_ebm.losses import DenoisingScoreMatching, load_training, save_training
from pyro_ebm.nn import ConvEnergy
from pyro_ebm.ops.distributed import (
    join_group,
    naming_ranks,
    rank,
    rank_path,
    rank_seed,
    world_size,
)

TIMEOUT = 60  # seconds until a rank that hangs is noticed

# ---- the data ----------------------------------------------------------------------------------


def split_digits():
    """Handwritten digits, 8 x 8 pixels in [-1, 1]: three quarters, and the rest."""
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[450:]], images[order[:450]]


# ---- the model, and its training ---------------------------------------------------------------


class Digits(torch.nn.Module):
    """A network as the energy of an image, and a Pyro model of ``size`` images."""

    def __init__(self, size, channels):
        super().__init__()
        self.net, self.size = ConvEnergy((8, 8), channels), size

    def forward(self, x):
        with pyro.plate("digits", self.size, subsample_size=len(x)):
            pyro.sample("x", UnnormalizedEnergy(self.net, event_shape=(8, 8)), obs=x)


def no_guide(x):
    """All sites are observed."""


class Training:
    """One training, of this process's data: all of them, or a shard."""

    def __init__(self, data, num_ranks, args):
        pyro.set_rng_seed(0)  # one network for all
        self.data, self.batch_size = data, args.batch_size // num_ranks
        self.model = Digits(num_ranks * len(data), args.channels)
        self.module = DenoisingScoreMatching(sigma=0.3)(self.model, no_guide)
        self.together = self.module
        if num_ranks > 1:  # the energy's last bias has no score, and so no gradient
            self.together = DistributedDataParallel(self.module, find_unused_parameters=True)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-3)
        self.seconds = 0.0
        pyro.set_rng_seed(rank_seed(1))  # noise of its own for each

    def step(self):
        start = time.perf_counter()
        batch = self.data[torch.randint(len(self.data), (self.batch_size,))]
        self.optimizer.zero_grad()
        (self.together(batch) / self.model.size).backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start

    def loss(self, images):
        """The mean loss of an image, always under the same noise; asks nothing of other ranks."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return float(self.module(images) / self.model.size)


def train(training, held_out, args):
    """The loss on the held-out digits, every few steps, from the last checkpoint on."""
    parts = (training.together, training.optimizer)
    progress = load_training(args.checkpoint, *parts, missing_ok=True)
    first, losses = progress.get("step", 0), progress.get("losses", {})
    print(f"rank {rank()} of {world_size()}, process {os.getpid()}: from step {first}", flush=True)
    for step in range(first + 1, args.num_steps + 1):
        training.step()
        if step % args.every == 0:
            losses[step] = training.loss(held_out)
            save_training(args.checkpoint, *parts, step=step, losses=losses)
            if rank() == 0:
                print(f"step {step}: saved", flush=True)
    return losses, args.num_steps - first


def remove(checkpoint):
    """The files of all ranks, for rank 0 to call: the next run starts anew."""
    names = glob.escape(rank_path(checkpoint).name).replace(".rank0of", ".rank*of")
    for path in list(checkpoint.parent.glob(names)):
        files.previous(path).unlink(missing_ok=True)
        path.unlink()


def main():
    parser = argparse.ArgumentParser(description="An energy of digits, in several processes.")
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between looks, and saves")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step, of all ranks")
    parser.add_argument("--channels", type=int, default=16, help="of the first convolution")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("examples/output/distributed_training.ckpt")
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    join_group(timeout=TIMEOUT)
    images, held_out = split_digits()
    shard = images[rank() :: world_size()]

    with naming_ranks(TIMEOUT):
        training = Training(shard, world_size(), args)
        losses, num_steps = train(training, held_out, args)
        if world_size() > 1:
            torch.distributed.barrier()  # all have saved
    report = {f"{world_size()} ranks" if world_size() > 1 else "one process": losses}
    speed = {name: training.seconds / max(num_steps, 1) for name in report}
    if rank() == 0 and world_size() > 1:
        print("the ranks are done; rank 0 trains alone", flush=True)
        alone = Training(images, 1, args)
        report["one process"] = beside = {}
        for step in range(1, args.num_steps + 1):
            alone.step()
            if step in losses:
                beside[step] = alone.loss(held_out)
        speed["one process"] = alone.seconds / args.num_steps
    if rank() == 0:
        print("\nloss of a held-out digit\n   step" + "".join(f"{name:>15}" for name in report))
        for step in losses:
            print(f"{step:7}" + "".join(f"{column[step]:15.4f}" for column in report.values()))
        print("ms/step" + "".join(f"{1000 * seconds:15.1f}" for seconds in speed.values()))
        remove(args.checkpoint)  # last of all: until then a restart needs the files of all ranks
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
