r"""Contrastive divergence of machines with hidden units, without a trace and without autograd.

What :class:`~pyro_ebm.ContrastiveDivergence` does at a site that is an
:class:`~pyro_ebm.distributions.RBM` is known in advance: the negatives come from block Gibbs
sweeps, and the gradient of the contrast :math:`\overline{F(x)} - \overline{F(x')}` is a difference
of mean products of units
(:meth:`~pyro_ebm.distributions.boltzmann.rbm_module.RBMModule.cd_gradient`). A step then is a few
products of small matrices. It makes the same draws as the loss in a model does, leaves its chains
in the loss, and its gradients agree to rounding.
"""

import torch
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_ebm.distributions.boltzmann.rbm_module import GaussianRBMModule, RBMModule
from pyro_ebm.losses.base import EnergyLoss
from pyro_ebm.losses.contrastive.chain_watch import chain_numbers
from pyro_ebm.losses.contrastive.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.mcmc.kernels.discrete.gibbs import GibbsKernel

SITE = "x"


class ClosedFormStep:
    """Sets the gradients of a machine to those of contrastive divergence on a batch.

    Args:
        net: the machine.
        loss: its settings and its chains.

    Example:
        >>> x = torch.bernoulli(torch.full((50, 6), 0.3))
        >>> net, loss = RBMModule(6, 4), ContrastiveDivergence(persistent=True)
        >>> ClosedFormStep(net, loss)(x)
        >>> net.weights.grad.shape, loss.chains["x"].shape
        (torch.Size([6, 4]), torch.Size([50, 6]))
    """

    def __init__(self, net: RBMModule, loss: ContrastiveDivergence):
        self.net, self.loss, self.machine = net, loss, net()
        self.parameters = dict(net.named_parameters())

    @classmethod
    def of(cls, net: RBMModule, loss: EnergyLoss) -> "ClosedFormStep | None":
        """The step of a machine; None where it or the loss differs from what is computed here."""
        if type(loss) is not ContrastiveDivergence or not is_as_made(net):
            return None
        kernel = loss.negatives.kernel
        sweeps = kernel is None or type(kernel) is GibbsKernel
        plain = loss.num_particles == 1 and loss.energy_penalty == 0
        return cls(net, loss) if sweeps and plain and loss.monitor.estimate is None else None

    @torch.no_grad()
    def __call__(self, x: Tensor, center_rate: float = 0.0, record: bool = False) -> None:
        """Moves the chains and the offsets, and sets the gradients.

        Args:
            x: data, shape ``(num, n)``.
            center_rate: how fast the offsets of a centered machine move.
            record: whether to compute the loss's diagnostics of this step.
        """
        net, loss, machine = self.net, self.loss, self.machine
        net.refresh(machine)
        units = x.to(machine.weights.dtype)
        p = machine.hidden_logits(units).sigmoid()
        if net.centered:  # p and the machine stay what they are: they do not depend on the offsets
            net.move_offsets(units.mean(0), p.mean(0), center_rate)
        sampler, negatives, more = loss.negatives, x, {}
        if sampler.persistent:
            negatives, more["restarted"] = sampler.start(SITE, machine, len(x), like=x)
        start = negatives
        for _ in range(sampler.num_steps):
            negatives = machine.gibbs_sweep(negatives, machine.gibbs_noise(negatives))
        if sampler.persistent:
            sampler.chains[SITE] = negatives
        negatives = negatives.to(units.dtype)
        q = machine.hidden_logits(negatives).sigmoid()
        grads = net.cd_gradient_of(units, p, negatives, q)
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                parameter.grad = grads[name]
        loss.steps_taken += 1
        if record:
            self._record(units, negatives, {**chain_numbers(units, start, negatives), **more})

    def _record(self, x: Tensor, negatives: Tensor, more: dict[str, Tensor]) -> None:
        machine = self.net()  # which checks its parameters
        data, negatives_energy = (machine.energy(units).mean() for units in (x, negatives))
        warn_if_nan(data - negatives_energy, "loss")
        kernel = self.loss.negatives.kernel or GibbsKernel()
        self.loss.records = {
            SITE: {
                "energy_data": data,
                "energy_negatives": negatives_energy,
                "acceptance_rate": x.new_ones(()),
                "step_size": x.new_tensor(kernel.step_size),
                **more,
            }
        }


def is_as_made(net: RBMModule) -> bool:
    """Whether a machine has no subclass, parametrization or hook that changes what it computes.

    Example:
        >>> is_as_made(RBMModule(6, 4))
        True
        >>> is_as_made(torch.nn.utils.parametrizations.spectral_norm(RBMModule(6, 4), "weights"))
        False
    """
    names = {"weights", "visible_bias", "hidden_bias", "log_scale"}
    return (
        type(net) in (RBMModule, GaussianRBMModule)
        and {*dict(net.named_parameters()), "log_scale"} == names
        and not (net._forward_hooks or net._forward_pre_hooks or net._backward_hooks)
        and not any(p._backward_hooks for p in net.parameters())
    )
