r"""Deep belief networks: restricted Boltzmann machines on top of one another.

With layers :math:`x = h_0, h_1, \dots, h_L`, the top two are the two layers of a restricted
Boltzmann machine, and each layer below is drawn from the one above it,

.. math:: p(x, h_1, \dots, h_L) = p(x \mid h_1) \cdots p(h_{L-2} \mid h_{L-1})\;
          p_{\mathrm{top}}(h_{L-1}, h_L).

It is built greedily. The machine of layers :math:`(h_0, h_1)` is trained on the data; it says
:math:`p(x) = \sum_{h_1} p(x \mid h_1)\, p(h_1)`. Its :math:`p(x \mid h_1)` is kept, and its
:math:`p(h_1)` is replaced by a machine of layers :math:`(h_1, h_2)`, trained on draws (or means) of
:math:`q(h_1 \mid x)`, the hidden units given the data. And so on. With

.. math:: \log p(x) \ge \mathbb E_{q(h_1 \mid x)}
          \big[\log p(x \mid h_1) + \log p(h_1) - \log q(h_1 \mid x)\big],

which is an equality for a single machine, a better :math:`p(h_1)` raises the bound. Of all
constants, the bound needs only :math:`\log Z` of the top machine.

Reference:
    Hinton, Osindero and Teh (2006), A fast learning algorithm for deep belief nets. Salakhutdinov
    and Murray (2008), On the quantitative analysis of deep belief networks.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pyro
import torch
from torch import Tensor, nn

from pyro_ebm.distributions.boltzmann.rbm import RBM
from pyro_ebm.distributions.boltzmann.rbm_module import GaussianRBMModule, RBMModule
from pyro_ebm.ops.arguments import shown


class DeepBeliefNetwork(nn.Module):
    r"""Restricted Boltzmann machines stacked, the hidden layer of one the visible of the next.

    Train it with :func:`pyro_ebm.losses.fit_layers`, layer by layer.

    Args:
        machines: the machines from the bottom up, as ``[RBMModule(64, 32), RBMModule(32, 16)]``.

    Raises:
        ValueError: if there are none, a hidden layer is not as wide as the visible layer of the
            next machine, or a machine of real visible units stands on another.

    Example:
        >>> network = DeepBeliefNetwork([RBMModule(6, 4), RBMModule(4, 3)])
        >>> network
        DeepBeliefNetwork(6, 4, 3)
        >>> x = network.sample((10,))
        >>> x.shape, network.transform(x).shape
        (torch.Size([10, 6]), torch.Size([10, 3]))
        >>> network.lower_bound(x).shape  # of log p(x), in nats
        torch.Size([10])
    """

    def __init__(self, machines: Iterable[RBMModule]):
        super().__init__()
        if isinstance(machines, Tensor) or not isinstance(machines, Iterable):
            raise ValueError(f"machines must be a list of them, got {shown(machines)}")
        machines = list(machines)
        for machine in machines:
            if not isinstance(machine, RBMModule):
                raise ValueError(
                    f"machines must be modules, such as RBMModule(64, 32), got {shown(machine)}"
                )
        if not machines:
            raise ValueError("machines must hold at least one, such as [RBMModule(64, 32)]")
        for i, (lower, upper) in enumerate(pairwise(machines)):
            hidden, visible = lower.weights.shape[1], upper.weights.shape[0]
            if hidden != visible:
                raise ValueError(
                    f"machine {i} has {hidden} hidden units, and machine {i + 1} on top of it has"
                    f" {visible} visible ones: these are the same layer"
                )
            if isinstance(upper, GaussianRBMModule):
                raise ValueError(
                    f"machine {i + 1} has real visible units, and the hidden units of machine {i}"
                    " below it are bits: use RBMModule above the first"
                )
        self.machines = nn.ModuleList(machines)

    def __len__(self) -> int:
        return len(self.machines)

    def machine(self, index: int) -> RBM:
        """The machine of layers ``index`` and ``index + 1`` at its current parameters."""
        return self.machines[index]()

    @torch.no_grad()
    def transform(self, x: Tensor, num_layers: int | None = None) -> Tensor:
        r"""Features of points: the means of a hidden layer, each layer's from those below.

        Args:
            x: points, shape ``(*batch, n)``.
            num_layers: how far up; to the top by default. 0 gives ``x`` back.

        Returns:
            Probabilities, shape ``(*batch, width of the layer)``.

        Raises:
            ValueError: for more layers than there are.
        """
        for machine in self._below(num_layers):
            x = machine.hidden_given(x).mean
        return x

    @torch.no_grad()
    def propagate(self, x: Tensor, num_layers: int | None = None) -> Tensor:
        r"""A draw of a hidden layer: each layer from :math:`q(h_{l+1} \mid h_l)`.

        Args:
            x: points, shape ``(*batch, n)``.
            num_layers: as in :meth:`transform`.

        Returns:
            Bits, shape ``(*batch, width of the layer)``.
        """
        for machine in self._below(num_layers):
            x = machine.hidden_given(x).sample()
        return x

    @torch.no_grad()
    def sample(
        self, sample_shape: torch.Size | Sequence[int] = (), num_steps: int = 1000
    ) -> Tensor:
        r"""Draws from the top down: Gibbs sweeps of the top machine, then each layer below.

        Args:
            sample_shape: how many points.
            num_steps: Gibbs sweeps of the top machine, from a uniform start; each draw is a chain
                of its own. They follow the density only if that is enough to converge.

        Returns:
            Points, shape ``(*sample_shape, n)``.
        """
        top = self.machine(-1)
        top.num_steps = num_steps
        x = top.sample(torch.Size(sample_shape))
        for index in reversed(range(len(self) - 1)):
            x = self.machine(index).visible_given(x).sample()
        return x

    @torch.no_grad()
    def lower_bound(
        self, x: Tensor, log_normalizer: Tensor | float | None = None, num_samples: int = 100
    ) -> Tensor:
        r"""An unbiased estimate of a lower bound on :math:`\log p(x)`, in nats.

        .. math:: \mathbb E_q \Big[ \sum_{l=1}^{L-1} \log p(h_{l-1} \mid h_l)
                  - \log q(h_l \mid h_{l-1}) \Big] + \mathbb E_q[\log p_{\mathrm{top}}(h_{L-1})]

        For a network of one machine it is :math:`\log p(x)` itself.

        Args:
            x: points, shape ``(*batch, n)``.
            log_normalizer: :math:`\log Z` of the top machine; by enumeration if None.
            num_samples: draws of the hidden layers for each point.

        Returns:
            Shape ``(*batch,)``.

        Raises:
            ValueError: if the top machine is too large to be enumerated, or points are not of the
                visible units.
        """
        top, bottom = self.machine(-1), self.machine(0)
        x = bottom.visible_units(x)
        bottom.check_values(x)
        if log_normalizer is None:
            log_normalizer = top.exact_log_normalizer()
        below, total = x.expand((num_samples, *x.shape)), torch.zeros(())
        for index in range(len(self) - 1):
            machine = self.machine(index)
            q = machine.hidden_given(below)
            above = q.sample()
            total = total + machine.visible_given(above).log_prob(below) - q.log_prob(above)
            below = above
        total = total - top.free_energy(below) - log_normalizer
        return total.mean(0)

    # -- as a Pyro program ---------------------------------------------------------------------

    def model(
        self,
        x: Tensor | None = None,
        num: int = 1,
        log_normalizer: Tensor | float | None = None,
    ) -> Tensor:
        r"""The network as a Pyro model, with sites ``"h1"``, ``"h2"``, ..., and ``"x"``.

        The top machine's own hidden layer is summed out. With :meth:`guide`, ``Trace_ELBO`` gives
        minus the sum over points of :meth:`lower_bound`, if the top's :math:`\log Z` is given.

        Args:
            x: data, shape ``(num, n)``, to observe at ``"x"``.
            num: how many points where there are no data.
            log_normalizer: :math:`\log Z` of the top machine, where it is known.
        """
        num = num if x is None else len(x)
        with pyro.plate("data", num):
            fn = self.machine(-1)
            if log_normalizer is not None:
                fn = fn.normalized(log_normalizer)
            for index in range(len(self) - 1, 0, -1):
                fn = self.machine(index - 1).visible_given(pyro.sample(f"h{index}", fn))
            return pyro.sample("x", fn, obs=x)

    def guide(self, x: Tensor, num: int = 1, log_normalizer: Tensor | float | None = None) -> None:
        """The hidden layers given the data, from the bottom up, as a Pyro guide."""
        with pyro.plate("data", len(x)):
            for index in range(len(self) - 1):
                x = pyro.sample(f"h{index + 1}", self.machine(index).hidden_given(x))

    def _below(self, num_layers: int | None) -> list[RBM]:
        num_layers = len(self) if num_layers is None else num_layers
        if not 0 <= num_layers <= len(self):
            raise ValueError(f"num_layers must lie in 0..{len(self)}, got {num_layers}")
        return [self.machine(index) for index in range(num_layers)]

    def __repr__(self) -> str:
        machines = [self.machine(index) for index in range(len(self))]
        widths = [*(machine.num_visible for machine in machines), machines[-1].num_hidden]
        return f"DeepBeliefNetwork({', '.join(map(str, widths))})"
