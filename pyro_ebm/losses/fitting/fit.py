r"""Training in one call.

A step of :func:`~pyro_ebm.fit` is that of a loop by hand: the gradient of the loss on a minibatch,
cut to a length if it is asked for, a step of the optimiser, a step of its schedule,

.. math:: g_k = \nabla_\theta \mathcal L(\theta_k; x_{B_k}), \qquad
          \theta_{k+1} = \theta_k - \epsilon\, s(k / K)\;
          \mathrm{optim}\big( g_k \min(1, c / |g_k|) \big) ,

with rate :math:`\epsilon`, schedule :math:`s`, and ``clip_norm`` :math:`c`. The model, the guide
and the loss are those of ``SVI``, the optimiser is one of torch over all parameters, and nothing is
hidden in between: another training is another loop, around the same parts.

Late in training the weights wander about an optimum, by the noise of the gradients. Their average
over the last :math:`1/(1 - \beta)` steps or so lies nearer to it,

.. math:: \bar\theta_k = \beta_k \bar\theta_{k-1} + (1 - \beta_k)\, \theta_k, \qquad
          \beta_k = \min\Big(\beta, \frac{1 + k}{10 + k}\Big), \qquad \bar\theta_0 = \theta_0 ;

at first it is one over the last tenth of the steps, which forgets where training began.

Reference:
    Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pyro.infer import ELBO
from torch.utils.data import DataLoader

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import CheckpointError
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.fitting.batches import Batches, Tensors, steps_of
from pyro_ebm.losses.fitting.best import Best
from pyro_ebm.losses.fitting.loop import History, Row, run
from pyro_ebm.losses.fitting.rates import Optim, Schedule, falling, make_schedule
from pyro_ebm.losses.fitting.step import GradientStep, check_plates, check_takes
from pyro_ebm.losses.module import EnergyLossModule
from pyro_ebm.losses.saving.training import load_training, save_training
from pyro_ebm.ops.arguments import check_callable, check_count, check_number, shown
from pyro_ebm.ops.distributed import gathered, rank, rank_path, world_size


@dataclass(repr=False)
class FitResult:
    """What :func:`~pyro_ebm.fit` returns."""

    history: dict[str, np.ndarray]
    """Numbers of each step: ``loss``, ``gradient_norm``, ``lr`` (of the first group of parameters),
    and the loss's diagnostics; with a metric ``metric``, at the steps ``metric_step``."""
    loss: ELBO
    """The loss, with its chains, turns and settings."""
    module: EnergyLossModule
    """``loss(model, guide)`` with all parameters, to evaluate and to save."""
    num_steps: int
    """How many steps were made."""
    stopped_by: str
    """What ended it: ``"num_steps"``, ``"patience"``, ``"callback"`` or ``"interrupt"``."""
    best_step: int | None = None
    """With a metric, the step of the weights that are left."""

    def __repr__(self) -> str:
        loss = repr(self.loss) if isinstance(self.loss, EnergyLoss) else type(self.loss).__name__
        best = "" if self.best_step is None else f", best_step={self.best_step}"
        last = ", ".join(f"{name} {v[-1]:.4g}" for name, v in self.history.items() if len(v))
        return (
            f"FitResult({loss}, num_steps={self.num_steps}, stopped_by={self.stopped_by!r}"
            f"{best}; last: {last})"
        )


def fit(
    model: Model,
    guide: Model | None,
    loss: ELBO,
    data: Tensors | DataLoader,
    num_steps: int | None = None,
    batch_size: int | None = None,
    *,
    num_epochs: int | None = None,
    shuffle: bool = True,
    optim: Optim | None = None,
    lr: float | None = None,
    schedule: Schedule | None = falling,
    clip_norm: float | None = None,
    average: float | None = 0.99,
    metric: Callable[[], object] | None = None,
    metric_every: int = 100,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    resume: bool = False,
    callbacks: Sequence[Callable[[int, Row], object]] = (),
    distributed: bool = False,
    disable_progbar: bool = False,
) -> FitResult:
    r"""Trains a model and its guide by a loss, on minibatches.

    All that the model and the guide use is trained: networks, whether or not ``pyro.module`` names
    them, and parameters of ``pyro.param``, in place: ``SVI``, ``Predictive`` or another ``fit`` go
    on with them.

    Args:
        model: as for ``SVI``. Its plate counts all data, and the batch is a part of it:
            ``pyro.plate("data", len(data), subsample_size=len(x))``.
        guide: as for ``SVI``; None where there are no latents and no noise, for one that samples
            nothing.
        loss: a loss of this package; or an ``ELBO`` of Pyro, for models in which whatever is
            trained, and moves an energy, moves its known log Z too: ``log_normalizer=`` computed
            from the same parameters, ``constant_normalizer=True``, or energies that stay as they
            are, as a factor or the prior of a latent.
        data: a tensor or a tuple of tensors, whose first dimension are the rows, or a
            ``DataLoader``. Model and guide are called with the tensors of a batch. ``()`` is for a
            model that takes none.
        num_steps: gradient steps, 2000 by default.
        batch_size: rows in a batch, by default 100 or all that there are.
        num_epochs: passes over the data, in place of ``num_steps``.
        shuffle: whether tensors are shuffled anew in each pass, by Pyro's seed. The last, shorter
            batch of a pass is then left out, and otherwise taken. (A ``DataLoader`` has settings
            of its own.)
        optim: an optimiser of ``pyro.optim``, also with rates for each parameter; a class of
            torch's, as ``torch.optim.AdamW``, or a function from parameters to an optimiser; or an
            optimiser of torch, and what it holds is trained. By default Adam.
        lr: the rate at the start, of Adam or a class; .005 by default.
        schedule: a function from the fraction of the training that is done, in [0, 1], to a factor
            of the rate; a scheduler of torch, stepped at each step; or None for a constant rate. By
            default it falls exponentially to a twentieth (unless the optimiser has a schedule of
            its own: ``lrd``, or a scheduler of ``pyro.optim``, which is stepped at each step too).
        clip_norm: the gradient is shortened to this Euclidean norm, that of all parameters, if it
            is longer. The loss is a sum over the data, and so is its gradient: look at
            ``history["gradient_norm"]`` first.
        average: the decay :math:`\beta` of the average of the weights, about the last
            :math:`1 / (1 - \beta)` steps; None for none. At the end the weights *are* the averages,
            and ``metric`` sees them; callbacks see those that are being trained.
        metric: a function without arguments whose value is the smaller the better, as the mean
            negative log-likelihood of held-out data. It is evaluated every ``metric_every`` steps
            and after the last, with random numbers of its own, and at the end the weights are
            those at which it was least.
        metric_every: after how many steps.
        patience: how many evaluations in a row without a new best end the training; None for no
            end before ``num_steps``.
        checkpoint: a file to which all of the training is saved
            (:func:`~pyro_ebm.save_training`), every ``checkpoint_every`` steps and at the end.
        checkpoint_every: after how many steps.
        resume: whether to go on from the checkpoint, if there is one. The same call then ends,
            bit for bit, where it would have without an interruption (as after
            :func:`~pyro_ebm.load_training`).
        callbacks: functions called as ``callback(step, numbers)`` after each step, with those that
            the history keeps. One that returns True ends the training (on all ranks, if there are
            several).
        distributed: whether the ranks of the process group train together, each on its shard of
            the data, by ``DistributedDataParallel``; the plate is then ``world_size() *
            len(shard)`` large (:class:`~pyro_ebm.losses.EnergyLossModule`). Without a group it
            changes nothing.
        disable_progbar: whether to show no progress.

    Returns:
        A :class:`~pyro_ebm.losses.FitResult`, with the history. Ctrl-C, too, returns what there is,
        with a warning.

    Raises:
        ValueError: for an argument out of range, or one that does not fit another; a plate that
            does not fit the data; a network that would not be trained; an ``ELBO`` of Pyro that
            would train an energy whose log Z is unknown, learned, or a number.
        FloatingPointError: at a step whose loss or gradient is NaN or infinite; the weights are
            those before that step.
        CheckpointError: for a checkpoint of another training, or one that ``resume`` was not
            given for.
        OSError: if the checkpoint cannot be written; the one before is untouched.

    Example:
        >>> from pyro_ebm import ScoreMatching, fit
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", 1000, subsample_size=len(x)):
        ...         pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> x = 0.5 * torch.randn(1000)
        >>> result = fit(model, None, ScoreMatching(), x, num_steps=500, lr=0.1,
        ...              disable_progbar=True)
        >>> result.stopped_by, sorted(result.history)
        ('num_steps', ['gradient_norm', 'loss', 'lr', 'score_norm'])
        >>> bool((pyro.param("precision") * x.square().mean() - 1).abs() < 0.02)
        True
    """
    if not isinstance(loss, ELBO):
        raise ValueError(f"loss must be a loss, such as ContrastiveDivergence(), got {shown(loss)}")
    guide = no_guide if guide is None else guide
    for name, function in (("model", model), ("guide", guide)):
        check_callable(name, function)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm)
        if not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if metric is None and patience is not None:
        raise ValueError("patience waits for a metric: give metric=")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ValueError(f"callbacks must be a list of functions, got {shown(callbacks)}")
    every = check_count("checkpoint_every", checkpoint_every)
    _check_file(checkpoint, resume)
    together = distributed and world_size() > 1
    if together and not isinstance(loss, EnergyLoss):
        raise ValueError(f"distributed: the loss must be one of pyro_ebm's, got {shown(loss)}")
    batches = Batches(data, batch_size, shuffle, resumable=checkpoint is not None)
    total = steps_of(batches, num_steps, num_epochs)
    if together and len({*gathered(torch.tensor(total)).tolist()}) > 1:
        raise ValueError("distributed: the ranks have different numbers of steps; give num_steps")

    for function in (model, guide):
        check_takes(function, batches.peek())
    module = EnergyLossModule(model, guide, loss).initialize(*batches.peek())
    check_plates(module, batches, world_size() if together else 1)
    history, best = History(), None
    step = GradientStep(module, optim, lr, clip_norm, average, history, together)
    step.scheduler = make_schedule(schedule, step.scheduler, step.optimizer, total)
    if metric is not None:
        best = Best(metric, metric_every, patience, module, step.average, together)
    parts = [module, step.optimizer, step.scheduler, step.average, batches, history, best]
    parts = [part for part in parts if part is not None]
    if checkpoint is not None and resume:
        load_training(checkpoint, *parts, missing_ok=True)

    def after(now: int, row: Row) -> str | None:
        if best is not None:
            best(now)
        stops = [function(now, row) is True for function in callbacks]
        if checkpoint is not None and now % every == 0:
            save_training(checkpoint, *parts)
        return "callback" if any(stops) else "patience" if best and best.exhausted else None

    begun, label = history.num_steps, f"fit {type(loss).__name__}"
    try:
        silent = disable_progbar or rank() > 0
        if best is not None and best.exhausted:
            reason = "patience"
        else:
            reason = run(step, batches, total, history, (after,), label, silent)
        if best is not None and history.num_steps:
            best(history.num_steps, last=True)
        if checkpoint is not None and history.num_steps > begun:
            save_training(checkpoint, *parts)
    except KeyboardInterrupt:
        if together:
            raise
        reason = "interrupt"
        warnings.warn(f"interrupted: {history.num_steps} of {total} steps are made", stacklevel=2)
    finally:
        module.zero_grad()  # SVI adds to the gradients that it finds
    if best is not None and best.values:
        best.restore()
    elif step.average is not None:
        step.average.exchange()
    arrays, best_step = history.arrays(), None
    if best is not None:
        arrays |= {"metric": np.array(best.values), "metric_step": np.array(best.steps)}
        best_step = best.steps[best.best] if best.values else None
    return FitResult(arrays, loss, module, history.num_steps, reason, best_step)


def no_guide(*args: object, **kwargs: object) -> None:
    """A guide that samples nothing."""


def _check_file(checkpoint: str | os.PathLike[str] | None, resume: bool) -> None:
    """Refuses to go on from nowhere, and to replace another training."""
    if checkpoint is None:
        if resume:
            raise ValueError("resume goes on from a checkpoint: give checkpoint=")
        return
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise ValueError(f"checkpoint must be the path of a file, got {shown(checkpoint)}")
    file = rank_path(checkpoint)
    if not file.parent.is_dir():
        raise ValueError(f"checkpoint: there is no folder {file.parent}; make it first")
    if file.exists() and not resume:
        raise CheckpointError(
            f"{file} is there already: go on from it with resume=True, or move it away to start"
            " anew"
        )
