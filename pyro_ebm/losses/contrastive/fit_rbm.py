r"""Training restricted Boltzmann machines, and networks of them layer by layer.

The loop of :func:`~pyro_ebm.fit` with steps of their own, for those who want a trained machine.
They touch no parameter store. Where the loss is the default, or another setting of contrastive
divergence by Gibbs sweeps, the steps are those of
:mod:`~pyro_ebm.losses.contrastive.rbm_gradient`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pyro_ebm.distributions.boltzmann.belief_network import DeepBeliefNetwork
from pyro_ebm.distributions.boltzmann.rbm_module import GaussianRBMModule, RBMModule
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.losses.contrastive.rbm_gradient import SITE, ClosedFormStep
from pyro_ebm.losses.fitting.batches import Batches
from pyro_ebm.losses.fitting.loop import History, Row, run
from pyro_ebm.losses.fitting.rates import adam, falling
from pyro_ebm.ops.arguments import check_count


def fit_rbm(
    net: RBMModule,
    data: Tensor,
    num_epochs: int = 60,
    batch_size: int = 100,
    lr: float = 0.03,
    loss: EnergyLoss | None = None,
    center_rate: float = 0.01,
    callback: Callable[[int, dict[str, float]], object] | None = None,
    disable_progbar: bool = False,
) -> list[dict[str, float]]:
    r"""Fits a restricted Boltzmann machine to data.

    Adam, with a rate that falls exponentially to a twentieth, on minibatches drawn without
    replacement; the negatives are persistent chains. Offsets of a centered machine follow the data.

    Args:
        net: ``RBMModule(n, m, data, centered=True)``, ``GaussianRBMModule(...)``; trained in
            place.
        data: points, shape ``(num, n)``. Numbers between 0 and 1 for binary units are
            probabilities: bits are drawn from them anew for each batch.
        num_epochs: passes over the data.
        batch_size: points for each step; a last, smaller batch is left out of its epoch.
        lr: Adam's rate at the start, for the mean log-likelihood of a point. In few epochs 0.1
            comes furthest, in many 0.03.
        loss: by default ``ContrastiveDivergence(persistent=True, num_chains=batch_size)``.
        center_rate: how fast the offsets of a centered machine move, see
            :meth:`~pyro_ebm.distributions.boltzmann.rbm_module.RBMModule.recenter`.
        callback: called as ``callback(epoch, diagnostics)`` after each, say to watch an exact or
            estimated log-likelihood: that of a machine trained too fast rises, then falls.
        disable_progbar: whether to show no progress.

    Returns:
        The loss's diagnostics at the end of each epoch.

    Raises:
        ValueError: for data of another shape or that are no visible units, or numbers out of range.

    Reference:
        Tieleman (2008), Training restricted Boltzmann machines using approximations to the
        likelihood gradient.

    Example:
        >>> data = torch.bernoulli(torch.full((200, 4), 0.2))
        >>> net = RBMModule(4, 3, data)
        >>> history = fit_rbm(net, data, num_epochs=5, disable_progbar=True)
        >>> len(history), "energy_data" in history[-1], "spread" in history[-1]
        (5, True, True)
    """
    num_epochs = check_count("num_epochs", num_epochs)
    batch_size = check_count("batch_size", batch_size)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not 0 <= center_rate <= 1:
        raise ValueError(f"center_rate must lie in [0, 1], got {center_rate}")
    num_visible = net.weights.shape[0]
    if data.dim() != 2 or data.shape[1] != num_visible or not len(data):
        raise ValueError(f"data must have shape (num, {num_visible}), got {tuple(data.shape)}")
    bits = not isinstance(net, GaussianRBMModule)
    if bits and not ((data >= 0) & (data <= 1)).all():
        raise ValueError(
            "data of binary units must be bits, or probabilities of bits, and some leave [0, 1]:"
            " scale or binarize them, or use GaussianRBMModule"
        )
    if not data.isfinite().all():
        raise ValueError("the data hold NaN or infinite values: drop those rows")
    bits = bits and not ((data == 0) | (data == 1)).all()
    batches = Batches(data, min(batch_size, len(data)), resumable=False)
    if loss is None:
        loss = ContrastiveDivergence(persistent=True, num_chains=batches.rows.batch_size)
    in_epoch, optimizer = len(batches), adam(net.parameters(), lr)
    num_steps = num_epochs * in_epoch
    schedule = LambdaLR(optimizer, lambda step: falling(step / num_steps))
    gradients = ClosedFormStep.of(net, loss) or _TracedStep(net, loss)
    history = []

    def step(x: Tensor) -> Row:
        last = batches.position == in_epoch
        gradients(torch.bernoulli(x) if bits else x, center_rate, record=last)
        optimizer.step()
        schedule.step()
        if not last:
            return {}
        history.append(loss.diagnostics)
        if callback is not None:
            callback(len(history) - 1, history[-1])
        return history[-1]

    run(
        step, batches, num_steps, History(), label=f"fit {net()!r}", disable_progbar=disable_progbar
    )
    optimizer.zero_grad()  # SVI adds to the gradients that it finds
    return history


def fit_layers(
    network: DeepBeliefNetwork,
    data: Tensor,
    means: bool = True,
    callback: Callable[[int, int, dict[str, float]], object] | None = None,
    **kwargs: Any,
) -> list[list[dict[str, float]]]:
    r"""Fits a deep belief network greedily, from the bottom up, each machine by :func:`fit_rbm`.

    The data of each machine are the hidden units of those below, given the data.

    Args:
        network: trained in place.
        data: points, shape ``(num, n)``.
        means: whether layers below hand up their means (bits of the layer being trained are drawn
            from them anew for each batch), or one draw of bits for each point.
        callback: called as ``callback(machine, epoch, diagnostics)`` after each epoch.
        **kwargs: settings of :func:`fit_rbm`; not ``loss``, which belongs to one machine.

    Returns:
        For each machine, the diagnostics of its epochs.

    Raises:
        ValueError: as :func:`fit_rbm` does.

    Reference:
        Hinton, Osindero and Teh (2006), A fast learning algorithm for deep belief nets.

    Example:
        >>> data = torch.bernoulli(torch.full((200, 4), 0.2))
        >>> network = DeepBeliefNetwork([RBMModule(4, 3, data), RBMModule(3, 2)])
        >>> history = fit_layers(network, data, num_epochs=2, disable_progbar=True)
        >>> [len(epochs) for epochs in history]
        [2, 2]
    """
    if "loss" in kwargs:
        raise ValueError(
            "a loss holds the chains of one machine: call fit_rbm for each with its own"
        )
    history, inner = [], None
    for index, net in enumerate(network.machines):
        assert isinstance(net, RBMModule)
        below = network.transform if means else network.propagate
        if callback is not None:
            inner = functools.partial(callback, index)
        history.append(fit_rbm(net, below(data, index), callback=inner, **kwargs))
    return history


class _TracedStep:
    """Sets the gradients of a machine by any loss, at the site of a model."""

    def __init__(self, net: RBMModule, loss: EnergyLoss):
        self.net, self.loss = net, loss

    def __call__(self, x: Tensor, center_rate: float, record: bool) -> None:
        if self.net.centered:
            self.net.recenter(x, center_rate)
        self.net.zero_grad()
        (self.loss.differentiable_loss(self._model, _no_guide, x) / len(x)).backward()

    def _model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(SITE, self.net(), obs=x)


def _no_guide(x: Tensor) -> None:
    """A guide with nothing in it: all sites are observed."""
