"""The parameters and modules that a captured graph of a potential depends on.

A graph refers to tensors, and sees them change in place. It does not see a parameter or a layer
that is replaced by another one, nor a module that turns from training to evaluation: an
:class:`~pyro_ebm.mcmc.engine.engine.Engine` compares these before it runs one.
"""

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module

from pyro_ebm.internals.pyro_runtime import parameter_identities
from pyro_ebm.mcmc.potentials.base import Potential


class Dependencies:
    """The parameters, buffers and modules that a potential reads, and their modes, as they are now.

    Args:
        potential: whose graph it is.
    """

    def __init__(self, potential: Potential):
        self.potential = potential
        self._look_at(potential.modules)

    def _look_at(self, modules: Iterable[Module]) -> None:
        self.modules = tuple({id(m): m for top in modules for m in top.modules()}.values())
        self._known = {id(module) for module in self.modules}
        self._plain = [  # tensors that are neither parameters nor buffers
            (vars(module), name)
            for module in self.modules
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        ]

    def __call__(self) -> tuple[Hashable, ...]:
        """Equal for two moments if one graph serves both."""
        below = (m for module in self.modules for m in module._modules.values())
        children = [id(m) for m in below if m is not None]
        if not self._known.issuperset(children):  # a layer was replaced
            self._look_at(self.modules)
            part: Any = self.potential
            while part is not None:  # a block of a potential, or one at another temperature
                part.modules = self.modules  # which are held in evaluation mode
                part = getattr(part, "whole", None)
            return self()
        store = parameter_identities()
        own = [
            (id(p), p.dtype, p.device)
            for module in self.modules
            for p in (*module._parameters.values(), *module._buffers.values())
            if p is not None
        ]
        plain = [id(attributes.get(name)) for attributes, name in self._plain]
        modes = [module.training for module in self.modules]
        return (*store, *own, *children, *plain, *modes)
