"""The best weights of a training, by a number that is evaluated now and then."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pyro_ebm import files
from pyro_ebm.files import Saved
from pyro_ebm.losses.fitting.average import WeightAverage
from pyro_ebm.ops.arguments import check_callable, check_count, check_number
from pyro_ebm.ops.distributed import gathered


class Best:
    """Evaluates a metric, the smaller the better, and keeps the weights at which it was least.

    Args:
        metric: a function without arguments; it has random numbers of its own.
        every: after how many steps it is evaluated.
        patience: how many evaluations in a row without a new best end the training; None for no
            end.
        module: what holds the weights.
        average: which are evaluated at their averages, if there are any.
        pooled: whether its mean over the ranks counts.

    Raises:
        ValueError: for what is no function, or a number out of range.
    """

    def __init__(
        self,
        metric: Callable[[], object],
        every: int,
        patience: int | None,
        module: nn.Module,
        average: WeightAverage | None,
        pooled: bool,
    ):
        check_callable("metric", metric, "a function without arguments")
        self.metric, self.every = metric, check_count("metric_every", every)
        self.patience = None if patience is None else check_count("patience", patience)
        self.module, self.average, self.pooled = module, average, pooled
        self.steps: list[int] = []
        self.values: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def __call__(self, step: int, last: bool = False) -> None:
        """Evaluates it after a step, if that is due."""
        if (step % self.every and not last) or step in self.steps[-1:]:
            return
        state = files.random_state()
        with self.average.in_place() if self.average else nullcontext():
            value = self.metric()
            check_number("the number that metric returns", value)
            value = torch.as_tensor(value, dtype=torch.float64).detach().reshape(())
            if self.pooled:
                value = gathered(value).mean()
            self.steps.append(step)
            self.values.append(float(value))
            if math.isnan(self.values[-1]):
                raise FloatingPointError(f"step {step}: metric returned {self.values[-1]}")
            if self.best == len(self.values) - 1:
                kept = self.module.state_dict()
                self.weights = {name: w.detach().clone() for name, w in kept.items()}
        files.set_random_state(state)

    @property
    def best(self) -> int:
        """Which evaluation is the first of the best."""
        return min(range(len(self.values)), key=self.values.__getitem__)

    @property
    def exhausted(self) -> bool:
        """Whether there was no new best for as long as the patience lasts."""
        if self.patience is None or not self.values:
            return False
        return len(self.values) - 1 - self.best >= self.patience

    def restore(self) -> None:
        """Makes the weights the best ones."""
        self.module.load_state_dict(self.weights)

    def state_dict(self) -> Saved:
        """The evaluations, and the best weights."""
        return {"steps": self.steps, "values": self.values, "weights": self.weights}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.steps, self.values = list(state["steps"]), list(state["values"])
        self.weights = dict(state["weights"])
