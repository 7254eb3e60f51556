"""A gradient step, and what must hold before the first one."""

import inspect
import math

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.core.introspection import name_of_function
from pyro_ebm.losses.fitting.average import WeightAverage
from pyro_ebm.losses.fitting.batches import Batches
from pyro_ebm.losses.fitting.loop import History, Row
from pyro_ebm.losses.fitting.rates import Optim, make_optimizer
from pyro_ebm.losses.module import EnergyLossModule
from pyro_ebm.losses.traces import refuse_untrained, samples


class GradientStep:
    """A step of the optimiser on a batch, and its numbers."""

    scheduler: LRScheduler | None

    def __init__(
        self,
        module: EnergyLossModule,
        optim: Optim | None,
        lr: float | None,
        clip_norm: float | None,
        average: float | None,
        history: History,
        together: bool,
    ):
        self.history = history
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(
                "the model and the guide have no parameters to train (an energy is not called"
                " before the first step: pyro.param inside of it is to be called in the model)"
            )
        self.module, self.clip_norm = module, clip_norm
        self.optimizer, self.scheduler = make_optimizer(optim, lr, named)
        groups = self.optimizer.param_groups
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        held = {id(p) for p in named.values()}
        if not held.issuperset(map(id, self.parameters)):
            raise ValueError("optim holds parameters that neither the model nor the guide uses")
        self.chosen = isinstance(optim, Optimizer)  # which then says what is trained
        self.average = None if average is None else WeightAverage(self.parameters, average)
        self.together: nn.Module | None = None
        if together:
            self.together = DistributedDataParallel(module, find_unused_parameters=True)
        self.num_known = -1  # parameters in the store when the leaves were last looked at

    def __call__(self, *batch: object) -> Row:
        """Takes the step."""
        self.optimizer.zero_grad()
        loss = (self.together or self.module)(*batch)
        self._check_leaves(loss, batch)
        if self.together is None:
            loss.backward(inputs=self.parameters)
        else:
            loss.backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(grads)
        row = {"loss": float(loss.detach()), "gradient_norm": float(norm)}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            raise FloatingPointError(self._complaint(row))
        if self.clip_norm is not None and row["gradient_norm"] > self.clip_norm:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update()
        return row | getattr(self.module.elbo, "diagnostics", {})

    def _check_leaves(self, loss: Tensor, batch: tuple[object, ...]) -> None:
        """Refuses a loss without parameters, and a parameter that would not be trained."""
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            trace = poutine.trace(self.module.model).get_trace(*batch)
            sampled = (node for node in trace.nodes.values() if node["type"] == "sample")
            if all(map(site_is_subsample, sampled)):
                raise ValueError(
                    f"the model, {name_of_function(self.module.model)}, has no pyro.sample"
                    ' statement: write a function with pyro.sample("x", UnnormalizedEnergy(net),'
                    " obs=x) in a pyro.plate, and give fit that"
                )
            raise ValueError(f"step {self._now}: no parameter takes part in the loss")
        known = len(pyro.get_param_store())
        if known != self.num_known and not self.chosen:
            points = getattr(self.module.elbo, "inputs", [])
            refuse_untrained(loss, [*self.parameters, *points], self.module.model, "fit")
        self.num_known = known

    @property
    def _now(self) -> int:
        return self.history.num_steps + 1

    def _complaint(self, row: Row) -> str:
        sites = ", ".join(map(repr, getattr(self.module.elbo, "not_finite", [])))
        if not math.isfinite(row["loss"]):
            of = f" at site {sites}" if sites else ""
            what = f"the loss is {row['loss']}{of}"
        else:
            named = self.module.named_parameters()
            bad = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
            what = f"the gradient of {bad or 'the parameters'} is not finite"
        return (
            f"step {self._now}: {what}; the weights are those before this step. A smaller lr, or"
            " clip_norm, may keep the energy from running off; history and chains of the steps"
            " before show where it began"
        )


def check_takes(function: Model, batch: tuple[object, ...]) -> None:
    """Raises a ValueError for a model or a guide that a batch has too many or too few tensors for.

    Example:
        >>> check_takes(lambda x: None, (torch.zeros(3), torch.zeros(3)))
        Traceback (most recent call last):
        ValueError: a batch of the data has 2 tensors, and lambda(x) cannot take them: ...
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # of some functions written in C
        return
    try:
        signature.bind(*batch)
    except TypeError as error:
        raise ValueError(
            f"a batch of the data has {len(batch)} tensor{'s' * (len(batch) != 1)}, and"
            f" {name_of_function(function)}{signature} cannot take them: {error}. Model and guide"
            " are called with all of a batch, labels too: give both an argument for each tensor, or"
            " data without the others"
        ) from error


def check_plates(module: EnergyLossModule, batches: Batches, num_ranks: int) -> None:
    """Raises a ValueError for an observed site whose plate does not count the data.

    Args:
        module: the model and the guide.
        batches: the data.
        num_ranks: how many processes hold as many.
    """
    batch, rows = batches.peek(), batches.num_rows
    size = next((len(x) for x in batch if isinstance(x, Tensor) and x.dim()), None)
    if size is None or rows is None:
        return
    total = rows * num_ranks
    with torch.no_grad():
        guide_trace = poutine.trace(module.guide).get_trace(*batch)
        trace = poutine.trace(poutine.replay(module.model, trace=guide_trace)).get_trace(*batch)
    for name, site in samples(trace).items():
        if not site["is_observed"]:
            continue
        shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        for frame in site["cond_indep_stack"]:
            full = frame.full_size or frame.size
            here = shape[frame.dim] if frame.dim is not None and -frame.dim <= len(shape) else None
            whole = here == size < frame.size == full == total
            if whole or (here == size == frame.size < full and full not in (total, size)):
                raise ValueError(
                    f"site {name!r}: the plate {frame.name!r} is one of {full} rows, a batch has"
                    f" {size} and the data {total}: write pyro.plate({frame.name!r}, {total},"
                    " subsample_size=len(x)) for a batch x"
                )
